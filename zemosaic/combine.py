"""Weights, rejection and the weighted mean of a stack of aligned frames: pure functions on arrays.

A stack is ``(C, n, h, w)`` float32 with NaN = no data: channel first, so that every step below runs over contiguous
planes. Outliers are judged against the median and a noise model (sky noise of each frame, plus a
tolerance on star slopes, where seeing and resampling make honest pixels differ), so that rejection means
something from two samples on, where a sample's own scatter does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from zemosaic.rejection import EVEN_NOISE, MODEL_WEIGHT, complete, judge, medians, slope_tolerance, weighted_mean
from zemosaic.tiles import FloatImage

Rejection = Literal["winsorized_sigma_clip", "kappa_sigma", "linear_fit_clip", "none"]

#: Share of the signal above sky by which honest pixels may differ, at any kappa: seeing changes star peaks.
STAR_TOLERANCE = 0.6

_MIN_SLOPE = 5  # samples from which the inner ones tell a slope that an outlier does not make


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
    valid: NDArray[np.bool_] | None = None,
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
    valid : ndarray, optional
        ``(n, h, w)`` `complete` samples of the stack, if they are known already.

    Returns
    -------
    image : ndarray
        ``(h, w, C)`` float32, NaN where nothing was kept.
    keep : ndarray
        ``(n, h, w)`` bool: samples that contributed; one that stands out in one channel goes in all of them.
    """
    stack = np.ascontiguousarray(stack)
    sigma, weight = (np.ascontiguousarray(v, np.float32) for v in (sigma, weight))
    sigma, weight = (v[..., None, None] if v.ndim == 2 else v for v in (sigma, weight))
    valid = complete(stack) if valid is None else valid
    if len(valid) == 1:
        return np.moveaxis(np.where(valid, stack[:, 0], np.float32(np.nan)), 0, -1), valid
    if even is None:
        even = float(sigma.max()) <= EVEN_NOISE * float(sigma.min())
    centre = medians(stack, valid, sigma, even)
    keep = valid
    if clip.method != "none":
        keep = judge(stack, valid, sigma, centre, *_limits(stack, valid, sigma, centre, sky, clip))
    if use_median:
        return np.moveaxis(medians(stack, keep, sigma, even), 0, -1), keep
    return weighted_mean(stack, weight, centre, keep), keep


def _limits(
    stack: FloatImage,
    valid: NDArray[np.bool_],
    sigma: FloatImage,
    centre: FloatImage,
    sky: NDArray[np.float32],
    clip: Clip,
) -> tuple[FloatImage, FloatImage, np.float32, np.float32]:
    """What `judge` asks for: tolerance, excess, and the squared thresholds below and above."""
    tolerance = slope_tolerance(centre, sky, np.float32(STAR_TOLERANCE))
    excess = np.zeros((0, 0, 0), np.float32)
    if clip.method == "kappa_sigma":
        excess = np.ones_like(centre)
    elif clip.method == "linear_fit_clip":
        excess = np.stack([_slope_excess(*c, valid) for c in zip(stack, sigma, centre, strict=True)])
    low, high = (np.float32(_per_channel(kappa, len(stack)) ** 2) for kappa in (clip.low, clip.high))
    return tolerance, excess, low, high


def _slope_excess(samples: FloatImage, noise: FloatImage, centre: FloatImage, valid: NDArray[np.bool_]) -> FloatImage:
    """Variance of one channel's samples in units of the noise model's, from the slope of their order, ``(h, w)``."""
    count = valid.sum(axis=0, dtype=np.int32)
    n = np.maximum(count, 1).astype(np.float32)
    ordered = np.sort(np.where(valid, samples, np.float32(np.inf)), axis=0)
    typical = np.where(valid, noise**2, 0).sum(axis=0, dtype=np.float32) / n
    found = (_order_slope(ordered, centre, count) ** 2 / np.where(typical > 0, typical, 1)).astype(np.float32)
    return np.where(count >= _MIN_SLOPE, (MODEL_WEIGHT + (n - 1) * found) / (MODEL_WEIGHT + n - 1), np.float32(1))


def _order_slope(ordered: FloatImage, centre: FloatImage, count: NDArray[np.int32]) -> FloatImage:
    """Slope of the inner sorted samples against normal order statistics: a scatter that two outliers do not move."""
    n = len(ordered)
    table = np.zeros((n + 1, n), np.float32)
    for k in range(_MIN_SLOPE, n + 1):
        quantile = ndtri((np.arange(1, k + 1) - 0.375) / (k + 0.25))  # Blom's approximation
        inner = np.abs(quantile) < ndtri(0.8) + 1e-9
        table[k, :k] = np.where(inner, quantile, 0) / np.sum(quantile[inner] ** 2)
    slope = np.zeros(centre.shape, np.float32)
    with np.errstate(invalid="ignore"):
        for rank, plane in enumerate(ordered):
            share = table[count, rank]
            slope += np.where(share != 0, share * (plane - centre), np.float32(0))
    return slope


@cache
def _per_channel(kappa: float, channels: int) -> float:
    """Threshold per channel that loses as many honest samples in all channels as `kappa` does in one (Sidak)."""
    return float(-ndtri((1 - (1 - 2 * ndtr(-kappa)) ** (1 / channels)) / 2))
