"""What the coverage map says about the picture: the coverage cut and the two-pass renormalisation.

Coverage counts the frames that contributed at a pixel. The rosette rim of an alt-az mosaic has few, the
overlaps of panels have many; everything here is measured against the *typical* coverage of the picture,
never against its peak, which one deep overlap can push far above every panel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from zemosaic.execute import thread_map
from zemosaic.tiles import FloatImage, Mosaic

PLATEAU_SHARE = 0.10  # share of the covered sky at one depth that makes this depth a panel, not a ramp
PLATEAU_WIDTH = 0.10  # relative half width of "one depth"
SAMPLES = 1_000_000  # pixels that give the typical coverage well enough
_ROWS = 512  # of the mosaic that are judged at a time
DIP_PX = 15  # width of a dip in the coverage that rejection makes: a trail, a cosmic ray
MIN_FRAMES = 3.0  # fewer cannot tell which of two disagreeing samples is the bad one

BLOCK = 8  # px; small against nebulae, so that their third difference vanishes, large against the noise
_MIDDLE = slice(BLOCK**2 // 2 - 1, BLOCK**2 // 2 + 1)  # of its pixels in order
MIN_BORDER = 0.02  # third difference of ln(coverage) from which a block counts as lying on a border
MIN_BLOCKS = 50
MIN_SIGNIFICANCE = 5.0
MIN_STEP = 0.003  # relative difference of level worth touching the picture for


def typical_coverage(coverage: FloatImage) -> float:
    """The coverage of an ordinary panel of this mosaic, in frames.

    It is the median of the *shallowest plateau*: the lowest depth at which (within 10 %) at least 10 % of
    the covered sky lies, looked for up to the median of the covered pixels; without a plateau it is this
    median. The ramp of a rosette rim spreads over all depths and forms no plateau; overlaps and deep spots
    lie above the panels, so however large they grow they do not raise the result.

    Parameters
    ----------
    coverage : ndarray
        ``(H, W)`` float32, frames; 0 = no data.

    Returns
    -------
    float
        Frames, > 0.

    Raises
    ------
    ValueError
        If no pixel is covered.
    """
    step = max(1, math.isqrt(coverage.size // SAMPLES))
    depth = coverage[::step, ::step]
    depth = depth[depth > 0]
    if not depth.size:  # hardly anything is covered: look at every pixel
        depth = coverage[coverage > 0]
    if not depth.size:
        raise ValueError("The mosaic has no pixel with data, so it has no typical coverage.")
    level = np.maximum(np.rint(depth), 1).astype(np.int64)
    below = np.cumsum(np.bincount(level)) / level.size
    middle = float(np.median(depth))
    depths = np.arange(1, int(np.rint(middle)) + 1)
    width = (depths * PLATEAU_WIDTH).astype(np.int64)
    held = below[np.minimum(depths + width, below.size - 1)] - below[depths - width - 1]
    plateaus = depths[held >= PLATEAU_SHARE]
    if not plateaus.size:
        return middle
    # Where rejection took samples out of many pixels, the foot of a plateau passes for one: step to its top.
    near = (depths >= plateaus[0]) & (depths <= plateaus[0] * 4 / 3)
    top = depths[near][np.argmax(held[near])]
    return float(np.median(depth[np.abs(level - top) <= PLATEAU_WIDTH * top]))


def coverage_threshold(coverage: FloatImage, keep: float, min_frames: float = MIN_FRAMES) -> float:
    """Coverage below which a pixel is not worth keeping, in frames.

    ``min(keep * typical, max(min_frames, keep**2 * typical))``. Signal-to-noise grows with the root of the
    depth, so ``keep**2 * typical`` is where it falls under `keep` of that of an ordinary panel. Pixels of
    fewer than `min_frames` frames are no better than their worst sample, since rejection cannot verify
    them. The outer ``min`` is the plain reading of `keep`: it never lets the two other terms cut deeper,
    so that a mosaic of one or two frames a panel stays whole. With ``keep = 0.4``:

    ======== === === === === ====
    typical    1   5  10  30  100
    cut below 0.4  2   3 4.8   16
    ======== === === === === ====

    Parameters
    ----------
    coverage : ndarray
        ``(H, W)`` float32, frames.
    keep : float
        0 (keep everything) to 1.
    min_frames : float
        Frames from which rejection can verify a pixel.

    Raises
    ------
    ValueError
        If `keep` is outside 0..1 or no pixel is covered.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"The share of the typical coverage to keep must lie in 0..1, not {keep}.")
    typical = typical_coverage(coverage)
    return min(keep * typical, max(min_frames, keep**2 * typical))


