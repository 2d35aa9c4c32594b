"""Lots of the SDS route on a Dask cluster that runs already.

One lot is one task: a worker reads the raw frames itself, from a folder that it shares with this machine, and gives
back the finished stack. To a worker travel the numbers of the lot's frames (`Sub`, without pixels) and once the master
frames; prepared frames never travel. Here every stack is fetched on its own, as soon as it is finished, and handed on,
so that neither this machine nor a worker ever holds more than a few.

Nothing else of the project imports this module unless the setting ``scheduler`` is set.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import logging
import pickle
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as NotInTime
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import psutil
from numpy.typing import NDArray

from zemosaic import __version__
from zemosaic.cache import Stamp, code_version, fingerprint, stamp_of
from zemosaic.calibrate import Calibration
from zemosaic.coadd import Sub
from zemosaic.events import Event, Events
from zemosaic.execute import one_thread_each
from zemosaic.resume import Steps, go_on
from zemosaic.settings import Settings
from zemosaic.stacking import Stack, stack_subs

if TYPE_CHECKING:
    from distributed import Client, Worker
    from distributed import Future as Promise

_IN_FLIGHT = 2  # lots a worker: one that it makes, and one that is on its way or waits to be fetched
_RETRIES = 2  # for a lot that fails; one whose worker dies is made elsewhere anyway, as often as the cluster allows
_POLL = 0.5  # seconds between two looks at the cluster and at the wish to stop
_MEMORY_SHARE = 0.6  # of a worker's memory, as of this machine's in a local run
_LIBRARIES = ("numpy", "scipy", "astropy", "sep", "numba", "llvmlite")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_MESSAGES = ("info", "detail", "warning", "error")
_LOST_TOUCH = (OSError, NotInTime, TimeoutError, CancelledError)
_GO_ON = "Finished lots are kept (unless resume is off): run again and it goes on from them, without --scheduler too"


class ClusterError(ConnectionError):
    """The cluster cannot be reached or cannot do the work; the message says why and what to do."""


@dataclass(frozen=True)
class Order:
    """What a worker needs to stack some frames; picklable, without pixels.

    Parameters
    ----------
    subs : tuple of Sub
        The frames, by absolute paths.
    stamps : tuple of (Stamp or None)
        What their files are like here.
    sky : ndarray
        ``(C,)`` common sky level after adjustment, ADU.
    settings : Settings
        Of the run.
    versions : mapping
        `versions` here.
    """

    subs: tuple[Sub, ...]
    stamps: tuple[Stamp | None, ...]
    sky: NDArray[np.float64]
    settings: Settings
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    """What a worker gives back.

    Parameters
    ----------
    stack : Stack
        Frames are counted within the order.
    unlike : tuple of int
        Frames whose files are not there, or are not what the order says.
    said : tuple of Event
        What there was to say.
    seconds : float
        Time it took.
    worker : str
        Address of who made it.
    """

    stack: Stack
    unlike: tuple[int, ...]
    said: tuple[Event, ...]
    seconds: float
    worker: str


# --- on a worker --------------------------------------------------------------------------------------------------

# One lot at a time in a process: it takes all of its threads, and its memory.
_turn = threading.Lock()


def stack_order(order: Order, calibration: Calibration) -> Answer:
    """Stack frames; runs on a worker, with as many threads and as much memory as that has.

    Raises
    ------
    ClusterError
        If the worker's code or libraries are not those of the machine that gave the order.
    zemosaic.events.Cancelled
        If the lot is no longer wanted.
    """
    from distributed import get_worker

    worker = get_worker()
    other = difference(order.versions, versions())
    if other:
        raise ClusterError(_OTHER_VERSIONS.format(worker=worker.address, other=other))
    keep_freed_memory()
    said: list[Event] = []
    events = Events(said.append, order.settings.language, _unwanted(worker))
    with _turn, one_thread_each():
        start = time.perf_counter()
        stack = stack_subs(
            range(len(order.subs)),
            order.subs,
            order.sky,
            calibration,
            order.settings,
            events,
            room=room_of(worker.memory_manager.memory_limit),
            workers=worker.state.nthreads,
        )
        seconds = time.perf_counter() - start
    # Afterwards, because files may vanish meanwhile.
    unlike = [not is_like(s.frame.path, stamp) for s, stamp in zip(order.subs, order.stamps, strict=True)]
    return Answer(stack, tuple(np.flatnonzero(unlike).tolist()), tuple(said), seconds, worker.address)


def room_of(limit: int | None) -> int:
    """Bytes that prepared pixels may take on a worker with this memory limit, as in a local run with that memory."""
    return int(_MEMORY_SHARE * (limit or psutil.virtual_memory().available)) // 4


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for what is allocated next.

    Dask starts workers with ``MALLOC_TRIM_THRESHOLD_``, and then glibc asks the system for every array anew: a lot of
    ten Seestar frames has 220,000 page faults in place of 2,000, and takes nearly twice the processor time. The
    limits set here are those that glibc comes to by itself in a program that uses large arrays.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library, which has no such habit
        set_option = ctypes.CDLL(None).mallopt
        set_option(_M_MMAP_THRESHOLD, 32 << 20)
        set_option(_M_TRIM_THRESHOLD, 64 << 20)


def is_like(path: Path, stamp: Stamp | None) -> bool:
    """Whether a file is there with the size and content of a stamp; times are not told alike by all file servers."""
    found = stamp_of(path)
    return found.size >= 0 and (stamp is None or (found.size, found.content) == (stamp.size, stamp.content))


def versions() -> dict[str, str]:
    """What must be the same everywhere for the same bytes: program, libraries, and the code itself."""
    libraries = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    code = code_version("zemosaic.stacking", "zemosaic.remote")
    return {"zemosaic": __version__, **libraries, "OpenCV": cv2.__version__, "code": code}


def difference(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """In words, what a worker has that is not as here; empty if there is nothing."""
    other = [name for name in here if there.get(name) != here[name]]
    named = [f"{name} {there.get(name, 'none')} instead of {here[name]}" for name in other if name != "code"]
    return ", ".join(named) or ("another state of zemosaic's code" if other else "")


def _task() -> Callable[[bytes, bytes], Answer]:
    """`stack_order` of what was pickled.

    The scheduler unpickles all tasks. As a function within a function goes by value, and its arguments are bytes, the
    scheduler need not have this program, nor stand still for the seconds that it takes to load.
    """

    def zemosaic_lot(order: bytes, calibration: bytes) -> Answer:
        from zemosaic.remote import stack_order

        return stack_order(pickle.loads(order), pickle.loads(calibration))

    return zemosaic_lot


def _unwanted(worker: Worker) -> Callable[[], bool]:
    """Whether the task that asks has been cancelled: Dask itself lets a task that has begun run to its end."""
    key, tasks = worker.get_current_task(), worker.state.tasks
    return lambda: getattr(tasks.get(key), "state", "") == "cancelled"


_OTHER_VERSIONS = "worker {worker} has {other}: install the same zemosaic and libraries on all machines"


# --- here ---------------------------------------------------------------------------------------------------------


@contextmanager
def remote_lots(settings: Settings, events: Events) -> Iterator[RemoteLots]:
    """Connect to the cluster of the setting ``scheduler`` for the length of a run.

    Raises
    ------
    ClusterError
        Dask is not installed, nobody answers, there is no worker, or one with other versions.
    """
    try:
        import dask
        from distributed import Client
    except ImportError as problem:
        raise ClusterError(
            f"a cluster needs Dask ({problem}): install it with  pip install 'zemosaic[distributed]'"
        ) from problem
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # what it has to say is said in a sentence here
    address, patience = settings.scheduler, settings.scheduler_timeout_s
    # Large masters are given to the scheduler on purpose: see `RemoteLots._masters`.
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 GB"}):
        try:
            client = Client(address, timeout=patience, set_as_default=False)
        except (*_LOST_TOUCH, ValueError) as problem:
            raise ClusterError(
                f"no Dask scheduler answers at {address} within {patience:g} s: check that it runs, its address "
                "(tcp://HOST:8786) and the firewall"
            ) from problem
        with client:
            yield RemoteLots(client, address, patience, events)


class RemoteLots:
    """Stacks lots on the workers of a cluster.

    Parameters
    ----------
    client : distributed.Client
        Connected.
    address : str
        Of the scheduler, as the user calls it.
    patience : float
        Seconds to wait for a worker while there is none.
    events : Events
        Hears what workers say and what becomes of them; asked for a wish to stop.

    Raises
    ------
    ClusterError
        There is no worker, or one with other versions.
    """

    def __init__(self, client: Client, address: str, patience: float, events: Events) -> None:
        self._client, self._address, self._patience, self._events = client, address, patience, events
        self._known: set[str] = set()
        self._versions = versions()
        threads = self._workers()
        self._compare_versions()
        events.info("cluster_connected", address=address, workers=len(threads), threads=sum(threads.values()))

    def stacks(
        self,
        lots: Sequence[Steps],
        subs: Sequence[Sub],
        sky: NDArray[np.float64],
        calibration: Calibration,
        settings: Settings,
        stamps: Mapping[Path, Stamp],
    ) -> Iterator[tuple[int, Stack, float]]:
        """Stack every lot, on a worker or from what earlier runs have kept.

        Parameters
        ----------
        lots : sequence of Steps
            Of every lot; see `zemosaic.resume.Results.steps`.
        subs : sequence of Sub
            All frames of the run.
        sky, calibration, settings
            As `stack_subs` takes them.
        stamps : mapping
            File → what it is like here.

        Yields
        ------
        index : int
            Which of `lots`; they come as they are finished.
        stack : Stack
            Frames are counted within `subs`.
        seconds : float
            Time it took, on the worker.

        Raises
        ------
        ClusterError
            The cluster has gone, has no worker any more, or a worker does not see the frames.
        zemosaic.events.Cancelled
            The run was asked to stop. What was under way is cancelled, as by every other end.
        """
        masters = self._masters(calibration)
        waiting = deque(range(len(lots)))
        flying: dict[Promise, tuple[int, list[int], str]] = {}
        arrived: queue.SimpleQueue[Promise] = queue.SimpleQueue()

        def send(index: int, members: list[int]) -> None:
            order = pickle.dumps(_order([subs[i] for i in members], sky, settings, stamps, self._versions))
            load = Counter(worker for _, _, worker in flying.values())
            to = min(self._workers(), key=lambda worker: load[worker])
            with self._in_touch():
                promise = self._client.submit(
                    _task(), order, masters, pure=False, workers=[to], allow_other_workers=True, retries=_RETRIES
                )
            flying[promise] = index, members, to
            promise.add_done_callback(arrived.put)

        try:
            while waiting or flying:
                index, made, seconds = -1, None, 0.0
                if waiting and len(flying) < _IN_FLIGHT * len(self._workers()):
                    index = waiting.popleft()
                else:
                    try:
                        promise = arrived.get(timeout=_POLL)
                    except queue.Empty:
                        self._workers()
                        continue
                    index, members, _ = flying.pop(promise)
                    made, seconds = self._accept(promise, members, subs, stamps)
                    del promise  # the worker may forget it
                asked = go_on(lots[index], made)
                del made
                if isinstance(asked, Stack):
                    yield index, asked, seconds
                    del asked  # before the next one is fetched
                else:
                    send(index, asked)
        finally:
            with contextlib.suppress(*_LOST_TOUCH):
                self._client.cancel(list(flying))

    def _masters(self, calibration: Calibration) -> bytes | Promise:
        """The master frames, pickled, for all workers.

        A task that only hands them on, and not scattered data, because that is lost with the workers that hold it.
        """
        packed = pickle.dumps(calibration)
        if calibration.dark is None and calibration.flat is None:
            return packed
        with self._in_touch():
            return self._client.submit(bytes, packed, key=f"zemosaic-masters-{fingerprint(calibration)}")

    def _accept(
        self, promise: Promise, members: Sequence[int], subs: Sequence[Sub], stamps: Mapping[Path, Stamp]
    ) -> tuple[Stack, float]:
        """Fetch what a worker has finished, say what it said, and count its frames as they are counted here."""
        answer = self._fetch(promise)
        for i in answer.unlike:
            path = subs[members[i]].frame.path
            if is_like(path, stamps.get(path)):
                raise ClusterError(
                    f"worker {answer.worker} does not see {path.absolute()} as it is here: the folder must be shared "
                    "with all workers, under the same path"
                )
        for event in answer.said:
            if event.kind in _MESSAGES:
                getattr(self._events, event.kind)(event.key, **event.values)
        stack = answer.stack
        used, rejected, lost = (
            {members[i]: value for i, value in counts.items()} for counts in (stack.used, stack.rejected, stack.lost)
        )
        return Stack(stack.tile, used, rejected, lost), answer.seconds  # type: ignore[arg-type]

    def _fetch(self, promise: Promise) -> Answer:
        """The answer of a task that has ended."""
        # In a thread, because its worker may die just now: then the lot is made again, and meanwhile the run may stop.
        pool = ThreadPoolExecutor(1)
        fetched: Future[Answer] = pool.submit(promise.result)
        pool.shutdown(wait=False)
        while not fetched.done():
            wait([fetched], timeout=_POLL)
            self._workers()
        problem = fetched.exception()
        if problem is None:
            return fetched.result()
        if promise.status == "error":
            raise _explained(problem) from problem
        raise self._gone() from problem

    def _workers(self) -> dict[str, int]:
        """Address and threads of every worker; waits for the first. Also the moment to hear a wish to stop."""
        until = time.monotonic() + self._patience
        while True:
            self._events.check_stop()
            with self._in_touch():
                found: dict[str, int] = self._client.nthreads()
            lost = self._known - found.keys()
            self._known = set(found)
            if lost:
                self._events.warning("cluster_workers_lost", workers=", ".join(sorted(lost)), left=len(found))
            if found:
                return found
            if time.monotonic() > until:
                raise ClusterError(
                    f"the Dask cluster at {self._address} has had no worker for {self._patience:g} s: start one with  "
                    f"dask worker {self._address}  (scheduler_timeout_s says how long to wait). {_GO_ON}"
                )
            time.sleep(_POLL)

    def _compare_versions(self) -> None:
        """See that every worker has the zemosaic and the libraries that are here."""
        with self._in_touch():
            told = self._client.run(versions, on_error="return")
        for worker, there in told.items():
            if isinstance(there, OSError):
                continue  # it has just gone
            if isinstance(there, Exception):
                raise ClusterError(f"worker {worker} has no zemosaic {__version__} ({there}): install it there")
            if other := difference(self._versions, there):
                raise ClusterError(_OTHER_VERSIONS.format(worker=worker, other=other))

    @contextmanager
    def _in_touch(self) -> Iterator[None]:
        try:
            yield
        except _LOST_TOUCH as problem:
            raise self._gone() from problem

    def _gone(self) -> ClusterError:
        return ClusterError(f"the Dask scheduler at {self._address} does not answer any more. {_GO_ON}")


def _order(
    subs: Sequence[Sub],
    sky: NDArray[np.float64],
    settings: Settings,
    stamps: Mapping[Path, Stamp],
    versions: Mapping[str, str],
) -> Order:
    known = tuple(stamps.get(sub.frame.path) for sub in subs)
    # Without their WCS, which has done its work; by absolute paths, because a worker runs in a folder of its own.
    bare = tuple(replace(s, frame=replace(s.frame, path=s.frame.path.absolute(), wcs=None)) for s in subs)
    return Order(bare, known, sky, settings, versions)


def _explained(problem: BaseException) -> BaseException:
    """A failure of a lot, in words where the cluster is to blame."""
    from distributed import KilledWorker

    if isinstance(problem, KilledWorker):
        return ClusterError(
            f"a lot has ended {problem.allowed_failures + 1} workers, for lack of memory most likely: start workers "
            f"with more of it (--memory-limit), or make smaller lots (sds_target_batch_size). {_GO_ON}"
        )
    if isinstance(problem, ImportError):
        return ClusterError(f"the cluster has no zemosaic {__version__} ({problem}): install it on all its machines")
    return problem
