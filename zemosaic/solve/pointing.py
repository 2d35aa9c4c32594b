"""Where frames point and how their cameras bend the sky: the numbers that global refinement adjusts.

A frame is described by the direction it looks in, a 2x2 matrix from pixels to the plane that touches the sky there, and
the distortion of its camera, which all frames of that camera share: a TAN-SIP WCS about the frame's centre. All
frames are kept in arrays, so that the sky positions of all their stars are found at once. Directions are unit
vectors in a frame of reference of their own, turned so that the field lies around its pole: there is no
RA 0 and no celestial pole to stumble over.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from astropy.coordinates import SkyCoord
from astropy.wcs import WCS, Sip
from numpy.typing import NDArray

from zemosaic.solve.adjust import TERMS
from zemosaic.sphere import to_vectors

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_POWERS = ((2, 0), (1, 1), (0, 2), (3, 0), (2, 1), (1, 2), (0, 3))  # of x and y in the terms of `Camera.sip_terms`
_GRID = 9  # points a side at which a WCS is compared with another
_VISIBLE = 1e-3  # pixels at the corner: less than this is no distortion


@dataclass(frozen=True)
class Camera:
    """What has one distortion: frames of one instrument and one shape.

    Parameters
    ----------
    instrument : hashable
        As in the observations.
    shape : tuple of int
        ``(ny, nx)``.
    """

    instrument: Hashable
    shape: tuple[int, int]

    @property
    def centre(self) -> Floats:
        """``(2,)`` x and y of the frame's middle, pixels."""
        return (np.array(self.shape[::-1]) - 1) / 2

    @property
    def reach(self) -> float:
        """Half diagonal, pixels."""
        return math.hypot(*self.shape) / 2

    def grid(self) -> Floats:
        """``(n, 2)`` x and y of points spread evenly over the frame, edges included."""
        ny, nx = self.shape
        x, y = np.meshgrid(np.linspace(0, nx - 1, _GRID), np.linspace(0, ny - 1, _GRID))
        return np.stack([x.ravel(), y.ravel()], axis=1)

    def terms(self, offset: Floats) -> Floats:
        """``(n, 9)`` distortion terms at offsets ``(n, 2)`` from the centre (pixels), 1 at the corners at most.

        The first two are x and y themselves: what all frames of the camera have in common that a matrix could do. The
        cubic ones are freed of it (least squares over the frame), so that distortion and matrices can be
        solved for together without fighting each other.
        """
        linear = offset / self.reach
        return np.concatenate([linear, self.sip_terms(offset) - linear @ self._linear_part()], axis=1)

    def sip_terms(self, offset: Floats) -> Floats:
        """``(n, 7)`` quadratic and cubic terms as SIP has them: products of powers."""
        x, y = (offset / self.reach).T
        x2, y2 = x * x, y * y
        return np.stack([x2, x * y, y2, x2 * x, x2 * y, x * y2, y2 * y], axis=1)

    def _linear_part(self) -> Floats:
        """``(2, 7)`` linear fit to every SIP term over the frame: mean of ``x**4`` over that of ``x**2``, and so on."""
        ny, nx = self.shape
        a2, b2 = (nx / 2 / self.reach) ** 2, (ny / 2 / self.reach) ** 2
        return np.array([[0, 0, 0, 0.6 * a2, 0, b2 / 3, 0], [0, 0, 0, 0, a2 / 3, 0, 0.6 * b2]])

    def sip(self, bend: Floats) -> tuple[Floats, Floats]:
        """Matrix ``(2, 2)`` and SIP coefficients ``(7, 2)`` (pixels at the corner) that together do what `bend` does.

        ``u + terms(u) @ bend == matrix @ (u + sip_terms(u) @ coefficients)``.
        """
        matrix = np.eye(2) + (bend[:2] - self._linear_part() @ bend[2:]).T / self.reach
        return matrix, np.linalg.solve(matrix, bend[2:].T).T


