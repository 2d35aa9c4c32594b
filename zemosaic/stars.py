"""Stars and sky of one frame: what the photometric solution and the quality gate are fed with.

Measured on the recorded photosites in 2x2 cells, before debayering: half the size, no interpolation, and the
colours of a CFA come apart by themselves. Positions are given in pixels of the frame
(0-based, centre of the first pixel = 0).
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import cv2
import numpy as np
import sep
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from zemosaic.apertures import half_light_radii, star_sums
from zemosaic.execute import thread_map
from zemosaic.kernels import cfa_cells
from zemosaic.robust import median
from zemosaic.tiles import FloatImage

_MAX_STARS = 400  # brightest detections that are measured
_DETECT_SIGMA = 5.0
_MAX_COMPANY = 0.25  # flux of a neighbour that is tolerated, share of the star's own
_COMPANY_ERROR = 0.3  # share of a neighbour's flux by which it may differ from frame to frame
_PART, _PART_MARGIN = 1024, 32  # side of the parts that sources are looked for in, and what is seen around, cells
_LIGHT_CELLS = 8.0  # that hold a star's light
_ALONE_CELLS = 10.0  # distance of the next source from which a width is not spoilt by it
_MAX_ELLIPTICITY = 0.6  # more is a piece of a trail
_BACKGROUND_CELLS = 32  # size of the background mesh, 2x2 cells
_NEBULA = 1.5  # times the noise of the frame, that a ring shows where a nebula makes it
_STRIP = 512  # rows that are averaged at a time


@dataclass(frozen=True)
class Plane:
    """One colour of a frame in 2x2 cells.

    Parameters
    ----------
    data : ndarray
        ``(ny // 2, nx // 2)`` float32, ADU.
    x0, y0 : float
        Frame pixel that the cell ``[0, 0]`` is centred on; a cell is two frame pixels wide.
    pixels_per_cell : int
        Photosites averaged into a cell.
    """

    data: FloatImage
    x0: float
    y0: float
    pixels_per_cell: int


def colour_planes(pixels: FloatImage, bayer: str | None, workers: int = 1) -> list[Plane]:
    """Red, green, blue (or one grey) plane of a frame in 2x2 cells, each knowing where its light was sampled.

    Parameters
    ----------
    pixels : ndarray
        ``(ny, nx)`` CFA or mono, or ``(ny, nx, 3)``; float32.
    bayer : str or None
        CFA pattern of ``pixels``.
    workers : int
        Threads, for a large picture without a pattern.
    """
    return cells_of(pixels, bayer).planes if bayer else _mean_planes(pixels, workers)


def _mean_planes(pixels: FloatImage, workers: int) -> list[Plane]:
    ny, nx = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
    if not ny * nx:  # a single row has no cells, and OpenCV does not know arrays without pixels
        return [Plane(np.zeros((ny // 2, nx // 2), np.float32), 0.5, 0.5, 4) for _ in range(pixels[0, 0].size)]
    planes = [np.empty((ny // 2, nx // 2), np.float32) for _ in range(pixels[0, 0].size)]

    def strip(y: int) -> None:
        rows = pixels[y : min(y + _STRIP, ny), :nx]
        mean = cv2.resize(rows, (nx // 2, len(rows) // 2), interpolation=cv2.INTER_AREA)
        for plane, colour in zip(planes, cv2.split(mean), strict=True):
            plane[y // 2 : y // 2 + len(colour)] = colour

    for _ in thread_map(strip, range(0, ny, _STRIP), workers):  # no copy of the whole picture
        pass
    return [Plane(plane, 0.5, 0.5, 4) for plane in planes]


@dataclass(frozen=True)
class Cells:
    """A frame in 2x2 cells.

    Parameters
    ----------
    planes : list of Plane
        Its colours.
    luminance, peak : ndarray
        ``(ny // 2, nx // 2)`` float32, mean and maximum of every cell over all colours, ADU.
    """

    planes: list[Plane]
    luminance: FloatImage
    peak: FloatImage


def cells_of(pixels: FloatImage, bayer: str | None) -> Cells:
    """The same with luminance and peak, for a search of stars."""
    if bayer:
        planes, luminance, peak = cfa_cells(np.ascontiguousarray(pixels), np.array(["RGB".index(c) for c in bayer]))
        sites = [[i for i, c in enumerate(bayer) if c == colour] for colour in "RGB"]
        middles = [(float(np.mean([i % 2 for i in at])), float(np.mean([i // 2 for i in at]))) for at in sites]
        found = [Plane(p, *middle, len(at)) for p, middle, at in zip(planes, middles, sites, strict=True)]
        return Cells(found, luminance, peak)
    ny, nx = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
    # One colour after the other: along a short axis numpy is slow.
    brightest = functools.reduce(np.maximum, np.moveaxis(np.atleast_3d(pixels), 2, 0))
    cells = [brightest[y:ny:2, x:nx:2] for y in (0, 1) for x in (0, 1)]
    planes = _mean_planes(pixels, 1)
    luminance = sum(plane.data for plane in planes) / np.float32(len(planes))
    return Cells(planes, luminance, functools.reduce(np.maximum, cells))


@dataclass(frozen=True)
class Stars:
    """Stars of one frame that are fit for photometry or position.

    Parameters
    ----------
    x, y : ndarray
        ``(n,)`` float64, frame pixels.
    flux : ndarray
        ``(n, C)`` float64, ADU: aperture sum over the local sky, in every colour.
    error : ndarray
        ``(n, C)`` float64, ADU, from the sky's noise.
    clean : ndarray
        ``(n,)`` bool: isolated and unsaturated, so fit for photometry.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    flux: NDArray[np.float64]
    error: NDArray[np.float64]
    clean: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Detection:
    """Sources found on the luminance of a frame, in cells, brightest first (all arrays ``(n,)`` float64)."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    flux: NDArray[np.float64]
    peak: NDArray[np.float64]
    fwhm: NDArray[np.float64]
    ellipticity: NDArray[np.float64]
    angle: NDArray[np.float64]

    def typical_fwhm(self) -> float:
        """Width of the frame's stars; NaN without sources.

        Knots of a nebula are found as well, and may outnumber the stars; but they are wide and faint for their
        flux. So only the third with the highest peaks counts (at least five sources, at most forty), of those the ones
        that stand alone if there are five, and of the rest what is not twice as wide as the sharpest quarter.
        """
        if not len(self.x):
            return float("nan")
        points = np.c_[self.x, self.y]
        apart = cKDTree(points).query(points, k=2)[0][:, 1] > _ALONE_CELLS
        count = int(np.clip(len(points) // 3, 5, 40))
        top = np.argsort(-self.peak, kind="stable")[:count]
        width = self.fwhm[top[apart[top]]] if apart[top].sum() >= 5 else self.fwhm[top]
        return float(np.median(width[width <= 2 * np.percentile(width, 25)]))


def detect(luminance: FloatImage, *, sigma: float = _DETECT_SIGMA, limit: int = _MAX_STARS) -> Detection:
    """Find stars on a hot-pixel-free image.

    Parameters
    ----------
    luminance : ndarray
        ``(h, w)`` float32; NaN = no data.
    sigma : float
        Detection threshold over the local background, in units of its noise.
    limit : int
        How many of the brightest are kept.

    Returns
    -------
    Detection
        Centroids, half-light diameters (= FWHM of a Gaussian) and shapes, in pixels of `luminance`.
        Blends, edge sources and sources sharper than any PSF are left out.
    """
    image = np.array(luminance, dtype=np.float32, order="C")  # sep works in place and needs native order
    mask = ~np.isfinite(image)
    image[mask] = 0
    empty = Detection(*(np.zeros(0) for _ in range(7)))
    if mask.all() or min(image.shape) < 8:
        return empty
    background = sep.Background(image, mask=mask, bw=_BACKGROUND_CELLS, bh=_BACKGROUND_CELLS)
    background.subfrom(image)
    noise = background.globalrms
    if not noise > 0:
        return empty
    found = _extract(image, mask, sigma * noise)
    if not len(found):
        return empty
    inside = (found["flag"] & (sep.OBJ_TRUNC | sep.OBJ_SINGU)) == 0
    found = found[inside & (found["a"] > 0) & (found["b"] > 0)]
    found = found[np.argsort(-found["flux"], kind="stable")[:limit]]
    if not len(found):
        return empty
    radius = half_light_radii(image, found["x"], found["y"], _LIGHT_CELLS)
    good = np.isfinite(radius) & ~_sharper_than_light(image, found)
    a, b = found["a"][good].astype(float), found["b"][good].astype(float)
    return Detection(
        found["x"][good].astype(float),
        found["y"][good].astype(float),
        found["flux"][good].astype(float),
        found["peak"][good].astype(float),
        2 * radius[good],
        1 - b / a,
        found["theta"][good].astype(float),
    )


def _extract(image: FloatImage, mask: NDArray[np.bool_], threshold: float) -> NDArray:
    """Sources above `threshold`, part by part where the image is large: sep's time grows with their number squared."""
    h, w = image.shape
    found = []
    for top, left in itertools.product(range(0, h, _PART), range(0, w, _PART)):
        y0, x0 = max(top - _PART_MARGIN, 0), max(left - _PART_MARGIN, 0)
        window = slice(y0, top + _PART + _PART_MARGIN), slice(x0, left + _PART + _PART_MARGIN)
        part = _extract_part(np.ascontiguousarray(image[window]), np.ascontiguousarray(mask[window]), threshold)
        for name, corner in (("x", x0), ("y", y0), ("xpeak", x0), ("ypeak", y0)):
            part[name] += corner
        own = (part["x"] >= left) & (part["x"] < left + _PART) & (part["y"] >= top) & (part["y"] < top + _PART)
        found.append(part[own])
    return np.concatenate(found)


def _extract_part(image: FloatImage, mask: NDArray[np.bool_], threshold: float) -> NDArray:
    """Sources above `threshold`, or above a higher one where they are too many to be taken apart."""
    for factor in (1, 4, 16):
        try:
            return sep.extract(image, factor * threshold, mask=mask, minarea=4, deblend_cont=0.01)
        except Exception as problem:  # sep has no type of its own for a full buffer
            if "pixel buffer full" not in str(problem) and "deblending overflow" not in str(problem):
                raise
    return sep.extract(image, np.inf, mask=mask)  # none


def _sharper_than_light(image: FloatImage, found: NDArray) -> NDArray[np.bool_]:
    """Sources whose 4th-brightest pixel of the 3x3 at the peak is under 10 % of it: defects, not stars."""
    h, w = image.shape
    xs = np.clip(found["xpeak"], 1, w - 2)
    ys = np.clip(found["ypeak"], 1, h - 2)
    box = np.stack([image[ys + dy, xs + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)])
    box = np.sort(box, axis=0)
    return box[-4] < 0.10 * box[-1]


@dataclass(frozen=True)
class Aperture:
    """Circular aperture and sky annulus, frame pixels."""

    radius: float = 7.0
    inner: float = 10.0
    outer: float = 14.0


def photometry(
    planes: list[Plane],
    detection: Detection,
    *,
    saturation: float,
    peak: FloatImage,
    noise: NDArray[np.float64],
    aperture: Aperture,
) -> Stars:
    """Aperture fluxes of detected stars in every colour, with the median of a ring around as local sky.

    Parameters
    ----------
    planes : list of Plane
        Colours of the frame.
    detection : Detection
        On the luminance in cells, i.e. at frame pixel ``2 x + 0.5``.
    saturation : float
        ADU from which a photosite is not linear.
    peak : ndarray
        ``(ny // 2, nx // 2)`` float32, brightest photosite of every cell, ADU.
    noise : ndarray
        ``(C,)`` sky noise of one cell of each plane, ADU; where that around a star is clearly larger, it counts.
    aperture : Aperture
        Radii in frame pixels.

    Returns
    -------
    Stars
        Only those whose ring lies wholly inside the frame.
    """
    reach = int(np.ceil(aperture.outer / 2)) + 1
    h, w = planes[0].data.shape
    cx, cy = np.rint(detection.x).astype(int), np.rint(detection.y).astype(int)
    inside = (cx >= reach) & (cx < w - reach) & (cy >= reach) & (cy < h - reach)
    cx, cy, x, y = cx[inside], cy[inside], 2 * detection.x[inside] + 0.5, 2 * detection.y[inside] + 0.5
    flux = np.full((len(x), len(planes)), np.nan)
    error = np.full_like(flux, np.nan)
    if not len(x):
        return Stars(x, y, flux, error, np.zeros(0, bool))
    radii = aperture.radius, aperture.inner, aperture.outer
    for c, plane in enumerate(planes):
        places = cx - reach, cy - reach, 2 * reach + 1, x - plane.x0, y - plane.y0
        total, effective, around_it = star_sums(plane.data, *places, *radii)
        # Some sixty differences tell the noise of a ring to 13 %: what is to be told from chance are bright nebulae.
        own = np.where(around_it > _NEBULA * noise[c], around_it, noise[c])
        flux[:, c], error[:, c] = 4 * total, 4 * own * np.sqrt(effective)
    around = np.arange(-reach, reach + 1)
    ys, xs = (cy[:, None] + around)[:, :, None], (cx[:, None] + around)[:, None, :]
    core = peak[ys, xs].reshape(len(x), -1).max(axis=1)
    round_ = (detection.ellipticity < _MAX_ELLIPTICITY) & (detection.fwhm < 2 * detection.typical_fwhm())
    clean = (core < 0.9 * saturation) & np.isfinite(flux).all(axis=1) & round_[inside]
    # All frames see the same neighbours, so that what they add is much the same in each, but for the seeing.
    company = _company(detection, aperture)[inside]
    error = np.hypot(error, _COMPANY_ERROR * company[:, None] * np.abs(flux))
    clean &= company < _MAX_COMPANY
    return Stars(x, y, flux, error, clean)


def _company(detection: Detection, aperture: Aperture) -> NDArray[np.float64]:
    """Flux of the brightest detected neighbour near enough to reach into the aperture, share of the star's own."""
    points = np.c_[detection.x, detection.y]
    pairs = cKDTree(points).query_pairs((aperture.radius + aperture.inner) / 2, output_type="ndarray")
    share = np.zeros(len(points))
    for a, b in (pairs.T, pairs.T[::-1]):
        np.maximum.at(share, a, np.maximum(detection.flux[b], 0) / np.maximum(detection.flux[a], 1e-9))
    return share


def plane_noise(plane: FloatImage) -> float:
    """Sky noise of one pixel of `plane`, ADU: MAD of differences two pixels apart, blind to smooth structure."""
    rows = max(1, plane.shape[0] // 128)  # a hundred rows give it to half a percent
    difference = plane[::rows, 2:] - plane[::rows, :-2]
    return 1.4826 * median(np.abs(difference)) / math.sqrt(2)


def block_medians(planes: list[Plane], cells: int) -> FloatImage:
    """Median of every ``cells x cells`` box of every plane.

    Returns
    -------
    ndarray
        ``(by, bx, C)`` float32; NaN where more than half a box has no data.
    """
    h, w = planes[0].data.shape
    by, bx = h // cells, w // cells
    out = np.empty((by, bx, len(planes)), np.float32)
    if not out.size:
        return out  # smaller than a box
    rows = max(1, _STRIP // cells)  # of boxes at a time: what is sorted are copies
    for c, i in itertools.product(range(len(planes)), range(0, by, rows)):
        strip = planes[c].data[i * cells : min(i + rows, by) * cells, : bx * cells]
        # A vectorised sort, which puts NaN last, is five times as fast as a selection per box.
        boxes = np.sort(strip.reshape(-1, cells, bx, cells).swapaxes(1, 2).reshape(-1, bx, cells**2), axis=-1)
        valid = boxes.shape[-1] - np.isnan(boxes).sum(axis=-1)
        middle = (np.maximum(valid - 1, 0) // 2, np.minimum(valid // 2, boxes.shape[-1] - 1))
        low, high = (np.take_along_axis(boxes, m[..., None], axis=-1)[..., 0] for m in middle)
        out[i : i + rows, :, c] = np.where(2 * valid >= boxes.shape[-1], (low + high) / 2, np.nan)
    return out
