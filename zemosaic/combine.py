"""Weights, rejection and the weighted mean of a stack of aligned frames: pure functions on arrays.

A stack is ``(C, n, h, w)`` float32 with NaN = no data: channel first, so that every step below runs over contiguous
planes. Outliers are judged against the median and a noise model (sky noise of each frame, plus a
tolerance on star slopes, where seeing and resampling make honest pixels differ), so that rejection means
something from two samples on, where a sample's own scatter does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from zemosaic.tiles import FloatImage

Rejection = Literal["winsorized_sigma_clip", "kappa_sigma", "linear_fit_clip", "none"]

#: Share of the signal above sky by which honest pixels may differ, at any kappa: seeing changes star peaks.
STAR_TOLERANCE = 0.6

_MODEL_WEIGHT = 10.0  # degrees of freedom that the noise model counts for against the sample's own scatter
#: Ratio of the largest to the smallest noise up to which samples count as even.
EVEN_NOISE = 2.0

_MIN_SLOPE = 5  # samples from which the inner ones tell a slope that an outlier does not make
_NETWORK_LIMIT = 32  # up to this many samples a sorting network of whole planes beats a sort per pixel


@dataclass(frozen=True)
class Clip:
    """How to reject.

    Parameters
    ----------
    method : str
        ``winsorized_sigma_clip``: the scatter is the noise model, corrected by the winsorised scatter of the samples.
        ``linear_fit_clip``: the same with the slope of the sorted samples against normal order statistics.
        ``kappa_sigma``: the noise model alone. ``none``: keep everything.
    low, high : float
        Thresholds below and above the median, in sigmas.
    """

    method: Rejection = "winsorized_sigma_clip"
    low: float = 3.0
    high: float = 3.0


def combine(
    stack: FloatImage,
    sigma: FloatImage,
    weight: FloatImage,
    sky: NDArray[np.float32],
    clip: Clip,
    *,
    use_median: bool = False,
    even: bool | None = None,
) -> tuple[FloatImage, NDArray[np.bool_]]:
    """Reject outliers, then take the weighted mean (or the median) of what is left.

    Parameters
    ----------
    stack : ndarray
        ``(C, n, h, w)`` float32, NaN = no data.
    sigma : ndarray
        Sky noise of every sample: ``(C, n)`` or ``(C, n, h, w)``, ADU, > 0.
    weight : ndarray
        Weight of every sample in the mean: ``(C, n)`` or ``(C, n, h, w)``.
    sky : ndarray
        ``(C,)`` common sky level of the stack, ADU.
    clip : Clip
        Rejection.
    use_median : bool
        Median of the kept samples instead of their mean.
    even : bool, optional
        Whether the samples are of similar noise, so that a plain median will do as their centre, which is faster.
        Looked up in `sigma` if not given; give it where a stack is cut into blocks.

    Returns
    -------
    image : ndarray
        ``(h, w, C)`` float32, NaN where nothing was kept.
    keep : ndarray
        ``(n, h, w)`` bool: samples that contributed; one that stands out in one channel goes in all of them.
    """
    sigma, weight = (np.asarray(v, np.float32) for v in (sigma, weight))
    sigma, weight = (v[..., None, None] if v.ndim == 2 else v for v in (sigma, weight))
    valid = ~np.isnan(stack[0])
    for plane in stack[1:]:
        valid &= ~np.isnan(plane)
    if len(valid) == 1:
        return np.moveaxis(np.where(valid, stack[:, 0], np.float32(np.nan)), 0, -1), valid
    count = valid.sum(axis=0, dtype=np.int32)
    keep = valid.copy()
    if even is None:
        even = float(sigma.max()) <= EVEN_NOISE * float(sigma.min())
    centres = []
    for samples, noise, level in zip(stack, sigma, sky, strict=True):
        ordered, centre = _ranked(samples, noise, valid, count, even, clip.method == "linear_fit_clip")
        centres.append(centre)
        if clip.method != "none" and len(samples) > 1:
            keep &= _belonging(samples, noise, valid, count, ordered, centre, level, clip, len(stack))
    if use_median:
        count = keep.sum(axis=0, dtype=np.int32)
        pairs = zip(stack, sigma, strict=True)
        return np.stack(
            [_ranked(samples, noise, keep, count, even, False)[1] for samples, noise in pairs], axis=-1
        ), keep
    parts = zip(stack, weight, centres, strict=True)
    return np.stack([_mean(samples, w, centre, keep) for samples, w, centre in parts], axis=-1), keep


def _ranked(
    samples: FloatImage,
    noise: FloatImage,
    valid: NDArray[np.bool_],
    count: NDArray[np.int32],
    even: bool,
    whole: bool,
) -> tuple[FloatImage, FloatImage]:
    """Samples of one channel in order, and their median: weighted by 1/sigma unless they are even."""
    if even:
        ordered = sort_planes(np.where(valid, samples, np.float32(np.inf)), whole)
        return ordered, median_of(ordered, count)
    ordered, centre = weighted_median(samples, noise, valid)
    worst = np.where(valid, noise, np.float32(0)).max(axis=0)
    best = np.where(valid, noise, np.float32(np.inf)).min(axis=0)
    # Two samples that are about as good as each other: what contaminates a pixel brightens it.
    pair = (count == 2) & (worst <= EVEN_NOISE * best)
    return ordered, np.where(pair, ordered[0], centre)


def _mean(samples: FloatImage, weight: FloatImage, centre: FloatImage, keep: NDArray[np.bool_]) -> FloatImage:
    """Weighted mean over axis 0 of the samples that are kept, ``(h, w)``.

    What is summed are differences to the median: small numbers, of which float32 loses nothing.
    """
    difference = np.subtract(samples, centre)
    np.copyto(difference, 0, where=~keep)
    if weight.shape[1:] == (1, 1):
        flat = weight[:, 0, 0]
        total = np.tensordot(flat, difference, axes=1)
        share = np.tensordot(flat, keep.astype(np.float32), axes=1)
    else:
        share = weight * keep
        total = np.einsum("nhw,nhw->hw", share, difference)
        share = share.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(share > 0, centre + total / share, np.float32(np.nan)).astype(np.float32)


def _belonging(
    samples: FloatImage,
    noise: FloatImage,
    valid: NDArray[np.bool_],
    count: NDArray[np.int32],
    ordered: FloatImage,
    centre: FloatImage,
    sky: np.float32,
    clip: Clip,
    channels: int,
) -> NDArray[np.bool_]:
    """Samples of one channel that agree with the median, ``(n, h, w)`` bool; missing ones count as agreeing."""
    precision = np.float32(1) / noise  # (n, 1, 1) or (n, h, w)
    with np.errstate(invalid="ignore"):
        z = (samples - centre) * precision
    np.copyto(z, 0, where=~valid)
    n = np.maximum(count, 1).astype(np.float32)
    excess = np.ones_like(n)
    if clip.method == "winsorized_sigma_clip":
        excess = _shrunk(_winsorised_variance(z, n), n)
    elif clip.method == "linear_fit_clip":
        typical = np.einsum("nhw,nhw->hw", np.broadcast_to(noise**2, z.shape), valid.astype(np.float32)) / n
        found = _order_slope(ordered, centre, count) ** 2 / np.where(typical > 0, typical, 1)
        excess = np.where(count >= _MIN_SLOPE, _shrunk(found.astype(np.float32), n), np.float32(1))
    # The median has a variance of its own: pi/2 over the sum of 1/sigma^2 for normal samples.
    total = np.einsum("nhw,nhw->hw", np.broadcast_to(precision**2, z.shape), valid.astype(np.float32))
    uncertain = np.float32(np.pi / 2) / np.where(total > 0, total, 1)
    tolerance = (np.float32(STAR_TOLERANCE) * _signal_above(centre, sky)) ** 2
    low, high = (np.float32(_per_channel(kappa, channels) ** 2) for kappa in (clip.low, clip.high))
    agrees = np.empty(z.shape, bool)
    for i, (sample, root) in enumerate(zip(z, precision, strict=True)):
        limit = high if low == high else np.where(sample < 0, low, high)
        bound = limit * excess * (1 + uncertain * root**2) + tolerance * root**2
        np.less_equal(sample**2, bound, out=agrees[i])
    return agrees


def _winsorised_variance(z: FloatImage, n: FloatImage) -> FloatImage:
    """Variance of samples clamped at 1.5 sigma, times 1.134² for what clamping takes off a normal distribution."""
    clamped: FloatImage = np.clip(z, np.float32(-1.5), np.float32(1.5))
    mean = clamped.sum(axis=0) / n
    square = np.einsum("nhw,nhw->hw", clamped, clamped) / n
    return np.float32(1.134**2) * (square - mean**2) * n / np.maximum(n - 1, 1)


def _shrunk(ratio: FloatImage, n: FloatImage) -> FloatImage:
    """Ratio of the samples' variance to the model's, drawn towards 1 where there are few samples."""
    return (_MODEL_WEIGHT + (n - 1) * ratio) / (_MODEL_WEIGHT + n - 1)


def _order_slope(ordered: FloatImage, centre: FloatImage, count: NDArray[np.int32]) -> FloatImage:
    """Slope of the inner sorted samples against normal order statistics: a scatter that two outliers do not move."""
    n = len(ordered)
    table = np.zeros((n + 1, n), np.float32)
    for k in range(_MIN_SLOPE, n + 1):
        quantile = norm.ppf((np.arange(1, k + 1) - 0.375) / (k + 0.25))  # Blom's approximation
        inner = np.abs(quantile) < norm.ppf(0.8) + 1e-9
        table[k, :k] = np.where(inner, quantile, 0) / np.sum(quantile[inner] ** 2)
    slope = np.zeros(centre.shape, np.float32)
    with np.errstate(invalid="ignore"):
        for rank, plane in enumerate(ordered):
            share = table[count, rank]
            slope += np.where(share != 0, share * (plane - centre), np.float32(0))
    return slope


def _signal_above(centre: FloatImage, sky: np.float32) -> FloatImage:
    """Signal above the sky at every pixel or its brightest neighbour, ``(h, w)``: where star slopes are."""
    above = np.nan_to_num(centre - sky, nan=0.0, posinf=0.0, neginf=0.0)
    return cv2.dilate(np.maximum(above, 0), np.ones((3, 3), np.uint8)).astype(np.float32, copy=False)


@cache
def _per_channel(kappa: float, channels: int) -> float:
    """Threshold per channel that loses as many honest samples in all channels as `kappa` does in one (Sidak)."""
    return float(norm.isf((1 - (1 - 2 * norm.sf(kappa)) ** (1 / channels)) / 2))


def sort_planes(filled: FloatImage, whole: bool = False) -> FloatImage:
    """Sort ``(n, h, w)`` along axis 0 in place; missing samples are +inf and so come last.

    Unless `whole`, only the ranks up to the middle are in place: a median needs no more.
    """
    n = len(filled)
    if n > _NETWORK_LIMIT:
        return np.sort(filled, axis=0)
    low = np.empty_like(filled[0])
    for i, j in _network(n, n if whole else n // 2 + 1):
        np.minimum(filled[i], filled[j], out=low)
        np.maximum(filled[i], filled[j], out=filled[j])
        filled[i] = low
    return filled


@cache
def _network(n: int, ranks: int) -> Sequence[tuple[int, int]]:
    """Comparators that sort `n` values (Batcher's merge exchange), without those that only order beyond `ranks`.

    D. E. Knuth, The Art of Computer Programming 3, 5.2.2, algorithm M.
    """
    comparators = []
    p = top = 1 << max(0, (n - 1).bit_length() - 1)
    while p > 0:
        q, r, d = top, 0, p
        while True:
            comparators += [(i, i + d) for i in range(n - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    needed, kept = set(range(ranks)), []
    for i, j in reversed(comparators):
        if i in needed or j in needed:
            needed |= {i, j}
            kept.append((i, j))
    return tuple(reversed(kept))


def median_of(ordered: FloatImage, count: NDArray[np.int32]) -> FloatImage:
    """Median of sorted planes; of two samples the lower, since what contaminates a pixel brightens it.

    Parameters
    ----------
    ordered : ndarray
        ``(n, h, w)`` from `sort_planes`.
    count : ndarray
        ``(h, w)`` valid samples of every pixel.

    Returns
    -------
    ndarray
        ``(h, w)`` float32, NaN where there is no sample.
    """
    n = len(ordered)
    if (count == n).all():
        low, high = ((n - 1) // 2, n // 2) if n != 2 else (0, 0)
        return (ordered[low] + ordered[high]) * np.float32(0.5)
    below = np.maximum(count - 1, 0) // 2
    above = np.where(count == 2, 0, count // 2)
    middle = np.full(count.shape, np.nan, np.float32)
    for rank in range(n // 2 + 1):
        # Adding half of each of the two middle ranks covers odd counts as well, where they are the same.
        first, second = (below == rank) & (count > 0), (above == rank) & (count > 0)
        np.copyto(middle, 0, where=first)
        np.add(middle, ordered[rank] * np.float32(0.5), out=middle, where=first)
        np.add(middle, ordered[rank] * np.float32(0.5), out=middle, where=second)
    return middle


def weighted_median(samples: FloatImage, noise: FloatImage, valid: NDArray[np.bool_]) -> tuple[FloatImage, FloatImage]:
    """Samples in order, and their median weighted by 1/sigma: one deep sample outweighs two shallow ones.

    Parameters
    ----------
    samples : ndarray
        ``(n, h, w)``.
    noise : ndarray
        ``(n, 1, 1)`` or ``(n, h, w)``.
    valid : ndarray
        ``(n, h, w)`` bool.

    Returns
    -------
    ordered : ndarray
        ``(n, h, w)``, +inf where there is no sample.
    median : ndarray
        ``(h, w)``, NaN where there is none; the lower of two where both fit.
    """
    filled = np.where(valid, samples, np.float32(np.inf))
    share = np.where(valid, np.float32(1) / noise, np.float32(0))
    n = len(filled)
    if n > _NETWORK_LIMIT:
        order = np.argsort(filled, axis=0, kind="stable")
        filled, share = np.take_along_axis(filled, order, axis=0), np.take_along_axis(share, order, axis=0)
    else:
        for i, j in _network(n, n):
            swap = filled[i] > filled[j]
            filled[i], filled[j] = np.minimum(filled[i], filled[j]), np.maximum(filled[i], filled[j])
            moved = (share[j] - share[i]) * swap
            share[i] += moved
            share[j] -= moved
    half = share.sum(axis=0) * np.float32(0.5 - 1e-5)
    median = np.full(half.shape, np.nan, np.float32)
    below = np.zeros_like(half)
    for plane, part in zip(filled, share, strict=True):
        before = below < half
        below += part
        np.copyto(median, plane, where=before & (below >= half))
    return filled, median
