"""A group of frames into one tile, as every route does it: read and mend them, then coadd as the settings say.

Pixels are only held for as much of the canvas as fits into memory: a window that would need more is made in bands, and
of every frame only the part that a band looks at is kept. Reading a frame once more costs a hundredth of a second.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zemosaic.calibrate import Calibration, prepare
from zemosaic.coadd import Coadd, Crop, Sub, coadd, hull, similar_noise
from zemosaic.combine import Clip
from zemosaic.events import Events
from zemosaic.execute import thread_map
from zemosaic.frames import FrameError
from zemosaic.settings import Settings
from zemosaic.tiles import Tile, Window
from zemosaic.warp import source_box

_LEAST_BAND = 64  # px: narrower bands would read every frame all too often


@dataclass(frozen=True)
class Stack:
    """A tile and what became of its frames.

    Parameters
    ----------
    tile : Tile
        Image, coverage and depth.
    used, rejected : dict
        Frame → pixels that contributed, and that were rejected as outliers.
    lost : dict
        Frame → why it could not be read any more; what was read of it before is in the tile.
    """

    tile: Tile
    used: dict[int, int]
    rejected: dict[int, int]
    lost: dict[int, str]


def stack_subs(
    members: Iterable[int],
    subs: Sequence[Sub],
    sky: NDArray[np.float64],
    calibration: Calibration,
    settings: Settings,
    events: Events,
    *,
    room: int,
    workers: int = 1,
    window: Window | None = None,
) -> Stack:
    """Coadd some of the frames with the ``stacking_*`` settings.

    Parameters
    ----------
    members : iterable of int
        Which of `subs`.
    subs : sequence of Sub
        All frames of the run.
    sky : ndarray
        ``(C,)`` common sky level after adjustment.
    calibration, settings, events, workers
        As in every route.
    room : int
        Bytes that prepared pixels may take at a time.
    window : Window, optional
        Canvas pixels to make; the hull of the frames' windows if not given.

    Returns
    -------
    Stack
        Without a single valid pixel if no frame could be read.
    """
    members = list(members)
    window = window or hull([subs[i].window for i in members])
    clip = Clip(settings.stacking_rejection_algorithm, settings.stacking_kappa_low, settings.stacking_kappa_high)
    even = similar_noise([subs[i] for i in members])
    used, rejected, lost = dict.fromkeys(members, 0), dict.fromkeys(members, 0), dict[int, str]()

    def load(i: int, band: Window) -> Crop | str | None:
        events.check_stop()
        sub = subs[i]
        near = band.grow(1).intersect(sub.window)  # as far as `coadd` looks
        box = source_box(sub.pixel_map, near, sub.frame.shape, bayer=bool(sub.frame.bayer))
        if not box.area:
            return None
        try:
            pixels = prepare(sub.frame, calibration, sub.repairs)[0]
        except FrameError as problem:
            return str(problem)
        whole = box == Window.of_shape(sub.frame.shape)
        return Crop(pixels if whole else pixels[box.slices].copy(), box)

    parts: list[Coadd] = []
    for band in _bands(window, [subs[i] for i in members], room):
        near = [i for i in members if i not in lost and band.grow(1).intersect(subs[i].window).area]
        found = dict(zip(near, thread_map(lambda i, band=band: load(i, band), near, workers), strict=True))  # type: ignore[misc]
        lost |= {i: crop for i, crop in found.items() if isinstance(crop, str)}
        crops = {i: crop for i, crop in found.items() if isinstance(crop, Crop)}
        part = coadd(
            [subs[i] for i in crops],
            list(crops.values()),
            sky,
            clip,
            use_median=settings.stacking_final_combine_method == "median",
            even=even,
            workers=workers,
            window=band,
            check_stop=events.check_stop,
        )
        for i, u, r in zip(crops, part.used.tolist(), part.rejected.tolist(), strict=True):
            used[i] += u
            rejected[i] += r
        del found, crops  # before the next band is read
        parts.append(part)
    return Stack(_joined(window, [part.tile for part in parts]), used, rejected, lost)


def _bands(window: Window, subs: Sequence[Sub], room: int) -> list[Window]:
    """The window cut across its longer side, so that the pixels a band looks at take about `room` bytes at most."""
    tall = window.shape[0] >= window.shape[1]
    start, stop = (window.y0, window.y1) if tall else (window.x0, window.x1)
    first, last = np.array([(w.y0, w.y1) if tall else (w.x0, w.x1) for w in (sub.window for sub in subs)]).T
    size = np.array([math.prod(s.frame.shape) * 4 * (3 if s.frame.colour == "rgb" else 1) for s in subs], float)
    count, most = 1, max(1, (stop - start) // _LEAST_BAND)
    while True:
        edges = np.linspace(start, stop, count + 1).round().astype(int)
        overlap = np.minimum(last, edges[1:, None]) - np.maximum(first, edges[:-1, None])
        # The box around the part that a band has of a turned frame is larger than its share.
        share = np.where(overlap > 0, np.minimum(1, 1.3 * overlap / (last - first) + 0.02), 0)
        if (share @ size).max() <= room or count >= most:
            break
        count = min(most, max(count + 1, math.ceil(1.1 * count)))
    pairs = itertools.pairwise(edges.tolist())
    if tall:
        return [Window(low, high, window.x0, window.x1) for low, high in pairs]
    return [Window(window.y0, window.y1, low, high) for low, high in pairs]


def _joined(window: Window, tiles: Sequence[Tile]) -> Tile:
    """One tile from its bands."""
    if len(tiles) == 1:
        return tiles[0]
    image = np.empty((*window.shape, *tiles[0].image.shape[2:]), np.float32)
    coverage, depth = np.empty(window.shape, np.float32), np.empty(window.shape, np.float32)
    for tile in tiles:
        at = tile.window.within(window)
        image[at], coverage[at], depth[at] = tile.image, tile.coverage, tile.depth
    return Tile(window, image, coverage, depth)
