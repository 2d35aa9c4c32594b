"""Reasons in French: every sentence that is translated is one that the program says, and it comes out whole."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest

from zemosaic.events import render, tomllib
from zemosaic.reasons import translated

ROOT = Path(__file__).parents[1]
TABLE: dict[str, str] = tomllib.loads(
    resources.files("zemosaic").joinpath("locale/reasons.fr.toml").read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def said() -> str:
    """All strings of the engine, gaps as {}, those that run over several lines in one."""
    files = [*ROOT.glob("*.py"), *(ROOT / "zemosaic").glob("*.py"), *(ROOT / "zemosaic" / "solve").glob("*.py")]
    text = "\n".join(path.read_text() for path in files)
    text = re.sub(r"\"\s*\n\s*f?\"", "", text).replace('\\"', '"')
    return re.sub(r"\{[^{}]*\}", "{}", text)


@pytest.mark.parametrize("english", TABLE)
def test_every_sentence_is_one_that_the_program_says(said, english):
    made_of_parts = {
        "dimmed: its stars have {} of their light in the night's clear frames",
        "clouded: its stars have {} of their light in the night's clear frames",
        "score {} under {} (interior {}, edge {})",
    }
    core = english.split(": ", 1)[-1] if english in made_of_parts else english
    core = "under {} ({})" if english.startswith("score") else core.removeprefix("the file ")
    assert core in said or core.replace("({})", "({} {})") in said


@pytest.mark.parametrize(("english", "french"), TABLE.items())
def test_a_sentence_and_its_translation_have_the_same_gaps(english, french):
    assert english.count("{}") == french.count("{}")
    values = [f"<{i}>" for i in range(english.count("{}"))]
    assert translated(english.format(*values), "fr") == french.format(*values)


def test_a_reason_within_a_reason_is_translated_too():
    reason = "it was not found on the sky: its WCS does not fit its stars"
    assert translated(reason, "fr") == (
        "elle n'a pas été trouvée sur le ciel : son WCS ne correspond pas à ses étoiles"
    )
    kinds = "it is mono and most frames are in colour: run it on its own"
    assert "monochrome" in translated(kinds, "fr") and "en couleurs" in translated(kinds, "fr")


def test_what_is_unknown_and_english_stay_as_they_are():
    assert translated("something new happened", "fr") == "something new happened"
    blurred = "blurred: FWHM 7.1 px, the night's median is 3.4 px"
    assert translated(blurred, "en") == blurred and translated(blurred, "fr").startswith("floue : FWHM 7.1 px")


def test_messages_say_reasons_in_their_language():
    values = {"name": "a.fit", "reason": "the file is empty; copy it again"}
    assert "le fichier est vide" in render("run_warn_frame_left_out", values, "fr")
    assert "the file is empty" in render("run_warn_frame_left_out", values, "en")
