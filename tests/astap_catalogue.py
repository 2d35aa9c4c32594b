"""A star database in ASTAP's 1476-5 format, made from any catalogue, so that tests can run the real ASTAP.

The format as its readers describe it: the sky in 36 rings of declination (5.142857 deg wide, half that at the
poles), each cut into cells of equal width in right ascension, a file a cell. A file begins with 110 bytes of text
whose last is the length of a record, 5 bytes. Stars come brightest first, in groups of one magnitude (0.1 mag) and
one upper byte of the declination; a record with right ascension 0xFFFFFF opens a group and holds both. The other
records are right ascension (24 bits of a turn) and the lower 16 bits of the declination (24 bits of a half turn),
the lowest byte first.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_HALF = (1, 3, 9, 15, 21, 27, 33, 38, 43, 48, 52, 56, 60, 63, 65, 67, 68, 69)
CELLS = np.array(_HALF + _HALF[::-1])
_RING_DEG = 180 / 35
_RA_UNIT = 360 / (2**24 - 1)
_DEC_UNIT = 90 / (2**23 - 1)


def write_database(folder: Path, ra: NDArray, dec: NDArray, mag: NDArray, name: str = "h18") -> None:
    """Write ``<name>_RRCC.1476`` for the whole sky into `folder`.

    Parameters
    ----------
    folder : Path
        Must exist.
    ra, dec : ndarray
        ``(n,)`` degrees, J2000; ``0 <= ra < 360``.
    mag : ndarray
        ``(n,)``, brighter than 23.
    name : str
        The database whose place it takes; older ASTAP know h17, h18 and v17 only.
    """
    ring = np.clip(np.floor((dec + 90) / _RING_DEG + 0.5).astype(int), 0, 35)
    cell = np.minimum((ra / 360 * CELLS[ring]).astype(int), CELLS[ring] - 1)
    area = np.r_[0, np.cumsum(CELLS)][ring] + cell
    order = np.lexsort((mag, area))
    bounds = np.searchsorted(area[order], np.arange(CELLS.sum() + 1))
    names = [f"{name}_{r + 1:02d}{c + 1:02d}.1476" for r, cells in enumerate(CELLS) for c in range(cells)]
    header = b"Made for a test".ljust(109) + bytes([5])
    for k, file in enumerate(names):
        stars = order[bounds[k] : bounds[k + 1]]
        (folder / file).write_bytes(header + _records(ra[stars], dec[stars], mag[stars]))


def _records(ra: NDArray, dec: NDArray, mag: NDArray) -> bytes:
    alpha = np.rint(ra / _RA_UNIT).astype(np.int64).clip(0, 2**24 - 2)
    delta = np.rint(dec / _DEC_UNIT).astype(np.int64)
    tenths = np.rint(mag * 10).astype(np.int64)
    high = delta >> 16
    order = np.lexsort((high, tenths))
    alpha, delta, tenths, high = alpha[order], delta[order], tenths[order], high[order]
    stars = np.stack([alpha & 255, alpha >> 8 & 255, alpha >> 16, delta & 255, delta >> 8 & 255], axis=1)
    opens = np.flatnonzero(np.diff(np.stack([tenths, high]), prepend=-9999).any(axis=0))
    groups = np.full((len(opens), 5), 255)
    groups[:, 3] = high[opens] + 128
    groups[:, 4] = tenths[opens] + 16
    return np.insert(stars, opens, groups, axis=0).astype(np.uint8).tobytes()
