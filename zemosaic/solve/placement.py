"""A frame laid on the sky: which stars meet, how likely that is by accident, and the best linear fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from astropy.wcs import WCS
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from zemosaic.solve.catalogue import Catalogue

COUNTING_RADII = (3.0, 1.5, 0.75)  # pixels, within which stars are said to meet
_AFFINE_FROM = 10  # pairs from which six parameters are fitted instead of four


@dataclass(frozen=True)
class Placement:
    """A linear map from a frame to the plane that touches the sky at a position (gnomonic projection).

    Pixels are counted from the centre of the frame.

    Parameters
    ----------
    ra, dec : float
        Where the plane touches, degrees.
    matrix : ndarray
        ``(2, 2)`` radians (east, north) per pixel (x, y).
    offset : ndarray
        ``(2,)`` radians (east, north): the frame's centre.
    shape : tuple of int
        ``(ny, nx)`` of the frame.
    """

    ra: float
    dec: float
    matrix: NDArray[np.float64]
    offset: NDArray[np.float64]
    shape: tuple[int, int]

    @property
    def scale(self) -> float:
        """Radians per pixel."""
        return math.sqrt(abs(float(np.linalg.det(self.matrix))))

    @property
    def stretch(self) -> float:
        """By how much the scale differs with the direction; 0 for the square pixels of a camera."""
        large, small = np.linalg.svd(self.matrix, compute_uv=False)
        return float(large / small - 1) if small > 0 else math.inf

    @property
    def half(self) -> float:
        """Half the frame's diagonal, degrees."""
        return math.degrees(self.scale) * math.hypot(*self.shape) / 2

    def centre(self) -> tuple[float, float]:
        """Right ascension and declination of the frame's centre, degrees."""
        ra, dec = deproject(self.offset[None], self.ra, self.dec)
        return float(ra[0]), float(dec[0])

    def to_pixels(self, ra: NDArray[np.float64], dec: NDArray[np.float64]) -> NDArray[np.float64]:
        """``(n, 2)`` pixels of positions in degrees."""
        return np.linalg.solve(self.matrix, (project(ra, dec, self.ra, self.dec) - self.offset).T).T

    def inside(self, pixels: NDArray[np.float64], margin: float = 0.0) -> NDArray[np.bool_]:
        """Which pixels lie in the frame, or up to `margin` pixels outside."""
        ny, nx = self.shape
        return np.all(np.abs(pixels) <= np.array([nx, ny]) / 2 + margin, axis=1)

    def to_wcs(self) -> WCS:
        """The same as a TAN WCS."""
        ny, nx = self.shape
        middle = np.array([(nx + 1) / 2, (ny + 1) / 2])
        crpix = middle - np.linalg.solve(self.matrix, self.offset)
        return linear_tan([self.ra, self.dec], crpix, np.degrees(self.matrix), self.shape)


def linear_tan(crval: ArrayLike, crpix: ArrayLike, cd: ArrayLike, shape: tuple[int, int]) -> WCS:
    """A linear TAN WCS, ICRS, of a frame of this ``(ny, nx)``; the numbers are those of FITS."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval, wcs.wcs.crpix, wcs.wcs.cd = crval, crpix, cd
    wcs.wcs.radesys = "ICRS"
    wcs.wcs.set()
    wcs.pixel_shape = shape[::-1]
    return wcs


def project(ra: NDArray[np.float64], dec: NDArray[np.float64], ra0: float, dec0: float) -> NDArray[np.float64]:
    """``(n, 2)`` radians east and north on the plane that touches the sky at ``(ra0, dec0)``, all in degrees.

    Gnomonic projection (Calabretta & Greisen 2002, A&A 395, 1077, section 5.1.3), for positions less than 90 degrees
    away.
    """
    d, d0, da = np.radians(dec), math.radians(dec0), np.radians(ra - ra0)
    depth = np.sin(d) * math.sin(d0) + np.cos(d) * math.cos(d0) * np.cos(da)
    east = np.cos(d) * np.sin(da)
    north = np.sin(d) * math.cos(d0) - np.cos(d) * math.sin(d0) * np.cos(da)
    return np.stack([east / depth, north / depth], axis=-1)


def deproject(plane: NDArray[np.float64], ra0: float, dec0: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Right ascension and declination, degrees, of what `project` returned."""
    east, north = plane.T
    d0 = math.radians(dec0)
    toward = math.cos(d0) - north * math.sin(d0)
    ra = ra0 + np.degrees(np.arctan2(east, toward))
    dec = np.degrees(np.arctan2(math.sin(d0) + north * math.cos(d0), np.hypot(east, toward)))
    return ra % 360, dec


