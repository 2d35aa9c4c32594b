"""How good a frame or a tile is, and which of them are too bad to be stacked.

Frames are judged against the night they belong to and the frames of the same field, tiles against their own
interior; nothing here knows an absolute "good". ``zequalitymt FILES [--json]`` prints the metrics and the verdict.
docs/quality.md has all formulas.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from zemosaic.calibrate import Calibration
from zemosaic.execute import elsewhere, memory_budget, one_thread_each, thread_map, worker_count
from zemosaic.frames import Frame, FrameError, find_files, read_frame
from zemosaic.measure import FrameMeasure, choose_aperture, measure_frame
from zemosaic.night import CLEAR, compare, needed, nights
from zemosaic.stars import Aperture
from zemosaic.tiles import FloatImage

FloatArray = NDArray[np.float64]
Item = TypeVar("Item")
Result = TypeVar("Result")

CELL_FWHM2 = 2 * 8 * math.log(2) * 2**2 / 12  # px^2: see frame_metrics

SHAPE_FAULTS = ("doubled", "trailed", "blurred", "misplaced")

FEW_FRAMES = 5  # fewer are no night to be judged by
FEW_STARS = 20  # sources below which it means nothing that others do not see them
FEW_SHAPES = 8  # sources below which a common elongation means nothing
BLUR_FACTOR = 1.6  # FWHM over the night's median that is called blurred
DOUBLED = 0.35  # share of doubled stars above the night's that is called doubled
TRAILING = 0.2  # common elongation above the night's that is called trailed
MISPLACED = 0.3  # share of stars in place, against the frames around, under which a WCS is called wrong
OFFSET = 1.0  # px above the night's by which stars are out of place
PATCHY = 0.1  # scatter of a frame's star fluxes (ln units) above the night's that is called clouded
UNEVEN, UNEVEN_NOISE = 2.5, 0.5  # structure of the sky, against frames of the same aim and a pixel's noise
STARVED = 0.2  # share of the night's stars under which a frame is called clouded
OPAQUE = 0.2  # transparency under which it is: such a frame has under a twentieth of the usual weight
GLOW, MOST_GLOW = 0.2, 1.5  # exponent and end of the part that a brighter sky has in calling a frame dimmed

MIN_BAND_DATA = 256  # px with data from which noise and level can be measured
NOISE_FLOOR = 0.1  # least scatter of the noise, in units of it: an even interior makes no outliers
LEVEL_FLOOR = 0.5  # least scatter of the level, in units of the noise of a single frame


@dataclass(frozen=True)
class FrameMetrics:
    """Quality of one frame; NaN where it cannot be measured.

    Parameters
    ----------
    stars : int
        Sources found, up to the 400 brightest.
    fwhm : float
        Typical full width at half maximum, px of the frame.
    ellipticity : float
        Median ``1 - b / a``.
    trailing, angle : float
        Elongation common to the stars, 0..1, and its direction, degrees from the x axis towards y.
    doubled, jump : float
        Share of the stars with a companion at one and the same shift, and the length of that shift, px.
    sky, noise : float
        Sky, and noise of one photosite, means of the colours, ADU.
    structure : float
        Unevenness of the sky, ADU.
    snr : float
        Median flux of the 10 brightest stars that are fit for photometry over the sky's noise in the aperture.
    transparency, patchiness, unevenness, placed, offset : float
        See `zemosaic.night.Comparison`.
    """

    stars: int = 0
    fwhm: float = math.nan
    ellipticity: float = math.nan
    trailing: float = math.nan
    angle: float = math.nan
    doubled: float = math.nan
    jump: float = math.nan
    sky: float = math.nan
    noise: float = math.nan
    structure: float = math.nan
    snr: float = math.nan
    transparency: float = math.nan
    patchiness: float = math.nan
    unevenness: float = math.nan
    placed: float = math.nan
    offset: float = math.nan


@dataclass(frozen=True)
class Verdict:
    """A frame, how good it is, what its fault is ("" for none) and which night it was judged by."""

    frame: Frame
    metrics: FrameMetrics
    reason: str
    night: str

    @property
    def fault(self) -> str:
        """First word of the reason: doubled, trailed, blurred, misplaced, clouded, dimmed or ""."""
        return self.reason.partition(":")[0]


def frame_metrics(measure: FrameMeasure, **compared: float) -> FrameMetrics:
    """What the measure of a frame tells of its quality, and what the comparison with its night told (`compared`).

    Notes
    -----
    FWHM is twice the half-light radius r50, which is exact for a Gaussian, less the width that sampling
    adds: a cell of 2x2 px is a box of variance 2²/12 px², once as it collects the light and once more as the
    aperture takes its light as spread evenly, in FWHM² together ``2 * 8 ln 2 * 4 / 12 = 3.7`` px². Real
    stars have wings, which widen r50: for a Moffat profile of beta = 3 the result is a quarter above
    the true FWHM. All frames of a night share this bias, and they are only compared with each other.
    """
    return FrameMetrics(
        stars=measure.detected,
        fwhm=math.sqrt(max(measure.fwhm**2 - CELL_FWHM2, 0.25)),
        ellipticity=measure.ellipticity,
        trailing=measure.trailing,
        angle=measure.angle,
        doubled=measure.doubled,
        jump=measure.jump,
        sky=float(measure.sky.mean()),
        noise=float(measure.noise.mean()),
        structure=measure.structure,
        snr=measure.snr,
        **compared,
    )


def judge(
    frames: Sequence[Frame],
    measures: Sequence[FrameMeasure],
    *,
    blur_factor: float = BLUR_FACTOR,
    transparency: float = CLEAR,
) -> list[Verdict]:
    """Metrics and verdict of frames of any number of cameras and nights: see `gate_frames`."""
    labels = nights(frames)
    verdicts: dict[int, Verdict] = {}
    for label in dict.fromkeys(labels):
        members = [i for i, own in enumerate(labels) if own == label]
        told = asdict(compare([frames[i] for i in members], [measures[i] for i in members]))
        metrics = [
            frame_metrics(measures[i], **{name: float(values[k]) for name, values in told.items()})
            for k, i in enumerate(members)
        ]
        reasons = gate_frames(metrics, blur_factor=blur_factor, transparency=transparency)
        verdicts |= {i: Verdict(frames[i], m, why, label) for i, m, why in zip(members, metrics, reasons, strict=True)}
    return [verdicts[i] for i in range(len(frames))]


def gate_frames(
    metrics: Sequence[FrameMetrics], *, blur_factor: float = BLUR_FACTOR, transparency: float = CLEAR
) -> list[str]:
    """Which frames of a night have a fault.

    Losing a good frame is worse than keeping a poor one, whose weight will be small. A frame gets the first
    of these faults that applies:

    * *doubled*: the mount jumped within the exposure. The share of doubled stars exceeds the night's median by
      0.35 and by 5 robust sigmas;
    * *trailed*: the common elongation exceeds the night's median by 0.2 and by 5 robust sigmas;
    * *blurred*: the FWHM exceeds `blur_factor` times the night's median;
    * *misplaced*: its WCS is wrong. The frames around see under 0.3 of the usual share of its stars in their
      place, or the stars are 1 px and 5 robust sigmas farther off than the night's median;
    * *clouded*: the star fluxes scatter by 0.1 and by 5 robust sigmas more than the night's median; or the sky
      is 2.5 times as uneven as in frames of the same aim, and by half the noise of a pixel at least; or the
      stars have less than 0.2 of their light; or, where that could not be measured, there are under 0.2 of the
      night's median of stars and this is 4 robust sigmas off in ln(stars), so that panels of sparse sky pass;
    * *dimmed*: the stars have less than `transparency` of their light in the clear frames. Clouds brighten most
      skies: where the sky is brighter than the night's, the limit rises by (noise² / median noise²)^0.2, 8 % at
      most.

    Of fewer than 5 frames only gross outliers have a fault: the factors are squared, the excesses doubled.

    Parameters
    ----------
    metrics : sequence of FrameMetrics
        Frames of one instrument and night, all measured in the same way.
    blur_factor : float
        > 1.
    transparency : float
        0..1.

    Returns
    -------
    list of str
        For every frame its fault and the figures that show it, or "" for a good one.
    """
    if not metrics:
        return []
    night = _Night.of(metrics, blur_factor, transparency)
    return [night.shape_fault(m) or night.light_fault(m) for m in metrics]


@dataclass(frozen=True)
class _Night:
    """What is usual in a night, and the limits that follow; see `gate_frames`."""

    stars: float
    few_stars: float
    fwhm: float
    noise: float
    blur_factor: float
    transparency: float
    doubled: float
    trailing: float
    offset: float
    patchiness: float
    power: int

    @classmethod
    def of(cls, metrics: Sequence[FrameMetrics], blur_factor: float, transparency: float) -> _Night:
        power = 2 if len(metrics) < FEW_FRAMES else 1
        stars = _low_median([float(m.stars) for m in metrics])
        log_stars, usual = [math.log(m.stars + 1) for m in metrics], math.log(stars + 1)
        sparse = math.exp(usual - 4 * _scatter(log_stars, usual)) - 1
        return cls(
            stars=stars,
            few_stars=min(STARVED**power * stars, sparse),
            fwhm=_low_median([m.fwhm for m in metrics]),
            noise=_low_median([m.noise for m in metrics]),
            blur_factor=blur_factor**power,
            transparency=transparency,
            doubled=_limit([m.doubled for m in metrics], power * DOUBLED),
            trailing=_limit([m.trailing for m in metrics], power * TRAILING),
            offset=_limit([m.offset for m in metrics], power * OFFSET),
            patchiness=_limit([m.patchiness for m in metrics], power * PATCHY),
            power=power,
        )

    def shape_fault(self, m: FrameMetrics) -> str:
        if m.doubled > self.doubled:
            return f"doubled: {m.doubled:.0%} of its stars are there twice, {m.jump:.0f} px apart"
        if m.trailing > self.trailing and m.stars >= FEW_SHAPES:
            return f"trailed: stars elongated by {m.trailing:.2f}, the night's limit is {self.trailing:.2f}"
        if m.fwhm > self.blur_factor * self.fwhm:
            return f"blurred: FWHM {m.fwhm:.1f} px, the night's median is {self.fwhm:.1f} px"
        if m.placed < MISPLACED**self.power and m.stars >= FEW_STARS:
            return f"misplaced: the frames around see {m.placed:.0%} of the usual share of its stars in their place"
        if m.offset > self.offset:
            return f"misplaced: its stars are {m.offset:.1f} px from where other frames see them"
        return ""

    def light_fault(self, m: FrameMetrics) -> str:
        if m.patchiness > self.patchiness:
            return f"clouded: its stars are dimmed unevenly, by {m.patchiness:.0%} (1 sigma)"
        if m.unevenness > UNEVEN**self.power and m.structure > UNEVEN_NOISE * m.noise:
            return f"clouded: its sky is {m.unevenness:.1f} times as uneven as in frames of the same aim"
        if math.isnan(m.transparency):
            few = m.stars < self.few_stars
            return f"clouded: {m.stars} stars, the night's median is {self.stars:.0f}" if few else ""
        glow = min(max((m.noise / self.noise) ** 2, 1.0), MOST_GLOW) if self.noise > 0 else 1.0
        if m.transparency < (self.transparency * glow**GLOW) ** self.power:
            word = "clouded" if m.transparency < OPAQUE else "dimmed"
            return f"{word}: its stars have {m.transparency:.0%} of their light in the night's clear frames"
        return ""


def kept(verdicts: Sequence[Verdict], faults: Collection[str]) -> list[bool]:
    """Which frames to stack if frames with these faults are to be left out.

    Dimmed ones stay where too little would be left of their field (see `zemosaic.night.needed`).
    """
    stay = [v.fault not in faults for v in verdicts]
    rivals = [i for i, v in enumerate(verdicts) if v.frame.wcs is not None and (stay[i] or v.fault == "dimmed")]
    dimmed = np.array([not stay[i] for i in rivals], bool)
    for i, needs in zip(rivals, needed([verdicts[i].frame for i in rivals], dimmed).tolist(), strict=True):
        stay[i] = stay[i] or needs
    return stay


def _low_median(values: Sequence[float]) -> float:
    """Median of the finite values, the lower of the middle two; NaN without any."""
    finite = sorted(v for v in values if math.isfinite(v))
    return finite[(len(finite) - 1) // 2] if finite else math.nan


def _scatter(values: Sequence[float], centre: float) -> float:
    """Scaled median absolute deviation of the finite values; 0 without any."""
    deviation = [abs(v - centre) for v in values if math.isfinite(v)]
    return 1.4826 * float(np.median(deviation)) if deviation else 0.0


def _limit(values: Sequence[float], excess: float) -> float:
    """The night's median and on top of it `excess` or 5 robust sigmas, whichever is more."""
    centre = _low_median(values)
    return centre + max(excess, 5 * _scatter(values, centre))


