"""One catalogue out of the stars of all frames: which detections are of one star, and which frames agree.

A frame whose WCS is wrong shows its stars where the others have none. How many of its stars fall on theirs is compared
with how many would do so by chance in that crowd; no threshold on a share is needed, so a frame that overlaps
the others by a thin strip is not mistaken for one that contradicts them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from scipy.special import pdtr, pdtrc  # scipy.stats, which has them too, takes half a second to load

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_FEWEST = 4  # stars in common that can prove anything
_CHANCE = 1e-7  # agreement that chance would produce more often proves nothing
_SURROUNDINGS = 8.0  # radius around a star, in match radii, in which the crowd is counted
_PROBES = 80  # stars of a frame at which it is counted
_SEEN_AGAIN = 0.3  # share of its stars amid those of others that a frame has in common with them, at least
_DOUBT = 0.01  # chance of having as few as it has, at which a frame contradicts the others


def label_stars(directions: Floats, radius: float) -> Ints:
    """Give detections of the same star the same number.

    Detections are first merged in cells of half the radius, then cells whose mean directions lie within `radius` are
    joined: the work grows linearly with the number of detections, however often a star was seen.

    Parameters
    ----------
    directions : ndarray
        ``(n, 3)`` unit vectors.
    radius : float
        Radians, at least 3e-6: the cells of the whole sky are numbered with 64 bits.

    Returns
    -------
    ndarray
        ``(n,)`` star numbers, from 0 without gaps.
    """
    if not len(directions):
        return np.zeros(0, np.int64)
    radius = max(radius, 3e-6)
    cells = np.floor((directions + 1) / (radius / 2)).astype(np.int64)
    side = int(4 / radius) + 2
    _, cell = np.unique((cells[:, 0] * side + cells[:, 1]) * side + cells[:, 2], return_inverse=True)
    cell = cell.reshape(-1)
    centre = means(cell, directions)
    pairs = cKDTree(centre).query_pairs(radius, output_type="ndarray")
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(centre), len(centre)))
    return connected_components(graph, directed=False)[1].astype(np.int64)[cell]


def means(label: Ints, values: Floats, weight: Floats | None = None) -> Floats:
    """``(labels, k)`` weighted means of values ``(n, k)`` that carry the same label."""
    total = np.bincount(label, weight)
    sums = [np.bincount(label, column if weight is None else weight * column) for column in values.T]
    return np.stack(sums, axis=1) / total[:, None]


def medians(label: Ints, values: Floats, labels: int) -> tuple[Floats, Ints]:
    """``(labels,)`` medians (the lower of two; 0 without values) and counts by label; negative labels are skipped."""
    valid = label >= 0
    label, values = label[valid], values[valid]
    values = values[np.argsort(label, kind="stable")]
    count = np.bincount(label, minlength=labels)
    end = np.cumsum(count)
    median = np.zeros(labels)
    for k in np.flatnonzero(count).tolist():
        middle = (count[k] - 1) // 2
        median[k] = np.partition(values[end[k] - count[k] : end[k]], middle)[middle]
    return median, count


def seen_once(star: Ints, frame: Ints) -> Bools:
    """``(n,)`` detections that are their frame's only one of a star: two mean a blend."""
    key = star * (int(frame.max(initial=0)) + 1) + frame
    _, inverse, count = np.unique(key, return_inverse=True, return_counts=True)
    return count[inverse.reshape(-1)] == 1


def crowd(tree: cKDTree, places: Floats, radius: float) -> tuple[Floats, Bools]:
    """How many stars of a tree to expect within `radius` of places ``(n, 3)`` by chance, and whether any is around."""
    near, around = (tree.query_ball_point(places, r * radius, return_length=True) for r in (2.0, _SURROUNDINGS))
    return (around - near) / (_SURROUNDINGS**2 - 4), around > 0


def beyond_chance(common: NDArray, chance: NDArray) -> Bools:
    """Whether more stars are in common than the number expected by chance explains."""
    return (common >= _FEWEST) & (pdtrc(common - 1, chance) < _CHANCE)


@dataclass(frozen=True)
class Agreement:
    """Which frames belong together.

    Parameters
    ----------
    trusted : ndarray
        ``(F,)`` bool: agrees with the majority, or contradicts nobody.
    group : ndarray
        ``(F,)`` number of the group of frames that agree, -1 for frames without stars to compare.
    """

    trusted: Bools
    group: Ints


