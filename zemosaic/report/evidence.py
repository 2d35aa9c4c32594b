"""What the judge gets to see: the mosaic, and as much of its frames as is known.

Everything is in pixels of the mosaic (0-based, x to the right) and in ADU of the common scale, i.e. after the gain of
the frame and of its mega-tile, so that a perfect mosaic agrees with all its frames. `evidence_of_run`
takes it from a run that has just ended; `zemosaic.report.check` builds the same from files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray

from zemosaic.canvas import Canvas, pixel_scale
from zemosaic.cluster import cluster_frames
from zemosaic.coadd import Sub
from zemosaic.frames import Camera, Frame
from zemosaic.ledger import TileRecord
from zemosaic.levels import canvas_nodes, sample_sky
from zemosaic.measure import FrameMeasure
from zemosaic.photometry import Photometry
from zemosaic.stars import Aperture
from zemosaic.tiles import FloatImage, Mosaic
from zemosaic.warp import PixelMap

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SIDE_POINTS = 8  # points along each side of a frame that draw its outline
_NODE_BLOCKS = 2  # spacing of the sky nodes, in blocks of the frames' sky measures
_MOST_SAMPLES = 400_000  # of sky, of all frames: from so many on, the nodes are farther apart
_PANEL_SHARE = 0.25  # of a frame's diagonal: frames whose centres lie nearer make one group where no lots are known


@dataclass(frozen=True)
class FrameFacts:
    """Facts of the frames that are in the mosaic; F frames, C channels.

    Parameters
    ----------
    name : tuple of str
    date : tuple of str
        Start of the exposure, ISO 8601, UTC; "" where unknown.
    lot : ndarray
        ``(F,)`` index of the lot (mega-tile, master tile), as in the ledger; frames without one share one more. Where a
        route has no lots at all, groups of like pointing.
    outline : ndarray
        ``(F, 4 * SIDE_POINTS, 2)`` x, y of points along the outer edge, in order around the frame.
    fwhm, ellipticity, sky : ndarray
        ``(F,)`` mosaic pixels; 0 … 1; ADU as recorded.
    gain, noise, weight : ndarray
        ``(F, C)`` factor that was applied; noise of a photosite after it, ADU; weight in the mean.
    photosites : ndarray
        ``(F, C)`` photosites of each colour to one mosaic pixel.
    """

    name: tuple[str, ...]
    date: tuple[str, ...]
    lot: Ints
    outline: Floats
    fwhm: Floats
    ellipticity: Floats
    sky: Floats
    gain: Floats
    noise: Floats
    weight: Floats
    photosites: Floats

    def __len__(self) -> int:
        return len(self.name)


@dataclass(frozen=True)
class StarFacts:
    """Stars as the frames saw them; n detections.

    Parameters
    ----------
    frame : ndarray
        ``(n,)`` which frame.
    x, y : ndarray
        ``(n,)`` where that frame puts the star on the mosaic.
    flux, error : ndarray
        ``(n, C)`` after gain, ADU summed over mosaic pixels.
    clean : ndarray
        ``(n,)`` bool: isolated and unsaturated.
    aperture : float
        Radius that the fluxes were measured with, mosaic pixels; NaN if unknown.
    """

    frame: Ints
    x: Floats
    y: Floats
    flux: Floats
    error: Floats
    clean: NDArray[np.bool_]
    aperture: float = float("nan")


@dataclass(frozen=True)
class SkyFacts:
    """The sky of the frames at nodes they share; n samples.

    Parameters
    ----------
    frame, node : ndarray
        ``(n,)`` which frame, which node.
    x, y : ndarray
        ``(n,)`` where the node is.
    value : ndarray
        ``(n, C)`` ADU, adjusted as it was stacked.
    error : ndarray
        ``(F, C)`` ADU, of one sample of each frame.
    block_px : int
        Side of the boxes whose medians the samples are interpolated between, mosaic pixels.
    """

    frame: Ints
    node: Ints
    x: Floats
    y: Floats
    value: Floats
    error: Floats
    block_px: int


@dataclass(frozen=True)
class Catalogue:
    """Reference stars: ``(n,)`` degrees ICRS at the epoch of the frames, and magnitudes (NaN where unknown)."""

    ra: Floats
    dec: Floats
    mag: Floats


@dataclass(frozen=True)
class Evidence:
    """What is known of a mosaic; everything but the image may be missing.

    Parameters
    ----------
    image : ndarray
        ``(H, W, 3)`` or ``(H, W)`` float32, ADU, linear, NaN = no data.
    coverage : ndarray, optional
        ``(H, W)`` float32, frames that contributed.
    wcs : WCS, optional
        Celestial, of the image.
    frames, stars, sky : FrameFacts, StarFacts, SkyFacts, optional
        The frames behind it; the other two need the first.
    catalogue : Catalogue, optional
        To compare stars with.
    """

    image: FloatImage
    coverage: FloatImage | None = None
    wcs: WCS | None = None
    frames: FrameFacts | None = None
    stars: StarFacts | None = None
    sky: SkyFacts | None = None
    catalogue: Catalogue | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(ny, nx)``."""
        return self.image.shape[0], self.image.shape[1]

    @property
    def channels(self) -> int:
        """1 or 3."""
        return 1 if self.image.ndim == 2 else self.image.shape[2]

    @property
    def lots(self) -> int:
        """How many lots there are; 0 without frames."""
        return int(self.frames.lot.max(initial=-1)) + 1 if self.frames is not None else 0


