"""Subs of a wide, invented field, thousands of them, cheaply: the sky is rendered once and every sub is a window of it.

No noise is in the sky itself, so a mosaic can be judged against it (`judge`). A sub has its own place (whole pixels),
transparency, sky level and gradient, photon and read noise. The subs of a panel are numbered, and a smaller set is the
first ones of every panel: sets of any size share their files.
"""

from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import sep
from astropy.io import fits
from astropy.wcs import WCS
from numpy.typing import NDArray

Image = NDArray[np.float32]

PEDESTAL, READ_NOISE, SKY = 500.0, 4.0, 600.0  # ADU, electrons; one electron is one ADU
SKY_TINT = np.array([0.85, 1.0, 0.75])
NEBULA_TINTS = np.array([(1.0, 0.28, 0.36), (0.35, 0.55, 1.0), (0.25, 0.8, 0.75)])
CENTRE = (83.8, 10.0)  # RA, Dec, degrees
PATTERN = "GRBG"
FOCAL_LENGTH = 250.0  # mm
DITHER = 24  # px at most, along x and y
PANELS_A_NIGHT = 4
PIECE = 64  # subs that a worker makes at a time


@dataclass(frozen=True)
class Field:
    """A field and how it is looked at.

    Parameters
    ----------
    canvas : tuple of int
        ``(ny, nx)`` of the whole sky that is rendered.
    shape : tuple of int
        ``(ny, nx)`` of a sub.
    scale : float
        arcsec per pixel.
    stars : float
        Per square degree.
    faintest : float
        Flux of the faintest star, ADU over all three colours of full pixels.
    stride : float
        Distance of two panels, in sides of a sub.
    fwhm : float
        Pixels.
    seed : int
        The same field and the same number, the same sub.
    """

    canvas: tuple[int, int]
    shape: tuple[int, int] = (1080, 1920)
    scale: float = 2.39
    stars: float = 2400.0
    faintest: float = 3000.0
    stride: float = 0.7
    fwhm: float = 2.8
    seed: int = 5

    @property
    def wcs(self) -> WCS:
        """Of the sky: north up, tangent in its middle."""
        wcs = WCS(naxis=2)
        wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
        wcs.wcs.crval = CENTRE
        wcs.wcs.crpix = [(side + 1) / 2 for side in self.canvas[::-1]]
        wcs.wcs.cd = np.diag([-self.scale, self.scale]) / 3600
        wcs.wcs.set()
        return wcs

    @property
    def panels(self) -> list[tuple[int, int]]:
        """``(y, x)`` of the first pixel of every panel: row after row, there and back."""
        starts = []
        for side, own in zip(self.canvas, self.shape, strict=True):
            count = math.ceil((side - own) / (self.stride * own)) + 1
            starts.append(np.linspace(0, side - own, count).round().astype(int).tolist())
        rows, columns = starts
        return [(y, x) for i, y in enumerate(rows) for x in (columns if i % 2 == 0 else columns[::-1])]

    def shares(self, count: int) -> list[int]:
        """How many of `count` subs every panel gets."""
        panels = len(self.panels)
        return [count // panels + (panel < count % panels) for panel in range(panels)]

    def catalogue(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """x, y on the sky and fluxes ``(n, 3)`` of all stars."""
        rng = np.random.default_rng([self.seed, 1])
        ny, nx = self.canvas
        count = rng.poisson(self.stars * ny * nx * (self.scale / 3600) ** 2)
        flux = np.minimum(self.faintest * rng.uniform(size=count) ** -0.8, 2.5e5)
        tint = np.clip(rng.normal([0.32, 0.38, 0.30], 0.06, (count, 3)), 0.1, None)
        return rng.uniform(0, nx - 1, count), rng.uniform(0, ny - 1, count), flux[:, None] * tint

    def render(self) -> Image:
        """The sky without background and noise, ``(ny, nx, 3)``, ADU."""
        rng = np.random.default_rng([self.seed, 2])
        ny, nx = self.canvas
        coarse = 32
        y, x = (np.linspace(0, 1, max(4, side // coarse)) for side in (ny, nx))
        clouds = np.zeros((len(y), len(x), 3))
        for tint in NEBULA_TINTS[rng.integers(0, 3, 12)]:
            (cy, cx), (sy, sx) = rng.uniform(0, 1, 2), rng.uniform(0.06, 0.2, 2)
            bump = np.exp(-0.5 * (((y[:, None] - cy) / sy) ** 2 + ((x - cx) / sx) ** 2))
            clouds += bump[..., None] * tint * rng.uniform(60, 250)
        image = np.asarray(cv2.resize(clouds.astype(np.float32), (nx, ny), interpolation=cv2.INTER_CUBIC))
        sigma, reach = self.fwhm / 2.3548, math.ceil(2.5 * self.fwhm)
        for cx, cy, flux in zip(*self.catalogue(), strict=True):
            x0, x1 = max(0, round(cx) - reach), min(nx, round(cx) + reach + 1)
            y0, y1 = max(0, round(cy) - reach), min(ny, round(cy) + reach + 1)
            across = np.exp(-0.5 * ((np.arange(x0, x1) - cx) / sigma) ** 2)
            down = np.exp(-0.5 * ((np.arange(y0, y1) - cy) / sigma) ** 2)
            spot = (down[:, None] * across)[..., None] * (flux / (2 * np.pi * sigma**2))
            image[y0:y1, x0:x1] += spot.astype(np.float32)
        return image


def make_subs(field: Field, count: int, folder: Path) -> list[Path]:
    """The files of the first subs of every panel, in order of time; those that are there already are not made again."""
    (folder / "subs").mkdir(parents=True, exist_ok=True)
    if not (folder / "sky.npy").exists():
        np.save(folder / "sky.part.npy", field.render())
        (folder / "sky.part.npy").rename(folder / "sky.npy")
    wanted = [(panel, k) for panel, share in enumerate(field.shares(count)) for k in range(share)]
    todo = [pair for pair in wanted if not _path(folder, *pair).exists()]
    pieces = [todo[i : i + PIECE] for i in range(0, len(todo), PIECE)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(_expose_some, [field] * len(pieces), [folder] * len(pieces), pieces))
    return [_path(folder, *pair) for pair in wanted]


def _path(folder: Path, panel: int, k: int) -> Path:
    return folder / "subs" / f"Light_p{panel:03d}_{k:04d}.fit"


def _expose_some(field: Field, folder: Path, pairs: list[tuple[int, int]]) -> None:
    sky = np.load(folder / "sky.npy", mmap_mode="r")
    for panel, k in pairs:
        expose(field, sky, panel, k, _path(folder, panel, k))


def expose(field: Field, sky: Image, panel: int, k: int, path: Path) -> None:
    """Write one sub."""
    rng = np.random.Generator(np.random.SFC64([field.seed, 3, panel, k]))
    (ny, nx), (height, width) = field.shape, field.canvas
    y, x = np.array(field.panels[panel]) + rng.integers(-DITHER, DITHER + 1, 2)
    y, x = int(np.clip(y, 0, height - ny)), int(np.clip(x, 0, width - nx))
    transparency = np.clip(rng.normal(1, 0.08), 0.75, 1.25)
    level = SKY * np.clip(rng.normal(1, 0.2), 0.5, 2)
    slope_y, slope_x = rng.normal(0, 0.05, 2)
    down = (1 + slope_y * np.linspace(-1, 1, ny)).astype(np.float32)
    across = (slope_x * np.linspace(-1, 1, nx)).astype(np.float32)
    pixels = np.empty((ny, nx), np.float32)
    for corner, name in enumerate(PATTERN):
        c, (py, px) = "RGB".index(name), divmod(corner, 2)
        part = pixels[py::2, px::2]
        np.add(down[py::2, None], across[px::2], out=part)
        part *= np.float32(level * SKY_TINT[c])
        part += np.float32(transparency) * sky[y + py : y + ny : 2, x + px : x + nx : 2, c]
    noise = rng.standard_normal(pixels.shape, np.float32)
    noise *= np.sqrt(pixels + np.float32(READ_NOISE**2))
    pixels += noise
    pixels += np.float32(PEDESTAL)
    hot, heat = hot_pixels(field)
    pixels.ravel()[hot] += heat
    np.rint(np.clip(pixels, 0, 65535, out=pixels), out=pixels)
    fits.PrimaryHDU(pixels.astype(np.uint16), _header(field, panel, k, y, x)).writeto(path, overwrite=True)


@cache
def hot_pixels(field: Field) -> tuple[NDArray[np.int64], Image]:
    """Which pixels of the detector are hot, and by how much."""
    rng = np.random.default_rng([field.seed, 4])
    count = math.prod(field.shape) // 5000
    return rng.integers(0, math.prod(field.shape), count), rng.uniform(500, 20000, count).astype(np.float32)


def _header(field: Field, panel: int, k: int, y: int, x: int) -> fits.Header:
    wcs = field.wcs
    wcs.wcs.crpix = wcs.wcs.crpix - [x, y]
    header = wcs.to_header()
    ra, dec = wcs.all_pix2world([[(side - 1) / 2 for side in field.shape[::-1]]], 0)[0]
    night, turn = divmod(panel, PANELS_A_NIGHT)
    # The panels of a night one after the other, eight hours of it at most.
    date = datetime(2025, 1, 3, 18) + timedelta(days=night, hours=2 * turn, seconds=11 * k)
    header.update(
        OBJECT="Wide Field",
        INSTRUME="Seestar S50",
        IMAGETYP="Light",
        BAYERPAT=PATTERN,
        EXPTIME=10.0,
        GAIN=80,
        FILTER="IRCUT",
        FOCALLEN=FOCAL_LENGTH,
        XPIXSZ=field.scale * FOCAL_LENGTH / 206.265,
        RA=ra,
        DEC=dec,
    )
    header["DATE-OBS"] = date.isoformat(timespec="milliseconds")
    return header


class Quality(NamedTuple):
    """A mosaic against its sky.

    Parameters
    ----------
    scale : float
        Flux of the stars over the true one, median; it is free, but must be near 1.
    stars : float
        Robust scatter of that ratio from star to star.
    level : float
        Robust rms of the nebula and sky in boxes, ADU, after one plane and the scale.
    covered : float
        Share of the sky that the mosaic holds.
    """

    scale: float
    stars: float
    level: float
    covered: float

    @property
    def faults(self) -> str:
        """What is not as it should be, in words; empty if the mosaic is right."""
        found = (
            (0.9 < self.scale < 1.1, f"the stars have {self.scale:.3f} of their light"),
            (self.stars < 0.03, f"the light of the stars scatters by {self.stars:.1%}"),
            (self.level < 5, f"sky and nebula are off by {self.level:.1f} ADU"),
            (self.covered > 0.97, f"only {self.covered:.1%} of the sky is there"),
        )
        return "; ".join(words for good, words in found if not good)


def judge(product: Path, field: Field, folder: Path, bright: float = 4e4, box: int = 48) -> Quality:
    """Compare the green channel of a mosaic with the sky that it is of."""
    sky = np.load(folder / "sky.npy", mmap_mode="r")
    with fits.open(product, memmap=True) as hdus:
        wcs = WCS(hdus[0].header, naxis=2)
        image = np.ascontiguousarray(hdus[0].data[1], np.float32)
    x, y, flux = field.catalogue()
    pick = flux.sum(axis=1) > bright
    pick[np.flatnonzero(pick)[4000:]] = False
    x, y = x[pick], y[pick]
    truth = _star_light(np.ascontiguousarray(sky[..., 1]), x, y)
    found = _star_light(image, *_on(wcs, field, x, y))
    ratio = (found / truth)[np.isfinite(found) & (truth > bright / 10)]
    scale = float(np.median(ratio))
    rows, columns = np.mgrid[box : field.canvas[0] - box : 2 * box, box : field.canvas[1] - box : 2 * box]
    rows, columns = rows.ravel(), columns.ravel()
    there = np.rint(_on(wcs, field, columns, rows)).astype(int).T
    half = box // 2
    own = np.array(
        [_median(sky[r - half : r + half, c - half : c + half, 1]) for r, c in zip(rows, columns, strict=True)]
    )
    mine = np.array([_median(image[max(0, r - half) : r + half, max(0, c - half) : c + half]) for c, r in there])
    design = np.c_[np.ones(len(rows)), rows, columns]
    difference, known = mine - scale * own, np.isfinite(mine)
    if not known.any():
        return Quality(scale, math.inf, math.inf, 0.0)
    left = difference[known] - design[known] @ np.linalg.lstsq(design[known], difference[known], rcond=None)[0]
    return Quality(scale, _spread(ratio) / scale, _spread(left), float(known.mean()))


def _on(wcs: WCS, field: Field, x: NDArray, y: NDArray) -> tuple[NDArray, NDArray]:
    """Pixels of the sky as pixels of a mosaic."""
    px, py = wcs.all_world2pix(*field.wcs.all_pix2world(x, y, 0), 0)
    return px, py


def _star_light(image: Image, x: NDArray, y: NDArray, radius: float = 6.0) -> NDArray[np.float64]:
    """Light in an aperture above the ring around it; NaN beyond the image and where data are missing."""
    inside = (x > 15) & (y > 15) & (x < image.shape[1] - 16) & (y < image.shape[0] - 16)
    light = np.full(len(x), np.nan)
    light[inside] = sep.sum_circle(image, x[inside], y[inside], radius, bkgann=(9.0, 13.0))[0]
    return light


def _median(part: Image) -> float:
    values = part[np.isfinite(part)]
    return float(np.median(values)) if values.size > part.size // 2 > 0 else math.nan


def _spread(values: NDArray) -> float:
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))
