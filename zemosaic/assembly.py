"""Master tiles into one mosaic: resample a tile, add it with its coverage as weight, go on to the next.

Only one tile and the canvas are in memory at a time. What lies under `_DEEP` frames of a tile could not be judged when
the tile was stacked, and may hold a satellite's trail: it is added last, and where deeper tiles are there already
only if it agrees with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
from zemosaic.robust import median
from zemosaic.store import ArrayStore
from zemosaic.tiles import FloatImage, Mosaic, Window, alpha_of, has_data
from zemosaic.warp import Crop, warp_block

Method = Literal["reproject_coadd", "incremental"]
Positions = tuple[NDArray[np.float64], NDArray[np.float64]]
Resample = Callable[[Sub, TilePixels, Window, Positions, WCS], FloatImage | None]

_BLOCK = 1024  # side of the blocks a tile is resampled in
_RIM_BLOCK = 256  # side of the pieces that its shallow parts are kept in
_SPLINE_REACH = 12  # px over which a cubic spline forgets its border
_SPARSE = 16  # of so many pixels one is enough for a median
_DEEP = 3  # frames from which a stack knows its outliers
_AGREE = Clip("kappa_sigma", 4.0, 4.0)  # when a shallow sample agrees with the deeper tiles


def assemble(
    tiles: Sequence[Sub],
    read: Callable[[Frame], TilePixels],
    canvas: Canvas,
    sky: NDArray[np.float64],
    method: Method,
    store: ArrayStore,
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
        Gives the pixels of a tile; called once for each, one after the other.
    canvas : Canvas
        Global pixel grid.
    sky : ndarray
        ``(C,)`` common sky of the adjusted tiles, ADU.
    method : {"reproject_coadd", "incremental"}
        Resample through the reproject library (exact WCS at every pixel, bicubic) or with the project's own warp
        (sparse exact map, Lanczos-3).
    store : ArrayStore
        Where the shallow parts of all tiles wait for the deep ones, in a scratch file.
    workers : int
        Threads.
    progress : callable
        Called with the tiles that are done and all that there are to do.
    check_stop : callable
        Called after every block; raises to stop.

    Returns
    -------
    Mosaic
        Coverage counts frames, summed over what was added of the tiles.
    """
    sky32 = sky.astype(np.float32)
    made = _Sum(np.zeros((len(sky), *canvas.shape), np.float32), np.zeros(canvas.shape, np.float32))
    resample: Resample = _reprojected if method == "reproject_coadd" else _warped
    rims: list[tuple[NDArray[np.float64], list[Window]]] = []

    with store.spool() as spool:
        for index, sub in enumerate(tiles):
            progress(index, len(tiles))
            pixels = read(sub.frame)
            work = partial(_sampled, sub=sub, pixels=pixels, sky=sky32, resample=resample, wcs=canvas.wcs)
            windows = []
            for found in thread_map(work, sub.window.blocks(_BLOCK), workers):
                check_stop()
                if found is not None:
                    block, samples = found
                    deep = samples[-1] >= _DEEP
                    made.add(block, np.where(deep, samples, np.float32(0)))
                    rest = np.where(deep, np.float32(0), samples)
                    for rim in _rims(rest[-1] > 0, block):
                        ys, xs = rim.within(block)
                        np.save(spool, rest[:, ys, xs])
                        windows.append(rim)
            rims.append((sub.noise * np.sqrt(_typical(pixels.coverage)), windows))
        spool.seek(0)
        settled = made.coverage > 0
        for noise, windows in rims:
            pieces = ((rim, np.load(spool)) for rim in windows)
            for rim, samples in thread_map(partial(made.agreeing, noise=noise, settled=settled), pieces, workers):
                check_stop()
                made.add(rim, samples)
    progress(len(tiles), len(tiles))
    return made.mosaic(sky32, canvas.wcs)


