"""What lots disagree about: stars and sky that several of them saw, and the offset of every lot from the rest.

One method serves brightness, position and sky alike: what lots share is averaged per lot, and
``value = common + offset[lot]`` is solved for all lots at once (`zemosaic.levels.solve_common`), so that a lot is
compared with everything it overlaps and a single bad one does not rub off on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from zemosaic.levels import solve_common
from zemosaic.report.evidence import Evidence, Floats, Ints
from zemosaic.report.surface import MosaicStars

_RADIUS = 3.0  # px between where a frame and the mosaic see a star; the run itself matches within as much
_SURE = 4.0  # standard deviations from which an offset of a lot is more than chance
_LEAST = 5  # shared stars or nodes from which a lot's offset means anything


@dataclass(frozen=True)
class Matched:
    """Frames' stars that the mosaic shows too, each at most once a frame; n detections.

    Parameters
    ----------
    star, frame, lot : ndarray
        ``(n,)`` which star of the mosaic, seen in which frame, of which lot.
    x, y : ndarray
        ``(n,)`` where the frame puts it, mosaic pixels.
    flux, error : ndarray
        ``(n, C)`` ADU after gain.
    weight : ndarray
        ``(n, C)`` weight of the frame in the mosaic.
    clean : ndarray
        ``(n,)`` bool: isolated and unsaturated.
    """

    star: Ints
    frame: Ints
    lot: Ints
    x: Floats
    y: Floats
    flux: Floats
    error: Floats
    weight: Floats
    clean: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.star)

    @property
    def signal(self) -> Floats:
        """``(n,)`` signal to noise of all channels together."""
        return np.sqrt((np.maximum(self.flux / self.error, 0) ** 2).sum(axis=1))

    def take(self, which: NDArray) -> Matched:
        """Some of the detections."""
        names = ("star", "frame", "lot", "x", "y", "flux", "error", "weight", "clean")
        return Matched(*(getattr(self, name)[which] for name in names))


@dataclass(frozen=True)
class Offsets:
    """Offset of every lot from what all lots agree on; L lots, K quantities.

    Parameters
    ----------
    value, error : ndarray
        ``(L, K)``; the median lot is 0 (of two lots, the first); NaN for a lot that shares too little with others.
    shared : ndarray
        ``(L,)`` stars or nodes that a lot shares.
    """

    value: Floats
    error: Floats
    shared: Ints

    @classmethod
    def unknown(cls, lots: int, quantities: int) -> Offsets:
        """Nothing is known of any lot."""
        empty = np.full((lots, quantities), np.nan)
        return cls(empty, empty, np.zeros(lots, np.int64))


def match_stars(evidence: Evidence, mosaic: MosaicStars) -> Matched | None:
    """Find the frames' stars in the mosaic; None where there are no frames or no stars."""
    stars, frames = evidence.stars, evidence.frames
    if stars is None or frames is None or not len(mosaic.stars) or not len(stars.x):
        return None
    distance, nearest = cKDTree(mosaic.points).query(np.c_[stars.x, stars.y], distance_upper_bound=_RADIUS)
    found = np.flatnonzero(np.isfinite(distance) & np.isfinite(stars.flux).all(axis=1))
    # The nearest of two detections of a frame that claim the same star.
    found = found[np.argsort(distance[found], kind="stable")]
    key = nearest[found] * len(frames) + stars.frame[found]
    found = np.sort(found[np.unique(key, return_index=True)[1]])
    frame = stars.frame[found]
    return Matched(
        star=nearest[found].astype(np.int64),
        frame=frame,
        lot=frames.lot[frame],
        x=stars.x[found],
        y=stars.y[found],
        flux=stars.flux[found],
        error=stars.error[found],
        weight=frames.weight[frame],
        clean=stars.clean[found],
    )


def average(common: Ints, group: Ints, value: Floats, weight: Floats) -> tuple[Ints, Ints, Floats, Floats]:
    """Weighted means of the values ``(n, K)`` of each pair of common thing and group.

    Returns
    -------
    common, group : ndarray
        ``(m,)`` the pairs.
    mean, total : ndarray
        ``(m, K)`` means and sums of the weights.
    """
    width = int(group.max(initial=0)) + 1
    pairs, at = np.unique(common * width + group, return_inverse=True)
    total = np.stack([np.bincount(at, w, len(pairs)) for w in weight.T], axis=1)
    mean = np.stack([np.bincount(at, w * v, len(pairs)) for v, w in zip(value.T, weight.T, strict=True)], axis=1)
    return pairs // width, pairs % width, mean / np.maximum(total, 1e-300), total.astype(float)


