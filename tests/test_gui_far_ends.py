"""The window's processes and words, without Qt: what the engine says in JSON, the helper, the bar, the languages."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import string
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args, get_origin

import cv2
import numpy as np
import pytest

from zemosaic.demo import make_field
from zemosaic.events import Event
from zemosaic.gui import helper, i18n, protocol
from zemosaic.gui.presets import Presets
from zemosaic.gui.progress import RunProgress, clock_text
from zemosaic.settings import Settings, SettingsError, describe_settings
from zemosaic.sphere import to_vectors

GUI = Path(helper.__file__).parent


@pytest.fixture(scope="module")
def subs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("subs")
    make_field(folder, frames=8, panels=(2, 1), shape=(120, 160))
    return folder


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zemosaic", "run", *map(str, arguments), "--progress", "json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_the_engine_and_the_far_ends_import_no_qt() -> None:
    code = (
        "import sys, zemosaic.cli, zemosaic_worker, zemosaic_sds, zemosaic.gui.helper, zemosaic.gui.protocol\n"
        "bad = [name for name in sys.modules if name.startswith(('PySide', 'shiboken', 'PyQt'))]\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_json_run_tells_events_and_last_the_result(subs: Path, tmp_path: Path) -> None:
    protocol.write_paths(tmp_path / "only.txt", sorted(subs.glob("*.fit"))[:5])
    options = ("--sds", "--set", "blur_filter=false", "--set", "cloud_filter=false", "--only", tmp_path / "only.txt")
    done = run(subs, "-o", tmp_path / "out", *options, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"phase", "progress", "info", "done"} <= {line["event"] for line in lines}
    result = lines[-1]
    assert result["event"] == "result" and result["exit_status"] == 0 and result["route"] == "sds"
    assert Path(result["product"]).is_file() and "5 of 5 files" in result["summary"]


def test_json_run_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run(tmp_path / "empty", "-o", tmp_path / "out", stdin=subprocess.DEVNULL)
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1
    assert result["product"] is None and result["exit_status"] == 1 and "no frame was found" in result["summary"]


def test_a_line_on_stdin_stops_the_run(subs: Path, tmp_path: Path) -> None:
    done = run(subs, "-o", tmp_path / "out", input="stop\n")
    assert done.returncode == 143
    assert json.loads(done.stdout.splitlines()[-1])["product"] is None
    assert not list((tmp_path / "out").glob("*.fits"))


def test_the_run_goes_on_when_its_window_is_gone(subs: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "zemosaic", "run", str(subs), "-o", str(tmp_path), "--progress", "json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stdin and process.stderr
        process.stdout.readline()
        process.stdout.close()
        process.stdin.close()
        assert process.wait(60) == 0, process.stderr.read()
    assert list(tmp_path.glob("*.fits"))


def test_json_lines_are_strict_whatever_the_values() -> None:
    out = io.StringIO()
    say = protocol.JsonProgress(out)
    values = {"path": Path("/a/é"), "n": np.int64(3), "x": np.float32(1.5), "bad": math.nan, "list": [np.bool_(True)]}
    say(Event("info", "key", "täxt", values))
    document = json.loads(out.getvalue(), parse_constant=lambda name: pytest.fail(name))
    assert document["values"] == {"path": "/a/é", "n": 3, "x": 1.5, "bad": None, "list": [True]}


# --- helper


def ask(*requests: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    out = io.StringIO()
    desk = helper.Desk(out)
    for request in requests:
        desk.handle(request)
    desk.finish()
    answers: dict[int, list[dict[str, Any]]] = {}
    for line in out.getvalue().splitlines():
        answer = json.loads(line)
        answers.setdefault(answer.pop("job"), []).append(answer)
    return answers


def test_helper_scans_measures_and_plans_lots(subs: Path) -> None:
    small_lots = {"sds_min_batch_size": 2, "sds_target_batch_size": 4}
    answers = ask(
        {"job": 1, "what": "scan", "inputs": [str(subs)]},
        {"job": 2, "what": "measure", "ids": [0, 1]},
        {"job": 3, "what": "lots", "ids": list(range(8)), "settings": small_lots},
    )
    rows = [row for answer in answers[1] for row in answer.get("rows", ())]
    assert [Path(row["path"]).name for row in rows] == [path.name for path in sorted(subs.glob("*.fit"))]
    assert all(len(row["outline"]) == 4 and row["wcs"] == "header" and row["exposure"] > 0 for row in rows)
    assert answers[2][0]["measures"]["0"]["stars"] >= 1 and answers[2][0]["measures"]["0"]["fwhm"] > 1
    lots = answers[3][0]["lots"]
    assert sorted(i for lot in lots for i in lot) == list(range(8)) and max(map(len, lots)) <= 5
    assert all(answer[-1] == {"done": True} for answer in answers.values())


def test_helper_names_what_is_wrong_with_a_file(subs: Path, tmp_path: Path) -> None:
    (tmp_path / "a.fit").write_bytes(b"no FITS")
    rows = ask({"job": 1, "what": "scan", "inputs": [str(tmp_path)]})[1][1]["rows"]
    assert "not a FITS file" in rows[0]["problem"]
    assert "does not exist" in ask({"job": 1, "what": "scan", "inputs": [str(tmp_path / "x")]})[1][-1]["error"]


def test_thumbnails_share_one_tone(subs: Path) -> None:
    out = io.StringIO()
    desk = helper.Desk(out)
    desk.scan({"inputs": [str(subs)]}, lambda **_: None)
    sent: list[dict[str, Any]] = []
    desk.thumbs({"ids": [0, 1], "size": 64}, lambda **answer: sent.append(answer))
    pictures = [cv2.imdecode(np.frombuffer(base64.b64decode(each["png"]), np.uint8), -1) for each in sent]
    assert [each["id"] for each in sent] == [0, 1] and max(pictures[0].shape) == 64
    tone = helper.Stretch(np.zeros(3, np.float32), 1.0)
    dark, bright = (tone.apply(np.full((2, 2, 3), adu, np.float32))[..., :3] for adu in (0, 5))
    assert (bright > dark).all()


def test_plane_keeps_distances_and_directions() -> None:
    middle = to_vectors(np.array(350.0), np.array(60.0))
    there = to_vectors(np.array([350.0, 350.0, 170.0]), np.array([61.0, 60.0, 60.0]))
    x, y = helper.on_plane(there, middle).T
    np.testing.assert_allclose(y, [1, 0, 60], atol=1e-9)  # the last one is over the pole
    np.testing.assert_allclose(x, 0, atol=1e-9)
    west = helper.on_plane(to_vectors(np.array([349.9]), np.array([60.0])), middle)
    assert west[0, 0] == pytest.approx(0.05, rel=1e-3)
    pole = helper.on_plane(to_vectors(np.array([10.0, 100.0]), np.array([89.0, 89.0])), np.array([0.0, 0.0, 1.0]))
    np.testing.assert_allclose(np.hypot(*pole.T), 1, atol=1e-9)


def test_depth_counts_the_frames_on_each_point() -> None:
    square = np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 1.0], [0.0, 1.0]])
    depth = helper.depth_map([square, square + (1.0, 0.0)])
    assert depth is not None and depth.max() == 2
    assert (depth == 2).mean() == pytest.approx(1 / 3, abs=0.02)
    assert (helper.colour_depth(depth)[..., 3] == 255).all()
    assert helper.depth_map([]) is None


def test_night_changes_at_noon() -> None:
    assert helper.night_of("2026-01-10T23:50:00") == helper.night_of("2026-01-11T03:00:00.5") == "2026-01-10"
    assert helper.night_of("") == ""


def test_a_cancelled_job_falls_silent(subs: Path) -> None:
    answers = ask({"what": "cancel", "target": 1}, {"job": 1, "what": "scan", "inputs": [str(subs)]})
    assert answers == {}


# --- progress


def test_the_bar_is_monotonic_and_full_at_the_end() -> None:
    now = [0.0]
    progress = RunProgress("sds", clock=lambda: now[0])
    seen = [progress.fraction]
    for phase in progress.phases:
        progress.hear({"event": "phase", "key": f"phase_{phase}"})
        for k in (0, 3, 2, 10):
            now[0] += 1
            progress.hear({"event": "progress", "values": {"current": k, "total": 10}})
            seen.append(progress.fraction)
    assert seen == sorted(seen) and 0.9 < seen[-1] <= 1
    assert progress.finish().keys() == set(progress.phases) and progress.fraction == 1


def test_remaining_time_comes_true_once_the_phases_are_known() -> None:
    now = [0.0]
    seconds = {"scan": 1.0, "measure": 9.0, "lots": 80.0, "save": 10.0}
    others = dict.fromkeys(("solve", "levels", "gains", "stack", "polish", "report"), 1e-9)
    progress = RunProgress("sds", seconds | others, clock=lambda: now[0])
    assert progress.remaining is None
    for phase, length in (("scan", 1.0), ("measure", 9.0), ("lots", 40.0)):
        progress.hear({"event": "phase", "key": f"phase_{phase}"})
        now[0] += length
    progress.hear({"event": "progress", "values": {"current": 5, "total": 10}})
    assert progress.remaining == pytest.approx(50, rel=0.01)


def test_what_will_not_come_is_not_waited_for() -> None:
    progress = RunProgress("sds", without=("report",))
    assert "report" not in progress.phases and "report" in RunProgress("sds").phases
    progress.hear({"event": "phase", "key": f"phase_{progress.phases[-1]}"})
    progress.hear({"event": "progress", "values": {"current": 10, "total": 10}})
    assert progress.fraction == pytest.approx(1)


def test_a_fallback_changes_the_phases_but_never_the_past() -> None:
    progress = RunProgress("sds")
    progress.hear({"event": "phase", "key": "phase_stack"})
    before = progress.fraction
    progress.hear({"event": "phase", "key": "phase_mosaic_first"})
    assert progress.route == "mosaic-first" and "mosaic_first" in progress.phases
    assert progress.fraction >= before


def test_clock() -> None:
    assert [clock_text(s) for s in (0, 61.4, 3725)] == ["0:00", "1:01", "1:02:05"]


# --- words


def _fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def _used_keys() -> set[str]:
    """Keys that the code names in full."""
    sources = [path.read_text(encoding="utf-8") for path in GUI.glob("*.py")]
    return {key for source in sources for key in re.findall(r"\btr\(\s*\"([a-z_]+)\"", source)}


def test_french_says_everything_that_english_says() -> None:
    english, french = i18n.words.catalogue("en"), i18n.words.catalogue("fr")
    assert [key for key in english if key not in french] == []
    assert [key for key in french if key not in english and not key.startswith("help.")] == []
    assert [key for key in english if _fields(english[key]) != _fields(french[key])] == []
    cognates = {"summary_time", "label.astrometry_local_path", "label.stacking_normalize_method"}
    same = {key for key in english if english[key] == french[key] and len(english[key]) > 12}
    assert not {key for key in same - cognates if not key.startswith("choice.")}, "not translated?"


def test_every_word_of_the_code_is_in_the_catalogue_and_none_is_left_over() -> None:
    english = i18n.words.catalogue("en")
    assert not sorted(_used_keys() - english.keys())
    sources = "".join(path.read_text(encoding="utf-8") for path in GUI.glob("*.py"))
    built = tuple(re.findall(r"f\"([a-z_]+_)\{", sources))  # keys that are put together, such as tr(f"mode_{mode}")
    plain = [key for key in english if "." not in key and key != i18n.NAME_KEY]
    assert [key for key in plain if f'"{key}"' not in sources and not key.startswith(built)] == []


def test_no_text_is_written_into_the_code() -> None:
    """Whatever a widget shows goes through `tr`: no sentence or capitalised word as a literal argument."""
    calls = "setText|setToolTip|setPlaceholderText|addAction|addMenu|label|button|Switch"
    pattern = re.compile(rf'(?:{calls})\(\s*f?"([A-Z][a-z]+)')
    found = {path.name: pattern.findall(path.read_text(encoding="utf-8")) for path in GUI.glob("*.py")}
    assert not {name: hits for name, hits in found.items() if hits}


def test_every_setting_is_named_and_explained_in_french() -> None:
    names = {info.name for info in describe_settings()} - {"language", "output_name"}
    french = i18n.words.catalogue("fr")
    assert not sorted(name for name in names if f"label.{name}" not in french), "add to zemosaic/gui/locale/*.toml"
    assert not sorted(name for name in names if f"help.{name}" not in french), "add to zemosaic/gui/locale/fr.toml"
    units = {info.unit for info in describe_settings()} - {""}
    assert not sorted(unit for unit in units if f"unit.{unit}" not in french)
    fields = [field.annotation for name, field in Settings.model_fields.items() if name != "language"]
    choices = {value for kind in fields if "Literal" in str(get_origin(kind)) for value in get_args(kind)}
    assert not sorted(value for value in choices if f"choice.{value}" not in french)


def test_a_language_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "eo.toml").write_text('language_name = "Esperanto"\nstart = "Faru la mozaikon"\n', encoding="utf-8")
    words = i18n.Words()
    words.use("eo", tmp_path)
    assert words.available()["eo"] == "Esperanto"
    assert words.say("start") == "Faru la mozaikon"
    assert words.say("stop") == i18n.words.catalogue("en")["stop"]
    words.use("xx", tmp_path)
    assert words.language == "en"
    with pytest.raises(LookupError):
        words.say("no_such_key")


# --- presets


def test_presets_come_back_as_they_were(tmp_path: Path) -> None:
    presets = Presets(tmp_path / "presets")
    assert presets.names() == []
    settings = Settings(sds_mode_default=True, memory_gb=3.25, two_pass_cov_gain_clip=(0.9, 1.1))
    assert presets.save("../Orion: wide?", settings) == ".. Orion  wide".strip(" .")
    assert presets.load(presets.names()[0]) == (settings, [])
    presets.delete(presets.names()[0])
    assert presets.names() == []
    with pytest.raises(SettingsError):
        presets.load("gone")


def test_helper_process_ends_with_its_window() -> None:
    command = [sys.executable, "-m", "zemosaic.gui.helper"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        process.stdin.close()
        start = time.monotonic()
        assert process.wait(20) == 0
        assert time.monotonic() - start < 20
