"""Light and dark: one palette each, and the style sheet that both share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import Template

from PySide6.QtCore import QObject, Qt
from PySide6.QtGui import QColor, QGuiApplication, QPalette
from PySide6.QtWidgets import QApplication, QWidget
from shiboken6 import isValid

from zemosaic.gui.slices import Slices

THEMES = ("system", "light", "dark")


@dataclass(frozen=True)
class Colours:
    """What is painted in which colour, as ``#rrggbb``."""

    window: str
    panel: str
    field: str
    border: str
    text: str
    dim: str
    accent: str
    on_accent: str
    good: str
    warn: str
    bad: str
    sky: str  # behind pictures and footprints


LIGHT = Colours(
    window="#eef1f6",
    panel="#ffffff",
    field="#f6f8fb",
    border="#cfd7e3",
    text="#1a2230",
    dim="#5a6780",
    accent="#1d63d8",
    on_accent="#ffffff",
    good="#147a4b",
    warn="#9a5b00",
    bad="#bb2244",
    sky="#e3e8f0",
)
DARK = Colours(
    window="#10131a",
    panel="#181d27",
    field="#212836",
    border="#313b4e",
    text="#e7ebf3",
    dim="#93a0b8",
    accent="#6aaeff",
    on_accent="#08131f",
    good="#52c993",
    warn="#f2b84b",
    bad="#ff7b93",
    sky="#090b10",
)

# Neighbours differ in hue and lightness; each is visible on both skies.
GROUP_COLOURS = (
    "#4c8dff",
    "#f08c3a",
    "#35b779",
    "#d65db1",
    "#c9a227",
    "#2bb5c4",
    "#e05656",
    "#8f7af5",
    "#7aa637",
    "#b07050",
    "#5f8fa8",
    "#d98aa9",
)
# From good to bad; lightness falls with it, so that it reads without colour vision too.
QUALITY_COLOURS = ("#35b779", "#8ec540", "#d9c12e", "#ee8f34", "#d8434e")
UNKNOWN_COLOUR = "#8a94a6"

# Roles of the palette that have each colour, as a style sheet writes them; it uses the first one.
_ROLES: dict[str, tuple[str, ...]] = {
    "window": ("window",),
    "panel": ("alternate-base", "tooltip-base"),
    "field": ("base", "button"),
    "border": ("mid", "midlight", "dark"),
    "text": ("window-text", "text", "button-text", "tooltip-text"),
    "dim": ("placeholder-text",),
    "accent": ("highlight", "link"),
    "on_accent": ("highlighted-text",),
    "good": ("link-visited",),
    "warn": ("shadow",),
    "bad": ("bright-text",),
}

_STYLE = Template("""
QMainWindow, QDialog, #page { background: $window; }
QFrame#card { background: $panel; border: 1px solid $border; border-radius: 10px; }
QLabel#title { font-size: 11pt; font-weight: 600; }
QLabel#headline { font-size: 13pt; font-weight: 600; }
QLabel#headline[kind="good"] { color: $good; }
QLabel#headline[kind="warn"] { color: $warn; }
QLabel#headline[kind="bad"] { color: $bad; }
QLabel#dim { color: $dim; }
QLabel#warn { color: $warn; }
QLabel#bad { color: $bad; }
QLabel#good { color: $good; }
QLineEdit, QPlainTextEdit, QAbstractItemView { background: $field; border: 1px solid $border; border-radius: 6px;
  padding: 4px 6px; selection-background-color: $accent; selection-color: $on_accent; }
QAbstractItemView { padding: 0; }
QLineEdit:focus, QAbstractItemView:focus, QPlainTextEdit:focus { border: 1px solid $accent; }
QLineEdit:disabled { color: $dim; }
QSpinBox, QDoubleSpinBox, QComboBox { min-height: 25px; }
QPushButton, QToolButton { background: $field; border: 1px solid $border; border-radius: 6px; padding: 5px 12px; }
QPushButton:hover, QToolButton:hover { border-color: $accent; }
QPushButton:focus, QToolButton:focus { border-color: $accent; }
QPushButton:pressed, QToolButton:pressed { background: $border; }
QPushButton:disabled, QToolButton:disabled { color: $dim; background: transparent; }
QToolButton:checked { background: $accent; color: $on_accent; border-color: $accent; }
QPushButton#primary { background: $accent; color: $on_accent; border-color: $accent; font-weight: 600;
  padding: 8px 18px; }
QPushButton#primary:disabled { background: $border; color: $dim; border-color: $border; }
QPushButton#link { background: transparent; border: 1px solid transparent; color: $accent; padding: 2px 4px; }
QPushButton#link:disabled { color: $dim; }
QPushButton#link:focus { border-color: $accent; }
QTabWidget::pane { border: 0; }
QTabBar { qproperty-drawBase: 0; }
QTabBar::tab { padding: 7px 16px; color: $dim; border: 0; border-bottom: 2px solid transparent; }
QTabBar::tab:selected { color: $text; border-bottom: 2px solid $accent; }
QTabBar::tab:focus { color: $accent; }
QProgressBar { background: $field; border: 1px solid $border; border-radius: 5px; height: 10px; text-align: center; }
QProgressBar::chunk { background: $accent; border-radius: 4px; }
QHeaderView::section { background: $panel; color: $dim; border: 0; border-bottom: 1px solid $border;
  padding: 5px 14px 5px 6px; }
QTableView { gridline-color: transparent; alternate-background-color: $panel; }
QScrollArea, QScrollArea > QWidget > QWidget { background: transparent; border: 0; }
QScrollBar:vertical { background: transparent; width: 10px; }
QScrollBar:horizontal { background: transparent; height: 10px; }
QScrollBar::handle { background: $border; border-radius: 4px; margin: 1px; }
QScrollBar::handle:vertical { min-height: 30px; } QScrollBar::handle:horizontal { min-width: 30px; }
QScrollBar::handle:hover { background: $dim; }
QScrollBar::add-line, QScrollBar::sub-line { width: 0; height: 0; }
QScrollBar::add-page, QScrollBar::sub-page { background: transparent; }
QAbstractScrollArea::corner { background: transparent; border: 0; }
QSplitter::handle { background: transparent; }
QMenuBar { background: $window; } QMenuBar::item:selected { background: $field; border-radius: 4px; }
QMenu { background: $panel; border: 1px solid $border; padding: 4px; }
QMenu::item { padding: 5px 24px; } QMenu::item:selected { background: $accent; color: $on_accent; }
QToolTip { background: $panel; color: $text; border: 1px solid $border; padding: 4px; }
QStatusBar { color: $dim; }
""")


