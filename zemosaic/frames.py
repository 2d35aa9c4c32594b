"""One sub on disk: find it, read the facts of its header, read its pixels. Any layout FITS allows.

`read_frame` touches headers only (about 1 ms, wherever the image is in the file); `read_pixels` reads
the pixels when they are needed. Raw files are never written to. Whatever is wrong with a file ends in
a `FrameError`, and nothing that its header merely claims is allocated or unpacked before it is known
that the file can hold it.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray

from zemosaic.headers import (
    CARD_LENGTH,
    Cards,
    HeaderError,
    Kind,
    bayer_phase,
    frame_kind,
    mount_mode,
    number,
    pack_wcs,
    parse_cards,
    pixel_size,
    pointing,
    printable,
    sky_wcs,
    start_time,
    text,
    unpack_wcs,
    whole,
)
from zemosaic.tiles import FloatImage
from zemosaic.unpack import BLOCK, unpack_tiles

_FITS_NAME = re.compile(r"(\.(?:fits?|fts)(?:\.gz|\.fz)?|\.fz)$", re.IGNORECASE)
_SIDECAR_NAME = re.compile(r"\.wcs(\.fits)?$", re.IGNORECASE)
# Tried one by one: listing a folder of 10,000 subs once for each of them would take minutes.
_SIDECAR_ENDINGS = (".wcs.fits", ".WCS.FITS", ".wcs.FITS", ".WCS.fits", ".wcs", ".WCS")
_SIDECAR_BYTES = 1 << 20

_MAX_HEADER_BLOCKS = 500
_MAX_HDUS = 500
_CHUNK = 1 << 20  # larger pieces are not unpacked any faster
_GZIP_MAGIC = b"\x1f\x8b"
# No deflate stream expands by more (zlib.net, "Maximum Compression Factor"). Tile compression can do
# better on a constant image, but not on one that came from a camera; and no camera fills 1 GiB, which takes
# some 4 s to unpack.
_MAX_EXPANSION = 1032
_MAX_UNPACKED = 1 << 30

_NO_MEASUREMENT = 1e12  # ADU
_PIXEL_TYPES = {8: ">u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}

#: What frames share that were taken with the same optics, sensor and binning: instrument, focal length, size of a pixel
#: and shape of the image.
Camera = tuple[str, float | None, float | None, tuple[int, int]]

_UNREADABLE = (OSError, EOFError, ValueError, MemoryError, zlib.error)


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
        super().__init__(printable(" ".join(message.split())), path)  # both in args: the error can be pickled
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
    kind : {"light", "dark", "bias", "flat", "stack"}
        What its header says it shows; a light unless it says otherwise.
    bayer : str or None
        For ``"bayer"``: colours of the array as read, four letters row-major from pixel [0, 0].
    wcs : WCS or None
        Two-axis celestial WCS of the array as read, longitude first, `pixel_shape` set.
    wcs_source : str or None
        ``header`` or ``sidecar``; later who solved it: see `zemosaic.solve.locate.Place`. None without a WCS.
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
    kind: Kind = "light"
    wcs: WCS | None = field(default=None, compare=False)
    wcs_source: Literal["header", "sidecar", "embedded", "astap", "astrometry", "neighbours"] | None = None
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

    @property
    def camera(self) -> Camera:
        """What decides on the scale of the frame and on the distortion of its image."""
        return self.instrument, self.focal_length, self.pixel_size, self.shape

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
        kind=frame_kind(facts),
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
    """The pixels of a frame in ADU: BZERO and BSCALE applied, NaN for BLANK and for what is no measurement.

    That is what is not finite, and values beyond 1e12, which flipped bits make and whose squares overflow.

    Returns
    -------
    ndarray
        float32, ``(ny, nx)``, or ``(ny, nx, 3)`` for an RGB frame; C-contiguous and the caller's own.

    Raises
    ------
    FrameError
        Truncated, unfinished or corrupt pixels, or a file that changed since `read_frame`.
    """
    with _named_errors(frame.path), _open(frame.path) as (stream, room):
        image = _find_image(stream, room)
        if image.shape != frame.shape or (image.channel_axis is not None) != (frame.colour == "rgb"):
            raise HeaderError(f"has changed since its header was read: now {image.axes}; start again")
        stored = _read_exactly(stream, image.offset, image.stored_bytes)
        if isinstance(stream, gzip.GzipFile):
            _go_to(stream, room)  # the check sum lies at the end of the stream
        if image.tiled:
            raw = unpack_tiles(image.cards, image.axes, image.bitpix, stored.tobytes())
        else:
            raw = stored.view(_PIXEL_TYPES[image.bitpix])
        pixels = _to_adu(raw, image).reshape(image.axes)
        if image.bitpix > 0 and image.scaling[1]:
            _check_end(pixels.reshape(-1), image.scaling[1])
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
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
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
            if room == _MAX_UNPACKED:
                raise HeaderError(f"declares {stored} bytes of pixels, too many for a gzipped file; unpack it first")
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
        _go_to(stream, start)
        header, length = _read_header(stream, b"XTENSION=" if index else b"SIMPLE  =")
        if not length:
            return
        yield header, start + length
        start += length + -(-_data_bytes(header) // BLOCK) * BLOCK
        if start >= room:
            return


def _read_header(stream: BinaryIO, opening: bytes) -> tuple[Cards, int]:
    """Cards of the header that starts here and its length in bytes; length 0 after the last HDU."""
    lines: list[str] = []
    for count in range(1, _MAX_HEADER_BLOCKS + 1):
        block = stream.read(BLOCK)
        if count == 1 and not block.startswith(opening):
            if opening.startswith(b"SIMPLE"):
                raise HeaderError("is not a FITS file; leave it out" if block else "is empty; copy it again")
            return {}, 0
        lines += _split_cards(block.decode("latin-1"))
        if any(line[:8].rstrip() == "END" for line in lines[-BLOCK // CARD_LENGTH :]):
            return parse_cards(lines), count * BLOCK
        if len(block) < BLOCK:
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
    bitpix = whole(cards, "ZBITPIX" if tiled else "BITPIX")
    if bitpix not in _PIXEL_TYPES:
        raise HeaderError(f"has pixels of an unknown type (BITPIX = {bitpix}); leave it out")
    if number(cards, "BSCALE") == 0:
        raise HeaderError("has BSCALE = 0, which makes all its pixels the same; leave it out")
    if len(axes) == 3 and axes[0] not in (1, 3) and axes[2] != 3:
        raise HeaderError(f"holds a cube {axes} that is neither RGB nor mono; leave it out")
    return _Image(cards, facts, axes, bitpix, tiled)


def _axes(cards: Cards, prefix: str = "") -> list[int]:
    """NAXIS1, NAXIS2, ... of an HDU."""
    count = whole(cards, f"{prefix}NAXIS")
    axes = [whole(cards, f"{prefix}NAXIS{axis}") for axis in range(1, min(count, 999) + 1)]
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
    count = whole(cards, "GCOUNT", 1) * (whole(cards, "PCOUNT", 0) + math.prod(axes))
    if count < 0:
        raise HeaderError("declares a negative amount of data; leave it out")
    return abs(whole(cards, "BITPIX")) // 8 * count


# --------------------------------------------------------------------------------------------- pixels


def _go_to(stream: BinaryIO, offset: int) -> None:
    """Like `seek`, which unpacks what it skips in a gzip stream by small pieces and half as fast."""
    if not isinstance(stream, gzip.GzipFile):
        stream.seek(offset)
        return
    while stream.tell() < offset and stream.read(min(_CHUNK, offset - stream.tell())):
        pass


def _read_exactly(stream: BinaryIO, offset: int, length: int) -> NDArray[np.uint8]:
    """`length` bytes from `offset`, in pieces: a gzip stream may end long before the header claims."""
    _go_to(stream, offset)
    stored = np.empty(length, np.uint8)  # costs memory only where it is written to
    view, done = stored.data, 0
    while done < length:
        count = stream.readinto(view[done : done + _CHUNK])  # type: ignore[attr-defined]
        if not count:
            raise HeaderError(f"is truncated: {length - done} of {length} bytes of pixels are missing; copy it again")
        done += count
    return stored


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
    largest = abs(scale) * 2.0 ** (8 * raw.dtype.itemsize) + abs(zero)
    if raw.dtype.kind == "f" or not largest < _NO_MEASUREMENT:
        pixels[~(np.abs(pixels) < _NO_MEASUREMENT)] = np.nan  # what is NaN already is not less either
    return pixels


def _check_end(pixels: FloatImage, nothing: float) -> None:
    """Refuse pixels ``(n,)`` in the order of the file whose last part was never written.

    Copying programs give a file its full length first; what has not arrived yet reads as zeros, which stand for
    `nothing` ADU. That is BZERO: where it is 0 itself, zeros may be the border of a frame.
    """
    last = pixels[-(pixels.size // 20) :]
    if last.size and (last == np.float32(nothing)).all() and not (pixels == np.float32(nothing)).all():
        raise HeaderError("ends in pixels that were never written: it was cut short or is still being copied")


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


def sidecar_name(path: Path) -> str:
    """Name of the file beside a frame that holds its WCS."""
    return _FITS_NAME.sub("", path.name) + _SIDECAR_ENDINGS[0]


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
