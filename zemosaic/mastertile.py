"""Master tiles: a group of frames stacked into one FITS file with a WCS of its own, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.io import fits

from zemosaic import __version__
from zemosaic.files import whole_file
from zemosaic.frames import Frame, read_pixels
from zemosaic.product import wcs_cards
from zemosaic.tiles import FloatImage, Mosaic, has_data


@dataclass(frozen=True)
class TilePixels:
    """What assembly needs of a master tile.

    Parameters
    ----------
    image : ndarray
        ``(h, w)`` or ``(h, w, 3)`` float32, ADU, NaN = no data.
    coverage : ndarray
        ``(h, w)`` float32, frames; 1 wherever a ready tile without such a map has data.
    """

    image: FloatImage
    coverage: FloatImage


def save_master_tile(path: Path, tile: Mosaic, names: Sequence[str], exposure: float) -> None:
    """Write one master tile: image, COVERAGE, and the names of its frames; complete or not at all.

    Parameters
    ----------
    path : Path
        Final name; written to ``.part`` beside it and renamed.
    tile : Mosaic
        The stacked group, with its own WCS.
    names : sequence of str
        Its frames.
    exposure : float
        Sum of their exposures, s; NaN if unknown.
    """
    colour = tile.image.ndim == 3
    primary = fits.PrimaryHDU(np.ascontiguousarray(np.moveaxis(tile.image, -1, 0)) if colour else tile.image)
    primary.header.extend(wcs_cards(tile.wcs, 3 if colour else 1), bottom=True)
    primary.header["BUNIT"] = ("adu", "linear, on the scale of one sub")
    primary.header["NCOMBINE"] = (len(names), "subs in the tile")
    if np.isfinite(exposure):
        primary.header["TOTALEXP"] = (exposure, "[s] sum over the subs in the tile")
    primary.header["CREATOR"] = f"ZeMosaic {__version__}"
    coverage = fits.ImageHDU(tile.coverage, wcs_cards(tile.wcs), name="COVERAGE")
    column = fits.Column("FILE", f"{max(map(len, names))}A", array=[n.encode("ascii", "replace") for n in names])
    hdus = fits.HDUList([primary, coverage, fits.BinTableHDU.from_columns([column], name="FRAMES")])
    with whole_file(path) as part:
        hdus.writeto(part, overwrite=True, checksum=True)


def read_master_tile(frame: Frame) -> TilePixels:
    """Image and coverage of a tile, ours or another program's.

    Raises
    ------
    FrameError
        If the image cannot be read.
    """
    image = read_pixels(frame)
    valid = has_data(image)
    coverage = valid.astype(np.float32)
    with contextlib.suppress(KeyError, OSError), fits.open(frame.path) as hdus:
        stored = np.asarray(hdus["COVERAGE"].data, np.float32)
        if stored.shape == valid.shape:
            coverage = np.where(valid, stored, np.float32(0))
            image[coverage <= 0] = np.nan  # another program may have written zeros there
    return TilePixels(image, coverage)
