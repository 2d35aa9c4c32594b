"""What the report page shows of the verdict: a section for each group of figures, the faults, the worst seams."""

from __future__ import annotations

import base64
import math
from typing import Any

import cv2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from zemosaic.events import render
from zemosaic.report import figures
from zemosaic.report.seams import Seam
from zemosaic.report.story import Story
from zemosaic.report.surface import robust_sigma
from zemosaic.report.thresholds import GRADES, THRESHOLDS
from zemosaic.report.verdict import Figure, Verdict
from zemosaic.report.words import NO_BREAK, Words
from zemosaic.tiles import FloatImage

_THUMBNAIL = 96  # px
_THUMBNAIL_BLUR = 2.5  # px: a step of a fraction of the noise is seen only where noise is averaged
_THUMBNAIL_SPAN = 3.5  # noises of a blurred pixel between middle grey and black or white
_UNITS = {"sigma": "σ"}


def judged(story: Story, verdict: Verdict | None, say: Words) -> dict[str, Any]:
    if verdict is None:
        return {"sections": [], "findings": [], "seams": [], "outlines": [], "sigma_note": ""}
    drawn = _figures(story, verdict, say)
    groups: dict[str, list[Figure]] = {}
    for figure in verdict.figures:
        groups.setdefault(figure.group, []).append(figure)
    noise = " / ".join(say.number(value) for value in verdict.noise)
    return {
        "sections": [
            {
                "key": group,
                "title": render(f"verdict_group_{group}", {}, story.language),
                "grade": max((figure.grade for figure in members), key=GRADES.index),
                "good": say(f"good_{group}"),
                "figures": drawn.get(group, []),
                "rows": [_row(figure, story, say) for figure in members],
            }
            for group, members in groups.items()
        ],
        "findings": [
            {"grade": f.grade, "text": f.text(story.language), "place": math.isfinite(f.x + f.y), "x": f.x, "y": f.y}
            for f in verdict.findings
        ],
        "seams": [_worst(seam, verdict, say) for seam in verdict.measures.seams.worst],
        "outlines": [
            {
                "points": " ".join(f"{x:.0f},{story.shape[0] - 1 - y:.0f}" for x, y in line.outline),
                "colour": figures.LOT_COLOURS[line.lot % len(figures.LOT_COLOURS)],
            }
            for line in verdict.lots
        ],
        "sigma_note": say("sigma_note", noise=noise),
    }


def _row(figure: Figure, story: Story, say: Words) -> dict[str, Any]:
    """A figure with its threshold; what it means for the eye is the meter: where the value lies in its range."""
    unit = _UNITS.get(figure.unit, figure.unit)
    known = math.isfinite(figure.value)
    number = say.number(figure.value)
    if math.isfinite(figure.chance):
        number += f" ± {say.number(figure.chance, 2)}"
    value = f"{number} {unit}".strip().replace(" ", NO_BREAK) if known else say("unknown")
    if known and unit == "px" and math.isfinite(story.scale):
        value += f" ({say.number(figure.value * story.scale)}″)"
    if math.isfinite(figure.fail):
        limit = say("limit_fail", warn=say.short(figure.warn), fail=say.short(figure.fail))
    elif math.isfinite(figure.warn):
        limit = say("limit_warn", warn=say.short(figure.warn))
    else:
        limit = say("limit_note")
    colours = ""
    if len(figure.channels) == 3:
        shown = zip("RGB", figure.channels, strict=True)
        colours = " ".join(f"{name}{NO_BREAK}{say.number(v)}" for name, v in shown)
    return {
        "label": render(f"verdict_{figure.key}", {}, story.language),
        "value": value,
        "grade": figure.grade,
        "limit": limit,
        "colours": colours,
        "meter": _meter(figure),
    }


def _meter(figure: Figure) -> dict[str, float] | None:
    """Ends of the good range and of that of warnings, and where the value is, in percent of the meter."""
    if figure.grade == "NONE":
        return None
    top = 1.3 * figure.fail if math.isfinite(figure.fail) else 2 * figure.warn
    fail = 100 * figure.fail / top if math.isfinite(figure.fail) else 100.0
    return {"warn": 100 * figure.warn / top, "fail": fail, "at": min(98.8, max(0.0, 100 * figure.value / top))}


