"""From raw photosites to clean colour: dark, flat, hot pixels on the CFA plane, debayer.

Everything here works on the frame as it was recorded, before any interpolation. The order matters:
a hot photosite that survives until debayering leaves a coloured ring around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from zemosaic.frames import Frame, FrameError, read_frame, read_pixels
from zemosaic.kernels import debayer_part, lonely_pixels
from zemosaic.robust import median
from zemosaic.tiles import FloatImage

# A defect stands alone: the seven lowest of its eight direct neighbours together carry less than this
# share of its own excess. For a star of FWHM 1.5 px they carry 1.2 times its peak, for a very red one
# on a red photosite still about 0.45.
_LONELY = 0.4


@dataclass(frozen=True)
class Calibration:
    """Master frames, already in the units they are applied in.

    Parameters
    ----------
    dark : ndarray or None
        ``(ny, nx)``, or ``(ny, nx, 3)`` for frames in colour; float32, ADU, subtracted as it is.
    flat : ndarray or None
        ``(ny, nx)`` float32, 1 on average per colour of the CFA; NaN where the flat is useless.
    """

    dark: FloatImage | None = None
    flat: FloatImage | None = None

    def apply(self, pixels: FloatImage, path: Path) -> FloatImage:
        """Calibrated copy of the pixels of the frame at `path` (or the very same if there is nothing to do).

        Raises
        ------
        FrameError
            If a master does not have the frame's shape.
        """
        for name, master in (("dark", self.dark), ("flat", self.flat)):
            if master is not None and master.shape not in (pixels.shape, pixels.shape[:2]):
                raise FrameError(
                    f"the master {name} is {master.shape[1]}x{master.shape[0]} px but the frame is "
                    f"{pixels.shape[1]}x{pixels.shape[0]}: use a master from the same camera mode",
                    path,
                )
        if self.dark is not None:
            pixels = pixels - _like(self.dark, pixels)
        if self.flat is not None:
            pixels = pixels / _like(self.flat, pixels)
        return pixels


def load_calibration(dark_path: str | Path = "", flat_path: str | Path = "") -> Calibration:
    """Read master dark and flat; an empty path means none.

    The flat is divided by its median per CFA colour (phase of the 2x2 cell for Bayer frames), so that it takes
    out vignetting and dust but leaves the colour balance to the camera.
    """
    dark = read_pixels(read_frame(Path(dark_path))) if str(dark_path) else None
    flat = None
    if str(flat_path):
        frame = read_frame(Path(flat_path))
        flat = normalise_flat(read_pixels(frame), cell=2 if frame.bayer else 1)
    return Calibration(dark, flat)


def normalise_flat(flat: FloatImage, cell: int = 2) -> FloatImage:
    """Flat divided by the median of each phase of its ``cell x cell`` pattern; <= 5 % of it becomes NaN."""
    out = np.empty_like(flat, dtype=np.float32)
    for y in range(cell):
        for x in range(cell):
            plane = flat[y::cell, x::cell]
            out[y::cell, x::cell] = plane / np.nanmedian(plane, axis=(0, 1))
    out[~(out > 0.05)] = np.nan
    return out


@dataclass(frozen=True)
class Repairs:
    """Defective pixels of one frame and what they were replaced by.

    Parameters
    ----------
    index : ndarray
        ``(n,)`` int64, flat indices into the frame's pixel array.
    value : ndarray
        ``(n,)`` float32, ADU.
    """

    index: NDArray[np.int64]
    value: FloatImage

    def apply(self, pixels: FloatImage) -> None:
        """Write the replacements into `pixels` in place."""
        pixels.reshape(-1)[self.index] = self.value


NO_REPAIRS = Repairs(np.zeros(0, np.int64), np.zeros(0, np.float32))


def find_hot_pixels(plane: FloatImage, *, bayer: bool, sigma: float = 6.0) -> Repairs:
    """Find pixels that are hot (or dead) on their own, never the cores of stars.

    A candidate differs by more than `sigma` from the 5x5 median of its own colour. It is a defect only if its
    *direct* neighbours, of whatever colour, do not share the excess: optics spread every star over them,
    while a hot photosite stands alone. The largest neighbour is left out of that sum, so that two
    adjacent hot pixels are still found.

    Parameters
    ----------
    plane : ndarray
        ``(ny, nx)`` float32, CFA mosaic or mono, ADU; NaN = no data.
    bayer : bool
        Whether neighbours two pixels apart share a colour.
    sigma : float
        Threshold in units of the local noise (MAD, scaled with the square root of the level).

    Returns
    -------
    Repairs
        Indices into `plane`, and the local same-colour medians to put there.
    """
    step = 2 if bayer else 1
    phases, smooth, limit, level = [], [], [], []
    for y in range(step):
        for x in range(step):
            sub = np.ascontiguousarray(plane[y::step, x::step])
            holes = np.isnan(sub)
            if holes.all():
                return NO_REPAIRS
            if holes.any():
                sub = np.where(holes, np.float32(median(sub)), sub)
            local = np.asarray(cv2.medianBlur(sub, 5), np.float32)
            some = (slice(None, None, 5),) * 2
            scatter = np.abs(np.where(holes[some], np.float32(0), sub[some] - local[some]))
            phases.append(sub)
            smooth.append(local)
            limit.append(sigma * max(1.4826 * median(scatter), 1e-3))
            level.append(max(median(local[some]), 1.0))
    found = lonely_pixels(plane, tuple(phases), tuple(smooth), np.array(limit), np.array(level), _LONELY)
    return Repairs(*found) if len(found[0]) else NO_REPAIRS


def prepare(
    frame: Frame, calibration: Calibration, repairs: Repairs | None = None, *, hot_sigma: float | None = 6.0
) -> tuple[FloatImage, Repairs]:
    """Read one frame, calibrate it and mend its hot pixels: the start of every route.

    Parameters
    ----------
    frame : Frame
        What to read.
    calibration : Calibration
        Master dark and flat.
    repairs : Repairs, optional
        The defects found by an earlier call for the same frame: they are mended without another search.
    hot_sigma : float or None
        Threshold of the search; None leaves hot pixels alone.

    Returns
    -------
    pixels : ndarray
        ``(ny, nx)`` (CFA or mono) or ``(ny, nx, 3)`` float32, ADU.
    repairs : Repairs
        What was mended.
    """
    pixels = calibration.apply(read_pixels(frame), frame.path)
    if repairs is None:
        repairs = NO_REPAIRS
        if pixels.ndim == 2 and hot_sigma is not None:
            repairs = find_hot_pixels(pixels, bayer=bool(frame.bayer), sigma=hot_sigma)
    repairs.apply(pixels)
    return pixels, repairs


#: Pixels around a region that its debayering looks at.
DEBAYER_MARGIN = 2


def debayer(cfa: FloatImage, pattern: str) -> FloatImage:
    """Full-resolution colour from a Bayer mosaic by gradient-corrected linear interpolation.

    Linear, so a star keeps its flux whatever its brightness and position. Compared on simulated stars, OpenCV's
    edge-aware method loses 9 % (FWHM 3 px) to 13 % (2.4 px) of their green flux, and bilinear
    interpolation makes red and blue stars 15 to 24 % wider (`benchmarks/debayer.py`).

    Parameters
    ----------
    cfa : ndarray
        ``(ny, nx)`` float32; NaN = no data spreads to the 5x5 pixels around it.
    pattern : str
        Colours of the 2x2 cell at ``[0, 0]``, row by row, e.g. ``"GRBG"``.

    Returns
    -------
    ndarray
        ``(ny, nx, 3)`` float32, red, green, blue.
    """
    # Mirrored without repeating the edge, which keeps the phase of the CFA.
    border = (DEBAYER_MARGIN,) * 4
    padded = cv2.copyMakeBorder(np.ascontiguousarray(cfa), *border, cv2.BORDER_REFLECT_101)
    return debayer_part(np.asarray(padded, np.float32), *red_site(pattern))


def red_site(pattern: str) -> tuple[int, int]:
    """Row and column of the red pixel in a 2x2 cell."""
    return divmod(pattern.index("R"), 2)


def _like(master: FloatImage, pixels: FloatImage) -> FloatImage:
    return master if master.ndim == pixels.ndim else master[..., None]