def place(centre: NDArray[np.float64], right: NDArray[np.float64], mirrored: bool, shape: tuple[int, int]) -> Placement:
    """A placement from the directions of the frame's centre and of the point half a diagonal along x from it."""
    (ra, dec), (ra_right, dec_right) = _angles(centre), _angles(right)
    along = project(np.array([ra_right]), np.array([dec_right]), ra, dec)[0] / (math.hypot(*shape) / 2)
    return Placement(ra, dec, _turn(complex(*along), mirrored), np.zeros(2), shape)


def _angles(direction: NDArray[np.float64]) -> tuple[float, float]:
    x, y, z = direction
    return math.degrees(math.atan2(y, x)) % 360, math.degrees(math.atan2(z, math.hypot(x, y)))


def _turn(x_axis: complex, mirrored: bool) -> NDArray[np.float64]:
    """Matrix of a similarity that takes x to `x_axis` and y a right angle anticlockwise of it, or clockwise."""
    y_axis = x_axis * (-1j if mirrored else 1j)
    return np.array([[x_axis.real, y_axis.real], [x_axis.imag, y_axis.imag]])


def brightest_first(
    x: NDArray[np.float64], y: NDArray[np.float64], flux: NDArray[np.float64], shape: tuple[int, int]
) -> NDArray[np.float64]:
    """Stars as ``(n, 2)`` pixels from the centre of the frame, in order of their flux (``(n,)`` or ``(n, C)``).

    Positions that are not finite are left out.
    """
    ny, nx = shape
    points = np.column_stack([x, y]).astype(np.float64).reshape(-1, 2) - [(nx - 1) / 2, (ny - 1) / 2]
    brightness = np.nan_to_num(np.asarray(flux, np.float64))
    brightness = brightness.sum(axis=1) if brightness.ndim == 2 else brightness
    order = np.argsort(-brightness, kind="stable")
    return points[order][np.isfinite(points[order]).all(axis=1)]


@dataclass(frozen=True)
class Fit:
    """A placement and the stars that meet on it.

    Parameters
    ----------
    placement : Placement
        Where the frame is.
    image, catalogue : ndarray
        ``(m,)`` indices of stars that meet.
    distance : ndarray
        ``(m,)`` pixels between them.
    """

    placement: Placement
    image: NDArray[np.int64]
    catalogue: NDArray[np.int64]
    distance: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.distance)

    def __getitem__(self, rows: NDArray) -> Fit:
        return Fit(self.placement, self.image[rows], self.catalogue[rows], self.distance[rows])

    @property
    def rms(self) -> float:
        """Pixels; NaN without stars."""
        return float(np.sqrt(np.mean(self.distance**2))) if len(self) else math.nan


def pair_up(placement: Placement, stars: NDArray[np.float64], catalogue: Catalogue, radius: float) -> Fit:
    """Stars of the frame (``(n, 2)`` pixels) and of the catalogue that are each other's nearest, within `radius`."""
    spots = placement.to_pixels(catalogue.ra, catalogue.dec)
    near = np.flatnonzero(placement.inside(spots, radius))
    if not len(near) or not len(stars):
        none = np.zeros(0, np.int64)
        return Fit(placement, none, none, np.zeros(0))
    distance, mine = cKDTree(stars).query(spots[near])
    back = cKDTree(spots[near]).query(stars[mine])[1]
    good = (distance <= radius) & (back == np.arange(len(near)))
    return Fit(placement, mine[good], near[good], distance[good])