def coverage_cut(mosaic: Mosaic, threshold: float, *, in_place: bool = False, workers: int = 1) -> tuple[Mosaic, int]:
    """Turn regions of less than `threshold` frames into "no data" (NaN, coverage 0, alpha 0).

    Where rejection took a sample of a satellite's trail or a cosmic ray, the coverage dips over a few
    pixels. Those dips are filled before judging (a grey closing of `DIP_PX`): a region is cut for how it
    was exposed, not for what was cleaned out of it. A large mosaic is better changed `in_place` than copied,
    and by several threads.

    Returns
    -------
    mosaic : Mosaic
        The very same object where nothing falls below the threshold, or in place.
    n_removed : int
        Covered pixels that were given up.
    """
    ny, reach = len(mosaic.coverage), 2 * DIP_PX

    def thin_rows(y: int) -> NDArray[np.bool_]:
        rows = mosaic.coverage[max(y - reach, 0) : y + _ROWS + reach]
        exposed = cv2.morphologyEx(rows, cv2.MORPH_CLOSE, np.ones((DIP_PX, DIP_PX), np.uint8))
        own = slice(min(y, reach), min(y, reach) + _ROWS)
        return (rows[own] > 0) & (exposed[own] < threshold)

    thin = np.concatenate(list(thread_map(thin_rows, range(0, ny, _ROWS), workers)))
    n_removed = int(np.count_nonzero(thin))
    if n_removed and not in_place:
        return mosaic.without(thin), n_removed
    mosaic.blank(thin)
    return mosaic, n_removed


@dataclass(frozen=True)
class RenormStats:
    """What `two_pass_renorm` measured and did.

    Parameters
    ----------
    slope : float
        d ln(level) / d ln(coverage) across the borders of coverage; NaN where it cannot be measured.
    significance : float
        The slope's distance from that of the control borders, in their standard deviations.
    step : float
        Relative difference of level between the deep and the shallow parts (90th and 10th percentile of
        the coverage) that the slope stands for.
    gain_min, gain_max : float
        Range of the gains applied; both 1 where nothing was changed.
    """

    slope: float = float("nan")
    significance: float = 0.0
    step: float = 0.0
    gain_min: float = 1.0
    gain_max: float = 1.0

    @property
    def applied(self) -> bool:
        """Whether the picture was touched."""
        return self.gain_min != 1.0 or self.gain_max != 1.0


def two_pass_renorm(
    mosaic: Mosaic, sigma_px: float = 50.0, gain_clip: tuple[float, float] = (0.85, 1.18), workers: int = 1
) -> tuple[Mosaic, RenormStats]:
    """Smooth what is left of steps of level that follow the borders of coverage.

    The level of a mean does not depend on how many frames went into it; where it does change with the
    coverage, frames came in with a wrong level. *First pass*: over blocks of 8 px, the slope of ln(level)
    against ln(coverage) is measured in their third differences along rows and columns. These see a step
    from one block to the next, and are blind to sky gradients and to nebulae, which are smooth at this
    scale whether or not they lie in a deep region. The same measurement on *control borders*, the same
    lines laid over 24 other places of the picture, gives the slope that chance and real structure make.
    *Second pass*, only if the slope stands `MIN_SIGNIFICANCE` above the controls and the step is more than
    `MIN_STEP`: the picture is divided by ``exp(slope * (ln n - smooth ln n))``, the smooth part a Gaussian
    of `sigma_px` over the covered pixels. That closes the step at the border and fades out within about
    `sigma_px` on either side; far from borders the gain is 1.

    Parameters
    ----------
    mosaic : Mosaic
        Linear, with its sky level (ADU > 0).
    sigma_px : float
        Reach of the correction, px.
    gain_clip : tuple of float
        Least and greatest gain, ``0 < least <= 1 <= greatest``.
    workers : int
        Threads that measure.

    Returns
    -------
    mosaic : Mosaic
        The very same object, hence bit-identical, where no significant step is found.
    stats : RenormStats
        The measurement.

    Notes
    -----
    The step is taken as multiplicative and common to the channels, so colours are kept; coverage, alpha
    and the choice of samples made by the rejection are not touched.
    """
    if not 0 < gain_clip[0] <= 1 <= gain_clip[1]:
        raise ValueError(f"The gain limits must enclose 1, not {gain_clip}.")
    depth, level = _block_logs(mosaic, workers)
    stats = _border_slope(depth, level, workers)
    if stats.significance < MIN_SIGNIFICANCE or stats.step < MIN_STEP:
        return mosaic, stats
    known = np.isfinite(depth)
    smooth = ndimage.gaussian_filter(np.where(known, depth, 0.0), sigma_px / BLOCK)
    weight = ndimage.gaussian_filter(known.astype(np.float64), sigma_px / BLOCK)
    smooth = np.divide(smooth, weight, out=np.full_like(smooth, np.nan), where=weight > 1e-6)
    ny, nx = mosaic.shape
    smooth = ndimage.zoom(smooth.astype(np.float32), BLOCK, order=1, mode="nearest", grid_mode=True)
    smooth = np.pad(smooth, ((0, ny - smooth.shape[0]), (0, nx - smooth.shape[1])), mode="edge")
    # Single pixels that lost a sample to rejection are no border: the median takes them out.
    counts = ndimage.median_filter(mosaic.coverage, size=3)
    counts = np.where(counts > 0, counts, np.maximum(mosaic.coverage, 1e-3))
    excess = np.nan_to_num(np.log(counts) - smooth)  # 0 on slivers that no measured block is near
    gain = np.clip(np.exp(-stats.slope * excess), *gain_clip).astype(np.float32)
    covered = gain[mosaic.coverage > 0]
    image = mosaic.image * (gain[..., None] if mosaic.image.ndim == 3 else gain)
    stats = replace(stats, gain_min=float(covered.min()), gain_max=float(covered.max()))
    return replace(mosaic, image=image), stats


