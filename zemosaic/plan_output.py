"""A `zemosaic.plan.Plan` for its readers: sentences, JSON, and a file of lots."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from zemosaic import __version__
from zemosaic.canvas import Canvas
from zemosaic.events import render

if TYPE_CHECKING:
    from zemosaic.forecast import Estimate, Forecast
    from zemosaic.overlaps import WeakLink
    from zemosaic.plan import LeftOut, Plan

#: Version of the layout of `plan_json`; a new number where a reader of the old one would go wrong.
SCHEMA_VERSION = 1

_EXAMPLES = 3  # names that stand for many
_SHOWN_REASONS = 8
_SHOWN_LINKS = 12
_GB = 2**30


# --- JSON ---------------------------------------------------------------------------------------------------


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, units in the names; panels and lots are counted from 1, as in the sentences."""
    return {
        "schema": "zemosaic-plan",
        "schema_version": SCHEMA_VERSION,
        "software": f"ZeMosaic {__version__}",
        "plan_seconds": plan.seconds,
        "files": {"found": plan.files, "used": len(plan.layout.frames), "left_out": len(plan.left_out)},
        "run_solves_frames_without_wcs": plan.solver,
        "problems": list(plan.problems),
        "canvas": canvas_facts(plan.layout.canvas),
        "coverage": _coverage_json(plan),
        "panels": _panels_json(plan),
        "links": [
            {
                "panels": [link.a + 1, link.b + 1],
                "frames": [link.frames_a, link.frames_b],
                "overlap_frame_areas": link.area,
            }
            for link in plan.graph.links
        ],
        "islands": [[panel + 1 for panel in island] for island in plan.graph.islands],
        "weak_links": [_weak_json(weak) for weak in plan.graph.weak],
        "left_out": [_left_out_json(item) for item in plan.left_out],
        "mixed": {fact: dict(values) for fact, values in plan.mixed.items()},
        "lots": [{"number": k, "frames": len(lot), "paths": lot} for k, lot in enumerate(lot_paths(plan), start=1)],
        "forecast": _forecast_json(plan.forecast) if plan.forecast else None,
    }


def canvas_facts(canvas: Canvas) -> dict[str, Any]:
    """Size, scale and place of the canvas, units in the names."""
    ny, nx = canvas.shape
    ra, dec = canvas.wcs.wcs_pix2world((nx - 1) / 2, (ny - 1) / 2, 0)
    return {
        "width_px": nx,
        "height_px": ny,
        "scale_arcsec_per_px": canvas.scale,
        "width_deg": nx * canvas.scale / 3600,
        "height_deg": ny * canvas.scale / 3600,
        "centre_ra_deg": float(ra),
        "centre_dec_deg": float(dec),
        "north_from_y_axis_deg": canvas_rotation(canvas),
    }


def canvas_rotation(canvas: Canvas) -> float:
    """Direction of north at the tangent point, degrees from the y axis towards the x axis."""
    matrix = canvas.wcs.pixel_scale_matrix
    return float(np.rad2deg(np.arctan2(matrix[1, 0], matrix[1, 1])))


def _coverage_json(plan: Plan) -> dict[str, Any]:
    covered = plan.coverage[plan.coverage > 0]
    cell_deg2 = (plan.cell * plan.layout.canvas.scale / 3600) ** 2
    exposures = [frame.exposure for frame in plan.layout.frames if frame.exposure is not None]
    return {
        "cell_px": plan.cell,
        "covered_deg2": float(covered.size * cell_deg2),
        "median_frames": float(np.median(covered)),
        "most_frames": int(covered.max()),
        "total_exposure_s": float(np.sum(exposures)) if exposures else None,
    }


def _panels_json(plan: Plan) -> list[dict[str, Any]]:
    middles = plan.layout.corners.mean(axis=1)
    listed = []
    for number, panel in enumerate(plan.graph.panels, start=1):
        x, y = middles[list(panel)].mean(axis=0)
        ra, dec = plan.layout.canvas.wcs.wcs_pix2world(x, y, 0)
        listed.append({"number": number, "frames": len(panel), "ra_deg": float(ra), "dec_deg": float(dec)})
    return listed


def _weak_json(weak: WeakLink) -> dict[str, Any]:
    return {
        "panels": [panel + 1 for panel in weak.panels],
        "frames": weak.frames,
        "hangs_on": [{"panel": panel + 1, "frames": n, "of_frames": of} for panel, n, of in weak.on],
        "overlap_frame_areas": weak.area,
        "sentence": weak_sentence(weak, "en"),
    }


def _left_out_json(item: LeftOut) -> dict[str, Any]:
    return {
        "path": str(item.path),
        "reason": item.reason,
        "lacks_wcs": item.lacks_wcs,
        "hint_ra_deg": item.ra,
        "hint_dec_deg": item.dec,
        "hint_panel": None if item.panel is None else item.panel + 1,
    }


def _forecast_json(made: Forecast) -> dict[str, Any]:
    return {
        "route": made.route,
        "workers": made.workers,
        "memory_bytes": asdict(made.memory),
        "disk_bytes": asdict(made.disk),
        "scratch_bytes": made.scratch,
        "cpu_seconds": asdict(made.cpu),
        "wall_seconds": asdict(made.wall),
        "phases": [
            {"phase": p.phase, "cpu_seconds": p.cpu, "wall_seconds": p.wall, "memory_bytes": p.memory}
            for p in made.phases
        ],
    }


