"""Astrometry: do frames put the same star at the same place, and is that place right?"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.spatial import cKDTree

from zemosaic.canvas import pixel_scale
from zemosaic.report.evidence import Evidence, Floats, Ints
from zemosaic.report.lots import (
    BRIGHT,
    Matched,
    Offsets,
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

_SIGNAL = 20.0  # from which a centroid is good to some hundredths of a pixel
_KING = 1.2  # a centroid against the limit that photons alone set
_DRAWS = 32  # of chance, for the percentiles of the positions' errors
_RADIUS = 5.0  # px, in which a star of a catalogue is looked for
_LEAST = 5  # stars that tell the shift of a frame
_ENOUGH = 10  # stars that tell anything about all frames
_MOST = 3.0  # px, as far as a lot may be off
_SYSTEMATIC = 0.01  # px, to which lots can be compared at best: distortion, sampling


@dataclass(frozen=True)
class AstrometryFigures:
    """Where stars are; F frames, L lots.

    Parameters
    ----------
    stars : int
        Stars that several frames saw.
    scale : float
        arcsec per pixel; NaN without a WCS.
    median, p95 : float
        px, distance of a frame's star from where the other frames see it.
    vectors : ndarray
        ``(F, 4)`` of every frame: x, y of its middle and its median shift dx, dy against the frames of all lots, mosaic
        pixels; NaN where it has fewer than `_LEAST` stars.
    lots : Offsets
        ``(L, 2)`` x, y of every lot against the others, px, with what stacking did to it.
    position_median, position_p95 : float
        px, expected error of a bright star's position in the mosaic, by its photons, by how well the frames are placed,
        and by the mean offset of the lots there.
    catalogue_median, catalogue_p95 : float
        px, distance of the mosaic's stars from the catalogue; NaN without one.
    catalogue_vectors : ndarray
        ``(n, 4)`` x, y, dx, dy of those stars.
    """

    stars: int
    scale: float
    median: float
    p95: float
    vectors: Floats
    lots: Offsets
    position_median: float
    position_p95: float
    catalogue_median: float
    catalogue_p95: float
    catalogue_vectors: Floats


def measure_astrometry(evidence: Evidence, mosaic: MosaicStars, matched: Matched | None) -> AstrometryFigures:
    """Everything that positions tell."""
    frames = evidence.frames
    offsets = Offsets.unknown(evidence.lots, 2)
    vectors = np.full((len(frames) if frames is not None else 0, 4), np.nan)
    residuals, position, stars = np.zeros(0), np.zeros(0), 0
    if matched is not None and frames is not None:
        vectors[:, :2] = frames.outline.mean(axis=1)
        good = plain(matched.take(np.flatnonzero(matched.clean)), _SIGNAL)
        alone = wholly_seen(good.take(np.flatnonzero(mosaic.lonely[good.star])), evidence)
        between = _lot_positions(good, evidence.lots)
        offsets = combined(between, _lot_stacking(mosaic, alone, evidence.lots))
        residual = _residuals(good)
        residuals = np.hypot(residual[:, 0], residual[:, 1])
        residuals = residuals[np.isfinite(residuals)]
        if len(np.unique(good.star)) < _ENOUGH:
            residuals = np.zeros(0)
        # Most stars of a lot are seen by frames of that lot alone, which are all shifted alike.
        shift = np.nan_to_num(between.value)
        level = replace(good, x=good.x - shift[good.lot, 0], y=good.y - shift[good.lot, 1])
        vectors[:, 2:] = _frame_medians(good.frame, _residuals(level), len(frames)) + shift[frames.lot]
        bright = plain(alone, BRIGHT)
        stars = len(np.unique(bright.star))
        own = vectors[:, 2:] - shift[frames.lot]
        sure_shift = np.where(sure(offsets) > 0, np.nan_to_num(offsets.value), 0.0)
        position = _position_errors(bright, sure_shift, own, mosaic.typical_fwhm)
    shift = _catalogue_residuals(evidence, mosaic)
    distance = np.hypot(shift[:, 2], shift[:, 3])
    return AstrometryFigures(
        stars=stars,
        scale=pixel_scale(evidence.wcs) if evidence.wcs is not None else float("nan"),
        median=_percentile(residuals, 50),
        p95=_percentile(residuals, 95),
        vectors=vectors,
        lots=offsets,
        position_median=_percentile(position, 50),
        position_p95=_percentile(position, 95),
        catalogue_median=_percentile(distance, 50),
        catalogue_p95=_percentile(distance, 95),
        catalogue_vectors=shift,
    )


def match_catalogue(evidence: Evidence, mosaic: MosaicStars) -> tuple[Ints, Ints, Floats]:
    """Stars of the mosaic and of the catalogue that are each other's nearest.

    Returns
    -------
    star, reference : ndarray
        ``(n,)`` indices; empty without a catalogue or a WCS.
    shift : ndarray
        ``(n, 2)`` mosaic minus catalogue, px.
    """
    none = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 2))
    if evidence.catalogue is None or evidence.wcs is None or not len(mosaic.stars):
        return none
    places = np.stack(evidence.wcs.all_world2pix(evidence.catalogue.ra, evidence.catalogue.dec, 0), axis=1)
    ny, nx = evidence.shape
    with np.errstate(invalid="ignore"):
        on = np.flatnonzero(((places >= 0) & (places <= [nx, ny])).all(axis=1))
    if not len(on):
        return none
    places = places[on]
    distance, reference = cKDTree(places).query(mosaic.points, distance_upper_bound=_RADIUS)
    star = np.flatnonzero(np.isfinite(distance) & mosaic.stars.clean)
    back = cKDTree(mosaic.points).query(places[reference[star]])[1]
    star = star[back == star]
    return star, on[reference[star]], mosaic.points[star] - places[reference[star]]


def _catalogue_residuals(evidence: Evidence, mosaic: MosaicStars) -> Floats:
    star, _, shift = match_catalogue(evidence, mosaic)
    return np.c_[mosaic.points[star], shift]


def _lot_positions(good: Matched, lots: int) -> Offsets:
    weight = np.repeat(np.minimum(good.signal, 100.0)[:, None] ** 2, 2, axis=1)
    star, lot, mean, total = average(good.star, good.lot, np.c_[good.x, good.y], weight)
    return lot_offsets(star, lot, mean, 1 / np.sqrt(total), lots, _MOST, _SYSTEMATIC)


def _lot_stacking(mosaic: MosaicStars, good: Matched, lots: int) -> Offsets:
    """How far stacking moved the lots, px: from where their frames see the stars to where the mosaic shows them."""
    star, _, place, _ = average(good.star, np.zeros_like(good.star), np.c_[good.x, good.y], good.weight[:, :1] * [1, 1])
    fine = mosaic.stars.clean[star]
    moved = (mosaic.points[star] - place)[fine]
    share = shares(good.star, good.lot, good.weight.mean(axis=1), lots)[fine]
    return stacked_offsets(share, moved - (np.median(moved, axis=0) if len(moved) else 0), floor=_SYSTEMATIC)


def _residuals(good: Matched) -> Floats:
    """Distance ``(n, 2)`` of every detection from the mean of the *other* frames' of the same star; NaN if alone."""
    _, at = np.unique(good.star, return_inverse=True)
    count = np.bincount(at)[at]
    out = np.full((len(good), 2), np.nan)
    for k, value in enumerate((good.x, good.y)):
        total = np.bincount(at, value)[at] if len(at) else value
        with np.errstate(invalid="ignore", divide="ignore"):
            # Divided so that n equally good frames show each its own error, not that of the others too.
            out[:, k] = np.where(count > 1, (value - total / count) * np.sqrt(count / (count - 1)), np.nan)
    return out


