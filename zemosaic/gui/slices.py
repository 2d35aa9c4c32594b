"""Long work of the window, done a few milliseconds at a time: between two slices every click and key is heard."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter

from PySide6.QtCore import QObject, QTimer

SLICE_S = 0.006


class Slices(QObject):
    """Does one piece of work, given as an iterator that takes a small step at a time.

    Parameters
    ----------
    parent : QObject
        The work ends with it.
    """

    def __init__(self, parent: QObject) -> None:
        super().__init__(parent)
        self._steps: Iterator[object] = iter(())
        self._timer = QTimer(self)
        self._timer.timeout.connect(self._go_on)

    @property
    def busy(self) -> bool:
        return self._timer.isActive()

    def start(self, steps: Iterator[object]) -> None:
        """Begin; what was under way is dropped."""
        self._steps = steps
        self._timer.start(0)

    def stop(self) -> None:
        """Drop what is under way."""
        self._timer.stop()
        self._steps = iter(())

    def finish(self) -> None:
        """Do all that is left now."""
        steps = self._steps
        self.stop()
        for _ in steps:
            pass

    def _go_on(self) -> None:
        deadline = perf_counter() + SLICE_S
        for _ in self._steps:
            if perf_counter() > deadline:
                return
        self._timer.stop()
