"""The mosaic while it grows: a small picture of the tiles that are done, and one of their coverage, for a window."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray

from zemosaic.events import Events
from zemosaic.files import write_whole
from zemosaic.preview import PreviewSettings, encode_png, preview_rgba
from zemosaic.tiles import FloatImage, Mosaic, Tile, alpha_of

LONGEST_SIDE = 900  # pixels of the pictures
PICTURE, COVERAGE = "preview.png", "preview_coverage.png"
_LEAST_PAUSE = 3.0  # seconds between two pictures
_COST = 0.01  # share of a run's time that pictures may take


class LivePreview:
    """Draws what there is of a mosaic into `preview.png` and `preview_coverage.png` of a folder, and says so.

    The pictures stay there after the run; the next run that is watched replaces them.

    Parameters
    ----------
    folder : Path
        Exists already.
    shape : tuple of int
        ``(ny, nx)`` of the canvas that the tiles lie on.
    events : Events
        Hears ``live_preview`` with the ``path`` of every new picture.
    look : PreviewSettings, optional
        Tone of the picture, as that of the finished one.
    clock : callable, optional
        Seconds, never going back.
    """

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, int],
        events: Events,
        look: PreviewSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._events, self._clock = folder, events, clock
        self._look = look or PreviewSettings()
        self._step = max(1, -(-max(shape) // LONGEST_SIDE))
        # How many canvas pixels the blocks of each row and column are high and wide: the last ones are cut.
        self._sides = [np.diff(np.append(np.arange(0, size, self._step), size)) for size in shape]
        self._next = -np.inf  # when it is time for another picture
        self.clear()

    def clear(self) -> None:
        """Forget all tiles: a route begins."""
        self._weight = np.zeros([len(side) for side in self._sides], np.float32)
        self._total: FloatImage | None = None  # (h, w, C), made when the first tile tells the number of channels
        self._fresh = False

    def add(self, tile: Tile) -> None:
        """Lay a finished tile over the others; a picture is drawn if the last one is some time ago."""
        image = np.atleast_3d(tile.image)
        if self._total is None:
            self._total = np.zeros((*self._weight.shape, image.shape[-1]), np.float32)
        box, step = tile.window, self._step
        columns = np.arange(box.x0 // step, -(-box.x1 // step))
        # Where each block begins in the tile; the first may begin before it.
        starts = np.maximum(columns * step - box.x0, 0)
        for row in range(box.y0 // step, -(-box.y1 // step)):
            rows = slice(max(row * step - box.y0, 0), (row + 1) * step - box.y0)
            depth = tile.coverage[rows]
            covered = depth > 0
            self._weight[row, columns] += np.add.reduceat(depth.sum(axis=0), starts)
            for channel in range(image.shape[-1]):  # one by one is three times as fast as all together
                light = np.where(covered, image[rows, :, channel], np.float32(0)) * depth
                self._total[row, columns, channel] += np.add.reduceat(light.sum(axis=0), starts)
        self._fresh = True
        if self._clock() >= self._next:
            self.draw()

    def so_far(self) -> tuple[FloatImage, FloatImage]:
        """Image ``(h, w, 3)`` or ``(h, w)``, ADU, NaN = no data, and coverage ``(h, w)``, frames: means of blocks.

        Raises
        ------
        ValueError
            Before the first tile.
        """
        if self._total is None:
            raise ValueError("there is no tile yet")
        mean = np.asarray(self._total / np.where(self._weight > 0, self._weight, np.nan)[..., None], np.float32)
        depth = np.asarray(self._weight / np.outer(*self._sides), np.float32)
        return (mean if mean.shape[-1] == 3 else mean[..., 0]), depth

    def draw(self) -> None:
        """Write both pictures now, if there is anything new; to be called after the last tile."""
        if not self._fresh:
            return
        start = self._clock()
        image, depth = self.so_far()
        picture = preview_rgba(Mosaic(image, depth, alpha_of(depth), WCS(naxis=2)), **asdict(self._look))
        try:
            # The window reads the coverage when it hears of the picture, so both must be there before.
            write_whole(self._folder / COVERAGE, encode_png(coverage_rgba(depth)))
            write_whole(self._folder / PICTURE, encode_png(picture))
        except OSError:  # a full disk: the run will say so itself where it matters
            return
        self._fresh = False
        end = self._clock()
        self._next = end + max(_LEAST_PAUSE, (end - start) / _COST)
        self._events.detail("live_preview", path=self._folder / PICTURE)


def coverage_rgba(coverage: FloatImage) -> NDArray[np.uint8]:
    """A picture of a coverage map ``(h, w)``: dark blue = 0, yellow = deepest; ``(h, w, 4)`` uint8, last row first.

    Transparent where nothing is covered.
    """
    deepest = float(coverage.max(initial=0)) or 1.0
    level = np.rint(coverage[::-1] * np.float32(255 / deepest)).astype(np.uint8)
    picture = cv2.cvtColor(cv2.applyColorMap(level, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGBA)
    picture[coverage[::-1] <= 0] = 0
    return np.asarray(picture, np.uint8)
