"""Where large arrays live: in memory up to a budget, memory-mapped in a scratch folder beyond it."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from zemosaic.mapping import MappedArray, is_mapped, map_file

Scalar = TypeVar("Scalar", bound=np.generic)


class ArrayStore:
    """Keeps arrays within a memory budget. Safe to share by threads.

    Parameters
    ----------
    budget : int
        Bytes that may stay in memory.
    folder : Path or None
        Where files go past the budget; None is the system's folder for temporary files.
    """

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        self._budget = budget
        self._folder = folder
        self._held = 0
        self._lock = threading.Lock()
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._mapped: list[NDArray[Any]] = []

    def keep(self, array: NDArray[Scalar]) -> NDArray[Scalar]:
        """The array itself while the budget lasts, else a memory-mapped copy of it; a mapped array stays as it is.

        Raises
        ------
        OSError
            If the scratch folder is full or cannot be written to.
        """
        with self._lock:
            if is_mapped(array):
                self._mapped.append(array)
                return array
            if self._held + array.nbytes <= self._budget:
                self._held += array.nbytes
                return array
            if self._files is None:
                self._files = tempfile.TemporaryDirectory(prefix=".zemosaic-", dir=self._made())
            path = Path(self._files.name) / f"{len(self._mapped):06d}"
            # Written first and mapped then: a mapping that the disk has no room for kills the process.
            array.tofile(path)
            copy = map_file(path).view(array.dtype).reshape(array.shape)
            self._mapped.append(copy)
        return copy

    def spool(self) -> IO[bytes]:
        """A scratch file to write and read again; gone when it is closed.

        Raises
        ------
        OSError
            If the scratch folder cannot be written to.
        """
        return tempfile.TemporaryFile(prefix=".zemosaic-", dir=self._made())

    def _made(self) -> Path | None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def release(self) -> None:
        """Let go of the memory that mapped arrays occupy for now; they are read back when they are looked at."""
        for array in self._mapped:
            if isinstance(array, MappedArray):
                array.release()

    def clear(self) -> None:
        """Forget all arrays: the caller has let go of them."""
        self.close()
        self._held = 0

    @property
    def room(self) -> int:
        """Bytes for what is needed at a time besides: half the budget."""
        return self._budget // 2

    def close(self) -> None:
        """Remove the scratch files."""
        self._mapped.clear()
        if self._files is not None:
            self._files.cleanup()
            self._files = None

    def __enter__(self) -> ArrayStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