class _Job(Protocol):
    @property
    def subs(self) -> Sequence[Sub]: ...
    @property
    def canvas(self) -> Canvas: ...
    @property
    def photometry(self) -> Photometry: ...


class _Intake(Protocol):
    @property
    def measures(self) -> Sequence[FrameMeasure]: ...
    @property
    def aperture(self) -> Aperture: ...
    @property
    def zooms(self) -> Mapping[Camera, float]: ...


class _Outcome(Protocol):
    @property
    def lot(self) -> int: ...
    @property
    def used(self) -> int: ...


class _Made(Protocol):
    @property
    def mosaic(self) -> Mosaic: ...
    @property
    def outcomes(self) -> Sequence[_Outcome]: ...
    @property
    def tiles(self) -> Sequence[TileRecord]: ...


def evidence_of_run(job: _Job, intake: _Intake, made: _Made, catalogue: Catalogue | None = None) -> Evidence:
    """What a run that has just ended knows of its mosaic.

    Parameters
    ----------
    job, intake, made
        `zemosaic_worker.Job`, `zemosaic.intake.Intake` and `zemosaic_worker.RouteResult`: the matched frames, their
        measures in the same order, and what the route handed back.
    catalogue : Catalogue, optional
        Reference stars, if any are at hand.
    """
    tile_gain = {tile.index: tile.gain for tile in made.tiles}
    lots = [outcome.lot for outcome in made.outcomes]
    radius = intake.aperture.radius
    seen = [
        SeenFrame(
            sub.frame,
            measure,
            sub.pixel_map,
            i,
            lot,
            tile_gain.get(lot, 1.0),
            aperture=radius * intake.zooms.get(sub.frame.camera, 1.0),
        )
        for i, (sub, measure, lot, outcome) in enumerate(
            zip(job.subs, intake.measures, lots, made.outcomes, strict=True)
        )
        if outcome.used > 0
    ]
    return gather(made.mosaic, seen, job.photometry, job.canvas, catalogue)


@dataclass(frozen=True)
class SeenFrame:
    """A frame with everything that is known of it.

    Parameters
    ----------
    frame, measure, pixel_map
        Header, stars and sky, place on the canvas.
    index : int
        Its row in the `Photometry` of all frames.
    lot : int
        -1 for none.
    tile_gain : float
        What its mega-tile was multiplied by.
    written_gain : ndarray, optional
        ``(C,)`` gain that the product's own table says was applied, its tile's included: stars are compared with
        that instead of the solution in the `Photometry`.
    aperture : float
        Radius that its stars were measured with, frame pixels; NaN if unknown.
    """

    frame: Frame
    measure: FrameMeasure
    pixel_map: PixelMap
    index: int
    lot: int = -1
    tile_gain: float = 1.0
    written_gain: Floats | None = None
    aperture: float = float("nan")


def gather(
    mosaic: Mosaic,
    seen: Sequence[SeenFrame],
    photometry: Photometry,
    canvas: Canvas,
    catalogue: Catalogue | None = None,
) -> Evidence:
    """The evidence of a mosaic and its frames.

    Parameters
    ----------
    mosaic : Mosaic
        Whole numbers of pixels may have been cropped off the canvas.
    seen : sequence of SeenFrame
        The frames in it.
    photometry : Photometry
        Gains, sky planes, noise and weights.
    canvas : Canvas
        The grid that the frames' pixel maps and sky planes are on.
    """
    alone = Evidence(mosaic.image, mosaic.coverage, mosaic.wcs, catalogue=catalogue)
    if not seen:
        return alone
    order = np.array([s.index for s in seen])
    tile_gain = np.array([s.tile_gain for s in seen])[:, None]
    gain = np.array([a.gain for a in photometry.adjustments])[order] * tile_gain
    applied = np.array([g if s.written_gain is None else s.written_gain for s, g in zip(seen, gain, strict=True)])
    frames = _frame_facts(mosaic.wcs, seen, applied, photometry.noise[order] * tile_gain, photometry.weight[order])
    return replace(
        alone,
        frames=frames,
        stars=_star_facts(mosaic.wcs, seen, applied),
        sky=_sky_facts(mosaic.wcs, seen, gain, photometry, canvas),
    )