# --- tiles --------------------------------------------------------------------------------------------------


def centre_and_scatter(values: FloatArray) -> tuple[float, float]:
    """Median and scaled median absolute deviation of finite values ``(n,)``, n > 0."""
    centre = float(np.median(values))
    return centre, 1.4826 * float(np.median(np.abs(values - centre)))


def noise_and_level(pixels: FloatImage, depth: FloatImage) -> tuple[float, float]:
    """Noise of a single frame's pixel and median level of a part of a picture.

    The noise is the scaled median absolute difference of neighbours along the rows: blind to sky and nebula
    and hardly touched by stars.

    Parameters
    ----------
    pixels : ndarray
        ``(h, w)`` float32, ADU, NaN = no data.
    depth : ndarray
        ``(h, w)`` float32, root of the coverage, which scales the noise of a mean back to that of a frame.

    Returns
    -------
    noise, level : float
        ADU; both NaN where fewer than `MIN_BAND_DATA` pixel pairs have data.
    """
    step = 1 + pixels.size // 200_000  # more pixels would not make either figure better
    here = pixels[:, :-1:step]
    differences = (here - pixels[:, 1::step]) * depth[:, :-1:step]
    known = np.isfinite(differences)
    if np.count_nonzero(known) < MIN_BAND_DATA:
        return math.nan, math.nan
    noise = 1.4826 / math.sqrt(2) * np.median(np.abs(differences[known]))
    return float(noise), float(np.median(here[known]))


