"""`zemosaic solve`: find frames on the sky, and write down where they are, without making a mosaic."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from astropy.io import fits
from astropy.wcs import WCS

from zemosaic.cache import Cache
from zemosaic.calibrate import load_calibration
from zemosaic.canvas import CanvasError, pixel_scale
from zemosaic.events import Events
from zemosaic.execute import one_thread_each, worker_count
from zemosaic.files import write_whole
from zemosaic.frames import Frame, FrameError, sidecar_name
from zemosaic.intake import Intake, locate_all, measure_all, scan
from zemosaic.product import set_exactly
from zemosaic.resume import Results
from zemosaic.settings import Settings
from zemosaic.solve.locate import Place

_COLUMNS = (
    "file",
    "status",
    "source",
    "checked",
    "stars",
    "residual_px",
    "ra_deg",
    "dec_deg",
    "scale_arcsec",
    "reason",
)


class SolvingError(Exception):
    """Nothing could be solved or written; the message says why and what to do."""


@dataclass(frozen=True)
class Solved:
    """What came of it.

    Parameters
    ----------
    places : dict
        Frame → where it is.
    left_out : dict
        File → why it is nowhere.
    written : tuple of Path
        Files that were written.
    """

    places: dict[Frame, Place]
    left_out: dict[Path, str]
    written: tuple[Path, ...]


def solve_files(
    inputs: Sequence[Path],
    settings: Settings,
    events: Events,
    *,
    folder: Path | None = None,
    sidecars: bool = False,
) -> Solved:
    """Find all frames of some files and folders on the sky.

    Parameters
    ----------
    inputs : sequence of Path
        Read only, but for `sidecars`.
    settings : Settings
        The ``solver_*`` settings and those of measuring.
    events : Events
        Hears of everything.
    folder : Path, optional
        Gets ``<frame>.wcs.fits`` for each frame and ``solutions.csv``.
    sidecars : bool
        Write ``<frame>.wcs.fits`` beside every frame that had no WCS or a wrong one; what is there already stays.

    Raises
    ------
    SolvingError
        No frame has a place on the sky, or a file cannot be written.
    """
    workers = worker_count(settings.num_processing_workers)
    try:
        calibration = load_calibration(settings.master_dark_path, settings.master_flat_path)
        with one_thread_each():
            events.phase(1, "scan")
            intake = scan(inputs, workers, events)
            intake.results = Results.of_run(Cache(None), intake.stamps, calibration=calibration, frames=intake.frames)
            if not intake.frames:
                raise SolvingError(_nothing(intake))
            events.phase(2, "measure")
            measure_all(intake, calibration, settings, workers, events)
            events.phase(3, "solve")
            before = {frame.path: frame for frame in intake.frames}
            found = locate_all(intake, settings, workers, events)
    except (CanvasError, FrameError) as problem:
        raise SolvingError(str(problem)) from problem
    there = [place for place in found.frames if place.wcs is not None]
    places = dict(zip(intake.frames, there, strict=True))
    if not places:
        raise SolvingError(_nothing(intake))
    written: list[Path] = []
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for frame, place in places.items():
                written.append(_write_wcs(folder / sidecar_name(frame.path), frame, place))
            table = folder / "solutions.csv"
            write_whole(table, _table(places, intake.rejected).encode())
            written.append(table)
        if sidecars:
            for frame, place in places.items():
                beside = frame.path.with_name(sidecar_name(frame.path))
                if before[frame.path].wcs is not place.wcs and not os.path.lexists(beside):
                    written.append(_write_wcs(beside, frame, place))
    except OSError as problem:
        raise SolvingError(f"{problem.filename} cannot be written: {problem.strerror}") from problem
    return Solved(places, dict(intake.rejected), tuple(written))


def solved_lines(solved: Solved) -> list[str]:
    """A line for every file: where it is, how that is known, and how well it fits."""
    lines = []
    for frame, place in solved.places.items():
        ra, dec, scale = _centre(frame, place)
        how = place.source or "?"
        fit = f"{place.matched} stars within {place.residual:.2f} px" if math.isfinite(place.residual) else "unchecked"
        lines.append(f"{frame.path.name}: {ra:.5f} {dec:+.5f}, {scale:.4f} arcsec/px, by {how}, {fit}")
    return lines + [f"{path.name}: not solved: {why}" for path, why in solved.left_out.items()]


def _nothing(intake: Intake) -> str:
    if not intake.files:
        return "no frame was found: there is no FITS file among the inputs; name files or their folder"
    path, why = next(iter(intake.rejected.items()))
    return f"none of {len(intake.files)} files has a place on the sky; of {path.name} it is said: {why}"


def _centre(frame: Frame, place: Place) -> tuple[float, float, float]:
    assert place.wcs is not None
    ny, nx = frame.shape
    ra, dec = place.wcs.all_pix2world([[(nx - 1) / 2, (ny - 1) / 2]], 0)[0]
    return float(ra), float(dec), pixel_scale(place.wcs)


def _table(places: dict[Frame, Place], left_out: dict[Path, str]) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(_COLUMNS)
    for frame, place in places.items():
        ra, dec, scale = _centre(frame, place)
        fit = (place.matched, f"{place.residual:.3f}")
        sky = (f"{ra:.7f}", f"{dec:.7f}", f"{scale:.5f}")
        rows.writerow((frame.path, "solved", place.source, place.checked, *fit, *sky, ""))
    for path, why in left_out.items():
        rows.writerow((path, "not solved", "", False, 0, "nan", "nan", "nan", "nan", why))
    return text.getvalue()


def _write_wcs(path: Path, frame: Frame, place: Place) -> Path:
    """A FITS file of one header: the WCS, with the size of the image it belongs to."""
    assert place.wcs is not None
    header = wcs_header(place.wcs)
    ny, nx = frame.shape
    header["IMAGEW"], header["IMAGEH"] = (nx, "width of the image, pixels"), (ny, "height of the image, pixels")
    header["SOLVER"] = (place.source or "", "who says so")
    stream = io.BytesIO()
    fits.PrimaryHDU(header=header).writeto(stream)
    write_whole(path, stream.getvalue())
    return path


def wcs_header(wcs: WCS) -> fits.Header:
    """A WCS as FITS cards, SIP included, with all digits that a float has."""
    header = wcs.to_header(relax=True)
    for keyword in list(header):
        if keyword.startswith(("PC", "CDELT")):
            del header[keyword]
    set_exactly(header, wcs)
    return header
