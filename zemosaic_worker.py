"""The way through: plan → route → save.

`run_hierarchical_mosaic` reads the frames, plans the global WCS, brings all frames to one photometric scale, lets a
route make the mosaic, and saves it with its books. The SDS route is imported only when SDS is on.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import psutil

from zemosaic import intake as steps
from zemosaic.calibrate import Calibration, load_calibration
from zemosaic.canvas import Canvas, CanvasError
from zemosaic.coadd import Sub
from zemosaic.events import Cancelled, Event, Events, render
from zemosaic.execute import one_thread_each, worker_count
from zemosaic.frames import FrameError
from zemosaic.intake import Intake
from zemosaic.ledger import FrameRecord, Ledger, LedgerError, TileRecord
from zemosaic.photometry import Photometry
from zemosaic.preview import PreviewSettings
from zemosaic.product import ProductError, ProductFacts, save_product
from zemosaic.settings import Settings, settings_toml
from zemosaic.store import ArrayStore
from zemosaic.tiles import Mosaic
from zequalitymt import FrameMetrics, gate_frames

EXIT_ASKED, EXIT_FALLBACK = 0, 3

_logger = logging.getLogger("zemosaic")
_MEMORY_SHARE = 0.6  # of the free memory, unless a budget is set
_RESIDENT_TILES = 3 << 28  # bytes (768 MB): beyond it the system's file cache holds tiles just as well


class RunError(Exception):
    """The run cannot start, or no route made a mosaic; the message says why and what to do."""


@dataclass(frozen=True)
class RunResult:
    """What a run made.

    Parameters
    ----------
    product : Path or None
        The mosaic FITS.
    route : str
        Route that made it: ``sds``, ``mosaic-first`` or ``master-tiles``.
    exit_status : int
        0 if the product was made by the route asked for, 3 if by a fallback.
    summary : str
        One sentence in the language of the run.
    ledger : Ledger
        What became of every file.
    """

    product: Path | None
    route: str
    exit_status: int
    summary: str
    ledger: Ledger


@dataclass(frozen=True)
class Job:
    """What a route gets: matched frames and the means to stack them."""

    subs: Sequence[Sub]
    photometry: Photometry
    canvas: Canvas
    calibration: Calibration
    settings: Settings
    events: Events
    store: ArrayStore
    workers: int
    preplan_path_groups: Sequence[Sequence[Path]] | None


@dataclass(frozen=True)
class Outcome:
    """What became of one frame in a route: its lot, and how many of its pixels were used or rejected."""

    lot: int
    used: int
    rejected: int
    lost: str = ""


@dataclass(frozen=True)
class RouteResult:
    """What every route hands back: the mosaic, the books of frames and tiles, the steps of the polish."""

    mosaic: Mosaic
    outcomes: Sequence[Outcome]
    tiles: Sequence[TileRecord]
    history: Sequence[str]
    cards: Sequence[tuple[str, str | int | float, str]] = ()


def run_hierarchical_mosaic(
    input_folder: Path | Sequence[Path],
    output_folder: Path,
    settings: Settings | None = None,
    *,
    sds: bool | None = None,
    preplan_path_groups: Sequence[Sequence[Path]] | None = None,
    progress_callback: Callable[[Event], None] | None = None,
    stop_requested: Callable[[], bool] | None = None,
) -> RunResult:
    """Make a mosaic of everything in a folder.

    Parameters
    ----------
    input_folder : Path or sequence of Path
        Folders and files with the frames; they are only read.
    output_folder : Path
        Where the product goes; made if it does not exist.
    settings : Settings, optional
        Defaults if not given.
    sds : bool, optional
        SDS on or off; ``settings.sds_mode_default`` if not given.
    preplan_path_groups : sequence of sequence of Path, optional
        Lots of raw paths for SDS.
    progress_callback : callable, optional
        Gets every `Event`.
    stop_requested : callable, optional
        Polled; True ends the run with `zemosaic.events.Cancelled`.

    Raises
    ------
    RunError
        No product could be made.
    """
    start = time.perf_counter()
    settings = settings or Settings()
    events = Events(progress_callback, settings.language, stop_requested)
    inputs = [input_folder] if isinstance(input_folder, Path) else list(input_folder)
    routes = routes_for(settings.sds_mode_default if sds is None else sds)
    budget = memory_budget(settings)
    scratch = Path(settings.coadd_memmap_dir) if settings.coadd_memmap_dir else None
    try:
        with one_thread_each(), ArrayStore(_resident(settings, budget), scratch) as store:
            job, intake = prepare_job(inputs, settings, events, store, budget, preplan_path_groups)
            route, made, failures = run_routes(routes, job)
            events.phase(9, "save")
            ledger = write_ledger(intake, job, made)
            facts = product_facts(job, route, made, failures)
            paths = save_product(
                output_folder,
                settings.output_name or facts.object or "mosaic",
                made.mosaic,
                facts=facts,
                ledger=ledger,
                tiles=made.tiles,
                settings_text=settings_toml(settings),
                preview=preview_settings(settings),
            )
    except (FrameError, CanvasError, ProductError, LedgerError, OSError, MemoryError) as problem:
        events.failed("run_error_failed", reason=problem)
        raise RunError(str(problem) or type(problem).__name__) from problem
    except RunError as problem:
        events.failed("run_error_failed", reason=problem)
        raise
    events.info("run_success_saved", path=paths.fits)
    events.done("run_success_finished", seconds=time.perf_counter() - start)
    summary = render("run_success_summary", _summary(route, made, ledger), settings.language)
    return RunResult(paths.fits, route, EXIT_FALLBACK if failures else EXIT_ASKED, summary, ledger)


def memory_budget(settings: Settings) -> int:
    """Bytes the run may use: ``memory_gb``, or 60 % of what is free now."""
    if settings.memory_gb:
        return int(settings.memory_gb * 2**30)
    return int(_MEMORY_SHARE * psutil.virtual_memory().available)


def _resident(settings: Settings, budget: int) -> int:
    """Bytes of tiles to keep in memory: half of a budget that was set, else no more than is useful."""
    return budget // 2 if settings.memory_gb else min(budget // 2, _RESIDENT_TILES)


def prepare_job(
    inputs: Sequence[Path],
    settings: Settings,
    events: Events,
    store: ArrayStore,
    budget: int,
    preplan_path_groups: Sequence[Sequence[Path]] | None,
) -> tuple[Job, Intake]:
    """Everything before the route: headers → canvas → stars and sky → gate → one photometric scale."""
    workers = worker_count(settings.num_processing_workers)
    calibration = load_calibration(settings.master_dark_path, settings.master_flat_path)
    events.phase(1, "scan")
    intake = steps.scan(inputs, workers, events)
    events.phase(2, "canvas")
    canvas = steps.place(intake, settings, events, budget)
    events.phase(3, "measure")
    steps.measure_all(intake, calibration, settings, workers, events)
    gate(intake, settings, events)
    events.phase(4, "levels")
    subs, photometry = steps.match(intake, canvas, settings, workers, events)
    return Job(subs, photometry, canvas, calibration, settings, events, store, workers, preplan_path_groups), intake


def gate(intake: Intake, settings: Settings, events: Events) -> None:
    """Leave out frames that are blurred, trailed or clouded far beyond the rest of the night."""
    if not settings.blur_filter:
        return
    metrics = [
        FrameMetrics(stars=m.detected, fwhm=m.fwhm, ellipticity=m.ellipticity, trailing=m.trailing)
        for m in intake.measures
    ]
    intake.drop(gate_frames(metrics, blur_factor=settings.blur_filter_factor), events)


def run_routes(routes: Sequence[str], job: Job) -> tuple[str, RouteResult, list[str]]:
    """The first route of the list that makes a mosaic, and why those before it did not.

    Raises
    ------
    RunError
        If none did.
    """
    failures: list[str] = []
    for route in routes:
        if failures:
            job.events.warning("run_warn_fallback", route=route)
        try:
            return route, ROUTES[route](job), failures
        except Cancelled:
            raise
        except Exception as problem:  # whatever a route dies of, the next one must get its turn
            _logger.debug("route %s", route, exc_info=True)
            failures.append(f"{route}: {problem or type(problem).__name__}")
            job.events.error("run_error_route_failed", route=route, reason=problem or type(problem).__name__)
    raise RunError("no route could make the mosaic (" + "; ".join(failures) + ")")


def _sds(job: Job) -> RouteResult:
    """lots → mega-tiles → gain renormalisation → global stack → polish."""
    import zemosaic_sds  # not at the top: a run without SDS never touches it

    made = zemosaic_sds.assemble_global_mosaic_sds(
        job.subs,
        job.canvas,
        job.photometry.sky,
        job.calibration,
        job.settings,
        job.events,
        job.store,
        workers=job.workers,
        preplan_path_groups=job.preplan_path_groups,
    )
    outcomes = [Outcome(-1, 0, 0, "no lot took it")] * len(job.subs)
    tiles = []
    for index, (report, median, gain) in enumerate(zip(made.lots, made.gains.medians, made.gains.gains, strict=True)):
        members = report.lot.members
        for i, used, rejected in zip(members, report.used, report.rejected, strict=True):
            outcomes[i] = Outcome(index, used, rejected, report.lost.get(i, ""))
        frames = len(members) - len(report.lost)
        tiles.append(TileRecord(index, report.window, frames, median, gain, report.seconds))
    settings = job.settings
    cards = (
        ("NLOTS", len(tiles), "mega-tiles"),
        ("SDSREF", made.gains.reference, "reference mega-tile, counted from 0"),
        ("SDSSCOPE", settings.sds_gain_scope, "sds_gain_scope"),
        ("SDSMIN", settings.sds_min_batch_size, "sds_min_batch_size"),
        ("SDSTARG", settings.sds_target_batch_size, "sds_target_batch_size"),
        ("SDSCOVER", settings.sds_coverage_threshold, "sds_coverage_threshold"),
        ("SDSKEEP", settings.sds_min_coverage_keep, "sds_min_coverage_keep"),
        ("SDSCOADD", settings.global_coadd_method, "global_coadd_method"),
    )
    return RouteResult(made.mosaic, outcomes, tiles, made.history, cards)


ROUTES: dict[str, Callable[[Job], RouteResult]] = {"sds": _sds}


def routes_for(sds: bool) -> list[str]:
    """Routes to try, in order."""
    if not sds:
        raise RunError("the classic routes are not part of this version: switch SDS on (--sds)")
    return ["sds"]


def write_ledger(intake: Intake, job: Job, made: RouteResult) -> Ledger:
    """One record for every file that was found.

    Raises
    ------
    LedgerError
        If a file is missing or in it twice: nothing may be lost on the way.
    """
    names = short_names(intake.files)
    ledger = Ledger(FrameRecord(names[p], "rejected", why) for p, why in intake.rejected.items())
    for sub, measure, outcome in zip(job.subs, intake.measures, made.outcomes, strict=True):
        frame, seen = sub.frame, outcome.used + outcome.rejected
        why = outcome.lost or ("" if outcome.used else "none of its pixels was used")
        ledger.add(
            FrameRecord(
                names[frame.path],
                "rejected" if why else "used",
                why,
                outcome.lot,
                frame.exposure if frame.exposure is not None else np.nan,
                frame.date_obs,
                tuple(sub.adjustment.gain.tolist()),
                tuple(sub.adjustment.plane[:, 0].tolist()),
                float(sub.weight.mean()),
                measure.fwhm,
                float(measure.sky.mean()),
                outcome.rejected / seen if seen else np.nan,
            )
        )
    ledger.check(names.values())
    return ledger


def short_names(files: Sequence[Path]) -> dict[Path, str]:
    """Every file by its path below the folder that holds them all."""
    folder = os.path.commonpath([p.parent for p in files])
    return {p: Path(os.path.relpath(p, folder)).as_posix() for p in files}


def product_facts(job: Job, route: str, made: RouteResult, failures: Sequence[str]) -> ProductFacts:
    """What the product's header tells of the run."""
    frames = [sub.frame for sub in job.subs]
    cards = (
        ("NORMALIZ", job.settings.stacking_normalize_method, "stacking_normalize_method"),
        ("WEIGHTS", job.settings.stacking_weighting_method, "stacking_weighting_method"),
        ("REJECT", job.settings.stacking_rejection_algorithm, "stacking_rejection_algorithm"),
        ("STARGRPS", len(set(job.photometry.star_groups.tolist())), "groups of frames tied by stars"),
        ("SKYGRPS", len(set(job.photometry.sky_groups.tolist())), "groups of frames tied by shared sky"),
    )
    return ProductFacts(
        route,
        _most_common(f.object for f in frames),
        _most_common(f.filter for f in frames),
        _most_common(f.instrument for f in frames),
        "; ".join(failures),
        cards + tuple(made.cards),
        tuple(made.history),
    )


def preview_settings(settings: Settings) -> PreviewSettings:
    """The ``preview_png_*`` settings."""
    return PreviewSettings(**{f.name: getattr(settings, f"preview_png_{f.name}") for f in fields(PreviewSettings)})


def _most_common(words: Iterable[str]) -> str:
    """The word most frames carry; of equals the first in the alphabet."""
    counts = Counter(word for word in words if word)
    return min(counts, key=lambda word: (-counts[word], word), default="")


def _summary(route: str, made: RouteResult, ledger: Ledger) -> dict[str, object]:
    ny, nx = made.mosaic.shape
    return {"route": route, "used": len(ledger.used), "files": len(ledger), "width": nx, "height": ny}
