"""Noise: is the background as quiet as the frames behind it allow?

Interpolation makes neighbouring pixels alike, so that the scatter of single pixels is too small to compare. Means of
8x8 pixels hardly share any photosite; eight times their scatter is what a pixel would have, were pixels independent.
The expectation of that, for a weighted mean of frames with noise sigma_f a photosite, k_f photosites of the colour to a
pixel and weights w_f, is

    sigma^2 = sum(w_f^2 sigma_f^2 / k_f) / (sum w_f)^2 .

Filling in the colours of a Bayer sensor smooths over two to four pixels, which takes 8 to 13 % off even the scatter of
8x8 means: a ratio of 0.87 (red, blue) to 0.92 (green) is what a perfect mosaic of such frames has.

Nebulae and faint stars scatter the means too. Faint stars are in some of the cells and not in others, so the scatter is
that of the quieter differences, scaled from their lower quartile. And noise grows in another way with the size of the
cells: differences of fourth order of 4x4 means see little of any structure, and correlation alone makes 8x8 means at
most `_MOST_GROWTH` times as noisy. So noise that is coarser than some 6 px counts only as far as it shows at 4 px too.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from zemosaic.report.evidence import Evidence, Floats, FrameFacts
from zemosaic.report.surface import CELL, Surface, nan_median
from zemosaic.tiles import FloatImage

_SHIFT = 4  # binary places of the polygons' corners
_MIN_FREE = 0.6  # of a cell that must be free of sources to count
_DEEP = 3.0  # frames that let outliers be told: less may rightly be cut off
_QUARTILE = 1 / 0.3186  # standard deviation of normal values over the lower quartile of their size
_SAMPLES = 24  # differences a region must have, for a scatter
#: By how much correlation can make noise grow from cells of 4 to cells of 8 px, by the number of colours: 1.16 in the
#: red and blue of a Bayer sensor, 1.09 in its green, 1.03 without debayering. What grows more is structure.
_MOST_GROWTH = {3: 1.2, 1: 1.1}


@dataclass(frozen=True)
class NoiseFigures:
    """Background noise; C channels.

    Parameters
    ----------
    pixel : ndarray
        ``(C,)`` ADU, typical scatter of single pixels.
    binned : ndarray
        ``(C,)`` ADU, typical noise of a pixel without correlation: 8 times the scatter of 8x8 means.
    ratio : ndarray
        ``(C,)`` median of `binned` over its expectation; NaN without frames.
    evenness : ndarray
        ``(C,)`` 95th percentile over median of noise times root of coverage; NaN without a coverage map.
    map : ndarray
        ``(ry, rx)`` float32: binned noise over its expectation (middle channel), or the binned noise, ADU, if that is
        unknown.
    depth : ndarray or None
        ``(h, w)`` float32, frames over every cell, from their outlines.
    complete : float
        Share of the cells that `_DEEP` frames cover (or one, if none is covered so often) which hold data in the
        mosaic; NaN without frames.
    """

    pixel: Floats
    binned: Floats
    ratio: Floats
    evenness: Floats
    map: FloatImage
    depth: FloatImage | None
    complete: float


def measure_noise(evidence: Evidence, surface: Surface) -> NoiseFigures:
    """Noise in regions, against what the frames' noise and weights lead to expect."""
    binned = binned_noise(surface)
    channels, middle = surface.channels, surface.channels // 2
    ratio, evenness = np.full(channels, np.nan), np.full(channels, np.nan)
    depth, complete, picture = None, float("nan"), binned[..., middle]
    if surface.coverage is not None:
        coverage = nan_median(surface.regions(surface.coverage), 0.3)
        even = (binned * np.sqrt(np.where(coverage > 0, coverage, np.nan))[..., None]).reshape(-1, channels)
        evenness = np.array([_percentile(e, 95) / _percentile(e, 50) for e in even.T])
    if evidence.frames is not None:
        depth, expected = expected_noise(evidence.frames, surface)
        deep = depth >= min(_DEEP, float(depth.max(initial=0.0)) or 1.0)
        # The cells along the edge are covered in part only.
        seen = cv2.erode(deep.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=0) > 0
        complete = float((surface.valid[seen] > 0.5).mean()) if seen.any() else float("nan")
        share = binned / nan_median(np.moveaxis(surface.regions(expected), 3, 2), 0.3)
        ratio = nan_median(share.reshape(-1, channels).T)
        picture = share[..., middle]
    typical = nan_median(binned.reshape(-1, channels).T)
    return NoiseFigures(surface.typical_noise, typical, ratio, evenness, picture.astype(np.float32), depth, complete)


