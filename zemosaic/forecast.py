"""What a run will cost: memory, disk and time, from the sizes of the field and a probe of this machine.

Nothing here is fitted to other runs. Every phase of a run grows with one of its sizes (pixels of the frames, of the
tiles, of the canvas), and the probe has measured what one unit of it costs, now and here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from zemosaic.execute import PROCESS_BYTES, PROCESS_SECONDS, processes
from zemosaic.layout import Sizes
from zemosaic.probe import Cost, Probe, Trial

# What the time of a phase grows with. A phase that is not named grows with the canvas.
_GROWS_WITH: Mapping[str, Callable[[Sizes], float]] = {
    "start": lambda s: s.frames,
    "phase_scan": lambda s: s.frames,
    "phase_lots": lambda s: s.samples,
    "phase_mosaic_first": lambda s: s.samples,
    "phase_master_tiles": lambda s: s.samples,
    "phase_gains": lambda s: s.tile_px,
    "phase_intertile": lambda s: s.tile_px,
    "phase_stack": lambda s: s.tile_px + s.canvas_px,
    "phase_assembly": lambda s: s.tile_px + s.canvas_px,
}
_STACKING = ("phase_lots", "phase_master_tiles", "phase_mosaic_first")  # frames' pixels are in memory
_WITH_TILES = ("phase_lots", "phase_gains", "phase_stack")  # mega-tiles are in memory
_PER_TILE = ("phase_lots", "phase_master_tiles", "phase_gains", "phase_intertile")  # a tile at a time

_PIXELS_BETWEEN_RESTS = 1 << 22  # of the canvas, that are stacked before mapped tiles are let go of
_APERTURE_FRAMES = 7  # frames that are measured once more, one after the other, to choose the aperture
_TIME_ERROR, _MEMORY_ERROR, _DISK_ERROR = 0.30, 0.15, 0.10  # of what the probe saw, 90 % of the runs
_BEYOND_ERROR = 0.5  # of what was not tried: the solution of many frames, stacks deeper than those of the trial
_DEEPER = 2.0  # times the frames of the trial


@dataclass(frozen=True)
class Estimate:
    """A number and the range that nine of ten runs fall into."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PhaseForecast:
    """What one phase of the run will cost.

    Parameters
    ----------
    phase : str
        As in the events of a run: ``phase_lots``, ….
    cpu, wall : float
        Seconds of processor time, and on the clock.
    memory : float
        Bytes of the process at its peak in this phase; 0 if it was not looked at.
    """

    phase: str
    cpu: float
    wall: float
    memory: float


@dataclass(frozen=True)
class Forecast:
    """What a run will cost.

    Parameters
    ----------
    route : str
        The route it is for.
    memory : Estimate
        Bytes of the process at its peak.
    disk : Estimate
        Bytes of the products (and of the master tiles, on their route).
    scratch : float
        Bytes of temporary files that the run needs besides.
    cpu, wall : Estimate
        Seconds of processor time, and on the clock, with as much other work on the machine as during the probe.
    phases : tuple of PhaseForecast
        The parts, in order.
    workers : int
        Threads.
    """

    route: str
    memory: Estimate
    disk: Estimate
    scratch: float
    cpu: Estimate
    wall: Estimate
    phases: tuple[PhaseForecast, ...]
    workers: int


def forecast(
    route: str,
    sizes: Sizes,
    probe: Probe,
    *,
    budget: int,
    resident: int,
    product_px: int,
    known: Mapping[str, Cost],
) -> Forecast:
    """Scale what the probe measured to the whole run.

    Parameters
    ----------
    route : str
        ``sds``, ``mosaic-first`` or ``master-tiles``.
    sizes : Sizes
        Of the run.
    probe : Probe
        On this machine.
    budget : int
        Bytes the run may use.
    resident : int
        Bytes of tiles that a run keeps in memory; beyond, they go to scratch files.
    product_px : int
        Pixels of the mosaic after its crop.
    known : mapping
        Phases that the plan has gone through itself, and what they cost.
    """
    times = {**phase_times(sizes, probe), **known}
    memory, scratch = phase_memory(sizes, probe, resident)
    if helpers := processes(probe.workers, int(sizes.frames), budget):
        times["phase_measure"] = _measured_elsewhere(times["phase_measure"], helpers)
        memory["phase_measure"] += helpers * PROCESS_BYTES
    phases = tuple(PhaseForecast(phase, cost.cpu, cost.wall, memory.get(phase, 0.0)) for phase, cost in times.items())
    total = Cost(0.0, 0.0)
    for cost in times.values():
        total = total + cost
    beyond = _beyond_trial(sizes, probe)
    disk = product_px * _product_bytes(sizes) + sizes.preview_px * probe.picture_bytes
    if route == "master-tiles":
        disk += sizes.tile_px * 4 * (sizes.channels + 1)
    peak = max(memory.values())
    return Forecast(
        route,
        memory=_within(peak, _MEMORY_ERROR * peak),
        disk=_within(disk, _DISK_ERROR * disk),
        scratch=scratch,
        cpu=_within(total.cpu, _TIME_ERROR * total.cpu + beyond.cpu),
        wall=_within(total.wall, _TIME_ERROR * total.wall + beyond.wall),
        phases=phases,
        workers=probe.workers,
    )


