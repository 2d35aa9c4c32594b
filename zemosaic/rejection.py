"""The compiled loops behind `combine`: median, judgement and mean of a stack, row by row while it is in cache.

A stack is ``(C, n, h, w)`` float32, contiguous, NaN = no data. What belongs to samples (noise, weight) comes as
``(C, n, 1, 1)`` or ``(C, n, h, w)``. Every loop runs along a row, so that the compiler makes vectors of it; samples are
taken in their order, so that results do not depend on how a stack is cut into blocks.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from zemosaic.compiled import compiled
from zemosaic.tiles import FloatImage

#: Ratio of the largest to the smallest noise up to which samples count as even.
EVEN_NOISE = 2.0
#: Degrees of freedom that the noise model counts for against the samples' own scatter.
MODEL_WEIGHT = np.float32(10)

_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_CLAMP = np.float32(1.5)
_CLAMPED_AWAY = np.float32(1.134**2)  # what clamping at 1.5 sigma takes off the variance of a normal distribution
_MEDIAN_VARIANCE = np.float32(np.pi / 2)  # of a median, over that of a mean


@compiled
def complete(stack: FloatImage) -> NDArray[np.bool_]:
    """Samples that have data in every channel, ``(n, h, w)``."""
    channels, n, height, width = stack.shape
    valid = np.empty((n, height, width), np.bool_)
    for i in range(n):
        for v in range(height):
            row = valid[i, v]
            for u in range(width):
                row[u] = True
            for c in range(channels):
                sample = stack[c, i, v]
                for u in range(width):
                    row[u] &= sample[u] == sample[u]
    return valid


@cache
def sorting_network(n: int, ranks: int) -> NDArray[np.int64]:
    """Comparators ``(m, 2)`` that sort `n` values, without those that only order beyond the lowest `ranks`.

    Batcher's merge exchange: D. E. Knuth, The Art of Computer Programming 3, 5.2.2, algorithm M.
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
    return np.array(kept[::-1], np.int64).reshape(-1, 2)


