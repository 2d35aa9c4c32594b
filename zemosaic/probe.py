"""A short trial on this machine: miniature runs of the real engine, on a few of the frames.

The first run loads what is loaded once (libraries, compiled kernels), the second is traced for its memory, the third
is timed. All go through `run_hierarchical_mosaic`, so that whatever a run does is in them. What does not grow in
proportion to the frames, the solution of gains and levels, is tried by itself at two sizes.
"""

from __future__ import annotations

import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path

import numpy as np
import psutil
from astropy.io import fits
from astropy.wcs import WCS

import zemosaic_worker as worker
from zemosaic.calibrate import load_calibration
from zemosaic.events import Cancelled, Event, Events
from zemosaic.execute import one_thread_each, worker_count
from zemosaic.frames import Frame
from zemosaic.intake import Intake, match
from zemosaic.layout import Layout, Sizes, lay_out, sizes_of
from zemosaic.measure import measure_frame
from zemosaic.preview import encode_png, preview_rgba
from zemosaic.settings import Settings
from zemosaic.stars import Aperture
from zemosaic.tiles import Mosaic, alpha_of

_TRIAL_PIXELS = 20_000_000  # of all frames of the timed run together, if they are not too few then
_TRIAL_FRAMES = (3, 10)
_TRACED_FRAMES = 2
_MATCH_FRAMES = (12, 48)  # sizes at which the solution is tried
_SAMPLE_SECONDS = 0.005

#: Tells the bytes that are held now, and the most that were held since it was last asked.
Look = Callable[[], tuple[int, int]]


@dataclass(frozen=True)
class Cost:
    """Seconds of processor time (all threads) and on the clock."""

    cpu: float
    wall: float

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.cpu * factor, self.wall * factor)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.cpu + other.cpu, self.wall + other.wall)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(max(0.0, self.cpu - other.cpu), max(0.0, self.wall - other.wall))


def _now() -> Cost:
    return Cost(time.process_time(), time.perf_counter())


@dataclass(frozen=True)
class Trial:
    """One miniature run.

    Parameters
    ----------
    sizes : Sizes
        What it dealt with.
    costs : mapping
        Phase (``phase_lots``, …) → time.
    held, peak : mapping
        Phase → bytes that are held when it begins, and the most that are held during it, counted from the start of
        the run; all 0 if the run was not traced.
    """

    sizes: Sizes
    costs: Mapping[str, Cost]
    held: Mapping[str, int]
    peak: Mapping[str, int]


@dataclass(frozen=True)
class Probe:
    """What the trials told of this machine.

    Parameters
    ----------
    base : int
        Memory of the process before the trials, bytes.
    unseen : int
        What the process took in the first run beyond what the trace of the second counts: compiled code, libraries'
        own memory, what the heap keeps.
    first, traced, timed : Trial
        The three runs; the first two of the same frames.
    match : tuple of (int, Cost)
        Frames → time to solve their gains and levels, at one or two sizes.
    match_bytes : float
        Memory of that solution, bytes per frame.
    picture : Cost
        Time per pixel to make and write the preview.
    picture_bytes : float
        Its size in the file, bytes per pixel.
    workers : int
        Threads of a run.
    """

    base: int
    unseen: int
    first: Trial
    traced: Trial
    timed: Trial
    match: tuple[tuple[int, Cost], ...]
    match_bytes: float
    picture: Cost
    picture_bytes: float
    workers: int


