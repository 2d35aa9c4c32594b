"""The stars that frames are solved against: 1.87 million of Tycho-2, shipped with the package.

The file holds the stars in order of declination, in nine planes of one byte a star, and is compressed with xz (see
`pack`): four planes, lowest byte first, of the step in declination from the star before; four of the right ascension;
one of V_T. In that order a star costs 35 bits, and reading needs no sorting.
"""

from __future__ import annotations

import lzma
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

DATA_FILE = "tycho2.xz"
_DEC_STEP = 0.03 / 3600  # degrees
_RA_STEP = 360 / 2**24  # 0.08 arcsec: rounding costs 0.02 arcsec rms, a third of the catalogue's own error
_MAG_STEP = 1 / 16
_PLANES = 9


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
        centre = unit_vectors(np.array([ra]), np.array([dec]))[0]
        chord = np.linalg.norm(unit_vectors(self.ra[rows], self.dec[rows]) - centre, axis=1)
        return self[rows[chord <= 2 * math.sin(math.radians(min(radius, 180.0)) / 2)]]


def unit_vectors(ra: NDArray[np.float64], dec: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(n, 3)`` directions of positions in degrees."""
    longitude, latitude = np.radians(ra), np.radians(dec)
    return np.stack(
        [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], axis=-1
    )


@cache
def load_catalogue() -> Catalogue:
    """The Tycho-2 stars shipped with the package; read once per process (0.4 s, 45 MB).

    Positions are rounded to 0.03″ in declination and 0.08″ in right ascension, V_T to 0.06.
    """
    return decode(files("zemosaic.solve").joinpath(DATA_FILE).read_bytes())


def encode(catalogue: Catalogue) -> bytes:
    """The file that `decode` reads."""
    dec = np.rint((catalogue.dec + 90) / _DEC_STEP).astype(np.int64)
    ra = np.rint(catalogue.ra / _RA_STEP).astype(np.int64) % 2**24
    mag = np.clip(np.rint(catalogue.mag / _MAG_STEP), 0, 255).astype(np.uint8)
    order = np.lexsort((ra, dec))
    columns = [np.diff(dec[order], prepend=0), ra[order]]
    planes = [column.astype("<u4").view(np.uint8).reshape(-1, 4).T for column in columns]
    body = b"".join(np.ascontiguousarray(plane).tobytes() for plane in (*planes, mag[order]))
    # Neighbouring bytes have nothing to do with each other, so no context is kept (lc = lp = pb = 0).
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 0, "pb": 0}]
    return lzma.compress(body, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=filters)


def decode(packed: bytes) -> Catalogue:
    """The catalogue in the bytes of a file that `encode` wrote."""
    planes = np.frombuffer(lzma.decompress(packed), np.uint8).reshape(_PLANES, -1)
    step, across = (np.ascontiguousarray(planes[i : i + 4].T).view("<u4")[:, 0] for i in (0, 4))
    up = np.cumsum(step, dtype=np.float64)  # whole numbers, exact
    return Catalogue(across * _RA_STEP, up * _DEC_STEP - 90, planes[8] * _MAG_STEP)