def _frame_medians(frame: Ints, residual: Floats, frames: int) -> Floats:
    """Median residual ``(F, 2)`` of every frame."""
    known = np.isfinite(residual).all(axis=1)
    frame, residual = frame[known], residual[known]
    order = np.argsort(frame, kind="stable")
    parts = np.split(residual[order], np.cumsum(np.bincount(frame, minlength=frames))[:-1])
    return np.array([np.median(p, axis=0) if len(p) >= _LEAST else (np.nan, np.nan) for p in parts])


def _position_errors(bright: Matched, lot: Floats, frame: Floats, fwhm: float) -> Floats:
    """Distances ``(n,)`` px of bright stars' images in the mosaic from where they should be, as far as can be foreseen.

    Parameters
    ----------
    bright : Matched
        Their detections.
    lot : ndarray
        ``(L, 2)`` offset of every lot, px, 0 where it is not sure.
    frame : ndarray
        ``(F, 2)`` shift of every frame, px, NaN where unknown: what one frame's place on the sky is uncertain by.
    fwhm : float
        Of the mosaic's stars, px.

    Notes
    -----
    A centroid is uncertain by FWHM/2.355 over signal to noise along each axis (King 1983, PASP 95, 163: a little more
    for a faint star). The frames' centroids say nothing of it: they are taken on coarser cells.
    """
    star, at = np.unique(bright.star, return_inverse=True)
    if not len(star):
        return np.zeros(0)
    count = np.bincount(at)
    signal = np.sqrt(np.bincount(at, bright.signal**2))
    spread = np.nan_to_num(robust_sigma(frame[np.isfinite(frame)]))
    sigma = np.hypot(_KING * fwhm / 2.355 / signal, spread / np.sqrt(count))
    weight = np.repeat(bright.weight.mean(axis=1)[:, None], 2, axis=1)
    shift = average(bright.star, np.zeros_like(bright.star), lot[bright.lot], weight)[2]
    chance = np.random.default_rng(0).normal(size=(_DRAWS, len(star), 2))
    return np.asarray(np.hypot(*np.moveaxis(shift + sigma[:, None] * chance, 2, 0)).ravel())


def _percentile(values: Floats, q: float) -> float:
    return float(np.percentile(values, q)) if len(values) else float("nan")
