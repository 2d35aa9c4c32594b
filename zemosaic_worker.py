"""The way through: plan → route → save.

`run_hierarchical_mosaic` reads the frames, plans the global WCS, brings all frames to one photometric scale, lets a
route make the mosaic, and saves it with its books. The SDS route is imported only when SDS is on.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import lecropper
from zemosaic import carry
from zemosaic import intake as steps
from zemosaic.assembly import assemble
from zemosaic.books import product_facts, write_ledger
from zemosaic.cache import Cache
from zemosaic.calibrate import Calibration, load_calibration
from zemosaic.canvas import CanvasError
from zemosaic.cluster import cluster_frames
from zemosaic.coadd import Sub
from zemosaic.events import Cancelled, Event, Events, render
from zemosaic.execute import memory_budget, one_thread_each, return_freed_memory, side_by_side, worker_count
from zemosaic.frames import Frame, FrameError
from zemosaic.intake import Intake
from zemosaic.job import Job, Outcome, RouteResult
from zemosaic.ledger import Ledger, LedgerError, TileRecord
from zemosaic.live import LivePreview
from zemosaic.mastertile import read_master_tile, save_master_tile
from zemosaic.photometry import Photometry
from zemosaic.preview import PreviewSettings
from zemosaic.product import ProductError, ProductFacts, ProductPaths, save_product
from zemosaic.report.chronicle import Chronicle
from zemosaic.report.evidence import Evidence, evidence_of_run
from zemosaic.resume import Results
from zemosaic.room import Room, check_tile_room
from zemosaic.settings import Settings, settings_toml
from zemosaic.stacking import Stack, stack_subs
from zemosaic.store import ArrayStore
from zemosaic.tiles import Mosaic, Tile, Window, alpha_of
from zemosaic.workplace import HIDDEN, UNFINISHED, WorkplaceError, scratch_folder, workplace
from zequalitymt import SHAPE_FAULTS, Verdict, judge, kept, tile_gate, tile_metrics

if TYPE_CHECKING:
    from zemosaic.remote import RemoteLots

EXIT_ASKED, EXIT_FALLBACK = 0, 3

#: Share of the typical coverage that the classic routes keep; SDS has a setting of its own.
CLASSIC_KEEP = 0.4

#: What may go wrong before and after a route, each with a sentence of its own.
_NAMED = (
    FrameError,
    CanvasError,
    ProductError,
    LedgerError,
    WorkplaceError,
    OSError,
    MemoryError,
    np.linalg.LinAlgError,
)
_logger = logging.getLogger("zemosaic")
_RESIDENT_TILES = 1 << 29  # bytes (512 MB): beyond it the system's file cache holds tiles just as well


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


def run_hierarchical_mosaic(
    input_folder: str | Path | Sequence[str | Path],
    output_folder: str | Path,
    settings: Settings | None = None,
    *,
    sds: bool | None = None,
    preplan_path_groups: Sequence[Sequence[Path]] | None = None,
    progress_callback: Callable[[Event], None] | None = None,
    stop_requested: Callable[[], bool] | None = None,
    live_preview: bool = False,
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
    live_preview : bool
        Whether pictures of the growing mosaic are written into ``OUT/.zemosaic`` (see `LivePreview`), for a window.

    Raises
    ------
    RunError
        No product could be made.
    """
    start = time.perf_counter()
    settings = settings or Settings()
    chronicle = Chronicle(progress_callback)
    events = Events(chronicle, settings.language, stop_requested)
    inputs = [Path(p) for p in ([input_folder] if isinstance(input_folder, (str, Path)) else input_folder)]
    output_folder = Path(output_folder)
    routes = routes_for(settings, sds)
    budget = memory_budget(settings.memory_gb)
    scratch = scratch_folder(settings.coadd_memmap_dir, output_folder)
    try:
        if output_folder.exists() and not output_folder.is_dir():
            raise RunError(f"{output_folder} is a file: choose another output folder")
        with (
            one_thread_each(),
            workplace(output_folder, scratch) as hidden,
            ArrayStore(resident_bytes(settings, budget), scratch) as store,
            open_cluster(settings, routes, events) as remote,
        ):
            cache = open_cache(hidden, settings, events)
            job, intake = prepare_job(
                inputs, output_folder, settings, events, store, budget, preplan_path_groups, cache, routes[0] == "sds"
            )
            return_freed_memory()  # of the equations
            job = replace(job, remote=remote)
            if live_preview:
                live = LivePreview(hidden, job.canvas.shape, events, preview_settings(settings))
                job = replace(job, live=live)
            route, made, failures = run_routes(routes, job)
            return_freed_memory()  # of the route: what is saved needs room, too
            tell_kept(cache, events)
            events.check_stop()
            events.phase(9, "save")
            ledger = write_ledger(intake, job, made)
            facts = product_facts(job, route, made, failures)
            paths, evidence = save(job, intake, made, facts, ledger)
            keep_state(job, intake, made, route)
            del job, intake  # all that is in memory of every frame, and grows with their number
            return_freed_memory()
            # Who wants the end gets it: there is a whole product, and `zemosaic check` can judge it later.
            if evidence is not None and not events.stopped:
                events.phase(10, "report")
                with no_report_at_worst(events):
                    from zemosaic.report.mosaic import report_mosaic  # not at the start of every run

                    report_mosaic(evidence, facts, ledger, made.tiles, settings, chronicle, paths, events)
    except _NAMED as problem:
        reason = f"{problem.path}: {problem}" if isinstance(problem, FrameError) else str(problem)
        events.failed("run_error_failed", reason=reason)
        raise RunError(reason or type(problem).__name__) from problem
    except RunError as problem:
        events.failed("run_error_failed", reason=problem)
        raise
    events.info("run_success_saved", path=paths.fits)
    events.done("run_success_finished", seconds=time.perf_counter() - start)
    summary = render("run_success_summary", _summary(route, made, ledger), settings.language)
    return RunResult(paths.fits, route, EXIT_FALLBACK if failures else EXIT_ASKED, summary, ledger)


