"""The report of a run: one page that needs nothing but itself, and its numbers as JSON."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from zemosaic.events import LANGUAGES, render
from zemosaic.report import figures
from zemosaic.report.seams import Seam
from zemosaic.report.story import Story, changed_settings, headline, report_json, versions
from zemosaic.report.thresholds import GRADES, THRESHOLDS
from zemosaic.report.verdict import Figure, Map, Verdict
from zemosaic.settings import settings_toml
from zemosaic.tiles import FloatImage

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PICTURE_BYTES = 1_500_000  # of the embedded JPEG, before base64
_PICTURE_SIDES = (2600, 2000, 1500, 1100)  # px, tried in this order
_THUMBNAIL = 96  # px
_THUMBNAIL_BLUR = 2.0  # px: a step of a fraction of the noise is seen only where noise is averaged
_THUMBNAIL_SPAN = 3.0  # pixel noises between middle grey and black or white
_MOST_WARNINGS = 200  # on the page; the JSON has all
_UNITS = {"sigma": "σ"}
_NO_BREAK = "\u00a0"

Text = Mapping[str, str]


@dataclass(frozen=True)
class ReportPaths:
    """The files of a report."""

    html: Path
    json: Path


def report_paths(product: Path) -> ReportPaths:
    """Where the report of a product goes: beside it, with its stem."""
    return ReportPaths(*(product.with_name(f"{product.stem}_report{end}") for end in (".html", ".json")))


def write_report(story: Story, verdict: Verdict | None, product: Path, preview: Path) -> ReportPaths:
    """Write page and JSON beside a product, each as a ``.part`` first.

    Parameters
    ----------
    story, verdict
        What there is to tell; no verdict where there was too little to judge.
    product, preview : Path
        FITS file and picture that the run has saved.

    Raises
    ------
    OSError
        They cannot be written, or the picture cannot be read.
    """
    paths = report_paths(product)
    data = json.dumps(report_json(story, verdict), indent=1, allow_nan=False)
    _write(paths.json, data.encode())
    # File names may hold bytes that are no text.
    _write(paths.html, page(story, verdict, read_picture(preview)).encode("utf-8", "backslashreplace"))
    return paths


def page(story: Story, verdict: Verdict | None, picture: NDArray[np.uint8]) -> str:
    """The page as text.

    Parameters
    ----------
    story, verdict
        As for `write_report`.
    picture : ndarray
        ``(h, w, 3)`` uint8, blue first, the last row of the mosaic first.
    """
    return _template().render(_context(story, verdict, picture))


def read_picture(path: Path) -> NDArray[np.uint8]:
    """The preview of a product, on black, ``(h, w, 3)`` uint8, blue first.

    Raises
    ------
    OSError
        If it is no picture.
    """
    picture = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    if picture is None:
        raise OSError(f"{path} is no picture")
    return np.asarray(picture, np.uint8)


def texts(language: str) -> Text:
    """The texts of the page, key to text; in English if the language is unknown."""
    code = language if language in LANGUAGES else "en"
    return tomllib.loads(_resource("locale", f"{code}.toml"))


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _resource(folder: str, name: str) -> str:
    return resources.files("zemosaic.report").joinpath(folder).joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
    return environment.from_string(_resource("templates", "report.html"))


# --- words and numbers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Words:
    """The page's language: texts, and how numbers are written."""

    catalogue: Text

    def __call__(self, key: str, **values: Any) -> str:
        return self.catalogue[key].format_map(values) if values else self.catalogue[key]

    def number(self, value: float, digits: int = 3) -> str:
        """Three significant digits, never an exponent for what people read."""
        if not math.isfinite(value):
            return "–"
        places = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
        text = f"{value:.{min(places, 4)}f}"
        if float(text) == 0:
            text = "0"
        return text.replace("-", "−").replace(".", self.catalogue["decimal"])

    def signed(self, value: float, error: float | None = None) -> str:
        """With its sign, and its error if it has one."""
        if not math.isfinite(value):
            return "–"
        text = ("+" if value > 0 else "") + self.number(value, 2)
        return text if error is None or not math.isfinite(error) else f"{text} ± {self.number(error, 2)}"


# --- what the template gets -----------------------------------------------------------------------------------------


