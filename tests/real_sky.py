"""Star lists and frames as a camera would see the real sky: catalogue stars where they are, fainter ones invented."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from zemosaic.solve.catalogue import Catalogue

COUNTS_SLOPE = 0.38  # log10 of the number of stars per magnitude
DETECTED = 400  # stars at most, as `zemosaic.stars.detect` keeps


@dataclass(frozen=True, kw_only=True)
class Camera:
    """What a frame is taken with.

    Parameters
    ----------
    shape : tuple of int
        ``(ny, nx)``.
    scale : float
        Arcseconds per pixel.
    depth : float
        Magnitudes of the faintest star seen below the middle one of the catalogue.
    noise : float
        Of a position, pixels, 1 sigma.
    colour : float
        Scatter of the camera's magnitudes around V_T.
    missed, invented : float
        Share of the stars that are not detected, and of detections that are no stars.
    distortion : float
        Radial, at the corners, pixels.
    cloud : float
        Share of the frame behind a cloud, in which nothing is seen.
    blend : float
        Pixels within which the fainter of two stars is not seen.
    """

    shape: tuple[int, int] = (1920, 1080)
    scale: float = 2.37
    depth: float = 2.0
    noise: float = 0.25
    colour: float = 0.35
    missed: float = 0.05
    invented: float = 0.03
    distortion: float = 0.0
    cloud: float = 0.0
    blend: float = 4.0


@dataclass(frozen=True)
class StarList:
    """What was detected on a frame, in random order, and where the frame is."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    flux: NDArray[np.float64]
    wcs: WCS
    catalogued: int  #: catalogue stars in the frame

    @property
    def x_y_flux(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """What a solver is given."""
        return self.x, self.y, self.flux


def aim(ra: float, dec: float, camera: Camera, *, rotation: float = 0.0, parity: int = 1) -> WCS:
    """TAN WCS of a frame centred on a position; `parity` is the sign of the CD determinant."""
    ny, nx = camera.shape
    cos, sin = math.cos(rotation), math.sin(rotation)
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [ra, dec]
    wcs.wcs.crpix = [(nx + 1) / 2, (ny + 1) / 2]
    wcs.wcs.cd = camera.scale / 3600 * np.array([[cos, -sin], [sin, cos]]) @ np.diag([parity, 1])
    wcs.wcs.set()
    wcs.pixel_shape = (nx, ny)
    return wcs


def anywhere(rng: np.random.Generator) -> tuple[float, float]:
    """A position, all parts of the sky alike."""
    return float(rng.uniform(0, 360)), math.degrees(math.asin(rng.uniform(-1, 1)))


def observe(
    catalogue: Catalogue, ra: float, dec: float, camera: Camera, rng: np.random.Generator, *, parity: int = 0
) -> StarList:
    """A frame at a position, with any rotation; parity 0 is either."""
    wcs = aim(ra, dec, camera, rotation=rng.uniform(0, 2 * math.pi), parity=parity or int(rng.choice([-1, 1])))
    ny, nx = camera.shape
    half = camera.scale * math.hypot(nx, ny) / 7200
    around = catalogue.cone(ra, dec, max(1.02 * half, 1.0))
    pixels = wcs.wcs_world2pix(np.c_[around.ra, around.dec], 0)
    inside = (np.abs(pixels - [(nx - 1) / 2, (ny - 1) / 2]) < [nx / 2, ny / 2]).all(axis=1)
    middle = float(np.median(around.mag))
    limit = middle + camera.depth
    faint = _faint_stars(
        around, max(1.02 * half, 1.0), nx * ny * (camera.scale / 3600) ** 2, middle, limit, inside, rng
    )
    points = np.concatenate([pixels[inside], rng.uniform(0, [nx, ny], (len(faint), 2))])
    mag = np.concatenate([around.mag[inside], faint])
    mag = mag + rng.normal(0, camera.colour, len(mag))
    seen = (rng.random(len(mag)) > camera.missed) & (mag < limit) & (points[:, 0] >= camera.cloud * nx)
    points, mag = points[seen], mag[seen]
    phantoms = int(camera.invented * len(mag))
    points = np.concatenate([points, rng.uniform(0, [nx, ny], (phantoms, 2))])
    mag = np.concatenate([mag, rng.choice(mag, phantoms)]) if phantoms else mag
    bright = np.argsort(mag, kind="stable")
    bright = bright[_alone(points[bright], camera.blend)][:DETECTED]
    points = _distort(points, camera) + rng.normal(0, camera.noise, points.shape)
    order = rng.permutation(bright)
    return StarList(*points[order].T, 10 ** (-0.4 * (mag[order] - 20)), wcs, int(inside.sum()))


def _faint_stars(
    around: Catalogue,
    radius: float,
    area: float,
    middle: float,
    limit: float,
    inside: NDArray[np.bool_],
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Magnitudes of stars that the catalogue lacks: counts go on as in its brighter half."""
    sky = 2 * math.pi * math.degrees(1) ** 2 * (1 - math.cos(math.radians(radius)))
    more = 10 ** (COUNTS_SLOPE * (limit - middle)) - 1
    known = int(((around.mag > middle) & (around.mag < limit) & inside).sum())
    count = max(rng.poisson(0.5 * len(around) / sky * area * more) - known, 0)
    return middle + np.log10(1 + more * rng.random(count)) / COUNTS_SLOPE


def _alone(points: NDArray[np.float64], radius: float) -> NDArray[np.bool_]:
    """Which of `points`, brightest first, have no brighter one near."""
    alone = np.ones(len(points), bool)
    alone[cKDTree(points).query_pairs(radius, output_type="ndarray").max(axis=1, initial=0)] = False
    alone[:1] = True
    return alone


def _distort(points: NDArray[np.float64], camera: Camera) -> NDArray[np.float64]:
    """Radial distortion with the cube of the distance from the centre."""
    ny, nx = camera.shape
    outward = (points - [(nx - 1) / 2, (ny - 1) / 2]) / (math.hypot(nx, ny) / 2)
    return points + camera.distortion * (outward**2).sum(axis=1)[:, None] * outward


def off(wcs: WCS, truth: WCS) -> float:
    """Pixels rms by which a WCS is off, over the frame of `truth`."""
    nx, ny = truth.pixel_shape
    grid = np.stack(np.meshgrid(np.linspace(0, nx - 1, 11), np.linspace(0, ny - 1, 11)), axis=-1).reshape(-1, 2)
    sky = truth.all_pix2world(grid, 0)
    with np.errstate(invalid="ignore"):
        found = wcs.wcs_world2pix(sky, 0)
    return float(np.sqrt(np.nan_to_num(((found - grid) ** 2).sum(axis=1), nan=1e12).mean()))


def render(
    stars: StarList, shape: tuple[int, int], rng: np.random.Generator, *, fwhm: float = 3.0
) -> NDArray[np.float32]:
    """``(ny, nx)`` pixels of a frame: a Gaussian for every star, on a sky of 600 with its noise."""
    ny, nx = shape
    image = rng.normal(600, 25, shape)
    sigma, reach = fwhm / 2.3548, math.ceil(3 * fwhm)
    light = 2e3 * stars.flux / np.sort(stars.flux)[len(stars.flux) // 10]
    for x, y, total in zip(stars.x, stars.y, light, strict=True):
        rows = np.arange(max(0, round(y) - reach), min(ny, round(y) + reach + 1))[:, None]
        columns = np.arange(max(0, round(x) - reach), min(nx, round(x) + reach + 1))
        spread = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * sigma**2)) / (2 * math.pi * sigma**2)
        image[rows, columns] += total * spread
    return np.clip(image, 0, 65535).astype(np.float32)
