"""Seams: is there a step of the sky where frames, lots or coverage begin and end?

Across a border the sky may change because the sky does. So the step at the border is compared with the steps across
lines parallel to it, a little away, where nothing begins or ends:

    excess = D(0) - median(D(±2), D(±3)),   D(k) = sky(24 k + r) - sky(24 k - r),   r = 8 px and 16 px

each the median along half a piece of border and over both r, inside minus outside. The rim of a nebula may be steeper
there than all around; but it rises over some distance, and a step does not. What is left of the difference across the
line, of distances d, 2 d and 3 d from it, when all that a smooth sky adds up to fourth order is taken off is

    S = 5/2 D_d - 2 D_2d + 1/2 D_3d .

d is 5 px, so that even the rim of a nebula that rises within 20 px leaves a tenth of itself; 8 px where a border is
known to a cell only. What counts is the smaller of excess and S. And a seam runs through: of the two halves the
smaller counts too, and nothing if they contradict each other, as beside the wing of a star.

The same statistic about the lines k = ±2 instead of the border tells how large it gets by noise and nebula alone. Its
variance is a constant, of the noise, and grows with how curved the sky is beside the line: the larger of
|sky(d) - 2 sky(2 d) + sky(3 d)| of both sides, which no step on the line changes. So each piece of border is measured
against lines with as lively a sky beside them: what the percentiles (their upper bounds, as few borders tell them only
roughly; of the largest, what one mosaic in twenty exceeds) of the lines would be there is taken off in quadrature.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from zemosaic.execute import thread_map
from zemosaic.report.evidence import SIDE_POINTS, Evidence, Floats, Ints
from zemosaic.report.surface import CELL, CellMap, Surface, nan_median
from zemosaic.tiles import FloatImage, Window

REACH = (8.0, 16.0)  # px from a line at which the sky on either side is read: a cell's width clear of it
_NEAR = {True: 5.0, False: 8.0}  # px, d of the module's formulae for borders known exactly, and to a cell
_SHARP = (2.5, -2.0, 0.5)  # of the differences at d, 2 d, 3 d
_CURVE = (1.0, -2.0, 1.0)
SPACING = 24.0  # px between parallel lines
BLOCK_CELLS = 3  # cells along the side of a block of `block_steps`: 24 px
_BLOCK_SHARE = 0.4  # of a block that must be free of sources
_LINES = np.arange(-4, 5)
_CONTROLS = (-3, -2, 2, 3)
_PIECE = 80.0  # px, least length of a piece of border, if the frame is large enough
_SHARP_LINES = (-2, 0, 2)  # lines that the sharper statistic is made for
_SAMPLES = 8  # points along a piece of border, of cells
_FINE_SAMPLES = 16  # of fine cells
_MAX_PIECES = 20_000
_BATCH = 500  # pieces that are measured at a time, for the memory
_MIN_STEP = 0.05  # share by which the coverage must change for a border to be seen in it
_MARGIN = 3.0  # standard errors of a percentile that are put down to chance
_ROUNDS = 5  # of the fit of the variance, which weights itself
_WILD = 4.0  # standard deviations at which a step counts no more in it: a star's wing
_LEAST = 1e-6  # variance, pixel noise squared
_TAIL = 0.1  # of the steps at control lines, beyond which their distribution is taken to be exponential
_RARE = 0.05  # of all mosaics: in so many, the largest step of all may exceed what is put down to chance
_WORST = 10
_THUMBNAIL = 96  # px, side of a seam's picture


@dataclass(frozen=True)
class Borders:
    """Pieces of border; m of them.

    Parameters
    ----------
    x, y : ndarray
        ``(m,)`` middle, mosaic pixels.
    nx, ny : ndarray
        ``(m,)`` unit normal that points inwards (to where more frames are).
    length : ndarray
        ``(m,)`` px.
    frame : ndarray
        ``(m,)`` whose border it is; -1 where only the coverage tells.
    """

    x: Floats
    y: Floats
    nx: Floats
    ny: Floats
    length: Floats
    frame: Ints

    def __len__(self) -> int:
        return len(self.x)

    def take(self, which: NDArray) -> Borders:
        """Some of the pieces."""
        return Borders(*(getattr(self, name)[which] for name in ("x", "y", "nx", "ny", "length", "frame")))


@dataclass(frozen=True)
class Seam:
    """One of the worst seams.

    Parameters
    ----------
    x, y : float
        Middle, mosaic pixels.
    angle : float
        Direction of the border, degrees from the x axis, 0 … 180.
    step : float
        Excess step, in units of the local pixel noise; positive = brighter inside.
    step_adu : float
        The same, ADU.
    chance : float
        How large it would get there by noise and nebula alone, in units of the pixel noise.
    channel : int
        The colour where it is largest.
    frame, lot : int
        Whose border it is; -1 where unknown.
    window : Window
        What to show of the mosaic.
    thumbnail : ndarray
        Mean over channels there, float32.
    """

    x: float
    y: float
    angle: float
    step: float
    step_adu: float
    chance: float
    channel: int
    frame: int
    lot: int
    window: Window
    thumbnail: FloatImage


@dataclass(frozen=True)
class SeamFigures:
    """What was found at the borders; percentiles per channel, ``(C,)``, of the size of the steps.

    Parameters
    ----------
    pieces : int
        Pieces of border that could be measured.
    p50, p95, max : ndarray
        In units of the local pixel noise, noise and nebula taken off in quadrature.
    p50_adu, p95_adu, max_adu : ndarray
        ADU.
    control_p95 : ndarray
        What noise and nebula alone give, in units of the pixel noise.
    block_p99 : ndarray
        ADU, see `block_steps`.
    worst : tuple of Seam
        The worst first, none near another.
    map : ndarray
        ``(ry, rx)`` float32, largest mean step of a region's borders, units of the pixel noise; NaN without border.
    """

    pieces: int
    p50: Floats
    p95: Floats
    max: Floats
    p50_adu: Floats
    p95_adu: Floats
    max_adu: Floats
    control_p95: Floats
    block_p99: Floats
    worst: tuple[Seam, ...]
    map: FloatImage


def measure_seams(evidence: Evidence, surface: Surface, workers: int = 1) -> SeamFigures:
    """Steps at all borders that are known, and between neighbouring blocks everywhere, on so many threads."""
    borders = frame_borders(evidence) if evidence.frames is not None else coverage_borders(surface)
    noise = surface.noise_at(borders.x, borders.y)
    own, control = border_steps(surface, borders, workers)
    own, control = own.over(noise), control.over(np.concatenate([noise, noise]))
    control, good = control.take(control.known), own.known
    borders, own, noise = borders.take(good), own.take(good), noise[good]
    # Pieces where the coverage changes lie cell by cell and overlap; those of an outline do not.
    apart = 1 if evidence.frames is not None else 8
    few = 1 / (apart / max(len(borders), 1) + apart / max(len(control.size), 1))
    chance = _chances(control, own, [_exceeded(q, few) for q in (50, 95, 100)])
    beyond = [_beyond(np.abs(own.size), limit) for limit in chance]
    p50, p95, top = (_percentile(b, q) for b, q in zip(beyond, (50, 95, 100), strict=True))
    p50_adu, p95_adu, top_adu = (_percentile(b * noise, q) for b, q in zip(beyond, (50, 95, 100), strict=True))
    return SeamFigures(
        pieces=len(borders),
        p50=p50,
        p95=p95,
        max=top,
        p50_adu=p50_adu,
        p95_adu=p95_adu,
        max_adu=top_adu,
        control_p95=_percentile(chance[1], 50),
        block_p99=block_steps(surface),
        worst=_worst(evidence, borders, own.size, noise, chance[2]),
        map=_map(surface, borders, own.size),
    )


def frame_borders(evidence: Evidence) -> Borders:
    """The outlines of all frames, in pieces of `_PIECE` px or more; not all pieces where the frames are very many."""
    assert evidence.frames is not None
    outline = evidence.frames.outline
    spacing = float(np.median(np.hypot(*np.moveaxis(np.diff(outline, axis=1), 2, 0))))
    # Short pieces of small frames are joined: a star's wing must not make up half of one.
    start = outline[:, :: 2 ** int(np.clip(np.ceil(np.log2(_PIECE / max(spacing, 1e-9))), 0, np.log2(SIDE_POINTS)))]
    edge = np.roll(start, -1, axis=1) - start
    length = np.hypot(edge[..., 0], edge[..., 1])
    middle = start + edge / 2
    normal = np.stack([-edge[..., 1], edge[..., 0]], axis=-1) / np.maximum(length, 1e-9)[..., None]
    inwards = ((start.mean(axis=1, keepdims=True) - middle) * normal).sum(axis=-1)
    normal *= np.sign(inwards)[..., None]
    frame = np.broadcast_to(np.arange(len(start))[:, None], length.shape)
    x, y = middle[..., 0].ravel(), middle[..., 1].ravel()
    ny, nx = evidence.shape
    inside = np.flatnonzero((x > 0) & (x < nx) & (y > 0) & (y < ny))
    inside = inside[:: max(1, -(-len(inside) // _MAX_PIECES))]
    every = Borders(
        x, y, normal[..., 0].ravel(), normal[..., 1].ravel(), length.ravel(), frame.ravel().astype(np.int64)
    )
    return every.take(inside)


def coverage_borders(surface: Surface) -> Borders:
    """Where the coverage changes from cell to cell by half a frame and by `_MIN_STEP` at least."""
    if surface.coverage is None or min(surface.coverage.shape) < 3:
        nothing = np.zeros(0)
        return Borders(nothing, nothing, nothing, nothing, nothing, np.zeros(0, np.int64))
    coverage = np.where(surface.valid > 0.99, surface.coverage, np.nan).astype(float)
    down, across = np.gradient(coverage)
    change = np.hypot(down, across)
    with np.errstate(invalid="ignore"):
        found = (change > 0.25) & (change > _MIN_STEP / 2 * coverage)  # a gradient spans two cells
    i, j = np.nonzero(found)
    thin = slice(None, None, max(1, -(-len(i) // _MAX_PIECES)))
    i, j = i[thin], j[thin]
    normal: Floats = np.stack([across[i, j], down[i, j]]).astype(np.float64) / change[i, j]
    middle = (CELL - 1) / 2
    return Borders(
        (j * CELL + middle).astype(np.float64),
        (i * CELL + middle).astype(np.float64),
        normal[0],
        normal[1],
        np.full(len(i), 8.0 * CELL),
        np.full(len(i), -1, np.int64),
    )


@dataclass(frozen=True)
class Steps:
    """Steps across lines, inside - outside, and how curved the sky is beside them, ``(m, C)``; both in one unit."""

    size: Floats
    curve: Floats

    def over(self, unit: Floats) -> Steps:
        """Both in another unit ``(m, C)``; NaN where that is 0."""
        unit = np.where(unit > 0, unit, np.nan)
        return Steps(self.size / unit, self.curve / unit)

    def take(self, which: NDArray) -> Steps:
        """Some of the lines."""
        return Steps(self.size[which], self.curve[which])

    @property
    def known(self) -> NDArray[np.bool_]:
        """``(m,)`` where all colours are."""
        return np.asarray(np.isfinite(self.size + self.curve).all(axis=1))


def border_steps(surface: Surface, borders: Borders, workers: int = 1) -> tuple[Steps, Steps]:
    """Steps at every piece of border, m of them, and at its control lines, 2 m; ADU."""
    near = _NEAR[bool((borders.frame >= 0).all())]
    parts = [borders.take(np.arange(i, min(i + _BATCH, len(borders)))) for i in range(0, len(borders), _BATCH)]
    none = np.zeros((0, len(_LINES), 2, surface.channels), np.float32)
    sky, close = surface.sky_map(), surface.sky_map(fine=near < CELL)

    def look(part: Borders) -> tuple[NDArray, NDArray, NDArray]:
        return _differences(sky, part), *_sharp(close, part, near)

    found = list(thread_map(look, parts, workers))
    step = np.concatenate([none, *(made[0] for made in found)])
    edge, curve = (np.concatenate([none[:, :3], *(made[k] for made in found)]) for k in (1, 2))
    at = {int(k): i for i, k in enumerate(_LINES)}

    def steps(line: int, controls: tuple[int, ...]) -> Steps:
        around = nan_median(np.moveaxis(step[:, [at[k] for k in controls]], 1, -1), 0.4)
        own = _SHARP_LINES.index(line)
        beyond = _agreed(step[:, at[line]] - around, edge[:, own])
        return Steps(_agreed(beyond[:, 0], beyond[:, 1]), np.asarray(curve[:, own].max(axis=1), float))

    sides = [steps(2, (-3, -2, 4, 3)), steps(-2, (-4, -3, 2, 3))]
    both = [np.concatenate([getattr(side, name) for side in sides]) for name in ("size", "curve")]
    return steps(0, _CONTROLS), Steps(*both)


def _agreed(first: NDArray, second: NDArray) -> Floats:
    """The smaller of two values if both have one sign, else 0; NaN if either is."""
    size = np.minimum(np.abs(first), np.abs(second))
    return np.asarray(np.where(first * second < 0, 0.0, np.sign(first) * size), float)


def _differences(sky_map: CellMap, borders: Borders) -> NDArray:
    """D(k) of the module's formulae for both halves of every piece, ``(m, lines, 2, C)``."""
    sky = _beside(sky_map, borders, _LINES, REACH)
    apart = np.moveaxis(sky[:, 1] - sky[:, 0], 2, -2)  # (piece, line, half, channel, reach, sample)
    return nan_median(apart.reshape(*apart.shape[:4], -1), 0.4)


