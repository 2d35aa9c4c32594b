"""What the frames of a night tell of each other: how clear the sky was, how even, and whether a WCS is right.

Frames that see the same stars are compared star by star, so that a panel of sparse sky or bright nebula is not
mistaken for a cloud.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from zemosaic.canvas import pixel_scale
from zemosaic.frames import Frame
from zemosaic.levels import match_positions, solve_common
from zemosaic.measure import FrameMeasure
from zemosaic.sphere import to_vectors

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

CLEAR = 0.72  # share of its light below which a frame is dimmed: see docs/quality.md

_NIGHT_GAP = timedelta(hours=6)  # without a frame, that parts two nights
_MATCH_RADIUS = 3.0  # px between two sightings of a star
_AROUND = 20  # frames of the same field that a frame is compared with, at most
_SAME_STARS, _SAME_SKY = 0.5, 0.15  # distance of frames, in short sides, up to which they see much the same
_FEW_AROUND = 3  # fewer are no field to be compared with
_FLUX_FLOOR = 0.02  # relative error of any flux: flat field, sampling
_SURE_FLUX = 0.05  # relative error up to which a flux tells of a cloud's structure
_MIN_FLUXES = 2  # shared stars below which a transparency is unknown
_MIN_PATCHY, _MIN_OFFSETS = 10, 5  # stars below which their scatter, and their median distance, mean nothing
_POINTS = 6  # raster in a frame, a side, on which the frames are counted
_SPARSE = 3  # sound frames below which nothing of a field is given away
_SPARE_SHARE = 0.2  # of a dimmed frame's sky that needs it, from which it stays


@dataclass(frozen=True)
class Comparison:
    """The frames of a night against each other; arrays ``(F,)``, NaN where there is nothing to compare.

    Parameters
    ----------
    transparency : ndarray
        Share of their light that a frame's stars have, 1 = as in the clear frames that it shares stars with.
    patchiness : ndarray
        Half the central 68 % range of that share among the frame's stars, ln units.
    unevenness : ndarray
        `FrameMeasure.structure` in units of the median of the frames that aim at the same place.
    placed : ndarray
        Share of a frame's stars that other frames see at the same place, in units of the median of the frames
        around.
    offset : ndarray
        Median distance of a frame's stars from where the others see them, px.
    """

    transparency: FloatArray
    patchiness: FloatArray
    unevenness: FloatArray
    placed: FloatArray
    offset: FloatArray


def nights(frames: Sequence[Frame]) -> list[str]:
    """Which frames are to be compared: those of one camera, its setting, filter and exposure, within one night.

    Returns
    -------
    list of str
        A label per frame: instrument and start of its night. A night ends where no frame was taken for 6 hours.
    """
    labels = [""] * len(frames)
    kinds: dict[tuple[object, ...], list[int]] = {}
    for i, f in enumerate(frames):
        exposure = None if f.exposure is None else round(f.exposure, 1)
        kinds.setdefault((f.instrument, f.filter, f.gain, exposure, f.shape, f.colour), []).append(i)
    for number, members in enumerate(kinds.values(), start=1):
        last: datetime | None = None
        start = ""
        for i in sorted(members, key=lambda k: frames[k].date_obs):
            now = _instant(frames[i].date_obs)
            if now is not None and (last is None or now - last > _NIGHT_GAP):
                start = frames[i].date_obs[:16]
            last = now or last
            kind = f"#{number}" if len(kinds) > 1 else ""
            labels[i] = " ".join(part for part in (frames[i].instrument, start, kind) if part)
    return labels


def _instant(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text[:19])
    except ValueError:
        return None


def compare(frames: Sequence[Frame], measures: Sequence[FrameMeasure]) -> Comparison:
    """Compare the frames of one night.

    Parameters
    ----------
    frames : sequence of Frame
        Those without a WCS are compared with none.
    measures : sequence of FrameMeasure
        In the same order.

    Returns
    -------
    Comparison
    """
    result = Comparison(*np.full((5, len(frames)), math.nan))
    placed = [i for i, f in enumerate(frames) if f.wcs is not None]
    if len(placed) < 2:
        return result
    some, theirs = [frames[i] for i in placed], [measures[i] for i in placed]
    project = _tangent_plane(some, float(np.median([pixel_scale(f.wcs) for f in some])))
    seen = _sightings(some, theirs, project)
    result.transparency[placed], result.patchiness[placed] = _light(seen)
    share, result.offset[placed] = _places(seen)
    structure = np.array([m.structure for m in theirs])
    with np.errstate(divide="ignore", invalid="ignore"):
        result.placed[placed] = share / _median_around(share, _around(some, project, _SAME_STARS))
        result.unevenness[placed] = structure / _median_around(structure, _around(some, project, _SAME_SKY))
    return result


# --- the plane ----------------------------------------------------------------------------------------------

_Project = Callable[[FloatArray], FloatArray]


def _tangent_plane(frames: Sequence[Frame], scale: float) -> _Project:
    """Gnomonic projection about the middle of some frames: unit vectors ``(..., 3)`` to px ``(..., 2)`` of `scale`."""
    middle = np.mean(_centres(frames), axis=0)
    middle /= np.linalg.norm(middle)
    east = np.cross([0.0, 0.0, 1.0] if abs(middle[2]) < 0.9 else [1.0, 0.0, 0.0], middle)
    east /= np.linalg.norm(east)
    axes = np.stack([east, np.cross(middle, east)], axis=1) * math.degrees(1) * 3600 / scale
    return lambda vectors: vectors @ axes / np.maximum(vectors @ middle, 1e-3)[..., None]


def _centres(frames: Sequence[Frame]) -> FloatArray:
    """Unit vectors ``(F, 3)`` of the frames' middles."""
    return np.concatenate([_on_sky(f, *(np.array([(n - 1) / 2]) for n in f.shape[::-1])) for f in frames])


