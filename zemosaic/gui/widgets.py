"""Small parts that several windows share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from PySide6.QtCore import QEvent, QObject, QPointF, QRectF, QSettings, QSize, Qt, Signal
from PySide6.QtGui import (
    QColor,
    QDragEnterEvent,
    QDropEvent,
    QImage,
    QMouseEvent,
    QPainter,
    QPaintEvent,
    QPen,
    QPixmap,
    QWheelEvent,
)
from PySide6.QtWidgets import (
    QAbstractButton,
    QFileDialog,
    QFrame,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QPushButton,
    QSizePolicy,
    QSplitter,
    QVBoxLayout,
    QWidget,
)

from zemosaic.gui.i18n import tr
from zemosaic.gui.theme import colours


def label(text: str, kind: str = "", *, wrap: bool = False) -> QLabel:
    """A label; `kind` is one of the style sheet's names (``title``, ``dim``, ``warn``, ``bad``, ``good``)."""
    made = QLabel(text)
    made.setObjectName(kind)
    made.setWordWrap(wrap)
    return made


def restyle(widget: QWidget, kind: str) -> None:
    """Give a widget another name of the style sheet."""
    if widget.objectName() != kind:
        widget.setObjectName(kind)
        widget.style().unpolish(widget)
        widget.style().polish(widget)


def button(text: str, kind: str = "", *, tip: str = "") -> QPushButton:
    """A push button; `kind` is ``primary``, ``link`` or nothing."""
    made = QPushButton(text)
    made.setObjectName(kind)
    made.setToolTip(tip)
    return made


@contextmanager
def painting(widget: QWidget) -> Iterator[QPainter]:
    """A smooth painter of a widget that ends with its context: left to the interpreter it may outlive the event."""
    painter = QPainter(widget)
    try:
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        yield painter
    finally:
        painter.end()


@contextmanager
def on_dark_ground(widget: QWidget) -> Iterator[QPainter]:
    """The same, over the rounded ground that pictures and footprints lie on."""
    with painting(widget) as painter:
        painter.setPen(Qt.PenStyle.NoPen)
        painter.setBrush(QColor(colours().sky))
        painter.drawRoundedRect(widget.rect(), 8, 8)
        yield painter


class Card(QFrame):
    """A rounded panel with an optional title; fill `body`."""

    def __init__(self, title: str = "") -> None:
        super().__init__()
        self.setObjectName("card")
        self.body = QVBoxLayout(self)
        self.body.setContentsMargins(14, 12, 14, 12)
        self.body.setSpacing(8)
        if title:
            self.body.addWidget(label(title, "title"))


class Switch(QAbstractButton):
    """An on/off switch."""

    def __init__(self, text: str = "") -> None:
        super().__init__()
        self.setCheckable(True)
        self.setText(text)
        self.setAccessibleName(text)
        self.setCursor(Qt.CursorShape.PointingHandCursor)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Fixed)

    def sizeHint(self) -> QSize:
        metrics = self.fontMetrics()
        gap = 10 if self.text() else 0
        return QSize(42 + gap + metrics.horizontalAdvance(self.text()), max(26, metrics.height() + 6))

    def minimumSizeHint(self) -> QSize:
        return self.sizeHint()

    def paintEvent(self, event: QPaintEvent) -> None:
        with painting(self) as painter:
            self._draw(painter)

    def _draw(self, painter: QPainter) -> None:
        shades = colours()
        if not self.isEnabled():
            painter.setOpacity(0.5)
        track = QRectF(2, (self.height() - 20) / 2, 38, 20)
        painter.setPen(QPen(QColor(shades.accent if self.hasFocus() else shades.border), 1.5))
        painter.setBrush(QColor(shades.accent if self.isChecked() else shades.field))
        painter.drawRoundedRect(track, 10, 10)
        painter.setPen(Qt.PenStyle.NoPen)
        painter.setBrush(QColor(shades.on_accent if self.isChecked() else shades.dim))
        painter.drawEllipse(
            QPointF(track.right() - 10 if self.isChecked() else track.left() + 10, track.center().y()), 7, 7
        )
        painter.setPen(QColor(shades.text))
        rest = self.rect().adjusted(50, 0, 0, 0)
        painter.drawText(rest, int(Qt.AlignmentFlag.AlignVCenter | Qt.AlignmentFlag.AlignLeft), self.text())


