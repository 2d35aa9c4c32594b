"""Real limits: a run stays within the memory it was told to use, with the same bytes; too little room is told first."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import shutil
import sys
from collections import namedtuple
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from astropy.io import fits

from zemosaic import room as room_module
from zemosaic.canvas import CanvasError
from zemosaic.demo import make_field
from zemosaic.frames import Frame, read_frame
from zemosaic.layout import Sizes, lay_out, sizes_of
from zemosaic.room import Room, check_tile_room
from zemosaic.settings import Settings
from zemosaic_worker import RunError, run_hierarchical_mosaic

FIELD: dict[str, Any] = {"panels": (1, 1), "frames": 18, "shape": (512, 640), "seed": 3, "trails": 0.0}
LOTS = {"sds_min_batch_size": 2, "sds_target_batch_size": 2}
#: Nine mega-tiles of 7 MB, with all else, do not fit into it, what a run needs at a time does.
LIMIT = 34 << 20
GB = 1 << 30

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def subs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("limit") / "subs"
    make_field(folder, **FIELD)
    return folder


# --- memory -----------------------------------------------------------------------------------------------------


def child(subs: Path, out: Path, log: Connection, limit: int | None, memory: float) -> None:
    """One run of the command line, that may have so many bytes more than it begins with."""
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    from zemosaic.cli import main

    if limit is not None:
        data = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert data is not None
        resource.setrlimit(resource.RLIMIT_DATA, (int(data[1]) * 1024 + limit,) * 2)
    fixed = [f"--set={name}={value}" for name, value in LOTS.items()]
    fixed += ["--set=resume=off", "--set=stacking_rejection_algorithm=kappa_sigma", "--no-report", "--workers=1"]
    sys.argv = ["zemosaic", "run", str(subs), "-o", str(out), "--sds", f"--memory={memory}", *fixed]
    main()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory of a process is unknown here")
def test_a_run_stays_within_the_memory_it_was_told_to_use(subs, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm", "zemosaic.cli", "rich.progress", __name__])
    with pytest.MonkeyPatch.context() as patch:  # before Python 3.13 a server looks nowhere else
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        multiprocessing.forkserver.ensure_running()

    def run(name: str, limit: int | None, memory: float) -> tuple[int, str]:
        said, log = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(subs, tmp_path / name, log, limit, memory))
        process.start()
        log.close()
        text = b"".join(iter(lambda: os.read(said.fileno(), 1 << 16), b"")).decode()
        process.join()
        return process.exitcode, text

    assert run("free", None, 4)[0] == 0
    status, text = run("limited", LIMIT, 0.026)
    assert status == 0, text
    free, limited = (next((tmp_path / name).glob("*_sds.fits")) for name in ("free", "limited"))
    for part in ("PRIMARY", "COVERAGE", "ALPHA"):
        assert fits.getdata(free, part).tobytes() == fits.getdata(limited, part).tobytes(), part
    # The limit is one: told to use more than there is, the same run does not get through.
    status, text = run("starved", LIMIT, 4)
    assert status in (1, 3) and "Traceback" not in text
    assert not list((tmp_path / "starved").glob("*_sds.fits"))


# --- room for tiles ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frames(subs: Path) -> list[Frame]:
    return [read_frame(path) for path in sorted(subs.iterdir())]


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Path, int]:
    """Folder → bytes that its disk has left; each folder is a disk of its own, if there are two."""
    left: dict[Path, int] = {}
    monkeypatch.setattr(room_module.shutil, "disk_usage", lambda path: Usage(1 << 50, 0, left[Path(path)]))
    return left


def sizes(frames: list[Frame], settings: Settings) -> Sizes:
    return sizes_of(lay_out(frames, settings), "sds", settings)


def told(frames: list[Frame], room: Room, **options: Any) -> str:
    settings = Settings(**LOTS, **options)
    try:
        check_tile_room(sizes(frames, settings), settings, room)
    except CanvasError as problem:
        return str(problem)
    return ""


def test_tiles_need_what_their_windows_hold(frames, tmp_path):
    settings = Settings(**LOTS)
    need = check_tile_room(sizes(frames, settings), settings, Room(GB, tmp_path, tmp_path))
    least = 9 * 512 * 640 * 4 * 5
    assert least < need < 1.7 * least  # dithered, and turned by up to 8 degrees


@pytest.mark.parametrize(("free", "fits_in"), [(20 << 20, False), (200 << 20, True)])
def test_a_scratch_folder_that_is_too_small_is_told_of_first(frames, tmp_path, disks, free, fits_in):
    disks[tmp_path] = free
    said = told(frames, Room(10 << 20, tmp_path / "scratch", tmp_path / "results"), resume="off")
    if fits_in:
        assert not said
        return
    assert re.fullmatch(
        rf"the mega-tiles take 0\.0\d+ GB, of which 0\.00977 GB stay in memory, and {re.escape(str(tmp_path))} has "
        r"0\.0195 GB left for the others: make room, choose another scratch folder \(coadd_memmap_dir\) or allow more "
        r"memory \(memory_gb\)",
        said,
    )


def test_what_fits_into_memory_needs_no_disk(frames, tmp_path, disks):
    disks[tmp_path] = 0
    assert not told(frames, Room(GB, tmp_path, tmp_path), resume="off")


def test_the_product_has_its_room_before_the_tiles(frames, tmp_path, disks):
    disks[tmp_path] = GB
    assert not told(frames, Room(0, tmp_path, tmp_path), resume="off")
    assert told(frames, Room(0, tmp_path, tmp_path, product=GB - 1), resume="off")


def test_kept_results_are_room_too(frames, tmp_path, disks):
    """Those of an earlier run as well: the same tiles need not be stored again."""
    disks[tmp_path] = 0
    results = tmp_path / "results"
    (results / "tiles").mkdir(parents=True)
    disks[results] = 0
    with open(results / "tiles" / "old.results", "wb") as stream:
        stream.truncate(GB)  # sparse
    assert not told(frames, Room(0, tmp_path, results))
    assert told(frames, Room(0, tmp_path, results), resume="off")
    assert shutil.disk_usage(tmp_path).free == 0


def test_a_run_is_refused_before_a_pixel_is_read(subs, tmp_path, monkeypatch):
    left = {"free": 20 << 20}
    monkeypatch.setattr(room_module.shutil, "disk_usage", lambda path: Usage(1 << 50, 0, left["free"]))
    phases = []
    settings = Settings(**LOTS, resume="off", memory_gb=0.026)
    with pytest.raises(RunError, match=r"^the mega-tiles take 0\.0\d+ GB, .* make room"):
        run_hierarchical_mosaic(
            subs, tmp_path / "out", settings, sds=True, progress_callback=lambda e: phases.append((e.kind, e.key))
        )
    assert ("phase", "phase_scan") in phases and ("phase", "phase_measure") not in phases
