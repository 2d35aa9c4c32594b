"""The simulator: what it says about its subs is what is in the files."""

from __future__ import annotations

import numpy as np
import pytest
from astropy.coordinates import FK5, SkyCoord
from astropy.io import fits
from astropy.time import Time
from astropy.wcs import WCS

from zemosaic.demo import BRIGHTEST, PEDESTAL, READ_NOISE, ZERO_POINT, FieldTruth, FrameTruth, make_demo, make_field
from zemosaic.events import Events
from zemosaic.settings import Settings
from zemosaic.solve.catalogue import load_catalogue
from zemosaic.solve.command import solve_files

CLEAN = {"trails": 0.0, "cosmics": 0, "hot_fraction": 0.0}


def expected(truth: FieldTruth, frame: FrameTruth) -> np.ndarray:
    """The noise-free sub, put together from what the truth says, ADU."""
    shape = truth.recipe.shape
    light = np.atleast_3d(truth.render(frame.wcs, shape, frame.fwhm)) * frame.transparency
    light = light + frame.background(shape)
    if truth.recipe.pattern is None:
        return light[..., 0] + PEDESTAL
    y, x = np.indices(shape)
    channel = np.array(["RGB".index(letter) for letter in truth.recipe.pattern])[(y % 2) * 2 + x % 2]
    return np.take_along_axis(light, channel[..., None], axis=-1)[..., 0] + PEDESTAL


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pattern": None},
        {"pattern": "BGGR", "parity": -1, "sip_px": 1.7, "center": (359.99, 72.0)},
        {"center": (10.0, 89.9), "blurred": 0.5, "shuffle": True},
    ],
)
def test_subs_are_the_truth_plus_noise(tmp_path, options):
    truth = make_field(tmp_path, frames=4, shape=(120, 160), **(CLEAN | options))
    for frame in truth.frames:
        pixels = fits.getdata(frame.path)
        assert pixels.dtype == np.uint16
        wanted = expected(truth, frame)
        noise = np.sqrt(wanted - PEDESTAL + READ_NOISE**2)
        pull = (pixels - wanted) / noise
        assert abs(pull.mean()) < 0.03
        assert pull.std() == pytest.approx(1, abs=0.03)
        assert np.abs(pull).max() < 7
        assert pixels.max() < 65535


def test_same_recipe_same_bytes(tmp_path):
    first = make_field(tmp_path / "a", frames=2, shape=(60, 80))
    again = make_field(tmp_path / "b", frames=2, shape=(60, 80))
    other = make_field(tmp_path / "c", frames=2, shape=(60, 80), seed=2)
    for one, same, different in zip(first.paths, again.paths, other.paths, strict=True):
        assert one.read_bytes() == same.read_bytes()
        assert one.read_bytes() != different.read_bytes()


def test_header_reads_like_a_seestar(tmp_path):
    truth = make_field(tmp_path, frames=2, shape=(60, 80))
    header = fits.getheader(truth.paths[0])
    assert (header["BAYERPAT"], header["EXPTIME"], header["INSTRUME"]) == ("GRBG", 10.0, "Seestar S50")
    assert 206.265 * header["XPIXSZ"] / header["FOCALLEN"] == pytest.approx(2.39, abs=1e-3)
    # The pointing is of date: minutes of arc from the J2000 centre, and right once precessed.
    centre = SkyCoord(*truth.frames[0].wcs.wcs.crval, unit="deg")
    read = SkyCoord(header["RA"], header["DEC"], unit="deg")
    assert centre.separation(read).arcmin > 5
    of_date = SkyCoord(header["RA"], header["DEC"], unit="deg", frame=FK5(equinox=Time(header["DATE-OBS"])))
    assert of_date.transform_to("icrs").separation(centre).arcsec < 1


@pytest.mark.filterwarnings("ignore:.*datfix")
def test_wcs_in_the_header_or_not(tmp_path):
    told = make_field(tmp_path / "a", frames=1, shape=(60, 80), sip_px=1.0)
    read = WCS(fits.getheader(told.paths[0]))
    np.testing.assert_allclose(read.all_pix2world(3, 5, 0), told.frames[0].wcs.all_pix2world(3, 5, 0), rtol=1e-12)
    silent = make_field(tmp_path / "b", frames=1, shape=(60, 80), sip_px=1.0, with_wcs=False)
    assert "CTYPE1" not in fits.getheader(silent.paths[0])
    np.testing.assert_array_equal(fits.getdata(silent.paths[0]), fits.getdata(told.paths[0]))


@pytest.mark.parametrize("parity", [1, -1])
@pytest.mark.parametrize("center", [(83.8, 10.0), (0.0, -30.0), (200.0, 89.95)])
def test_panels_overlap_as_asked_anywhere_on_the_sky(tmp_path, center, parity):
    truth = make_field(
        tmp_path,
        frames=4,
        shape=(60, 80),
        center=center,
        parity=parity,
        overlap=0.25,
        rotation_deg=0.0,
        dither_px=0.0,
    )
    wcs, (height, width) = truth.canvas()
    # 1.75 panels across and down, and a pixel or two of rounding; wider if panels were turned.
    assert width == pytest.approx(1.75 * 80, abs=3)
    assert height == pytest.approx(1.75 * 60, abs=3)
    assert all(np.sign(np.linalg.det(frame.wcs.pixel_scale_matrix)) == parity for frame in truth.frames)
    middle = wcs.wcs_pix2world((width - 1) / 2, (height - 1) / 2, 0)
    away = SkyCoord(*middle, unit="deg").separation(SkyCoord(*center, unit="deg"))
    assert away.arcsec < 2 * truth.recipe.scale


