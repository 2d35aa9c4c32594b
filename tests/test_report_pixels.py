"""What the pixels themselves tell: noise, sharpness, trails, holes."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from report_field import NOISE, Fault, blank, invent, line, measured

import zemosaic.report.surface as surface_module
from zemosaic.report.defects import find_holes, find_trails
from zemosaic.report.evidence import Evidence
from zemosaic.report.noise import binned_noise, expected_noise, measure_noise
from zemosaic.report.sharpness import measure_sharpness
from zemosaic.report.surface import measure_surface, nan_median


@pytest.fixture(scope="module")
def good() -> Evidence:
    return invent()


@pytest.mark.parametrize("workers", [1, 3])
def test_the_picture_may_be_looked_at_in_strips(workers: int, monkeypatch: pytest.MonkeyPatch):
    """Of any height, whatever lies on the lines between them; the picture is no whole number of anything."""
    made = invent()
    image, coverage = made.image[:-3, :-5].copy(), made.coverage[:-3, :-5]
    image[150:260, 200:300] = np.nan
    evidence = Evidence(image, coverage)
    whole = measure_surface(evidence)
    monkeypatch.setattr(surface_module, "_ROWS", 28)
    strips = measure_surface(evidence, workers)
    for name in ("sky", "free", "fine", "fine_free", "valid", "coverage", "noise", "luminance", "luminance_noise"):
        np.testing.assert_array_equal(getattr(strips, name), getattr(whole, name), err_msg=name)
    assert 0.02 < 1 - whole.free.sum() / whole.valid.sum() < 0.5  # some stars are masked


def trails(image: np.ndarray):
    return find_trails(*measured(Evidence(image)))


# --- noise ----------------------------------------------------------------------------------------------------


def test_noise_of_white_noise():
    surface = measure_surface(Evidence(blank((600, 800), noise=6.0)))
    assert surface.typical_noise[0] == pytest.approx(6, rel=0.03)
    assert np.nanmedian(binned_noise(surface)) == pytest.approx(6, rel=0.05)


def test_binning_takes_the_correlation_out():
    smooth = cv2.GaussianBlur(blank((800, 800), noise=6.0), (0, 0), 0.5)
    surface = measure_surface(Evidence(smooth))
    assert surface.typical_noise[0] < 4
    assert np.nanmedian(binned_noise(surface)) == pytest.approx(6, rel=0.15)  # smoothing reaches across cells


def test_noise_is_blind_to_slopes_and_stars(good: Evidence):
    yy, xx = np.mgrid[: good.shape[0], : good.shape[1]].astype(np.float32)
    sloped = replace(good, image=good.image + (0.5 * xx - 0.2 * yy)[..., None])
    figures = [measure_noise(e, measure_surface(e)) for e in (good, sloped)]
    for each in figures:
        assert each.ratio == pytest.approx(1, abs=0.08)
        assert each.pixel == pytest.approx(NOISE / np.sqrt(8), rel=0.08)
        assert each.complete > 0.99


def test_structure_is_no_noise_but_noise_is():
    """Clouds of 10 px that scatter the means of 8x8 px by four times the noise; then three times the noise on top."""
    evidence = invent(channels=1)
    rng = np.random.default_rng(3)
    clouds = cv2.GaussianBlur(rng.normal(size=evidence.shape).astype(np.float32), (0, 0), 10.0)
    structured = evidence.image + 60 * clouds / clouds.std()
    noisy = structured + 3 * NOISE / np.sqrt(8) * rng.normal(size=evidence.shape)
    found = [replace(evidence, image=image.astype(np.float32)) for image in (structured, noisy)]
    quiet, loud = (measure_noise(each, measure_surface(each)).ratio[0] for each in found)
    assert quiet < 1.25 and loud > 2.0


def test_expected_noise_follows_weights_and_photosites(good: Evidence):
    surface = measure_surface(replace(good, coverage=None))
    frames = good.frames
    depth, plain = expected_noise(frames, surface)
    corner = np.s_[10, 10]
    assert depth[corner] == 8 and plain[corner] == pytest.approx(NOISE / np.sqrt(8), rel=1e-3)
    bayer = replace(frames, photosites=frames.photosites * [0.25, 0.5, 0.25])
    assert expected_noise(bayer, surface)[1][corner] == pytest.approx(NOISE / np.sqrt(8) * np.array([2, 2**0.5, 2]))
    weight, noise = frames.weight.copy(), frames.noise.copy()
    weight[0], noise[0] = 0.25, 2 * NOISE  # inverse variance: the noisy frame counts as a quarter
    odd = expected_noise(replace(frames, weight=weight, noise=noise), surface)[1]
    assert odd[corner] == pytest.approx(NOISE / np.sqrt(7.25), rel=1e-3)


def test_noise_beyond_the_frames_shows():
    evidence = invent()
    noisy = evidence.image.copy()
    noisy[:, 400:] += np.random.default_rng(1).normal(0, 15, noisy[:, 400:].shape).astype(np.float32)
    worse = replace(evidence, image=noisy)
    figures = measure_noise(worse, measure_surface(worse))
    assert np.nanmedian(figures.map[:, 8:-1]) == pytest.approx(np.hypot(1, 15 / (NOISE / np.sqrt(8))), rel=0.25)
    assert np.nanmedian(figures.map[:, :5]) == pytest.approx(1, rel=0.15)


def test_missing_sky_is_counted(good: Evidence):
    holed = good.image.copy()
    holed[100:160, 100:200] = np.nan
    figures = measure_noise(replace(good, image=holed), measure_surface(replace(good, image=holed)))
    assert 1 - figures.complete == pytest.approx(60 * 100 / (560 * 760), rel=0.4)


def test_nan_median():
    values = np.array([[3, np.nan, 1, 2], [np.nan, np.nan, np.nan, 4], [np.nan] * 4])
    assert nan_median(values).tolist()[:2] == [2, 4] and np.isnan(nan_median(values)[2])
    assert np.isnan(nan_median(values, 0.5)[1])


# --- sharpness ------------------------------------------------------------------------------------------------


def test_widths_of_a_good_mosaic(good: Evidence):
    figures = measure_sharpness(good, measured(good)[1])
    assert figures.ratio == pytest.approx(1, abs=0.05)
    assert figures.evenness < 1.08 and figures.ellipticity < 0.08
    assert figures.lots.tolist() == [1, 1, 1, 1]


def test_blurred_corner_shows_in_the_map():
    evidence = invent(Fault(lot=0, fwhm=4.8))  # lower left panel
    figures = measure_sharpness(evidence, measured(evidence)[1])
    assert figures.lots == pytest.approx([1.6, 1, 1, 1])
    assert figures.fwhm_map[0, 0] > 1.2 * np.nanmedian(figures.fwhm_map)


def test_elongated_stars_show(good: Evidence):
    trailed = np.stack([cv2.blur(np.ascontiguousarray(c), (6, 1)) for c in np.moveaxis(good.image, 2, 0)], axis=2)
    figures = measure_sharpness(replace(good, image=trailed), measured(Evidence(trailed))[1])
    assert figures.ellipticity > 0.2


# --- trails and holes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("height", [6.0, 20.0, 500.0])
@pytest.mark.parametrize("ends", [((60, 50), (450, 330)), ((200, 20), (230, 380)), ((30, 200), (480, 205))])
def test_trail_is_found_from_end_to_end(height: float, ends: tuple):
    found = trails(line(blank(), *ends, height))
    assert len(found) >= 1
    places = sorted([(found[0].x0, found[0].y0), (found[0].x1, found[0].y1)])
    assert np.allclose(places, sorted(ends), atol=45)
    assert found[0].significance > 7 and found[0].length > 200


def test_brighter_trails_have_more_contrast():
    found = [trails(line(blank(), (60, 50), (450, 330), h))[0].contrast for h in (8, 20, 100)]
    assert np.all(np.diff(found) > 0) and found[2] / found[0] == pytest.approx(12.5, rel=0.4)


def test_two_trails_are_two():
    image = line(line(blank(), (60, 50), (450, 330), 15), (40, 350), (470, 120), 15)
    assert len(trails(image)) == 2


@pytest.mark.parametrize("seed", range(6))
def test_noise_has_no_trail(seed: int):
    assert trails(blank((600, 800), seed=seed)) == []


def test_stars_nebula_and_steps_are_no_trail(good: Evidence):
    assert find_trails(*measured(good)) == []
    stepped = blank((600, 800))
    yy, xx = np.mgrid[:600, :800]
    stepped += np.float32(10) * (xx + 0.3 * yy > 400)
    assert trails(stepped) == []
    stepped += (300 * np.exp(-0.5 * ((xx - 500) ** 2 + (yy - 200) ** 2) / 60**2)).astype(np.float32)
    assert trails(stepped) == []


def test_holes_are_counted_and_placed():
    image = blank()
    image[100:120, 200:240] = np.nan
    image[300:304, 50:54] = np.nan
    image[:, :20] = np.nan  # the outside is no hole
    holes, area = find_holes(measure_surface(Evidence(image)))
    assert area == 800 + 16 and len(holes) == 2
    assert (holes[0].x, holes[0].y, holes[0].area) == (219.5, 109.5, 800)
    assert find_holes(measure_surface(Evidence(blank()))) == ([], 0.0)


def test_stars_in_a_row_are_no_trail():
    image = blank((500, 600))
    for k, height in enumerate([30, 300, 90, 2000, 60, 800, 40, 5000, 120, 50, 1500, 70] * 3):
        x, y = 60 + 13 * k, 60 + 9 * k
        image = line(image, (x - 4.0, y - 3.0), (x + 4.0, y + 3.0), height)
    assert not trails(image)
    assert trails(line(image, (60.0, 300.0), (500.0, 420.0), 8.0))


def test_what_is_narrower_than_a_star_tells_no_width(good: Evidence):
    fwhm = good.frames.fwhm.copy()
    fwhm[[0, 1, 2, 3, 4]] = [0.0, 0.3, 0.5, 0.4, np.nan]
    spotted = replace(good, frames=replace(good.frames, fwhm=fwhm))
    figures = measure_sharpness(spotted, measured(good)[1])
    assert figures.lots == pytest.approx(1, abs=0.02)
    assert figures.ratio == pytest.approx(measure_sharpness(good, measured(good)[1]).ratio, rel=0.01)


def test_ridge_of_a_nebula_is_no_trail():
    image = blank((500, 600))
    yy, xx = np.mgrid[:500, :600]
    ridge = 60 * np.exp(-0.5 * ((xx - yy - 40) / 2**0.5 / 7) ** 2) * ((xx > 100) & (xx < 500))
    assert not trails((image + ridge).astype(np.float32))
