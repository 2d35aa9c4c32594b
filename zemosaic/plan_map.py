"""A picture of the coverage that a `zemosaic.plan.Plan` foresees."""

from __future__ import annotations

import io
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from zemosaic.events import render
from zemosaic.plan_output import canvas_facts

if TYPE_CHECKING:
    from astropy.wcs import WCS

    from zemosaic.plan import Plan

_DPI = 120
_LONG_SIDE = 11.0  # inches of the picture
_LABELLED = 150  # more panels than this get no numbers: nobody could read them
_PAPER, _INK, _FAINT, _ALARM = "#10141b", "#e6e9ef", "#8b95a7", "#ff5d5d"


def coverage_png(plan: Plan, language: str = "en") -> bytes:
    """The coverage map as a PNG: depth in frames, sky grid, panels with their numbers, weak links in red."""
    from astropy.visualization.wcsaxes import WCSAxes
    from matplotlib.figure import Figure

    ny, nx = plan.coverage.shape
    factor = _LONG_SIDE / max(nx, ny)
    width, height = max(4.5, nx * factor), max(3.5, ny * factor)
    figure = Figure(figsize=(width + 1.9, height + 1.4), dpi=_DPI, facecolor=_PAPER)
    place = (1.0 / (width + 1.9), 0.7 / (height + 1.4), width / (width + 1.9), height / (height + 1.4))
    axes = WCSAxes(figure, place, wcs=_map_wcs(plan))
    figure.add_axes(axes)
    depth = np.where(plan.coverage > 0, plan.coverage, np.nan)
    shown = axes.imshow(depth, origin="lower", cmap="viridis", vmin=0, interpolation="nearest")
    _sky_grid(axes)
    _draw_panels(axes, plan)
    bar = figure.colorbar(shown, ax=axes, fraction=0.035, pad=0.02)
    bar.set_label(render("plan_map_frames", {}, language), color=_INK)
    bar.ax.tick_params(colors=_INK)
    bar.outline.set_visible(False)
    title = {"frames": len(plan.layout.frames), "name": _object(plan), **canvas_facts(plan.layout.canvas)}
    axes.set_title(render("plan_map_title", title, language), color=_INK, fontsize=13, pad=12)
    if plan.graph.weak:
        axes.legend(
            handles=[_legend_line(render("plan_map_weak", {"n": len(plan.graph.weak)}, language))],
            loc="upper left",
            facecolor=_PAPER,
            edgecolor=_FAINT,
            labelcolor=_INK,
        )
    stream = io.BytesIO()
    figure.savefig(stream, format="png", facecolor=_PAPER, bbox_inches="tight", pad_inches=0.25)
    return stream.getvalue()


def _map_wcs(plan: Plan) -> WCS:
    """The WCS of the cells of the coverage map."""
    wcs = plan.layout.canvas.wcs.deepcopy()
    wcs.wcs.crpix = (wcs.wcs.crpix - 0.5) / plan.cell + 0.5
    wcs.wcs.cd = wcs.pixel_scale_matrix * plan.cell
    wcs.pixel_shape = plan.coverage.shape[::-1]
    wcs.wcs.set()
    return wcs


def _sky_grid(axes: Any) -> None:
    axes.coords.grid(color=_FAINT, alpha=0.35, linestyle="-", linewidth=0.6)
    axes.coords.frame.set_color(_FAINT)
    axes.set_facecolor(_PAPER)
    for coordinate, name in zip(axes.coords, ("RA (J2000)", "Dec (J2000)"), strict=True):
        coordinate.set_axislabel(name, color=_INK)
        coordinate.set_ticklabel(color=_INK, exclude_overlapping=True)
        coordinate.set_ticks(color=_FAINT)


def _draw_panels(axes: Any, plan: Plan) -> None:
    """Outline and number of every panel, and a line for every weak link."""
    corners = (plan.layout.corners + 0.5) / plan.cell - 0.5
    centres = corners.mean(axis=1)
    middles = np.array([centres[list(panel)].mean(axis=0) for panel in plan.graph.panels])
    for weak in plan.graph.weak:
        for panel, _, _ in weak.on:
            near = list(weak.panels)
            own = near[int(np.argmin(np.linalg.norm(middles[near] - middles[panel], axis=1)))]
            axes.plot(*middles[[own, panel]].T, color=_ALARM, linewidth=2.2, solid_capstyle="round")
    if len(middles) > _LABELLED:
        return
    box = {"boxstyle": "round,pad=0.25", "facecolor": _PAPER, "alpha": 0.75, "edgecolor": "none"}
    for number, (members, middle) in enumerate(zip(plan.graph.panels, middles, strict=True), start=1):
        typical = members[int(np.argmin(np.linalg.norm(centres[list(members)] - middle, axis=1)))]
        axes.plot(*corners[typical][[0, 1, 2, 3, 0]].T, color=_INK, linewidth=0.8, alpha=0.55)
        axes.text(*middle, str(number), color=_INK, ha="center", va="center", fontsize=10, bbox=box)


def _legend_line(text: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=_ALARM, linewidth=2.2, label=text)


def _object(plan: Plan) -> str:
    names = Counter(frame.object for frame in plan.layout.frames if frame.object)
    return max(names, key=lambda name: names[name], default="")
