"""Photometry: do lots, and the mosaic itself, agree about the brightness of the stars?

A star's magnitude in the mosaic is wrong by three things, which are measured without any catalogue:

* the noise of the frames' mean: what the photons of each star and the floor of a measurement make of it, times how much
  more (or less) two halves of the frames (every other one that saw the star) differ than that;
* the lots' zero points: `zemosaic.report.lots`, both their offsets and how well these are known (a run that has been
  fitted to the stars that lots share shows no offset, but an error it has);
* what stacking did to the star: the mosaic's flux against the mean of the frames' fluxes, both in one aperture.

The last two, added up star by star, are the map of the zero point over the field; with the light that an aperture of
the usual size misses, which is another share where a lot is blurred.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from zemosaic.report.astrometry import match_catalogue
from zemosaic.report.evidence import Evidence, Floats, Ints
from zemosaic.report.lots import (
    BRIGHT,
    Matched,
    Offsets,
    agreeing,
    average,
    combined,
    lot_offsets,
    plain,
    shares,
    stacked_offsets,
    wholly_seen,
)
from zemosaic.report.surface import MosaicStars, robust_sigma
from zemosaic.tiles import FloatImage

GRID = 6  # cells of the zero-point map along each side, as in the project's scorer
MMAG = 1000.0
_FAINT = 12.0  # signal to noise that still helps to tie lots together
_DIM = 30.0  # ... where there are too few of them
_WANTED = 30  # stars that repeatability is measured with, if there are as many
_LEAST = 10  # below which it is not
_FLOOR = 0.01  # mag, of a single measurement: sampling, flat field, seeing
_STACKING = 0.002  # mag, floor of what stacking does to a single star
_SYSTEMATIC = 1.0  # mmag, to which lots can be compared at best: seeing, flat field, neighbours
_STATED = 5.0  # degrees of freedom that the stated errors of magnitudes are worth
_CELLS = 5  # cells from which they say something about the field
_CELL_STARS = 3  # stars from which a cell of the map is more than chance
_MEDIAN = 1.25  # scatter of a median over that of a mean
_OWN = 60  # stars from which each colour tells its own noise; fewer, and all tell it together
_MOST = 0.5  # mag, as far as a lot may be off


@dataclass(frozen=True)
class PhotometryFigures:
    """How well magnitudes are known; C channels.

    Parameters
    ----------
    stars : int
        Bright stars that several frames saw.
    shared : int
        Those of them that several lots saw.
    repeat_median, repeat_p95 : ndarray
        ``(C,)`` mmag, scatter of a star's magnitude between lots: median and 95th percentile over stars.
    scatter : ndarray
        ``(C,)`` mmag, expected 1-sigma error of a bright star's magnitude in the mosaic, the zero point set by all.
    uniformity : ndarray
        ``(C,)`` mmag, expected rms of the median error in the cells of a `GRID` x `GRID` map.
    photons, cell_photons, lot_photons : ndarray
        ``(C,)`` mmag, what of `scatter`, `uniformity` and `repeat_median` the photons of the stars make: no stacking
        could do better.
    lots : Offsets
        ``(L, 1 + C)`` mmag, magnitude of every lot against the others, first of all colours together, then of each;
        ``(L, 1)`` for one colour. Positive = fainter. With what stacking did to it.
    map : ndarray
        ``(GRID, GRID)`` float32, mmag, error of the zero point (green or grey); row 0 at y = 0; NaN where unknown.
    catalogue : float
        mmag, robust scatter against the catalogue; NaN without one.
    """

    stars: int
    shared: int
    repeat_median: Floats
    repeat_p95: Floats
    scatter: Floats
    uniformity: Floats
    photons: Floats
    cell_photons: Floats
    lot_photons: Floats
    lots: Offsets
    map: FloatImage
    catalogue: float


def measure_photometry(evidence: Evidence, mosaic: MosaicStars, matched: Matched | None) -> PhotometryFigures:
    """Everything that stars tell of the gains."""
    channels, lots = evidence.channels, evidence.lots
    nothing, blank = np.full(channels, np.nan), np.full((GRID, GRID), np.nan, np.float32)
    unknown = Offsets.unknown(lots, 1 + channels if channels > 1 else 1)
    catalogue = _against_catalogue(evidence, mosaic)
    found = PhotometryFigures(
        0, 0, nothing, nothing, nothing, nothing, nothing, nothing, nothing, unknown, blank, catalogue
    )
    if matched is None:
        return found
    sound = matched.clean & (matched.flux > 0).all(axis=1) & mosaic.calm[matched.star]
    seen = matched.take(np.flatnonzero(sound))
    tied = plain(seen.take(np.flatnonzero(agreeing(seen, _FLOOR))), _FAINT)
    usable = wholly_seen(tied, evidence)
    if not len(usable):
        return found
    alone = usable.take(np.flatnonzero(mosaic.lonely[usable.star]))
    between = _lot_magnitudes(tied, lots)
    found = replace(found, lots=combined(between, _lot_stacking(mosaic, alone, lots)))
    bright = _bright(alone)
    if len(np.unique(bright.star)) < _LEAST:
        return found
    frames = np.bincount(usable.lot, minlength=lots)
    tie = float(np.sqrt(np.average(np.nan_to_num(between.sigma[:, 0] / MMAG) ** 2, weights=frames)))
    tie /= 2 if lots == 2 else 1  # which is the error of their difference
    return _with_precision(found, evidence, mosaic, usable, bright, _shrunk(between)[:, -channels:] / MMAG, tie)


def _with_precision(
    found: PhotometryFigures,
    evidence: Evidence,
    mosaic: MosaicStars,
    usable: Matched,
    bright: Matched,
    offset: Floats,
    tie: float,
) -> PhotometryFigures:
    """The figures made of bright stars; `offset`, `tie`: zero points of the lots ``(L, C)`` and their error, mag."""
    seen, _, magnitude, _ = average(bright.star, bright.lot, _magnitude(bright.flux), bright.weight)
    median, p95, shared = _repeatability(seen, magnitude)
    single = _photons(replace(bright, star=bright.star * (int(bright.lot.max()) + 1) + bright.lot))
    each = _photons(bright)
    photons = np.median(each, axis=0)
    noise = _half_differences(bright)
    star, error, sigma = _errors(mosaic, bright, offset)
    own = float(np.median(sigma**2)) if len(sigma) else 0.0
    # Frame by frame and in the mosaic, apertures do not cut the same pixels: that is about a photon noise of the mean.
    shown = np.hypot(each[np.isin(np.unique(bright.star), star)], _STACKING)
    spread = photons * np.sqrt(max(robust_sigma((error / shown).ravel()) ** 2 - 1, 0))
    count = _cell_counts(evidence.shape, mosaic.points[star])
    # Bright stars are few, but what goes wrong with them goes wrong with all: the map is made of every star.
    every, error, sigma = _errors(mosaic, usable, offset)
    # And the usual aperture misses more light where a lot is blurred.
    missed = _magnitude(mosaic.core[every]) - _magnitude(mosaic.stars.flux[every])
    known = np.isfinite(missed).all(axis=1)
    error = (error + missed)[known] - (np.median(missed[known], axis=0) if known.any() else 0)
    maps, errors = _maps(evidence.shape, mosaic.points[every[known]], error, sigma[known], own)
    wander = np.array([between_variance(maps[..., c], errors[..., c]) for c in range(maps.shape[2])])
    share = _MEDIAN * np.sqrt((1 / count[count >= _CELL_STARS]).mean()) if (count >= _CELL_STARS).any() else 1.0
    return replace(
        found,
        stars=len(star),
        shared=shared,
        repeat_median=MMAG * median,
        repeat_p95=MMAG * p95,
        photons=MMAG * photons,
        lot_photons=MMAG * np.median(single, axis=0),
        cell_photons=MMAG * share * photons,
        scatter=MMAG * np.sqrt(noise**2 + spread**2 + tie**2),
        uniformity=MMAG * np.sqrt(wander + (share * noise) ** 2 + tie**2),
        map=(MMAG * maps[..., evidence.channels // 2]).astype(np.float32),
    )


def _errors(mosaic: MosaicStars, seen: Matched, offset: Floats) -> tuple[Ints, Floats, Floats]:
    """Which stars of the mosaic show well what was done to them, what that is ``(n, C)``, mag, and its error ``(n,)``.

    It is what stacking did, and the mean offset of the lots there.
    """
    fine, error = _stacking(mosaic, seen)
    error = error + average(seen.star, np.zeros_like(seen.star), offset[seen.lot], seen.weight)[2]
    star, at = np.unique(seen.star, return_inverse=True)
    return star[fine], error[fine], _stacking_sigma(at, seen.signal)[fine]


def _stacking_sigma(star: Ints, signal: Floats) -> Floats:
    """Error, mag, of what `_stacking` finds of each star; `star` and `signal` are of the detections.

    Frame by frame and in the mosaic, apertures do not cut the same pixels: that is about a photon noise of the mean.
    """
    return np.hypot(1.0857 / np.sqrt(np.bincount(star, signal**2)), _STACKING)


def _magnitude(flux: Floats) -> Floats:
    return -2.5 * np.log10(np.maximum(flux, 1e-9))


def _lot_magnitudes(usable: Matched, lots: int) -> Offsets:
    sigma = np.hypot(1.0857 * usable.error / usable.flux, _FLOOR)
    magnitude = _magnitude(usable.flux)
    if magnitude.shape[1] > 1:
        # The same weights for all stars, lest their colours look like differences between lots.
        share = 1 / np.median(sigma, axis=0) ** 2 if len(usable) else np.ones(magnitude.shape[1])
        share /= share.sum()
        magnitude = np.c_[magnitude @ share, magnitude]
        sigma = np.c_[np.sqrt((sigma * share) ** 2 @ np.ones(len(share))), sigma]
    weight = 1 / (MMAG * sigma) ** 2
    star, lot, mean, total = average(usable.star, usable.lot, MMAG * magnitude, weight)
    return lot_offsets(star, lot, mean, 1 / np.sqrt(total), lots, MMAG * _MOST, _SYSTEMATIC, _STATED)


def _shrunk(offsets: Offsets) -> Floats:
    """The offsets, drawn to 0 as far as they may be chance."""
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.maximum(0, 1 - np.square(offsets.error / offsets.value))
    return np.nan_to_num(offsets.value * share)


def _bright(usable: Matched) -> Matched:
    """Detections of stars that are bright in their typical frame."""
    _, at = np.unique(usable.star, return_inverse=True)
    count = np.bincount(at)
    signal = np.bincount(at, usable.signal) / np.maximum(count, 1)
    several = count >= 2
    ranked = np.sort(signal[several])[::-1]
    limit = float(np.clip(ranked[min(_WANTED, len(ranked)) - 1], _DIM, BRIGHT)) if len(ranked) else BRIGHT
    return usable.take(np.flatnonzero((several & (signal >= limit))[at]))


def _repeatability(star: Ints, magnitude: Floats) -> tuple[Floats, Floats, int]:
    """Median and 95th percentile ``(C,)`` of the stars' scatter between lots, and how many stars several lots saw."""
    _, at = np.unique(star, return_inverse=True)
    count = np.bincount(at)
    channels = magnitude.shape[1]
    if not (count > 1).any():
        return np.full(channels, np.nan), np.full(channels, np.nan), 0
    mean = np.stack([np.bincount(at, m) / count for m in magnitude.T], axis=1)
    square = np.stack([np.bincount(at, d**2) for d in (magnitude - mean[at]).T], axis=1)
    scatter = np.sqrt(square[count > 1] / (count[count > 1] - 1)[:, None])
    return np.median(scatter, axis=0), np.percentile(scatter, 95, axis=0), int((count > 1).sum())


