"""Where could a frame be? Triangles of its stars are looked up among triangles of catalogue stars.

Why a matcher of our own: it finds, on the whole sky too, every frame that shows some six catalogue stars
(`benchmarks/solve.py`), while the libraries that can do that need an index of 110 to 280 MB (`tetra3rs`, `astrometry`).

A triangle is a star with two of its nearest neighbours. Its shape (two ratios of sides) survives scale, rotation and
mirroring. Every pair of like triangles places the frame somewhere; true pairs agree on the place, chance ones do not,
so the places are counted in cells and the fullest cells are returned. Whether one of them is right is decided
elsewhere (`placement.log_chance`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from zemosaic.solve.catalogue import Catalogue
from zemosaic.sphere import to_vectors

_BINS = 150  # of a ratio of sides, 0 … 1
LOOSEST = 1 / _BINS  # largest tolerance of a ratio: neighbouring bins are looked at, no more
_THINNEST = 0.08  # shortest over longest side; with less, the shape says little
_NEIGHBOURS = 6  # of a star of the frame
_CHUNK = 2_000_000  # pairs of triangles looked at in one go, some 100 MB
_CELL = 0.12  # side of a counting cell, in half diagonals of the frame
_SCALE_STEP = 0.1  # of ln(scale); the size of the cells follows the scale
# Odd numbers with well-mixed bits: cells are counted by a 64-bit hash of their eight integers.
_HASH = np.random.default_rng(2000).integers(0, 2**63, 8, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


@dataclass(frozen=True)
class Triangles:
    """Triangles of points, all arrays of the same length.

    Parameters
    ----------
    corners : ndarray
        ``(t, 3)`` int32, the points opposite the longest, the middle and the shortest side.
    shape : ndarray
        ``(t, 2)`` float32, middle and shortest side over the longest.
    longest : ndarray
        ``(t,)`` float32, longest side, in the unit of the points.
    mirrored : ndarray
        ``(t,)`` bool, whether the corners go round clockwise.
    """

    corners: NDArray[np.int32]
    shape: NDArray[np.float32]
    longest: NDArray[np.float32]
    mirrored: NDArray[np.bool_]

    def __getitem__(self, rows: NDArray[np.int64]) -> Triangles:
        # numpy.take copies rows four times as fast as indexing does.
        corners, shape = np.take(self.corners, rows, axis=0), np.take(self.shape, rows, axis=0)
        return Triangles(corners, shape, self.longest[rows], self.mirrored[rows])


@dataclass(frozen=True)
class Sky:
    """Catalogue stars with their triangles, ordered by shape.

    Parameters
    ----------
    stars : ndarray
        ``(n, 3)`` float64 directions.
    triangles : Triangles
        Sides in radians.
    starts : ndarray
        ``(_BINS**2 + 1,)`` where the triangles of each bin of shapes start.
    """

    stars: NDArray[np.float64]
    triangles: Triangles
    starts: NDArray[np.int64]


@dataclass(frozen=True)
class Places:
    """Where a frame could be, likeliest first; all arrays of the same length.

    Parameters
    ----------
    centre, right : ndarray
        ``(p, 3)`` directions of the frame's centre and of the point half a diagonal along x from it.
    mirrored : ndarray
        ``(p,)`` bool, whether the sky is seen mirrored: y turned clockwise from x.
    votes : ndarray
        ``(p,)`` int64, pairs of triangles that agree.
    pairs : int
        Pairs of triangles that had a vote: so many places had a chance to be right by accident.
    """

    centre: NDArray[np.float64]
    right: NDArray[np.float64]
    mirrored: NDArray[np.bool_]
    votes: NDArray[np.int64]
    pairs: int


def thin_out(catalogue: Catalogue, side: float, count: int) -> NDArray[np.int64]:
    """Indices of the `count` brightest stars of every cell of `side` degrees, in the catalogue's order."""
    band = np.floor((catalogue.dec + 90) / side).astype(np.int64)
    middle = np.radians(np.clip((np.arange(band.max(initial=0) + 1) + 0.5) * side - 90, -89.9, 89.9))
    columns = np.ceil(360 / side * np.cos(middle)).astype(np.int64)
    cell = (np.cumsum(columns) - columns)[band] + (catalogue.ra / 360 * columns[band]).astype(np.int64)
    order = np.argsort(catalogue.mag, kind="stable")
    order = order[np.argsort(cell[order], kind="stable")]
    first = np.flatnonzero(np.diff(cell[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
    return np.sort(order[rank < count])


def sky_triangles(catalogue: Catalogue, neighbours: int) -> Sky:
    """Triangles of every star of a catalogue with its nearest `neighbours`: 6 each for 4 of them, 15 for 6."""
    stars = to_vectors(catalogue.ra, catalogue.dec)
    found = triangles(stars, neighbours)
    cell = _bins(found.shape) @ np.array([_BINS, 1])
    starts = np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=_BINS**2))])
    order = np.argsort(cell.astype(np.uint16), kind="stable")  # 150² fits 16 bits, which numpy sorts by radix
    return Sky(stars, found[order], starts)


