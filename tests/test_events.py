"""Events: texts in two languages, the old string forms, logging, threads, and the request to stop."""

import ast
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

import pytest

from zemosaic.events import LANGUAGES, Cancelled, Event, Events, messages, render

ROOT = Path(__file__).parents[1]


@pytest.fixture
def heard() -> list[Event]:
    return []


def placeholders(text: str) -> dict[str, str]:
    """Name -> format specification of every placeholder."""
    return {name: spec or "" for _, name, spec, _ in Formatter().parse(text) if name is not None}


def test_catalogues_have_the_same_keys_and_placeholders():
    english = messages("en")
    for language in LANGUAGES:
        other = messages(language)
        assert list(other) == list(english)
        for key, text in english.items():
            assert placeholders(other[key]) == placeholders(text), key


def keys_in_code() -> Iterator[tuple[str, str, set[str] | None]]:
    """Where, key, and names of the values of every message that the source sends as a literal."""
    prefix = {"phase": "phase_", "progress": "stage_", "count": "count_"}
    plain = ("info", "detail", "warning", "error", "done", "failed")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("zemosaic/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            name, where = node.func.attr, f"{path.name}:{node.lineno}"
            arguments = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if name in prefix and len(arguments) == 1:
                yield where, prefix[name] + arguments[0], None
            elif name in plain and arguments and re.match("(run|sds|global_coadd)_", arguments[0]):
                names = {k.arg for k in node.keywords if k.arg}
                yield where, arguments[0], None if any(k.arg is None for k in node.keywords) else names


def test_every_message_the_code_sends_is_in_the_catalogues():
    english = messages("en")
    sent = list(keys_in_code())
    assert sent
    missing = [f"{where}: no message {key}" for where, key, _ in sent if key not in english]
    assert not missing
    unfilled = [
        f"{where}: {key} lacks {lacking}"
        for where, key, names in sent
        if names is not None and (lacking := placeholders(english[key]).keys() - names)
    ]
    assert not unfilled


def test_text_is_rendered_in_the_language_of_the_run(heard: list[Event]):
    Events(heard.append).info("run_info_scan_found", n=12)
    Events(heard.append, "fr").info("run_info_scan_found", n=12)
    Events(heard.append, "xx").info("run_info_scan_found", n=12)
    assert [event.text for event in heard] == ["Found 12 files.", "12 fichiers trouvés.", "Found 12 files."]
    assert heard[0].values == {"n": 12}
    assert heard[0].key == "run_info_scan_found"


def test_gap_in_a_catalogue_raises_in_tests(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ZEMOSAIC_STRICT_MESSAGES", "1")
    with pytest.raises(KeyError):
        render("no_such_key", {})
    with pytest.raises(KeyError):
        render("run_info_scan_found", {})


def test_gap_in_a_catalogue_never_ends_a_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ZEMOSAIC_STRICT_MESSAGES", raising=False)
    assert render("no_such_key", {"n": 3, "why": "x"}, "fr") == "no_such_key n=3 why=x"
    assert render("run_success_finished", {"seconds": "soon"}) == "run_success_finished seconds=soon"
    with monkeypatch.context() as patch:
        catalogues = {"fr": {}, "en": messages("en")}
        patch.setattr("zemosaic.events.messages", catalogues.__getitem__)
        assert render("run_info_scan_found", {"n": 3}, "fr") == "Found 3 files."


def test_old_string_forms(heard: list[Event], monkeypatch: pytest.MonkeyPatch):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("zemosaic.events.time.monotonic", lambda: next(clock))
    say = Events(heard.append)
    say.phase(3, "lots")
    say.progress("phase1_scan", 0, 370)
    say.progress("phase1_scan", 1, 370)
    say.count("raw_file", 4, 9)
    say.count("master_tile", 1, 2)
    say.info("run_info_scan_found", n=1)
    say.done("run_success_finished", seconds=1.0)
    say.failed("run_error_failed", reason="no frames")
    assert [event.legacy() for event in heard] == [
        "PHASE_UPDATE:3",
        "STAGE_PROGRESS(phase1_scan, 0, 370)",
        "STAGE_PROGRESS(phase1_scan, 1, 370)",
        "ETA_UPDATE:01:01:30",
        "RAW_FILE_COUNT_UPDATE:4/9",
        "MASTER_TILE_COUNT_UPDATE:1/2",
        None,
        "PROCESS_DONE",
        "PROCESS_ERROR",
    ]


def test_a_stage_that_begins_again_is_timed_anew(heard: list[Event], monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 1000.0, 1001.0])
    monkeypatch.setattr("zemosaic.events.time.monotonic", lambda: next(clock))
    say = Events(heard.append)
    for current in (5, 1, 2):
        say.progress("sds_lots", current, 12)
    assert heard[-1].values["eta"] == "00:00:10"


def test_messages_go_to_the_log_and_progress_does_not(caplog: pytest.LogCaptureFixture):
    say = Events()
    with caplog.at_level(logging.DEBUG, logger="zemosaic"):
        say.info("run_info_scan_found", n=1)
        say.detail("run_info_scan_found", n=2)
        say.warning("run_warn_settings", text="100 % odd")
        say.error("run_error_failed", reason="r")
        say.phase(1, "scan")
        say.progress("sds_lots", 1, 2)
        say.count("raw_file", 1, 2)
    levels = [logging.INFO, logging.DEBUG, logging.WARNING, logging.ERROR, logging.INFO]
    assert [record.levelno for record in caplog.records] == levels
    assert caplog.records[2].getMessage() == "100 % odd"


def test_stop_is_raised_only_when_asked_for():
    Events().check_stop()
    Events(stop_requested=lambda: False).check_stop()
    with pytest.raises(Cancelled, match="arrêté"):
        Events(language="fr", stop_requested=lambda: True).check_stop()


def test_callback_is_never_called_by_two_threads_at_once_and_may_speak_itself():
    inside, seen = threading.Lock(), []

    def listen(event: Event) -> None:
        if event.key == "run_warn_settings":
            return
        assert inside.acquire(blocking=False), "two threads in the callback"
        say.warning("run_warn_settings", text="nested")
        seen.append(event.values["current"])
        inside.release()

    say = Events(listen)
    threads = [threading.Thread(target=lambda: [say.count("raw_file", n, 200) for n in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == sorted(list(range(200)) * 4)
