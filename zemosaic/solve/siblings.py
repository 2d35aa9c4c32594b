"""A frame too shallow to be recognised, placed by what frames of the same camera and night have in common.

Those that were solved tell the scale, the parity, how the camera was turned and by how much headers point beside the
truth. With that only a small shift and a small turn are left to find, and four stars are proof enough where the whole
sky would ask for eight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from zemosaic.solve.catalogue import Catalogue
from zemosaic.solve.placement import Fit, Placement, deproject, log_chance, pair_up, project, refine

Floats = NDArray[np.float64]

_FEWEST_SIBLINGS = 2
_LEAST_SHIFT = 0.05  # degrees: how far siblings' pointings are believed to agree at best
_SHIFT_SPREADS = 4.0  # of their scatter that is searched
_LEAST_TURN = math.radians(1.5)
_CERTAIN = math.log(1e-6)  # chance of an accident, tries counted
_BIN = 3.0  # pixels within which shifts count as one
_REFINE_RADII = (4.0, 3.0, 2.0)  # pixels
_CANDIDATES = 3  # shifts looked at per angle


@dataclass(frozen=True, eq=False)
class Sibling:
    """A frame of the same camera that was solved.

    Parameters
    ----------
    wcs : WCS
        Its solution, `pixel_shape` set.
    pointing : tuple of float
        What its header says, right ascension and declination in degrees.
    """

    wcs: WCS
    pointing: tuple[float, float]


def place_among(
    stars: Floats,
    shape: tuple[int, int],
    pointing: tuple[float, float],
    siblings: Sequence[Sibling],
    catalogue: Catalogue,
) -> WCS | None:
    """Where a frame is; None if no place is beyond doubt.

    Parameters
    ----------
    stars : ndarray
        ``(n, 2)`` pixels from the centre of the frame, brightest first.
    shape : tuple of int
        ``(ny, nx)``.
    pointing : tuple of float
        What its header says, degrees, in the same equinox as those of the siblings.
    siblings : sequence of Sibling
        At least two, of one camera and parity; else None.
    catalogue : Catalogue
        Stars with known positions.
    """
    known = [_known(sibling) for sibling in siblings]
    if len(known) < _FEWEST_SIBLINGS or len({k.mirrored for k in known}) > 1 or len(stars) < 3:
        return None
    shift = np.median([k.shift for k in known], axis=0)
    spread = float(np.max([np.hypot(*(k.shift - shift)) for k in known]))
    reach = max(_LEAST_SHIFT, math.degrees(_SHIFT_SPREADS * spread))
    ra, dec = (float(v[0]) for v in deproject(shift[None], *pointing))
    scale = float(np.median([k.scale for k in known]))
    near = catalogue.cone(ra, dec, reach + math.degrees(scale) * math.hypot(*shape) / 2)
    if len(near) < 3:
        return None
    angles = _angles(known, scale, shape)
    best, best_chance = None, 0.0
    tries = len(angles) * max(1.0, (math.radians(2 * reach) / scale / _BIN) ** 2)
    for angle in angles:
        turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        matrix = turn @ np.diag([1.0, -1.0]) if known[0].mirrored else turn
        for offset in _shifts(stars, project(near.ra, near.dec, ra, dec), matrix, math.radians(reach)):
            fit = _fit(Placement(ra, dec, matrix, offset, shape), stars, near)
            if fit is None:
                continue
            chance = log_chance(fit, stars, near, free=0) + math.log(tries)
            if chance < best_chance:
                best, best_chance = fit.placement, chance
    return best.to_wcs() if best is not None and best_chance < _CERTAIN else None


@dataclass(frozen=True)
class _Known:
    scale: float  # radians per pixel
    mirrored: bool
    angle: float  # of the x axis, from east
    shift: Floats  # from header to sky, radians east and north


def _known(sibling: Sibling) -> _Known:
    nx, ny = sibling.wcs.pixel_shape
    middle = np.array([[(nx - 1) / 2, (ny - 1) / 2]])
    points = middle + np.array([[0.0, 0.0], [nx / 4, 0.0], [0.0, ny / 4]])
    ra, dec = sibling.wcs.all_pix2world(points, 0).T
    plane = project(ra, dec, ra[0], dec[0])
    matrix = np.stack([plane[1] / (nx / 4), plane[2] / (ny / 4)], axis=1)
    shift = project(ra[:1], dec[:1], *sibling.pointing)[0]
    angle = math.atan2(matrix[1, 0], matrix[0, 0])
    determinant = float(np.linalg.det(matrix))
    return _Known(math.sqrt(abs(determinant)), determinant < 0, angle, shift)


def _angles(known: Sequence[_Known], scale: float, shape: tuple[int, int]) -> Floats:
    """Angles to try: those of the siblings and a little beyond, in steps of two pixels at the corners."""
    direction = np.exp(1j * np.array([k.angle for k in known]))
    middle = np.angle(direction.mean())
    spread = np.abs(np.angle(direction / np.exp(1j * middle))).max()
    reach = max(_LEAST_TURN, 1.5 * float(spread))
    step = 4.0 / math.hypot(*shape)
    return middle + step * np.arange(-math.ceil(reach / step), math.ceil(reach / step) + 1)


def _shifts(stars: Floats, sky: Floats, matrix: Floats, reach: float) -> list[Floats]:
    """Offsets on the plane, at most `reach` from 0, that bring most pairs of stars together."""
    there = stars @ matrix.T
    offsets = (sky[:, None, :] - there[None, :, :]).reshape(-1, 2)
    offsets = offsets[np.hypot(*offsets.T) <= reach]
    if len(offsets) < 3:
        return []
    radius = _BIN * math.sqrt(abs(np.linalg.det(matrix)))
    tree = cKDTree(offsets)
    count = tree.query_ball_point(offsets, radius, return_length=True)
    order = np.argsort(-count, kind="stable")[:_CANDIDATES]
    return [offsets[tree.query_ball_point(offsets[i], radius)].mean(axis=0) for i in order if count[i] >= 3]


def _fit(start: Placement, stars: Floats, near: Catalogue) -> Fit | None:
    fit = pair_up(start, stars, near, 2 * _BIN)
    return refine(fit, stars, near, _REFINE_RADII) if len(fit) >= 3 else None