@dataclass(frozen=True)
class _Sum:
    """The mosaic being made: sum of weighted differences to the sky ``(C, H, W)``, and sum of weights ``(H, W)``.

    Of differences float32 loses nothing: they are small. Samples are ``(C + 1, h, w)``: differences, and their weight.
    """

    total: FloatImage
    coverage: FloatImage

    def add(self, block: Window, samples: FloatImage) -> None:
        ys, xs = block.slices
        self.total[:, ys, xs] += samples[-1] * samples[:-1]
        self.coverage[ys, xs] += samples[-1]

    def agreeing(
        self, piece: tuple[Window, FloatImage], noise: NDArray[np.float64], settled: NDArray[np.bool_]
    ) -> tuple[Window, FloatImage]:
        """Shallow samples, without those that contradict what deeper tiles have settled."""
        block, samples = piece
        ys, xs = block.slices
        doubtful = settled[ys, xs] & (samples[-1] > 0)
        if doubtful.any():
            found = np.full_like(samples[:-1], np.nan)
            np.divide(self.total[:, ys, xs], self.coverage[ys, xs], out=found, where=doubtful)
            agrees = _agrees(samples[:-1], samples[-1], found, self.coverage[ys, xs], noise)
            samples[-1][doubtful & ~agrees] = 0
        return block, samples

    def mosaic(self, sky: FloatImage, wcs: WCS) -> Mosaic:
        """Divide, in place; NaN where nothing was added."""
        with np.errstate(invalid="ignore", divide="ignore"):
            np.divide(self.total, self.coverage, out=self.total)
        np.add(self.total, sky[:, None, None], out=self.total)
        image = np.ascontiguousarray(np.moveaxis(self.total, 0, -1)) if len(sky) == 3 else self.total[0]
        return Mosaic(image, self.coverage, alpha_of(self.coverage), wcs.deepcopy())


def _sampled(
    block: Window, sub: Sub, pixels: TilePixels, sky: FloatImage, resample: Resample, wcs: WCS
) -> tuple[Window, FloatImage] | None:
    """What a tile holds of a block, as `_Sum` takes it, and where; None if that is nothing."""
    positions = sub.pixel_map.block(block)
    weight = _weight(pixels.coverage, positions)
    if not weight.any():
        return None
    there = _bounds(weight > 0)
    x, y = (p[there.slices] for p in positions)
    block = there.shift(block.y0, block.x0)
    image = resample(sub, pixels, block, (x, y), wcs)
    if image is None:
        return None
    sub.adjustment.apply(image, block, image)
    image -= sky[:, None, None]
    known = ~np.isnan(image).any(axis=0)
    return block, np.where(known, np.concatenate([image, weight[there.slices][None]]), np.float32(0))


def _rims(shallow: NDArray[np.bool_], block: Window) -> Iterator[Window]:
    """Boxes that hold all shallow samples of a block, and not much else, as most are narrow strips."""
    for part in Window.of_shape(block.shape).blocks(_RIM_BLOCK):
        if (inside := shallow[part.slices]).any():
            yield _bounds(inside).shift(block.y0 + part.y0, block.x0 + part.x0)


def _bounds(mask: NDArray[np.bool_]) -> Window:
    """The smallest window that holds all of a mask that is not empty."""
    (top, bottom), (left, right) = (np.flatnonzero(mask.any(axis=axis))[[0, -1]] for axis in (1, 0))
    return Window(int(top), int(bottom) + 1, int(left), int(right) + 1)


def _typical(coverage: FloatImage) -> float:
    """Median coverage of the pixels that have any, frames: the depth that a tile's noise was measured at."""
    covered = coverage[coverage > 0]
    return median(covered) if covered.size else 1.0


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
    holes = ~has_data(pixels.image[near])
    if holes.all():
        return None
    planes = np.moveaxis(np.atleast_3d(pixels.image[near]), 2, 0)
    if holes.any():
        typical = np.array([median(plane[~holes][::_SPARSE]) for plane in planes], np.float32)
        planes = np.concatenate([np.where(holes, typical[:, None, None], planes), ~holes[None]], dtype=np.float32)
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
