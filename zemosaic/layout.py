"""Where the frames of a run lie, from their headers alone: canvas, corners, lots, and the sizes a route works with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

import zemosaic_sds
from zemosaic.canvas import Canvas, plan_canvas
from zemosaic.cluster import cluster_frames
from zemosaic.events import Events
from zemosaic.frames import Frame
from zemosaic.overlaps import quad_areas
from zemosaic.settings import Settings
from zemosaic.tiles import Window


@dataclass(frozen=True, eq=False)
class Layout:
    """Frames on their canvas.

    Parameters
    ----------
    frames : tuple of Frame
        With a WCS, in order of time.
    canvas : Canvas
        Global pixel grid.
    corners : ndarray
        ``(n, 4, 2)`` canvas positions ``x, y`` of the frames' outer corners, in order around the frame.
    windows : tuple of Window
        Canvas pixels that each frame may touch.
    lots : tuple of tuple of int
        Frames of every lot, as SDS builds them.
    """

    frames: tuple[Frame, ...]
    canvas: Canvas
    corners: NDArray[np.float64]
    windows: tuple[Window, ...]
    lots: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Sizes:
    """How much of everything a route has to deal with.

    Parameters
    ----------
    frames : int
        Frames that are measured.
    frame_px : int
        Their pixels.
    samples : float
        Canvas pixels under all frames together: what is warped and combined.
    tiles : tuple of int
        Pixels of every mega-tile or master tile; empty on a route without any.
    tile_frames : int
        Frames of the largest group that is stacked at once.
    canvas_px : int
        Pixels of the canvas.
    preview_px : int
        Pixels of the preview picture.
    channels : int
        1 or 3.
    frame_bytes : int
        One prepared frame in memory.
    """

    frames: int
    frame_px: int
    samples: float
    tiles: tuple[int, ...]
    tile_frames: int
    canvas_px: int
    preview_px: int
    channels: int
    frame_bytes: int

    @property
    def tile_px(self) -> int:
        """Pixels of all tiles."""
        return sum(self.tiles)

    @property
    def largest_tile(self) -> int:
        """Pixels of the largest tile, or of the canvas on a route without tiles."""
        return max(self.tiles, default=self.canvas_px)


@dataclass(frozen=True)
class _Place:
    """Canvas pixel → frame pixel through the four corners, as the planner of lots wants it.

    A frame without distortion, one tangent plane seen from another, is exact; one with distortion is off by that,
    a few pixels, where the lots count cells of dozens.
    """

    window: Window
    projection: NDArray[np.float64]

    def at(self, x: NDArray, y: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Frame positions of canvas positions ``(n,)``."""
        fx, fy, w = self.projection @ np.stack([x, y, np.ones_like(x)])
        return fx / w, fy / w


@dataclass(frozen=True)
class _Placed:
    """A frame and its place."""

    frame: Frame
    pixel_map: _Place


def lay_out(
    frames: Sequence[Frame],
    settings: Settings,
    given_lots: Sequence[Sequence[Path]] | None = None,
    events: Events | None = None,
) -> Layout:
    """Plan canvas and lots.

    Parameters
    ----------
    frames : sequence of Frame
        With a WCS, in order of time.
    settings : Settings
        Canvas and lots depend on them.
    given_lots : sequence of sequence of Path, optional
        Lots to take as they are; the rest is planned.
    events : Events, optional
        Asked between frames whether to stop.

    Raises
    ------
    zemosaic.canvas.CanvasError
        If the frames span more than a canvas can show.
    """
    canvas = plan_canvas(frames, settings)
    events = events or Events()
    corners, placed = [], []
    for frame in frames:
        events.check_stop()
        assert frame.wcs is not None
        ny, nx = frame.shape
        own = np.array([[0, 0], [nx, 0], [nx, ny], [0, ny]]) - 0.5
        quad = canvas.wcs.wcs_world2pix(frame.wcs.all_pix2world(own, 0), 0)
        (x0, y0), (x1, y1) = (
            np.floor(quad.min(axis=0)).astype(int).tolist(),
            np.ceil(quad.max(axis=0)).astype(int).tolist(),
        )
        window = Window(y0, y1 + 1, x0, x1 + 1).intersect(Window.of_shape(canvas.shape))
        projection = cv2.getPerspectiveTransform(quad.astype(np.float32), own.astype(np.float32))
        corners.append(quad)
        placed.append(_Placed(frame, _Place(window, np.asarray(projection))))
    lots = zemosaic_sds.plan_lots(placed, canvas, settings, Events(language=settings.language), given_lots)
    windows = tuple(each.pixel_map.window for each in placed)
    return Layout(tuple(frames), canvas, np.array(corners), windows, tuple(lot.members for lot in lots))


def sizes_of(layout: Layout, route: str, settings: Settings) -> Sizes:
    """What `route` will have to deal with: ``sds``, ``mosaic-first`` or ``master-tiles``."""
    groups: Sequence[Sequence[int]] = ()
    if route == "sds":
        groups = layout.lots
    elif route == "master-tiles":
        groups = cluster_frames(
            layout.frames,
            settings.cluster_panel_threshold,
            settings.cluster_orientation_split_deg,
            settings.max_raw_per_master_tile,
        )
    frames = layout.frames
    ny, nx = layout.canvas.shape
    pixels = [frame.shape[0] * frame.shape[1] for frame in frames]
    planes = [3 if frame.colour == "rgb" else 1 for frame in frames]
    return Sizes(
        frames=len(frames),
        frame_px=sum(pixels),
        samples=float(quad_areas(layout.corners).sum()),
        tiles=tuple(_hull([layout.windows[i] for i in group]).area for group in groups),
        tile_frames=max((len(group) for group in groups), default=len(frames)),
        canvas_px=ny * nx,
        preview_px=int(ny * nx * min(1.0, settings.preview_png_max_dim / max(ny, nx)) ** 2),
        channels=1 if frames[0].colour == "mono" else 3,
        frame_bytes=4 * max(p * n for p, n in zip(pixels, planes, strict=True)),
    )


def _hull(windows: Sequence[Window]) -> Window:
    hull = windows[0]
    for window in windows[1:]:
        hull = hull.hull(window)
    return hull