def binned_noise(surface: Surface) -> FloatImage:
    """Noise without correlation ``(ry, rx, C)``, ADU: MAD of differences of cell means, times the side of a cell.

    Cells of 8 px tell it, but for real structure, of which those of 4 px show far less.
    """
    # One colour after the other, for the memory.
    colours = [slice(c, c + 1) for c in range(surface.channels)]
    coarse, fine = (
        np.concatenate([_scatter(surface, cells[..., c], free, side, weights) for c in colours], axis=-1)
        for cells, free, side, weights in (
            (surface.sky, surface.free, CELL, (1, -2, 1)),
            (surface.fine, surface.fine_free, CELL // 2, (1, -4, 6, -4, 1)),
        )
    )
    most = _MOST_GROWTH[surface.channels] * fine
    return np.asarray(np.where(np.isnan(fine), coarse, np.minimum(coarse, most)), np.float32)


def _scatter(
    surface: Surface, sky: FloatImage, free: FloatImage, side: int, weights: tuple[int, ...]
) -> NDArray[np.floating]:
    """Noise of a pixel in every region, from differences of these weights along both axes of cells of `side` px."""
    share = np.sqrt(np.where(free >= _MIN_FREE, free, np.float32(np.nan)))
    step = CELL // side  # of lines of cells: as many differences from small cells as from large ones
    reach = len(weights) // 2
    parts = []
    for axis in (0, 1):
        lines = np.s_[:, ::step] if axis == 0 else np.s_[::step, :]
        size = (side, step * side) if axis == 0 else (step * side, side)
        values, weight = sky[lines], share[lines]
        difference, mean = np.zeros_like(values), np.zeros_like(weight)
        for k, factor in enumerate(weights):
            difference += np.float32(factor) * _moved(values, reach - k, axis)
            # A mean of fewer pixels is noisier: brought to that of a full cell.
            mean += np.float32(factor**2) * _moved(weight, reach - k, axis)
        mean /= np.float32(sum(factor**2 for factor in weights))
        parts.append(np.moveaxis(surface.regions(np.abs(difference) * mean[..., None], size), 3, 2))
    boxes = np.concatenate(parts, axis=-1)
    unit = _QUARTILE * side / np.sqrt(sum(factor**2 for factor in weights))
    return np.asarray(unit * _lower_quartile(boxes))


def _lower_quartile(sizes: NDArray) -> NDArray:
    """Of the last axis, NaN left out; NaN where there are fewer than `_SAMPLES`."""
    ordered = np.sort(sizes, axis=-1)
    count = ordered.shape[-1] - np.isnan(ordered).sum(axis=-1)
    at = 0.25 * np.maximum(count - 1, 0)
    low = at.astype(np.int64)
    below, above = (
        np.take_along_axis(ordered, k[..., None], axis=-1)[..., 0] for k in (low, np.minimum(low + 1, count))
    )
    return np.where(count >= _SAMPLES, below + (at - low) * (above - below), np.nan)


def _moved(cells: FloatImage, step: int, axis: int) -> FloatImage:
    """The cells moved by a step along an axis; NaN comes in."""
    out = np.full_like(cells, np.nan)
    to, source = [slice(None)] * cells.ndim, [slice(None)] * cells.ndim
    if step:
        to[axis] = slice(step, None) if step > 0 else slice(None, step)
        source[axis] = slice(None, -step) if step > 0 else slice(-step, None)
    out[tuple(to)] = cells[tuple(source)]
    return out


def expected_noise(frames: FrameFacts, surface: Surface) -> tuple[FloatImage, FloatImage]:
    """Frames over every cell ``(h, w)``, and the expected noise ``(h, w, C)`` of an independent pixel, ADU."""
    h, w = surface.free.shape
    channels = surface.channels
    depth = np.zeros((h, w), np.float32)
    weight, variance = np.zeros((h, w, channels), np.float32), np.zeros((h, w, channels), np.float32)
    each = frames.weight**2 * frames.noise**2 / frames.photosites
    corners = (frames.outline + 0.5) / CELL - 0.5
    low = np.clip(np.floor(corners.min(axis=1)).astype(int), 0, [w, h])
    high = np.clip(np.ceil(corners.max(axis=1)).astype(int) + 1, 0, [w, h])
    for outline, (x0, y0), (x1, y1), own, noise in zip(corners, low, high, frames.weight, each, strict=True):
        if x1 <= x0 or y1 <= y0:
            continue
        mask: NDArray[np.uint8] = np.zeros((y1 - y0, x1 - x0), np.uint8)
        points = np.rint((outline - [x0, y0]) * 2**_SHIFT).astype(np.int32)
        cv2.fillPoly(mask, [points], 1, shift=_SHIFT)
        box = np.s_[y0:y1, x0:x1]
        depth[box] += mask
        weight[box] += mask[..., None] * own.astype(np.float32)
        variance[box] += mask[..., None] * noise.astype(np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = np.sqrt(variance) / weight
        if surface.coverage is not None:  # rejection and cuts leave fewer samples than there are frames
            expected = expected * np.sqrt(depth / surface.coverage)[..., None]
    return depth, np.where(np.isfinite(expected), expected, np.nan).astype(np.float32)


def _percentile(values: FloatImage, q: float) -> float:
    values = values[np.isfinite(values)]
    return float(np.percentile(values, q)) if values.size else float("nan")