class PathRow(QWidget):
    """A line for a path, with a button that opens the file dialog."""

    changed = Signal(str)

    def __init__(self, what: str, *, folder: bool = True) -> None:
        super().__init__()
        self._what, self._folder = what, folder
        self.line = QLineEdit()
        self.line.setAccessibleName(what)
        self.line.textChanged.connect(self.changed)
        self.browse = button(tr("browse"), tip=what)
        self.browse.clicked.connect(self._ask)
        row = QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        row.addWidget(self.line, 1)
        row.addWidget(self.browse)

    def text(self) -> str:
        return self.line.text().strip()

    def set_text(self, text: str) -> None:
        self.line.setText(text)

    def _ask(self) -> None:
        if self._folder:
            chosen = QFileDialog.getExistingDirectory(self, self._what, self.text())
        else:
            chosen, _ = QFileDialog.getOpenFileName(self, self._what, self.text())
        if chosen:
            self.line.setText(chosen)


class DropArea(QFrame):
    """Where subs are dropped: folders and files."""

    dropped = Signal(list)

    def __init__(self) -> None:
        super().__init__()
        self.setAcceptDrops(True)
        self.setMinimumHeight(92)
        self._over = False
        self.text = label("", wrap=True)
        self.text.setAlignment(Qt.AlignmentFlag.AlignCenter)
        self.hint = label("", "dim", wrap=True)
        self.hint.setAlignment(Qt.AlignmentFlag.AlignCenter)
        inside = QVBoxLayout(self)
        inside.addStretch()
        inside.addWidget(self.text)
        inside.addWidget(self.hint)
        inside.addStretch()

    def dragEnterEvent(self, event: QDragEnterEvent) -> None:
        if event.mimeData().hasUrls():
            event.acceptProposedAction()
            self._over = True
            self.update()

    def dragLeaveEvent(self, event: QEvent) -> None:
        self._over = False
        self.update()

    def dropEvent(self, event: QDropEvent) -> None:
        self._over = False
        self.update()
        paths = [Path(url.toLocalFile()) for url in event.mimeData().urls() if url.isLocalFile()]
        if paths:
            event.acceptProposedAction()
            self.dropped.emit(paths)

    def paintEvent(self, event: QPaintEvent) -> None:
        shades = colours()
        with painting(self) as painter:
            painter.setPen(QPen(QColor(shades.accent if self._over else shades.border), 1.5, Qt.PenStyle.DashLine))
            painter.setBrush(QColor(shades.field))
            painter.drawRoundedRect(QRectF(self.rect()).adjusted(1, 1, -1, -1), 8, 8)