def _within(value: float, error: float) -> Estimate:
    return Estimate(value, max(0.0, value - error), value + error)


def phase_times(sizes: Sizes, probe: Probe) -> dict[str, Cost]:
    """Time of every phase: what is loaded once, and what grows."""
    trial = probe.timed
    nothing = Cost(0.0, 0.0)
    times = {}
    for phase, cost in trial.costs.items():
        grows = _GROWS_WITH.get(phase, lambda s: s.canvas_px)
        if phase == "phase_measure":
            times[phase] = _measure_time(cost, trial.sizes, sizes, probe.workers)
        elif phase == "phase_levels":
            times[phase] = match_time(probe, sizes.frames)
        elif phase == "phase_save":
            # The preview does not grow with the mosaic, and takes most of the time of a small one.
            file = cost - probe.picture * trial.sizes.preview_px
            times[phase] = file * (sizes.canvas_px / trial.sizes.canvas_px) + probe.picture * sizes.preview_px
        elif phase == "phase_solve":
            # The catalogue, and the search for the first frames, cost the same for few and many.
            fewer, few = probe.traced.sizes.frames, probe.traced.costs.get(phase, cost)
            each = (cost - few) * (1 / max(1, trial.sizes.frames - fewer))
            times[phase] = (cost - each * trial.sizes.frames) + each * sizes.frames
        else:
            times[phase] = cost * (grows(sizes) / grows(trial.sizes))
        once = probe.first.costs.get(phase, nothing) - probe.traced.costs.get(phase, nothing)
        times[phase] = times[phase] + once
    return times


def _measure_time(cost: Cost, tried: Sizes, sizes: Sizes, workers: int) -> Cost:
    """Some frames are measured twice, first one after the other, then all on the workers."""
    alone, later = min(tried.frames, _APERTURE_FRAMES), tried.frames
    one = cost.cpu / (alone + later)
    slowed = max(1.0, cost.wall / max(cost.cpu, 1e-9))  # by other work on the machine
    together = max((cost.wall - alone * one * slowed) / later, one / workers)
    bigger = (sizes.frame_px / sizes.frames) / (tried.frame_px / tried.frames)
    alone, later = min(sizes.frames, _APERTURE_FRAMES), sizes.frames
    return Cost((alone + later) * one, alone * one * slowed + later * together) * bigger


def _measured_elsewhere(here: Cost, helpers: int) -> Cost:
    """The time of `_measure_time` where processes measure the frames: none waits for another, but they have to start.

    The frames that choose the aperture are few where there are processes.
    """
    cpu = here.cpu + helpers * PROCESS_SECONDS
    return Cost(cpu, min(here.wall, cpu / (helpers + 1)))


def match_time(probe: Probe, frames: int) -> Cost:
    """Time to solve gains and levels: ``a n + b n²`` through what was tried.

    A frame's stars and sky samples cost the same in any field; every pair of frames that share sky costs besides.
    """
    if len(probe.match) == 1:
        return probe.match[0][1]
    (n1, t1), (n2, t2) = probe.match
    cpu, wall = (_parabola(n1, a, n2, b, frames) for a, b in ((t1.cpu, t2.cpu), (t1.wall, t2.wall)))
    return Cost(cpu, wall)


def _parabola(n1: int, t1: float, n2: int, t2: float, n: int) -> float:
    """``a n + b n²`` through ``(n1, t1)`` and ``(n2, t2)`` at `n`, with ``a, b >= 0``."""
    b = max(0.0, (t2 / n2 - t1 / n1) / (n2 - n1))
    a = max(0.0, t2 / n2 - b * n2)
    return a * n + b * n * n


