"""What an SDS run costs: processor time, wall time and peak memory of `zemosaic run SUBS --sds`.

    python benchmarks/run_sds.py SUBS [-n 3] [-- options of zemosaic run]
    python benchmarks/run_sds.py [--panels 3x2] [--frames 60] [--shape 1080x1920] [-n 3] [-- options of zemosaic run]

Every run is a process of its own that writes to a scratch folder. Without SUBS a field is simulated first, which is not
counted. Needs `os.wait4`, so Linux or macOS.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import NamedTuple

from zemosaic.demo import make_field
from zemosaic.execute import worker_count
from zemosaic.frames import find_files


class Cost(NamedTuple):
    """What one run took: seconds of processor time, seconds on the clock, bytes."""

    cpu: float
    wall: float
    memory: int


def main(argv: Sequence[str] | None = None) -> None:
    """Run, and print minimum, median and maximum."""
    parser = argparse.ArgumentParser(description="Measure SDS runs. What follows -- goes to `zemosaic run`.")
    parser.add_argument("subs", nargs="?", type=Path, metavar="SUBS", help="folder of subs; none = simulate")
    parser.add_argument("-n", "--repeat", type=int, default=3, help="number of runs (3)")
    parser.add_argument("--panels", type=_pair, default=(3, 2), metavar="3x2", help="of the simulated field")
    parser.add_argument("--frames", type=int, default=60, metavar="60", help="simulated subs")
    parser.add_argument("--shape", type=_pair, default=(1080, 1920), metavar="1080x1920", help="rows x columns of one")
    parser.add_argument("--seed", type=int, default=11, metavar="11")
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    options, further = parser.parse_args(words[:end]), words[end + 1 :]
    with tempfile.TemporaryDirectory() as scratch:
        subs = options.subs or Path(scratch, "subs")
        if options.subs is None:
            # In a process of its own: a child's peak memory starts at its parent's.
            with ProcessPoolExecutor(1) as pool:
                field = {name: getattr(options, name) for name in ("panels", "frames", "shape", "seed")}
                pool.submit(make_field, subs, **field).result()
        count = len(find_files([subs]))
        costs = [measure(subs, Path(scratch, f"out{i}"), further) for i in range(options.repeat)]
    print(f"{count} subs, {len(costs)} runs, {worker_count(0)} cores     min  median     max")
    for title, values in (
        ("CPU seconds per sub", [cost.cpu / count for cost in costs]),
        ("wall seconds", [cost.wall for cost in costs]),
        ("peak memory, GB", [cost.memory / 2**30 for cost in costs]),
    ):
        print(f"{title:26s}  {min(values):7.2f} {median(values):7.2f} {max(values):7.2f}")


def measure(subs: Path, out: Path, further: Sequence[str]) -> Cost:
    """Run `zemosaic run` once; its failure ends the program."""
    command = [sys.executable, "-m", "zemosaic", "run", str(subs), "-o", str(out), "--sds", "-q", *further]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with status {process.returncode}")
    # ru_maxrss is in kilobytes, on macOS in bytes.
    memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Cost(usage.ru_utime + usage.ru_stime, wall, memory)


def _pair(text: str) -> tuple[int, int]:
    first, second = text.lower().split("x")
    return int(first), int(second)


if __name__ == "__main__":
    main()
