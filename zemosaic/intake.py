"""What every route begins with: files → frames → canvas → measures → one photometric scale.

Each step keeps what it can use and says of everything else why not; nothing is lost on the way.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from zemosaic import misfits
from zemosaic.cache import Stamp, stamp_of
from zemosaic.calibrate import Calibration
from zemosaic.canvas import Canvas, CanvasError, find_strays, pixel_scale, plan_canvas
from zemosaic.carry import Carried, shifted_map
from zemosaic.coadd import Sub
from zemosaic.events import Events
from zemosaic.execute import elsewhere, memory_budget, thread_map
from zemosaic.frames import Camera, Frame, FrameError, find_files, read_frame
from zemosaic.headers import printable
from zemosaic.measure import FrameMeasure, measure_frame, probe_aperture
from zemosaic.photometry import Photometry, match_frames
from zemosaic.resume import CHANGED, Results
from zemosaic.settings import Settings
from zemosaic.solve.embedded import SolveError
from zemosaic.solve.hint import hint_of
from zemosaic.solve.locate import Place, Places, header_check, locate
from zemosaic.stars import Aperture
from zemosaic.warp import PixelMap, pixel_map

_CANVAS_COPIES = 3  # of image and coverage that exist at the same time in the last steps of a run


@dataclass
class Intake:
    """Frames on their way to a route, and the reasons of those that were left behind.

    Parameters
    ----------
    files : list of Path
        Everything that was found.
    rejected : dict
        File → why it is not used.
    frames, measures : list
        What is still in, in order of time; `measures` from `measure_all` on.
    measured : dict
        File → its measure, also of frames that were left out afterwards.
    stamps : dict
        File → what it was like when its header was read.
    results : Results
        What is kept of earlier runs, and for later ones.
    carried : Carried or None
        The state of the last run, if this one goes on from there.
    said : dict
        File → what its own WCS is worth, from `measure_all` on.
    aperture : Aperture
        Of the photometry, from `measure_all` on.
    zooms : dict
        By how much it is larger for every camera.
    """

    files: list[Path]
    rejected: dict[Path, str] = field(default_factory=dict)
    frames: list[Frame] = field(default_factory=list)
    measures: list[FrameMeasure] = field(default_factory=list)
    measured: dict[Path, FrameMeasure] = field(default_factory=dict)
    stamps: dict[Path, Stamp] = field(default_factory=dict)
    results: Results = field(default_factory=Results)
    carried: Carried | None = None
    said: dict[Path, Place] = field(default_factory=dict)
    aperture: Aperture = field(default_factory=Aperture)
    zooms: dict[Camera, float] = field(default_factory=dict)

    def drop(self, reasons: Sequence[str], events: Events, key: str = "run_warn_frame_left_out") -> None:
        """Leave out the frames that have a reason, keep those whose reason is empty."""
        for frame, reason in zip(self.frames, reasons, strict=True):
            if reason:
                self.rejected[frame.path] = reason
                events.warning(key, name=printable(frame.path.name), reason=reason)
        stay = [i for i, reason in enumerate(reasons) if not reason]
        self.frames = [self.frames[i] for i in stay]
        self.measures = [self.measures[i] for i in stay] if self.measures else []

    def old_frames(self) -> list[int]:
        """Where the frames of the last run are, if this one goes on from there; one that was left out ends that."""
        rows = self.carried.rows(self.frames, self.results) if self.carried is not None else []
        if not rows:
            self.carried = None
        return rows


def scan(inputs: Sequence[Path], workers: int, events: Events, *, tiles: bool = False) -> Intake:
    """Find the files and read their headers; frames come back in order of time, whatever the file order.

    What this program made itself is no sub, should the output lie among the inputs; `tiles` lets it in.

    Raises
    ------
    FrameError
        If an input does not exist.
    """
    files = find_files(inputs)
    events.info("run_info_scan_found", n=len(files))
    intake = Intake(files)
    step = max(1, len(files) // 50)
    for i, (path, found) in enumerate(zip(files, thread_map(_read, files, workers), strict=True), start=1):
        events.check_stop()
        if isinstance(found, tuple):
            frame, intake.stamps[path] = found
            intake.frames.append(frame)
        else:
            intake.rejected[path] = found
            events.warning("run_warn_frame_left_out", name=printable(path.name), reason=found)
        if i % step == 0 or i == len(files):
            events.progress("phase1_scan", i, len(files))
    intake.frames.sort(key=lambda f: (f.date_obs, f.path.name, str(f.path)))
    intake.drop(misfits.not_lights(intake.frames, tiles=tiles), events)
    return intake


def _read(path: Path) -> tuple[Frame, Stamp] | str:
    try:
        before = stamp_of(path)
        frame = read_frame(path)
    except FrameError as problem:
        return str(problem)
    return (frame, before) if before.fits(path) else CHANGED


def place(intake: Intake, settings: Settings, events: Events, budget: int, output_folder: Path) -> Canvas:
    """Leave out what cannot share a canvas, then plan it.

    Raises
    ------
    CanvasError
        If no canvas can be made of what is left, or it would not fit into `budget` bytes of memory or on the disk
        of `output_folder`.
    """
    mono = select(intake, events)
    carried = intake.carried if intake.old_frames() else None
    if carried is None or not carried.reaches(intake.frames):
        intake.carried = None
        canvas = plan_canvas(intake.frames, settings)
    else:
        canvas, extent = carried.canvas(intake.frames)
        intake.results = replace(intake.results, origin=(-extent.y0, -extent.x0))
        events.info("run_info_carried", old=len(carried.names), new=len(intake.frames) - len(carried.names))
    events.info("run_info_canvas", width=canvas.shape[1], height=canvas.shape[0], scale=canvas.scale)
    check_room(canvas, 1 if mono else 3, budget, output_folder, events)
    return canvas


def select(intake: Intake, events: Events) -> bool:
    """Leave out what cannot share a canvas with the rest; True if what is left is mono, False if in colour.

    Raises
    ------
    CanvasError
        If nothing is left.
    """
    if not intake.files:
        raise CanvasError("no frame was found: there is no FITS file among the inputs; name files or their folder")
    intake.drop([_unplaced(f) for f in intake.frames], events)
    intake.drop(find_strays(intake.frames), events, "run_warn_stray_pointing")
    intake.drop(misfits.of_another_kind(intake.frames), events)
    if intake.measures:  # a plan is made without
        intake.drop(misfits.duplicates(intake.frames, intake.measures), events)
        intake.drop(misfits.without_stars(intake.frames, intake.measures), events)
        intake.drop(misfits.in_other_units(intake.measures), events)
    _check_left(intake)
    filters = misfits.filters_mixed(intake.frames)
    if filters:
        events.warning("run_warn_filters_mixed", filters=", ".join(f"{name} ({n})" for name, n in filters.items()))
    return intake.frames[0].colour == "mono"


def check_room(canvas: Canvas, channels: int, budget: int, output_folder: Path, events: Events) -> None:
    """Refuse a canvas that neither memory nor disk can hold, with the numbers."""
    ny, nx = canvas.shape
    need = ny * nx * (channels + 1) * 4 * _CANVAS_COPIES
    events.info("run_info_memory_forecast", need_gb=need / 2**30, budget_gb=budget / 2**30)
    if need > budget:
        raise CanvasError(
            f"a canvas of {nx} x {ny} px needs {need / 2**30:.2f} GB of memory and the run may use "
            f"{budget / 2**30:.2f} GB: allow more (memory_gb), choose a coarser scale (global_wcs_res_override) or "
            "split the field"
        )
    product = ny * nx * (4 * channels + 5)  # image, coverage and alpha
    parent = next(p for p in (output_folder, *output_folder.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(parent).free
    if product > free:
        raise CanvasError(
            f"a mosaic of {nx} x {ny} px takes {product / 2**30:.2f} GB and {parent} has {free / 2**30:.2f} GB left: "
            "make room, choose another output folder or a coarser scale (global_wcs_res_override)"
        )


def _check_left(intake: Intake) -> None:
    if not intake.frames:
        reason, count = Counter(intake.rejected.values()).most_common(1)[0]
        raise CanvasError(f"no frame is left of {len(intake.files)} files; of {count} it is said: {reason}")


def _unplaced(frame: Frame) -> str:
    if frame.wcs is not None:
        system = (frame.wcs.wcs.lngtyp, frame.wcs.wcs.radesys)
        if frame.wcs.wcs.lngtyp != "RA" or frame.wcs.wcs.radesys.startswith("FK4"):
            return "its WCS is not in equatorial coordinates of J2000 ({} {}): solve it again".format(*system).replace(
                " )", ")"
            )
        return ""
    return frame.wcs_problem or "it has no WCS, neither in its header nor in a sidecar file: solve it first"


def measure_all(intake: Intake, calibration: Calibration, settings: Settings, workers: int, events: Events) -> None:
    """Find the stars and sample the sky of every frame; frames that cannot be read leave here.

    The WCS of each is held against its stars at once: that keeps this process busy while others measure.
    """
    frames = intake.frames
    hot = settings.hot_pixel_sigma if settings.hot_pixel_correction else None
    results = intake.results
    scales = _typical_scales(frames)
    # Of the frames, not of the cameras: one odd frame must not change the aperture of all others.
    usual = [scales[frame.camera] for frame in frames if frame.camera in scales]
    scale = float(np.median(usual)) if usual else 1.0
    zooms = {kind: scale / own for kind, own in scales.items()}
    old = intake.old_frames()
    reasons: list[str] = []
    measures: list[FrameMeasure] = []
    here = partial(measure_frame, calibration=calibration, hot_sigma=hot)
    budget = memory_budget(settings.memory_gb)
    # The star finder keeps the interpreter's lock.
    with elsewhere(here, workers, len(frames), budget) as (measure, threads):
        if intake.carried is None:
            probes = _probes(intake)
            aperture = results.aperture(probes, lambda: probe_aperture(probes, calibration, workers=workers))
        else:
            aperture = intake.carried.aperture
            zooms |= {frames[i].camera: zoom for i, zoom in zip(old, intake.carried.zooms.tolist(), strict=True)}
        intake.aperture, intake.zooms = aperture, zooms
        check = header_check(settings)

        def work(frame: Frame) -> FrameMeasure | str:
            made = _measure(frame, measure, aperture, zooms, hot, events, results)
            if check is not None and isinstance(made, FrameMeasure):
                intake.said[frame.path] = check(frame, made)
            return made

        for i, found in enumerate(thread_map(work, frames, threads), start=1):
            if isinstance(found, FrameMeasure):
                measures.append(found)
                reasons.append("")
            else:
                reasons.append(found)
            events.progress("sds_measure", i, len(frames))
    intake.drop(reasons, events)
    intake.measures = measures
    intake.measured = {frame.path: measure for frame, measure in zip(intake.frames, measures, strict=True)}


def _probes(intake: Intake) -> list[Frame]:
    """Frames to choose the aperture by, in an order that their contents decide, so that it is hardly ever another one
    because of files that are no good: where frames are placed already, those of the field; of copies only one.
    """
    fit = placed_frames(intake) or intake.frames
    stamps = intake.stamps
    order = {stamps[f.path].content if f.path in stamps else str(f.path): f for f in reversed(fit)}
    return [order[content] for content in sorted(order)]


def _typical_scales(frames: Sequence[Frame]) -> dict[Camera, float]:
    """Arcseconds per pixel of every camera: the median of what WCSs say, else what headers hint at, if anything."""
    said: dict[Camera, list[float]] = {}
    hinted: dict[Camera, list[float]] = {}
    for frame in frames:
        if frame.wcs is not None:
            said.setdefault(frame.camera, []).append(pixel_scale(frame.wcs))
        elif (hint := hint_of(frame)[0].scale) is not None:
            hinted.setdefault(frame.camera, []).append(hint)
    return {kind: float(np.median(scales)) for kind, scales in (hinted | said).items()}


def _measure(
    frame: Frame,
    measure: Callable[..., FrameMeasure],
    aperture: Aperture,
    zooms: Mapping[Camera, float],
    hot_sigma: float | None,
    events: Events,
    results: Results,
) -> FrameMeasure | str:
    events.check_stop()
    # The aperture is the same on the sky for every camera.
    zoom = zooms.get(frame.camera, 1.0)
    own = Aperture(aperture.radius * zoom, aperture.inner * zoom, aperture.outer * zoom)
    try:
        found = results.measure(frame, own, hot_sigma, lambda: measure(frame, aperture=own))
    except FrameError as problem:
        return str(problem)
    if not np.isfinite(found.sky).all():
        return "it holds no valid pixels"
    if not (found.noise > 0).all():
        return "its pixels are all alike: it is empty or saturated"
    return found


def locate_all(intake: Intake, settings: Settings, workers: int, events: Events) -> Places:
    """Check, find and refine the WCS of all frames; those that have no place on the sky leave here.

    Raises
    ------
    CanvasError
        If the solver that was asked for is not installed.
    """
    try:
        places = locate(
            intake.frames,
            intake.measures,
            settings,
            events,
            workers=workers,
            said=intake.said,
            recall=lambda frame, make: intake.results.place(frame, settings, make),
        )
    except SolveError as problem:
        raise CanvasError(str(problem)) from problem
    intake.frames = [
        frame if place.wcs is frame.wcs or place.wcs is None else replace(frame, wcs=place.wcs, wcs_source=place.source)
        for frame, place in zip(intake.frames, places.frames, strict=True)
    ]
    counts = Counter(place.source for place in places.frames if place.wcs is not None)
    if places.agreement is not None:
        agreed = {"median": places.agreement.median, "p95": places.agreement.p95}
        events.info(
            "run_info_located",
            found=counts.total(),
            frames=len(intake.frames),
            solved=sum(n for source, n in counts.items() if source not in ("header", "sidecar")),
            unchecked=sum(place.wcs is not None and not place.checked for place in places.frames),
            **agreed,
        )
    intake.drop([_no_place(place) for place in places.frames], events)
    return places


def _no_place(place: Place) -> str:
    if place.wcs is not None:
        return ""
    return f"it was not found on the sky: {place.reason}"


def foresee(intake: Intake, settings: Settings, events: Events, budget: int, output_folder: Path) -> list[Frame]:
    """Refuse frames and a canvas that are too large before any pixel is read, as far as headers can tell.

    Returns
    -------
    list of Frame
        Those that a WCS places in the field already; none if all are to be solved anew.

    Raises
    ------
    CanvasError
        If it would not fit into memory or on the disk.
    """
    intake.drop(misfits.of_impossible_size(intake.frames, budget), events)
    placed = [] if settings.force_resolve_existing_wcs else placed_frames(intake)
    if placed:
        channels = 1 if all(frame.colour == "mono" for frame in placed) else 3
        check_room(plan_canvas(placed, settings), channels, budget, output_folder, events)
    return placed


def placed_frames(intake: Intake) -> list[Frame]:
    """Frames that a WCS places in the field, before any was solved."""
    placed = [frame for frame in intake.frames if not _unplaced(frame)]
    return [frame for frame, why in zip(placed, find_strays(placed), strict=True) if not why]


def match(
    intake: Intake, canvas: Canvas, settings: Settings, workers: int, events: Events
) -> tuple[list[Sub], Photometry]:
    """Pixel maps and one photometric scale for all frames that are left.

    Raises
    ------
    CanvasError
        If none is left.
    """
    _check_left(intake)

    carried, old = intake.carried, intake.old_frames()
    grid = canvas.wcs if carried is None else carried.grid
    dy, dx = intake.results.origin
    known = {i: carried.maps[k] for k, i in enumerate(old)} if carried is not None else {}

    def work(i: int) -> PixelMap:
        events.check_stop()
        frame = intake.frames[i]
        made = known.get(i) or pixel_map(frame.wcs, frame.shape, grid, canvas.window_of(frame).shift(-dy, -dx))
        return shifted_map(made, dy, dx)

    maps = list(thread_map(work, range(len(intake.frames)), workers))
    held = carried.held(old) if carried is not None else None
    photometry = match_frames(intake.frames, intake.measures, maps, canvas, settings, held, workers)
    groups = len(set(photometry.sky_groups.tolist()))
    events.info("run_info_levels_solved", frames=len(maps), groups=groups)
    if groups > 1:
        events.warning("run_warn_levels_groups", groups=groups)
    if photometry.unmatched:
        names = ", ".join(printable(intake.frames[i].path.name) for i in photometry.unmatched[:3])
        events.warning("run_warn_few_stars", n=len(photometry.unmatched), examples=names)
    subs = [
        Sub(frame, measure.repairs, each, adjustment, noise, weight)
        for frame, measure, each, adjustment, noise, weight in zip(
            intake.frames,
            intake.measures,
            maps,
            photometry.adjustments,
            photometry.noise,
            photometry.weight,
            strict=True,
        )
    ]
    return subs, photometry