def _context(story: Story, verdict: Verdict | None, picture: NDArray[np.uint8]) -> dict[str, Any]:
    say = _Words(texts(story.language))
    script = _resource("templates", "report.js")
    shown, data = _jpeg(picture)
    return {
        "language": story.language,
        "say": say,
        "title": story.facts.object or story.name,
        "style": Markup(_resource("templates", "report.css")),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "headline": headline(verdict, story.language),
        "grade": verdict.grade if verdict else "NONE",
        "grade_words": {grade: say(f"grade_{grade.lower()}") for grade in GRADES},
        "problem": "" if verdict else say("no_verdict", reason=story.problem),
        "width": story.shape[1],
        "height": story.shape[0],
        "picture_width": shown[1],
        "picture_height": shown[0],
        "picture_data": data,
        "facts": _facts(story, say),
        **_judged(story, verdict, say),
        **_frames(story, verdict, say),
        **_run(story, say),
        **_ledger(story, say),
    }


def _jpeg(picture: NDArray[np.uint8]) -> tuple[tuple[int, int], str]:
    """Shape and base64 of a JPEG of at most `PICTURE_BYTES`."""
    height, width = picture.shape[:2]
    for side in _PICTURE_SIDES:
        factor = min(1.0, side / max(height, width))
        size = max(1, round(width * factor)), max(1, round(height * factor))
        small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA) if factor < 1 else picture
        data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 82])[1]
        if len(data) <= PICTURE_BYTES:
            break
    return (size[1], size[0]), base64.b64encode(data.tobytes()).decode()


def _facts(story: Story, say: _Words) -> list[dict[str, str]]:
    """The tiles below the headline."""
    ny, nx = story.shape
    used, counts = story.ledger.used, story.ledger.counts()
    exposures = [r.exposure for r in used if math.isfinite(r.exposure)]
    field = (say.number(size * story.scale / 3600) for size in (nx, ny))
    rows = [
        ("fact_size", say("fact_size_value", width=nx, height=ny), ""),
        (
            "fact_frames",
            say("fact_frames_value", used=len(used), files=len(story.ledger)),
            say("fact_frames_more", **counts),
        ),
        ("fact_route", story.facts.route, say("fact_lots", n=len(story.tiles)) if story.tiles else ""),
        ("fact_time", _duration(story.seconds), say("fact_time_more", version=versions()["zemosaic"])),
    ]
    if math.isfinite(story.scale):
        width, height = field
        more = say("fact_field", width=width, height=height, scale=say.number(story.scale))
        rows[0] = (*rows[0][:2], more)
    if exposures:
        typical = say.number(float(np.median(exposures)))
        more = say("fact_exposure_more", n=len(exposures), seconds=typical)
        rows.insert(2, ("fact_exposure", _duration(sum(exposures)), more))
    return [{"name": say(key), "value": value, "more": more} for key, value, more in rows]


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (s, "s")]
    return " ".join(f"{n}{_NO_BREAK}{unit}" for n, unit in parts if n) or f"0{_NO_BREAK}s"


# --- the verdict ----------------------------------------------------------------------------------------------------


def _judged(story: Story, verdict: Verdict | None, say: _Words) -> dict[str, Any]:
    if verdict is None:
        return {"sections": [], "findings": [], "seams": [], "outlines": [], "sigma_note": "", "worst_note": ""}
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
        "worst_note": say("worst_note", span=say.number(_THUMBNAIL_SPAN / _averaged())),
    }


def _row(figure: Figure, story: Story, say: _Words) -> dict[str, Any]:
    """A figure with its threshold; what it means for the eye is the meter: where the value lies in its range."""
    unit = _UNITS.get(figure.unit, figure.unit)
    known = math.isfinite(figure.value)
    value = f"{say.number(figure.value)} {unit}".strip().replace(" ", _NO_BREAK) if known else say("unknown")
    if known and unit == "px" and math.isfinite(story.scale):
        value += f" ({say.number(figure.value * story.scale)}″)"
    if math.isfinite(figure.fail):
        limit = say("limit_fail", warn=say.number(figure.warn), fail=say.number(figure.fail))
    elif math.isfinite(figure.warn):
        limit = say("limit_warn", warn=say.number(figure.warn))
    else:
        limit = say("limit_note")
    colours = ""
    if len(figure.channels) == 3:
        shown = zip("RGB", figure.channels, strict=True)
        colours = " ".join(f"{name}{_NO_BREAK}{say.number(v)}" for name, v in shown)
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


