"""Results kept on disk, keyed by what went into them: what one run has finished, the next need not do again.

A key is a fingerprint of everything a result depends on, so a result is never out of date: where anything differs,
there is no entry of that key. An entry is one file of plain arrays (no pickle), written to ``.part`` and renamed, with
a checksum of every array: one that was damaged or cut off is no entry. Nothing is forced to the disk for the same
reason; after a loss of power some results may have to be made again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from zemosaic import __version__
from zemosaic.files import whole_file
from zemosaic.mapping import map_file

Arrays = Mapping[str, NDArray[Any]]

_MAGIC = b"ZeMosaic"
_FRONT = struct.Struct("<8sIII")  # magic, length of the table of contents, its CRC, zero
_ALIGN = 64  # bytes: an array that is mapped from a file starts where processors like it
_PLAIN = "biufSU"  # kinds of numbers and text; never objects
_SAMPLE = 1 << 16  # bytes at either end of a file that stand for its content
_END = ".results"

#: Libraries whose arithmetic is in the results.
_LIBRARIES = ("numpy", "scipy", "astropy", "sep", "numba", "llvmlite")
#: Modules that say things, order work or hold switches, and have no part in a number.
_NO_NUMBERS = {f"zemosaic.{name}" for name in ("cache", "resume", "events", "execute", "files", "settings", "store")}
_IMPORT = re.compile(r"^\s*(?:from|import) (zemosaic(?:\.\w+)*)(?: import (\([^)]*\)|.*))?", re.MULTILINE)


# --- keys -------------------------------------------------------------------------------------------------------


def fingerprint(*parts: object) -> str:
    """A name, 40 hexadecimal digits, that values share only if they are the same to the last bit.

    Parameters
    ----------
    *parts
        None, bool, int, float, str, bytes, arrays of numbers, and tuples, lists, mappings and dataclasses of these.

    Raises
    ------
    TypeError
        For anything else: how it would be told from its like is unknown.
    """
    digest = hashlib.blake2b(digest_size=20)
    _feed(digest.update, parts)
    return digest.hexdigest()


def _feed(eat: Callable[[Any], None], part: Any) -> None:
    if isinstance(part, np.generic):
        part = part.item()
    if isinstance(part, np.ndarray):
        if part.dtype.kind not in _PLAIN:
            raise TypeError(f"arrays of {part.dtype} have no fingerprint")
        eat(f"array {part.dtype.str} {part.shape}:".encode())
        eat(part.tobytes())
    elif part is None or isinstance(part, (bool, int, float, str, bytes)):
        text = repr(part)
        eat(f"{type(part).__name__} {len(text)}:{text}".encode("utf-8", "surrogatepass"))
    elif is_dataclass(part):
        _feed(eat, (type(part).__name__, *((f.name, getattr(part, f.name)) for f in fields(part))))
    elif isinstance(part, Mapping):
        _feed(eat, sorted(part.items()))
    elif isinstance(part, (tuple, list)):
        eat(f"list {len(part)}:".encode())
        for item in part:
            _feed(eat, item)
    else:
        raise TypeError(f"{type(part).__name__} has no fingerprint")


@dataclass(frozen=True)
class Stamp:
    """Which file it is, as far as can be told without reading all of it.

    Parameters
    ----------
    size : int
        Bytes.
    mtime_ns : int
        Time of the last change, ns. It is only ever compared for equality: clocks may be wrong and may jump.
    content : str
        Fingerprint of the first and the last 64 KB; all of a shorter file.
    """

    size: int
    mtime_ns: int
    content: str

    def fits(self, path: Path) -> bool:
        """Whether the file has the size and the time of change that it had; False if it is gone."""
        try:
            found = path.stat()
        except OSError:
            return False
        return (found.st_size, found.st_mtime_ns) == (self.size, self.mtime_ns)


def stamp_of(path: Path) -> Stamp:
    """The stamp of a file as it is now.

    A file that cannot be read has no content: whoever reads it will say so.
    """
    try:
        found = path.stat()
        if not path.is_file():  # nobody may ever write into a pipe
            return Stamp(found.st_size, found.st_mtime_ns, "")
        with open(path, "rb") as stream:
            head = stream.read(_SAMPLE)
            stream.seek(max(len(head), found.st_size - _SAMPLE))
            return Stamp(found.st_size, found.st_mtime_ns, fingerprint(head, stream.read(_SAMPLE)))
    except OSError:
        return Stamp(-1, 0, "")


@functools.cache
def code_version(*modules: str) -> str:
    """Fingerprint of this program's version, of modules and all that they import of it, and of the libraries.

    So a result never outlives the code that made it, in development neither.
    """
    sources: dict[str, str] = {}
    todo = list(modules)
    while todo:
        name = todo.pop()
        if name in sources or name in _NO_NUMBERS or name == "zemosaic":
            continue
        spec = importlib.util.find_spec(name)
        loader = getattr(spec, "loader", None)
        if loader is None or not hasattr(loader, "get_source"):
            continue  # not a module but a name within one
        sources[name] = loader.get_source(name) or ""
        for parent, names in _IMPORT.findall(sources[name]):
            within = re.findall(r"\w+", re.sub(r" as \w+", "", names)) if parent == "zemosaic" else ()
            todo += [parent, *(f"zemosaic.{name}" for name in within)]
    libraries = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return fingerprint(__version__, libraries, _opencv(), sources)


def _opencv() -> str:
    import cv2  # whose distribution has one of four names

    return str(cv2.__version__)


# --- files ------------------------------------------------------------------------------------------------------


class Cache:
    """A folder of results under kinds and keys. Safe to share by the threads of one process.

    Storing never fails a run: where the disk is full or refuses, nothing more is kept, and `trouble` is told why.

    Parameters
    ----------
    folder : Path or None
        Where the results lie; made when the first is stored. None keeps nothing and finds nothing.
    limit : float
        Bytes that all results may take. Where a new one needs room the oldest go, but none that this run has used:
        rather than take away what the next run will need first, the new one is not kept.
    spare : int
        Bytes that must stay free on the disk, for the product and whatever else.
    trouble : callable
        Called with a reason, once, when nothing more is kept.
    """

    def __init__(
        self, folder: Path | None, limit: float = 0, spare: int = 0, trouble: Callable[[str], None] = lambda _: None
    ) -> None:
        self.folder = folder
        self.found: Counter[str] = Counter()  #: results of earlier runs that were asked for, by kind
        self.stored: Counter[str] = Counter()  #: results that were stored, by kind
        self.size = 0  #: bytes of all results
        self.spare = spare
        self._limit, self._trouble = limit, trouble
        self._lock = threading.Lock()
        self._closed = folder is None
        self._sizes: dict[Path, int] = {}  # oldest first
        self._used: set[Path] = set()
        self._made: set[Path] = set()
        if folder is not None and folder.is_dir():
            self._take_stock(folder)

    def _take_stock(self, folder: Path) -> None:
        found = []
        for path in folder.glob("*/*"):
            with contextlib.suppress(OSError):
                if path.suffix == ".part":
                    path.unlink()  # of a run that was killed
                elif path.suffix == _END:
                    state = path.stat()
                    found.append((state.st_mtime_ns, path, state.st_size))
        self._sizes = {path: size for _, path, size in sorted(found)}
        self.size = sum(self._sizes.values())

    def get(self, kind: str, key: str, *, mapped: bool = False) -> dict[str, NDArray[Any]] | None:
        """A stored result; None if there is none, or it is damaged.

        Parameters
        ----------
        kind : str
            What it is, a plain word: the name of a folder.
        key : str
            `fingerprint` of all that went into it.
        mapped : bool
            Leave the arrays on the disk, read-only: see `zemosaic.mapping`.
        """
        path = self._path(kind, key)
        if path is None:
            return None
        try:
            arrays = _read(path, mapped, trusted=path in self._made)
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            self._forget(path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        with self._lock:
            self.found[kind] += path not in self._made
            self._used.add(path)
        return arrays

    def put(self, kind: str, key: str, arrays: Arrays) -> bool:
        """Store a result; False if there is no room for it or it cannot be written.

        Parameters
        ----------
        arrays : mapping of str to ndarray
            Numbers and text of any shape.
        """
        path = self._path(kind, key)
        size = sum(array.nbytes + _ALIGN for array in arrays.values())
        if path is None or self._closed or not self._has_room(size):
            return False
        part = path.with_suffix(f".{threading.get_ident()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path, part) as part, open(part, "wb") as stream:
                _write(stream, arrays)
                size = stream.tell()
        except OSError as problem:
            self._give_up(problem.strerror or str(problem))
            return False
        with self._lock:
            self.size += size - self._sizes.pop(path, 0)
            self._sizes[path] = size
            self._used.add(path)
            self._made.add(path)
            self.stored[kind] += 1
        return True

    def _path(self, kind: str, key: str) -> Path | None:
        return None if self.folder is None else self.folder / kind / f"{key}{_END}"

    def _has_room(self, size: int) -> bool:
        """Make room by letting the oldest results go; False if it takes one that this run has used."""
        with self._lock:
            if self._fits(size):
                return True
            for path in [path for path in self._sizes if path not in self._used]:
                self._unlink(path)
                if self._fits(size):
                    return True
        self._give_up("the room that they may take is used up (resume_cache_gb)")
        return False

    def _fits(self, size: int) -> bool:
        assert self.folder is not None
        there = next(p for p in (self.folder, *self.folder.absolute().parents) if p.is_dir())
        return self.size + size <= self._limit and shutil.disk_usage(there).free >= size + self.spare

    def _forget(self, path: Path) -> None:
        with self._lock:
            self._unlink(path)

    def _unlink(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()
        self.size -= self._sizes.pop(path, 0)

    def _give_up(self, reason: str) -> None:
        with self._lock:
            first, self._closed = not self._closed, True
        if first:
            self._trouble(reason)


def _write(stream: BinaryIO, arrays: Arrays) -> None:
    """A table of contents in JSON, then the bytes of every array."""
    contents, offset, plain = [], 0, []
    for name, given in arrays.items():
        array = np.asarray(given, order="C")
        if array.dtype.kind not in _PLAIN:
            raise TypeError(f"{name}: arrays of {array.dtype} cannot be stored")
        data = array.reshape(-1).view(np.uint8) if array.size else np.zeros(0, np.uint8)
        contents.append([name, array.dtype.str, array.shape, offset, zlib.crc32(data.data)])
        plain.append((offset, data))
        offset += -(-array.nbytes // _ALIGN) * _ALIGN
    text = json.dumps(contents).encode()
    stream.write(_FRONT.pack(_MAGIC, len(text), zlib.crc32(text), 0))
    stream.write(text)
    start = _start(len(text))
    for at, data in plain:
        stream.write(bytes(start + at - stream.tell()))
        stream.write(data.data)


def _start(length: int) -> int:
    """Where the arrays begin behind a table of contents of this length."""
    return -(-(_FRONT.size + length) // _ALIGN) * _ALIGN


def _read(path: Path, mapped: bool, *, trusted: bool = False) -> dict[str, NDArray[Any]]:
    """The arrays of a file; ValueError if it is not whole, as far as that is looked at."""
    data: NDArray[np.uint8] = map_file(path) if mapped else np.fromfile(path, np.uint8)
    if data.size < _FRONT.size:
        raise ValueError(f"{path} is cut off")
    magic, length, crc, _ = _FRONT.unpack(data[: _FRONT.size].tobytes())
    text = data[_FRONT.size : _FRONT.size + length].tobytes()
    if magic != _MAGIC or zlib.crc32(text) != crc:
        raise ValueError(f"{path} has no table of contents")
    arrays = {}
    for name, dtype, shape, offset, expected in json.loads(text):
        kind = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        at = _start(length) + offset
        raw = data[at : at + size]
        if raw.size != size or not (trusted or zlib.crc32(raw.data) == expected):
            raise ValueError(f"{path}: {name} is damaged")
        arrays[name] = raw.view(kind).reshape(shape) if size else np.zeros(shape, kind)
    return arrays
