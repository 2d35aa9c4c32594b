"""The main window: what goes in, where it comes out, how it is made, and the run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from PySide6.QtCore import QSettings, Qt, QTimer, Signal
from PySide6.QtGui import QAction, QActionGroup, QCloseEvent, QKeySequence
from PySide6.QtWidgets import (
    QFileDialog,
    QHBoxLayout,
    QInputDialog,
    QMainWindow,
    QMenu,
    QMessageBox,
    QScrollArea,
    QSplitter,
    QVBoxLayout,
    QWidget,
)

from zemosaic.gui.engine import Engine, RunRequest
from zemosaic.gui.filter_window import FilterWindow
from zemosaic.gui.forecast import Forecast
from zemosaic.gui.frame_store import FrameStore
from zemosaic.gui.i18n import tr, words
from zemosaic.gui.presets import Presets
from zemosaic.gui.progress import TYPICAL, RunProgress
from zemosaic.gui.run_form import RunForm
from zemosaic.gui.run_view import RunView
from zemosaic.gui.scanner import Scanner
from zemosaic.gui.settings_panel import SettingsPanel
from zemosaic.gui.theme import THEMES
from zemosaic.gui.widgets import restore_states, save_states
from zemosaic.settings import Settings, SettingsError, load_settings, settings_from

_LATER_MS = 500
_SETTINGS_FILES = "TOML, JSON (*.toml *.json)"
_STOP_WAIT_MS = 5000


class MainWindow(QMainWindow):
    """Everything hangs here. Signals: ``theme_chosen(str)``, ``language_chosen(str)``.

    Parameters
    ----------
    memory : QSettings
        Geometry, last folders, timings.
    folder : Path
        Where presets live.
    panel : SettingsPanel, optional
        The settings, if they were made before.
    """

    theme_chosen = Signal(str)
    language_chosen = Signal(str)

    def __init__(self, memory: QSettings, folder: Path, panel: SettingsPanel | None = None) -> None:
        super().__init__()
        self._memory = memory
        self.presets = Presets(folder / "presets")
        self.store = FrameStore(self)
        self.scanner = Scanner(self.store, self)
        self.engine = Engine(self)
        self.panel = panel or SettingsPanel()
        self.form = RunForm(self.panel)
        self.view = RunView(self.panel)
        self.filter: FilterWindow | None = None
        self.forecast = Forecast(self)
        self._phases: dict[str, float] = {}  # seconds that the forecast gives them
        self._last: RunRequest | None = None  # a run that did not get to its end
        self._choices: tuple[dict[str, str], tuple[tuple[str, ...], ...]] | None = None
        self.setWindowTitle("ZeMosaic")
        self.resize(1280, 880)
        self._build()
        self._build_menus()
        self._later = QTimer(self)
        self._later.setSingleShot(True)
        self._later.setInterval(_LATER_MS)
        self._later.timeout.connect(self.refresh)
        self._connect()
        self._recall()
        self.refresh()

    # --- parts

    def _build(self) -> None:
        page = QWidget()
        page.setObjectName("page")
        self.setCentralWidget(page)
        area = QScrollArea()
        area.setWidgetResizable(True)
        area.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        area.setWidget(self.form)
        left = QWidget()
        left.setMinimumWidth(390)
        column = QVBoxLayout(left)
        column.setContentsMargins(0, 0, 0, 0)
        column.addWidget(area, 1)
        column.addWidget(self.form.start_card)
        split = QSplitter(Qt.Orientation.Horizontal)
        split.setHandleWidth(10)
        split.addWidget(left)
        split.addWidget(self.view)
        split.setStretchFactor(0, 0)
        split.setStretchFactor(1, 1)
        split.setSizes([410, 820])
        self._splits = {"main/split": split}
        row = QHBoxLayout(page)
        row.setContentsMargins(14, 8, 14, 14)
        row.addWidget(split)

    def _build_menus(self) -> None:
        files = self.menuBar().addMenu(tr("menu_file"))
        _action(files, tr("choose_folder"), self._ask_folder, QKeySequence.StandardKey.Open)
        _action(files, tr("choose_files"), self._ask_files, "Ctrl+Shift+O")
        files.addSeparator()
        _action(files, tr("quit"), self.close, QKeySequence.StandardKey.Quit)
        run = self.menuBar().addMenu(tr("menu_run"))
        _action(run, tr("start"), self.start, "Ctrl+R")
        _action(run, tr("stop"), self.view.stop_button.click, "Ctrl+.")
        _action(run, tr("filter_open"), self.open_filter, "Ctrl+F")
        self.preset_menu = self.menuBar().addMenu(tr("menu_presets"))
        self.preset_menu.aboutToShow.connect(self._fill_presets)
        view = self.menuBar().addMenu(tr("menu_view"))
        themes = view.addMenu(tr("menu_theme"))
        _choices(themes, {name: tr(f"theme_{name}") for name in THEMES}, self._theme(), self.choose_theme)
        self.language_menu = view.addMenu(tr("menu_language"))
        _choices(self.language_menu, words.available(), words.language, self.language_chosen.emit)
        for n, place in enumerate(("picture", "coverage", "log", "settings")):
            _action(view, tr(f"tab_{place}"), lambda n=n: self.view.tabs.setCurrentIndex(n), f"Alt+{n + 1}")

    def _connect(self) -> None:
        form = self.form
        form.inputs_chosen.connect(self.set_inputs)
        form.ask_folder.connect(self._ask_folder)
        form.ask_files.connect(self._ask_files)
        form.open_filter.connect(self.open_filter)
        form.start.connect(self.start)
        form.show_all.connect(lambda: self.view.tabs.setCurrentIndex(3))
        form.changed.connect(self._soon)
        form.estimate.connect(self._estimate)
        self.panel.changed.connect(self._soon)
        for signal in (self.store.added, self.store.changed, self.store.cleared, self.store.lots_changed):
            signal.connect(self._soon)
        self.scanner.scanned.connect(lambda n, total: form.show_scan(n, total))
        self.scanner.idle.connect(self._helper_idle)
        self.scanner.failed.connect(lambda reason: form.say(tr("helper_failed", reason=reason), "bad"))
        self.forecast.ready.connect(self._foreseen)
        self.engine.heard.connect(self.view.hear)
        self.engine.finished.connect(self._finished)
        self.view.stop.connect(self.engine.stop)
        self.view.kill.connect(self.engine.kill)

    def _recall(self) -> None:
        if geometry := self._memory.value("main/geometry"):
            self.restoreGeometry(geometry)
        restore_states(self._memory, self._splits)
        self.panel.set_value("sds_mode_default", self._memory.value("sds", False, bool))

    def _theme(self) -> str:
        return str(self._memory.value("theme", "system"))

    def choose_theme(self, name: str) -> None:
        """Look like one of `THEMES` from here on."""
        self._memory.setValue("theme", name)
        self.theme_chosen.emit(name)

    # --- input

    def set_inputs(self, paths: Sequence[Path]) -> None:
        """Take folders and files as the subs, and look at them at once."""
        self.form.set_inputs(paths)
        self._phases = {}
        self._memory.setValue("input", str(paths[0]))
        self.scanner.scan(paths)
        self._soon()

    def choices(self) -> tuple[dict[str, str], tuple[tuple[str, ...], ...]]:
        """What the user decided about the subs: path → why it is left out, and the lots if they were edited."""
        excluded = {row.path: row.excluded for row in self.store.rows if row.excluded}
        return excluded, self.store.lot_paths() if self.store.edited else ()

    def keep_choices(self, choices: tuple[dict[str, str], tuple[tuple[str, ...], ...]]) -> None:
        """Make these decisions again when the scan that comes is over."""
        self._choices = choices

    def rescan(self) -> None:
        """Look at the same subs again; what was decided about them stays."""
        choices = self.choices()
        self.scanner.scan(self.form.inputs)
        self.keep_choices(choices)

    def _helper_idle(self, what: str) -> None:
        if what == "scan" and self._choices is not None:
            (excluded, lots), self._choices = self._choices, None
            self.store.restore(excluded, lots)
        self._soon()

    def _ask_folder(self) -> None:
        chosen = QFileDialog.getExistingDirectory(self, tr("choose_folder"), str(self._memory.value("input", "")))
        if chosen:
            self.set_inputs([Path(chosen)])

    def _ask_files(self) -> None:
        start = str(self._memory.value("input", ""))
        chosen, _ = QFileDialog.getOpenFileNames(self, tr("choose_files"), start, "FITS (*.fit *.fits *.fts *.gz *.fz)")
        if chosen:
            self.set_inputs([Path(path) for path in chosen])

    def open_filter(self) -> None:
        """Open the filter window on the same subs."""
        if self.filter is None:
            self.filter = FilterWindow(self.store, self.scanner, self._loose_request, self._memory)
            self.filter.built.connect(self.refresh)
            self.filter.sds_toggled.connect(lambda on: self.panel.set_value("sds_mode_default", on))
            self.filter.rescan.connect(self.rescan)
        self.filter.open()

    # --- settings

    def settings(self) -> tuple[Settings, list[str]]:
        """The settings as they stand; `SettingsError` for what is not allowed."""
        values = self.panel.values()
        values |= {"language": self._engine_language(), "output_name": self.form.name()}
        return settings_from(values)

    def _engine_language(self) -> str:
        known = get_args(Settings.model_fields["language"].annotation)
        return words.language if words.language in known else "en"

    def _loose_request(self) -> RunRequest:
        """The run, with default settings while something in them is wrong: for what only looks ahead."""
        try:
            return self.request()
        except SettingsError:
            return RunRequest(tuple(self.form.inputs), self.form.output(), Settings())

    def apply_settings(self, settings: Settings, warnings: Sequence[str] = ()) -> None:
        """Take over settings that were read."""
        self.panel.set_values(settings.model_dump())
        self.form.set_name(settings.output_name)
        if warnings:
            self.form.say("\n".join(warnings), "warn")
        else:
            self.form.say("")

    def load_settings_file(self, path: Path) -> None:
        """Take over settings from TOML or a ``zemosaic_config.json``; what is wrong is said in the window."""
        try:
            self.apply_settings(*load_settings(path))
        except SettingsError as problem:
            self.form.say(tr("settings_bad", path=path.name, reason=problem), "bad")

    def _fill_presets(self) -> None:
        menu = self.preset_menu
        menu.clear()
        menu.addAction(tr("preset_default"), lambda: self.apply_settings(Settings()))
        for name in self.presets.names():
            menu.addAction(name, partial(self._load_preset, name))
        menu.addSeparator()
        menu.addAction(tr("preset_save"), self._ask_preset)
        gone = menu.addMenu(tr("preset_delete"))
        for name in self.presets.names():
            gone.addAction(name, partial(self.presets.delete, name))
        gone.setEnabled(bool(self.presets.names()))
        menu.addSeparator()
        menu.addAction(tr("settings_import"), self._ask_import)

    def _load_preset(self, name: str) -> None:
        try:
            self.apply_settings(*self.presets.load(name))
        except SettingsError as problem:
            self.form.say(tr("settings_bad", path=name, reason=problem), "bad")

    def _ask_preset(self) -> None:
        name, agreed = QInputDialog.getText(self, tr("preset_save"), tr("preset_name"))
        if agreed and name.strip():
            self.save_preset(name)

    def save_preset(self, name: str) -> None:
        """Keep the settings under a name."""
        try:
            self.form.say(tr("preset_saved", name=self.presets.save(name, self.settings()[0])))
        except (SettingsError, OSError) as problem:
            self.form.say(str(problem), "bad")

    def _ask_import(self) -> None:
        chosen, _ = QFileDialog.getOpenFileName(self, tr("settings_import"), "", _SETTINGS_FILES)
        if chosen:
            self.load_settings_file(Path(chosen))

    # --- the run

    def _soon(self) -> None:
        if not self._later.isActive():
            self._later.start()

    def refresh(self) -> None:
        """Bring the summary, the switch of the filter window and the start button up to date."""
        self.form.summarise(self.store, scanning=self.scanner.busy("scan"))
        if self.filter is not None and self.filter.ready:
            self.filter.set_sds(bool(self.panel.value("sds_mode_default")))
        problems = self.problems()
        running = self.engine.running
        resumable = not running and not problems and self._last is not None and self._last == self.request()
        self.form.show_start(running=running, problems=problems, resumable=resumable)
        self.language_menu.setEnabled(not running)

    def problems(self) -> list[str]:
        """Why a run cannot start, one sentence each; empty if it can."""
        form, rows = self.form, self.store.rows
        if not form.inputs:
            return [tr("problem_no_input")]
        found = [tr("problem_input_gone", path=path) for path in form.inputs if not path.exists()]
        if not form.output_text():
            found.append(tr("problem_no_output"))
        elif form.output().exists() and not form.output().is_dir():
            found.append(tr("problem_output_file", path=form.output()))
        if not self.scanner.busy("scan"):
            if not rows:
                found.append(tr("problem_no_subs"))
            elif all(row.excluded for row in rows):
                found.append(tr("problem_all_excluded"))
        return found + self.panel.problems()

    def request(self) -> RunRequest:
        """The run as it would start now.

        Raises
        ------
        SettingsError
            For a value that is not allowed.
        """
        rows = self.store.rows
        only = None
        if any(row.excluded for row in rows):
            only = tuple(row.path for row in rows if not row.excluded)
        lots = self.store.lot_paths() if self.store.edited else None
        return RunRequest(tuple(self.form.inputs), self.form.output(), self.settings()[0], only, lots)

    def start(self) -> None:
        """Start the run, or go on with the one that was stopped."""
        if self.engine.running or self.problems():
            self.refresh()
            return
        request = self.request()
        self.forecast.cancel()
        self.form.show_forecast("")
        self._last = request
        self._memory.setValue("sds", request.settings.sds_mode_default)
        route = request.settings.route
        if route == "auto":
            route = "sds" if request.settings.sds_mode_default else "master-tiles"
        without = () if request.settings.report else ("report",)
        self.view.begin(RunProgress(route, self._phases or self._timings(route), without=without))
        self.form.say("")
        self.engine.start(request)
        self.refresh()

    def _finished(self, result: dict[str, Any]) -> None:
        route = str(result.get("route", ""))
        seconds = self.view.finish(result)
        if result.get("product"):
            self._last = None
            for phase, value in seconds.items():
                if phase in TYPICAL.get(route, ()):
                    self._memory.setValue(f"timings/{route}/{phase}", value)
        self.refresh()

    def _timings(self, route: str) -> dict[str, float]:
        phases = TYPICAL.get(route, ())
        return {phase: float(str(self._memory.value(f"timings/{route}/{phase}", 0.0))) for phase in phases}

    def _foreseen(self, text: str, phases: dict[str, float]) -> None:
        self._phases = phases
        self.form.show_forecast(text)

    def _estimate(self) -> None:
        if not self.problems():
            self.forecast.start(self.request())

    def closeEvent(self, event: QCloseEvent) -> None:
        if self.engine.running and not self._agrees_to_stop():
            event.ignore()
            return
        self._memory.setValue("main/geometry", self.saveGeometry())
        save_states(self._memory, self._splits)
        if self.engine.running:
            self.engine.stop()
            self.engine.wait(_STOP_WAIT_MS)
            self.engine.kill()
            self.engine.wait(_STOP_WAIT_MS)
        self.forecast.cancel()
        self.scanner.close()
        if self.filter is not None:
            self.filter.end()
        super().closeEvent(event)

    def _agrees_to_stop(self) -> bool:
        box = QMessageBox(QMessageBox.Icon.Question, "ZeMosaic", tr("close_question"), parent=self)
        box.setInformativeText(tr("close_detail"))
        stop = box.addButton(tr("close_stop"), QMessageBox.ButtonRole.DestructiveRole)
        stay = box.addButton(tr("close_stay"), QMessageBox.ButtonRole.RejectRole)
        box.setDefaultButton(stay)
        box.exec()
        return box.clickedButton() is stop


def _action(menu: QMenu, text: str, do: Any, keys: Any) -> QAction:
    action = menu.addAction(text)
    action.triggered.connect(lambda _=False: do())
    action.setShortcut(QKeySequence(keys))
    return action


def _choices(menu: QMenu, names: dict[str, str], now: str, choose: Any) -> None:
    group = QActionGroup(menu)
    for name, text in names.items():
        action = menu.addAction(text)
        action.setCheckable(True)
        action.setChecked(name == now)
        action.triggered.connect(lambda _=False, name=name: choose(name))
        group.addAction(action)