def _figures(story: Story, verdict: Verdict, say: _Words) -> dict[str, list[dict[str, Any]]]:
    """The plots of every group, in order."""
    measures, maps, lots = verdict.measures, verdict.maps, verdict.lots
    found: dict[str, list[dict[str, Any]]] = {}

    def add(group: str, key: str, svg: str, title: str = "") -> None:
        figure = {"title": say(title or f"map_{key}"), "note": say(f"note_{key}"), "svg": Markup(svg)}
        found.setdefault(group, []).append(figure)

    def add_map(group: str, key: str, title: str = "", **options: Any) -> None:
        if key in maps:
            label = say(title or f"map_{key}")
            add(group, key, figures.map_figure(key, maps[key], label, **options), title)

    top = max(THRESHOLDS["seam_p95"].fail, _high(maps.get("seam")))
    add_map("seams", "seam", limits=(0.0, top), colours="inferno", extra=figures.mark_seams(measures.seams.worst))
    add_map("levels", "level", zero=True)
    add_map("photometry", "zero_point", zero=True)
    for group, axis, key, unit in (
        ("levels", "sky", "lot_sky", min(verdict.noise)),
        ("photometry", "gain", "lot_gain", 1.0),
    ):
        limit = THRESHOLDS[key]
        if any(math.isfinite(getattr(line, axis)) for line in lots):
            limits = limit.warn * unit, limit.fail * unit
            add(group, key, figures.offsets_figure(key, lots, axis, limits, say(f"map_{key}")))
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
    add_map("noise", "noise", "" if frames is not None else "map_noise_alone")
    add_map("sharpness", "fwhm")
    add_map("sharpness", "ellipticity")
    marks = figures.mark_defects(measures.trails, measures.holes)
    add_map("defects", "coverage", extra=marks)
    return found


def _high(each: Map | None) -> float:
    return float(np.nanpercentile(each.values, 99)) if each is not None else 0.0


def _averaged() -> float:
    """How many times a blur with `_THUMBNAIL_BLUR` reduces independent noise."""
    return 2 * math.sqrt(math.pi) * _THUMBNAIL_BLUR


def _worst(seam: Seam, verdict: Verdict, say: _Words) -> dict[str, Any]:
    """A seam's thumbnail and words."""
    angle = math.radians(seam.angle)
    dx, dy = math.cos(angle), -math.sin(angle)
    ticks = " ".join(f"M{s * 36 * dx:.1f} {s * 36 * dy:.1f}L{s * 72 * dx:.1f} {s * 72 * dy:.1f}" for s in (-1, 1))
    row, half = verdict.shape[0] - 1 - seam.y, max(40.0, verdict.shape[1] / 90)
    noise = float(np.mean(verdict.noise)) / math.sqrt(len(verdict.noise))
    where = f"x {seam.x:.0f}, y {seam.y:.0f}"
    if seam.lot >= 0:
        where += ", " + say("worst_lot", lot=seam.lot + 1)
    return {
        "x": f"{seam.x:.1f}",
        "y": f"{seam.y:.1f}",
        "path": f"M{seam.x - half * dx:.0f} {row - half * dy:.0f}L{seam.x + half * dx:.0f} {row + half * dy:.0f}",
        "data": _thumbnail(seam, noise),
        "ticks": ticks,
        "text": say("worst_step", step=say.signed(seam.step), adu=say.signed(seam.step_adu)),
        "where": where,
    }


def _thumbnail(seam: Seam, noise: float) -> str:
    """Base64 of a grey PNG of a seam, which lies in its middle; `noise` is that of a pixel of the thumbnail."""
    whole = np.full((_THUMBNAIL, _THUMBNAIL), np.nan, np.float32)
    window, half = seam.window, _THUMBNAIL // 2
    y0, x0 = window.y0 - (int(seam.y) - half), window.x0 - (int(seam.x) - half)
    part = seam.thumbnail[: _THUMBNAIL - y0, : _THUMBNAIL - x0]
    whole[y0 : y0 + part.shape[0], x0 : x0 + part.shape[1]] = part
    grey = np.where(np.isfinite(whole), _grey(whole, noise), np.uint8(0))
    return base64.b64encode(cv2.imencode(".png", np.ascontiguousarray(grey[::-1]))[1].tobytes()).decode()


def _grey(image: FloatImage, noise: float) -> NDArray[np.uint8]:
    there = np.isfinite(image)
    middle = float(np.median(image[there])) if there.any() else 0.0
    # Stars must not smear over the step.
    filled = np.where(there, np.clip(image - middle, -5 * noise, 5 * noise), 0).astype(np.float32)
    smooth = cv2.GaussianBlur(filled, (0, 0), _THUMBNAIL_BLUR)
    span = _THUMBNAIL_SPAN * noise / _averaged()
    return np.clip(128 + 127 * smooth / max(span, 1e-9), 0, 255).astype(np.uint8)


# --- frames, lots, time ---------------------------------------------------------------------------------------------


