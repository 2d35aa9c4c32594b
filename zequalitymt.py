"""How good a frame or a tile is, and which of them are too bad to be stacked.

Frames are judged against the night they belong to, tiles against their own interior; nothing here knows an
absolute "good". ``python zequalitymt.py FILES [--json]`` prints the metrics and the verdict.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import sep
from numpy.typing import NDArray
from scipy import ndimage

from zemosaic.frames import FrameError, find_files, read_frame, read_pixels
from zemosaic.tiles import FloatImage

FloatArray = NDArray[np.float64]

DETECT_SIGMA = 4.0  # of the sky noise, in the image smoothed by sep's 3x3 kernel
MESH_PX = 32  # background mesh; follows nebulae, far wider than a blurred star
MAX_MEASURED = 200  # stars whose shape is measured; their median has settled long before
MIN_MEASURED = 5  # stars below which a median shape means nothing
SHARP = 0.15  # 4th-brightest over brightest pixel of a 3x3 box: below it no optics made this source
PIXEL_FWHM2 = 2 * 8 * math.log(2) / 12  # px^2: see frame_metrics

MIN_BAND_DATA = 256  # px with data from which noise and level can be measured
FEW_FRAMES = 5  # fewer are no night to be judged by
STARVED = 0.2  # share of the night's stars under which a frame is called clouded
TRAILING = 0.2  # common elongation above the night's that is called trailed

NOISE_FLOOR = 0.1  # least scatter of the noise, in units of it: an even interior makes no outliers
LEVEL_FLOOR = 0.5  # least scatter of the level, in units of the noise of a single frame


@dataclass(frozen=True)
class FrameMetrics:
    """Quality of one frame; NaN where it cannot be measured.

    Parameters
    ----------
    stars : int
        Sources that look like stars.
    fwhm : float
        Median full width at half maximum, px of the full frame.
    ellipticity : float
        Median ``1 - b / a``.
    trailing : float
        Elongation common to the stars, 0..1: length of the median of the vectors
        ``(a^2 - b^2) / (a^2 + b^2) * (cos 2 theta, sin 2 theta)``. Noise and optics point
        everywhere and cancel.
    angle : float
        Direction of the trailing, degrees from the x axis towards y, 0..180.
    sky, noise : float
        Median sky and noise of one pixel of the image that was measured, ADU.
    snr : float
        Median signal-to-noise of the measured stars within their half-light circle.
    """

    stars: int = 0
    fwhm: float = math.nan
    ellipticity: float = math.nan
    trailing: float = math.nan
    angle: float = math.nan
    sky: float = math.nan
    noise: float = math.nan
    snr: float = math.nan


@dataclass(frozen=True)
class _Sources:
    """What `_detect` found: how many stars, and the shapes of the brightest.

    All arrays ``(n,)`` float64: half-light radius and second-moment axes in px, position angle in radians.
    """

    count: int
    flux: FloatArray
    radius: FloatArray
    a: FloatArray
    b: FloatArray
    theta: FloatArray
    sky: float
    noise: float


def frame_metrics(luminance: FloatImage, scale: float = 1.0, saturation: float = math.inf) -> FrameMetrics:
    """Measure a frame.

    Parameters
    ----------
    luminance : ndarray
        ``(h, w)`` float32, ADU, NaN = no data; usually the means of the 2x2 cells of the sensor. Hot
        pixels do no harm.
    scale : float
        Pixels of the full frame per pixel of `luminance` (2 for 2x2 cells); `fwhm` is given in the former.
    saturation : float
        ADU of `luminance` from which a star's shape is not to be trusted.

    Returns
    -------
    FrameMetrics
        ``stars = 0`` and NaN shapes for a frame without a star.

    Notes
    -----
    FWHM is twice the half-light radius r50, which is exact for a Gaussian, less the width that sampling
    adds: a pixel is a box of variance 1/12 px^2, once as the detector integrates over it and once more as the
    aperture takes its light as spread evenly, in FWHM^2 together ``2 * 8 ln 2 / 12 = 0.92`` px^2. Real
    stars have wings, which widen r50: for a Moffat profile of beta = 3 the result is a quarter above
    the true FWHM. All frames of a night share this bias, and they are only compared with each other.
    """
    found = _detect(luminance, saturation)
    metrics = FrameMetrics(stars=found.count, sky=found.sky, noise=found.noise)
    if found.flux.size < MIN_MEASURED:
        return metrics
    width2 = np.maximum((2 * found.radius) ** 2 - PIXEL_FWHM2, 0.25)
    elongation = (found.a**2 - found.b**2) / (found.a**2 + found.b**2)
    along = float(np.median(elongation * np.cos(2 * found.theta)))
    across = float(np.median(elongation * np.sin(2 * found.theta)))
    return FrameMetrics(
        stars=found.count,
        fwhm=scale * float(np.sqrt(np.median(width2))),
        ellipticity=float(np.median(1 - found.b / found.a)),
        trailing=math.hypot(along, across),
        angle=math.degrees(math.atan2(across, along)) / 2 % 180,
        sky=found.sky,
        noise=found.noise,
        snr=float(np.median(found.flux / (2 * math.sqrt(math.pi) * found.noise * found.radius))),
    )


def _detect(luminance: FloatImage, saturation: float) -> _Sources:
    """Find stars over the local background, and measure the brightest.

    Close pairs are not taken apart and neighbours not left out: the medians over the brightest do not notice
    them, not even in a simulated field of 1800 detections (FWHM within 1 %).
    """
    image = np.array(luminance, dtype=np.float32, order="C")  # a copy: sep subtracts in place
    blank = ~np.isfinite(image)
    image[blank] = 0
    none = np.zeros(0)
    if image.size - np.count_nonzero(blank) < MESH_PX**2:
        return _Sources(0, none, none, none, none, none, math.nan, math.nan)
    background = sep.Background(image, mask=blank, bw=MESH_PX, bh=MESH_PX)
    background.subfrom(image)
    image[blank] = 0
    sky, noise = background.globalback, background.globalrms
    # A buffer as large as the image cannot overflow, nor can deblending that is switched off.
    sep.set_extract_pixstack(max(sep.get_extract_pixstack(), image.size))
    found = sep.extract(image, DETECT_SIGMA * noise, mask=blank, minarea=4, deblend_cont=1.0)
    found = found[(found["flag"] & (sep.OBJ_TRUNC | sep.OBJ_SINGU) == 0) & ~_sharp(image, found)]
    found = found[np.argsort(-found["peak"], kind="stable")]
    count = len(found)
    found = found[(found["peak"] + sky < saturation) & (found["b"] > 0)][:MAX_MEASURED]
    if not len(found):
        return _Sources(count, none, none, none, none, none, sky, noise)
    reach = np.clip(4 * found["a"], 4, 16)
    radius, trouble = sep.flux_radius(image, found["x"], found["y"], reach, 0.5, subpix=5)
    good = (trouble == 0) & (radius > 0)
    flux, a, b, theta = (found[name][good].astype(np.float64) for name in ("flux", "a", "b", "theta"))
    return _Sources(count, flux, radius[good], a, b, theta, sky, noise)


def _sharp(image: FloatImage, found: NDArray[np.void]) -> NDArray[np.bool_]:
    """Hot pixels and cosmic hits: sources sharper than any star, or with their peak on the border."""
    height, width = image.shape
    x, y = found["xpeak"], found["ypeak"]
    inside = (x > 0) & (y > 0) & (x < width - 1) & (y < height - 1)
    x, y = np.clip(x, 1, width - 2), np.clip(y, 1, height - 2)
    box = np.sort([image[y + j, x + i] for j in (-1, 0, 1) for i in (-1, 0, 1)], axis=0)
    return ~inside | (box[-4] < SHARP * box[-1])


def gate_frames(metrics: Sequence[FrameMetrics], *, blur_factor: float = 1.6) -> list[str]:
    """Which frames of a night are too bad to be stacked.

    Losing a good frame is worse than keeping a poor one, whose weight will be small. A frame is out only if

    * *blurred*: its FWHM exceeds `blur_factor` times the night's median;
    * *trailed*: its common elongation exceeds the night's median by 0.2 and by 5 robust sigmas;
    * *clouded*: it shows under 0.2 of the night's median of stars, and this is 4 robust sigmas off in
      ln(stars), so that panels of sparse sky pass in a mosaic whose star density varies.

    Of fewer than 5 frames only gross outliers go: the factors are squared, the elongation doubled.

    Parameters
    ----------
    metrics : sequence of FrameMetrics
        Frames of one instrument, all measured in the same way.
    blur_factor : float
        > 1.

    Returns
    -------
    list of str
        For every frame the reason to leave it out, or "" for a good one.
    """
    power = 2 if len(metrics) < FEW_FRAMES else 1
    fwhm = _low_median([m.fwhm for m in metrics])
    trailing = [m.trailing for m in metrics]
    trail_mid = _low_median(trailing)
    trail_limit = trail_mid + max(power * TRAILING, 5 * _scatter(trailing, trail_mid))
    stars = _low_median([float(m.stars) for m in metrics])
    log_stars = [math.log(m.stars + 1) for m in metrics]
    few = math.log(stars + 1) - 4 * _scatter(log_stars, math.log(stars + 1)) if metrics else 0.0

    def reason(m: FrameMetrics) -> str:
        if m.stars < STARVED**power * stars and math.log(m.stars + 1) < few:
            return f"clouded: {m.stars} stars, the night's median is {stars:.0f}"
        if m.trailing > trail_limit:
            return f"trailed: stars elongated by {m.trailing:.2f}, the night's median is {trail_mid:.2f}"
        if m.fwhm > blur_factor**power * fwhm:
            return f"blurred: FWHM {m.fwhm:.1f} px, the night's median is {fwhm:.1f} px"
        return ""

    return [reason(m) for m in metrics]


def _low_median(values: Sequence[float]) -> float:
    """Median of the finite values, the lower of the middle two; NaN without any."""
    finite = sorted(v for v in values if math.isfinite(v))
    return finite[(len(finite) - 1) // 2] if finite else math.nan


def _scatter(values: Sequence[float], centre: float) -> float:
    """Scaled median absolute deviation of the finite values; 0 without any."""
    deviation = [abs(v - centre) for v in values if math.isfinite(v)]
    return 1.4826 * float(np.median(deviation)) if deviation else 0.0


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


def binned_luminance(pixels: FloatImage) -> tuple[FloatImage, float]:
    """Mean of the 2x2 cells (and colours) of a frame, CFA or not, and its scale of 2 for `frame_metrics`."""
    grey = pixels.mean(axis=2) if pixels.ndim == 3 else pixels
    ny, nx = grey.shape[0] // 2, grey.shape[1] // 2
    return grey[: 2 * ny, : 2 * nx].reshape(ny, 2, nx, 2).mean(axis=(1, 3)), 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: metrics and verdict of FITS frames.

    Returns
    -------
    int
        0, or 1 if a file could not be read.
    """
    parser = argparse.ArgumentParser(prog="zequalitymt", description="Metrics and verdict of the frames of a night.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILES", help="FITS frames, or folders of them")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--blur-factor", type=float, default=1.6, help="FWHM over the night's median (1.6)")
    options = parser.parse_args(argv)
    paths, metrics, failures = [], [], 0
    for path in find_files(options.files):
        try:
            frame = read_frame(path)
            luminance, scale = binned_luminance(read_pixels(frame))
        except FrameError as problem:
            print(f"{path}: {problem}", file=sys.stderr)
            failures += 1
            continue
        paths.append(path)
        # The mean of a cell stays well below its brightest photosite.
        metrics.append(frame_metrics(luminance, scale, 0.5 * frame.saturation))
    reasons = gate_frames(metrics, blur_factor=options.blur_factor)
    rows = list(zip(paths, metrics, reasons, strict=True))
    print(_as_json(rows) if options.json else _as_table(rows))
    return 1 if failures else 0


def _as_json(rows: Sequence[tuple[Path, FrameMetrics, str]]) -> str:
    """A list of objects; what could not be measured is null."""
    return json.dumps(
        [
            {"file": str(path)}
            | {name: value if math.isfinite(value) else None for name, value in asdict(m).items()}
            | {"reason": reason}
            for path, m, reason in rows
        ],
        indent=1,
    )


def _as_table(rows: Sequence[tuple[Path, FrameMetrics, str]]) -> str:
    """One line a frame, the path last."""
    lines = [f"{'stars':>5} {'FWHM':>6} {'ellip':>6} {'trail':>6} {'sky':>9} {'noise':>8} {'S/N':>7}  file"]
    for path, m, reason in rows:
        shape = f"{m.stars:5d} {m.fwhm:6.2f} {m.ellipticity:6.2f} {m.trailing:6.2f}"
        light = f"{m.sky:9.1f} {m.noise:8.2f} {m.snr:7.1f}"
        lines.append(f"{shape} {light}  {path}{'  OUT: ' + reason if reason else ''}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
