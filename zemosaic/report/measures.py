"""Everything that is measured of a mosaic, in the order in which one thing needs another."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from zemosaic.execute import return_freed_memory, side_by_side
from zemosaic.report.astrometry import AstrometryFigures, measure_astrometry
from zemosaic.report.defects import Hole, Trail, find_holes, find_trails
from zemosaic.report.evidence import Evidence
from zemosaic.report.levels import LevelFigures, measure_levels
from zemosaic.report.lots import match_stars
from zemosaic.report.noise import NoiseFigures, measure_noise
from zemosaic.report.photometry import PhotometryFigures, measure_photometry
from zemosaic.report.seams import SeamFigures, measure_seams
from zemosaic.report.sharpness import SharpnessFigures, measure_sharpness
from zemosaic.report.surface import CELL, Surface, measure_stars, measure_surface

_MIN_SIDE = 32  # px


class TooLittle(ValueError):
    """There is not enough of a picture to judge."""


@dataclass(frozen=True)
class Measures:
    """All measurements; see the classes. `hole_ppm` counts all holes, also those not listed, against the data."""

    seams: SeamFigures
    levels: LevelFigures
    photometry: PhotometryFigures
    astrometry: AstrometryFigures
    noise: NoiseFigures
    sharpness: SharpnessFigures
    trails: tuple[Trail, ...]
    holes: tuple[Hole, ...]
    hole_ppm: float


def measure(evidence: Evidence, workers: int = 1) -> tuple[Surface, Measures]:
    """Measure everything that the evidence allows, on so many threads.

    Raises
    ------
    TooLittle
        Fewer than 32 x 32 px, or no cell of 8 x 8 px with data.
    """
    if min(evidence.shape) < _MIN_SIDE:
        raise TooLittle(f"a picture of {evidence.shape[1]} x {evidence.shape[0]} px is too small to be judged")
    surface = measure_surface(evidence, workers)
    if not np.isfinite(surface.sky).any():
        raise TooLittle("the picture holds hardly any data")
    return_freed_memory()  # of the strips that the threads have worked on
    aperture = evidence.stars.aperture if evidence.stars is not None else float("nan")
    bare = replace(surface, planes=[])  # a third of all that is held here, and only two need it
    with side_by_side(workers) as start:
        found = start(measure_stars, evidence.image, aperture, surface.planes)  # the longest
        seams = start(measure_seams, evidence, bare, workers)
        levels = start(measure_levels, evidence, surface)
        noise = start(measure_noise, evidence, bare)
        gaps = start(find_holes, bare)
        del surface
        stars = found.result()
        trails = start(find_trails, bare, stars, workers)
        matched = match_stars(evidence, stars)
        photometry = start(measure_photometry, evidence, stars, matched)
        astrometry = start(measure_astrometry, evidence, stars, matched)
        holes, area = gaps.result()
        return bare, Measures(
            seams=seams.result(),
            levels=levels.result(),
            photometry=photometry.result(),
            astrometry=astrometry.result(),
            noise=noise.result(),
            sharpness=measure_sharpness(evidence, stars),
            trails=tuple(trails.result()),
            holes=tuple(holes),
            hole_ppm=1e6 * area / max(1.0, float(bare.valid.sum()) * CELL**2),
        )
