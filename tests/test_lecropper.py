"""Crops: what goes, what stays, and that the WCS still points at the same sky."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from astropy.wcs import WCS, Sip
from numpy.typing import NDArray
from scipy import ndimage

from lecropper import MAX_SIDE_SHARE, QualityCrop, altaz_cleanup, autocrop, quality_crop
from zemosaic.coverage import coverage_cut
from zemosaic.tiles import Mosaic, Window, alpha_of

SKY, NOISE = 1000.0, 25.0  # ADU; noise of one frame


def tan_wcs(shape: tuple[int, int], sip: bool = False) -> WCS:
    wcs = WCS(naxis=2)
    suffix = "-SIP" if sip else ""
    wcs.wcs.ctype = ["RA---TAN" + suffix, "DEC--TAN" + suffix]
    wcs.wcs.crval = [359.9, 71.3]
    wcs.wcs.crpix = [shape[1] / 2 + 3.7, shape[0] / 2 - 11.2]
    turn, scale = np.deg2rad(33), 2.39 / 3600
    wcs.wcs.cd = scale * np.array([[-np.cos(turn), np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    if sip:
        a, b = np.zeros((4, 4)), np.zeros((4, 4))
        a[3, 0] = a[1, 2] = b[0, 3] = b[2, 1] = 5e-9
        a[2, 0], b[1, 1] = 3e-7, -2e-7
        wcs.sip = Sip(a, b, None, None, wcs.wcs.crpix)
    wcs.pixel_shape = shape[::-1]
    wcs.wcs.set()
    return wcs


def mosaic_of(coverage: NDArray, light: NDArray | float = SKY, *, sip: bool = False, seed: int = 0) -> Mosaic:
    """A picture of this light with the noise that the mean of so many frames has."""
    rng = np.random.default_rng(seed)
    noise = NOISE / np.sqrt(np.maximum(coverage, 1))[..., None] * rng.standard_normal((*coverage.shape, 3))
    image = (np.broadcast_to(light, coverage.shape)[..., None] + noise).astype(np.float32)
    image[coverage == 0] = np.nan
    coverage = coverage.astype(np.float32)
    return Mosaic(image, coverage, alpha_of(coverage), tan_wcs(coverage.shape, sip))


def with_noise(mosaic: Mosaic, where: tuple[slice, slice], factor: float) -> Mosaic:
    """The picture with the noise of a part of it raised to `factor` times what its coverage explains."""
    image = mosaic.image.copy()
    extra = NOISE * np.sqrt(factor**2 - 1) / np.sqrt(np.maximum(mosaic.coverage[where], 1))
    image[where] += extra[..., None] * np.random.default_rng(9).standard_normal(image[where].shape)
    return replace(mosaic, image=image)


def rosette(shape: tuple[int, int] = (400, 600), frames: int = 10, seed: int = 2) -> NDArray[np.float32]:
    """Coverage of frames turned by up to 8 degrees about nearly the same centre."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float64)
    coverage = np.zeros(shape, np.float32)
    for turn in np.deg2rad(rng.uniform(-8, 8, frames)):
        cy, cx = shape[0] / 2 + rng.normal(0, 6), shape[1] / 2 + rng.normal(0, 6)
        u = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
        v = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
        coverage += (np.abs(u) < 0.38 * shape[1]) & (np.abs(v) < 0.35 * shape[0])
    return coverage


def assert_in_step(mosaic: Mosaic) -> None:
    """No data is no data in image, coverage and alpha alike."""
    covered = mosaic.coverage > 0
    np.testing.assert_array_equal(np.isfinite(mosaic.image).all(axis=-1), covered)
    np.testing.assert_array_equal(mosaic.alpha > 0, covered)
    assert mosaic.wcs.pixel_shape == mosaic.shape[::-1]


# --- the sky stays where it is ---------------------------------------------------------------------------


@pytest.mark.parametrize("sip", [False, True])
@pytest.mark.parametrize("how", ["autocrop", "quality_crop"])
def test_a_crop_keeps_every_star_at_its_sky_position(sip, how):
    coverage = np.zeros((420, 560), np.float32)
    coverage[50:370, 90:500] = 10
    mosaic = mosaic_of(coverage, sip=sip)
    if how == "autocrop":
        cropped, window = (lambda r: (r[0], r[1].window))(autocrop(mosaic, 20))
        y0, x0 = window.y0, window.x0
    else:
        mosaic = with_noise(mosaic, np.s_[:120, :], 3)
        cropped, crop = quality_crop(mosaic)
        y0, x0 = crop.top, crop.left
    assert y0 > 0 and x0 > 0
    before = mosaic.wcs.wcs.crpix.copy(), None if not sip else mosaic.wcs.sip.crpix.copy()
    x, y = np.random.default_rng(1).uniform(130, 300, (2, 50))
    ra, dec = mosaic.wcs.all_pix2world(x, y, 0)
    cx, cy = cropped.wcs.all_world2pix(ra, dec, 0, tolerance=1e-9)
    np.testing.assert_allclose(cx, x - x0, atol=1e-6)
    np.testing.assert_allclose(cy, y - y0, atol=1e-6)
    # The crop owns its WCS: moving it must not have moved the original's.
    np.testing.assert_array_equal(mosaic.wcs.wcs.crpix, before[0])
    cropped.wcs.wcs.crpix += 5
    np.testing.assert_array_equal(mosaic.wcs.wcs.crpix, before[0])
    if sip:
        np.testing.assert_array_equal(mosaic.wcs.sip.crpix, before[1])


