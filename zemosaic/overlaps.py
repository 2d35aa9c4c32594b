"""Which panels the frames make, how they overlap, and which overlaps the field hangs on.

Everything is counted on a grid of cells, so that the work grows with the number of frames, not of pairs of frames: a
frame meets a *panel* (frames that look at the same place), and panels meet each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, depth_first_order, minimum_spanning_tree

from zemosaic.tiles import Window

Ints = NDArray[np.int64]
Corners = NDArray[np.float64]

_CELLS_PER_SIDE = 24  # cells along the shorter side of a frame
_LEAST_OVERLAP = 0.01  # of a frame: less sky in common is none
_THIN_SHARE = 1 / 3  # of the frames next to a link: fewer that really overlap make it weak
_THIN_AREA = 0.05  # of a frame: a narrower overlap makes it weak


@dataclass(frozen=True)
class Link:
    """Two panels that share sky.

    Parameters
    ----------
    a, b : int
        Panels, ``a < b``, counted from 0.
    frames_a, frames_b : int
        Frames of `a` that overlap panel `b`, and the reverse.
    area : float
        Shared sky, in units of a frame's area.
    """

    a: int
    b: int
    frames_a: int
    frames_b: int
    area: float


@dataclass(frozen=True)
class WeakLink:
    """A part of the field that only few frames, or a thin strip, tie to the rest.

    Parameters
    ----------
    panels : tuple of int
        The smaller part, counted from 0.
    frames : int
        Its frames that overlap the rest.
    on : tuple of (int, int, int)
        What it hangs on: panel, frames of that panel that overlap the part, all frames of that panel.
    area : float
        Shared sky, in units of a frame's area.
    """

    panels: tuple[int, ...]
    frames: int
    on: tuple[tuple[int, int, int], ...]
    area: float


@dataclass(frozen=True)
class OverlapGraph:
    """How the panels of a field hang together.

    Parameters
    ----------
    panels : tuple of tuple of int
        Frames of every panel.
    links : tuple of Link
        Panels that share sky.
    islands : tuple of tuple of int
        Panels of every connected part of the field, the largest (by frames) first: nothing ties different parts.
    weak : tuple of WeakLink
        What would fall apart easily, the weakest first.
    """

    panels: tuple[tuple[int, ...], ...]
    links: tuple[Link, ...]
    islands: tuple[tuple[int, ...], ...]
    weak: tuple[WeakLink, ...]


def overlap_graph(corners: Corners, panels: Sequence[Sequence[int]]) -> OverlapGraph:
    """Find the overlaps of panels, and the weak ones.

    Parameters
    ----------
    corners : ndarray
        ``(n, 4, 2)`` canvas positions ``x, y`` of the frames' corners, in order around the frame.
    panels : sequence of sequence of int
        Every frame in exactly one panel.
    """
    sides = np.linalg.norm(np.diff(corners, axis=1, append=corners[:, :1]), axis=2)
    cells = frame_cells(corners, float(np.median(sides.min(axis=1))) / _CELLS_PER_SIDE)
    frame_area = float(np.median(cells.sum(axis=1)))
    member = _membership(panels, len(corners))
    covered = _binary(member @ cells)
    touches = cells @ covered.T  # frames x panels: cells that they share
    touches.data *= touches.data >= _LEAST_OVERLAP * frame_area
    touches.eliminate_zeros()
    touches = _binary(touches)
    counts = member @ touches
    shared = (covered @ covered.T).tocoo()
    upper = shared.row < shared.col
    a, b, area = shared.row[upper], shared.col[upper], shared.data[upper] / frame_area
    found = zip(*(v.tolist() for v in (a, b, _pick(counts, a, b), _pick(counts, b, a), area)), strict=True)
    links = tuple(Link(*link) for link in sorted(found) if link[2] and link[3])
    sizes = np.array([len(panel) for panel in panels])
    return OverlapGraph(
        tuple(tuple(int(i) for i in panel) for panel in panels),
        links,
        _islands(links, sizes),
        tuple(_weak_links(links, sizes, member, touches)),
    )


def frame_cells(corners: Corners, cell: float) -> csr_array:
    """Cells whose middle lies on each frame.

    Parameters
    ----------
    corners : ndarray
        ``(n, 4, 2)`` as in `overlap_graph`.
    cell : float
        Side of a cell, canvas pixels.

    Returns
    -------
    csr_array
        ``(n, cells)`` int32, 1 where a frame lies.
    """
    scaled = (corners - corners.min(axis=(0, 1))) / cell
    ny, nx = (int(np.ceil(scaled[..., axis].max())) + 1 for axis in (1, 0))
    found = []
    for quad in scaled:
        box, mask = quad_mask(quad, (ny, nx))
        y, x = np.nonzero(mask)
        found.append((y + box.y0) * nx + x + box.x0)
    starts = np.concatenate([[0], np.cumsum([len(f) for f in found])])
    index = np.concatenate(found)
    return csr_array((np.ones(len(index), np.int32), index, starts), shape=(len(found), ny * nx))


def quad_mask(quad: NDArray[np.float64], shape: tuple[int, int]) -> tuple[Window, NDArray[np.bool_]]:
    """Pixels of a grid whose middle lies in a convex quadrangle.

    Parameters
    ----------
    quad : ndarray
        ``(4, 2)`` corners ``x, y`` in order around it, either way; pixel ``(i, j)`` reaches from ``j`` to ``j + 1``.
    shape : tuple of int
        ``(ny, nx)`` of the grid.

    Returns
    -------
    box : Window
        The part of the grid that may lie in it.
    mask : ndarray
        ``box.shape`` bool.
    """
    (x0, y0), (x1, y1) = np.floor(quad.min(axis=0)).astype(int), np.ceil(quad.max(axis=0)).astype(int)
    whole = Window.of_shape(shape)
    box = Window(min(y0, y1), y1, min(x0, x1), x1).intersect(whole)
    y = np.arange(box.y0, box.y1) + 0.5
    left, right = np.full(len(y), -np.inf), np.full(len(y), np.inf)
    ends = np.roll(quad, -1, axis=0)
    turn = float(np.sum(quad[:, 0] * ends[:, 1] - ends[:, 0] * quad[:, 1]))
    for (ax, ay), (bx, by) in zip(quad, ends, strict=True):
        if ay == by:
            continue
        crossing = ax + (y - ay) * (bx - ax) / (by - ay)
        if (by > ay) == (turn > 0):
            np.minimum(right, crossing, out=right)
        else:
            np.maximum(left, crossing, out=left)
    x = np.arange(box.x0, box.x1) + 0.5
    inside = (y >= quad[:, 1].min()) & (y <= quad[:, 1].max())
    return box, (x >= left[:, None]) & (x <= right[:, None]) & inside[:, None]


def quad_areas(corners: Corners) -> NDArray[np.float64]:
    """Areas ``(n,)`` of quadrangles ``(n, 4, 2)`` (the shoelace formula)."""
    x, y = corners[..., 0], corners[..., 1]
    nx, ny = np.roll(x, -1, axis=1), np.roll(y, -1, axis=1)
    return np.abs((x * ny - nx * y).sum(axis=1)) / 2


def _membership(panels: Sequence[Sequence[int]], frames: int) -> csr_array:
    """``(panels, frames)`` int32, 1 where a frame belongs to a panel."""
    index = np.concatenate([np.asarray(panel, np.int64) for panel in panels])
    starts = np.concatenate([[0], np.cumsum([len(panel) for panel in panels])])
    return csr_array((np.ones(len(index), np.int32), index, starts), shape=(len(panels), frames))


def _binary(counts: csr_array) -> csr_array:
    made = csr_array(counts)
    made.data = np.ones_like(made.data, dtype=np.int32)
    return made


def _pick(matrix: csr_array, rows: Ints, columns: Ints) -> Ints:
    """Elements ``(n,)`` of a sparse matrix, for n = 0 too."""
    return np.asarray(matrix[rows, columns] if len(rows) else [], np.int64)


def _islands(links: Sequence[Link], sizes: Ints) -> tuple[tuple[int, ...], ...]:
    label = connected_components(_weighted(links, len(sizes)), directed=False)[1]
    parts = [tuple(np.flatnonzero(label == k).tolist()) for k in range(int(label.max()) + 1)]
    return tuple(sorted(parts, key=lambda part: (-int(sizes[list(part)].sum()), part)))


def _weighted(links: Sequence[Link], panels: int) -> csr_array:
    """The panel graph; an edge is the shorter the more frames and sky are behind it."""
    a, b = np.array([(link.a, link.b) for link in links], np.int64).reshape(-1, 2).T
    length = np.array([1 / (min(link.frames_a, link.frames_b) * link.area) for link in links])
    return csr_array((length, (a, b)), shape=(panels, panels))


def _weak_links(links: Sequence[Link], sizes: Ints, member: csr_array, touches: csr_array) -> Iterable[WeakLink]:
    """The weak ones of the cuts that the edges of the strongest spanning tree stand for.

    Every edge of the tree splits its island in two; all links between the two parts are the cut. A link that is the
    only one between two parts is in every spanning tree, so no such bridge is missed.
    """
    if not links:
        return []
    ends = np.array([(link.a, link.b) for link in links])
    # What one strong link ties is not weak, whatever else ties it.
    strong = np.array([link.area >= 3 * _THIN_AREA and _share(link, sizes) >= 2 * _THIN_SHARE for link in links])
    found = []
    for part in _tree_parts(_weighted(links, len(sizes))):
        crossing = part[ends[:, 0]] != part[ends[:, 1]]
        if (strong & crossing).any():
            continue
        island = _reach(part, ends)
        small = part if sizes[part].sum() <= sizes[island & ~part].sum() else island & ~part
        weak = _cut([link for link, is_in in zip(links, crossing, strict=True) if is_in], small, sizes, member, touches)
        if weak is not None:
            found.append(weak)
    return sorted(found, key=lambda w: (min(w.frames, sum(n for _, n, _ in w.on)), w.area, w.panels))


def _tree_parts(graph: csr_array) -> Iterable[NDArray[np.bool_]]:
    """The panels below every edge of the strongest spanning forest, each ``(panels,)`` bool."""
    tree = minimum_spanning_tree(graph)
    label = connected_components(tree, directed=False)[1]
    for root in np.unique(label, return_index=True)[1]:
        order, parent = depth_first_order(tree, root, directed=False)
        size = np.ones(graph.shape[0], np.int64)
        for panel in order[:0:-1]:
            size[parent[panel]] += size[panel]
        for place, panel in enumerate(order[1:], start=1):
            part = np.zeros(graph.shape[0], np.bool_)
            part[order[place : place + size[panel]]] = True  # a subtree is one run of the depth-first order
            yield part


def _reach(part: NDArray[np.bool_], ends: Ints) -> NDArray[np.bool_]:
    """All panels of the island that `part` belongs to."""
    reached = part.copy()
    while True:
        next_to = ends[reached[ends[:, 0]] | reached[ends[:, 1]]].ravel()
        if reached[next_to].all():
            return reached
        reached[next_to] = True


def _share(link: Link, sizes: Ints) -> float:
    return float(min(link.frames_a / sizes[link.a], link.frames_b / sizes[link.b]))


def _cut(
    links: Sequence[Link], small: NDArray[np.bool_], sizes: Ints, member: csr_array, touches: csr_array
) -> WeakLink | None:
    """What ties the panels of `small` to the rest, if it is weak."""
    near = sorted({link.a if small[link.a] else link.b for link in links})
    far = sorted({link.b if small[link.a] else link.a for link in links})
    area = sum(link.area for link in links)

    def overlapping(panel: int, others: list[int]) -> int:
        frames = member[[panel]].indices
        return int((touches[frames][:, others].sum(axis=1) > 0).sum())

    here = sum(overlapping(panel, far) for panel in near)
    on = tuple((panel, overlapping(panel, near), int(sizes[panel])) for panel in far)
    share = min(here / sizes[near].sum(), sum(n for _, n, _ in on) / sizes[far].sum())
    if share >= _THIN_SHARE and area >= _THIN_AREA:
        return None
    return WeakLink(tuple(np.flatnonzero(small).tolist()), here, on, area)
