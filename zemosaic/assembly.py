"""Master tiles into one mosaic: resample a tile, add it with its coverage as weight, go on to the next.

Only one tile and the canvas are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import cv2
import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray

from zemosaic.canvas import Canvas
from zemosaic.coadd import Sub
from zemosaic.execute import thread_map
from zemosaic.mastertile import TilePixels
from zemosaic.tiles import FloatImage, Mosaic, Window, alpha_of
from zemosaic.warp import Crop, warp_block

Method = Literal["reproject_coadd", "incremental"]
Layer = tuple[FloatImage, FloatImage]

_BLOCK = 512  # side of the blocks a tile is resampled in
_SPLINE_REACH = 12  # px over which a cubic spline forgets its border


def assemble(
    tiles: Iterable[tuple[Sub, TilePixels]],
    canvas: Canvas,
    sky: NDArray[np.float64],
    method: Method,
    *,
    workers: int = 1,
    check_stop: Callable[[], None] = lambda: None,
) -> Mosaic:
    """Weighted mean of master tiles on the canvas.

    Parameters
    ----------
    tiles : iterable of (Sub, TilePixels)
        Each tile with its place and photometric adjustment; read one at a time.
    canvas : Canvas
        Global pixel grid.
    sky : ndarray
        ``(C,)`` common sky of the adjusted tiles, ADU.
    method : {"reproject_coadd", "incremental"}
        Resample through the reproject library (exact WCS at every pixel, bicubic) or with the project's own warp
        (sparse exact map, Lanczos-3).
    workers : int
        Threads.
    check_stop : callable
        Called before every block; raises to stop.

    Returns
    -------
    Mosaic
        Coverage counts frames, summed over the tiles.
    """
    channels = len(sky)
    # Differences to the sky are summed: small numbers, of which float32 loses nothing.
    total = np.zeros((channels, *canvas.shape), np.float32)
    coverage = np.zeros(canvas.shape, np.float32)
    resample = _reprojected if method == "reproject_coadd" else _warped
    for sub, pixels in tiles:

        def work(
            block: Window, sub: Sub = sub, pixels: TilePixels = pixels
        ) -> tuple[Window, FloatImage, FloatImage] | None:
            check_stop()
            layer = resample(sub, pixels, block, canvas.wcs)
            if layer is None:
                return None
            image, weight = layer
            sub.adjustment.apply(image, block, image)
            return block, image, np.where(np.isnan(image).any(axis=0), np.float32(0), weight)

        for layer in thread_map(work, sub.window.blocks(_BLOCK), workers):
            if layer is not None:
                window, image, weight = layer
                difference = image - sky.astype(np.float32)[:, None, None]
                np.copyto(difference, 0, where=weight == 0)
                ys, xs = window.slices
                total[:, ys, xs] += weight * difference
                coverage[ys, xs] += weight
    with np.errstate(invalid="ignore", divide="ignore"):
        total /= coverage
    total += sky.astype(np.float32)[:, None, None]
    image = np.ascontiguousarray(np.moveaxis(total, 0, -1)) if channels == 3 else total[0]
    return Mosaic(image, coverage, alpha_of(coverage), canvas.wcs.deepcopy())


def _warped(sub: Sub, pixels: TilePixels, block: Window, canvas_wcs: WCS) -> Layer | None:
    """A block of a tile by the sparse pixel map: image ``(C, h, w)`` and weight ``(h, w)``."""
    image = np.empty((len(sub.noise), *block.shape), np.float32)
    if not warp_block(Crop.whole(pixels.image), None, sub.pixel_map, sub.frame.shape, block, sub.edge, image):
        return None
    return image, _weight(pixels, sub.pixel_map.block(block))


def _reprojected(sub: Sub, pixels: TilePixels, block: Window, canvas_wcs: WCS) -> Layer | None:
    """The same through `reproject.reproject_interp`."""
    from reproject import reproject_interp  # takes long to load, and only this needs it

    (ys, xs), positions = block.slices, sub.pixel_map.block(block)
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
    filled = np.where(holes[..., None], np.nanmedian(image, axis=(0, 1)).astype(np.float32), image)
    there = np.where(holes, np.float32(0), np.float32(1))
    planes = np.concatenate([np.moveaxis(filled, 2, 0), there[None]])
    assert sub.frame.wcs is not None
    made = reproject_interp(
        (planes, sub.frame.wcs[near]),
        canvas_wcs[ys, xs],
        order="bicubic",
        shape_out=block.shape,
        roundtrip_coords=False,
        return_footprint=False,
    )
    # A spline of ones is one, except where it feels a hole: there the data are not complete.
    complete = np.abs(made[-1] - 1) < 1e-3
    return np.where(complete, made[:-1], np.nan).astype(np.float32), _weight(pixels, positions)


def _weight(pixels: TilePixels, positions: tuple[NDArray[np.float64], NDArray[np.float64]]) -> FloatImage:
    """Coverage of a tile at the given positions: linear, because a spline overshoots at its steps, even below 0."""
    x, y = (p.astype(np.float32) for p in positions)
    weight = cv2.remap(pixels.coverage, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(weight, np.float32)