def resident_bytes(settings: Settings, budget: int) -> int:
    """Bytes of tiles to keep in memory: half of a budget that was set, else no more than is useful."""
    return budget // 2 if settings.memory_gb else min(budget // 2, _RESIDENT_TILES)


def open_cache(hidden: Path, settings: Settings, events: Events) -> Cache:
    """The results of earlier runs, and the room for those of this one, as ``resume`` says."""
    if settings.resume == "off":
        return Cache(None)
    limit = settings.resume_cache_gb * 2**30 if settings.resume == "auto" else math.inf
    return Cache(hidden / "results", limit, trouble=lambda reason: events.warning("run_warn_not_kept", reason=reason))


@contextmanager
def open_cluster(settings: Settings, routes: Sequence[str], events: Events) -> Iterator[RemoteLots | None]:
    """The cluster of the setting ``scheduler``, connected before hours of work may be in vain; None without one."""
    if settings.scheduler and routes[0] != "sds":
        events.warning("cluster_unused", route=routes[0])
    if not settings.scheduler or routes[0] != "sds":
        yield None
        return
    from zemosaic.remote import remote_lots  # here, because it needs an extra

    with remote_lots(settings, events) as remote:
        yield remote


def keep_state(job: Job, intake: Intake, made: RouteResult, route: str) -> None:
    """Keep what a run over a grown folder goes on from; the lots only of the route that has lots."""
    frames = [sub.frame for sub in job.subs]
    carry.keep(
        job.results,
        job.settings,
        job.preplan_path_groups,
        job.subs,
        job.photometry,
        job.canvas,
        intake.aperture,
        [intake.zooms.get(frame.camera, 1.0) for frame in frames],
        [outcome.lot if route == "sds" else -1 for outcome in made.outcomes],
    )


