"""The global pixel grid: where every frame lies on it, which frames are not of this field, which overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from zemosaic.frames import Camera, Frame
from zemosaic.headers import printable
from zemosaic.settings import Settings
from zemosaic.sphere import separation, to_radec, to_vectors
from zemosaic.tiles import Window

_EDGE_POINTS = 9  # points along each side of a frame that draw its footprint
_SCALE_TOLERANCE = 1.25  # a WCS scale off by more than this factor is a mistake
_SCALE_RANGE = 10.0  # coarser pixels than this many times the usual show nothing of the mosaic, finer ones no sky
_EMPTY_LIMIT = 6.0  # a canvas may be this many times larger than the sky that the frames cover


class CanvasError(Exception):
    """No usable canvas can be made of these frames; the message says why and what to do."""


@dataclass(frozen=True)
class Canvas:
    """The global pixel grid.

    Parameters
    ----------
    wcs : WCS
        TAN, ``pixel_shape`` set.
    shape : tuple of int
        ``(ny, nx)``.
    scale : float
        arcsec per pixel.
    """

    wcs: WCS
    shape: tuple[int, int]
    scale: float

    def window_of(self, frame: Frame) -> Window:
        """Canvas pixels that a frame may touch; an empty window beside the canvas.

        Raises
        ------
        CanvasError
            If a part of the frame is 90 degrees or more from the tangent point, where the plane has no place for it.
        """
        x, y = _project(self.wcs, footprint(frame.wcs, frame.shape))
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise CanvasError(f"{printable(frame.path.name)} looks away from the canvas: run it on its own")
        box = Window(
            *(int(v) for v in (np.floor(y.min()), np.ceil(y.max()) + 1, np.floor(x.min()), np.ceil(x.max()) + 1))
        )
        return box.intersect(Window.of_shape(self.shape))


def pixel_scale(wcs: WCS) -> float:
    """Scale at the reference point, arcsec per pixel: square root of the pixel's area."""
    flat = wcs if wcs.naxis == 2 else wcs.celestial  # `celestial` makes a copy, for nothing in every frame
    return float(np.sqrt(np.abs(np.linalg.det(flat.pixel_scale_matrix)))) * 3600


def footprint(wcs: WCS, shape: tuple[int, int], points: int = _EDGE_POINTS) -> NDArray[np.float64]:
    """Outline of an image on the sky.

    Returns
    -------
    ndarray
        ``(4 * (points - 1), 3)`` unit vectors along the outer pixel edges, in order around the image.
    """
    ny, nx = shape
    t = np.linspace(0, 1, points)[:-1]
    x = np.concatenate([t, np.ones_like(t), 1 - t, np.zeros_like(t)]) * nx - 0.5
    y = np.concatenate([np.zeros_like(t), t, np.ones_like(t), 1 - t]) * ny - 0.5
    return to_vectors(*wcs.all_pix2world(x, y, 0))


def find_strays(frames: Sequence[Frame]) -> list[str]:
    """Frames whose WCS cannot be right or that lie far from the field.

    Returns
    -------
    list of str
        One sentence per frame, empty for a frame that belongs to the field.
    """
    reasons = _scale_problems(frames)
    kept = [i for i, reason in enumerate(reasons) if not reason]
    if not kept:
        return reasons
    outlines = [footprint(frames[i].wcs, frames[i].shape) for i in kept]
    usable = [bool(np.isfinite(outline).all()) for outline in outlines]
    for i, ok in zip(kept, usable, strict=True):
        if not ok:
            reasons[i] = "its WCS does not map the frame's corners onto the sky: solve it again"
    kept = [i for i, ok in zip(kept, usable, strict=True) if ok]
    if not kept:
        return reasons
    outline = np.stack([o for o, ok in zip(outlines, usable, strict=True) if ok])
    centre = outline.mean(axis=1)
    centre /= np.linalg.norm(centre, axis=1, keepdims=True)
    radius = separation(outline, centre[:, None]).max(axis=1)
    group = _linked(centre, radius)
    for i, reason in zip(kept, _far_groups(group, centre, radius), strict=True):
        reasons[i] = reason
    return reasons


