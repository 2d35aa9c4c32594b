"""The stars that frames are solved against: 1.87 million of Tycho-2, shipped with the package.

The file (see `pack`) holds the stars in order of declination, deflated: how many there are, and how many of them lie
256 steps of declination or more beyond the star before; which these are, and their steps without the lowest byte; then
of all stars, column by column, the lower two bytes of the right ascension, its third, the lowest byte of the step in
declination, and V_T. In that order a star costs 35 bits, and reading needs neither sorting nor anything slow: most
bytes of the right ascension, which nothing could shorten, are stored as they are.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from zemosaic.sphere import to_vectors

DATA_FILE = "tycho2.z"
_DEC_STEP = 0.03 / 3600  # degrees
_RA_STEP = 360 / 2**24  # 0.08 arcsec: rounding costs 0.02 arcsec rms, a third of the catalogue's own error
_MAG_STEP = 1 / 16
_KINDS = ("<u4", "<u4", "<u4", "<u2", "u1", "u1", "u1")  # of the columns of the file


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Stars with known positions, in order of declination (they are sorted at birth if they are not).

    Parameters
    ----------
    ra, dec : ndarray
        ``(n,)`` float64, degrees, ICRS, epoch J2000.
    mag : ndarray
        ``(n,)`` float64, any magnitude that orders the stars by brightness; V_T for Tycho-2.

    Raises
    ------
    ValueError
        If the three differ in length or a position is not finite.
    """

    ra: NDArray[np.float64]
    dec: NDArray[np.float64]
    mag: NDArray[np.float64]

    def __post_init__(self) -> None:
        if not self.ra.shape == self.dec.shape == self.mag.shape or self.ra.ndim != 1:
            raise ValueError(
                f"a catalogue needs three equal columns, not {self.ra.shape, self.dec.shape, self.mag.shape}"
            )
        if not (np.isfinite(self.ra).all() and np.isfinite(self.dec).all()):
            raise ValueError("a catalogue needs finite positions")
        if (np.diff(self.dec) < 0).any():
            order = np.argsort(self.dec, kind="stable")
            for name in ("ra", "dec", "mag"):
                object.__setattr__(self, name, getattr(self, name)[order])

    def __len__(self) -> int:
        return len(self.ra)

    def __getitem__(self, rows: NDArray) -> Catalogue:
        """The stars with these indices, or where this mask is true."""
        return Catalogue(self.ra[rows], self.dec[rows], self.mag[rows])

    def cone(self, ra: float, dec: float, radius: float) -> Catalogue:
        """Stars at most `radius` degrees from a position; a millisecond or two of the shipped catalogue."""
        low, high = np.searchsorted(self.dec, [dec - radius, dec + radius + 1e-9])
        rows = np.arange(low, high)
        if abs(dec) + radius < 90:
            # Half width in right ascension of a circle on the sphere.
            width = math.degrees(math.asin(math.sin(math.radians(radius)) / math.cos(math.radians(dec))))
            rows = rows[np.abs((self.ra[low:high] - ra + 180) % 360 - 180) <= width + 1e-9]
        centre = to_vectors(np.array([ra]), np.array([dec]))[0]
        chord = np.linalg.norm(to_vectors(self.ra[rows], self.dec[rows]) - centre, axis=1)
        return self[rows[chord <= 2 * math.sin(math.radians(min(radius, 180.0)) / 2)]]


@cache
def load_catalogue() -> Catalogue:
    """The Tycho-2 stars shipped with the package; read once per process (0.04 s, 45 MB).

    Positions are rounded to 0.03″ in declination and 0.08″ in right ascension, V_T to 0.06.
    """
    return decode(files("zemosaic.solve").joinpath(DATA_FILE).read_bytes())


def encode(catalogue: Catalogue) -> bytes:
    """The file that `decode` reads."""
    dec = np.rint((catalogue.dec + 90) / _DEC_STEP).astype(np.int64)
    ra = np.rint(catalogue.ra / _RA_STEP).astype(np.int64) % 2**24
    mag = np.clip(np.rint(catalogue.mag / _MAG_STEP), 0, 255)
    order = np.lexsort((ra, dec))
    ra, step = ra[order], np.diff(dec[order], prepend=0)
    wide = np.flatnonzero(step > 255)
    columns = ([len(ra), len(wide)], wide, step[wide] >> 8, ra % 2**16, ra >> 16, step % 256, mag[order])
    body = b"".join(np.asarray(column).astype(kind).tobytes() for kind, column in zip(_KINDS, columns, strict=True))
    # Neighbouring bytes have nothing to do with each other: there is nothing to look for but how often each occurs.
    packer = zlib.compressobj(9, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    return packer.compress(body) + packer.flush()


def decode(packed: bytes) -> Catalogue:
    """The catalogue in the bytes of a file that `encode` wrote."""
    body = zlib.decompress(packed, bufsize=2 * len(packed))  # room for all of it at once
    stars, wide = np.frombuffer(body, _KINDS[0], 2).tolist()
    columns, at = [], 8
    for kind, count in zip(_KINDS[1:], (wide, wide, stars, stars, stars, stars), strict=True):
        columns.append(np.frombuffer(body, kind, count, at))
        at += columns[-1].nbytes
    row, far, right, across, step, mag = columns
    up = step.astype(np.uint32)
    up[row] += far << 8
    dec = np.cumsum(up, dtype=np.uint32).astype(np.float64) * _DEC_STEP - 90
    ra = (across.astype(np.uint32) << 16) + right
    return Catalogue(ra * _RA_STEP, dec, mag * _MAG_STEP)
