"""Files that are there whole or not at all: written under another name beside, then renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def part_of(path: Path) -> Path:
    """Where a file is written until it is whole."""
    return path.with_name(path.name + ".part")


@contextmanager
def whole_file(path: Path, part: Path | None = None) -> Iterator[Path]:
    """A name to write under, which becomes `path` at the end; whatever goes wrong, nothing half done is left.

    Whoever reads the file meanwhile sees the old one or the new one.

    Parameters
    ----------
    path : Path
        Replaced if it exists.
    part : Path, optional
        The other name, in the same folder; `part_of` if not given.

    Raises
    ------
    OSError
        If it cannot be renamed.
    """
    part = part or part_of(path)
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong before is what counts
            part.unlink()
        raise


def write_whole(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write a file at once.

    Parameters
    ----------
    durable : bool
        Wait until the content is on the disk, so that no loss of power can leave an empty file of this name.

    Raises
    ------
    OSError
        If it cannot be written; what was there before is there still.
    """
    with whole_file(path) as part, part.open("wb") as stream:
        stream.write(content)
        if durable:
            force(stream)


def force(stream: BinaryIO) -> None:
    """Wait until the file is on the disk, so that a rename cannot publish an empty one."""
    stream.flush()
    os.fsync(stream.fileno())
