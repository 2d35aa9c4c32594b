"""Noise: is the background as quiet as the frames behind it allow?

Interpolation makes neighbouring pixels alike, so that the scatter of single pixels is too small to compare. Means of
8x8 pixels hardly share any photosite; eight times their scatter is what a pixel would have, were pixels independent.
The expectation of that, for a weighted mean of frames with noise sigma_f a photosite, k_f photosites of the colour to a
pixel and weights w_f, is

    sigma^2 = sum(w_f^2 sigma_f^2 / k_f) / (sum w_f)^2 .

Filling in the colours of a Bayer sensor smooths over two to four pixels, which takes 8 to 13 % off even the scatter of
8x8 means: a ratio of 0.87 (red, blue) to 0.92 (green) is what a perfect mosaic of such frames has.
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
_SAMPLES = 24  # differences a region must have, for a scatter


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
    """Noise without correlation ``(ry, rx, C)``, ADU: MAD of second differences of cell means, times `CELL`."""
    free = np.where(surface.free >= _MIN_FREE, surface.free, np.float32(np.nan))
    parts = []
    for axis in (0, 1):
        before, here, after = (_moved(surface.sky, k, axis) for k in (1, 0, -1))
        # A mean of fewer pixels is noisier: brought to that of a full cell.
        share = np.cbrt(_moved(free, 1, axis) * free * _moved(free, -1, axis))
        parts.append(np.moveaxis(surface.regions(np.abs(before - 2 * here + after) * np.sqrt(share)[..., None]), 3, 2))
    boxes = np.concatenate(parts, axis=-1)
    return np.asarray(1.4826 * CELL / np.sqrt(6) * nan_median(boxes, _SAMPLES / boxes.shape[-1]), np.float32)


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