def _block_logs(mosaic: Mosaic, workers: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """ln(mean coverage) and ln(median luminance) per block; NaN for blocks not wholly covered or <= 0."""
    ny, nx = (n - n % BLOCK for n in mosaic.shape)

    def row_of_blocks(y: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        image, coverage = mosaic.image[y : y + BLOCK, :nx], mosaic.coverage[y : y + BLOCK, :nx]
        # Plane by plane: numpy is slow along a short axis.
        luminance = sum(np.moveaxis(image, 2, 0)) / np.float32(image.shape[2]) if image.ndim == 3 else image
        cells, frames = (
            part.reshape(BLOCK, -1, BLOCK).swapaxes(0, 1).reshape(-1, BLOCK * BLOCK) for part in (luminance, coverage)
        )
        whole = np.all((frames > 0) & np.isfinite(cells), axis=1)
        # A vectorised sort is several times as fast as a selection per block.
        level = np.sort(np.where(whole[:, None], cells, np.float32(1)), axis=1)[:, _MIDDLE].mean(axis=1)
        whole &= level > 0
        depth = np.where(whole, np.log(np.where(whole, frames.mean(axis=1), 1.0)), np.nan)
        return depth, np.where(whole, np.log(np.where(whole, level, 1.0)), np.nan)

    rows = list(thread_map(row_of_blocks, range(0, ny, BLOCK), workers))  # no second copy of the picture
    return np.array([depth for depth, _ in rows]), np.array([level for _, level in rows])


def _border_slope(depth: NDArray[np.float64], level: NDArray[np.float64], workers: int) -> RenormStats:
    """Slope of the third differences of `level` on those of `depth`, against displaced control borders."""
    if min(depth.shape, default=0) < 8:
        return RenormStats()
    lines = [(np.diff(depth, 3, axis), np.diff(level, 3, axis)) for axis in (0, 1)]
    borders = [np.nonzero(np.abs(depths) > MIN_BORDER) for depths, _ in lines]
    steps = np.concatenate([depths[at] for (depths, _), at in zip(lines, borders, strict=True)])

    def slope(move: tuple[int, int]) -> float:
        dy, dx = move
        moved = [
            levels[(at[0] + dy) % levels.shape[0], (at[1] + dx) % levels.shape[1]]
            for (_, levels), at in zip(lines, borders, strict=True)
        ]
        return _robust_slope(steps, np.concatenate(moved))

    far = max(4, min(depth.shape) // 6)
    moves = [(0, 0), *((j * far, i * far) for j in range(-2, 3) for i in range(-2, 3) if j or i)]
    own, *others = thread_map(slope, moves, workers)
    controls = np.array(others)
    controls = controls[np.isfinite(controls)]
    if not np.isfinite(own) or controls.size < 8:
        return RenormStats()
    # Median, not rms: a straight border moved along itself still lies on the step it is to be compared with.
    spread = 1.4826 * float(np.median(np.abs(controls))) + 1e-12
    shallow, deep = np.nanpercentile(depth, (10, 90))
    return RenormStats(own, abs(own) / spread, abs(own) * float(deep - shallow))


def _robust_slope(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Slope of ``y = slope * x``, outliers beyond 4 robust sigmas dropped (stars); NaN for too few points."""
    fine = np.isfinite(y)
    slope = float("nan")
    for _ in range(3):
        if np.count_nonzero(fine) < MIN_BLOCKS:
            return float("nan")
        slope = float(x[fine] @ y[fine] / (x[fine] @ x[fine]))
        residual = np.abs(y - slope * x)
        fine = residual <= 4 * 1.4826 * np.median(residual[fine])
    return slope
