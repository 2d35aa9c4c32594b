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
from scipy.special import ndtr, stdtrit  # scipy.stats, which has them too, takes half a second to load

from zemosaic.levels import solve_common
from zemosaic.report.evidence import Evidence, Floats, Ints
from zemosaic.report.surface import MosaicStars, robust_sigma

_RADIUS = 3.0  # px between where a frame and the mosaic see a star; the run itself matches within as much
#: Signal to noise in one frame, all channels together, from which a star tells millimagnitudes and its place.
BRIGHT = 45.0

_SURE = 4.0  # standard deviations from which an offset of a lot is more than chance
_LEAST = 5  # shared stars or nodes from which a lot's offset means anything
_SHARE = 0.1  # of what a star or node shows, from which on it tells of a lot
_ALONE = 5.0  # errors by which a detection may differ from the others of its star and lot
_EFFICIENCY = 0.37  # of a median absolute deviation, against a standard deviation of normal values
_MANY = 20  # values of a lot from which their own scatter is known
_SMOOTH = 1.5  # what stacking does to a star changes slowly over the field, so that neighbours err alike
_WHOLE = 0.8  # of the frames at a star that must have seen it, for their mean to be what the mosaic should show


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
        ``(L, K)``; the median lot is 0 (of two lots, the first); NaN for a lot that shares too little with others. The
        errors are such that `_SURE` of them are as rare as that number of normal errors, however few things are shared.
    sigma : ndarray
        ``(L, K)`` the plain standard errors.
    shared : ndarray
        ``(L,)`` stars or nodes that a lot shares.
    """

    value: Floats
    error: Floats
    sigma: Floats
    shared: Ints

    @classmethod
    def unknown(cls, lots: int, quantities: int) -> Offsets:
        """Nothing is known of any lot."""
        empty = np.full((lots, quantities), np.nan)
        return cls(empty, empty, empty, np.zeros(lots, np.int64))


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


def plain(matched: Matched, signal: float) -> Matched:
    """Detections of stars with this signal to noise on average: none is found only where noise makes it brighter."""
    _, at = np.unique(matched.star, return_inverse=True)
    mean = np.bincount(at, matched.signal) / np.maximum(np.bincount(at), 1)
    return matched.take(np.flatnonzero((mean >= signal)[at]))


def agreeing(matched: Matched, floor: float) -> NDArray[np.bool_]:
    """``(n,)`` whether a detection agrees with the others of its star and lot, of which there are two at least.

    Frames of a lot share their faults; one that differs by `_ALONE` errors (`floor`: least error, mag) from the median
    of its lot has a hot pixel, a cosmic ray or a satellite in its aperture.
    """
    pair = np.unique(matched.star * (int(matched.lot.max(initial=0)) + 1) + matched.lot, return_inverse=True)[1]
    count = np.bincount(pair)
    first = np.cumsum(count) - count
    fine = np.ones(len(matched), np.bool_)
    for flux, error in zip(matched.flux.T, matched.error.T, strict=True):
        ordered = flux[np.lexsort((flux, pair))]
        median = ((ordered[first + (count - 1) // 2] + ordered[first + count // 2]) / 2)[pair]
        fine &= np.abs(flux - median) <= _ALONE * np.hypot(error, floor / 1.0857 * median)
    return fine | (count < 3)[pair]


def wholly_seen(matched: Matched, evidence: Evidence) -> Matched:
    """Detections of the stars that (nearly) every frame there has seen: their mean is what the mosaic should show."""
    if evidence.coverage is None or not len(matched):
        return matched
    _, at = np.unique(matched.star, return_inverse=True)
    count = np.bincount(at)
    place = [(np.bincount(at, p) / count).round().astype(np.int64) for p in (matched.y, matched.x)]
    y, x = (np.clip(p, 0, size - 1) for p, size in zip(place, evidence.shape, strict=True))
    return matched.take(np.flatnonzero((count >= _WHOLE * evidence.coverage[y, x])[at]))


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


def lot_offsets(
    common: Ints,
    lot: Ints,
    value: Floats,
    sigma: Floats,
    lots: int,
    scale: float,
    floor: float = 0.0,
    stated: float = 0.0,
) -> Offsets:
    """Offset of every lot.

    Parameters
    ----------
    common, lot : ndarray
        ``(n,)`` which star or node, seen by which lot.
    value, sigma : ndarray
        ``(n, K)`` means of the lots (`average`) and their errors; but for `stated` only their proportions matter.
    lots : int
        How many there are.
    scale : float
        What an offset may be at most, in the unit of `value`; keeps at 0 what nothing is tied to.
    floor : float
        Error that an offset has however many things are shared, in the same unit.
    stated : float
        How many degrees of freedom the size of `sigma` is worth, against that of the scatter itself: a few values may
        agree by chance.
    """
    tied = np.bincount(common)[common] > 1 if len(common) else np.zeros(0, bool)
    common, lot, value, sigma = common[tied], lot[tied], value[tied], sigma[tied]
    shared = np.bincount(lot, minlength=lots)
    enough = shared >= _LEAST
    if enough.sum() < 2:
        return Offsets.unknown(lots, value.shape[1])
    offset, sigmas = np.full((lots, value.shape[1]), np.nan), np.full((lots, value.shape[1]), np.nan)
    one, zero, wide = np.ones((len(lot), 1)), np.zeros((lots, 1)), np.full((lots, 1), scale)
    _, at = np.unique(common, return_inverse=True)
    seen = np.bincount(at)[at]
    z = np.zeros_like(value)
    for k in range(value.shape[1]):
        found = solve_common(common, lot, one, value[:, k], sigma[:, k], zero, wide).unknowns[:, 0]
        weight = 1 / sigma[:, k] ** 2
        total = np.bincount(at, weight)
        flat = value[:, k] - found[lot]
        centre = np.bincount(at, weight * flat) / total
        # The mean of a few values lies near each of them.
        z[:, k] = (flat - centre[at]) * np.sqrt(weight * seen / (seen - 1))
        pairs = np.zeros((len(total), lots))
        np.add.at(pairs, (at, lot), weight)
        normal = np.diag(pairs.sum(axis=0)) - pairs.T @ (pairs / total[:, None])
        offset[:, k] = np.where(enough, found - _reference(found[enough]), np.nan)
        sigmas[:, k] = np.where(enough, _standard_errors(normal, enough, scale), np.nan)
    # Where few things are shared, all quantities together tell better how much they scatter than one alone.
    least, freedom = robust_sigma(z.ravel()), len(z) - len(np.unique(common)) - lots + 1
    for k, column in enumerate(z.T):
        spread = [max(least, _scatter(column, column[lot == i])) for i in range(lots)]
        sigmas[:, k] *= [_pooled(s, freedom, stated) for s in spread]
    error, sigmas = np.hypot(_student(freedom, stated) * sigmas, floor), np.hypot(sigmas, floor)
    return Offsets(offset, error, sigmas, shared)


def stacked_offsets(
    share: Floats, residual: Floats, sigma: Floats | None = None, floor: float = 0.0, stated: float = 0.0
) -> Offsets:
    """What stacking did to each lot: the part of ``mosaic - frames`` that goes with the lot's share in the mosaic.

    Frames may agree and the mosaic still show one lot too bright, because it was stacked with another gain or level
    than the frames' own; so it is with mosaics of other programs.

    Parameters
    ----------
    share : ndarray
        ``(n, L)`` share of every lot in the mosaic at a star or node; rows add up to 1.
    residual : ndarray
        ``(n, K)`` mosaic less frames there.
    sigma : ndarray, optional
        ``(n,)`` expected errors of the residuals; only their proportions matter. All alike if not given.
    floor, stated : float
        As for `lot_offsets`.
    """
    lots = share.shape[1]
    shared = (share > _SHARE).sum(axis=0)
    enough = shared >= _MANY  # each star or node shows a mixture of lots: few of them fit any offsets
    if enough.sum() < 2 or len(share) <= lots + 1:
        return Offsets.unknown(lots, residual.shape[1])
    offset, error, sigmas = (np.full((lots, residual.shape[1]), np.nan) for _ in range(3))
    root = 1 / sigma if sigma is not None else np.ones(len(share))
    design = share * root[:, None]
    # A lot that is hardly ever seen alone stays at 0, and its error is large.
    ridge = 1e-6 * float(np.trace(design.T @ design)) * np.eye(lots)
    for k, y in enumerate((residual * root[:, None]).T):
        use = np.isfinite(y)
        for _ in range(4):
            normal = design[use].T @ design[use]
            left = y - design @ np.linalg.solve(normal + ridge, design[use].T @ y[use])
            spread = robust_sigma(left[use])
            use = np.isfinite(y) & (np.abs(left) <= 4 * spread)
        found = np.linalg.solve(normal + ridge, design[use].T @ y[use])
        known = left[np.isfinite(y)]
        spread = _SMOOTH * _pooled(_scatter(known, known), len(known) - lots, stated)
        offset[:, k] = np.where(enough, found - _reference(found[enough]), np.nan)
        single = np.where(enough, spread * _standard_errors(normal + ridge, enough), np.nan)
        sigmas[:, k] = np.hypot(single, floor)
        error[:, k] = np.hypot(_student(len(known) - lots, stated) * single, floor)
    return Offsets(offset, error, sigmas, shared)


def _scatter(values: Floats, own: Floats) -> float:
    """Robust scatter of values; a part of them that scatters more counts by itself, if that is known well enough."""
    spread = robust_sigma(values)
    return max(spread, robust_sigma(own)) if len(own) >= _MANY else spread


def _pooled(spread: float, freedom: float, stated: float) -> float:
    """Robust scatter of so many degrees of freedom, in stated errors, together with what these say themselves."""
    own = max(_EFFICIENCY * freedom, 1.0)
    return float(np.sqrt((own * spread**2 + stated) / (own + stated)))


def _student(freedom: float, stated: float) -> float:
    """What makes `_SURE` errors from a robust scatter of so many degrees of freedom as rare as that number says.

    Student's distribution takes the place of the normal one; a median absolute deviation is worth `_EFFICIENCY` of its
    degrees of freedom, and `stated` are what the stated errors are worth.
    """
    return -float(stdtrit(max(_EFFICIENCY * freedom, 1.0) + stated, ndtr(-_SURE))) / _SURE


def _standard_errors(normal: Floats, enough: NDArray[np.bool_], scale: float = np.inf) -> Floats:
    """Errors ``(L,)`` of the solution of normal equations, against the mean of the lots with `enough`."""
    covariance = np.linalg.pinv(normal + np.eye(len(normal)) / scale**2, hermitian=True)
    mean = covariance[:, enough].mean(axis=1)
    variance = np.diag(covariance) - 2 * mean + mean[enough].mean()
    if enough.sum() == 2:  # the first is the reference
        first = int(np.flatnonzero(enough)[0])
        variance = np.diag(covariance) - 2 * covariance[:, first] + covariance[first, first]
        variance[first] = variance[enough].max()
    return np.sqrt(np.maximum(variance, 0))


def combined(frames: Offsets, stacked: Offsets) -> Offsets:
    """The offsets between frames, and on top what stacking did where that is more than chance."""
    more = sure(stacked) > 0
    value = np.where(more, np.nan_to_num(frames.value) + stacked.value, frames.value)
    error, sigma = (
        np.where(more, np.hypot(np.nan_to_num(getattr(frames, name)), getattr(stacked, name)), getattr(frames, name))
        for name in ("error", "sigma")
    )
    return Offsets(value, error, sigma, np.maximum(frames.shared, stacked.shared))


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
