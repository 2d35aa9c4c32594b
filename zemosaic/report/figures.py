"""The plots of the report as SVG that takes its colours from the page, so that it suits a light and a dark one.

Text and lines are drawn in stand-in colours, which become CSS variables in the end; matplotlib's object interface is
used, without pyplot and its global state, so that a run may be a thread of a larger program.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from zemosaic.ledger import FrameRecord
from zemosaic.report.defects import Hole, Trail
from zemosaic.report.faults import LotLine
from zemosaic.report.seams import Seam
from zemosaic.report.story import Story
from zemosaic.report.verdict import Map
from zemosaic.report.words import Words

# Stand-ins that nothing else is drawn in, and what they become.
INK, MUTED, LINE = "#0a0b0c", "#0b0c0d", "#0c0d0e"
BLUE, AMBER, RED = "#0d0e0f", "#0e0f10", "#0f1011"
_COLOURS = {INK: "ink", MUTED: "muted", LINE: "line", BLUE: "blue", AMBER: "amber", RED: "red"}

#: Middle tones that are seen on white and on black alike.
LOT_COLOURS = ("#4c8dd6", "#e08a3c", "#4aa873", "#d2607a", "#9a78cf", "#b9922f", "#3fa6ad", "#a4745c")

_WIDTH, _WIDE = 4.6, 5.2  # inches
_TALLEST = 5.5
_LEFT = 0.46  # inches that the labels of an axis take
_TEXT = 8.5  # points
_NIGHT, _PAUSE = 18 * 60, 7 * 60  # minutes: frames of one night; between two nights
_MOST_ARROWS = 500
_MOST_LABELS = 40
_MOST_MARKERS = 1500  # drawn one by one; beyond that as a picture

_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": _TEXT,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.unicode_minus": True,
}

#: Zero is a grey that is neither of both pages.
DIVERGING = LinearSegmentedColormap.from_list("levels", ["#2166c4", "#7fb0e6", "#b9bcc0", "#ef9a6b", "#c33a26"])


def plot(name: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """SVG of a figure; `name` keeps its identifiers apart from those of the page's other figures."""
    with rc_context(_RC | {"svg.hashsalt": name}):
        figure = Figure(figsize=size)
        draw(figure)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return _for_page(stream.getvalue())


