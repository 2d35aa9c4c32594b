"""Start of the window: one `QApplication`, language and theme as the user left them."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from PySide6.QtCore import QLocale, QSettings, QStandardPaths
from PySide6.QtWidgets import QApplication

from zemosaic.gui.i18n import words
from zemosaic.gui.main_window import MainWindow
from zemosaic.gui.settings_panel import SettingsPanel
from zemosaic.gui.slices import Slices
from zemosaic.gui.theme import Skin

_END_WAIT_MS = 2000


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
        self.skin = Skin(app)
        self.use_theme(str(self.memory.value("theme", "system")))
        app.styleHints().colorSchemeChanged.connect(lambda _: self.use_theme(str(self.memory.value("theme", "system"))))
        self._changing = Slices(app)
        self.window = self._open()
        self.window.show()
        # What there is now stays to the end: a garbage collection that walks over it holds up the window for 40 ms.
        gc.freeze()

    def use_language(self, language: str) -> None:
        """Speak a language from here on."""
        words.use(language, self.folder / "locale")
        QLocale.setDefault(QLocale(words.language))

    def use_theme(self, theme: str) -> None:
        """Look like this from here on."""
        self.skin.wear(theme)

    def _open(self, panel: SettingsPanel | None = None) -> MainWindow:
        window = MainWindow(self.memory, self.folder, panel)
        window.theme_chosen.connect(self.use_theme)
        window.language_chosen.connect(self.change_language)
        return window

    def change_language(self, language: str) -> None:
        """Begin to speak another language; `changing` until it is done."""
        self._changing.start(self._reopen(language))

    @property
    def changing(self) -> bool:
        return self._changing.busy

    def reopen(self, language: str) -> None:
        """The same window in another language: same subs, settings and place."""
        self.change_language(language)
        self._changing.finish()

    def _reopen(self, language: str) -> Iterator[None]:
        old = self.window
        self.memory.setValue("language", language)
        settings = old.panel.values()
        inputs, output, name = old.form.inputs, old.form.output_text(), old.form.name()
        choices = old.choices()
        old.close()
        yield
        self.use_language(language)
        yield
        panel = SettingsPanel()  # apart, because it takes a good part of the time
        yield
        self.window = self._open(panel)
        yield
        self.window.show()
        yield
        self.window.panel.set_values(settings)
        yield
        self.window.form.set_name(name)
        if output:
            self.window.form.set_output(Path(output))
        if inputs:
            self.window.set_inputs(inputs)
            self.window.keep_choices(choices)
        yield
        for gone in (old.filter, old):
            if gone is not None:
                gone.deleteLater()
            yield


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
    desk.window.scanner.wait(_END_WAIT_MS)
    desk.memory.sync()
    return status
