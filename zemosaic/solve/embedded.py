"""The embedded plate solver: near the hints, then wider, then anywhere on the sky. Offline and deterministic.

A solution must bring so many stars together that the chance of an accident, times the number of places that were tried,
is below 1e-12, and its scale must fit. The best of 1,000 lists of random points came to 1e-6 (`benchmarks/solve.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray

from zemosaic.solve.catalogue import Catalogue
from zemosaic.solve.hint import Hint
from zemosaic.solve.match import LOOSEST, Places, Sky, find_places, sky_triangles, thin_out
from zemosaic.solve.placement import Fit, Placement, brightest_first, log_chance, place, refine, settle

#: Natural logarithm of the odds against an accident that a solution must have.
CERTAIN = -math.log(1e-12)
_ARCSEC = math.radians(1 / 3600)
_FULL_SKY = 4 * math.pi * math.degrees(1) ** 2  # square degrees
_SCALES = (0.4 * _ARCSEC, 30 * _ARCSEC)  # radians per pixel, where nothing is known of the scale
_FEWEST = 4  # stars with which it is worth trying
_WIDER = (1, 3, 10)  # times the radius of the hint
_FARTHEST = 15.0  # degrees around a hint; beyond, the index of the whole sky is as good
_LARGEST_FIELD = 30.0  # degrees across; a header with less focal length than that is mistaken
_STRETCH = 0.01  # pixels are square, and refraction is less than that
_PLACES = 12  # fullest places that are looked at
_BRIGHTEST = 300  # catalogue stars that meetings are counted on
_BLIND_TOLERANCE = 0.004  # of ratios of sides: the fewer chance pairs, the faster
_REFINE_RADII = (6.0, 3.0, 2.0)  # pixels


@dataclass(frozen=True)
class _Level:
    """A density to thin the catalogue to: the `count` brightest stars of every cell of `side` degrees."""

    side: float
    count: int

    @property
    def density(self) -> float:
        """Stars per square degree."""
        return self.count / self.side**2


# Triangles are alike when both sides know the same stars, so the density must follow the size of the field. With 12 to
# 48 stars in a frame these serve fields from 0.2 to 50 square degrees.
_LEVELS = (_Level(1.5, 4), _Level(0.75, 4), _Level(0.4, 4), _Level(0.4, 12))
_COUNTS = (24, 12, 48)
_COUNT_SPREAD = 1.4  # in scale, around that at which a level shows this number of stars


class SolveError(Exception):
    """A frame that was not found on the sky; the message says how many stars it has and what was tried."""


@dataclass(frozen=True)
class Solution:
    """Where a frame is.

    Parameters
    ----------
    wcs : WCS
        Linear TAN, of pixels of the frame, `pixel_shape` set.
    matched : int
        Catalogue stars that it was fitted to.
    rms : float
        Pixels between them and the stars of the frame.
    log_odds : float
        Natural logarithm of the odds against an accident, 27.6 at least.
    tried : tuple of str
        Where was looked, the last is where it was found.
    """

    wcs: WCS
    matched: int
    rms: float
    log_odds: float
    tried: tuple[str, ...]


@dataclass(frozen=True)
class _Attempt:
    """Places found in one way of looking, and what a solution from them must fulfil."""

    name: str
    places: Places
    catalogue: Catalogue
    scales: tuple[float, float]


def solve(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    flux: NDArray[np.float64],
    shape: tuple[int, int],
    hints: Sequence[Hint],
    catalogue: Catalogue,
    *,
    wider: bool = True,
    blind: bool = True,
    certain: float = CERTAIN,
) -> Solution:
    """Find a frame on the sky by its stars.

    Parameters
    ----------
    x, y : ndarray
        ``(n,)`` stars of the frame, 0-based pixels, in any order.
    flux : ndarray
        ``(n,)`` or ``(n, C)``, in any unit: the brightest are used first.
    shape : tuple of int
        ``(ny, nx)`` of the frame.
    hints : sequence of Hint
        Where to look first; all are tried, then all wider.
    catalogue : Catalogue
        Stars with known positions: `load_catalogue`, or any other for hinted solving.
    wider : bool
        Whether to look further around the hints than they say, after that.
    blind : bool
        Whether to look at the whole sky in the end. The index for that is built once per process and catalogue (a few
        seconds, some 150 MB for each of up to four sizes of fields) and shared by all threads.
    certain : float
        Natural logarithm of the odds against an accident that are asked for.

    Raises
    ------
    SolveError
        If no place is good enough.
    """
    stars = brightest_first(x, y, flux, shape)
    if len(stars) < _FEWEST:
        raise SolveError(f"its {len(stars)} stars are too few to find it on the sky")
    tried: dict[str, None] = {}
    pairs = 1
    for attempt in _attempts(stars, shape, hints, catalogue, _WIDER if wider else _WIDER[:1], blind):
        tried[attempt.name] = None
        pairs += attempt.places.pairs
        for fit in _candidates(attempt, stars, shape):
            odds = -log_chance(fit, stars, _neighbourhood(attempt.catalogue, fit.placement)) - math.log(pairs)
            if odds >= certain:
                near = attempt.catalogue.cone(*fit.placement.centre(), 1.1 * fit.placement.half)
                best = refine(fit, stars, near, _REFINE_RADII)
                return Solution(best.placement.to_wcs(), len(best), best.rms, odds, tuple(tried))
    raise SolveError(f"no place on the sky fits its {len(stars)} stars (tried: {', '.join(tried) or 'nothing'})")


def _candidates(attempt: _Attempt, stars: NDArray[np.float64], shape: tuple[int, int]) -> Iterator[Fit]:
    """Fits at the places of an attempt, of those where three stars meet and the scale is right."""
    half = math.hypot(*shape) / 2
    # A place is known to a percent of the frame, but no farther than that one star in four meets another by accident.
    crowded = math.sqrt(0.25 * shape[0] * shape[1] / (math.pi * len(stars)))
    first = max(min(max(8.0, 0.012 * half), crowded), 3.0)
    found = attempt.places
    for centre, right, mirrored in zip(found.centre, found.right, found.mirrored, strict=True):
        start = place(centre, right, bool(mirrored), shape)
        fit = settle(start, stars, _neighbourhood(attempt.catalogue, start), (first, 5.0, 3.0))
        if fit is not None and fit.placement.stretch < _STRETCH:
            low, high = attempt.scales
            if low <= fit.placement.scale <= high:
                yield fit


def _neighbourhood(catalogue: Catalogue, placement: Placement) -> Catalogue:
    """The brightest stars in and just around a frame."""
    near = catalogue.cone(*placement.centre(), 1.1 * placement.half)
    return near[np.sort(np.argsort(near.mag, kind="stable")[:_BRIGHTEST])]


def _attempts(
    stars: NDArray[np.float64],
    shape: tuple[int, int],
    hints: Sequence[Hint],
    catalogue: Catalogue,
    factors: Sequence[float],
    blind: bool,
) -> Iterator[_Attempt]:
    likely = [hint for hint in hints if hint.scale is None or _is_possible(hint.scale, shape)]
    for factor in factors:
        for hint in likely:
            radius = factor * min(hint.radius, _FARTHEST)
            if hint.ra is None or hint.dec is None or radius > _FARTHEST:
                continue
            if hint.scale is not None:
                yield from _near(stars, shape, hint, radius, catalogue)
            elif factor < _WIDER[-1]:  # all levels of a large circle cost as much as the whole sky
                yield from _near_at_any_scale(stars, shape, hint, radius, catalogue)
    if blind:
        for scale, error in dict.fromkeys((h.scale, h.scale_error) for h in likely):
            if scale is not None:
                yield from _anywhere(stars, shape, scale, error, catalogue)
        name = "the whole sky at any scale"
        for count in _COUNTS:
            for number, level in enumerate(_LEVELS):
                scales = _scales(level, count, shape)
                if scales[0] < scales[1]:
                    sky = _whole_sky(catalogue, number)
                    yield _look(name, sky, stars[:count], shape, scales, catalogue, _BLIND_TOLERANCE)


def _is_possible(scale: float, shape: tuple[int, int]) -> bool:
    """Whether a scale in arcseconds per pixel can be that of a camera: focal lengths of headers may be in any unit."""
    return scale > _SCALES[0] / _ARCSEC / 10 and scale * max(shape) < 3600 * _LARGEST_FIELD


def _near(
    stars: NDArray[np.float64], shape: tuple[int, int], hint: Hint, radius: float, catalogue: Catalogue
) -> Iterator[_Attempt]:
    """Around a hint, at its scale: first with as many stars as the catalogue has in a frame, then with more."""
    assert hint.ra is not None and hint.dec is not None and hint.scale is not None
    scale = math.degrees(hint.scale * _ARCSEC)
    scales = hint.scale * _ARCSEC * (1 - hint.scale_error), hint.scale * _ARCSEC * (1 + hint.scale_error)
    area = shape[0] * shape[1] * scale**2
    half = scale * math.hypot(*shape) / 2
    reach = min(radius + half, 180.0)
    around = catalogue.cone(hint.ra, hint.dec, min(reach + 1.2 * half, 180.0))  # all stars of any frame found
    local = around.cone(hint.ra, hint.dec, reach)
    in_frame = len(local) * area / (_FULL_SKY * math.sin(math.radians(reach) / 2) ** 2)
    name = f"within {radius:.3g}° of {hint.ra:.2f}° {hint.dec:+.2f}°"
    skies: dict[int, Sky] = {}
    for factor in (1, 2, 4):
        count = max(6, round(factor * min(in_frame, 30)))
        rows = thin_out(local, math.sqrt(area) / 2, max(2, round(count / 4)))
        if len(rows) not in skies:  # where the catalogue has no more to give, it is the same sky again
            skies[len(rows)] = sky_triangles(local[rows], 6)
        yield _look(name, skies[len(rows)], stars[:count], shape, scales, around)


def _near_at_any_scale(
    stars: NDArray[np.float64], shape: tuple[int, int], hint: Hint, radius: float, catalogue: Catalogue
) -> Iterator[_Attempt]:
    assert hint.ra is not None and hint.dec is not None
    name = f"within {radius:.3g}° of {hint.ra:.2f}° {hint.dec:+.2f}° at any scale"
    skies: dict[_Level, Sky] = {}
    for count in _COUNTS:
        for level in _LEVELS:
            scales = _scales(level, count, shape)
            if scales[0] >= scales[1]:
                continue
            if level not in skies:
                # As far as the largest field of this level reaches.
                reach = radius + math.sqrt(2 * max(_COUNTS) / level.density)
                local = catalogue.cone(hint.ra, hint.dec, min(reach, 180.0))
                skies[level] = sky_triangles(local[thin_out(local, level.side, level.count)], 6)
            yield _look(name, skies[level], stars[:count], shape, scales, catalogue)


def _anywhere(
    stars: NDArray[np.float64], shape: tuple[int, int], scale: float, error: float, catalogue: Catalogue
) -> Iterator[_Attempt]:
    """On the whole sky at a known scale: with the density that shows some 25 stars first, then with others."""
    scales = scale * _ARCSEC * (1 - error), scale * _ARCSEC * (1 + error)
    area = shape[0] * shape[1] * math.degrees(scale * _ARCSEC) ** 2
    counts = [(number, round(level.density * area)) for number, level in enumerate(_LEVELS)]
    for number, count in sorted(counts, key=lambda item: abs(math.log(max(item[1], 1) / 25))):
        if 8 <= count <= 120:
            sky = _whole_sky(catalogue, number)
            name = f"the whole sky at {scale:.2f}″ per pixel"
            yield _look(name, sky, stars[:count], shape, scales, catalogue, _BLIND_TOLERANCE)


def _scales(level: _Level, count: int, shape: tuple[int, int]) -> tuple[float, float]:
    """Scales (radians per pixel) at which a frame shows about `count` stars of a level."""
    scale = math.radians(math.sqrt(count / level.density / (shape[0] * shape[1])))
    return max(scale / _COUNT_SPREAD, _SCALES[0]), min(scale * _COUNT_SPREAD, _SCALES[1])


def _look(
    name: str,
    sky: Sky,
    stars: NDArray[np.float64],
    shape: tuple[int, int],
    scales: tuple[float, float],
    catalogue: Catalogue,
    tolerance: float = LOOSEST,
) -> _Attempt:
    places = find_places(sky, stars, math.hypot(*shape) / 2, scales, tolerance=tolerance, limit=_PLACES)
    return _Attempt(name, places, catalogue, scales)


_building = Lock()


def _whole_sky(catalogue: Catalogue, number: int) -> Sky:
    """The index of a level; threads that need it at the same time wait for one of them to build it."""
    with _building:
        return _build(catalogue, number)


@lru_cache(maxsize=len(_LEVELS))
def _build(catalogue: Catalogue, number: int) -> Sky:
    level = _LEVELS[number]
    return sky_triangles(catalogue[thin_out(catalogue, level.side, level.count)], 4)