def _frames(story: Story, verdict: Verdict | None, say: _Words) -> dict[str, Any]:
    lots = verdict.lots if verdict else ()
    titles = [render(f"phase_{phase.name}", {}, story.language) for phase in story.phases]
    ra, dec = story.centre
    cpu = sum(phase.cpu for phase in story.phases)
    known = lots and math.isfinite(story.scale)
    return {
        "frames_svg": Markup(figures.frames_figure(list(story.ledger), say)),
        "footprint": Markup(figures.footprint_figure(lots, story, say)) if known else "",
        "lots_note": say("lots_note", ra=f"{say.number(ra, 6)}°", dec=f"{say.number(dec, 6)}°"),
        "lot_columns": [say("lot"), *(say(f"lot_{name}") for name in _LOT_COLUMNS)],
        "lot_rows": _lot_rows(story, verdict, say),
        "time_svg": Markup(figures.waterfall_figure(story.phases, titles, say)) if story.phases else "",
        "time_note": say("time_note", seconds=say.number(story.seconds), cpu=say.number(cpu)),
    }


_LOT_COLUMNS = ("frames", "gain", "sky", "shift", "fwhm", "median", "tile_gain", "seconds")


def _lot_rows(story: Story, verdict: Verdict | None, say: _Words) -> list[list[str]]:
    """What is known of every lot: by the verdict, and by the books of the mega-tiles."""
    lines = {line.lot: line for line in (verdict.lots if verdict else ())}
    tiles = {tile.index: tile for tile in story.tiles}
    rows = []
    for lot in sorted(lines.keys() | tiles.keys()):
        line, tile = lines.get(lot), tiles.get(lot)
        frames = line.frames if line else tile.frames if tile else 0
        row = [str(lot + 1), str(frames)]
        if line:
            row += [say.signed(line.gain, line.gain_error), say.signed(line.sky, line.sky_error)]
            shift = f"{say.signed(line.dx)}, {say.signed(line.dy)}"
            error = f" ± {say.number(line.shift_error, 2)}" if math.isfinite(line.shift_error) else ""
            row += [shift + error, say.number(line.fwhm)]
        else:
            row += ["–"] * 4
        row += [say.number(tile.median, 4), say.number(tile.gain, 5), say.number(tile.seconds)] if tile else ["–"] * 3
        rows.append(row)
    return rows


# --- the run --------------------------------------------------------------------------------------------------------


def _run(story: Story, say: _Words) -> dict[str, Any]:
    facts, all_texts = story.facts, [event.text for event in story.warnings]
    more = len(all_texts) - _MOST_WARNINGS
    changed = changed_settings(story.settings)
    return {
        "route": facts.route,
        "fallback": facts.fallback,
        "warnings": all_texts[:_MOST_WARNINGS],
        "warning_count": len(all_texts),
        "warnings_more": say("run_warnings_more", n=more, file=f"{story.name}_report.json") if more > 0 else "",
        "history": facts.history,
        "changed": [(name, _toml_value(value), _toml_value(default)) for name, (value, default) in changed.items()],
        "settings_text": settings_toml(story.settings),
        "cards": facts.cards,
        "versions": versions(),
    }


def _toml_value(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


# --- the ledger -----------------------------------------------------------------------------------------------------

_TEXT_COLUMNS = ("file", "status", "reason", "date_obs", "remark")
_COLUMNS = (
    "file",
    "status",
    "reason",
    "lot",
    "date_obs",
    "exposure",
    "weight",
    "gain",
    "level",
    "rejected_share",
    "fwhm",
    "ellipticity",
    "trailing",
    "sky",
    "stars",
    "snr",
    "transparency",
    "remark",
)


def _ledger(story: Story, say: _Words) -> dict[str, Any]:
    counts, files = story.ledger.counts(), len(story.ledger)
    words = {status: say(f"ledger_{status}") for status in counts}
    columns = [{"key": key, "title": say(f"col_{key}"), "text": key in _TEXT_COLUMNS} for key in _COLUMNS]
    rows = [[_cell(key, row[key]) for key in _COLUMNS] for row in story.ledger.rows()]
    return {
        "ledger": {
            "columns": columns,
            "rows": rows,
            "words": words | {"page": say("ledger_page"), "none": say("ledger_none")},
            "decimal": say("decimal"),
        },
        "ledger_note": say("ledger_note", files=files, **counts),
        "ledger_no_script": say("ledger_no_script", file=f"{story.name}_frames.csv"),
        "json_note": say("json_note", json=f"{story.name}_report.json", csv=f"{story.name}_frames.csv"),
    }


def _cell(key: str, value: Any) -> Any:
    """As the page shows it: lots from 1, shares in percent, four digits, null for what is unknown."""
    if isinstance(value, list):
        return [_cell(key, each) for each in value]
    if key in ("lot", "stars") and value == -1:
        return None
    if key == "lot":
        return value + 1
    if key == "rejected_share" and value is not None:
        value = 100 * value
    return float(f"{value:.4g}") if isinstance(value, float) else value