def _frame_facts(wcs: WCS, seen: Sequence[SeenFrame], gain: Floats, noise: Floats, weight: Floats) -> FrameFacts:
    scale = pixel_scale(wcs)
    zoom = np.array([pixel_scale(s.frame.wcs) / scale for s in seen])
    colours = np.array([[0.25, 0.5, 0.25] if s.frame.bayer else [1.0] * gain.shape[1] for s in seen])
    return FrameFacts(
        name=tuple(s.frame.path.name for s in seen),
        date=tuple(s.frame.date_obs for s in seen),
        lot=_lots(seen),
        outline=np.array([outline(s.frame, wcs) for s in seen]),
        fwhm=zoom * [s.measure.fwhm for s in seen],
        ellipticity=np.array([s.measure.ellipticity for s in seen]),
        sky=np.array([s.measure.sky.mean() for s in seen]),
        gain=gain,
        noise=noise,
        weight=weight,
        photosites=colours / zoom[:, None] ** 2,
    )


def _lots(seen: Sequence[SeenFrame]) -> Ints:
    """Lot of every frame; groups of like pointing where the route has no lots at all."""
    lot = np.array([s.lot for s in seen], np.int64)
    if (lot >= 0).any():
        return np.where(lot < 0, lot.max() + 1, lot)
    first = seen[0].frame
    diagonal = float(np.hypot(*first.shape)) * pixel_scale(first.wcs) / 3600
    for index, group in enumerate(cluster_frames([s.frame for s in seen], _PANEL_SHARE * diagonal)):
        lot[list(group)] = index
    return lot


def outline(frame: Frame, wcs: WCS) -> Floats:
    """Outer edge of a frame on another grid: ``(4 * SIDE_POINTS, 2)`` x, y in order around the frame."""
    ny, nx = frame.shape
    t = np.arange(SIDE_POINTS) / SIDE_POINTS
    one, zero = np.ones_like(t), np.zeros_like(t)
    x = np.concatenate([t, one, 1 - t, zero]) * nx - 0.5
    y = np.concatenate([zero, t, one, 1 - t]) * ny - 0.5
    assert frame.wcs is not None
    return np.stack(_onto(wcs, *frame.wcs.all_pix2world(x, y, 0)), axis=1)


def _onto(wcs: WCS, ra: Floats, dec: Floats) -> tuple[Floats, Floats]:
    """x, y of places on the sky; our own mosaics have no distortion, those of some cameras do."""
    if not wcs.has_distortion:
        x, y = wcs.wcs_world2pix(ra, dec, 0)
    else:
        x, y = wcs.all_world2pix(ra, dec, 0, quiet=True)  # far outside it need not converge
    return x, y


def _star_facts(wcs: WCS, seen: Sequence[SeenFrame], gain: Floats) -> StarFacts:
    scale = pixel_scale(wcs)
    parts: list[Mapping[str, NDArray]] = []
    for i, s in enumerate(seen):
        stars = s.measure.stars
        assert s.frame.wcs is not None
        x, y = _onto(wcs, *s.frame.wcs.all_pix2world(stars.x, stars.y, 0))
        # A mosaic keeps surface brightness: on finer pixels a star's values add up to more.
        factor = gain[i] * (pixel_scale(s.frame.wcs) / scale) ** 2
        parts.append(
            {
                "frame": np.full(len(x), i, np.int64),
                "x": x,
                "y": y,
                "flux": stars.flux * factor,
                "error": stars.error * factor,
                "clean": stars.clean,
            }
        )
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    radius = float(np.median([s.aperture * pixel_scale(s.frame.wcs) / scale for s in seen]))
    return StarFacts(**columns, aperture=radius)


def _sky_facts(wcs: WCS, seen: Sequence[SeenFrame], gain: Floats, photometry: Photometry, canvas: Canvas) -> SkyFacts:
    """Block medians of every frame at nodes of the canvas, brought to the common sky as the coadd does it."""
    block_px = int(np.median([s.measure.block_px for s in seen]))
    many = sum(s.pixel_map.window.area for s in seen) / (_NODE_BLOCKS * block_px) ** 2
    spacing = _NODE_BLOCKS * block_px * math.ceil(math.sqrt(many / _MOST_SAMPLES))
    # An autocrop moves the reference pixel by whole pixels.
    dx, dy = np.rint(wcs.wcs.crpix - canvas.wcs.wcs.crpix)
    parts: list[Mapping[str, NDArray]] = []
    for i, s in enumerate(seen):
        node, x, y, u, v = canvas_nodes(s.pixel_map.window, spacing, canvas.shape[1])
        samples = sample_sky(s.measure.blocks, s.measure.block_px, s.pixel_map.at(x, y), node, u, v)
        plane = photometry.adjustments[s.index].plane
        # The mega-tile's gain multiplies what is left after the plane has been taken off.
        design = np.stack([np.ones_like(samples.u), samples.u, samples.v], axis=1)
        value = samples.value * gain[i] - design @ plane.T * s.tile_gain
        there = np.isin(node, samples.node)
        parts.append(
            {
                "frame": np.full(len(samples.node), i, np.int64),
                "node": samples.node,
                "x": x[there] + dx,
                "y": y[there] + dy,
                "value": value,
            }
        )
    error = np.array([s.measure.block_noise for s in seen]) * gain
    zoom = pixel_scale(seen[0].frame.wcs) / pixel_scale(wcs)
    columns = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    return SkyFacts(**columns, error=error, block_px=max(4, round(block_px * zoom)))
