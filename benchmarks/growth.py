"""How a run grows: with the number of subs, and with the canvas.

    python benchmarks/growth.py [30@5 60@5 120@5 480@5 480@20 480@60 1920@60] [--work FOLDER] [--make-only]
                                [-- options of zemosaic run]

A step is so many subs (1080 x 1920, Bayer) on a canvas of so many megapixels. The subs come from `big_sky` and stay in
the folder for the next time: 4.2 MB each, larger sets hold the smaller ones of the same canvas. Every step is one
``zemosaic run --sds`` in a process of its own, watched from outside, and its mosaic is held against the sky that the
subs were made of: a fast wrong answer fails. The exit status is 1 if a mosaic is wrong or a bar is missed.

"busy" (share of all cores) means something only where nothing else runs on the machine, and is no bar unless asked for
by ``--quiet-machine``. Linux and macOS.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from big_sky import Field, Quality, judge, make_subs  # beside this file
from watch import Watched, mosaic, phases

GB = 2**30
STEPS = ("30@5", "60@5", "120@5", "480@5", "480@20", "480@60", "1920@60")
LARGEST = 61  # Mpx up to which the bar of memory holds, with the border that the run adds
BUSY = 0.85


class Step(NamedTuple):
    """One run: subs, megapixels of the sky, what it took, how good it is."""

    subs: int
    megapixels: int
    seen: Watched
    quality: Quality


def main(argv: Sequence[str] | None = None) -> int:
    """Make the subs, run, print the table, hold it against the bars."""
    parser = argparse.ArgumentParser(description="Growth of a run. What follows -- goes to `zemosaic run`.")
    parser.add_argument("steps", nargs="*", default=STEPS, metavar="SUBS@MEGAPIXELS")
    parser.add_argument(
        "--work", type=Path, default=Path("growth"), metavar="FOLDER", help="where subs stay (./growth)"
    )
    parser.add_argument("--make-only", action="store_true", help="make the subs, do not run")
    parser.add_argument("--quiet-machine", action="store_true", help="the share of the cores is a bar, too")
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    options, further = parser.parse_args(words[:end]), words[end + 1 :]
    pairs = [tuple(map(int, step.split("@"))) for step in options.steps]
    steps = []
    print("  subs   Mpx  CPU s/sub    wall s  busy   peak GB  files  stars' light  scatter  level ADU", flush=True)
    for subs, megapixels in pairs:
        field, folder = field_of(megapixels), options.work / f"{megapixels}mpx"
        paths = make_subs(field, subs, folder)
        if not options.make_only:
            steps.append(measured(subs, megapixels, field, folder, paths, further))
    return 1 if judged(steps, options.quiet_machine) else 0


def field_of(megapixels: int) -> Field:
    """A field of 3 by 4 of so many pixels."""
    height = round(math.sqrt(megapixels * 1e6 * 0.75))
    return Field((height, round(megapixels * 1e6 / height)))


def measured(
    subs: int, megapixels: int, field: Field, folder: Path, paths: Sequence[Path], further: Sequence[str]
) -> Step:
    """One run, and its line."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    seen, product = mosaic(paths, out, further)
    step = Step(subs, megapixels, seen, judge(product, field, folder))
    q = step.quality
    print(
        f"{subs:6d} {megapixels:5d} {seen.cpu / subs:10.3f} {seen.wall:9.1f} {seen.busy:5.0%} {seen.memory / GB:9.2f}"
        f" {seen.files:6d} {q.scale:13.4f} {q.stars:8.2%} {q.level:10.2f}",
        flush=True,
    )
    parts = [f"{phase['name']} {phase['cpu_seconds'] / subs * 1000:.0f}" for phase in phases(product)]
    print("       ms of CPU per sub: " + ", ".join(parts), flush=True)
    shutil.rmtree(out)
    return step


def judged(steps: Sequence[Step], quiet: bool) -> list[str]:
    """Print and return what is wrong, or misses its bar."""
    faults = [f"{s.subs}@{s.megapixels}: {s.quality.faults}" for s in steps if s.quality.faults]
    for s in steps:
        name, memory = f"{s.subs}@{s.megapixels}", s.seen.memory / GB
        if s.subs <= 60 and s.megapixels <= 5 and memory > 1.5:
            faults.append(f"{name}: {memory:.2f} GB, and 1.5 are allowed")
        if s.megapixels <= LARGEST and memory > 4:
            faults.append(f"{name}: {memory:.2f} GB, and 4 are allowed")
        if quiet and s.subs >= 120 and s.seen.busy < BUSY:
            faults.append(f"{name}: {s.seen.busy:.0%} of the cores were busy, and {BUSY:.0%} are asked for")
    memory_of = {(s.subs, s.megapixels): s.seen.memory for s in steps}
    for (subs, megapixels), memory in memory_of.items():
        before = memory_of.get((480, megapixels))
        if subs == 1920 and before is not None:
            print(f"memory from 480 to 1,920 subs at {megapixels} Mpx: {memory / before - 1:+.1%}")
            if memory > 1.1 * before:
                faults.append(f"memory grows by {memory / before - 1:.1%} from 480 to 1,920 subs at {megapixels} Mpx")
    for fault in faults:
        print(f"MISSED: {fault}")
    return faults


if __name__ == "__main__":
    sys.exit(main())
