"""From the measures of all frames to one photometric adjustment and one weight per frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zemosaic.canvas import Canvas, pixel_scale
from zemosaic.execute import thread_map
from zemosaic.frames import Frame
from zemosaic.levels import (
    Adjustment,
    SkySamples,
    Solution,
    canvas_nodes,
    match_positions,
    sample_sky,
    solve_gains,
    solve_skies,
)
from zemosaic.measure import FrameMeasure
from zemosaic.settings import Settings
from zemosaic.warp import PixelMap

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Photometry:
    """One photometric scale for all frames.

    Parameters
    ----------
    adjustments : tuple of Adjustment
        One per frame.
    sky : ndarray
        ``(C,)`` common sky level after adjustment, ADU.
    noise : ndarray
        ``(F, C)`` noise of one photosite after gain, ADU.
    weight : ndarray
        ``(F, C)`` weight of every frame in a mean, 1 for the typical frame.
    star_groups, sky_groups : ndarray
        ``(F,)`` labels of the groups of frames that stars and shared sky tie together.
    unmatched : tuple of int
        Frames without enough stars, whose gain is only what their exposure says.
    star_scatter : float
        Robust scatter of the star fluxes about the solution, in units of their errors; NaN if none was made.
    """

    adjustments: tuple[Adjustment, ...]
    sky: Floats
    noise: Floats
    weight: Floats
    star_groups: NDArray[np.int64]
    sky_groups: NDArray[np.int64]
    unmatched: tuple[int, ...]
    star_scatter: float


@dataclass(frozen=True)
class Held:
    """Frames whose adjustments stay as they are, and the scale that they set.

    Parameters
    ----------
    rows : ndarray
        ``(H,)`` which of the frames.
    gain, plane : ndarray
        ``(H, C)`` and ``(H, C, 3)``, as in `zemosaic.levels.Adjustment`.
    noise, weight : ndarray
        ``(H, C)``, as in `Photometry`.
    sky : ndarray
        ``(C,)`` common sky level, ADU.
    """

    rows: NDArray[np.int64]
    gain: Floats
    plane: Floats
    noise: Floats
    weight: Floats
    sky: Floats

    def among(self, frames: int, values: Floats) -> Floats:
        """Values ``(H, ...)`` at their places among all frames ``(F, ...)``, NaN elsewhere."""
        all_of = np.full((frames, *values.shape[1:]), np.nan)
        all_of[self.rows] = values
        return all_of


_MIN_STARS = 3  # star fluxes a frame must share for its gain to count as measured
_MATCH_RADIUS = 3.0  # canvas pixels
_MOST_SAMPLES = 4_000_000  # of sky, of all frames: each takes some 200 bytes while the levels are solved


def match_frames(
    frames: Sequence[Frame],
    measures: Sequence[FrameMeasure],
    maps: Sequence[PixelMap],
    canvas: Canvas,
    settings: Settings,
    held: Held | None = None,
    workers: int = 1,
) -> Photometry:
    """Solve gains and sky levels of all frames at once, as ``stacking_normalize_method`` says.

    ``linear_fit`` solves gains from stars and sky planes from overlaps; ``sky_mean`` takes gains from the exposures
    and sets every frame's median sky to the mean of all; ``none`` leaves the frames alone. Frames that are `held` keep
    what they have, and the others are solved against them.
    """
    channels = measures[0].blocks.shape[2]
    gain, plane = np.ones((len(frames), channels)), np.zeros((len(frames), channels, 3))
    star_groups = sky_groups = np.zeros(len(frames), np.int64)
    unmatched: tuple[int, ...] = ()
    scatter = float("nan")
    sky = np.array([m.sky for m in measures])
    if settings.stacking_normalize_method != "none":
        gain = np.tile(_exposure_gain(frames)[:, None], (1, channels))
    if settings.stacking_normalize_method == "linear_fit":
        gain, stars = _gains(frames, measures, canvas, gain[:, 0], held, workers)
        star_groups, scatter = stars.group, stars.rms
        unmatched = tuple(np.flatnonzero(stars.observations < _MIN_STARS).tolist())
        if settings.match_background_for_final:
            plane, sky_groups = _skies(measures, maps, canvas, gain, held, workers)
    elif settings.stacking_normalize_method == "sky_mean":
        plane[..., 0] = gain * sky - (gain * sky).mean(axis=0)
    noise = gain * np.array([m.noise for m in measures])
    level = np.nanmedian(gain * sky - plane[..., 0], axis=0)
    weight = frame_weights(noise, np.array([m.fwhm for m in measures]), settings.stacking_weighting_method)
    if held is not None:
        # Weights are relative to the typical frame, which must stay the one that it was.
        weight *= np.median(held.weight / weight[held.rows], axis=0)
        level, gain[held.rows], plane[held.rows] = held.sky, held.gain, held.plane
        noise[held.rows], weight[held.rows] = held.noise, held.weight
    return Photometry(
        adjustments=tuple(Adjustment(w, g, p) for w, g, p in zip((m.window for m in maps), gain, plane, strict=True)),
        sky=level,
        noise=noise,
        weight=weight,
        star_groups=star_groups,
        sky_groups=sky_groups,
        unmatched=unmatched,
        star_scatter=scatter,
    )


def frame_weights(noise: Floats, fwhm: Floats, method: str) -> Floats:
    """Weights ``(F, C)`` of frames in a mean, normalised to 1 for the typical frame.

    Parameters
    ----------
    noise : ndarray
        ``(F, C)`` noise after gain.
    fwhm : ndarray
        ``(F,)`` pixels; NaN counts as typical.
    method : str
        ``noise_variance``: 1/noise²; ``noise_fwhm``: also over FWHM², the area a star's light is spread over; ``none``.
    """
    if method == "none":
        return np.ones_like(noise)
    weight = 1 / np.maximum(noise, 1e-12) ** 2
    if method == "noise_fwhm" and np.isfinite(fwhm).any():
        weight = weight / np.where(np.isfinite(fwhm), fwhm, np.nanmedian(fwhm))[:, None] ** 2
    return weight / np.median(weight, axis=0)


def _exposure_gain(frames: Sequence[Frame]) -> Floats:
    """Gain expected from the exposures alone: typical exposure over the frame's own; 1 where unknown."""
    exposure = np.array([f.exposure or np.nan for f in frames], float)
    known = np.isfinite(exposure) & (exposure > 0)
    if not known.any():
        return np.ones(len(frames))
    typical = np.median(exposure[known])
    return np.where(known, typical / np.where(known, exposure, 1), 1.0)


