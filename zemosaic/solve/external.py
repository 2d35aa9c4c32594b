"""What the external plate solvers share: finding the program, running it, reading its WCS, and their order.

A program is started without a shell, in a process group of its own and in a temporary folder that nothing outlives.
All files it reads and writes lie there under plain relative names, so that neither the names of the user's files nor
an odd temporary folder can be taken for options or cross a wrong character encoding, and nothing is ever written
beside a raw frame.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import psutil
from astropy.wcs import WCS

from zemosaic.headers import HeaderError, Value, number, sky_wcs
from zemosaic.settings import Settings
from zemosaic.solve.embedded import SolveError

Solver = Literal["embedded", "astap", "astrometry"]

# Without a window of its own: ASTAP's older command line opens one on Windows. Zero elsewhere.
_CREATION_FLAGS = getattr(subprocess, "CREATE_NO_WINDOW", 0) | getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
_POLL_S = 0.1
_OUTPUT = "output.txt"
_TAIL_BYTES = 2000

# The programs for the command line come first: a graphical one needs a display.
_ASTAP_NAMES = ("astap_cli", "astap")
_ASTAP_PLACES = {
    "win32": (r"%ProgramFiles%\astap", r"%ProgramFiles(x86)%\astap", r"%LocalAppData%\Programs\astap"),
    "darwin": ("/Applications/ASTAP.app/Contents/MacOS", "~/Applications/ASTAP.app/Contents/MacOS", "/usr/local/bin"),
}
_ASTAP_PLACES_UNIX = ("/opt/astap", "/usr/local/bin", "/usr/bin", "~/.local/bin", "~/astap")
_SOLVE_FIELD_PLACES = {
    "win32": (),
    "darwin": ("/opt/homebrew/bin", "/usr/local/bin", "/Applications/KStars.app/Contents/MacOS/astrometry/bin"),
}
_SOLVE_FIELD_PLACES_UNIX = ("/usr/local/astrometry/bin", "/usr/bin", "/usr/local/bin", "/opt/astrometry/bin")
_INSIDE = ("", "bin", "Contents/MacOS")  # where a folder that was given may hold the program

NOT_FOUND = {
    "astap": "ASTAP was not found: install it or say in astap_executable_path where it is",
    "astrometry": "solve-field was not found: install astrometry.net or say in astrometry_local_path where it is",
}

_slots: dict[tuple[Path, int], threading.BoundedSemaphore] = {}
_slots_lock = threading.Lock()


def never_stop() -> None:
    """Stand-in for `Events.check_stop` where nobody can ask to stop."""


# ------------------------------------------------------------------------------------------ which, where


def solver_order(settings: Settings) -> tuple[Solver, ...]:
    """The solvers to try on a frame, one after the other; empty for ``solver_method = "none"``.

    The chosen one comes first if it is there. With ``solver_fallback`` the embedded one follows, which costs nothing,
    and then what else is found on this machine.

    Raises
    ------
    SolveError
        The chosen program is not there, and nothing may take its place.
    """
    installed: dict[Solver, bool] = {
        "embedded": True,
        "astap": find_astap(settings.astap_executable_path) is not None,
        "astrometry": find_solve_field(settings.astrometry_local_path) is not None,
    }
    if settings.solver_method == "none":
        return ()
    first: Solver = "embedded" if settings.solver_method == "auto" else settings.solver_method
    wanted = (first, *installed) if settings.solver_fallback else (first,)
    order = tuple(dict.fromkeys(solver for solver in wanted if installed[solver]))
    if not order:
        raise SolveError(NOT_FOUND[first])
    return order


def find_astap(path_setting: str | Path = "") -> Path | None:
    """ASTAP's program: as set, else from PATH, else from the usual places of this operating system.

    Parameters
    ----------
    path_setting : str or Path
        The program, or a folder (or macOS bundle) that holds it; empty = search. A setting that leads to no
        program is not searched past: whoever set it meant that one.
    """
    return _find_program(path_setting, _ASTAP_NAMES, _ASTAP_PLACES.get(sys.platform, _ASTAP_PLACES_UNIX))


def find_solve_field(path_setting: str | Path = "") -> Path | None:
    """astrometry.net's ``solve-field``: as set, else from PATH, else from the usual places.

    Parameters
    ----------
    path_setting : str or Path
        The program or a folder that holds it; empty, a configuration file (``*.cfg``) or a folder of index files
        (``index-*.fits``) = search.
    """
    names = ("solve-field",)
    if has_indexes(path_setting) or str(path_setting).endswith(".cfg"):
        path_setting = ""
    return _find_program(path_setting, names, _SOLVE_FIELD_PLACES.get(sys.platform, _SOLVE_FIELD_PLACES_UNIX))


def has_indexes(folder: str | Path) -> bool:
    """Whether `folder` holds index files of astrometry.net."""
    return bool(str(folder)) and any(Path(folder).expanduser().glob("index-*.fits"))


def _find_program(setting: str | Path, names: Sequence[str], places: Iterable[str]) -> Path | None:
    if str(setting):
        given = Path(setting).expanduser()
        candidates = [given / inside / name for name in names for inside in _INSIDE] if given.is_dir() else [given]
    else:
        folders = [Path(os.path.expandvars(place)).expanduser() for place in places]
        candidates = [path for name in names for path in (Path(name), *(folder / name for folder in folders))]
    found = next(filter(None, (shutil.which(path) for path in candidates)), None)
    return None if found is None else Path(os.path.abspath(found))  # it is started in another folder


# ---------------------------------------------------------------------------------------------- running


@contextmanager
def working_folder() -> Iterator[Path]:
    """A temporary folder for one run of a program, removed with all that is in it."""
    try:
        with tempfile.TemporaryDirectory(prefix="zemosaic-", ignore_cleanup_errors=True) as name:
            yield Path(name)
    except OSError as error:
        raise SolveError(f"the temporary folder cannot be used ({error.strerror or error})") from error


@contextmanager
def instance(program: Path, instances: int, check_stop: Callable[[], None] = never_stop) -> Iterator[None]:
    """Wait until fewer than `instances` of `program` run, and count as one of them.

    Parameters
    ----------
    program : Path
        What is counted; all threads of this process share the count.
    instances : int
        At least 1.
    check_stop : callable
        Called while waiting; what it raises ends the wait.
    """
    with _slots_lock:
        slot = _slots.setdefault((program, instances), threading.BoundedSemaphore(instances))
    while not slot.acquire(timeout=_POLL_S):
        check_stop()
    try:
        yield
    finally:
        slot.release()


def run_program(
    command: Sequence[str], folder: Path, timeout: float, check_stop: Callable[[], None] = never_stop
) -> tuple[int, str]:
    """Run a program in `folder` until it ends; its whole process group ends with it.

    Parameters
    ----------
    command : sequence
        Absolute path of the program and its arguments; no shell is involved.
    folder : Path
        Its working folder, which also takes what it prints (``output.txt``).
    timeout : float
        Seconds after which it is killed.
    check_stop : callable
        Called every tenth of a second; if it raises, the program is killed and the exception goes on.

    Returns
    -------
    status : int
        Exit status, negative for the signal that ended it.
    output : str
        The end of what it printed.

    Raises
    ------
    SolveError
        The program cannot be started, or did not end in time.
    """
    name = Path(command[0]).name
    with open(folder / _OUTPUT, "wb") as output:  # not a pipe: a forgotten grandchild would keep that open
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                creationflags=_CREATION_FLAGS,
            )
        except (OSError, ValueError) as error:
            raise SolveError(f"{name} cannot be started ({error})") from error
    try:
        status = _wait(process, time.monotonic() + timeout, check_stop)
    finally:
        _end_group(process)
    if status is None:
        raise SolveError(f"{name} had not ended after {timeout:g} s")
    return status, _tail(folder / _OUTPUT)


def _wait(process: subprocess.Popen[bytes], deadline: float, check_stop: Callable[[], None]) -> int | None:
    """Exit status; None if the process still runs at the `deadline` (of ``time.monotonic``)."""
    while True:
        check_stop()
        left = deadline - time.monotonic()
        try:
            return process.wait(max(min(left, _POLL_S), 0))
        except subprocess.TimeoutExpired:
            if left <= 0:
                return None


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a program: the process, its group, and children that left the group."""
    family: list[psutil.Process] = []
    if process.returncode is None:  # else its number may be another's by now
        with suppress(psutil.NoSuchProcess):
            family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    if sys.platform != "win32":
        # Children of a leader that ended are still in its group. Errors: none left (macOS: none but zombies).
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def _tail(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read().decode("utf-8", "replace")


def last_words(output: str) -> str:
    """The last line with anything on it, for an error message: printable, in brackets, at most 160 characters."""
    lines = ["".join(c for c in line if c.isprintable()).strip() for line in output.splitlines()]
    last = next(filter(None, reversed(lines)), "")
    return f" ({last[:160]})" if last else ""


# ------------------------------------------------------------------------------------------- the answer


def linear_wcs(cards: Mapping[str, Value], shape: tuple[int, int], solver: str, binning: int = 1) -> WCS:
    """The linear TAN part of a solution, for the pixels of the whole frame; its parity is kept.

    SIP terms are left out: a single frame has too few stars for them.

    Parameters
    ----------
    cards : mapping
        CRPIXi, CRVALi and CDi_j of the image that was solved, ICRS (the frame of all programs' catalogues).
    shape : tuple of int
        ``(ny, nx)`` of the frame.
    solver : str
        Who is to blame in an error message.
    binning : int
        Side of the boxes of frame pixels, from the first pixel on, that the solved image's pixels are.

    Raises
    ------
    SolveError
        Numbers are missing or do not make a WCS.
    """
    names = [f"{key}{axis}" for axis in (1, 2) for key in ("CRPIX", "CRVAL")] + [
        f"CD{i}_{j}" for i in (1, 2) for j in (1, 2)
    ]
    values = {name: number(cards, name) for name in names}
    linear: dict[str, Value] = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "RADESYS": "ICRS", "LONPOLE": 180.0}
    for name, value in values.items():
        if value is None:
            raise SolveError(f"the solution of {solver} has no usable {name}")
        if name.startswith("CRPIX"):  # from the middle of the first pixel = 1 to its edge = 0.5, and back
            value = (value - 0.5) * binning + 0.5
        elif name.startswith("CD"):
            value /= binning
        linear[name] = value
    try:
        return sky_wcs(linear, shape)
    except HeaderError as error:
        raise SolveError(f"the solution of {solver} {error}") from error
