"""Work over cores: the same results in the same order, errors at their place, and no thread left running."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import cv2
import psutil
import pytest
from threadpoolctl import threadpool_info

from zemosaic import execute
from zemosaic.execute import (
    PROCESS_BYTES,
    elsewhere,
    memory_budget,
    one_thread_each,
    side_by_side,
    thread_map,
    worker_count,
)
from zemosaic.frames import FrameError

WORKERS = pytest.mark.parametrize("workers", [0, 1, 2, 5])


def test_a_requested_number_of_workers_is_taken_as_it_is():
    assert [worker_count(n) for n in (1, 3, 64)] == [1, 3, 64]


@pytest.mark.parametrize("requested", [0, -1])
def test_otherwise_every_core_this_process_may_use(requested, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert worker_count(requested) == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert worker_count(requested) == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert worker_count(requested) == 1


# --- threads ---------------------------------------------------------------------------------------------


@WORKERS
def test_results_come_in_the_order_of_the_items(workers):
    def work(i: int) -> int:
        time.sleep(0.002 * (i % 3))  # later items are done first
        return i * i

    assert list(thread_map(work, range(30), workers)) == [i * i for i in range(30)]


@WORKERS
def test_calls_side_by_side_give_their_results_and_errors(workers):
    with side_by_side(workers) as start:
        there = start(threading.get_ident).result()
        assert start(divmod, 17, 5).result() == (3, 2)
        with pytest.raises(ZeroDivisionError):
            start(divmod, 1, 0).result()
    assert (there == threading.get_ident()) == (workers <= 1)


@WORKERS
def test_no_items_no_results(workers):
    assert list(thread_map(str, [], workers)) == []


def test_work_really_runs_side_by_side():
    meeting = threading.Barrier(3, timeout=5)  # breaks unless three are there at once
    assert sorted(thread_map(lambda _: meeting.wait(), range(3), 3)) == [0, 1, 2]


def test_a_single_worker_stays_in_this_thread():
    assert set(thread_map(lambda _: threading.get_ident(), range(5), 1)) == {threading.get_ident()}


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_no_more_than_twice_the_workers_is_taken_ahead_of_the_consumer(workers):
    """What is done but not yet fetched is memory."""
    taken = []

    def items() -> Iterator[int]:
        for i in range(100):
            taken.append(i)
            yield i

    results = thread_map(str, items(), workers)
    for fetched in range(1, 20):
        next(results)
        assert len(taken) <= fetched + 2 * workers
    results.close()  # type: ignore[attr-defined]


class Failure(Exception):
    pass


@WORKERS
def test_an_error_is_raised_at_its_place_and_little_else_is_started(workers):
    started = []

    def work(i: int) -> int:
        started.append(i)
        if i == 10:
            raise Failure("at item 10")
        if i > 10:
            time.sleep(0.03)
        return i

    got: list[int] = []
    with pytest.raises(Failure, match="at item 10"):
        got.extend(thread_map(work, range(1000), workers))
    assert got == list(range(10))
    assert len(started) <= 11 + workers  # what was running when the error came
    after = len(started)
    time.sleep(0.02)
    assert len(started) == after  # nothing goes on behind our back


@WORKERS
def test_an_error_of_the_items_themselves_is_raised_too(workers):
    def items() -> Iterator[int]:
        yield from range(3)
        raise Failure("no more items")

    with pytest.raises(Failure, match="no more items"):
        list(thread_map(str, items(), workers))


@pytest.mark.parametrize("workers", [1, 3])
def test_whoever_stops_fetching_stops_the_work(workers):
    before, started = threading.active_count(), []

    def work(i: int) -> int:
        started.append(i)
        return i

    results = thread_map(work, range(1000), workers)
    assert [next(results) for _ in range(5)] == list(range(5))
    results.close()  # type: ignore[attr-defined]
    assert len(started) <= 5 + 2 * workers
    assert threading.active_count() == before


# --- other people's threads ------------------------------------------------------------------------------


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info()}


@pytest.mark.parametrize("fails", [False, True])
def test_libraries_use_one_thread_each_and_afterwards_what_they_used_before(fails):
    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    pools = blas_threads()
    try:
        with one_thread_each():
            assert cv2.getNumThreads() == 1
            assert blas_threads() <= {1}
            if fails:
                raise Failure
    except Failure:
        assert fails
    try:
        assert cv2.getNumThreads() == 3
        assert blas_threads() == pools
    finally:
        cv2.setNumThreads(before)


# --- processes ------------------------------------------------------------------------------------------

ROOM = 1 << 40  # bytes


def where(item: int, *, offset: int) -> tuple[int, int]:
    time.sleep(0.1)  # long enough for another to be asked meanwhile
    return item + offset, os.getpid()


def refuse(item: int) -> None:
    raise FrameError(f"number {item} is no good", Path(f"{item}.fit"))


def die_away_from(home: int, item: int) -> int:
    time.sleep(0.1)
    if os.getpid() != home:
        os._exit(9)
    return -item


def pinned(_: int) -> tuple[int, int, set[int]]:
    time.sleep(0.1)
    return os.getpid(), cv2.getNumThreads(), {library["num_threads"] for library in threadpool_info()}


@pytest.fixture
def worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "_WORTH", 5)


@pytest.mark.usefixtures("worth_it")
def test_many_calls_are_made_here_and_in_other_processes_and_come_back_in_order():
    with elsewhere(partial(where, offset=100), 2, 8, ROOM) as (call, threads):
        made = list(thread_map(call, range(8), threads))
    assert [value for value, _ in made] == list(range(100, 108))
    assert len({process for _, process in made}) == 2 and os.getpid() in {process for _, process in made}


@pytest.mark.usefixtures("worth_it")
@pytest.mark.parametrize(("workers", "calls", "budget"), [(1, 8, ROOM), (2, 4, ROOM), (2, 8, PROCESS_BYTES)])
def test_few_calls_one_worker_or_little_memory_stay_in_this_process(workers, calls, budget):
    with elsewhere(refuse, workers, calls, budget) as (call, _):
        assert call is refuse


@pytest.mark.usefixtures("worth_it")
def test_what_a_call_raises_there_is_raised_here():
    with (
        elsewhere(refuse, 2, 8, ROOM) as (call, _),
        pytest.raises(FrameError, match="number 3 is no good") as caught,
    ):
        call(3)
    assert caught.value.path == Path("3.fit")


@pytest.mark.usefixtures("worth_it")
def test_where_processes_are_killed_the_work_is_done_here():
    with elsewhere(partial(die_away_from, os.getpid()), 2, 8, ROOM) as (call, _):
        assert list(thread_map(call, range(8), 3)) == [-i for i in range(8)]


@pytest.mark.usefixtures("worth_it")
def test_every_process_keeps_to_one_thread():
    with elsewhere(pinned, 2, 8, ROOM) as (call, _):
        made = [threads for process, *threads in thread_map(call, range(8), 3) if process != os.getpid()]
    assert made and made == [[1, {1}]] * len(made)


def test_the_memory_a_run_may_use():
    assert memory_budget(1.5) == 3 << 29
    assert 0 < memory_budget() < 0.7 * psutil.virtual_memory().total