def _sharp(sky_map: CellMap, borders: Borders, near: float) -> tuple[NDArray, NDArray]:
    """S at `_SHARP_LINES` of the module's formulae, and the curvature beside them, ``(m, 3, 2, C)`` each."""
    reach = (near, 2 * near, 3 * near)
    sky = _beside(sky_map, borders, np.array(_SHARP_LINES), reach)
    edge = _combined(_SHARP, nan_median(sky[:, 1] - sky[:, 0], 0.4), 2)
    return edge, np.abs(_combined(_CURVE, nan_median(sky, 0.4), 3)).max(axis=1)


def _combined(factors: tuple[float, ...], values: NDArray, axis: int) -> NDArray:
    """Sum over an axis; a library's product would round as the place in memory has it."""
    return sum(np.float32(f) * value for f, value in zip(factors, np.moveaxis(values, axis, 0), strict=True))


def _beside(sky_map: CellMap, borders: Borders, lines: NDArray, reach: tuple[float, ...]) -> NDArray:
    """The sky outside and inside of all lines: ``(piece, side, line, reach, half, channel, sample)``."""
    samples = _SAMPLES if sky_map.side == CELL else _FINE_SAMPLES
    along = (np.arange(samples) + 0.5) / samples - 0.5
    side = np.array([-1.0, 1.0])[:, None, None] * np.array(reach)[None, None, :] + (lines * SPACING)[None, :, None]
    # (piece, side, line, reach, sample)
    t = along * borders.length[:, None, None, None, None]
    d = side[None, ..., None]
    nx, ny = (n[:, None, None, None, None] for n in (borders.nx, borders.ny))
    x = borders.x[:, None, None, None, None] + d * nx - t * ny
    y = borders.y[:, None, None, None, None] + d * ny + t * nx
    sky = sky_map.at(x, y)
    return np.moveaxis(sky.reshape(len(borders), 2, len(lines), len(reach), 2, -1, sky.shape[-1]), -1, -2)


