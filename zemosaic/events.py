"""What a run says while it works: progress and messages, in English or French, to whoever listens.

No front end is imported here. A callback gets every `Event`; the standard logger ``zemosaic`` gets the
messages among them (details at DEBUG). The texts live in ``locale/<language>.toml``, one
``key = "text with {placeholders}"`` a line.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Kind = Literal["info", "detail", "warning", "error", "phase", "progress", "eta", "count", "done", "failed"]

LANGUAGES = ("en", "fr")

_LEVELS: dict[str, int] = {
    "detail": logging.DEBUG,
    "info": logging.INFO,
    "phase": logging.INFO,
    "done": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "failed": logging.ERROR,
}

_logger = logging.getLogger("zemosaic")
_logger.addHandler(logging.NullHandler())  # an application that sets up no logging gets no stray lines


class Cancelled(Exception):
    """The run was asked to stop."""


@dataclass(frozen=True)
class Event:
    """One thing that a run has to say.

    Parameters
    ----------
    kind : str
        What sort of event: a message (``info``, ``detail``, ``warning``, ``error``), the start of a
        ``phase``, ``progress`` within a stage, its ``eta``, a ``count``, or the end (``done``, ``failed``).
    key : str
        Message key in the catalogues.
    text : str
        The message in the language of the run.
    values : mapping
        What the text was filled with; progress has ``stage``, ``current``, ``total`` and ``rate``
        (units a second, 0 as long as it is unknown).
    """

    kind: Kind
    key: str
    text: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def legacy(self) -> str | None:
        """The event as existing ZeMosaic front ends read it; None where they have no such form."""
        values = self.values
        if self.kind == "phase":
            return f"PHASE_UPDATE:{values['n']}"
        if self.kind == "progress":
            return f"STAGE_PROGRESS({values['stage']}, {values['current']}, {values['total']})"
        if self.kind == "eta":
            return f"ETA_UPDATE:{values['eta']}"
        if self.kind == "count":
            return f"{values['what'].upper()}_COUNT_UPDATE:{values['current']}/{values['total']}"
        return {"done": "PROCESS_DONE", "failed": "PROCESS_ERROR"}.get(self.kind)


class Events:
    """The channel a run speaks through, and hears a request to stop through. Safe to share by threads.

    Parameters
    ----------
    callback : callable, optional
        Called with every `Event`, never by two threads at the same time.
    language : str
        ``en`` or ``fr``; any other falls back to English.
    stop_requested : callable, optional
        Asked by `check_stop`; True means that the run shall end.
    """

    def __init__(
        self,
        callback: Callable[[Event], None] | None = None,
        language: str = "en",
        stop_requested: Callable[[], bool] | None = None,
    ) -> None:
        self.language = language
        self._callback = callback
        self._stop_requested = stop_requested
        self._lock = threading.RLock()  # re-entrant: a callback may say something itself
        self._started: dict[str, tuple[float, int]] = {}  # stage -> when, at which count

    def info(self, key: str, **values: Any) -> None:
        """Say something every user wants to know."""
        self._say("info", key, values)

    def detail(self, key: str, **values: Any) -> None:
        """Say something only a curious user wants to know."""
        self._say("detail", key, values)

    def warning(self, key: str, **values: Any) -> None:
        """Say that something is not as it should be and the run goes on."""
        self._say("warning", key, values)

    def error(self, key: str, **values: Any) -> None:
        """Say that something failed."""
        self._say("error", key, values)

    def done(self, key: str, **values: Any) -> None:
        """Say that the run has ended with a product."""
        self._say("done", key, values)

    def failed(self, key: str, **values: Any) -> None:
        """Say that the run has ended without one."""
        self._say("failed", key, values)

    def phase(self, n: int, name: str) -> None:
        """Say that phase `n` begins; its title is the message ``phase_<name>``."""
        self._say("phase", f"phase_{name}", {"n": n})

    def count(self, what: Literal["raw_file", "master_tile"], current: int, total: int) -> None:
        """Say how many raw files or master tiles have been dealt with."""
        self._say("count", f"count_{what}", {"what": what, "current": current, "total": total})

    def progress(self, stage: str, current: int, total: int) -> None:
        """Say how far a stage is; its title is the message ``stage_<stage>``. The ETA follows by itself."""
        with self._lock:
            now = time.monotonic()
            since, first = self._started.get(stage, (now, current))
            if current <= first:  # the stage begins, or begins again
                self._started[stage] = since, first = now, current
            rate = (current - first) / (now - since) if now > since else 0.0
            values = {"stage": stage, "current": current, "total": total, "rate": rate}
            self._say("progress", f"stage_{stage}", values)
            if rate:
                self._say("eta", "eta", {"stage": stage, "eta": _clock((total - current) / rate)})

    @property
    def stopped(self) -> bool:
        """Whether the run has been asked to stop."""
        return self._stop_requested is not None and self._stop_requested()

    def check_stop(self) -> None:
        """Raise `Cancelled` if the run has been asked to stop; to be called between units of work."""
        if self.stopped:
            raise Cancelled(render("run_warn_cancelled", {}, self.language))

    def _say(self, kind: Kind, key: str, values: dict[str, Any]) -> None:
        event = Event(kind, key, render(key, values, self.language), values)
        with self._lock:
            if kind in _LEVELS:
                _logger.log(_LEVELS[kind], "%s", event.text)
            if self._callback is not None:
                self._callback(event)


def render(key: str, values: Mapping[str, Any], language: str = "en") -> str:
    """The text of a message.

    A gap in the catalogues must not end a run of hours: a missing text falls back to English and then to
    the bare key with its values. With the environment variable ``ZEMOSAIC_STRICT_MESSAGES`` set (as in
    the tests) it is an error instead.

    Raises
    ------
    LookupError, ValueError, TypeError, AttributeError
        Strict only: no such key, or values that do not fit its placeholders.
    """
    strict = bool(os.environ.get("ZEMOSAIC_STRICT_MESSAGES"))
    for code in dict.fromkeys((language, "en")):
        try:
            return messages(code)[key].format_map(_translated(values, code))
        except (LookupError, ValueError, TypeError, AttributeError):
            if strict:
                raise
    return " ".join([key, *(f"{name}={value}" for name, value in values.items())])


def _translated(values: Mapping[str, Any], language: str) -> Mapping[str, Any]:
    """The values of a message, a reason of the ledger among them in its language."""
    if language == "en" or not isinstance(values.get("reason"), str):
        return values
    from zemosaic.reasons import translated  # which needs this module

    return {**values, "reason": translated(values["reason"], language)}


@functools.cache
def messages(language: str) -> Mapping[str, str]:
    """The catalogue of a language, message key to text; that of English if there is none."""
    code = language if language in LANGUAGES else "en"
    text = resources.files("zemosaic").joinpath("locale").joinpath(f"{code}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{s:02d}"
