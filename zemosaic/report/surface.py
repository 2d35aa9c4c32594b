"""The mosaic's sky and stars, measured once for all figures: star-free cell means, pixel noise, a list of stars.

Most figures need the sky only at a coarse scale. So the picture is read once, its sources are masked, and what is left
is averaged in cells of `CELL` pixels, in which noise that resampling has correlated is nearly independent again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial

import cv2
import numpy as np
import sep
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from zemosaic.execute import thread_map
from zemosaic.report.evidence import Evidence, Floats
from zemosaic.robust import median
from zemosaic.stars import Aperture, Detection, Plane, Stars, colour_planes, detect, photometry, plane_noise
from zemosaic.tiles import FloatImage

CELL = 8  # px, side of a cell
MAX_MAP = 256  # most regions along a side: every map is small enough for a page
_HALVES = CELL // 2  # 2x2 bins to a cell
_MIN_SHARE = 0.2  # of a cell that must be free of sources
_MIN_WEIGHT = 0.15  # of the cells around a point, to say anything about the sky there
_MESH = 32  # 2x2 bins, side of the background mesh
_MASK_SIGMA = 4.0
_OPENING = 31  # 2x2 bins: wider light is sky
_HALO = ((1, 2), (10, 3), (100, 5), (1000, 10))  # from what multiple of the threshold, how many bins around go
_MAX_STARS = 6000  # brightest sources that are measured
_COMPANY = 0.04  # 3.5 mag: a neighbour that has less of a star's light does not spoil its magnitude
_SECTORS, _ANGLES = 8, 4  # of the ring around a star, and directions in each
_RING = (1.45, 1.6, 1.75, 1.9)  # radii there, of the aperture's
_MEDIAN_NOISE = 1.25  # of a median over that of a mean
_CORE, _CORES = 1.8, 1200  # times the typical FWHM; stars
_STEP = 4  # rows between those that the pixel noise is taken from
_SPARSE = 7  # 2x2 bins between the rows that the noise of the bins is taken from
_ROWS = 64 * _SPARSE  # 2x2 bins that are worked on at a time: whole cells


@dataclass(frozen=True)
class Surface:
    """The coarse picture; C channels, h x w cells, ry x rx regions.

    Parameters
    ----------
    shape : tuple of int
        ``(ny, nx)`` of the mosaic.
    sky : ndarray
        ``(h, w, C)`` float32, mean of the source-free pixels of every cell, ADU; NaN where too few are left.
    free : ndarray
        ``(h, w)`` float32, share of a cell's pixels that have data and no source.
    fine, fine_free : ndarray
        ``(2 h, 2 w, C)`` and ``(2 h, 2 w)`` float32: the same of cells of half the side.
    valid : ndarray
        ``(h, w)`` float32, share of a cell's pixels that have data.
    coverage : ndarray or None
        ``(h, w)`` float32, mean coverage where there are data.
    region : int
        Side of a region, px, a multiple of `CELL`.
    noise : ndarray
        ``(ry, rx, C)`` float32, noise of a pixel, ADU: as in `zemosaic.stars.plane_noise`.
    luminance : ndarray
        ``(ny // 2, nx // 2)`` float32, mean over channels of 2x2 pixels less the local background, in units of its
        noise; NaN = no data.
    luminance_noise : float
        Typical value of that unit, ADU.
    planes : list of Plane
        The 2x2 pixels of every channel, as frames are measured in.
    """

    shape: tuple[int, int]
    sky: FloatImage
    free: FloatImage
    fine: FloatImage
    fine_free: FloatImage
    valid: FloatImage
    coverage: FloatImage | None
    region: int
    noise: FloatImage
    luminance: FloatImage
    luminance_noise: float
    planes: list[Plane]

    @property
    def channels(self) -> int:
        """1 or 3."""
        return self.sky.shape[2]

    @property
    def typical_noise(self) -> Floats:
        """``(C,)`` median noise of a pixel, ADU."""
        return np.asarray(nan_median(self.noise.reshape(-1, self.channels).T), float)

    def noise_at(self, x: Floats, y: Floats) -> Floats:
        """``(..., C)`` noise of a pixel near positions, ADU."""
        ry, rx = self.noise.shape[:2]
        i = np.clip((np.asarray(y) // self.region).astype(int), 0, ry - 1)
        j = np.clip((np.asarray(x) // self.region).astype(int), 0, rx - 1)
        return self.noise[i, j].astype(float)

    def sky_map(self, fine: bool = False) -> CellMap:
        """The sky to be looked up between the middles of (fine) cells."""
        return CellMap(self.fine, self.fine_free, CELL // 2) if fine else CellMap(self.sky, self.free)

    def regions(self, cells: FloatImage, side: tuple[int, int] = (CELL, CELL)) -> FloatImage:
        """Cells ``(h, w, ...)`` sorted by region: ``(ry, rx, cells of a region, ...)``, NaN where there are none.

        `side` is that of the cells along y and x, px.
        """
        ky, kx = (self.region // size for size in side)
        ry, rx = self.noise.shape[:2]
        pad = [(0, ry * ky - cells.shape[0]), (0, rx * kx - cells.shape[1])] + [(0, 0)] * (cells.ndim - 2)
        full = np.pad(cells, pad, constant_values=np.nan)
        boxes = full.reshape(ry, ky, rx, kx, *cells.shape[2:]).swapaxes(1, 2)
        return boxes.reshape(ry, rx, ky * kx, *cells.shape[2:])


@dataclass(frozen=True)
class MosaicStars:
    """Stars of the mosaic, measured exactly as those of a frame.

    Parameters
    ----------
    stars : Stars
        Positions and fluxes, mosaic pixels and ADU.
    fwhm, ellipticity, angle : ndarray
        ``(n,)`` pixels; 0 … 1; radians.
    typical_fwhm : float
        As a frame's; NaN without stars.
    lonely : ndarray
        ``(n,)`` bool: calm, and out to the ring that its sky is taken from no other star has `_COMPANY` of its light.
    calm : ndarray
        ``(n,)`` bool: nor is the sky of that ring so uneven (`_unevenness`), as in a lively nebula.
    core : ndarray
        ``(n, C)`` flux within `_CORE` times the typical width, as magnitudes are usually taken; NaN beyond the `_CORES`
        brightest.
    """

    stars: Stars
    fwhm: Floats
    ellipticity: Floats
    angle: Floats
    typical_fwhm: float
    lonely: NDArray[np.bool_]
    calm: NDArray[np.bool_]
    core: Floats

    @property
    def points(self) -> Floats:
        """``(n, 2)`` x, y."""
        return np.c_[self.stars.x, self.stars.y]


def measure_surface(evidence: Evidence, workers: int = 1) -> Surface:
    """Mask the sources, average what is left in cells, and measure the noise of the pixels, on so many threads."""
    planes = colour_planes(evidence.image, None, workers)
    colours = [plane.data for plane in planes]
    grey = _mean(colours)
    background, scatter = _background(grey)
    masked = _sources(grey, scatter, workers)
    h, w = (size // CELL for size in evidence.shape)
    fine, fine_free = np.empty((2 * h, 2 * w, len(colours)), np.float32), np.empty((2 * h, 2 * w), np.float32)
    sky, free = np.empty((h, w, len(colours)), np.float32), np.empty((h, w), np.float32)
    valid, coverage = np.empty((h, w), np.float32), np.empty((h, w), np.float32)

    def average(rows: slice) -> None:
        """Whole cells from some rows of bins; what is left over at the far edges is dropped."""
        there = np.isfinite(grey[rows])
        own_free = (there & ~masked[rows]).astype(np.float32)
        light = [_cell_means(np.where(own_free > 0, colour[rows], np.float32(0)), _HALVES // 2) for colour in colours]
        top, bottom = rows.start // _HALVES, rows.stop // _HALVES
        part = slice(2 * top, 2 * bottom)
        light = [each[: 2 * (bottom - top), : 2 * w] for each in light]
        fine_free[part] = _cell_means(own_free, _HALVES // 2)[: 2 * (bottom - top), : 2 * w]
        fine[part] = _means(np.stack(light, axis=-1), fine_free[part])
        part = slice(top, bottom)
        free[part] = _cell_means(fine_free[2 * top : 2 * bottom], 2)
        sky[part] = _means(np.stack([_cell_means(each, 2) for each in light], axis=-1), free[part])
        valid[part] = _cell_means(there.astype(np.float32))
        if evidence.coverage is not None:
            pixels = evidence.coverage[2 * rows.start : 2 * rows.stop, : 2 * there.shape[1]]
            bins = np.asarray(cv2.resize(pixels, there.shape[::-1], interpolation=cv2.INTER_AREA), np.float32)
            bins[~there] = 0
            with np.errstate(invalid="ignore", divide="ignore"):
                coverage[part] = _cell_means(bins) / valid[part]

    for _ in thread_map(average, _strips(len(grey)), workers):
        pass
    region = 64 * max(1, math.ceil(max(evidence.shape) / (64 * MAX_MAP)))
    channels = np.moveaxis(np.atleast_3d(evidence.image), 2, 0)
    noise = np.stack(list(thread_map(lambda c: _noise_map(c, region), channels, workers)), axis=-1)
    units = scatter[np.isfinite(grey)][::97]
    if background is not None:
        background.subfrom(grey)
    luminance = np.divide(grey, scatter, out=grey)
    return Surface(
        shape=evidence.shape,
        sky=sky,
        free=free,
        fine=fine,
        fine_free=fine_free,
        valid=valid,
        coverage=coverage if evidence.coverage is not None else None,
        region=region,
        noise=noise,
        luminance=luminance,
        luminance_noise=float(np.median(units)) if len(units) else math.nan,
        planes=planes,
    )


def _mean(planes: list[FloatImage]) -> FloatImage:
    """Mean of planes of equal shape, without stacking them first."""
    total = planes[0].copy()
    for plane in planes[1:]:
        total += plane
    total /= np.float32(len(planes))
    return total


def measure_stars(image: FloatImage, radius: float = math.nan, planes: list[Plane] | None = None) -> MosaicStars:
    """Find and measure the stars of a mosaic.

    Parameters
    ----------
    image : ndarray
        ``(H, W)`` or ``(H, W, 3)`` float32; NaN = no data.
    radius : float
        Of the aperture, px: that of the frames, lest the wings of the stars look like an error of their fluxes. NaN
        leaves it to the width of the stars.
    planes : list of Plane, optional
        `Surface.planes`, if they are there already.
    """
    planes = planes or colour_planes(image, None)
    luminance = _mean([p.data for p in planes])
    found = detect(luminance, limit=_MAX_STARS)
    width = 2 * found.typical_fwhm()
    if not np.isfinite(radius):
        # The rule of `measure.choose_aperture`.
        radius = max(5.0, 2.3 * width) if np.isfinite(width) else Aperture().radius
    noise = np.array([plane_noise(p.data) for p in planes])

    def measured(which: Detection, inner: float) -> Stars:
        aperture = Aperture(inner, 1.4 * radius, 2.0 * radius)
        return photometry(planes, which, saturation=math.inf, peak=luminance, noise=noise, aperture=aperture)

    stars = measured(found, radius)
    if not len(stars):
        none = np.zeros(0)
        nobody = np.zeros(0, bool)
        return MosaicStars(stars, none, none, none, width, nobody, nobody, np.zeros_like(stars.flux))
    # `photometry` leaves out stars too near to the edge; the shapes are picked up by position.
    row = cKDTree(np.c_[found.x, found.y]).query(np.c_[stars.x - 0.5, stars.y - 0.5] / 2)[1]
    lonely = _lonely(stars, 2 * radius)
    calm = _unevenness(luminance, stars, radius) < _COMPANY * stars.flux.mean(axis=1)
    core = np.full_like(stars.flux, np.nan)
    few = measured(Detection(*(values[:_CORES] for values in vars(found).values())), min(_CORE * width, radius))
    core[: len(few)] = few.flux
    shape = 2 * found.fwhm[row], found.ellipticity[row], found.angle[row]
    return MosaicStars(stars, *shape, width, lonely & calm, calm, core)


def _lonely(stars: Stars, reach: float) -> NDArray[np.bool_]:
    """Whether no star within `reach` px is brighter than `_COMPANY` of each."""
    light = np.maximum(stars.flux.sum(axis=1), 1e-9)
    pairs = cKDTree(np.c_[stars.x, stars.y]).query_pairs(reach, output_type="ndarray")
    lonely = np.ones(len(stars), bool)
    for a, b in (pairs.T, pairs.T[::-1]):
        lonely[a[light[b] > _COMPANY * light[a]]] = False
    return lonely


def _unevenness(luminance: FloatImage, stars: Stars, radius: float) -> Floats:
    """What a bent sky may add to the aperture ``(n,)`` of each star, ADU: its scatter around the ring, noise taken off.

    The ring is cut into eight sectors. A slope cancels in the mean of two opposite ones.
    """
    angle = (np.arange(_SECTORS)[:, None] + (np.arange(_ANGLES) + 0.5) / _ANGLES) * 2 * np.pi / _SECTORS
    reach = radius * np.array(_RING)[:, None, None] / 2
    u = ((stars.x - 0.5) / 2)[:, None, None, None] + reach * np.cos(angle)
    v = ((stars.y - 0.5) / 2)[:, None, None, None] + reach * np.sin(angle)
    i, j = (np.clip(np.rint(p).astype(np.int64), 0, n - 1) for p, n in zip((v, u), luminance.shape, strict=True))
    samples = np.moveaxis(luminance[i, j], 1, 2).reshape(len(stars), _SECTORS, -1)
    half = _SECTORS // 2
    sector = nan_median(samples, 0.5)
    noise = _MEDIAN_NOISE * plane_noise(luminance) / math.sqrt(2 * samples.shape[2])
    bent = np.var((sector[:, :half] + sector[:, half:]) / 2, axis=1, ddof=1) - noise**2
    return np.asarray(np.nan_to_num(np.sqrt(np.maximum(bent, 0)), nan=np.inf) * math.pi * radius**2)


@dataclass(frozen=True)
class CellMap:
    """A map of cells that can be looked up anywhere, by weighted bilinear interpolation.

    Parameters
    ----------
    values : ndarray
        ``(h, w, C)``, NaN where unknown; C up to 3.
    weight : ndarray
        ``(h, w)`` what each cell counts: a neighbour full of stars leaves the sky to the other three.
    side : int
        Of a cell, px.
    """

    values: FloatImage
    weight: FloatImage
    side: int = CELL

    @cached_property
    def _source(self) -> FloatImage:
        """``(h, w, C + 1)`` float32: what is interpolated, values times weight and weight."""
        known: NDArray[np.bool_] = np.isfinite(self.values.sum(axis=2))
        share = np.where(known, self.weight, np.float32(0))[..., None]
        planes = [np.where(known[..., None], self.values, np.float32(0)) * share, share]
        return np.ascontiguousarray(np.concatenate(planes, axis=2), np.float32)

    def at(self, x: Floats, y: Floats) -> FloatImage:
        """The map at mosaic pixels of any shape.

        Returns
        -------
        ndarray
            ``(..., C)`` float32; NaN outside, and where less than a third of the weight is there.
        """
        u, v = (((np.asarray(p) + 0.5) / self.side - 0.5).astype(np.float32) for p in (x, y))
        rows = 16384  # OpenCV takes images below 32768 px only
        count = -(-u.size // rows)
        across, down = (np.resize(p.ravel(), count * rows).reshape(count, rows) for p in (u, v))
        found = cv2.remap(self._source, across, down, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
        channels = self._source.shape[2]
        out = np.asarray(found, np.float32).reshape(-1, channels)[: u.size].reshape(*u.shape, channels)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(out[..., -1:] > _MIN_WEIGHT, out[..., :-1] / out[..., -1:], np.float32(np.nan))


def _background(grey: FloatImage) -> tuple[sep.Background | None, FloatImage]:
    """Local background of the 2x2 bins, None where there are none, and its noise, ADU."""
    missing = ~np.isfinite(grey)
    if missing.all():
        return None, np.ones_like(grey)
    background = sep.Background(np.where(missing, np.float32(0), grey), mask=missing, bw=_MESH, bh=_MESH)
    scatter = background.rms()
    return background, np.maximum(scatter, np.float32(1e-3 * background.globalrms + 1e-30), out=scatter)


def _sources(grey: FloatImage, scatter: FloatImage, workers: int) -> NDArray[np.bool_]:
    """Bins that hold light of sources; at most half of the picture, in a field of nothing but stars.

    A source is what a morphological opening takes away: light narrower than `_OPENING`. That leaves slopes, and steps
    of any height, as they are; against a mesh of background levels a seam would be a source on its bright side.
    """
    strips = _strips(len(grey))
    excess = np.empty_like(grey)
    # One row in seven tells the noise as well as all.
    step = _SPARSE if np.isfinite(grey[::_SPARSE]).any() else 1
    apart = list(thread_map(lambda rows: _stand_out(grey, scatter, rows, step, excess), strips, workers))
    differences = np.concatenate([np.zeros(0, np.float32), *apart])
    sigma = 1.4826 / math.sqrt(2) * median(differences) if differences.size else 0.0
    threshold = _MASK_SIGMA * max(sigma, 1e-6)
    some = excess[::step]
    some = some[np.isfinite(some)]
    middle = median(some) if some.size else 0.0
    mask = np.zeros(grey.shape, bool)
    for factor in 2.0 ** np.arange(6):
        hide = partial(_with_halo, excess, middle, factor * threshold, mask)
        there, hidden = np.sum(list(thread_map(hide, strips, workers)), axis=0)
        if hidden <= 0.5 * there:
            break
    return mask


def _strips(height: int) -> list[slice]:
    return [slice(y, min(y + _ROWS, height)) for y in range(0, height, _ROWS)]


def _around(rows: slice, reach: int, height: int) -> tuple[slice, slice]:
    """The same rows with up to `reach` more on either side, and where they are among those."""
    first = max(rows.start - reach, 0)
    return slice(first, min(rows.stop + reach, height)), slice(rows.start - first, rows.stop - first)


def _stand_out(grey: FloatImage, scatter: FloatImage, rows: slice, step: int, out: FloatImage) -> FloatImage:
    """Some rows of what is narrower than `_OPENING`, in units of the noise, NaN = no data, into the same rows of `out`.

    Returns
    -------
    ndarray
        ``(n,)`` differences of bins four apart in every `step`-th row, of the same unit: they share no pixel of the
        smoothing, and are blind to slopes.
    """
    wide, inner = _around(rows, _OPENING + 1, len(grey))
    part, unit = grey[wide], scatter[wide]
    there = np.isfinite(part)
    smooth = np.asarray(cv2.blur(np.where(there, part, np.float32(0)), (3, 3)), np.float32)
    smooth /= np.maximum(cv2.blur(there.astype(np.float32), (3, 3)), np.float32(1e-6))
    some, known = smooth[inner][::step], there[inner][::step]
    apart = np.abs((some[:, 4:] - some[:, :-4]) / unit[inner][::step, 4:])[known[:, 4:] & known[:, :-4]]
    top = np.float32(np.finfo(np.float32).max)
    square = np.ones((_OPENING, _OPENING), np.uint8)
    low = np.asarray(cv2.erode(np.where(there, smooth, top), square), np.float32)
    low[low == top] = -top
    smooth -= cv2.dilate(low, square)
    smooth /= unit
    smooth[~there] = np.nan
    out[rows] = smooth[inner]
    return apart


def _with_halo(
    excess: FloatImage, middle: float, threshold: float, out: NDArray[np.bool_], rows: slice
) -> tuple[int, int]:
    """Some rows of the sources and of the light around them into the same rows of `out`.

    Returns
    -------
    tuple of int
        Bins with data there, and those of them that are hidden.
    """
    wide, inner = _around(rows, _HALO[-1][1], len(excess))
    bright = excess[wide] - np.float32(middle)
    mask = np.zeros(bright.shape, bool)
    for factor, radius in _HALO:
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
        mask |= np.asarray(cv2.dilate((bright > factor * threshold).astype(np.uint8), disc)) > 0
    out[rows] = mask[inner]
    there = np.isfinite(bright[inner])
    return int(there.sum()), int((there & mask[inner]).sum())


def _means(light: FloatImage, share: FloatImage) -> FloatImage:
    """Light ``(h, w, C)`` of cells over the share ``(h, w)`` of them that is free, NaN where that is too little."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(share[..., None] >= _MIN_SHARE, light / share[..., None], np.float32(np.nan))


def _cell_means(bins: FloatImage, side: int = _HALVES) -> FloatImage:
    """Means of `side` x `side` bins; what is left over at the far edges is dropped."""
    h, w = (size // side for size in bins.shape)
    if not h or not w:
        return np.zeros((h, w), np.float32)
    cut = np.ascontiguousarray(bins[: h * side, : w * side], np.float32)
    return np.asarray(cv2.resize(cut, (w, h), interpolation=cv2.INTER_AREA), np.float32)


def _noise_map(plane: FloatImage, region: int) -> FloatImage:
    """Noise of a pixel in every region: scaled MAD of differences two pixels apart along some of the rows."""
    k, rx = region // _STEP, -(-plane.shape[1] // region)
    lines = []
    for y in range(0, len(plane), region):  # what is sorted is several times as large as a row of regions
        rows = plane[y : y + region : _STEP]
        difference = np.abs(rows[:, 2:] - rows[:, :-2])
        around = (0, k - len(rows)), (0, rx * region - difference.shape[1])
        boxes = np.pad(difference, around, constant_values=np.nan).reshape(k, rx, region)
        lines.append(nan_median(boxes.swapaxes(0, 1).reshape(rx, -1), 0.1))
    return (1.4826 / math.sqrt(2) * np.stack(lines)).astype(np.float32)


def nan_median(values: NDArray, least: float = 0.0) -> NDArray:
    """Median over the last axis, NaN left out; NaN where less than a share `least` is there.

    A sort puts NaN last, and is far quicker than `numpy.nanmedian` row by row.
    """
    ordered = np.sort(values, axis=-1)
    count = ordered.shape[-1] - np.isnan(ordered).sum(axis=-1)
    low, high = np.maximum(count - 1, 0) // 2, np.minimum(count // 2, ordered.shape[-1] - 1)
    middle = [np.take_along_axis(ordered, k[..., None], axis=-1)[..., 0] for k in (low, high)]
    return np.where(count > least * ordered.shape[-1], (middle[0] + middle[1]) / 2, np.nan)


def robust_sigma(values: NDArray) -> float:
    """Scaled median absolute deviation of values ``(n,)``; NaN for none."""
    return float(1.4826 * np.median(np.abs(values - np.median(values)))) if len(values) else math.nan
