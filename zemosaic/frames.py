"""One sub on disk: find it, read the facts of its header, read its pixels. Any layout FITS allows.

`read_frame` touches headers only (about 1 ms, wherever the image is in the file); `read_pixels` reads
the pixels when they are needed. Raw files are never written to. Whatever is wrong with a file ends in
a `FrameError`, and nothing that its header merely claims is allocated or unpacked before it is known
that the file can hold it.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS
from numpy.typing import NDArray

from zemosaic.headers import (
    CARD_LENGTH,
    Cards,
    HeaderError,
    Value,
    bayer_phase,
    format_card,
    mount_mode,
    number,
    pack_wcs,
    parse_cards,
    pixel_size,
    pointing,
    sky_wcs,
    start_time,
    text,
    unpack_wcs,
)
from zemosaic.tiles import FloatImage

try:
    from astropy.io.fits.hdu.compressed._compression import CfitsioException
except ImportError:  # astropy < 7
    from astropy.io.fits._tiled_compression._compression import CfitsioException

_FITS_NAME = re.compile(r"(\.(?:fits?|fts)(?:\.gz|\.fz)?|\.fz)$", re.IGNORECASE)
_SIDECAR_NAME = re.compile(r"\.wcs(\.fits)?$", re.IGNORECASE)
# Tried one by one: listing a folder of 10,000 subs once for each of them would take minutes.
_SIDECAR_ENDINGS = (".wcs.fits", ".WCS.FITS", ".wcs.FITS", ".WCS.fits", ".wcs", ".WCS")
_SIDECAR_BYTES = 1 << 20

_BLOCK = 2880
_MAX_HEADER_BLOCKS = 500
_MAX_HDUS = 500
_CHUNK = 1 << 24
_GZIP_MAGIC = b"\x1f\x8b"
# No deflate stream expands by more (zlib.net, "Maximum Compression Factor"). Tile compression can do
# better on a constant image, but not on one that came from a camera; and no camera fills 4 GiB.
_MAX_EXPANSION = 1032
_MAX_UNPACKED = 1 << 32

_PIXEL_TYPES = {8: ">u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}

_RICE_OPTIONS = {"BLOCKSIZE": (16, 32), "BYTEPIX": (1, 2, 4)}  # what astropy's decoder is safe with

_UNREADABLE = (OSError, EOFError, ValueError, MemoryError, zlib.error)
# What astropy raises for tiles that are damaged.
_UNDECODABLE = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    fits.VerifyError,
    CfitsioException,
)


class FrameError(Exception):
    """A file that cannot be used as a frame.

    Parameters
    ----------
    message : str
        One sentence: what is wrong and what to do.
    path : Path
        The file, kept apart so that a ledger can have a column of each.
    """

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(" ".join(message.split()), path)  # both in args: the error can be pickled
        self.path = path

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Frame:
    """One sub: where it is and what its header says. Picklable, cheaply and to the last bit.

    Parameters
    ----------
    path : Path
    shape : tuple of int
        ``(ny, nx)`` of the image `read_pixels` returns.
    colour : {"bayer", "rgb", "mono"}
    bayer : str or None
        For ``"bayer"``: colours of the array as read, four letters row-major from pixel [0, 0].
    wcs : WCS or None
        Two-axis celestial WCS of the array as read, longitude first, `pixel_shape` set.
    wcs_source : {"header", "sidecar", None}
    wcs_problem : str
        Why `wcs` is None; else empty.
    exposure : float or None
        Seconds.
    filter, object, instrument, creator : str
        As in FILTER, OBJECT, INSTRUME, CREATOR; empty where the header does not say.
    gain : float or None
        Camera setting, in the camera's own units.
    egain : float or None
        Electrons per ADU.
    date_obs : str
        Start of the exposure, ISO 8601, UTC; empty where unknown.
    focal_length : float or None
        Millimetres.
    pixel_size : float or None
        Micrometres, binning applied.
    mount : {"altaz", "eq", ""}
    saturation : float
        ADU at which pixels saturate; infinite for floating-point files that do not say.
    ra, dec : float or None
        Where the mount says it points, degrees; a hint, equinox of date or J2000.
    """

    path: Path
    shape: tuple[int, int]
    colour: Literal["bayer", "rgb", "mono"]
    bayer: str | None = None
    wcs: WCS | None = field(default=None, compare=False)
    wcs_source: Literal["header", "sidecar"] | None = None
    wcs_problem: str = ""
    exposure: float | None = None
    filter: str = ""
    object: str = ""
    instrument: str = ""
    creator: str = ""
    gain: float | None = None
    egain: float | None = None
    date_obs: str = ""
    focal_length: float | None = None
    pixel_size: float | None = None
    mount: str = ""
    saturation: float = math.inf
    ra: float | None = None
    dec: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "wcs": self.wcs and pack_wcs(self.wcs)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, wcs=state["wcs"] and unpack_wcs(state["wcs"]))


def find_files(inputs: Iterable[Path]) -> list[Path]:
    """The FITS files among `inputs` and below its folders, sorted, each once.

    Files named by the caller are taken whatever their ending; hidden files and folders (``._x.fit`` of
    macOS) and sidecars (``*.wcs``, ``*.wcs.fits``) are left out. Symbolic links are followed, in loops
    too.

    Raises
    ------
    FrameError
        For an input that does not exist and a folder that cannot be listed.
    """
    found: dict[str, Path] = {}
    visited: set[str] = set()
    for path in sorted(Path(item) for item in inputs):
        if not path.exists():
            raise FrameError("the file or folder does not exist; check the name", path)
        for candidate in _files_below(path, visited) if path.is_dir() else [path]:
            if not _SIDECAR_NAME.search(candidate.name):
                found.setdefault(os.path.realpath(candidate), candidate)
    return sorted(found.values())


def _files_below(folder: Path, visited: set[str]) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise FrameError(f"the folder cannot be listed ({error.strerror})", Path(error.filename)) from error

    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in visited else sorted(name for name in folders if name[0] != ".")
        if real not in visited:
            visited.add(real)
            yield from (Path(root, name) for name in names if name[0] != "." and _FITS_NAME.search(name))


def read_frame(path: Path) -> Frame:
    """The facts of one sub, from its header and from a WCS sidecar beside it; no pixel is read.

    The image is that of the first HDU that holds one: (ny, nx), RGB as (3, ny, nx) or (ny, nx, 3), or
    mono as (1, ny, nx). ``NAME.wcs.fits`` or ``NAME.wcs`` beside ``NAME.fit`` (without any FITS ending,
    ``.gz`` and ``.fz`` included) wins over the WCS of the header, and a sidecar that is no good leaves
    the frame without a WCS: whoever put it there did not trust the header.

    Raises
    ------
    FrameError
        Not a FITS file, truncated, no image, or an image that is neither mono, Bayer nor RGB.
    """
    path = Path(path)
    with _named_errors(path), _open(path) as (stream, room):
        image = _find_image(stream, room)
        bayer = None if image.channel_axis is not None else bayer_phase(image.facts, image.shape[0])
        wcs, source, problem = _find_wcs(path, image)
    facts = image.facts
    ra, dec = pointing(facts)
    return Frame(
        path=path,
        shape=image.shape,
        colour="rgb" if image.channel_axis is not None else "bayer" if bayer else "mono",
        bayer=bayer,
        wcs=wcs,
        wcs_source=source,
        wcs_problem=problem,
        exposure=number(facts, "EXPTIME", "EXPOSURE", "EXP", positive=True),
        filter=text(facts, "FILTER"),
        object=text(facts, "OBJECT"),
        instrument=text(facts, "INSTRUME"),
        creator=text(facts, "CREATOR"),
        gain=number(facts, "GAIN"),
        egain=number(facts, "EGAIN", positive=True),
        date_obs=start_time(facts),
        focal_length=number(facts, "FOCALLEN", positive=True),
        pixel_size=pixel_size(facts),
        mount=mount_mode(facts),
        saturation=image.saturation,
        ra=ra,
        dec=dec,
    )


def read_pixels(frame: Frame) -> FloatImage:
    """The pixels of a frame in ADU: BZERO and BSCALE applied, NaN for BLANK and for what is not finite.

    Returns
    -------
    ndarray
        float32, ``(ny, nx)``, or ``(ny, nx, 3)`` for an RGB frame; C-contiguous and the caller's own.

    Raises
    ------
    FrameError
        Truncated or corrupt pixels, or a file that changed since `read_frame`.
    """
    with _named_errors(frame.path), _open(frame.path) as (stream, room):
        image = _find_image(stream, room)
        if image.shape != frame.shape or (image.channel_axis is not None) != (frame.colour == "rgb"):
            raise HeaderError(f"has changed since its header was read: now {image.axes}; start again")
        stored = _read_exactly(stream, image.offset, image.stored_bytes)
        raw = _unpack_tiles(image, stored) if image.tiled else np.frombuffer(stored, _PIXEL_TYPES[image.bitpix])
        pixels = _to_adu(raw, image).reshape(image.axes)
    if image.channel_axis is not None:
        return np.ascontiguousarray(np.moveaxis(pixels, image.channel_axis, -1))
    return pixels.reshape(image.shape)


# ------------------------------------------------------------------------------------- inside a file


@dataclass(frozen=True)
class _Image:
    """The image HDU of an open file; `axes` in numpy order, `offset` and `stored_bytes` of its data."""

    cards: Cards
    facts: Cards
    axes: tuple[int, ...]
    bitpix: int
    tiled: bool
    offset: int = 0
    stored_bytes: int = 0

    @property
    def channel_axis(self) -> int | None:
        """Axis of the three colours; planes (as FITS writers mostly do) before interleaved pixels."""
        if len(self.axes) == 2 or self.axes[0] == 1:
            return None
        return 0 if self.axes[0] == 3 else 2

    @property
    def shape(self) -> tuple[int, int]:
        ny, nx = self.axes[:2] if self.channel_axis == 2 else self.axes[-2:]
        return ny, nx

    @property
    def scaling(self) -> tuple[float, float]:
        """``(BSCALE, BZERO)``."""
        scale = number(self.cards, "BSCALE")
        return 1.0 if scale is None else scale, number(self.cards, "BZERO") or 0.0

    @property
    def saturation(self) -> float:
        """The largest value of the pixel type, or what the header says if that is less."""
        declared = number(self.facts, "SATURATE", "DATAMAX", positive=True) or math.inf
        if self.bitpix < 0:
            return declared
        limits = np.iinfo(_PIXEL_TYPES[self.bitpix])
        scale, zero = self.scaling
        return min(declared, max(scale * int(limits.min), scale * int(limits.max)) + zero)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turn what can go wrong with a file into a `FrameError` that says so."""
    try:
        yield
    except HeaderError as error:
        raise FrameError(f"the file {error}", path) from error
    except _UNREADABLE as error:
        reason = str(error) or type(error).__name__
        raise FrameError(f"the file cannot be read ({reason}); copy it again or leave it out", path) from error


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The file as a stream, unpacked if it is gzipped, and the most bytes that the stream can hold."""
    if path.exists() and not path.is_file():
        raise HeaderError("is not a regular file; give FITS files or folders")
    with open(path, "rb") as raw:
        size = os.fstat(raw.fileno()).st_size
        packed = raw.read(2) == _GZIP_MAGIC
        raw.seek(0)
        if not packed:
            yield raw, size
        else:
            with gzip.GzipFile(fileobj=raw, mode="rb") as unpacked:
                yield unpacked, min(size * _MAX_EXPANSION, _MAX_UNPACKED)  # type: ignore[misc]


def _find_image(stream: BinaryIO, room: int) -> _Image:
    """The first HDU with an image, checked against what the stream can hold."""
    primary: Cards = {}
    for cards, offset in _hdus(stream, room):
        primary = primary or cards
        image = _image_of(cards, {**primary, **cards})
        if image is None:
            continue
        stored = _data_bytes(cards)
        if offset + stored > room:
            raise HeaderError(f"is truncated: {stored} bytes of pixels are declared; copy it again")
        unpacked = math.prod(image.axes) * abs(image.bitpix) // 8
        if image.tiled and unpacked > min(room * _MAX_EXPANSION, _MAX_UNPACKED):
            raise HeaderError(f"cannot hold the {image.axes} pixels that it declares; leave it out")
        return replace(image, offset=offset, stored_bytes=stored)
    raise HeaderError("holds no 2-D or 3-D image; leave it out")


def _hdus(stream: BinaryIO, room: int) -> Iterator[tuple[Cards, int]]:
    """Cards and data offset of each HDU; the data are skipped, not read."""
    start = 0
    for index in range(_MAX_HDUS):
        stream.seek(start)
        header, length = _read_header(stream, b"XTENSION=" if index else b"SIMPLE  =")
        if not length:
            return
        yield header, start + length
        start += length + -(-_data_bytes(header) // _BLOCK) * _BLOCK
        if start >= room:
            return


def _read_header(stream: BinaryIO, opening: bytes) -> tuple[Cards, int]:
    """Cards of the header that starts here and its length in bytes; length 0 after the last HDU."""
    lines: list[str] = []
    for count in range(1, _MAX_HEADER_BLOCKS + 1):
        block = stream.read(_BLOCK)
        if count == 1 and not block.startswith(opening):
            if opening.startswith(b"SIMPLE"):
                raise HeaderError("is not a FITS file; leave it out" if block else "is empty; copy it again")
            return {}, 0
        lines += _split_cards(block.decode("latin-1"))
        if any(line[:8].rstrip() == "END" for line in lines[-_BLOCK // CARD_LENGTH :]):
            return parse_cards(lines), count * _BLOCK
        if len(block) < _BLOCK:
            break
    raise HeaderError("has a header without an end; copy it again")


def _split_cards(header: str) -> list[str]:
    return [header[i : i + CARD_LENGTH] for i in range(0, len(header), CARD_LENGTH)]


def _image_of(cards: Cards, facts: Cards) -> _Image | None:
    """The image an HDU holds; None for tables, empty images, and 1-D or 4-D arrays."""
    tiled = cards.get("ZIMAGE") is True
    if not tiled and text(cards, "XTENSION").upper() not in ("", "IMAGE"):
        return None
    axes = tuple(_axes(cards, "Z" if tiled else "")[::-1])
    if len(axes) not in (2, 3) or 0 in axes:
        return None
    bitpix = _whole(cards, "ZBITPIX" if tiled else "BITPIX")
    if bitpix not in _PIXEL_TYPES:
        raise HeaderError(f"has pixels of an unknown type (BITPIX = {bitpix}); leave it out")
    if number(cards, "BSCALE") == 0:
        raise HeaderError("has BSCALE = 0, which makes all its pixels the same; leave it out")
    if len(axes) == 3 and axes[0] not in (1, 3) and axes[2] != 3:
        raise HeaderError(f"holds a cube {axes} that is neither RGB nor mono; leave it out")
    return _Image(cards, facts, axes, bitpix, tiled)


def _whole(cards: Cards, key: str, default: int | None = None) -> int:
    value = number(cards, key)
    if value is None and default is not None and key not in cards:
        return default
    if value is None or value != int(value):
        raise HeaderError(f"has no valid {key} in its header; leave it out")
    return int(value)


def _axes(cards: Cards, prefix: str = "") -> list[int]:
    """NAXIS1, NAXIS2, ... of an HDU."""
    count = _whole(cards, f"{prefix}NAXIS")
    axes = [_whole(cards, f"{prefix}NAXIS{axis}") for axis in range(1, min(count, 999) + 1)]
    if count > 999 or min(axes, default=0) < 0:
        raise HeaderError(f"declares impossible axes (NAXIS = {count}); leave it out")
    return axes


def _data_bytes(cards: Cards) -> int:
    """Length of the data of an HDU, without padding (FITS standard 4.0, equations 1 and 2, section 6)."""
    axes = _axes(cards)
    if not axes:
        return 0
    if axes[0] == 0 and cards.get("GROUPS") is True:
        axes = axes[1:]
    count = _whole(cards, "GCOUNT", 1) * (_whole(cards, "PCOUNT", 0) + math.prod(axes))
    if count < 0:
        raise HeaderError("declares a negative amount of data; leave it out")
    return abs(_whole(cards, "BITPIX")) // 8 * count


# --------------------------------------------------------------------------------------------- pixels


def _read_exactly(stream: BinaryIO, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`, in pieces: a gzip stream may end long before the header claims."""
    stream.seek(offset)
    pieces = []
    missing = length
    while missing:
        piece = stream.read(min(missing, _CHUNK))
        if not piece:
            raise HeaderError(f"is truncated: {missing} of {length} bytes of pixels are missing; copy it again")
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def _to_adu(raw: NDArray[Any], image: _Image) -> FloatImage:
    """Stored values to float32 ADU, by way of float64 where float32 would lose digits of the sum."""
    scale, zero = image.scaling
    blank = number(image.cards, "BLANK", "ZBLANK") if raw.dtype.kind in "iu" else None
    single = (raw.dtype.itemsize <= 2 and scale == 1) or (scale, zero) == (1, 0)
    with np.errstate(over="ignore", invalid="ignore"):
        adu: NDArray[np.floating[Any]] = raw.astype(np.float32 if single else np.float64)
        if scale != 1:
            adu *= scale
        if zero:
            adu += zero
        pixels = adu.astype(np.float32, copy=False)
    if blank is not None:
        pixels[raw == int(blank)] = np.nan
    if raw.dtype.kind == "f":
        pixels[~np.isfinite(pixels)] = np.nan
    return pixels