def triangles(points: NDArray[np.float64], neighbours: int) -> Triangles:
    """Every point with every two of its nearest neighbours; some triangles are found from two or three corners.

    Parameters
    ----------
    points : ndarray
        ``(n, 2)`` on a plane, or ``(n, 3)`` directions.
    neighbours : int
        How many are looked at.
    """
    count = max(min(neighbours, len(points) - 1), 0)
    pairs = list(combinations(range(count), 2))
    room = len(points) * len(pairs)
    corners, shape = np.empty((room, 3), np.int32), np.empty((room, 2), np.float32)
    longest, mirrored = np.empty(room, np.float32), np.empty(room, bool)
    if not room:
        return Triangles(corners, shape, longest, mirrored)
    distance, index = cKDTree(points).query(points, k=count + 1)
    apart, near = distance[:, 1:].astype(np.float32), index[:, 1:].astype(np.int32)
    own = np.arange(len(points), dtype=np.int32)
    coordinates = points.astype(np.float32)  # directions to 0.02 arcsec
    end = 0
    for i, j in pairs:
        a, b = near[:, i], near[:, j]
        to_a, to_b = apart[:, i], apart[:, j]  # nearest first, so that only the place of the third side is open
        side = coordinates[a] - coordinates[b]
        base = np.sqrt(np.einsum("ij,ij->i", side, side))
        long, short = np.maximum(base, to_b), np.minimum(base, to_a)
        middle = np.maximum(np.minimum(base, to_b), to_a)
        good = np.flatnonzero(short > _THINNEST * long)
        wide, narrow = base >= to_b, base < to_a
        opposite = (np.where(wide, own, a), np.where(wide, a, np.where(narrow, b, own)), np.where(narrow, own, b))
        here = slice(end, end + len(good))
        corners[here] = np.stack(opposite, axis=1)[good]
        shape[here] = np.stack([middle, short], axis=1)[good] / long[good, None]
        longest[here] = long[good]
        mirrored[here] = _clockwise(*(coordinates[c] for c in corners[here].T))
        end = here.stop
    return Triangles(corners[:end], shape[:end], longest[:end], mirrored[:end])