def refit(fit: Fit, stars: NDArray[np.float64], catalogue: Catalogue) -> Placement:
    """Least squares over the stars that meet: shift, rotation and scale, or from ten stars on any linear map.

    The plane is moved to touch the sky at the centre of the frame.
    """
    ra, dec = fit.placement.centre()
    here = stars[fit.image]
    there = project(catalogue.ra[fit.catalogue], catalogue.dec[fit.catalogue], ra, dec)
    from_, to = here - here.mean(axis=0), there - there.mean(axis=0)
    if len(here) >= _AFFINE_FROM:
        # einsum, because sums of a threaded BLAS depend on the number of threads
        matrix = np.linalg.solve(np.einsum("ni,nj->ij", from_, from_), np.einsum("ni,nj->ij", from_, to)).T
    else:
        mirrored = bool(np.linalg.det(fit.placement.matrix) < 0)
        z = from_[:, 0] + (-1j if mirrored else 1j) * from_[:, 1]
        matrix = _turn(complex((z.conj() * (to[:, 0] + 1j * to[:, 1])).sum() / (np.abs(z) ** 2).sum()), mirrored)
    offset = there.mean(axis=0) - np.einsum("ij,j->i", matrix, here.mean(axis=0))
    return replace(fit.placement, ra=ra, dec=dec, matrix=matrix, offset=offset)


def settle(
    placement: Placement, stars: NDArray[np.float64], catalogue: Catalogue, radii: Sequence[float]
) -> Fit | None:
    """Pair up and refit within each of `radii` (pixels) in turn; None where fewer than three stars meet."""
    for radius in radii:
        fit = pair_up(placement, stars, catalogue, radius)
        if len(fit) < 3:
            return None
        placement = refit(fit, stars, catalogue)
    fit = pair_up(placement, stars, catalogue, radii[-1])
    return fit if len(fit) >= 3 else None


def refine(fit: Fit, stars: NDArray[np.float64], catalogue: Catalogue, radii: Sequence[float]) -> Fit:
    """The best linear fit over all stars: within each of `radii` in turn, then without what stands out.

    A blend or a star whose catalogue position is stale must not pull on a fit of few stars: what is farther off than
    3 σ of the rest is left out (σ from the median, which for distances in two dimensions is 1.18 σ).
    """
    last = settle(fit.placement, stars, catalogue, radii) or fit
    for _ in range(3):
        limit = max(3 * float(np.median(last.distance)) / 1.18, 0.3)
        kept = last[last.distance <= limit]
        if len(kept) == len(last) or len(kept) < 3:
            break
        last = pair_up(refit(kept, stars, catalogue), stars, catalogue, min(limit, radii[-1]))
    # The plane touches the sky at the old centre of the frame; a last fit brings it to the new one.
    placement = refit(last, stars, catalogue)
    return pair_up(placement, stars, catalogue, radii[-1])


def log_chance(
    fit: Fit,
    stars: NDArray[np.float64],
    catalogue: Catalogue,
    *,
    free: int | None = None,
    radii: Sequence[float] = COUNTING_RADII,
) -> float:
    """Natural logarithm of a bound on the probability that so many stars meet by accident.

    Were the stars of the frame scattered at random, the meetings within a radius would be a Poisson number. Those that
    the fit brings about by itself do not count: two, or three for six parameters. Of a few choices (all stars or
    the brightest, several radii) the most telling is taken, and paid for by their number.

    Parameters
    ----------
    fit : Fit
        Stars that meet.
    stars : ndarray
        ``(n, 2)`` of the frame, brightest first.
    catalogue : Catalogue
        As for `fit`.
    free : int, optional
        Meetings that do not count, if the placement does not come from a fit to these stars.
    radii : sequence of float
        Pixels within which meetings are counted, each for itself.
    """
    ny, nx = fit.placement.shape
    expected = int(fit.placement.inside(fit.placement.to_pixels(catalogue.ra, catalogue.dec)).sum())
    if free is None:
        free = 3 if len(fit) >= _AFFINE_FROM else 2
    counts = sorted({len(stars), min(len(stars), 2 * expected)})
    best = 0.0
    for count in counts:
        for radius in radii:
            met = int(((fit.image < count) & (fit.distance <= radius)).sum()) - free
            mean = expected * count * math.pi * radius**2 / (nx * ny)
            if met > mean > 0:
                # The terms from `met` on are less than the geometric series of the first two.
                tail = met * math.log(mean) - mean - math.lgamma(met + 1) - math.log1p(-mean / (met + 1))
                best = min(best, tail)
    return best + math.log(len(counts) * len(radii))
