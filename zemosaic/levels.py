"""Photometric matching: measure what frames share, then solve one linear system for all of them at once.

Sky adds and transparency multiplies, so they are kept apart. Gains come from stars, sky levels and gradients from
the sky that frames share. No frame is the reference: every one is fitted to what all of them agree on,
and what the data cannot constrain (the overall scale, the overall level and tilt of each connected
group of frames) stays neutral and is reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from scipy.ndimage import map_coordinates
from scipy.sparse import coo_array, csr_array, diags_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import spsolve
from scipy.spatial import cKDTree

from zemosaic.execute import thread_map
from zemosaic.reduced import ReducedEquations
from zemosaic.tiles import FloatImage, Window

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_DENSE_LIMIT = 1000  # unknowns up to which formed equations are factorised as a full matrix
_FEW = 150  # unknowns up to which nothing is faster than that
_DEEP = 12  # frames that see a star or a block, on average, from which the equations count as full
_STAR_FLOOR = 0.01  # magnitude-like floor of a single flux: sampling, flat field, seeing
_GAIN_PRIOR = 0.15  # how far a frame's transparency may lie from what its exposure says, ln units
_COLOUR_PRIOR = 0.02  # how far a channel's transparency may lie from the grey one, ln units
_PLANE_PRIOR = 0.1  # sky gradient over half a frame, share of the sky
_ITERATIONS = 8
_HELD = 1e-5  # prior width, ln units or shares of the sky, of what must stay as it is
_SETTLED = 0.01  # change of the unknowns, in units of a single observation's error, at which iteration ends


@dataclass(frozen=True)
class Solution:
    """Result of `solve_common`.

    Parameters
    ----------
    unknowns : ndarray
        ``(F, P)`` the frames' unknowns.
    group : ndarray
        ``(F,)`` label of the connected group of each frame: nothing ties different groups together.
    observations : ndarray
        ``(F,)`` observations each frame shares with another.
    rms : float
        Robust scatter of the residuals, in units of the stated errors.
    """

    unknowns: Floats
    group: Ints
    observations: Ints
    rms: float


def solve_common(
    common: Ints,
    frame: Ints,
    design: Floats,
    value: Floats,
    sigma: Floats,
    prior: Floats,
    prior_sigma: Floats,
) -> Solution:
    """Fit ``value = c[common] + design @ unknowns[frame]``, the common values eliminated, robustly.

    The common values (a star's magnitude, the sky in a block) enter only through the normal equations reduced by
    them, so that the system has P unknowns a frame, however many stars or blocks there are. Alternating between frames
    and common values would crawl on large scales, so it is solved directly; in a deep field, where the matrix is
    nearly full and to form it is most of the work, without forming it (`ReducedEquations`).

    Parameters
    ----------
    common, frame : ndarray
        ``(n,)`` which common value, which frame an observation belongs to.
    design : ndarray
        ``(n, P)``.
    value, sigma : ndarray
        ``(n,)`` observations and their errors.
    prior, prior_sigma : ndarray
        ``(F, P)`` expected unknowns and how far they may be off; keeps neutral what the data leave open.

    Returns
    -------
    Solution
    """
    frames = len(prior)
    weight = 1 / sigma**2
    seen = np.bincount(common)
    tied = seen[common] > 1
    group = _groups(common[tied], frame[tied], frames)
    _, common = np.unique(common, return_inverse=True)
    deep = None
    if prior.size > _FEW and len(value) >= _DEEP * (common.max(initial=0) + 1):
        deep = ReducedEquations(common, frame, design, value, prior, prior_sigma)
    unknowns = prior.copy()
    robust = np.ones(len(value))
    scale = 1.0
    for step in range(_ITERATIONS if len(value) else 0):
        w = weight * robust
        before = unknowns
        if deep is not None:
            unknowns = deep.solve(w, before)
        else:
            unknowns = _solve_formed(common, frame, design, value, w, prior, prior_sigma)
        fitted = np.einsum("np,np->n", design, unknowns[frame])
        total = np.bincount(common, w)
        centre = np.bincount(common, w * (value - fitted)) / np.maximum(total, 1e-300)
        residual = (value - fitted - centre[common]) * np.sqrt(weight)
        if tied.any():
            scale = max(float(1.4826 * np.median(np.abs(residual[tied]))), 1e-12)
        if step > 2 and np.abs(unknowns - before).max() < _SETTLED * np.median(sigma):
            break
        # Huber first, so that a bad start does not throw honest frames out; then Tukey's biweight.
        z = residual / scale
        robust = np.minimum(1, 2 / np.maximum(np.abs(z), 1e-9)) if step < 2 else np.clip(1 - (z / 5) ** 2, 1e-6, 1) ** 2
    return Solution(unknowns, group, np.bincount(frame[tied], minlength=frames), scale)


def _solve_formed(
    common: Ints,
    frame: Ints,
    design: Floats,
    value: Floats,
    w: Floats,
    prior: Floats,
    prior_sigma: Floats,
) -> Floats:
    """One weighted solution of the reduced normal equations, ``(F, P)``, from their matrix."""
    size, width = prior.size, prior.shape[1]
    precision = 1 / prior_sigma.reshape(-1) ** 2
    rows = np.repeat(np.arange(len(value)), width)
    columns = frame[:, None] * width + np.arange(width)
    x = csr_array((design.reshape(-1), (rows, columns.reshape(-1))), shape=(len(value), size))
    wx = diags_array(w) @ x
    total = np.bincount(common, w)
    indicator = csr_array((np.ones(len(value)), (common, np.arange(len(value)))), shape=(len(total), len(value)))
    shared = indicator @ wx  # common values x unknowns
    inverse = 1 / np.maximum(total, 1e-300)
    right = wx.T @ value - shared.T @ (inverse * np.bincount(common, w * value)) + precision * prior.reshape(-1)
    normal = (x.T @ wx) - (shared.T @ (diags_array(inverse) @ shared)) + diags_array(precision)
    if size > _DENSE_LIMIT:
        return np.asarray(spsolve(normal.tocsc(), right)).reshape(prior.shape)
    return linalg.solve(normal.toarray(), right, assume_a="pos").reshape(prior.shape)


def _groups(common: Ints, frame: Ints, frames: int) -> Ints:
    """Connected groups of frames that share common values."""
    _, common = np.unique(common, return_inverse=True)
    nodes = frames + (int(common.max()) + 1 if len(common) else 0)
    graph = coo_array((np.ones(len(frame)), (frame, frames + common)), shape=(nodes, nodes))
    label = connected_components(graph, directed=False)[1][:frames]
    return np.unique(label, return_inverse=True)[1].astype(np.int64)


def match_positions(x: Floats, y: Floats, radius: float) -> Ints:
    """Give detections of the same star the same number.

    Detections are first merged in cells of half the radius, then cells whose mean positions lie within
    `radius` are joined: the work grows linearly with the number of detections, however often a star was seen.

    Parameters
    ----------
    x, y : ndarray
        ``(n,)`` canvas positions of all detections of all frames.
    radius : float
        Pixels.

    Returns
    -------
    ndarray
        ``(n,)`` star numbers.
    """
    if not len(x):
        return np.zeros(0, np.int64)
    size = radius / 2
    cells = np.stack([np.floor(x / size), np.floor(y / size)], axis=1).astype(np.int64)
    _, cell = np.unique(cells, axis=0, return_inverse=True)
    cell = cell.reshape(-1)
    count = np.bincount(cell)
    centre = np.c_[np.bincount(cell, x) / count, np.bincount(cell, y) / count]
    pairs = cKDTree(centre).query_pairs(radius, output_type="ndarray")
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(centre), len(centre)))
    return connected_components(graph, directed=False)[1].astype(np.int64)[cell]


def solve_gains(
    star: Ints,
    frame: Ints,
    flux: Floats,
    error: Floats,
    expected: Floats,
    held: Floats | None = None,
    workers: int = 1,
) -> tuple[Floats, Solution]:
    """Gain of every frame and channel that puts all of them on one photometric scale.

    First one grey gain per frame from all channels together, then every channel with the grey gain as its
    expectation: a channel with few stars leans on the others.

    Parameters
    ----------
    star, frame : ndarray
        ``(n,)`` which star was seen in which frame.
    flux, error : ndarray
        ``(n, C)`` ADU.
    expected : ndarray
        ``(F,)`` gain to expect without stars, i.e. typical exposure over the frame's own.
    held : ndarray, optional
        ``(F, C)`` gains that stay as they are, NaN where a frame is to be solved against those.
    workers : int
        Threads.

    Returns
    -------
    gain : ndarray
        ``(F, C)``; multiplies the frame.
    grey : Solution
        Of the first step, for what it says about groups and residuals.
    """
    frames, channels = len(expected), flux.shape[1]
    twice = _once_per_frame(star, frame)
    star, frame, flux, error = star[twice], frame[twice], flux[twice], error[twice]
    usable = (flux > 5 * error) & np.isfinite(flux)
    value = np.log(np.where(usable, flux, 1.0))
    sigma = np.hypot(error / np.where(usable, flux, 1.0), _STAR_FLOOR)
    start = np.log(expected)[:, None]
    each, channel = np.nonzero(usable)
    held = np.full((frames, channels), np.nan) if held is None else held
    fixed = np.asarray(np.isfinite(held).all(axis=1), np.bool_)
    if fixed.any():
        grey_held = np.log(held[fixed]).mean(axis=1, keepdims=True)
        start += np.median(grey_held - start[fixed])  # the exposures only say how frames differ
        start[fixed] = grey_held

    def solve(pick: tuple, common: Ints, who: Ints, prior: Floats, width: float) -> Solution:
        design = -np.ones((len(who), 1))
        widths = np.where(fixed, _HELD, width)[:, None]
        return solve_common(common, who, design, value[pick], sigma[pick], prior, widths)

    grey = solve((each, channel), star[each] * channels + channel, frame[each], start, _GAIN_PRIOR)

    def colour(c: int) -> Floats:
        rows = np.flatnonzero(usable[:, c])
        prior = np.where(fixed, np.log(held[:, c]), grey.unknowns[:, 0])[:, None]
        return solve((rows, c), star[rows], frame[rows], prior, _COLOUR_PRIOR).unknowns[:, 0]

    gain = np.stack(list(thread_map(colour, range(channels), workers)), axis=1)
    if not fixed.any():
        # One constant is free: keep the typical frame as it is, and the colours as they are.
        gain -= np.median(grey.unknowns) - np.median(start)
    return np.where(fixed[:, None], held, np.exp(gain)), grey


def _once_per_frame(star: Ints, frame: Ints) -> NDArray[np.bool_]:
    """Observations of stars that were matched only once in their frame: two matches mean a blend."""
    key = star * (int(frame.max(initial=0)) + 1) + frame
    _, inverse, count = np.unique(key, return_inverse=True, return_counts=True)
    return count[inverse] == 1


@dataclass(frozen=True)
class SkySamples:
    """Sky of one frame at nodes that all frames share.

    Parameters
    ----------
    node : ndarray
        ``(n,)`` number of the node on the canvas.
    u, v : ndarray
        ``(n,)`` position of the node in the frame's window, -1 … 1.
    value : ndarray
        ``(n, C)`` ADU, before any gain.
    """

    node: Ints
    u: Floats
    v: Floats
    value: Floats


def sample_sky(
    blocks: FloatImage, block_px: int, positions: tuple[Floats, Floats], node: Ints, u: Floats, v: Floats
) -> SkySamples:
    """Interpolate a frame's block medians at canvas nodes.

    Parameters
    ----------
    blocks : ndarray
        ``(by, bx, C)`` medians of boxes of ``block_px`` frame pixels.
    positions : tuple of ndarray
        ``x, y``: ``(n,)`` frame positions of the nodes.
    node, u, v : ndarray
        ``(n,)`` as in `SkySamples`.
    """
    bx, by = ((p - (block_px - 1) / 2) / block_px for p in positions)
    value = np.stack(
        [
            map_coordinates(blocks[..., c], (by, bx), order=1, cval=np.nan, prefilter=False)
            for c in range(blocks.shape[2])
        ],
        axis=1,
    )
    good = np.isfinite(value).all(axis=1)
    return SkySamples(node[good], u[good], v[good], value[good].astype(np.float64))


def canvas_nodes(window: Window, spacing: int, canvas_width: int) -> tuple[Ints, Floats, Floats, Floats, Floats]:
    """Nodes of the canvas-aligned grid inside a window: number, x, y (canvas pixels), u, v (-1 … 1)."""
    x = np.arange(-(-window.x0 // spacing) * spacing, window.x1, spacing)
    y = np.arange(-(-window.y0 // spacing) * spacing, window.y1, spacing)
    gx, gy = (g.ravel() for g in np.meshgrid(x, y))
    node = ((gy // spacing) * (canvas_width // spacing + 2) + gx // spacing).astype(np.int64)
    cy, cx, hy, hx = window_frame(window)
    px, py = gx.astype(np.float64), gy.astype(np.float64)
    return node, px, py, (px - cx) / hx, (py - cy) / hy


def window_frame(window: Window) -> tuple[float, float, float, float]:
    """Centre ``cy, cx`` and half size ``hy, hx`` that `SkySamples` counts ``v, u`` in."""
    ny, nx = window.shape
    return (
        (window.y0 + window.y1 - 1) / 2,
        (window.x0 + window.x1 - 1) / 2,
        max(ny / 2, 1.0),
        max(nx / 2, 1.0),
    )


def solve_skies(
    samples: list[SkySamples], gain: Floats, noise: Floats, held: Floats | None = None, workers: int = 1
) -> tuple[Floats, list[Solution]]:
    """Sky level and gradient of every frame and channel against the sky they share.

    Parameters
    ----------
    samples : list of SkySamples
        One per frame.
    gain : ndarray
        ``(F, C)`` from `solve_gains`.
    noise : ndarray
        ``(F, C)`` error of one sample, ADU before gain.
    held : ndarray, optional
        ``(F, C, 3)`` planes that stay as they are, NaN where a frame is to be solved against those.
    workers : int
        Threads.

    Returns
    -------
    plane : ndarray
        ``(F, C, 3)``: level, slope over u, slope over v, ADU after gain; subtract them.
    solutions : list of Solution
        One per channel.
    """
    frames = len(samples)
    frame = np.repeat(np.arange(frames), [len(s.node) for s in samples])
    node = np.concatenate([s.node for s in samples])
    raw = np.concatenate([s.value for s in samples])
    design = np.concatenate([np.c_[np.ones_like(s.u), s.u, s.v] for s in samples])
    del samples  # as large as all that was made of them, if the caller has let go of them
    held = np.full((*gain.shape, 3), np.nan) if held is None else held
    fixed = np.asarray(np.isfinite(held).all(axis=(1, 2)), np.bool_)
    if not len(raw):
        return np.where(fixed[:, None, None], held, 0.0), []

    def colour(c: int) -> Solution:
        value, sigma = raw[:, c] * gain[frame, c], (noise[:, c] * gain[:, c])[frame]
        sky = max(abs(float(np.median(value))), float(np.median(sigma)))
        # Removing the median keeps the numbers small; it comes back through the common sky.
        width = np.tile(sky * np.array([1.0, _PLANE_PRIOR, _PLANE_PRIOR]), (frames, 1))
        width[fixed] = _HELD * sky
        prior = np.where(fixed[:, None], held[:, c], 0)
        return solve_common(node, frame, design, value - np.median(value), sigma, prior, width)

    solutions = list(thread_map(colour, range(gain.shape[1]), workers))
    plane = np.stack([solution.unknowns for solution in solutions], axis=1)
    return np.where(fixed[:, None, None], held, plane), solutions


@dataclass(frozen=True)
class Adjustment:
    """What brings one frame to the common photometric scale and sky.

    Parameters
    ----------
    window : Window
        The frame's window: the gradient is counted from its middle.
    gain : ndarray
        ``(C,)`` multiplies.
    plane : ndarray
        ``(C, 3)`` level and slopes, ADU after gain, subtracted.
    """

    window: Window
    gain: Floats
    plane: Floats

    def apply(self, image: FloatImage, block: Window, out: FloatImage) -> None:
        """Write the adjusted ``(C, h, w)`` canvas pixels of `block` into `out` of the same shape."""
        y, x = (np.arange(*r) for r in ((block.y0, block.y1), (block.x0, block.x1)))
        for plane, target, gain, (level, along_x, along_y) in zip(image, out, self.gain, self.slopes, strict=True):
            np.multiply(plane, np.float32(gain), out=target)
            target -= (along_x * (x - self.window.x0)).astype(np.float32)
            target -= (level + along_y * (y - self.window.y0)).astype(np.float32)[:, None]

    @cached_property
    def slopes(self) -> Floats:
        """What is subtracted, ``(C, 3)``: at the first pixel of the window, per column and per row, ADU."""
        cy, cx, hy, hx = window_frame(self.window)
        level, slope_u, slope_v = self.plane.T
        first = level + slope_u * (self.window.x0 - cx) / hx + slope_v * (self.window.y0 - cy) / hy
        return np.stack([first, slope_u / hx, slope_v / hy], axis=1)