def _photons(seen: Matched, floor: float = 0.0) -> Floats:
    """Photon noise ``(n, C)`` of the mean of the frames, mag, in order of the stars' numbers.

    `floor` is what else a single measurement is wrong by, mag.
    """
    _, at = np.unique(seen.star, return_inverse=True)
    square = np.square(seen.weight * np.hypot(1.0857 * seen.error / np.maximum(seen.flux, 1e-9), floor))
    columns = [np.sqrt(np.bincount(at, q)) / np.bincount(at, w) for q, w in zip(square.T, seen.weight.T, strict=True)]
    return np.stack(columns, axis=1)


def _half_differences(bright: Matched) -> Floats:
    """Error ``(C,)`` mag of the mean of all frames for the typical star: half what two halves of them differ by."""
    order = np.lexsort((bright.frame, bright.star))
    star = bright.star[order]
    first = np.r_[0, np.flatnonzero(np.diff(star)) + 1]
    rank = np.arange(len(star)) - np.repeat(first, np.diff(np.r_[first, len(star)]))
    star, _, flux, _ = average(star, rank % 2, bright.flux[order], bright.weight[order])
    pair = np.flatnonzero(np.diff(star) == 0)
    difference = (_magnitude(flux[pair]) - _magnitude(flux[pair + 1])) / 2
    # In units of what is expected of each star, lest the faint ones among them set it.
    expected = _photons(bright, _FLOOR)
    ratio = difference / expected[np.isin(np.unique(star), star[pair])]
    times = [robust_sigma(r) for r in ratio.T] if len(pair) >= _OWN else robust_sigma(ratio.ravel())
    return np.asarray(np.median(expected, axis=0) * times)


