"""What a run tells of itself beside the verdict: its way, its time, its warnings, its books; and all of it as JSON."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from zemosaic import __version__
from zemosaic.events import Event, render
from zemosaic.ledger import Ledger, TileRecord
from zemosaic.product import ProductFacts
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
class Phase:
    """One phase of a run.

    Parameters
    ----------
    name : str
        The message ``phase_<name>`` is its title.
    start, seconds : float
        Since the run began, and how long it took; wall clock.
    cpu : float
        Seconds of processor time of this process.
    """

    name: str
    start: float
    seconds: float
    cpu: float


class Chronicle:
    """Listens to the events of a run and passes them on: remembers when each phase began, and every warning.

    Parameters
    ----------
    listener : callable, optional
        Who is to hear the events too.
    """

    def __init__(self, listener: Callable[[Event], None] | None = None) -> None:
        self._listener = listener
        self._begin = self._now()
        self._marks: list[tuple[str, tuple[float, float]]] = []
        self.warnings: list[Event] = []

    def __call__(self, event: Event) -> None:
        if event.kind == "phase":
            self._marks.append((event.key.removeprefix("phase_"), self._now()))
        elif event.kind in ("warning", "error"):
            self.warnings.append(event)
        if self._listener is not None:
            self._listener(event)

    def phases(self) -> list[Phase]:
        """The phases so far, the last one up to now."""
        ends = [*(mark for _, mark in self._marks[1:]), self._now()]
        return [
            Phase(name, start[0] - self._begin[0], end[0] - start[0], end[1] - start[1])
            for (name, start), end in zip(self._marks, ends, strict=True)
        ]

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


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
    scale : float
        arcsec per pixel.
    centre : tuple of float
        Right ascension and declination of the middle, degrees, ICRS.
    north : float
        Direction of north in the picture, degrees from up, positive to the left (to the east as seen on the sky).
    mirrored : bool
        East is to the right if north is up.
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
    scale: float = float("nan")
    centre: tuple[float, float] = (float("nan"), float("nan"))
    north: float = 0.0
    mirrored: bool = False
    problem: str = ""

    @property
    def language(self) -> str:
        """That of the run."""
        return self.settings.language

    @property
    def seconds(self) -> float:
        """Time that the run took, up to its report."""
        return self.phases[-1].start + self.phases[-1].seconds if self.phases else float("nan")


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
            "centre_ra_deg": _known(story.centre[0]),
            "centre_dec_deg": _known(story.centre[1]),
            "north_from_up_deg": _known(story.north),
            "mirrored": story.mirrored,
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
    return float(f"{value:.6g}") if value - value == 0 else None
