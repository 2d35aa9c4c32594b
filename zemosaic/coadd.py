"""Many frames into one tile, block by block: warp, adjust, reject, average while the pixels are in cache.

Every route stacks frames through `coadd`; only which frames, onto which grid, differs. The result is the same to the
last bit however many workers share the blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zemosaic.calibrate import Repairs
from zemosaic.combine import Clip, combine
from zemosaic.execute import thread_map
from zemosaic.frames import Frame
from zemosaic.levels import Adjustment
from zemosaic.rejection import EVEN_NOISE, complete, tally
from zemosaic.tiles import FloatImage, Tile, Window
from zemosaic.warp import Crop, PixelMap, warp_block

_BLOCK_SAMPLES = 1_000_000  # samples of a block's stack: with its temporaries it stays in the outer cache
_DEPTH_CELL = 128  # px: resolution at which overlaps are counted
_GUARD_SIGMAS = 5.0  # departure from the nearest pixel, in units of the noise, from which ringing is guarded against


@dataclass(frozen=True)
class Sub:
    """Everything a coadd needs to know of one frame; picklable, without pixels.

    Parameters
    ----------
    frame : Frame
        Where the pixels are.
    repairs : Repairs
        Hot pixels to mend after reading.
    pixel_map : PixelMap
        Where the frame lies on the canvas.
    adjustment : Adjustment
        Gain and sky plane.
    noise : ndarray
        ``(C,)`` noise of a photosite after gain, ADU.
    weight : ndarray
        ``(C,)`` weight in the mean.
    """

    frame: Frame
    repairs: Repairs
    pixel_map: PixelMap
    adjustment: Adjustment
    noise: NDArray[np.float64]
    weight: NDArray[np.float64]

    @property
    def window(self) -> Window:
        """Canvas pixels the frame may touch."""
        return self.pixel_map.window

    @property
    def edge(self) -> float:
        """Departure from the nearest pixel, ADU of the frame, from which interpolation is guarded against ringing."""
        return _GUARD_SIGMAS * float(np.max(self.noise / self.adjustment.gain))


@dataclass(frozen=True)
class Coadd:
    """A tile and what became of its frames.

    Parameters
    ----------
    tile : Tile
        Image and coverage over the common window of the frames.
    used, rejected : ndarray
        ``(n,)`` pixels of each frame that contributed, and that were rejected as outliers.
    """

    tile: Tile
    used: NDArray[np.int64]
    rejected: NDArray[np.int64]


def coadd(
    subs: Sequence[Sub],
    crops: Sequence[Crop],
    sky: NDArray[np.float64],
    clip: Clip,
    *,
    use_median: bool = False,
    even: bool | None = None,
    workers: int = 1,
    window: Window | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> Coadd:
    """Stack frames onto their common window of the canvas.

    Parameters
    ----------
    subs : sequence of Sub
        The frames.
    crops : sequence of Crop
        Their prepared pixels, in the same order; at least what `window` looks at, one pixel around it included.
    sky : ndarray
        ``(C,)`` common sky level after adjustment.
    clip : Clip
        Rejection.
    use_median : bool
        Median instead of weighted mean.
    even : bool, optional
        Whether the noise of the frames is similar (`similar_noise`); give it where a stack is made in parts.
    workers : int
        Threads.
    window : Window, optional
        Canvas pixels to make; the hull of the frames' windows if not given.
    check_stop : callable
        Called before every block; raises to stop.

    Returns
    -------
    Coadd
    """
    if window is None:
        window = hull([sub.window for sub in subs])
    channels = len(sky)
    image = np.empty((*window.shape, channels), np.float32)  # the blocks fill it
    coverage, share = np.empty(window.shape, np.float32), np.empty(window.shape, np.float32)
    used, rejected = np.zeros(len(subs), np.int64), np.zeros(len(subs), np.int64)
    sky32 = sky.astype(np.float32)
    even = similar_noise(subs) if even is None else even
    noise, weights = (np.array([getattr(s, name) for s in subs], np.float32) for name in ("noise", "weight"))

    def work(block: Window) -> tuple[list[int], NDArray[np.int64], NDArray[np.int64]] | None:
        check_stop()
        # One pixel more on every side: rejection looks at the brightest neighbour.
        halo = block.grow(1)
        stack, who = warp_stack(subs, crops, halo)
        at = block.within(window)
        if not who:
            image[at], coverage[at], share[at] = np.nan, 0, 0
            return None
        valid = complete(stack)
        sigma, weight = noise[who].T, weights[who].T
        result, keep = combine(stack, sigma, weight, sky32, clip, use_median=use_median, even=even, valid=valid)
        ys, xs = block.within(halo)
        image[at] = result[ys, xs]
        coverage[at], share[at], taken, out = tally(valid[:, ys, xs], keep[:, ys, xs], weight.mean(axis=0))
        return who, taken, out

    blocks = window.blocks(block_side(deepest([sub.window for sub in subs]) if subs else 0, channels))
    for done in thread_map(work, blocks, workers):
        if done is None:
            continue
        who, taken, out = done
        used[who] += taken
        rejected[who] += out
    tile = Tile(window, image if channels == 3 else image[..., 0], coverage, share)
    return Coadd(tile, used, rejected)


def hull(windows: Sequence[Window]) -> Window:
    """The smallest window that holds all of them."""
    return functools.reduce(Window.hull, windows)


def similar_noise(subs: Sequence[Sub]) -> bool:
    """Whether the noise of the frames is similar enough for a plain median."""
    noise = np.array([sub.noise for sub in subs])
    return bool((noise.max(axis=0) <= EVEN_NOISE * noise.min(axis=0)).all()) if len(noise) else True


def warp_stack(subs: Sequence[Sub], crops: Sequence[Crop], block: Window) -> tuple[FloatImage, list[int]]:
    """Adjusted pixels of all frames that touch a block: ``(C, n, h, w)`` and which frames they are."""
    touching = [i for i, sub in enumerate(subs) if block.intersect(sub.window).area]
    channels = len(subs[0].noise) if subs else 0
    stack = np.empty((channels, len(touching), *block.shape), np.float32)
    who: list[int] = []
    for i in touching:
        sub, layer = subs[i], stack[:, len(who)]
        box = block.intersect(sub.window)
        if box != block:
            layer[...] = np.nan
        ys, xs = box.within(block)
        if warp_block(
            crops[i],
            sub.frame.bayer,
            sub.pixel_map,
            sub.frame.shape,
            box,
            sub.edge,
            layer[:, ys, xs],
            sub.adjustment.gain,
            sub.adjustment.slopes,
        ):
            who.append(i)
    return np.ascontiguousarray(stack[:, : len(who)]), who


def deepest(windows: Sequence[Window]) -> int:
    """Largest number of windows that meet, to the nearest `_DEPTH_CELL` pixels."""
    y, x = (min(getattr(w, name) for w in windows) // _DEPTH_CELL for name in ("y0", "x0"))
    rows, columns = (max(getattr(w, name) for w in windows) // _DEPTH_CELL + 1 for name in ("y1", "x1"))
    depth = np.zeros((rows - y, columns - x), np.int64)
    for w in windows:
        depth[
            w.y0 // _DEPTH_CELL - y : w.y1 // _DEPTH_CELL - y + 1, w.x0 // _DEPTH_CELL - x : w.x1 // _DEPTH_CELL - x + 1
        ] += 1
    return int(depth.max())


def block_side(frames: int, channels: int) -> int:
    """Side of a block, a power of two from 32 to 256 px, that keeps the stack of `frames` near the cache."""
    side = 256
    while side > 32 and frames * channels * side**2 > _BLOCK_SAMPLES:
        side //= 2
    return side
