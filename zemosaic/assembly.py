"""Master tiles into one mosaic: resample a tile, add it with its coverage as weight, go on to the next.

Only one tile and the canvas are in memory at a time. What lies under `_DEEP` frames of a tile could not be judged when
the tile was stacked, and may hold a satellite's trail: it is added last, and where deeper tiles are there already
only if it agrees with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import cv2
import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray

from zemosaic.canvas import Canvas
from zemosaic.coadd import Sub
from zemosaic.combine import Clip, combine
from zemosaic.execute import thread_map
from zemosaic.frames import Frame
from zemosaic.mastertile import TilePixels
from zemosaic.tiles import FloatImage, Mosaic, Window, alpha_of
from zemosaic.warp import Crop, warp_block

Method = Literal["reproject_coadd", "incremental"]
Positions = tuple[NDArray[np.float64], NDArray[np.float64]]

_BLOCK = 1024  # side of the blocks a tile is resampled in
_RIM_BLOCK = 256  # the same for its shallow parts, most of which are narrow
_SPLINE_REACH = 12  # px over which a cubic spline forgets its border
_DEEP = 3  # frames from which a stack knows its outliers
_AGREE = Clip("kappa_sigma", 4.0, 4.0)  # when a shallow sample agrees with the deeper tiles


def assemble(
    tiles: Sequence[Sub],
    read: Callable[[Frame], TilePixels],
    canvas: Canvas,
    sky: NDArray[np.float64],
    method: Method,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    check_stop: Callable[[], None] = lambda: None,
) -> Mosaic:
    """Weighted mean of master tiles on the canvas.

    Parameters
    ----------
    tiles : sequence of Sub
        Each tile's place, photometric adjustment and noise.
    read : callable
        Gives the pixels of a tile; called up to twice for each, one after the other.
    canvas : Canvas
        Global pixel grid.
    sky : ndarray
        ``(C,)`` common sky of the adjusted tiles, ADU.
    method : {"reproject_coadd", "incremental"}
        Resample through the reproject library (exact WCS at every pixel, bicubic) or with the project's own warp
        (sparse exact map, Lanczos-3).
    workers : int
        Threads.
    progress : callable
        Called with the tiles that are done and all that there are to do.
    check_stop : callable
        Called before every block; raises to stop.

    Returns
    -------
    Mosaic
        Coverage counts frames, summed over what was added of the tiles.
    """
    channels = len(sky)
    sky32 = sky.astype(np.float32)
    # Differences to the sky are summed: small numbers, of which float32 loses nothing.
    total = np.zeros((channels, *canvas.shape), np.float32)
    coverage = np.zeros(canvas.shape, np.float32)
    resample = _reprojected if method == "reproject_coadd" else _warped

    def add(sub: Sub, pixels: TilePixels, settled: NDArray[np.bool_] | None) -> None:
        depth = _typical(pixels.coverage)
        part = np.where((pixels.coverage >= _DEEP) == (settled is None), pixels.coverage, np.float32(0))

        def work(block: Window) -> tuple[Window, FloatImage, FloatImage] | None:
            check_stop()
            x, y = sub.pixel_map.block(block)
            weight = _weight(part, (x, y))
            if not weight.any():
                return None
            # Of a rim only a strip is in the block: no need to resample the rest.
            there = _bounds(weight > 0)
            at, block = there.slices, there.shift(block.y0, block.x0)
            weight = weight[at]
            image = resample(sub, pixels, block, (x[at], y[at]), canvas.wcs)
            if image is None:
                return None
            sub.adjustment.apply(image, block, image)
            image -= sky32[:, None, None]
            weight[np.isnan(image).any(axis=0)] = 0
            ys, xs = block.slices
            if settled is not None and (doubtful := settled[ys, xs] & (weight > 0)).any():
                found = np.full_like(image, np.nan)
                np.divide(total[:, ys, xs], coverage[ys, xs], out=found, where=doubtful)
                noise = sub.noise * np.sqrt(depth)
                weight[doubtful & ~_agrees(image, weight, found, coverage[ys, xs], noise)] = 0
            np.copyto(image, 0, where=weight == 0)
            return block, image, weight

        for made in thread_map(work, sub.window.blocks(_BLOCK if settled is None else _RIM_BLOCK), workers):
            if made is not None:
                block, image, weight = made
                ys, xs = block.slices
                total[:, ys, xs] += weight * image
                coverage[ys, xs] += weight

    for rims in (False, True):
        settled = coverage > 0 if rims else None
        for index, sub in enumerate(tiles, start=rims * len(tiles)):
            progress(index, 2 * len(tiles))
            add(sub, read(sub.frame), settled)
    progress(2 * len(tiles), 2 * len(tiles))
    with np.errstate(invalid="ignore", divide="ignore"):
        total /= coverage
    total += sky32[:, None, None]
    image = np.ascontiguousarray(np.moveaxis(total, 0, -1)) if channels == 3 else total[0]
    return Mosaic(image, coverage, alpha_of(coverage), canvas.wcs.deepcopy())


def _bounds(mask: NDArray[np.bool_]) -> Window:
    """The smallest window that holds all of a mask that is not empty."""
    (top, bottom), (left, right) = (np.flatnonzero(mask.any(axis=axis))[[0, -1]] for axis in (1, 0))
    return Window(int(top), int(bottom) + 1, int(left), int(right) + 1)


def _typical(coverage: FloatImage) -> float:
    """Median coverage of the pixels that have any, frames: the depth that a tile's noise was measured at."""
    covered = coverage[coverage > 0]
    return float(np.median(covered)) if covered.size else 1.0


