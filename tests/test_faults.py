"""A run that is killed, stopped, starved or crowded: a clear message, the right status, no half product, no work lost.

Runs go through the command line in processes of their own, forked from a server that has imported everything, so that
one takes half a second.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from astropy.io.fits import FITSDiff

from zemosaic.demo import make_field
from zemosaic.settings import Settings
from zemosaic_worker import run_hierarchical_mosaic

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")

TINY = {"panels": (1, 1), "shape": (96, 128), "star_density": 9000, "nebula": 30, "trails": 0, "sky": 300}
FIXED: dict[str, Any] = {"sds_min_batch_size": 3, "sds_target_batch_size": 3, "report": False}
IGNORED = {"ignore_keywords": ["DATE", "CHECKSUM", "DATASUM"], "ignore_fields": ["SECONDS"]}
FRAMES, TILES = 9, 3
KILLED = -signal.SIGKILL

#: Audit events of Python's that tell of the file system.
TOUCHES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime", "os.truncate"}

Fault = tuple[Any, ...]


# --- in the child -----------------------------------------------------------------------------------------------


def child(subs: Path, out: Path, log: Connection, fault: Fault, options: tuple[str, ...]) -> None:
    """One run of the command line, with everything it says in a pipe, and something that goes wrong."""
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    from zemosaic.cli import main

    what, *how = fault
    FAULTS[what](out, *how)
    fixed = [f"--set={name}={str(value).lower()}" for name, value in FIXED.items()]
    route = [] if any(option.startswith("--route") for option in options) else ["--sds"]
    sys.argv = ["zemosaic", "run", str(subs), "-o", str(out), *route, "--workers=1", *fixed, *options]
    main()


def none(out: Path) -> None:
    pass


def kill_at(out: Path, count: int) -> None:
    """End at the given touch of the file system in the output folder; with 0 only count them."""
    touches = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal touches
        if event in TOUCHES and str(args[0]).startswith(str(out)):
            touches += 1
            if touches == count:
                os.kill(os.getpid(), signal.SIGKILL)
            if not count:
                os.write(1, b"touch\n")

    sys.addaudithook(hook)


def kill_after_tile(out: Path, count: int) -> None:
    """End when so many master tiles have been written."""
    from zemosaic.events import Events

    say = Events.count

    def counted(self: Events, what: Any, current: int, total: int) -> None:
        say(self, what, current, total)
        if current == count:
            os.kill(os.getpid(), signal.SIGKILL)

    Events.count = counted  # type: ignore[method-assign]


def signal_at(out: Path, number: int, phase: int) -> None:
    """A signal as soon as a phase begins."""
    from zemosaic.events import Events

    begin = Events.phase

    def phase_begins(self: Events, n: int, name: str) -> None:
        begin(self, n, name)
        if n == phase:
            os.kill(os.getpid(), number)

    Events.phase = phase_begins  # type: ignore[method-assign]


def limit_files(out: Path, size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def limit_memory(out: Path, megabytes: float) -> None:
    """So much more than what is mapped already."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + int(megabytes * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def wait_for(out: Path, sign: Path) -> None:
    """Stand still in the middle of the run until a file appears."""
    from zemosaic.events import Events

    begin = Events.phase

    def phase_begins(self: Events, n: int, name: str) -> None:
        begin(self, n, name)
        while n == 5 and not sign.exists():
            time.sleep(0.01)

    Events.phase = phase_begins  # type: ignore[method-assign]


def jumping_clock(out: Path) -> None:
    """Every look at the clock is an hour before the last one."""
    hours = iter(range(10**6))
    time.time = lambda: 4e9 - 3600 * next(hours)
    time.time_ns = lambda: int(time.time() * 1e9)


FAULTS: dict[str, Callable[..., None]] = {
    f.__name__: f
    for f in (none, kill_at, kill_after_tile, signal_at, limit_files, limit_memory, wait_for, jumping_clock)
}


# --- in the parent ----------------------------------------------------------------------------------------------


class Ended:
    """What a child left: its exit status and all that it said."""

    def __init__(self, status: int, log: Connection) -> None:
        self.status = status
        parts = iter(lambda: os.read(log.fileno(), 1 << 16), b"")
        self.text = b"".join(parts).decode()

    @property
    def reused(self) -> tuple[int, int]:
        found = re.search(r"measures of (\d+) frames, (\d+) tiles", self.text)
        return (int(found[1]), int(found[2])) if found else (0, 0)


@pytest.fixture(scope="module")
def server() -> Any:
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm", "zemosaic.cli", "rich.progress", __name__])
    with pytest.MonkeyPatch.context() as patch:  # before Python 3.13 a server looks nowhere else
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        forkserver.ensure_running()
    return context


