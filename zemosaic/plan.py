"""A run before it is made, from the headers alone: canvas, coverage, lots, what the field hangs on, and what it costs.

`make_plan` looks at the frames as a run would and ends where a run would begin to read pixels; only the probe behind
the forecast reads a few. `zemosaic.plan_output` turns a `Plan` into words, JSON, a picture and a file of lots.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

import zemosaic_worker as worker
from zemosaic import intake as steps
from zemosaic import misfits
from zemosaic.canvas import CanvasError
from zemosaic.cluster import cluster_frames
from zemosaic.events import Events
from zemosaic.execute import memory_budget, worker_count
from zemosaic.forecast import Forecast, forecast
from zemosaic.frames import Frame, FrameError
from zemosaic.intake import Intake
from zemosaic.layout import Layout, lay_out, sizes_of
from zemosaic.overlaps import OverlapGraph, overlap_graph, quad_mask
from zemosaic.plan_map import coverage_png
from zemosaic.plan_output import lots_text, plan_json, plan_lines
from zemosaic.probe import Cost, run_probe
from zemosaic.room import check_tile_room
from zemosaic.settings import Settings
from zemosaic.sphere import separation, to_vectors

__all__ = [
    "LeftOut",
    "Plan",
    "PlanError",
    "coverage_png",
    "make_plan",
    "plan_json",
    "plan_lines",
    "process_cost",
    "save_plan",
]

_MAP_CELLS = 1000  # cells along the longer side of the coverage map
_PANEL_RADIUS = 0.25  # of a frame's shorter side: frames that point as close together are one panel
_MANY_PANELS = 300  # beyond, panels twice as wide say as much
_HINT_REACH = 0.75  # of a frame's diagonal: a header's pointing of date may be 17' off
_COMPARED = 4096  # bytes at the end of two files that decide whether they are the same


class PlanError(Exception):
    """No plan can be made or written; the message says why and what to do."""


@dataclass(frozen=True)
class LeftOut:
    """A file that takes no part.

    Parameters
    ----------
    path : Path
    reason : str
        Why, as a run would say it.
    lacks_wcs : bool
        Whether a plate solution would let it in.
    ra, dec : float or None
        Where its header says the mount pointed, degrees; a hint, up to a quarter degree off.
    panel : int or None
        Panel that the hint lies in.
    """

    path: Path
    reason: str
    lacks_wcs: bool = False
    ra: float | None = None
    dec: float | None = None
    panel: int | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """What a run will find and make. Picklable.

    Parameters
    ----------
    files : int
        Files that were found.
    solver : bool
        Whether a run would try to solve the frames that lack a WCS; the plan is without them.
    layout : Layout
        Frames that take part, in order of time, their canvas, corners and lots.
    left_out : tuple of LeftOut
        All others.
    coverage : ndarray
        ``(h, w)`` uint16 frames over each cell of the coverage map; its first row is the lowest of the canvas.
    cell : float
        Side of a cell of the map, canvas pixels.
    graph : OverlapGraph
        Panels and how they overlap.
    mixed : mapping
        Fact of the header (``filter``, ``exposure_s``, …) → value → frames, for facts that differ.
    forecast : Forecast or None
        What the run will cost; None without a probe.
    problems : tuple of str
        Why the run would refuse to start, or the forecast is missing.
    seconds : float
        Time that the plan took without the probe.
    """

    files: int
    solver: bool
    layout: Layout
    left_out: tuple[LeftOut, ...]
    coverage: NDArray[np.uint16]
    cell: float
    graph: OverlapGraph
    mixed: Mapping[str, Mapping[str, int]]
    forecast: Forecast | None
    problems: tuple[str, ...]
    seconds: float


class _Progress(Events):
    """Passes on progress and the wish to stop; what a run says of single frames, a plan says in its lists."""

    def __init__(self, outer: Events) -> None:
        super().__init__(language=outer.language)
        self._outer = outer

    def progress(self, stage: str, current: int, total: int) -> None:
        self._outer.progress(stage, current, total)

    def check_stop(self) -> None:
        self._outer.check_stop()


def make_plan(
    inputs: Sequence[Path],
    settings: Settings | None = None,
    events: Events | None = None,
    probe: bool = True,
    *,
    sds: bool | None = None,
    given_lots: Sequence[Sequence[Path]] | None = None,
    output_folder: Path = Path(),
    startup: Cost | None = None,
) -> Plan:
    """Plan a run.

    Parameters
    ----------
    inputs : sequence of Path
        Folders and files with the frames, as for a run.
    settings : Settings, optional
        Of the run; defaults if not given.
    events : Events, optional
        Told how far the plan is, asked whether to stop.
    probe : bool
        Try the engine on a few frames for the forecast; without it there is none.
    sds, given_lots, output_folder
        As for a run.
    startup : Cost, optional
        What the program of the run takes to start, if that is to be in the forecast (see `process_cost`).

    Raises
    ------
    PlanError
        If an input does not exist, or no canvas can be made of the frames.
    zemosaic.events.Cancelled
        If asked to stop.
    """
    settings, quiet = settings or Settings(), _Progress(events or Events())
    try:
        made, known = _without_forecast(inputs, settings, sds, quiet, given_lots, output_folder)
    except FrameError as problem:
        raise PlanError(f"{problem.path}: {problem}") from problem
    except (CanvasError, OSError) as problem:
        raise PlanError(str(problem)) from problem
    if not probe:
        return made
    if startup is not None:
        known["start"] = startup
    try:
        return replace(made, forecast=_forecast(made, settings, sds, known, quiet))
    except (worker.RunError, FrameError, CanvasError, OSError) as problem:
        return replace(made, problems=(*made.problems, f"there is no forecast, because the probe failed: {problem}"))


def _without_forecast(
    inputs: Sequence[Path],
    settings: Settings,
    sds: bool | None,
    quiet: Events,
    given_lots: Sequence[Sequence[Path]] | None,
    output_folder: Path,
) -> tuple[Plan, dict[str, Cost]]:
    """All that the headers tell, and what it took to find out."""
    start = _now()
    workers, tiles = worker_count(settings.num_processing_workers), settings.use_existing_master_tiles
    intake = steps.scan([Path(p) for p in inputs], workers, quiet, tiles=tiles)
    found = list(intake.frames)
    if found and all(frame.wcs is None for frame in found):
        raise CanvasError(f"none of {len(found)} frames has a WCS: find out where they lie by zemosaic solve first")
    budget = memory_budget(settings.memory_gb)
    intake.drop(misfits.of_impossible_size(intake.frames, budget), quiet)
    steps.select(intake, quiet)
    _drop_copies(intake, quiet)
    layout = lay_out(intake.frames, settings, given_lots, quiet)
    graph = overlap_graph(layout.corners, _panels(layout))
    coverage, cell = coverage_map(layout)
    made = Plan(
        files=len(intake.files),
        solver=settings.solver_method != "none",
        layout=layout,
        left_out=_left_out(intake, found, layout, graph),
        coverage=coverage,
        cell=cell,
        graph=graph,
        mixed=mixed_facts(layout.frames),
        forecast=None,
        problems=_refusals(layout, settings, sds, budget, output_folder),
        seconds=(_now() - start).wall,
    )
    return made, {"phase_scan": _now() - start}


def process_cost() -> Cost:
    """What this process has cost so far: right after it has loaded the engine, the start-up of a run."""
    return Cost(time.process_time(), time.time() - psutil.Process().create_time())


def _now() -> Cost:
    return Cost(time.process_time(), time.perf_counter())


def _drop_copies(intake: Intake, events: Events) -> None:
    """Leave out files that are other files again; a run finds out by their pixels."""
    twins: dict[tuple[str, tuple[int, int], int], list[Frame]] = defaultdict(list)
    for frame in intake.frames:
        if frame.date_obs:
            twins[frame.date_obs, frame.shape, frame.path.stat().st_size].append(frame)
    reasons: dict[Path, str] = {}
    for group in twins.values():
        first: dict[bytes, Frame] = {}
        for frame in group if len(group) > 1 else ():
            original = first.setdefault(_tail(frame.path), frame)
            if original is not frame:
                reasons[frame.path] = f"it holds the same pixels as {original.path.name}, which is used once"
    intake.drop([reasons.get(frame.path, "") for frame in intake.frames], events)


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-min(_COMPARED, path.stat().st_size), os.SEEK_END)
        return file.read()


def _panels(layout: Layout) -> list[tuple[int, ...]]:
    """Frames by where they look, in groups much narrower than a frame."""
    short = float(np.median([min(frame.shape) for frame in layout.frames])) * layout.canvas.scale / 3600
    panels = cluster_frames(layout.frames, _PANEL_RADIUS * short)
    return panels if len(panels) <= _MANY_PANELS else cluster_frames(layout.frames, 2 * _PANEL_RADIUS * short)


def coverage_map(layout: Layout) -> tuple[NDArray[np.uint16], float]:
    """Frames over each cell of a coarse grid on the canvas, ``(h, w)``, and the side of a cell in canvas pixels."""
    ny, nx = layout.canvas.shape
    cell = max(1.0, max(ny, nx) / _MAP_CELLS)
    depth = np.zeros((int(np.ceil(ny / cell)), int(np.ceil(nx / cell))), np.uint16)
    for quad in (layout.corners + 0.5) / cell:
        box, mask = quad_mask(quad, (depth.shape[0], depth.shape[1]))
        depth[box.slices] += mask
    return depth, cell


def mixed_facts(frames: Sequence[Frame]) -> dict[str, dict[str, int]]:
    """Facts in which the frames differ: fact → value → number of frames, the most frequent first."""
    facts = {
        "instrument": lambda f: f.instrument,
        "filter": lambda f: f.filter,
        "exposure_s": lambda f: f"{f.exposure:g}" if f.exposure is not None else "",
        "gain": lambda f: f"{f.gain:g}" if f.gain is not None else "",
        "object": lambda f: f.object,
        "size_px": lambda f: f"{f.shape[1]} x {f.shape[0]}",
        "colour": lambda f: f.bayer or f.colour,
        "mount": lambda f: f.mount,
    }
    counts = {name: Counter(value for f in frames if (value := fact(f))) for name, fact in facts.items()}
    return {name: dict(count.most_common()) for name, count in counts.items() if len(count) > 1}


def _left_out(intake: Intake, found: Sequence[Frame], layout: Layout, graph: OverlapGraph) -> tuple[LeftOut, ...]:
    unsolved = {frame.path: frame for frame in found if frame.wcs is None}
    centres, reach = _panel_centres(layout, graph)
    listed = []
    for path, reason in intake.rejected.items():
        frame = unsolved.get(path)
        if frame is None:
            listed.append(LeftOut(path, reason))
            continue
        panel = None
        if frame.ra is not None and frame.dec is not None:
            away = separation(centres, to_vectors(np.float64(frame.ra), np.float64(frame.dec)))
            panel = int(np.argmin(away)) if away.min() <= reach else None
        listed.append(LeftOut(path, reason, True, frame.ra, frame.dec, panel))
    return tuple(listed)


def _panel_centres(layout: Layout, graph: OverlapGraph) -> tuple[NDArray[np.float64], float]:
    """Unit vectors ``(panels, 3)`` of the panels' middles, and how far (deg) a pointing may be from its panel."""
    middles = layout.corners.mean(axis=1)
    points = np.array([middles[list(panel)].mean(axis=0) for panel in graph.panels])
    vectors = to_vectors(*layout.canvas.wcs.wcs_pix2world(points[:, 0], points[:, 1], 0))
    diagonal = float(np.median(np.linalg.norm(layout.corners[:, 0] - layout.corners[:, 2], axis=1)))
    return vectors, _HINT_REACH * diagonal * layout.canvas.scale / 3600