def _stacking(mosaic: MosaicStars, seen: Matched) -> tuple[NDArray[np.bool_], Floats]:
    """What stacking did to the stars ``(n, C)``, mag, the median 0; and which of them the mosaic shows well.

    In order of the stars' numbers, as `average` has them.
    """
    star, _, flux, _ = average(seen.star, np.zeros_like(seen.star), seen.flux, seen.weight)
    own = mosaic.stars.flux[star]
    fine = mosaic.stars.clean[star] & (own > 0).all(axis=1)
    error = _magnitude(own) - _magnitude(flux)
    return fine, error - (np.median(error[fine], axis=0) if fine.any() else 0)


def _lot_stacking(mosaic: MosaicStars, usable: Matched, lots: int) -> Offsets:
    """What stacking did to the lots, mmag, columns as in `_lot_magnitudes`."""
    fine, error = _stacking(mosaic, usable)
    share = shares(usable.star, usable.lot, usable.weight.mean(axis=1), lots)[fine]
    error = MMAG * error[fine]
    sigma = _stacking_sigma(np.unique(usable.star, return_inverse=True)[1], usable.signal)[fine]
    columns = np.c_[error.mean(axis=1), error] if error.shape[1] > 1 else error
    return stacked_offsets(share, columns, MMAG * sigma, _SYSTEMATIC, _STATED)


