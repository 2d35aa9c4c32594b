"""The verdict: every figure beside its threshold, a sentence for each fault, small maps; and all of it as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from zemosaic import __version__
from zemosaic.events import render
from zemosaic.report.evidence import Evidence, Floats, FrameFacts
from zemosaic.report.faults import Finding, LotLine, find_faults, lot_lines
from zemosaic.report.lots import Offsets, sure
from zemosaic.report.measures import Measures, measure
from zemosaic.report.photometry import GRID
from zemosaic.report.surface import Surface, nan_median
from zemosaic.report.thresholds import GRADES, THRESHOLDS, Grade, Threshold
from zemosaic.tiles import FloatImage

SCHEMA = "zemosaic.verdict/1"


@dataclass(frozen=True)
class Figure:
    """One number of the verdict; of all of them more is worse.

    Parameters
    ----------
    key : str
        Its name; the message ``verdict_<key>`` says it in words.
    group, unit : str
        As in `zemosaic.report.thresholds`; the message ``verdict_group_<group>`` is the heading.
    value : float
        NaN where it could not be measured; of colours the worst one.
    warn, fail : float
        Thresholds; infinite = none.
    grade : {"PASS", "WARN", "FAIL", "NONE"}
    channels : tuple of float
        The value in every colour, where it has one.
    chance : float
        1 sigma by which the stars behind it, few as they are, differ from it if they are compared with the true sky;
        NaN where that is not known.
    """

    key: str
    group: str
    unit: str
    value: float
    warn: float
    fail: float
    grade: Grade
    channels: tuple[float, ...] = ()
    chance: float = math.nan


@dataclass(frozen=True)
class Map:
    """A small picture of a quantity over the field.

    Parameters
    ----------
    values : ndarray
        ``(h, w)`` float32, at most 256 a side; row 0 at y = 0; NaN where unknown.
    unit : str
    width, height : float
        Sides of a cell, mosaic pixels.
    """

    values: FloatImage
    unit: str
    width: float
    height: float


@dataclass(frozen=True)
class Verdict:
    """Everything that was found out about a mosaic.

    Parameters
    ----------
    grade : {"PASS", "WARN", "FAIL", "NONE"}
        The worst of all figures.
    shape : tuple of int
        ``(ny, nx)`` of the mosaic.
    noise : tuple of float
        Pixel noise in every colour, ADU: what "sigma" means as a unit.
    figures, findings, lots : tuple
        Numbers with their grades; faults, the graver ones first; one line per lot.
    maps : mapping
        Name → `Map`: coverage, sky, level, seam, noise, fwhm, ellipticity, zero_point; what is unknown is left out.
    frames : FrameFacts or None
        The frames in it.
    measures : Measures
        The measurements themselves, with their arrays.
    """

    grade: Grade
    shape: tuple[int, int]
    noise: tuple[float, ...]
    figures: tuple[Figure, ...]
    findings: tuple[Finding, ...]
    lots: tuple[LotLine, ...]
    maps: Mapping[str, Map]
    frames: FrameFacts | None
    measures: Measures

    def figure(self, key: str) -> Figure:
        """The figure of this name."""
        return next(figure for figure in self.figures if figure.key == key)


def judge(evidence: Evidence, workers: int = 1) -> Verdict:
    """Measure everything that the evidence allows, on so many threads, and grade it.

    Raises
    ------
    zemosaic.report.measures.TooLittle
        The picture is too small, or all but empty.
    """
    surface, found = measure(evidence, workers)
    noise = surface.typical_noise
    # Where borders are known, steps across them tell seams from steep nebulae; those between blocks cannot.
    noted = {"block_step_p99"} if found.seams.pieces else set()
    stars = found.photometry
    # What the photons make of a figure is no fault of the mosaic.
    allowed = {
        "phot_scatter": stars.photons,
        "phot_uniformity": stars.cell_photons,
        "repeat_median": stars.lot_photons,
    }
    chance = {"phot_scatter": stars.scatter_chance, "phot_uniformity": stars.cell_chance}
    figures = tuple(
        _figure(key, value, key not in noted, allowed.get(key), chance.get(key))
        for key, value in _values(found, surface).items()
    )
    lots = lot_lines(evidence, found)
    return Verdict(
        grade=max((figure.grade for figure in figures), key=GRADES.index),
        shape=evidence.shape,
        noise=tuple(noise.tolist()),
        figures=figures,
        findings=find_faults(found, lots, noise),
        lots=lots,
        maps=_maps(evidence, surface, found),
        frames=evidence.frames,
        measures=found,
    )


def _values(found: Measures, surface: Surface) -> dict[str, Floats | float]:
    """The value of every figure, or its values per colour."""
    noise = surface.typical_noise
    seams, levels, stars, places = found.seams, found.levels, found.photometry, found.astrometry
    sharp = found.sharpness
    return {
        "seam_p50": seams.p50,
        "seam_p95": seams.p95,
        "seam_p95_adu": seams.p95_adu,
        "seam_max": seams.max,
        "block_step_p99": seams.block_p99 / noise,
        "block_step_p99_adu": seams.block_p99,
        "lot_sky": _largest(levels.shown) / noise,
        "level_rms": levels.rms / noise,
        "level_rms_adu": levels.rms,
        "lot_gain": float(_largest(stars.lots).max()),
        "phot_scatter": stars.scatter,
        "phot_uniformity": stars.uniformity,
        "repeat_median": stars.repeat_median,
        "repeat_p95": stars.repeat_p95,
        "catalogue_scatter": stars.catalogue,
        "astrom_median": places.median,
        "astrom_p95": places.p95,
        "lot_shift": _largest_shift(places.lots),
        "position_median": places.position_median,
        "catalogue_median": places.catalogue_median,
        "noise_ratio": found.noise.ratio,
        "noise_evenness": found.noise.evenness,
        "fwhm_ratio": sharp.ratio,
        "fwhm_evenness": sharp.evenness,
        "lot_fwhm": float(np.nanmax(sharp.lots)) if np.isfinite(sharp.lots).any() else math.nan,
        "ellipticity": sharp.ellipticity,
        "trail": max((trail.contrast for trail in found.trails), default=0.0),
        "holes": found.hole_ppm,
        "missing": 1 - found.noise.complete,
    }


def _figure(
    key: str,
    value: Floats | float,
    graded: bool = True,
    allowed: Floats | None = None,
    chance: Floats | None = None,
) -> Figure:
    """A figure of one number, or of one per colour; not graded, it is only told.

    `allowed`, of the same shape, adds to the limits in quadrature; `chance` is noted.
    """
    limit = THRESHOLDS[key]
    if not graded:
        limit = Threshold(limit.group, limit.unit)
    values = np.atleast_1d(np.asarray(value, float))
    colours = tuple(values.tolist()) if np.ndim(value) else ()
    worst = int(np.nanargmax(values)) if np.isfinite(values).any() else 0
    number = float(values[worst]) if math.isfinite(values[worst]) else math.nan
    if allowed is not None and math.isfinite(allowed[worst]):
        more = float(allowed[worst])
        limit = replace(limit, warn=math.hypot(limit.warn, more), fail=math.hypot(limit.fail, more))
    varies = float(chance[worst]) if chance is not None and math.isfinite(number) else math.nan
    return Figure(key, limit.group, limit.unit, number, limit.warn, limit.fail, limit.grade(number), colours, varies)


def _largest(offsets: Offsets) -> Floats:
    """Largest sure offset ``(K,)`` of any lot; 0 if none is sure, NaN if nothing could be compared."""
    if not np.isfinite(offsets.value).any():
        return np.full(offsets.value.shape[1], np.nan)
    return np.asarray(sure(offsets).max(axis=0))


def _largest_shift(offsets: Offsets) -> float:
    shift = sure(offsets)
    return float(np.hypot(shift[:, 0], shift[:, 1]).max()) if np.isfinite(offsets.value).any() else math.nan


def _maps(evidence: Evidence, surface: Surface, found: Measures) -> dict[str, Map]:
    side, (ny, nx), cell = float(surface.region), evidence.shape, found.sharpness.cell_px
    level, px = found.levels.residual, found.levels.residual_px
    depth = surface.coverage if surface.coverage is not None else found.noise.depth
    maps = {
        "sky": Map(found.levels.sky, "ADU", side, side),
        "level": Map(level, "ADU", px, px),
        "seam": Map(found.seams.map, "sigma", side, side),
        "noise": Map(found.noise.map, "" if evidence.frames is not None else "ADU", side, side),
        "fwhm": Map(found.sharpness.fwhm_map, "px", cell, cell),
        "ellipticity": Map(found.sharpness.ellipticity_map, "", cell, cell),
        "zero_point": Map(found.photometry.map, "mmag", nx / GRID, ny / GRID),
    }
    if depth is not None:
        maps["coverage"] = Map(nan_median(surface.regions(depth)).astype(np.float32), "frames", side, side)
    return {name: each for name, each in maps.items() if np.isfinite(each.values).any()}


def as_json(verdict: Verdict, language: str = "en") -> dict[str, Any]:
    """The verdict as plain data; NaN and infinity are null, and of a map there is only what it spans.

    Positions and lengths are in mosaic pixels, rows from the bottom as in the file; lots and frames are counted from 0.
    """
    seam_names = ("x", "y", "angle", "step", "step_adu", "channel", "frame", "lot")
    finding_names = ("key", "grade", "lot", "frame", "x", "y", "values")
    data = {
        "schema": SCHEMA,
        "version": __version__,
        "grade": verdict.grade,
        "width": verdict.shape[1],
        "height": verdict.shape[0],
        "pixel_noise_adu": verdict.noise,
        "arcsec_per_px": verdict.measures.astrometry.scale,
        "figures": {
            figure.key: {"label": render(f"verdict_{figure.key}", {}, language), **_record(figure)}
            for figure in verdict.figures
        },
        "findings": [{"text": f.text(language), **_record(f, *finding_names)} for f in verdict.findings],
        "lots": [_record(line) for line in verdict.lots],
        "seams": [_record(seam, *seam_names) for seam in verdict.measures.seams.worst],
        "trails": [_record(trail) for trail in verdict.measures.trails],
        "holes": [_record(hole) for hole in verdict.measures.holes],
        "frames": _frame_rows(verdict),
        "maps": {name: _map_facts(each) for name, each in verdict.maps.items()},
    }
    return dict(_plain(data))


def write_json(verdict: Verdict, path: Path, language: str = "en") -> None:
    """Write `as_json` to a file."""
    path.write_text(json.dumps(as_json(verdict, language), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _map_facts(each: Map) -> dict[str, Any]:
    low, middle, high = np.nanpercentile(each.values, (5, 50, 95))
    facts = {"unit": each.unit, "shape": each.values.shape, "cell_width_px": each.width, "cell_height_px": each.height}
    return {**facts, "p5": low, "p50": middle, "p95": high}


def _frame_rows(verdict: Verdict) -> list[dict[str, Any]]:
    """What was measured of every frame; dx, dy: its median shift against the other frames."""
    frames = verdict.frames
    if frames is None:
        return []
    columns = {
        "name": frames.name,
        "date": frames.date,
        "lot": frames.lot,
        "fwhm_px": frames.fwhm,
        "ellipticity": frames.ellipticity,
        "sky_adu": frames.sky,
        "gain": frames.gain,
        "noise_adu": frames.noise,
        "weight": frames.weight,
        "dx_px": verdict.measures.astrometry.vectors[:, 2],
        "dy_px": verdict.measures.astrometry.vectors[:, 3],
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _record(thing: Any, *names: str) -> dict[str, Any]:
    return {name: value for name, value in vars(thing).items() if not names or name in names}


def _plain(value: Any) -> Any:
    """Anything as JSON can hold it, floats to six digits."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
