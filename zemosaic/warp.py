"""One frame onto the canvas: an exact but sparse pixel map, and one interpolation."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from astropy.wcs import WCS, NoConvergence
from numpy.typing import NDArray

from zemosaic.calibrate import DEBAYER_MARGIN, debayer
from zemosaic.tiles import FloatImage, Window

#: Largest tolerated error of the interpolated pixel map, pixels.
MAP_TOLERANCE = 0.01

_KERNEL_REACH = 4  # Lanczos-4 looks at 8x8 pixels
_LANES = 32  # pixels, a multiple of what any vector unit takes at a time
_UNDERSHOOT = 0.03  # the same for an honest trough
_RINGING_SLACK = 0.3  # share of the local range by which an honest peak may exceed it


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
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    error: float

    def block(self, block: Window) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Frame positions ``x, y`` of every pixel of `block`, each ``(h, w)`` float64."""
        rows = _hat_weights(np.arange(block.y0, block.y1) - self.window.y0, self.step, self.x.shape[0])
        cols = _hat_weights(np.arange(block.x0, block.x1) - self.window.x0, self.step, self.x.shape[1])
        (i0, i1, wr), (j0, j1, wc) = rows, cols
        x, y = (wr @ grid[i0:i1, j0:j1] @ wc.T for grid in (self.x, self.y))
        return x, y

    def at(self, x: NDArray, y: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
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


def _hat_weights(positions: NDArray[np.int64], step: int, nodes: int) -> tuple[int, int, NDArray[np.float64]]:
    """Linear interpolation weights of integer positions: first and last node used, and ``(n, nodes used)``."""
    cell = np.minimum(positions // step, nodes - 2)
    first, last = int(cell[0]), int(cell[-1]) + 2
    weight = np.zeros((len(positions), last - first))
    row = np.arange(len(positions))
    share = positions / step - cell
    weight[row, cell - first] = 1 - share
    weight[row, cell - first + 1] = share
    return first, last, weight


def pixel_map(
    frame_wcs: WCS, frame_shape: tuple[int, int], canvas_wcs: WCS, window: Window, *, step: int = 32
) -> PixelMap:
    """Sparse exact map from a canvas window to a frame; the grid is refined until its error is below 0.01 px.

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
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
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


def warp_block(
    pixels: FloatImage,
    bayer: str | None,
    positions: tuple[NDArray[np.float64], NDArray[np.float64]],
    edge: float,
) -> tuple[FloatImage, tuple[slice, slice]] | None:
    """Colour of a frame at the given positions: debayer just the part that is needed, then interpolate once.

    Parameters
    ----------
    pixels : ndarray
        ``(ny, nx)`` CFA or mono, or ``(ny, nx, 3)``; float32 ADU, NaN = no data.
    bayer : str or None
        CFA pattern of `pixels`.
    positions : tuple of ndarray
        ``x, y``, each ``(h, w)``: where to look, 0-based.
    edge : float
        Range of a 3x3 neighbourhood, ADU, from which the ringing guard acts.

    Returns
    -------
    part : ndarray
        ``(h', w', C)`` float32, NaN outside the frame and within a pixel of missing data (which, beyond
        that, counts as the mean of its surroundings).
    box : tuple of slice
        The rows and columns of the positions that `part` stands for: at the edges of a frame much of a block
        lies outside, and only the box that holds the rest is interpolated. None in place of both if no
        position lies on the frame.

    Notes
    -----
    Lanczos-4. Around bright, sharp edges (saturated cores) its negative lobes would ring: there the
    result is held within the range of the 3x3 nearest pixels, widened upwards by 30 %, the most that an honest star
    peak between pixels needs, and downwards by 3 %, in either case by a few times the noise at least.
    """
    ny, nx = pixels.shape[:2]
    x, y = positions
    inside = (x >= -0.5) & (x <= nx - 0.5) & (y >= -0.5) & (y <= ny - 0.5)
    rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return None
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    x, y, inside = x[box], y[box], inside[box]
    margin = 2 * _KERNEL_REACH + DEBAYER_MARGIN + 1  # the kernel's reach, and that of what fills a hole in it
    # Even corners keep the phase of the CFA. Filters round the columns at the end of a row that do not fill a
    # vector register differently: with rows that start and end on whole registers, no result depends on the cut.
    y0 = max(0, int(y[inside].min()) - margin) // 2 * 2
    x0 = max(0, int(x[inside].min()) - margin) // _LANES * _LANES
    y1 = min(ny, int(y[inside].max()) + margin + 2)
    x1 = min(nx, int(x[inside].max()) + margin + 2 + _LANES)
    source = pixels[y0:y1, x0:x1]
    source = debayer(source, bayer) if bayer else np.ascontiguousarray(source)
    # OpenCV rounds positions to 1/32 px; done here, the result cannot depend on where the part was cut out.
    mx, my = ((np.rint(p * 32) / 32 - origin).astype(np.float32) for p, origin in ((x, x0), (y, y0)))
    part = _interpolate(source, mx, my, edge)
    part[~inside] = np.nan
    return part, box


def _interpolate(source: FloatImage, mx: FloatImage, my: FloatImage, edge: float) -> FloatImage:
    """Guarded Lanczos-4 of ``(h, w)`` or ``(h, w, 3)`` at the given float32 positions → ``(h', w', C)``."""
    damaged = bool(np.isnan(source.min()))
    if damaged:
        holes = np.isnan(source)
        source = _filled(source, holes)
    out = cv2.remap(source, mx, my, cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REFLECT_101)
    low, high = cv2.erode(source, _BOX), cv2.dilate(source, _BOX)
    # Only strong edges ring visibly; elsewhere the guard would shape the noise.
    span = cv2.subtract(high, low)
    strong = (span if span.ndim == 2 else np.maximum(np.maximum(span[..., 0], span[..., 1]), span[..., 2])) > edge
    if strong.any():
        # The kernel reaches an edge from three pixels away.
        reached = cv2.dilate(strong.astype(np.uint8), np.ones((7, 7), np.uint8))
        near = cv2.remap(reached, mx, my, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
        at = np.nonzero(near)
        y = np.clip(np.rint(my[at]).astype(int), 0, source.shape[0] - 1)
        x = np.clip(np.rint(mx[at]).astype(int), 0, source.shape[1] - 1)
        low, high = low[y, x], high[y, x]
        span, noise = high - low, np.float32(edge / 4)
        out[at] = np.clip(
            out[at], low - np.maximum(_UNDERSHOOT * span, noise), high + np.maximum(_RINGING_SLACK * span, noise)
        )
    out = out if out.ndim == 3 else out[..., None]
    if damaged:
        spread = cv2.dilate(holes.astype(np.uint8), np.ones((3, 3), np.uint8))
        spread = cv2.remap(spread, mx, my, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
        out[(spread > 0) if spread.ndim == 3 else (spread > 0)[..., None]] = np.nan
    return out.astype(np.float32, copy=False)


def _filled(source: FloatImage, holes: NDArray[np.bool_]) -> FloatImage:
    """Missing pixels replaced by the mean of the valid ones within the kernel's reach."""
    side = (2 * _KERNEL_REACH + 1, 2 * _KERNEL_REACH + 1)
    total = cv2.boxFilter(np.where(holes, np.float32(0), source), -1, side, normalize=False)
    share = cv2.boxFilter(np.where(holes, np.float32(0), np.float32(1)), -1, side, normalize=False)
    return np.where(holes, total / np.maximum(share, 1), source).astype(np.float32)


_BOX = np.ones((3, 3), np.uint8)
