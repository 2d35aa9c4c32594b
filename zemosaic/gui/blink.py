"""The selected subs as pictures in one tone: a strip of thumbnails, and one after the other to compare (blink)."""

from __future__ import annotations

from PySide6.QtCore import QSize, Qt, QTimer
from PySide6.QtGui import QIcon, QImage, QPixmap
from PySide6.QtWidgets import QHBoxLayout, QListView, QListWidget, QListWidgetItem, QSlider, QVBoxLayout, QWidget

from zemosaic.gui.frame_store import FrameStore
from zemosaic.gui.i18n import tr
from zemosaic.gui.scanner import Scanner
from zemosaic.gui.widgets import PictureView, button, label

MOST = 40  # subs that are fetched of a large selection
_SIZE = 640
_ICON = QSize(96, 96)
_WAIT_MS = 250  # a selection may still change


class BlinkPanel(QWidget):
    """Fetches pictures of the selection while it is visible."""

    def __init__(self, store: FrameStore, scanner: Scanner) -> None:
        super().__init__()
        self._store, self._scanner = store, scanner
        self.images: dict[int, QImage] = {}
        self._numbers: list[int] = []
        self._beat = QTimer(self)
        self._beat.setInterval(250)
        self._beat.timeout.connect(self._next)
        self.picture = PictureView(tr("blink_empty"))
        self.caption = label("", "dim")
        self.strip = QListWidget()
        self.strip.setViewMode(QListView.ViewMode.IconMode)
        self.strip.setFlow(QListView.Flow.LeftToRight)
        self.strip.setWrapping(False)
        self.strip.setIconSize(_ICON)
        self.strip.setFixedHeight(_ICON.height() + 44)
        self.strip.setMovement(QListView.Movement.Static)
        self.strip.currentRowChanged.connect(self._show)
        self.play = button(tr("blink_play"), tip=tr("blink_play_tip"))
        self.play.setCheckable(True)
        self.play.toggled.connect(self._play)
        self.speed = QSlider(Qt.Orientation.Horizontal)
        self.speed.setRange(1, 12)
        self.speed.setValue(4)
        self.speed.setFixedWidth(110)
        self.speed.setAccessibleName(tr("blink_speed"))
        self.speed.setToolTip(tr("blink_speed"))
        self.speed.valueChanged.connect(lambda n: self._beat.setInterval(1000 // n))
        self._wait = QTimer(self)
        self._wait.setSingleShot(True)
        self._wait.setInterval(_WAIT_MS)
        self._wait.timeout.connect(self.fetch)
        row = QHBoxLayout()
        for widget in (self.play, self.speed):
            row.addWidget(widget)
        row.addWidget(self.caption, 1)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self.picture, 1)
        layout.addLayout(row)
        layout.addWidget(self.strip)
        store.selected.connect(self._selection_changed)
        scanner.thumb.connect(self._take)

    def showEvent(self, event: object) -> None:
        self._wait.start()

    def hideEvent(self, event: object) -> None:
        self.play.setChecked(False)

    def _selection_changed(self) -> None:
        if self.isVisible():
            self._wait.start()

    def fetch(self) -> None:
        """Ask for the pictures of what is selected now, in order of time."""
        rows = self._store.rows
        chosen = sorted(self._store.selection, key=lambda i: (rows[i].date, rows[i].path))[:MOST]
        if chosen == self._numbers:
            return
        self._numbers = chosen
        self.images.clear()
        self.strip.clear()
        self.picture.show_image(None)
        self.caption.setText("")
        if chosen:
            self._scanner.ask_thumbs(chosen, _SIZE)

    def _take(self, number: int, image: QImage) -> None:
        if number not in self._numbers:
            return
        self.images[number] = image
        small = image.scaled(_ICON, Qt.AspectRatioMode.KeepAspectRatio, Qt.TransformationMode.FastTransformation)
        row = self._store.rows[number]
        item = QListWidgetItem(QIcon(QPixmap.fromImage(small)), row.date[11:19] or row.name[-14:])
        item.setData(Qt.ItemDataRole.UserRole, number)
        item.setToolTip(row.name)
        self.strip.addItem(item)
        if self.strip.count() == 1:
            self.strip.setCurrentRow(0)

    def _show(self, place: int) -> None:
        item = self.strip.item(place)
        if item is None:
            return
        number = item.data(Qt.ItemDataRole.UserRole)
        self.picture.show_image(self.images[number])
        self.caption.setText(f"{place + 1}/{len(self._numbers)}   {self._store.rows[number].name}")

    def _next(self) -> None:
        if self.strip.count():
            self.strip.setCurrentRow((self.strip.currentRow() + 1) % self.strip.count())

    def _play(self, on: bool) -> None:
        (self._beat.start if on else self._beat.stop)()