def run_probe(layout: Layout, panel: Sequence[int], route: str, settings: Settings, events: Events) -> Probe:
    """Try the engine on a few frames of one panel.

    Parameters
    ----------
    layout : Layout
        The whole field.
    panel : sequence of int
        Frames that overlap, of which some are tried.
    route : str
        ``sds``, ``mosaic-first`` or ``master-tiles``.
    settings : Settings
        Of the run to come.
    events : Events
        Told how far the probe is, and asked whether to stop.

    Raises
    ------
    zemosaic_worker.RunError
        If the engine cannot make a mosaic of these frames.
    zemosaic.events.Cancelled
        If the probe was asked to stop.
    """
    base = psutil.Process().memory_info().rss
    pixels = float(np.mean([f.shape[0] * f.shape[1] for f in layout.frames]))
    count = min(len(panel), int(np.clip(_TRIAL_PIXELS / pixels, *_TRIAL_FRAMES)))
    # Spread over the panel, so that clouds of one hour do not speak for the night.
    chosen = [layout.frames[panel[i]] for i in np.linspace(0, len(panel) - 1, count).astype(int)]
    steps = iter(range(5))

    def step() -> None:
        events.progress("probe", next(steps), 4)
        events.check_stop()

    step()
    with tempfile.TemporaryDirectory(prefix="zemosaic-probe-") as folder:
        few = chosen[:_TRACED_FRAMES]
        with _sampled() as most:
            first = _trial(few, route, settings, events, Path(folder, "first"), _blind)
        step()
        with _traced() as look:
            traced = _trial(few, route, settings, events, Path(folder, "traced"), look)
        step()
        # Two lots at least: the stack of a single mega-tile costs next to nothing.
        half = {"sds_min_batch_size": -(-count // 2), "sds_target_batch_size": -(-count // 2)}
        timed = _trial(chosen, route, settings.model_copy(update=half), events, Path(folder, "timed"), _blind)
        picture, picture_bytes = _picture(Path(folder, "timed"), settings)
    step()
    solved, solve_bytes = _match_costs(layout, chosen, settings, events)
    step()
    workers = worker_count(settings.num_processing_workers)
    unseen = max(0, most[0] - base - max(traced.peak.values()))
    return Probe(base, unseen, first, traced, timed, solved, solve_bytes, picture, picture_bytes, workers)


def _blind() -> tuple[int, int]:
    return 0, 0


@contextmanager
def _traced() -> Iterator[Look]:
    """What Python and NumPy allocate, to the byte."""
    running = tracemalloc.is_tracing()
    if not running:
        tracemalloc.start()
    start = tracemalloc.get_traced_memory()[0]

    def look() -> tuple[int, int]:
        now, peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        return now - start, peak - start

    try:
        yield look
    finally:
        if not running:
            tracemalloc.stop()


@contextmanager
def _sampled() -> Iterator[list[int]]:
    """The most that the whole process was seen to occupy, bytes: a list of one number that grows."""
    process, ended = psutil.Process(), threading.Event()
    most = [process.memory_info().rss]

    def sample() -> None:
        while not ended.wait(_SAMPLE_SECONDS):
            most[0] = max(most[0], process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def _trial(frames: Sequence[Frame], route: str, settings: Settings, events: Events, folder: Path, look: Look) -> Trial:
    """Run the engine on a few frames and keep the books of its phases."""
    marks: list[tuple[str, float, float]] = []
    held: dict[str, int] = {}
    peak: dict[str, int] = {}

    def mark(phase: str) -> None:
        now, most = look()
        if marks:
            peak[marks[-1][0]] = most
        held[phase] = now
        marks.append((phase, time.process_time(), time.perf_counter()))

    def listen(event: Event) -> None:
        if event.kind == "phase":
            mark(event.key)

    def asked() -> bool:
        try:
            events.check_stop()
        except Cancelled:
            return True
        return False

    mark("start")
    made = worker.run_hierarchical_mosaic(
        [frame.path for frame in frames],
        folder,
        settings.model_copy(update={"route": route, "coadd_memmap_dir": ""}),
        progress_callback=listen,
        stop_requested=asked,
    )
    mark("end")
    if made.route != route:
        raise worker.RunError(f"route {route} failed on a few frames, {made.route} made their mosaic")
    costs: dict[str, Cost] = {}
    for (phase, cpu, wall), (_, next_cpu, next_wall) in pairwise(marks):
        costs[phase] = costs.get(phase, Cost(0, 0)) + Cost(next_cpu - cpu, next_wall - wall)
    layout = lay_out(sorted(frames, key=lambda f: (f.date_obs, f.path.name, str(f.path))), settings)
    return Trial(sizes_of(layout, route, settings), costs, held, peak)


def _match_costs(
    layout: Layout, measured: Sequence[Frame], settings: Settings, events: Events
) -> tuple[tuple[tuple[int, Cost], ...], float]:
    """Time to solve gains and levels of some frames spread over the whole field, with the stars and sky of a few."""
    calibration = load_calibration(settings.master_dark_path, settings.master_flat_path)
    hot = settings.hot_pixel_sigma if settings.hot_pixel_correction else None
    workers = worker_count(settings.num_processing_workers)
    costs: list[tuple[int, Cost]] = []
    with one_thread_each():
        measures = [measure_frame(frame, calibration, Aperture(), hot_sigma=hot) for frame in measured[:3]]
        for count in sorted({min(size, len(layout.frames)) for size in _MATCH_FRAMES}):
            some = [layout.frames[i] for i in np.linspace(0, len(layout.frames) - 1, count).astype(int)]
            few = Intake([], frames=some, measures=list(islice(cycle(measures), count)))
            start = _now()
            match(few, layout.canvas, settings, workers, Events())
            costs.append((count, _now() - start))
            events.check_stop()
        with _traced() as look:
            few.frames, few.measures = few.frames[: _MATCH_FRAMES[0]], few.measures[: _MATCH_FRAMES[0]]
            match(few, layout.canvas, settings, workers, Events())
            solve_bytes = look()[1] / len(few.frames)
    return tuple(costs), solve_bytes


def _picture(folder: Path, settings: Settings) -> tuple[Cost, float]:
    """Time to make and write the preview of a trial again, and its size in the file, both per pixel."""
    product, preview = next(folder.glob("*.fits")), next(folder.glob("*.png"))
    with fits.open(product, memmap=False) as hdus:
        image = np.asarray(hdus[0].data, np.float32)
        coverage = np.asarray(hdus["COVERAGE"].data, np.float32)
    image = np.ascontiguousarray(np.moveaxis(image, 0, -1)) if image.ndim == 3 else image
    mosaic = Mosaic(image, coverage, alpha_of(coverage), WCS(naxis=2))
    start = _now()
    picture = preview_rgba(mosaic, **asdict(worker.preview_settings(settings)))
    encode_png(picture)
    area = picture.shape[0] * picture.shape[1]
    return (_now() - start) * (1 / area), preview.stat().st_size / area
