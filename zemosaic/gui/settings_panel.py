"""All settings, from the model itself: searchable, the changed ones marked, each with its help and a way back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from PySide6.QtCore import QLocale, Qt, Signal
from PySide6.QtWidgets import (
    QComboBox,
    QDoubleSpinBox,
    QGridLayout,
    QHBoxLayout,
    QLineEdit,
    QScrollArea,
    QSizePolicy,
    QSpinBox,
    QVBoxLayout,
    QWidget,
)

from zemosaic.gui.i18n import tr, words
from zemosaic.gui.slices import Slices
from zemosaic.gui.widgets import Card, PathRow, Switch, button, keep_wheel_away, label, restyle
from zemosaic.settings import SettingInfo, Settings, SettingsError, describe_settings, settings_from

# In the window's own places, not in this list.
ELSEWHERE = frozenset({"language", "output_name"})

# Group of a setting: the one that has a beginning of its name.
GROUPS: dict[str, tuple[str, ...]] = {
    "sds": ("sds_", "global_coadd"),
    "subs": ("master_dark", "master_flat", "hot_pixel", "blur_", "cloud_", "use_existing"),
    "solver": ("solve", "astap", "astrometry", "force_resolve"),
    "canvas": ("global_wcs",),
    "stacking": ("stacking_", "match_background"),
    "classic": ("route", "cluster_", "max_raw", "apply_master", "master_tile", "intertile", "final_assembly"),
    "polish": ("two_pass", "quality_", "crop_", "altaz_"),
    "picture": ("preview_", "report"),
    "machine": ("num_processing", "memory_", "coadd_memmap", "resume", "scheduler"),
}

_FIRST_GUESS = 2.0  # of a number that was automatic so far


def group_of(name: str) -> str:
    """The group of a setting; `LookupError` if no group takes it."""
    for group, starts in GROUPS.items():
        if name.startswith(starts):
            return group
    raise LookupError(f"setting {name!r} is in no group: add the beginning of its name to GROUPS")


def setting_label(name: str) -> str:
    """What a setting is called; one that no catalogue names yet is called by its own name."""
    return tr(f"label.{name}") if words.has(f"label.{name}") else name.replace("_", " ").capitalize()


def setting_help(name: str) -> str:
    """What a setting does, in the user's language if its catalogue says so."""
    if words.has(f"help.{name}"):
        return tr(f"help.{name}")
    return Settings.model_fields[name].description or ""


def setting_unit(name: str) -> str:
    """Its unit, as the settings have it."""
    return next(info.unit for info in describe_settings() if info.name == name)


def unit_text(unit: str) -> str:
    """A unit in the user's language."""
    return (tr(f"unit.{unit}") if unit and words.has(f"unit.{unit}") else unit).strip()


def choice_text(value: str) -> str:
    """A value of a setting, in plain words."""
    return tr(f"choice.{value}") if words.has(f"choice.{value}") else value


class Editor(QWidget):
    """The field of one setting. Signals: ``edited()``. Subclasses read and write a value of the setting's type."""

    edited = Signal()

    def value(self) -> Any:
        raise NotImplementedError

    def set_value(self, value: Any) -> None:
        raise NotImplementedError

    def _hold(self, *widgets: QWidget) -> None:
        row = QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        for widget in widgets:
            row.addWidget(widget)


class _Flag(Editor):
    def __init__(self) -> None:
        super().__init__()
        self.box = Switch()
        self.box.toggled.connect(self.edited)
        self._hold(self.box)
        self.setFixedWidth(48)

    def value(self) -> bool:
        return self.box.isChecked()

    def set_value(self, value: Any) -> None:
        self.box.setChecked(value)


class _Choice(Editor):
    def __init__(self, values: tuple[str, ...]) -> None:
        super().__init__()
        self.box = QComboBox()
        for value in values:
            self.box.addItem(choice_text(value), value)
        self.box.currentIndexChanged.connect(self.edited)
        self._hold(self.box)

    def value(self) -> str:
        return str(self.box.currentData())

    def set_value(self, value: Any) -> None:
        self.box.setCurrentIndex(self.box.findData(value))


class _Whole(Editor):
    def __init__(self, low: float, high: float, unit: str) -> None:
        super().__init__()
        self.box = QSpinBox()
        self.box.setRange(int(max(low, -(2**31))), int(min(high, 2**31 - 1)))
        self.box.setSuffix(f" {unit}" if unit else "")
        self.box.valueChanged.connect(self.edited)
        self._hold(self.box)

    def value(self) -> int:
        return self.box.value()

    def set_value(self, value: Any) -> None:
        self.box.setValue(value)


class NumberBox(QDoubleSpinBox):
    """A number with as many decimals as it needs: a value that is read must not be rounded by being shown."""

    def textFromValue(self, value: float) -> str:
        locale = self.locale()
        locale.setNumberOptions(QLocale.NumberOption.OmitGroupSeparator)
        return locale.toString(value, "f", 6).rstrip("0").rstrip(locale.decimalPoint())


