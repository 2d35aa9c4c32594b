"""Lots on a real Dask cluster of two worker processes: the same bytes, and a plain sentence for all that goes wrong."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from astropy.io.fits import FITSDiff
from typer.testing import CliRunner

from zemosaic import remote
from zemosaic.cache import stamp_of
from zemosaic.cli import app
from zemosaic.demo import make_field
from zemosaic.events import Cancelled, Event, Events
from zemosaic.settings import Settings
from zemosaic_worker import RunError, RunResult, open_cluster, run_hierarchical_mosaic

RECIPE = {"panels": (1, 1), "frames": 18, "shape": (96, 128), "star_density": 9000, "nebula": 30, "sky": 300}
LOTS: dict[str, Any] = {
    "sds_min_batch_size": 3,
    "sds_target_batch_size": 3,
    "num_processing_workers": 1,
    "blur_filter": False,
    "report": False,
}
#: What may differ: when it was, and how long it took.
IGNORED = {"ignore_keywords": ["DATE", "CHECKSUM", "DATASUM"], "ignore_fields": ["SECONDS"]}


@pytest.fixture(scope="module")
def subs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighteen tiny subs, which make six lots, with a master dark and a master flat beside them."""
    folder = tmp_path_factory.mktemp("field") / "subs"
    make_field(folder, **RECIPE)
    y, x = np.mgrid[:96, :128].astype(np.float32)
    fits.writeto(folder.parent / "dark.fits", 20 + y % 3)
    fits.writeto(folder.parent / "flat.fits", 1000 - (x - 64) ** 2 / 40)
    return folder


def run(subs: Path, out: Path, heard: Callable[[Event], None] | None = None, **changes: Any) -> RunResult:
    masters = {"master_dark_path": str(subs.parent / "dark.fits"), "master_flat_path": str(subs.parent / "flat.fits")}
    settings = Settings(**(LOTS | masters | changes))
    return run_hierarchical_mosaic(subs, out, settings, sds=True, progress_callback=heard)


@pytest.fixture(scope="module")
def local(subs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The product of this machine alone."""
    product = run(subs, tmp_path_factory.mktemp("local")).product
    assert product is not None
    return product


def same(a: Path | str | None, b: Path) -> bool:
    return bool(FITSDiff(str(a), str(b), **IGNORED).identical)


# --- a cluster ----------------------------------------------------------------------------------------------------


class Cluster:
    """A scheduler and workers, each a process of its own in a folder of its own."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self.workers: list[subprocess.Popen[bytes]] = []
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self._start("scheduler", "--host", self.address)

    def add_worker(self, threads: int = 1) -> None:
        options = ("--nthreads", str(threads), "--memory-limit", "1GB")
        self.workers.append(self._start("worker", self.address, "--no-nanny", "--preload", "zemosaic.remote", *options))

    def wait(self) -> None:
        """Until all workers are there."""
        from distributed import Client

        with Client(self.address, timeout=20, set_as_default=False) as client:
            client.wait_for_workers(len(self.workers), timeout=20)

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        log = self._stack.enter_context((self.folder / f"{command[0]}{len(self.workers)}.log").open("wb"))
        process = subprocess.Popen(
            [sys.executable, "-m", "dask", *command, "--no-dashboard"],
            cwd=self.folder,
            # The first as Dask's nannies start their workers.
            env=os.environ | {"MALLOC_TRIM_THRESHOLD_": "65536", "DASK_TEMPORARY_DIRECTORY": str(self.folder)},
            stdout=log,
            stderr=log,
        )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def starting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two workers, one with one thread and one with two, which take seconds to load what they need."""
    pytest.importorskip("distributed")
    with ExitStack() as stack:
        cluster = Cluster(tmp_path_factory.mktemp("cluster"), stack)
        cluster.add_worker(threads=1)
        cluster.add_worker(threads=2)
        yield cluster


@pytest.fixture(scope="module")
def cluster(starting: Cluster, local: Path) -> Cluster:
    """The two workers, ready; `local` was made meanwhile."""
    starting.wait()
    return starting


def test_the_command_line_makes_the_same_bytes_on_a_cluster(cluster, subs, local, tmp_path, monkeypatch):
    """From another folder than the workers', with relative paths."""
    monkeypatch.chdir(subs.parent)
    command = ["run", "subs", "-o", str(tmp_path), "--sds", "--dark", "dark.fits", "--flat", "flat.fits"]
    changes = [part for name, value in LOTS.items() for part in ("--set", f"{name}={str(value).lower()}")]
    made = CliRunner().invoke(app, [*command, *changes, "--scheduler", cluster.address])
    assert made.exit_code == 0, made.output
    assert f"the Dask cluster at {cluster.address}: 2 workers with 3 threads" in made.stderr
    assert same(made.stdout.splitlines()[-1], local)


def test_what_earlier_runs_have_kept_is_not_sent(cluster, subs, local, tmp_path, monkeypatch):
    """Half of the lots are there, made by this machine; the cluster makes the others, and after that there are none."""
    sent: list[int] = []
    order = remote._order
    monkeypatch.setattr(remote, "_order", lambda subs, *more: sent.append(len(subs)) or order(subs, *more))

    def stop_in_the_middle(event: Event) -> None:
        if event.key == "sds_lot_done" and event.values["index"] == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(subs, tmp_path, stop_in_the_middle)
    assert not sent
    assert same(run(subs, tmp_path, scheduler=cluster.address).product, local)
    assert sent == [3, 3, 3]
    assert same(run(subs, tmp_path).product, local)


def test_a_frame_that_vanishes_is_left_out_and_named(cluster, subs, tmp_path, monkeypatch):
    """After its lot was sent: the worker does not see it, and neither does this machine, so nobody is to blame."""
    shutil.copytree(subs, tmp_path / "subs")
    for name in ("dark.fits", "flat.fits"):
        shutil.copy(subs.parent / name, tmp_path)
    victim = sorted((tmp_path / "subs").iterdir())[4]
    order = remote._order

    def vanish(subs: Any, *more: Any) -> Any:
        if victim in [sub.frame.path for sub in subs]:
            victim.unlink()
        return order(subs, *more)

    monkeypatch.setattr(remote, "_order", vanish)
    made = run(tmp_path / "subs", tmp_path / "out", scheduler=cluster.address)
    (record,) = (record for record in made.ledger if record.file == victim.name)
    assert record.status == "rejected" and "has changed" in record.reason
    assert len(made.ledger.used) == 17


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="the system has no paths that processes see apart")
def test_a_folder_that_is_not_shared_is_named(cluster, subs, tmp_path, monkeypatch):
    """Below /proc/self/cwd every process sees what is below its own folder."""
    monkeypatch.chdir(subs.parent)
    sentence = r"worker tcp://\S+ does not see /proc/self/cwd/subs/.+ as it is here: the folder must be shared"
    with pytest.raises(RunError, match=sentence):
        run(Path("/proc/self/cwd/subs"), tmp_path / "out", scheduler=cluster.address)
    assert not list((tmp_path / "out").glob("*.fits"))


