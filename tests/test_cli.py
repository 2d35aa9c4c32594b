"""The command line, with an engine that only pretends: parsing, precedence, output, status, signals."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from zemosaic.cli import app
from zemosaic.events import Cancelled, Events
from zemosaic.lots import read_lots
from zemosaic.settings import Settings, SettingsError, describe_settings, load_settings

ROOT = Path(__file__).parents[1]


class RunError(Exception):
    """Stands for zemosaic_worker.RunError."""


class Engine:
    """Stands for `run_hierarchical_mosaic`: notes the call, speaks, returns or raises what it is told to."""

    def __init__(self) -> None:
        self.call: dict[str, Any] = {}
        self.outcome: Any = SimpleNamespace(
            product=Path("out/m_sds.fits"), route="sds", exit_status=0, summary="2 lots"
        )

    def __call__(self, inputs, output_folder, settings=None, **named: Any):
        self.call = {"inputs": inputs, "output_folder": output_folder, "settings": settings, **named}
        say = Events(named["progress_callback"], settings.language, named["stop_requested"])
        say.info("run_info_scan_found", n=3)
        say.detail("run_info_canvas", width=1, height=2, scale=3.0)
        say.progress("sds_lots", 0, 2)
        say.progress("sds_lots", 2, 2)
        say.warning("run_warn_frames_blurred", n=1, limit=3.0)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    fake, module = Engine(), ModuleType("zemosaic_worker")
    module.__dict__.update(run_hierarchical_mosaic=fake, RunError=RunError)
    monkeypatch.setitem(sys.modules, "zemosaic_worker", module)
    return fake


@pytest.fixture
def subs(tmp_path: Path) -> Path:
    (tmp_path / "subs").mkdir()
    return tmp_path / "subs"


def zemosaic(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_version_and_help():
    assert zemosaic("--version").stdout.startswith("zemosaic ")
    assert "settings" in zemosaic("--help").stdout


def test_help_needs_nothing_heavy():
    code = "import sys, zemosaic.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    heavy = {"numpy", "astropy", "scipy", "cv2", "pydantic", "rich", "tomlkit", "zemosaic_worker"}
    assert not heavy & set(done.stdout.split())


def test_run_hands_everything_to_the_engine(engine: Engine, subs: Path, tmp_path: Path):
    config, lots, dark = tmp_path / "c.toml", tmp_path / "lots.json", tmp_path / "dark.fits"
    config.write_text("global_coadd_k = 2.5\nsds_min_batch_size = 3\nmemory_gb = 1\nlanguage = 'fr'\n")
    lots.write_text(json.dumps([["subs/a.fit", "subs/b.fit"]]))
    dark.touch()
    result = zemosaic(
        *("run", subs, "-o", tmp_path / "out", "--config", config, "--lots", lots, "--dark", dark, "--sds"),
        *(
            "--set",
            "global_coadd_k=2.8",
            "--set",
            "memory_gb=2",
            "--memory",
            3,
            "--workers",
            2,
            "--lang",
            "en",
        ),
    )
    assert result.exit_code == 0, result.output
    call = engine.call
    assert call["inputs"] == [subs]
    assert call["output_folder"] == tmp_path / "out"
    assert call["sds"] is True
    assert call["preplan_path_groups"] == [[subs / "a.fit", subs / "b.fit"]]
    assert call["settings"] == Settings(
        global_coadd_k=2.8,
        sds_min_batch_size=3,
        memory_gb=3,
        num_processing_workers=2,
        master_dark_path=str(dark),
    )


@pytest.mark.parametrize(("flags", "sds"), [([], None), (["--sds"], True), (["--no-sds"], False)])
def test_route_flag_overrides_the_setting_only_when_given(engine: Engine, subs: Path, flags, sds):
    zemosaic("run", subs, "-o", "out", "--set", "sds_mode_default=true", *flags)
    assert engine.call["sds"] is sds
    assert engine.call["settings"].sds_mode_default is True


def test_results_on_stdout_and_messages_on_stderr(engine: Engine, subs: Path):
    result = zemosaic("run", subs, "-o", "out")
    assert result.stdout.splitlines() == ["2 lots", "out/m_sds.fits"]
    lines = result.stderr.splitlines()
    assert lines[0] == "Found 3 files."
    assert lines[1].startswith("Lots: 2/2, ")
    assert "blurred" in lines[2]
    assert len(lines) == 3


def test_verbose_adds_details_and_quiet_leaves_warnings(engine: Engine, subs: Path):
    assert "Canvas" in zemosaic("run", subs, "-o", "out", "-v").stderr
    quiet = zemosaic("run", subs, "-o", "out", "-q")
    assert len(quiet.stderr.splitlines()) == 1
    assert quiet.stdout.splitlines() == ["out/m_sds.fits"]
    assert zemosaic("run", subs, "-o", "out", "-q", "-v").exit_code == 2


def test_language(engine: Engine, subs: Path):
    assert "3 fichiers trouvés." in zemosaic("run", subs, "-o", "out", "--lang", "fr").stderr
    assert "en | fr" in zemosaic("run", subs, "-o", "out", "--lang", "tlh").stderr


def test_progress_of_a_long_stage_is_told_now_and_then(engine: Engine, subs: Path, monkeypatch):
    monkeypatch.setattr("zemosaic.cli._SECONDS_BETWEEN_LINES", 0.0)
    lines = zemosaic("run", subs, "-o", "out").stderr.splitlines()
    assert [line.split(",")[0] for line in lines if line.startswith("Lots")] == ["Lots: 0/2", "Lots: 2/2"]


@pytest.mark.parametrize("status", [0, 3])
def test_status_of_the_engine_is_the_exit_status(engine: Engine, subs: Path, status: int):
    engine.outcome.exit_status = status
    assert zemosaic("run", subs, "-o", "out").exit_code == status


def test_run_without_product_prints_no_path(engine: Engine, subs: Path):
    engine.outcome = SimpleNamespace(product=None, route="sds", exit_status=1, summary="")
    result = zemosaic("run", subs, "-o", "out")
    assert (result.exit_code, result.stdout) == (1, "")


def test_run_error_is_one_sentence(engine: Engine, subs: Path):
    engine.outcome = RunError("no usable frame in subs")
    result = zemosaic("run", subs, "-o", "out")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1] == "No mosaic was made: no usable frame in subs"


def test_cancelled_run(engine: Engine, subs: Path):
    engine.outcome = Cancelled()
    result = zemosaic("run", subs, "-o", "out")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "The run was stopped."


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "sds_mode_defualt=1"], "sds_mode_default"),
        (["--set", "sds_mode_default"], "key=value"),
        (["--memory", "0"], "memory_gb"),
        (["--workers", "-7"], "num_processing_workers"),
        (["--lots", "empty.json"], "list of lots"),
        (["--config", "missing.toml"], "missing.toml"),
    ],
)
def test_wrong_use_ends_with_status_2_before_the_engine_starts(
    engine: Engine, subs: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
):
    monkeypatch.chdir(subs)
    Path("empty.json").write_text("[]")
    result = zemosaic("run", subs, "-o", "out", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not engine.call


def test_missing_subs_end_with_status_2(engine: Engine, tmp_path: Path):
    assert zemosaic("run", tmp_path / "nothing", "-o", "out").exit_code == 2


def test_warnings_of_the_settings_are_shown(engine: Engine, subs: Path):
    assert "wsc_impl" in zemosaic("run", subs, "-o", "out", "-q", "--set", "wsc_impl=x").stderr


@pytest.mark.parametrize(
    ("line", "explained"),
    [
        ("raise ImportError('libGL.so.1: cannot open shared object file: No such file or directory')", True),
        ("raise ImportError('libgthread-2.0.so.0: cannot open shared object file')", True),
        ("raise ModuleNotFoundError('No module named cv2', name='cv2')", True),
        ("raise ModuleNotFoundError('No module named scipy', name='scipy')", False),
    ],
)
def test_opencv_without_system_libraries_is_explained(tmp_path, subs, monkeypatch, line, explained):
    (tmp_path / "zemosaic_worker.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "zemosaic_worker", raising=False)
    result = zemosaic("run", subs, "-o", "out")
    assert result.exit_code == 1
    assert ("libgl1" in result.stderr and "opencv-python-headless" in result.stderr) is explained
    assert isinstance(result.exception, ImportError) is not explained


def fake_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("zemosaic.demo")

    def make_demo(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a.fit").touch()

    module.__dict__["make_demo"] = make_demo
    monkeypatch.setitem(sys.modules, "zemosaic.demo", module)


def test_demo_cleans_up_after_itself(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_demo(monkeypatch)
    result = zemosaic("demo", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "out/m_sds.fits"
    assert engine.call["sds"] is True
    assert not engine.call["inputs"][0].exists()


def test_demo_keeps_subs_and_never_mixes_them_with_older_ones(engine, tmp_path, monkeypatch):
    fake_demo(monkeypatch)
    assert zemosaic("demo", "-o", tmp_path, "--keep-subs").exit_code == 0
    assert (tmp_path / "subs" / "a.fit").exists()
    assert zemosaic("demo", "-o", tmp_path, "--keep-subs").exit_code == 2


def test_settings_command(tmp_path: Path):
    text = zemosaic("settings").stdout
    for row in describe_settings():
        assert f"{row.name} = " in text
        assert row.description in text
    (tmp_path / "s.toml").write_text(zemosaic("settings", "--toml").stdout, encoding="utf-8")
    assert load_settings(tmp_path / "s.toml") == (Settings(), [])


def test_lots_file(tmp_path: Path):
    absolute = tmp_path.parent / "elsewhere" / "c.fit"
    (tmp_path / "lots.toml").write_text(f"lots = [['a.fit', '../b.fit'], ['{absolute}']]")
    assert read_lots(tmp_path / "lots.toml") == [[tmp_path / "a.fit", tmp_path.parent / "b.fit"], [absolute]]
    (tmp_path / "lots.json").write_text('{"preplan_path_groups": [["a.fit"]]}')
    assert read_lots(tmp_path / "lots.json") == [[tmp_path / "a.fit"]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "one of the keys"),
        ('{"lots": [], "preplan_path_groups": []}', "one of the keys"),
        ("[]", "list of lots"),
        ('"a.fit"', "list of lots"),
        ('["a.fit"]', "lot 1"),
        ('[["a.fit"], []]', "lot 2"),
        ("[[1]]", "lot 1"),
        ('[["a.fit"], ["./a.fit"]]', "in lot 1 and again in lot 2"),
        ("[[", "not valid JSON"),
    ],
)
def test_bad_lots_file_is_explained(tmp_path: Path, content: str, words: str):
    path = tmp_path / "lots.json"
    path.write_text(content)
    with pytest.raises(SettingsError, match=words) as caught:
        read_lots(path)
    assert str(path) in str(caught.value)


# --- as a program of its own, because signals and terminals belong to a process

PRETENDER = """
    import sys, time
    from pathlib import Path
    from types import SimpleNamespace
    from zemosaic.events import Events

    class RunError(Exception): ...

    def run_hierarchical_mosaic(inputs, output_folder, settings, *, progress_callback, stop_requested, **_):
        say = Events(progress_callback, settings.language, stop_requested)
        for i in range(4):
            say.progress("sds_lots", i, 3)
        say.info("run_info_scan_found", n=3)
        if settings.output_name == "ends":
            return SimpleNamespace(product=Path("p.fits"), summary="", exit_status=0)
        print("ready", flush=True)
        while True:
            time.sleep(0.02)
            if settings.output_name != "deaf":
                say.check_stop()