def _on_sky(frame: Frame, x: FloatArray, y: FloatArray) -> FloatArray:
    """Unit vectors of pixel positions."""
    assert frame.wcs is not None
    return to_vectors(*frame.wcs.all_pix2world(x, y, 0))


# --- stars --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sightings:
    """All stars of `frames` frames on one tangent plane; arrays ``(n,)``, ordered by frame, positions in px."""

    frames: int
    star: IntArray
    frame: IntArray
    x: FloatArray
    y: FloatArray
    flux: FloatArray
    error: FloatArray
    clean: NDArray[np.bool_]


def _sightings(frames: Sequence[Frame], measures: Sequence[FrameMeasure], project: _Project) -> _Sightings:
    stars = [m.stars for m in measures]
    frame = np.repeat(np.arange(len(frames)), [len(s) for s in stars])
    x, y = project(np.concatenate([_on_sky(f, s.x, s.y) for f, s in zip(frames, stars, strict=True)])).T
    star = match_positions(x, y, _MATCH_RADIUS)
    # Two matches in one frame mean a blend.
    _, inverse, count = np.unique(star * len(frames) + frame, return_inverse=True, return_counts=True)
    once = count[inverse] == 1
    flux = np.concatenate([s.flux.sum(axis=1) for s in stars])
    error = np.concatenate([np.sqrt((s.error**2).sum(axis=1)) for s in stars])
    clean = np.concatenate([s.clean for s in stars])
    return _Sightings(len(frames), *(a[once] for a in (star, frame, x, y, flux, error, clean)))


def _light(seen: _Sightings) -> tuple[FloatArray, FloatArray]:
    """Transparency and patchiness of every frame, ``(F,)``.

    For every star seen in several frames ln(flux) = star + ln(transparency of the frame); all are solved at once.
    """
    use = seen.clean & (seen.flux > 5 * seen.error)
    star, frame, flux = seen.star[use], seen.frame[use], seen.flux[use]
    transparency, patchiness = np.full((2, seen.frames), math.nan)
    if not len(star):
        return transparency, patchiness
    value: FloatArray = np.log(flux)
    sigma = np.hypot(seen.error[use] / flux, _FLUX_FLOOR)
    loose = np.ones((seen.frames, 1))
    solution = solve_common(star, frame, np.ones((len(star), 1)), value, sigma, 0 * loose, loose)
    ln = solution.unknowns[:, 0]
    known = solution.observations >= _MIN_FLUXES
    for group in np.unique(solution.group[known]):
        members = np.flatnonzero(known & (solution.group == group))
        transparency[members] = np.exp(ln[members]) / _clear_level(np.exp(ln[members]))
    own = value - ln[frame]
    rest = own - _star_medians(star, own)
    sure = (sigma < _SURE_FLUX) & (np.bincount(star)[star] >= 3)
    for i, mine in _by_frame(frame[sure], rest[sure]):
        if len(mine) >= _MIN_PATCHY:
            low, high = np.percentile(mine, (16, 84))  # half the stars under a cloud leave a median deviation of 0
            patchiness[i] = (high - low) / 2
    return transparency, patchiness


def _clear_level(values: FloatArray) -> float:
    """Typical transparency of the frames that are not dimmed: the median of all above `CLEAR` times itself."""
    level = float(np.median(values))
    for _ in range(20):
        level = float(np.median(values[values > CLEAR * level]))
    return level


