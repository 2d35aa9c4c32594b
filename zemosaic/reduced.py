"""The equations of `zemosaic.levels.solve_common` for thousands of frames: never formed, solved in two levels.

The normal equations reduced by the common values couple all frames that see the same sky: for deep stacks the matrix is
nearly full. It is only ever multiplied here, observation by observation, within conjugate gradients. What would make
those crawl are changes that whole parts of the field make together; so frames that see much the same are taken as one,
and the small system of those is solved exactly in every step (a two-level preconditioner: A. Toselli, O. Widlund,
Domain Decomposition Methods, Springer 2005, chapter 2).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from scipy.sparse.linalg import LinearOperator, cg

from zemosaic.compiled import compiled

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_TOLERANCE, _STEPS = 1e-10, 3000  # of the residual, and conjugate gradient steps at most
_SHARES = (0.5, 0.25, 0.1)  # of a frame's observations, in common with the first of its group
_COARSE = 2000  # unknowns of the groups at most
_FREE = 10.0  # times its own observations, from which a prior counts as a decree


class ReducedEquations:
    """``value = c[common] + design @ unknowns[frame]`` with priors, for any weights of the observations.

    Parameters
    ----------
    common, frame : ndarray
        ``(n,)`` which common value, counted without gaps, and which frame an observation belongs to.
    design, value : ndarray
        ``(n, P)`` and ``(n,)``.
    prior, prior_sigma : ndarray
        ``(F, P)`` expected unknowns and how far they may be off.
    """

    def __init__(
        self, common: Ints, frame: Ints, design: Floats, value: Floats, prior: Floats, prior_sigma: Floats
    ) -> None:
        frames = len(prior)
        ordered = bool((np.diff(frame) >= 0).all())
        self._order = slice(None) if ordered else np.argsort(frame, kind="stable")  # without a copy where it can be
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(frame, minlength=frames))])
        self._common = common[self._order].astype(np.uint32)  # negative ones need not be thought of
        self._design, self._value = np.ascontiguousarray(design[self._order]), np.ascontiguousarray(value[self._order])
        self._prior, self._precision = prior, 1 / prior_sigma**2
        self._commons = int(self._common.max()) + 1
        self._group_of: Ints | None = None  # group of each of `_members`
        self._members: Ints
        self._move: Floats  # of a member's unknowns with those of the first of its group, (members, P, P)
        self._coarse: tuple[Floats, bool]

    def solve(self, weight: Floats, start: Floats) -> Floats:
        """The unknowns ``(F, P)``.

        Parameters
        ----------
        weight : ndarray
            ``(n,)`` of the observations, > 0.
        start : ndarray
            ``(F, P)`` where to start from.
        """
        shape = start.shape
        w = weight[self._order]
        total = np.bincount(self._common, w, self._commons)
        inverse = 1 / np.maximum(total, 1e-300)
        means = np.bincount(self._common, w * self._value, self._commons) * inverse
        blocks, right = _own_parts(self._starts, self._design, w, self._value - means[self._common])
        # Of the observations alone: what a prior holds is of another order.
        tolerance = _TOLERANCE * float(np.linalg.norm(right))
        right += self._precision * self._prior
        if self._group_of is None:
            self._group(w, blocks, inverse)
        blocks += self._precision[:, :, None] * np.eye(shape[1])
        own = np.linalg.inv(blocks)
        multiply, sums = _multiplier(shape[1]), np.empty(self._commons)

        def apply(unknowns: Floats) -> Floats:
            x = unknowns.reshape(shape)
            made = multiply(self._starts, self._common, self._design, w, inverse, x, sums)
            return np.asarray(made + self._precision * x).reshape(-1)

        def prepare(residual: Floats) -> Floats:
            r = residual.reshape(shape)
            return np.asarray(np.einsum("fpq,fq->fp", own, r) + self._together(r)).reshape(-1)

        operators = (LinearOperator((start.size,) * 2, matvec=f, dtype=np.float64) for f in (apply, prepare))
        matrix, preconditioner = operators
        found, _ = cg(
            matrix,
            right.reshape(-1),
            x0=start.reshape(-1),
            rtol=_TOLERANCE**2,
            atol=tolerance,
            maxiter=_STEPS,
            M=preconditioner,
        )
        return np.asarray(found).reshape(shape)

    def _group(self, w: Floats, blocks: Floats, inverse: Floats) -> None:
        """Find the groups, and factorise their equations; the weights of the first solution do for all."""
        frames, width = self._prior.shape
        seen_by = np.argsort(self._common, kind="stable")
        seen = np.concatenate([[0], np.cumsum(np.bincount(self._common, minlength=self._commons))])
        frame = np.repeat(np.arange(frames), np.diff(self._starts))
        # What a prior holds does not move with its neighbours.
        held = (np.diagonal(blocks, axis1=1, axis2=2) * _FREE < self._precision).any(axis=1)
        for share in _SHARES:
            group, count = _alike(self._starts, self._common, seen, frame[seen_by], ~held, share)
            if count * width <= _COARSE:
                break
        if not 0 < count * width <= _COARSE:
            self._group_of = np.zeros(0, np.int64)
            return
        mine, theirs = _shared_parts(self._starts, self._common, self._design, w, group, self._commons)
        move = np.linalg.solve(mine + 1e-9 * np.eye(width) * (1e-300 + _trace(mine)), theirs)
        matrix = _coarse_matrix(seen, seen_by, frame, self._design, w, inverse, group, move, count)
        full = blocks + self._precision[:, :, None] * np.eye(width)
        self._members = np.flatnonzero(group >= 0)
        self._group_of, self._move = group[self._members], move[self._members]
        diagonal = np.einsum("fpq,fpr,frs->fqs", self._move, full[self._members], self._move, optimize=True)
        for g, own in zip(self._group_of.tolist(), diagonal, strict=True):
            matrix[g * width : (g + 1) * width, g * width : (g + 1) * width] += own
        self._coarse = linalg.cho_factor(matrix)

    def _together(self, residual: Floats) -> Floats:
        """What groups as a whole should change by, for a residual ``(F, P)``."""
        out = np.zeros_like(residual)
        if self._group_of is not None and len(self._group_of):
            width = residual.shape[1]
            pushed = np.einsum("fpq,fp->fq", self._move, residual[self._members])
            count = len(self._coarse[0]) // width
            sums = np.stack([np.bincount(self._group_of, column, count) for column in pushed.T], axis=1)
            moved = linalg.cho_solve(self._coarse, sums.reshape(-1), check_finite=False).reshape(count, width)
            out[self._members] = np.einsum("fpq,fq->fp", self._move, moved[self._group_of])
        return out


def _trace(blocks: Floats) -> Floats:
    return np.asarray(np.trace(blocks, axis1=1, axis2=2)[:, None, None])


@cache
def _multiplier(width: int) -> Any:
    """The reduced matrix without priors times unknowns, for so many of them a frame, as a compiled function::

        product = multiply(starts, common, design, w, inverse, unknowns, sums)

    `unknowns` and `product` are ``(F, P)``, `sums` is room for the common values. That P is known makes the inner loops
    a third faster.
    """

    def multiply(starts, common, design, w, inverse, unknowns, sums):  # type: ignore[no-untyped-def]
        out, own, made = np.empty_like(unknowns), np.empty(width), np.empty(width)
        sums[:] = 0
        for f in range(len(out)):
            own[:] = unknowns[f]
            for i in range(starts[f], starts[f + 1]):
                fitted = 0.0
                for p in range(width):
                    fitted += design[i, p] * own[p]
                sums[common[i]] += w[i] * fitted
        for c in range(len(sums)):
            sums[c] *= inverse[c]
        for f in range(len(out)):
            own[:] = unknowns[f]
            made[:] = 0
            for i in range(starts[f], starts[f + 1]):
                left = -sums[common[i]]
                for p in range(width):
                    left += design[i, p] * own[p]
                left *= w[i]
                for p in range(width):
                    made[p] += left * design[i, p]
            out[f] = made
        return out

    return compiled(multiply, width)


@compiled
def _own_parts(starts, design, w, value):  # type: ignore[no-untyped-def]
    """Every frame's own part of the normal equations, ``(F, P, P)``, and of their right side, ``(F, P)``."""
    frames, width = len(starts) - 1, design.shape[1]
    blocks, right = np.zeros((frames, width, width)), np.zeros((frames, width))
    for f in range(frames):
        for i in range(starts[f], starts[f + 1]):
            for p in range(width):
                right[f, p] += w[i] * design[i, p] * value[i]
                for q in range(width):
                    blocks[f, p, q] += w[i] * design[i, p] * design[i, q]
    return blocks, right


