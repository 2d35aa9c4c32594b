"""Rejection and the weighted mean: what stands out goes, what is honest stays, at any number of samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from zemosaic import combine as combine_module
from zemosaic.combine import Clip, combine
from zemosaic.rejection import medians, slope_tolerance, sorting_network

SKY, SIGMA = 600.0, 10.0  # ADU
TRAIL = 60  # the row that a satellite crosses
METHODS = ["winsorized_sigma_clip", "kappa_sigma", "linear_fit_clip"]
COUNTS = [3, 4, 5, 8, 15]


def honest(n: int, channels: int = 1, shape=(120, 160), noise: ArrayLike = SIGMA, seed: int = 0) -> NDArray[np.float32]:
    """A stack of flat sky ``(C, n, h, w)``; `noise` is the same for all samples or one value for each."""
    spread = np.broadcast_to(noise, n)[:, None, None]
    samples = SKY + spread * np.random.default_rng(seed).standard_normal((channels, n, *shape))
    return samples.astype(np.float32)


def stacked(stack, method="winsorized_sigma_clip", *, kappa=(3.0, 3.0), noise=SIGMA, weight=None, median=False):
    """`combine` with the same noise and weight in every channel; the weight is 1/noise² if not given."""
    channels, n = stack.shape[:2]
    noise = np.tile(np.broadcast_to(noise, n), (channels, 1))
    weight = noise**-2.0 if weight is None else np.tile(np.broadcast_to(weight, n), (channels, 1))
    sky = np.full(channels, SKY, np.float32)
    return combine(stack, noise, weight, sky, Clip(method, *kappa), use_median=median)


# --- outliers go -----------------------------------------------------------------------------------------


def clipped_at_own_scatter(stack: NDArray, kappa: float) -> NDArray[np.bool_]:
    """What rejection often looks like: samples against their own mean and standard deviation."""
    samples = stack[0].astype(np.float64)
    return np.abs(samples - samples.mean(axis=0)) <= kappa * samples.std(axis=0)


@pytest.mark.parametrize("kappa", [2.0, 3.0])
@pytest.mark.parametrize("method", METHODS)
def test_five_samples_are_enough_to_tell_a_trail_although_no_z_score_exceeds_two(method, kappa):
    stack = honest(5)
    stack[:, 2, TRAIL] += 30 * SIGMA
    # However large an outlier is, it cannot lie more than sqrt(n - 1) of its own standard deviations off the mean.
    assert clipped_at_own_scatter(stack, kappa)[2, TRAIL].mean() > 0.99
    _, keep = stacked(stack, method, kappa=(kappa, kappa))
    assert not keep[2, TRAIL].any()


# Three samples in colour are not asked of linear_fit_clip: the slope of three is the outlier's own.
TRAILS = [(m, n, c) for m in METHODS for n in [*COUNTS, 40] for c in (1, 3) if (m, n, c) != ("linear_fit_clip", 3, 3)]


@pytest.mark.parametrize(("method", "n", "channels"), TRAILS)
def test_a_trail_of_30_sigma_is_gone_and_takes_nothing_with_it(method, n, channels):
    stack = honest(n, channels)
    stack[:, n // 2, TRAIL] += 30 * SIGMA
    image, keep = stacked(stack, method)
    assert not keep[n // 2, TRAIL].any()
    assert np.delete(keep, n // 2, axis=0)[:, TRAIL].mean() > 0.97
    # Clamped instead of rejected, the trail would still stand 3 sigma / n above the sky.
    error = SIGMA / np.sqrt((n - 1) * image[TRAIL].size)
    assert abs(image[TRAIL].mean() - SKY) < 4 * error
    assert stacked(stack, "none")[0][TRAIL].mean() > SKY + 25 * SIGMA / n  # the trail was there


@pytest.mark.parametrize("n", [8, 15])
@pytest.mark.parametrize("method", METHODS)
def test_two_trails_that_cross_are_both_gone(method, n):
    stack = honest(n)
    stack[:, 0, TRAIL] += 30 * SIGMA
    stack[:, 1, :, TRAIL] += 30 * SIGMA
    _, keep = stacked(stack, method)
    assert not keep[0, TRAIL].any() and not keep[1, :, TRAIL].any()


@pytest.mark.parametrize("method", METHODS)
def test_dark_outliers_go_as_well(method):
    stack = honest(5)
    stack[:, 3, TRAIL] -= 30 * SIGMA
    _, keep = stacked(stack, method)
    assert not keep[3, TRAIL].any()


def test_what_stands_out_in_one_channel_goes_in_all():
    stack = honest(5, channels=3)
    stack[2, 1, TRAIL] += 30 * SIGMA
    image, keep = stacked(stack)
    assert not keep[1, TRAIL].any()
    rest = np.delete(stack, 1, axis=1)[0, :, TRAIL]
    everything_else_kept = np.delete(keep, 1, axis=0)[:, TRAIL].all(axis=0)
    np.testing.assert_allclose(
        image[TRAIL, :, 0][everything_else_kept], rest.mean(axis=0)[everything_else_kept], rtol=1e-6
    )


# --- honest samples stay ---------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("method", METHODS)
def test_honest_noise_loses_little_and_the_mean_neither_shifts_nor_coarsens(method, n, channels):
    stack = honest(n, channels)
    image, keep = stacked(stack, method)
    assert keep.mean() > 0.975
    assert abs(image.mean() - SKY) < 0.02 * SIGMA
    assert image.std() < 1.02 * stack.mean(axis=1).std()  # Fisher information of what 3 sigma cut off: 3 %


def stars_in_changing_seeing(n: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Stars of constant flux whose peaks differ by up to 30 % either way, and where their light is."""
    y, x = np.mgrid[0:128, 0:128] % 16 - 8.0
    peak = np.linspace(0.7, 1.3, n)[:, None, None]
    light = 3000 * peak * np.exp(-peak * (x**2 + y**2) / (2 * 1.2**2))
    return (honest(n, shape=x.shape) + light).astype(np.float32), np.hypot(x, y) < 3


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("method", METHODS)
def test_seeing_may_change_star_peaks_by_a_third(method, n, monkeypatch):
    stack, star = stars_in_changing_seeing(n)
    _, keep = stacked(stack, method)
    assert keep[:, star].mean() > 0.97
    monkeypatch.setattr(combine_module, "STAR_TOLERANCE", 0.0)
    assert stacked(stack, "kappa_sigma")[1][:, star].mean() < 0.8  # noise alone would reject the stars