def _unpack_tiles(image: _Image, table: bytes) -> NDArray[Any]:
    """Decompressed values of a tile-compressed image, BZERO and BSCALE not yet applied.

    astropy gets the table alone, under a header made of checked values, so that nothing else that is
    odd in the file can stop it or make it print a warning.
    """
    cards = _tile_cards(image)
    parts = [
        _header_bytes({"SIMPLE": True, "BITPIX": 8, "NAXIS": 0, "EXTEND": True}),
        _header_bytes(cards),
        table.ljust(-(-len(table) // _BLOCK) * _BLOCK, b"\0"),
    ]
    try:
        if cards["ZCMPTYPE"] in ("HCOMPRESS_1", "PLIO_1"):
            _check_streams(cards, image.axes, table)
        with np.errstate(all="ignore"), fits.open(io.BytesIO(b"".join(parts)), memmap=False) as hdus:
            return np.asarray(hdus[1].data)
    except _UNDECODABLE as error:
        raise HeaderError(f"has damaged tiles ({error}); copy it again") from error


def _check_streams(cards: Mapping[str, Any], axes: tuple[int, ...], table: bytes) -> None:
    """Raise ValueError for tiles that claim to be longer than they are: the C decoders believe it, and crash."""
    tile = [cards[f"ZTILE{n}"] for n in range(len(axes), 0, -1)]
    grid = [-(-length // step) for length, step in zip(axes, tile, strict=True)]
    heap = cards.get("THEAP", cards["NAXIS1"] * cards["NAXIS2"])
    pointer, width = ">i8" if "Q" in cards["TFORM1"] else ">i4", 2 if "I" in cards["TFORM1"] else 1
    for row in range(math.prod(grid)):
        count, start = np.frombuffer(table, pointer, 2, row * cards["NAXIS1"]).tolist()
        stream = table[heap + start : heap + start + width * count]
        if not count:  # this tile is in another column, gzipped
            continue
        if cards["ZCMPTYPE"] == "PLIO_1":
            words = np.frombuffer(stream, ">i2").tolist()
            claimed, there = words[2] if words[2] > 0 else (words[4] << 15) + words[3], len(words)
        else:
            corner = np.multiply(np.unravel_index(row, grid), tile)
            claimed = math.prod(struct.unpack_from(">ii", stream, 2))
            there = math.prod(int(n) for n in np.minimum(tile, np.subtract(axes, corner)))
        if not 0 < claimed <= there:
            raise ValueError(f"tile {row} claims {claimed} values of {there}")


def _tile_cards(image: _Image) -> dict[str, Value]:
    """The cards that describe tile compression (FITS standard 4.0, section 10.1), each of them checked."""
    cards = image.cards
    columns, axes = _whole(cards, "TFIELDS"), image.axes[::-1]
    if image.stored_bytes != _whole(cards, "NAXIS1") * _whole(cards, "NAXIS2") + _whole(cards, "PCOUNT"):
        raise HeaderError("has tiles in a table that is no table of bytes; unpack it with funpack")
    found: dict[str, Value] = {"XTENSION": "BINTABLE", "BITPIX": 8, "NAXIS": 2}
    found |= {key: _whole(cards, key) for key in ("NAXIS1", "NAXIS2", "PCOUNT")}
    found |= {"GCOUNT": 1, "TFIELDS": columns}
    for n in range(1, columns + 1):
        found[f"TTYPE{n}"] = _word(cards, f"TTYPE{n}", r"\w+" if n > 1 else "COMPRESSED_DATA")
        found[f"TFORM{n}"] = _word(cards, f"TFORM{n}", r"1?(?:[PQ][BIJED](?:\(\d+\))?|[BIJKED])")
    found |= {"ZIMAGE": True, "ZBITPIX": image.bitpix, "ZNAXIS": len(axes)}
    for n, length in enumerate(axes, start=1):
        found[f"ZNAXIS{n}"] = length
        found[f"ZTILE{n}"] = max(1, min(length, _whole(cards, f"ZTILE{n}", length if n == 1 else 1)))
    found["ZCMPTYPE"] = _word(cards, "ZCMPTYPE", r"GZIP_[12]|RICE_1|RICE_ONE|PLIO_1|HCOMPRESS_1|NOCOMPRESS")
    for n in range(1, 10):
        if f"ZNAME{n}" in cards:
            name, value = _word(cards, f"ZNAME{n}", r"\w+").upper(), int(number(cards, f"ZVAL{n}") or 0)
            if value not in _RICE_OPTIONS.get(name, (value,)):
                raise HeaderError(f"has tiles with {name} = {value}; unpack it with funpack")
            found |= {f"ZNAME{n}": name, f"ZVAL{n}": value}
    if "ZQUANTIZ" in cards:
        found["ZQUANTIZ"] = _word(cards, "ZQUANTIZ", r"NONE|NO_DITHER|SUBTRACTIVE_DITHER_[12]")
    return found | {key: _whole(cards, key) for key in ("THEAP", "ZDITHER0", "ZBLANK") if key in cards}


def _word(cards: Cards, key: str, pattern: str) -> str:
    value = text(cards, key)
    if not re.fullmatch(pattern, value, re.ASCII):
        raise HeaderError(f"has tiles with an unknown {key} ('{value}'); unpack it with funpack")
    return value


def _header_bytes(cards: Mapping[str, Value]) -> bytes:
    header = "".join([*(format_card(key, value) for key, value in cards.items()), "END"])
    return header.ljust(-(-len(header) // _BLOCK) * _BLOCK).encode("ascii")


# ------------------------------------------------------------------------------------------------ sky


def _find_wcs(path: Path, image: _Image) -> tuple[WCS | None, Literal["header", "sidecar"] | None, str]:
    """The WCS of a frame, where it comes from, and why there is none."""
    sidecar = _sidecar_of(path)
    try:
        if sidecar is None:
            return sky_wcs(image.cards, image.shape, interleaved=image.channel_axis == 2), "header", ""
        return sky_wcs(_sidecar_cards(sidecar, image.shape), image.shape), "sidecar", ""
    except HeaderError as error:
        return None, None, f"the {f'sidecar {sidecar.name}' if sidecar else 'header'} {error}"
    except OSError as error:
        return None, None, f"the sidecar {sidecar} cannot be read ({error.strerror})"


def _sidecar_of(path: Path) -> Path | None:
    stem = _FITS_NAME.sub("", path.name)
    candidates = (path.with_name(stem + ending) for ending in _SIDECAR_ENDINGS)
    return next((file for file in candidates if file != path and os.path.isfile(file)), None)


def _sidecar_cards(sidecar: Path, shape: tuple[int, int]) -> Cards:
    """Cards of a FITS header or of one kept as lines of text (ASTAP), which must be of this image."""
    with open(sidecar, "rb") as file:
        header = file.read(_SIDECAR_BYTES).decode("latin-1")
    is_lines = re.search(r"[\r\n]", header[: CARD_LENGTH + 2])
    cards = parse_cards(re.split(r"[\r\n]+", header) if is_lines else _split_cards(header))
    for names in (("IMAGEW", "IMAGEH"), ("NAXIS1", "NAXIS2")):
        width, height = (number(cards, name) for name in names)
        if width and height:
            if (height, width) != shape:
                raise HeaderError(f"is of an image of {width:.0f} x {height:.0f} pixels, not of this one")
            break
    return cards
