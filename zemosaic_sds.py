"""SDS mode (ZeSupaDupStack): lots → mega-tiles → gain renormalisation → global stack → polish.

`assemble_global_mosaic_sds` reads like that sentence; every step is a function of its own. The frames come in
already measured and matched to one photometric scale (`zemosaic.photometry`), and go straight from
their raw pixels into the global WCS, with one interpolation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

import lecropper
from zemosaic.canvas import Canvas
from zemosaic.coadd import Sub, block_side, deepest
from zemosaic.combine import Clip, combine
from zemosaic.events import Events
from zemosaic.execute import Result, return_freed_memory, thread_map
from zemosaic.frames import Frame
from zemosaic.job import Workbench
from zemosaic.robust import median
from zemosaic.settings import Settings
from zemosaic.stacking import Stack, stack_subs
from zemosaic.stars import plane_noise
from zemosaic.store import ArrayStore
from zemosaic.tiles import FloatImage, Mosaic, Tile, Window, alpha_of

if TYPE_CHECKING:
    from zemosaic.remote import RemoteLots

_GRID_CELLS = 128  # cells along the longer side of the coarse coverage grid
_MEDIAN_SAMPLES = 500_000  # pixels that are enough for a median
_MIN_SHARED = 16  # pixels (or boxes of them) two mega-tiles must share to be compared
_BOX_PX = 16  # side of the boxes that pixels are averaged in before a shared median
_BOX_ROWS = 16  # rows of boxes that are averaged at a time

Boxes = tuple[Window, FloatImage]  # means of boxes, and which of the canvas's they are


class SdsError(Exception):
    """The SDS chain cannot make a mosaic; the message says why."""


@dataclass(frozen=True)
class Lot:
    """Frames that become one mega-tile.

    Parameters
    ----------
    members : tuple of int
        Positions in the list of frames.
    given : bool
        Whether the lot was given (``preplan_path_groups``) rather than planned here.
    """

    members: tuple[int, ...]
    given: bool = False


class Place(Protocol):
    """Canvas pixel → frame pixel; a `zemosaic.warp.PixelMap` is one."""

    @property
    def window(self) -> Window: ...

    def at(self, x: NDArray, y: NDArray, /) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...


class Placed(Protocol):
    """What `plan_lots` needs of a frame: which it is and where it lies. A `Sub` is one."""

    @property
    def frame(self) -> Frame: ...

    @property
    def pixel_map(self) -> Place: ...


class StackedLot(NamedTuple):
    """A lot whose frames are stacked.

    Parameters
    ----------
    lot : Lot
        Its frames.
    finish : callable
        Keeps the stack for the next run, which one core does while the others go on; returns it.
    start : float
        When it was begun, s on a clock.
    """

    lot: Lot
    finish: Callable[[], Stack]
    start: float


@dataclass(frozen=True)
class LotReport:
    """How a mega-tile came about.

    Parameters
    ----------
    lot : Lot
        Its frames.
    window : Window
        Where it lies on the canvas.
    used, rejected : tuple of int
        Pixels of each member that contributed, and that were rejected.
    lost : dict
        Member → why it could not be used after all.
    seconds : float
        Time it took.
    """

    lot: Lot
    window: Window
    used: tuple[int, ...]
    rejected: tuple[int, ...]
    lost: dict[int, str]
    seconds: float


@dataclass(frozen=True)
class Gains:
    """Outcome of the gain renormalisation.

    Parameters
    ----------
    reference : int
        Index of the mega-tile with gain 1.
    medians : tuple of float
        Each tile's own median over covered pixels, ADU.
    gains : tuple of float
        What each tile is multiplied by; finite and positive.
    replaced : tuple of int
        Tiles whose gain could not be used and is 1 instead.
    isolated : tuple of int
        Tiles without overlap, whose gain compares whole tiles.
    """

    reference: int
    medians: tuple[float, ...]
    gains: tuple[float, ...]
    replaced: tuple[int, ...] = ()
    isolated: tuple[int, ...] = ()


@dataclass(frozen=True)
class SdsResult:
    """The SDS product before saving: the mosaic, and what the report needs of every step."""

    mosaic: Mosaic
    lots: tuple[LotReport, ...]
    gains: Gains
    history: tuple[str, ...]


def assemble_global_mosaic_sds(
    subs: Sequence[Sub],
    canvas: Canvas,
    sky: NDArray[np.float64],
    bench: Workbench,
    preplan_path_groups: Sequence[Sequence[Path]] | None = None,
) -> SdsResult:
    """The whole chain, from matched frames to the polished mosaic.

    Parameters
    ----------
    subs : sequence of Sub
        Frames that passed the gate, in order of time.
    canvas : Canvas
        Global pixel grid.
    sky : ndarray
        ``(C,)`` common sky level of the adjusted frames, ADU.
    bench : Workbench
        Settings, calibration, and what else a run works with.
    preplan_path_groups : sequence of sequence of Path, optional
        Lots given by the user.

    Raises
    ------
    SdsError
        No usable lot, or a mosaic without a single valid pixel.
    """
    settings, events, store = bench.settings, bench.events, bench.store
    lots = plan_lots(subs, canvas, settings, events, preplan_path_groups)
    events.phase(5, "lots")
    built = build_megatiles(lots, subs, sky, bench)
    if not built:
        raise SdsError("no lot has a frame that can be used")
    tiles, reports = [tile for tile, _ in built], tuple(report for _, report in built)
    events.phase(6, "gains")
    gains = renormalise_gains(tiles, settings.sds_gain_scope, store.release, bench.workers)
    _report_gains(gains, events)
    events.phase(7, "stack")
    mosaic = stack_megatiles(tiles, gains.gains, canvas, sky, bench)
    del built, tiles  # they are the bulk of the memory
    store.clear()
    if not (mosaic.coverage > 0).any():
        raise SdsError("the mosaic has no valid pixel: every sample was rejected or missing")
    events.phase(8, "polish")
    mosaic, history = polish(mosaic, settings, events, bench.workers)
    return SdsResult(mosaic, reports, gains, history)


# --- lots ---------------------------------------------------------------------------------------------------


def plan_lots(
    subs: Sequence[Placed],
    canvas: Canvas,
    settings: Settings,
    events: Events,
    preplan_path_groups: Sequence[Sequence[Path]] | None = None,
) -> list[Lot]:
    """Every frame into exactly one lot: given lots first, matched by raw path, then the own plan for the rest.

    The own plan takes the frames in order and closes a lot once it holds ``sds_min_batch_size`` frames and covers
    ``sds_coverage_threshold`` of the union footprint, or holds ``sds_target_batch_size``. A tail shorter than
    the minimum joins the last lot.
    """
    where = {sub.frame.path.resolve(): i for i, sub in enumerate(subs)}
    lots, taken, unknown = [], set[int](), []
    for group in preplan_path_groups or ():
        found = [where.get(Path(path).resolve()) for path in group]
        unknown += [str(path) for path, i in zip(group, found, strict=True) if i is None]
        members = tuple(i for i in dict.fromkeys(found) if i is not None and i not in taken)
        taken.update(members)
        if members:
            lots.append(Lot(members, given=True))
    rest = [i for i in range(len(subs)) if i not in taken]
    lots += _own_plan(rest, subs, canvas, settings)
    if unknown:
        events.warning("sds_preplan_unmatched", n=len(unknown), examples=", ".join(unknown[:3]))
    events.info("sds_lots_planned", lots=len(lots), preplan=len(taken), planned=len(rest))
    return lots


def _own_plan(order: Sequence[int], subs: Sequence[Placed], canvas: Canvas, settings: Settings) -> list[Lot]:
    marks = {i: _coarse_footprint(subs[i], canvas) for i in order}
    _, rows, columns = _coarse_grid(canvas)
    union, covered = np.zeros(rows * columns, np.bool_), np.zeros(rows * columns, np.bool_)
    for cells in marks.values():
        union[cells] = True
    lots: list[Lot] = []
    current: list[int] = []
    for i in order:
        current.append(i)
        covered[marks[i]] = True
        enough = len(current) >= settings.sds_min_batch_size
        wide = covered.sum() >= settings.sds_coverage_threshold * union.sum()
        if (enough and wide) or len(current) >= settings.sds_target_batch_size:
            lots.append(Lot(tuple(current)))
            current = []
            covered[:] = False
    if current and lots and len(current) < settings.sds_min_batch_size:
        lots[-1] = Lot(lots[-1].members + tuple(current))
    elif current:
        lots.append(Lot(tuple(current)))
    return lots


def _coarse_grid(canvas: Canvas) -> tuple[int, int, int]:
    """Side of a cell of the coarse coverage grid, canvas pixels, and its rows and columns."""
    cell = max(1, -(-max(canvas.shape) // _GRID_CELLS))
    return cell, -(-canvas.shape[0] // cell), -(-canvas.shape[1] // cell)


def _coarse_footprint(sub: Placed, canvas: Canvas) -> NDArray[np.int64]:
    """Cells of the coarse coverage grid whose middle lies on a frame."""
    cell, rows, columns = _coarse_grid(canvas)
    box, half = sub.pixel_map.window, (cell - 1) / 2
    # The cells whose middle lies in the frame's window.
    row, column = (
        np.arange(math.ceil((low - half) / cell), min(size, math.ceil((high - half) / cell)))
        for low, high, size in ((box.y0, box.y1, rows), (box.x0, box.x1, columns))
    )
    row, column = (grid.ravel() for grid in np.meshgrid(row, column, indexing="ij"))
    x, y = sub.pixel_map.at(column * cell + half, row * cell + half)
    ny, nx = sub.frame.shape
    on = (x >= -0.5) & (x <= nx - 0.5) & (y >= -0.5) & (y <= ny - 0.5)
    return row[on] * columns + column[on]


# --- mega-tiles ---------------------------------------------------------------------------------------------


def build_megatiles(
    lots: Sequence[Lot], subs: Sequence[Sub], sky: NDArray[np.float64], bench: Workbench
) -> list[tuple[Tile, LotReport]]:
    """One mega-tile per lot that has a usable frame, with a line in the log for each as it is finished."""
    events, live = bench.events, bench.live
    if bench.remote:
        made = _remote_megatiles(bench.remote, lots, subs, sky, bench)
    else:
        # What was stacked is kept on another core, while the next lot is stacked.
        stacked = (stack_lot(lot, subs, sky, bench) for lot in lots)
        made = enumerate(thread_map(partial(build_megatile, store=bench.store), stacked, bench.workers, ahead=2))
    built = {}
    events.progress("sds_lots", 0, len(lots))
    for done, (index, megatile) in enumerate(made, start=1):
        if megatile is not None:
            seconds, frames = megatile[1].seconds, len(lots[index].members)
            events.info("sds_lot_done", index=index + 1, lots=len(lots), frames=frames, seconds=seconds)
            built[index] = megatile
            if live:
                live.add(megatile[0])
                bench.store.release()
        events.progress("sds_lots", done, len(lots))
    if live:
        live.draw()
    return [built[index] for index in sorted(built)]


def stack_lot(lot: Lot, subs: Sequence[Sub], sky: NDArray[np.float64], bench: Workbench) -> StackedLot:
    """Stack one lot in the global WCS: read and mend, warp once, match, weight, reject, average.

    A frame that can no longer be read, or has changed, is left out and named in ``lost``.
    """
    start = time.perf_counter()

    def stack(members: Sequence[int]) -> Stack:
        means = bench.calibration, bench.settings, bench.events
        return stack_subs(members, subs, sky, *means, room=bench.store.room, workers=bench.workers)

    return StackedLot(lot, bench.results.stack(lot.members, subs, sky, bench.settings, stack, mapped=True), start)


def build_megatile(stacked: StackedLot, store: ArrayStore) -> tuple[Tile, LotReport] | None:
    """What was stacked as a mega-tile, kept for the next run.

    Returns
    -------
    tile : Tile
        Image H×W×3 (or H×W), coverage and weight over the lot's window.
    report : LotReport
        Or None in place of both if no frame of the lot could be read.
    """
    made = stacked.finish()
    return _kept(stacked.lot, made, store, time.perf_counter() - stacked.start)


def _remote_megatiles(
    remote: RemoteLots, lots: Sequence[Lot], subs: Sequence[Sub], sky: NDArray[np.float64], bench: Workbench
) -> Iterator[tuple[int, tuple[Tile, LotReport] | None]]:
    """The mega-tiles of a cluster, each with the index of its lot, as they are finished."""
    results, settings = bench.results, bench.settings
    steps = [results.steps(lot.members, subs, sky, settings, mapped=True) for lot in lots]
    for index, made, seconds in remote.stacks(steps, subs, sky, bench.calibration, settings, results.stamps):
        megatile = _kept(lots[index], made, bench.store, seconds)
        del made  # before the next one comes
        yield index, megatile


def _kept(lot: Lot, made: Stack, store: ArrayStore, seconds: float) -> tuple[Tile, LotReport] | None:
    """The stack of a lot as a mega-tile in the store; None if no frame could be read."""
    if len(made.lost) == len(lot.members):
        return None
    window = made.tile.window
    tile = Tile(window, *(store.keep(a) for a in (made.tile.image, made.tile.coverage, made.tile.depth)))
    store.release()
    used, rejected = (tuple(counts[i] for i in lot.members) for counts in (made.used, made.rejected))
    return tile, LotReport(lot, window, used, rejected, made.lost, seconds)


# --- gain renormalisation -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Facts:
    """What gains take from a mega-tile, so that its pixels are read once, however many others it meets.

    Parameters
    ----------
    weight : float
        Sum of its coverage.
    median : float
        Of its covered pixels, grey.
    mask : tuple
        `_coarse_mask`.
    boxes : tuple
        `_covered_boxes`.
    """

    weight: float
    median: float
    mask: tuple[Window, NDArray[np.bool_]]
    boxes: Boxes


def _facts(tile: Tile, step: int) -> _Facts:
    weight = float(np.sum(tile.coverage, dtype=np.float64))
    return _Facts(weight, _tile_median(tile), _coarse_mask(tile, step), _covered_boxes(tile))


def choose_reference(windows: Sequence[Window], weights: Sequence[float]) -> int:
    """The mega-tile with the greatest coverage weight; without any coverage the central one, else the first."""
    if max(weights, default=0.0) > 0:
        return int(np.argmax(weights))
    middles = np.array([[window.y0 + window.y1, window.x0 + window.x1] for window in windows], float)
    return int(np.argmin(np.linalg.norm(middles - np.median(middles, axis=0), axis=1)))


def renormalise_gains(
    tiles: Sequence[Tile], scope: str = "shared", rest: Callable[[], None] = lambda: None, workers: int = 1
) -> Gains:
    """Gain of every mega-tile against the reference: ``gain_ref = 1``, ``gain_i = median(ref / i)``.

    Parameters
    ----------
    tiles : sequence of Tile
        Mega-tiles.
    scope : {"shared", "tile"}
        ``shared`` takes the median of the ratio over the pixels two tiles share and carries gains through the
        overlaps to tiles that do not touch the reference; ``tile`` takes ``median_ref / median_i`` of whole tiles,
        which mistakes a brighter sky or a nebula for a gain. A tile without overlap gets the latter.
    rest : callable
        Called after every tile that was looked at: lets go of memory-mapped arrays.
    workers : int
        Threads.

    Returns
    -------
    Gains
        Finite and positive; what cannot be computed is 1 and listed.
    """
    step = 8 if min(min(tile.window.shape) for tile in tiles) > 64 else 1
    facts = _of_each(partial(_facts, step=step), tiles, rest, workers)
    reference = choose_reference([tile.window for tile in tiles], [each.weight for each in facts])
    medians = [each.median for each in facts]
    with np.errstate(divide="ignore", invalid="ignore"):
        gains = np.float64(medians[reference]) / np.array(medians)
    solved = {reference}
    if scope == "shared":
        gains[reference] = 1.0
        solved = _carry_gains(tiles, facts, reference, gains, rest, workers)
    isolated = tuple(i for i in range(len(tiles)) if i not in solved) if scope == "shared" else ()
    gains[reference] = 1.0
    bad = ~(np.isfinite(gains) & (gains > 0))
    gains[bad] = 1.0
    return Gains(reference, tuple(medians), tuple(gains.tolist()), tuple(np.flatnonzero(bad).tolist()), isolated)


def _of_each(
    work: Callable[[Tile], Result], tiles: Sequence[Tile], rest: Callable[[], None], workers: int
) -> list[Result]:
    """``work`` on every tile, with a `rest` after each."""
    made = []
    for done in thread_map(work, tiles, workers):
        made.append(done)
        rest()
    return made


def _carry_gains(
    tiles: Sequence[Tile],
    facts: Sequence[_Facts],
    reference: int,
    gains: NDArray[np.float64],
    rest: Callable[[], None],
    workers: int,
) -> set[int]:
    """Fill in `gains` outwards from the reference through shared pixels; returns the tiles that were reached."""
    shared = _shared_table([each.mask for each in facts])
    boxes = [each.boxes for each in facts]
    compared = _compared(tiles, boxes, reference, shared, rest, workers)
    waiting = np.ones(len(tiles), np.bool_)
    waiting[reference] = False
    reach = shared[:, reference].copy()  # cells in common with all tiles that are solved
    while True:
        direct = shared[:, reference]
        near = np.flatnonzero(waiting & (direct > 0))
        near = near if len(near) else np.flatnonzero(waiting & (reach > 0))
        if not len(near):
            return set(np.flatnonzero(~waiting).tolist())
        i = int(near[np.lexsort((-near, reach[near], direct[near]))[-1]])
        against = [reference] if direct[i] > 0 else np.flatnonzero(~waiting & (shared[i] > 0)).tolist()
        logs, weights = [], []
        for j in against:
            ratio, pixels = compared.get((j, i)) or _ratio((tiles[j], boxes[j]), (tiles[i], boxes[i]))
            if pixels >= _MIN_SHARED and np.isfinite(ratio):
                logs.append(np.log(gains[j] * ratio))
                weights.append(pixels)
        if logs:
            gains[i] = np.exp(np.average(logs, weights=weights))
            waiting[i] = False
            reach += shared[:, i]
        else:
            shared[i, ~waiting] = 0
            reach[i] = 0


def _compared(
    tiles: Sequence[Tile],
    boxes: Sequence[Boxes],
    reference: int,
    shared: NDArray[np.int64],
    rest: Callable[[], None],
    workers: int,
) -> dict[tuple[int, int], tuple[float, int]]:
    """`_ratio` of the pairs that carry gains: of the reference with all that touch it, and of those that do
    not with all their neighbours. Only where one of them leads nowhere others are needed."""
    far = shared[reference] == 0
    far[reference] = False
    wanted = (shared > 0) & (far | far[:, None])
    wanted[reference] |= shared[reference] > 0
    pairs = np.argwhere(np.triu(wanted | wanted.T, 1)).tolist()
    found = {}
    each = list(zip(tiles, boxes, strict=True))
    ratios = thread_map(lambda pair: _ratio(each[pair[0]], each[pair[1]]), pairs, workers)
    for done, ((a, b), (ratio, pixels)) in enumerate(zip(pairs, ratios, strict=True), start=1):
        found[a, b], found[b, a] = (ratio, pixels), (1 / ratio, pixels)
        if done % 32 == 0:  # few of them have looked at pixels
            rest()
    return found


def _shared_table(masks: Sequence[tuple[Window, NDArray[np.bool_]]]) -> NDArray[np.int64]:
    """`_shared_cells` of all pairs, ``(n, n)``; only of those whose windows meet is it counted, each once."""
    y0, y1, x0, x1 = np.array([(box.y0, box.y1, box.x0, box.x1) for box, _ in masks]).T
    meet = (np.minimum(y1[:, None], y1) > np.maximum(y0[:, None], y0)) & (
        np.minimum(x1[:, None], x1) > np.maximum(x0[:, None], x0)
    )
    shared = np.zeros(meet.shape, np.int64)
    for a, b in np.argwhere(np.triu(meet, 1)).tolist():
        shared[a, b] = shared[b, a] = _shared_cells(masks[a], masks[b])
    return shared


def _ratio(a: tuple[Tile, Boxes], b: tuple[Tile, Boxes]) -> tuple[float, int]:
    """`shared_ratio` from the boxes of two tiles where these are enough, else from their pixels."""
    (first, one), (second, other) = a[1], b[1]
    box = first.intersect(second)
    if box.area >= _BOX_PX**2:
        boxes = one[box.within(first)], other[box.within(second)]
        whole = int((np.isfinite(boxes[0]) & np.isfinite(boxes[1])).sum())
        if whole >= _BOX_PX**2:
            return _median_ratio(*boxes), whole * _BOX_PX**2
    return shared_ratio(a[0], b[0])


def shared_ratio(a: Tile, b: Tile) -> tuple[float, int]:
    """Median of a / b over the pixels that both tiles cover, and the number of those pixels.

    The median of the ratios, not the ratio of the medians: where the sky is not flat, noise moves a tile's median along
    its slopes, by 1 % in a real nebula. For the same reason the pixels are averaged in small boxes first.
    """
    box = a.window.intersect(b.window)
    parts = [(t.coverage[box.within(t.window)] > 0, t.image[box.within(t.window)]) for t in (a, b)]
    both = parts[0][0] & parts[1][0]
    count = int(both.sum())
    if not count:
        return float("nan"), 0
    first, second = (np.where(both, _grey(image), np.float32(np.nan)) for _, image in parts)
    side = max(1, min(_BOX_PX, math.isqrt(count) // _BOX_PX))
    boxes = [_box_means(image, side) for image in (first, second)]
    if (np.isfinite(boxes[0]) & np.isfinite(boxes[1])).sum() < _MIN_SHARED:  # an overlap too thin to hold boxes
        boxes = [first, second]
    return _median_ratio(*boxes), count


def _median_ratio(first: FloatImage, second: FloatImage) -> float:
    """Median of first / second where both are known; NaN where half of them or more is not above zero."""
    known = np.isfinite(first) & np.isfinite(second)
    light = known & (first > 0) & (second > 0)
    if 2 * light.sum() <= known.sum():  # sky about zero: a ratio means nothing
        return float("nan")
    return _median(np.divide(first, second, where=light, out=np.zeros_like(first)), light)


def _covered_boxes(tile: Tile) -> Boxes:
    """Grey means of a canvas-wide grid of boxes, NaN unless the tile covers a box wholly, and their window in boxes."""
    box = tile.window
    y, x = -box.y0 % _BOX_PX, -box.x0 % _BOX_PX
    ny, nx = (max(0, size - first) // _BOX_PX for size, first in zip(box.shape, (y, x), strict=True))
    means = np.full((ny, nx), np.nan, np.float32)
    for top in range(0, ny if nx else 0, _BOX_ROWS):
        rows = slice(y + top * _BOX_PX, y + min(ny, top + _BOX_ROWS) * _BOX_PX)
        part = rows, slice(x, x + nx * _BOX_PX)
        grey = np.where(tile.coverage[part] > 0, _grey(tile.image[part]), np.float32(np.nan))
        means[top : top + _BOX_ROWS] = _box_means(grey, _BOX_PX)
    y0, x0 = (box.y0 + y) // _BOX_PX, (box.x0 + x) // _BOX_PX
    return Window(y0, y0 + ny, x0, x0 + nx), means


def _box_means(image: FloatImage, side: int) -> FloatImage:
    """Means of ``side x side`` boxes; NaN unless a box is wholly covered."""
    ny, nx = (size // side for size in image.shape)
    return cv2.resize(image[: ny * side, : nx * side], (nx, ny), interpolation=cv2.INTER_AREA)  # type: ignore[return-value]


def _coarse_mask(tile: Tile, step: int) -> tuple[Window, NDArray[np.bool_]]:
    """Covered pixels of every `step`-th row and column of the canvas, and their window in steps."""
    box = tile.window
    y, x = -box.y0 % step, -box.x0 % step
    mask = tile.coverage[y::step, x::step] > 0
    y0, x0 = (box.y0 + y) // step, (box.x0 + x) // step
    return Window(y0, y0 + mask.shape[0], x0, x0 + mask.shape[1]), mask


def _shared_cells(a: tuple[Window, NDArray[np.bool_]], b: tuple[Window, NDArray[np.bool_]]) -> int:
    """Number of cells of two coarse masks that both are covered."""
    box = a[0].intersect(b[0])
    return int((a[1][box.within(a[0])] & b[1][box.within(b[0])]).sum()) if box.area else 0


def _tile_median(tile: Tile) -> float:
    """Median over all covered pixels, or over a regular grid of them in a large tile."""
    step = max(1, math.isqrt(tile.coverage.size // _MEDIAN_SAMPLES))
    return _median(_grey(tile.image[::step, ::step]), tile.coverage[::step, ::step] > 0)


def _grey(image: FloatImage) -> FloatImage:
    return image if image.ndim == 2 else (image[..., 0] + image[..., 1] + image[..., 2]) / np.float32(3)


def _median(values: FloatImage, where: NDArray[np.bool_]) -> float:
    """Median over a mask, NaN left out, from at most half a million evenly spread pixels; NaN if none."""
    picked = values[where]
    picked = picked[:: max(1, picked.size // _MEDIAN_SAMPLES)]
    return median(picked)


def _report_gains(gains: Gains, events: Events) -> None:
    reference = gains.reference
    events.info("sds_reference", index=reference + 1, median=gains.medians[reference])
    order = np.argsort(np.abs(np.log(gains.gains)), kind="stable")[::-1][:3]
    examples = ", ".join(f"{i + 1}: {gains.gains[i]:.4f}" for i in order)
    events.info("sds_gains", min=min(gains.gains), max=max(gains.gains), examples=examples)
    for i in gains.replaced:
        events.warning("sds_gain_replaced", index=i + 1, gain=gains.medians[i])
    for i in gains.isolated:
        events.warning("sds_gain_isolated", index=i + 1)


# --- global stack -------------------------------------------------------------------------------------------


def stack_megatiles(
    tiles: Sequence[Tile], gains: Sequence[float], canvas: Canvas, sky: NDArray[np.float64], bench: Workbench
) -> Mosaic:
    """Combine the renormalised mega-tiles on the canvas; levels stay as they are.

    The weight of a tile at a pixel is its coverage there, every frame counted by its own weight
    (``stacking_weighting_method``; with ``none`` that is the coverage itself). A sample's expected noise is its
    tile's, scaled to that weight, so that rejection works from two tiles on. The canvas's coverage
    counts the frames behind the samples that were kept.
    """
    channels, settings, events, store = len(sky), bench.settings, bench.events, bench.store
    method, k = settings.global_coadd_method, settings.global_coadd_k
    names = {"kappa_sigma": "kappa_sigma", "winsorized": "winsorized_sigma_clip"}
    clip = Clip(names.get(method, "none"), k, k)  # type: ignore[arg-type]
    noise = _of_each(_unit_noise, tiles, store.release, bench.workers)
    unit = [each * gain for each, gain in zip(noise, gains, strict=True)]
    sky32 = sky.astype(np.float32)
    return_freed_memory()  # of lots and gains: now comes the largest array of the run
    # The blocks fill them: to touch so many pages for the first time takes as long as a tenth of the stack.
    image = np.empty((*canvas.shape, channels), np.float32)
    coverage = np.empty(canvas.shape, np.float32)
    events.info("global_coadd_start", tiles=len(tiles), method=method)
    start = time.perf_counter()

    def work(block: Window) -> None:
        events.check_stop()
        halo = block.grow(1)
        layers = [
            _layer(t, g, u, halo) for t, g, u in zip(tiles, gains, unit, strict=True) if halo.intersect(t.window).area
        ]
        if not layers:
            image[block.slices], coverage[block.slices] = np.nan, 0
            return
        stack, sigma, weight = (np.stack([layer[k] for layer in layers], axis=1) for k in range(3))
        result, keep = combine(stack, sigma, weight, sky32, clip, use_median=method == "median")
        inner = block.within(halo)
        depth = np.einsum("nhw,nhw->hw", keep, np.stack([layer[3] for layer in layers]))
        image[block.slices], coverage[block.slices] = result[inner], depth[inner]

    blocks = list(Window.of_shape(canvas.shape).blocks(block_side(deepest([t.window for t in tiles]), channels)))
    for done, _ in enumerate(thread_map(work, blocks, bench.workers), start=1):
        if done % 16 == 0 or done == len(blocks):
            store.release()  # often: the system maps a wide neighbourhood of what is looked at
            events.progress("sds_stack", done, len(blocks))
    events.info("global_coadd_done", tiles=len(tiles), seconds=time.perf_counter() - start)
    return Mosaic(image if channels == 3 else image[..., 0], coverage, alpha_of(coverage), canvas.wcs.deepcopy())


def _layer(
    tile: Tile, gain: float, unit: NDArray[np.float64], halo: Window
) -> tuple[FloatImage, FloatImage, FloatImage, FloatImage]:
    """One tile's part of a block: image, noise and weight, each ``(C, h, w)``, and coverage ``(h, w)``."""
    box = halo.intersect(tile.window)
    (ys, xs), inside = box.within(halo), box.within(tile.window)
    image = np.full((len(unit), *halo.shape), np.nan, np.float32)
    weight, depth = np.zeros(halo.shape, np.float32), np.zeros(halo.shape, np.float32)
    part = tile.image[inside]
    image[:, ys, xs] = np.moveaxis(part if part.ndim == 3 else part[..., None], 2, 0) * np.float32(gain)
    weight[ys, xs] = tile.depth[inside]
    depth[ys, xs] = tile.coverage[inside]
    noise = unit[:, None, None] / np.sqrt(np.where(weight > 0, weight, 1))
    return image, noise.astype(np.float32), np.broadcast_to(weight, image.shape), depth


def _unit_noise(tile: Tile) -> NDArray[np.float64]:
    """Noise ``(C,)`` of a typical frame in this tile: pixel differences times the root of the weight."""
    rows = slice(None, None, max(1, tile.window.shape[0] // 128))
    image, root = tile.image[rows], np.sqrt(tile.depth[rows])
    image = image if image.ndim == 3 else image[..., None]
    noise = np.array([plane_noise(image[..., c] * root) for c in range(image.shape[2])])
    return np.where(noise > 0, noise, 1e-6)


# --- polish -------------------------------------------------------------------------------------------------


def polish(mosaic: Mosaic, settings: Settings, events: Events, workers: int = 1) -> tuple[Mosaic, tuple[str, ...]]:
    """Coverage cut → two-pass renormalisation → quality crop → alt-az clean-up → autocrop, as switched on.

    Every step takes the whole mosaic, so image, coverage, alpha and WCS stay in step.

    Returns
    -------
    mosaic : Mosaic
        Polished.
    history : tuple of str
        One line per step that was run.
    """
    return lecropper.polish(mosaic, settings, events, keep=settings.sds_min_coverage_keep, workers=workers)