@pytest.mark.parametrize("method", METHODS)
def test_a_star_excuses_its_direct_neighbours_and_no_others(method):
    """Half a pixel of atmosphere moves a good part of a star's light into the next pixel."""
    stack = np.full((1, 5, 9, 9), SKY, np.float32)
    stack[..., 4, 4] += 100 * SIGMA
    stack[0, 3, 5, 5] += 50 * SIGMA
    stack[0, 3, 6, 6] += 50 * SIGMA
    _, keep = stacked(stack, method)
    assert np.argwhere(~keep).tolist() == [[3, 6, 6]]


@pytest.mark.parametrize("method", METHODS)
def test_three_channels_lose_no_more_than_one(method):
    """A sample has three chances to stand out in colour; the threshold allows for it (Šidák)."""
    one = 1 - stacked(honest(15), method, kappa=(2, 2))[1].mean()
    stack = honest(15, channels=3)
    three = 1 - stacked(stack, method, kappa=(2, 2))[1].mean()
    each_alone = np.prod([stacked(stack[c : c + 1], method, kappa=(2, 2))[1] for c in range(3)], axis=0)
    assert 1 - each_alone.mean() > 2.5 * one
    assert three == pytest.approx(one, rel=0.25)


@pytest.mark.parametrize(("low", "high"), [(3.0, 3.0), (5.0, 2.0), (2.0, 4.0)])
@pytest.mark.parametrize("n", [5, 15])
def test_thresholds_count_sigmas_of_the_difference_to_the_median(low, high, n):
    """A median of n normal samples has the variance pi / 2n: that widens the noise model's threshold, no more."""
    width = SIGMA * np.sqrt(1 + np.pi / 2 / n)
    offset = np.array([-1.02 * low, -0.98 * low, 0.98 * high, 1.02 * high]) * width
    stack = np.full((1, n, 1, 4), SKY, np.float32)
    stack[0, 0, 0] += offset
    _, keep = stacked(stack, "kappa_sigma", kappa=(low, high))
    assert keep[0, 0].tolist() == [False, True, True, False]
    assert keep[1:].all()