def tell_kept(cache: Cache, events: Events) -> None:
    """Say what of earlier runs was used, and what is kept for later ones."""
    found = cache.found
    if found:
        events.info("run_info_reused", measures=found["measures"], tiles=found["tiles"])
    if cache.folder is not None and cache.size:
        events.info("run_info_kept", size_gb=cache.size / 2**30, folder=cache.folder.parent)


def prepare_job(
    inputs: Sequence[Path],
    output_folder: Path,
    settings: Settings,
    events: Events,
    store: ArrayStore,
    budget: int,
    preplan_path_groups: Sequence[Sequence[Path]] | None,
    cache: Cache,
    lots_ahead: bool = False,
) -> tuple[Job, Intake]:
    """Everything before the route: headers → canvas → stars and sky → gate → one photometric scale."""
    workers = worker_count(settings.num_processing_workers)
    calibration = load_calibration(settings.master_dark_path, settings.master_flat_path)
    if settings.use_existing_master_tiles:
        calibration, settings = Calibration(), _for_tiles(settings)
    events.phase(1, "scan")
    intake = steps.scan(inputs, workers, events, tiles=settings.use_existing_master_tiles)
    intake.results = Results.of_run(cache, intake.stamps, calibration, intake.frames)
    intake.carried = carry.recall(intake.results, intake.frames, settings, preplan_path_groups)
    placed = steps.foresee(intake, settings, events, budget, output_folder)
    if lots_ahead and placed:
        foresee_tiles(placed, settings, budget, output_folder, preplan_path_groups)
    events.phase(2, "measure")
    steps.measure_all(intake, calibration, settings, workers, events)
    events.phase(3, "solve")
    if not settings.use_existing_master_tiles:
        steps.locate_all(intake, settings, workers, events)
    canvas = steps.place(intake, settings, events, budget, output_folder)
    cache.spare = math.prod(canvas.shape) * 4 * 5  # the product is still to be written
    verdicts = gate(intake, settings, events)
    events.phase(4, "levels")
    subs, photometry = steps.match(intake, canvas, settings, workers, events)
    job = Job(
        subs=subs,
        photometry=photometry,
        canvas=canvas,
        calibration=calibration,
        settings=settings,
        events=events,
        store=store,
        workers=workers,
        output_folder=output_folder,
        preplan_path_groups=preplan_path_groups,
        verdicts=verdicts,
        results=intake.results,
        old_lots=intake.carried.groups(intake.frames, intake.old_frames()) if intake.carried else (),
    )
    return job, intake


def foresee_tiles(
    placed: Sequence[Frame],
    settings: Settings,
    budget: int,
    output_folder: Path,
    preplan_path_groups: Sequence[Sequence[Path]] | None,
) -> None:
    """Refuse mega-tiles that will find no room, before any pixel is read, as far as headers can tell.

    Raises
    ------
    CanvasError
        With the numbers.
    """
    from zemosaic.layout import lay_out, sizes_of  # not at the top: it needs the SDS route

    try:
        sizes = sizes_of(lay_out(placed, settings, preplan_path_groups), "sds", settings)
        check_tile_room(sizes, settings, tile_room(settings, budget, output_folder))
    except CanvasError:
        raise
    except Exception:  # a plan that fails is the route's business, which has others behind it
        _logger.debug("room for mega-tiles", exc_info=True)


def tile_room(settings: Settings, budget: int, output_folder: Path) -> Room:
    """Where the mega-tiles of a run may lie."""
    scratch = scratch_folder(settings.coadd_memmap_dir, output_folder)
    return Room(resident_bytes(settings, budget), scratch, output_folder / HIDDEN / "results")


