"""What is at fault, by name: the lots that stand apart, seams, trails and holes, each with a sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from zemosaic.events import render
from zemosaic.report.defects import Trail
from zemosaic.report.evidence import Evidence, Floats
from zemosaic.report.lots import Offsets, sure
from zemosaic.report.measures import Measures
from zemosaic.report.seams import SeamFigures
from zemosaic.report.thresholds import THRESHOLDS, Grade

_NAMED = 5  # lots, seams and trails of each kind that get a sentence


@dataclass(frozen=True)
class Finding:
    """One fault, by name.

    Parameters
    ----------
    key : str
        The message ``verdict_found_<key>`` says it in words, filled with `values`.
    grade : {"WARN", "FAIL"}
    values : mapping
        Numbers; lots in it are counted from 1, as in the log.
    lot, frame : int
        At fault, counted from 0; -1 where it is not one.
    x, y : float
        Where, mosaic pixels.
    """

    key: str
    grade: Grade
    values: Mapping[str, Any]
    lot: int = -1
    frame: int = -1
    x: float = math.nan
    y: float = math.nan

    def text(self, language: str = "en") -> str:
        """The sentence."""
        return render(f"verdict_found_{self.key}", self.values, language)


@dataclass(frozen=True)
class LotLine:
    """One lot in numbers; NaN where it shares too little with the others.

    Parameters
    ----------
    lot, frames : int
        Index, from 0, and how many frames it has.
    gain, gain_error : float
        mmag against the other lots, of all colours together or of the one that is most surely off.
    sky, sky_error : float
        ADU.
    dx, dy, shift_error : float
        px.
    fwhm : float
        Median of its frames over that of all lots.
    outline : ndarray
        ``(n, 2)`` x, y of the convex hull of its frames, mosaic pixels.
    """

    lot: int
    frames: int
    gain: float
    gain_error: float
    sky: float
    sky_error: float
    dx: float
    dy: float
    shift_error: float
    fwhm: float
    outline: Floats


def _significance(offsets: Offsets) -> Floats:
    """Sizes ``(L, K)`` of the offsets in units of their errors, 0 where unknown."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num(np.abs(offsets.value / offsets.error), posinf=0.0)


def lot_lines(evidence: Evidence, found: Measures) -> tuple[LotLine, ...]:
    """One line per lot that has frames."""
    if evidence.frames is None:
        return ()
    gains, skies, shifts = found.photometry.lots, found.levels.lots, found.astrometry.lots
    lines = []
    for lot in range(evidence.lots):
        members = np.flatnonzero(evidence.frames.lot == lot)
        if not len(members):
            continue
        gain, sky = (int(np.argmax(_significance(o)[lot])) for o in (gains, skies))
        lines.append(
            LotLine(
                lot=lot,
                frames=len(members),
                gain=float(gains.value[lot, gain]),
                gain_error=float(gains.error[lot, gain]),
                sky=float(skies.value[lot, sky]),
                sky_error=float(skies.error[lot, sky]),
                dx=float(shifts.value[lot, 0]),
                dy=float(shifts.value[lot, 1]),
                shift_error=float(np.max(shifts.error[lot])),
                fwhm=float(found.sharpness.lots[lot]),
                outline=_hull(evidence.frames.outline[members].reshape(-1, 2)),
            )
        )
    return tuple(lines)


def find_faults(found: Measures, lots: Sequence[LotLine], noise: Floats) -> tuple[Finding, ...]:
    """Every fault that can be named, the graver ones first.

    Parameters
    ----------
    found : Measures
    lots : sequence of LotLine
    noise : ndarray
        ``(C,)`` noise of a pixel, ADU.
    """
    findings = [
        *_lot_faults(found, lots, noise),
        *_seam_faults(found.seams),
        *_trail_faults(found.trails),
        *_hole_faults(found),
    ]
    return tuple(sorted(findings, key=lambda finding: finding.grade != "FAIL"))


def _lot_faults(found: Measures, lots: Sequence[LotLine], noise: Floats) -> Iterator[Finding]:
    """Lots that are off in brightness, sky, position or sharpness."""
    gains, skies, shifts = (sure(o) for o in (found.photometry.lots, found.levels.shown, found.astrometry.lots))
    for key, sizes in {
        "lot_gain": gains.max(axis=1, initial=0),
        "lot_sky": (skies / noise).max(axis=1, initial=0) if len(skies) else np.zeros(0),
        "lot_shift": np.hypot(shifts[:, 0], shifts[:, 1]),
        "lot_fwhm": np.nan_to_num(found.sharpness.lots),
    }.items():
        for line in sorted(lots, key=lambda line: -sizes[line.lot])[:_NAMED]:
            grade = THRESHOLDS[key].grade(float(sizes[line.lot]))
            if grade in ("WARN", "FAIL"):
                x, y = (float(v) for v in line.outline.mean(axis=0))
                yield Finding(key, grade, _lot_values(key, line), line.lot, x=x, y=y)


def _lot_values(key: str, line: LotLine) -> dict[str, Any]:
    values: dict[str, dict[str, float]] = {
        "lot_gain": {"mmag": line.gain, "error": line.gain_error},
        "lot_sky": {"adu": line.sky, "error": line.sky_error},
        "lot_shift": {"dx": line.dx, "dy": line.dy, "error": line.shift_error},
        "lot_fwhm": {"ratio": line.fwhm},
    }
    return {"lot": line.lot + 1, "frames": line.frames, **values[key]}


def _seam_faults(seams: SeamFigures) -> Iterator[Finding]:
    for seam in seams.worst[:_NAMED]:
        beyond = math.sqrt(max(seam.step**2 - seam.chance**2, 0))
        grade = THRESHOLDS["seam_max"].grade(beyond)
        if grade in ("WARN", "FAIL"):
            key = "seam_lot" if seam.lot >= 0 else "seam"
            values = {"x": seam.x, "y": seam.y, "sigma": abs(seam.step), "adu": abs(seam.step_adu), "lot": seam.lot + 1}
            yield Finding(key, grade, values, seam.lot, seam.frame, seam.x, seam.y)


def _trail_faults(trails: Sequence[Trail]) -> Iterator[Finding]:
    for trail in trails[:_NAMED]:
        values = {"length": trail.length, "sigma": trail.contrast}
        values |= {name: getattr(trail, name) for name in ("x0", "y0", "x1", "y1")}
        grade = THRESHOLDS["trail"].grade(trail.contrast)
        if grade in ("WARN", "FAIL"):
            yield Finding("trail", grade, values, x=(trail.x0 + trail.x1) / 2, y=(trail.y0 + trail.y1) / 2)


def _hole_faults(found: Measures) -> Iterator[Finding]:
    grade = THRESHOLDS["holes"].grade(found.hole_ppm)
    if grade in ("WARN", "FAIL"):
        largest = found.holes[0]
        values = {"ppm": found.hole_ppm, "area": largest.area, "x": largest.x, "y": largest.y}
        yield Finding("holes", grade, values, x=largest.x, y=largest.y)


def _hull(points: Floats) -> Floats:
    return np.asarray(cv2.convexHull(points.astype(np.float32)), float).reshape(-1, 2)
