"""astrometry.net's ``solve-field`` as a plate solver: it gets our list of stars, never an image.

Its own detection hangs in frames with hot pixels, and the steps that it does in Python (removing lines, spreading
the stars evenly) fail where another Python is first in PATH, such as that of our own virtual environment; without
them it takes 0.05 s instead of 1.4 s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS
from numpy.typing import ArrayLike

from zemosaic.execute import worker_count
from zemosaic.headers import CARD_LENGTH, Cards, parse_cards
from zemosaic.settings import Settings
from zemosaic.solve.embedded import SolveError
from zemosaic.solve.external import (
    NOT_FOUND,
    find_solve_field,
    has_indexes,
    instance,
    last_words,
    linear_wcs,
    never_stop,
    run_program,
    working_folder,
)
from zemosaic.solve.hint import Hint

_LIST = "stars.xyls"
_CONFIG = "astrometry.cfg"
_NAME = "solution"
_HEADER_BYTES = 1 << 20
_MIN_STARS = 4  # a quad
_MIN_SCALE_ERROR = 0.01
_WHOLE_SKY = 180.0
# Quads are made of the 60 brightest stars at most: a field that is not there is given up after 2 s instead of 8, and no
# solution was lost. Matches are verified with all stars.
_DEPTH = "10,20,30,40,60"
_OUTPUTS = ("new-fits", "solved", "match", "rdls", "corr", "index-xyls")  # files that nobody needs


@dataclass(frozen=True)
class AstrometryOptions:
    """How ``solve-field`` is run.

    Parameters
    ----------
    program : Path
        Absolute.
    config : Path or None
        Its configuration file, which names the index files; None = that of its installation.
    indexes : Path or None
        Folder of index files, in place of a configuration file.
    instances : int
        Programs at the same time.
    timeout : float
        Seconds.
    check_stop : callable
        Raises when the run shall end; called while it works.
    """

    program: Path
    config: Path | None = None
    indexes: Path | None = None
    instances: int = 1
    timeout: float = 60.0
    check_stop: Callable[[], None] = never_stop


def astrometry_options(settings: Settings, check_stop: Callable[[], None] = never_stop) -> AstrometryOptions:
    """The options that the settings ask for; as many instances as the run has workers.

    Raises
    ------
    SolveError
        ``solve-field`` is not there.
    """
    program = find_solve_field(settings.astrometry_local_path)
    if program is None:
        raise SolveError(NOT_FOUND["astrometry"])
    given = Path(settings.astrometry_local_path).expanduser().absolute()
    return AstrometryOptions(
        program=program,
        config=given if given.suffix == ".cfg" else None,
        indexes=given if has_indexes(settings.astrometry_local_path) else None,
        instances=worker_count(settings.num_processing_workers),
        timeout=settings.solver_timeout_s,
        check_stop=check_stop,
    )


def solve_astrometry_net(
    x: ArrayLike, y: ArrayLike, flux: ArrayLike, shape: tuple[int, int], hint: Hint, options: AstrometryOptions
) -> WCS:
    """Find a frame's WCS with ``solve-field``.

    Parameters
    ----------
    x, y : array_like
        ``(n,)`` pixels of the frame, 0-based.
    flux : array_like
        ``(n,)`` any unit; the brightest are tried first.
    shape : tuple of int
        ``(ny, nx)`` of the frame.
    hint : Hint
        Where to look and how large the pixels are, as far as known.
    options : AstrometryOptions

    Returns
    -------
    WCS
        Linear TAN, ICRS; `pixel_shape` set. Unverified.

    Raises
    ------
    SolveError
        No solution, or why there could be none; one sentence.
    """
    columns = {"X": np.asarray(x, float) + 1, "Y": np.asarray(y, float) + 1, "FLUX": np.asarray(flux, float)}
    if len(columns["X"]) < _MIN_STARS:
        raise SolveError(f"{len(columns['X'])} stars are too few for solve-field")
    table = fits.BinTableHDU.from_columns([fits.Column(name, "D", array=values) for name, values in columns.items()])
    with instance(options.program, options.instances, options.check_stop), working_folder() as folder:
        table.writeto(folder / _LIST)
        command = [str(options.program), *_arguments(shape, hint, options), *_config(folder, options), _LIST]
        status, output = run_program(command, folder, options.timeout, options.check_stop)
        cards = _read_header(folder / f"{_NAME}.wcs")
    if not cards:
        raise SolveError(_reason(status, output))
    return linear_wcs(cards, shape, "solve-field")


def _arguments(shape: tuple[int, int], hint: Hint, options: AstrometryOptions) -> list[str]:
    """The command line between the program and its configuration."""
    arguments = ["--no-plots", "--overwrite", "--no-remove-lines", "--uniformize", "0"]
    arguments += ["--dir", ".", "--temp-dir", ".", "--out", _NAME]
    for output in _OUTPUTS:
        arguments += [f"--{output}", "none"]
    arguments += ["--width", str(shape[1]), "--height", str(shape[0])]
    arguments += ["--x-column", "X", "--y-column", "Y", "--sort-column", "FLUX", "--depth", _DEPTH]
    # A linear fit to all matches halves the error of the plain match (0.14 px in the corners instead of 0.30).
    arguments += ["--crpix-center", "--tweak-order", "1", "--cpulimit", str(math.ceil(options.timeout))]
    if hint.scale is not None:
        error = max(hint.scale_error, _MIN_SCALE_ERROR)
        low, high = hint.scale / (1 + error), hint.scale * (1 + error)
        arguments += ["--scale-units", "arcsecperpix", "--scale-low", f"{low:.5f}", "--scale-high", f"{high:.5f}"]
    if hint.ra is not None and hint.dec is not None:
        # With "=", because a declination may begin with a minus sign.
        arguments += [f"--ra={hint.ra:.6f}", f"--dec={hint.dec:.6f}", f"--radius={hint.radius or _WHOLE_SKY:.3f}"]
    return arguments


def _config(folder: Path, options: AstrometryOptions) -> list[str]:
    """Arguments that name the configuration file, which is written if only a folder of index files is known."""
    if options.indexes is not None:
        text = f"add_path {options.indexes}\nautoindex\n"
        (folder / _CONFIG).write_text(text, encoding="utf-8")
        return ["--config", _CONFIG]
    return [] if options.config is None else ["--config", str(options.config)]


def _read_header(path: Path) -> Cards:
    """The cards of a solution; empty if there is none."""
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER_BYTES).decode("latin-1")
    except FileNotFoundError:
        return {}
    return parse_cards(header[i : i + CARD_LENGTH] for i in range(0, len(header), CARD_LENGTH))


def _reason(status: int, output: str) -> str:
    """Why there is no solution, in one sentence."""
    if "at least one index" in output:
        return "solve-field has no index files: install some or say in astrometry_local_path where they are"
    if status:
        return f"solve-field failed with exit status {status}{last_words(output)}"
    return "solve-field found no solution"
