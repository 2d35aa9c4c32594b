"""The reasons of the ledger in the language of the user.

A reason is an English sentence wherever it is made, and in every product: that is what other programs and other people
read. Pages and messages translate it by the sentence it was made from (``locale/reasons.<language>.toml``).
"""

from __future__ import annotations

import functools
import re
from importlib import resources

from zemosaic.events import tomllib

_GAP = "{}"


def translated(reason: str, language: str) -> str:
    """A reason in a language; as it is where there is no translation of it.

    What stands in the gaps of a sentence may be a reason of its own, and is translated as well.
    """
    for pattern, text in sentences(language):
        if found := pattern.fullmatch(reason):
            return text.format(*(translated(part, language) for part in found.groups()))
    first, separator, rest = reason.partition("; ")
    if separator and (there := translated(first, language)) != first:
        return there + " ; " + translated(rest, language)
    return reason


@functools.cache
def sentences(language: str) -> tuple[tuple[re.Pattern[str], str], ...]:
    """Patterns of the English sentences with their translations; what has the most words of its own comes first."""
    source = resources.files("zemosaic").joinpath("locale").joinpath(f"reasons.{language}.toml")
    if not source.is_file():
        return ()
    table = tomllib.loads(source.read_text(encoding="utf-8"))
    order = sorted(table, key=lambda english: -len(english.replace(_GAP, "")))
    return tuple(
        (re.compile("(.+)".join(map(re.escape, english.split(_GAP))), re.DOTALL), table[english]) for english in order
    )
