"""The table of the subs. It sorts its own list of numbers: Qt's sorting proxy asks Python for every comparison."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PySide6.QtCore import (
    QAbstractTableModel,
    QItemSelection,
    QItemSelectionRange,
    QModelIndex,
    QPersistentModelIndex,
    Qt,
    Signal,
)
from PySide6.QtGui import QColor

from zemosaic.gui.frame_store import FrameRow, FrameStore
from zemosaic.gui.i18n import tr, words
from zemosaic.gui.theme import colours

Index = QModelIndex | QPersistentModelIndex

_RANGES = 200  # of a selection that are handed to Qt at a time: a few milliseconds


@dataclass(frozen=True)
class Column:
    """One column: its key in the catalogue (``column_<key>``), what it sorts by, what it shows."""

    key: str
    value: Callable[[FrameRow], Any]
    text: Callable[[FrameRow], str]
    right: bool = False
    width: int = 70


def _number(name: str, decimals: int, width: int = 70) -> Column:
    def value(row: FrameRow) -> float:
        return float(getattr(row, name))

    def text(row: FrameRow) -> str:
        return "" if math.isnan(value(row)) else words.number(value(row), decimals)

    return Column(name, value, text, right=True, width=width)


def _word(name: str, width: int = 110) -> Column:
    return Column(name, lambda row: getattr(row, name), lambda row: getattr(row, name), width=width)


def _aligned(column: Column) -> int:
    side = Qt.AlignmentFlag.AlignRight if column.right else Qt.AlignmentFlag.AlignLeft
    return int(side | Qt.AlignmentFlag.AlignVCenter)


def state_text(row: FrameRow) -> str:
    """What becomes of a sub, in the user's language."""
    if row.unsolved and not row.excluded:
        return tr("state_unsolved")
    return row.problem or row.excluded or tr("state_used")


COLUMNS = (
    _word("name", 174),
    Column("date", lambda row: row.date, lambda row: row.date[:19].replace("T", " "), width=150),
    _number("exposure", 1, 80),
    _number("fwhm", 2, 70),
    _number("sky", 0, 62),
    _number("stars", 0, 68),
    Column("wcs", lambda row: row.wcs, lambda row: tr(f"wcs_{row.wcs}") if row.wcs else "–", width=80),
    Column("lot", lambda row: row.lot, lambda row: str(row.lot + 1) if row.lot >= 0 else "", right=True, width=46),
    Column("state", state_text, state_text, width=200),
    _word("instrument"),
    _word("filter", 80),
)


