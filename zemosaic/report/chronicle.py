"""What a run said while it worked: when each of its phases began, and every warning."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from zemosaic.events import Event


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