def _refusals(
    layout: Layout, settings: Settings, sds: bool | None, budget: int, output_folder: Path
) -> tuple[str, ...]:
    """What a run would say before it starts, if there is no room for its canvas or its mega-tiles."""
    channels = 1 if layout.frames[0].colour == "mono" else 3
    try:
        steps.check_room(layout.canvas, channels, budget, output_folder, Events(language=settings.language))
        if worker.routes_for(settings, sds)[0] == "sds":
            room = worker.tile_room(settings, budget, output_folder)
            check_tile_room(sizes_of(layout, "sds", settings), settings, room)
    except CanvasError as problem:
        return (str(problem),)
    return ()


def _forecast(made: Plan, settings: Settings, sds: bool | None, known: Mapping[str, Cost], events: Events) -> Forecast:
    route = worker.routes_for(settings, sds)[0]
    layout = made.layout
    # The fullest panel says most about the lots.
    panel = max(made.graph.panels, key=len)
    probed = run_probe(layout, panel, route, settings, events)
    budget = memory_budget(settings.memory_gb)
    return forecast(
        route,
        sizes_of(layout, route, settings),
        probed,
        budget=budget,
        resident=worker.resident_bytes(settings, budget),
        product_px=_product_px(made, settings),
        known=known,
    )


def _product_px(made: Plan, settings: Settings) -> int:
    """Pixels of the mosaic when its empty border is cut off."""
    ny, nx = made.layout.canvas.shape
    if not settings.global_wcs_autocrop_enabled:
        return ny * nx
    sides = []
    for axis, size in ((1, ny), (0, nx)):
        seen = np.flatnonzero(made.coverage.any(axis=axis))
        sides.append(min(size, (seen[-1] + 1 - seen[0]) * made.cell + 2 * settings.global_wcs_autocrop_margin_px))
    return int(sides[0] * sides[1])


def save_plan(plan: Plan, folder: Path | None, lots: Path | None, language: str = "en") -> list[Path]:
    """Write ``plan.json`` and ``coverage.png`` into a folder, and the lots into a file for ``run --lots``.

    Parameters
    ----------
    plan : Plan
    folder : Path or None
        Made if needed; older files of these names are replaced.
    lots : Path or None
        Ends in ``.json`` or ``.toml``.
    language : str
        Of the picture.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    PlanError
        If a file cannot be written, or lots are to go into a file of another kind.
    """
    content: dict[Path, bytes] = {}
    if folder is not None:
        content[folder / "plan.json"] = json.dumps(plan_json(plan), indent=1).encode()
        content[folder / "coverage.png"] = coverage_png(plan, language)
    if lots is not None:
        try:
            content[lots] = lots_text(plan, lots.suffix).encode()
        except ValueError as problem:
            raise PlanError(f"{lots}: {problem}") from problem
    for path, data in content.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as problem:
            raise PlanError(f"{path} cannot be written: {problem.strerror}") from problem
    return list(content)