def _number_box(low: float, high: float, unit: str = "") -> QDoubleSpinBox:
    box = NumberBox()
    box.setDecimals(6)
    box.setStepType(QDoubleSpinBox.StepType.AdaptiveDecimalStepType)
    box.setRange(max(low, -1e9), min(high, 1e9))
    box.setSuffix(f" {unit}" if unit else "")
    return box


class _Number(Editor):
    """A number; `optional` adds a check box for none."""

    def __init__(self, low: float, high: float, unit: str, *, optional: bool = False) -> None:
        super().__init__()
        self.box = _number_box(low, high, unit)
        self.given = Switch()
        self.given.setVisible(optional)
        self.given.setToolTip(tr("setting_optional"))
        self.given.setChecked(True)
        self._low = self.box.minimum()
        if optional:
            self.box.setSpecialValueText(tr("automatic"))
        self.given.toggled.connect(self._give)
        self.given.toggled.connect(self.edited)
        self.box.valueChanged.connect(self.edited)
        self.box.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self._hold(self.given, self.box)

    def _give(self, on: bool) -> None:
        self.box.setEnabled(on)
        self.box.setValue(max(self._low, _FIRST_GUESS) if on else self._low)

    def value(self) -> float | None:
        return self.box.value() if self.given.isChecked() else None

    def set_value(self, value: Any) -> None:
        self.given.setChecked(value is not None)
        self.box.setEnabled(value is not None)
        self.box.setValue(self._low if value is None else value)


class _Pair(Editor):
    def __init__(self) -> None:
        super().__init__()
        self.boxes = _number_box(0.001, 1.0), _number_box(1.0, 1000.0)
        for box in self.boxes:
            box.valueChanged.connect(self.edited)
        self._hold(*self.boxes)

    def value(self) -> tuple[float, float]:
        return self.boxes[0].value(), self.boxes[1].value()

    def set_value(self, value: Any) -> None:
        for box, each in zip(self.boxes, value, strict=True):
            box.setValue(each)


class _Text(Editor):
    def __init__(self) -> None:
        super().__init__()
        self.line = QLineEdit()
        self.line.textChanged.connect(self.edited)
        self._hold(self.line)

    def value(self) -> str:
        return self.line.text().strip()

    def set_value(self, value: Any) -> None:
        self.line.setText(value)


class _File(Editor):
    def __init__(self, what: str, *, folder: bool) -> None:
        super().__init__()
        self.path = PathRow(what, folder=folder)
        self.path.changed.connect(lambda _: self.edited.emit())
        self._hold(self.path)

    def value(self) -> str:
        return self.path.text()

    def set_value(self, value: Any) -> None:
        self.path.set_text(value)


def make_editor(name: str, unit: str = "") -> Editor:
    """The field that fits the type and the bounds of a setting."""
    field = Settings.model_fields[name]
    kind, args = field.annotation, get_args(field.annotation)
    if kind is bool:
        return _Flag()
    if get_origin(kind) is Literal:
        return _Choice(args)
    if kind is str:
        folder = name.endswith(("_dir", "_directory_path", "_folder"))
        return _File(setting_label(name), folder=folder) if folder or name.endswith("_path") else _Text()
    if get_origin(kind) is tuple:
        return _Pair()
    low, high = _bounds(field.metadata, 1.0 if kind is int else 0.001)
    if kind is int:
        return _Whole(low, high, unit)
    return _Number(low, high, unit, optional=type(None) in args)


def _bounds(metadata: list[Any], step: float) -> tuple[float, float]:
    low, high = -math.inf, math.inf
    for mark in metadata:
        low = getattr(mark, "ge", low)
        high = getattr(mark, "le", high)
        if hasattr(mark, "gt"):
            low = mark.gt + step
        if hasattr(mark, "lt"):
            high = mark.lt - step
    return low, high


class _Row:
    """Label, field, help and way back of one setting."""

    def __init__(self, info: SettingInfo, layout: QGridLayout, changed: Callable[[str], None]) -> None:
        self.info = info
        self._shown = True
        self.title = label(setting_label(info.name))
        self.editor = make_editor(info.name, unit_text(info.unit))
        self.editor.setAccessibleName(self.title.text())
        self.editor.setToolTip(f"{info.name}\n{info.allowed}")
        self.help = label(setting_help(info.name), "dim", wrap=True)
        self.back = button("↺", "link", tip=tr("setting_reset"))
        self.back.setAccessibleName(tr("setting_reset"))
        self.back.setFixedWidth(28)
        self.back.clicked.connect(lambda: self.editor.set_value(info.default))
        self.editor.set_value(info.default)
        self.editor.edited.connect(lambda: changed(info.name))
        if not isinstance(self.editor, _Flag):
            self.editor.setMinimumWidth(230)
        self.words = f"{info.name} {self.title.text()} {self.help.text()}".lower()
        at = layout.rowCount()
        layout.addWidget(self.title, at, 0)
        layout.addWidget(self.editor, at, 1, Qt.AlignmentFlag.AlignRight)
        layout.addWidget(self.back, at, 2)
        layout.addWidget(self.help, at + 1, 0, 1, 3)
        keep_wheel_away(
            [w for kind in (QSpinBox, QDoubleSpinBox, QComboBox) for w in _all(self.editor, kind)], self.editor
        )

    @property
    def changed(self) -> bool:
        return bool(self.editor.value() != self.info.default)

    def mark(self) -> None:
        """Show whether it differs from its default."""
        self.back.setVisible(self.changed)
        self.title.setText(("● " if self.changed else "") + setting_label(self.info.name))
        restyle(self.title, "warn" if self.changed else "")

    def show(self, on: bool) -> None:
        if on == self._shown:
            return
        self._shown = on
        for widget in (self.title, self.editor, self.help):
            widget.setVisible(on)
        self.back.setVisible(on and self.changed)


