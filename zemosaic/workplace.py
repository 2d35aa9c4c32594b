"""The hidden folder of a run in its output folder: one run at a time, and what a killed one left behind is tidied away.

``OUT/.zemosaic`` holds the lock, kept results (`zemosaic.cache`) and scratch files. The lock is one of the operating
system's, which ends with the process that holds it, however that ends: there are no stale locks.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from zemosaic.cache import fingerprint

HIDDEN = ".zemosaic"
#: In a folder of master tiles as long as its run has not ended.
UNFINISHED = ".unfinished"
#: What the names of a product's files end in, that of the FITS file first.
PRODUCT_ENDINGS = (".fits", ".png", ".toml", "_frames.csv")
#: The same of what may later be written beside a product.
REPORT_ENDINGS = ("_report.html", "_report.json")

_PRODUCT = r"(.+_(?:sds|mosaic-first|master-tiles)(?:_\d+)?)"
_CLAIM = re.compile(_PRODUCT + r"\.fits\.part")
_REPORT = re.compile(_PRODUCT + f"(?:{'|'.join(map(re.escape, REPORT_ENDINGS))})" + r"\.part")
_TILE = re.compile(r"master_tile_\d+\.fits(\.part)?")


class WorkplaceError(Exception):
    """The output folder cannot be used now: one sentence that says why, and one that says what to do."""


@contextmanager
def workplace(output: Path, scratch: Path | None = None) -> Iterator[Path]:
    """Hold the output folder for one run; half-done files of a run that was killed are removed first.

    What is empty in the end is removed again, the output folder itself included if it was made here.

    Parameters
    ----------
    output : Path
        Made if it does not exist.
    scratch : Path, optional
        `scratch_folder` of this run.

    Yields
    ------
    Path
        The hidden folder.

    Raises
    ------
    WorkplaceError
        If another run works there, or nothing can be written.
    """
    new = not output.exists()
    hidden = output / HIDDEN
    with _locked(output, hidden):
        try:
            with contextlib.suppress(OSError):
                (hidden / "running").write_text(f"process {os.getpid()} on {socket.gethostname()}")
            _tidy(output, scratch)
            yield hidden
        finally:
            if scratch is not None:
                with contextlib.suppress(OSError):
                    scratch.rmdir()
            with contextlib.suppress(OSError):
                (hidden / "running").unlink()
                (hidden / "lock").unlink()
                hidden.rmdir()  # which takes nothing but empty folders
                if new:
                    output.rmdir()


@contextmanager
def _locked(output: Path, hidden: Path) -> Iterator[None]:
    note = hidden / "running"
    lock = FileLock(hidden / "lock")
    try:
        hidden.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as problem:
        raise WorkplaceError(
            f"{_holder(note)} is at work in {output}: wait for its end, or choose another output folder"
        ) from problem
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise WorkplaceError(f"{output} cannot be written to ({reason}): choose another output folder") from problem
    try:
        yield
    finally:
        lock.release()


def _holder(note: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        who = note.read_text()
        if who:
            return f"another run ({who})"
    return "another run"


def scratch_folder(memmap_dir: str, output: Path) -> Path:
    """Where a run keeps arrays beyond its memory: a folder of its own, so that what is in it can only be its own."""
    if not memmap_dir:
        return output / HIDDEN / "scratch"
    return Path(memmap_dir) / f"{HIDDEN}-{fingerprint(str(output.resolve()))[:12]}"


def remove_results(output: Path) -> int:
    """Remove everything that runs have kept for later runs in an output folder; returns its size in bytes.

    Raises
    ------
    WorkplaceError
        If a run works there, or something cannot be removed.
    """
    hidden = output / HIDDEN
    if not hidden.is_dir():
        return 0
    with _locked(output, hidden):
        size = sum(path.lstat().st_size for path in hidden.rglob("*") if path.is_file())
        try:
            shutil.rmtree(hidden)
        except OSError as problem:
            raise WorkplaceError(f"{problem.filename} cannot be removed: {problem.strerror}") from problem
    return size


# --- after a kill -----------------------------------------------------------------------------------------------


def _tidy(output: Path, scratch: Path | None) -> None:
    """Remove what a killed run left half done; nobody else works here now."""
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)
    with contextlib.suppress(OSError):
        for claim in output.glob("*.fits.part"):
            if match := _CLAIM.fullmatch(claim.name):
                _remove_claim(output, match[1])
        for part in output.glob("*_report.*.part"):
            if _REPORT.fullmatch(part.name):
                part.unlink()
        for marker in output.glob(f"*/{UNFINISHED}"):
            _remove_tiles(marker)


def _remove_claim(output: Path, stem: str) -> None:
    """Files of a product that was never finished: its FITS file is the last to get its name."""
    finished = (output / f"{stem}{PRODUCT_ENDINGS[0]}").exists()
    for end in reversed(PRODUCT_ENDINGS):  # the claim, which names the others, goes last
        if not finished:
            (output / f"{stem}{end}").unlink(missing_ok=True)
        (output / f"{stem}{end}.part").unlink(missing_ok=True)


def _remove_tiles(marker: Path) -> None:
    for path in marker.parent.iterdir():
        if _TILE.fullmatch(path.name):
            path.unlink()
    marker.unlink()
    with contextlib.suppress(OSError):
        marker.parent.rmdir()