def _gains(
    frames: Sequence[Frame],
    measures: Sequence[FrameMeasure],
    canvas: Canvas,
    expected: Floats,
    held: Held | None,
    workers: int,
) -> tuple[Floats, Solution]:
    xs, ys, who, flux, error = [], [], [], [], []
    for i, (frame, measure) in enumerate(zip(frames, measures, strict=True)):
        stars, clean = measure.stars, measure.stars.clean
        assert frame.wcs is not None
        x, y = canvas.wcs.wcs_world2pix(*frame.wcs.all_pix2world(stars.x[clean], stars.y[clean], 0), 0)
        # Surface brightness is what is stacked: a frame with coarser pixels collects more light in each.
        area = (pixel_scale(frame.wcs) / canvas.scale) ** 2
        xs.append(x)
        ys.append(y)
        who.append(np.full(len(x), i))
        flux.append(stars.flux[clean] * area)
        error.append(stars.error[clean] * area)
    x, y, frame_index = np.concatenate(xs), np.concatenate(ys), np.concatenate(who)
    return solve_gains(
        match_positions(x, y, _MATCH_RADIUS),
        frame_index,
        np.concatenate(flux),
        np.concatenate(error),
        expected,
        None if held is None else held.among(len(frames), held.gain),
        workers,
    )


def _spacing(measures: Sequence[FrameMeasure], maps: Sequence[PixelMap]) -> int:
    """Canvas pixels between the nodes that the skies of all frames are compared at.

    As close as the sky was measured; wider where there are so many frames that their samples would fill the memory.
    """
    closest = int(np.median([m.block_px for m in measures]))
    samples = sum(m.window.area for m in maps) / closest**2
    return closest * math.ceil(math.sqrt(samples / _MOST_SAMPLES))


def _skies(
    measures: Sequence[FrameMeasure],
    maps: Sequence[PixelMap],
    canvas: Canvas,
    gain: Floats,
    held: Held | None,
    workers: int,
) -> tuple[Floats, NDArray[np.int64]]:
    spacing = _spacing(measures, maps)

    def sampled(pair: tuple[FrameMeasure, PixelMap]) -> SkySamples:
        measure, pixel_map = pair
        node, x, y, u, v = canvas_nodes(pixel_map.window, spacing, canvas.shape[1])
        return sample_sky(measure.blocks, measure.block_px, pixel_map.at(x, y), node, u, v)

    fixed = None if held is None else held.among(len(measures), held.plane)
    noise = np.array([m.block_noise for m in measures])
    samples = thread_map(sampled, zip(measures, maps, strict=True), workers)
    plane, solutions = solve_skies(list(samples), gain, noise, fixed, workers)
    return plane, solutions[0].group if solutions else np.zeros(len(measures), np.int64)
