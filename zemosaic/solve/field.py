"""All frames of a field on their way from where they were thought to be to where they are.

The steps of global refinement, to be called by `refine` in this order: `Field.find_wrong`, `Field.adjust_all` with
ever smaller radii, `Field.place_lost`, and `Field.adjust_all` again if that placed any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from zemosaic.solve.adjust import Adjustment, Equations, adjust, own_moves, shifts
from zemosaic.solve.merge import Consensus, beyond_chance, crowd, label_stars, means, medians, seen_once
from zemosaic.solve.pointing import (
    Pointings,
    normalised,
    read_pointings,
    rms_length,
    sky_directions,
    tangent_axes,
    turn_to_pole,
    turned,
)
from zemosaic.solve.rescue import Targets
from zemosaic.sphere import to_vectors

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

FIRST_RADIUS = 4.0  #: pixels within which detections are first taken for one star
CLIP = 5.0  #: sigmas beyond which a detection does not count
VISIBLE = 0.03  #: pixels rms over a frame: smaller corrections and distortions are not worth making

_COARSEST = 2.0  # pixels are at most so many times larger than the typical one, as far as matching goes
_TARGET_RADIUS = 2.0  # pixels, the same where frames are to be placed
_NEIGHBOURS = 20  # stars around one that tell how often it should have been seen
_SEEN_AGAIN = 0.2  # share of that at which a star is real
_REFERENCE_ERROR = 0.4  # arcsec per axis: position and 25 years of proper motion of a Tycho-2 star
_REFERENCE_RADIUS = 2.0  # arcsec within which a reference star is looked for, at least
_NARROWEST = 0.005  # pixels: frames are never taken to agree better than that beforehand
_UNEVEN = 5.0  # sigmas at which the scatter of all WCSs together is more than noise (exact ones: up to 2, solved: 7 on)
_LOOSE = np.array([1.0, 0.3, 0.3])  # pixels by which a frame placed anew may still be shifted, and be misshapen
_PRECISEST = 0.01  # pixels: no detection is taken to be better
_LEANING = 10  # stars of all frames that a frame's own noise is averaged with
_DISTORTION_GAIN = 70.0  # by which a distortion's eighteen numbers must lower chi squared
_FEWEST_POOLED = 200  # detections that a distortion is fitted to, at least
_SAME_SCALE = 0.03  # by how much the scales of one instrument may differ
_ANY_SCALE = 2.5  # factor by which a scale may be wrong of which no other frame of the instrument tells
_MOST_SUSPECTS = 40  # more groups of frames than that are no mistake but a scattered lot
_PART = 1 << 15  # detections at a time
_MOST_STARS = 200_000  # of all frames: from so many on, only the brightest of each count
_ENOUGH_STARS = 200  # of a frame: they place it to 0.014 px, 400 to 0.010
_CONE = 5.0  # degrees around a frame within which catalogue stars are fetched for all frames at once


@dataclass(frozen=True, eq=False)
class Observation:
    """Stars of one frame.

    Parameters
    ----------
    x, y : ndarray
        ``(n,)`` pixels, 0 at the centre of the first.
    flux : ndarray
        ``(n,)`` brightness in any unit, to order them.
    wcs : WCS or None
        Where the frame is thought to be; None if nobody knows.
    shape : tuple of int
        ``(ny, nx)``.
    instrument : hashable
        The same for all frames that share optics, scale and binning.
    """

    x: Floats
    y: Floats
    flux: Floats
    wcs: WCS | None
    shape: tuple[int, int]
    instrument: Hashable


class Positions(Protocol):
    """Stars with known positions, degrees."""

    @property
    def ra(self) -> Floats: ...
    @property
    def dec(self) -> Floats: ...


class ReferenceCatalogue(Positions, Protocol):
    """Such as `zemosaic.solve.catalogue.Catalogue`."""

    def cone(self, ra: float, dec: float, radius: float) -> Positions: ...


@dataclass(frozen=True)
class Merged:
    """Detections that are tied to others by a common star; those of the reference catalogue come last, with frame -1.

    Parameters
    ----------
    row : ndarray
        ``(n,)`` index of the detection, or of the reference star.
    frame, star : ndarray
        ``(n,)``; stars count from 0 without gaps.
    direction : ndarray
        ``(n, 3)``.
    """

    row: Ints
    frame: Ints
    star: Ints
    direction: Floats


class Field:
    """Frames, their detections, and what is known about them so far.

    Parameters
    ----------
    observations : sequence of Observation
    catalogue : catalogue or None
        Reference positions; dropped where no frames match it.

    Attributes
    ----------
    turn : ndarray
        ``(3, 3)`` turns ICRS directions into those used here.
    given, now : Pointings
        As they came, and as they are.
    frame, offset : ndarray
        ``(n,)`` and ``(n, 2)``: frame of every detection and pixels from its centre.
    trusted, rescued : ndarray
        ``(F,)`` bool: agrees with the others or contradicts nobody; was placed anew.
    uneven : bool
        The WCSs that came in differ among each other by more than noise explains.
    noise : ndarray
        ``(F,)`` scatter of a detection per axis, in `unit`.
    unit : float
        The typical pixel, radians.
    """

    def __init__(self, observations: Sequence[Observation], catalogue: ReferenceCatalogue | None = None) -> None:
        self.observations = observations
        self.frames = len(observations)
        wcs, shapes = [o.wcs for o in observations], [o.shape for o in observations]
        instruments = [o.instrument for o in observations]
        self.turn = turn_to_pole(_middles(observations))
        self.given = self.now = read_pointings(wcs, shapes, instruments, self.turn)
        placed = self.given.placed
        scale = self.given.scale[placed] if placed.any() else np.ones(1)
        self.unit = float(np.median(scale))
        # Matching radii follow the coarser frames, but no few with an absurd scale.
        self._coarsest = min(float(np.percentile(scale, 90)), _COARSEST * self.unit)
        self._list_detections()
        self._reference = np.zeros((0, 3))
        if catalogue is not None and placed.any():
            self._reference = _reference_stars(catalogue, self.given, self.turn)
        self.trusted, self.rescued = placed, np.zeros(self.frames, bool)
        self.uneven, self.noise = False, np.full(self.frames, np.nan)
        self._group, self._sure = np.full(self.frames, -1), np.zeros(self.frames, bool)
        self._moved, self._bent = np.zeros((self.frames, 3, 2)), np.zeros_like(self.given.bend)
        self._free = np.zeros(len(self.given.cameras), bool)
        self._passes = 0

    def _list_detections(self) -> None:
        """The brightest finite detections of all frames in columns."""
        frame, offset, flux, terms = [], [], [], []
        most = max(_ENOUGH_STARS, _MOST_STARS // max(1, self.frames))
        for f, o in enumerate(self.observations):
            camera = self.given.cameras[self.given.camera[f]]
            xy = np.stack([o.x, o.y], axis=1).astype(np.float64)
            light = np.nan_to_num(np.asarray(o.flux, np.float64))
            good = np.flatnonzero(np.isfinite(xy).all(axis=1))
            good = np.sort(good[np.argsort(-light[good], kind="stable")[:most]])
            frame.append(np.full(len(good), f))
            offset.append(xy[good] - camera.centre)
            flux.append(light[good])
            terms.append(camera.terms(offset[-1]))
        self.frame = np.concatenate([np.zeros(0, np.int64), *frame])
        self.offset = np.concatenate([np.zeros((0, 2)), *offset])
        self._flux = np.concatenate([np.zeros(0), *flux])
        self._terms = np.concatenate([np.zeros((0, self.given.bend.shape[1])), *terms])

    @property
    def wrong(self) -> Bools:
        """``(F,)`` frames whose WCS contradicts the others."""
        return (self._group >= 0) & ~self.trusted

    def directions(self, rows: Ints) -> Floats:
        """``(n, 3)`` directions of detections by the pointings as they are now."""

        def sky(part: slice) -> Floats:
            own = rows[part]
            return self.now.sky(self.frame[own], self.offset[own], self._terms[own])

        return _by_parts(sky, len(rows))

    # ------------------------------------------------------------------------------------ who agrees

    def find_wrong(self) -> None:
        """Tell frames that agree with the majority, or with the reference catalogue, from those that do not."""
        radius = FIRST_RADIUS * self._coarsest
        rows = np.flatnonzero(self.now.placed[self.frame])
        direction, frame = self.directions(rows), self.frame[rows]
        star = label_stars(direction, radius)
        centre = normalised(means(star, direction))
        met, chance = np.zeros(len(centre), bool), np.zeros(len(centre))
        if len(self._reference) and len(centre):
            tree = cKDTree(self._reference)
            near = max(radius, _arcsec(_REFERENCE_RADIUS))
            met, chance = tree.query(centre)[0] < near, crowd(tree, centre, near)[0]
        self._sure = beyond_chance(*(np.bincount(frame, each[star], self.frames) for each in (met, chance)))
        verdict = Consensus(frame, star, centre, self.frames, radius).agree(self._sure)
        self.trusted, self._group = verdict.trusted, verdict.group
        # A small field has too few reference stars in any one frame, but perhaps not altogether.
        seen = np.unique(star[self.trusted[frame]])
        if not (self._sure.any() or beyond_chance(met[seen].sum(), chance[seen].sum())):
            self._reference = np.zeros((0, 3))

    def place_lost(self) -> bool:
        """Place frames that are wrong, or nowhere, among those that agree; whether any was."""
        self._unmask_groups()
        lost = [int(f) for f in np.flatnonzero(~self.trusted)]
        while lost:
            targets = self._targets(self.trusted)
            found = [f for f in lost if self._place(f, targets)]
            if not found:
                break
            lost = [f for f in lost if f not in found]
        return bool(self.rescued.any())

    def _unmask_groups(self) -> None:
        """Distrust frames that contradict nobody, being nowhere near the others, but whose stars are theirs."""
        size = np.bincount(self._group[self._group >= 0], minlength=self.frames)
        size[self._group[self._sure]] = self.frames
        company = np.where(self.trusted, size[self._group], 0)
        suspects = np.unique(self._group[self.trusted & (company < company.max(initial=0))])
        stars = np.bincount(self.frame, minlength=self.frames)
        for larger in np.unique(size[suspects]) if len(suspects) <= _MOST_SUSPECTS else ():
            targets = self._targets(self.trusted & (company > larger))
            for g in suspects[size[suspects] == larger]:
                own = self._group == g
                if self._find(int(np.argmax(np.where(own, stars, -1))), targets) is not None:
                    self.trusted = self.trusted & ~own

    def _targets(self, frames: Bools) -> Targets:
        rows = np.flatnonzero((frames & self.now.placed)[self.frame])
        direction = self.directions(rows)
        star = label_stars(direction, _TARGET_RADIUS * self._coarsest)
        centre = normalised(means(star, direction))
        brightness = means(star, np.log(np.maximum(self._flux[rows], 1e-30))[:, None])[:, 0]
        real = _often_seen(centre, np.bincount(star))
        return Targets(centre[real], brightness[real])

    def _place(self, f: int, targets: Targets) -> bool:
        """Try to place one frame; its direction and matrix are set if it worked."""
        place = self._find(f, targets)
        if place is None:
            return False
        tangent, matrix = self.now.tangent.copy(), self.now.matrix.copy()
        tangent[f], matrix[f] = place
        self.now = replace(self.now, tangent=tangent, matrix=matrix)
        self._moved[f] = 0
        self.rescued[f] = self.trusted[f] = True
        return True

    def _find(self, f: int, targets: Targets) -> tuple[Floats, Floats] | None:
        """Direction and matrix of a frame among others' stars, if they are beyond doubt."""
        rows = np.flatnonzero(self.frame == f)
        if not len(targets):
            return None
        camera = self.now.camera[f]
        straight = self.offset[rows] + self._terms[rows] @ self.now.bend[camera]
        return targets.find(self._flux[rows], straight, self.now.cameras[camera], self._possible_scales(f))

    def _possible_scales(self, f: int) -> tuple[float, float]:
        """Smallest and largest scale: that of trusted frames of the instrument, else roughly what its WCS says."""
        instrument = self.observations[f].instrument
        siblings = self.trusted & self.now.placed & [o.instrument == instrument for o in self.observations]
        siblings[f] = False
        if siblings.any():
            scale = float(np.median(self.now.scale[siblings]))
            return (1 - _SAME_SCALE) * scale, (1 + _SAME_SCALE) * scale
        scale = float(self.given.scale[f]) if self.given.placed[f] else self.unit
        return scale / _ANY_SCALE, scale * _ANY_SCALE

    # --------------------------------------------------------------------------------------- merging

    def merge(self, radius: float) -> Merged:
        """Stars of trusted frames, taking detections within `radius` pixels for one."""
        rows = np.flatnonzero((self.trusted & self.now.placed)[self.frame])
        return self.tie(rows, self.directions(rows), radius)

    def tie(self, rows: Ints, direction: Floats, radius: float) -> Merged:
        """Stars that were seen at least twice, the reference catalogue counted."""
        radius = radius * self._coarsest
        star = label_stars(direction, radius)
        once = seen_once(star, self.frame[rows])
        rows, direction, star = rows[once], direction[once], _renumbered(star[once])
        frame = self.frame[rows]
        if len(self._reference) and len(rows):
            reach = max(radius, _arcsec(_REFERENCE_RADIUS))
            distance, nearest = cKDTree(means(star, direction)).query(self._reference, distance_upper_bound=reach)
            order = np.argsort(distance, kind="stable")
            order = order[np.isfinite(distance[order])]
            anchor = order[np.unique(nearest[order], return_index=True)[1]]  # the closest one of every star
            rows, star = np.concatenate([rows, anchor]), np.concatenate([star, nearest[anchor]])
            frame = np.concatenate([frame, np.full(len(anchor), -1)])
            direction = np.concatenate([direction, self._reference[anchor]])
        tied = np.bincount(star)[star] > 1
        return Merged(rows[tied], frame[tied], _renumbered(star[tied]), direction[tied])

    # ------------------------------------------------------------------------------------- adjusting

    def adjust_all(self, radius: float) -> None:
        """One pass: merge what lies within `radius` pixels, and fit all frames to it."""
        merged = self.merge(radius)
        self._passes += 1
        if not len(merged.row):
            return
        equations = self._equations(merged)
        for _ in range(3):
            weight = self._robust_weights(equations, own_moves(equations)[0])
            equations = self._weighted(equations, merged, weight)
        equations = self._without_noise(equations, merged)
        equations = replace(equations, width=self._widths(*own_moves(equations)))
        result = adjust(equations, self._free)
        if self._passes > 1:  # the first brings frames together that are pixels apart
            result = self._free_distortions(equations, result)
        self._moved = self._moved + result.move
        self._bent = self._bent + result.bend
        stretch = np.swapaxes(result.move[:, 1:], 1, 2) * (self.unit / self._half())[:, None, None]
        self.now = replace(self.now.moved(result.move[:, 0] * self.unit, stretch), bend=self.now.bend + result.bend)

    def _half(self) -> Floats:
        """``(F,)`` rms distance of a frame's pixels from its centre along an axis, radians."""
        return np.where(self.now.placed, self.now.scale * self.now.reach / math.sqrt(6), 1.0)

    def _equations(self, merged: Merged) -> Equations:
        """The equations with equal weights, detections being where they were found."""
        n, own = len(merged.row), merged.frame >= 0
        offset = np.zeros((n, 2))
        offset[own] = self.offset[merged.row[own]]
        camera = np.where(own, self.now.camera[merged.frame], -1)
        place, terms = self._design(merged.frame, camera, offset)
        equations = Equations(
            star=merged.star,
            frame=merged.frame,
            place=place,
            turn=self.now.matrix / self.unit,
            terms=terms,
            camera=camera,
            miss=np.zeros((n, 2)),
            weight=np.ones(n),
            moved=self._moved,
            width=np.tile(_LOOSE, (self.frames, 1)),
            bent=self._bent,
        )
        return self._weighted(equations, merged, equations.weight)

    def _without_noise(self, equations: Equations, merged: Merged) -> Equations:
        """The same equations as if every detection were where its star is.

        Noise in the positions that distortions are calculated for would not average out: making all frames smaller
        makes their noise smaller, and where nothing else determines the scale, that would be the best fit.
        """
        own = merged.frame >= 0
        offset = np.zeros_like(equations.miss)
        back = np.linalg.inv(np.where(self.now.placed[:, None, None], equations.turn, np.eye(2)))
        offset[own] = self.offset[merged.row[own]] + turned(back, merged.frame[own], equations.miss[own])
        place, terms = self._design(merged.frame, equations.camera, offset)
        return replace(equations, place=place, terms=terms)

    def _design(self, frame: Ints, camera: Ints, offset: Floats) -> tuple[Floats, Floats]:
        """``(n, 3)`` places and ``(n, 9)`` distortion terms of offsets; 0 for the reference."""
        half, kinds = self._half(), self._terms.shape[1]

        def design(part: slice) -> Floats:
            own, where = frame[part], offset[part]
            terms = np.zeros((len(own), kinds))
            for k, one in enumerate(self.now.cameras):
                rows = camera[part] == k
                terms[rows] = one.terms(where[rows])
            place, rows = np.zeros((len(own), 3)), own >= 0
            place[rows, 0] = 1
            place[rows, 1:] = self.now.plane(own[rows], where[rows], terms[rows]) / half[own[rows], None]
            return np.concatenate([place, terms], axis=1)

        both = _by_parts(design, len(frame))
        return np.ascontiguousarray(both[:, :3]), np.ascontiguousarray(both[:, 3:])

    def _weighted(self, equations: Equations, merged: Merged, weight: Floats) -> Equations:
        """The same equations with other weights, and the common positions that follow from them."""
        centre = normalised(means(merged.star, merged.direction, weight))
        axes = tangent_axes(centre)

        def miss(part: slice) -> Floats:
            star = merged.star[part]
            return np.einsum("nk,nak->na", centre[star] - merged.direction[part], axes[star]) / self.unit

        return replace(equations, miss=_by_parts(miss, len(weight)), weight=weight)

    def _robust_weights(self, equations: Equations, move: Floats) -> Floats:
        """Weights from the scatter of every frame and of the reference; what is far off hardly counts."""
        residual = equations.miss - shifts(equations, move)
        # A detection pulls the mean that it is compared with.
        pull = equations.weight / np.bincount(equations.star, equations.weight)[equations.star]
        square = (residual**2).sum(axis=1) / np.maximum(1 - pull, 0.05)
        noise = self.estimate_noise(equations.frame, square)
        return np.clip(1 - square / (2 * CLIP**2 * noise**2), 1e-3, 1) ** 2 / noise**2

    def estimate_noise(self, frame: Ints, square: Floats) -> Floats:
        """Scatter per axis of the detections' frames, or of the reference; sets `noise`.

        Parameters
        ----------
        frame, square : ndarray
            ``(n,)`` frame (-1 for the reference) and squared distance from the merged star, `unit` squared.

        Returns
        -------
        ndarray
            ``(n,)`` in `unit`. Where a frame has few stars it leans on all others.
        """
        own, half_widths = frame >= 0, 2 * math.log(2)  # median of a squared distance, in variances per axis
        median, count = medians(frame, square, self.frames)
        common = float(np.median(square[own])) if own.any() else 0.0
        self.noise = np.sqrt((median * count + common * _LEANING) / (count + _LEANING) / half_widths)
        noise = np.maximum(self.noise, _PRECISEST)[frame]
        if not own.all():
            anchors = np.count_nonzero(~own)
            expected = (_arcsec(_REFERENCE_ERROR) / self.unit) ** 2
            found = float(np.median(square[~own])) / half_widths
            noise[~own] = math.sqrt((found * anchors + expected * _LEANING) / (anchors + _LEANING))
        return noise

    def _widths(self, move: Floats, error: Floats) -> Floats:
        """``(F, 3)`` how far frames are expected to have to move: as most of them do, beyond what noise explains.

        Exact WCSs stay exact that way, and those of a solver are improved; a frame that stands out may move freely.
        """
        total = np.linalg.norm(self._moved + move, axis=2) / math.sqrt(2)
        known = self.trusted & (error[:, 0] < _LOOSE[0]) & ~self.rescued
        width = np.full(3, _NARROWEST)
        if known.any():
            spread, noise = np.median(total[known] ** 2, axis=0) / math.log(2), np.median(error[known] ** 2, axis=0)
            width = np.sqrt(np.maximum(spread - noise, _NARROWEST**2))
            self.uneven = bool(spread.sum() > noise.sum() * (1 + _UNEVEN / math.sqrt(known.sum())))
        outlying = total > 3 * np.hypot(width, error)
        widths = np.where(outlying, np.maximum(total, width), width)
        return np.where(self.rescued[:, None], np.maximum(widths, _LOOSE), widths)

    def _free_distortions(self, equations: Equations, result: Adjustment) -> Adjustment:
        """Let a camera bend the sky if all its frames together ask for it; the adjustment with those that do."""
        pooled = np.bincount(equations.camera[equations.camera >= 0], minlength=len(self._free))
        for k in np.flatnonzero(~self._free & (pooled >= _FEWEST_POOLED)).tolist():
            free = self._free.copy()
            free[k] = True
            trial = adjust(equations, free)
            camera = self.now.cameras[k]
            effect = camera.terms(camera.grid() - camera.centre) @ trial.bend[k]
            if result.chi2 - trial.chi2 > _DISTORTION_GAIN and rms_length(effect) > VISIBLE:
                self._free, result = free, trial
        return result


