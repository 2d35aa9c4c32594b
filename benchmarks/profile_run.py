"""Where the time of a run goes, and how far its kernels are from what this machine can do at all.

    python benchmarks/profile_run.py [--subs 60] [--work FOLDER] [--repeat 5] [-- options of zemosaic run]

First the phases of one run over simulated subs (`big_sky`, 1080 x 1920, 5 Mpx), in milliseconds of processor time per
sub. Then the kernels by themselves, on one core, beside their floors, which are measured in the same session:

* bytes that must be read and written, at the speed of copying memory (or of reading and writing a file that is in the
  system's cache);
* multiply-adds of the interpolation (6 x 6 taps, 3 colours), at the rate of a matrix product;
* comparisons of a median (1.5 for each sample, C. A. R. Hoare's and every other selection needs more), at the rate of
  an element-wise minimum in the cache.

No kernel can be faster than its floor; the column "times" says how much room is left. Linux and macOS.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from astropy.wcs import WCS
from big_sky import make_subs  # beside this file
from growth import field_of
from watch import mosaic, phases

from zemosaic.calibrate import Calibration, find_hot_pixels, prepare
from zemosaic.canvas import plan_canvas
from zemosaic.combine import Clip, combine
from zemosaic.execute import one_thread_each
from zemosaic.frames import read_frame, read_pixels
from zemosaic.kernels import debayer_part
from zemosaic.measure import measure_frame, probe_aperture
from zemosaic.settings import Settings
from zemosaic.solve.catalogue import load_catalogue
from zemosaic.solve.verify import verify
from zemosaic.warp import Crop, pixel_map, warp_block

DEPTH = 10  # frames of a lot
TAPS = 6 * 18 + 6 * 3  # multiply-adds of a pixel: six rows of three colours into one, then that


class Floor(NamedTuple):
    """What this machine can do on one core: bytes, multiply-adds and comparisons a second."""

    copied: float
    read: float
    written: float
    multiplied: float
    compared: float


class Kernel(NamedTuple):
    """A kernel and its floor, seconds of processor time for one sub."""

    name: str
    taken: float
    floor: float


def main(argv: Sequence[str] | None = None) -> None:
    """Phases, floors, kernels."""
    parser = argparse.ArgumentParser(description="Profile of a run. What follows -- goes to `zemosaic run`.")
    parser.add_argument("--subs", type=int, default=60)
    parser.add_argument(
        "--work", type=Path, default=Path("growth"), metavar="FOLDER", help="where subs stay (./growth)"
    )
    parser.add_argument("--repeat", type=int, default=5, help="the best of so many counts (5)")
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    options, further = parser.parse_args(words[:end]), words[end + 1 :]
    folder = options.work / "5mpx"
    paths = make_subs(field_of(5), options.subs, folder)
    tell_phases(paths, folder / "out", further)
    with one_thread_each(), tempfile.TemporaryDirectory() as scratch:
        floor = floor_of(Path(scratch, "floor"), options.repeat)
        print(
            f"floor, one core: copy {floor.copied / 1e9:.1f} GB/s (read + write), read a cached file "
            f"{floor.read / 1e9:.1f} GB/s, write one {floor.written / 1e9:.1f} GB/s, {floor.multiplied / 1e9:.1f} G "
            f"multiply-adds/s, {floor.compared / 1e9:.1f} G minima/s"
        )
        print(f"{'kernel':34s}{'ms per sub':>12s}{'floor':>9s}{'times':>8s}")
        for name, taken, least in kernels(paths[:DEPTH], floor, options.repeat):
            print(f"{name:34s}{taken * 1e3:12.2f}{least * 1e3:9.2f}{taken / least:8.1f}")


def tell_phases(paths: Sequence[Path], out: Path, further: Sequence[str]) -> None:
    """One run, by phases."""
    shutil.rmtree(out, ignore_errors=True)
    seen, product = mosaic(paths, out, further)
    found = phases(product)
    shutil.rmtree(out)
    known = sum(phase["cpu_seconds"] for phase in found)
    print(f"{len(paths)} subs: {seen.cpu / len(paths) * 1e3:.0f} ms of CPU per sub, {seen.busy:.0%} of the cores busy")
    for name, cpu in (*((p["name"], p["cpu_seconds"]) for p in found), ("start and end", seen.cpu - known)):
        print(f"  {name:16s}{cpu / len(paths) * 1e3:8.1f} ms{cpu / seen.cpu:7.1%}")


def best(work: Callable[[], object], repeat: int) -> float:
    """Least seconds of processor time of some goes."""
    times = []
    for _ in range(repeat):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return max(min(times), 1e-9)


def floor_of(path: Path, repeat: int) -> Floor:
    """Measure this machine."""
    size = 1 << 26
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    with open(path, "wb") as stream:
        written = best(lambda: (stream.seek(0), stream.write(source.data), stream.flush()), repeat)
    with open(path, "rb", buffering=0) as raw:
        read = best(lambda: (raw.seek(0), raw.readinto(target.data)), repeat)
    side, small = 1024, 1 << 14
    a, b = np.ones((side, side), np.float32), np.ones((side, side), np.float32)
    u, v, low = np.ones(small, np.float32), np.zeros(small, np.float32), np.empty(small, np.float32)

    def minima() -> None:
        for _ in range(2000):
            np.minimum(u, v, out=low)

    return Floor(
        copied=2 * size / best(lambda: np.copyto(target, source), repeat),
        read=size / read,
        written=size / written,
        multiplied=side**3 / best(lambda: a @ b, repeat),
        compared=2000 * small / best(minima, repeat),
    )


def kernels(paths: Sequence[Path], floor: Floor, repeat: int) -> list[Kernel]:
    """The kernels of a run, each for one sub of a lot."""
    frames = [read_frame(path) for path in paths]
    frame, settings = frames[0], Settings()
    pixels, _ = prepare(frame, Calibration())
    count, stored = pixels.size, os.path.getsize(frame.path)
    aperture = probe_aperture(frames[:3], Calibration())
    measured = measure_frame(frame, Calibration(), aperture)
    canvas, catalogue = plan_canvas(frames, settings), load_catalogue()
    assert isinstance(frame.wcs, WCS)
    box = canvas.window_of(frame)
    placed = pixel_map(frame.wcs, frame.shape, canvas.wcs, box)
    padded = np.pad(pixels, 2, mode="reflect")
    stars, seen = measured.stars, 4 * count  # bytes of the pixels
    rng = np.random.default_rng(1)
    stack = rng.normal(1000, 25, (3, DEPTH, 258, 258)).astype(np.float32)
    noise, even = np.full((3, DEPTH), 25.0), np.ones((3, DEPTH))
    share = box.area / (258 * 258 * DEPTH)  # of one sub in the combination of its lot's pixels

    def warp() -> None:
        for block in box.blocks(256):
            out = np.empty((3, *block.shape), np.float32)
            warp_block(Crop.whole(pixels), frame.bayer, placed, frame.shape, block, 125.0, out)

    def joined() -> None:
        combine(stack, noise, even, np.full(3, 1000, np.float32), Clip(), even=True)

    return [
        Kernel(
            "read a sub (decode)", best(lambda: read_pixels(frame), repeat), stored / floor.read + seen / floor.copied
        ),
        Kernel(
            "find hot pixels", best(lambda: find_hot_pixels(pixels, bayer=True), repeat), _median(25 * count, floor)
        ),
        Kernel(
            "measure, reading included",
            best(lambda: measure_frame(frame, Calibration(), aperture), repeat),
            stored / floor.read + 2 * seen / floor.copied + _median(25 * count, floor),
        ),
        Kernel(
            "check the WCS by the catalogue",
            best(lambda: verify(frame.wcs, stars.x, stars.y, stars.flux, frame.shape, catalogue), repeat),
            len(stars) * 24 / floor.copied,
        ),
        Kernel("debayer", best(lambda: debayer_part(padded, 0, 1), repeat), 4 * seen / floor.copied),
        Kernel("warp, debayering included", best(warp, repeat), box.area * TAPS / floor.multiplied),
        Kernel(
            "reject and average", best(joined, repeat) * share, _median(3 * box.area, floor) + 3 * seen / floor.copied
        ),
    ]


def _median(samples: float, floor: Floor) -> float:
    """Seconds that medians of so many samples take at least."""
    return 1.5 * samples / floor.compared


if __name__ == "__main__":
    main()
