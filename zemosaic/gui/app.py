"""Start of the window: one `QApplication`, language and theme as the user left them."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from PySide6.QtCore import QLocale, QSettings, QStandardPaths, QTimer
from PySide6.QtWidgets import QApplication

from zemosaic.gui.i18n import words
from zemosaic.gui.main_window import MainWindow
from zemosaic.gui.theme import apply_theme


class Desk:
    """The application: makes the main window, and makes it anew in another language.

    Parameters
    ----------
    app : QApplication
    memory : QSettings, optional
        The user's own if not given.
    folder : Path, optional
        Where presets and further languages live; the platform's place if not given.
    """

    def __init__(self, app: QApplication, memory: QSettings | None = None, folder: Path | None = None) -> None:
        self._app = app
        self.memory = memory or QSettings("ZeMosaic", "ZeMosaic")
        place = QStandardPaths.writableLocation(QStandardPaths.StandardLocation.GenericConfigLocation)
        self.folder = folder or Path(place) / "zemosaic"
        self.use_language(str(self.memory.value("language", QLocale.system().name()[:2])))
        self.use_theme(str(self.memory.value("theme", "system")))
        app.styleHints().colorSchemeChanged.connect(lambda _: self.use_theme(str(self.memory.value("theme", "system"))))
        self.window = self._open()

    def use_language(self, language: str) -> None:
        """Speak a language from here on."""
        words.use(language, self.folder / "locale")
        QLocale.setDefault(QLocale(words.language))

    def use_theme(self, theme: str) -> None:
        apply_theme(self._app, theme)

    def _open(self) -> MainWindow:
        window = MainWindow(self.memory, self.folder)
        window.theme_chosen.connect(self.use_theme)
        window.language_chosen.connect(self._change_language)
        window.show()
        return window

    def _change_language(self, language: str) -> None:
        # Later: the menu that asked for it belongs to the window that goes.
        QTimer.singleShot(0, lambda: self.reopen(language))

    def reopen(self, language: str) -> None:
        """The same window in another language: same subs, settings and place."""
        old = self.window
        self.memory.setValue("language", language)
        settings = old.panel.values()
        inputs, output, name = old.form.inputs, old.form.output_text(), old.form.name()
        choices = old.choices()
        old.close()
        self.use_language(language)
        self.window = self._open()
        self.window.panel.set_values(settings)
        self.window.form.set_name(name)
        if output:
            self.window.form.set_output(Path(output))
        if inputs:
            self.window.set_inputs(inputs)
            self.window.keep_choices(choices)
        for gone in (old.filter, old):
            if gone is not None:
                gone.deleteLater()


def main() -> int:
    """Open the window; returns when it is closed."""
    # opencv-python, should anything import it here, points Qt at plugins and fonts of its own.
    for name in ("QT_QPA_PLATFORM_PLUGIN_PATH", "QT_QPA_FONTDIR"):
        if "cv2" in os.environ.get(name, ""):
            del os.environ[name]
    app = QApplication(sys.argv[:1])
    app.setApplicationName("ZeMosaic")
    app.setDesktopFileName("zemosaic")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the terminal it was started from
    desk = Desk(app)
    status = app.exec()
    desk.memory.sync()
    return status