def _beyond_trial(sizes: Sizes, probe: Probe) -> Cost:
    """Uncertainty of what the trials cannot show."""
    largest, tried = probe.match[-1]
    beyond = match_time(probe, sizes.frames) - tried * (sizes.frames / largest)
    trial = probe.timed
    if sizes.tile_frames > _DEEPER * trial.sizes.tile_frames:
        for phase in _STACKING:
            beyond = beyond + trial.costs.get(phase, Cost(0, 0)) * (sizes.samples / trial.sizes.samples)
    return beyond * _BEYOND_ERROR


def phase_memory(sizes: Sizes, probe: Probe, resident: int) -> tuple[dict[str, float], float]:
    """Memory of the process in every phase, and bytes of scratch files.

    What is known to be there (frames that were measured, pixels of a group, tiles) is counted; what a phase needs
    besides was seen in the traced run, and grows with the tile or the canvas.
    """
    base = probe.base + probe.unseen
    memory = {phase: base + traced for phase, traced in _phase_bytes(sizes, probe, resident).items()}
    tiles = sizes.tile_px * _tile_bytes(sizes) if "phase_gains" in probe.traced.costs else 0
    # Where the trial held none of its tiles in memory, all go to files: a run that can be resumed keeps them there.
    filed = _tiles_held(probe.traced) < 0.5 * probe.traced.sizes.tile_px * _tile_bytes(sizes)
    return memory, tiles if filed else max(0, tiles - resident)


def _phase_bytes(sizes: Sizes, probe: Probe, resident: int) -> dict[str, float]:
    trial = probe.traced
    first = next((phase for phase in _STACKING if phase in trial.held), "end")
    per_frame = trial.held[first] / trial.sizes.frames  # its header, its stars and sky, its place
    found = {}
    for phase, peak in trial.peak.items():
        if phase in ("start", "phase_scan"):
            continue
        if phase == "phase_measure":
            busy = min(probe.workers, trial.sizes.frames)
            found[phase] = sizes.frames * per_frame + peak * probe.workers / busy
        elif phase == "phase_levels":
            found[phase] = sizes.frames * (per_frame + probe.match_bytes)
        elif phase == "phase_solve":
            found[phase] = sizes.frames * per_frame + peak  # which is mostly the catalogue
        else:
            tiles = _tiles_held(trial) if phase in _WITH_TILES else 0.0
            own = peak - trial.sizes.frames * per_frame - _counted(phase, trial.sizes, resident) - tiles
            grown = _grown(phase, sizes) / _grown(phase, trial.sizes)
            found[phase] = sizes.frames * per_frame + _counted(phase, sizes, resident) + max(0.0, own) * grown
            if phase in _WITH_TILES:
                found[phase] += _tile_memory(phase, sizes, resident)
    return found


def _tiles_held(trial: Trial) -> float:
    """Bytes of mega-tiles that a traced run held in memory, not in files."""
    return max(0, trial.held.get("phase_gains", 0) - trial.held.get("phase_lots", 0))


def _tile_memory(phase: str, sizes: Sizes, resident: int) -> float:
    """Bytes that mega-tiles occupy: in memory, or as pages of files that are mapped."""
    tiles = sizes.tile_px * _tile_bytes(sizes)
    memory = float(min(tiles, resident))
    if phase == "phase_stack":
        # Pages beyond the budget count until they are let go of.
        memory += (tiles - memory) * min(1.0, _PIXELS_BETWEEN_RESTS / sizes.canvas_px)
    return memory


def _counted(phase: str, sizes: Sizes, resident: int) -> float:
    """Bytes that are known to be there: pixels of the frames that are stacked, a master tile, the mosaic."""
    counted = 0.0
    if phase == "phase_save":
        counted += sizes.canvas_px * _product_bytes(sizes)
    if phase == "phase_assembly":
        counted += sizes.largest_tile * 4 * (sizes.channels + 1)
    if phase in _STACKING:
        shelf = resident if phase == "phase_mosaic_first" else resident // 2
        counted += min(sizes.tile_frames * sizes.frame_bytes, shelf)
    return counted


def _grown(phase: str, sizes: Sizes) -> float:
    if phase == "phase_save":
        return sizes.preview_px
    return sizes.largest_tile if phase in _PER_TILE else sizes.canvas_px


def _product_bytes(sizes: Sizes) -> int:
    """Bytes per pixel of a mosaic: image, coverage and alpha."""
    return 4 * sizes.channels + 5


def _tile_bytes(sizes: Sizes) -> int:
    """Bytes per pixel of a mega-tile: image, coverage and weight."""
    return 4 * (sizes.channels + 2)
