"""Spread work over this machine's cores; the results come back in order, whatever the number of workers."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import cv2
import psutil
from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Result = TypeVar("Result")

PROCESS_BYTES = 300 << 20  # of a process with the libraries and one frame
PROCESS_SECONDS = 1.1  # of processor time until it has loaded them

_WORTH = 150  # calls from which it pays to start processes
_PROCESS_SHARE = 0.5  # of the memory of the run, that they may take
_MEMORY_SHARE = 0.6  # of the free memory, for a run without a limit
_IDLE = 20.0  # s after which a process ends that is asked for nothing, as when this one was killed

_function: Callable[..., Any]  # what a process of `elsewhere` calls


def worker_count(requested: int) -> int:
    """Number of workers to use: `requested`, or every core this process may run on if that is <= 0."""
    if requested > 0:
        return requested
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_map(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int | None = None
) -> Iterator[Result]:
    """``map(work, items)`` on threads, at most `ahead` items (``2 * workers``) before the consumer.

    NumPy, OpenCV and our kernels release the interpreter's lock for the heavy part, and threads share the frames they
    work on.
    An exception in `work` is raised here, at its item's place, and nothing further is started.
    """
    ahead = ahead or 2 * workers
    if workers <= 1:
        yield from map(work, items)
        return
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def side_by_side(workers: int) -> Iterator[Callable[..., Future[Any]]]:
    """What starts a call and gives its `Future`: on threads, or here and at once if there is only one worker.

    For one worker no thread is started: where memory is used up, a thread may die before it has begun, and Python waits
    for it for ever.
    """
    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            yield pool.submit
        return

    def call(function: Callable[..., Any], *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*args))
        return done

    yield call


def memory_budget(limit_gb: float | None = None) -> int:
    """Bytes a run may use: the limit (GB, 2^30 bytes), or 60 % of what is free now."""
    return int(limit_gb * 2**30 if limit_gb else _MEMORY_SHARE * psutil.virtual_memory().available)


def return_freed_memory() -> None:
    """Give freed memory back to the system: glibc keeps the room of small arrays for others that may never come."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def processes(workers: int, calls: int, budget: int) -> int:
    """How many processes `elsewhere` starts for so many calls: one fewer than workers, or none."""
    fits = (workers - 1) * PROCESS_BYTES <= _PROCESS_SHARE * budget
    return workers - 1 if calls >= _WORTH and fits else 0


@contextmanager
def elsewhere(
    function: Callable[..., Result], workers: int, calls: int, budget: int
) -> Iterator[tuple[Callable[..., Result], int]]:
    """A function that is called in other processes, too, where that pays: for what keeps the interpreter's lock.

    Each thread that calls it waits for its own result; one at a time does the work itself, so that nothing waits for
    the processes to start.

    Parameters
    ----------
    function : callable
        Together with what is bound to it, it is sent once; its arguments and results, or what it raises, with each
        call. All must be picklable.
    workers : int
        Of the run; how many of them are `processes` depends on the rest.
    calls : int
        How many are to be expected.
    budget : int
        Bytes the run may use.

    Yields
    ------
    callable
        The same function, or a stand-in for it.
    int
        On how many threads to call it: one more than workers if there are processes, so that none of those waits
        while a result is taken in.
    """
    helpers = processes(workers, calls, budget)
    if not helpers:
        yield function, workers
        return
    from loky import ProcessPoolExecutor  # needs no ``if __name__ == "__main__"`` in the user's script

    here = threading.Lock()

    def call(*args: Any, **named: Any) -> Result:
        if here.acquire(blocking=False):
            try:
                return function(*args, **named)
            finally:
                here.release()
        try:
            made: Result = pool.submit(_call, *args, **named).result()
        except BrokenExecutor:  # a process was killed, as the system does where memory is short: then here
            return function(*args, **named)
        return made

    with ProcessPoolExecutor(helpers, timeout=_IDLE, initializer=_begin, initargs=(function,)) as pool:
        pool.submit(int)  # so that they are all started, while the caller may have something else to do
        yield call, workers + 1


def _begin(function: Callable[..., Any]) -> None:
    """Make a new process ready."""
    global _function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends its processes
    cv2.setNumThreads(1)
    threadpool_limits(limits=1)
    _function = function


def _call(*args: Any, **named: Any) -> Any:
    return _function(*args, **named)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Keep OpenCV's and BLAS's own threads out of the way of ours, for the length of a run."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        cv2.setNumThreads(before)
