"""The filter window: which subs go into the mosaic, and in which lots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PySide6.QtCore import QSettings, Qt, QTimer, Signal
from PySide6.QtGui import QCloseEvent, QImage, QKeySequence, QShortcut
from PySide6.QtWidgets import (
    QButtonGroup,
    QComboBox,
    QFileDialog,
    QHBoxLayout,
    QMainWindow,
    QProgressBar,
    QSplitter,
    QTabWidget,
    QToolButton,
    QVBoxLayout,
    QWidget,
)

from zemosaic.gui.blink import BlinkPanel
from zemosaic.gui.engine import Command, has_command, last_line
from zemosaic.gui.exclude_bar import ExcludeBar
from zemosaic.gui.frame_store import FrameStore
from zemosaic.gui.frame_table import FrameTable
from zemosaic.gui.i18n import tr
from zemosaic.gui.lots_panel import LotsPanel
from zemosaic.gui.scanner import Scanner
from zemosaic.gui.sky_view import COLOUR_MODES, TOOLS, SkyView
from zemosaic.gui.table_model import export_csv
from zemosaic.gui.widgets import Card, PictureView, Switch, button, label, restyle
from zemosaic.settings import Settings

_LATER_MS = 400  # what is summed up over all subs need not follow every one of them


class FilterWindow(QMainWindow):
    """Sky, coverage, pictures, table and lots of the same subs.

    Signals: ``sds_toggled(bool)``; ``rescan()`` when headers have changed (after solving).

    Parameters
    ----------
    store, scanner
        Shared with the main window.
    settings : callable
        The settings as they are in the main window now: the lots depend on them.
    output : callable
        The output folder as it is now: solutions go there.
    """

    sds_toggled = Signal(bool)
    rescan = Signal()

    def __init__(
        self,
        store: FrameStore,
        scanner: Scanner,
        settings: Callable[[], Settings],
        output: Callable[[], Path],
        memory: QSettings,
    ) -> None:
        super().__init__()
        self._store, self._scanner = store, scanner
        self._settings, self._output, self._memory = settings, output, memory
        self.setWindowTitle(tr("filter_title"))
        self.resize(1380, 860)
        self._solver = Command(self)
        self._solver.ended.connect(self._solved)
        self._later = QTimer(self)
        self._later.setSingleShot(True)
        self._later.setInterval(_LATER_MS)
        self._later.timeout.connect(self.refresh)
        self._build()
        for signal in (store.added, store.changed, store.cleared, store.lots_changed, store.selected):
            signal.connect(self._soon)
        scanner.scanned.connect(self._progress)
        scanner.measured.connect(self._progress)
        scanner.lots_progress.connect(lambda share: self._progress(round(100 * share), 100))
        scanner.idle.connect(self._idle)
        scanner.failed.connect(lambda reason: self.say(tr("helper_failed", reason=reason), "bad"))
        scanner.depth.connect(self._show_depth)
        if geometry := memory.value("filter/geometry"):
            self.restoreGeometry(geometry)
        self.refresh()

    # --- parts

    def _build(self) -> None:
        page = QWidget()
        page.setObjectName("page")
        self.setCentralWidget(page)
        layout = QVBoxLayout(page)
        layout.setContentsMargins(14, 10, 14, 12)
        layout.setSpacing(10)
        self.summary = label("", "title")
        self.message = label("", "dim")
        self.bar = QProgressBar()
        self.bar.setTextVisible(False)
        self.bar.setFixedWidth(180)
        self.bar.hide()
        head = QHBoxLayout()
        head.addWidget(self.summary)
        head.addStretch(1)
        head.addWidget(self.message)
        head.addWidget(self.bar)
        layout.addLayout(head)
        split = QSplitter(Qt.Orientation.Horizontal)
        split.setHandleWidth(10)
        split.addWidget(self._left())
        split.addWidget(self._right())
        split.setStretchFactor(0, 1)
        split.setStretchFactor(1, 1)
        split.setSizes([640, 700])
        layout.addWidget(split, 1)
        self.exclude = ExcludeBar(self._store)
        layout.addWidget(self.exclude)
        layout.addLayout(self._foot())

    def _left(self) -> Card:
        card = Card()
        self.sky = SkyView(self._store)
        self.depth_map = PictureView(tr("coverage_empty"))
        self.blink = BlinkPanel(self._store, self._scanner)
        self.tabs = QTabWidget()
        self.tabs.setDocumentMode(True)
        for widget, name in (
            (self._sky_page(), "tab_sky"),
            (self._depth_page(), "tab_coverage"),
            (self.blink, "tab_blink"),
        ):
            self.tabs.addTab(widget, tr(name))
        self.tabs.currentChanged.connect(self._tab_changed)
        card.body.addWidget(self.tabs)
        return card

    def _sky_page(self) -> QWidget:
        page = QWidget()
        layout = QVBoxLayout(page)
        layout.setContentsMargins(0, 6, 0, 0)
        self.mode = QComboBox()
        self.mode.setAccessibleName(tr("colour_by"))
        for mode in COLOUR_MODES:
            self.mode.addItem(tr(f"mode_{mode}"), mode)
        self.mode.currentIndexChanged.connect(lambda: self.sky.set_mode(self.mode.currentData()))
        row = QHBoxLayout()
        row.addWidget(label(tr("colour_by"), "dim"))
        row.addWidget(self.mode)
        row.addStretch(1)
        self.tools = QButtonGroup(self)
        for key, tool in zip(("Ctrl+1", "Ctrl+2", "Ctrl+3"), TOOLS, strict=True):
            made = QToolButton()
            made.setText(tr(f"tool_{tool}"))
            made.setToolTip(f"{tr(f'tool_{tool}_tip')} ({key})")
            made.setCheckable(True)
            made.setChecked(tool == "pan")
            made.setShortcut(QKeySequence(key))
            made.clicked.connect(lambda _=False, chosen=tool: self.sky.set_tool(chosen))
            self.tools.addButton(made)
            row.addWidget(made)
        fit = QToolButton()
        fit.setText(tr("fit"))
        fit.setToolTip(tr("fit_tip"))
        fit.clicked.connect(self.sky.fit)
        row.addWidget(fit)
        layout.addLayout(row)
        layout.addWidget(self.sky, 1)
        return page

    def _depth_page(self) -> QWidget:
        page = QWidget()
        layout = QVBoxLayout(page)
        layout.setContentsMargins(0, 6, 0, 0)
        self.depth_note = label("", "dim")
        layout.addWidget(self.depth_map, 1)
        layout.addWidget(self.depth_note)
        return page

    def _right(self) -> QSplitter:
        split = QSplitter(Qt.Orientation.Vertical)
        split.setHandleWidth(10)
        frames = Card(tr("table_name"))
        self.table = FrameTable(self._store)
        frames.body.addWidget(self.table)
        lots = Card(tr("lots"))
        self.lots = LotsPanel(self._store)
        self.lots.build.connect(self.build_lots)
        self.sds = Switch(tr("sds"))
        self.sds.setToolTip(tr("sds_help"))
        self.sds.toggled.connect(self.sds_toggled)
        self.sds.toggled.connect(self._sds_changed)
        lots.body.insertWidget(1, self.sds)
        lots.body.addWidget(self.lots)
        split.addWidget(frames)
        split.addWidget(lots)
        split.setStretchFactor(0, 3)
        split.setStretchFactor(1, 2)
        return split

    def _foot(self) -> QHBoxLayout:
        self.measure = button(tr("measure"), tip=tr("measure_tip"))
        self.measure.clicked.connect(self._measure)
        self.solve = button(tr("solve"), tip=tr("solve_tip"))
        self.solve.clicked.connect(self._solve)
        self.solve.setVisible(has_command("solve"))
        self.export = button(tr("export_csv"), tip=tr("export_csv_tip"))
        self.export.clicked.connect(self._export)
        self.done = button(tr("filter_done"), "primary", tip=tr("filter_done_tip"))
        self.done.clicked.connect(self.close)
        QShortcut(QKeySequence("Ctrl+Return"), self, self.close)
        QShortcut(QKeySequence(QKeySequence.StandardKey.Delete), self.table, self.exclude.selected.click)
        row = QHBoxLayout()
        for widget in (self.measure, self.solve, self.export):
            row.addWidget(widget)
        row.addStretch(1)
        row.addWidget(label(tr("filter_note"), "dim"))
        row.addWidget(self.done)
        return row

    # --- what happens

    def set_sds(self, on: bool) -> None:
        """Follow the switch of the main window."""
        self.sds.setChecked(on)

    def _sds_changed(self, on: bool) -> None:
        self.lots.setEnabled(on)

    def build_lots(self) -> None:
        """Let the engine's planner make the lots."""
        self.say(tr("lots_building"))
        self._scanner.build_lots(self._settings())

    def refresh(self) -> None:
        """Sum up what there is."""
        rows = self._store.rows
        used = self._store.used()
        seconds = sum(rows[i].exposure for i in used if rows[i].exposure == rows[i].exposure)
        unsolved = sum(not row.wcs for row in rows)
        parts = [tr("summary_subs", used=len(used), all=len(rows)), tr("summary_time", minutes=seconds / 60)]
        if self._store.selection:
            parts.append(tr("summary_selected", n=len(self._store.selection)))
        self.summary.setText("   ·   ".join(parts))
        self.solve.setEnabled(unsolved > 0 and not self._solver.running)
        self.solve.setText(tr("solve_n", n=unsolved) if unsolved else tr("solve"))
        self.measure.setEnabled(bool(rows) and not self._scanner.busy("scan"))
        measuring = self._scanner.busy("measure")
        self.measure.setText(tr("measure_stop") if measuring else tr("measure"))
        self.exclude.refresh_values()
        self.lots.setEnabled(self.sds.isChecked())
        if self.tabs.currentIndex() == 1 and not self._scanner.busy("coverage"):
            self._scanner.ask_depth()

    def say(self, text: str, kind: str = "dim") -> None:
        """A sentence at the top right."""
        restyle(self.message, kind)
        self.message.setText(text)

    def _soon(self) -> None:
        if not self._later.isActive():
            self._later.start()

    def _tab_changed(self, place: int) -> None:
        if place == 1:
            self._scanner.ask_depth()

    def _show_depth(self, image: QImage, deepest: int) -> None:
        self.depth_map.show_image(image)
        self.depth_note.setText(tr("coverage_note", deepest=deepest))

    def _progress(self, current: int, total: int) -> None:
        self.bar.setVisible(current < total)
        self.bar.setRange(0, total)
        self.bar.setValue(current)
        if self._scanner.busy("scan"):
            self.say(tr("scanning", n=current, total=total))
        elif self._scanner.busy("measure"):
            self.say(tr("measuring", n=current, total=total))

    def _idle(self, what: str) -> None:
        if what in ("scan", "measure", "lots"):
            self.bar.hide()
            if self.message.objectName() == "dim":
                self.say("")
            self._soon()

    def _measure(self) -> None:
        if self._scanner.busy("measure"):
            self._scanner.cancel("measure")
            return
        store = self._store
        chosen = [i for i in sorted(store.selection) if store.rows[i].wcs] if len(store.selection) > 1 else []
        todo = [i for i in (chosen or store.used()) if store.rows[i].stars != store.rows[i].stars]
        if todo:
            self._scanner.measure(todo)
            self._progress(0, len(todo))
        self._soon()

    def _solve(self) -> None:
        paths = [row.path for row in self._store.rows if not row.wcs]
        folder = self._output()
        self.say(tr("solving", n=len(paths)))
        self._solver.start("solve", [*paths, "-o", str(folder)])
        self._soon()

    def _solved(self, status: int, _text: str, errors: str) -> None:
        if status == 0:
            self.say(tr("solved"))
            self.rescan.emit()
        else:
            self.say(tr("solve_failed", reason=last_line(errors) or status), "bad")
        self._soon()

    def _export(self) -> None:
        chosen, _ = QFileDialog.getSaveFileName(self, tr("export_csv"), "subs.csv", "CSV (*.csv)")
        if not chosen:
            return
        try:
            export_csv(self._store, Path(chosen))
        except OSError as problem:
            self.say(tr("export_failed", path=chosen, reason=problem.strerror), "bad")
        else:
            self.say(tr("exported", path=chosen))

    def closeEvent(self, event: QCloseEvent) -> None:
        self._memory.setValue("filter/geometry", self.saveGeometry())
        super().closeEvent(event)
