"""The first look at every frame: mend it, find its stars, sample its sky. Nothing is resampled here."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zemosaic.calibrate import Calibration, Repairs, prepare
from zemosaic.frames import Frame, FrameError
from zemosaic.stars import (
    Aperture,
    Detection,
    Stars,
    block_medians,
    colour_planes,
    detect,
    photometry,
    plane_noise,
)
from zemosaic.tiles import FloatImage

_SKY_BLOCKS = 32  # sky samples along the shorter side of a frame


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
    planes = colour_planes(pixels, frame.bayer)
    cell_noise = np.array([plane_noise(p.data) for p in planes])
    luminance, peak = _luminance_and_peak(pixels)
    found = detect(luminance)
    stars = photometry(planes, found, saturation=frame.saturation, peak=peak, noise=cell_noise, aperture=aperture)
    cells = int(np.clip(min(frame.shape) // (2 * _SKY_BLOCKS), 4, 32))
    blocks = block_medians(planes, cells)
    return FrameMeasure(
        repairs=repairs,
        stars=stars,
        detected=len(found.x),
        fwhm=2 * found.typical_fwhm(),
        ellipticity=float(np.median(found.ellipticity)) if len(found.x) else float("nan"),
        trailing=_trailing(found),
        sky=np.array([_median(blocks[..., c]) for c in range(len(planes))]),
        noise=cell_noise * np.sqrt([p.pixels_per_cell for p in planes]),
        blocks=blocks,
        # The median of a normal sample scatters 1.25 times as much as its mean.
        block_noise=1.25 * cell_noise / cells,
        block_px=2 * cells,
    )


def choose_aperture(frames: Sequence[Frame], calibration: Calibration, *, probes: int = 7) -> Aperture:
    """Aperture for a whole run: 2.3 times the typical FWHM of a few frames spread over it, at least 5 px.

    That holds 99 % of a star's light in the core, so that a change of seeing hardly changes a flux.
    """
    widths = []
    for frame in frames[:: max(1, len(frames) // probes)][:probes]:
        with contextlib.suppress(FrameError):  # it is named when its turn comes
            widths.append(measure_frame(frame, calibration, Aperture()).fwhm)
    widths = [w for w in widths if np.isfinite(w)]
    radius = max(5.0, 2.3 * float(np.median(widths))) if widths else Aperture().radius
    return Aperture(radius, 1.4 * radius, 2.0 * radius)


def _luminance_and_peak(pixels: FloatImage) -> tuple[FloatImage, FloatImage]:
    """Mean and maximum of every 2x2 cell over all colours, ``(ny // 2, nx // 2)``."""
    ny, nx = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
    grey = pixels if pixels.ndim == 2 else pixels.mean(axis=2, dtype=np.float32)
    top = pixels if pixels.ndim == 2 else pixels.max(axis=2)
    cells, tops = ([a[y:ny:2, x:nx:2] for y in (0, 1) for x in (0, 1)] for a in (grey, top))
    mean = (cells[0] + cells[1] + cells[2] + cells[3]) * np.float32(0.25)
    return mean, np.maximum(np.maximum(tops[0], tops[1]), np.maximum(tops[2], tops[3]))


def _trailing(found: Detection) -> float:
    if not len(found.x):
        return float("nan")
    ratio = (1 - found.ellipticity) ** 2
    elongation = (1 - ratio) / (1 + ratio)
    x, y = (float(np.median(elongation * f(2 * found.angle))) for f in (np.cos, np.sin))
    return float(np.hypot(x, y))


def _median(values: FloatImage) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else float("nan")
