"""The footprints of all subs on the sky: pan, zoom, select.

Thousands of outlines take longer to paint than a screen frame lasts. They are painted into a picture in slices of a few
milliseconds; meanwhile the picture before is shown where the view has moved it. Subs that stream in are painted
on top of what is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from PySide6.QtCore import QEvent, QPointF, QRectF, QSize, Qt, QTimer, Signal
from PySide6.QtGui import (
    QColor,
    QFontMetricsF,
    QImage,
    QKeyEvent,
    QMouseEvent,
    QPainter,
    QPaintEvent,
    QPen,
    QPolygonF,
    QTransform,
    QWheelEvent,
)
from PySide6.QtWidgets import QWidget

from zemosaic.gui.frame_store import FrameRow, FrameStore
from zemosaic.gui.i18n import tr, words
from zemosaic.gui.slices import SLICE_S
from zemosaic.gui.theme import QUALITY_COLOURS, UNKNOWN_COLOUR, colours, group_colours
from zemosaic.gui.widgets import on_dark_ground

COLOUR_MODES = ("lot", "night", "instrument", "quality")
TOOLS = ("pan", "rectangle", "lasso")

_MANY = 1500  # footprints from which on they are drawn without smoothing and filling
_CLICK_PX = 4
_SETTLE_MS = 60
_LEGEND_ROWS = 12


@dataclass(frozen=True)
class View:
    """What part of the plane is seen: the point in the middle (degrees) and pixels a degree."""

    x: float = 0.0
    y: float = 0.0
    scale: float = 100.0

    def transform(self, size: QSize) -> QTransform:
        """From the plane to the widget; north is up, west to the right."""
        made = QTransform.fromTranslate(size.width() / 2, size.height() / 2)
        return made.scale(self.scale, -self.scale).translate(-self.x, -self.y)


class _Layer:
    """A picture that is painted bit by bit, and the view it belongs to."""

    def __init__(self) -> None:
        self.image = QImage()
        self.view = View()
        self._next = QImage()
        self._next_view = View()
        self._position = 0
        self.items: Sequence[int] = ()
        self.busy = False

    def restart(self, view: View, size: QSize, ratio: float, items: Sequence[int]) -> None:
        """Begin a new picture; the old one is shown until it is done."""
        self._next = QImage(size * ratio, QImage.Format.Format_ARGB32_Premultiplied)
        self._next.setDevicePixelRatio(ratio)
        self._next.fill(Qt.GlobalColor.transparent)
        self._next_view, self._position, self.items, self.busy = view, 0, items, True

    def extend(self, end: int) -> None:
        """More items have come: `items` must be a range from 0."""
        self.items = range(end)
        self.busy = True

    def step(self, size: QSize, deadline: float, draw: Callable[[QPainter, int], None], smooth: bool) -> None:
        """Paint until the deadline."""
        painter = QPainter(self._next)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing, smooth)
        painter.setTransform(self._next_view.transform(size))
        while self._position < len(self.items):
            draw(painter, self.items[self._position])
            self._position += 1
            if self._position % 16 == 0 and perf_counter() > deadline:
                break
        painter.end()
        self.busy = self._position < len(self.items)
        if not self.busy or self._next_view == self.view:
            self.image, self.view = self._next, self._next_view

    def show(self, painter: QPainter, view: View, size: QSize) -> None:
        """Put the picture where it belongs in the present view."""
        if self.image.isNull():
            return
        back, _ = self.view.transform(size).inverted()
        painter.save()
        painter.setTransform(back * view.transform(size))
        painter.drawImage(0, 0, self.image)
        painter.restore()


class SkyView(QWidget):
    """The sky with all footprints. Signals: ``pointer(x, y)`` degrees on the plane under the mouse."""

    pointer = Signal(float, float)

    def __init__(self, store: FrameStore) -> None:
        super().__init__()
        self.setMinimumSize(260, 220)
        self.setMouseTracking(True)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setAccessibleName(tr("sky_view"))
        self._store = store
        self._view = View()
        self._touched = False  # by the user: then new subs no longer change the view
        self._base, self._marks = _Layer(), _Layer()
        self._mode = "lot"
        self._tool = "pan"
        self._palette: dict[str, str] = {}
        self._steps: list[float] = []
        self._drag: list[QPointF] = []
        self._timer = QTimer(self)
        self._timer.timeout.connect(self._paint_on)
        self._settle = QTimer(self)  # a wheel turns on: painting anew waits until it stops
        self._settle.setSingleShot(True)
        self._settle.timeout.connect(self._settled)
        store.added.connect(self._added)
        store.changed.connect(lambda numbers: self._settle.start(_SETTLE_MS) if numbers else None)
        store.selected.connect(self._repaint_marks)
        store.cleared.connect(self._cleared)

    @property
    def settled(self) -> bool:
        """Whether everything is painted."""
        return not (self._base.busy or self._marks.busy or self._settle.isActive())

    def set_mode(self, mode: str) -> None:
        """Colour by one of `COLOUR_MODES`."""
        self._mode = mode
        self._repaint_all()

    def set_tool(self, tool: str) -> None:
        """What dragging does: one of `TOOLS`."""
        self._tool = tool
        self.setCursor(Qt.CursorShape.OpenHandCursor if tool == "pan" else Qt.CursorShape.CrossCursor)

    def fit(self) -> None:
        """Show all footprints; those left out for being of another field only if there is nothing else."""
        rows = [row for row in self._store.rows if not row.box.isEmpty()]
        boxes = [row.box for row in ([r for r in rows if not r.problem] or rows)]
        if not boxes:
            return
        left, right = min(b.left() for b in boxes), max(b.right() for b in boxes)
        low, high = min(b.top() for b in boxes), max(b.bottom() for b in boxes)
        scale = 0.88 * min(self.width() / max(right - left, 1e-6), self.height() / max(high - low, 1e-6))
        self._view = View((left + right) / 2, (low + high) / 2, scale)
        self._repaint_all()

    # --- painting

    def showEvent(self, event: QEvent) -> None:
        self._settle.start(0)

    def _settled(self) -> None:
        if self._touched:
            self._repaint_all()
        else:
            self.fit()

    def _added(self, first: int, end: int) -> None:
        if not self.isVisible():
            return
        box = self._visible()
        outside = any(not box.contains(r.box) for r in self._store.rows[first:end] if not r.box.isEmpty())
        if outside and not self._touched:
            self.fit()
        elif self._crossing(first, end) or self._base.view != self._view or self._base.image.isNull():
            self._repaint_all()
        else:
            self._legend()
            self._base.extend(end)
            self._timer.start(0)

    def _crossing(self, first: int, end: int) -> bool:
        return first <= _MANY < end

    def _cleared(self) -> None:
        self._touched = False
        self._repaint_all()

    def _repaint_all(self) -> None:
        self._settle.stop()
        if not self.isVisible():  # shown again, everything is painted anew
            return
        self._legend()
        self._base.restart(self._view, self.size(), self.devicePixelRatioF(), range(len(self._store.rows)))
        self._repaint_marks()

    def _repaint_marks(self) -> None:
        if not self.isVisible():
            return
        self._marks.restart(self._view, self.size(), self.devicePixelRatioF(), sorted(self._store.selection))
        self._timer.start(0)

    def _paint_on(self) -> None:
        deadline = perf_counter() + SLICE_S
        smooth = len(self._store.rows) <= _MANY
        if self._base.busy:
            self._base.step(self.size(), deadline, self._draw_footprint, smooth)
        elif self._marks.busy:
            self._marks.step(self.size(), deadline, self._draw_mark, len(self._marks.items) <= _MANY)
        else:
            self._timer.stop()
        self.update()

    def _draw_footprint(self, painter: QPainter, number: int) -> None:
        row = self._store.rows[number]
        if row.outline.isEmpty():
            return
        colour = QColor(self._colour(row))
        fill = QColor(colour)
        fill.setAlpha(16)
        if not row.used:
            colour.setAlpha(70)
        pen = QPen(colour, 1.2)
        pen.setCosmetic(True)
        if not row.used:
            pen.setStyle(Qt.PenStyle.DotLine)
        painter.setPen(pen)
        filled = row.used and len(self._store.rows) <= _MANY
        painter.setBrush(fill if filled else Qt.BrushStyle.NoBrush)
        painter.drawPolygon(row.outline)

    def _draw_mark(self, painter: QPainter, number: int) -> None:
        accent = QColor(colours().text)
        pen = QPen(accent, 2.0)
        pen.setCosmetic(True)
        painter.setPen(pen)
        fill = QColor(colours().accent)
        fill.setAlpha(70 if len(self._marks.items) < 50 else 12)
        painter.setBrush(fill if len(self._marks.items) <= 400 else Qt.BrushStyle.NoBrush)
        painter.drawPolygon(self._store.rows[number].outline)

    def _legend(self) -> None:
        rows = self._store.rows
        if self._mode == "quality":
            known = sorted(row.fwhm for row in rows if not math.isnan(row.fwhm))
            n = len(QUALITY_COLOURS)
            self._steps = [known[len(known) * k // n] for k in range(1, n)] if len(known) >= n else []
            self._palette = {}
        else:
            self._palette = group_colours(sorted({self._group(row) for row in rows} - {""}, key=_natural))

    def _group(self, row: FrameRow) -> str:
        if self._mode == "lot":
            return str(row.lot + 1) if row.lot >= 0 else ""
        return row.night if self._mode == "night" else row.instrument

    def _colour(self, row: FrameRow) -> str:
        if not row.used:
            return UNKNOWN_COLOUR
        if self._mode == "quality":
            if not self._steps or math.isnan(row.fwhm):
                return UNKNOWN_COLOUR
            return QUALITY_COLOURS[sum(row.fwhm >= step for step in self._steps)]
        return self._palette.get(self._group(row), colours().accent if self._mode == "lot" else UNKNOWN_COLOUR)

    def resizeEvent(self, event: QEvent) -> None:
        self._settle.start(_SETTLE_MS)

    def changeEvent(self, event: QEvent) -> None:
        if event.type() in (QEvent.Type.PaletteChange, QEvent.Type.StyleChange):
            self._settle.start(_SETTLE_MS)
        super().changeEvent(event)

    def paintEvent(self, event: QPaintEvent) -> None:
        with on_dark_ground(self) as painter:
            if not any(row.wcs for row in self._store.rows):
                painter.setPen(QColor(colours().dim))
                flags = Qt.AlignmentFlag.AlignCenter | Qt.TextFlag.TextWordWrap
                text = tr("sky_unplaced" if self._store.rows else "sky_empty")
                painter.drawText(self.rect().adjusted(40, 20, -40, -20), int(flags), text)
                return
            self._base.show(painter, self._view, self.size())
            self._marks.show(painter, self._view, self.size())
            self._draw_drag(painter)
            self._draw_scale_bar(painter)
            self._draw_compass(painter)
            self._draw_legend(painter)

    def _draw_drag(self, painter: QPainter) -> None:
        if self._tool == "pan" or len(self._drag) < 2:
            return
        fill = QColor(colours().accent)
        painter.setPen(QPen(fill, 1.5, Qt.PenStyle.DashLine))
        fill.setAlpha(40)
        painter.setBrush(fill)
        painter.drawPolygon(self._drag_shape())

    def _draw_scale_bar(self, painter: QPainter) -> None:
        wanted = 110 / self._view.scale
        steps = [60.0, 30.0, 10.0, 5.0, 2.0, 1.0, 0.5, 1 / 6, 1 / 12, 1 / 30, 1 / 60]
        length = next((step for step in steps if step <= wanted), steps[-1])
        text = f"{length:g}°" if length >= 0.5 else f"{length * 60:.0f}′"
        y, x, width = self.height() - 16.0, 16.0, length * self._view.scale
        painter.setPen(QPen(QColor(colours().text), 1.5))
        painter.drawPolyline(
            QPolygonF([QPointF(x, y - 5), QPointF(x, y), QPointF(x + width, y), QPointF(x + width, y - 5)])
        )
        painter.drawText(QPointF(x + 6, y - 6), text)

    def _draw_compass(self, painter: QPainter) -> None:
        origin = QPointF(self.width() - 22.0, self.height() - 18.0)
        painter.setPen(QPen(QColor(colours().text), 1.5))
        painter.drawLine(origin, origin + QPointF(0, -24))
        painter.drawLine(origin, origin + QPointF(-24, 0))
        painter.drawText(origin + QPointF(-4, -28), tr("north"))
        painter.drawText(origin + QPointF(-37, 4), tr("east"))

    def _draw_legend(self, painter: QPainter) -> None:
        if self._mode == "quality":
            edges = [f"< {words.number(self._steps[0], 1)} px"] if self._steps else [tr("legend_unmeasured")]
            edges += [f"≥ {words.number(step, 1)} px" for step in self._steps]
            entries = list(zip(edges, QUALITY_COLOURS if self._steps else (UNKNOWN_COLOUR,), strict=True))
        else:
            prefix = tr("legend_lot") + " " if self._mode == "lot" else ""
            entries = [(prefix + name, colour) for name, colour in self._palette.items()]
        if len(entries) > _LEGEND_ROWS:
            entries = [*entries[: _LEGEND_ROWS - 1], (tr("legend_more", n=len(entries) - _LEGEND_ROWS + 1), "")]
        if not entries:
            return
        metrics = QFontMetricsF(self.font())
        step = metrics.height() + 2
        width = max(metrics.horizontalAdvance(text) for text, _ in entries) + 34
        back = QColor(colours().panel)
        back.setAlpha(215)
        painter.setPen(Qt.PenStyle.NoPen)
        painter.setBrush(back)
        painter.drawRoundedRect(QRectF(10, 10, width, step * len(entries) + 10), 6, 6)
        for k, (text, colour) in enumerate(entries):
            y = 15 + step * k
            painter.setPen(Qt.PenStyle.NoPen)
            if colour:
                painter.setBrush(QColor(colour))
                painter.drawEllipse(QPointF(22, y + step / 2), 4.5, 4.5)
            painter.setPen(QColor(colours().text))
            painter.drawText(QPointF(34, y + metrics.ascent() + 1), text)

    # --- the hand of the user

    def _visible(self) -> QRectF:
        back, _ = self._view.transform(self.size()).inverted()
        return back.mapRect(QRectF(self.rect()))

    def _to_plane(self, point: QPointF) -> QPointF:
        back, _ = self._view.transform(self.size()).inverted()
        return back.map(point)

    def _look(self, view: View) -> None:
        self._view = view
        self._touched = True
        self._settle.start(_SETTLE_MS)
        self.update()

    def wheelEvent(self, event: QWheelEvent) -> None:
        self.zoom(1.0015 ** event.angleDelta().y(), event.position())
        event.accept()

    def zoom(self, factor: float, around: QPointF | None = None) -> None:
        """Zoom by a factor; what is at `around` (widget pixels; the middle if not given) stays there."""
        point = around or QPointF(self.width() / 2, self.height() / 2)
        before = self._to_plane(point)
        scale = min(max(self._view.scale * factor, 0.5), 2e5)
        x = before.x() - (point.x() - self.width() / 2) / scale
        y = before.y() + (point.y() - self.height() / 2) / scale
        self._look(View(x, y, scale))

    def keyPressEvent(self, event: QKeyEvent) -> None:
        key, step = event.key(), 60 / self._view.scale
        moves = {
            Qt.Key.Key_Left: (-step, 0.0),
            Qt.Key.Key_Right: (step, 0.0),
            Qt.Key.Key_Up: (0.0, step),
            Qt.Key.Key_Down: (0.0, -step),
        }
        if key in moves:
            dx, dy = moves[Qt.Key(key)]
            self._look(replace(self._view, x=self._view.x + dx, y=self._view.y + dy))
        elif key in (Qt.Key.Key_Plus, Qt.Key.Key_Equal):
            self.zoom(1.25)
        elif key == Qt.Key.Key_Minus:
            self.zoom(0.8)
        elif key == Qt.Key.Key_Escape:
            self._store.select(())
        else:
            super().keyPressEvent(event)

    def mousePressEvent(self, event: QMouseEvent) -> None:
        self._drag = [event.position()]

    def mouseMoveEvent(self, event: QMouseEvent) -> None:
        place = self._to_plane(event.position())
        self.pointer.emit(place.x(), place.y())
        if not self._drag:
            return
        if self._tool == "pan":
            moved = event.position() - self._drag[-1]
            scale = self._view.scale
            self._look(replace(self._view, x=self._view.x - moved.x() / scale, y=self._view.y + moved.y() / scale))
        self._drag.append(event.position())
        self.update()

    def mouseReleaseEvent(self, event: QMouseEvent) -> None:
        path, self._drag = self._drag, []
        if not path:
            return
        add = bool(event.modifiers() & (Qt.KeyboardModifier.ShiftModifier | Qt.KeyboardModifier.ControlModifier))
        moved = max(abs(p.x() - path[0].x()) + abs(p.y() - path[0].y()) for p in path)
        if moved <= _CLICK_PX:
            found = self._at(self._to_plane(event.position()))
        elif self._tool == "pan":
            return
        else:
            self._drag = path
            found = self._inside(self._drag_shape())
            self._drag = []
        self._store.select(found | self._store.selection if add else found)
        self.update()

    def mouseDoubleClickEvent(self, event: QMouseEvent) -> None:
        self._touched = False
        self.fit()

    def _drag_shape(self) -> QPolygonF:
        """What was drawn, in widget pixels."""
        if self._tool == "rectangle":
            return QPolygonF(QRectF(self._drag[0], self._drag[-1]).normalized())
        return QPolygonF(self._drag)

    def _inside(self, shape: QPolygonF) -> frozenset[int]:
        """Subs whose middle lies in a shape of widget pixels."""
        back, _ = self._view.transform(self.size()).inverted()
        area = back.map(shape)
        box, rule = area.boundingRect(), Qt.FillRule.OddEvenFill
        return frozenset(
            i
            for i, row in enumerate(self._store.rows)
            if row.wcs and box.contains(row.middle) and area.containsPoint(row.middle, rule)
        )

    def _at(self, point: QPointF) -> frozenset[int]:
        """The sub whose middle is nearest to a point of the plane, of those that hold it."""
        rule = Qt.FillRule.OddEvenFill
        hits = [
            i
            for i, row in enumerate(self._store.rows)
            if row.wcs and row.box.contains(point) and row.outline.containsPoint(point, rule)
        ]
        away = {i: (self._store.rows[i].middle - point).manhattanLength() for i in hits}
        return frozenset([min(hits, key=away.__getitem__)] if hits else ())


def _natural(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdigit() else (0, text)
