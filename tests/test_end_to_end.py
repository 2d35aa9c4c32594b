"""A known sky is observed, cut up, rebuilt by the whole chain, and compared with what it was.

All fields are small, so that the tests are quick: their mosaics hold some fifteen bright stars, and the photon noise of
those sets most of the limits below.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from zemosaic.calibrate import debayer
from zemosaic.demo import FieldTruth, make_field
from zemosaic.settings import Settings
from zemosaic_worker import run_hierarchical_mosaic

ROOT = Path(__file__).resolve().parents[1]
FIELD = {"panels": (2, 1), "shape": (240, 320), "star_density": 4000, "nebula": 60, "sky": 300}
CLEAN = {"trails": 0, "cosmics": 0, "hot_fraction": 0}
BOX = 16  # px, side of the boxes that the sky is compared in
STAMP = 14  # px, half side of the stamp around a star


@dataclass(frozen=True)
class Rebuilt:
    """A mosaic beside the sky that it should show."""

    product: Path
    truth: FieldTruth

    @cached_property
    def image(self) -> NDArray[np.float64]:
        """``(H, W, C)``."""
        pixels = fits.getdata(self.product).astype(float)
        return np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 else pixels[..., None]

    @cached_property
    def coverage(self) -> NDArray[np.float64]:
        return fits.getdata(self.product, "COVERAGE").astype(float)

    @cached_property
    def wcs(self) -> WCS:
        return WCS(fits.getheader(self.product)).celestial

    @cached_property
    def nebula(self) -> NDArray[np.float64]:
        return np.atleast_3d(self.truth.nebula(self.wcs, self.coverage.shape)).astype(float)

    @cached_property
    def light(self) -> NDArray[np.float64]:
        """Nebula and stars, at the typical seeing of the subs."""
        fwhm = float(np.median([frame.fwhm for frame in self.truth.frames]))
        return np.atleast_3d(self.truth.render(self.wcs, self.coverage.shape, fwhm)).astype(float)

    def stars(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Bright, single stars: flux over true flux ``(n, C)``, and distance from their true positions ``(n,)``, px."""
        x, y, index = self.truth.star_pixels(self.wcs, self.coverage.shape, -STAMP - 1)
        flux = self.truth.flux[index].mean(axis=1)
        company = cKDTree(np.c_[x, y]).query_ball_point(np.c_[x, y], STAMP)
        ratios, distances = [], []
        for i in np.flatnonzero(flux > 10000):
            row, column = round(y[i]), round(x[i])
            stamp = np.s_[row - STAMP : row + STAMP + 1, column - STAMP : column + STAMP + 1]
            if self.coverage[stamp].min() < 5 or flux[company[i]].sum() > 1.1 * flux[i]:
                continue
            seen, true = (_flux_and_centroid(picture[stamp]) for picture in (self.image, self.light))
            ratios.append(seen[0] / true[0])
            distances.append(np.hypot(*(seen[1] - true[1])))
        return np.array(ratios), np.array(distances)

    def sky(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """What is left of the picture without its truth, away from stars: boxes, single pixels, and where those are.

        The common level and tilt of all frames cannot be known from the frames, so a plane is taken off.

        Returns
        -------
        boxes : ndarray
            ``(n, C)`` medians of boxes, ADU.
        pixels : ndarray
            ``(H, W, C)`` in units of their noise.
        dark : ndarray
            ``(H, W)`` bool.
        """
        scale = np.median(self.stars()[0], axis=0)
        dark = ((self.light - self.nebula).max(axis=2) < 1) & (self.coverage >= 5)
        rows, columns = np.mgrid[: dark.shape[0], : dark.shape[1]]
        plane = np.stack([np.ones(dark.shape), rows, columns], axis=-1)
        rest = self.image / scale - self.light
        rest -= plane @ np.linalg.lstsq(plane[dark], rest[dark], rcond=None)[0]
        ny, nx = (size // BOX * BOX for size in dark.shape)
        masked = np.where(dark[..., None], rest, np.nan)[:ny, :nx]
        boxes = masked.reshape(ny // BOX, BOX, nx // BOX, BOX, -1).swapaxes(1, 2).reshape(-1, BOX**2, rest.shape[2])
        boxes = boxes[np.isfinite(boxes[..., 0]).sum(axis=1) > BOX**2 / 2]
        pixels = rest * np.sqrt(self.coverage)[..., None]
        return np.nanmedian(boxes, axis=1), pixels / (1.4826 * np.median(np.abs(pixels[dark]), axis=0)), dark


def _flux_and_centroid(stamp: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Aperture flux per channel over the ring around it, and windowed centroid of all channels together."""
    y, x = np.mgrid[-STAMP : STAMP + 1, -STAMP : STAMP + 1]
    r = np.hypot(x, y)
    stamp = stamp - np.median(stamp[(r > 10) & (r < 14)], axis=0)
    grey, centre = stamp.sum(axis=2), np.zeros(2)
    for _ in range(15):
        window = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / 4.5) * grey
        centre = centre + 2 * (np.array([(window * y).sum(), (window * x).sum()]) / window.sum() - centre)
    return stamp[r < 7.5].sum(axis=0), centre


def robust_scatter(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1.4826 * np.median(np.abs(values - np.median(values, axis=0)), axis=0)


def sds(inputs: Path | Sequence[Path], out: Path, **settings: object) -> Path:
    """A run by the SDS route, its product."""
    settings = Settings(**({"num_processing_workers": 1} | settings))
    product = run_hierarchical_mosaic(inputs, out, settings, sds=True).product
    assert product is not None
    return product


@pytest.fixture(scope="session")
def field(tmp_path_factory: pytest.TempPathFactory) -> FieldTruth:
    """24 Bayer subs of two panels: a nebula, hot pixels, cosmic rays, satellites, clouds, moonlight from all sides."""
    return make_field(tmp_path_factory.mktemp("field") / "subs", frames=24, trails=0.25, **FIELD)


@pytest.fixture(scope="session")
def subs(field: FieldTruth) -> Path:
    return field.paths[0].parent


@pytest.fixture(scope="session")
def rebuilt(field: FieldTruth, subs: Path, tmp_path_factory: pytest.TempPathFactory) -> Rebuilt:
    return Rebuilt(sds(subs, tmp_path_factory.mktemp("out")), field)
