"""One honest bar for a whole run: how far it is, and how long it will still take. No Qt here.

A run says which phase it is in and how far the phase is. The bar weighs each phase by the time it took the last
time (or typically takes), never runs backwards, and gives a remaining time only when there is something to go by.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

# Seconds of the phases of typical runs (60 to 600 subs on two cores), in any unit: only their ratios count.
_COMMON = {"scan": 2.0, "measure": 28.0, "solve": 2.0, "levels": 6.0}
_END = {"polish": 5.0, "save": 4.0, "report": 12.0}
TYPICAL: dict[str, dict[str, float]] = {
    "sds": _COMMON | {"lots": 45.0, "gains": 1.0, "stack": 8.0} | _END,
    "master-tiles": _COMMON | {"master_tiles": 40.0, "intertile": 8.0, "assembly": 12.0} | _END,
    "mosaic-first": _COMMON | {"mosaic_first": 50.0} | _END,
}
_ROUTE_OF_PHASE = {"lots": "sds", "mosaic_first": "mosaic-first", "master_tiles": "master-tiles"}
_LEAST_SECONDS = 3.0  # before that nothing is known about the pace
_LEAST_FRACTION = 0.02


class RunProgress:
    """Follows the events of one run.

    Parameters
    ----------
    route : str
        The route that is asked for.
    weights : mapping, optional
        Seconds that each phase took in an earlier run of this route.
    clock : callable
        Seconds, of any beginning.
    without : collection of str
        Phases that the settings switch off.
    """

    def __init__(
        self,
        route: str,
        weights: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
        without: Collection[str] = (),
    ) -> None:
        self._clock = clock
        self._start = clock()
        self._since = self._start
        self._learnt = dict(weights or {})
        self._without = frozenset(without)
        self.route = route if route in TYPICAL else "master-tiles"
        self.phase = ""
        self.seconds: dict[str, float] = {}  # of the phases that are over
        self._within = 0.0
        self._fraction = 0.0

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases of the route, in order."""
        return tuple(name for name in TYPICAL[self.route] if name not in self._without)

    def hear(self, event: Mapping[str, Any]) -> None:
        """Take in one event of the run."""
        if event.get("event") == "phase":
            self._begin(str(event["key"]).removeprefix("phase_"))
        elif event.get("event") == "progress":
            values = event["values"]
            if values.get("total"):
                self._within = max(self._within, min(1.0, values["current"] / values["total"]))

    def _begin(self, phase: str) -> None:
        now = self._clock()
        if self.phase:
            self.seconds[self.phase] = now - self._since
        if phase in _ROUTE_OF_PHASE:  # a fallback changes what is still to come
            self.route = _ROUTE_OF_PHASE[phase]
        self.phase, self._since, self._within = phase, now, 0.0

    def finish(self) -> dict[str, float]:
        """The run is over: the bar is full. Seconds of every phase, to learn from."""
        self._begin("")
        self._fraction = 1.0
        return self.seconds

    @property
    def fraction(self) -> float:
        """How much of the run is done, 0 … 1; never less than before."""
        weights = self._weights()
        if self.phase in weights:
            names = list(weights)
            done = sum(weights[name] for name in names[: names.index(self.phase)])
            share = (done + weights[self.phase] * self._within) / sum(weights.values())
            self._fraction = max(self._fraction, share)
        return self._fraction

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    @property
    def remaining(self) -> float | None:
        """Seconds still to go at the pace so far; None as long as there is no pace."""
        fraction = self.fraction
        if self.elapsed < _LEAST_SECONDS or fraction < _LEAST_FRACTION:
            return None
        return self.elapsed * (1 - fraction) / fraction

    def _weights(self) -> dict[str, float]:
        typical = {name: TYPICAL[self.route][name] for name in self.phases}
        known = {name: self._learnt[name] for name in typical if self._learnt.get(name, 0) > 0}
        if not known:
            return typical
        # Phases never timed on this machine are put on the scale of those that were.
        scale = sum(known.values()) / sum(typical[name] for name in known)
        return {name: known.get(name, weight * scale) for name, weight in typical.items()}


def clock_text(seconds: float) -> str:
    """``m:ss`` or ``h:mm:ss``."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