@compiled
def _alike(starts, common, seen, frame_of, free, share):  # type: ignore[no-untyped-def]
    """Group of every frame, -1 for none, and their number: frames that see enough of what a first one sees."""
    frames = len(starts) - 1
    group, times = np.full(frames, -1), np.zeros(frames, np.int64)
    touched = np.empty(frames, np.int64)
    count = 0
    for first in range(frames):
        size = starts[first + 1] - starts[first]
        if group[first] >= 0 or not free[first] or size == 0:
            continue
        met = 0
        for i in range(starts[first], starts[first + 1]):
            for j in range(seen[common[i]], seen[common[i] + 1]):
                other = frame_of[j]
                if group[other] < 0 and free[other]:
                    if times[other] == 0:
                        touched[met] = other
                        met += 1
                    times[other] += 1
        for k in range(met):
            other = touched[k]
            if times[other] >= share * min(size, starts[other + 1] - starts[other]):
                group[other] = count
            times[other] = 0
        group[first] = count
        count += 1
    return group, count


@compiled
def _shared_parts(starts, common, design, w, group, commons):  # type: ignore[no-untyped-def]
    """What fits every frame's unknowns to those of the first of its group over what both see: two ``(F, P, P)``."""
    frames, width = len(starts) - 1, design.shape[1]
    mine, theirs = np.zeros((frames, width, width)), np.zeros((frames, width, width))
    row = np.full(commons, -1)  # the observation of each common value by the first
    by_group = np.argsort(group, kind="mergesort")
    current = -1
    for k in range(frames):
        f = by_group[k]
        if group[f] < 0:
            continue
        if group[f] != current:
            current = group[f]
            row[:] = -1
            for i in range(starts[f], starts[f + 1]):
                row[common[i]] = i
        for i in range(starts[f], starts[f + 1]):
            other = row[common[i]]
            if other >= 0:
                for p in range(width):
                    for q in range(width):
                        mine[f, p, q] += w[i] * design[i, p] * design[i, q]
                        theirs[f, p, q] += w[i] * design[i, p] * design[other, q]
    return mine, theirs


@compiled
def _coarse_matrix(seen, seen_by, frame, design, w, inverse, group, move, count):  # type: ignore[no-untyped-def]
    """What the common values take off the equations of the groups, ``(count P, count P)``, as negative numbers."""
    width = design.shape[1]
    matrix = np.zeros((count * width, count * width))
    place, met, sums = np.full(count, -1), np.empty(count, np.int64), np.zeros((count, width))
    for c in range(len(seen) - 1):
        here = 0
        for j in range(seen[c], seen[c + 1]):
            i = seen_by[j]
            f = frame[i]
            g = group[f]
            if g < 0:
                continue
            if place[g] < 0:
                place[g] = here
                met[here] = g
                sums[here] = 0
                here += 1
            for q in range(width):
                for p in range(width):
                    sums[place[g], q] += w[i] * design[i, p] * move[f, p, q]
        for a in range(here):
            for b in range(here):
                for p in range(width):
                    for q in range(width):
                        matrix[met[a] * width + p, met[b] * width + q] -= sums[a, p] * sums[b, q] * inverse[c]
        for a in range(here):
            place[met[a]] = -1
    return matrix
