"""Settings under a name of the user's: one TOML file each, which ``run --config`` takes as well. No Qt here."""

from __future__ import annotations

import re
from pathlib import Path

from zemosaic.settings import Settings, dump_settings, load_settings

_FORBIDDEN = re.compile(r'[\\/:*?"<>|\x00-\x1f]')


class Presets:
    """The presets in a folder.

    Parameters
    ----------
    folder : Path
        Made when the first one is saved.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(path.stem for path in self._folder.glob("*.toml"))

    def save(self, name: str, settings: Settings) -> str:
        """Save settings; returns the name as a file can bear it."""
        name = _FORBIDDEN.sub(" ", name).strip(" .") or "preset"
        self._folder.mkdir(parents=True, exist_ok=True)
        dump_settings(settings, self._folder / f"{name}.toml")
        return name

    def load(self, name: str) -> tuple[Settings, list[str]]:
        """The settings and warnings about them; `SettingsError` if the file is no good."""
        return load_settings(self._folder / f"{name}.toml")

    def delete(self, name: str) -> None:
        """Remove one, if it is there."""
        (self._folder / f"{name}.toml").unlink(missing_ok=True)
