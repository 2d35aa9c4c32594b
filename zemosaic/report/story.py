"""What a run tells of itself beside the verdict: its way, its time, its warnings, its books; and all of it as JSON."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

import numpy as np
from astropy.wcs import WCS

from zemosaic import __version__
from zemosaic.canvas import pixel_scale
from zemosaic.events import Event, render
from zemosaic.ledger import Ledger, TileRecord
from zemosaic.product import ProductFacts
from zemosaic.report.chronicle import Phase
from zemosaic.report.verdict import Verdict, as_json
from zemosaic.settings import Settings

SCHEMA = "zemosaic.report/1"

#: Units of what the JSON does not name them for, by where it is; "sigma" = noise of one pixel.
UNITS: Mapping[str, Mapping[str, str]] = {
    "verdict.lots": {
        "gain": "mmag",
        "gain_error": "mmag",
        "sky": "ADU",
        "sky_error": "ADU",
        "dx": "px",
        "dy": "px",
        "shift_error": "px",
        "fwhm": "median of all lots",
        "outline": "px",
    },
    "verdict.seams": {"x": "px", "y": "px", "angle": "deg", "step": "sigma", "step_adu": "ADU"},
    "verdict.trails": {"x0": "px", "y0": "px", "x1": "px", "y1": "px", "length": "px", "contrast": "sigma"},
    "verdict.holes": {"x": "px", "y": "px", "area": "px2"},
    "verdict.findings": {"x": "px", "y": "px"},
    "megatiles": {"y0": "px", "y1": "px", "x0": "px", "x1": "px", "median": "ADU", "gain": "factor", "seconds": "s"},
    "ledger.frames": {
        "exposure": "s",
        "date_obs": "ISO 8601, UTC",
        "gain": "factor",
        "level": "ADU",
        "weight": "typical frame",
        "fwhm": "px",
        "sky": "ADU",
        "rejected_share": "fraction",
        "ellipticity": "0 to 1",
        "trailing": "0 to 1",
        "snr": "ratio",
        "transparency": "clearest frames of the night",
    },
}

_PACKAGES = ("numpy", "scipy", "astropy", "opencv-python", "reproject", "sep", "numba", "matplotlib")


@dataclass(frozen=True)
class SkyPlace:
    """Where a picture lies on the sky.

    Parameters
    ----------
    scale : float
        arcsec per pixel.
    ra, dec : float
        Of its middle, degrees, ICRS.
    north, east : tuple of float
        Unit vectors (x, y) in the picture that point there, at its middle.
    """

    scale: float
    ra: float
    dec: float
    north: tuple[float, float]
    east: tuple[float, float]


def sky_place(wcs: WCS, shape: tuple[int, int]) -> SkyPlace:
    """Where the picture ``(ny, nx)`` of a celestial WCS lies."""
    x, y = (shape[1] - 1) / 2, (shape[0] - 1) / 2
    ra, dec = (float(v) for v in wcs.all_pix2world(x, y, 0))
    # A step of an arcsecond or so; at the pole itself north is any direction.
    step = 1 / 3600 * (1 if dec < 0 else -1)
    up = np.array(wcs.all_world2pix(ra, dec + step, 0)) - (x, y)
    side = np.array(wcs.all_world2pix(ra + abs(step) / max(np.cos(np.deg2rad(dec)), 1e-6), dec, 0)) - (x, y)
    north, east = np.sign(step) * up / np.hypot(*up), side / np.hypot(*side)
    return SkyPlace(pixel_scale(wcs), ra, dec, (float(north[0]), float(north[1])), (float(east[0]), float(east[1])))


@dataclass(frozen=True)
class Story:
    """Everything about a run that its report tells, beside the verdict.

    Parameters
    ----------
    name : str
        Stem of the product's files.
    shape : tuple of int
        ``(ny, nx)`` of the mosaic.
    facts : ProductFacts
        What the header of the product tells.
    ledger, tiles
        The books.
    settings : Settings
        As they were in force.
    phases : sequence of Phase
    warnings : sequence of Event
        Of the kinds "warning" and "error".
    sky : SkyPlace or None
        Where it lies; None without a WCS.
    problem : str
        Why there is no verdict; "" if there is one.
    """

    name: str
    shape: tuple[int, int]
    facts: ProductFacts
    ledger: Ledger
    tiles: Sequence[TileRecord]
    settings: Settings
    phases: Sequence[Phase] = ()
    warnings: Sequence[Event] = ()
    sky: SkyPlace | None = None
    problem: str = ""

    @property
    def language(self) -> str:
        """That of the run."""
        return self.settings.language

    @property
    def scale(self) -> float:
        """arcsec per pixel; NaN without a WCS."""
        return self.sky.scale if self.sky else math.nan

    @property
    def seconds(self) -> float:
        """Time that the run took, up to its report."""
        return self.phases[-1].start + self.phases[-1].seconds if self.phases else math.nan


def headline(verdict: Verdict | None, language: str = "en") -> str:
    """The verdict in one sentence."""
    if verdict is None:
        return render("report_headline_none", {}, language)
    judged = [figure for figure in verdict.figures if figure.grade != "NONE"]
    values = {"n": len(judged)}
    for grade in ("FAIL", "WARN"):
        worst = [figure for figure in judged if figure.grade == grade]
        if worst:
            names = [render(f"verdict_{figure.key}", {}, language) for figure in worst[:3]]
            what = "; ".join(names) + ("; …" if len(worst) > len(names) else "")
            return render(f"report_headline_{grade.lower()}", values | {"bad": len(worst), "what": what}, language)
    return render("report_headline_pass", values, language)


def report_json(story: Story, verdict: Verdict | None) -> dict[str, Any]:
    """The whole report as plain data: every number with its unit in its name, beside it, or under ``units``.

    What is unknown is null. ``verdict`` is `zemosaic.report.verdict.as_json`.
    """
    facts, language = story.facts, story.language
    return {
        "schema": SCHEMA,
        "version": __version__,
        "created": facts.created.utc.isot,
        "language": language,
        "grade": verdict.grade if verdict else "NONE",
        "headline": headline(verdict, language),
        "problem": story.problem,
        "product": {
            "name": story.name,
            "object": facts.object,
            "filter": facts.filter,
            "instrument": facts.instrument,
            "width_px": story.shape[1],
            "height_px": story.shape[0],
            "scale_arcsec_px": _known(story.scale),
            "centre_ra_deg": story.sky.ra if story.sky else None,
            "centre_dec_deg": story.sky.dec if story.sky else None,
            "north_x_y": story.sky.north if story.sky else None,
            "east_x_y": story.sky.east if story.sky else None,
        },
        "run": {
            "route": facts.route,
            "fallback": facts.fallback,
            "seconds": _known(story.seconds),
            "phases": [
                {
                    "name": phase.name,
                    "title": render(f"phase_{phase.name}", {}, language),
                    "start_s": _known(phase.start),
                    "seconds": _known(phase.seconds),
                    "cpu_seconds": _known(phase.cpu),
                }
                for phase in story.phases
            ],
            "history": list(facts.history),
            "cards": {name: _known(value) for name, value, _ in facts.cards},
            "warnings": [{"kind": event.kind, "key": event.key, "text": event.text} for event in story.warnings],
        },
        "verdict": as_json(verdict, language) if verdict else None,
        "megatiles": [_tile_row(tile) for tile in story.tiles],
        "ledger": {"counts": story.ledger.counts(), "frames": story.ledger.rows()},
        "units": UNITS,
        "settings": story.settings.model_dump(mode="json"),
        "versions": dict(versions()),
    }


def changed_settings(settings: Settings) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from their defaults: name → value, default."""
    fields = type(settings).model_fields
    values = {name: getattr(settings, name) for name in fields}
    return {name: (value, fields[name].default) for name, value in values.items() if value != fields[name].default}


@cache
def versions() -> Mapping[str, str]:
    """Versions of what a run rests on."""
    found = {"zemosaic": __version__, "python": platform.python_version(), "system": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # OpenCV comes under several names
            continue
    return found


def _tile_row(tile: TileRecord) -> dict[str, Any]:
    window = tile.window
    return {
        "tile": tile.index,
        "y0": window.y0,
        "y1": window.y1,
        "x0": window.x0,
        "x1": window.x1,
        "frames": tile.frames,
        "median": _known(tile.median),
        "gain": _known(tile.gain),
        "seconds": _known(tile.seconds),
    }


def _known(value: Any) -> Any:
    """A number to six digits, None for one that is not finite; anything else as it is."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
