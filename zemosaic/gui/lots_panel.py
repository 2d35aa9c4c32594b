"""The lots: built, looked at, edited, saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PySide6.QtCore import QAbstractTableModel, QItemSelection, QItemSelectionModel, QModelIndex, Qt, Signal
from PySide6.QtWidgets import (
    QAbstractItemView,
    QFileDialog,
    QHBoxLayout,
    QHeaderView,
    QInputDialog,
    QMenu,
    QTableView,
    QVBoxLayout,
    QWidget,
)

from zemosaic.gui.engine import save_lots
from zemosaic.gui.frame_store import FrameStore
from zemosaic.gui.frame_table import keep_header_apart
from zemosaic.gui.i18n import tr, words
from zemosaic.gui.table_model import Index
from zemosaic.gui.widgets import button, label, restyle
from zemosaic.lots import read_lots
from zemosaic.settings import SettingsError

_COLUMNS = ("lot", "frames", "minutes", "nights")
_FILES = "JSON (*.json)"
_OFFERED = 10  # lots to move subs to, the nearest ones; others by their number


class LotsModel(QAbstractTableModel):
    """One row a lot: number, subs, minutes, nights."""

    def __init__(self, store: FrameStore) -> None:
        super().__init__(store)
        self._store = store
        self._texts: list[tuple[str, ...]] = []
        store.lots_changed.connect(self.refresh)
        store.cleared.connect(self.refresh)

    def refresh(self) -> None:
        """Follow the store; rows come and go at the end, so that the view stays where it is."""
        before, after = len(self._texts), len(self._store.lots)
        if after > before:
            self.beginInsertRows(QModelIndex(), before, after - 1)
        elif after < before:
            self.beginRemoveRows(QModelIndex(), after, before - 1)
        self._texts = [self._describe(number, lot) for number, lot in enumerate(self._store.lots)]
        if after > before:
            self.endInsertRows()
        elif after < before:
            self.endRemoveRows()
        if after:
            self.dataChanged.emit(self.index(0, 0), self.index(after - 1, len(_COLUMNS) - 1))

    def _describe(self, number: int, lot: Sequence[int]) -> tuple[str, ...]:
        rows = [self._store.rows[i] for i in lot]
        seconds = sum(row.exposure for row in rows if not math.isnan(row.exposure))
        nights = sorted({row.night for row in rows} - {""})
        span = nights[0] if len(nights) == 1 else f"{nights[0]} … {nights[-1]}" if nights else ""
        return str(number + 1), str(len(lot)), words.number(seconds / 60, 1), span

    def rowCount(self, parent: Index = QModelIndex()) -> int:  # noqa: B008
        return 0 if parent.isValid() else len(self._texts)

    def columnCount(self, parent: Index = QModelIndex()) -> int:  # noqa: B008
        return 0 if parent.isValid() else len(_COLUMNS)

    def headerData(self, section: int, orientation: Qt.Orientation, role: int = Qt.ItemDataRole.DisplayRole) -> Any:
        if orientation == Qt.Orientation.Horizontal and role == Qt.ItemDataRole.DisplayRole:
            return tr(f"lots_column_{_COLUMNS[section]}")
        return None

    def data(self, index: Index, role: int = Qt.ItemDataRole.DisplayRole) -> Any:
        if role == Qt.ItemDataRole.DisplayRole:
            return self._texts[index.row()][index.column()]
        return None


class LotsPanel(QWidget):
    """The list of lots and what can be done with them. Signals: ``build()`` the engine's own plan is wanted."""

    build = Signal()

    def __init__(self, store: FrameStore) -> None:
        super().__init__()
        self._store = store
        self.model = LotsModel(store)
        self.table = QTableView()
        self.table.setModel(self.model)
        self.table.setAccessibleName(tr("lots"))
        self.table.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.table.setShowGrid(False)
        self.table.verticalHeader().setVisible(False)
        self.table.verticalHeader().setSectionResizeMode(QHeaderView.ResizeMode.Fixed)
        self.table.verticalHeader().setDefaultSectionSize(self.fontMetrics().height() + 9)
        self.table.horizontalHeader().setStretchLastSection(True)
        self.table.horizontalHeader().setHighlightSections(False)
        self.table.horizontalHeader().setDefaultAlignment(Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter)
        for k, width in enumerate((50, 60, 70)):
            self.table.setColumnWidth(k, width)
        keep_header_apart(self.table)
        self.table.selectionModel().selectionChanged.connect(self._show_members)
        self.note = label("", "dim", wrap=True)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self.note)
        layout.addWidget(self.table, 1)
        layout.addLayout(self._buttons())
        store.lots_changed.connect(self.refresh)
        store.cleared.connect(self.refresh)
        store.selected.connect(self.refresh)
        self.refresh()

    def _buttons(self) -> QHBoxLayout:
        self.build_button = button(tr("lots_build"), tip=tr("lots_build_tip"))
        self.build_button.clicked.connect(self.build)
        self.merge = button(tr("lots_merge"), tip=tr("lots_merge_tip"))
        self.merge.clicked.connect(self._merge)
        self.split = button(tr("lots_split"), tip=tr("lots_split_tip"))
        self.split.clicked.connect(self._split)
        self.move_button = button(tr("lots_move"), tip=tr("lots_move_tip"))
        self.move_button.clicked.connect(self._offer_targets)
        self.more = button(tr("lots_more"))
        menu = QMenu(self)
        menu.addAction(tr("lots_drop"), lambda: self._store.drop_lots(self.chosen()))
        menu.addAction(tr("lots_clear"), lambda: self._store.set_lots([]))
        menu.addSeparator()
        menu.addAction(tr("lots_save"), self._ask_save)
        menu.addAction(tr("lots_load"), self._ask_load)
        self.more.setMenu(menu)
        row = QHBoxLayout()
        row.setSpacing(6)
        for each in (self.build_button, self.merge, self.split, self.move_button, self.more):
            each.setStyleSheet("padding-left: 8px; padding-right: 8px;")
            row.addWidget(each)
        return row

    def chosen(self) -> list[int]:
        """Numbers of the lots that are selected."""
        return sorted({index.row() for index in self.table.selectionModel().selectedRows()})

    def choose(self, numbers: Sequence[int]) -> None:
        """Select lots."""
        picked = QItemSelection()
        for number in numbers:
            picked.select(self.model.index(number, 0), self.model.index(number, len(_COLUMNS) - 1))
        self.table.selectionModel().select(picked, QItemSelectionModel.SelectionFlag.ClearAndSelect)

    def refresh(self) -> None:
        """Say what the lots are, and offer what can be done."""
        lots, chosen = len(self._store.lots), len(self.chosen())
        restyle(self.note, "dim")
        if not lots:
            self.note.setText(tr("lots_none"))
        elif self._store.edited:
            self.note.setText(tr("lots_edited", lots=lots))
        else:
            self.note.setText(tr("lots_planned", lots=lots))
        self.merge.setEnabled(chosen > 1)
        self.split.setEnabled(chosen == 1 and len(self._store.lots[self.chosen()[0]]) > 1)
        self.move_button.setEnabled(bool(self._store.selection))

    def save(self, path: Path) -> None:
        """Write the lots to a file."""
        save_lots(path, self._store.lot_paths())

    def load(self, path: Path) -> None:
        """Read lots from a file; what is wrong with it is said in the panel."""
        try:
            unknown = self._store.take_lot_paths(read_lots(path))
        except SettingsError as problem:
            self._warn(tr("lots_load_failed", reason=problem))
            return
        if unknown:
            self._warn(tr("lots_unknown", n=unknown))

    def _warn(self, text: str) -> None:
        self.note.setText(text)
        restyle(self.note, "warn")

    def _merge(self) -> None:
        numbers = self.chosen()
        self._store.merge_lots(numbers)
        self.choose(numbers[:1])

    def _split(self) -> None:
        number, before = self.chosen()[0], len(self._store.lots)
        self._store.split_lot(number)
        self.choose(range(number, number + 1 + len(self._store.lots) - before))

    def _show_members(self) -> None:
        chosen = [number for number in self.chosen() if number < len(self._store.lots)]
        if chosen:
            self._store.select(i for number in chosen for i in self._store.lots[number])
        self.refresh()

    def _offer_targets(self) -> None:
        menu = QMenu(self)
        moving = tuple(self._store.selection)
        menu.addAction(tr("lots_move_new"), lambda: self._store.move_to_lot(moving, len(self._store.lots)))
        menu.addSeparator()
        near = self._store.near_lots(moving, _OFFERED)
        for number in near:
            text = tr("lots_move_to", lot=number + 1)
            menu.addAction(text, partial(self._store.move_to_lot, moving, number))
        if len(near) < len(self._store.lots):
            menu.addSeparator()
            menu.addAction(tr("lots_move_other"), lambda: self._ask_target(moving))
        menu.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        menu.popup(self.move_button.mapToGlobal(self.move_button.rect().bottomLeft()))

    def _ask_target(self, moving: Sequence[int]) -> None:
        most = len(self._store.lots)
        number, agreed = QInputDialog.getInt(self, tr("lots_move"), tr("lots_column_lot"), 1, 1, most)
        if agreed:
            self._store.move_to_lot(moving, number - 1)

    def _ask_save(self) -> None:
        chosen, _ = QFileDialog.getSaveFileName(self, tr("lots_save"), "lots.json", _FILES)
        if chosen:
            self.save(Path(chosen))

    def _ask_load(self) -> None:
        chosen, _ = QFileDialog.getOpenFileName(self, tr("lots_load"), "", _FILES)
        if chosen:
            self.load(Path(chosen))
