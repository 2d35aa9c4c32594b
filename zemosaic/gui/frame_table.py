"""The table of subs: selection in step with the sky view, however many rows."""

from __future__ import annotations

from collections.abc import Iterator

from PySide6.QtCore import QItemSelection, QItemSelectionModel, Qt
from PySide6.QtWidgets import QAbstractItemView, QHeaderView, QTableView

from zemosaic.gui.frame_store import FrameStore
from zemosaic.gui.i18n import tr
from zemosaic.gui.slices import Slices
from zemosaic.gui.table_model import COLUMNS, FrameTableModel


class FrameTable(QTableView):
    """Shows a `FrameStore`; what is selected here is selected everywhere, and the other way round."""

    def __init__(self, store: FrameStore) -> None:
        super().__init__()
        self._store = store
        self._syncing = False
        self._marking = Slices(self)
        self.frames = FrameTableModel(store)
        self.setModel(self.frames)
        self.setAccessibleName(tr("table_name"))
        self.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.setSelectionMode(QAbstractItemView.SelectionMode.ExtendedSelection)
        self.setAlternatingRowColors(True)
        self.setShowGrid(False)
        self.setTextElideMode(Qt.TextElideMode.ElideMiddle)  # names of subs differ at their end
        self.setWordWrap(False)
        self.horizontalHeader().setSortIndicator(-1, Qt.SortOrder.AscendingOrder)  # as they come, to begin with
        self.setSortingEnabled(True)
        self.horizontalHeader().setHighlightSections(False)
        self.horizontalHeader().setDefaultAlignment(Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter)
        rows = self.verticalHeader()
        rows.setVisible(False)
        rows.setSectionResizeMode(QHeaderView.ResizeMode.Fixed)  # measuring rows would read all of them
        rows.setDefaultSectionSize(self.fontMetrics().height() + 9)
        for k, column in enumerate(COLUMNS):
            self.setColumnWidth(k, column.width)
        self.horizontalHeader().setStretchLastSection(True)
        keep_header_apart(self)
        self.selectionModel().selectionChanged.connect(self._chosen_here)
        self.frames.resorting.connect(self._take_off)
        self.frames.resorted.connect(self._put_on)
        store.selected.connect(self._chosen_elsewhere)

    @property
    def marking(self) -> bool:
        """Whether a selection made elsewhere is still being shown here."""
        return self._marking.busy

    def _chosen_here(self, _new: QItemSelection, _old: QItemSelection) -> None:
        if self._syncing:
            return
        self._marking.stop()
        order = self.frames.order
        parts = self.selectionModel().selection().toList()
        rows = (row for part in parts for row in range(part.top(), part.bottom() + 1))
        self._syncing = True
        self._store.select(order[row] for row in rows)
        self._syncing = False

    def _chosen_elsewhere(self) -> None:
        if self._syncing:
            return
        self._take_off()
        self._put_on()
        if self._store.selection:
            self.scrollTo(self.frames.index(self.frames.first_row(self._store.selection), 0))

    def _take_off(self) -> None:
        self._marking.stop()
        self._syncing = True
        self.selectionModel().clear()
        self._syncing = False

    def _put_on(self) -> None:
        self._marking.start(self._mark())

    def _mark(self) -> Iterator[None]:
        """Select what the store has selected, in parts: thousands of single rows take Qt a tenth of a second."""
        for part in self.frames.selection_of(self._store.selection):
            self._syncing = True
            self.selectionModel().select(part, QItemSelectionModel.SelectionFlag.Select)
            self._syncing = False
            yield


def keep_header_apart(table: QTableView) -> None:
    """Give the header a selection of its own: else it asks for every cell whether whole columns are selected."""
    header = table.horizontalHeader()
    header.setSelectionModel(QItemSelectionModel(table.model(), header))
