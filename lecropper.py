"""Crops that end a mosaic: bad outer bands, the ragged rim of field rotation, empty margins.

Every function takes a Mosaic and returns a new one (the very same object where there is nothing to do)
together with a small record of what was removed; image, coverage, alpha and WCS cannot get out of step. None
of them touches a pixel value that stays. Each can be used alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from zemosaic.coverage import coverage_cut, coverage_threshold, two_pass_renorm
from zemosaic.events import Events, render
from zemosaic.settings import Settings
from zemosaic.tiles import FloatImage, Mosaic, Window
from zequalitymt import LEVEL_FLOOR, NOISE_FLOOR, centre_and_scatter, noise_and_level, photon_allowance

MAX_SIDE_SHARE = 0.25  # quality_crop never takes more than this of the picture from one side


@dataclass(frozen=True)
class QualityCrop:
    """What `quality_crop` cut, in pixels of the picture it was given.

    Parameters
    ----------
    top, bottom, left, right : int
        Rows at the low-index (top) and high-index end, columns likewise; empty margins outside count too.
    n_removed : int
        Covered pixels that were lost.
    """

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0
    n_removed: int = 0


@dataclass(frozen=True)
class AltazCleanup:
    """What `altaz_cleanup` gave up.

    Parameters
    ----------
    threshold : float
        Coverage, in frames, below which rim pixels were given up.
    n_removed : int
        Covered pixels of the rim.
    ramp_px : float
        Width of the soft edge of alpha.
    """

    threshold: float
    n_removed: int
    ramp_px: float


@dataclass(frozen=True)
class AutoCrop:
    """What `autocrop` kept: `window`, in pixels of the picture it was given, and the margins it cut (px)."""

    window: Window
    n_removed: int


def polish(
    mosaic: Mosaic, settings: Settings, events: Events, *, keep: float, workers: int = 1
) -> tuple[Mosaic, tuple[str, ...]]:
    """Coverage cut → two-pass renormalisation → quality crop → alt-az clean-up → autocrop, as switched on.

    Every step takes the whole mosaic, so image, coverage, alpha and WCS stay in step.

    Parameters
    ----------
    mosaic : Mosaic
        As it was stacked; given away: its pixels may be changed.
    settings : Settings
        Which steps, and how.
    events : Events
        Is told what every step removed.
    keep : float
        Coverage to keep, share of the typical one (`zemosaic.coverage.coverage_threshold`); 0 = no cut.
    workers : int
        Threads.

    Returns
    -------
    mosaic : Mosaic
        Polished.
    history : tuple of str
        One line per step that was run.
    """
    history = []

    def note(key: str, **values: float) -> None:
        events.info(key, **values)
        events.check_stop()
        history.append(render(key, values))

    if keep > 0:
        limit = coverage_threshold(mosaic.coverage, keep)
        mosaic, removed = coverage_cut(mosaic, limit, in_place=True, workers=workers)
        note("polish_coverage_cut", n=removed, limit=limit)
    if settings.two_pass_coverage_renorm:
        reach, clip = settings.two_pass_cov_sigma_px, settings.two_pass_cov_gain_clip
        mosaic, stats = two_pass_renorm(mosaic, reach, clip, workers)
        note("polish_two_pass", min=stats.gain_min, max=stats.gain_max)
    mosaic = crop_edges(mosaic, settings, note)
    if settings.global_wcs_autocrop_enabled:
        mosaic, cut = autocrop(mosaic, settings.global_wcs_autocrop_margin_px)
        box = cut.window
        note("polish_autocrop", width=mosaic.shape[1], height=mosaic.shape[0], x0=box.x0, y0=box.y0)
    return mosaic, tuple(history)


def crop_edges(mosaic: Mosaic, settings: Settings, note: Callable[..., None]) -> Mosaic:
    """Quality crop and alt-az clean-up as switched on, of a mosaic or of a master tile; `note` is told what went."""
    if settings.quality_crop_enabled:
        mosaic, crop = quality_crop(
            mosaic,
            settings.quality_crop_band_px,
            settings.quality_crop_k_sigma,
            settings.quality_crop_margin_px,
            settings.quality_crop_min_run,
            settings.crop_follow_signal,
        )
        note("polish_quality_crop", n=crop.n_removed)
    if settings.altaz_cleanup_enabled:
        mosaic, cleanup = altaz_cleanup(
            mosaic,
            settings.altaz_margin_percent,
            settings.altaz_decay,
            settings.altaz_nanize,
            settings.altaz_min_coverage_abs,
            settings.altaz_min_coverage_frac,
            settings.altaz_morph_open_px,
        )
        note("polish_altaz_cleanup", n=cleanup.n_removed)
    return mosaic


def quality_crop(
    mosaic: Mosaic,
    band_px: int = 32,
    k_sigma: float = 2.0,
    margin_px: int = 8,
    min_run: int = 2,
    follow_signal: bool = True,
) -> tuple[Mosaic, QualityCrop]:
    """Cut bad bands off the four sides.

    The picture is read in bands of `band_px` rows, then of `band_px` columns, across the box that holds its
    data. A band's *noise* is the scaled median absolute difference of neighbouring pixels along the band
    (blind to sky and nebula, hardly touched by stars), times the root of the coverage: a lack of frames is
    `coverage_cut`'s and `altaz_cleanup`'s business, here only noise that it does not explain is bad. Its
    *level* is the median. A band is bad where its noise exceeds the median of the bands of the middle half
    by more than `k_sigma` of their robust scatter, or where its level is off by as much on either side.
    If the outermost `min_run` bands or more are bad without a gap, all of this run and `margin_px` are
    cut, at most a quarter of the box from a side (`MAX_SIDE_SHARE`).

    Parameters
    ----------
    mosaic : Mosaic
        Linear.
    band_px : int
        Thickness of a band, px.
    k_sigma : float
        Limit in robust standard deviations; the scatter of the noise counts as 10 % of it at
        least, that of the level as half the noise of a single frame.
    margin_px : int
        Cut in addition behind a bad run, px.
    min_run : int
        Bands that a bad run has at least.
    follow_signal : bool
        A different level alone is taken for real signal (a nebula) and not cut, and the noise limit grows in
        proportion to the level, which brighter sky may do by its photons.

    Raises
    ------
    ValueError
        If no pixel is covered.
    """
    box = _data_box(mosaic)
    image = mosaic.image[box.slices]
    luminance = image.mean(axis=2) if image.ndim == 3 else image
    depth = np.sqrt(mosaic.coverage[box.slices])

    def cuts(lines: FloatImage, depth: FloatImage) -> tuple[int, int]:
        """Rows to cut at the low and at the high end."""
        edges = np.linspace(0, len(lines), max(1, round(len(lines) / band_px)) + 1).astype(int)
        bad = _bad_bands(lines, depth, edges, k_sigma, follow_signal)
        most = int(MAX_SIDE_SHARE * len(lines))
        low, high = (int(np.argmin(np.append(run, False))) for run in (bad, bad[::-1]))  # leading bad bands
        low_px = edges[low] + margin_px if low >= min_run else 0
        high_px = edges[-1] - edges[-1 - high] + margin_px if high >= min_run else 0
        return min(int(low_px), most), min(int(high_px), most)

    (top, bottom), (left, right) = cuts(luminance, depth), cuts(luminance.T, depth.T)
    if not any((top, bottom, left, right)):
        return mosaic, QualityCrop()
    keep = Window(box.y0 + top, box.y1 - bottom, box.x0 + left, box.x1 - right)
    height, width = mosaic.shape
    cropped, n_removed = _crop(mosaic, keep)
    return cropped, QualityCrop(keep.y0, height - keep.y1, keep.x0, width - keep.x1, n_removed)


def altaz_cleanup(
    mosaic: Mosaic,
    margin_percent: float = 5.0,
    decay: float = 0.15,
    nanize: bool = True,
    min_coverage_abs: float = 3.0,
    min_coverage_frac: float = 0.5,
    morph_open_px: int = 3,
) -> tuple[Mosaic, AltazCleanup]:
    """Remove the ragged rim of few frames that field rotation leaves, and give the rest a soft edge.

    Rim is what has less coverage than `zemosaic.coverage.coverage_threshold` of (`min_coverage_frac`,
    `min_coverage_abs`), hence never a panel of its own depth, *and* hangs together with the picture's border
    or with no data. Before that is judged, a morphological opening by `morph_open_px` takes out strips of
    up to twice this width: a seam of low coverage between two panels stays. Inwards of the edge alpha is
    multiplied by ``(1 - exp(-t / decay)) / (1 - exp(-1 / decay))``, with ``t`` = distance over the ramp's
    width, at most 1; so it is where an earlier coverage cut has left no rim to remove.

    Parameters
    ----------
    mosaic : Mosaic
        Picture whose coverage counts frames.
    margin_percent : float
        Width of the ramp of alpha, % of the shorter side; 0 = no ramp.
    decay : float
        Scale of the ramp as a share of its width, > 0; small = steep.
    nanize : bool
        True: the rim becomes no data (NaN, coverage 0, alpha 0). False: only its alpha becomes 0.
    min_coverage_abs : float
        Frames.
    min_coverage_frac : float
        Share of the typical coverage, 0..1.
    morph_open_px : int
        px; 0 = no opening.

    Raises
    ------
    ValueError
        If no pixel is covered, or `decay` is not positive.
    """
    if decay <= 0:
        raise ValueError(f"The decay of the alpha ramp must be positive, not {decay}.")
    threshold = coverage_threshold(mosaic.coverage, min_coverage_frac, min_coverage_abs)
    outer = _outer_region(mosaic.coverage, threshold, morph_open_px)
    rim = outer & (mosaic.coverage > 0)
    ramp_px = margin_percent / 100 * min(mosaic.shape)
    if ramp_px > 0:
        ramp = np.minimum(_distance_inside(outer, max(1, int(ramp_px / 32))) / np.float32(ramp_px), 1)
        ramp = (1 - np.exp(-ramp / np.float32(decay))) / np.float32(1 - np.exp(-1 / decay))
        # What is kept stays at least faintly visible: alpha 0 says that there is nothing.
        soft = np.maximum(np.rint(mosaic.alpha * ramp), np.minimum(mosaic.alpha, 1)).astype(np.uint8)
    else:
        soft = mosaic.alpha.copy()
    soft[rim] = 0
    cleaned = mosaic.without(rim) if nanize else mosaic
    return replace(cleaned, alpha=soft), AltazCleanup(threshold, int(np.count_nonzero(rim)), ramp_px)


def autocrop(mosaic: Mosaic, margin_px: int = 128) -> tuple[Mosaic, AutoCrop]:
    """Crop to the bounding box of the covered pixels, `margin_px` wider on every side where there is room.

    Raises
    ------
    ValueError
        If no pixel is covered.
    """
    whole = Window.of_shape(mosaic.shape)
    window = _data_box(mosaic).grow(margin_px).intersect(whole)
    if window == whole:
        return mosaic, AutoCrop(window, 0)
    cropped, n_removed = _crop(mosaic, window)
    return cropped, AutoCrop(window, n_removed)


def _crop(mosaic: Mosaic, window: Window) -> tuple[Mosaic, int]:
    """The part inside `window`, and how many covered pixels lay outside."""
    cropped = mosaic.crop(window)
    return cropped, int(np.count_nonzero(mosaic.coverage) - np.count_nonzero(cropped.coverage))


def _data_box(mosaic: Mosaic) -> Window:
    """The smallest window that holds every covered pixel."""
    covered = mosaic.coverage > 0
    rows, columns = np.flatnonzero(covered.any(axis=1)), np.flatnonzero(covered.any(axis=0))
    if not rows.size:
        raise ValueError("The mosaic holds no pixel with data: there is nothing to crop.")
    return Window(int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)


def _bad_bands(
    lines: FloatImage, depth: FloatImage, edges: NDArray[np.int_], k_sigma: float, follow_signal: bool
) -> NDArray[np.bool_]:
    """Whether each band of rows ``edges[i]:edges[i + 1]`` is noisier than, or off the level of, the middle.

    Bands with hardly any data count as bad: they have nothing to lose.
    """
    noise, level = np.array([noise_and_level(lines[a:b], depth[a:b]) for a, b in pairwise(edges)]).T
    middle = slice(len(noise) // 4, len(noise) - len(noise) // 4)
    known = np.isfinite(noise[middle])
    if np.count_nonzero(known) < 4:  # too few bands to tell bad from good
        return np.zeros(len(noise), bool)
    noise_mid, noise_scatter = centre_and_scatter(noise[middle][known])
    level_mid, level_scatter = centre_and_scatter(level[middle][known])
    limit = noise_mid + k_sigma * max(noise_scatter, NOISE_FLOOR * noise_mid)
    if follow_signal:
        return ~(noise <= limit * photon_allowance(level, level_mid))
    even = np.abs(level - level_mid) <= k_sigma * max(level_scatter, LEVEL_FLOOR * noise_mid)
    return ~((noise <= limit) & even)


def _outer_region(coverage: FloatImage, threshold: float, open_px: int) -> NDArray[np.bool_]:
    """Pixels under `threshold` that hang together with no data or with the border, thin strips left out."""
    pad = open_px + 1  # the world around the picture is no data too
    weak = np.pad(coverage < threshold, pad, constant_values=True)
    if open_px:
        weak = ndimage.binary_opening(weak, iterations=open_px)
    empty = np.pad(coverage <= 0, pad, constant_values=True)
    labels, n_labels = ndimage.label(weak)
    outer = np.zeros(n_labels + 1, bool)
    outer[labels[weak & empty]] = True
    return outer[labels][pad:-pad, pad:-pad]


def _distance_inside(outer: NDArray[np.bool_], step: int) -> FloatImage:
    """Distance of every pixel from `outer` and from the picture's border, px.

    Taken at every `step`-th pixel and interpolated: the exact transform of a large mosaic takes a gigabyte.
    """
    ny, nx = outer.shape
    blocked = np.pad(outer[::step, ::step], 1, constant_values=True)
    coarse = ndimage.distance_transform_edt(~blocked)[1:-1, 1:-1].astype(np.float32) * np.float32(step)
    fine = [(n - 1) * step + 1 for n in coarse.shape]  # the sampled pixels keep their place
    zoom = [f / n for f, n in zip(fine, coarse.shape, strict=True)]
    distance = ndimage.zoom(coarse, zoom, order=1)
    return np.pad(distance, ((0, ny - fine[0]), (0, nx - fine[1])), mode="edge")
