"""What a mosaic costs here and elsewhere: the same simulated subs through SDS, SWarp, reproject and Montage.

    python benchmarks/compare.py [--frames 12] [--panels 2x1] [--shape 1080x1920] [-n 3] [--only sds swarp]

The subs are simulated first; for the others they are calibrated and debayered into one FITS plane per colour, which is
not counted against them, nor is a first run of SDS, which compiles on a new machine. Every program then runs as a
process of its own (with its children), in turns, `n` times:

* `sds`: the whole of ``zemosaic run --sds``, from raw frames to the saved product;
* `swarp`: SWarp once per plane, COMBINE_TYPE CLIPPED, LANCZOS3, its own background subtraction;
* `reproject`: `reproject_and_coadd` once per plane, bicubic, ``match_background=True``;
* `montage`: mProjExec, mDiffFitExec, mBgModel, mBgExec, mAdd once per plane, so with its background matching.

Printed are processor seconds per colour sub, wall time, peak memory of the largest process, ratios of processor time to
SDS of the same turn, and three figures of quality against the truth: scatter of star magnitudes (mmag), rms of the sky
in 32-px boxes (ADU) after its own smoothest plane is taken off, and noise of a pixel (ADU). Programs that are not
installed are left out. Needs `os.wait4`, so Linux or macOS.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import cv2
import numpy as np
import sep
from astropy.io import fits
from astropy.wcs import WCS

from zemosaic.calibrate import Calibration, debayer, prepare
from zemosaic.demo import FieldTruth, make_field
from zemosaic.frames import read_frame

COLOURS = "RGB"
REPROJECT = """
import sys
from pathlib import Path
from astropy.io import fits
from reproject import reproject_interp
from reproject.mosaicking import find_optimal_celestial_wcs, reproject_and_coadd
out = Path(sys.argv[1])
for colour in sys.argv[3:]:
    hdus = [fits.open(p)[0] for p in sorted(Path(sys.argv[2]).glob(f"*_{colour}.fits"))]
    wcs, shape = find_optimal_celestial_wcs(hdus)
    image, _ = reproject_and_coadd(
        hdus, wcs, shape_out=shape, reproject_function=reproject_interp, order="bicubic", match_background=True
    )
    fits.writeto(out / f"{colour}.fits", image.astype("f4"), wcs.to_header())
