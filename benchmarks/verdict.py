"""Does the verdict find what is wrong with a mosaic, and do its numbers agree with the truth?

    python benchmarks/verdict.py [--bench ../shared/bench] [--frames 48] [--shape 800x1000] [--keep FOLDER] [-- ...]

A field is simulated and stacked ten times: as it is, and with one lot (a panel) made wrong in a known way. Every mosaic
is judged, by the verdict and by the scorer that knows the true sky. Printed are what the verdict found, its figures
beside the scorer's, and whether both put the mosaics into the same order. Takes about four minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
from astropy.io import fits
from numpy.typing import NDArray
from scipy.stats import spearmanr

import zemosaic_worker
from zemosaic.coadd import Sub
from zemosaic.product import wcs_cards
from zemosaic.report.evidence import Evidence, evidence_of_run
from zemosaic.report.noise import binned_noise
from zemosaic.report.seams import BLOCK_CELLS
from zemosaic.report.surface import CELL, measure_surface
from zemosaic.report.verdict import Verdict, judge
from zemosaic.settings import Settings
from zemosaic.tiles import Mosaic
from zemosaic.warp import pixel_map

PANELS = (3, 2)
BAD = 4  # the panel that is made wrong

# What the verdict and the scorer call the same thing; one electron is one ADU here.
PAIRS = (
    ("block_step_p99_adu", "step_p99_e"),
    ("phot_scatter", "phot_mmag"),
    ("phot_uniformity", "unif_mmag"),
    ("level_rms_adu", "bg_rms_e"),
    ("position_p95", "astrom_px_p95"),
    ("trail", "defects_ppm"),
)


@dataclass(frozen=True)
class Fault:
    """What is done to one lot, and what the verdict must call it."""

    name: str
    finding: str = ""
    gain: float = 1.0
    sky: float = 0.0
    shift: float = 0.0
    blur: float = 0.0
    trail: float = 0.0


FAULTS = (
    Fault("good"),
    Fault("gain 1 %", "lot_gain", gain=1.01),
    Fault("gain 3 %", "lot_gain", gain=1.03),
    Fault("gain 6 %", "lot_gain", gain=1.06),
    Fault("sky 3 e", "lot_sky", sky=3.0),
    Fault("sky 6 e", "lot_sky", sky=6.0),
    Fault("shift 0.3 px", "lot_shift", shift=0.3),
    Fault("shift 0.8 px", "lot_shift", shift=0.8),
    Fault("blurred lot", "lot_fwhm", blur=2.0),
    Fault("trail", "trail", trail=80.0),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate, spoil, judge, compare."""
    names = [fault.name for fault in FAULTS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--bench", type=Path, default=here.parent / "shared" / "bench", help="simulator and scorer")
    parser.add_argument("--frames", type=int, default=48)
    parser.add_argument("--shape", default="800x1000", metavar="ROWSxCOLUMNS")
    parser.add_argument("--density", type=float, default=3500, help="stars per square degree")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help="not all ten")
    parser.add_argument("--keep", type=Path, help="folder for the mosaics; a scratch folder if not given")
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("simulator", nargs="*", help="after --: further options of the simulator")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        subs = folder / "subs"
        command = [options.bench / "simulate.py", subs, "--panels", "x".join(map(str, PANELS))]
        command += ["--frames", options.frames, "--shape", options.shape, "--density", options.density]
        _run(command + ["--seed", options.seed, "--dither", 20, *options.simulator])
        rows = [
            examine(fault, subs, folder, options.bench) for fault in FAULTS if fault.name in (options.only or names)
        ]
    compare(rows)


@dataclass(frozen=True)
class Row:
    """One mosaic, judged twice; `noise`: `block_noise`."""

    fault: Fault
    verdict: Verdict
    score: dict[str, float]
    noise: float


