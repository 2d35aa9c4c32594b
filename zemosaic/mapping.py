"""Files mapped into memory without keeping them open.

Python's `mmap` keeps a duplicate of the descriptor of every file that is mapped (until 3.13 and its ``trackfd=False``),
and so does `numpy.memmap`: a thousand mega-tiles would be a thousand open files, and many systems allow 1,024. The
mapping itself needs none, so it is asked for from the C library.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LIBC: Any = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
if _LIBC is not None:
    _LIBC.mmap.restype = ctypes.c_void_p
    _LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    _LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    _LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value


class MappedArray(np.ndarray):
    """Bytes of a file, or a view of them; what is computed from them is an array like any other."""

    _region: Any = None

    def __array_finalize__(self, parent: object) -> None:
        region = getattr(parent, "_region", None)
        self._region = region if region is not None and np.may_share_memory(self, parent) else None

    def release(self) -> None:
        """Give the pages back: they stay in the system's file cache, and are read again when they are looked at."""
        if self._region is not None and hasattr(mmap, "MADV_DONTNEED"):
            _LIBC.madvise(ctypes.addressof(self._region), len(self._region), mmap.MADV_DONTNEED)


def is_mapped(array: NDArray[Any]) -> bool:
    """Whether an array lies in a file."""
    return isinstance(array, np.memmap) or (isinstance(array, MappedArray) and array._region is not None)


def map_file(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file, read-only; without a descriptor that stays open, and releasable, where the system is POSIX.

    Raises
    ------
    OSError
        If the file cannot be read or mapped.
    """
    if _LIBC is None or not path.stat().st_size:
        return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, stream.fileno(), 0)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    region = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(region, _LIBC.munmap, address, size).atexit = False
    array = np.frombuffer(memoryview(region), np.uint8).view(MappedArray)
    array._region = region
    array.flags.writeable = False
    return array