class PictureView(QWidget):
    """A picture that fits the widget; the wheel zooms, dragging moves, a double click fits again."""

    def __init__(self, placeholder: str = "") -> None:
        super().__init__()
        self.setMinimumSize(160, 120)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self._placeholder = placeholder
        self._pixmap = QPixmap()
        self._fitted = QPixmap()  # scaled once for the size of the widget, not at every paint
        self._zoom = 1.0
        self._centre = QPointF(0.5, 0.5)  # of the view, as shares of the picture
        self._grip: QPointF | None = None

    @property
    def empty(self) -> bool:
        return self._pixmap.isNull()

    def show_image(self, image: QImage | None) -> None:
        """Show a picture, or the placeholder; zoom and place stay."""
        self._pixmap = QPixmap() if image is None else QPixmap.fromImage(image)
        self._fitted = QPixmap()
        self.update()

    def show_text(self, text: str) -> None:
        """Show a sentence where the picture will be."""
        self._placeholder = text
        self.show_image(None)

    def fit(self) -> None:
        self._zoom, self._centre = 1.0, QPointF(0.5, 0.5)
        self.update()

    def _scale(self) -> float:
        size = self._pixmap.size()
        return self._zoom * min(self.width() / size.width(), self.height() / size.height())

    def resizeEvent(self, event: QEvent) -> None:
        self._fitted = QPixmap()

    def paintEvent(self, event: QPaintEvent) -> None:
        with on_dark_ground(self) as painter:
            if self._pixmap.isNull():
                painter.setPen(QColor(colours().dim))
                flags = Qt.AlignmentFlag.AlignCenter | Qt.TextFlag.TextWordWrap
                painter.drawText(self.rect().adjusted(40, 20, -40, -20), int(flags), self._placeholder)
            else:
                self._draw(painter)

    def _draw(self, painter: QPainter) -> None:
        scale = self._scale()
        width, height = self._pixmap.width() * scale, self._pixmap.height() * scale
        corner = QPointF(
            self.width() / 2 - width * self._centre.x(),
            self.height() / 2 - height * self._centre.y(),
        )
        if self._zoom == 1.0:
            painter.drawPixmap(corner, self._fit_pixmap(width, height))
            return
        painter.setRenderHint(QPainter.RenderHint.SmoothPixmapTransform, scale < 4)
        painter.drawPixmap(QRectF(corner.x(), corner.y(), width, height), self._pixmap, QRectF(self._pixmap.rect()))

    def _fit_pixmap(self, width: float, height: float) -> QPixmap:
        if self._fitted.isNull():
            ratio = self.devicePixelRatioF()
            size = QSize(max(1, round(width * ratio)), max(1, round(height * ratio)))
            smooth = Qt.TransformationMode.SmoothTransformation
            self._fitted = self._pixmap.scaled(size, Qt.AspectRatioMode.IgnoreAspectRatio, smooth)
            self._fitted.setDevicePixelRatio(ratio)
        return self._fitted

    def wheelEvent(self, event: QWheelEvent) -> None:
        if self.empty or not event.angleDelta().y():
            return
        before = self._scale()
        self._zoom = min(max(self._zoom * 1.0015 ** event.angleDelta().y(), 1.0), 40.0)
        if self._zoom == 1.0:
            self._centre = QPointF(0.5, 0.5)
        else:  # what is under the pointer stays there
            away = event.position() - QPointF(self.width() / 2, self.height() / 2)
            shift = away * (1 / before - 1 / self._scale())
            self._centre += QPointF(shift.x() / self._pixmap.width(), shift.y() / self._pixmap.height())
        self.update()
        event.accept()

    def mousePressEvent(self, event: QMouseEvent) -> None:
        self._grip = event.position()

    def mouseMoveEvent(self, event: QMouseEvent) -> None:
        if self._grip is None or self.empty or self._zoom == 1.0:
            return
        moved = (event.position() - self._grip) / self._scale()
        self._centre -= QPointF(moved.x() / self._pixmap.width(), moved.y() / self._pixmap.height())
        self._grip = event.position()
        self.update()

    def mouseReleaseEvent(self, event: QMouseEvent) -> None:
        self._grip = None

    def mouseDoubleClickEvent(self, event: QMouseEvent) -> None:
        self.fit()


def save_states(memory: QSettings, splits: Mapping[str, QSplitter]) -> None:
    """Remember where splitters are, each under a key."""
    for key, split in splits.items():
        memory.setValue(key, split.saveState())


def restore_states(memory: QSettings, splits: Mapping[str, QSplitter]) -> None:
    """Put splitters where they were."""
    for key, split in splits.items():
        if state := memory.value(key):
            split.restoreState(state)


class NoWheel(QObject):
    """Keeps the wheel from changing fields that only happen to lie under the pointer while a page scrolls."""

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        if event.type() == QEvent.Type.Wheel and isinstance(watched, QWidget) and not watched.hasFocus():
            event.ignore()
            return True
        return False


def keep_wheel_away(widgets: Iterable[QWidget], owner: QObject) -> None:
    """Put `NoWheel` on widgets; `owner` keeps it alive."""
    guard = NoWheel(owner)
    for widget in widgets:
        widget.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        widget.installEventFilter(guard)
