"""The few types everything speaks: a window on the canvas, a tile that knows where it is, a mosaic.

Images are ``(H, W, 3)`` (or ``(H, W)`` for mono) float32 with NaN = no data; coverage is ``(H, W)``
float32 and counts the frames that really contributed at a pixel. All three types are checked at
birth, so a tile whose arrays disagree with its window cannot exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray

FloatImage = NDArray[np.float32]


@dataclass(frozen=True, order=True)
class Window:
    """A half-open box ``[y0, y1) x [x0, x1)`` in canvas pixels.

    Parameters
    ----------
    y0, y1, x0, x1 : int
        Bounds; ``y1 >= y0`` and ``x1 >= x0``. An empty window is allowed, an inverted one is not.
    """

    y0: int
    y1: int
    x0: int
    x1: int

    def __post_init__(self) -> None:
        if self.y1 < self.y0 or self.x1 < self.x0:
            raise ValueError(f"inverted window {self}")

    @property
    def shape(self) -> tuple[int, int]:
        """``(ny, nx)``."""
        return self.y1 - self.y0, self.x1 - self.x0

    @property
    def area(self) -> int:
        """Number of pixels."""
        return (self.y1 - self.y0) * (self.x1 - self.x0)

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of this window in an array that covers the whole canvas."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)

    def within(self, outer: Window) -> tuple[slice, slice]:
        """Index of this window in an array that covers `outer`."""
        return (
            slice(self.y0 - outer.y0, self.y1 - outer.y0),
            slice(self.x0 - outer.x0, self.x1 - outer.x0),
        )

    def intersect(self, other: Window) -> Window:
        """The common part; an empty window (area 0) where there is none."""
        y0, x0 = max(self.y0, other.y0), max(self.x0, other.x0)
        return Window(y0, max(y0, min(self.y1, other.y1)), x0, max(x0, min(self.x1, other.x1)))

    def hull(self, other: Window) -> Window:
        """The smallest window that holds both."""
        return Window(min(self.y0, other.y0), max(self.y1, other.y1), min(self.x0, other.x0), max(self.x1, other.x1))

    def grow(self, margin: int) -> Window:
        """The window with `margin` more pixels on every side."""
        return Window(self.y0 - margin, self.y1 + margin, self.x0 - margin, self.x1 + margin)

    def shift(self, dy: int, dx: int) -> Window:
        """The window of the same pixels where they are counted from ``(-dy, -dx)``."""
        return Window(self.y0 + dy, self.y1 + dy, self.x0 + dx, self.x1 + dx)

    def blocks(self, step: int) -> Iterator[Window]:
        """Cut into boxes of at most ``step x step``, aligned to multiples of `step` on the canvas."""
        for y in range(self.y0 - self.y0 % step, self.y1, step):
            for x in range(self.x0 - self.x0 % step, self.x1, step):
                block = Window(y, y + step, x, x + step).intersect(self)
                if block.area:
                    yield block

    @classmethod
    def of_shape(cls, shape: tuple[int, int]) -> Window:
        """The window of a whole array of this ``(ny, nx)``."""
        return cls(0, shape[0], 0, shape[1])


@dataclass(frozen=True)
class Tile:
    """Pixels over their own window of the canvas: a warped frame, a master tile or a mega-tile.

    Parameters
    ----------
    window : Window
        Where the arrays lie on the canvas.
    image : ndarray
        ``(h, w, 3)`` or ``(h, w)`` float32, ADU, NaN = no data.
    coverage : ndarray
        ``(h, w)`` float32, frames that contributed; 0 exactly where the image has no data.
    weight : ndarray, optional
        ``(h, w)`` float32, sum of the weights of those frames, 1 for a typical frame: a frame taken through
        clouds covers a pixel, but weighs little. The coverage itself if not given.
    """

    window: Window
    image: FloatImage
    coverage: FloatImage
    weight: FloatImage | None = None

    def __post_init__(self) -> None:
        _check("tile", self.image, self.coverage)
        _check("tile", self.image, self.depth)
        if self.coverage.shape != self.window.shape:
            raise ValueError(f"tile arrays {self.coverage.shape} do not fill their window {self.window.shape}")

    @property
    def depth(self) -> FloatImage:
        """`weight`, or the coverage where every frame counts the same."""
        return self.coverage if self.weight is None else self.weight


@dataclass(frozen=True)
class Mosaic:
    """The picture and everything that has to stay in step with it.

    Parameters
    ----------
    image : ndarray
        ``(H, W, 3)`` or ``(H, W)`` float32, ADU, linear, NaN = no data.
    coverage : ndarray
        ``(H, W)`` float32, frames that contributed.
    alpha : ndarray
        ``(H, W)`` uint8, display mask: 0 = transparent, 255 = opaque.
    wcs : astropy.wcs.WCS
        Celestial, 2-D, of this very pixel grid.
    """

    image: FloatImage
    coverage: FloatImage
    alpha: NDArray[np.uint8]
    wcs: WCS

    def __post_init__(self) -> None:
        _check("mosaic", self.image, self.coverage)
        if self.alpha.dtype != np.uint8 or self.alpha.shape != self.coverage.shape:
            raise ValueError(f"alpha {self.alpha.dtype}{self.alpha.shape} is no mask of {self.coverage.shape}")

    @property
    def shape(self) -> tuple[int, int]:
        """``(ny, nx)``."""
        ny, nx = self.coverage.shape
        return ny, nx

    def crop(self, window: Window) -> Mosaic:
        """The part inside `window`, pixels of this mosaic, as a view; the WCS is moved along exactly."""
        box = window.intersect(Window.of_shape(self.shape))
        if not box.area:
            raise ValueError(f"crop window {window} leaves nothing of a mosaic of {self.shape}")
        ys, xs = box.slices
        # Slicing a WCS makes a deep copy; WCS.copy() would share the CRPIX with the original.
        return Mosaic(self.image[ys, xs], self.coverage[ys, xs], self.alpha[ys, xs], self.wcs[ys, xs])

    def blank(self, mask: NDArray[np.bool_]) -> None:
        """Turn the pixels of `mask` ``(H, W)`` into "no data" everywhere, in place."""
        self.image[mask] = np.nan
        self.coverage[mask] = 0
        self.alpha[mask] = 0

    def without(self, mask: NDArray[np.bool_]) -> Mosaic:
        """A copy of the mosaic with the pixels of `mask` ``(H, W)`` turned into "no data" everywhere."""
        copy = replace(self, image=self.image.copy(), coverage=self.coverage.copy(), alpha=self.alpha.copy())
        copy.blank(mask)
        return copy


def has_data(image: FloatImage) -> NDArray[np.bool_]:
    """Pixels of an image ``(h, w)`` or ``(h, w, C)`` that are finite in every channel, ``(h, w)``."""
    # Plane by plane: a reduction over the last, short axis takes ten times as long.
    planes = [image] if image.ndim == 2 else np.moveaxis(image, -1, 0)
    return np.asarray(np.logical_and.reduce([np.isfinite(plane) for plane in planes]))


def alpha_of(coverage: FloatImage) -> NDArray[np.uint8]:
    """Display mask of a coverage map: 255 where there is data, else 0."""
    return (coverage > 0).astype(np.uint8) * np.uint8(255)


def _check(what: str, image: FloatImage, coverage: FloatImage) -> None:
    if image.dtype != np.float32 or coverage.dtype != np.float32:
        raise TypeError(f"{what} arrays must be float32, not {image.dtype} and {coverage.dtype}")
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise ValueError(f"{what} image must be (H, W) or (H, W, 3), not {image.shape}")
    if image.shape[:2] != coverage.shape:
        raise ValueError(f"{what} image {image.shape} and coverage {coverage.shape} differ")