# --- autocrop --------------------------------------------------------------------------------------------


def test_autocrop_cuts_to_the_data_and_its_margin():
    coverage = np.zeros((300, 400), np.float32)
    coverage[100:150, 200:280] = 2
    mosaic = mosaic_of(coverage)
    cropped, crop = autocrop(mosaic, 16)
    assert crop.window == Window(84, 166, 184, 296) and crop.n_removed == 0
    np.testing.assert_array_equal(cropped.image, mosaic.image[84:166, 184:296])
    assert_in_step(cropped)


def test_autocrop_stops_at_the_picture():
    coverage = np.zeros((300, 400), np.float32)
    coverage[5:150, 390:] = 2
    assert autocrop(mosaic_of(coverage), 16)[1].window == Window(0, 166, 374, 400)
    mosaic = mosaic_of(np.ones((30, 40)))
    assert autocrop(mosaic)[0] is mosaic


# --- quality crop ----------------------------------------------------------------------------------------


def test_a_good_picture_is_not_cropped():
    mosaic = mosaic_of(np.full((500, 700), 10))
    assert quality_crop(mosaic) == (mosaic, QualityCrop())


def test_fewer_frames_at_the_rim_are_no_reason_to_crop():
    mosaic = mosaic_of(rosette((600, 800)))
    assert quality_crop(mosaic)[0] is mosaic


@pytest.mark.parametrize("side", ["top", "bottom", "left", "right"])
def test_a_noisy_side_is_cut_with_its_margin(side):
    where = {"top": np.s_[:96, :], "bottom": np.s_[-96:, :], "left": np.s_[:, :96], "right": np.s_[:, -96:]}
    mosaic = with_noise(mosaic_of(np.full((640, 640), 10)), where[side], 2)
    cropped, crop = quality_crop(mosaic, band_px=32, margin_px=8)
    assert crop == QualityCrop(**{side: 104}, n_removed=104 * 640)
    assert_in_step(cropped)


def test_one_bad_band_is_no_run():
    mosaic = with_noise(mosaic_of(np.full((640, 640), 10)), np.s_[:32, :], 3)
    assert quality_crop(mosaic, min_run=2)[0] is mosaic
    assert quality_crop(mosaic, min_run=1)[1].top == 40


def test_bad_bands_behind_a_good_one_stay():
    mosaic = with_noise(mosaic_of(np.full((640, 640), 10)), np.s_[64:128, :], 3)
    assert quality_crop(mosaic)[0] is mosaic


def test_no_side_loses_more_than_its_share():
    mosaic = with_noise(mosaic_of(np.full((640, 640), 10)), np.s_[:300, :], 3)
    assert quality_crop(mosaic, k_sigma=1)[1].top <= MAX_SIDE_SHARE * 640


def test_bands_are_counted_from_where_the_data_begin():
    coverage = np.zeros((800, 800), np.float32)
    coverage[100:740, 80:720] = 10
    mosaic = with_noise(mosaic_of(coverage), np.s_[:196, :], 2)
    crop = quality_crop(mosaic)[1]
    assert (crop.top, crop.bottom, crop.left, crop.right) == (204, 60, 80, 80)


def test_a_nebula_at_a_side_is_followed_and_a_light_leak_is_cut_on_demand():
    y, _ = np.mgrid[0:640, 0:640]
    light = SKY + 800 * np.exp(-((y / 120.0) ** 2))
    coverage = np.full(light.shape, 10)
    mosaic = mosaic_of(coverage, light)
    photons = NOISE * np.sqrt(light / SKY - 1) / np.sqrt(10)  # brighter sky is noisier
    extra = photons[..., None] * np.random.default_rng(4).standard_normal(mosaic.image.shape)
    mosaic = replace(mosaic, image=(mosaic.image + extra).astype(np.float32))
    assert quality_crop(mosaic, follow_signal=True)[0] is mosaic
    assert quality_crop(mosaic, follow_signal=False)[1].top >= 64


# --- alt-az clean-up -------------------------------------------------------------------------------------