def lot_offsets(common: Ints, lot: Ints, value: Floats, sigma: Floats, lots: int, scale: float) -> Offsets:
    """Offset of every lot.

    Parameters
    ----------
    common, lot : ndarray
        ``(n,)`` which star or node, seen by which lot.
    value, sigma : ndarray
        ``(n, K)`` means of the lots (`average`) and their errors.
    lots : int
        How many there are.
    scale : float
        What an offset may be at most, in the unit of `value`; keeps at 0 what nothing is tied to.
    """
    tied = np.bincount(common)[common] > 1 if len(common) else np.zeros(0, bool)
    common, lot, value, sigma = common[tied], lot[tied], value[tied], sigma[tied]
    shared = np.bincount(lot, minlength=lots)
    enough = shared >= _LEAST
    if enough.sum() < 2:
        return Offsets.unknown(lots, value.shape[1])
    offset, error = np.full((lots, value.shape[1]), np.nan), np.full((lots, value.shape[1]), np.nan)
    one, zero, wide = np.ones((len(lot), 1)), np.zeros((lots, 1)), np.full((lots, 1), scale)
    seen = np.bincount(common)[common]
    for k in range(value.shape[1]):
        found = solve_common(common, lot, one, value[:, k], sigma[:, k], zero, wide).unknowns[:, 0]
        weight = 1 / sigma[:, k] ** 2
        flat = value[:, k] - found[lot]
        centre = np.bincount(common, weight * flat) / np.maximum(np.bincount(common, weight), 1e-300)
        # The mean of a few values lies near each of them.
        z = (flat - centre[common]) * np.sqrt(weight * seen / (seen - 1))
        spread = np.array([_robust_sigma(z[lot == i]) for i in range(lots)])
        total = np.bincount(lot, weight * (seen - 1) / seen, lots)
        offset[:, k] = np.where(enough, found - _reference(found[enough]), np.nan)
        error[:, k] = np.where(enough, spread / np.sqrt(np.maximum(total, 1e-300)), np.nan)
    return Offsets(offset, error, shared)


def stacked_offsets(share: Floats, residual: Floats, correlated: float = 1.0) -> Offsets:
    """What stacking did to each lot: the part of ``mosaic - frames`` that goes with the lot's share in the mosaic.

    Frames may agree and the mosaic still show one lot too bright, because it was stacked with another gain or level
    than the frames' own; so it is with mosaics of other programs.

    Parameters
    ----------
    share : ndarray
        ``(n, L)`` share of every lot in the mosaic at a star or node; rows add up to 1.
    residual : ndarray
        ``(n, K)`` mosaic less frames there.
    correlated : float
        By how much the errors are too small because neighbours are alike.
    """
    lots = share.shape[1]
    shared = (share > 0.2).sum(axis=0)
    enough = shared >= _LEAST
    if enough.sum() < 2 or len(share) <= lots:
        return Offsets.unknown(lots, residual.shape[1])
    offset, error = np.full((lots, residual.shape[1]), np.nan), np.full((lots, residual.shape[1]), np.nan)
    for k, y in enumerate(residual.T):
        use = np.isfinite(y)
        for _ in range(4):
            normal = share[use].T @ share[use] + 0.01 * np.eye(lots)  # a lot that is never seen stays at 0
            found = np.linalg.solve(normal, share[use].T @ y[use])
            left = y - share @ found
            spread = _robust_sigma(left[use])
            use = np.isfinite(y) & (np.abs(left) <= 4 * spread)
        offset[:, k] = np.where(enough, found - _reference(found[enough]), np.nan)
        error[:, k] = np.where(enough, correlated * spread * np.sqrt(np.diag(np.linalg.inv(normal))), np.nan)
    return Offsets(offset, error, shared)


def combined(frames: Offsets, stacked: Offsets) -> Offsets:
    """The offsets between frames, and on top what stacking did where that is more than chance."""
    more = sure(stacked) > 0
    value = np.where(more, np.nan_to_num(frames.value) + stacked.value, frames.value)
    error = np.where(more, np.hypot(np.nan_to_num(frames.error), stacked.error), frames.error)
    return Offsets(value, error, np.maximum(frames.shared, stacked.shared))


def sure(offsets: Offsets) -> Floats:
    """Sizes ``(L, K)`` of the offsets that are more than chance, 0 for the others."""
    size = np.nan_to_num(np.abs(offsets.value))
    return np.where(size > _SURE * np.nan_to_num(offsets.error, nan=np.inf), size, 0.0)


def shares(common: Ints, lot: Ints, weight: Floats, lots: int) -> Floats:
    """Share ``(n, lots)`` of every lot in what the mosaic shows of each common thing, in order of `common`."""
    _, at = np.unique(common, return_inverse=True)
    total = np.bincount(at * lots + lot, weight, (int(at.max(initial=-1)) + 1) * lots).reshape(-1, lots)
    return total / np.maximum(total.sum(axis=1, keepdims=True), 1e-300)


def _reference(offset: Floats) -> float:
    return float(offset[0] if len(offset) == 2 else np.median(offset))


def _robust_sigma(values: Floats) -> float:
    return float(1.4826 * np.median(np.abs(values - np.median(values)))) if len(values) else float("nan")
