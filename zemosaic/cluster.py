"""Which frames make one master tile: those that look at the same place with the same orientation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zemosaic.canvas import separation, to_vectors
from zemosaic.frames import Frame


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
    centre, angle = _pointings(frames)
    leaders: list[int] = []
    for i in range(len(frames)):
        if (
            not leaders
            or not _joins(centre[i], angle[i], centre[leaders], angle[leaders], threshold_deg, split_deg).any()
        ):
            leaders.append(i)
    middle, turn = centre[leaders], angle[leaders]
    label = np.zeros(len(frames), np.int64)
    for _ in range(2):  # once to the leaders, once to the middles of what they gathered
        label = np.array([_nearest(c, a, middle, turn, split_deg) for c, a in zip(centre, angle, strict=True)])
        kept = np.unique(label)
        middle = np.stack([centre[label == k].mean(axis=0) for k in kept])
        turn = np.array([np.angle(np.exp(1j * angle[label == k]).mean()) for k in kept])
        label = np.searchsorted(kept, label)
    groups = [np.flatnonzero(label == k) for k in np.unique(label)]
    parts = [part for group in groups for part in _cut(group, max_frames)]
    return [tuple(int(i) for i in part) for part in sorted(parts, key=lambda part: part[0])]


def _pointings(frames: Sequence[Frame]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit vectors ``(n, 3)`` of the centres, and directions ``(n,)`` of the y axes from north, radians."""
    centres, angles = [], []
    for frame in frames:
        assert frame.wcs is not None
        ny, nx = frame.shape
        x, y = (nx - 1) / 2, (ny - 1) / 2
        ra, dec = frame.wcs.all_pix2world([x, x], [y, y + 1], 0)
        centres.append(to_vectors(ra[0], dec[0]))
        east = ((ra[1] - ra[0] + 180) % 360 - 180) * np.cos(np.deg2rad(dec[0]))
        angles.append(np.arctan2(east, dec[1] - dec[0]))
    return np.array(centres), np.array(angles)


def _joins(
    centre: NDArray, angle: float, centres: NDArray, angles: NDArray, threshold_deg: float, split_deg: float
) -> NDArray[np.bool_]:
    return (separation(centres, centre) <= threshold_deg) & _aligned(angle, angles, split_deg)


def _nearest(centre: NDArray, angle: float, centres: NDArray, angles: NDArray, split_deg: float) -> int:
    near = _aligned(angle, angles, split_deg)
    # Averaging may have turned every group away from a frame: then any will do.
    away = np.where(near | ~near.any(), np.linalg.norm(centres - centre, axis=1), np.inf)
    return int(np.argmin(away))


def _aligned(angle: float, angles: NDArray, split_deg: float) -> NDArray[np.bool_]:
    turn = np.abs(np.angle(np.exp(1j * (angles - angle))))
    return (turn <= np.deg2rad(split_deg)) | (split_deg <= 0)


def _cut(group: NDArray[np.int64], max_frames: int) -> list[NDArray[np.int64]]:
    return np.array_split(group, -(-len(group) // max_frames)) if max_frames > 1 else [group]