def examine(fault: Fault, subs: Path, folder: Path, bench: Path) -> Row:
    """Make one mosaic and judge it."""
    own = blurred(subs, folder / "blurred", fault.blur) if fault.blur else subs
    evidence, mosaic = stack(fault, own, folder / "run")
    path = folder / f"{fault.name.replace(' ', '_')}.fits"
    planes = fits.PrimaryHDU(np.moveaxis(mosaic.image, -1, 0), wcs_cards(mosaic.wcs, 3))
    fits.HDUList([planes, fits.ImageHDU(mosaic.coverage, name="COVERAGE")]).writeto(path, overwrite=True)
    score = json.loads(_run([bench / "score.py", path, f"{subs}_truth", "--json"]))
    row = Row(fault, judge(evidence), score, block_noise(evidence))
    print(f"{fault.name:14s} {row.verdict.grade:5s}", *(f.text() for f in row.verdict.findings[:3]), flush=True)
    return row


def stack(fault: Fault, subs: Path, out: Path) -> tuple[Any, Mosaic]:
    """The engine's mosaic of the frames, one lot of them spoilt, and the evidence of the run."""
    seen: list[tuple[Any, Mosaic]] = []
    match, books = zemosaic_worker.steps.match, zemosaic_worker.write_ledger

    def spoilt(*args: Any, **named: Any) -> Any:
        matched, photometry = match(*args, **named)
        bad = _lots(len(matched)) == BAD
        matched = [
            spoil(sub, fault, photometry.sky, args[1].wcs) if b else sub for sub, b in zip(matched, bad, strict=True)
        ]
        return matched, replace(photometry, adjustments=tuple(sub.adjustment for sub in matched))

    def listen(intake: Any, job: Any, made: Any) -> Any:
        lots = _lots(len(job.subs))
        outcomes = [replace(o, lot=int(lot)) for o, lot in zip(made.outcomes, lots, strict=True)]
        mosaic = painted(made.mosaic, fault.trail)
        seen.append((evidence_of_run(job, intake, replace(made, outcomes=outcomes, mosaic=mosaic)), mosaic))
        return books(intake, job, made)

    # Nothing may come from an earlier run: a spoilt adjustment that is resumed is the next mosaic's too.
    settings = Settings(route="mosaic-first", resume="off", report=False, blur_filter=False, num_processing_workers=1)
    with (
        patch.object(zemosaic_worker.steps, "match", spoilt),
        patch.object(zemosaic_worker, "write_ledger", listen),
    ):
        zemosaic_worker.run_hierarchical_mosaic(subs, out, settings)
    return seen[0]


def _lots(frames: int) -> NDArray[np.int64]:
    """Panel of every frame; the simulator takes one panel after the other."""
    return np.arange(frames) * (PANELS[0] * PANELS[1]) // frames


def spoil(sub: Sub, fault: Fault, sky: NDArray[np.float64], canvas_wcs: Any) -> Sub:
    """One frame with its lot's fault: a wrong gain or level after matching, or a wrong WCS."""
    own = sub.adjustment
    plane = own.plane * fault.gain
    plane[:, 0] += sky * (fault.gain - 1) - fault.sky  # gain about the sky, so that its level stays
    frame, where = sub.frame, sub.pixel_map
    if fault.shift and frame.wcs is not None:
        wcs = frame.wcs.deepcopy()
        wcs.wcs.crpix += [fault.shift, 0]
        wcs.wcs.set()
        frame = replace(frame, wcs=wcs)
        where = pixel_map(wcs, frame.shape, canvas_wcs, sub.window)
    return replace(sub, frame=frame, pixel_map=where, adjustment=replace(own, gain=own.gain * fault.gain, plane=plane))


def blurred(subs: Path, folder: Path, sigma: float) -> Path:
    """A copy of the subs in which one lot is out of focus: every colour of the CFA smoothed, hot pixels mended."""
    folder.mkdir(exist_ok=True)
    hot = np.load(Path(f"{subs}_truth") / "truth.npz")["hot"]
    paths = sorted(subs.glob("*.fit"))
    for path, lot in zip(paths, _lots(len(paths)), strict=True):
        pixels, header = fits.getdata(path, header=True)
        pixels = pixels.astype(np.float32)
        if lot == BAD:
            around = [np.roll(pixels, step, axis) for axis in (0, 1) for step in (-2, 2)]
            pixels.flat[hot] = np.median([a.flat[hot] for a in around], axis=0)
            for cell in ((y, x) for y in (0, 1) for x in (0, 1)):
                plane = np.ascontiguousarray(pixels[cell[0] :: 2, cell[1] :: 2])
                pixels[cell[0] :: 2, cell[1] :: 2] = cv2.GaussianBlur(plane, (0, 0), sigma / 2)
        fits.writeto(folder / path.name, np.rint(pixels).astype(np.uint16), header, overwrite=True)
    return folder