def test_distortion_is_as_large_as_asked_in_the_corners(tmp_path):
    truth = make_field(tmp_path, frames=1, panels=(1, 1), shape=(60, 80), sip_px=1.7)
    wcs = truth.frames[0].wcs
    sky = wcs.all_pix2world(-0.5, -0.5, 0)
    assert np.hypot(*(np.array(wcs.wcs_world2pix(*sky, 0)) + 0.5)) == pytest.approx(1.7, rel=0.03)


def test_defects_are_where_the_truth_says(tmp_path):
    truth = make_field(tmp_path, frames=8, shape=(60, 80), trails=0.25, blurred=0.5, hot_fraction=0.01, cosmics=0)
    assert sum(frame.trail for frame in truth.frames) == 2
    assert sum(frame.blurred for frame in truth.frames) == 4
    assert min(f.fwhm for f in truth.frames if f.blurred) > max(f.fwhm for f in truth.frames if not f.blurred)
    for frame in truth.frames:
        excess = fits.getdata(frame.path) - expected(truth, frame)
        assert (truth.heat > 0).sum() == pytest.approx(48, abs=25)
        assert (excess[truth.heat > 0] > 1500).all()
        assert (np.delete(excess.ravel(), np.flatnonzero(truth.heat)).max() > 400) == frame.trail


def test_stars_keep_their_flux_on_any_grid(tmp_path):
    truth = make_field(tmp_path, frames=1, panels=(1, 1), nebula=0.0, star_density=300.0)
    wcs, shape = truth.canvas()
    fine = wcs.deepcopy()
    fine.wcs.cd /= 2
    fine.wcs.crpix = (wcs.wcs.crpix - 0.5) * 2 + 0.5
    x, y, index = truth.star_pixels(wcs, shape, margin=-25)
    brightest = np.argmax(truth.flux[index, 1])
    box = (
        slice(int(y[brightest]) - 20, int(y[brightest]) + 21),
        slice(int(x[brightest]) - 20, int(x[brightest]) + 21),
    )
    coarse_sum = truth.render(wcs, shape, 2.8)[box].sum(axis=(0, 1))
    fine_box = tuple(slice(2 * s.start, 2 * s.stop) for s in box)
    fine_sum = truth.render(fine, (2 * shape[0], 2 * shape[1]), 2.8)[fine_box].sum(axis=(0, 1))
    np.testing.assert_allclose(coarse_sum, truth.flux[index[brightest]], rtol=0.01)
    np.testing.assert_allclose(fine_sum, 4 * coarse_sum, rtol=0.003)


@pytest.mark.parametrize("shape", [(64, 64), (240, 320)])
def test_nebula_is_smooth_colourful_and_exact(tmp_path, shape):
    truth = make_field(tmp_path, frames=1, shape=shape)
    wcs, size = truth.canvas()
    nebula = truth.nebula(wcs, size)
    x, y = truth.plane.wcs_world2pix(*wcs.wcs_pix2world(*np.meshgrid(np.arange(size[1]), np.arange(size[0])), 0), 0)
    np.testing.assert_allclose(nebula, truth.clouds.at(x / truth.radius, y / truth.radius), atol=0.5)
    assert nebula.min() >= 0
    assert nebula.max() <= 1.05 * truth.recipe.nebula
    hue = nebula[nebula.sum(axis=-1) > 100]
    assert np.ptp(hue[:, 0] / hue.sum(axis=1)) > 0.1


def test_real_stars_are_those_of_the_catalogue_and_the_invented_ones_are_fainter(tmp_path):
    truth = make_field(
        tmp_path, frames=1, panels=(1, 1), real_stars=True, scale=8.0, center=(38.0, 61.0), star_density=250.0
    )
    known = load_catalogue().cone(38.0, 61.0, 1.0)
    sky, stars = (SkyCoord(ra, dec, unit="deg") for ra, dec in ((known.ra, known.dec), (truth.ra, truth.dec)))
    nearest, away, _ = stars.match_to_catalog_sky(sky)
    real = away.arcsec < 1e-3
    # The middle channel has no colour in it.
    wanted = np.minimum(10 ** (0.4 * (ZERO_POINT - known.mag[nearest[real]])), BRIGHTEST)
    np.testing.assert_allclose(truth.flux[real, 1], wanted, rtol=1e-6)
    assert real.sum() > 20
    assert (~real).sum() > 100
    assert truth.flux[~real, 1].max() < wanted.min()


def test_every_sub_of_the_demo_is_found_on_the_sky(tmp_path):
    truth = make_demo(tmp_path)
    shape = truth.recipe.shape
    known = load_catalogue().cone(*truth.recipe.center, 2.0)
    solved = solve_files([tmp_path], Settings(num_processing_workers=1), Events())
    assert not solved.left_out
    where = {frame.path: place.wcs for frame, place in solved.places.items()}
    corners = np.array([[0, 0], [shape[1] - 1, 0], [0, shape[0] - 1], [shape[1] - 1, shape[0] - 1]])
    for frame in truth.frames:
        x, y = frame.wcs.all_world2pix(known.ra, known.dec, 0)
        assert ((x > 0) & (x < shape[1] - 1) & (y > 0) & (y < shape[0] - 1)).sum() >= 12
        assert "CTYPE1" not in fits.getheader(frame.path)
        found = frame.wcs.all_world2pix(where[frame.path].all_pix2world(corners, 0), 0)
        assert np.abs(found - corners).max() < 0.5  # pixels
        assert fits.getdata(frame.path).max() < 65535


@pytest.mark.parametrize("options", [{"parity": 0}, {"pattern": "RGB"}])
def test_nonsense_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match=r"parity|pattern"):
        make_field(tmp_path, **options)
    with pytest.raises(TypeError, match="hot_pixels"):
        make_field(tmp_path, hot_pixels=3)
