"""Ten thousand small subs, from the first header to the saved mosaic: what would grow with the square shows here.

    python benchmarks/ten_thousand.py [--counts 2500 5000 10000] [--work FOLDER] [--no-run] [--no-steps]
                                      [-- options of zemosaic run]

For every count, in a process of its own, the steps of a run up to the first stack, in seconds of processor time:
``scan`` (all headers), ``layout`` (canvas and lots), ``graph`` (panels and their overlaps, as `zemosaic plan` makes
them), ``measure`` (the only one that reads pixels), ``solve`` (places, refined), ``gate`` (frames against each other),
``levels`` (pixel maps and one photometric scale); and ``plan``, the whole of ``zemosaic plan --no-probe``.

The largest count then runs to its end, watched for memory and open files; its mosaic is held against the sky and its
books must close. Bars: scan, layout, graph and levels of 10,000 subs within 60 s in all; no step takes more than
`GROWTH` times as long for twice the subs; no more than `FILES` open files. The exit status is 1 if one is missed. The
subs stay in the folder for the next time (510 MB). Linux and macOS.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from astropy.table import Table
from big_sky import Field, judge, make_subs  # beside this file
from watch import mosaic, phases, watch

FIELD = Field((1500, 2000), shape=(128, 192), fwhm=2.6, stars=2200.0, faintest=6e4)
SECONDS = 60.0  # for `BARRED` of 10,000 subs
GROWTH = 2.6  # times the seconds, for twice the subs
SHORT = 1.0  # second: shorter steps say nothing about growth
FILES = 300  # that may be open at a time
STEPS = ("scan", "layout", "graph", "measure", "solve", "gate", "levels")
BARRED = ("scan", "layout", "graph", "levels")


def main(argv: Sequence[str] | None = None) -> int:
    """Steps for every count, then the run."""
    parser = argparse.ArgumentParser(description="Thousands of subs. What follows -- goes to `zemosaic run`.")
    parser.add_argument("--counts", type=int, nargs="+", default=[2500, 5000, 10000])
    parser.add_argument("--work", type=Path, default=Path("ten_thousand"), metavar="FOLDER", help="where subs stay")
    parser.add_argument("--no-run", action="store_true", help="only the steps")
    parser.add_argument("--no-steps", action="store_true", help="only the run")
    parser.add_argument("--steps-of", type=Path, help=argparse.SUPPRESS)  # the process of the steps
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    options, further = parser.parse_args(words[:end]), words[end + 1 :]
    if options.steps_of:
        print(json.dumps(steps_of(options.steps_of)))
        return 0
    faults: list[str] = []
    times: dict[int, dict[str, float]] = {}
    counts = sorted(options.counts)
    paths = make_subs(FIELD, counts[-1], options.work)
    if not options.no_steps:
        print("  subs " + "".join(f"{name:>9s}" for name in (*STEPS, "plan")) + "   s of CPU", flush=True)
    for count in () if options.no_steps else counts:
        paths = make_subs(FIELD, count, options.work)
        folder = chosen(paths, options.work / f"{count}")
        child = [sys.executable, __file__, "--steps-of", str(folder)]
        times[count] = json.loads(watch(child).output.strip().splitlines()[-1])
        plan = [sys.executable, "-m", "zemosaic", "plan", str(folder), "--sds", "--no-probe", "-q"]
        times[count]["plan"] = watch(plan).cpu
        print(f"{count:6d} " + "".join(f"{times[count][name]:9.2f}" for name in (*STEPS, "plan")), flush=True)
    if times:
        faults += grown(times)
    if not options.no_run:
        faults += run(paths, options.work, further)
    for fault in faults:
        print(f"MISSED: {fault}")
    return 1 if faults else 0


def chosen(paths: Sequence[Path], folder: Path) -> Path:
    """A folder of links to some files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in paths:
        (folder / path.name).symlink_to(path.resolve())
    return folder


def steps_of(folder: Path) -> dict[str, float]:
    """Processor seconds of every step, in this process."""
    # Here, and not above, so that the process that watches stays small.
    import zemosaic_worker as worker
    from zemosaic import intake as steps
    from zemosaic.calibrate import Calibration
    from zemosaic.events import Events
    from zemosaic.execute import memory_budget, one_thread_each, worker_count
    from zemosaic.layout import lay_out
    from zemosaic.overlaps import overlap_graph
    from zemosaic.plan import _panels
    from zemosaic.settings import Settings

    settings, events, workers = Settings(), Events(), worker_count(0)
    times = {}

    def timed(name: str, step: Callable[..., Any], *values: Any) -> Any:
        start = time.process_time()
        made = step(*values)
        times[name] = time.process_time() - start
        return made

    with one_thread_each():
        intake = timed("scan", steps.scan, [folder], workers, events)
        layout = timed("layout", lay_out, intake.frames, settings)
        timed("graph", lambda: overlap_graph(layout.corners, _panels(layout)))
        timed("measure", steps.measure_all, intake, Calibration(), settings, workers, events)
        timed("solve", steps.locate_all, intake, settings, workers, events)
        canvas = steps.place(intake, settings, events, memory_budget(settings.memory_gb), folder)
        timed("gate", worker.gate, intake, settings, events)
        timed("levels", steps.match, intake, canvas, settings, workers, events)
    return times


def grown(times: dict[int, dict[str, float]]) -> list[str]:
    """Bars that the steps miss."""
    faults = []
    counts = list(times)
    for few, many in itertools.pairwise(counts):
        for name, late in times[many].items():
            allowed = GROWTH ** math.log2(many / few)
            if late > max(SHORT, allowed * times[few][name]):
                faults.append(f"{name} takes {times[few][name]:.1f} s for {few} subs and {late:.1f} s for {many}")
    most = counts[-1]
    total = sum(times[most][name] for name in BARRED)
    print(f"{', '.join(BARRED)} of {most} subs: {total:.1f} s")
    if total > SECONDS * max(1.0, most / 10000):
        faults.append(f"{total:.1f} s before the first stack, and {SECONDS:.0f} are allowed")
    return faults


def run(paths: Sequence[Path], work: Path, further: Sequence[str]) -> list[str]:
    """The whole run: its line, and the bars that it misses."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    # Of three or four stars a frame is easily called blurred.
    seen, product = mosaic(paths, out, ["--set=blur_filter=false", *further])
    quality = judge(product, FIELD, work)
    books = Table.read(product, "FRAMES")
    parts = [f"{phase['name']} {phase['cpu_seconds']:.1f}" for phase in phases(product)]
    used = sum(str(status) != "rejected" for status in books["STATUS"])
    print(f"run: {seen.cpu:.0f} s of CPU, {seen.wall:.0f} s, {seen.memory / 2**30:.2f} GB, {seen.files} open files")
    print("  s of CPU: " + ", ".join(parts))
    print(f"  {len(books)} in the books, {used} used; {quality}")
    faults = [quality.faults] if quality.faults else []
    if len(books) != len(paths) or len(set(books["FILE"])) != len(paths):
        faults.append(f"{len(books)} subs are in the books, of {len(paths)}")
    if seen.files > FILES:
        faults.append(f"{seen.files} files were open, and {FILES} are allowed")
    shutil.rmtree(out)
    return faults


if __name__ == "__main__":
    sys.exit(main())
