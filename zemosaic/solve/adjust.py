"""One linear pass over all frames at once: what moves, turns and stretches each of them onto what all agree on.

Stars are unknowns too, but never appear: everything is measured against the weighted mean of a star's detections,
which is a projection. What remains are six numbers a frame and eighteen a camera, found by LSMR; chaining frames
or alternating between stars and frames would crawl over a large mosaic, and a dense solution of thousands of
frames would not fit into memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, lsmr

from zemosaic.compiled import compiled

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

TERMS = 9  #: of a camera's distortion: two linear, three quadratic, four cubic
_BEND_PRIOR = 3.0  # pixels at the corner by which a distortion may differ from what it was taken for
_TOLERANCE = 1e-6
_MAX_ITERATIONS = 300


@dataclass(frozen=True)
class Equations:
    """Everything the linear pass is given; a row is one detection.

    Parameters
    ----------
    star, frame : ndarray
        ``(n,)`` numbers; frame -1 is the reference catalogue, which does not move.
    place : ndarray
        ``(n, 3)``: 1 and the place in the frame (tangent plane axes) in units of its rms.
    turn : ndarray
        ``(F, 2, 2)`` frame pixels to the axes of the sky.
    terms : ndarray
        ``(n, 9)`` distortion terms.
    camera : ndarray
        ``(n,)``; -1 for the catalogue.
    miss : ndarray
        ``(n, 2)`` common position of the star minus the detection's, pixels, on the axes of the sky.
    weight : ndarray
        ``(n,)`` 1 / px².
    moved, width : ndarray
        ``(F, 3, 2)`` how far the frames have been moved already (pixels rms) and ``(F, 3)`` how far they may be moved.
    bent : ndarray
        ``(K, 9, 2)`` pixels by which the distortions have been changed already.
    """

    star: Ints
    frame: Ints
    place: Floats
    turn: Floats
    terms: Floats
    camera: Ints
    miss: Floats
    weight: Floats
    moved: Floats
    width: Floats
    bent: Floats


@dataclass(frozen=True)
class Adjustment:
    """Result of `adjust`.

    Parameters
    ----------
    move : ndarray
        ``(F, 3, 2)`` pixels: what `Equations.place` is multiplied with, per axis of the sky.
    bend : ndarray
        ``(K, 9, 2)`` pixels, to be added to the distortions.
    chi2 : float
        What is left of the weighted squares, priors included.
    """

    move: Floats
    bend: Floats
    chi2: float


def own_moves(equations: Equations) -> tuple[Floats, Floats]:
    """Move of each frame onto the common positions if those stayed where they are, and its formal error.

    Returns
    -------
    move : ndarray
        ``(F, 3, 2)`` pixels; 0 where nothing is known.
    error : ndarray
        ``(F, 3)`` pixels; infinite where nothing is known.
    """
    e, none = equations, np.full(len(equations.bent), -1)
    gram = _frame_grams(equations) + 1e-9 * np.eye(3)
    right = np.zeros_like(e.moved)
    _gather(e.frame, e.camera, none, e.place, e.turn, e.terms, e.weight, e.miss, right, e.bent[:0])
    covariance = np.linalg.inv(gram)
    return covariance @ right, np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))


def shifts(equations: Equations, move: Floats) -> Floats:
    """``(n, 2)`` how far moves ``(F, 3, 2)`` shift every detection, pixels on the axes of the sky."""
    e, none = equations, np.full(len(equations.bent), -1)
    made = np.empty_like(e.miss)
    _apply(e.frame, e.camera, none, e.place, e.turn, e.terms, np.ones(len(made)), move, e.bent[:0], made)
    return made


def adjust(equations: Equations, free: Bools) -> Adjustment:
    """Solve for all frames and the distortions of the cameras that are `free`, ``(K,)``.

    Minimised are the weighted squares of ``place @ move[frame] + turn @ terms @ bend[camera] - miss``, less their
    mean for every star, plus the squares of all moves made so far in units of their `width`.
    """
    system = _System(equations, free)
    solution = lsmr(
        LinearOperator(system.shape, matvec=system.forward, rmatvec=system.adjoint, dtype=np.float64),
        system.right,
        atol=_TOLERANCE,
        btol=_TOLERANCE,
        maxiter=_MAX_ITERATIONS,
    )
    move, bend = system.unpack(solution[0])
    full = np.zeros_like(equations.bent)
    full[free] = bend
    return Adjustment(move, full, float(solution[3]) ** 2)


class _System:
    """The equations in variables in which every block of unknowns alone would be solved in one step.

    Rows are the detections (times two axes), then the priors of the frames, then those of the cameras.
    """

    def __init__(self, equations: Equations, free: Bools) -> None:
        self._equations = equations
        self._root = np.sqrt(equations.weight)
        self._total = np.bincount(equations.star, equations.weight)
        self._slot = np.where(free, np.cumsum(free) - 1, -1)  # where a camera's distortion is among the unknowns
        self._frames = len(equations.width)
        gram = _frame_grams(equations) + np.eye(3) / equations.width[:, :, None] ** 2
        # With the Cholesky factor L of a block, x = L^-T y turns the block into the unit matrix.
        self.frame_scale = np.swapaxes(np.linalg.inv(np.linalg.cholesky(gram)), 1, 2)
        scales = [_bend_scale(equations, k) for k in np.flatnonzero(free).tolist()]
        self.bend_scale = np.reshape(scales, (-1, TERMS, TERMS))
        width = equations.width[:, :, None]
        right = equations.miss * self._root[:, None]
        _take_means(equations.star, self._root, self._total, right)
        self.right = np.concatenate(
            [right.ravel(), (-equations.moved / width).ravel(), (-equations.bent[free] / _BEND_PRIOR).ravel()]
        )
        self.shape = (len(self.right), 6 * self._frames + 2 * TERMS * int(free.sum()))

    def unpack(self, unknowns: Floats) -> tuple[Floats, Floats]:
        """Moves ``(F, 3, 2)`` and distortions ``(free, 9, 2)``, pixels."""
        split = 6 * self._frames
        move, bend = unknowns[:split].reshape(-1, 3, 2), unknowns[split:].reshape(-1, TERMS, 2)
        return self.frame_scale @ move, self.bend_scale @ bend

    def forward(self, unknowns: Floats) -> Floats:
        """What the rows say of the unknowns."""
        e, n = self._equations, len(self._root)
        move, bend = self.unpack(unknowns)
        made = np.empty(self.shape[0])
        rows = made[: 2 * n].reshape(n, 2)
        _apply(e.frame, e.camera, self._slot, e.place, e.turn, e.terms, self._root, move, bend, rows)
        _take_means(e.star, self._root, self._total, rows)
        made[2 * n :] = np.concatenate([(move / e.width[:, :, None]).ravel(), (bend / _BEND_PRIOR).ravel()])
        return made

    def adjoint(self, values: Floats) -> Floats:
        """The transpose of `forward`."""
        e, n = self._equations, len(self._root)
        rows = values[: 2 * n].reshape(n, 2)  # free of their stars' means already, as `right` and `forward` are
        priors = values[2 * n :]
        move = priors[: 6 * self._frames].reshape(-1, 3, 2) / e.width[:, :, None]
        bend = priors[6 * self._frames :].reshape(-1, TERMS, 2) / _BEND_PRIOR
        _gather(e.frame, e.camera, self._slot, e.place, e.turn, e.terms, self._root, rows, move, bend)
        move = np.swapaxes(self.frame_scale, 1, 2) @ move
        bend = np.swapaxes(self.bend_scale, 1, 2) @ bend
        return np.concatenate([move.ravel(), bend.ravel()])


def _bend_scale(equations: Equations, camera: int) -> Floats:
    """``(9, 9)`` the same as the frames' scale for the distortion of one camera, equally in x and y."""
    rows = equations.camera == camera
    terms = equations.terms[rows]
    gram = terms.T @ (terms * equations.weight[rows, None]) + np.eye(TERMS) / _BEND_PRIOR**2
    return np.asarray(np.linalg.inv(np.linalg.cholesky(gram)).T)