def _agrees(
    image: FloatImage, weight: FloatImage, found: FloatImage, depth: FloatImage, noise: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Where samples ``(C, h, w)`` of some weight agree with what was found at some depth, above sky both.

    `noise` is that of one frame, ``(C,)``.
    """
    stack = np.stack([found, image], axis=1)
    frames = np.maximum(np.stack([depth, weight]), np.float32(1e-3))
    sigma = noise.astype(np.float32)[:, None, None, None] / np.sqrt(frames)
    _, keep = combine(stack, sigma, np.ones_like(sigma), np.zeros(len(image), np.float32), _AGREE)
    return np.asarray(keep.all(axis=0))


def _warped(sub: Sub, pixels: TilePixels, block: Window, positions: Positions, canvas_wcs: WCS) -> FloatImage | None:
    """A block of a tile by the sparse pixel map, ``(C, h, w)``; None if the tile has nothing there."""
    image = np.empty((len(sub.noise), *block.shape), np.float32)
    there = warp_block(Crop.whole(pixels.image), None, sub.pixel_map, sub.frame.shape, block, sub.edge, image)
    return image if there else None


def _reprojected(
    sub: Sub, pixels: TilePixels, block: Window, positions: Positions, canvas_wcs: WCS
) -> FloatImage | None:
    """The same through `reproject.reproject_interp`."""
    from reproject import reproject_interp  # takes long to load, and only this needs it

    ys, xs = block.slices
    # Only the part of the tile that the block looks at: the spline filter runs over all it is given.
    near = tuple(
        slice(max(0, int(p.min()) - _SPLINE_REACH), max(0, min(size, int(p.max()) + _SPLINE_REACH + 1)))
        for p, size in zip(positions[::-1], pixels.coverage.shape, strict=True)
    )
    if any(part.stop <= part.start for part in near):
        return None
    image = np.atleast_3d(pixels.image[near])
    holes: NDArray[np.bool_] = np.isnan(image.sum(axis=2))
    if holes.all():
        return None
    planes = np.moveaxis(image, 2, 0)
    if holes.any():
        filled = np.where(holes, np.nanmedian(image, axis=(0, 1)).astype(np.float32)[:, None, None], planes)
        planes = np.concatenate([filled, np.where(holes, np.float32(0), np.float32(1))[None]])
    assert sub.frame.wcs is not None
    made = reproject_interp(
        (planes, sub.frame.wcs[near]),
        canvas_wcs[ys, xs],
        order="bicubic",
        shape_out=block.shape,
        roundtrip_coords=False,
        return_footprint=False,
    )
    if holes.any():
        # A spline of ones is one, except where it feels a hole: there the data are not complete.
        made = np.where(np.abs(made[-1] - 1) < 1e-3, made[:-1], np.nan)
    return np.asarray(made, np.float32)


def _weight(coverage: FloatImage, positions: Positions) -> FloatImage:
    """Coverage of a tile at the given positions: linear, because a spline overshoots at its steps, even below 0."""
    x, y = (p.astype(np.float32) for p in positions)
    return np.asarray(cv2.remap(coverage, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.float32)
