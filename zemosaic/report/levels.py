"""Sky levels: does every lot show the same sky, and does the mosaic show what its frames show?

The frames' own sky, sampled at nodes that they share and adjusted as it was stacked, is compared between lots
(`zemosaic.report.lots`). The residual map is the mosaic's sky less the mean of its frames', plus the mean offset of the
lots behind a node: what one would have to take off to make the large-scale level right, as far as overlaps can tell.
A level or tilt that all frames have in common cannot be seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from zemosaic.levels import sample_sky
from zemosaic.report.evidence import Evidence, Floats, Ints, SkyFacts
from zemosaic.report.lots import Offsets, average, combined, lot_offsets, shares, stacked_offsets
from zemosaic.report.surface import CELL, MAX_MAP, Surface, nan_median
from zemosaic.stars import block_medians
from zemosaic.tiles import FloatImage

_FREE = 0.8  # share of the pixels around a node that hold no source
_BETWEEN = 0.67  # a sample lies between four boxes, of which it is the mean: it scatters so much less than one
_AGREED = 1.5  # times their errors, by which frames differ where there is nothing but sky
_LEAST_STEADY = 20  # nodes
_NEIGHBOURS = (1.3, 2.1)  # spacings of the nodes: near enough for one level, too far to share a box
_ALIKE = 4.0  # neighbouring nodes share blocks, stars and the edges of frames: 16 of them count as one


@dataclass(frozen=True)
class LevelFigures:
    """The sky's level over the field; L lots, C channels.

    Parameters
    ----------
    lots : Offsets
        ``(L, C)`` ADU, sky of every lot against the others, with what stacking did to it.
    visible : ndarray
        ``(L,)`` how much the share of a lot in the mosaic changes over the field, 0 … 1: as much of its offset shows.
    rms : ndarray
        ``(C,)`` ADU, scatter of the residual map without the noise of its nodes; NaN without frames.
    residual : ndarray
        ``(gy, gx)`` float32, ADU, residual map (green or grey); NaN where unknown.
    residual_px : float
        Side of its cells, mosaic pixels.
    sky : ndarray
        ``(ry, rx)`` float32, ADU, the mosaic's sky in regions (green or grey), less a plane: nebula and gradients.
    gradient : float
        ADU, rise of that plane over the mosaic's diagonal.
    """

    lots: Offsets
    visible: Floats
    rms: Floats
    residual: FloatImage
    residual_px: float
    sky: FloatImage
    gradient: float

    @property
    def shown(self) -> Offsets:
        """As much of the offsets and their errors as the mosaic shows."""
        part = self.visible[:, None]
        lots = self.lots
        return replace(lots, value=lots.value * part, error=lots.error * part, sigma=lots.sigma * part)


def measure_levels(evidence: Evidence, surface: Surface) -> LevelFigures:
    """Offsets between lots, and the two maps."""
    channels = evidence.channels
    sky, gradient = _large_scale(surface)
    offsets, visible = Offsets.unknown(evidence.lots, channels), np.ones(evidence.lots)
    rms, residual, px = np.full(channels, np.nan), np.full((1, 1), np.nan, np.float32), float(max(evidence.shape))
    if evidence.sky is not None and evidence.frames is not None and len(evidence.sky.node):
        visible = _visible(_node_shares(evidence))
        evidence = replace(evidence, sky=_steady(evidence, np.nan_to_num(_lot_skies(evidence).value)))
        offsets = _lot_skies(evidence)
        x, y, stacking, shift = _node_residuals(evidence, surface, np.nan_to_num(offsets.value))
        difference = stacking + _level(x, y, shift)
        known = np.isfinite(difference).all(axis=1)
        offsets = combined(offsets, _lot_stacking(evidence, stacking))
        if known.any():
            x, y, difference = x[known], y[known], difference[known]
            rms = _coherent(x, y, difference)
            residual, px = _grid(evidence, x, y, difference[:, channels // 2])
    return LevelFigures(offsets, visible, rms, residual, px, sky, gradient)


def _steady(evidence: Evidence, offset: Floats) -> SkyFacts:
    """The samples at nodes where frames agree about the sky, as far as noise lets them and but for `offset` ``(L, C)``.

    Where they do not, the wing of a star or a steep nebula is in their boxes, in each in another way. All samples if
    hardly any node is left.
    """
    frames, sky = evidence.frames, evidence.sky
    assert frames is not None and sky is not None
    weight = 1 / np.maximum(sky.error, 1e-9)[sky.frame] ** 2
    value = sky.value - offset[frames.lot[sky.frame]]
    _, _, mean, _ = average(sky.node, np.zeros_like(sky.node), value, weight)
    _, at = np.unique(sky.node, return_inverse=True)
    square = np.bincount(at, (weight * (value - mean[at]) ** 2).mean(axis=1))
    steady = square <= (_AGREED * _BETWEEN) ** 2 * np.maximum(np.bincount(at) - 1, 1)
    keep = steady[at]
    if steady.sum() < _LEAST_STEADY:
        return sky
    names = ("frame", "node", "x", "y", "value")
    return replace(sky, **{name: getattr(sky, name)[keep] for name in names})


def _lot_skies(evidence: Evidence) -> Offsets:
    frames, sky = evidence.frames, evidence.sky
    assert frames is not None and sky is not None
    sigma = np.maximum(sky.error, 1e-9)[sky.frame]
    node, lot, mean, total = average(sky.node, frames.lot[sky.frame], sky.value, 1 / sigma**2)
    most = float(np.abs(np.median(sky.value))) + 1.0
    return lot_offsets(node, lot, mean, 1 / np.sqrt(total), evidence.lots, most)


def _lot_stacking(evidence: Evidence, residual: Floats) -> Offsets:
    """What stacking did to the sky of the lots, ADU; `residual` is mosaic less frames at the nodes."""
    found = stacked_offsets(_node_shares(evidence), residual)
    return replace(found, error=_ALIKE * found.error, sigma=_ALIKE * found.sigma)


def _node_shares(evidence: Evidence) -> Floats:
    """Share ``(n, L)`` of every lot in what the mosaic shows at the nodes."""
    frames, sky = evidence.frames, evidence.sky
    assert frames is not None and sky is not None
    return shares(sky.node, frames.lot[sky.frame], frames.weight[sky.frame].mean(axis=1), evidence.lots)


def _visible(share: Floats) -> Floats:
    """How much of its offset each lot leaves as a patch, 0 … 1: the scatter of its share ``(n, L)`` over the field.

    In units of what that is for a lot with the same part of the mosaic which is alone in some places and absent in all
    others, the root of m (1 - m). Where the frames of all lots lie everywhere in like numbers, none shows.
    """
    mean = share.mean(axis=0)
    most = np.sqrt(mean * (1 - mean))
    return np.asarray(np.where(most > 0, share.std(axis=0) / np.maximum(most, 1e-9), 1.0))


def _node_residuals(evidence: Evidence, surface: Surface, offset: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """x, y ``(n,)`` of the nodes, mosaic less frames (the median is 0), and mean offset of the lots, ``(n, C)`` ADU."""
    frames, sky = evidence.frames, evidence.sky
    assert frames is not None and sky is not None
    weight = frames.weight[sky.frame]
    lot = offset[frames.lot[sky.frame]]
    same = np.zeros_like(sky.node)
    _, _, level, _ = average(sky.node, same, sky.value, weight)
    _, _, shift, _ = average(sky.node, same, lot, weight)
    first = np.unique(sky.node, return_index=True)[1]
    x, y = sky.x[first], sky.y[first]
    # Medians of boxes as large as those of the frames, stars and all: what stars add to one, they add to the other.
    blocks = block_medians(surface.planes, sky.block_px // 2)
    own = sample_sky(blocks, sky.block_px // 2 * 2, (x, y), np.arange(len(x)), x, y)
    mosaic = np.full_like(level, np.nan)
    mosaic[own.node] = own.value
    mosaic[~_starless(surface, x, y)] = np.nan
    difference = mosaic - level
    return x, y, difference - np.nan_to_num(nan_median(difference.T)), shift


def _starless(surface: Surface, x: Floats, y: Floats) -> NDArray[np.bool_]:
    """Nodes with little starlight around; in a field full of stars the freest half."""
    h, w = surface.free.shape
    i, j = (np.clip(p // CELL, 0, n - 1).astype(np.int64) for p, n in ((y, h), (x, w)))
    free = np.asarray(cv2.blur(surface.free, (3, 3)))[i, j]
    return np.asarray(free >= min(_FREE, float(np.median(free))) if len(free) else np.zeros(0, bool))


def _level(x: Floats, y: Floats, value: Floats) -> Floats:
    """Values ``(n, C)`` less their best planes: no overlap fixes the common level and tilt of the lots."""
    if len(x) < _LEAST_STEADY:
        return value
    design = np.stack([np.ones_like(x), x - x.mean(), y - y.mean()], axis=1)
    return np.asarray(value - design @ np.linalg.lstsq(design, value, rcond=None)[0])


def _coherent(x: Floats, y: Floats, value: Floats) -> Floats:
    """Root mean square ``(C,)`` of what nodes near each other have in common; NaN where there are no such pairs.

    Their noise, stars and nebula they have not: boxes and samples of nodes `_NEIGHBOURS` apart are not the same. So
    the mean product of two is the variance of the level alone. The wildest fiftieth (bright stars) is left out.
    """
    points = np.stack([x, y], axis=1)
    tree = cKDTree(points)
    spacing = float(np.median(tree.query(points, 2)[0][:, 1])) if len(x) > 1 else 0.0
    pairs = tree.query_pairs(_NEIGHBOURS[1] * spacing, output_type="ndarray")
    distance = np.hypot(*(points[pairs[:, 0]] - points[pairs[:, 1]]).T)
    pairs = pairs[distance >= _NEIGHBOURS[0] * spacing]
    rms = np.full(value.shape[1], np.nan)
    for c, column in enumerate(value.T):
        size = np.abs(column - np.median(column))
        first, second = pairs[(size <= np.percentile(size, 98))[pairs].all(axis=1)].T
        if len(first):
            rms[c] = np.sqrt(max(float((column[first] * column[second]).mean()), 0.0))
    return rms


def _grid(evidence: Evidence, x: Floats, y: Floats, value: Floats) -> tuple[FloatImage, float]:
    """Means of scattered values on a map of square cells, and their side, px."""
    longest = max(evidence.shape)
    # About one node to a cell where every node is known.
    size = max(longest / MAX_MAP, float(np.sqrt(evidence.shape[0] * evidence.shape[1] / max(len(x), 1))))
    rows, columns = (max(1, int(np.ceil(n / size))) for n in evidence.shape)
    i, j = (np.clip((p / size).astype(np.int64), 0, n - 1) for p, n in ((y, rows), (x, columns)))
    cell: Ints = i * columns + j
    count = np.bincount(cell, minlength=rows * columns)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.bincount(cell, value, rows * columns) / count
    return means.reshape(rows, columns).astype(np.float32), size


def _large_scale(surface: Surface) -> tuple[FloatImage, float]:
    """Median sky of the regions less a robust plane (middle channel), and what the plane rises over the diagonal."""
    middle = surface.channels // 2
    sky = nan_median(surface.regions(surface.sky[..., middle]), 0.2)
    ry, rx = sky.shape
    v, u = np.mgrid[0:ry, 0:rx].astype(float)
    design = np.stack([np.ones(sky.size), u.ravel() - rx / 2, v.ravel() - ry / 2], axis=1)
    values = sky.ravel()
    use = np.isfinite(values)
    plane = np.zeros(3)
    for _ in range(5):  # nebulae are clipped: the plane shall follow the sky
        if use.sum() < 3:
            break
        plane = np.linalg.lstsq(design[use], values[use], rcond=None)[0]
        residual = values - design @ plane
        spread = 1.4826 * np.median(np.abs(residual[use]))
        use = np.isfinite(values) & (np.abs(residual) <= 3 * spread + 1e-9)
    flat = (values - design @ plane).reshape(ry, rx)
    return flat.astype(np.float32), float(np.hypot(plane[1] * rx, plane[2] * ry))
