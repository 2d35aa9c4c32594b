"""What debayering does to stars: flux and width per colour, for three ways of doing it.

    python benchmarks/debayer.py [--fwhm 2.4 3.0] [--stars 900] [--seed 1]

Gaussian stars of many colours stand at random sub-pixel places, too far apart to touch, and are seen through a GRBG
matrix with photon noise. Each debayered picture is compared with the same scene before the matrix: the light
within an aperture (bias and scatter from star to star, in millimagnitudes; positive = light is lost)
and the FWHM of the mean profile. The FWHM given is the one on the detector, pixels included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import curve_fit

from zemosaic.calibrate import debayer

Image = NDArray[np.float32]

PATTERN = "GRBG"
CELL = 40  # pixels from star to star
SKY = 1100.0  # ADU, pedestal included; one electron is one ADU
FLUX = (2e4, 2e5)  # ADU in green
REDNESS = 0.2  # 1-sigma of the colour between neighbouring channels, magnitudes
APERTURE = 3.0  # radius in FWHM: holds all of a Gaussian


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table per FWHM."""
    parser = argparse.ArgumentParser(description="Compare debayering methods on simulated stars.")
    parser.add_argument("--fwhm", type=float, nargs="+", default=[2.4, 3.0], help="of the stars, px (2.4 3.0)")
    parser.add_argument("--stars", type=int, default=900, help="number of stars (900)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    for fwhm in options.fwhm:
        scene, x, y = draw_stars(fwhm, options.stars, np.random.default_rng(options.seed))
        cfa = behind_matrix(scene, np.random.default_rng([options.seed, 1]))
        true_flux, true_width = fluxes(scene, x, y, fwhm), widths(scene, x, y)
        print(f"FWHM {fwhm:g} px, {len(x)} stars       R      G      B")
        for name, method in METHODS.items():
            picture = method(cfa)
            loss = -2500 * np.log10(fluxes(picture, x, y, fwhm) / true_flux)
            bias = np.median(loss, axis=0)
            scatter = 1.4826 * np.median(np.abs(loss - bias), axis=0)
            print(f"  {name:11s} light lost {_row(bias, 0)}  mmag")
            print(f"  {'':11s} scatter    {_row(scatter, 0)}  mmag")
            print(f"  {'':11s} width      {_row(widths(picture, x, y) / true_width, 3)}  of the true one")


def draw_stars(fwhm: float, count: int, rng: np.random.Generator) -> tuple[Image, Image, Image]:
    """Stars on a flat sky: scene ``(ny, nx, 3)`` in ADU, and the stars' x and y in pixels."""
    side = int(np.ceil(np.sqrt(count)))
    row, column = np.divmod(np.arange(count), side)
    x, y = ((place + 0.5) * CELL + rng.uniform(-1, 1, count) for place in (column, row))
    green = FLUX[0] * (FLUX[1] / FLUX[0]) ** rng.random(count)
    flux = green[:, None] * 10 ** (0.4 * rng.normal(0, REDNESS, count)[:, None] * np.array([1, 0, -1]))
    scene = np.full((side * CELL, side * CELL, 3), SKY, np.float32)
    pixel, variance = np.arange(CELL), fwhm**2 / (8 * np.log(2))
    for i in range(count):
        rows, columns = row[i] * CELL + pixel, column[i] * CELL + pixel
        r2 = (rows - y[i])[:, None] ** 2 + (columns - x[i]) ** 2
        profile = np.exp(-0.5 * r2 / variance) / (2 * np.pi * variance)
        scene[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] += (profile[..., None] * flux[i]).astype(np.float32)
    return scene, x.astype(np.float32), y.astype(np.float32)


def behind_matrix(scene: Image, rng: np.random.Generator) -> NDArray[np.uint16]:
    """The one colour that every photosite of a sensor sees, with photon noise, ``(ny, nx)``."""
    cfa = np.empty(scene.shape[:2], np.float32)
    for i, colour in enumerate(PATTERN):
        at = slice(i // 2, None, 2), slice(i % 2, None, 2)
        cfa[at] = scene[..., "RGB".index(colour)][at]
    return np.clip(rng.poisson(cfa), 0, 65535).astype(np.uint16)


def _stamps(picture: Image, x: Image, y: Image) -> tuple[Image, Image]:
    """Cells around the stars over their own sky, ``(n, CELL, CELL, 3)``, and distances, ``(n, CELL, CELL)``."""
    side = picture.shape[0] // CELL
    cells = picture.reshape(side, CELL, side, CELL, 3).swapaxes(1, 2).reshape(-1, CELL, CELL, 3)[: len(x)]
    row, column = np.divmod(np.arange(len(x)), side)
    pixel = np.arange(CELL)
    dy = pixel + (row * CELL - y)[:, None]
    dx = pixel + (column * CELL - x)[:, None]
    distance = np.hypot(dy[:, :, None], dx[:, None, :])
    sky = np.array([cell[far].mean(axis=0) for cell, far in zip(cells, distance > CELL * 0.4, strict=True)])
    return cells - sky[:, None, None], distance


def fluxes(picture: Image, x: Image, y: Image, fwhm: float) -> NDArray[np.float64]:
    """Light of every star within `APERTURE`, ``(n, 3)`` ADU."""
    cells, distance = _stamps(picture, x, y)
    share = np.clip(APERTURE * fwhm - distance + 0.5, 0, 1)
    return (cells * share[..., None]).sum(axis=(1, 2), dtype=np.float64)


def widths(picture: Image, x: Image, y: Image) -> NDArray[np.float64]:
    """FWHM of the mean profile around the known places of the stars, ``(3,)`` pixels: a Gaussian is fitted."""
    cells, distance = _stamps(picture, x, y)
    near = distance < 6
    brightness = cells.sum(axis=(1, 2))
    found = []
    for c in range(3):
        profile = (cells[..., c] / brightness[:, None, None, c])[near]
        (_, sigma), _ = curve_fit(lambda r, a, s: a * np.exp(-0.5 * (r / s) ** 2), distance[near], profile, (0.1, 1.2))
        found.append(abs(sigma) * np.sqrt(8 * np.log(2)))
    return np.array(found)


def _opencv(code: int) -> Callable[[NDArray[np.uint16]], Image]:
    return lambda cfa: cv2.cvtColor(cfa, code).astype(np.float32)


METHODS: dict[str, Callable[[NDArray[np.uint16]], Image]] = {
    "bilinear": _opencv(cv2.COLOR_BayerGRBG2RGB),
    "edge-aware": _opencv(cv2.COLOR_BayerGRBG2RGB_EA),
    "linear": lambda cfa: debayer(cfa.astype(np.float32), PATTERN),
}


def _row(values: NDArray[np.float64], digits: int) -> str:
    rounded = np.round(values, digits) + 0.0  # no "-0"
    return " ".join(f"{value:6.{digits}f}" for value in rounded)


if __name__ == "__main__":
    main()