def _for_page(svg: str) -> str:
    """Without prologue, group names and size; colours by name."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for stand_in, name in _COLOURS.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    return svg


def map_figure(
    name: str,
    each: Map,
    shape: tuple[int, int],
    *,
    limits: tuple[float, float] | None = None,
    colours: str | Colormap = "viridis",
    extra: Callable[[Axes], None] | None = None,
) -> str:
    """A map over the mosaic with a colour bar.

    Parameters
    ----------
    name : str
        See `plot`.
    each : Map
    shape : tuple of int
        ``(ny, nx)`` of the mosaic: what of the map's cells reaches beyond it is cut off.
    limits : tuple of float, optional
        Of the colours; the 1st and 99th percentile if left out.
    colours : str or Colormap
        `DIVERGING` for what is as good below zero as above.
    extra : callable
        Draws on the axes, which are in mosaic pixels.
    """
    rows, columns = each.values.shape
    width, height = columns * each.width, rows * each.height
    low, high = limits or np.nanpercentile(each.values, (1, 99))

    inner = _inner(shape)

    def draw(figure: Figure) -> None:
        axes = _axes(figure, _LEFT, 0.78, *inner)
        image = axes.imshow(
            each.values,
            cmap=colours,
            vmin=low,
            vmax=high,
            origin="lower",
            extent=(-0.5, width - 0.5, -0.5, height - 0.5),
            interpolation="none",
        )
        if extra:
            extra(axes)
        _map_axes(axes, shape)
        bar = figure.colorbar(image, cax=_axes(figure, _LEFT, 0.27, inner[0], 0.09), orientation="horizontal")
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=2, labelsize=_TEXT - 0.5)
        bar.locator = MaxNLocator(6)
        bar.update_ticks()

    return plot(name, (_WIDTH, inner[1] + 0.84), draw)


def mark_seams(seams: Sequence[Seam]) -> Callable[[Axes], None]:
    """Draws the numbers of the worst seams on a map."""

    def draw(axes: Axes) -> None:
        for number, seam in enumerate(seams, start=1):
            axes.plot(seam.x, seam.y, "o", ms=10, mfc="#000000a0", mec="#ffffff", mew=0.8)
            axes.text(seam.x, seam.y, str(number), color="#ffffff", ha="center", va="center_baseline", size=_TEXT - 1.5)

    return draw


def mark_defects(trails: Sequence[Trail], holes: Sequence[Hole]) -> Callable[[Axes], None]:
    """Draws trails and holes on a map."""

    def draw(axes: Axes) -> None:
        for trail in trails:
            axes.plot([trail.x0, trail.x1], [trail.y0, trail.y1], color="#ff5d5d", lw=1.4)
        for hole in holes:
            axes.plot(hole.x, hole.y, "o", ms=7, mfc="none", mec="#ff5d5d", mew=1.1)

    return draw


def vector_figure(
    name: str, vectors: NDArray[np.float64], lots: NDArray[np.int64], shape: tuple[int, int], scale: float, say: Words
) -> str:
    """Arrows of the median residual of every frame (or of catalogue stars), at most `_MOST_ARROWS` of them.

    Parameters
    ----------
    name : str
        See `plot`.
    vectors : ndarray
        ``(n, 4)`` x, y, dx, dy, mosaic pixels.
    lots : ndarray
        ``(n,)`` that give the colours.
    shape : tuple of int
        ``(ny, nx)`` of the mosaic.
    scale : float
        arcsec per pixel.
    say : callable
        Texts of the page.
    """
    there = np.flatnonzero(np.isfinite(vectors).all(axis=1))
    there = there[:: max(1, -(-len(there) // _MOST_ARROWS))]
    x, y, dx, dy = vectors[there].T
    typical = float(np.percentile(np.hypot(dx, dy), 90)) if len(there) else 0.1
    key = _round_number(max(typical, 1e-3))

    inner = _inner(shape)

    def draw(figure: Figure) -> None:
        axes = _axes(figure, _LEFT, 0.4, *inner)
        _map_axes(axes, shape)
        arrows = axes.quiver(
            x,
            y,
            dx,
            dy,
            color=[LOT_COLOURS[i % len(LOT_COLOURS)] for i in lots[there]],
            angles="xy",
            scale=typical / 0.09,
            scale_units="width",
            width=0.004,
        )
        text = say("plot_arrow", px=say.short(key)) + (
            f" = {say.number(key * scale, 2)}″" if np.isfinite(scale) else ""
        )
        axes.quiverkey(arrows, 0.09, 0.06, key, text, labelpos="E", color=INK, labelcolor=INK)

    return plot(name, (_WIDTH, inner[1] + 0.46), draw)


def offsets_figure(
    name: str, lots: Sequence[LotLine], axis: str, limits: tuple[float, float], unit: str, label: str
) -> str:
    """How far every lot is off, with errors, between the thresholds; `axis` is "gain" or "sky" of the lots' lines.

    `limits` are warning and fault in `unit`, that of the lines; `label` is of the axis of the lots.
    """
    place = np.array([line.lot + 1 for line in lots], float)
    value = np.array([getattr(line, axis) for line in lots])
    error = np.array([getattr(line, f"{axis}_error") for line in lots])

    def draw(figure: Figure) -> None:
        axes = _axes(figure, _LEFT + 0.12, 0.42, _WIDTH - _LEFT - 0.2, 1.22)
        for limit, colour in zip(limits, (AMBER, RED), strict=True):
            for side in (-limit, limit):
                axes.axhline(side, color=colour, lw=0.8, ls="--")
        axes.axhline(0, color=LINE, lw=0.7)
        axes.errorbar(place, value, np.nan_to_num(error), fmt="o", ms=3.5, lw=1, color=BLUE)
        _plain_axes(axes)
        reach = max(1.3 * limits[0], 1.15 * float(np.nanmax(np.abs(value) + np.nan_to_num(error), initial=0)))
        axes.set(ylim=(-reach, reach), xlim=(place.min() - 0.7, place.max() + 0.7), ylabel=unit, xlabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))

    return plot(name, (_WIDTH, 1.7), draw)


def footprint_figure(lots: Sequence[LotLine], story: Story, say: Words) -> str:
    """Outlines of the lots on the sky, in degrees from the middle of the mosaic, and where north and east are."""
    ny, nx = story.shape
    degrees = story.scale / 3600

    width = _WIDE - 0.75
    height = min(_TALLEST, 1.08 * width * ny / nx)

    def draw(figure: Figure) -> None:
        axes = _axes(figure, 0.65, 0.45, width, height)
        for line in lots:
            colour = LOT_COLOURS[line.lot % len(LOT_COLOURS)]
            points = (line.outline - [(nx - 1) / 2, (ny - 1) / 2]) * degrees
            axes.add_patch(Polygon(points, closed=True, fc=colour, ec="none", alpha=0.14))
            axes.add_patch(Polygon(points, closed=True, fc="none", ec=colour, lw=1.1))
        # Lots that lie on one another would write their numbers there too: side by side instead.
        for (x, y), numbers in _gathered(lots[:_MOST_LABELS], 0.06 * nx).items():
            shown = ", ".join(map(str, numbers[:8])) + (" …" if len(numbers) > 8 else "")
            place = (x - (nx - 1) / 2) * degrees, (y - (ny - 1) / 2) * degrees
            axes.text(*place, shown, ha="center", va="center", size=_TEXT, weight="bold")
        axes.autoscale_view()
        axes.set_aspect("equal")
        axes.margins(0.02)
        _plain_axes(axes, "both")
        axes.set(xlabel=say("plot_degrees_x"), ylabel=say("plot_degrees_y"))
        _compass(axes, story, say)

    return plot("footprint", (_WIDE, height + 0.6), draw)


def _gathered(lots: Sequence[LotLine], reach: float) -> dict[tuple[float, float], list[int]]:
    """Numbers of the lots whose middles lie within `reach` of each other, by place."""
    found: dict[tuple[float, float], list[int]] = {}
    for line in lots:
        x, y = (float(v) for v in (line.outline.min(axis=0) + line.outline.max(axis=0)) / 2)
        near = next((place for place in found if np.hypot(place[0] - x, place[1] - y) < reach), (x, y))
        found.setdefault(near, []).append(line.lot + 1)
    return found


def _compass(axes: Axes, story: Story, say: Words) -> None:
    """Arrows to north and east in the upper right corner."""
    assert story.sky is not None
    for (x, y), name in ((story.sky.north, say("plot_north")), (story.sky.east, say("plot_east"))):
        axes.annotate(
            name,
            (0.95, 0.84),
            xytext=(22 * x, 22 * y),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            va="center",
            size=_TEXT,
            arrowprops={"arrowstyle": "<-", "color": INK, "lw": 0.9, "shrinkA": 5, "shrinkB": 0},
        )


def frames_figure(records: Sequence[FrameRecord], say: Words) -> str:
    """FWHM, sky and gain of all measured frames over time, with their histograms; "" if none was measured."""
    measured = [r for r in records if np.isfinite(r.fwhm) or np.isfinite(r.sky)]
    if not measured:
        return ""
    when, nights = _time_axis(measured)
    rows = {
        "plot_fwhm": [r.fwhm for r in measured],
        "plot_sky": [r.sky for r in measured],
        "plot_gain": [float(np.mean(r.gain)) if r.gain else np.nan for r in measured],
    }
    colours = {"used": BLUE, "partial": AMBER, "rejected": RED}
    status = np.array([r.status for r in measured])

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(
            len(rows), 2, width_ratios=(4, 1), wspace=0.05, hspace=0.12, left=0.13, right=0.99, bottom=0.1, top=0.99
        )
        for i, (key, values) in enumerate(rows.items()):
            axes = figure.add_subplot(grid[i, 0])
            side = figure.add_subplot(grid[i, 1], sharey=axes)
            value = np.array(values, float)
            for name, colour in colours.items():
                some = (status == name) & np.isfinite(value)
                marker = "x" if name == "rejected" else "o"
                many = len(measured) > _MOST_MARKERS
                axes.plot(when[some], value[some], marker, ms=2.6, color=colour, mew=0.8, ls="", rasterized=many)
            known = value[np.isfinite(value)]
            if len(known):
                # Numbers that differ only by rounding leave no room for several bins.
                bins = min(40, 5 + int(np.sqrt(len(known)))) if np.ptp(known) > 1e-6 * np.abs(known).max() else 1
                side.hist(known, bins=bins, orientation="horizontal", color=BLUE)
            for edge in nights:
                axes.axvline(edge, color=LINE, lw=0.7)
            _plain_axes(axes)
            axes.set_ylabel(say(key))
            axes.tick_params(labelbottom=i == len(rows) - 1)
            side.axis("off")
            axes.yaxis.set_major_locator(MaxNLocator(4))
        if when.dtype.kind == "f":
            axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 1.5, 2, 3, 6, 10], integer=True))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda m, _: f"{int(m) // 60 % 24:02d}:{int(m) % 60:02d}"))
            axes.set_xlabel(say("plot_clock"))
        else:
            axes.set_xlabel(say("plot_number"))

    return plot("frames", (_WIDE, 4.2), draw)


def _time_axis(records: Sequence[FrameRecord]) -> tuple[NDArray[Any], list[float]]:
    """Place of every frame: its date, if all lie within a day, else its number in order of time; where nights begin."""
    times = [_moment(r.date_obs) for r in records]
    known = np.array([t for t in times if t is not None])
    if len(known) == len(times) and np.ptp(known) < _NIGHT:
        return known, []
    order = np.array([np.inf if t is None else t for t in times])
    place = np.empty(len(records), np.int64)
    place[np.argsort(order, kind="stable")] = np.arange(1, len(records) + 1)
    sorted_times = np.sort(order)
    gaps = np.flatnonzero(np.diff(sorted_times[np.isfinite(sorted_times)]) > _PAUSE)
    return place, [float(g) + 1.5 for g in gaps]


def _moment(date: str) -> float | None:
    """A FITS date as minutes since midnight of day 0."""
    try:
        # Python 3.10 reads fractions of 3 or 6 digits only, and no Z.
        whole, _, fraction = date.strip().rstrip("Z").partition(".")
        moment = datetime.fromisoformat(f"{whole}.{fraction:0<6.6}" if fraction else whole)
    except ValueError:
        return None
    return (
        moment.toordinal() * 1440 + (moment - datetime.combine(moment.date(), datetime.min.time())).total_seconds() / 60
    )


def _inner(shape: tuple[int, int]) -> tuple[float, float]:
    """Width and height that the picture of a mosaic takes in a figure, inches."""
    width = _WIDTH - _LEFT - 0.08
    height = width * shape[0] / shape[1]
    return (width, height) if height <= _TALLEST else (_TALLEST * shape[1] / shape[0], _TALLEST)


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches: that takes half the time of a layout that looks for room."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, bottom / h, width / w, height / h))


def _map_axes(axes: Axes, shape: tuple[int, int]) -> None:
    axes.set(xlim=(-0.5, shape[1] - 0.5), ylim=(-0.5, shape[0] - 0.5), aspect="equal")
    axes.set_xlabel("px", size=_TEXT - 1, labelpad=1)
    axes.tick_params(length=2, labelsize=_TEXT - 1)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(4))


def _plain_axes(axes: Axes, grid: str = "y") -> None:
    axes.grid(axis=grid, color=LINE, lw=0.5)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _round_number(value: float) -> float:
    """1, 2 or 5 times a power of ten that is nearest below."""
    power = 10 ** np.floor(np.log10(value))
    return float(next((step for step in (5, 2, 1) if step * power <= value), 1) * power)