def gate(intake: Intake, settings: Settings, events: Events) -> dict[Path, Verdict]:
    """Judge every frame against its night, and leave out those with a fault that the settings do not tolerate.

    Returns
    -------
    dict
        File → its metrics and verdict, of the frames left out too.
    """
    verdicts = judge(
        intake.frames,
        intake.measures,
        blur_factor=settings.blur_filter_factor,
        transparency=settings.cloud_filter_transparency,
    )
    faults = set(SHAPE_FAULTS if settings.blur_filter else ())
    if settings.cloud_filter and not settings.use_existing_master_tiles:  # each of those has a scale of its own
        faults |= {"clouded", "dimmed"} if settings.cloud_filter_dimmed else {"clouded"}
    old = set(intake.old_frames())  # they are in tiles that are used again
    stay = [stays or i in old for i, stays in enumerate(kept(verdicts, faults))]
    noted = [v for v, stays in zip(verdicts, stay, strict=True) if stays and v.fault]
    if noted:
        examples = "; ".join(f"{v.frame.path.name} {v.reason}" for v in noted[:3])
        events.info("run_info_frames_noted", n=len(noted), examples=examples)
    intake.drop(["" if stays else v.reason for v, stays in zip(verdicts, stay, strict=True)], events)
    return {v.frame.path: v for v in verdicts}


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
            if job.live:
                job.live.clear()
        try:
            made = ROUTES[route](job)
            _with_data(made.mosaic)
            return route, made, failures
        except (Cancelled, ConnectionError):  # a cluster that is gone is no fault of the route
            raise
        except Exception as problem:  # whatever a route dies of, the next one must get its turn
            _logger.debug("route %s", route, exc_info=True)
            reason = str(problem) or type(problem).__name__
            job.store.clear()
            failures.append(f"{route}: {reason}")
            job.events.error("run_error_route_failed", route=route, reason=reason)
    raise RunError("no route could make the mosaic (" + "; ".join(failures) + ")")


def _sds(job: Job) -> RouteResult:
    """lots → mega-tiles → gain renormalisation → global stack → polish."""
    import zemosaic_sds  # not at the top: a run without SDS never touches it

    given = [*job.old_lots, *(job.preplan_path_groups or ())]
    made = zemosaic_sds.assemble_global_mosaic_sds(job.subs, job.canvas, job.photometry.sky, job, given)
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


def _mosaic_first(job: Job) -> RouteResult:
    """All frames straight onto the global canvas, block by block."""
    events, settings = job.events, job.settings
    events.phase(5, "mosaic_first")
    made = _stack(range(len(job.subs)), job, Window.of_shape(job.canvas.shape))
    tile = made.tile
    mosaic = Mosaic(tile.image, tile.coverage, alpha_of(tile.coverage), job.canvas.wcs.deepcopy())
    mosaic, history = lecropper.polish(_with_data(mosaic), settings, events, keep=CLASSIC_KEEP, workers=job.workers)
    outcomes = [Outcome(-1, made.used[i], made.rejected[i], made.lost.get(i, "")) for i in range(len(job.subs))]
    return RouteResult(mosaic, outcomes, (), history)


def _master_tiles(job: Job) -> RouteResult:
    """Groups of frames → master tiles → levels between them → assembly."""
    events, settings = job.events, job.settings
    outcomes = [Outcome(-1, 0, 0, "") for _ in job.subs]
    records: list[TileRecord] = []
    if settings.use_existing_master_tiles:
        tiles, photometry = list(job.subs), job.photometry
        outcomes = [Outcome(i, sub.frame.shape[0] * sub.frame.shape[1], 0) for i, sub in enumerate(job.subs)]
    else:
        events.phase(5, "master_tiles")
        with fresh_folder(job.output_folder, "master_tiles") as folder:
            paths = build_master_tiles(job, folder, outcomes, records)
        events.phase(6, "intertile")
        tiles, photometry = match_tiles(paths, job)
    events.phase(7, "assembly")
    mosaic = assemble(
        tiles,
        read_master_tile,
        job.canvas,
        photometry.sky,
        settings.final_assembly_method,
        job.store,
        workers=job.workers,
        progress=partial(events.progress, "phase5_incremental"),
        check_stop=events.check_stop,
    )
    events.phase(8, "polish")
    mosaic, history = lecropper.polish(_with_data(mosaic), settings, events, keep=CLASSIC_KEEP, workers=job.workers)
    cards = (
        ("NTILES", len(tiles), "master tiles"),
        ("ASSEMBLY", settings.final_assembly_method, "final_assembly_method"),
    )
    return RouteResult(mosaic, outcomes, records, history, cards)