@dataclass(frozen=True)
class Pointings:
    """Direction, matrix and distortion of all frames.

    Parameters
    ----------
    cameras : tuple of Camera
    camera : ndarray
        ``(F,)`` which of them took a frame.
    tangent : ndarray
        ``(F, 3)`` directions; NaN for a frame whose place is unknown.
    matrix : ndarray
        ``(F, 2, 2)`` pixels to tangent plane, radians; the plane's axes are those of `tangent_axes`.
    bend : ndarray
        ``(K, 9, 2)`` pixels: what `Camera.terms` are multiplied with, added to a pixel's position.
    """

    cameras: tuple[Camera, ...]
    camera: Ints
    tangent: Floats
    matrix: Floats
    bend: Floats

    @property
    def placed(self) -> NDArray[np.bool_]:
        """``(F,)`` frames whose place is known."""
        return np.isfinite(self.tangent[:, 0])

    @property
    def scale(self) -> Floats:
        """``(F,)`` radians per pixel."""
        m = self.matrix
        return np.sqrt(np.abs(m[:, 0, 0] * m[:, 1, 1] - m[:, 0, 1] * m[:, 1, 0]))

    @property
    def reach(self) -> Floats:
        """``(F,)`` half diagonals, pixels."""
        return np.array([camera.reach for camera in self.cameras])[self.camera]

    def plane(self, frame: Ints, offset: Floats, terms: Floats) -> Floats:
        """``(n, 2)`` tangent plane coordinates, radians, of offsets from the centres of frames and their terms."""
        bent, camera = offset.astype(np.float64), self.camera[frame]
        for k in np.flatnonzero(self.bend.any(axis=(1, 2))):
            rows = camera == k
            bent[rows] += terms[rows] @ self.bend[k]
        return turned(self.matrix, frame, bent)

    def sky(self, frame: Ints, offset: Floats, terms: Floats) -> Floats:
        """``(n, 3)`` directions of the same."""
        xi = self.plane(frame, offset, terms)
        axes = tangent_axes(self.tangent)[frame]
        return normalised(self.tangent[frame] + np.einsum("na,nak->nk", xi, axes))

    def moved(self, shift: Floats, stretch: Floats) -> Pointings:
        """Pointings after planes moved by ``shift (F, 2)``, radians, and were changed by ``stretch (F, 2, 2)``."""
        tangent = normalised(self.tangent + np.einsum("fa,fak->fk", shift, tangent_axes(self.tangent)))
        return replace(self, tangent=tangent, matrix=self.matrix + stretch @ self.matrix)

    def grids(self, camera: int) -> tuple[Ints, Floats]:
        """The frames ``(m,)`` of one camera, and directions ``(m, n, 3)`` of its `Camera.grid` in each."""
        one, frames = self.cameras[camera], np.flatnonzero(self.camera == camera)
        offset = one.grid() - one.centre
        n, m = len(offset), len(frames)
        found = self.sky(np.repeat(frames, n), np.tile(offset, (m, 1)), np.tile(one.terms(offset), (m, 1)))
        return frames, found.reshape(m, n, 3)

    def wcs(self, frame: int, turn: Floats) -> WCS:
        """The WCS of one frame: TAN, or TAN-SIP where its camera bends the sky.

        Parameters
        ----------
        frame : int
        turn : ndarray
            ``(3, 3)`` turns ICRS directions into those kept here.
        """
        camera = self.cameras[self.camera[frame]]
        stretch, bend = camera.sip(self.bend[self.camera[frame]])
        axes = tangent_axes(self.tangent[frame]) @ turn
        x, y, z = self.tangent[frame] @ turn
        ra, dec = math.atan2(y, x), math.atan2(z, math.hypot(x, y))
        north = [-math.sin(dec) * math.cos(ra), -math.sin(dec) * math.sin(ra), math.cos(dec)]
        east = [-math.sin(ra), math.cos(ra), 0.0]
        wcs = WCS(naxis=2)
        bent = np.abs(bend).max() > _VISIBLE
        wcs.wcs.ctype = ["RA---TAN-SIP", "DEC--TAN-SIP"] if bent else ["RA---TAN", "DEC--TAN"]
        wcs.wcs.cunit = ["deg", "deg"]
        wcs.wcs.radesys = "ICRS"
        wcs.wcs.crval = math.degrees(ra) % 360, math.degrees(dec)
        wcs.wcs.crpix = camera.centre + 1
        wcs.wcs.cd = np.degrees(np.array([east, north]) @ axes.T @ self.matrix[frame] @ stretch)
        wcs.wcs.lonpole = 180.0  # its default would be 0 at a declination of exactly 90
        if bent:
            wcs.sip = _as_sip(bend, camera)
        wcs.pixel_shape = camera.shape[::-1]
        wcs.wcs.set()
        return wcs


def _as_sip(bend: Floats, camera: Camera) -> Sip:
    """SIP keywords' coefficients, ``A_p_q`` in pixels to the power of ``1 - p - q``."""
    a, b = np.zeros((4, 4)), np.zeros((4, 4))
    for (p, q), (in_x, in_y) in zip(_POWERS, bend, strict=True):
        a[p, q], b[p, q] = in_x / camera.reach ** (p + q), in_y / camera.reach ** (p + q)
    return Sip(a, b, None, None, camera.centre + 1)


