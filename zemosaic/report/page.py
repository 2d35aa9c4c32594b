"""The report of a run: one page that needs nothing but itself, and its numbers as JSON."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from zemosaic.events import render
from zemosaic.files import write_whole
from zemosaic.reasons import translated
from zemosaic.report import figures
from zemosaic.report.sections import judged
from zemosaic.report.story import Story, changed_settings, headline, report_json, versions
from zemosaic.report.thresholds import GRADES
from zemosaic.report.verdict import Verdict
from zemosaic.report.words import NO_BREAK, Words, duration, resource, texts
from zemosaic.settings import settings_toml
from zemosaic.workplace import REPORT_ENDINGS

PICTURE_BYTES = 1_500_000  # of the embedded JPEG, before base64
_PICTURE_SIDES = (2600, 2000, 1500, 1100)  # px, tried in this order
_MOST_WARNINGS = 200  # on the page; the JSON has all


@dataclass(frozen=True)
class ReportPaths:
    """The files of a report."""

    html: Path
    json: Path


def report_paths(product: Path) -> ReportPaths:
    """Where the report of a product goes: beside it, with its stem."""
    return ReportPaths(*(product.with_name(product.stem + end) for end in REPORT_ENDINGS))


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
    write_whole(paths.json, data.encode(), durable=True)
    # File names may hold bytes that are no text.
    text = page(story, verdict, read_picture(preview)).encode("utf-8", "backslashreplace")
    write_whole(paths.html, text, durable=True)
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


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
    return environment.from_string(resource("templates", "report.html"))


# --- what the template gets -----------------------------------------------------------------------------------------


def _context(story: Story, verdict: Verdict | None, picture: NDArray[np.uint8]) -> dict[str, Any]:
    say = Words(texts(story.language))
    script = resource("templates", "report.js")
    shown, data = _jpeg(picture)
    return {
        "language": story.language,
        "say": say,
        "title": story.facts.object or story.name,
        "style": Markup(resource("templates", "report.css")),
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
        **judged(story, verdict, say),
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


def _facts(story: Story, say: Words) -> list[dict[str, str]]:
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
        ("fact_time", duration(story.seconds), say("fact_time_more", version=versions()["zemosaic"])),
    ]
    if math.isfinite(story.scale):
        width, height = field
        more = say("fact_field", width=width, height=height, scale=say.number(story.scale))
        rows[0] = (*rows[0][:2], more)
    if exposures:
        typical = float(np.median(exposures))
        more = say("fact_exposure_more", n=len(exposures), seconds=say.short(typical))
        rows.insert(2, ("fact_exposure", duration(sum(exposures)), more))
    return [{"name": say(key), "value": value, "more": more} for key, value, more in rows]


# --- frames, lots, time ---------------------------------------------------------------------------------------------


def _frames(story: Story, verdict: Verdict | None, say: Words) -> dict[str, Any]:
    lots = verdict.lots if verdict else ()
    sky = story.sky
    cpu = sum(phase.cpu for phase in story.phases)
    return {
        "frames_svg": Markup(say.figure(figures.frames_figure(list(story.ledger), say))),
        "footprint": Markup(say.figure(figures.footprint_figure(lots, story, say))) if lots and sky else "",
        "lots_note": say("lots_note", ra=f"{say.number(sky.ra, 6)}°", dec=f"{say.number(sky.dec, 6)}°") if sky else "",
        "lot_columns": [say("lot"), *(say(f"lot_{name}") for name in _LOT_COLUMNS)],
        "lot_rows": _lot_rows(story, verdict, say),
        "phases": _waterfall(story, say),
        "time_note": say("time_note", seconds=say.number(story.seconds), cpu=say.number(cpu)),
    }


def _waterfall(story: Story, say: Words) -> list[dict[str, Any]]:
    """Where on the way of the run each phase began, and how much of it it took, in percent."""
    whole = story.seconds or 1.0
    return [
        {
            "title": render(f"phase_{phase.name}", {}, story.language),
            "seconds": f"{say.number(phase.seconds, 2)}{NO_BREAK}s",
            "share": f"{100 * phase.seconds / whole:.0f}{NO_BREAK}%",
            "start": f"{100 * phase.start / whole:.2f}",
            "length": f"{100 * phase.seconds / whole:.2f}",
        }
        for phase in story.phases
    ]


_LOT_COLUMNS = ("frames", "gain", "sky", "shift", "fwhm", "median", "tile_gain", "seconds")


def _lot_rows(story: Story, verdict: Verdict | None, say: Words) -> list[list[str]]:
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


def _run(story: Story, say: Words) -> dict[str, Any]:
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


def _ledger(story: Story, say: Words) -> dict[str, Any]:
    counts, files = story.ledger.counts(), len(story.ledger)
    words = {status: say(f"status_{status}") for status in counts}
    columns = [{"key": key, "title": say(f"col_{key}"), "text": key in _TEXT_COLUMNS} for key in _COLUMNS]
    rows = [[_cell(key, row[key], story.language) for key in _COLUMNS] for row in story.ledger.rows()]
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


def _cell(key: str, value: Any, language: str) -> Any:
    """As the page shows it: lots from 1, shares in percent, four digits, null for what is unknown."""
    if isinstance(value, list):
        return [_cell(key, each, language) for each in value]
    if key in ("reason", "remark"):
        return translated(value, language)
    if key in ("lot", "stars") and value == -1:
        return None
    if key == "lot":
        return value + 1
    if key == "rejected_share" and value is not None:
        value = 100 * value
    return float(f"{value:.4g}") if isinstance(value, float) else value