def _clockwise(a: NDArray[np.float32], b: NDArray[np.float32], c: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which way triangles go round: on the plane, or on the sky looking towards the centre of the sphere."""
    u, v = (b - a).T, (c - a).T
    if len(u) == 2:
        return u[0] * v[1] - u[1] * v[0] < 0
    x, y, z = a.T
    return x * (u[1] * v[2] - u[2] * v[1]) + y * (u[2] * v[0] - u[0] * v[2]) + z * (u[0] * v[1] - u[1] * v[0]) < 0


def _bins(shape: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.minimum((shape * _BINS).astype(np.int64), _BINS - 1)


def find_places(
    sky: Sky,
    stars: NDArray[np.float64],
    half: float,
    scales: tuple[float, float],
    *,
    tolerance: float = LOOSEST,
    limit: int,
) -> Places:
    """Places that at least two pairs of like triangles agree on.

    Parameters
    ----------
    sky : Sky
        Triangles of the catalogue.
    stars : ndarray
        ``(n, 2)`` stars of the frame, pixels from its centre.
    half : float
        Half its diagonal, pixels.
    scales : tuple of float
        Smallest and largest scale, radians per pixel.
    tolerance : float
        By how much the ratios of like triangles may differ, at most `LOOSEST`.
    limit : int
        Length of the answer at most.
    """
    mine = triangles(stars, _NEIGHBOURS)
    mine = mine[_once(mine.corners)]
    parts = [
        _placed(sky, mine, stars, half, rows, theirs)
        for rows, theirs in _like(sky, mine, scales, tolerance)
        if len(rows)
    ]
    if not parts:
        none = np.zeros((0, 3))
        return Places(none, none, np.zeros(0, bool), np.zeros(0, np.int64), 0)
    points = np.concatenate([p for p, _ in parts])
    return _fullest(points, np.concatenate([m for _, m in parts]), limit)


def _once(corners: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where each set of three corners occurs first."""
    a, b, c = np.sort(corners.astype(np.int64), axis=1).T
    return np.unique((a << 40) + (b << 20) + c, return_index=True)[1]


def _like(
    sky: Sky, mine: Triangles, scales: tuple[float, float], tolerance: float
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Chunks of (rows of `mine`, triangles of the sky) of one shape, and of sizes that fit the scale."""
    bins = _bins(mine.shape)
    low, high = np.maximum(bins[:, 1] - 1, 0), np.minimum(bins[:, 1] + 1, _BINS - 1)
    own = np.arange(len(bins))
    # The triangles of three neighbouring bins of the second ratio lie side by side.
    lines = [
        (own[ok], line[ok] * _BINS, ok)
        for line in bins[:, 0] + np.array([[-1], [0], [1]])
        for ok in [(line >= 0) & (line < _BINS)]
    ]
    rows = np.concatenate([r for r, _, _ in lines])
    start = np.concatenate([sky.starts[first + low[ok]] for _, first, ok in lines])
    count = np.concatenate([sky.starts[first + high[ok] + 1] for _, first, ok in lines]) - start
    chunk = np.cumsum(count) // _CHUNK
    for at in (chunk == k for k in np.unique(chunk)):
        row = np.repeat(rows[at], count[at])
        theirs = np.arange(len(row)) + np.repeat(start[at] - np.cumsum(count[at]) + count[at], count[at])
        ratio = sky.triangles.longest[theirs] / mine.longest[row]
        fits = np.flatnonzero((ratio >= scales[0]) & (ratio <= scales[1]))
        row, theirs = row[fits], theirs[fits]
        differ = np.abs(np.take(sky.triangles.shape, theirs, axis=0) - np.take(mine.shape, row, axis=0))
        fits = np.flatnonzero((differ[:, 0] <= tolerance) & (differ[:, 1] <= tolerance))
        yield row[fits], theirs[fits]


def _placed(
    sky: Sky,
    mine: Triangles,
    stars: NDArray[np.float64],
    half: float,
    rows: NDArray[np.int64],
    theirs: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Where each pair of triangles puts the frame: least squares on the plane that touches the sky there.

    Returns
    -------
    points : ndarray
        ``(p, 6)`` directions of the frame's centre and of the point half a diagonal along x from it.
    mirrored : ndarray
        ``(p,)`` bool.
    """
    mirrored = mine.mirrored[rows] != sky.triangles.mirrored[theirs]
    corners = np.take(stars, mine.corners[rows], axis=0)
    z = corners[..., 0] + 1j * np.where(mirrored, -1, 1)[:, None] * corners[..., 1]
    v = np.take(sky.stars, np.take(sky.triangles.corners, theirs, axis=0), axis=0)
    touch = _unit(v[:, 0] + v[:, 1] + v[:, 2])
    # Any direction across will do as the plane's first axis.
    first = _unit(np.cross(touch, np.eye(3)[np.argmin(np.abs(touch), axis=1)]))
    second = np.cross(touch, first)
    w = np.einsum("tij,tj->ti", v, first) + 1j * np.einsum("tij,tj->ti", v, second)
    w /= np.einsum("tij,tj->ti", v, touch)
    middle = _mean(z)
    dz = z - middle[:, None]
    turn = _mean(dz.conj() * w) / _mean(dz.conj() * dz)
    centre = _mean(w) - turn * middle
    points = [
        _unit(touch + spot.real[:, None] * first + spot.imag[:, None] * second)
        for spot in (centre, centre + turn * half)
    ]
    return np.concatenate(points, axis=1), mirrored


def _mean(corners: NDArray[np.complex128]) -> NDArray[np.complex128]:
    """Of three columns; a sum along a short axis would take most of the time."""
    return (corners[:, 0] + corners[:, 1] + corners[:, 2]) / 3


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return vectors / np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]


def _fullest(points: NDArray[np.float64], mirrored: NDArray[np.bool_], limit: int) -> Places:
    """Count places in cells, in two grids half a cell apart, and take the medians of the fullest cells."""
    apart = points[:, 3:] - points[:, :3]
    size = np.log(np.einsum("ij,ij->i", apart, apart)) / (2 * _SCALE_STEP)
    cells = []
    for shift in (0.0, 0.5):
        step = np.floor(size + shift)
        side = _CELL * np.exp((step + 0.5 - shift) * _SCALE_STEP)
        numbers = np.column_stack([np.floor(points / side[:, None] + shift), step, mirrored]).astype(np.int64)
        key = np.einsum("ij,j->i", numbers.astype(np.uint64), _HASH)
        _, cell, votes = np.unique(key, return_inverse=True, return_counts=True)
        for c in np.argsort(-votes, kind="stable")[:limit]:
            if votes[c] > 1:
                cells.append((int(votes[c]), np.flatnonzero(cell == c)))
    kept: list[tuple[NDArray[np.float64], bool, int]] = []
    for votes_here, members in sorted(cells, key=lambda c: -c[0]):
        place, hand = np.median(points[members], axis=0), bool(mirrored[members[0]])
        near = 0.25 * _CELL * np.linalg.norm(place[3:] - place[:3])
        # The same place is often fullest in both grids.
        if all(hand != h or np.abs(place - p).max() > near for p, h, _ in kept):
            kept.append((place, hand, votes_here))
    kept = kept[:limit]
    spots = np.array([p for p, _, _ in kept]).reshape(-1, 6)
    return Places(
        spots[:, :3],
        spots[:, 3:],
        np.array([h for _, h, _ in kept], dtype=bool),
        np.array([v for _, _, v in kept], dtype=np.int64),
        len(points),
    )
