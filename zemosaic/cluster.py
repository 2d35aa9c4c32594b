"""Which frames make one master tile: those that look at the same place with the same orientation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zemosaic.frames import Frame
from zemosaic.sphere import separation, to_vectors


def cluster_frames(
    frames: Sequence[Frame], threshold_deg: float, split_deg: float = 0.0, max_frames: int = 0
) -> list[tuple[int, ...]]:
    """Groups of frames whose centres lie together.

    Frames are taken in order; each joins the nearest group whose first frame lies within `threshold_deg` and within
    `split_deg` of its orientation, or opens a group of its own. Then every frame moves to the group whose middle is
    nearest, so that a group does not depend on a first frame that was off.

    Parameters
    ----------
    frames : sequence of Frame
        With a WCS, in order of time.
    threshold_deg : float
        Largest distance of a frame's centre from its group's first frame.
    split_deg : float
        Largest difference of orientation within a group; 0 = any.
    max_frames : int
        Larger groups are cut, in order, into parts of nearly equal size; 0 or 1 = never.

    Returns
    -------
    list of tuple of int
        Every frame in exactly one group; groups in order of their first frame.
    """
    centre, up = _pointings(frames)
    leaders: list[int] = []
    for i in range(len(frames)):
        near = separation(centre[leaders], centre[i]) <= threshold_deg
        if not (near & _aligned(up[i], up[leaders], split_deg)).any():
            leaders.append(i)
    middle, turn = centre[leaders], up[leaders]
    for _ in range(2):  # once to the leaders, once to the middles of what they gathered
        label = np.array([_nearest(c, u, middle, turn, split_deg) for c, u in zip(centre, up, strict=True)])
        members = [np.flatnonzero(label == k) for k in np.unique(label)]
        middle, turn = (_unit(np.array([v[group].mean(axis=0) for group in members])) for v in (centre, up))
    parts = [part for group in members for part in _cut(group, max_frames)]
    return [tuple(int(i) for i in part) for part in sorted(parts, key=lambda part: part[0])]


def _pointings(frames: Sequence[Frame]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit vectors ``(n, 3)`` of the centres, and of the directions of the y axes there.

    Vectors, not angles from north: around a pole north turns by more from frame to frame than the frames do.
    """
    points = []
    for frame in frames:
        assert frame.wcs is not None
        ny, nx = frame.shape
        x, y = (nx - 1) / 2, (ny - 1) / 2
        points.append(to_vectors(*frame.wcs.all_pix2world([x, x], [y, y + 1], 0)))
    centre, above = np.moveaxis(np.array(points), 1, 0)
    return centre, _unit(above - centre)


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _nearest(centre: NDArray, up: NDArray, centres: NDArray, ups: NDArray, split_deg: float) -> int:
    aligned = _aligned(up, ups, split_deg)
    # A frame may have lost every group of its orientation to the averaging: then any will do.
    away = np.linalg.norm(centres - centre, axis=1)
    return int(np.argmin(np.where(aligned, away, np.inf) if aligned.any() else away))


def _aligned(up: NDArray, ups: NDArray, split_deg: float) -> NDArray[np.bool_]:
    return separation(ups, up) <= (split_deg or 180.0)


def _cut(group: NDArray[np.int64], max_frames: int) -> list[NDArray[np.int64]]:
    return np.array_split(group, -(-len(group) // max_frames)) if max_frames > 1 else [group]
