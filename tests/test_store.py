"""Where large arrays live: within the budget in memory, beyond it in scratch files that are gone afterwards."""

from __future__ import annotations

import gc
import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from zemosaic.mapping import is_mapped
from zemosaic.store import ArrayStore

MEGABYTE = 2**20


def block(value: float, megabytes: float = 1.0) -> np.ndarray:
    return np.full(int(megabytes * MEGABYTE / 4), value, np.float32)


def scratch_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_within_the_budget_arrays_are_kept_as_they_are(tmp_path):
    with ArrayStore(3 * MEGABYTE, tmp_path) as store:
        arrays = [block(i) for i in range(3)]  # to the last byte
        assert all(store.keep(array) is array for array in arrays)
        assert scratch_files(tmp_path) == []


def test_beyond_the_budget_arrays_are_mapped_from_files(tmp_path):
    with ArrayStore(2 * MEGABYTE, tmp_path) as store:
        kept = [store.keep(block(i)) for i in range(5)]
        assert [is_mapped(array) for array in kept] == [False, False, True, True, True]
        assert len(scratch_files(tmp_path)) == 3
        for i, array in enumerate(kept):
            assert array.dtype == np.float32 and (array == i).all()
    assert list(tmp_path.iterdir()) == []


def test_what_still_fits_stays_in_memory_even_after_something_did_not(tmp_path):
    with ArrayStore(2 * MEGABYTE, tmp_path) as store:
        assert is_mapped(store.keep(block(1, 3)))
        small = block(2, 1.5)
        assert store.keep(small) is small
        assert is_mapped(store.keep(block(3)))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24.0).reshape(2, 3, 4),
        np.asfortranarray(np.arange(12, dtype=np.uint8).reshape(3, 4)),
        np.arange(100, dtype=np.int64)[::7],
        np.array([np.nan, 1, np.inf], np.float32),
    ],
)
def test_a_mapped_copy_is_the_same_array(tmp_path, array):
    with ArrayStore(0, tmp_path) as store:
        kept = store.keep(array)
        assert is_mapped(kept)
        assert kept.shape == array.shape and kept.dtype == array.dtype
        np.testing.assert_array_equal(kept, array)
        with pytest.raises(ValueError, match="read-only"):
            kept[...] = 1


def test_an_empty_array_needs_no_room(tmp_path):
    with ArrayStore(0, tmp_path) as store:
        assert store.keep(np.zeros((0, 3), np.float32)).shape == (0, 3)
        assert scratch_files(tmp_path) == []


def test_released_arrays_are_read_back(tmp_path):
    with ArrayStore(MEGABYTE, tmp_path) as store:
        in_memory, mapped = store.keep(block(1)), store.keep(block(2))
        store.release()
        assert (in_memory == 1).all() and (mapped == 2).all()


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="this system lets go of mapped memory by itself")
def test_release_gives_the_memory_back(tmp_path):
    with ArrayStore(0, tmp_path) as store:
        mapped = store.keep(np.ones(8 * MEGABYTE, np.float32))  # 32 MB
        assert mapped.sum() == mapped.size  # looked at, it takes memory
        before = psutil.Process().memory_info().rss
        store.release()
        assert before - psutil.Process().memory_info().rss > 24 * MEGABYTE
        assert (mapped == 1).all()


def test_clear_forgets_all_and_frees_the_budget(tmp_path):
    with ArrayStore(2 * MEGABYTE, tmp_path) as store:
        for i in range(4):
            store.keep(block(i))
        store.clear()
        assert list(tmp_path.iterdir()) == []
        again = [block(i) for i in range(2)]
        assert all(store.keep(array) is array for array in again)
        assert (store.keep(block(9)) == 9).all()
        assert len(scratch_files(tmp_path)) == 1


def test_files_are_removed_when_the_run_fails(tmp_path):
    def fail() -> None:
        with ArrayStore(0, tmp_path) as store:
            store.keep(block(1))
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_closing_twice_or_unused_is_harmless(tmp_path):
    store = ArrayStore(0, tmp_path)
    store.close()
    store.keep(block(1))
    store.close()
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_threads_share_one_budget(tmp_path):
    arrays = [block(i, 0.25) for i in range(40)]
    with ArrayStore(5 * MEGABYTE, tmp_path) as store, ThreadPoolExecutor(8) as pool:
        kept = list(pool.map(store.keep, arrays))
        assert sum(is_mapped(array) for array in kept) == 20
        assert all((array == i).all() for i, array in enumerate(kept))


def test_a_folder_that_cannot_be_written_to_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with ArrayStore(0, tmp_path / "file") as store, pytest.raises(OSError, match="file"):
        store.keep(block(1))


def test_without_a_folder_the_systems_own_is_used_and_left_clean(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with ArrayStore(0) as store:
        store.keep(block(1))
        assert len(scratch_files(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted on Linux")
def test_a_thousand_mapped_arrays_keep_no_file_open(tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    with ArrayStore(0, tmp_path) as store:
        kept = [store.keep(np.full(10, i, np.int16)) for i in range(1000)]
        assert len(list(Path("/proc/self/fd").iterdir())) < before + 10
        store.release()
        assert [int(array[3]) for array in kept] == list(range(1000))


def test_what_is_computed_from_a_mapped_array_is_not_mapped(tmp_path):
    with ArrayStore(0, tmp_path) as store:
        kept = store.keep(np.arange(12.0).reshape(3, 4))
        assert is_mapped(kept[1:, ::2]) and is_mapped(kept.T)
        assert not any(is_mapped(made) for made in (kept + 1, kept.copy(), kept[[0, 2]], kept.sum(axis=0)))


def test_a_view_outlives_the_array_that_it_was_cut_from(tmp_path):
    with ArrayStore(0, tmp_path) as store:
        view = store.keep(np.arange(100_000.0))[10:20]
        gc.collect()
        np.testing.assert_array_equal(view, np.arange(10.0, 20.0))
