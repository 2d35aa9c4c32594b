"""The words of the report page in English and French, and how it writes numbers."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from zemosaic.events import LANGUAGES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NO_BREAK = "\u00a0"


def resource(folder: str, name: str) -> str:
    """Text of a file that comes with the package."""
    return resources.files("zemosaic.report").joinpath(folder).joinpath(name).read_text(encoding="utf-8")


def texts(language: str) -> Mapping[str, str]:
    """The texts of the page, key to text; in English if the language is unknown."""
    code = language if language in LANGUAGES else "en"
    return tomllib.loads(resource("locale", f"{code}.toml"))


@dataclass(frozen=True)
class Words:
    """The page's language: texts, and how numbers are written."""

    catalogue: Mapping[str, str]

    def __call__(self, key: str, **values: Any) -> str:
        return self.catalogue[key].format_map(values) if values else self.catalogue[key]

    def number(self, value: float, digits: int = 3) -> str:
        """Three significant digits, never an exponent for what people read."""
        if not math.isfinite(value):
            return "–"
        places = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
        text = f"{value:.{min(places, 4)}f}"
        if float(text) == 0:
            text = "0"
        return text.replace("-", "−").replace(".", self.catalogue["decimal"])

    def short(self, value: float) -> str:
        """A round number, without zeros at its end."""
        return f"{value:g}".replace(".", self.catalogue["decimal"])

    def figure(self, svg: str) -> str:
        """A plot with its numbers written as the page writes them."""
        return re.sub(r">([−\d]\d*)\.(\d+)<", rf">\1{self.catalogue['decimal']}\2<", svg)

    def signed(self, value: float, error: float | None = None) -> str:
        """With its sign, and its error if it has one."""
        if not math.isfinite(value):
            return "–"
        text = ("+" if value > 0 else "") + self.number(value, 2)
        return text if error is None or not math.isfinite(error) else f"{text} ± {self.number(error, 2)}"


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (s, "s")]
    return " ".join(f"{n}{NO_BREAK}{unit}" for n, unit in parts if n) or f"0{NO_BREAK}s"