def test_none_keeps_everything():
    stack = honest(5)
    stack[:, 2] += 1000 * SIGMA
    image, keep = stacked(stack, "none")
    assert keep.all()
    np.testing.assert_allclose(image[..., 0], stack[0].mean(axis=0), rtol=1e-6)


# --- one, two and unequal samples --------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, "none"])
def test_a_single_sample_is_the_result(method):
    stack = honest(1, channels=3, shape=(4, 5))
    stack[1, 0, 2, 3] = np.nan
    image, keep = stacked(stack, method)
    whole = keep[0]
    assert not whole[2, 3] and whole.sum() == 19
    np.testing.assert_array_equal(image[whole], np.moveaxis(stack[:, 0], 0, -1)[whole])
    assert np.isnan(image[2, 3]).all()  # a colour without red or blue is none


@pytest.mark.parametrize("method", METHODS)
def test_of_two_equal_samples_the_brighter_goes(method):
    """Satellites, aircraft and cosmic rays add light; nothing takes any away."""
    stack = honest(2)
    stack[:, 1, TRAIL] += 30 * SIGMA
    image, keep = stacked(stack, method)
    assert keep[0, TRAIL].all() and not keep[1, TRAIL].any()
    np.testing.assert_array_equal(image[TRAIL, :, 0], stack[0, 0, TRAIL])
    assert keep.mean() > 0.975  # elsewhere both stay


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("noise", [(2, 20), (2, 20, 20), (20, 2, 20)])
def test_a_deep_sample_outweighs_shallow_ones(method, noise):
    deep = noise.index(2)
    stack = honest(len(noise), noise=noise)
    if len(noise) > 2:  # a plain median follows the two noisy samples, far from the best one
        assert (np.abs(stack[0, deep] - np.median(stack[0], axis=0)) > 3 * 2).mean() > 0.25
    image, keep = stacked(stack, method, noise=noise)
    assert keep[deep].mean() > 0.99
    assert keep.mean() > 0.975
    assert image.std() == pytest.approx(np.sum(np.square(noise, dtype=float) ** -1.0) ** -0.5, rel=0.03)
    assert abs(image.mean() - SKY) < 0.02 * 2
    # Light that only the shallow samples saw is no part of the sky.
    shallow = 1 - deep if len(noise) == 2 else (deep + 1) % 3
    stack[:, shallow, TRAIL] += 30 * 20
    _, keep = stacked(stack, method, noise=noise)
    assert keep[deep, TRAIL].all() and not keep[shallow, TRAIL].any()


