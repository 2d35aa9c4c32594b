"""Pictures, decoded beside the window's thread."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from pathlib import Path

from PySide6.QtCore import QObject, QRunnable, QSize, Qt, QThreadPool, Signal
from PySide6.QtGui import QImage, QImageReader

MOST_PIXELS = 2000  # of the longer side: more than most screens show


def read_picture(path: Path) -> QImage:
    """The picture in a file, no larger than a screen; null if it is none (yet)."""
    reader = QImageReader(str(path))
    reader.setAutoDetectImageFormat(True)
    size = reader.size()
    if max(size.width(), size.height()) > MOST_PIXELS:
        reader.setScaledSize(size.scaled(QSize(MOST_PIXELS, MOST_PIXELS), Qt.AspectRatioMode.KeepAspectRatio))
    return reader.read()


class _Task(QRunnable):
    def __init__(self, decoder: Decoder, number: int, decode: Callable[[], QImage]) -> None:
        super().__init__()
        self._decoder, self._number, self._decode = decoder, number, decode

    def run(self) -> None:
        image = self._decode()
        if not image.isNull():  # as the screen has it, so that showing it is no work
            image = image.convertToFormat(QImage.Format.Format_ARGB32_Premultiplied)
        with contextlib.suppress(RuntimeError):  # the window has gone meanwhile, and the decoder with it
            self._decoder.done.emit(self._number, image)


class Decoder(QObject):
    """Decodes pictures one after the other. Signals: ``decoded(int, QImage)`` with the number that came with it."""

    decoded = Signal(int, QImage)
    done = Signal(int, QImage)

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._waiting: deque[_Task] = deque()
        self._busy = False
        self.done.connect(self._take)

    def start(self, number: int, decode: Callable[[], QImage]) -> None:
        """Decode one when it is its turn."""
        self._waiting.append(_Task(self, number, decode))
        if not self._busy:
            self._next()

    def _next(self) -> None:
        self._busy = bool(self._waiting)
        if self._busy:
            QThreadPool.globalInstance().start(self._waiting.popleft())

    def _take(self, number: int, image: QImage) -> None:
        self._next()
        self.decoded.emit(number, image)


class PictureLoader(QObject):
    """Loads one picture after the other.

    Signals: ``loaded(QImage)``.
    """

    loaded = Signal(QImage)

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._decoder = Decoder(self)
        self._decoder.decoded.connect(self._take)

    def load(self, path: Path) -> None:
        """Begin to load; a file that is no picture (yet) is passed over in silence."""
        self._decoder.start(0, lambda: read_picture(path))

    def _take(self, _number: int, image: QImage) -> None:
        if not image.isNull():
            self.loaded.emit(image)