@pytest.mark.parametrize("nanize", [True, False])
def test_the_rosette_rim_goes_and_the_rest_stays(nanize):
    coverage = rosette()
    mosaic = mosaic_of(coverage)
    cleaned, record = altaz_cleanup(mosaic, nanize=nanize)
    rim = ndimage.binary_opening((coverage < 3), iterations=4) & (coverage > 0)
    body = coverage >= 3
    assert record.threshold == 3 and record.n_removed > 1000
    assert not cleaned.alpha[rim].any() and (cleaned.alpha[body] > 0).all()
    if nanize:
        assert_in_step(cleaned)
        assert (cleaned.coverage[rim] == 0).all()
    else:
        np.testing.assert_array_equal(cleaned.coverage, mosaic.coverage)
        np.testing.assert_array_equal(cleaned.image, mosaic.image)
    np.testing.assert_array_equal(cleaned.image[body], mosaic.image[body])


def test_alpha_rises_from_the_edge_as_documented():
    coverage = np.zeros((400, 500), np.float32)
    coverage[50:350, 50:450] = 10
    cleaned, record = altaz_cleanup(mosaic_of(coverage), margin_percent=10, decay=0.3)
    assert record.ramp_px == 40 and record.n_removed == 0
    distance = np.arange(1, 60)
    t = np.minimum(distance / 40, 1)
    expected = 255 * (1 - np.exp(-t / 0.3)) / (1 - np.exp(-1 / 0.3))
    np.testing.assert_allclose(cleaned.alpha[200, 50:109], expected, atol=6)
    np.testing.assert_allclose(cleaned.alpha[50:109, 250], expected, atol=6)
    assert (cleaned.alpha[100:300, 100:400] == 255).all()


def test_a_coarse_ramp_agrees_with_the_exact_one():
    coverage = np.zeros((1500, 1600), np.float32)
    coverage[100:1430, 77:1501] = 10
    coverage[700:800, :300] = 0
    cleaned, record = altaz_cleanup(mosaic_of(coverage), margin_percent=8)
    t = np.minimum(ndimage.distance_transform_edt(coverage) / record.ramp_px, 1)
    expected = 255 * (1 - np.exp(-t / 0.15)) / (1 - np.exp(-1 / 0.15))
    difference = np.abs(cleaned.alpha - expected)[coverage > 0]
    assert difference.max() < 50 and difference.mean() < 2


def test_a_single_depth_panel_beside_a_deep_one_stays():
    coverage = np.full((200, 400), 10, np.float32)
    coverage[:, 250:] = 200
    assert altaz_cleanup(mosaic_of(coverage))[1].n_removed == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_a_mosaic_of_single_frames_stays(depth):
    assert altaz_cleanup(mosaic_of(np.full((100, 200), depth)))[1].n_removed == 0


def test_a_thin_seam_between_panels_stays_even_where_it_reaches_the_rim():
    coverage = np.zeros((300, 400), np.float32)
    coverage[30:270, 30:370] = 10
    coverage[30:40, 30:370] = 1  # rim
    coverage[30:270, 198:203] = 1  # seam, 5 px wide
    cleaned, record = altaz_cleanup(mosaic_of(coverage), morph_open_px=3)
    assert (cleaned.coverage[50:260, 198:203] == 1).all()
    assert record.n_removed >= 10 * 330
    assert altaz_cleanup(mosaic_of(coverage), morph_open_px=0)[1].n_removed > record.n_removed + 1000


def test_a_shallow_pocket_inside_and_a_small_hole_stay():
    coverage = np.full((300, 400), 10, np.float32)
    coverage[100:200, 100:200] = 1
    coverage[50, 300] = 0
    cleaned, record = altaz_cleanup(mosaic_of(coverage))
    assert record.n_removed == 0
    assert cleaned.alpha[51, 300] == 255  # a lost pixel does not fade what is around it


def test_the_edge_is_softened_after_a_coverage_cut_too():
    cut, _ = coverage_cut(mosaic_of(rosette()), 3.0)
    cleaned, record = altaz_cleanup(cut)
    assert record.n_removed < 100  # notches of the rim that the cut passed over
    assert 0 < np.mean((cleaned.alpha > 0) & (cleaned.alpha < 255)) < 0.3


def test_a_decay_of_zero_is_an_error():
    with pytest.raises(ValueError, match="decay"):
        altaz_cleanup(mosaic_of(np.ones((20, 20))), decay=0)


# --- nothing at all --------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [quality_crop, altaz_cleanup, autocrop])
def test_a_picture_without_data_is_an_error_in_one_sentence(crop):
    with pytest.raises(ValueError, match="no pixel with data"):
        crop(mosaic_of(np.zeros((40, 50))))


@pytest.mark.parametrize("crop", [quality_crop, altaz_cleanup, autocrop])
def test_a_tiny_mono_picture_passes(crop):
    ones = np.ones((3, 4), np.float32)
    mosaic = Mosaic(ones.copy(), ones, alpha_of(ones), WCS(naxis=2))
    assert crop(mosaic)[0].shape == (3, 4)
