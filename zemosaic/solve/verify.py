"""Is a WCS right? What a header or a sidecar claims, held against the frame's own stars and the catalogue."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray

from zemosaic.solve.catalogue import Catalogue
from zemosaic.solve.placement import COUNTING_RADII, Placement, brightest_first, log_chance, pair_up, project

_RADIUS = 6.0  # pixels, within which stars are compared
_WORST = 1.5  # pixels rms of a WCS that is used as it is
_BEYOND_CHANCE = math.log(1e-6)  # one place is tested, not thousands: less will do than for a solution
_GRID = 9  # points along a side, to find the linear part of a WCS
_FEWEST = 8  # stars on both sides from which missing meetings tell against a WCS
_BRIGHTEST = 300  # catalogue stars looked at


@dataclass(frozen=True)
class Check:
    """What the stars say about a WCS.

    Parameters
    ----------
    state : {"good", "wrong", "unchecked"}
        ``"unchecked"`` if the frame or the catalogue has too few stars here to tell.
    matched : int
        Stars of the frame that are within 6 pixels of a catalogue star.
    expected : int
        As many as there could be: stars of the frame, or of the catalogue in it, whichever are fewer.
    rms : float
        Pixels between them, without what is beyond 3 medians; NaN where stars meet only by chance.
    """

    state: Literal["good", "wrong", "unchecked"]
    matched: int
    expected: int
    rms: float


def verify(
    wcs: WCS,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    flux: NDArray[np.float64],
    shape: tuple[int, int],
    catalogue: Catalogue,
) -> Check:
    """Check a celestial WCS, with or without distortion.

    It is good if more stars meet than by accident and do so within 1.5 pixels rms. It is wrong if they are farther off,
    or if both sides have eight stars and hardly any meet, as when the scale is doubled or the sky mirrored. Subs
    with invented stars fail like that too, and so does a frame of clouds: whether all frames of a set fail, and whether
    `zemosaic.solve.embedded.solve` finds a better place, is for the caller to see.

    Parameters
    ----------
    wcs : WCS
        Two-axis celestial WCS, longitude first.
    x, y : ndarray
        ``(n,)`` stars of the frame, 0-based pixels, in any order.
    flux : ndarray
        ``(n,)`` or ``(n, C)``: the brightest count most.
    shape : tuple of int
        ``(ny, nx)`` of the frame.
    catalogue : Catalogue
        Stars with known positions.
    """
    placement = _linear_part(wcs, shape)
    near = catalogue.cone(*placement.centre(), min(1.1 * placement.half, 80.0))
    near = near[np.sort(np.argsort(near.mag, kind="stable")[:_BRIGHTEST])]
    inside = int(placement.inside(placement.to_pixels(near.ra, near.dec)).sum())
    stars = brightest_first(x, y, flux, shape)
    # More stars than the catalogue shows here are fainter than its faintest, and only add chance pairs.
    stars = _undistorted(wcs, placement, stars[: max(3 * inside, _FEWEST)])
    expected = min(inside, len(stars))
    fit = pair_up(placement, stars, near, _RADIUS)
    if len(fit) and log_chance(fit, stars, near, free=0, radii=(_RADIUS, *COUNTING_RADII)) < _BEYOND_CHANCE:
        # A pair that met by chance, or a blend, must not condemn a WCS.
        rms = fit[fit.distance <= 3 * np.median(fit.distance)].rms
        return Check("good" if rms <= _WORST else "wrong", len(fit), expected, rms)
    return Check("unchecked" if expected < _FEWEST else "wrong", len(fit), expected, math.nan)


def _linear_part(wcs: WCS, shape: tuple[int, int]) -> Placement:
    """The linear map that is nearest to a WCS over the frame."""
    ny, nx = shape
    grid = np.stack(np.meshgrid(np.linspace(-nx / 2, nx / 2, _GRID), np.linspace(-ny / 2, ny / 2, _GRID)), axis=-1)
    pixels = grid.reshape(-1, 2)
    ra, dec = _sky(wcs, np.concatenate([np.zeros((1, 2)), pixels]), shape)
    plane = project(ra[1:], dec[1:], ra[0], dec[0])
    # The grid is symmetric, so that the three terms are independent.
    matrix = np.einsum("ni,nj->ij", plane, pixels) / (pixels**2).sum(axis=0)
    return Placement(float(ra[0]), float(dec[0]), matrix, plane.mean(axis=0), shape)


def _undistorted(wcs: WCS, placement: Placement, stars: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where stars would be on the linear map (pixels from the centre, both)."""
    return placement.to_pixels(*_sky(wcs, stars, placement.shape))


def _sky(
    wcs: WCS, pixels: NDArray[np.float64], shape: tuple[int, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """ICRS positions in degrees of pixels counted from the centre of the frame."""
    ny, nx = shape
    x, y = pixels[:, 0] + (nx - 1) / 2, pixels[:, 1] + (ny - 1) / 2
    core = wcs.wcs
    today = core.radesys == "FK5" and abs(core.equinox - 2000) > 0.01  # NaN, where none is given, is J2000
    if core.lngtyp == "RA" and core.radesys in ("", "ICRS", "FK5") and not today:
        ra, dec = wcs.all_pix2world(x, y, 0)
        return ra, dec
    sky = wcs.pixel_to_world(x, y).icrs
    return sky.ra.deg, sky.dec.deg
