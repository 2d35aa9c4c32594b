"""Coverage cut and two-pass renormalisation on maps and pictures whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy import ndimage

from zemosaic.coverage import coverage_cut, coverage_threshold, two_pass_renorm, typical_coverage
from zemosaic.tiles import Mosaic, alpha_of

SKY, NOISE = 1100.0, 25.0  # ADU; noise of one frame


def mosaic_of(
    coverage: NDArray, light: NDArray | float = SKY, seed: int = 0, noise: float = NOISE, channels: int = 3
) -> Mosaic:
    """A picture of this light with the noise that the mean of so many frames has."""
    rng = np.random.default_rng(seed)
    shape = (*coverage.shape, 3) if channels == 3 else coverage.shape
    spread = noise / np.sqrt(np.maximum(coverage, 1))
    light = np.broadcast_to(light, coverage.shape)
    if channels == 3:
        spread, light = spread[..., None], light[..., None]
    image = (light + spread * rng.standard_normal(shape)).astype(np.float32)
    image[coverage == 0] = np.nan
    coverage = coverage.astype(np.float32)
    return Mosaic(image, coverage, alpha_of(coverage), WCS(naxis=2))


def rosette(frames: int = 10, panels: int = 2, seed: int = 1, rotation: float = 8.0) -> NDArray[np.float32]:
    """Coverage of panels side by side with 25 % overlap, dithered and rotated by up to `rotation` degrees."""
    rng = np.random.default_rng(seed)
    height, width = 240, 420
    step = 0.75 * width
    y, x = np.mgrid[0 : height + 120, 0 : int(width + step * (panels - 1)) + 120].astype(np.float64)
    coverage = np.zeros(y.shape, np.float32)
    for panel in range(panels):
        for _ in range(frames):
            turn = np.deg2rad(rng.uniform(-rotation, rotation))
            cx, cy = 60 + width / 2 + panel * step + rng.normal(0, 6), 60 + height / 2 + rng.normal(0, 6)
            u = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
            v = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
            coverage += (np.abs(u) < width / 2) & (np.abs(v) < height / 2)
    return coverage


# --- typical coverage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1.0, 3.0, 10.0, 250.0, 0.5])
def test_typical_coverage_of_a_single_depth_is_this_depth(depth):
    assert typical_coverage(np.full((50, 60), depth, np.float32)) == depth


def test_overlaps_do_not_raise_the_typical_coverage():
    panels = np.full((100, 300), 10, np.float32)
    panels[:, 80:220] = 20  # nearly half of the sky
    panels[40:60, 80:220] = 40
    assert typical_coverage(panels) == 10


def test_a_very_deep_spot_does_not_raise_the_typical_coverage():
    spot = np.full((100, 100), 8, np.float32)
    spot[40:60, 40:60] = 5000
    assert typical_coverage(spot) == 8


def test_a_deep_core_larger_than_the_panels_does_not_raise_the_typical_coverage():
    core = np.full((100, 100), 10, np.float32)
    core[:, :80] = 1000
    assert np.median(core) == 1000  # what a plain median would take for typical
    assert typical_coverage(core) == 10


@pytest.mark.parametrize("frames", [5, 10, 40])
def test_the_ramp_of_a_rosette_does_not_lower_the_typical_coverage(frames):
    assert typical_coverage(rosette(frames)) == pytest.approx(frames, rel=0.1)


def test_pixels_that_lost_samples_to_rejection_do_not_matter():
    coverage = np.full((200, 200), 10, np.float32)
    coverage -= np.random.default_rng(0).random((200, 200)) < 0.1
    assert typical_coverage(coverage) == 10


def test_no_coverage_is_an_error():
    with pytest.raises(ValueError, match="no pixel with data"):
        typical_coverage(np.zeros((5, 5), np.float32))


# --- coverage cut ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("typical", "threshold"), [(1, 0.4), (2, 0.8), (5, 2), (10, 3), (15, 3), (30, 4.8), (100, 16)])
def test_threshold_table_of_the_docstring(typical, threshold):
    assert coverage_threshold(np.full((9, 9), typical, np.float32), 0.4) == pytest.approx(threshold)


def test_threshold_never_cuts_into_the_typical_depth():
    for keep in (0.0, 0.1, 0.4, 0.9, 1.0):
        for typical in (1, 2, 3, 7, 50):
            assert coverage_threshold(np.full((9, 9), typical, np.float32), keep) <= typical


@pytest.mark.parametrize("keep", [-0.1, 1.1, float("nan")])
def test_a_keep_that_is_no_share_is_an_error(keep):
    with pytest.raises(ValueError, match=r"0\.\.1"):
        coverage_threshold(np.ones((9, 9), np.float32), keep)


@pytest.mark.parametrize("depth", [1, 4, 100])
@pytest.mark.parametrize("keep", [0.4, 1.0])
def test_uniform_coverage_loses_nothing(depth, keep):
    mosaic = mosaic_of(np.full((40, 50), depth))
    assert coverage_cut(mosaic, coverage_threshold(mosaic.coverage, keep)) == (mosaic, 0)


def test_a_single_depth_panel_survives_beside_a_deep_overlap():
    coverage = np.full((100, 200), 10, np.float32)
    coverage[:, 120:] = 400
    assert (coverage < 0.4 * coverage.max()).mean() == 0.6  # a cut relative to the peak erases the panel
    assert coverage_cut(mosaic_of(coverage), coverage_threshold(coverage, 0.4))[1] == 0


def test_the_cut_makes_no_data_everywhere_and_counts_it():
    coverage = rosette()
    mosaic = mosaic_of(coverage)
    cut, n_removed = coverage_cut(mosaic, 3.0)
    gone = np.isnan(cut.image).any(axis=2) & (coverage > 0)
    assert n_removed == gone.sum()
    # All that is thin goes, but for notches of the rim no wider than what rejection leaves of a trail.
    thin = (coverage > 0) & (coverage < 3)
    assert 0.98 * thin.sum() < n_removed <= thin.sum() and not (gone & ~thin).any()
    assert np.isnan(cut.image[gone]).all() and not cut.coverage[gone].any() and not cut.alpha[gone].any()
    stays = coverage >= 3
    np.testing.assert_array_equal(cut.image[stays], mosaic.image[stays])
    assert np.isfinite(mosaic.image[gone]).all()  # the picture that came in is as it was


def test_a_tall_picture_is_judged_as_a_whole_by_any_number_of_workers(monkeypatch):
    coverage = rosette()
    coverage[::7, 3::11] = 1  # dips, some of them across the borders of what is judged at a time
    whole = coverage_cut(mosaic_of(coverage), 3.0)[0].coverage
    logs = two_pass_renorm(mosaic_of(coverage))[1]
    for rows in (16, 37):
        monkeypatch.setattr("zemosaic.coverage._ROWS", rows)
        np.testing.assert_array_equal(coverage_cut(mosaic_of(coverage), 3.0, workers=3)[0].coverage, whole)
    assert two_pass_renorm(mosaic_of(coverage), workers=3)[1] == logs


@pytest.mark.parametrize("seed", range(3))
def test_sky_with_three_frames_stays_at_ten_frames_a_panel(seed):
    coverage = rosette(10, seed=seed)
    cut, _ = coverage_cut(mosaic_of(coverage, channels=1), coverage_threshold(coverage, 0.4))
    assert (cut.coverage[coverage >= 3] > 0).mean() >= 0.985


# --- two-pass renormalisation ----------------------------------------------------------------------------


def random_coverages() -> dict[str, NDArray]:
    rng = np.random.default_rng(3)
    patches = np.kron(rng.integers(1, 20, (8, 10)), np.ones((40, 40)))
    half = np.full((320, 400), 10)
    half[:, 203:] = 20
    return {"pixels": rng.integers(1, 20, (320, 400)), "patches": patches, "half": half, "rosette": rosette()}


@pytest.mark.parametrize("kind", ["pixels", "patches", "half", "rosette"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_uniform_sky_stays_bit_identical_whatever_the_coverage(kind, channels):
    coverage = random_coverages()[kind]
    for seed in range(4):
        mosaic = mosaic_of(coverage, seed=seed, channels=channels)
        result, stats = two_pass_renorm(mosaic)
        assert result is mosaic
        assert not stats.applied


@pytest.mark.parametrize(("radius", "sigma"), [(60, 40), (100, 60), (100, 40), (150, 100), (40, 40)])
@pytest.mark.parametrize("height", [300.0, 3000.0])
def test_a_nebula_in_a_deep_region_is_not_dimmed(radius, sigma, height):
    y, x = np.mgrid[0:400, 0:500]
    distance = np.hypot(y - 200, x - 250)
    coverage = np.where(distance < radius, 40, 10)
    mosaic = mosaic_of(coverage, SKY + height * np.exp(-(distance**2) / (2 * sigma**2)))
    assert two_pass_renorm(mosaic)[0] is mosaic


def test_stars_and_filaments_are_no_step():
    rng = np.random.default_rng(8)
    coverage = rosette(seed=4)
    light = np.zeros(coverage.shape)
    light[rng.integers(0, light.shape[0], 800), rng.integers(0, light.shape[1], 800)] = rng.pareto(1, 800) * 2e3
    filaments = ndimage.gaussian_filter(rng.standard_normal(coverage.shape), 20)
    mosaic = mosaic_of(coverage, SKY + ndimage.gaussian_filter(light, 1.4) + 150 * filaments / filaments.std())
    assert two_pass_renorm(mosaic)[0] is mosaic


def step_at(image: NDArray, column: int) -> float:
    """Relative step of the sky from the 8 columns left of `column` to the 8 right of it."""
    return float(np.median(image[:, column : column + 8]) / np.median(image[:, column - 8 : column]) - 1)


@pytest.mark.parametrize("border", [304, 301])  # on and off the grid of blocks
@pytest.mark.parametrize("step", [0.03, -0.03])
def test_a_step_that_follows_the_coverage_is_smoothed(border, step):
    coverage = np.full((405, 606), 10.0)
    coverage[:, border:] = 20
    mosaic = mosaic_of(coverage, np.where(coverage == 20, SKY * (1 + step), SKY))
    assert step_at(mosaic.image, border) == pytest.approx(step, abs=2e-3)
    result, stats = two_pass_renorm(mosaic)
    assert stats.applied and stats.significance > 5
    assert abs(step_at(result.image, border)) < 0.25 * abs(step)
    far = np.s_[:, :60]
    np.testing.assert_allclose(result.image[far], mosaic.image[far], rtol=1e-4)
    np.testing.assert_array_equal(result.coverage, mosaic.coverage)
    np.testing.assert_array_equal(result.alpha, mosaic.alpha)
    assert result.image.dtype == np.float32


def test_a_level_that_follows_the_frames_of_a_rosette_is_smoothed_and_then_left_alone():
    coverage = rosette()
    light = SKY * (np.maximum(coverage, 1) / 10) ** 0.03
    result, stats = two_pass_renorm(mosaic_of(coverage, light))
    assert stats.slope == pytest.approx(0.03, rel=0.15)
    assert two_pass_renorm(result)[0] is result


def test_the_gain_stays_within_its_limits():
    coverage = np.full((320, 400), 10.0)
    coverage[:, 200:] = 40
    light = np.where(coverage == 40, 1.1 * SKY, SKY)
    _, stats = two_pass_renorm(mosaic_of(coverage, light), gain_clip=(0.99, 1.01))
    assert (stats.gain_min, stats.gain_max) == pytest.approx((0.99, 1.01))


def test_single_pixels_that_lost_a_sample_get_the_gain_of_their_neighbours():
    coverage = np.full((320, 400), 10.0)
    coverage[:, 200:] = 20
    coverage[50:300:40, 20:380:40] -= 3
    mosaic = mosaic_of(coverage, np.where(coverage > 10, 1.03 * SKY, SKY))
    result, stats = two_pass_renorm(mosaic)
    assert stats.applied
    gain = (result.image / mosaic.image)[..., 0]
    np.testing.assert_allclose(gain[50:300:40, 20:380:40], gain[50:300:40, 21:381:40], rtol=2e-3)


def test_a_sliver_far_from_all_that_was_measured_is_left_alone():
    coverage = np.zeros((320, 1000))
    coverage[:, :200], coverage[:, 200:400], coverage[:, 990:993] = 10, 20, 5
    mosaic = mosaic_of(coverage, np.where(coverage == 20, 1.03 * SKY, SKY))
    result, stats = two_pass_renorm(mosaic)
    assert stats.applied
    np.testing.assert_array_equal(result.image[:, 990:993], mosaic.image[:, 990:993])


@pytest.mark.parametrize("shape", [(5, 5), (30, 400), (70, 70)])
def test_small_pictures_are_left_alone(shape):
    mosaic = mosaic_of(np.ones(shape))
    assert two_pass_renorm(mosaic)[0] is mosaic


def test_a_step_within_the_noise_is_no_step():
    steps = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        coverage = np.zeros((200, 200))
        for y, x in rng.integers(0, 100, (8, 2)):
            coverage[y : y + 120, x : x + 120] += 1
        mosaic = mosaic_of(coverage, seed=seed, noise=60.0)
        result, stats = two_pass_renorm(mosaic)
        assert result is mosaic
        steps.append(stats.step)
    assert max(steps) > 0.003  # chance alone makes steps large enough to be worth it


def test_a_sky_around_zero_is_left_alone():
    mosaic = mosaic_of(rosette(), 0.0)
    assert two_pass_renorm(mosaic)[0] is mosaic


def test_limits_that_exclude_one_are_an_error():
    with pytest.raises(ValueError, match="enclose 1"):
        two_pass_renorm(mosaic_of(np.ones((9, 9))), gain_clip=(1.05, 1.18))
