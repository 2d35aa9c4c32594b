"""The first look at every frame: mend it, find its stars, sample its sky. Nothing is resampled here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from zemosaic.calibrate import Calibration, Repairs, prepare
from zemosaic.execute import thread_map
from zemosaic.frames import Frame, FrameError
from zemosaic.robust import median
from zemosaic.stars import (
    Aperture,
    Detection,
    Stars,
    block_medians,
    cells_of,
    detect,
    photometry,
    plane_noise,
)
from zemosaic.tiles import FloatImage

_SKY_BLOCKS = 32  # sky samples along the shorter side of a frame
_BRIGHTEST = 10  # stars whose signal-to-noise stands for the frame's
_STRUCTURE_FIELDS = 5  # fields of sky along the shorter side whose unevenness is looked at
_JUMP_REACH = 100.0  # px: longest jump that doubles the stars
_JUMP_RADIUS = 2.0  # px by which the shifts of two doubled stars may differ
_JUMP_STARS = 20  # stars below which a common shift means nothing


@dataclass(frozen=True)
class FrameMeasure:
    """What the photometric solution, the gate and the coadd need to know of one frame.

    Parameters
    ----------
    repairs : Repairs
        Hot pixels, so that the frame is searched only once.
    stars : Stars
        Positions and fluxes.
    detected : int
        Number of sources found (up to the detection limit).
    fwhm, ellipticity : float
        Medians over the stars; FWHM in frame pixels; NaN without stars.
    trailing : float
        0 … 1, elongation that the stars have in common: length of the median of their vectors
        ``(a² - b²) / (a² + b²) (cos 2θ, sin 2θ)``.
    angle : float
        Its direction, degrees from the x axis towards y, 0 … 180.
    doubled, jump : float
        Share of the stars that have a companion at one and the same shift, and the length of that shift, px.
    snr : float
        Median flux of the 10 brightest stars that are fit for photometry, over the noise of the sky in the aperture.
    structure : float
        Unevenness of the sky on the scale of a fifth of the frame, 1 sigma about the best plane, ADU.
    sky, noise : ndarray
        ``(C,)`` ADU: median sky, and noise of one photosite.
    blocks : ndarray
        ``(by, bx, C)`` medians of boxes of ``block_px`` frame pixels.
    block_noise : ndarray
        ``(C,)`` expected error of one such median, ADU.
    block_px : int
        Side of a box, frame pixels.
    """

    repairs: Repairs
    stars: Stars
    detected: int
    fwhm: float
    ellipticity: float
    trailing: float
    angle: float
    doubled: float
    jump: float
    snr: float
    structure: float
    sky: NDArray[np.float64]
    noise: NDArray[np.float64]
    blocks: FloatImage
    block_noise: NDArray[np.float64]
    block_px: int


def measure_frame(
    frame: Frame, calibration: Calibration, aperture: Aperture, *, hot_sigma: float | None = 6.0
) -> FrameMeasure:
    """Read one frame and measure it.

    Parameters
    ----------
    frame : Frame
        What to read.
    calibration : Calibration
        Applied before measuring.
    aperture : Aperture
        Radii in pixels of this frame.
    hot_sigma : float or None
        Threshold of the hot pixel search; None leaves them alone.

    Raises
    ------
    FrameError
        If the pixels cannot be read or hold nothing.
    """
    pixels, repairs = prepare(frame, calibration, hot_sigma=hot_sigma)
    cells = cells_of(pixels, frame.bayer)
    planes = cells.planes
    cell_noise = np.array([plane_noise(p.data) for p in planes])
    found = detect(cells.luminance)
    stars = photometry(planes, found, saturation=frame.saturation, peak=cells.peak, noise=cell_noise, aperture=aperture)
    side = int(np.clip(min(frame.shape) // (2 * _SKY_BLOCKS), 4, 32))
    blocks = block_medians(planes, side)
    trailing, angle = _trailing(found)
    doubled, jump = _doubled(stars)
    return FrameMeasure(
        repairs=repairs,
        stars=stars,
        detected=len(found.x),
        fwhm=2 * found.typical_fwhm(),
        ellipticity=float(np.median(found.ellipticity)) if len(found.x) else float("nan"),
        trailing=trailing,
        angle=angle,
        doubled=doubled,
        jump=jump,
        # Noise of the sky in the aperture; a cell is 2 px wide.
        snr=_typical_snr(stars, 2 * math.sqrt(math.pi) * aperture.radius * float(np.linalg.norm(cell_noise))),
        structure=_structure(blocks.mean(axis=2, dtype=np.float64)),
        sky=np.array([median(blocks[..., c]) for c in range(len(planes))]),
        noise=cell_noise * np.sqrt([p.pixels_per_cell for p in planes]),
        blocks=blocks,
        # The median of a normal sample scatters 1.25 times as much as its mean.
        block_noise=1.25 * cell_noise / side,
        block_px=2 * side,
    )


def choose_aperture(frames: Sequence[Frame], calibration: Calibration, *, probes: int = 7) -> Aperture:
    """Aperture for a whole run: 2.3 times the typical FWHM of a few frames spread over it, at least 5 px.

    That holds 99 % of a star's light in the core, so that a change of seeing hardly changes a flux.
    """
    return probe_aperture(frames[:: max(1, len(frames) // probes)][:probes], calibration, probes=probes)


def probe_aperture(order: Sequence[Frame], calibration: Calibration, *, probes: int = 7, workers: int = 1) -> Aperture:
    """The same from the first few frames that show stars, however many of those before them show none."""

    def width_of(frame: Frame) -> float:
        try:
            return measure_frame(frame, calibration, Aperture()).fwhm
        except FrameError:  # it is named when its turn comes
            return math.nan

    widths: list[float] = []
    for width in thread_map(width_of, order[: 3 * probes], workers, ahead=workers):
        widths += [width] if np.isfinite(width) else []
        if len(widths) == probes:
            break
    # In coarse steps, so that a frame more or less hardly ever changes what all are measured with.
    radius = max(5.0, round(2 * 2.3 * float(np.median(widths))) / 2) if widths else Aperture().radius
    return Aperture(radius, 1.4 * radius, 2.0 * radius)


def _trailing(found: Detection) -> tuple[float, float]:
    """Elongation common to the stars, and its direction in degrees."""
    if not len(found.x):
        return math.nan, math.nan
    ratio = (1 - found.ellipticity) ** 2
    elongation = (1 - ratio) / (1 + ratio)
    x, y = (float(np.median(elongation * f(2 * found.angle))) for f in (np.cos, np.sin))
    return math.hypot(x, y), math.degrees(math.atan2(y, x)) / 2 % 180


def _doubled(stars: Stars) -> tuple[float, float]:
    """Share of the stars that a jump within the exposure has doubled, and its length in px.

    Of the shifts between any two stars a jump makes one far more frequent than chance; what chance gives at this
    density of stars is taken off.
    """
    count = len(stars)
    if count < _JUMP_STARS:
        return math.nan, math.nan
    points = np.c_[stars.x, stars.y]
    pairs = cKDTree(points).query_pairs(_JUMP_REACH, output_type="ndarray")
    if not len(pairs):
        return 0.0, math.nan
    shifts = points[pairs[:, 1]] - points[pairs[:, 0]]
    # Either star of a pair may be the first.
    alike = cKDTree(np.concatenate([shifts, -shifts])).query_ball_point(shifts, _JUMP_RADIUS, return_length=True)
    best = int(np.argmax(alike))
    chance = count**2 * math.pi * _JUMP_RADIUS**2 / float(np.prod(np.ptp(points, axis=0) + 1))
    return min(1.0, 2 * max(0.0, alike[best] - 1 - chance) / count), float(np.hypot(*shifts[best]))


def _typical_snr(stars: Stars, noise: float) -> float:
    brightest = np.sort(stars.flux[stars.clean].sum(axis=1))[-_BRIGHTEST:]
    return float(np.median(brightest)) / noise if len(brightest) and noise > 0 else math.nan


def _structure(blocks: NDArray[np.float64]) -> float:
    """Half-width of the sky about its best plane: the 80 % range over 2.56; NaN for less than nine fields of sky.

    The sky is the lower quartile of the blocks ``(by, bx)`` in fields of a fifth of the shorter side: in fields that
    large a satellite trail does not count.
    """
    if not blocks.size:
        return float("nan")
    side = max(1, min(blocks.shape) // _STRUCTURE_FIELDS)
    ny, nx = blocks.shape[0] // side, blocks.shape[1] // side
    fields = blocks[: ny * side, : nx * side].reshape(ny, side, nx, side).transpose(0, 2, 1, 3).reshape(ny, nx, -1)
    y, x = np.nonzero(np.isfinite(fields).mean(axis=2) >= 0.5)
    if len(x) < 9:
        return math.nan
    seen = fields[y, x]
    # Looking out for gaps takes ten times as long.
    percentile = np.percentile if np.isfinite(seen).all() else np.nanpercentile
    rest = value = percentile(seen, 25, axis=1)
    design = np.c_[np.ones(len(x)), x, y]
    for _ in range(3):  # a cloud must not tilt the plane
        off = np.abs(rest - np.median(rest))
        keep = off <= 4.5 * np.median(off)
        rest = value - design @ np.linalg.lstsq(design[keep], value[keep], rcond=None)[0]
    low, high = np.percentile(rest, (10, 90))
    return float(high - low) / 2.56