def build_master_tiles(job: Job, folder: Path, outcomes: list[Outcome], records: list[TileRecord]) -> list[Path]:
    """Cluster the frames, stack each group, save it in `folder`; fills in what became of every frame and tile.

    A tile is a window of the global grid with a WCS of its own, so its frames are interpolated only once.
    """
    events, settings = job.events, job.settings
    groups = cluster_frames(
        [sub.frame for sub in job.subs],
        settings.cluster_panel_threshold,
        settings.cluster_orientation_split_deg,
        settings.max_raw_per_master_tile,
    )
    paths = []
    for index, group in enumerate(groups):
        events.progress("master_tiles", index, len(groups))
        start = time.perf_counter()
        made = _stack(group, job)
        for i in group:
            outcomes[i] = Outcome(index, made.used[i], made.rejected[i], made.lost.get(i, ""))
        there = [i for i in group if i not in made.lost]
        if not there:
            continue
        tile, reason = finish_tile(made.tile, job)
        if reason:
            events.warning("run_warn_tile_rejected", index=index + 1, reason=reason)
            for i in there:
                outcomes[i] = replace(outcomes[i], lost=f"its master tile {index + 1} was rejected: {reason}")
            continue
        path = folder / f"master_tile_{index + 1:04d}.fits"
        frames = [job.subs[i].frame for i in there]
        save_master_tile(path, tile, [f.path.name for f in frames], sum(f.exposure or np.nan for f in frames))
        paths.append(path)
        seconds = time.perf_counter() - start
        median = float(np.nanmedian(tile.image[::4, ::4]))
        records.append(TileRecord(index, made.tile.window, len(there), median, 1.0, seconds))
        events.info("run_info_master_tile", index=index + 1, tiles=len(groups), frames=len(there), seconds=seconds)
        events.count("master_tile", index + 1, len(groups))
        if job.live:
            job.live.add(made.tile)
    if job.live:
        job.live.draw()
    if not paths:
        raise RunError("no master tile could be made")
    return paths


@contextmanager
def fresh_folder(parent: Path, name: str) -> Iterator[Path]:
    """Make ``name``, ``name_2``, … in a folder: the first that no other run has taken. Gone again if left empty."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        break
    try:
        (folder / UNFINISHED).touch()
        yield folder
    finally:
        with suppress(OSError):
            (folder / UNFINISHED).unlink()
            folder.rmdir()  # which takes nothing but empty folders


def finish_tile(tile: Tile, job: Job) -> tuple[Mosaic, str]:
    """A stacked group as a picture of its own: border cut, crops and clean-up as configured, and the gate's verdict."""
    settings = job.settings
    ys, xs = tile.window.slices
    picture = Mosaic(tile.image, tile.coverage, alpha_of(tile.coverage), job.canvas.wcs[ys, xs])
    if settings.apply_master_tile_crop:
        ny, nx = picture.shape
        dy, dx = (int(size * settings.master_tile_crop_percent / 100) for size in (ny, nx))
        picture = picture.crop(Window(dy, ny - dy, dx, nx - dx))
    if not (picture.coverage > 0).any():
        return picture, "it holds no valid pixel"
    picture = lecropper.crop_edges(picture, settings, job.events.detail)
    if settings.quality_gate_enabled:
        metrics = tile_metrics(
            picture.image,
            picture.coverage,
            settings.quality_gate_edge_band_px,
            settings.quality_gate_k_sigma,
            settings.quality_gate_erode_px,
        )
        reason = tile_gate(metrics, settings.quality_gate_threshold)
        if reason:
            return picture, reason
    return picture, ""