"""
MONTAGE = """
set -e
cd "$1"
mkdir raw$2 proj$2 diff$2 corr$2
for f in "$3"/*_$2.fits; do ln -s "$f" raw$2/; done
mImgtbl raw$2 raw$2.tbl
mMakeHdr raw$2.tbl $2.hdr
mProjExec -p raw$2 raw$2.tbl $2.hdr proj$2 stats$2.tbl
mImgtbl proj$2 proj$2.tbl
mOverlaps proj$2.tbl diffs$2.tbl
mDiffFitExec -p proj$2 diffs$2.tbl $2.hdr diff$2 fits$2.tbl
mBgModel proj$2.tbl fits$2.tbl corrections$2.tbl
mBgExec -p proj$2 proj$2.tbl corrections$2.tbl corr$2
mImgtbl corr$2 corr$2.tbl
mAdd -p corr$2 corr$2.tbl $2.hdr $2.fits
rm -r proj$2 diff$2 corr$2
"""


class Cost(NamedTuple):
    """Seconds of processor time and on the clock, bytes of the largest process."""

    cpu: float
    wall: float
    memory: int


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate, run all in turns, print the table."""
    parser = argparse.ArgumentParser(description="Compare the cost of a mosaic.")
    parser.add_argument("--frames", type=int, default=12, help="colour subs (12)")
    parser.add_argument("--panels", type=_pair, default=(2, 1), metavar="2x1")
    parser.add_argument("--shape", type=_pair, default=(1080, 1920), metavar="1080x1920")
    parser.add_argument("-n", "--repeat", type=int, default=3, help="turns (3)")
    parser.add_argument("--only", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS))
    options = parser.parse_args(argv)
    chosen = [name for name in options.only if _available(name)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        truth = make_field(
            folder / "subs", panels=options.panels, frames=options.frames, shape=options.shape, seed=11, sip_px=0.0
        )
        split(truth, folder / "planes")
        run_sds(folder, folder / "first")  # compiles its loops, once on a machine
        shutil.rmtree(folder / "first")
        costs: dict[str, list[Cost]] = {name: [] for name in chosen}
        figures: dict[str, tuple[float, float, float]] = {}
        for turn in range(options.repeat):
            for name in chosen:
                out = folder / f"{name}{turn}"
                out.mkdir()
                costs[name].append(PROGRAMS[name](folder, out))
                figures[name] = quality(*read_mosaic(out), truth)
                shutil.rmtree(out)
                print(f"turn {turn + 1}: {name} {costs[name][-1].cpu:.1f} s", file=sys.stderr)
    print(f"{options.frames} colour subs of {options.shape[0]} x {options.shape[1]} px, {options.repeat} turns")
    print("             CPU s/sub      CPU over sds, min median max   wall s   GB     stars mmag  sky ADU  noise ADU")
    for name in chosen:
        ratios = [c.cpu / s.cpu for c, s in zip(costs[name], costs["sds"], strict=True)] if "sds" in costs else [np.nan]
        print(
            f"{name:10s} {median(c.cpu for c in costs[name]) / options.frames:10.2f}"
            f"   {min(ratios):12.2f} {median(ratios):8.2f} {max(ratios):8.2f}"
            f" {median(c.wall for c in costs[name]):12.1f} {max(c.memory for c in costs[name]) / 2**30:6.2f}"
            f" {figures[name][0]:12.1f} {figures[name][1]:8.2f} {figures[name][2]:8.2f}"
        )


def split(truth: FieldTruth, folder: Path) -> None:
    """Calibrated, debayered planes with their WCS, one FITS file per sub and colour."""
    folder.mkdir()
    for number, path in enumerate(truth.paths):
        frame = read_frame(path)
        assert frame.bayer is not None and frame.wcs is not None
        colour = debayer(prepare(frame, Calibration())[0], frame.bayer)
        for c, name in enumerate(COLOURS):
            fits.writeto(folder / f"{number:04d}_{name}.fits", colour[..., c], _with_cd(frame.wcs))


def _with_cd(wcs: WCS) -> fits.Header:
    """The header of a WCS with a CD matrix: Montage takes scale and rotation from nothing else."""
    header = wcs.to_header()
    for i in (1, 2):
        for key in (f"CDELT{i}", f"PC{i}_1", f"PC{i}_2"):
            header.remove(key, ignore_missing=True)
        for j in (1, 2):
            header[f"CD{i}_{j}"] = float(wcs.pixel_scale_matrix[i - 1, j - 1])
    return header


def run_sds(folder: Path, out: Path) -> Cost:
    """The whole of this program."""
    return measured([[sys.executable, "-m", "zemosaic", "run", str(folder / "subs"), "-o", str(out), "--sds", "-q"]])


def run_swarp(folder: Path, out: Path) -> Cost:
    """Once per colour."""
    program = _available("swarp")
    return measured(
        [
            [
                str(program),
                *(str(p) for p in sorted((folder / "planes").glob(f"*_{colour}.fits"))),
                *f"-IMAGEOUT_NAME {out / colour}.fits -WEIGHTOUT_NAME {out / colour}.weight.fits".split(),
                *(
                    "-COMBINE_TYPE",
                    "CLIPPED",
                    "-RESAMPLING_TYPE",
                    "LANCZOS3",
                    "-VERBOSE_TYPE",
                    "QUIET",
                    "-WRITE_XML",
                    "N",
                ),
                *f"-RESAMPLE_DIR {out} -NTHREADS {os.cpu_count()}".split(),
            ]
            for colour in COLOURS
        ],
        cwd=out,
    )


def run_reproject(folder: Path, out: Path) -> Cost:
    """All colours in one process."""
    return measured([[sys.executable, "-c", REPROJECT, str(out), str(folder / "planes"), *COLOURS]])


def run_montage(folder: Path, out: Path) -> Cost:
    """Once per colour."""
    return measured([["bash", "-c", MONTAGE, "montage", str(out), c, str(folder / "planes")] for c in COLOURS])


PROGRAMS = {"sds": run_sds, "swarp": run_swarp, "reproject": run_reproject, "montage": run_montage}


def measured(commands: Sequence[Sequence[str]], cwd: Path | None = None) -> Cost:
    """Run commands one after the other; the first failure ends the program."""
    start, cpu, memory = time.perf_counter(), 0.0, 0
    for command in commands:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=cwd)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{' '.join(command)[:300]} ended with status {process.returncode}")
        cpu += usage.ru_utime + usage.ru_stime
        memory = max(memory, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    return Cost(cpu, time.perf_counter() - start, memory)


def read_mosaic(out: Path) -> tuple[np.ndarray, WCS]:
    """Image ``(3, ny, nx)``, NaN = no data, and WCS of whatever a program left in its folder."""
    products = sorted(out.glob("*_sds.fits"))
    if products:
        with fits.open(products[0]) as hdus:
            return hdus[0].data.astype(np.float32), WCS(hdus[0].header, naxis=2)
    planes, header = [], None
    for colour in COLOURS:
        with fits.open(out / f"{colour}.fits") as hdus:
            header = hdus[0].header
            planes.append(hdus[0].data.astype(np.float32))
    ny, nx = (min(p.shape[axis] for p in planes) for axis in (0, 1))
    image = np.stack([p[:ny, :nx] for p in planes])
    image[:, (image == 0).all(axis=0)] = np.nan
    return image, WCS(header, naxis=2)


def quality(image: np.ndarray, wcs: WCS, truth: FieldTruth) -> tuple[float, float, float]:
    """Scatter of star magnitudes (mmag), rms of the sky in 32-px boxes and noise of a pixel (ADU), all in green."""
    green = image[1]
    x, y = wcs.wcs_world2pix(truth.ra, truth.dec, 0)
    bright = truth.flux[:, 1] > np.percentile(truth.flux[:, 1], 70)
    apart = np.array([np.sort(np.hypot(x - a, y - b))[1] for a, b in zip(x, y, strict=True)])
    near = (x > 40) & (y > 40) & (x < green.shape[1] - 40) & (y < green.shape[0] - 40)
    holes = ~np.isfinite(green)
    rim = cv2.dilate(holes.astype(np.uint8), np.ones((35, 35), np.uint8)) > 0
    pick = np.flatnonzero(bright & (apart > 25) & near)
    pick = pick[~rim[np.rint(y[pick]).astype(int), np.rint(x[pick]).astype(int)]]
    data = np.ascontiguousarray(np.where(holes, np.nanmedian(green), green))
    flux, _, flag = sep.sum_circle(data, x[pick], y[pick], 8.0, bkgann=(11, 16), mask=holes)
    good = (flag == 0) & (flux > 0)
    magnitude = -2500 * np.log10(flux[good] / truth.flux[pick[good], 1])
    scatter = 1.4826 * float(np.median(np.abs(magnitude - np.median(magnitude))))
    light = truth.render(wcs, green.shape, 2.8)[..., 1]
    rest = np.where(holes, np.nan, green - light)
    ny, nx = (size // 32 * 32 for size in rest.shape)
    boxes = rest[:ny, :nx].reshape(ny // 32, 32, nx // 32, 32).swapaxes(1, 2).reshape(-1, 1024)
    there = np.flatnonzero(np.isfinite(boxes).all(axis=1))
    sky = np.median(boxes[there], axis=1)
    design = np.c_[np.ones(len(there)), np.stack(np.divmod(there, nx // 32), axis=1)]
    left = sky - design @ np.linalg.lstsq(design, sky, rcond=None)[0]
    pixel = np.diff(rest, axis=1) / np.sqrt(2)
    noise = 1.4826 * float(np.nanmedian(np.abs(pixel)))
    return scatter, 1.4826 * float(np.median(np.abs(left))), noise


def _available(name: str) -> str | None:
    """The program behind a name, if it is there."""
    if name == "swarp":
        return shutil.which("SWarp") or shutil.which("swarp")
    if name == "montage":
        return shutil.which("mProjExec")
    return sys.executable


def _pair(text: str) -> tuple[int, int]:
    first, second = text.lower().split("x")
    return int(first), int(second)


if __name__ == "__main__":
    main()