# --- lots ---------------------------------------------------------------------------------------------------


def lot_paths(plan: Plan) -> list[list[str]]:
    """Absolute paths of the frames of every lot."""
    frames = plan.layout.frames
    return [[os.path.abspath(frames[i].path) for i in lot] for lot in plan.layout.lots]


def lots_text(plan: Plan, suffix: str) -> str:
    """The lots as `zemosaic.lots.read_lots` reads them, JSON or TOML as `suffix` (``.json``, ``.toml``) says.

    Raises
    ------
    ValueError
        For any other ending.
    """
    document = {"lots": lot_paths(plan)}
    if suffix.lower() == ".json":
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    if suffix.lower() == ".toml":
        import tomlkit

        return tomlkit.dumps(document)
    raise ValueError("a file of lots must end in .toml or .json")


# --- sentences ----------------------------------------------------------------------------------------------


def plan_lines(plan: Plan, language: str = "en") -> Iterator[str]:
    """The plan in sentences, one a line."""

    def say(key: str, **values: Any) -> str:
        return render(f"plan_{key}", values, language)

    yield say("files", files=plan.files, used=len(plan.layout.frames), left_out=len(plan.left_out))
    yield from _left_out_lines(plan.left_out, plan.solver, say)
    canvas, coverage = canvas_facts(plan.layout.canvas), _coverage_json(plan)
    yield say("canvas", **{name.replace("_per_", "_"): value for name, value in canvas.items()})
    yield say("coverage", **{**coverage, "total_exposure_s": duration(coverage["total_exposure_s"] or 0)})
    yield say("panels", panels=len(plan.graph.panels), links=len(plan.graph.links))
    for island in plan.graph.islands[1:]:
        yield say("island", panels=_panel_names(island, language))
    for weak in plan.graph.weak[:_SHOWN_LINKS]:
        yield say("weak", sentence=weak_sentence(weak, language))
    if len(plan.graph.weak) > _SHOWN_LINKS:
        yield say("weak_more", n=len(plan.graph.weak) - _SHOWN_LINKS)
    for fact, values in plan.mixed.items():
        shown = ", ".join(f"{value} ({n})" for value, n in list(values.items())[:_SHOWN_REASONS])
        yield say("mixed", fact=say(f"fact_{fact}"), values=shown)
    sizes = [len(lot) for lot in plan.layout.lots]
    yield say("lots", lots=len(sizes), least=min(sizes), most=max(sizes))
    if plan.forecast:
        yield from _forecast_lines(plan.forecast, say)
    for problem in plan.problems:
        yield say("problem", problem=problem)


def _left_out_lines(left_out: Sequence[LeftOut], solver: bool, say: Any) -> Iterator[str]:
    reasons = Counter(item.reason for item in left_out if not item.lacks_wcs)
    for reason, n in reasons.most_common(_SHOWN_REASONS):
        yield say("left_out", n=n, reason=reason, examples=_names([i for i in left_out if i.reason == reason]))
    unsolved = [item for item in left_out if item.lacks_wcs]
    if unsolved:
        hinted = [item for item in unsolved if item.ra is not None]
        yield say("no_wcs", n=len(unsolved), hinted=len(hinted), examples=_names(unsolved))
        near = sorted(Counter(item.panel for item in hinted if item.panel is not None).items())
        if solver:
            yield say("solver")
        if near:
            yield say("no_wcs_panels", panels=", ".join(f"{panel + 1} ({n})" for panel, n in near))


def _names(items: Sequence[LeftOut]) -> str:
    names = ", ".join(item.path.name for item in items[:_EXAMPLES])
    return names + ", …" if len(items) > _EXAMPLES else names


def _forecast_lines(made: Forecast, say: Any) -> Iterator[str]:
    def span(estimate: Estimate) -> dict[str, str]:
        return {name: duration(value) for name, value in asdict(estimate).items()}

    def size(estimate: Estimate) -> dict[str, float]:
        return {name: value / _GB for name, value in asdict(estimate).items()}

    yield say("time", route=made.route, workers=made.workers, cpu=duration(made.cpu.value), **span(made.wall))
    yield say("memory", **size(made.memory))
    yield say("disk", scratch=made.scratch / _GB, **size(made.disk))


def weak_sentence(weak: WeakLink, language: str) -> str:
    """“panel 7 hangs on 12 of 40 frames of panel 3”, without a full stop."""
    on = ", ".join(
        render("plan_hangs_on", {"n": n, "of": of, "panel": panel + 1}, language) for panel, n, of in weak.on
    )
    key = "plan_hangs" if len(weak.panels) == 1 else "plan_hang"
    values = {"panels": _panel_names(weak.panels, language), "frames": weak.frames, "on": on, "area": 100 * weak.area}
    return render(key, values, language)


def _panel_names(panels: Sequence[int], language: str) -> str:
    key = "plan_panel" if len(panels) == 1 else "plan_panel_list"
    shown = [str(panel + 1) for panel in panels[:_SHOWN_LINKS]] + ["…"] * (len(panels) > _SHOWN_LINKS)
    return render(key, {"panels": ", ".join(shown)}, language)


def duration(seconds: float) -> str:
    """A time in two units at most: 2 h 05 min, 3 min 20 s, 12 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours:
        return f"{hours} h {m:02d} min"
    return f"{minutes} min {s:02d} s" if minutes else f"{s} s"
