"""Pictures from disk, decoded beside the window's thread."""

from __future__ import annotations

from pathlib import Path

from PySide6.QtCore import QObject, QRunnable, QSize, Qt, QThreadPool, Signal
from PySide6.QtGui import QImage, QImageReader

MOST_PIXELS = 2000  # of the longer side: more than most screens show


class _Load(QRunnable):
    def __init__(self, loader: PictureLoader, path: Path, number: int) -> None:
        super().__init__()
        self._loader, self._path, self._number = loader, path, number

    def run(self) -> None:
        reader = QImageReader(str(self._path))
        reader.setAutoDetectImageFormat(True)
        size = reader.size()
        if max(size.width(), size.height()) > MOST_PIXELS:
            reader.setScaledSize(size.scaled(QSize(MOST_PIXELS, MOST_PIXELS), Qt.AspectRatioMode.KeepAspectRatio))
        self._loader.arrived.emit(self._number, reader.read())


class PictureLoader(QObject):
    """Loads one picture after the other; what was overtaken by a newer one is not shown.

    Signals: ``loaded(QImage)``.
    """

    loaded = Signal(QImage)
    arrived = Signal(int, QImage)

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._asked = self._shown = 0
        self.arrived.connect(self._take)

    def load(self, path: Path) -> None:
        """Begin to load; a file that is no picture (yet) is passed over in silence."""
        self._asked += 1
        QThreadPool.globalInstance().start(_Load(self, path, self._asked))

    def _take(self, number: int, image: QImage) -> None:
        if number > self._shown and not image.isNull():
            self._shown = number
            self.loaded.emit(image)
