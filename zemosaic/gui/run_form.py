"""The left half of the main window: subs, output, the few settings that matter, and the start button."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PySide6.QtCore import Signal
from PySide6.QtWidgets import QFormLayout, QHBoxLayout, QLineEdit, QProgressBar, QSpinBox, QVBoxLayout, QWidget

from zemosaic.gui.frame_store import FrameStore
from zemosaic.gui.i18n import tr
from zemosaic.gui.settings_panel import (
    Editor,
    SettingsPanel,
    make_editor,
    setting_help,
    setting_label,
    setting_unit,
    unit_text,
)
from zemosaic.gui.widgets import Card, DropArea, PathRow, Switch, button, keep_wheel_away, label, restyle

# The settings that most users will want to touch; everything else is one click away.
ESSENTIAL_SWITCHES = ("blur_filter", "altaz_cleanup_enabled", "quality_crop_enabled")
ESSENTIAL_FIELDS = ("global_wcs_orientation", "memory_gb")


class RunForm(QWidget):
    """The form. Its fields for settings are bound to those of the `SettingsPanel`, which holds the values."""

    inputs_chosen = Signal(list)
    ask_folder = Signal()
    ask_files = Signal()
    open_filter = Signal()
    show_all = Signal()
    estimate = Signal()
    start = Signal()
    changed = Signal()

    def __init__(self, panel: SettingsPanel) -> None:
        super().__init__()
        self._panel = panel
        self.inputs: list[Path] = []
        self._suggested = ""
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 4, 0)
        layout.setSpacing(10)
        for card in (self._input_card(), self._output_card(), self._method_card()):
            layout.addWidget(card)
        layout.addStretch(1)
        self.start_card = self._start_card()

    # --- parts

    def _input_card(self) -> Card:
        card = Card(tr("input"))
        self.drop = DropArea()
        self.drop.text.setText(tr("drop_here"))
        self.drop.hint.setText(tr("drop_hint"))
        self.drop.dropped.connect(self.inputs_chosen)
        self.folder_button = button(tr("choose_folder"))
        self.folder_button.clicked.connect(self.ask_folder)
        self.files_button = button(tr("choose_files"))
        self.files_button.clicked.connect(self.ask_files)
        self.scan_bar = QProgressBar()
        self.scan_bar.setTextVisible(False)
        self.scan_bar.hide()
        self.filter_button = button(tr("filter_open"), tip=tr("filter_open_tip"))
        self.filter_button.clicked.connect(self.open_filter)
        self.filter_button.setEnabled(False)
        row = QHBoxLayout()
        row.addWidget(self.folder_button, 1)
        row.addWidget(self.files_button, 1)
        card.body.addWidget(self.drop)
        card.body.addWidget(self.scan_bar)
        card.body.addLayout(row)
        card.body.addWidget(self.filter_button)
        return card

    def _output_card(self) -> Card:
        card = Card(tr("mosaic"))
        self._output = PathRow(tr("output"))
        self._output.changed.connect(self.changed)
        self._name = QLineEdit()
        self._name.setPlaceholderText(tr("name_hint"))
        self._name.setAccessibleName(tr("name"))
        self._name.textChanged.connect(self.changed)
        fields = QFormLayout()
        fields.addRow(tr("output"), self._output)
        fields.addRow(tr("name"), self._name)
        card.body.addLayout(fields)
        return card

    def _method_card(self) -> Card:
        card = Card(tr("method"))
        self.sds = Switch(tr("sds"))
        self.bind(self.sds, "sds_mode_default")
        card.body.addWidget(self.sds)
        card.body.addWidget(label(tr("sds_help"), "dim", wrap=True))
        self.switches: dict[str, Switch] = {}
        for name in ESSENTIAL_SWITCHES:
            switch = Switch(setting_label(name))
            switch.setToolTip(setting_help(name))
            self.bind(switch, name)
            self.switches[name] = switch
            card.body.addWidget(switch)
        fields = QFormLayout()
        for name in ESSENTIAL_FIELDS:
            editor = make_editor(name, unit_text(setting_unit(name)))
            editor.setToolTip(setting_help(name))
            editor.set_value(self._panel.value(name))
            editor.edited.connect(lambda name=name, editor=editor: self._panel.set_value(name, editor.value()))
            self._panel.changed.connect(lambda changed, name=name, editor=editor: self._follow(changed, name, editor))
            keep_wheel_away(editor.findChildren(QSpinBox), editor)
            fields.addRow(setting_label(name), editor)
        card.body.addLayout(fields)
        more = button(tr("all_settings"), "link")
        more.clicked.connect(self.show_all)
        card.body.addWidget(more)
        return card

    def _start_card(self) -> Card:
        card = Card()
        self.forecast = label("", "dim", wrap=True)
        self.forecast.hide()
        self.message = label("", "dim", wrap=True)
        self.message.hide()
        self.estimate_button = button(tr("estimate"), tip=tr("estimate_tip"))
        self.estimate_button.clicked.connect(self._ask_estimate)
        self.start_button = button(tr("start"), "primary")
        self.start_button.clicked.connect(self.start)
        row = QHBoxLayout()
        row.addWidget(self.estimate_button)
        row.addWidget(self.start_button, 1)
        for widget in (self.forecast, self.message):
            card.body.addWidget(widget)
        card.body.addLayout(row)
        return card

    # --- settings

    def bind(self, switch: Switch, name: str) -> None:
        """Keep a switch and a setting the same, whichever is changed."""
        switch.setChecked(bool(self._panel.value(name)))
        switch.toggled.connect(lambda on: self._panel.set_value(name, on))
        self._panel.changed.connect(
            lambda changed: switch.setChecked(bool(self._panel.value(name))) if changed == name else None
        )

    def _follow(self, changed: str, name: str, editor: Editor) -> None:
        value = self._panel.value(name)
        if changed == name and editor.value() != value:
            editor.set_value(value)

    # --- input and output

    def set_inputs(self, paths: Sequence[Path]) -> None:
        """Show what was chosen, and suggest where the mosaic goes, unless the user said so already."""
        self.inputs = list(paths)
        first = paths[0]
        folder = first if first.is_dir() else first.parent
        self.drop.text.setText(str(first) if len(paths) == 1 else tr("several_inputs", n=len(paths), folder=folder))
        if self.output_text() in ("", self._suggested):
            self._suggested = str(folder.with_name(f"{folder.name}-mosaic"))
            self._output.set_text(self._suggested)
        self.filter_button.setEnabled(True)
        self.forecast.hide()

    def output_text(self) -> str:
        return self._output.text()

    def output(self) -> Path:
        """The output folder."""
        return Path(self._output.text()).expanduser()

    def set_output(self, path: Path) -> None:
        self._output.set_text(str(path))

    def name(self) -> str:
        return self._name.text().strip()

    def set_name(self, name: str) -> None:
        self._name.setText(name)

    # --- what is said

    def show_scan(self, current: int, total: int) -> None:
        """How far the reading of headers is."""
        self.scan_bar.setVisible(current < total)
        self.scan_bar.setRange(0, total)
        self.scan_bar.setValue(current)

    def summarise(self, store: FrameStore, *, scanning: bool) -> None:
        """One or two lines about the subs."""
        if not self.inputs:
            return
        if not scanning:
            self.scan_bar.hide()
        used = [row for row in store.rows if row.coming]
        if not store.rows:
            self.drop.hint.setText(tr("scan_starting") if scanning else tr("problem_no_subs"))
            return
        seconds = sum(row.exposure for row in used if row.exposure == row.exposure)
        parts = [tr("summary_subs", used=len(used), all=len(store.rows)), tr("summary_time", minutes=seconds / 60)]
        nights = len({row.night for row in used} - {""})
        if nights:
            parts.append(tr("summary_nights", n=nights))
        cameras = Counter(row.instrument for row in used if row.instrument).most_common(2)
        parts += [name for name, _ in cameras]
        unsolved = sum(not row.wcs for row in store.rows)
        if unsolved:
            parts.append(tr("summary_unsolved", n=unsolved))
        if store.edited:
            parts.append(tr("summary_lots", n=len(store.lots)))
        self.drop.hint.setText("  ·  ".join(parts))

    def say(self, text: str, kind: str = "dim") -> None:
        """A message above the start button."""
        restyle(self.message, kind)
        self.message.setText(text)
        self.message.setVisible(bool(text))

    def show_forecast(self, text: str) -> None:
        """What a run will need."""
        self.forecast.setText(text)
        self.forecast.setVisible(bool(text))

    def _ask_estimate(self) -> None:
        self.show_forecast(tr("estimating"))
        self.estimate.emit()

    def show_start(self, *, running: bool, problems: Sequence[str], resumable: bool) -> None:
        """The start button, and why it cannot be pressed."""
        ready = not running and not problems
        self.start_button.setEnabled(ready)
        self.estimate_button.setEnabled(ready)
        self.start_button.setText(tr("running") if running else tr("resume") if resumable else tr("start"))
        self.start_button.setToolTip("\n".join(problems))
        if problems and self.inputs:
            self.say("\n".join(problems), "bad")
        elif self.message.objectName() == "bad":
            self.say("")