def _maps(shape: tuple[int, int], points: Floats, value: Floats, sigma: Floats, bright: float) -> tuple[Floats, Floats]:
    """Weighted medians ``(GRID, GRID, C)`` of cells, and their errors.

    A cell counts whose stars tell as much as `_CELL_STARS` bright ones, of the variance `bright`. How much larger the
    errors are than `sigma` says is told by the scatter in all cells, or in the cell itself, where that is larger.
    """
    cell, weight = _cell(shape, points), 1 / sigma**2
    count, total = np.bincount(cell, minlength=GRID * GRID), np.bincount(cell, weight, GRID * GRID)
    maps = np.full((GRID * GRID, value.shape[1]), np.nan)
    own, z = np.zeros_like(maps), np.zeros_like(value)
    for k in np.unique(cell):
        stars = np.flatnonzero(cell == k)
        maps[k] = [_weighted_median(v, weight[stars]) for v in value[stars].T]
        z[stars] = (value[stars] - maps[k]) / sigma[stars, None]
        own[k] = np.sqrt(np.square(z[stars]).sum(axis=0) / max(len(stars) - 1, 1))
    maps[(count < _CELL_STARS) | (total * bright < _CELL_STARS)] = np.nan
    scale = np.maximum(own, [robust_sigma(v) for v in z.T])
    errors = _MEDIAN * scale / np.sqrt(np.maximum(total, 1e-300))[:, None]
    return maps.reshape(GRID, GRID, -1), errors.reshape(GRID, GRID, -1)


def between_variance(value: Floats, error: Floats) -> float:
    """Variance of values beyond their errors, the better known ones counting more; NaN for fewer than `_CELLS`.

    The moment estimate of random effects: DerSimonian and Laird, Controlled Clinical Trials 7, 177 (1986).
    """
    known = np.isfinite(value)
    if known.sum() < _CELLS:
        return float("nan")
    value, weight = value[known], 1 / np.square(error[known])
    square = weight @ np.square(value - np.average(value, weights=weight))
    spare = weight.sum() - weight @ weight / weight.sum()
    return max(float((square - (len(value) - 1)) / spare), 0.0)


def _weighted_median(values: Floats, weight: Floats) -> float:
    order = np.argsort(values)
    half = np.cumsum(weight[order]) - weight[order] / 2
    return float(np.interp(weight.sum() / 2, half, values[order]))


def _cell_counts(shape: tuple[int, int], points: Floats) -> Ints:
    return np.bincount(_cell(shape, points), minlength=GRID * GRID)


def _cell(shape: tuple[int, int], points: Floats) -> Ints:
    """Which cell of the map points ``(n, 2)`` x, y lie in."""
    return _grid_cell(points[:, 1], shape[0]) * GRID + _grid_cell(points[:, 0], shape[1])


def _grid_cell(position: Floats, size: int) -> Ints:
    return np.clip(position / size * GRID, 0, GRID - 1).astype(np.int64)


def _against_catalogue(evidence: Evidence, mosaic: MosaicStars) -> float:
    """Robust scatter of bright stars against catalogue magnitudes, mmag."""
    star, reference, _ = match_catalogue(evidence, mosaic)
    if evidence.catalogue is None or not len(star):
        return float("nan")
    flux = mosaic.stars.flux[star, evidence.channels // 2]
    error = mosaic.stars.error[star, evidence.channels // 2]
    difference = _magnitude(flux) - evidence.catalogue.mag[reference]
    fine = mosaic.stars.clean[star] & (flux > BRIGHT * error) & np.isfinite(difference)
    return MMAG * robust_sigma(difference[fine]) if fine.sum() >= _CELL_STARS else float("nan")