def photon_allowance(level: FloatArray, interior: float) -> FloatArray:
    """How much noisier than the interior a part of this level may be: in proportion to it, 1 to 3 times.

    Photon noise grows with the root of the light, and ADU may contain a pedestal; both stay below.
    """
    return np.clip(level / interior, 1.0, 3.0) if interior > 0 else np.ones_like(level)


@dataclass(frozen=True)
class TileMetrics:
    """Quality of a tile or mosaic, judged against its own interior.

    Parameters
    ----------
    noise : float
        Median noise of the interior, scaled to a single frame, ADU; NaN for a tile too small to judge.
    uniformity : float
        Share of the interior's blocks that are as quiet as the rest and free of steps of level, 0..1.
    edge : float
        The same share of the blocks at the border or at no data, 0..1.
    """

    noise: float = math.nan
    uniformity: float = 0.0
    edge: float = 0.0

    @property
    def score(self) -> float:
        """``uniformity * edge``: 0 = useless, 1 = flawless."""
        return self.uniformity * self.edge


def tile_metrics(
    image: FloatImage, coverage: FloatImage, edge_px: int = 64, k_sigma: float = 2.5, erode_px: int = 3
) -> TileMetrics:
    """Measure a tile in blocks of `edge_px` squared.

    A block is bad where its noise exceeds the interior's median by more than `k_sigma` of its robust
    scatter (10 % at least; the limit grows with the level, as photon noise does), or where its level makes
    a step of more than `k_sigma` times the noise of a pixel of the tile. A step is sharp, within 4 px along
    the rows or columns; nebulae and gradients are smooth at this scale and pass.

    Parameters
    ----------
    image : ndarray
        ``(H, W, 3)`` or ``(H, W)`` float32, ADU, NaN = no data.
    coverage : ndarray
        ``(H, W)`` float32, frames.
    edge_px : int
        Width of the edge and size of a block, px.
    k_sigma : float
        Limit in robust standard deviations.
    erode_px : int
        Outermost pixels of the data that are not looked at (px): interpolation ends there.
    """
    noise, level, step = _block_facts(image, coverage, edge_px, erode_px)
    known = np.isfinite(noise)
    core = known & ndimage.binary_erosion(known, np.ones((3, 3)))
    if np.count_nonzero(core) < 4:
        return TileMetrics()
    noise_mid, noise_scatter = centre_and_scatter(noise[core])
    limit = noise_mid + k_sigma * max(noise_scatter, NOISE_FLOOR * noise_mid)
    quiet = noise <= limit * photon_allowance(level, float(np.median(level[core])))
    good = quiet & (step <= k_sigma * noise_mid / math.sqrt(np.median(coverage[coverage > 0])))
    edge = known & ~core
    return TileMetrics(noise_mid, float(good[core].mean()), float(good[edge].mean()) if edge.any() else 1.0)