def read_pointings(
    wcs: Sequence[WCS | None], shapes: Sequence[tuple[int, int]], instruments: Sequence[Hashable], turn: Floats
) -> Pointings:
    """Pointings that say what WCSs of any projection say, as nearly as one distortion per camera allows.

    Parameters
    ----------
    wcs : sequence of WCS or None
    shapes : sequence of tuple
        ``(ny, nx)`` of the frames.
    instruments : sequence of hashable
    turn : ndarray
        ``(3, 3)`` turns ICRS directions into those to be kept.
    """
    keys = [Camera(instrument, (shape[0], shape[1])) for instrument, shape in zip(instruments, shapes, strict=True)]
    cameras = tuple(dict.fromkeys(keys))
    number = {camera: k for k, camera in enumerate(cameras)}
    camera = np.array([number[key] for key in keys], np.int64)
    tangent, matrix = np.full((len(keys), 3), np.nan), np.full((len(keys), 2, 2), np.nan)
    bend = np.zeros((len(cameras), TERMS, 2))
    for k, one in enumerate(cameras):
        planes = {}
        for f in np.flatnonzero(camera == k).tolist():
            found = _tangent_plane(wcs[f], one, turn)
            if found is not None:
                tangent[f], planes[f] = found
        offset = one.grid() - one.centre
        terms = one.terms(offset)
        if planes:
            typical = np.median([_bend_of(plane, offset, terms) for plane in planes.values()], axis=0)
            bend[k] = typical if np.abs(typical).max() > _VISIBLE else 0
        for f, plane in planes.items():
            matrix[f] = np.linalg.lstsq(offset + terms @ bend[k], plane, rcond=None)[0].T
    return Pointings(cameras, camera, tangent, matrix, bend)


def _tangent_plane(wcs: WCS | None, camera: Camera, turn: Floats) -> tuple[Floats, Floats] | None:
    """Direction ``(3,)`` of a frame's centre and ``(n, 2)`` its grid on the plane that touches the sky there."""
    if wcs is None:
        return None
    middle = sky_directions(wcs, camera.centre[None])[0] @ turn.T
    grid = sky_directions(wcs, camera.grid()) @ turn.T
    depth = grid @ middle
    if not (depth > 0).all():  # it is undefined somewhere on the frame
        return None
    return middle, grid @ tangent_axes(middle).T / depth[:, None]


def _bend_of(plane: Floats, offset: Floats, terms: Floats) -> Floats:
    """``(9, 2)`` distortion, pixels, of one frame by itself: what its matrix cannot do."""
    fit = np.linalg.lstsq(np.c_[offset, terms[:, 2:]], plane, rcond=None)[0]
    return np.concatenate([np.zeros((2, 2)), np.linalg.solve(fit[:2].T, fit[2:].T).T])


def sky_directions(wcs: WCS, pixels: Floats) -> Floats:
    """``(n, 3)`` ICRS directions of pixel positions ``(n, 2)``, counted from 0; NaN where there is none."""
    if wcs.wcs.lngtyp == "RA" and wcs.wcs.radesys in ("", "ICRS", "FK5"):
        return to_vectors(*wcs.all_pix2world(pixels, 0).T)
    sky: SkyCoord = wcs.pixel_to_world(*pixels.T)
    return np.asarray(sky.icrs.cartesian.xyz.value.T)


def rms_length(vectors: Floats) -> float:
    """Root of the mean squared length of vectors ``(n, k)``."""
    return math.sqrt(float((vectors**2).sum(axis=1).mean()))


def normalised(vectors: Floats) -> Floats:
    """Vectors of length one, ``(..., 3)``."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def turned(matrices: Floats, which: Ints, vectors: Floats) -> Floats:
    """Vectors ``(n, 2)`` times those of the matrices ``(m, 2, 2)`` whose numbers are given, ``(n,)``."""
    (xx, xy), (yx, yy) = np.moveaxis(matrices, 0, -1)
    x, y = vectors.T
    return np.stack([xx[which] * x + xy[which] * y, yx[which] * x + yy[which] * y], axis=1)


def tangent_axes(direction: Floats) -> Floats:
    """Two axes at right angles to directions, ``(..., 2, 3)``: those of the pole, carried there along a great circle.

    They turn smoothly from place to place everywhere but at the opposite pole.
    """
    x, y, z = np.moveaxis(direction, -1, 0)
    down = 1 + z
    return np.stack(
        [np.stack([1 - x * x / down, -x * y / down, -x], -1), np.stack([-x * y / down, 1 - y * y / down, -y], -1)], -2
    )


def turn_to_pole(directions: Floats) -> Floats:
    """``(3, 3)`` rotation of directions ``(n, 3)`` that brings their middle to the pole, none near the opposite one."""
    mean = directions.sum(axis=0)
    length = np.linalg.norm(mean)
    candidates = [*([mean / length] if length > 1e-3 else []), *np.eye(3), *-np.eye(3)]
    pole = next((c for c in candidates if (directions @ c).min(initial=1) > -0.9), None)
    if pole is None:  # frames all over the sky
        pole = max(candidates, key=lambda c: float((directions @ c).min()))
    side = np.cross(pole, np.eye(3)[np.argmin(np.abs(pole))])
    side /= np.linalg.norm(side)
    return np.stack([side, np.cross(pole, side), pole])