@pytest.fixture
def start(server, subs, tmp_path) -> Iterator[Callable[..., Any]]:
    """Begin a run with a fault; all that still run in the end are killed."""
    begun: list[Any] = []

    def begin(fault: Fault = ("none",), out: Path = tmp_path / "out", options: tuple[str, ...] = ()) -> Any:
        process_log, log = server.Pipe(duplex=False)
        process = server.Process(target=child, args=(subs, out, log, fault, options))
        process.log = process_log
        process.start()
        log.close()
        begun.append(process)
        return process

    yield begin
    for process in begun:
        process.kill()


@pytest.fixture
def ended(start) -> Callable[..., Ended]:
    """A run with a fault, waited for."""

    def wait(fault: Fault = ("none",), **more: Any) -> Ended:
        process = start(fault, **more)
        process.join(60)
        assert process.exitcode is not None, "it hangs"
        return Ended(process.exitcode, process.log)

    return wait


@pytest.fixture(scope="module")
def subs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine tiny subs; the runs only read them."""
    return make_field(tmp_path_factory.mktemp("field") / "subs", frames=FRAMES, **TINY).paths[0].parent


@pytest.fixture(scope="module")
def expected(subs, tmp_path_factory) -> Path:
    """The product of a run that nothing happened to."""
    settings = Settings(num_processing_workers=1, resume="off", **FIXED)
    made = run_hierarchical_mosaic(subs, tmp_path_factory.mktemp("clean"), settings, sds=True)
    assert made.product is not None
    return made.product


def assert_whole(product: Path, expected: Path) -> None:
    found = FITSDiff(str(expected), str(product), **IGNORED)
    assert found.identical, found.report()


def files(out: Path) -> set[str]:
    """Everything in the output folder but what is kept for later runs."""
    return {path.name for path in out.iterdir()} - {".zemosaic"} if out.exists() else set()


def assert_recovers(ended: Callable[..., Ended], out: Path, expected: Path, **more: Any) -> Ended:
    """The next run makes the very product, under its very name, and leaves nothing else."""
    done = ended(out=out, **more)
    assert done.status == 0, done.text
    assert files(out) == files(expected.parent)
    assert_whole(out / expected.name, expected)
    assert not [p for p in out.rglob("*") if p.suffix == ".part" or "scratch" in p.parts]
    return done


# --- killed -----------------------------------------------------------------------------------------------------


def test_killed_at_twenty_moments(ended, start, expected, tmp_path):
    """Every kill lets the next run go on from there; twelve hit a touch of the disk, eight any moment."""
    chance = random.Random(8)
    out = tmp_path / "out"
    begin = time.monotonic()
    touches = ended(("kill_at", 0)).text.count("touch")
    seconds = time.monotonic() - begin
    assert touches > 60
    shutil.rmtree(out)
    kept = 0
    for moment in [*sorted(chance.randrange(1, touches) for _ in range(12)), *[0] * 8]:
        if moment:
            ended(("kill_at", moment))
        else:
            process = start()
            process.join(chance.uniform(0.1, 1) * seconds)
            process.kill()
            process.join()
        for product in out.glob("*.fits"):  # the run was faster
            assert_whole(product, expected)
            for path in out.iterdir():
                if path.name != ".zemosaic":
                    path.unlink()
        now = len(list(out.rglob("*.results")))
        assert now >= kept  # nothing that was finished is lost
        kept = now
    done = assert_recovers(ended, out, expected)
    assert done.reused[0] > 0


@pytest.fixture(scope="module")
def kept(subs, tmp_path_factory) -> Path:
    """An output folder with everything that a run keeps, and no product."""
    out = tmp_path_factory.mktemp("kept") / "out"
    run_hierarchical_mosaic(subs, out, Settings(num_processing_workers=1, **FIXED), sds=True)
    for name in files(out):
        (out / name).unlink()
    return out


@pytest.mark.parametrize("back", [0, 2, 4, 6])
def test_killed_while_it_publishes(ended, kept, expected, tmp_path, back):
    """The last touches of the disk: the product is written, and its files get their names one by one."""
    shutil.copytree(kept, tmp_path / "count")
    shutil.copytree(kept, tmp_path / "out")
    touches = ended(("kill_at", 0), out=tmp_path / "count").text.count("touch")
    assert ended(("kill_at", touches - back)).status == KILLED
    if (tmp_path / "out" / expected.name).exists():
        assert_whole(tmp_path / "out" / expected.name, expected)
    else:
        assert assert_recovers(ended, tmp_path / "out", expected).reused == (FRAMES, TILES)


def test_killed_in_the_classic_route(ended, tmp_path):
    """Master tiles that a killed run left are not taken for finished ones."""
    options = ("--route=master-tiles", "--set=max_raw_per_master_tile=3")
    assert ended(out=tmp_path / "clean", options=options).status == 0
    (product,) = (tmp_path / "clean").glob("*.fits")
    assert ended(("kill_after_tile", 2), options=options).status == KILLED
    assert len(list((tmp_path / "out" / "master_tiles").glob("*.fits"))) == 2
    done = ended(options=options)
    assert done.status == 0 and done.reused == (FRAMES, 2)
    assert files(tmp_path / "out") == files(tmp_path / "clean")
    assert_whole(tmp_path / "out" / product.name, product)
    assert len(list((tmp_path / "out" / "master_tiles").iterdir())) == 3


# --- stopped ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", range(1, 10))
def test_stopped_by_a_signal_in_every_phase(ended, expected, tmp_path, phase):
    number = signal.SIGTERM if phase % 2 else signal.SIGINT
    stopped = ended(("signal_at", number, phase))
    if stopped.status == 0:  # polishing and saving are short, and may come to their end
        assert phase >= 8
        assert_whole(tmp_path / "out" / expected.name, expected)
        return
    assert stopped.status == 128 + number
    assert "The run was stopped." in stopped.text and "Traceback" not in stopped.text
    assert not files(tmp_path / "out")
    done = assert_recovers(ended, tmp_path / "out", expected)
    assert done.reused[0] == FRAMES or phase < 4
    assert done.reused[1] == (TILES if phase > 5 else 0)


# --- starved ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 30_000, 200_000])
def test_a_disk_that_is_full_at_some_size(ended, expected, tmp_path, size):
    out = tmp_path / "out"
    failed = ended(("limit_files", size), options=("--memory=0.0025",))  # with scratch files
    assert failed.status == 1
    assert "no room left" in failed.text and "Traceback" not in failed.text
    assert not files(out)
    assert_recovers(ended, out, expected)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_real_disk_that_is_full(ended, expected, small_disk):
    failed = ended(out=small_disk / "out", options=("--memory=0.0025",))
    assert failed.status == 1
    assert re.search(r"make room|no room left", failed.text) and "Traceback" not in failed.text
    assert not files(small_disk / "out")
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    assert_recovers(ended, small_disk / "out", expected)


def test_an_output_folder_that_is_read_only(ended, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o555)
    if os.access(out, os.W_OK):  # the superuser may write everywhere but into the kernel's own files
        out = Path("/sys/zemosaic")
    begin = time.monotonic()
    failed = ended(out=out)
    assert failed.status == 1
    assert f"{out} cannot be written to" in failed.text and "choose another output folder" in failed.text
    assert "Reading headers" not in failed.text, "it is told before the work, not after"
    assert time.monotonic() - begin < 20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is unknown here")
@pytest.mark.parametrize("megabytes", [1, 10, 30])
def test_too_little_memory(ended, expected, tmp_path, megabytes):
    starved = ended(("limit_memory", megabytes))
    if starved.status == 0:
        assert_whole(tmp_path / "out" / expected.name, expected)
        return
    assert starved.status == 1, starved.text
    assert "No mosaic was made" in starved.text and "Traceback" not in starved.text
    assert not files(tmp_path / "out")
    assert_recovers(ended, tmp_path / "out", expected)


# --- crowded, and out of time -----------------------------------------------------------------------------------


def test_two_runs_into_one_folder(start, ended, expected, tmp_path):
    first = start(("wait_for", tmp_path / "go"))
    while not list((tmp_path / "out").rglob("*.results")):
        assert first.is_alive()
        time.sleep(0.01)
    second = ended()
    assert second.status == 1
    assert f"another run (process {first.pid} on " in second.text and "choose another output folder" in second.text
    cleaned = subprocess.run(
        [sys.executable, "-m", "zemosaic", "clean", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert cleaned.returncode == 1 and "is at work" in cleaned.stderr
    (tmp_path / "go").touch()
    first.join(60)
    assert first.exitcode == 0
    assert_whole(tmp_path / "out" / expected.name, expected)


def test_a_killed_run_leaves_no_lock(start, ended, expected, tmp_path):
    first = start(("wait_for", tmp_path / "never"))
    while not list((tmp_path / "out").rglob("*.results")):
        assert first.is_alive()
        time.sleep(0.01)
    first.kill()
    first.join()
    assert_recovers(ended, tmp_path / "out", expected)


def test_a_clock_that_jumps(ended, expected, subs, tmp_path):
    """Neither the results nor what is used again depend on what time it is."""
    assert ended(("jumping_clock",)).status == 0
    assert_whole(tmp_path / "out" / expected.name, expected)
    for path in (tmp_path / "out").rglob("*.results"):
        os.utime(path, (6e9, 6e9))  # in the year 2160
    for path in files(tmp_path / "out"):
        (tmp_path / "out" / path).unlink()
    assert assert_recovers(ended, tmp_path / "out", expected).reused == (FRAMES, TILES)


# --- all at once ------------------------------------------------------------------------------------------------


def test_a_bad_night_in_miniature(tmp_path, capfd):
    """Thirty good subs, as many bad files of every kind, little memory, one cut: the same pixels, and closed books."""
    spec = importlib.util.spec_from_file_location("night", Path(__file__).parents[1] / "benchmarks" / "night.py")
    assert spec is not None and spec.loader is not None
    night = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(night)
    options = Namespace(subs=30, share=0.05, cuts=1, memory=0.5, seed=3)
    status = night.night_of(tmp_path, options, ())
    assert status == 0, capfd.readouterr().out
