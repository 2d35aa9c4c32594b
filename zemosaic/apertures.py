"""Light of single stars: sums in apertures, and the circles that hold half of it.

Loops over the few pixels of every star, compiled as `zemosaic.compiled` says.
"""

from __future__ import annotations

import math

import numpy as np

from zemosaic.compiled import compiled

_RINGS = 256  # equal in area, in which the light around a star is counted
_SIGMA = 1.4826 / math.sqrt(2)  # of normal values, over the median distance between two of them
_PARTS = 5  # along each side of a pixel ...
_NEAR = 3.5  # ... so near to a star


@compiled
def star_sums(plane, corner_x, corner_y, side, x, y, radius, inner, outer):  # type: ignore[no-untyped-def]
    """Sum over the local sky of every star in one plane of cells, two pixels wide each.

    Parameters
    ----------
    plane : ndarray
        ``(h, w)`` float32.
    corner_x, corner_y : ndarray
        ``(n,)`` int64 first column and row of a star's box.
    side : int
        Cells along a side of the boxes; they lie in the plane.
    x, y : ndarray
        ``(n,)`` float64 positions of the stars, pixels from the centre of the plane's first cell.
    radius, inner, outer : float
        Aperture and sky ring, pixels.

    Returns
    -------
    total : ndarray
        ``(n,)`` float64, cell values over the median of the ring; NaN if any cell of the box is missing. A cell that
        the circle cuts counts by how far its centre lies inside.
    effective : ndarray
        ``(n,)`` float64, sum of the squared shares with which cells counted.
    noise : ndarray
        ``(n,)`` float64, noise of a cell of the ring, as `zemosaic.stars.plane_noise` has it; 0 if that is unknown.
    """
    total, effective, noise = np.empty(len(x)), np.empty(len(x)), np.zeros(len(x))
    ring, apart = np.empty(side * side, np.float32), np.empty(side * side, np.float32)
    nearest, farthest, rim = inner * inner, outer * outer, (radius + 1) * (radius + 1)
    for star in range(len(x)):
        light = counted = squares = 0.0
        known = pairs = 0
        for v in range(corner_y[star], corner_y[star] + side):
            down = 2.0 * v - y[star]
            for u in range(corner_x[star], corner_x[star] + side):
                sample = plane[v, u]
                if math.isnan(sample):
                    light = np.nan
                    continue
                along = 2.0 * u - x[star]
                square = along * along + down * down
                if square < rim:
                    share = min((radius - math.sqrt(square)) / 2 + 0.5, 1.0)
                    light += sample * share
                    counted += share
                    squares += share * share
                if nearest <= square <= farthest:
                    ring[known] = sample
                    known += 1
                    if u >= corner_x[star] + 2 and nearest <= (along - 4.0) ** 2 + down * down <= farthest:
                        apart[pairs] = abs(sample - plane[v, u - 2])
                        pairs += 1
        total[star] = light - counted * np.median(ring[:known]) if known else np.nan
        effective[star] = squares
        if pairs:
            noise[star] = _SIGMA * np.median(apart[:pairs])
    return total, effective, noise


@compiled
def half_light_radii(image, x, y, reach):  # type: ignore[no-untyped-def]
    """Radius of the circle that holds half of the light within `reach` of every star.

    Parameters
    ----------
    image : ndarray
        ``(h, w)`` float32, the background taken off.
    x, y : ndarray
        ``(n,)`` float64 positions, pixels.
    reach : float
        Pixels.

    Returns
    -------
    ndarray
        ``(n,)`` float64 pixels; 0 where the circle holds no light, NaN where it does not lie in the image.
    """
    h, w = image.shape
    radii = np.full(len(x), np.nan)
    rings = np.empty(_RINGS)
    for star in range(len(x)):
        if not (reach <= x[star] <= w - 1 - reach and reach <= y[star] <= h - 1 - reach):
            continue
        left, top = math.floor(x[star] - reach), math.floor(y[star] - reach)
        box = image[top : math.ceil(y[star] + reach) + 1, left : math.ceil(x[star] + reach) + 1]
        radii[star] = _half_light(box, x[star] - left, y[star] - top, reach, _NEAR, rings)
        if radii[star] > _NEAR - 1:
            radii[star] = _half_light(box, x[star] - left, y[star] - top, reach, reach, rings)
    return radii


@compiled
def _half_light(box, x, y, reach, near, rings):  # type: ignore[no-untyped-def]
    """The same for one star.

    Pixels nearer than `near` are counted in parts, by the ring that the middle of a part lies in. Rings have equal
    areas, so that light which is spread evenly grows in proportion to their number.
    """
    rings[:] = 0
    per_area = len(rings) / (reach * reach)
    for v in range(box.shape[0]):
        for u in range(box.shape[1]):
            down, along = v - y, u - x
            parts = _PARTS if down * down + along * along < near * near else 1
            light = box[v, u] / (parts * parts)
            for i in range(parts):
                below = down + (i + 0.5) / parts - 0.5
                for j in range(parts):
                    beside = along + (j + 0.5) / parts - 0.5
                    ring = int((below * below + beside * beside) * per_area)
                    if ring < len(rings):
                        rings[ring] += light
    half = rings.sum() / 2
    before, ring = 0.0, 0
    while ring < len(rings) - 1 and before + rings[ring] < half:
        before += rings[ring]
        ring += 1
    if half > 0 and rings[ring] > 0:
        return math.sqrt((ring + (half - before) / rings[ring]) / per_area)
    return 0.0