def _figures(story: Story, verdict: Verdict, say: Words) -> dict[str, list[dict[str, Any]]]:
    """The plots of every group, in order."""
    measures, maps, lots = verdict.measures, verdict.maps, verdict.lots
    found: dict[str, list[dict[str, Any]]] = {}

    def add(group: str, key: str, svg: str, title: str = "") -> None:
        figure = {"title": say(title or f"map_{key}"), "note": say(f"note_{key}"), "svg": Markup(say.figure(svg))}
        found.setdefault(group, []).append(figure)

    def reach(key: str, limit: str, unit: float = 1.0) -> float:
        """Up to where the colours of a map go: what is a fault, and what is there."""
        there = np.nanpercentile(np.abs(maps[key].values), 99) if key in maps else 0.0
        return max(THRESHOLDS[limit].fail * unit, float(there))

    def add_map(group: str, key: str, title: str = "", **options: Any) -> None:
        if key in maps:
            add(group, key, figures.map_figure(key, maps[key], story.shape, **options), title)

    noise = min(verdict.noise)
    seams = figures.mark_seams(measures.seams.worst)
    add_map("seams", "seam", limits=(0.0, reach("seam", "seam_p95")), colours="inferno", extra=seams)
    for group, key, limit, size in (
        ("levels", "level", "level_rms", noise),
        ("photometry", "zero_point", "phot_uniformity", 1.0),
    ):
        top = reach(key, limit, size)
        add_map(group, key, limits=(-top, top), colours=figures.DIVERGING)
    for group, axis, key, unit in (("levels", "sky", "lot_sky", "ADU"), ("photometry", "gain", "lot_gain", "mmag")):
        scale = noise if THRESHOLDS[key].unit == "sigma" else 1.0
        limits = THRESHOLDS[key].warn * scale, THRESHOLDS[key].fail * scale
        if any(math.isfinite(getattr(line, axis)) for line in lots):
            add(group, key, figures.offsets_figure(key, lots, axis, limits, unit, say("lot")))
    vectors, frames = measures.astrometry.vectors, verdict.frames
    if frames is not None and np.isfinite(vectors).all(axis=1).any():
        svg = figures.vector_figure("vectors", vectors, frames.lot, story.shape, story.scale, say)
        add("astrometry", "vectors", svg)
    stars = measures.astrometry.catalogue_vectors
    if len(stars):
        none = np.zeros(len(stars), np.int64)
        add(
            "astrometry",
            "catalogue",
            figures.vector_figure("catalogue", stars, none, story.shape, story.scale, say),
        )
    if frames is not None:
        add_map("noise", "noise", limits=(0.0, reach("noise", "noise_ratio")))
    else:
        add_map("noise", "noise", "map_noise_alone")
    if "fwhm" in maps:
        middle = float(np.nanmedian(maps["fwhm"].values))
        fault = THRESHOLDS["fwhm_evenness"].fail
        add_map("sharpness", "fwhm", limits=(middle / fault, reach("fwhm", "fwhm_evenness", middle)))
    add_map("sharpness", "ellipticity", limits=(0.0, reach("ellipticity", "ellipticity")))
    marks = figures.mark_defects(measures.trails, measures.holes)
    add_map("defects", "coverage", extra=marks)
    return found


def _worst(seam: Seam, verdict: Verdict, say: Words) -> dict[str, Any]:
    """A seam's thumbnail and words."""
    angle = math.radians(seam.angle)
    dx, dy = math.cos(angle), -math.sin(angle)
    ticks = " ".join(f"M{s * 36 * dx:.1f} {s * 36 * dy:.1f}L{s * 72 * dx:.1f} {s * 72 * dy:.1f}" for s in (-1, 1))
    row, half = verdict.shape[0] - 1 - seam.y, max(40.0, verdict.shape[1] / 90)
    where = f"x {seam.x:.0f}, y {seam.y:.0f}"
    if seam.lot >= 0:
        where += ", " + say("worst_lot", lot=seam.lot + 1)
    return {
        "x": f"{seam.x:.1f}",
        "y": f"{seam.y:.1f}",
        "path": f"M{seam.x - half * dx:.0f} {row - half * dy:.0f}L{seam.x + half * dx:.0f} {row + half * dy:.0f}",
        "data": _thumbnail(seam),
        "ticks": ticks,
        "text": say("worst_step", step=say.signed(seam.step), adu=say.signed(seam.step_adu)),
        "where": where,
    }


def _thumbnail(seam: Seam) -> str:
    """Base64 of a grey PNG of a seam, which lies in its middle."""
    whole = np.full((_THUMBNAIL, _THUMBNAIL), np.nan, np.float32)
    window, half = seam.window, _THUMBNAIL // 2
    y0, x0 = window.y0 - (int(seam.y) - half), window.x0 - (int(seam.x) - half)
    part = seam.thumbnail[: _THUMBNAIL - y0, : _THUMBNAIL - x0]
    whole[y0 : y0 + part.shape[0], x0 : x0 + part.shape[1]] = part
    grey = np.where(np.isfinite(whole), _grey(whole), np.uint8(0))
    return base64.b64encode(cv2.imencode(".png", np.ascontiguousarray(grey[::-1]))[1].tobytes()).decode()


def _grey(image: FloatImage) -> NDArray[np.uint8]:
    """A picture ``(h, w)`` in which a faint step is seen: slope taken off, stars capped, smoothed, stretched."""
    there = np.isfinite(image)
    y, x = np.nonzero(there)
    if len(x) < 3:
        return np.zeros(image.shape, np.uint8)
    design = np.stack([np.ones_like(x), x, y], axis=1).astype(float)
    flat = np.zeros(image.shape)
    flat[there] = image[there]
    # Twice, the second time without the stars; a plane cannot take a step off.
    for _ in range(2):
        plane = np.linalg.lstsq(design, flat[there], rcond=None)[0]
        flat[there] -= design @ plane
        limit = 3 * robust_sigma(flat[there])
        flat[there] = np.clip(flat[there], -limit, limit)
    smooth = cv2.GaussianBlur(flat, (0, 0), _THUMBNAIL_BLUR)
    span = _THUMBNAIL_SPAN * robust_sigma(smooth[there])
    return np.clip(128 + 127 * smooth / max(span, 1e-9), 0, 255).astype(np.uint8)