def _frame_grams(equations: Equations) -> Floats:
    """``(F, 3, 3)`` normal matrices of the frames by themselves."""
    gram = np.zeros((len(equations.width), 3, 3))
    _add_squares(equations.frame, equations.weight, equations.place, gram)
    return gram


@compiled
def _add_squares(frame, weight, place, gram):  # type: ignore[no-untyped-def]
    """Add every row's place times itself to its frame's matrix."""
    for i in range(len(frame)):
        if frame[i] >= 0:
            own = gram[frame[i]]
            for a in range(3):
                for b in range(3):
                    own[a, b] += weight[i] * place[i, a] * place[i, b]


@compiled
def _apply(frame, camera, slot, place, turn, terms, root, move, bend, out):  # type: ignore[no-untyped-def]
    """Rows ``(n, 2)``: how far moves and distortions shift every detection, times the root of its weight."""
    for i in range(len(frame)):
        f = frame[i]
        x = y = 0.0
        if f >= 0:
            for a in range(3):
                x += place[i, a] * move[f, a, 0]
                y += place[i, a] * move[f, a, 1]
            k = slot[camera[i]]
            if k >= 0:
                along, across = 0.0, 0.0
                for a in range(TERMS):
                    along += terms[i, a] * bend[k, a, 0]
                    across += terms[i, a] * bend[k, a, 1]
                x += turn[f, 0, 0] * along + turn[f, 0, 1] * across
                y += turn[f, 1, 0] * along + turn[f, 1, 1] * across
        out[i, 0], out[i, 1] = root[i] * x, root[i] * y


@compiled
def _gather(frame, camera, slot, place, turn, terms, root, rows, move, bend):  # type: ignore[no-untyped-def]
    """The transpose of `_apply`, added to moves and distortions."""
    for i in range(len(frame)):
        f = frame[i]
        if f < 0:
            continue
        x, y = root[i] * rows[i, 0], root[i] * rows[i, 1]
        for a in range(3):
            move[f, a, 0] += place[i, a] * x
            move[f, a, 1] += place[i, a] * y
        k = slot[camera[i]]
        if k >= 0:
            along = turn[f, 0, 0] * x + turn[f, 1, 0] * y
            across = turn[f, 0, 1] * x + turn[f, 1, 1] * y
            for a in range(TERMS):
                bend[k, a, 0] += terms[i, a] * along
                bend[k, a, 1] += terms[i, a] * across


@compiled
def _take_means(star, root, total, rows):  # type: ignore[no-untyped-def]
    """Free weighted rows of their stars' weighted means, in place."""
    sums = np.zeros((len(total), 2))
    for i in range(len(star)):
        sums[star[i], 0] += root[i] * rows[i, 0]
        sums[star[i], 1] += root[i] * rows[i, 1]
    for i in range(len(star)):
        share = root[i] / total[star[i]]
        rows[i, 0] -= share * sums[star[i], 0]
        rows[i, 1] -= share * sums[star[i], 1]
