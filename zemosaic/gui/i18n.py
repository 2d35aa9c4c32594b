"""The words of the window, in the user's language.

A language is a file ``locale/<code>.toml``, here or in a folder that the user fills: its own name (``language_name``),
``key = "text with {placeholders}"``, and the tables ``label`` and ``help`` (of the settings) and ``choice`` (of their
values). What a language lacks comes from English.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Traversable  # importlib.resources.abc from Python 3.11 on

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FALLBACK = "en"
NAME_KEY = "language_name"


class Words:
    """The catalogues that there are, and the language that is spoken now."""

    def __init__(self) -> None:
        self.language = FALLBACK
        self._texts: dict[str, dict[str, str]] = {}
        self._folder: Path | None = None

    def use(self, language: str, folder: Path | None = None) -> None:
        """Speak `language` if there is a catalogue of it, else English; `folder` may hold further ones."""
        self._folder = folder
        self._texts.clear()
        self.language = language if language in self.available() else FALLBACK

    def available(self) -> dict[str, str]:
        """Code of every language and its own name for itself."""
        return {code: self.catalogue(code)[NAME_KEY] for code in dict.fromkeys(code for code, _ in self._files())}

    def catalogue(self, code: str) -> Mapping[str, str]:
        """All texts of a language, keys of the tables written ``table.key``; empty if there is no such language."""
        if code not in self._texts:
            texts: dict[str, str] = {NAME_KEY: code}
            for found, file in self._files():
                if found == code:
                    texts |= _flat(tomllib.loads(file.read_text(encoding="utf-8")))
            self._texts[code] = texts
        return self._texts[code]

    def has(self, key: str) -> bool:
        """Whether the language, or else English, has the text."""
        return any(key in self.catalogue(code) for code in (self.language, FALLBACK))

    def say(self, key: str, **values: Any) -> str:
        """A text in the language spoken now.

        A gap is no reason to stop a program: English and then the bare key stand in, unless the environment has
        ``ZEMOSAIC_STRICT_MESSAGES`` (as in the tests).
        """
        for code in (self.language, FALLBACK):
            if key in self.catalogue(code):
                return self.catalogue(code)[key].format_map(values)
        if os.environ.get("ZEMOSAIC_STRICT_MESSAGES"):
            raise LookupError(f"no text {key!r} in {self.language}")
        return key

    def number(self, value: float, decimals: int) -> str:
        """A number with the decimal mark of the language."""
        return f"{value:.{decimals}f}".replace(".", self.say("decimal_mark"))

    def size(self, size: float) -> str:
        """Bytes, in MB (2^20) or GB (2^30)."""
        if size < 0.1 * 2**30:
            return self.say("size_mb", n=self.number(size / 2**20, 0))
        return self.say("size_gb", n=self.number(size / 2**30, 1))

    def _files(self) -> Iterator[tuple[str, Traversable | Path]]:
        folders: list[Traversable | Path] = [resources.files("zemosaic.gui").joinpath("locale")]
        if self._folder is not None and self._folder.is_dir():
            folders.append(self._folder)
        for folder in folders:
            for file in sorted(folder.iterdir(), key=lambda file: file.name):
                if file.name.endswith(".toml"):
                    yield file.name.removesuffix(".toml"), file


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    texts: dict[str, str] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            texts |= _flat(value, f"{prefix}{key}.")
        else:
            texts[prefix + key] = str(value)
    return texts


words = Words()
tr = words.say
