"""The filter window: which subs go into the mosaic, and in which lots."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
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

from zemosaic.cli import EXIT_PARTLY
from zemosaic.gui.blink import BlinkPanel
from zemosaic.gui.engine import Command, RunRequest, last_line
from zemosaic.gui.exclude_bar import ExcludeBar
from zemosaic.gui.frame_store import FrameStore
from zemosaic.gui.frame_table import FrameTable
from zemosaic.gui.i18n import tr
from zemosaic.gui.lots_panel import LotsPanel
from zemosaic.gui.scanner import Scanner
from zemosaic.gui.sky_view import COLOUR_MODES, TOOLS, SkyView
from zemosaic.gui.slices import Slices
from zemosaic.gui.table_model import export_csv
from zemosaic.gui.widgets import Card, PictureView, Switch, button, label, restore_states, restyle, save_states

_END_WAIT_MS = 2000
_LATER_MS = 400  # what is summed up over all subs need not follow every one of them


class FilterWindow(QMainWindow):
    """Sky, coverage, pictures, table and lots of the same subs.

    Signals: ``built()`` when all parts are made; ``sds_toggled(bool)``; ``rescan()`` when headers have changed (after
    solving).

    Parameters
    ----------
    store, scanner
        Shared with the main window.
    request : callable
        The run as the main window would start it now: lots and solutions depend on its settings.
    """

    built = Signal()
    sds_toggled = Signal(bool)
    rescan = Signal()

    def __init__(
        self,
        store: FrameStore,
        scanner: Scanner,
        request: Callable[[], RunRequest],
        memory: QSettings,
    ) -> None:
        super().__init__()
        self.store, self._scanner = store, scanner
        self.ready = False  # whether all parts are made
        self._wanted = False
        self._request, self._memory = request, memory
        self.setWindowTitle(tr("filter_title"))
        self.resize(1380, 860)
        self._solver = Command(self)
        self._solver.ended.connect(self._solved)
        self._later = QTimer(self)
        self._later.setSingleShot(True)
        self._later.timeout.connect(self.refresh)
        self._building = Slices(self)
        self._building.start(self._build())
        if geometry := memory.value("filter/geometry"):
            self.restoreGeometry(geometry)

    def build_all(self) -> None:
        """Make whatever is still missing now."""
        self._building.finish()

    def open(self) -> None:
        """Show it, in front; at once if it is ready, else as soon as it is."""
        self._wanted = True
        if self.ready:
            self.show()
            self.raise_()
            self.activateWindow()
            self._later.start(0)

    def _connect(self) -> None:
        store, scanner = self.store, self._scanner
        for signal in (store.added, store.changed, store.cleared, store.lots_changed, store.selected):
            signal.connect(self._soon)
        scanner.scanned.connect(self._progress)
        scanner.measured.connect(self._progress)
        scanner.lots_progress.connect(lambda share: self._progress(round(100 * share), 100))
        scanner.idle.connect(self._idle)
        scanner.failed.connect(lambda reason: self.say(tr("helper_failed", reason=reason), "bad"))
        scanner.depth.connect(self._show_depth)

    # --- parts

    def _build(self) -> Iterator[None]:
        """Make the parts, with pauses: together they would hold up the main window for a tenth of a second."""
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
        yield
        right = self._right()
        split.addWidget(right)
        yield
        split.setStretchFactor(0, 1)
        split.setStretchFactor(1, 1)
        split.setSizes([640, 700])
        self._splits = {"filter/split": split, "filter/split_right": right}
        restore_states(self._memory, self._splits)
        layout.addWidget(split, 1)
        yield
        self.exclude = ExcludeBar(self.store)
        layout.addWidget(self.exclude)
        yield
        layout.addLayout(self._foot())
        self._connect()
        yield
        for widget in self.findChildren(QWidget):
            widget.ensurePolished()
            yield
        self.ready = True
        self.built.emit()
        yield
        if self._wanted:
            self.open()

    def _left(self) -> Card:
        card = Card()
        self.sky = SkyView(self.store)
        self.depth_map = PictureView(tr("coverage_empty"))
        self.blink = BlinkPanel(self.store, self._scanner)
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
        self.table = FrameTable(self.store)
        frames.body.addWidget(self.table)
        lots = Card(tr("lots"))
        self.lots = LotsPanel(self.store)
        self.lots.build.connect(self.build_lots)
        self.sds = Switch(tr("sds"))
        self.sds.setToolTip(tr("sds_help"))
        self.sds.toggled.connect(self.sds_toggled)
        self.sds.toggled.connect(self.lots.setEnabled)
        self.lots.setEnabled(False)
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
        self.export = button(tr("export_csv"), tip=tr("export_csv_tip"))
        self.export.clicked.connect(self._export)
        self.done = button(tr("filter_done"), "primary", tip=tr("filter_done_tip"))
        self.done.clicked.connect(self.close)
        self.undo = self.store.undo
        undo, redo = self.undo.createUndoAction(self, tr("undo")), self.undo.createRedoAction(self, tr("redo"))
        undo.setShortcut(QKeySequence.StandardKey.Undo)
        redo.setShortcuts([QKeySequence("Ctrl+Shift+Z"), QKeySequence("Ctrl+Y")])
        QShortcut(QKeySequence("Ctrl+Return"), self, self.close)
        QShortcut(QKeySequence(QKeySequence.StandardKey.Delete), self.table, self.exclude.selected.click)
        row = QHBoxLayout()
        for widget in (self.measure, self.solve, self.export):
            row.addWidget(widget)
        for action, sign in ((undo, "↶"), (redo, "↷")):
            made = QToolButton()
            made.setDefaultAction(action)
            action.setIconText(sign)
            made.setAccessibleName(action.text())
            row.addWidget(made)
        row.addStretch(1)
        row.addWidget(label(tr("filter_note"), "dim"))
        row.addWidget(self.done)
        return row

    # --- what happens

    def set_sds(self, on: bool) -> None:
        """Follow the switch of the main window."""
        self.sds.setChecked(on)

    def build_lots(self) -> None:
        """Let the engine's planner make the lots."""
        self.say(tr("lots_building"))
        self._scanner.build_lots(self._request().settings)

    def refresh(self) -> None:
        """Sum up what there is."""
        rows = self.store.rows
        used = [row for row in rows if row.coming]
        seconds = sum(row.exposure for row in used if row.exposure == row.exposure)
        unsolved = sum(not row.wcs for row in rows)
        parts = [tr("summary_subs", used=len(used), all=len(rows)), tr("summary_time", minutes=seconds / 60)]
        if self.store.selection:
            parts.append(tr("summary_selected", n=len(self.store.selection)))
        self.summary.setText("   ·   ".join(parts))
        solving = self._solver.running
        self.solve.setEnabled(solving or (unsolved > 0 and not self._scanner.busy("scan")))
        self.solve.setText(tr("solve_stop") if solving else tr("solve_n", n=unsolved) if unsolved else tr("solve"))
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
        if self.isVisible() and not self._later.isActive():
            self._later.start(_LATER_MS)

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
        store = self.store
        chosen = [i for i in sorted(store.selection) if store.rows[i].wcs] if len(store.selection) > 1 else []
        todo = [i for i in (chosen or store.used()) if store.rows[i].stars != store.rows[i].stars]
        if todo:
            self._scanner.measure(todo)
            self._progress(0, len(todo))
        self._soon()

    def _solve(self) -> None:
        if self._solver.running:
            self._solver.kill()
            return
        request = self._request()
        paths = tuple(row.path for row in self.store.rows if not row.wcs)
        self.say(tr("solving", n=len(paths)))
        self.bar.setRange(0, 0)  # it is not known how long it takes
        self.bar.show()
        folder = Path(tempfile.mkdtemp(prefix="zemosaic-"))
        arguments = replace(request, only=paths, lots=None).arguments(folder)
        self._solver.start("solve", [*arguments, "--write-sidecars"], folder)
        self._soon()

    def _solved(self, status: int, text: str, errors: str) -> None:
        self.bar.hide()
        unsolved = [line for line in text.splitlines() if ": not solved: " in line]
        if status == -1:  # stopped by the user
            self.say("")
        elif status in (0, EXIT_PARTLY):
            self.say(tr("solved_partly", n=len(unsolved), example=unsolved[0]) if unsolved else tr("solved"))
            self.rescan.emit()
        else:
            self.say(tr("solve_failed", reason=last_line(errors) or status), "bad")
        self._soon()

    def _export(self) -> None:
        chosen, _ = QFileDialog.getSaveFileName(self, tr("export_csv"), "subs.csv", "CSV (*.csv)")
        if not chosen:
            return
        try:
            export_csv(self.store, Path(chosen))
        except OSError as problem:
            self.say(tr("export_failed", path=chosen, reason=problem.strerror), "bad")
        else:
            self.say(tr("exported", path=chosen))

    def end(self) -> None:
        """Close it for good, with what it has under way."""
        self._building.stop()
        self._solver.kill()
        self._solver.wait(_END_WAIT_MS)
        self.close()

    def closeEvent(self, event: QCloseEvent) -> None:
        self._wanted = False
        if self.ready:
            self._memory.setValue("filter/geometry", self.saveGeometry())
            save_states(self._memory, self._splits)
        super().closeEvent(event)
