"""The inner loops that a run spends most of its time in.

Each does in one pass over the pixels, without temporaries, what would take a dozen passes of array operations.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numba
import numpy as np

from zemosaic.compiled import compiled
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


@cache
def lanczos_table() -> FloatImage:
    """Weights of the six nearest pixels at every phase, ``(513, 6)``; every row adds up to 1.

    Lanczos-3: ``sinc(d) sinc(d / 3)``, C. E. Duchon, J. Appl. Meteor. 18, 1016 (1979).
    """
    offset = np.arange(_PHASES + 1)[:, None] / _PHASES - np.arange(1 - LANCZOS_REACH, LANCZOS_REACH + 1)
    weight = np.sinc(offset) * np.sinc(offset / LANCZOS_REACH)
    return (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)


@compiled
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

    def warp(source, y0, x0, shape, grid_x, grid_y, step, top, left, table, edge, gain, plane, out):  # type: ignore[no-untyped-def]
        flat, weights = source.reshape(-1), table.reshape(-1)
        width = numba.uint64(source.shape[1])
        height, length = out.shape[1:]
        # The second of each pair never matters where the source is as large as promised.
        low_x, high_x = max(-0.5, x0 + _BEFORE), min(shape[1] - 0.5, x0 + source.shape[1] // channels - _BEHIND)
        low_y, high_y = max(-0.5, y0 + _BEFORE), min(shape[0] - 0.5, y0 + source.shape[0] - _BEHIND)
        limits = low_x, high_x, low_y, high_y
        starts, nears = np.empty(length, np.int32), np.empty(length, np.int32)
        phases_x, phases_y = np.empty(length, np.int32), np.empty(length, np.int32)
        lines = np.empty(taps, np.float32)
        value = np.empty(channels, np.float32)
        count = 0
        for v in range(height):
            at = y0, x0, source.shape[1], channels
            _look_up(grid_x, grid_y, step, top + v, left, limits, at, starts, nears, phases_x, phases_y)
            for u in range(length):
                if starts[u] < 0:
                    for c in range(channels):
                        out[c, v, u] = np.nan
                    continue
                count += 1
                start, nearest = numba.uint64(starts[u]), numba.uint64(nears[u])
                px, py = numba.uint64(phases_x[u]), numba.uint64(phases_y[u])
                w0, w1, w2, w3, w4, w5 = _six(weights, py)
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
                w0, w1, w2, w3, w4, w5 = _six(weights, px)
                jump = False
                for c in range(channels):
                    total = (
                        (w0 * lines[c] + w1 * lines[channels + c])
                        + (w2 * lines[2 * channels + c] + w3 * lines[3 * channels + c])
                        + (w4 * lines[4 * channels + c] + w5 * lines[5 * channels + c])
                    )
                    out[c, v, u] = total
                    # Also true where anything is missing.
                    jump |= not abs(total - flat[nearest + numba.uint64(c)]) <= edge
                if jump:
                    for c in range(channels):
                        value[c] = out[c, v, u]
                    _guard(flat, width, channels, start, nearest, weights, px, py, edge, value)
                    for c in range(channels):
                        out[c, v, u] = value[c]
            for c in range(channels):
                factor, base, slope, rest = gain[c], plane[c, 0], plane[c, 1], plane[c, 2] * (top + v)
                for u in range(length):
                    level = base + slope * np.float64(np.int32(left + u)) + rest
                    out[c, v, u] = out[c, v, u] * factor - level
        return count

    return compiled(warp, channels)


@compiled
def _look_up(grid_x, grid_y, step, v, left, limits, source, starts, nears, phases_x, phases_y):  # type: ignore[no-untyped-def]
    """Where the pixels of one row look: a loop of its own, because the compiler does that with vectors.

    Parameters
    ----------
    grid_x, grid_y, step, left
        As in `lanczos`.
    v : int
        Row, pixels from node ``[0, 0]`` of the grid.
    limits : tuple of float
        Least and greatest x, then y, that have all that interpolation looks at.
    source : tuple of int
        Frame row and column of the source's first pixel; numbers in a row of the source, and in a pixel.
    starts, nears : ndarray
        ``(length,)`` int32, are filled: where the source has the first of the 6x6 pixels around a position (-1 if that
        is beyond the limits), and the nearest.
    phases_x, phases_y : ndarray
        ``(length,)`` int32, are filled: where the table has the weights in x and y.
    """
    low_x, high_x, low_y, high_y = limits
    y0, x0, width, channels = source
    first_x, first_y = np.int32(x0 + LANCZOS_REACH - 1), np.int32(y0 + LANCZOS_REACH - 1)
    across, down, taps = np.int32(channels), np.int32(width), np.int32(_TAPS)
    near, one, none = np.int32(LANCZOS_REACH - 1), np.int32(1), np.int32(0)
    last_row, last_column = grid_x.shape[0] - 2, grid_x.shape[1] - 2
    i = min(v // step, last_row)
    share = v / step - i
    node, u, length = min(left // step, last_column), 0, len(starts)
    x_here = grid_x[i, node] * (1 - share) + grid_x[i + 1, node] * share
    y_here = grid_y[i, node] * (1 - share) + grid_y[i + 1, node] * share
    while u < length:
        x_next = grid_x[i, node + 1] * (1 - share) + grid_x[i + 1, node + 1] * share
        y_next = grid_y[i, node + 1] * (1 - share) + grid_y[i + 1, node + 1] * share
        stop = min(length, (node + 1) * step - left) if node < last_column else length
        x_slope, y_slope = (x_next - x_here) / step, (y_next - y_here) / step
        x_start, y_start = x_here - node * step * x_slope, y_here - node * step * y_slope
        for k in range(u, stop):
            column = np.float64(np.int32(left + k))  # vectors know how to convert 32 bits, but not 64
            x, y = x_start + column * x_slope, y_start + column * y_slope
            inside = (x >= low_x) & (x <= high_x) & (y >= low_y) & (y <= high_y)
            x, y = x if inside else low_x, y if inside else low_y
            whole_x, whole_y = np.floor(x), np.floor(y)
            x, y = x - whole_x, y - whole_y
            start = (np.int32(whole_y) - first_y) * down + (np.int32(whole_x) - first_x) * across
            right, below = near + (one if x >= 0.5 else none), near + (one if y >= 0.5 else none)
            starts[k] = start if inside else -1
            nears[k] = start + below * down + right * across
            phases_x[k] = np.int32(x * _PHASES + 0.5) * taps
            phases_y[k] = np.int32(y * _PHASES + 0.5) * taps
        x_here, y_here, node, u = x_next, y_next, node + 1, stop


@compiled
def _six(weights, at):  # type: ignore[no-untyped-def]
    """Six numbers of an array of weights."""
    return (
        weights[at],
        weights[at + numba.uint64(1)],
        weights[at + numba.uint64(2)],
        weights[at + numba.uint64(3)],
        weights[at + numba.uint64(4)],
        weights[at + numba.uint64(5)],
    )


@compiled
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


@compiled
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


@compiled
def lonely_pixels(plane, phases, smooth, limit, level, share):  # type: ignore[no-untyped-def]
    """Pixels that stand out from their own colour without their direct neighbours: see `calibrate.find_hot_pixels`.

    Parameters
    ----------
    plane : ndarray
        ``(ny, nx)`` float32, NaN = no data.
    phases, smooth : tuple of ndarray
        Every phase of the pattern (four of a CFA, one of mono), without gaps, and its local medians.
    limit, level : ndarray
        ``(phases,)`` threshold at the typical level of a phase, and that level, ADU.
    share : float
        What part of the excess the neighbours may have.

    Returns
    -------
    index : ndarray
        ``(n,)`` int64 flat indices into `plane`, ascending.
    value : ndarray
        ``(n,)`` float32 local medians to put there.
    """
    ny, nx = plane.shape
    step = 2 if len(phases) == 4 else 1
    index, value = [numba.int64(0) for _ in range(0)], [np.float32(0) for _ in range(0)]
    around, raw = np.empty(8, np.float32), np.empty(8, np.float32)
    lowest = np.float32(limit.min())
    for y in range(ny):
        for column in range(step):
            phase = y % step * step + column
            row, middle = phases[phase][y // step], smooth[phase][y // step]
            for u in range(len(row)):
                own = row[u] - middle[u]
                if not abs(own) > lowest:
                    continue
                x = u * step + column
                # Photon noise grows with the root of the level.
                brightness = max(middle[u] / level[phase], 1.0)
                if math.isnan(plane[y, x]) or not abs(own) > limit[phase] * math.sqrt(brightness):
                    continue
                k = 0
                for v in range(y - 1, y + 2):
                    for w in range(x - 1, x + 2):
                        if v == y and w == x:
                            continue
                        around[k], raw[k] = 0, np.nan
                        if 0 <= v < ny and 0 <= w < nx and not math.isnan(plane[v, w]):
                            around[k] = plane[v, w] - smooth[v % step * step + w % step][v // step, w // step]
                            raw[k] = plane[v, w] - middle[u]
                        k += 1
                total = top = np.float32(0)
                for k in range(8):
                    other = around[k]
                    # Inside a saturated core nothing exceeds its own surroundings: hold it against the candidate's too.
                    if step == 1 and raw[k] > other:
                        other = raw[k]
                    # A gap between two stars is dark among bright neighbours; a dead pixel is dark on its own.
                    if own <= 0:
                        other = abs(other)
                    total += other
                    top = other if k == 0 else max(top, other)
                if total - top < share * abs(own):
                    index.append(y * nx + x)
                    value.append(middle[u])
    order = np.argsort(np.array(index))
    return np.array(index)[order], np.array(value)[order]


@compiled
def cfa_cells(cfa, colours):  # type: ignore[no-untyped-def]
    """The 2x2 cells of a Bayer mosaic in one pass.

    Parameters
    ----------
    cfa : ndarray
        ``(ny, nx)`` float32; a last odd row or column is left out.
    colours : ndarray
        ``(4,)`` colour (0 red, 1 green, 2 blue) of the pixels of a cell, row by row; two of them green.

    Returns
    -------
    planes : ndarray
        ``(3, ny // 2, nx // 2)`` float32, mean of a cell's pixels of every colour.
    mean, peak : ndarray
        ``(ny // 2, nx // 2)`` float32, mean and maximum of all four. NaN wherever a pixel that counts is NaN.
    """
    h, w = cfa.shape[0] // 2, cfa.shape[1] // 2
    planes = np.empty((3, h, w), np.float32)
    mean, peak = np.empty((h, w), np.float32), np.empty((h, w), np.float32)
    red, blue = 0, 0
    for k in range(4):
        red = k if colours[k] == 0 else red
        blue = k if colours[k] == 2 else blue
    quarter, half = np.float32(0.25), np.float32(0.5)
    for v in range(h):
        above, below = cfa[2 * v], cfa[2 * v + 1]
        for u in range(w):
            a, b, c, d = above[2 * u], above[2 * u + 1], below[2 * u], below[2 * u + 1]
            r = (a if red == 0 else b) if red < 2 else (c if red == 2 else d)
            z = (a if blue == 0 else b) if blue < 2 else (c if blue == 2 else d)
            total = ((a + b) + c) + d
            planes[0, v, u], planes[2, v, u] = r, z
            # Red and blue stand on one diagonal, green on the other.
            planes[1, v, u] = ((b + c) if red == 0 or red == 3 else (a + d)) * half
            mean[v, u] = total * quarter
            top = max(max(a, b), max(c, d))
            peak[v, u] = top if total == total else total
    return planes, mean, peak
