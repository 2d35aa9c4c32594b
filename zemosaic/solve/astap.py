"""ASTAP as a plate solver: it gets a clean, binned copy of the frame in a temporary folder.

ASTAP reads its arguments and writes its answer as its manual says (hnsky.org, "ASTAP command line"): right
ascension in hours, the distance from the south pole instead of a declination that could be negative, the height of
the field; a file ``.ini`` with ``PLTSOLVD`` and the WCS, or with ``ERROR``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

from zemosaic.calibrate import find_hot_pixels
from zemosaic.settings import Settings
from zemosaic.solve.embedded import SolveError
from zemosaic.solve.external import (
    NOT_FOUND,
    find_astap,
    instance,
    last_words,
    linear_wcs,
    never_stop,
    run_program,
    working_folder,
)
from zemosaic.solve.hint import Hint
from zemosaic.stars import colour_planes
from zemosaic.tiles import FloatImage

_IMAGE = "frame.fits"
_ANSWER = "solution"
_ANSWER_BYTES = 1 << 16
_MIN_CELLS = 32  # side of the smallest copy in which ASTAP can find anything
_FULL_SCALE = 60000.0  # ASTAP's histogram ends at 65535
_SKY_DEPTH = 20.0  # noise sigmas below the sky at which the copy is zero

_BINNING = 2
_WHOLE_SKY = 180.0

# Names of the first file of every kind of star database: 1476 or 290 areas, or one file.
_DATABASES = ("*_0101.1476", "*_0101.290", "*_0101.001")
_DATABASE_PLACES = (
    "/opt/astap",
    "/usr/share/astap/data",
    "/usr/local/share/astap",
    "/usr/local/opt/astap",  # macOS
    "/Applications/ASTAP.app/Contents/MacOS",
    "C:/Program Files/astap",
)

# Exit status as in the manual; the command line version of 2022 ends with 1 whatever happened, and says it in its file.
_STATUS = {
    1: "ASTAP found no solution",
    2: "ASTAP found too few stars",
    16: "ASTAP could not read the image",
    32: "ASTAP found no star database: install one or say in astap_data_directory_path where it is",
    33: "ASTAP could not read its star database: install it again",
}
_ERROR = {"no star database": 32, "reading star database": 33, "reading image": 16}


@dataclass(frozen=True)
class AstapOptions:
    """How ASTAP is run.

    Parameters
    ----------
    program : Path
        Absolute.
    database : Path or None
        Folder of the star database; None = where ASTAP itself looks.
    search_radius : float
        Degrees; hints that are less sure of the place count instead.
    downsample : int
        Binning of the frame in which ASTAP looks for stars; 2 at least, 0 = ASTAP decides, from 2 on.
    instances : int
        Programs at the same time.
    timeout : float
        Seconds.
    check_stop : callable
        Raises when the run shall end; called while ASTAP works.
    """

    program: Path
    database: Path | None = None
    search_radius: float = 3.0
    downsample: int = 2
    instances: int = 1
    timeout: float = 60.0
    check_stop: Callable[[], None] = never_stop


def astap_options(settings: Settings, check_stop: Callable[[], None] = never_stop) -> AstapOptions:
    """The options that the settings ask for.

    Raises
    ------
    SolveError
        ASTAP is not there.
    """
    program = find_astap(settings.astap_executable_path)
    if program is None:
        raise SolveError(NOT_FOUND["astap"])
    return AstapOptions(
        program=program,
        database=find_database(settings.astap_data_directory_path, program),
        search_radius=settings.astap_default_search_radius,
        downsample=settings.astap_default_downsample,
        instances=settings.astap_max_instances,
        timeout=settings.solver_timeout_s,
        check_stop=check_stop,
    )


def find_database(setting: str | Path, program: Path) -> Path | None:
    """Folder of ASTAP's star database: as set, else where there is one, beside the program first; else None."""
    if str(setting):
        return Path(setting).expanduser().absolute()
    folders: Iterable[Path] = (program.parent, program.resolve().parent, *map(Path, _DATABASE_PLACES))
    return next((folder for folder in folders if any(next(folder.glob(name), None) for name in _DATABASES)), None)