class FrameTableModel(QAbstractTableModel):
    """Rows of a `FrameStore` in the order that the user chose.

    Signals: ``resorting()`` before and ``resorted()`` after a change of order, for the view to take its selection off
    and put it on again: Qt would carry it over cell by cell.
    """

    resorting = Signal()
    resorted = Signal()

    def __init__(self, store: FrameStore) -> None:
        super().__init__(store)
        self._store = store
        self.order = list(range(len(store.rows)))  # row of the table -> number of the sub
        self._place = {i: i for i in self.order}
        self._sorted_by: tuple[int, bool] | None = None
        store.added.connect(self._added)
        store.changed.connect(self._changed)
        store.cleared.connect(self._cleared)

    def rowCount(self, parent: Index = QModelIndex()) -> int:  # noqa: B008  (Qt's own default)
        return 0 if parent.isValid() else len(self.order)

    def columnCount(self, parent: Index = QModelIndex()) -> int:  # noqa: B008
        return 0 if parent.isValid() else len(COLUMNS)

    def headerData(self, section: int, orientation: Qt.Orientation, role: int = Qt.ItemDataRole.DisplayRole) -> Any:
        if orientation != Qt.Orientation.Horizontal:
            return None
        if role == Qt.ItemDataRole.DisplayRole:
            return tr(f"column_{COLUMNS[section].key}")
        if role == Qt.ItemDataRole.ToolTipRole:
            return tr(f"column_{COLUMNS[section].key}_tip")
        if role == Qt.ItemDataRole.TextAlignmentRole:
            return _aligned(COLUMNS[section])
        return None

    def data(self, index: Index, role: int = Qt.ItemDataRole.DisplayRole) -> Any:
        column = COLUMNS[index.column()]
        row = self._store.rows[self.order[index.row()]]
        if role == Qt.ItemDataRole.DisplayRole:
            return column.text(row)
        if role == Qt.ItemDataRole.ToolTipRole:
            return row.path if column.key == "name" else column.text(row)
        if role == Qt.ItemDataRole.ForegroundRole and not row.used:
            return QColor(
                colours().bad if row.problem and not row.unsolved and column.key == "state" else colours().dim
            )
        if role == Qt.ItemDataRole.TextAlignmentRole:
            return _aligned(column)
        return None

    def sort(self, column: int, order: Qt.SortOrder = Qt.SortOrder.AscendingOrder) -> None:
        self._sorted_by = (column, order == Qt.SortOrder.DescendingOrder) if column >= 0 else None
        self._sort()

    def rows_of(self, numbers: Iterable[int]) -> list[int]:
        """Rows of the table of some subs, ascending."""
        return sorted(self._place[i] for i in numbers)

    def first_row(self, numbers: Iterable[int]) -> int:
        """The first row of the table that shows one of some subs."""
        return min(self._place[i] for i in numbers)

    def selection_of(self, numbers: Iterable[int]) -> Iterator[QItemSelection]:
        """The selection of some subs, in parts: neighbouring rows are one range, because each range costs Qt time."""
        made = QItemSelection()
        last = len(COLUMNS) - 1
        start = end = -2
        for row in [*self.rows_of(numbers), -1]:
            if row == end + 1 and row >= 0:
                end = row
                continue
            if start >= 0:
                made.append(QItemSelectionRange(self.createIndex(start, 0), self.createIndex(end, last)))
                if made.size() == _RANGES:
                    yield made
                    made = QItemSelection()
            start = end = row
        yield made

    def _sort(self) -> None:
        if self._sorted_by is None:
            return
        column, down = self._sorted_by
        value = COLUMNS[column].value
        rows = self._store.rows

        def key(i: int) -> tuple[bool, Any]:
            each = value(rows[i])
            blank = each == "" or (isinstance(each, float) and math.isnan(each))
            return blank != down, (0 if isinstance(each, float) else "") if blank else each  # blanks always last

        self.resorting.emit()
        self.layoutAboutToBeChanged.emit()
        self.order.sort(key=key, reverse=down)
        self._place = {i: row for row, i in enumerate(self.order)}
        self.layoutChanged.emit()
        self.resorted.emit()

    def _added(self, first: int, end: int) -> None:
        if first == end:
            return
        self.beginInsertRows(QModelIndex(), first, end - 1)
        self.order += range(first, end)
        self._place |= {i: i for i in range(first, end)}
        self.endInsertRows()
        self._sort()  # a few milliseconds for thousands of rows

    def _changed(self, numbers: set[int]) -> None:
        if not numbers:
            return
        rows = [self._place[i] for i in numbers]
        self.dataChanged.emit(self.index(min(rows), 0), self.index(max(rows), len(COLUMNS) - 1))

    def _cleared(self) -> None:
        self.beginResetModel()
        self.order, self._place = [], {}
        self.endResetModel()


def export_csv(store: FrameStore, path: Path) -> None:
    """Write the table, every sub with its full path, as CSV that spreadsheets and scripts read (UTF-8, ISO dates)."""
    names = ("path", "date", "night", "exposure", "fwhm", "sky", "stars", "wcs", "instrument", "filter", "object")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "lot", "used", "reason"])
        for row in store.rows:
            facts = [getattr(row, name) for name in names]
            facts = ["" if isinstance(fact, float) and math.isnan(fact) else fact for fact in facts]
            reason = row.problem or row.excluded
            writer.writerow([*facts, row.lot + 1 if row.lot >= 0 else "", int(row.used), reason])
