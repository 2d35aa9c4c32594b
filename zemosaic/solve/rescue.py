"""Find the place of a frame among the stars of others: for frames whose WCS is wrong, or that have none.

The neighbours' stars are a deeper catalogue than any that is shipped, so a frame too shallow or too clouded for that
can still be placed.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from zemosaic.solve.catalogue import Catalogue
from zemosaic.solve.match import Sky, find_places, sky_triangles, thin_out
from zemosaic.solve.placement import Placement, log_chance, place, settle
from zemosaic.solve.pointing import Camera, tangent_axes
from zemosaic.sphere import to_vectors

Floats = NDArray[np.float64]

_BRIGHTEST = (40, 100, 250)  # stars of a frame whose triangles are tried, one after the other
_PLACES = 12  # places looked at per try
_NEIGHBOURS = 8  # of a star that it forms triangles with
_RADII = (12.0, 6.0, 3.0, 2.0)  # pixels: a place is refined on the stars within
_FEWEST = 6  # stars
_CHANCE = math.log(1e-12)  # of an agreement that is no accident
_STRETCH = 0.01  # no camera has pixels less square than that


class Targets:
    """Stars to place frames among.

    Parameters
    ----------
    directions : ndarray
        ``(S, 3)`` unit vectors.
    brightness : ndarray
        ``(S,)`` in any unit that orders them.
    """

    def __init__(self, directions: Floats, brightness: Floats) -> None:
        x, y, z = directions.T
        ra, dec = np.degrees(np.arctan2(y, x)) % 360, np.degrees(np.arcsin(np.clip(z, -1, 1)))
        self._stars = Catalogue(ra, dec, -brightness)
        self._skies: dict[tuple[int, int], Sky] = {}

    def __len__(self) -> int:
        return len(self._stars)

    def find(
        self, flux: Floats, position: Floats, camera: Camera, scale: tuple[float, float]
    ) -> tuple[Floats, Floats] | None:
        """Direction ``(3,)`` and matrix ``(2, 2)`` of a frame, as in `Pointings`; None where no place is beyond doubt.

        Parameters
        ----------
        flux : ndarray
            ``(n,)`` brightness of its stars.
        position : ndarray
            ``(n, 2)`` where they would be without distortion, pixels from the centre.
        camera : Camera
        scale : tuple of float
            Smallest and largest possible, radians per pixel.
        """
        stars = position[np.argsort(-flux, kind="stable")]
        if len(stars) < _FEWEST:
            return None
        side = math.degrees(math.sqrt(scale[0] * scale[1] * math.prod(camera.shape)))
        for count in _BRIGHTEST:
            sky = self._sky(side, count)
            places = find_places(sky, stars[:count], camera.reach, scale, limit=_PLACES)
            for centre, right, mirrored in zip(places.centre, places.right, places.mirrored, strict=True):
                found = self._settled(place(centre, right, bool(mirrored), camera.shape), stars, places.pairs)
                if found is not None:
                    return _as_pointing(found)
            if count >= len(stars):
                break
        return None

    def _sky(self, side: float, count: int) -> Sky:
        """Triangles of the `count` brightest stars of every cell of about `side` degrees."""
        step = round(4 * math.log(side))  # frames of nearly one size share them
        if (step, count) not in self._skies:
            side = math.exp(step / 4)
            bright = self._stars[thin_out(self._stars, side, count)]
            self._skies[step, count] = sky_triangles(bright, _NEIGHBOURS)
        return self._skies[step, count]

    def _settled(self, start: Placement, stars: Floats, pairs: int) -> Placement | None:
        """A place refined on ever closer stars; None if that many could meet by accident."""
        around = 1.2 * math.degrees(start.scale) * math.hypot(*start.shape) / 2
        near = self._stars.cone(start.ra, start.dec, around)
        fit = settle(start, stars, near, _RADII)
        if fit is None or len(fit.image) < _FEWEST or fit.placement.stretch > _STRETCH:
            return None
        return fit.placement if log_chance(fit, stars, near) + math.log(max(pairs, 1)) < _CHANCE else None


def _as_pointing(found: Placement) -> tuple[Floats, Floats]:
    """Direction of the centre, and the matrix on the axes of `tangent_axes` instead of east and north.

    Only rotation and scale of the matrix are kept: shear fitted to stars in one corner runs wild in the others.
    """
    ra, dec = (math.radians(a) for a in found.centre())
    direction = to_vectors(*np.degrees([[ra], [dec]]))[0]
    east = [-math.sin(ra), math.cos(ra), 0.0]
    north = [-math.sin(dec) * math.cos(ra), -math.sin(dec) * math.sin(ra), math.cos(dec)]
    matrix = tangent_axes(direction) @ np.array([east, north]).T @ found.matrix
    parity = math.copysign(1, np.linalg.det(matrix))
    along, across = (matrix[0, 0] + parity * matrix[1, 1]) / 2, (matrix[1, 0] - parity * matrix[0, 1]) / 2
    return direction, np.array([[along, -parity * across], [across, parity * along]])
