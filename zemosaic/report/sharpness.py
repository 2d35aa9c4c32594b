"""Sharpness: are the mosaic's stars as small and round as those of its frames?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zemosaic.report.evidence import Evidence, Floats, Ints
from zemosaic.report.surface import MosaicStars
from zemosaic.tiles import FloatImage

_LEAST_WIDTH = 1.0  # px: what is narrower is no star, but a hot pixel or a cosmic ray
_SIGNAL = 20.0
_CELL_STARS = 5  # stars from which a cell of the map is more than chance
_MAX_GRID = 24


@dataclass(frozen=True)
class SharpnessFigures:
    """Widths and shapes of stars; L lots.

    Parameters
    ----------
    stars : int
        Stars the maps are made of.
    fwhm : float
        px, of the mosaic.
    ratio : float
        Over the weighted mean of the frames'; NaN without frames.
    ellipticity : float
        Median, 0 … 1.
    frame_ellipticity : float
        The frames' median; NaN without frames.
    evenness : float
        95th percentile over median of the map of widths.
    fwhm_map, ellipticity_map : ndarray
        ``(gy, gx)`` float32, medians of cells of `cell_px`; NaN where there are few stars.
    cell_px : float
        Side of their cells, px.
    lots : ndarray
        ``(L,)`` median width of a lot's frames over the median of all lots; NaN for an empty one.
    """

    stars: int
    fwhm: float
    ratio: float
    ellipticity: float
    frame_ellipticity: float
    evenness: float
    fwhm_map: FloatImage
    ellipticity_map: FloatImage
    cell_px: float
    lots: Floats


def measure_sharpness(evidence: Evidence, mosaic: MosaicStars) -> SharpnessFigures:
    """Widths and shapes of the mosaic's stars, and the widths that the lots came with."""
    stars = mosaic.stars
    with np.errstate(invalid="ignore"):
        fine = stars.clean & (stars.flux > _SIGNAL * stars.error).all(axis=1) & (mosaic.fwhm > _LEAST_WIDTH)
    points, fwhm, ellipticity = mosaic.points[fine], mosaic.fwhm[fine], mosaic.ellipticity[fine]
    side = max(evidence.shape) / np.clip(np.sqrt(len(points) / (2 * _CELL_STARS)), 1, _MAX_GRID)
    fwhm_map = _cell_medians(evidence.shape, side, points, fwhm)
    known = fwhm_map[np.isfinite(fwhm_map)]
    ratio, frame_ellipticity, lots = float("nan"), float("nan"), np.zeros(0)
    if evidence.frames is not None:
        frames = evidence.frames
        there = frames.fwhm > _LEAST_WIDTH
        if there.any():
            ratio = mosaic.typical_fwhm / float(np.average(frames.fwhm[there], weights=frames.weight.mean(1)[there]))
            frame_ellipticity = float(np.nanmedian(frames.ellipticity))
        lots = _lot_widths(frames.lot, frames.fwhm, evidence.lots)
    return SharpnessFigures(
        stars=len(points),
        fwhm=mosaic.typical_fwhm,
        ratio=ratio,
        ellipticity=float(np.median(ellipticity)) if len(points) else float("nan"),
        frame_ellipticity=frame_ellipticity,
        evenness=float(np.percentile(known, 95) / np.median(known)) if known.size else float("nan"),
        fwhm_map=fwhm_map,
        ellipticity_map=_cell_medians(evidence.shape, side, points, ellipticity),
        cell_px=float(side),
        lots=lots,
    )


def _lot_widths(lot: Ints, fwhm: Floats, lots: int) -> Floats:
    known = fwhm > _LEAST_WIDTH
    parts = [fwhm[known & (lot == i)] for i in range(lots)]
    medians = np.array([np.median(part) if len(part) else np.nan for part in parts])
    return medians / np.nanmedian(medians) if np.isfinite(medians).any() else medians


def _cell_medians(shape: tuple[int, int], side: float, points: Floats, value: Floats) -> FloatImage:
    rows, columns = (max(1, int(np.ceil(n / side))) for n in shape)
    out = np.full(rows * columns, np.nan, np.float32)
    if len(value):
        cell = np.minimum(points[:, 1] // side, rows - 1) * columns + np.minimum(points[:, 0] // side, columns - 1)
        order = np.argsort(cell, kind="stable")
        found, start = np.unique(cell[order], return_index=True)
        for k, part in zip(found.astype(int), np.split(value[order], start[1:]), strict=True):
            if len(part) >= _CELL_STARS:
                out[k] = np.median(part)
    return out.reshape(rows, columns)
