"""One frame onto the canvas: an exact but sparse pixel map, and one interpolation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from astropy.wcs import WCS, NoConvergence
from numpy.typing import NDArray

from zemosaic.calibrate import DEBAYER_MARGIN, red_site
from zemosaic.kernels import LANCZOS_REACH, debayer_part, grid_reach, lanczos, lanczos_table
from zemosaic.tiles import FloatImage, Window

#: Largest tolerated error of the interpolated pixel map, pixels.
MAP_TOLERANCE = 0.01

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PixelMap:
    """Canvas pixel → frame pixel, exact at the nodes of a coarse grid and bilinear between them.

    Parameters
    ----------
    window : Window
        Canvas pixels the map is good for.
    step : int
        Node spacing, pixels.
    x, y : ndarray
        ``(rows, columns)`` float64 frame positions (0-based) at canvas ``(window.y0 + i step, window.x0 + j step)``.
    error : float
        Largest error found between the nodes, pixels.
    """

    window: Window
    step: int
    x: Floats
    y: Floats
    error: float

    def block(self, block: Window) -> tuple[Floats, Floats]:
        """Frame positions ``x, y`` of every pixel of `block`, each ``(h, w)`` float64."""
        i, down = _cells(np.arange(block.y0, block.y1) - self.window.y0, self.step, self.x.shape[0])
        j, along = _cells(np.arange(block.x0, block.x1) - self.window.x0, self.step, self.x.shape[1])
        lines = (g[i] * (1 - down[:, None]) + g[i + 1] * down[:, None] for g in (self.x, self.y))
        x, y = (line[:, j] * (1 - along) + line[:, j + 1] * along for line in lines)
        return x, y

    def reach(self, block: Window) -> tuple[float, float, float, float]:
        """Least and greatest x, then y, that the pixels of `block` have in the frame; NaN if none is known."""
        at = block.y0 - self.window.y0, block.x0 - self.window.x0
        return grid_reach(self.x, self.y, self.step, *at, *block.shape)

    def at(self, x: NDArray, y: NDArray) -> tuple[Floats, Floats]:
        """Frame positions of canvas points ``(n,)`` inside the window."""
        u = np.clip((np.asarray(x) - self.window.x0) / self.step, 0, self.x.shape[1] - 1.000001)
        v = np.clip((np.asarray(y) - self.window.y0) / self.step, 0, self.x.shape[0] - 1.000001)
        j, i = u.astype(int), v.astype(int)
        du, dv = u - j, v - i
        fx, fy = (
            (g[i, j] * (1 - du) + g[i, j + 1] * du) * (1 - dv) + (g[i + 1, j] * (1 - du) + g[i + 1, j + 1] * du) * dv
            for g in (self.x, self.y)
        )
        return fx, fy


def _cells(positions: NDArray[np.int64], step: int, nodes: int) -> tuple[NDArray[np.int64], Floats]:
    """Node before each position, and how far the position is on the way to the next one."""
    cell = np.minimum(positions // step, nodes - 2)
    return cell, positions / step - cell


def pixel_map(
    frame_wcs: WCS, frame_shape: tuple[int, int], canvas_wcs: WCS, window: Window, *, step: int = 128
) -> PixelMap:
    """Sparse exact map from a canvas window to a frame; the grid is refined until its error is below `MAP_TOLERANCE`.

    Parameters
    ----------
    frame_wcs, canvas_wcs : WCS
        Celestial; the frame's may carry any distortion that astropy can invert.
    frame_shape : tuple of int
        ``(ny, nx)``: errors count only where the map lands on the frame.
    window : Window
        Canvas pixels to map.
    step : int
        First node spacing to try; halved down to 4.
    """
    while True:
        ny, nx = (max(2, -(-(size - 1) // step) + 1) for size in window.shape)
        gy, gx = np.mgrid[0:ny, 0:nx] * float(step)
        x, y = _exact(frame_wcs, frame_shape, canvas_wcs, gx + window.x0, gy + window.y0)
        # Between the nodes the error of bilinear interpolation is largest in the middle of the cells.
        cx, cy = gx[:-1, :-1] + step / 2, gy[:-1, :-1] + step / 2
        ex, ey = _exact(frame_wcs, frame_shape, canvas_wcs, cx + window.x0, cy + window.y0)
        mx, my = ((g[:-1, :-1] + g[:-1, 1:] + g[1:, :-1] + g[1:, 1:]) / 4 for g in (x, y))
        h, w = frame_shape
        inside = (ex > -step) & (ex < w + step) & (ey > -step) & (ey < h + step)
        difference = np.hypot(mx - ex, my - ey)[inside]
        error = float(difference.max()) if difference.size else 0.0
        if error < MAP_TOLERANCE or step <= 4:
            return PixelMap(window, step, x, y, error)
        step //= 2


def _exact(
    frame_wcs: WCS, frame_shape: tuple[int, int], canvas_wcs: WCS, x: NDArray, y: NDArray
) -> tuple[Floats, Floats]:
    """Frame positions of canvas positions through both WCS."""
    ra, dec = canvas_wcs.wcs_pix2world(x.ravel(), y.ravel(), 0)
    fx, fy = frame_wcs.wcs_world2pix(ra, dec, 0)
    if frame_wcs.sip is not None or frame_wcs.cpdis1 is not None or frame_wcs.det2im1 is not None:
        # A distortion polynomial means nothing far outside the frame, and its inversion may not converge there.
        h, w = frame_shape
        near = (fx > -0.25 * w) & (fx < 1.25 * w) & (fy > -0.25 * h) & (fy < 1.25 * h)
        if near.any():
            try:
                fx[near], fy[near] = frame_wcs.all_world2pix(ra[near], dec[near], 0, tolerance=1e-5, maxiter=30)
            except NoConvergence as partial:
                fx[near], fy[near] = partial.best_solution.T
    return fx.reshape(x.shape), fy.reshape(x.shape)


@dataclass(frozen=True)
class Crop:
    """Part of a frame, or all of it.

    Parameters
    ----------
    pixels : ndarray
        ``(h, w)`` CFA or mono, or ``(h, w, 3)``; float32 ADU, NaN = no data.
    box : Window
        Where they lie in the frame, frame pixels.
    """

    pixels: FloatImage
    box: Window

    @classmethod
    def whole(cls, pixels: FloatImage) -> Crop:
        """All pixels of a frame."""
        return cls(pixels, Window.of_shape(pixels.shape[:2]))


def source_box(pixel_map: PixelMap, block: Window, shape: tuple[int, int], *, bayer: bool) -> Window:
    """Frame pixels that a block of the canvas looks at, interpolation and debayering included; may be empty."""
    return _look(pixel_map, block, shape, bayer=bayer).intersect(Window.of_shape(shape))


def _look(pixel_map: PixelMap, block: Window, shape: tuple[int, int], *, bayer: bool) -> Window:
    """The same beyond the edges of the frame."""
    x0, x1, y0, y1 = pixel_map.reach(block)
    if not (x1 >= -0.5 and x0 <= shape[1] - 0.5 and y1 >= -0.5 and y0 <= shape[0] - 0.5):
        return Window(0, 0, 0, 0)
    top, bottom = _around(y0, y1, shape[0])
    left, right = _around(x0, x1, shape[1])
    if not bayer:
        return Window(top, bottom, left, right)
    # Even corners keep the phase of the CFA, even sides its cells whole.
    top, left = (p // 2 * 2 - DEBAYER_MARGIN for p in (top, left))
    bottom, right = (-(-p // 2) * 2 + DEBAYER_MARGIN for p in (bottom, right))
    return Window(top, bottom, left, right)


def warp_block(
    crop: Crop,
    bayer: str | None,
    pixel_map: PixelMap,
    shape: tuple[int, int],
    block: Window,
    edge: float,
    out: FloatImage,
    gain: Floats | None = None,
    plane: Floats | None = None,
) -> int:
    """A frame on a block of the canvas: debayer just the part that is needed, then interpolate once.

    Parameters
    ----------
    crop : Crop
        Its pixels, at least those in `source_box` of the block.
    bayer : str or None
        CFA pattern of the frame.
    pixel_map : PixelMap
        Where the frame lies on the canvas.
    shape : tuple of int
        ``(ny, nx)`` of the frame.
    block : Window
        Canvas pixels to make, within the window of the map.
    edge : float
        How far the interpolation may depart from the nearest pixel before the ringing guard looks at it, ADU.
    out : ndarray
        ``(C, h, w)`` float32, gets the block; NaN outside the frame and within a pixel of missing data.
    gain : ndarray, optional
        ``(C,)`` what the values are multiplied by; 1 if not given.
    plane : ndarray, optional
        ``(C, 3)`` what is taken off then: at the first pixel of the map's window, per column and per row, ADU.

    Returns
    -------
    int
        Pixels of the block that lie on the frame.

    Notes
    -----
    Lanczos-3. Around bright, sharp edges (saturated cores) its negative lobes would ring: see `kernels.lanczos`.
    """
    channels, (ny, nx) = len(out), shape
    box = _look(pixel_map, block, shape, bayer=bool(bayer))
    there = box.intersect(crop.box)
    if not there.area:
        out[...] = np.nan
        return 0
    source = np.ascontiguousarray(crop.pixels[there.within(crop.box)])
    border = max(0, -box.y0), max(0, box.y1 - ny), max(0, -box.x0), max(0, box.x1 - nx)
    top, left = there.y0 - border[0], there.x0 - border[2]
    if any(border):
        # Mirrored without repeating the edge, which keeps the phase of the CFA as well.
        source = np.asarray(cv2.copyMakeBorder(source, *border, cv2.BORDER_REFLECT_101), np.float32)
    if bayer:
        source = debayer_part(source, *red_site(bayer))
        top, left = top + DEBAYER_MARGIN, left + DEBAYER_MARGIN
    count = lanczos(channels)(
        source.reshape(len(source), -1),
        top,
        left,
        (ny, nx),
        pixel_map.x,
        pixel_map.y,
        pixel_map.step,
        block.y0 - pixel_map.window.y0,
        block.x0 - pixel_map.window.x0,
        lanczos_table(),
        np.float32(edge),
        np.ones(channels) if gain is None else gain,
        np.zeros((channels, 3)) if plane is None else plane,
        out,
    )
    return int(count)


def _around(low: float, high: float, size: int) -> tuple[int, int]:
    """First frame pixel that interpolation needs between two positions, and the one after the last."""
    # A hair more: the kernel rounds in another order.
    first = math.floor(max(low, -0.5) - 1e-6) - LANCZOS_REACH + 1
    stop = math.floor(min(high, size - 0.5) + 1e-6) + LANCZOS_REACH + 1
    # At an edge of the frame at least as much as is mirrored there.
    return min(first, size - 2 * LANCZOS_REACH), max(stop, 2 * LANCZOS_REACH)