def _scale_problems(frames: Sequence[Frame]) -> list[str]:
    """A WCS scale that contradicts the optics in the header or the frames of the same camera, or suits no mosaic."""
    scales = np.array([pixel_scale(f.wcs) for f in frames])
    cameras: dict[Camera, list[float]] = {}
    for frame, scale in zip(frames, scales, strict=True):
        cameras.setdefault(frame.camera, []).append(scale)
    # The lower of the two middle ones: of two halves that contradict each other one must stay.
    usual_of = {camera: sorted(peers)[(len(peers) - 1) // 2] for camera, peers in cameras.items()}
    reasons = []
    for frame, scale in zip(frames, scales, strict=True):
        expected, source = usual_of[frame.camera], "the other frames of this camera have"
        if len(cameras[frame.camera]) < 3 and frame.focal_length and frame.pixel_size:
            expected, source = (
                206.265 * frame.pixel_size / frame.focal_length,
                "its focal length and pixel size give",
            )
        wrong = not 1 / _SCALE_TOLERANCE < scale / expected < _SCALE_TOLERANCE
        reasons.append(f'its WCS says {scale:.2f}"/px but {source} {expected:.2f}"/px: solve it again' if wrong else "")
    kept = [i for i, reason in enumerate(reasons) if not reason]
    usual = sorted(scales[kept])[(len(kept) - 1) // 2] if kept else 0.0
    for i in kept:
        if not 1 / _SCALE_RANGE < scales[i] / usual < _SCALE_RANGE:
            reasons[i] = f'it has {scales[i]:.3g}"/px and most frames have {usual:.3g}"/px: run it on its own'
    return reasons


def _linked(centre: NDArray, radius: NDArray) -> NDArray[np.int64]:
    """Label of the connected group of every frame: two frames are linked if their circles touch.

    Frames that look at the same spot, to an eighth of their radius, are one: ten thousand subs of one
    panel would be 50 million pairs.
    """
    cell = np.floor(centre / (float(np.median(radius)) * np.pi / 180 / 8)).astype(np.int64)
    _, first, member = np.unique(cell, axis=0, return_index=True, return_inverse=True)
    member = member.reshape(-1)
    largest = np.zeros(len(first))
    np.maximum.at(largest, member, radius)
    spot = centre[first]
    reach = 2 * np.sin(np.deg2rad(2 * float(largest.max())) / 2)
    pairs = cKDTree(spot).query_pairs(reach, output_type="ndarray")
    near = separation(spot[pairs[:, 0]], spot[pairs[:, 1]]) <= largest[pairs[:, 0]] + largest[pairs[:, 1]]
    a, b = pairs[near].T
    graph = coo_array((np.ones(len(a)), (a, b)), shape=(len(spot), len(spot)))
    return connected_components(graph, directed=False)[1].astype(np.int64)[member]


def _far_groups(group: NDArray, centre: NDArray, radius: NDArray) -> list[str]:
    """Name the groups that would stretch the canvas over mostly empty sky; the largest group always stays."""
    order = sorted(set(group.tolist()), key=lambda g: (-int((group == g).sum()), int(np.argmax(group == g))))
    kept = group == order[0]
    reasons = [""] * len(group)
    for label in order[1:]:
        both = kept | (group == label)
        middle = centre[both].mean(axis=0)
        middle /= np.linalg.norm(middle)
        extent = float((separation(centre[both], middle) + radius[both]).max())
        covered = float((np.pi * np.minimum(radius, extent) ** 2)[both].sum())
        # Deeply overlapping frames cover far less than the sum of their areas; the extent of each group bounds it.
        spread = sum(_extent(centre[m], radius[m]) ** 2 * np.pi for m in (kept, group == label))
        if extent < 60 and (2 * extent) ** 2 <= _EMPTY_LIMIT * min(covered, spread):
            kept = both
            continue
        away = float(separation(centre[group == label].mean(axis=0), centre[kept].mean(axis=0)))
        for i in np.flatnonzero(group == label):
            reasons[i] = f"it points {away:.1f} deg away from the main field: run it on its own"
    return reasons


def _extent(centre: NDArray, radius: NDArray) -> float:
    middle = centre.mean(axis=0)
    return float((separation(centre, middle / np.linalg.norm(middle)) + radius).max())


def plan_canvas(frames: Sequence[Frame], settings: Settings) -> Canvas:
    """Global TAN canvas over all frames.

    The tangent point is the middle of the union of the footprints, found on the sphere, so that neither RA 0
    nor the poles are special.

    Raises
    ------
    CanvasError
        If the frames span more than a tangent plane can show.
    """
    if not frames:
        raise CanvasError("no frame with a usable WCS is left: solve the frames first")
    outlines = [footprint(f.wcs, f.shape) for f in frames]
    scales = np.array([pixel_scale(f.wcs) for f in frames])
    quantile = {"min": 0.0, "median": 0.5, "max": 1.0}[settings.global_wcs_pixelscale_mode]
    scale = float(settings.global_wcs_res_override or np.quantile(scales, quantile))
    points = np.concatenate(outlines)
    middle = points.mean(axis=0)
    rotation = _median_rotation(frames) if settings.global_wcs_orientation == "median_pc" else 0.0
    for _ in range(2):  # the second pass centres the tangent point on the bounding box
        if separation(points, middle / np.linalg.norm(middle)).max() > 60:
            raise CanvasError("the frames span more than 120 deg of sky: split them into separate runs")
        wcs = _tan(to_radec(middle), scale, rotation)
        x, y = _project(wcs, points)
        box = np.array([(x.min() + x.max()) / 2, (y.min() + y.max()) / 2])
        middle = to_vectors(*wcs.wcs_pix2world(*box, 0))
    pad = settings.global_wcs_padding_percent / 100
    nx, ny = (int(np.ceil(np.ptp(v) * (1 + 2 * pad))) + 2 for v in (x, y))
    # Near a pole the box turns with the tangent point: it is placed where this very plane has it.
    wcs.wcs.crpix = np.array([(nx + 1) / 2, (ny + 1) / 2]) - box
    wcs.wcs.set()
    wcs.pixel_shape = (nx, ny)
    return Canvas(wcs, (ny, nx), scale)


def _tan(centre: tuple[float, float], scale: float, rotation: float) -> WCS:
    """Gnomonic WCS with east to the left, `rotation` degrees of north from the y axis."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.cunit = ["deg", "deg"]
    wcs.wcs.crval = list(centre)
    wcs.wcs.crpix = [1, 1]
    c, s = np.cos(np.deg2rad(rotation)), np.sin(np.deg2rad(rotation))
    wcs.wcs.cd = scale / 3600 * np.array([[-c, s], [s, c]])
    wcs.wcs.radesys = "ICRS"
    wcs.wcs.set()
    return wcs


def _project(wcs: WCS, vectors: NDArray) -> tuple[NDArray, NDArray]:
    ra = np.rad2deg(np.arctan2(vectors[:, 1], vectors[:, 0]))
    dec = np.rad2deg(np.arctan2(vectors[:, 2], np.hypot(vectors[:, 0], vectors[:, 1])))
    x, y = wcs.wcs_world2pix(ra, dec, 0)
    return x, y


def _median_rotation(frames: Sequence[Frame]) -> float:
    """Typical direction of the frames' y axis from north, degrees, folded to a half turn and averaged as vectors."""
    angles = []
    for frame in frames:
        assert frame.wcs is not None
        ny, nx = frame.shape
        x, y = np.full(2, nx / 2), ny / 2 + np.array([0.0, 1.0])
        ra, dec = frame.wcs.all_pix2world(x, y, 0)
        east = ((ra[1] - ra[0] + 180) % 360 - 180) * np.cos(np.deg2rad(dec[0]))
        angles.append(np.arctan2(east, dec[1] - dec[0]))
    doubled = np.exp(2j * np.array(angles))
    return float(np.rad2deg(np.angle(doubled.mean()) / 2))
