"""The inner loops that a run spends most of its time in, compiled with numba.

Each does in one pass over the pixels, without temporaries, what would take a dozen passes of array operations. They
release the interpreter lock and use no fast-math: a pixel's value depends on nothing but its own inputs. Compiled code
is cached on disk, so only the first run ever waits for the compiler.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numba
import numpy as np

from zemosaic.tiles import FloatImage

#: Pixels beyond a position that its interpolation looks at.
LANCZOS_REACH = 3
#: Share by which interpolation may exceed the range of the nearest 3x3 pixels: that of an honest peak between pixels.
OVERSHOOT = 0.3
#: The same below it, for an honest trough.
UNDERSHOOT = 0.03

_TAPS = 2 * LANCZOS_REACH
_PHASES = 512  # positions are rounded to this part of a pixel
_BEFORE, _BEHIND = LANCZOS_REACH - 1, LANCZOS_REACH + 1e-6  # of the source that a position must have around it
_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@cache
def lanczos_table() -> FloatImage:
    """Weights of the six nearest pixels at every phase, ``(513, 6)``; every row adds up to 1.

    Lanczos-3: ``sinc(d) sinc(d / 3)``, C. E. Duchon, J. Appl. Meteor. 18, 1016 (1979).
    """
    offset = np.arange(_PHASES + 1)[:, None] / _PHASES - np.arange(1 - LANCZOS_REACH, LANCZOS_REACH + 1)
    weight = np.sinc(offset) * np.sinc(offset / LANCZOS_REACH)
    return (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)


@_compiled
def grid_reach(grid_x, grid_y, step, top, left, height, width):  # type: ignore[no-untyped-def]
    """Least and greatest x, then y, of the pixels of a box on a grid (see `lanczos`); NaN if none is known."""
    low_x, high_x, low_y, high_y = np.inf, -np.inf, np.inf, -np.inf
    last_row, last_column = grid_x.shape[0] - 2, grid_x.shape[1] - 2
    v = top
    # Bilinear within the cells: the extremes are at the corners of what the box has of each.
    while True:
        i = min(v // step, last_row)
        down = v / step - i
        u = left
        while True:
            j = min(u // step, last_column)
            along = u / step - j
            x = (grid_x[i, j] * (1 - down) + grid_x[i + 1, j] * down) * (1 - along)
            x += (grid_x[i, j + 1] * (1 - down) + grid_x[i + 1, j + 1] * down) * along
            y = (grid_y[i, j] * (1 - down) + grid_y[i + 1, j] * down) * (1 - along)
            y += (grid_y[i, j + 1] * (1 - down) + grid_y[i + 1, j + 1] * down) * along
            if math.isfinite(x) and math.isfinite(y):
                low_x, high_x, low_y, high_y = min(low_x, x), max(high_x, x), min(low_y, y), max(high_y, y)
            if u == left + width - 1:
                break
            u = min((u // step + 1) * step, left + width - 1)
        if v == top + height - 1:
            break
        v = min((v // step + 1) * step, top + height - 1)
    if low_x > high_x:
        return np.nan, np.nan, np.nan, np.nan
    return low_x, high_x, low_y, high_y


@cache
def lanczos(channels: int) -> Any:
    """The interpolation for images of 1 or 3 channels, as a compiled function::

        count = warp(source, y0, x0, shape, grid_x, grid_y, step, top, left, table, edge, gain, plane, out)

    Parameters of the function it returns
    -------------------------------------
    source : ndarray
        ``(H, W * channels)`` float32, channels interleaved, NaN = no data. It must reach `LANCZOS_REACH` pixels beyond
        every position on the frame that `out` looks at.
    y0, x0 : int
        Frame pixel of ``source[0, 0]``.
    shape : tuple of int
        ``(ny, nx)`` of the frame; what looks further than half a pixel beyond it gets NaN.
    grid_x, grid_y : ndarray
        ``(rows, columns)`` float64 frame positions at the nodes of a grid, bilinear between them.
    step : int
        Node spacing, pixels of `out`.
    top, left : int
        Place of ``out[:, 0, 0]`` on the grid, pixels from node ``[0, 0]``.
    table : ndarray
        From `lanczos_table`.
    edge : float
        How far interpolation may depart from the nearest pixel before the ringing guard looks at it, ADU: then it is
        held within the range of the 3x3 nearest pixels, widened by `OVERSHOOT` and `UNDERSHOOT` of that range or by
        `edge`, whichever is more.
    gain : ndarray
        ``(channels,)`` float64.
    plane : ndarray
        ``(channels, 3)`` float64, taken off after the gain: at node ``[0, 0]``, per column and per row, ADU.
    out : ndarray
        ``(channels, h, w)`` float32; every pixel is written, NaN where there is no data. Missing pixels of the source
        take no part; within a pixel of one there is no data either.

    Returns
    -------
    int
        Pixels that lie on the frame.
    """
    taps = _TAPS * channels

    @_compiled
    def warp(source, y0, x0, shape, grid_x, grid_y, step, top, left, table, edge, gain, plane, out):  # type: ignore[no-untyped-def]
        flat, weights = source.reshape(-1), table.reshape(-1)
        width = numba.uint64(source.shape[1])
        height, length = out.shape[1:]
        # The second of each pair never matters where the source is as large as promised.
        low_x, high_x = max(-0.5, x0 + _BEFORE), min(shape[1] - 0.5, x0 + source.shape[1] // channels - _BEHIND)
        low_y, high_y = max(-0.5, y0 + _BEFORE), min(shape[0] - 0.5, y0 + source.shape[0] - _BEHIND)
        last_row, last_column = grid_x.shape[0] - 2, grid_x.shape[1] - 2
        row_x, row_y = np.empty(grid_x.shape[1]), np.empty(grid_x.shape[1])
        lines = np.empty(taps, np.float32)
        value = np.empty(channels, np.float32)
        missing = np.float32(np.nan)
        count = 0
        for v in range(height):
            i = min((top + v) // step, last_row)
            share = (top + v) / step - i
            for j in range(grid_x.shape[1]):
                row_x[j] = grid_x[i, j] * (1 - share) + grid_x[i + 1, j] * share
                row_y[j] = grid_y[i, j] * (1 - share) + grid_y[i + 1, j] * share
            node, cell_end = min(left // step, last_column) - 1, 0
            x_start = y_start = x_slope = y_slope = 0.0
            for u in range(length):
                if left + u >= cell_end:
                    node = min(node + 1, last_column)
                    cell_end = (node + 1) * step if node < last_column else left + length
                    x_slope, y_slope = (row_x[node + 1] - row_x[node]) / step, (row_y[node + 1] - row_y[node]) / step
                    x_start, y_start = row_x[node] - node * step * x_slope, row_y[node] - node * step * y_slope
                x, y = x_start + (left + u) * x_slope, y_start + (left + u) * y_slope
                if not (x >= low_x and x <= high_x and y >= low_y and y <= high_y):
                    for c in range(channels):
                        out[c, v, u] = missing
                    continue
                count += 1
                ix, iy = math.floor(x), math.floor(y)
                px = numba.uint64(int((x - ix) * _PHASES + 0.5) * _TAPS)
                py = numba.uint64(int((y - iy) * _PHASES + 0.5) * _TAPS)
                start = numba.uint64(iy - y0 - LANCZOS_REACH + 1) * width
                start += numba.uint64((ix - x0 - LANCZOS_REACH + 1) * channels)
                w0, w1, w2 = weights[py], weights[py + numba.uint64(1)], weights[py + numba.uint64(2)]
                w3, w4, w5 = (
                    weights[py + numba.uint64(3)],
                    weights[py + numba.uint64(4)],
                    weights[py + numba.uint64(5)],
                )
                # Six rows into one first: the compiler does that with vectors, whatever the number of channels.
                for k in range(taps):
                    a = start + numba.uint64(k)
                    b = a + width
                    c2 = b + width
                    d = c2 + width
                    e = d + width
                    lines[k] = (w0 * flat[a] + w1 * flat[b] + w2 * flat[c2]) + (
                        w3 * flat[d] + w4 * flat[e] + w5 * flat[e + width]
                    )
                jump = False
                nearest = numba.uint64(math.floor(y + 0.5) - y0) * width
                nearest += numba.uint64((math.floor(x + 0.5) - x0) * channels)
                for c in range(channels):
                    total = (
                        (weights[px] * lines[c] + weights[px + numba.uint64(1)] * lines[channels + c])
                        + (
                            weights[px + numba.uint64(2)] * lines[2 * channels + c]
                            + weights[px + numba.uint64(3)] * lines[3 * channels + c]
                        )
                        + (
                            weights[px + numba.uint64(4)] * lines[4 * channels + c]
                            + weights[px + numba.uint64(5)] * lines[5 * channels + c]
                        )
                    )
                    value[c] = total
                    # Also true where anything is missing.
                    jump |= not abs(total - flat[nearest + numba.uint64(c)]) <= edge
                if jump:
                    _guard(flat, width, channels, start, nearest, weights, px, py, edge, value)
                for c in range(channels):
                    level = plane[c, 0] + plane[c, 1] * (left + u) + plane[c, 2] * (top + v)
                    out[c, v, u] = value[c] * gain[c] - level
        return count

    return warp


@_compiled
def _guard(flat, width, channels, start, nearest, weights, px, py, edge, value):  # type: ignore[no-untyped-def]
    """Hold one interpolated pixel against its surroundings, in place; where pixels are missing do without them."""
    corner = nearest - width - numba.uint64(channels)
    for c in range(channels):
        low = high = flat[nearest + numba.uint64(c)]
        for j in range(3):
            for i in range(3):
                sample = flat[corner + numba.uint64(j) * width + numba.uint64(i * channels + c)]
                if math.isnan(sample):
                    value[:] = np.nan
                    return
                low, high = min(low, sample), max(high, sample)
        if math.isnan(value[c]):
            total = share = 0.0
            for j in range(_TAPS):
                for i in range(_TAPS):
                    sample = flat[start + numba.uint64(j) * width + numba.uint64(i * channels + c)]
                    if not math.isnan(sample):
                        weight = weights[py + numba.uint64(j)] * weights[px + numba.uint64(i)]
                        total += weight * sample
                        share += weight
            value[c] = total / share
        span = high - low
        value[c] = min(max(value[c], low - max(UNDERSHOOT * span, edge)), high + max(OVERSHOOT * span, edge))


@_compiled
def debayer_part(cfa: FloatImage, red_row: int, red_column: int) -> FloatImage:
    """Colour of a part of a Bayer mosaic, two pixels smaller on every side.

    Parameters
    ----------
    cfa : ndarray
        ``(h + 4, w + 4)`` float32; NaN = no data spreads to the 5x5 pixels around it.
    red_row, red_column : int
        Parity of the rows and of the columns that hold the red pixels.

    Returns
    -------
    ndarray
        ``(h, w, 3)`` float32, red, green, blue.

    Notes
    -----
    Gradient-corrected linear interpolation (H. S. Malvar, L. He, R. Cutler, ICASSP 2004).
    """
    height, width = cfa.shape[0] - 4, cfa.shape[1] - 4
    out = np.empty((height, width, 3), np.float32)
    cross, along_row, along_column, across = (
        np.empty(width, np.float32),
        np.empty(width, np.float32),
        np.empty(width, np.float32),
        np.empty(width, np.float32),
    )
    for y in range(height):
        r0, r1, r2, r3, r4 = cfa[y], cfa[y + 1], cfa[y + 2], cfa[y + 3], cfa[y + 4]
        for x in range(width):
            # All four at every pixel, though each is needed at every other one at most: that runs in vectors.
            middle, above, beside = r2[x + 2], r1[x + 2] + r3[x + 2], r2[x + 1] + r2[x + 3]
            far_above, far_beside = r0[x + 2] + r4[x + 2], r2[x] + r2[x + 4]
            corners = r1[x + 1] + r1[x + 3] + r3[x + 1] + r3[x + 3]
            cross[x] = (np.float32(4) * middle + np.float32(2) * (above + beside) - (far_above + far_beside)) * _EIGHTH
            along_row[x] = (
                np.float32(5) * middle + np.float32(4) * beside - far_beside - corners + _HALF * far_above
            ) * _EIGHTH
            along_column[x] = (
                np.float32(5) * middle + np.float32(4) * above - far_above - corners + _HALF * far_beside
            ) * _EIGHTH
            across[x] = (
                np.float32(6) * middle + np.float32(2) * corners - np.float32(1.5) * (far_above + far_beside)
            ) * _EIGHTH
        red, blue = (0, 2) if y % 2 == red_row else (2, 0)
        # In a row of red and green pixels "red" is red, in one of blue and green it is blue.
        first = red_column if y % 2 == red_row else 1 - red_column
        for x in range(first, width, 2):
            out[y, x, red], out[y, x, 1], out[y, x, blue] = r2[x + 2], cross[x], across[x]
        for x in range(1 - first, width, 2):
            out[y, x, red], out[y, x, 1], out[y, x, blue] = along_row[x], r2[x + 2], along_column[x]
    return out


_EIGHTH, _HALF = np.float32(0.125), np.float32(0.5)
