"""Photometry: do lots, and the mosaic itself, agree about the brightness of the stars?

A star's magnitude in the mosaic is wrong by three things, which are measured without any catalogue:

* the noise of the frames' mean: what the photons of each star and the floor of a measurement make of it, times how much
  more (or less) than that the frames of a star differ from each other;
* the lots' zero points: `zemosaic.report.lots`, both their offsets and how well these are known (a run that has been
  fitted to the stars that lots share shows no offset, but an error it has);
* what stacking did to the star: the mosaic's flux against the mean of the frames' fluxes, both in one aperture.

The last two, added up star by star, are the map of the zero point over the field; with the light that an aperture of
the usual size misses, which is another share where a lot is blurred. What they come to, for bright stars and for the
cells of the map, is drawn at random many times over, star by star: errors of several kinds and sizes do not simply add
up to a median.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

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
    sure,
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
_OWN = 150  # degrees of freedom from which each colour tells its own noise; fewer, and all tell it together
_BLEND = 1.2  # times the width of the stars around: two stars in one
_DRAWS = 200  # of the errors of all stars
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
        ``(C,)`` mmag, expected robust scatter of the errors of bright stars in the mosaic, the zero point set by all.
    uniformity : ndarray
        ``(C,)`` mmag, expected rms of the median error in the cells of a `GRID` x `GRID` map.
    scatter_chance, cell_chance : ndarray
        ``(C,)`` mmag, by how much (1 sigma) both differ from that if these few stars are compared with the true sky.
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
    scatter_chance: Floats
    cell_chance: Floats
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
        0, 0, nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, unknown, blank, catalogue
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
    lots = int(bright.lot.max()) + 1
    twice = np.bincount(seen)[bright.star] > 1  # what is not compared does not tell how well it can be
    single = _photons(replace(bright, star=bright.star * lots + bright.lot).take(twice))
    found = replace(
        found,
        shared=shared,
        repeat_median=MMAG * median,
        repeat_p95=MMAG * p95,
        lot_photons=MMAG * np.median(single, axis=0) if shared else np.full_like(median, np.nan),
    )
    losses = _losses(evidence, mosaic, usable)
    which = np.flatnonzero(np.isin(losses.star, bright.star))
    if len(which) < _LEAST:
        return found
    shown = np.isin(np.unique(bright.star), losses.star)
    photons, noise = _photons(bright)[shown], (_photons(bright, _FLOOR) * _excess_noise(bright, offset))[shown]
    # Frame by frame and in the mosaic, apertures do not cut the same pixels: that is about a photon noise of the mean.
    left = (losses.stacking - losses.share @ _of_lots(losses, losses.stacking))[which] / np.hypot(photons, _STACKING)
    more = np.sqrt(max(robust_sigma(left.ravel()) ** 2 - 1, 0))
    stacked = _of_lots(losses, losses.value)
    share, cell = losses.share[which], _cell(evidence.shape, mosaic.points[losses.star[which]])
    known = share @ (offset + stacked)
    errors = _foreseen(known, np.hypot(noise, more * photons), share, tie, cell)
    least = _foreseen(np.zeros_like(known), photons, share, 0.0, cell)
    # Bright stars are few, but what goes wrong with them goes wrong with all: the map is made of every star.
    every = losses.value + losses.share @ offset
    own = float(np.median(losses.sigma[which] ** 2))
    maps, sigma = _maps(evidence.shape, mosaic.points[losses.star], every, losses.sigma, own)
    wander = np.array([between_variance(maps[..., c], sigma[..., c]) for c in range(maps.shape[2])])
    return replace(
        found,
        stars=len(which),
        scatter=MMAG * errors.scatter,
        scatter_chance=MMAG * errors.scatter_chance,
        uniformity=MMAG * np.sqrt(wander + errors.cells**2),
        cell_chance=MMAG * errors.cell_chance,
        photons=MMAG * least.scatter,
        cell_photons=MMAG * least.cells,
        map=(MMAG * maps[..., evidence.channels // 2]).astype(np.float32),
    )


@dataclass(frozen=True)
class _Losses:
    """What happened to the light of stars in the mosaic; n stars, their numbers in order.

    Parameters
    ----------
    star : ndarray
        ``(n,)`` which they are.
    stacking : ndarray
        ``(n, C)`` mag, what stacking did.
    value, sigma : ndarray
        ``(n, C)`` and ``(n,)`` mag, that and the light that an aperture of the usual size misses, and its error. The
        medians of both are 0.
    share : ndarray
        ``(n, L)`` share of every lot in what the mosaic shows there.
    """

    star: Ints
    stacking: Floats
    value: Floats
    sigma: Floats
    share: Floats


def _of_lots(losses: _Losses, value: Floats) -> Floats:
    """What ``(L, C)`` of `value` goes with the lots for sure."""
    found = stacked_offsets(losses.share, value, losses.sigma, _SYSTEMATIC / MMAG, _STATED)
    return np.where(sure(found) > 0, found.value, 0.0)


def _losses(evidence: Evidence, mosaic: MosaicStars, usable: Matched) -> _Losses:
    """Of all stars that the mosaic shows well."""
    fine, stacking = _stacking(mosaic, usable)
    star, at = np.unique(usable.star, return_inverse=True)
    value = stacking + _magnitude(mosaic.core[star]) - _magnitude(mosaic.stars.flux[star])
    # A companion within the usual aperture, or on its edge, is light that it misses here and nowhere else.
    cell = _cell(evidence.shape, mosaic.points[star])
    width = np.full(GRID * GRID, np.nan)
    for k in np.unique(cell):
        width[k] = np.median(mosaic.fwhm[star[cell == k]])
    use = np.flatnonzero(fine & np.isfinite(value).all(axis=1) & (mosaic.fwhm[star] <= _BLEND * width[cell]))
    share = shares(usable.star, usable.lot, usable.weight.mean(axis=1), evidence.lots)
    stacking, value = (each[use] - (np.median(each[use], axis=0) if len(use) else 0) for each in (stacking, value))
    return _Losses(star[use], stacking, value, _stacking_sigma(at, usable.signal)[use], share[use])


@dataclass(frozen=True)
class _Foreseen:
    """``(C,)`` mag: robust scatter of stars, rms of the medians of cells, and how much both vary by chance."""

    scatter: Floats
    cells: Floats
    scatter_chance: Floats
    cell_chance: Floats


def _foreseen(known: Floats, sigma: Floats, share: Floats, tie: float, cell: Ints) -> _Foreseen:
    """What the errors of stars come to, drawn at random `_DRAWS` times.

    Parameters
    ----------
    known, sigma : ndarray
        ``(n, C)`` mag, the part of each star's error that is known, and the size of the rest. The first does not go
        into the medians of cells: the map knows better.
    share : ndarray
        ``(n, L)`` of the lots in what the mosaic shows of each.
    tie : float
        mag, error of a lot's zero point against the mean of all lots.
    cell : ndarray
        ``(n,)`` of the map. Those of fewer than `_CELL_STARS` stars do not count, unless all are.
    """
    rng = np.random.default_rng(0)
    lots = share.shape[1]
    zero = tie * np.sqrt(lots / max(lots - 1, 1)) * rng.normal(size=(_DRAWS, lots)) @ share.T
    count = np.bincount(cell)
    full = np.flatnonzero(count >= min(_CELL_STARS, count.max()))
    columns = []
    for fixed, size in zip(known.T, sigma.T, strict=True):
        error = zero + size * rng.normal(size=(_DRAWS, len(size)))
        medians = np.stack([np.median(error[:, cell == k], axis=1) for k in full], axis=1)
        rms = np.sqrt(np.square(medians - np.median(error, axis=1, keepdims=True)).mean(axis=1))
        error += fixed
        scatter = 1.4826 * np.median(np.abs(error - np.median(error, axis=1, keepdims=True)), axis=1)
        columns.append((scatter.mean(), np.sqrt(np.square(rms).mean()), scatter.std(), rms.std()))
    return _Foreseen(*np.array(columns).T)


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
    """Detections of stars that are bright in their typical frame.

    What counts is the light that it takes for that: the same over the whole field, even where frames are blurred or
    dimmed and their noise is another.
    """
    _, at = np.unique(usable.star, return_inverse=True)
    count = np.bincount(at)
    several = count >= 2
    if not several.any():
        return usable.take(np.zeros(0, np.int64))
    signal, light = (np.bincount(at, each) / count for each in (usable.signal, usable.flux.sum(axis=1)))
    ranked = np.sort(signal[several])[::-1]
    limit = float(np.clip(ranked[min(_WANTED, len(ranked)) - 1], _DIM, BRIGHT))
    near = np.flatnonzero(several)[np.argsort(np.abs(np.log(signal[several] / limit)), kind="stable")[:_WANTED]]
    enough = limit * np.median(light[near] / signal[near])
    return usable.take(np.flatnonzero((several & (light >= enough))[at]))


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


def _excess_noise(bright: Matched, offset: Floats) -> Floats:
    """How much more than foreseen ``(C,)`` the frames' magnitudes of a star scatter, but for the offsets of their lots.

    Foreseen are its photons and `_FLOOR`. Of a few bright stars every frame tells, not only their sums.
    """
    magnitude = _magnitude(bright.flux) - offset[bright.lot]
    expected = np.hypot(1.0857 * bright.error / bright.flux, _FLOOR)
    star, at = np.unique(bright.star, return_inverse=True)
    _, _, mean, total = average(bright.star, np.zeros_like(bright.star), magnitude, bright.weight)
    # The mean moves along with each of them by its share.
    variance = (1 - 2 * bright.weight / total[at]) * expected**2 + (_photons(bright, _FLOOR) ** 2)[at]
    ratio = (magnitude - mean[at]) / np.sqrt(np.maximum(variance, 1e-12))
    if len(ratio) - len(star) < _OWN:
        return np.full(ratio.shape[1], robust_sigma(ratio.ravel()))
    return np.array([robust_sigma(column) for column in ratio.T])


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
    """Variance of values beyond their errors; NaN for fewer than `_CELLS`.

    That which makes chi squared what is expected: Paule and Mandel, J. Res. NBS 87, 377 (1982). Values that differ far
    more than their errors then count alike, instead of the best known ones alone.
    """
    known = np.isfinite(value)
    if known.sum() < _CELLS:
        return float("nan")
    value, square = value[known], np.square(error[known])

    def excess(variance: float) -> float:
        weight = 1 / (square + variance)
        return float(weight @ np.square(value - np.average(value, weights=weight))) - (len(value) - 1)

    if excess(0.0) <= 0:
        return 0.0
    return float(brentq(excess, 0.0, 1.01 * np.var(value, ddof=1)))


def _weighted_median(values: Floats, weight: Floats) -> float:
    order = np.argsort(values)
    half = np.cumsum(weight[order]) - weight[order] / 2
    return float(np.interp(weight.sum() / 2, half, values[order]))


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