def match_tiles(paths: Sequence[Path], job: Job) -> tuple[list[Sub], Photometry]:
    """The master tiles as frames of their own, matched to each other in gain and level."""
    settings = _for_tiles(job.settings)
    tiles = steps.scan(paths, 1, Events(language=settings.language), tiles=True)
    steps.measure_all(tiles, Calibration(), settings, job.workers, job.events)
    if not tiles.frames:
        raise RunError("none of the master tiles can be read back")
    return steps.match(tiles, job.canvas, settings, job.workers, job.events)


def _for_tiles(settings: Settings) -> Settings:
    """The settings to measure and match master tiles with: no hot pixel is left in them."""
    changes: dict[str, object] = {"hot_pixel_correction": False}
    if not settings.intertile_photometric_match:
        changes["stacking_normalize_method"] = "none"
    return settings.model_copy(update=changes)


def _stack(members: Sequence[int], job: Job, window: Window | None = None) -> Stack:
    sky, settings = job.photometry.sky, job.settings

    def stack(members: Sequence[int]) -> Stack:
        means = job.calibration, settings, job.events
        return stack_subs(members, job.subs, sky, *means, room=job.store.room, workers=job.workers, window=window)

    return job.results.stack(members, job.subs, sky, settings, stack, window=window)()


def _with_data(mosaic: Mosaic) -> Mosaic:
    """The mosaic itself, if there is anything on it."""
    first = mosaic.image if mosaic.image.ndim == 2 else mosaic.image[..., 0]
    if not (np.isfinite(first) & (mosaic.coverage > 0)).any():
        raise RunError("the mosaic has no valid pixel: every sample was rejected or missing")
    return mosaic


ROUTES: dict[str, Callable[[Job], RouteResult]] = {
    "sds": _sds,
    "mosaic-first": _mosaic_first,
    "master-tiles": _master_tiles,
}


def routes_for(settings: Settings, sds: bool | None) -> list[str]:
    """The route asked for, and those to fall back to, in order."""
    order = list(ROUTES)
    if sds is None and settings.route != "auto":
        return order[order.index(settings.route) :]
    return order if (settings.sds_mode_default if sds is None else sds) else order[-1:]


def save(
    job: Job, intake: Intake, made: RouteResult, facts: ProductFacts, ledger: Ledger
) -> tuple[ProductPaths, Evidence | None]:
    """Write the product, and gather meanwhile what its report is to be made of."""
    settings = job.settings
    # A WCS is no thing for two threads at a time.
    seen = replace(made, mosaic=replace(made.mosaic, wcs=made.mosaic.wcs.deepcopy()))
    with side_by_side(job.workers) as start:
        evidence = start(gather_evidence, job, intake, seen)
        paths = save_product(
            job.output_folder,
            settings.output_name or facts.object or "mosaic",
            made.mosaic,
            facts=facts,
            ledger=ledger,
            tiles=made.tiles,
            settings_text=settings_toml(settings),
            preview=preview_settings(settings),
            workers=job.workers,
        )
        return paths, evidence.result()


def gather_evidence(job: Job, intake: Intake, made: RouteResult) -> Evidence | None:
    """What the report is to be made of; None where it is not wanted, or cannot be had."""
    if job.settings.report:
        with no_report_at_worst(job.events):
            return evidence_of_run(job, intake, made)
    return None


@contextmanager
def no_report_at_worst(events: Events) -> Iterator[None]:
    """The product is safe already: nothing that a page is made of is worth the end of a run of hours."""
    try:
        yield
    except Exception as problem:
        _logger.debug("report", exc_info=True)
        events.warning("run_warn_no_report", reason=str(problem) or type(problem).__name__)


def preview_settings(settings: Settings) -> PreviewSettings:
    """The ``preview_png_*`` settings."""
    return PreviewSettings(**{f.name: getattr(settings, f"preview_png_{f.name}") for f in fields(PreviewSettings)})


def _summary(route: str, made: RouteResult, ledger: Ledger) -> dict[str, object]:
    ny, nx = made.mosaic.shape
    return {"route": route, "used": len(ledger.used), "files": len(ledger), "width": nx, "height": ny}