def painted(mosaic: Mosaic, height: float) -> Mosaic:
    """The mosaic with a trail across a third of it."""
    if not height:
        return mosaic
    ny, nx = mosaic.shape
    a, b = np.array([0.3 * nx, 0.3 * ny]), np.array([0.7 * nx, 0.6 * ny])
    along = (b - a) / np.hypot(*(b - a))
    yy, xx = np.mgrid[:ny, :nx]
    t = (xx - a[0]) * along[0] + (yy - a[1]) * along[1]
    d = (yy - a[1]) * along[0] - (xx - a[0]) * along[1]
    light = height * np.exp(-0.5 * (d / 1.2) ** 2) * ((t > 0) & (t < np.hypot(*(b - a))))
    return replace(mosaic, image=mosaic.image + light[..., None].astype(np.float32))


def compare(rows: Sequence[Row]) -> None:
    """Print what was found, both sets of figures, and the order of the mosaics by each."""
    print("\nfault found and named:")
    for row in rows:
        key, found = row.fault.finding, row.verdict.findings
        named = any(f.key == key and f.lot in (BAD, -1) for f in found) if key else not found
        others = sorted({f.key for f in found if f.key != key})
        print(f"  {row.fault.name:14s} {'yes' if named else 'NO':4s} {', '.join(others)}")
    ours, theirs = (np.array([[figure(row, pair) for pair in PAIRS] for row in rows]) for figure in (_own, _true))
    for k, (own, true) in enumerate(PAIRS):
        print(f"\n{own} against {true}:")
        for row, x, y in zip(rows, ours[:, k], theirs[:, k], strict=True):
            print(f"  {row.fault.name:14s} {x:8.3f} {y:8.3f}" + (f" {x / y - 1:+6.0%}" if y else ""))
    # How many times worse than the good mosaic each is in its worst figure.
    worse = [(1 + np.maximum(v / v[0] - 1, 0) if v[0] else 1 + v / (v.max() or 1)) for v in (*ours.T, *theirs.T)]
    by_ours, by_theirs = (np.max(part, axis=0) for part in (worse[: len(PAIRS)], worse[len(PAIRS) :]))
    print("\ntimes worse than the good one:  verdict   scorer")
    for row, x, y in sorted(zip(rows, by_ours, by_theirs, strict=True), key=lambda each: each[2]):
        print(f"  {row.fault.name:30s} {x:7.2f} {y:8.2f}")
    print(f"rank correlation {spearmanr(by_ours, by_theirs).statistic:.2f}")


def _own(row: Row, pair: tuple[str, str]) -> float:
    """The verdict's figure, in green where it has colours: the scorer looks at nothing else."""
    if pair[0] == "position_p95":
        return row.verdict.measures.astrometry.position_p95
    figure = row.verdict.figure(pair[0])
    value = figure.channels[len(figure.channels) // 2] if figure.channels else figure.value
    if pair[0] == "level_rms_adu":
        value = float(np.hypot(value, row.noise))  # the level is without noise, the scorer's blocks are not
    return value


def block_noise(evidence: Evidence) -> float:
    """Error, rms over the mosaic, of the medians of the scorer's blocks of 24 px in green, ADU.

    A median scatters 1.25 times as much as a mean of the pixels that stars leave.
    """
    surface = measure_surface(evidence)
    side = BLOCK_CELLS * CELL
    h, w = (size // BLOCK_CELLS for size in surface.free.shape)
    cells = surface.free[: h * BLOCK_CELLS, : w * BLOCK_CELLS]
    free = cells.reshape(h, BLOCK_CELLS, w, BLOCK_CELLS).mean(axis=(1, 3))
    noise = binned_noise(surface)[..., surface.channels // 2]
    i, j = (np.arange(n) * side // surface.region for n in (h, w))
    square = (1.25 * noise[np.ix_(i, j)] / side) ** 2 / np.where(free > 0.4, free, np.nan)
    return float(np.sqrt(np.nanmean(square)))


def _true(row: Row, pair: tuple[str, str]) -> float:
    return float(row.score[pair[1]])


def _run(command: Sequence[Any]) -> str:
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
