"""The preview: neutral sky, honest colours, the right way up, and no image that breaks it."""

from __future__ import annotations

import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from zemosaic.demo import make_field, tangent_header
from zemosaic.preview import encode_png, preview_rgba
from zemosaic.tiles import Mosaic, alpha_of

SHARED = Path(__file__).parents[2] / "shared"


def mosaic_of(image: np.ndarray) -> Mosaic:
    """A mosaic of an image; covered where every channel is finite."""
    image = image.astype(np.float32)
    coverage = np.isfinite(np.atleast_3d(image)).all(axis=-1).astype(np.float32)
    return Mosaic(image, coverage, alpha_of(coverage), WCS(tangent_header(83.8, 10, coverage.shape, scale=2.4)))


def starfield(sky=(900.0, 1000.0, 700.0), noise=5.0, shape=(200, 300)) -> np.ndarray:
    """A sky with a cast, a red star at (150, 60) and a blue one at (50, 200), rows upwards."""
    image = np.random.default_rng(3).normal(0, noise, (*shape, 3)) + sky
    y, x = np.indices(shape)
    for row, column, colour in ((150, 60, (4000, 2000, 1000)), (50, 200, (1000, 2000, 4000))):
        psf = np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * 2.0**2))
        image += psf[..., None] * colour
    return image


def test_picture_is_upright():
    image = starfield()
    image[:20] = np.nan
    picture = preview_rgba(mosaic_of(image), p_high=100)
    assert picture.shape == (200, 300, 4)
    assert picture.dtype == np.uint8
    # Row 150 of a FITS file is 49 rows below the top edge of the picture, and its first rows last.
    assert np.unravel_index(picture[..., 0].argmax(), (200, 300)) == (49, 60)
    assert (picture[-20:] == 0).all()
    assert (picture[:-20, :, 3] == 255).all()


@pytest.mark.parametrize("sky", [(900, 1000, 700), (0.1, 0.2, 0.05), (-50, 20, 5)])
def test_sky_becomes_a_neutral_dark_grey(sky):
    noise = 1e-3 if max(sky) < 1 else 5.0
    image = starfield(noise=1.0) * noise + np.array(sky) - np.array((900, 1000, 700)) * noise
    picture = preview_rgba(mosaic_of(image)).astype(float)
    levels = np.median(picture[..., :3], axis=(0, 1))
    assert np.ptp(levels) <= 3
    assert 15 < levels.mean() < 50


def test_stars_keep_their_colours_and_their_cores():
    picture = preview_rgba(mosaic_of(starfield(noise=2.0))).astype(int)
    for row, column, bright, faint in ((49, 60, 0, 2), (149, 200, 2, 0)):
        core = picture[row, column, :3]
        assert core[bright] > core[1] > core[faint]
        assert core[faint] < 0.6 * core[bright]
        # Far above white, and yet no flat disc: the middle stays the brightest.
        assert core[bright] > picture[row, column + 2, bright] > picture[row, column + 4, bright]


def test_white_balance_takes_out_a_cast_only_if_asked():
    image = starfield()
    image[..., 1] = 1000 + (image[..., 1] - 1000) * 1.8
    peak = {}
    for balance in (False, True):
        picture = preview_rgba(mosaic_of(image), apply_wb=balance).astype(float)
        stars = picture[..., :3].max(axis=-1) > 120
        peak[balance] = picture[stars][:, :3].mean(axis=0)
    assert peak[False][1] > 1.2 * peak[False][[0, 2]].mean()
    assert peak[True][1] == pytest.approx(peak[True][[0, 2]].mean(), rel=0.1)


def test_a_stronger_stretch_lifts_faint_light():
    image = starfield()
    image[80:120, 80:220] += 100
    faint = [preview_rgba(mosaic_of(image), asinh_a=a)[100, 150, :3].mean() for a in (1, 12, 100)]
    assert faint[0] < faint[1] < faint[2]


