"""Unpacking of tile-compressed images (FITS standard 4.0, section 10.1): astropy decodes what was checked here."""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from zemosaic.headers import Cards, HeaderError, Value, format_card, number, text, whole

try:
    from astropy.io.fits.hdu.compressed._compression import CfitsioException
except ImportError:  # astropy < 7
    from astropy.io.fits._tiled_compression._compression import CfitsioException

BLOCK = 2880  #: bytes in a block of a FITS file

_RICE_OPTIONS = {"BLOCKSIZE": (16, 32), "BYTEPIX": (1, 2, 4)}  # what astropy's decoder is safe with
# astropy takes 15 to 80 microseconds for each, however small. Cameras' files have one a row.
_MAX_TILES = 1 << 16

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


def unpack_tiles(cards: Cards, axes: tuple[int, ...], bitpix: int, table: bytes) -> NDArray[Any]:
    """Decompressed values of a tile-compressed image, BZERO and BSCALE not yet applied.

    astropy gets the table alone, under a header made of checked values, so that nothing else that is
    odd in the file can stop it or make it print a warning.

    Parameters
    ----------
    cards : mapping
        Header of the table that holds the tiles.
    axes : tuple of int
        Lengths of the image's axes, in numpy order.
    bitpix : int
        Type of its pixels.
    table : bytes
        The data of the table, heap included.

    Returns
    -------
    ndarray
        Of shape `axes`.

    Raises
    ------
    HeaderError
        Tiles that are damaged, too many, or of a kind that is not supported.
    """
    checked = _tile_cards(cards, axes, bitpix, len(table))
    parts = [
        _header_bytes({"SIMPLE": True, "BITPIX": 8, "NAXIS": 0, "EXTEND": True}),
        _header_bytes(checked),
        table.ljust(-(-len(table) // BLOCK) * BLOCK, b"\0"),
    ]
    try:
        if checked["ZCMPTYPE"] in ("HCOMPRESS_1", "PLIO_1"):
            _check_streams(checked, axes, table)
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


def _tile_cards(cards: Cards, axes: tuple[int, ...], bitpix: int, table_bytes: int) -> dict[str, Value]:
    """The cards that describe tile compression (FITS standard 4.0, section 10.1), each of them checked."""
    columns, axes = whole(cards, "TFIELDS"), axes[::-1]
    if table_bytes != whole(cards, "NAXIS1") * whole(cards, "NAXIS2") + whole(cards, "PCOUNT"):
        raise HeaderError("has tiles in a table that is no table of bytes; unpack it with funpack")
    found: dict[str, Value] = {"XTENSION": "BINTABLE", "BITPIX": 8, "NAXIS": 2}
    found |= {key: whole(cards, key) for key in ("NAXIS1", "NAXIS2", "PCOUNT")}
    found |= {"GCOUNT": 1, "TFIELDS": columns}
    for n in range(1, columns + 1):
        found[f"TTYPE{n}"] = _word(cards, f"TTYPE{n}", r"\w+" if n > 1 else "COMPRESSED_DATA")
        found[f"TFORM{n}"] = _word(cards, f"TFORM{n}", r"1?(?:[PQ][BIJED](?:\(\d+\))?|[BIJKED])")
    found |= {"ZIMAGE": True, "ZBITPIX": bitpix, "ZNAXIS": len(axes)}
    for n, length in enumerate(axes, start=1):
        found[f"ZNAXIS{n}"] = length
        found[f"ZTILE{n}"] = max(1, min(length, whole(cards, f"ZTILE{n}", length if n == 1 else 1)))
    tiles = math.prod(-(-length // int(found[f"ZTILE{n}"])) for n, length in enumerate(axes, start=1))
    if tiles > _MAX_TILES:
        raise HeaderError(f"has {tiles} tiles, too many for one image; unpack it with funpack")
    found["ZCMPTYPE"] = _word(cards, "ZCMPTYPE", r"GZIP_[12]|RICE_1|RICE_ONE|PLIO_1|HCOMPRESS_1|NOCOMPRESS")
    for n in range(1, 10):
        if f"ZNAME{n}" in cards:
            name, value = _word(cards, f"ZNAME{n}", r"\w+").upper(), int(number(cards, f"ZVAL{n}") or 0)
            if value not in _RICE_OPTIONS.get(name, (value,)):
                raise HeaderError(f"has tiles with {name} = {value}; unpack it with funpack")
            found |= {f"ZNAME{n}": name, f"ZVAL{n}": value}
    if "ZQUANTIZ" in cards:
        found["ZQUANTIZ"] = _word(cards, "ZQUANTIZ", r"NONE|NO_DITHER|SUBTRACTIVE_DITHER_[12]")
    return found | {key: whole(cards, key) for key in ("THEAP", "ZDITHER0", "ZBLANK") if key in cards}


def _word(cards: Cards, key: str, pattern: str) -> str:
    value = text(cards, key)
    if not re.fullmatch(pattern, value, re.ASCII):
        raise HeaderError(f"has tiles with an unknown {key} ('{value}'); unpack it with funpack")
    return value


def _header_bytes(cards: Mapping[str, Value]) -> bytes:
    header = "".join([*(format_card(key, value) for key, value in cards.items()), "END"])
    return header.ljust(-(-len(header) // BLOCK) * BLOCK).encode("ascii")