def _block_facts(
    image: FloatImage, coverage: FloatImage, edge_px: int, erode_px: int
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """`noise_and_level` and `_sharpest_step` of every block of a tile, three ``(rows, columns)`` arrays."""
    luminance = image.mean(axis=2) if image.ndim == 3 else image.copy()
    inside = coverage > 0
    if erode_px:
        inside = ndimage.binary_erosion(inside, iterations=erode_px)
    luminance[~inside] = np.nan
    depth = np.sqrt(coverage)
    ys, xs = (np.linspace(0, n, max(1, n // edge_px) + 1).astype(int) for n in coverage.shape)
    facts = []
    for y0, y1 in pairwise(ys):
        for x0, x1 in pairwise(xs):
            step = _sharpest_step(luminance[y0 : y1 + 12, x0 : x1 + 12])  # not to miss one between blocks
            facts.append((*noise_and_level(luminance[y0:y1, x0:x1], depth[y0:y1, x0:x1]), step))
    noise, level, steps = np.array(facts).T.reshape(3, len(ys) - 1, len(xs) - 1)
    return noise, level, steps


def _sharpest_step(block: FloatImage) -> float:
    """Greatest jump of the level within 4 px along the rows or columns of a block, ADU.

    Third differences between means of 4 px, which gradients do not move and in which a step counts twice;
    their median across the block, which no star moves. 0 where the block has too little data.
    """
    steps = [0.0]
    for lines in (block, block.T):
        means = lines[: len(lines) // 4 * 4].reshape(len(lines) // 4, 4, -1).mean(axis=1)
        jumps = np.diff(means, 3, axis=0)
        jumps = jumps[np.isfinite(jumps).all(axis=1)]
        if jumps.size:
            steps.append(float(np.abs(np.median(jumps, axis=1)).max()) / 2)
    return max(steps)


def tile_gate(metrics: TileMetrics, threshold: float = 0.48) -> str:
    """Why to leave a tile out (its score is below `threshold`), or ""; one too small to judge passes."""
    if math.isnan(metrics.noise) or metrics.score >= threshold:
        return ""
    parts = f"interior {metrics.uniformity:.2f}, edge {metrics.edge:.2f}"
    return f"score {metrics.score:.2f} under {threshold:.2f} ({parts})"


# --- the command line ---------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: metrics and verdict of FITS frames, which are only read.

    Returns
    -------
    int
        0, or 1 if a file could not be read or copied.
    """
    options = _parser().parse_args(argv)
    with one_thread_each():
        frames, measures, problems = _measure_files(options.files, worker_count(options.workers))
    verdicts = judge(frames, measures, blur_factor=options.blur_factor, transparency=options.transparency)
    if options.move_rejects:
        problems += copy_rejects(verdicts, options.move_rejects)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(_as_json(verdicts) if options.json else _as_table(verdicts))
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zequalitymt", description="Metrics and verdict of the frames of a night.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILES", help="FITS frames, or folders of them")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--move-rejects", type=Path, metavar="DIR", help="copy the frames with a fault there")
    limits = (
        ("--blur-factor", BLUR_FACTOR, "FWHM over the night's median that is called blurred"),
        ("--transparency", CLEAR, "share of their light below which stars are called dimmed"),
    )
    for name, default, text in limits:
        parser.add_argument(name, type=float, default=default, metavar="X", help=f"{text} ({default})")
    parser.add_argument("--workers", type=int, default=-1, metavar="N", help="frames measured at the same time")
    return parser


def _measure_files(inputs: Sequence[Path], workers: int) -> tuple[list[Frame], list[FrameMeasure], list[str]]:
    """Every frame that can be read and its measure, in order of time, and what is wrong with the others."""
    problems: list[str] = []

    def attempt(work: Callable[[Item], Result], item: Item) -> Result | None:
        try:
            return work(item)
        except FrameError as problem:
            problems.append(f"{problem.path}: {problem}")
            return None

    paths = attempt(find_files, inputs) or []
    read = thread_map(partial(attempt, read_frame), paths, workers)
    frames = sorted((f for f in read if f), key=lambda f: (f.date_obs, f.path.name, str(f.path)))
    aperture = choose_aperture(frames, Calibration()) if frames else Aperture()
    here = partial(measure_frame, calibration=Calibration(), aperture=aperture)
    budget = memory_budget()
    with elsewhere(here, workers, len(frames), budget) as (measure, threads):
        measures = list(thread_map(partial(attempt, measure), frames, threads))
    there = [(f, m) for f, m in zip(frames, measures, strict=True) if m]
    return [f for f, _ in there], [m for _, m in there], sorted(problems)


def copy_rejects(verdicts: Sequence[Verdict], folder: Path) -> list[str]:
    """Copy the frames with a fault below `folder`, by their paths below the folder that holds all frames.

    Nothing is ever overwritten, and the frames themselves stay where they are.

    Returns
    -------
    list of str
        What could not be copied, and why.
    """
    problems = []
    parents = [os.path.abspath(v.frame.path.parent) for v in verdicts]
    for verdict, parent in zip(verdicts, parents, strict=True):
        if not verdict.reason:
            continue
        target = folder / os.path.relpath(parent, os.path.commonpath(parents)) / verdict.frame.path.name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with verdict.frame.path.open("rb") as original, target.open("xb") as copy:
                shutil.copyfileobj(original, copy)
            shutil.copystat(verdict.frame.path, target)
        except FileExistsError:
            problems.append(f"{target} exists already: it is left as it is")
        except OSError as problem:
            problems.append(f"{verdict.frame.path} cannot be copied to {target}: {problem.strerror}")
    return problems


def _as_json(verdicts: Sequence[Verdict]) -> str:
    """A list of objects; what could not be measured is null."""
    rows = []
    for v in verdicts:
        figures = {name: x if math.isfinite(x) else None for name, x in asdict(v.metrics).items()}
        rows.append({"file": str(v.frame.path), "night": v.night} | figures | {"fault": v.fault, "reason": v.reason})
    return json.dumps(rows, indent=1)


def _as_table(verdicts: Sequence[Verdict]) -> str:
    """One line a frame, the path and its fault last."""
    lines = [
        f"{'stars':>5} {'FWHM':>6} {'ellip':>6} {'trail':>6} {'sky':>9} {'noise':>8} {'S/N':>7} {'clear':>6}  file"
    ]
    for v in verdicts:
        m = v.metrics
        shape = f"{m.stars:5d} {m.fwhm:6.2f} {m.ellipticity:6.2f} {m.trailing:6.2f}"
        light = f"{m.sky:9.1f} {m.noise:8.2f} {m.snr:7.1f} {m.transparency:6.2f}"
        lines.append(f"{shape} {light}  {v.frame.path}{'  ' + v.reason if v.reason else ''}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
