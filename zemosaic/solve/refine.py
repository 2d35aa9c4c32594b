"""One consistent astrometry: all frames refitted at once to the catalogue that their own stars make up.

Frames solved one by one agree to 0.1 or 0.2 pixels; a stack deserves better. The detections of all frames are merged
into one catalogue of mean positions, tied to a reference catalogue where frames match it, and every frame is fitted to
that: shift, rotation, scale and shear of its own, one distortion for all frames of a camera. Frames whose
WCS contradicts the others are found and placed anew by their neighbours, and a WCS that is as good as
what could be found out about it is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray

from zemosaic.solve.field import CLIP, FIRST_RADIUS, VISIBLE, Field, Merged, Observation, ReferenceCatalogue
from zemosaic.solve.merge import means
from zemosaic.solve.pointing import normalised, rms_length, sky_directions, tangent_axes

__all__ = ["Distortion", "Observation", "RefinedFrame", "Refinement", "refine"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
State = Literal["kept", "refined", "rescued", "wrong", "alone"]

_RADII = (FIRST_RADIUS, 3.0, 2.0, 1.5)  # pixels within which detections are one star, pass by pass
_LAST_RADII = (3.0, 1.5)  # the same after frames were placed
_SIGNIFICANT = 3.0  # formal errors a correction must exceed
_FEWEST_MATCHED = 4  # stars below which nothing is said about a frame
_PARTS = 3  # a frame is divided into as many by as many parts to see how well it agrees locally
_FEWEST_IN_PART = 5


@dataclass(frozen=True, eq=False)
class RefinedFrame:
    """What became of one frame.

    Parameters
    ----------
    wcs : WCS or None
        TAN or TAN-SIP if it was changed, else the one that came in, to the last bit; `pixel_shape` is set.
    residual : float
        rms distance of its stars from the merged catalogue, pixels; NaN without any.
    matched : int
        Stars that count.
    state : {"kept", "refined", "rescued", "wrong", "alone"}
        *kept*: right as it was; *refined*: corrected; *rescued*: was wrong or missing and was placed among its
        neighbours; *wrong*: contradicts them and could not be placed; *alone*: nothing to compare it with.
    """

    wcs: WCS | None
    residual: float
    matched: int
    state: State


@dataclass(frozen=True)
class Distortion:
    """What all frames of one camera share.

    Parameters
    ----------
    instrument : hashable
    shape : tuple of int
        ``(ny, nx)``; the centre of the distortion is the middle.
    corner : float
        Largest displacement at a corner, pixels.
    """

    instrument: Hashable
    shape: tuple[int, int]
    corner: float


@dataclass(frozen=True, eq=False)
class Refinement:
    """Result of `refine`.

    Parameters
    ----------
    frames : tuple of RefinedFrame
        In the order of the observations.
    median, p95 : float
        How well frames agree: median and 95th percentile, over the ninths of all frames, of the distance between the
        merged catalogue and the mean of the stars there, pixels; NaN if there are too few stars. A
        part with n stars adds the noise of its mean, 1/sqrt(n) of a star's.
    absolute : float
        rms distance of merged stars from the reference catalogue, arcsec, proper motion included; NaN without.
    anchors : int
        Stars that this was taken from.
    distortions : tuple of Distortion
        Of the cameras that bend the sky.
    """

    frames: tuple[RefinedFrame, ...]
    median: float
    p95: float
    absolute: float
    anchors: int
    distortions: tuple[Distortion, ...]


def refine(observations: Sequence[Observation], catalogue: ReferenceCatalogue | None = None) -> Refinement:
    """Make all frames agree, and agree with the catalogue.

    Parameters
    ----------
    observations : sequence of Observation
        Frames in any order; islands that do not touch are fine.
    catalogue : catalogue or None
        Reference positions. Without, or where no frames match it, the mean of the input WCSs says where
        everything is.

    Returns
    -------
    Refinement
    """
    field = Field(observations, catalogue)
    field.find_wrong()
    for radius in _RADII:
        field.adjust_all(radius)
    if field.place_lost():
        for radius in _LAST_RADII:
            field.adjust_all(radius)
    return _result(field)


def _result(field: Field) -> Refinement:
    """The frames as they are now, those that were right all along as they came."""
    changed = _to_change(field)
    rows = np.flatnonzero((field.trusted & field.now.placed)[field.frame])
    merged = field.tie(rows, _final_directions(field, rows, changed), _RADII[-1])
    square, good = _residuals(field, merged)
    frame = merged.frame[good]
    matched = np.bincount(frame, minlength=field.frames)
    total = np.bincount(frame, square[good], field.frames)
    residual = np.sqrt(total / np.maximum(matched, 1)) * field.unit / field.now.scale
    frames = []
    for f, observation in enumerate(field.observations):
        state = _state(field, f, int(matched[f]), bool(changed[f]))
        wcs = field.now.wcs(f, field.turn) if changed[f] else _with_shape(observation.wcs, observation.shape)
        told = state not in ("wrong", "alone")
        frames.append(RefinedFrame(wcs, float(residual[f]) if told else math.nan, int(matched[f]) * told, state))
    median, p95 = _local_agreement(field, merged, good)
    absolute, anchors = _absolute(merged)
    return Refinement(tuple(frames), median, p95, absolute, anchors, _distortions(field))


def _state(field: Field, f: int, matched: int, changed: bool) -> State:
    if field.rescued[f]:
        return "rescued"
    if field.wrong[f]:
        return "wrong"
    if matched < _FEWEST_MATCHED:
        return "alone"
    return "refined" if changed else "kept"


def _to_change(field: Field) -> Bools:
    """``(F,)`` frames whose WCS is off by more than is worth mentioning and by more than could be noise.

    Where the WCSs as a whole are off by more than noise (they were solved one by one), any correction is likelier right
    than none: frames of few stars would otherwise stay as they came.
    """
    merged = field.merge(_RADII[-1])
    count = np.bincount(merged.frame[merged.frame >= 0], minlength=field.frames)
    change = field.rescued.copy()
    known = field.trusted & field.now.placed & ~field.rescued & (count >= _FEWEST_MATCHED)
    scale = field.now.scale
    for k, camera in enumerate(field.now.cameras):
        for f, after in zip(*field.now.grids(k), strict=True):
            wcs = field.observations[f].wcs
            if not known[f] or wcs is None:
                continue
            before = sky_directions(wcs, camera.grid()) @ field.turn.T
            correction = rms_length(after - before) / scale[f]
            # Three numbers an axis are fitted; each adds the variance of the mean.
            error = field.noise[f] * field.unit / scale[f] * math.sqrt(6 / count[f])
            change[f] = correction > (VISIBLE if field.uneven else max(VISIBLE, _SIGNIFICANT * error))
    return change


def _final_directions(field: Field, rows: Ints, changed: Bools) -> Floats:
    """``(n, 3)`` directions of detections by the WCSs that are handed out."""
    direction = field.directions(rows)
    frame = field.frame[rows]
    starts = np.searchsorted(frame, np.arange(field.frames + 1))  # detections come frame by frame
    for f in np.unique(frame[~changed[frame]]).tolist():
        own = slice(starts[f], starts[f + 1])
        centre = field.now.cameras[field.now.camera[f]].centre
        direction[own] = sky_directions(field.observations[f].wcs, field.offset[rows[own]] + centre) @ field.turn.T
    return direction


def _residuals(field: Field, merged: Merged) -> tuple[Floats, Bools]:
    """``(n,)`` squared distances from the merged stars (`unit` squared), and the detections that are not far off."""
    good = merged.frame >= 0
    weight = np.ones(len(good))
    square = np.zeros(len(good))
    for _ in range(3 if good.any() else 0):
        centre = normalised(means(merged.star, merged.direction, weight))
        square = ((centre[merged.star] - merged.direction) ** 2).sum(axis=1) / field.unit**2
        noise = field.estimate_noise(merged.frame, square)
        good = square < 2 * CLIP**2 * noise**2
        weight = np.where(good, 1, 1e-3) / noise**2
    return square, good & (merged.frame >= 0)


def _local_agreement(field: Field, merged: Merged, good: Bools) -> tuple[float, float]:
    """Median and 95th percentile of the mean distance in parts of frames, see `Refinement`."""
    if not good.any():
        return math.nan, math.nan
    centre = normalised(means(merged.star, merged.direction, np.where(good, 1, 1e-9)))
    star, frame = merged.star[good], merged.frame[good]
    apart = np.einsum("nk,nak->na", centre[star] - merged.direction[good], tangent_axes(centre)[star])
    size = np.array([camera.shape[::-1] for camera in field.now.cameras])[field.now.camera[frame]]
    column, row = np.clip((field.offset[merged.row[good]] / size + 0.5) * _PARTS, 0, _PARTS - 1e-6).astype(int).T
    part = (frame * _PARTS + column) * _PARTS + row
    count = np.bincount(part)
    enough = count >= _FEWEST_IN_PART
    if not enough.any():
        return math.nan, math.nan
    apart /= field.now.scale[frame][:, None]
    distance = np.hypot(*(np.bincount(part, along)[enough] / count[enough] for along in apart.T))
    return float(np.median(distance)), float(np.percentile(distance, 95))


def _absolute(merged: Merged) -> tuple[float, int]:
    """rms distance of merged stars from the reference, arcsec, without gross errors, and how many they are."""
    own = merged.frame >= 0
    if own.all():
        return math.nan, 0
    centre = normalised(means(merged.star[own], merged.direction[own]))
    distance = np.linalg.norm(centre[merged.star[~own]] - merged.direction[~own], axis=1)
    distance = distance[distance <= 4 * np.median(distance)]
    return math.degrees(rms_length(distance[:, None])) * 3600, len(distance)


def _distortions(field: Field) -> tuple[Distortion, ...]:
    found = []
    for k, camera in enumerate(field.now.cameras):
        half = np.array(camera.shape[::-1]) / 2
        corners = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]]) * half
        bend = camera.sip(field.now.bend[k])[1]
        corner = float(np.linalg.norm(camera.sip_terms(corners) @ bend, axis=1).max())
        if field.trusted[field.now.camera == k].any() and corner > VISIBLE:
            found.append(Distortion(camera.instrument, camera.shape, corner))
    return tuple(found)


def _with_shape(wcs: WCS | None, shape: tuple[int, int]) -> WCS | None:
    """The same WCS, knowing the size of its image."""
    if wcs is not None and wcs.pixel_shape != tuple(shape[::-1]):
        wcs = wcs.deepcopy()
        wcs.pixel_shape = shape[::-1]
    return wcs