def medians(stack: FloatImage, mask: NDArray[np.bool_], sigma: FloatImage, even: bool) -> FloatImage:
    """Median of the samples in `mask`, ``(C, h, w)``, NaN where there is none.

    Of two samples that are about as good as each other it is the lower: what contaminates a pixel brightens it.

    Parameters
    ----------
    stack : ndarray
        ``(C, n, h, w)``.
    mask : ndarray
        ``(n, h, w)`` bool.
    sigma : ndarray
        ``(C, n, 1, 1)`` or ``(C, n, h, w)`` noise of the samples.
    even : bool
        Whether they are of similar noise: a plain median, else one weighted by 1/sigma, so that one deep sample
        outweighs two shallow ones.
    """
    n = stack.shape[1]
    if even:
        return np.asarray(_plain_medians(stack, mask, sorting_network(n, n // 2 + 1)))
    return np.asarray(_weighted_medians(stack, mask, sigma, sorting_network(n, n)))


@compiled
def _plain_medians(stack, mask, network):  # type: ignore[no-untyped-def]
    channels, n, height, width = stack.shape
    centre = np.empty((channels, height, width), np.float32)
    lines = np.empty((n, width), np.float32)
    count = np.empty(width, np.int64)
    for v in range(height):
        count[:] = 0
        for i in range(n):
            inside = mask[i, v]
            for u in range(width):
                count[u] += inside[u]
        for c in range(channels):
            for i in range(n):
                sample, inside, line = stack[c, i, v], mask[i, v], lines[i]
                for u in range(width):
                    line[u] = sample[u] if inside[u] else np.float32(np.inf)
            for k in range(len(network)):
                low, high = lines[network[k, 0]], lines[network[k, 1]]
                for u in range(width):
                    a, b = low[u], high[u]
                    low[u] = a if a < b else b
                    high[u] = b if a < b else a
            for u in range(width):
                m = count[u]
                if m == 0:
                    centre[c, v, u] = np.nan
                elif m == 2:
                    centre[c, v, u] = lines[0, u]
                else:
                    centre[c, v, u] = (lines[(m - 1) // 2, u] + lines[m // 2, u]) * _HALF
    return centre


@compiled
def _weighted_medians(stack, mask, sigma, network):  # type: ignore[no-untyped-def]
    channels, n, height, width = stack.shape
    centre = np.empty((channels, height, width), np.float32)
    lines, shares = np.empty((n, width), np.float32), np.empty((n, width), np.float32)
    for v in range(height):
        for c in range(channels):
            for i in range(n):
                sample, inside, line, share = stack[c, i, v], mask[i, v], lines[i], shares[i]
                _copy_row(sigma, c, i, v, share)
                for u in range(width):
                    line[u] = sample[u] if inside[u] else np.float32(np.inf)
                    share[u] = _ONE / share[u] if inside[u] else _ZERO
            for k in range(len(network)):
                low, high = lines[network[k, 0]], lines[network[k, 1]]
                first, second = shares[network[k, 0]], shares[network[k, 1]]
                for u in range(width):
                    a, b, p, q = low[u], high[u], first[u], second[u]
                    # Of equals those without data, infinite, stay behind.
                    swap = a > b
                    low[u], high[u] = b if swap else a, a if swap else b
                    first[u], second[u] = q if swap else p, p if swap else q
            for u in range(width):
                centre[c, v, u] = _weighted_middle(lines, shares, u)
    return centre


@compiled
def _weighted_middle(lines, shares, u):  # type: ignore[no-untyped-def]
    """Where half the weight of one sorted column is reached; NaN for an empty one."""
    n = len(lines)
    total, count = _ZERO, 0
    for i in range(n):
        total += shares[i, u]
        count += shares[i, u] > 0
    if count == 0:
        return np.float32(np.nan)
    if count == 2:
        best, worst = max(shares[0, u], shares[1, u]), min(shares[0, u], shares[1, u])
        if best <= EVEN_NOISE * worst:
            return lines[0, u]
    half = total * np.float32(0.5 - 1e-5)
    below = _ZERO
    for i in range(n):
        below += shares[i, u]
        if below >= half:
            return lines[i, u]
    return lines[n - 1, u]


@compiled
def judge(stack, valid, sigma, centre, tolerance, excess, low, high):  # type: ignore[no-untyped-def]
    """Samples that agree with the centre in every channel, ``(n, h, w)`` bool.

    Parameters
    ----------
    stack : ndarray
        ``(C, n, h, w)``.
    valid : ndarray
        ``(n, h, w)`` bool: those that have data.
    sigma : ndarray
        ``(C, n, 1, 1)`` or ``(C, n, h, w)`` noise of the samples.
    centre : ndarray
        ``(C, h, w)`` their median.
    tolerance : ndarray
        ``(C, h, w)`` further variance that honest samples may have, ADU².
    excess : ndarray
        ``(C, h, w)`` variance of the samples in units of the noise model's; of size 0: from their winsorised scatter,
        clamped at 1.5 sigma and drawn towards 1 where they are few.
    low, high : float32
        Squares of the thresholds below and above the centre.
    """
    channels, n, height, width = stack.shape
    keep = np.empty(valid.shape, np.bool_)
    z, precision = np.empty((n, width), np.float32), np.empty((n, width), np.float32)
    total, count = np.empty(width, np.float32), np.empty(width, np.float32)
    mean, square = np.empty(width, np.float32), np.empty(width, np.float32)
    for v in range(height):
        for i in range(n):
            keep[i, v] = valid[i, v]
        for c in range(channels):
            middle, slack = centre[c, v], tolerance[c, v]
            total[:], count[:], mean[:], square[:] = _ZERO, _ZERO, _ZERO, _ZERO
            for i in range(n):
                sample, inside, distance, root = stack[c, i, v], valid[i, v], z[i], precision[i]
                _copy_row(sigma, c, i, v, root)
                for u in range(width):
                    one = _ONE if inside[u] else _ZERO
                    root[u] = _ONE / root[u]
                    off = (sample[u] - middle[u]) * root[u] if inside[u] else _ZERO
                    distance[u] = off
                    clamped = min(max(off, -_CLAMP), _CLAMP)
                    mean[u] += clamped
                    square[u] += clamped * clamped
                    total[u] += one * root[u] * root[u]
                    count[u] += one
            for u in range(width):
                m = max(count[u], _ONE)
                average = mean[u] / m
                variance = _CLAMPED_AWAY * (square[u] / m - average * average) * m / max(m - _ONE, _ONE)
                mean[u] = (MODEL_WEIGHT + (m - _ONE) * variance) / (MODEL_WEIGHT + m - _ONE)
                # The median has a variance of its own.
                square[u] = _MEDIAN_VARIANCE / total[u] if total[u] > 0 else _MEDIAN_VARIANCE
            if excess.size:
                mean[:] = excess[c, v]
            for i in range(n):
                distance, root, stays = z[i], precision[i], keep[i, v]
                for u in range(width):
                    limit = low if distance[u] < 0 else high
                    inverse = root[u] * root[u]
                    bound = limit * mean[u] * (_ONE + square[u] * inverse) + slack[u] * inverse
                    stays[u] &= distance[u] * distance[u] <= bound
    return keep


@compiled
def slope_tolerance(centre, sky, share):  # type: ignore[no-untyped-def]
    """Further variance ``(C, h, w)`` that honest samples may have where star slopes are, ADU²: see `judge`.

    The square of a `share` of the signal above the sky at every pixel or its brightest neighbour.

    Parameters
    ----------
    centre : ndarray
        ``(C, h, w)`` median of the samples, NaN where there are none.
    sky : ndarray
        ``(C,)`` common sky level, ADU.
    share : float32
        By how much of their signal honest samples may differ.
    """
    channels, height, width = centre.shape
    tolerance = np.empty(centre.shape, np.float32)
    signal, widest = np.zeros(width + 2, np.float32), np.empty((height, width), np.float32)
    for c in range(channels):
        for v in range(height):
            row, level = centre[c, v], sky[c]
            for u in range(width):
                above = row[u] - level
                signal[u + 1] = above if _ZERO < above < np.inf else _ZERO
            for u in range(width):
                widest[v, u] = max(max(signal[u], signal[u + 1]), signal[u + 2])
        for v in range(height):
            before, here, behind = widest[max(v - 1, 0)], widest[v], widest[min(v + 1, height - 1)]
            slack = tolerance[c, v]
            for u in range(width):
                brightest = share * max(max(before[u], here[u]), behind[u])
                slack[u] = brightest * brightest
    return tolerance


@compiled
def weighted_mean(stack, weight, centre, keep):  # type: ignore[no-untyped-def]
    """Weighted mean of the samples that are kept, ``(h, w, C)``, NaN where there is none.

    What is summed are differences to the centre ``(C, h, w)``: small numbers, of which float32 loses nothing.
    """
    channels, n, height, width = stack.shape
    image = np.empty((height, width, channels), np.float32)
    total, share, heavy = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    for v in range(height):
        for c in range(channels):
            middle = centre[c, v]
            total[:], share[:] = _ZERO, _ZERO
            for i in range(n):
                sample, inside = stack[c, i, v], keep[i, v]
                _copy_row(weight, c, i, v, heavy)
                for u in range(width):
                    part = heavy[u] if inside[u] else _ZERO
                    difference = sample[u] - middle[u] if inside[u] else _ZERO
                    total[u] += part * difference
                    share[u] += part
            for u in range(width):
                image[v, u, c] = middle[u] + total[u] / share[u] if share[u] > 0 else np.float32(np.nan)
    return image


@compiled
def _copy_row(values, c, i, v, row):  # type: ignore[no-untyped-def]
    """One row of values that are given for every pixel or once for all, into `row`."""
    if values.shape[3] == 1:
        row[:] = values[c, i, 0, 0]
    else:
        row[:] = values[c, i, v]


@compiled
def tally(valid, keep, share):  # type: ignore[no-untyped-def]
    """Who is behind the pixels of a combined stack.

    Parameters
    ----------
    valid, keep : ndarray
        ``(n, h, w)`` bool: samples with data, and those of them that were kept.
    share : ndarray
        ``(n,)`` float32 weight of the samples.

    Returns
    -------
    coverage, depth : ndarray
        ``(h, w)`` float32, number of the samples that were kept and sum of their weights.
    used, rejected : ndarray
        ``(n,)`` int64, pixels of every sample.
    """
    n, height, width = keep.shape
    coverage, depth = np.zeros((height, width), np.float32), np.zeros((height, width), np.float32)
    used, rejected = np.zeros(n, np.int64), np.zeros(n, np.int64)
    for i in range(n):
        kept = there = 0
        for v in range(height):
            frames, weight, mine, known = coverage[v], depth[v], keep[i, v], valid[i, v]
            for u in range(width):
                frames[u] += _ONE if mine[u] else _ZERO
                weight[u] += share[i] if mine[u] else _ZERO
                kept += mine[u]
                there += known[u]
        used[i], rejected[i] = kept, there - kept
    return coverage, depth, used, rejected
