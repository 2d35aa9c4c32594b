"""Results on disk: found only under the very same key, whole or not at all, within the room that they may take."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from zemosaic import cache as cache_module
from zemosaic import workplace as workplace_module
from zemosaic.cache import Cache, code_version, fingerprint, stamp_of
from zemosaic.mapping import is_mapped
from zemosaic.measure import FrameMeasure
from zemosaic.product import ProductPaths
from zemosaic.workplace import PRODUCT_ENDINGS, UNFINISHED, WorkplaceError, remove_results, scratch_folder, workplace

ROOT = Path(__file__).resolve().parents[1]
ROOM = 1 << 30
ARRAYS = {
    "image": np.arange(24, dtype=np.float32).reshape(2, 4, 3),
    "nothing": np.zeros((0, 3), np.float32),
    "turned": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "every_other": np.arange(9, dtype=np.int64)[::2],
    "number": np.array(7),
    "word": np.array("é😀"),
    "unknown": np.array([np.nan, -0.0, np.inf]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "results"


def the_file(folder: Path) -> Path:
    (path,) = (p for p in folder.rglob("*") if p.is_file())
    return path


def same(found: dict[str, np.ndarray] | None, expected: dict[str, np.ndarray]) -> bool:
    assert found is not None
    return list(found) == list(expected) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(found.values(), expected.values(), strict=True)
    )


# --- store and find ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [False, True])
def test_what_is_stored_is_found_bit_by_bit(folder, mapped):
    assert Cache(folder, ROOM).put("tiles", "k", ARRAYS)
    assert same(Cache(folder, ROOM).get("tiles", "k", mapped=mapped), ARRAYS)


def test_a_mapped_array_stays_on_the_disk_and_cannot_be_spoilt(folder):
    cache = Cache(folder, ROOM)
    cache.put("tiles", "k", ARRAYS)
    image = cache.get("tiles", "k", mapped=True)["image"]
    assert is_mapped(image) and image.ctypes.data % 64 == 0
    with pytest.raises(ValueError, match="read-only"):
        image[0] = 1
    loaded = cache.get("tiles", "k")["image"]
    loaded[0] = 1  # while what was loaded is the caller's own
    assert same(cache.get("tiles", "k"), ARRAYS)


def test_another_kind_or_key_is_another_result(folder):
    cache = Cache(folder, ROOM)
    cache.put("tiles", "k", ARRAYS)
    assert cache.get("tiles", "l") is None
    assert cache.get("measures", "k") is None
    assert Cache(folder / "elsewhere", ROOM).get("tiles", "k") is None


def test_without_a_folder_nothing_is_kept():
    cache = Cache(None)
    assert not cache.put("tiles", "k", ARRAYS)
    assert cache.get("tiles", "k") is None


def test_results_of_earlier_runs_are_counted_and_ones_own_are_not(folder):
    first = Cache(folder, ROOM)
    first.put("tiles", "k", ARRAYS)
    assert first.get("tiles", "k") and first.found["tiles"] == 0
    second = Cache(folder, ROOM)
    assert second.get("tiles", "k") and second.found["tiles"] == 1


def test_objects_are_refused(folder):
    with pytest.raises(TypeError, match="object"):
        Cache(folder, ROOM).put("tiles", "k", {"a": np.array([{}])})


# --- damage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("at", [0, 9, 12, 40, 200, -1])
def test_a_flipped_bit_makes_it_no_result(folder, at, mapped):
    arrays = {"image": np.arange(999, dtype=np.float32)}
    Cache(folder, ROOM).put("tiles", "k", arrays)
    path = the_file(folder)
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    cache = Cache(folder, ROOM)
    assert cache.get("tiles", "k", mapped=mapped) is None
    assert not path.exists()  # so that it takes no room
    assert cache.put("tiles", "k", arrays) and same(cache.get("tiles", "k"), arrays)


@pytest.mark.parametrize("length", [0, 1, 19, 20, 64, 150, -4])
def test_a_file_that_is_cut_off_is_no_result(folder, length):
    Cache(folder, ROOM).put("tiles", "k", {"image": np.arange(999, dtype=np.float32)})
    path = the_file(folder)
    path.write_bytes(path.read_bytes()[:length])
    assert Cache(folder, ROOM).get("tiles", "k", mapped=True) is None


@given(content=st.binary(max_size=300), magic=st.booleans())
def test_whatever_lies_there_is_a_result_or_none(tmp_path_factory, content, magic):
    folder = tmp_path_factory.mktemp("results")
    (folder / "tiles").mkdir()
    (folder / "tiles" / "k.results").write_bytes((b"ZeMosaic" if magic else b"") + content)
    assert Cache(folder, ROOM).get("tiles", "k") is None


def test_a_half_written_file_is_tidied_away(folder):
    (folder / "tiles").mkdir(parents=True)
    (folder / "tiles" / "k.123.part").write_bytes(b"half")
    assert Cache(folder, ROOM).get("tiles", "k") is None
    assert not list(folder.rglob("*.part"))


# --- room -------------------------------------------------------------------------------------------------------


def block(megabytes: float) -> dict[str, np.ndarray]:
    return {"a": np.ones(int(megabytes * 2**20), np.uint8)}


def test_the_oldest_results_go_first(folder):
    first = Cache(folder, ROOM)
    for age, key in enumerate("abc"):
        first.put("tiles", key, block(1))
        os.utime(folder / "tiles" / f"{key}.results", (1e9 + age, 1e9 + age))
    second = Cache(folder, 3.5 * 2**20)
    assert second.put("tiles", "d", block(1))
    assert [key for key in "abcd" if second.get("tiles", key)] == ["b", "c", "d"]
    assert second.size < 3.5 * 2**20


def test_what_this_run_uses_is_never_given_up_for_more(folder):
    told: list[str] = []
    Cache(folder, ROOM).put("tiles", "old", block(1))
    cache = Cache(folder, 2.5 * 2**20, trouble=told.append)
    assert cache.get("tiles", "old") and cache.put("tiles", "a", block(1))
    assert not cache.put("tiles", "b", block(1))
    assert not cache.put("tiles", "c", block(0.1))
    assert len(told) == 1 and "resume_cache_gb" in told[0]
    assert cache.get("tiles", "old") and cache.get("tiles", "a")


def test_the_disk_keeps_its_spare_room(folder, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 2**20))
    assert Cache(folder, ROOM, trouble=told.append).put("tiles", "a", block(0.5))
    assert not Cache(folder, ROOM, spare=2**20, trouble=told.append).put("tiles", "b", block(0.5))
    assert len(told) == 1


@pytest.mark.parametrize("step", ["open", "replace"])
def test_a_disk_that_refuses_fails_no_run(folder, monkeypatch, step):
    told: list[str] = []
    cache = Cache(folder, ROOM, trouble=told.append)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"open": ("builtins.open", refuse), "replace": (os, "replace", refuse)}[step])
    assert not cache.put("tiles", "a", block(0.1))
    monkeypatch.undo()
    assert not cache.put("tiles", "a", block(0.1))
    assert told == ["No space left on device"]
    assert not [p for p in folder.rglob("*") if p.is_file()]


def test_threads_share_it(folder):
    cache = Cache(folder, ROOM)

    def work(i: int) -> bool:
        arrays = {"a": np.full(1000, i % 7)}
        return cache.put("tiles", str(i % 7), arrays) and same(cache.get("tiles", str(i % 7)), arrays)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))
    assert cache.size == sum(p.stat().st_size for p in folder.rglob("*.results"))


# --- keys -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    x: float
    y: object = ()


DIFFERENT = [
    (),
    ("",),
    (None,),
    (0,),
    (0.0,),
    (-0.0,),
    (False,),
    ("0",),
    (b"0",),
    (1, 2),
    ((1, 2),),
    ((1,), 2),
    ("1", "2"),
    ("12",),
    (float("nan"),),
    (np.array([1, 2]),),
    (np.array([1.0, 2.0]),),
    (np.array([[1], [2]]),),
    (np.array([1, 2], np.int32),),
    (Point(1.0),),
    (Point(1.0, 2),),
    ({"x": 1.0, "y": 2},),
]


def test_different_values_have_different_fingerprints():
    assert len({fingerprint(*parts) for parts in DIFFERENT}) == len(DIFFERENT)


def test_equal_values_have_equal_fingerprints():
    assert fingerprint({"a": 1, "b": 2.5}) == fingerprint({"b": 2.5, "a": 1})
    assert fingerprint(np.float64(0.1), np.int64(3)) == fingerprint(0.1, 3)
    grid = np.arange(12.0).reshape(3, 4)
    assert fingerprint(grid) == fingerprint(np.asfortranarray(grid)) == fingerprint(np.repeat(grid, 2, 0)[::2])


@given(hnp.arrays(np.float32, st.integers(1, 5), elements=st.floats(width=32)), st.data())
def test_a_single_bit_changes_the_fingerprint(array, data):
    other = array.copy()
    other.view(np.uint32)[data.draw(st.integers(0, len(array) - 1))] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
    assert fingerprint(array) != fingerprint(other)


@pytest.mark.parametrize("thing", [object(), {1, 2}, np.array([None])])
def test_what_cannot_be_told_from_its_like_is_refused(thing):
    with pytest.raises(TypeError, match="fingerprint"):
        fingerprint(thing)


def test_a_stamp_tells_files_apart(tmp_path):
    path = tmp_path / "a.fit"
    path.write_bytes(bytes(200_000))
    first = stamp_of(path)
    assert first.fits(path) and stamp_of(path) == first
    os.utime(path, ns=(0, first.mtime_ns + 1))
    assert not first.fits(path) and stamp_of(path) != first
    for at in (0, 199_999):  # with the very same size and time
        data = bytearray(200_000)
        data[at] = 1
        path.write_bytes(data)
        os.utime(path, ns=(0, first.mtime_ns))
        assert stamp_of(path) != first
    path.write_bytes(bytes(200_001))
    assert not first.fits(path)
    path.unlink()
    assert not first.fits(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.fit")
    assert stamp_of(tmp_path / "a.fit").content == ""


def test_the_code_version_follows_the_imports(monkeypatch):
    def sources(*modules: str) -> set[str]:
        seen: dict[str, str] = {}
        monkeypatch.setattr(cache_module, "fingerprint", lambda *parts: seen.update(parts[-1]) or "")
        code_version.__wrapped__(*modules)
        return {name.removeprefix("zemosaic.") for name in seen}

    assert {"measure", "stars", "calibrate", "frames", "headers", "unpack", "tiles"} <= sources("zemosaic.measure")
    stack = sources("zemosaic.stacking")
    assert {"stacking", "coadd", "combine", "rejection", "kernels", "warp", "levels", "frames"} <= stack
    assert not {"cli", "settings", "events", "cache", "product"} & stack


def test_every_module_that_measures_is_in_the_code_version():
    """What Python really imports for it, in a process of its own."""
    code = "import sys, zemosaic.measure; print(*(m for m in sys.modules if m.startswith('zemosaic.')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    seen: dict[str, str] = {}
    original, cache_module.fingerprint = cache_module.fingerprint, lambda *parts: seen.update(parts[-1]) or ""
    try:
        code_version.__wrapped__("zemosaic.measure")
    finally:
        cache_module.fingerprint = original
    assert set(done.stdout.split()) - cache_module._NO_NUMBERS <= set(seen)
    assert FrameMeasure.__module__ in seen


# --- the output folder ------------------------------------------------------------------------------------------


def test_one_run_at_a_time(tmp_path):
    with workplace(tmp_path), pytest.raises(WorkplaceError, match=rf"process {os.getpid()} on .* is at work"):
        workplace(tmp_path).__enter__()
    with workplace(tmp_path):
        pass


def test_a_lock_of_a_dead_process_is_none(tmp_path):
    (tmp_path / ".zemosaic").mkdir()
    (tmp_path / ".zemosaic" / "lock").write_text("")
    (tmp_path / ".zemosaic" / "running").write_text("process 1 on this machine")
    with workplace(tmp_path):
        pass


def test_a_folder_that_was_made_for_nothing_is_gone(tmp_path):
    with workplace(tmp_path / "out") as hidden:
        assert hidden.is_dir()
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    with workplace(tmp_path / "mine"):
        pass
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WorkplaceError, match=r"cannot be written to .*choose another output folder"):
        workplace(tmp_path / "file" / "out").__enter__()


def test_half_done_products_are_removed_and_whole_ones_stay(tmp_path):
    whole = {"M_sds.fits", "M_sds.png", "M_sds.toml", "M_sds_frames.csv"}
    others = {"mine.fits.part", "notes.png.part", "my_report.html.part"}
    killed_when_reporting = {"M_sds_report.html.part", "M_sds_report.json.part"}
    claim_not_given_back = {"M_sds.fits.part"}
    killed_when_publishing = {"M_sds_2.fits.part", "M_sds_2.png", "M_sds_2.toml.part", "M_sds_2_frames.csv.part"}
    for name in whole | others | claim_not_given_back | killed_when_publishing | killed_when_reporting:
        (tmp_path / name).touch()
    with workplace(tmp_path):
        pass
    assert {p.name for p in tmp_path.iterdir()} == whole | others


def test_the_files_of_a_product_are_known():
    assert len(PRODUCT_ENDINGS) == len(fields(ProductPaths))


def test_master_tiles_of_a_killed_run_are_removed(tmp_path):
    for folder, marked in (("master_tiles", False), ("master_tiles_2", True)):
        (tmp_path / folder).mkdir()
        for name in ("master_tile_0001.fits", "master_tile_0002.fits.part", "notes.txt")[: 2 if marked else 3]:
            (tmp_path / folder / name).touch()
        if marked:
            (tmp_path / folder / UNFINISHED).touch()
    with workplace(tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["master_tiles"]
    assert len(list((tmp_path / "master_tiles").iterdir())) == 3


@pytest.mark.parametrize("elsewhere", [False, True])
def test_scratch_files_of_a_killed_run_are_removed_and_no_other(tmp_path, elsewhere):
    shared = tmp_path / "scratch"
    shared.mkdir()
    mine, other = (scratch_folder(str(shared) if elsewhere else "", tmp_path / name) for name in ("out", "other"))
    for folder in (mine, other):
        folder.mkdir(parents=True)
        (folder / "0.npy").touch()
    with workplace(tmp_path / "out", mine):
        assert not mine.exists()
    assert (other / "0.npy").exists()


def test_clean_removes_what_is_kept_and_nothing_else(tmp_path):
    (tmp_path / "M_sds.fits").touch()
    with workplace(tmp_path) as hidden:
        Cache(hidden / "results", ROOM).put("tiles", "k", block(1))
        with pytest.raises(WorkplaceError, match="at work"):
            remove_results(tmp_path)
    assert remove_results(tmp_path) > 2**20
    assert [p.name for p in tmp_path.iterdir()] == ["M_sds.fits"]
    assert remove_results(tmp_path) == 0


def test_a_lock_from_elsewhere_counts(tmp_path):
    (tmp_path / workplace_module.HIDDEN).mkdir()
    with FileLock(tmp_path / workplace_module.HIDDEN / "lock"), pytest.raises(WorkplaceError, match="another run is"):
        workplace(tmp_path).__enter__()