def _chances(control: Steps, own: Steps, shares: list[float]) -> list[Floats]:
    """What these shares of the lines with as lively a sky beside them exceed, at each border ``(m, C)``."""
    square, curve = np.square(control.size).ravel(), control.curve.ravel()
    design = np.stack([np.ones_like(curve), curve], axis=1)
    growth, variance = np.zeros(2), 1 + curve
    for _ in range(_ROUNDS if len(curve) else 0):
        growth = nnls(design / variance[:, None], np.minimum(square, _WILD**2 * variance) / variance)[0]
        variance = np.maximum(design @ growth, _LEAST)
    z = np.sqrt(square / variance)  # of all colours: they have the noise as unit, and are few
    spread = np.sqrt(growth[0] + growth[1] * own.curve)
    return [_upper(z, share) * spread for share in shares]


def _upper(z: Floats, share: float) -> float:
    """What a share of such values exceeds, by an exponential tail where few of them tell; NaN for none."""
    if not len(z):
        return float("nan")
    own, start = (float(np.percentile(z, 100 * (1 - part))) for part in (share, _TAIL))
    tail = float((z[z >= start] - start).mean())
    return max(own, start + tail * float(np.log(_TAIL / share)))


def block_steps(surface: Surface) -> Floats:
    """99th percentile ``(C,)`` of the steps between neighbouring blocks of 24 px, ADU; the slope around taken off.

    Finds steps wherever they are, without knowing any border; contains the noise of the blocks themselves. It is
    ``step_p99_e`` of the project's scorer, with the neighbouring steps in place of the true sky.
    """
    k = BLOCK_CELLS
    h, w = (size // k for size in surface.free.shape)
    free = surface.free[: h * k, : w * k, None]
    weight = np.where(np.isfinite(surface.sky[: h * k, : w * k]), free, np.float32(0))
    light = np.nan_to_num(surface.sky[: h * k, : w * k]) * weight
    light, weight = (a.reshape(h, k, w, k, a.shape[2]).sum(axis=(1, 3)) for a in (light, weight))
    with np.errstate(invalid="ignore", divide="ignore"):
        blocks = np.where(weight > _BLOCK_SHARE * k * k, light / weight, np.nan)
    return np.array([_percentile(_excess_steps(blocks[..., c]), 99) for c in range(surface.channels)])


def _excess_steps(blocks: NDArray) -> NDArray:
    """Size of the steps along both axes, less the median of those 2, 3 and 4 blocks before and behind."""
    out = []
    for step in (np.diff(blocks, axis=0), np.diff(blocks, axis=1).T):
        if len(step) < 9:
            continue
        around = np.stack([np.roll(step, k, axis=0) for k in (-4, -3, -2, 2, 3, 4)], axis=-1)
        out.append(np.abs(step - nan_median(around, 0.4))[4:-4].ravel())
    return np.concatenate(out) if out else np.zeros(0)


def _percentile(values: NDArray, q: float) -> NDArray:
    """Percentile over the first axis, NaN left out; NaN if there is nothing."""
    if values.ndim == 1:
        values = values[np.isfinite(values)]
    return np.percentile(values, q, axis=0) if len(values) else np.full(values.shape[1:], np.nan)


def _exceeded(q: float, count: float) -> float:
    """The share that may exceed the percentile `q` of `count` values by chance: less by binomial standard errors."""
    least = _RARE / max(count, 1.0)
    return max(1 - q / 100 - _MARGIN * float(np.sqrt(q * (100 - q) / max(count, 1.0))) / 100, least)


def _beyond(value: NDArray, floor: NDArray) -> Floats:
    """What of `value` is more than `floor`, both random and independent."""
    return np.sqrt(np.maximum(np.square(value) - np.nan_to_num(np.square(floor)), 0))


def _worst(evidence: Evidence, borders: Borders, steps: Floats, noise: Floats, chance: Floats) -> tuple[Seam, ...]:
    """The pieces that go farthest beyond chance; then, where none does, the largest steps."""
    size = np.abs(steps)
    rank = _beyond(size, chance) + 1e-3 * size
    channel = rank.argmax(axis=1) if len(size) else np.zeros(0, int)
    order = np.argsort(-rank.max(axis=1, initial=0), kind="stable")
    taken: list[int] = []
    for i in order:
        if all(np.hypot(borders.x[i] - borders.x[j], borders.y[i] - borders.y[j]) > _THUMBNAIL for j in taken):
            taken.append(int(i))
        if len(taken) == _WORST:
            break
    seams = []
    for i in taken:
        c, half = int(channel[i]), _THUMBNAIL // 2
        x, y = float(borders.x[i]), float(borders.y[i])
        box = Window(int(y) - half, int(y) + half, int(x) - half, int(x) + half).intersect(
            Window.of_shape(evidence.shape)
        )
        part = evidence.image[box.slices]
        frame = int(borders.frame[i])
        seams.append(
            Seam(
                x=x,
                y=y,
                angle=float(np.rad2deg(np.arctan2(borders.nx[i], -borders.ny[i])) % 180),
                step=float(steps[i, c]),
                step_adu=float(steps[i, c] * noise[i, c]),
                chance=float(np.nan_to_num(chance[i, c])),
                channel=c,
                frame=frame,
                lot=int(evidence.frames.lot[frame]) if evidence.frames is not None and frame >= 0 else -1,
                window=box,
                thumbnail=part if part.ndim == 2 else part.mean(axis=2, dtype=np.float32),
            )
        )
    return tuple(seams)


def _map(surface: Surface, borders: Borders, steps: Floats) -> FloatImage:
    """Mean size of the steps in every region, of the worst channel."""
    ry, rx = surface.noise.shape[:2]
    cell = (borders.y // surface.region).astype(int) * rx + (borders.x // surface.region).astype(int)
    count = np.bincount(cell, minlength=ry * rx)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = [np.bincount(cell, np.abs(s), ry * rx) / count for s in steps.T]
    return np.max(means, axis=0).reshape(ry, rx).astype(np.float32)
