"""Defects that should not be in a mosaic: trails that rejection has left over, and holes.

A trail may be too faint in any one pixel and yet plain along its length. So the brighter bins (4x4 px) of the star-free
picture vote for straight lines (Hough transform), tile by tile, each tile so small that noise has about one vote for a
line. What wins is fitted, followed to its ends across the mosaic, and must stand out against *both* of its
sides, which tells it from a step of the sky, and along most of its length, which tells it from a star or a knot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from zemosaic.execute import thread_map
from zemosaic.report.evidence import Floats
from zemosaic.report.surface import MosaicStars, Surface, robust_sigma
from zemosaic.tiles import FloatImage

_BIN = 4  # px, side of the bins lines are looked for in
_TILE = 128  # bins, side of the tiles; they overlap by half
_SMOOTH = 25  # bins, over which a median takes away what is not narrow
_VOTE = 2.5  # sigma of a bin from which it votes
_MIN_VOTES = 9  # noise gives a line one or two votes; what it gives by chance, `_scores` and `_judge` turn down
_TILE_LINES = 16  # best lines of a tile that are looked at
_CHORD_POINTS = 96  # points along the part of a line inside a tile
_LINES = 1000  # that are looked at together
_MIN_SCORE = 4.0  # standard deviations by which that part must be brighter than its sides to be followed
_MOST_LINES = 60
_ANGLE = np.pi / 360  # step of the directions, rad
_CLIP = 3.0  # sigma that a single bin may weigh: a star on a line is no trail
_SIDES = np.array([-6.0, -5.0, -4.0, 4.0, 5.0, 6.0])  # bins beside a line that it is compared with
_NEAR = np.array([-2.0, 2.0])  # bins where a trail has no light any more, but the ridge of a nebula has
_CORE = np.array([-0.5, 0.0, 0.5])  # bins across a line that are on it
_RUN = 16  # bins, over which a line's brightness is smoothed to see where it ends
_GAP = 32  # bins over which a trail may be hidden
_MIN_LENGTH = 25  # bins
_MIN_CONTRAST = 0.4  # sigma of a bin: the mean along the line over that along either side
_MIN_RIDGE = 0.5  # share of its height over the darker side that it must rise over the brighter one, unlike a step
_MIN_FILLED = 0.7  # share of a line, in pieces of 8 bins, that must be brighter than both sides
_MIN_SIGNIFICANCE = 7.0
_NARROW = 0.75  # of its height that it must rise over what is near
_EVEN = 0.3  # of its height: a trail is as bright all along, but for the noise; stars in a row are not


@dataclass(frozen=True)
class Trail:
    """A straight line of light.

    Parameters
    ----------
    x0, y0, x1, y1 : float
        Its ends, mosaic pixels.
    contrast : float
        Median brightness of 4x4 px along it over that of its sides, in units of the pixel noise.
    significance : float
        Of that mean, standard deviations.
    """

    x0: float
    y0: float
    x1: float
    y1: float
    contrast: float
    significance: float

    @property
    def length(self) -> float:
        """Pixels."""
        return float(np.hypot(self.x1 - self.x0, self.y1 - self.y0))


@dataclass(frozen=True)
class Hole:
    """Pixels without data that data surround: middle, and area in pixels."""

    x: float
    y: float
    area: float


def find_holes(surface: Surface, most: int = 20) -> tuple[list[Hole], float]:
    """The largest holes, and the area of all of them, px; to the nearest bin of 2x2 px."""
    empty = np.pad(~np.isfinite(surface.luminance), 1, constant_values=True)
    _, label, facts, middle = cv2.connectedComponentsWithStats(empty.view(np.uint8), connectivity=4)
    area = facts[:, cv2.CC_STAT_AREA]
    area[[0, label[0, 0]]] = 0  # data, and what lies around them
    largest = [int(i) for i in np.argsort(-area, kind="stable")[:most] if area[i] > 0]
    holes = [Hole(2 * x - 1.5, 2 * y - 1.5, 4.0 * area[i]) for i in largest for x, y in [middle[i].tolist()]]
    return holes, 4.0 * float(area.sum(dtype=np.float64))


def find_trails(surface: Surface, mosaic: MosaicStars, workers: int = 1) -> list[Trail]:
    """Straight features longer than 100 px, the most significant first, looked for on so many threads."""
    bins, unit = _star_free(surface, mosaic)
    clipped = np.clip(bins, -_CLIP, _CLIP)
    trails: list[Trail] = []
    for a, b in _candidates(clipped, workers):
        ends = _ends(clipped, *_fit(clipped, a, b))
        if ends is None:
            continue
        ends = _fit(clipped, *ends)
        trail = _judge(clipped, bins, *ends, unit)
        if trail is not None:
            trails.append(trail)
            p, q = ((round(v[0]), round(v[1])) for v in ends)
            cv2.line(clipped, p, q, (float("nan"),), 5)  # found once is enough
    return sorted(trails, key=lambda trail: -trail.significance)


def _star_free(surface: Surface, mosaic: MosaicStars) -> tuple[FloatImage, float]:
    """Star-free bins in units of their own noise, NaN = no data; and that noise in units of a pixel's."""
    k = _BIN // 2
    h, w = (size // k for size in surface.luminance.shape)
    bins = surface.luminance[: h * k, : w * k].reshape(h, k, w, k).mean(axis=(1, 3), dtype=np.float32)
    missing = np.isnan(bins)
    stars, width = mosaic.stars, mosaic.typical_fwhm
    with np.errstate(invalid="ignore", divide="ignore"):
        signal = np.nan_to_num((stars.flux / stars.error).mean(axis=1), nan=10.0)
    round_ = (mosaic.ellipticity < 0.4) & (mosaic.fwhm < 2 * width)
    radius = (width + 4 * np.log10(np.maximum(signal, 1) / 10)) / _BIN
    mask = missing.astype(np.uint8)
    for (x, y), r in zip((mosaic.points[round_] - 1.5) / _BIN, radius[round_], strict=True):
        cv2.circle(mask, (round(x), round(y)), int(np.ceil(r)), 1, -1)
    mask |= cv2.dilate(missing.astype(np.uint8), np.ones((3, 3), np.uint8))
    bins[mask > 0] = np.nan
    values = bins[np.isfinite(bins)]
    if not values.size:
        return bins, float("nan")
    sigma = max(robust_sigma(values), 1e-6)
    bins = (bins - np.median(values)) / np.float32(sigma)
    # What the mesh of background levels leaves of nebulae and of the rims of steps is wider than any trail.
    coarse = (np.clip(np.nan_to_num(bins), -8, 7.9) * 16 + 128).astype(np.uint8)
    bins -= (np.asarray(cv2.medianBlur(coarse, _SMOOTH), np.float32) - 128) / 16
    pixel = float(np.mean(surface.typical_noise))
    return bins, sigma * surface.luminance_noise / pixel if pixel > 0 else float("nan")


def _candidates(clipped: FloatImage, workers: int) -> list[tuple[Floats, Floats]]:
    """Lines that many bright bins lie on: both ends of their part in a tile, the most significant first."""
    bright = (np.nan_to_num(clipped) > _VOTE).astype(np.uint8)

    def look(corner: tuple[int, int]) -> list[list[tuple[float, float]]]:
        y, x = corner
        tile = np.ascontiguousarray(bright[y : y + _TILE, x : x + _TILE])
        lines = cv2.HoughLinesWithAccumulator(tile, 1, _ANGLE, _MIN_VOTES)
        best = lines.reshape(-1, 3)[:_TILE_LINES] if lines is not None else ()
        return [_chord(float(rho), float(theta), x, y, *tile.shape) for rho, theta, _ in best]

    found = [line for lines in thread_map(look, _tiles(*bright.shape), workers) for line in lines]
    if not found:
        return []
    ends = np.array(found)  # (line, end, axis)
    parts = [ends[i : i + _LINES] for i in range(0, len(ends), _LINES)]
    score = np.concatenate(list(thread_map(lambda part: _scores(clipped, part), parts, workers)))
    order = np.argsort(-score, kind="stable")[:_MOST_LINES]
    return [(ends[i, 0], ends[i, 1]) for i in order if score[i] > _MIN_SCORE]


def _scores(clipped: FloatImage, ends: Floats) -> Floats:
    """How much brighter lines ``(n, 2, 2)`` are than both their sides, standard deviations of noise."""
    t = np.linspace(0, 1, _CHORD_POINTS)[:, None]
    span = ends[:, 1] - ends[:, 0]
    length = np.hypot(span[:, 0], span[:, 1])
    normal = np.stack([-span[:, 1], span[:, 0]], axis=1) / np.maximum(length, 1e-9)[:, None]
    points = ends[:, None, 0] + t * span[:, None]
    means = []
    for offsets in (_CORE, _SIDES[_SIDES < 0], _SIDES[_SIDES > 0]):
        at = points[:, :, None] + offsets[:, None] * normal[:, None, None]
        values = _sample(clipped, at[..., 0], at[..., 1]).reshape(len(ends), -1)
        known = np.isfinite(values)
        means.append(np.where(known, values, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1))
    return (means[0] - np.maximum(means[1], means[2])) * np.sqrt(length / 2)


def _tiles(h: int, w: int) -> Iterator[tuple[int, int]]:
    step = _TILE // 2
    for y in range(0, max(1, h - step), step):
        for x in range(0, max(1, w - step), step):
            yield y, x


def _chord(rho: float, theta: float, x: int, y: int, h: int, w: int) -> list[tuple[float, float]]:
    """Where the line ``u cos + v sin = rho`` of a tile enters and leaves it, in bins of the mosaic."""
    c, s = np.cos(theta), np.sin(theta)
    t = np.arange(-float(np.hypot(h, w)), float(np.hypot(h, w)), 0.25)
    u, v = rho * c - t * s, rho * s + t * c
    inside = np.flatnonzero((u >= 0) & (u <= w - 1) & (v >= 0) & (v <= h - 1))
    if not len(inside):
        return [(rho * c + x, rho * s + y)] * 2
    return [(float(u[i] + x), float(v[i] + y)) for i in (inside[0], inside[-1])]


def _fit(residual: FloatImage, a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """Both ends moved sideways by up to two bins to where the line is brightest."""
    normal = _normal(a, b)
    shifts = np.arange(-2, 2.01, 0.5)
    t = np.linspace(0, 1, max(2, int(np.hypot(*(b - a)))))
    first, second = (end + shifts[:, None] * normal for end in (a, b))
    points = first[:, None, None] * (1 - t[:, None]) + second[None, :, None] * t[:, None]
    values = _sample(residual, points[..., 0], points[..., 1])
    known = np.isfinite(values)
    mean = np.where(known, values, 0).sum(axis=2) / np.maximum(known.sum(axis=2), 1)
    i, j = np.unravel_index(int(mean.argmax()), mean.shape)
    return first[i], second[j]


def _ends(residual: FloatImage, a: Floats, b: Floats) -> tuple[Floats, Floats] | None:
    """The line, lengthened or shortened to where it stands out from its sides; None if that is too short."""
    length = float(np.hypot(*(b - a)))
    if length < 2:
        return None
    along = (b - a) / length
    reach = float(np.hypot(*residual.shape))
    t = np.arange(-reach, reach + length)
    core, left, right = _profile(residual, a, along, t)
    both = np.nan_to_num(core - np.fmax(left, right))
    known = np.isfinite(core).astype(float)
    smooth = ndimage.uniform_filter1d(both, _RUN) / np.maximum(ndimage.uniform_filter1d(known, _RUN), 0.1)
    inside = (t >= 0) & (t <= length)
    bright = smooth > max(_MIN_CONTRAST / 2, 0.5 * float(smooth[inside].mean()))
    # A trail hidden behind a star or a gap in the data goes on beyond it.
    bright = ndimage.binary_closing(np.pad(bright, _GAP), np.ones(_GAP))[_GAP:-_GAP]
    label, _ = ndimage.label(bright)
    here = label[inside & (label > 0)]
    longest = int(np.bincount(here).argmax()) if len(here) else -1
    run = np.flatnonzero((label == longest) & np.isfinite(core))
    if not len(run):
        return None
    start, end = t[run[0]], t[run[-1]]
    return (a + start * along, a + end * along) if end - start >= _MIN_LENGTH else None


def _judge(clipped: FloatImage, bins: FloatImage, a: Floats, b: Floats, unit: float) -> Trail | None:
    """The line as a trail, if it is one."""
    length = float(np.hypot(*(b - a)))
    t = np.arange(0, length)
    core, left, right = _profile(clipped, a, (b - a) / length, t)
    known = np.isfinite(core) & np.isfinite(left) & np.isfinite(right)
    if known.sum() < _MIN_LENGTH or known.mean() < 0.4:
        return None
    core, left, right = core[known], left[known], right[known]
    contrast = float(core.mean() - max(left.mean(), right.mean()))
    scatter = float(np.std(left - right)) / np.sqrt(2) * np.sqrt(3 + 1)  # sides are means of three bins
    significance = contrast / max(scatter, 1e-6) * float(np.sqrt(len(core) / 2))  # neighbours share bins
    n = len(core) // 8 * 8
    pieces = [p[:n].reshape(-1, 8).mean(axis=1) for p in (core, left, right)]
    filled = float((pieces[0] > np.maximum(pieces[1], pieces[2])).mean()) if n else 0.0
    if contrast < _MIN_CONTRAST or significance < _MIN_SIGNIFICANCE or filled < _MIN_FILLED:
        return None
    profile = _profile(bins, a, (b - a) / length, t)
    middle, *sides = (float(np.nanmedian(side)) for side in profile)
    height = middle - max(sides)
    if height < _MIN_RIDGE * (middle - min(sides)):
        return None
    near = _profile(bins, a, (b - a) / length, t, _NEAR)[1:]
    if middle - max(float(np.nanmedian(side)) for side in near) < _NARROW * height:
        return None
    line, left, right = (side[np.isfinite(side)] for side in profile)
    # Sides are means of three lines of bins, the core of half as many; stars beside the line make but one side worse.
    noise = float(np.sqrt(2) * min(robust_sigma(left), robust_sigma(right)))
    if robust_sigma(line) > 2 * noise + _EVEN * height:
        return None
    (x0, y0), (x1, y1) = (end * _BIN + 1.5 for end in (a, b))
    return Trail(float(x0), float(y0), float(x1), float(y1), height * unit, float(significance))


def _profile(
    residual: FloatImage, a: Floats, along: Floats, t: Floats, sides: Floats = _SIDES
) -> tuple[Floats, Floats, Floats]:
    """Mean brightness on the line and on its two sides at distances `t` from `a`; NaN where too little is known."""
    normal = np.array([-along[1], along[0]])
    out = []
    for offsets in (_CORE, sides[sides < 0], sides[sides > 0]):
        points = a + t[:, None, None] * along + offsets[None, :, None] * normal
        values = _sample(residual, points[..., 0], points[..., 1])
        known = np.isfinite(values)
        count = known.sum(axis=1)
        out.append(np.where(count > 0, np.where(known, values, 0).sum(axis=1) / np.maximum(count, 1), np.nan))
    return out[0], out[1], out[2]


def _sample(residual: FloatImage, x: Floats, y: Floats) -> NDArray:
    return ndimage.map_coordinates(residual, (y, x), order=1, cval=np.nan, prefilter=False)


def _normal(a: Floats, b: Floats) -> Floats:
    d = (b - a) / max(float(np.hypot(*(b - a))), 1e-9)
    return np.array([-d[1], d[0]])
