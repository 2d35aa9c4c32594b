"""What the window asks its helper process, and what becomes of the answers: the `FrameStore` fills."""

from __future__ import annotations

import base64
import gc
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PySide6.QtCore import QObject, Signal
from PySide6.QtGui import QImage

from zemosaic.gui.engine import Helper
from zemosaic.gui.frame_store import FrameStore, row_from
from zemosaic.gui.pictures import Decoder
from zemosaic.settings import Settings


class Scanner(QObject):
    """Keeps the store in step with the helper.

    Signals: ``scanned(int, int)`` files so far and in all; ``measured(int, int)``; ``thumb(int, QImage)``;
    ``depth(QImage, int)`` coverage map and its greatest depth; ``lots_progress(float)``, ``lots_built()``;
    ``idle(str)`` when a job of that name is over; ``failed(str)`` what went wrong.
    """

    scanned = Signal(int, int)
    measured = Signal(int, int)
    thumb = Signal(int, QImage)
    depth = Signal(QImage, int)
    lots_progress = Signal(float)
    lots_built = Signal()
    idle = Signal(str)
    failed = Signal(str)

    def __init__(self, store: FrameStore, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self.store = store
        self._helper = Helper(self)
        self._helper.answer.connect(self._heard)
        self._helper.lost.connect(self._lost)
        self._decoder = Decoder(self)
        self._decoder.decoded.connect(self.thumb)
        self._depth_decoder = Decoder(self)
        self._depth_decoder.decoded.connect(lambda deepest, image: self.depth.emit(image, deepest))
        self._jobs: dict[str, int] = {}  # what -> number of the job whose answers count
        self._total = 0
        self._to_measure = self._done = 0

    def busy(self, what: str) -> bool:
        """Whether a job of this name is under way."""
        return what in self._jobs

    def scan(self, inputs: Iterable[Path]) -> None:
        """Read the headers of everything in the inputs, from the beginning."""
        for what in tuple(self._jobs):
            self.cancel(what)
        self.store.clear()
        self._total = 0
        self._ask("scan", inputs=[str(path) for path in inputs])

    def measure(self, numbers: Sequence[int]) -> None:
        """Measure stars and sky of these subs."""
        self._to_measure, self._done = len(numbers), 0
        self._ask("measure", ids=list(numbers))

    def ask_thumbs(self, numbers: Sequence[int], size: int) -> None:
        """Pictures of these subs, in one tone."""
        self._ask("thumbs", ids=list(numbers), size=size)

    def ask_depth(self) -> None:
        """The coverage map of the subs that are used."""
        self._ask("coverage", ids=self.store.used())

    def build_lots(self, settings: Settings) -> None:
        """The lots that the engine would make of the subs that are used."""
        self._ask("lots", ids=self.store.used(), settings=settings.model_dump(mode="json"))

    def cancel(self, what: str) -> None:
        """No longer wait for a job."""
        if what in self._jobs:
            self._helper.ask("cancel", target=self._jobs.pop(what))
            self.idle.emit(what)

    def close(self) -> None:
        """Ask nothing any more: the helper goes."""
        self._helper.close()

    def wait(self, milliseconds: int) -> None:
        """Wait until it has gone; for the end of the program only."""
        self._helper.wait(milliseconds)

    def _ask(self, what: str, **details: Any) -> None:
        if what in self._jobs:
            self._helper.ask("cancel", target=self._jobs.pop(what))
        self._jobs[what] = self._helper.ask(what, **details)

    def _heard(self, job: int, message: dict[str, Any]) -> None:
        what = next((name for name, number in self._jobs.items() if number == job), None)
        if what is None:
            return
        if message.get("done"):
            del self._jobs[what]
            if "error" in message:
                self.failed.emit(message["error"])
            self.idle.emit(what)
            return
        {
            "scan": self._take_rows,
            "measure": self._take_measures,
            "thumbs": self._take_thumb,
            "coverage": self._take_depth,
            "lots": self._take_lots,
        }[what](message)

    def _take_rows(self, message: dict[str, Any]) -> None:
        self._total = message.get("total", self._total)
        self.store.append([row_from(row) for row in message.get("rows", ())])
        # Rows are many, long-lived and free of cycles: a garbage collection that walks over 5,000 of them holds up the
        # window for 100 ms, and finds nothing.
        gc.freeze()
        if reasons := message.get("reasons"):
            self.store.update({int(i): {"problem": reason} for i, reason in reasons.items()})
        self.scanned.emit(len(self.store.rows), self._total)

    def _take_measures(self, message: dict[str, Any]) -> None:
        measures = {int(i): facts for i, facts in message["measures"].items()}
        self._done += len(measures)
        self.store.update(measures)
        self.measured.emit(self._done, self._to_measure)

    def _take_thumb(self, message: dict[str, Any]) -> None:
        if "png" in message:
            self._decoder.start(message["id"], partial(_image, message["png"]))

    def _take_depth(self, message: dict[str, Any]) -> None:
        self._depth_decoder.start(message["deepest"], partial(_image, message["png"]))

    def _take_lots(self, message: dict[str, Any]) -> None:
        if "lots" in message:
            self.store.set_lots(message["lots"], edited=False)
            self.lots_built.emit()
        else:
            self.lots_progress.emit(message["progress"])

    def _lost(self, reason: str) -> None:
        jobs, self._jobs = tuple(self._jobs), {}
        for what in jobs:
            self.idle.emit(what)
        self.failed.emit(reason)


def _image(png: str) -> QImage:
    return QImage.fromData(base64.b64decode(png))