def test_noise_and_weight_may_be_given_per_pixel():
    stack, noise = honest(3, channels=3, shape=(20, 30), noise=(2, 20, 20)), np.array([2.0, 20.0, 20.0])
    image, keep = stacked(stack, noise=noise)
    planes = np.broadcast_to(noise[:, None, None], stack.shape).astype(np.float32)
    sky = np.full(3, SKY, np.float32)
    again, keep_again = combine(stack, planes, planes**-2, sky, Clip())
    np.testing.assert_array_equal(keep, keep_again)
    np.testing.assert_allclose(again, image, rtol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("method", METHODS)
def test_a_frame_that_lies_elsewhere_changes_nothing(method, n):
    stack = honest(n, channels=3)
    stack[:, 0, TRAIL] += 30 * SIGMA
    image, keep = stacked(stack, method)
    nothing = np.full_like(stack[:, :1], np.nan)
    same, keep_same = stacked(np.concatenate([nothing, stack], axis=1), method)
    np.testing.assert_array_equal(keep_same[1:], keep)
    np.testing.assert_allclose(same, image, rtol=3e-7)
    assert not keep_same[0].any()


# --- the mean and the median -----------------------------------------------------------------------------


@st.composite
def gappy_stacks(draw):
    """Stacks with missing samples, unequal noise and a few outliers."""
    n, channels, seed = draw(st.integers(2, 9)), draw(st.sampled_from([1, 3])), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    noise = SIGMA * rng.uniform(1, draw(st.sampled_from([1.5, 10.0])), n)
    stack = honest(n, channels, (8, 9), noise, seed)
    stack[..., rng.random((8, 9)) < 0.1] += 1000
    stack[:, rng.random((n, 8, 9)) < 0.05] += 1000
    stack[rng.random(stack.shape) < draw(st.sampled_from([0.0, 0.1, 0.6]))] = np.nan
    return stack, noise, rng.uniform(0.1, 3, n)


@settings(max_examples=60, deadline=None)
@given(gappy_stacks(), st.sampled_from([*METHODS, "none"]))
def test_the_mean_is_that_of_the_kept_samples_and_missing_ones_are_missing(case, method):
    stack, noise, weight = case
    image, keep = stacked(stack, method, noise=noise, weight=weight)
    valid = np.isfinite(stack).all(axis=0)
    assert not (keep & ~valid).any()
    assert keep.sum() == valid.sum() or method != "none"
    share = weight[:, None, None] * keep
    with np.errstate(invalid="ignore"):
        wanted = np.where(keep, stack.astype(np.float64), 0) * share
        wanted = np.moveaxis(wanted.sum(axis=1) / share.sum(axis=0), 0, -1)
    np.testing.assert_allclose(image, wanted, rtol=1e-6, equal_nan=True)
    assert image.dtype == np.float32 and (np.isnan(image).any(axis=-1) == ~keep.any(axis=0)).all()


def test_a_thousand_samples_far_from_zero_lose_no_precision():
    stack = honest(1000, shape=(8, 8)) + np.float32(60_000)
    image, _ = stacked(stack, "none")
    exact = stack.mean(axis=(0, 1), dtype=np.float64)
    assert np.abs(image[..., 0] - exact).max() <= np.spacing(np.float32(60_600)) / 2 * 1.01


@settings(max_examples=40, deadline=None)
@given(gappy_stacks(), st.sampled_from(METHODS), st.booleans(), st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_matter(case, method, median, random):
    stack, noise, weight = case
    image, keep = stacked(stack, method, noise=noise, weight=weight, median=median)
    order = random.sample(range(len(noise)), len(noise))
    moved, keep_moved = stacked(stack[:, order], method, noise=noise[order], weight=weight[order], median=median)
    np.testing.assert_array_equal(keep_moved, keep[order])
    np.testing.assert_allclose(moved, image, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("n", [2, 3, 4, 7, 10, 40])
def test_the_median_is_that_of_the_kept_samples(n):
    stack = honest(n, shape=(30, 40))
    stack[0, np.random.default_rng(1).random((n, 30, 40)) < 0.2] = np.nan
    stack[0, 0, 10] += 30 * SIGMA
    image, keep = stacked(stack, median=True)
    kept = np.where(keep, stack[0], np.nan)
    ordered = np.sort(kept, axis=0)
    pairs = keep.sum(axis=0) == 2  # of two the lower: what contaminates a pixel brightens it
    some = keep.any(axis=0)
    wanted = np.full(some.shape, np.nan, np.float32)
    wanted[some] = np.nanmedian(kept[:, some], axis=0)
    wanted[pairs] = ordered[0][pairs]
    np.testing.assert_allclose(image[..., 0], wanted, rtol=2e-7, equal_nan=True)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 10, 40])
def test_weighted_median_halves_the_weight(n):
    rng = np.random.default_rng(n)
    samples = rng.normal(SKY, SIGMA, (n, 20, 20)).astype(np.float32)
    noise = rng.uniform(1, 10, (n, 20, 20)).astype(np.float32)
    valid = rng.random(samples.shape) < 0.7
    median = medians(samples[None], valid, noise[None], even=False)[0]
    share = np.where(valid, 1 / noise, 0)
    below, upto = ((share * there).sum(axis=0) for there in (samples < median, samples <= median))
    empty = ~valid.any(axis=0)
    assert np.isnan(median[empty]).all() and np.isfinite(median[~empty]).all()
    half = 0.5 * share.sum(axis=0)
    # Of two that are about as good as each other it is the lower.
    best, worst = np.where(valid, noise, np.inf).min(axis=0), np.where(valid, noise, 0).max(axis=0)
    pair = (valid.sum(axis=0) == 2) & (worst <= 2 * best)
    np.testing.assert_array_equal(median[pair], np.where(valid, samples, np.inf).min(axis=0)[pair])
    there = ~empty & ~pair
    assert (below <= half + 1e-4)[there].all() and (upto >= half - 1e-4)[there].all()


# --- sorting ---------------------------------------------------------------------------------------------


def zeros_and_ones(n: int) -> NDArray[np.float32]:
    """Every column of n zeros and ones up to n = 14, or 20,000 random ones: ``(n, 1, columns)``."""
    if n <= 14:
        return (np.arange(2**n)[None, None, :] >> np.arange(n)[:, None, None] & 1).astype(np.float32)
    rng = np.random.default_rng(n)
    return (rng.random((n, 1, 20_000)) < rng.random(20_000)).astype(np.float32)


@pytest.mark.parametrize("n", range(1, 41))
def test_the_network_sorts_everything(n):
    """A network that sorts all zeros and ones sorts all numbers (Knuth 5.3.4, theorem Z), rank by rank."""
    planes = zeros_and_ones(n)
    wanted = np.sort(planes, axis=0)
    np.testing.assert_array_equal(through(sorting_network(n, n), planes), wanted)
    lower = slice(0, n // 2 + 1)
    np.testing.assert_array_equal(through(sorting_network(n, n // 2 + 1), planes)[lower], wanted[lower])


def through(network: NDArray[np.int64], planes: NDArray[np.float32]) -> NDArray[np.float32]:
    planes = planes.copy()
    for i, j in network:
        planes[i], planes[j] = np.minimum(planes[i], planes[j]), np.maximum(planes[i], planes[j])
    return planes


@pytest.mark.parametrize("n", [1, 2, 5, 8, 33])
def test_the_median_with_missing_samples(n):
    samples = honest(n, shape=(20, 20))
    missing = np.random.default_rng(n).random(samples.shape[1:]) < 0.3
    median = medians(samples, ~missing, np.ones((1, n, 1, 1), np.float32), even=True)[0]
    for y, x in np.ndindex(20, 20):
        left = np.sort(samples[0, ~missing[:, y, x], y, x])
        wanted = np.nan if not left.size else left[0] if left.size == 2 else np.median(left)
        np.testing.assert_allclose(median[y, x], wanted, rtol=2e-7)


def test_honest_samples_may_differ_by_a_share_of_the_brightest_neighbour():
    """A plain dilation of the signal above the sky; what is missing or endless is no signal."""
    centre = np.random.default_rng(3).normal(100, 20, (3, 9, 14)).astype(np.float32)
    centre[0, 2, 3], centre[1, 4, 13], centre[2, 0, 0] = np.nan, np.inf, -np.inf
    sky = np.array([95, 100, 105], np.float32)
    signal = np.maximum(np.nan_to_num(centre - sky[:, None, None], nan=0, posinf=0, neginf=0), 0)
    edged = np.pad(signal, ((0, 0), (1, 1), (1, 1)))
    brightest = np.max([edged[:, y : y + 9, x : x + 14] for y in range(3) for x in range(3)], axis=0)
    found = slope_tolerance(centre, sky, np.float32(0.6))
    np.testing.assert_allclose(found, (0.6 * brightest) ** 2, rtol=1e-6)