class Consensus:
    """Detections of all frames as merged stars, and the question which frames agree.

    Parameters
    ----------
    frame, star : ndarray
        ``(n,)`` frame and star of every detection.
    centre : ndarray
        ``(S, 3)`` direction of every star.
    frames : int
        Number of frames.
    radius : float
        Radians within which detections were taken for the same star.
    """

    def __init__(self, frame: Ints, star: Ints, centre: Floats, frames: int, radius: float) -> None:
        self.frames, self.radius, self.centre = frames, radius, centre
        order = np.argsort(frame, kind="stable")
        self.frame, self.star = frame[order], star[order]
        self.count = np.bincount(frame, minlength=frames)
        self.start = np.cumsum(self.count) - self.count

    def agree(self, sure: Bools) -> Agreement:
        """Sort frames into groups that agree, and distrust groups that a larger one contradicts.

        Parameters
        ----------
        sure : ndarray
            ``(F,)`` frames that agree with a reference catalogue: they outvote all others.
        """
        group = np.full(self.frames, -1, np.int64)
        left = self.count >= _FEWEST
        shared = np.bincount(self.frame, np.bincount(self.star)[self.star] - 1.0, self.frames)
        seed, number = sure & left, 0
        while left.any():
            if not seed.any():
                seed = np.arange(self.frames) == np.argmax(np.where(left, shared, -1))
            core = self._grown(seed, left)
            group[core], left, seed = number, left & ~core, np.zeros_like(seed)
            number += 1
        size = np.bincount(group[group >= 0], minlength=number)
        size[group[sure & (group >= 0)]] = self.frames
        trusted = np.zeros(self.frames, bool)
        for g in np.argsort(-size, kind="stable"):
            if not (trusted.any() and self._contradicted(group == g, trusted)):
                trusted |= group == g
        return Agreement(trusted, group)

    def _grown(self, core: Bools, left: Bools) -> Bools:
        """`core` with all frames of `left` that agree with it, with those that agree with these, and so on."""
        while True:
            found = self._agreeing(left & ~core, core)
            if not found.any():
                return core
            core = core | found

    def _agreeing(self, asked: Bools, core: Bools) -> Bools:
        """``(F,)`` those of the `asked` frames that share more stars with the `core` than chance allows."""
        known, common = self._common(core)
        asked = asked & (common >= _FEWEST)
        chance, _ = self._surroundings(asked, known)
        return asked & beyond_chance(common, chance)

    def _contradicted(self, members: Bools, core: Bools) -> bool:
        """Whether a group has its stars amid those of the `core`, but not the same ones."""
        known, common = self._common(core)
        _, amid = self._surroundings(members, known)
        most = np.argmax(np.where(members, amid, -1))
        return bool(pdtr(common[most], _SEEN_AGAIN * amid[most]) < _DOUBT)

    def _common(self, core: Bools) -> tuple[Bools, Ints]:
        """``(S,)`` stars that the `core` has seen, and ``(F,)`` how many of them each frame has."""
        known = np.zeros(len(self.centre), bool)
        known[self.star[core[self.frame]]] = True
        return known, np.bincount(self.frame, known[self.star], self.frames).astype(np.int64)

    def _surroundings(self, asked: Bools, known: Bools) -> tuple[Floats, Floats]:
        """``(F,)`` stars that frames should share with the `known` ones by chance, and how many have any around."""
        rows = self._probes(asked & (self.count > 0))
        if not len(rows) or not known.any():
            return np.zeros(self.frames), np.zeros(self.frames)
        places = self.centre[self.star[rows]]
        middle = places.mean(axis=0)
        reach = np.linalg.norm(places - middle, axis=1).max() + 2 * _SURROUNDINGS * self.radius
        near = known & (np.linalg.norm(self.centre - middle, axis=1) <= reach)  # a group is small, the sky is large
        expected, amid = crowd(cKDTree(self.centre[near]), places, self.radius)
        share = self.count / np.maximum(np.bincount(self.frame[rows], minlength=self.frames), 1)
        frame = self.frame[rows]
        return share * np.bincount(frame, expected, self.frames), share * np.bincount(frame, amid, self.frames)

    def _probes(self, asked: Bools) -> Ints:
        """Detections, spread evenly over the stars of every frame asked, at which its surroundings are counted."""
        rows = [
            np.linspace(self.start[f], self.start[f] + self.count[f] - 1, min(self.count[f], _PROBES)).astype(np.int64)
            for f in np.flatnonzero(asked)
        ]
        return np.concatenate([np.zeros(0, np.int64), *rows])
