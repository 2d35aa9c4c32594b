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
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, lsmr

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
        ``(n, 2, 2)`` frame pixels to the axes of the sky.
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
    frames = len(equations.width)
    gram = _frame_grams(equations) + 1e-9 * np.eye(3)
    rows = equations.frame >= 0
    weighted = equations.weight[rows, None, None] * equations.place[rows, :, None] * equations.miss[rows, None, :]
    right = np.stack(
        [np.bincount(equations.frame[rows], column, frames) for column in weighted.reshape(-1, 6).T], axis=1
    ).reshape(frames, 3, 2)
    covariance = np.linalg.inv(gram)
    return covariance @ right, np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))


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
    full[free] = system.bend_scale @ bend
    return Adjustment(np.swapaxes(system.frame_scale, 1, 2) @ move, full, float(solution[3]) ** 2)


class _System:
    """The equations in variables in which every block of unknowns alone would be solved in one step.

    Rows are the detections (times two axes), then the priors of the frames, then those of the cameras.
    """

    def __init__(self, equations: Equations, free: Bools) -> None:
        n, frames = len(equations.star), len(equations.width)
        root = np.sqrt(equations.weight)
        gram = _frame_grams(equations) + np.eye(3) / equations.width[:, :, None] ** 2
        # With the Cholesky factor L of a block, x = L^-T y turns the block into the unit matrix.
        self.frame_scale = np.linalg.inv(np.linalg.cholesky(gram))
        at = np.maximum(equations.frame, 0)
        place = np.einsum("nij,nj->ni", self.frame_scale[at], equations.place) * root[:, None]
        place[equations.frame < 0] = 0
        columns = (3 * at[:, None] + np.arange(3)).ravel()
        self.place = csr_array((place.ravel(), columns, np.arange(0, 3 * n + 1, 3)), shape=(n, 3 * frames))
        self.place_t = self.place.T.tocsr()
        norm = np.sqrt(np.bincount(equations.star, equations.weight))
        star = csr_array((root / norm[equations.star], equations.star, np.arange(n + 1)), shape=(n, len(norm)))
        self.star, self.star_t = star, star.T.tocsr()
        self.frame_prior = np.swapaxes(self.frame_scale, 1, 2) / equations.width[:, :, None]
        self._prepare_cameras(equations, root, np.flatnonzero(free))
        miss = equations.miss * root[:, None]
        self.right = np.concatenate(
            [
                (miss - self.star @ (self.star_t @ miss)).ravel(),
                (-equations.moved / equations.width[:, :, None]).ravel(),
                (-equations.bent[free] / _BEND_PRIOR).ravel(),
            ]
        )
        self.n, self.frames, self.free = n, frames, int(free.sum())
        self.shape = (len(self.right), 6 * frames + 2 * TERMS * self.free)

    def _prepare_cameras(self, equations: Equations, root: Floats, free: Ints) -> None:
        self.rows, self.terms, self.turn = [], [], []
        self.bend_scale = np.zeros((len(free), TERMS, TERMS))
        for i, k in enumerate(free):
            rows = np.flatnonzero(equations.camera == k)
            terms = equations.terms[rows] * root[rows, None]
            scale = np.linalg.inv(np.linalg.cholesky(terms.T @ terms + np.eye(TERMS) / _BEND_PRIOR**2)).T
            self.bend_scale[i] = scale
            self.rows.append(rows)
            self.terms.append(terms @ scale)
            self.turn.append(equations.turn[rows])

    def unpack(self, unknowns: Floats) -> tuple[Floats, Floats]:
        split = 6 * self.frames
        return unknowns[:split].reshape(self.frames, 3, 2), unknowns[split:].reshape(self.free, TERMS, 2)

    def forward(self, unknowns: Floats) -> Floats:
        move, bend = self.unpack(unknowns)
        rows = self.place @ move.reshape(-1, 2)
        for at, terms, turn, b in zip(self.rows, self.terms, self.turn, bend, strict=True):
            rows[at] += np.einsum("nij,nj->ni", turn, terms @ b)
        rows -= self.star @ (self.star_t @ rows)
        return np.concatenate(
            [rows.ravel(), (self.frame_prior @ move).ravel(), (self.bend_scale @ bend / _BEND_PRIOR).ravel()]
        )

    def adjoint(self, values: Floats) -> Floats:
        a, b = 2 * self.n, 2 * self.n + 6 * self.frames
        rows = values[:a].reshape(self.n, 2)  # free of their stars' means already, as `right` and `forward` are
        move = (self.place_t @ rows).reshape(self.frames, 3, 2)
        move += np.swapaxes(self.frame_prior, 1, 2) @ values[a:b].reshape(self.frames, 3, 2)
        bend = np.swapaxes(self.bend_scale, 1, 2) @ values[b:].reshape(self.free, TERMS, 2) / _BEND_PRIOR
        for i, (at, terms, turn) in enumerate(zip(self.rows, self.terms, self.turn, strict=True)):
            bend[i] += terms.T @ np.einsum("nij,ni->nj", turn, rows[at])
        return np.concatenate([move.ravel(), bend.ravel()])


def _frame_grams(equations: Equations) -> Floats:
    """``(F, 3, 3)`` normal matrices of the frames by themselves."""
    frames = len(equations.width)
    rows = equations.frame >= 0
    place, frame = equations.place[rows], equations.frame[rows]
    weighted = place * equations.weight[rows, None]
    gram = np.empty((frames, 3, 3))
    for i in range(3):
        for j in range(3):
            gram[:, i, j] = np.bincount(frame, weighted[:, i] * place[:, j], frames)
    return gram