"""


def start(folder: Path, name: str, stderr: int) -> subprocess.Popen[str]:
    (folder / "zemosaic_worker.py").write_text(textwrap.dedent(PRETENDER))
    arguments = ["run", ".", "-o", "out", "--set", f"output_name={name}"]
    return subprocess.Popen(
        [sys.executable, "-m", "zemosaic", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def wait_until_it_works(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_the_run_cleanly(tmp_path: Path, number: signal.Signals):
    with start(tmp_path, "polls", stderr=subprocess.PIPE) as process:
        wait_until_it_works(process)
        begun = time.monotonic()
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=10)
        assert time.monotonic() - begun < 2
    assert process.returncode == 128 + number
    assert stdout == ""
    assert stderr.splitlines()[-1] == "The run was stopped."
    assert "Stopping" in stderr


def test_second_signal_ends_a_run_that_does_not_listen(tmp_path: Path):
    with start(tmp_path, "deaf", stderr=subprocess.PIPE) as process:
        wait_until_it_works(process)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_bars_on_a_terminal(tmp_path: Path):
    import pty

    master, slave = pty.openpty()
    with start(tmp_path, "ends", stderr=slave) as process:
        os.close(slave)
        stdout, _ = process.communicate(timeout=20)
    shown = os.read(master, 65536).decode()
    os.close(master)
    assert (process.returncode, stdout) == (0, "p.fits\n")
    assert "\x1b[" in shown
    assert "3/3" in shown
    assert "Found 3 files." in shown