def colours() -> Colours:
    """The colours in force."""
    return DARK if QGuiApplication.palette().color(QPalette.ColorRole.Window).lightness() < 128 else LIGHT


def group_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for every name, the same for the same list of names."""
    return {name: GROUP_COLOURS[i % len(GROUP_COLOURS)] for i, name in enumerate(names)}


class Skin(QObject):
    """What the application wears.

    The style sheet takes its colours from the palette, so that it is set only once: another sheet for a thousand
    widgets costs Qt half a second. For another palette every widget is polished again, some at a time, and nothing is
    painted until all are done.

    Parameters
    ----------
    app : QApplication
    """

    def __init__(self, app: QApplication) -> None:
        super().__init__(app)
        self._app = app
        self._held: list[QWidget] = []
        self._changing = Slices(self)
        if not app.styleSheet():
            app.setStyle("Fusion")
            font = app.font()
            font.setPointSize(10)
            app.setFont(font)
            app.setStyleSheet(_STYLE.substitute({name: f"palette({roles[0]})" for name, roles in _ROLES.items()}))

    @property
    def changing(self) -> bool:
        return self._changing.busy

    def wear(self, theme: str) -> None:
        """Paint everything in ``light``, ``dark`` or as the desktop does (``system``)."""
        dark = theme == "dark" or (theme == "system" and self._desktop_is_dark())
        self._changing.start(self._change(_palette(DARK if dark else LIGHT)))

    def _change(self, palette: QPalette) -> Iterator[None]:
        self._hold([widget for widget in self._app.topLevelWidgets() if widget.isVisible()])
        self._app.setPalette(palette)
        yield
        for widget in self._app.allWidgets():
            if isValid(widget):  # it may have gone meanwhile
                widget.style().polish(widget)
            yield
        self._hold([])

    def _hold(self, widgets: list[QWidget]) -> None:
        """Paint nothing of these windows, and the others again."""
        for widget in self._held:
            if isValid(widget):
                widget.setUpdatesEnabled(True)
        self._held = widgets
        for widget in widgets:
            widget.setUpdatesEnabled(False)

    def _desktop_is_dark(self) -> bool:
        return self._app.styleHints().colorScheme() == Qt.ColorScheme.Dark


def _palette(chosen: Colours) -> QPalette:
    palette = QPalette()
    for name, roles in _ROLES.items():
        for role in roles:
            palette.setColor(_role(role), QColor(getattr(chosen, name)))
    for role in _ROLES["text"]:
        palette.setColor(QPalette.ColorGroup.Disabled, _role(role), QColor(chosen.dim))
    return palette


def _role(name: str) -> QPalette.ColorRole:
    """The role that a style sheet calls so: ``alternate-base`` is ``AlternateBase``."""
    return QPalette.ColorRole[name.title().replace("-", "").replace("Tooltip", "ToolTip")]