def _often_seen(centre: Floats, count: Ints) -> Bools:
    """``(S,)`` stars that were not seen much less often than those around: a false one is in one frame of many."""
    if not len(centre):
        return np.zeros(0, bool)
    near = cKDTree(centre).query(centre, k=range(1, min(_NEIGHBOURS, len(centre)) + 1))[1]
    often: Bools = count >= _SEEN_AGAIN * count[near].max(axis=1)
    return often


def _by_parts(work: Callable[[slice], Floats], rows: int) -> Floats:
    """What `work` makes of all rows, a part at a time, so that what it needs besides stays in the cache."""
    parts = [slice(first, first + _PART) for first in range(0, max(rows, 1), _PART)]
    return np.concatenate([work(part) for part in parts])


def _reference_stars(catalogue: ReferenceCatalogue, pointings: Pointings, turn: Floats) -> Floats:
    """``(R, 3)`` directions of catalogue stars on and around the frames."""
    placed = pointings.placed
    middle, half = pointings.tangent[placed] @ turn, (pointings.reach * pointings.scale)[placed]
    found = []
    left = np.ones(len(middle), bool)
    while left.any():  # few large cones instead of one for every frame
        here = middle[np.argmax(left)]
        apart = np.arccos(np.clip(middle @ here, -1, 1))
        near = left & (apart <= math.radians(_CONE))
        ra, dec = math.degrees(math.atan2(here[1], here[0])) % 360, math.degrees(math.asin(np.clip(here[2], -1, 1)))
        cone = catalogue.cone(ra, dec, math.degrees(float((apart + half)[near].max())))
        found.append(to_vectors(np.asarray(cone.ra), np.asarray(cone.dec)))
        left &= ~near
    directions: Floats = np.unique(np.concatenate(found), axis=0) @ turn.T
    return directions


def _middles(observations: Sequence[Observation]) -> Floats:
    """``(n, 3)`` ICRS directions of the centres of frames that have any."""
    found = [sky_directions(o.wcs, (np.array([o.shape[::-1]]) - 1) / 2) for o in observations if o.wcs is not None]
    middles = np.concatenate([np.zeros((0, 3)), *found])
    return middles[np.isfinite(middles).all(axis=1)]


def _renumbered(label: Ints) -> Ints:
    """The same labels without gaps."""
    return np.unique(label, return_inverse=True)[1].reshape(-1)


def _arcsec(angle: float) -> float:
    return math.radians(angle / 3600)