@pytest.mark.parametrize(("max_dim", "shape"), [(150, (100, 150)), (70, (47, 70)), (3200, (200, 300))])
def test_size(max_dim, shape):
    assert preview_rgba(mosaic_of(starfield()), max_dim=max_dim).shape == (*shape, 4)


def test_downsampling_averages_area_and_leaves_holes_out():
    from zemosaic.preview import STRIP, _area_mean

    plane = np.random.default_rng(1).normal(100, 10, (2 * STRIP + 40, 300)).astype(np.float32)
    plane[::7, ::5] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        wanted = np.nanmean(plane.reshape(STRIP + 20, 2, 150, 2), axis=(1, 3))
    np.testing.assert_allclose(_area_mean(plane[..., None], (150, STRIP + 20), 2)[..., 0], wanted, rtol=1e-5)
    smooth = np.broadcast_to(np.arange(300, dtype=np.float32), (100, 300))
    uneven = _area_mean(smooth[..., None], (70, 23), 2)[..., 0]
    np.testing.assert_allclose(uneven, np.broadcast_to((np.arange(70) + 0.5) * 300 / 70 - 0.5, (23, 70)), atol=0.06)
    holes = np.full((4, 4), np.nan, np.float32)
    holes[0, 0] = 5
    assert np.isnan(_area_mean(holes[..., None], (1, 1), 1))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "image",
    [
        np.full((40, 50, 3), 7.0),
        np.full((40, 50), -7.0),
        np.zeros((1, 1, 3)),
        np.full((30, 30, 3), np.nan),
        np.where(np.arange(900).reshape(30, 30) == 450, 5.0, np.nan),
        np.where(np.arange(900).reshape(30, 30) < 3, np.inf, 1e30),
        np.full((3, 4000), 2.0),
        np.array([[0.0, 1e-9]]),
    ],
    ids=["constant", "mono", "one pixel", "empty", "nearly empty", "huge", "thin", "two pixels"],
)
@pytest.mark.parametrize("balance", [False, True])
def test_odd_images(image, balance):
    mosaic = mosaic_of(image)
    picture = preview_rgba(mosaic, apply_wb=balance)
    assert picture.shape[:2] <= mosaic.shape
    assert picture[..., 3].any() == mosaic.alpha.any()
    assert picture[picture[..., 3] > 0][:, :3].max(initial=0) < 60


def test_same_picture_every_time_and_the_mosaic_untouched():
    mosaic = mosaic_of(starfield())
    before = mosaic.image.copy()
    pictures = [preview_rgba(mosaic, max_dim=130) for _ in range(2)]
    np.testing.assert_array_equal(*pictures)
    np.testing.assert_array_equal(mosaic.image, before)


def test_png_keeps_every_pixel():
    picture = preview_rgba(mosaic_of(starfield()))
    read = cv2.imdecode(np.frombuffer(encode_png(picture), np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(cv2.cvtColor(read, cv2.COLOR_BGRA2RGBA), picture)


def test_demo_field_is_worth_looking_at(tmp_path):
    truth = make_field(tmp_path, frames=1)
    wcs, shape = truth.canvas()
    image = truth.render(wcs, shape, 2.8) + np.random.default_rng(0).normal(600, 10, (*shape, 3))
    picture = preview_rgba(mosaic_of(image)).astype(float)
    light = picture[::-1, :, :3].mean(axis=-1)
    nebula = truth.nebula(wcs, shape).mean(axis=-1)
    dark, bright = light[nebula < 10], light[nebula > 150]
    assert np.median(dark) < 40
    assert np.median(bright) > 60
    assert np.percentile(light, 99.9) > 150
    assert (picture[..., :3] == 0).mean() < 0.02


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared data")
def test_real_mono_tile():
    path = SHARED / "data" / "m17-2mass" / "aK_asky_990502s1350092.fits.gz"
    picture = preview_rgba(mosaic_of(fits.getdata(path)))
    levels = picture[..., 0].astype(float)
    assert (picture[..., 0] == picture[..., 2]).all()
    assert 10 < np.percentile(levels, 10) < 40
    assert np.percentile(levels, 99.5) > 120
