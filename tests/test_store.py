"""Where large arrays live: within the budget in memory, beyond it in scratch files that are gone afterwards."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

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
        assert [isinstance(array, np.memmap) for array in kept] == [False, False, True, True, True]
        assert len(scratch_files(tmp_path)) == 3
        for i, array in enumerate(kept):
            assert array.dtype == np.float32 and (array == i).all()
    assert list(tmp_path.iterdir()) == []


def test_what_still_fits_stays_in_memory_even_after_something_did_not(tmp_path):
    with ArrayStore(2 * MEGABYTE, tmp_path) as store:
        assert isinstance(store.keep(block(1, 3)), np.memmap)
        small = block(2, 1.5)
        assert store.keep(small) is small
        assert isinstance(store.keep(block(3)), np.memmap)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24.0).reshape(2, 3, 4),
        np.asfortranarray(np.arange(12, dtype=np.uint8).reshape(3, 4)),
        np.arange(100, dtype=np.int64)[::7],
        np.array([np.nan, 1, np.inf], np.float32),
    ],
)
def test_a_mapped_copy_is_the_same_array_and_can_be_written_to(tmp_path, array):
    with ArrayStore(0, tmp_path) as store:
        kept = store.keep(array)
        assert isinstance(kept, np.memmap)
        assert kept.shape == array.shape and kept.dtype == array.dtype
        np.testing.assert_array_equal(kept, array)
        before = array.copy()
        kept[...] = 1
        np.testing.assert_array_equal(array, before)


def test_an_empty_array_needs_no_room(tmp_path):
    with ArrayStore(0, tmp_path) as store:
        assert store.keep(np.zeros((0, 3), np.float32)).shape == (0, 3)
        assert scratch_files(tmp_path) == []


def test_released_arrays_are_read_back_with_what_was_written_to_them(tmp_path):
    with ArrayStore(MEGABYTE, tmp_path) as store:
        in_memory, mapped = store.keep(block(1)), store.keep(block(2))
        mapped[::2] = 7
        store.release()
        assert (in_memory == 1).all()
        assert (mapped[::2] == 7).all() and (mapped[1::2] == 2).all()


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
        assert sum(isinstance(array, np.memmap) for array in kept) == 20
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
