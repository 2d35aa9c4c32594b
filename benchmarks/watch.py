"""Run a program and watch what it and its children use: processor time, memory, open files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

INTERVAL = 0.1  # seconds between two looks


class Watched(NamedTuple):
    """What a program took.

    Parameters
    ----------
    cpu, wall : float
        Seconds: of processor time, user and system, children that were waited for included; and on the clock.
    memory : int
        Bytes of resident memory of all its processes at their peak; pages of mapped files count.
    files : int
        File descriptors of all its processes, at most.
    output : str
        What it wrote to stdout.
    """

    cpu: float
    wall: float
    memory: int
    files: int
    output: str

    @property
    def busy(self) -> float:
        """Share of this machine's cores that it kept busy; other work on the machine lowers it."""
        return self.cpu / self.wall / len(os.sched_getaffinity(0))


def watch(command: Sequence[str]) -> Watched:
    """Run a program to its end; its failure ends this one."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:  # thousands of warnings are nothing for a table
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
        found = {"memory": 0, "files": 0}
        done = threading.Event()
        watcher = threading.Thread(target=_look, args=(process.pid, found, done))
        watcher.start()
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        done.set()
        watcher.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)} ended with status {process.returncode}\n{said.read()[-2000:]}")
    # Between two looks the largest process may have been larger. ru_maxrss is in kilobytes, on macOS in bytes.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Watched(usage.ru_utime + usage.ru_stime, wall, max(peak, found["memory"]), found["files"], output)


def _look(pid: int, found: dict[str, int], done: threading.Event) -> None:
    while not done.wait(INTERVAL):
        try:
            root = psutil.Process(pid)
            processes = [root, *root.children(recursive=True)]
            found["memory"] = max(found["memory"], sum(p.memory_info().rss for p in processes))
            found["files"] = max(found["files"], sum(p.num_fds() for p in processes))
        except psutil.Error:
            continue  # one of them has just ended


def mosaic(subs: Sequence[Path], out: Path, options: Sequence[str] = ()) -> tuple[Watched, Path]:
    """Watch ``zemosaic run`` over some files; also the path of the product."""
    out.mkdir(parents=True, exist_ok=True)
    listed = out / "subs.txt"
    listed.write_text("".join(f"{path.resolve()}\n" for path in subs))
    fixed = [str(subs[0].parent), "--only", str(listed), "-o", str(out), "--sds", "-q"]
    seen = watch([sys.executable, "-m", "zemosaic", "run", *fixed, *options])
    return seen, Path(seen.output.strip().splitlines()[-1])


def phases(product: Path) -> list[dict[str, Any]]:
    """What the report of a run says of its phases up to the report: ``name``, ``seconds``, ``cpu_seconds``."""
    report = json.loads(product.with_name(f"{product.stem}_report.json").read_text())
    return list(report["run"]["phases"])