def solve_astap(pixels: FloatImage, hint: Hint, options: AstapOptions) -> WCS:
    """Find a frame's WCS with ASTAP.

    Parameters
    ----------
    pixels : ndarray
        ``(ny, nx)`` CFA or mono, or ``(ny, nx, 3)``; float32, any linear unit, NaN = no data. Left as it is.
    hint : Hint
        Where to look and how large the pixels are, as far as known.
    options : AstapOptions

    Returns
    -------
    WCS
        Linear TAN, ICRS, of the whole frame; `pixel_shape` set. Unverified.

    Raises
    ------
    SolveError
        No solution, or why there could be none; one sentence.
    """
    copy = binned_copy(pixels)
    shape = pixels.shape[0], pixels.shape[1]
    with instance(options.program, options.instances, options.check_stop), working_folder() as folder:
        fits.PrimaryHDU(copy).writeto(folder / _IMAGE)
        command = [str(options.program), *_arguments(hint, options, copy.shape[0])]
        status, output = run_program(command, folder, options.timeout, options.check_stop)
        answer = _read_answer(folder / f"{_ANSWER}.ini")
    if answer.get("PLTSOLVD") != "T":
        raise SolveError(_reason(status, answer.get("ERROR", ""), output))
    return linear_wcs(answer, shape, "ASTAP", _BINNING)


def binned_copy(pixels: FloatImage) -> FloatImage:
    """What ASTAP gets: 2x2 means of the frame in one colour, mended, in positive numbers that fit 16 bits.

    Binned, a Bayer mosaic is a luminance. Hot pixels, on which ASTAP's star finder would spend its stars, stand out
    alone afterwards as before; those of stars do not (see `find_hot_pixels`).

    Returns
    -------
    ndarray
        ``(ny // 2, nx // 2)`` float32; the pixel ``[0, 0]`` covers the frame's first 2x2.

    Raises
    ------
    SolveError
        The frame is too small or empty.
    """
    planes = np.stack([plane.data for plane in colour_planes(pixels, None)])
    plane: FloatImage = planes.mean(axis=0, dtype=np.float32)
    if min(plane.shape) < _MIN_CELLS:
        raise SolveError(f"a frame of {pixels.shape[1]} x {pixels.shape[0]} px is too small for ASTAP")
    known = np.isfinite(plane)
    if known.mean() < 0.5:
        raise SolveError("most of the frame has no data")
    sky = np.median(plane[known])
    plane[~known] = sky
    find_hot_pixels(plane, bayer=False).apply(plane)
    floor = sky - _SKY_DEPTH * 1.4826 * np.median(np.abs(plane - sky))
    span = float(plane.max()) - float(floor)
    if not span > 0:
        raise SolveError("the frame is flat: there are no stars in it")
    return np.clip((plane - floor) * (_FULL_SCALE / span), 0, _FULL_SCALE).astype(np.float32)


def _arguments(hint: Hint, options: AstapOptions, rows: int) -> list[str]:
    """The command line after the program, for a copy of so many rows."""
    height = 0.0 if hint.scale is None else rows * _BINNING * hint.scale / 3600
    if hint.ra is None or hint.dec is None:
        ra, dec, radius = 0.0, 0.0, _WHOLE_SKY
    else:
        ra, dec, radius = hint.ra, hint.dec, max(hint.radius or 0.0, options.search_radius)
    further = max(1, options.downsample // _BINNING) if options.downsample else 0
    place = ["-ra", f"{ra % 360 / 15:.6f}", "-spd", f"{dec + 90:.6f}", "-r", f"{radius:.3f}"]
    database = [] if options.database is None else ["-d", str(options.database)]
    return ["-f", _IMAGE, "-o", _ANSWER, "-fov", f"{height:.5f}", *place, "-z", str(further), *database]


def _read_answer(path: Path) -> dict[str, str]:
    """The lines ``KEY=value`` of ASTAP's answer; empty if there is none."""
    try:
        with open(path, "rb") as file:
            text = file.read(_ANSWER_BYTES).decode("latin-1")
    except FileNotFoundError:
        return {}
    pairs = (line.partition("=") for line in text.splitlines())
    return {key.strip().upper(): value.strip() for key, equals, value in pairs if equals}


def _reason(status: int, error: str, output: str) -> str:
    """Why there is no solution, in one sentence."""
    status = next((code for words, code in _ERROR.items() if words in error.lower()), status)
    if status in _STATUS:
        return _STATUS[status]
    if status == 0:
        return "ASTAP ended without an answer"
    return f"ASTAP failed with exit status {status}{last_words(error) or last_words(output)}"