def _all(widget: QWidget, kind: type[QWidget]) -> list[QWidget]:
    return list(widget.findChildren(kind))


class SettingsPanel(QWidget):
    """Every setting of a run. Signals: ``changed(str)`` the name of one that changed, by whomever.

    The fields are made group by group while the program idles: all at once would stop the window for too long.
    """

    changed = Signal(str)

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, _Row] = {}
        self._cards: dict[str, Card] = {}
        self._held: dict[str, Any] = {}  # values of settings whose field is not made yet
        self._infos = [info for info in describe_settings() if info.name not in ELSEWHERE]
        self.search = QLineEdit()
        self.search.setPlaceholderText(tr("settings_search"))
        self.search.setAccessibleName(tr("settings_search"))
        self.search.setClearButtonEnabled(True)
        self.search.textChanged.connect(self._filter_later)
        self.only_changed = Switch(tr("settings_only_changed"))
        self.only_changed.toggled.connect(self._filter_later)
        self.reset = button(tr("settings_reset_all"), "link")
        self.reset.clicked.connect(lambda: self.set_values(Settings().model_dump()))
        head = QHBoxLayout()
        head.addWidget(self.search, 1)
        head.addWidget(self.only_changed)
        head.addWidget(self.reset)
        inside = QWidget()
        self._list = QVBoxLayout(inside)
        self._list.setContentsMargins(0, 0, 8, 0)
        self._list.addStretch(1)
        area = QScrollArea()
        area.setWidgetResizable(True)
        area.setWidget(inside)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 6, 0, 0)
        layout.addLayout(head)
        layout.addWidget(area, 1)
        self._building, self._filtering = Slices(self), Slices(self)
        self._building.start(self._build())

    def build_all(self) -> None:
        """Make whatever is still missing now."""
        self._building.finish()

    def _build(self) -> Iterator[str]:
        for group in GROUPS:
            infos = [info for info in self._infos if group_of(info.name) == group]
            if not infos:
                continue
            card = Card(tr(f"group_{group}"))
            grid = QGridLayout()
            grid.setColumnStretch(0, 1)
            grid.setHorizontalSpacing(12)
            card.body.addLayout(grid)
            self._cards[group] = card
            self._list.insertWidget(self._list.count() - 1, card)
            for info in infos:
                row = _Row(info, grid, self._edited)
                self.rows[info.name] = row
                if info.name in self._held:
                    row.editor.set_value(self._held.pop(info.name))
                row.mark()
                yield info.name
        self._filter_later()

    def _edited(self, name: str) -> None:
        self.rows[name].mark()
        self.changed.emit(name)

    def value(self, name: str) -> Any:
        """What a setting is now."""
        if name in self.rows:
            return self.rows[name].editor.value()
        return self._held.get(name, Settings.model_fields[name].default)

    def set_value(self, name: str, value: Any) -> None:
        """Change one setting."""
        if name in self.rows:
            self.rows[name].editor.set_value(value)
        elif self.value(name) != value:
            self._held[name] = value
            self.changed.emit(name)

    def values(self) -> dict[str, Any]:
        """All of them."""
        return {info.name: self.value(info.name) for info in self._infos}

    def set_values(self, values: Mapping[str, Any]) -> None:
        """Change many; those that have no field here are ignored."""
        for info in self._infos:
            if info.name in values:
                self.set_value(info.name, values[info.name])

    def problems(self) -> list[str]:
        """What the engine would refuse, one sentence each."""
        try:
            settings_from(self.values())
        except SettingsError as error:
            return str(error).splitlines()
        return []

    def filter(self) -> None:
        """Show the settings that have all words of the search, and are changed if only those are wanted."""
        self._filter_later()
        self._filtering.finish()

    @property
    def filtering(self) -> bool:
        return self._filtering.busy

    def _filter_later(self) -> None:
        self._filtering.start(self._filter())

    def _filter(self) -> Iterator[None]:
        wanted = self.search.text().lower().split()
        only = self.only_changed.isChecked()
        some = dict.fromkeys(self._cards, False)
        for name, row in self.rows.items():
            fits = all(word in row.words for word in wanted) and (row.changed or not only)
            row.show(fits)
            some[group_of(name)] |= fits
            yield
        for group, card in self._cards.items():
            card.setVisible(some[group])