def test_workers_with_another_version_are_named(cluster, subs, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "__version__", "77.1")
    with pytest.raises(RunError, match=r"worker tcp://\S+ has zemosaic \S+ instead of 77.1"):
        run(subs, tmp_path, scheduler=cluster.address)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives back every array at once")
def test_a_worker_keeps_the_memory_of_one_array_for_the_next(cluster):
    from distributed import Client

    def faults() -> int:  # within a function it goes to the worker by value: tests cannot be imported there
        import resource

        from zemosaic.remote import keep_freed_memory

        keep_freed_memory()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(100):
            np.ones(1 << 20, np.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with Client(cluster.address, set_as_default=False) as client:
        found = client.run(faults).values()
    assert max(found) < 100 * 256 / 10  # a page has 4 KB


def test_a_stop_cancels_what_is_under_way(cluster, subs, tmp_path):
    from distributed import Client

    done: list[Event] = []

    def listen(event: Event) -> None:
        done.extend([event] if event.key == "sds_lot_done" else [])

    settings = Settings(**LOTS, scheduler=cluster.address)
    with pytest.raises(Cancelled):
        run_hierarchical_mosaic(
            subs, tmp_path, settings, sds=True, progress_callback=listen, stop_requested=lambda: bool(done)
        )
    assert len(done) < 6
    with Client(cluster.address, set_as_default=False) as client:
        wait_for(lambda: client.run_on_scheduler(lambda dask_scheduler: not dask_scheduler.tasks))


def test_a_lot_that_has_begun_notices_that_it_is_not_wanted_any_more(cluster, tmp_path):
    from distributed import Client, get_worker

    begun, noticed = tmp_path / "begun", tmp_path / "noticed"

    def work() -> None:
        from zemosaic.remote import _unwanted

        unwanted = _unwanted(get_worker())
        begun.touch()
        for _ in range(100):
            if unwanted():
                noticed.touch()
                return
            time.sleep(0.05)

    with Client(cluster.address, set_as_default=False) as client:
        promise = client.submit(work)
        wait_for(begun.exists)
        assert not noticed.exists()
        client.cancel(promise)
        wait_for(noticed.exists)


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_worker_that_is_killed_costs_nothing_but_its_time(cluster, subs, local, tmp_path):
    """The last test of the two workers: one is left after it."""
    victim = cluster.workers[0]
    lost: list[int] = []

    def kill(event: Event) -> None:
        if event.key == "sds_lot_done" and victim.poll() is None:
            os.kill(victim.pid, signal.SIGKILL)
            victim.wait()
        if event.key == "cluster_workers_lost":
            lost.append(event.values["left"])

    assert same(run(subs, tmp_path, kill, scheduler=cluster.address).product, local)
    assert lost == [1]


def test_a_cluster_whose_last_worker_dies_is_not_waited_for_forever(cluster, subs, tmp_path):
    """What was finished is kept: this machine goes on from it."""

    def kill(event: Event) -> None:
        if event.key == "sds_lot_done":
            for worker in cluster.workers:
                worker.kill()

    with pytest.raises(RunError, match="has had no worker for 1 s"):
        run(subs, tmp_path, kill, scheduler=cluster.address, scheduler_timeout_s=1)
    assert not list(tmp_path.glob("*.fits"))
    heard: list[Event] = []
    run(subs, tmp_path, heard.append)
    (reused,) = (event for event in heard if event.key == "run_info_reused")
    assert reused.values["tiles"] >= 1


# --- without one --------------------------------------------------------------------------------------------------


def test_a_scheduler_that_cannot_be_reached_ends_the_run_before_it_begins(subs, tmp_path):
    pytest.importorskip("distributed")
    address = f"tcp://127.0.0.1:{free_port()}"
    made = CliRunner().invoke(
        app,
        ["run", str(subs), "-o", str(tmp_path), "--sds", "--scheduler", address, "--set", "scheduler_timeout_s=0.5"],
    )
    assert made.exit_code == 1
    assert f"no Dask scheduler answers at {address} within 0.5 s" in made.stderr
    assert "phase" not in made.stderr and "Reading headers" not in made.stderr


def test_an_address_that_is_none_is_named(subs, tmp_path):
    pytest.importorskip("distributed")
    with pytest.raises(RunError, match="no Dask scheduler answers at nonsense://there"):
        run(subs, tmp_path, scheduler="nonsense://there", scheduler_timeout_s=0.5)


def test_a_missing_extra_is_named_with_the_way_to_install_it(subs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(RunError, match=r"pip install 'zemosaic\[distributed\]'"):
        run(subs, tmp_path, scheduler="tcp://127.0.0.1:1")


def test_other_routes_say_that_they_do_without_it():
    heard: list[Event] = []
    settings = Settings(scheduler="tcp://127.0.0.1:1")
    with open_cluster(settings, ["mosaic-first", "master-tiles"], Events(heard.append)) as lots:
        assert lots is None
    assert [(event.kind, event.key, event.values) for event in heard] == [
        ("warning", "cluster_unused", {"route": "mosaic-first"})
    ]


def test_dask_is_loaded_only_for_a_cluster():
    """Not without one, and not for a route that does not use it."""
    code = (
        "import sys, zemosaic.cli, zemosaic_worker, zemosaic_sds\n"
        "from zemosaic.events import Events\n"
        "from zemosaic.settings import Settings\n"
        "for scheduler, route in (('', 'sds'), ('tcp://127.0.0.1:1', 'master-tiles')):\n"
        "    with zemosaic_worker.open_cluster(Settings(scheduler=scheduler), [route], Events()) as lots:\n"
        "        assert lots is None\n"
        "assert not {'distributed', 'zemosaic.remote'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the parts ----------------------------------------------------------------------------------------------------


def test_a_difference_is_told_in_words():
    here = {"zemosaic": "2", "numpy": "2.1", "code": "a"}
    assert remote.difference(here, here) == ""
    assert remote.difference(here, here | {"numpy": "1.26", "code": "b"}) == "numpy 1.26 instead of 2.1"
    assert remote.difference(here, {"zemosaic": "2", "code": "a"}) == "numpy none instead of 2.1"
    assert remote.difference(here, here | {"code": "b"}) == "another state of zemosaic's code"


def test_a_file_is_told_by_size_and_content_whatever_its_times(tmp_path):
    path = tmp_path / "sub.fit"
    path.write_bytes(b"one")
    stamp = stamp_of(path)
    os.utime(path, (1, 1))
    assert remote.is_like(path, stamp)
    path.write_bytes(b"two")
    assert not remote.is_like(path, stamp)
    assert remote.is_like(path, None)
    path.unlink()
    assert not remote.is_like(path, stamp) and not remote.is_like(path, None)


def test_the_room_of_a_lot_grows_with_the_memory_of_its_worker():
    assert remote.room_of(4 << 30) == 2 * remote.room_of(2 << 30) < 1 << 30
    assert remote.room_of(None) > 0