def _star_medians(star: IntArray, value: FloatArray) -> FloatArray:
    """For every sighting the (upper) median over all sightings of its star, ``(n,)``."""
    order = np.lexsort((value, star))
    _, first, inverse, count = np.unique(star[order], return_index=True, return_inverse=True, return_counts=True)
    out = np.empty(len(star))
    out[order] = value[order][first + count // 2][inverse]
    return out


def _by_frame(frame: IntArray, value: FloatArray) -> Iterator[tuple[int, FloatArray]]:
    """The values of every frame that has any; `frame` is ``(n,)`` ascending, `value` ``(n,)``."""
    which, first = np.unique(frame, return_index=True)
    if len(which):
        yield from zip(which.tolist(), np.split(value, first[1:]), strict=True)


def _places(seen: _Sightings) -> tuple[FloatArray, FloatArray]:
    """Share of a frame's stars that others see at the same place, and their median distance in px, ``(F,)``."""
    offset = np.full(seen.frames, math.nan)
    total = np.bincount(seen.frame, minlength=seen.frames)
    times = np.bincount(seen.star)[seen.star] if len(seen.star) else seen.star
    share = np.bincount(seen.frame, times > 1, minlength=seen.frames) / np.where(total, total, math.nan)
    often = times >= 3
    star, n = seen.star[often], times[often]
    away = [(np.bincount(star, p)[star] - n * p) / (n - 1) for p in (seen.x[often], seen.y[often])]
    for i, mine in _by_frame(seen.frame[often], np.hypot(*away)):
        if len(mine) >= _MIN_OFFSETS:
            offset[i] = np.median(mine)
    return share, offset


def _around(frames: Sequence[Frame], project: _Project, sides: float) -> IntArray:
    """The nearest frames whose middle is less than so many short sides away, ``(F, k)``; F stands for none."""
    count = len(frames)
    reach = sides * float(np.median([min(f.shape) for f in frames]))
    centre = project(_centres(frames))
    nearest = cKDTree(centre).query(centre, k=min(_AROUND + 1, count), distance_upper_bound=reach)[1]
    return np.where(nearest == np.arange(count)[:, None], count, nearest)


def _median_around(values: FloatArray, around: IntArray) -> FloatArray:
    """Median of the frames around, NaN where fewer than three have a value, ``(F,)``."""
    table = np.append(values, math.nan)[around]
    enough = np.isfinite(table).sum(axis=1) >= _FEW_AROUND
    out = np.full(len(values), math.nan)
    out[enough] = np.nanmedian(table[enough], axis=1)
    return out


# --- what must not be lost ----------------------------------------------------------------------------------


def needed(frames: Sequence[Frame], dimmed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which dimmed frames should stay, because too little is left of their field without them.

    A dimmed frame is noisy but does no harm. It stays if over a fifth of its sky fewer than 3 sound frames, or
    fewer sound frames than dimmed ones, see the same place: so a panel that was taken in haze is not lost.

    Parameters
    ----------
    frames : sequence of Frame
        All frames without a fault that must go, each with a WCS.
    dimmed : ndarray
        ``(F,)`` which of them are dimmed.

    Returns
    -------
    ndarray
        ``(F,)`` bool, True for the dimmed frames to keep.
    """
    keep = np.zeros(len(frames), bool)
    if not dimmed.any():
        return keep
    project = _tangent_plane(frames, 1.0)
    maps = np.stack([_to_unit_square(f, project) for f in frames])
    steps = (np.arange(_POINTS) + 0.5) / _POINTS
    raster = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    for i in np.flatnonzero(dimmed):
        points = np.linalg.solve(maps[i, :, :2], (raster - maps[i, :, 2]).T)
        there = maps[:, :, :2] @ points + maps[:, :, 2:]  # (F, 2, n)
        inside: NDArray[np.bool_] = np.all(np.abs(there - 0.5) <= 0.5, axis=1)
        sound, poor = inside[~dimmed].sum(axis=0), inside[dimmed].sum(axis=0)
        keep[i] = (sound < np.maximum(_SPARSE, poor)).mean() > _SPARE_SHARE
    return keep


def _to_unit_square(frame: Frame, project: _Project) -> FloatArray:
    """Affine map ``(2, 3)`` from the tangent plane to a frame's own square, 0..1 along x and y."""
    ny, nx = frame.shape
    corners = np.array([(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
    plane = project(_on_sky(frame, corners[:, 0] * nx - 0.5, corners[:, 1] * ny - 0.5))
    return np.linalg.lstsq(np.c_[plane, np.ones(4)], corners, rcond=None)[0].T
