"""Photometric matching: what frames share fixes their gains and skies, what nothing fixes stays neutral."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from zemosaic import levels
from zemosaic.execute import one_thread_each
from zemosaic.levels import (
    Adjustment,
    SkySamples,
    Solution,
    canvas_nodes,
    match_positions,
    sample_sky,
    solve_common,
    solve_gains,
    solve_skies,
    window_frame,
)
from zemosaic.stars import block_medians, colour_planes
from zemosaic.tiles import Window

SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module", autouse=True)
def as_in_a_run() -> Iterator[None]:
    """BLAS threads gain nothing on systems this small and cost seconds on a busy machine."""
    with one_thread_each():
        yield


class Survey(NamedTuple):
    """What `solve_common` is given, in its order."""

    common: NDArray[np.int64]
    frame: NDArray[np.int64]
    design: NDArray[np.float64]
    value: NDArray[np.float64]
    sigma: NDArray[np.float64]
    prior: NDArray[np.float64]
    prior_sigma: NDArray[np.float64]


def survey(
    seed: int = 0, *, width: int = 1, frames: int = 12, commons: int = 150, each: int = 5, noise: float = 1.0
) -> tuple[Survey, NDArray[np.float64]]:
    """`commons` stars (or patches of sky), each seen by a few frames at random, and the frames' true unknowns."""
    rng = np.random.default_rng(seed)
    common = np.repeat(np.arange(commons), each)
    frame = np.concatenate([rng.permutation(frames)[:each] for _ in range(commons)])
    design = np.ones((len(frame), width))
    design[:, 1:] = rng.uniform(-1, 1, (len(frame), width - 1))
    truth = rng.normal(0, 30, (frames, width))
    sigma = noise * rng.uniform(0.5, 2, len(frame))
    value = rng.normal(600, 100, commons)[common] + (design * truth[frame]).sum(axis=1)
    value += sigma * rng.standard_normal(len(frame))
    prior, prior_sigma = np.zeros((frames, width)), np.full((frames, width), 500.0)
    return Survey(common, frame, design, value, sigma, prior, prior_sigma), truth


def brute_force(case: Survey) -> NDArray[np.float64]:
    """Plain least squares with every common value as an unknown of its own, dense: ``(F, P)``."""
    n, (frames, width) = len(case.value), case.prior.shape
    stars = case.common.max() + 1
    table = np.zeros((n, frames * width + stars))
    for k in range(width):
        table[np.arange(n), case.frame * width + k] = case.design[:, k]
    table[np.arange(n), frames * width + case.common] = 1
    pull = np.eye(frames * width, table.shape[1]) / case.prior_sigma.reshape(-1, 1)
    rows = np.concatenate([table / case.sigma[:, None], pull])
    right = np.concatenate([case.value / case.sigma, (case.prior / case.prior_sigma).reshape(-1)])
    return np.linalg.lstsq(rows, right, rcond=None)[0][: frames * width].reshape(frames, width)


def spread(difference: NDArray[np.float64]) -> float:
    """RMS of differences between frames: what all have in common cannot be known."""
    return float((difference - difference.mean(axis=0)).std())


# --- the linear system -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dense_limit", [3000, 0], ids=["dense", "sparse"])
@pytest.mark.parametrize("width", [1, 3])
def test_eliminating_the_common_values_changes_nothing(width, dense_limit, monkeypatch):
    monkeypatch.setattr(levels, "_DENSE_LIMIT", dense_limit)
    monkeypatch.setattr(levels, "_ITERATIONS", 1)  # the first step weighs all observations by their errors alone
    case, _ = survey(width=width)
    np.testing.assert_allclose(solve_common(*case).unknowns, brute_force(case), rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [1, 3])
def test_without_errors_the_solution_is_the_truth(width):
    case, truth = survey(width=width, noise=1e-9)
    unknowns = solve_common(*case._replace(sigma=np.ones(len(case.value)))).unknowns
    assert spread(unknowns[:, :1] - truth[:, :1]) < 1e-4
    np.testing.assert_allclose(unknowns[:, 1:], truth[:, 1:], atol=1e-4)


def test_scatter_is_told_in_units_of_the_stated_errors():
    case, _ = survey(commons=2000)
    honest = solve_common(*case).rms
    assert solve_common(*case._replace(sigma=case.sigma / 3)).rms == pytest.approx(3 * honest, rel=0.02)
    # Of five observations one degree of freedom went into the common value.
    assert honest == pytest.approx(np.sqrt(4 / 5), rel=0.05)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_a_tenth_of_gross_outliers_matters_less_than_the_noise(seed, width):
    case, truth = survey(seed, width=width, commons=300)
    rng = np.random.default_rng(seed)
    hit = rng.random(len(case.value)) < 0.1
    dirty = case._replace(value=case.value + hit * case.sigma * rng.uniform(20, 200, len(hit)))
    clean = solve_common(*case).unknowns
    error = spread(clean - truth)
    assert spread(brute_force(dirty) - truth) > 10 * error  # plain least squares is spoilt
    assert spread(solve_common(*dirty).unknowns - clean) < error


def test_groups_that_share_nothing_are_told_apart_and_stay_neutral():
    one, _ = survey(1, frames=6, commons=40)
    two, _ = survey(2, frames=5, commons=40)
    # A frame that shares nothing at all comes last.
    joined = [np.concatenate(pair) for pair in zip(one, two, strict=True)]
    both = Survey(*joined)._replace(
        common=np.append(one.common, two.common + 40),
        frame=np.append(one.frame, two.frame + 6),
        prior=np.zeros((12, 1)),
        prior_sigma=np.full((12, 1), 500.0),
    )
    solution = solve_common(*both)
    assert [len(set(solution.group[part])) for part in (slice(0, 6), slice(6, 11), slice(11, 12))] == [1, 1, 1]
    assert len(set(solution.group)) == 3
    assert solution.observations.tolist() == np.bincount(both.frame, minlength=12).tolist()
    level = solution.unknowns[:, 0]
    assert abs(level[:6].sum()) < 1e-3 and abs(level[6:11].sum()) < 1e-3 and level[11] == 0
    np.testing.assert_allclose(level[:6], solve_common(*one).unknowns[:, 0], atol=0.2)


def test_what_only_one_frame_saw_ties_nothing():
    case, _ = survey(commons=30, each=1, frames=4)
    solution = solve_common(*case)
    assert len(set(solution.group)) == 4 and not solution.observations.any()
    np.testing.assert_allclose(solution.unknowns, 0, atol=1e-9)


def test_without_observations_the_prior_is_the_answer():
    case, _ = survey()
    nothing = Survey(*(part[:0] for part in case[:5]), case.prior + 7, case.prior_sigma)
    solution = solve_common(*nothing)
    assert (solution.unknowns == 7).all() and len(set(solution.group)) == 12


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from([1, 3]))
def test_nothing_depends_on_the_order_or_the_names(seed, width):
    case, _ = survey(seed, width=width, frames=7, commons=40, each=3)
    rng = np.random.default_rng(seed)
    solution = solve_common(*case)
    order, names, labels = rng.permutation(len(case.value)), rng.permutation(7), rng.permutation(400)[:40]
    shuffled = Survey(*(part[order] for part in case[:5]), case.prior, case.prior_sigma)
    renamed = shuffled._replace(frame=names[shuffled.frame], common=labels[shuffled.common])
    moved = solve_common(*renamed)
    np.testing.assert_allclose(moved.unknowns[names], solution.unknowns, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(moved.observations[names], solution.observations)
    same = solution.group[:, None] == solution.group
    np.testing.assert_array_equal(moved.group[names][:, None] == moved.group[names], same)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.floats(-1000, 1000))
def test_levels_do_not_drift(seed, offset):
    """However bright all frames are, their levels add up to nothing: the sky they share is not their fault."""
    case, _ = survey(seed, frames=7, commons=40)
    solution = solve_common(*case._replace(value=case.value + offset))
    assert abs(solution.unknowns.sum()) < 1e-3
    np.testing.assert_allclose(solution.unknowns, solve_common(*case).unknowns, atol=1e-4)


# --- gains from stars ------------------------------------------------------------------------------------


class Nights(NamedTuple):
    """Star fluxes through changing air, as `solve_gains` takes them, and the true transparency."""

    star: NDArray[np.int64]
    frame: NDArray[np.int64]
    flux: NDArray[np.float64]
    error: NDArray[np.float64]
    transparency: NDArray[np.float64]


def observe(seed: int = 0, frames: int = 15, stars: int = 60) -> Nights:
    """Every frame sees half of the stars, which are of all colours, through grey clouds and a coloured haze."""
    rng = np.random.default_rng(seed)
    truth = 10 ** rng.uniform(3.5, 5, (stars, 1)) * 10 ** (0.4 * rng.normal(0, 0.5, (stars, 3)))
    transparency = np.exp(rng.normal(0, 0.15, (frames, 1)) + rng.normal(0, 0.02, (frames, 3)))
    frame, star = np.nonzero(rng.random((frames, stars)) < 0.5)
    error = 0.01 * truth[star] * transparency[frame]
    flux = truth[star] * transparency[frame] + error * rng.standard_normal(error.shape)
    return Nights(star, frame, flux, error, transparency)


def gains_of(nights: Nights, expected: NDArray[np.float64] | None = None) -> tuple[NDArray[np.float64], Solution]:
    expected = np.ones(len(nights.transparency)) if expected is None else expected
    return solve_gains(*nights[:4], expected)


def millimagnitudes(gain: NDArray[np.float64], transparency: NDArray[np.float64]) -> NDArray[np.float64]:
    """Error of every frame and channel, with what all frames of a channel have in common taken out."""
    error = 2500 * np.log10(gain * transparency)
    return error - np.median(error, axis=0)


@pytest.mark.parametrize("seed", range(3))
def test_thirty_stars_of_one_per_cent_give_gains_to_five_millimagnitudes(seed):
    nights = observe(seed)
    assert millimagnitudes(np.ones((15, 3)), nights.transparency).std() > 100
    gain, grey = gains_of(nights)
    assert millimagnitudes(gain, nights.transparency).std() < 5
    assert np.abs(millimagnitudes(gain, nights.transparency)).max() < 15
    assert len(set(grey.group)) == 1


def test_the_typical_frame_is_left_as_it_is():
    gain, _ = gains_of(observe())
    # One grey constant is free; colours are not shifted against each other by a median of their own.
    np.testing.assert_allclose(np.median(gain, axis=0), 1, rtol=0.02)
    nights = observe()
    brighter, _ = gains_of(nights._replace(flux=nights.flux * 3, error=nights.error * 3))
    np.testing.assert_allclose(brighter, gain, rtol=1e-6)


def test_saturated_and_variable_stars_among_the_good_ones_do_not_matter():
    nights = observe(stars=100)
    clean = millimagnitudes(gains_of(nights)[0], nights.transparency)
    rng = np.random.default_rng(9)
    odd = rng.random(nights.flux.shape) < 0.1
    dirty, _ = gains_of(nights._replace(flux=nights.flux * np.where(odd, rng.uniform(0.3, 1.5, odd.shape), 1)))
    assert (millimagnitudes(dirty, nights.transparency) - clean).std() < clean.std()


def test_a_star_seen_twice_in_a_frame_is_a_blend_and_counts_for_nothing():
    nights = observe()
    first = np.flatnonzero(nights.frame == 4)[:8]  # eight stars of frame 4 were taken for two each
    twice = Nights(*(np.concatenate([part, part[first]]) for part in nights[:4]), nights.transparency)
    twice.flux[first] *= 0.6
    twice.flux[len(nights.flux) :] *= 0.4
    without = Nights(*(np.delete(part, first, axis=0) for part in nights[:4]), nights.transparency)
    np.testing.assert_allclose(gains_of(twice)[0], gains_of(without)[0], rtol=1e-9)


def test_a_frame_without_stars_gets_the_gain_of_its_exposure_and_is_reported():
    nights = observe()
    blind = nights.frame == 6
    rest = Nights(*(part[~blind] for part in nights[:4]), nights.transparency)
    expected = np.ones(15)
    expected[6] = 0.5  # 20 s where 10 s are usual
    gain, grey = gains_of(rest, expected)
    assert np.flatnonzero(grey.observations == 0).tolist() == [6]
    assert (grey.group == grey.group[6]).sum() == 1
    typical = np.exp(np.log(np.delete(gain, 6, axis=0)).mean(axis=0))
    np.testing.assert_allclose(gain[6] / typical, 0.5, rtol=0.01)


def test_a_channel_without_bright_stars_leans_on_the_others():
    nights = observe()
    nights.error[:, 2] = nights.flux[:, 2]  # blue: nothing stands out of the noise
    gain, grey = gains_of(nights)
    shape = np.exp(grey.unknowns[:, 0])
    np.testing.assert_allclose(gain[:, 2] / shape, gain[0, 2] / shape[0], rtol=1e-9)
    assert millimagnitudes(gain[:, :2], nights.transparency[:, :2]).std() < 5
    assert millimagnitudes(gain[:, 2:], nights.transparency[:, 2:]).std() < 40  # all that the haze makes of it


# --- which detections are the same star --------------------------------------------------------------------


def test_detections_of_a_star_in_many_frames_get_one_number_of_its_own():
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:10, 0:25]
    stars = np.c_[columns.ravel(), rows.ravel()] * 12.0 + rng.uniform(-2, 2, (250, 2))  # 8 px apart or more
    seen = np.repeat(np.arange(250), 80)  # 20,000 detections, scattered by a third of a pixel
    x, y = (stars[seen] + rng.normal(0, 0.35, (len(seen), 2))).T
    number = match_positions(x, y, 3.0)
    assert len(set(number)) == 250
    assert len(set(zip(seen, number, strict=True))) == 250


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 5000), st.floats(0, 5000), st.floats(0, 2 * np.pi), st.floats(0, 8))
def test_two_detections_are_one_star_up_to_the_radius(x, y, angle, distance):
    """Wherever the cells' borders lie between them."""
    number = match_positions(
        np.array([x, x + distance * np.cos(angle)]), np.array([y, y + distance * np.sin(angle)]), 3.0
    )
    if abs(distance - 3) > 1e-6:
        assert (number[0] == number[1]) == (distance < 3)


def test_numbers_do_not_depend_on_the_order_of_detections():
    rng = np.random.default_rng(3)
    x, y = rng.uniform(0, 300, (2, 2000))
    order = rng.permutation(2000)
    number, moved = match_positions(x, y, 3.0), match_positions(x[order], y[order], 3.0)
    pairs = set(zip(number[order], moved, strict=True))
    assert len(pairs) == len(set(number)) == len(set(moved))


def test_no_detections_no_stars():
    assert match_positions(np.zeros(0), np.zeros(0), 3.0).shape == (0,)


# --- nodes and sky samples -------------------------------------------------------------------------------


@st.composite
def windows(draw):
    y0, x0 = draw(st.integers(0, 500)), draw(st.integers(0, 900))
    return Window(y0, y0 + draw(st.integers(1, 120)), x0, x0 + draw(st.integers(1, 100)))


@settings(max_examples=50, deadline=None)
@given(windows(), windows(), st.sampled_from([8, 16, 50]))
def test_nodes_are_the_same_points_of_the_canvas_for_every_window(one, other, spacing):
    width = 1000
    places = {}
    for window in (one, other):
        node, x, y, u, v = canvas_nodes(window, spacing, width)
        rows, columns = ([p for p in range(a, b) if p % spacing == 0] for a, b in ((one.y0, one.y1), (one.x0, one.x1)))
        if window is one:
            assert len(set(node)) == len(node) == len(rows) * len(columns)
        assert ((x % spacing == 0) & (y % spacing == 0)).all()
        assert ((x >= window.x0) & (x < window.x1) & (y >= window.y0) & (y < window.y1)).all()
        cy, cx, hy, hx = window_frame(window)
        np.testing.assert_allclose(np.stack([cx + u * hx, cy + v * hy]), np.stack([x, y]), atol=1e-9)
        assert (np.abs(u) < 1).all() and (np.abs(v) < 1).all()
        for number, *place in zip(node, x, y, strict=True):
            assert places.setdefault(number, place) == place
    assert len(set(map(tuple, places.values()))) == len(places)


def test_a_block_stands_for_its_middle():
    """A sky that rises evenly is sampled exactly, anywhere between the middles of the outermost blocks."""
    y, x = np.mgrid[0:160, 0:240].astype(np.float32)
    ramp = 600 + 0.5 * x - 0.25 * y
    blocks = block_medians(colour_planes(ramp, None), 8)  # 16 px
    assert blocks.shape == (10, 15, 1)
    px, py = np.random.default_rng(0).uniform(-10, 250, (2, 500))
    node = np.arange(500)
    sky = sample_sky(blocks, 16, (px, py), node, px / 240, py / 160)
    inside = (px >= 7.5) & (px <= 231.5) & (py >= 7.5) & (py <= 151.5)
    np.testing.assert_array_equal(sky.node, node[inside])
    np.testing.assert_array_equal(sky.u, px[inside] / 240)
    np.testing.assert_allclose(sky.value[:, 0], 600 + 0.5 * px[inside] - 0.25 * py[inside], atol=1e-3)


def test_a_block_without_data_is_no_sample():
    blocks = np.full((6, 6, 3), 600, np.float32)
    blocks[2, 3, 1] = np.nan
    x, y = (c.ravel() * 10.0 + 4.5 for c in np.meshgrid(np.arange(6), np.arange(6)))
    node = np.arange(36)
    sky = sample_sky(blocks, 10, (x, y), node, x, y)
    assert 2 * 6 + 3 not in sky.node
    assert np.isfinite(sky.value).all() and len(sky.node) >= 36 - 9


# --- skies from overlaps -----------------------------------------------------------------------------------


def panels(seed: int = 0, n: int = 12, noise: float = 1.0) -> tuple[list[Window], NDArray, list[SkySamples]]:
    """A row of panels that overlap by 30 %, each with its own sky, over one nebula; the nodes are 16 px apart."""
    rng = np.random.default_rng(seed)
    row = [Window(0, 240, 224 * i, 224 * i + 320) for i in range(n)]
    planes = rng.normal(0, [150, 40, 40], (n, 3))
    samples = []
    for window, (level, slope_u, slope_v) in zip(row, planes, strict=True):
        node, x, y, u, v = canvas_nodes(window, 16, row[-1].x1)
        light = 600 + 300 * np.exp(-((x / row[-1].x1 - 0.5) ** 2) * 16) + 100 * np.sin(x / 70) * np.cos(y / 50)
        sky = light + level + slope_u * u + slope_v * v + noise * rng.standard_normal(len(x))
        samples.append(SkySamples(node, u, v, sky[:, None]))
    return row, planes, samples


def left_in_the_mosaic(row: list[Window], planes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sky errors at nine points of every panel, without the one plane over the whole mosaic that nobody can know."""
    points, error = [], []
    for window, (level, slope_u, slope_v) in zip(row, planes, strict=True):
        cy, cx, hy, hx = window_frame(window)
        v, u = np.mgrid[-1:2, -1:2].reshape(2, -1)
        points.append(np.stack([np.ones(9), cx + u * hx, cy + v * hy], axis=1))
        error.append(level + slope_u * u + slope_v * v)
    table, values = np.concatenate(points), np.concatenate(error)
    return values - table @ np.linalg.lstsq(table, values, rcond=None)[0]


def alternating(samples: list[SkySamples], sweeps: int) -> NDArray[np.float64]:
    """The tempting way: sky from the frames, frames from the sky, and again."""
    node = np.unique(np.concatenate([s.node for s in samples]), return_inverse=True)[1]
    value = np.concatenate([s.value[:, 0] for s in samples])
    designs = [np.stack([np.ones_like(s.u), s.u, s.v], axis=1) for s in samples]
    ends = np.cumsum([len(s.node) for s in samples])[:-1]
    fits = [np.linalg.pinv(design) for design in designs]
    planes = np.zeros((len(samples), 3))
    for _ in range(sweeps):
        own = np.concatenate([design @ plane for design, plane in zip(designs, planes, strict=True)])
        sky = np.bincount(node, value - own) / np.bincount(node)
        planes = np.array([fit @ rest for fit, rest in zip(fits, np.split(value - sky[node], ends), strict=True)])
    return planes


@pytest.mark.parametrize("seed", range(3))
def test_a_row_of_twelve_panels_is_level_from_end_to_end(seed):
    row, truth, samples = panels(seed)
    assert left_in_the_mosaic(row, alternating(samples, 80) - truth).std() > 30  # it crawls
    plane, (solution,) = solve_skies(samples, np.ones((12, 1)), np.ones((12, 1)))
    assert left_in_the_mosaic(row, plane[:, 0] - truth).std() < 6
    assert abs(plane[:, 0, 0].sum()) < 0.01 and set(solution.group) == {0}


def test_frames_agree_where_they_overlap():
    _, _, samples = panels()
    plane, _ = solve_skies(samples, np.ones((12, 1)), np.ones((12, 1)))
    left = {}
    for i, (sky, (level, slope_u, slope_v)) in enumerate(zip(samples, plane[:, 0], strict=True)):
        for node, value in zip(sky.node, sky.value[:, 0] - level - slope_u * sky.u - slope_v * sky.v, strict=True):
            left.setdefault(node, []).append((i, value))
    steps = np.array([pair[1][1] - pair[0][1] for pair in left.values() if len(pair) == 2])
    assert steps.std() == pytest.approx(np.sqrt(2), rel=0.05) and abs(steps.mean()) < 0.1


def test_satellites_and_stars_in_a_few_samples_do_not_tilt_the_sky():
    row, truth, samples = panels()
    rng = np.random.default_rng(5)
    for sky in samples:
        sky.value[rng.random(len(sky.value)) < 0.05] += 200
    plane, _ = solve_skies(samples, np.ones((12, 1)), np.ones((12, 1)))
    assert left_in_the_mosaic(row, plane[:, 0] - truth).std() < 6


def test_planes_are_counted_after_the_gain():
    _, _, samples = panels()
    gain = np.linspace(0.5, 2, 12)[:, None]
    dimmed = [SkySamples(s.node, s.u, s.v, s.value / g) for s, g in zip(samples, gain, strict=True)]
    plane, _ = solve_skies(dimmed, gain, 1 / gain)
    same, _ = solve_skies(samples, np.ones((12, 1)), np.ones((12, 1)))
    np.testing.assert_allclose(plane, same, atol=1e-4)


def test_an_island_keeps_its_own_mean_level():
    _, _, samples = panels()
    apart = samples[:5] + samples[7:]
    plane, (solution,) = solve_skies(apart, np.ones((10, 1)), np.ones((10, 1)))
    assert solution.group.tolist() == [solution.group[0]] * 5 + [solution.group[9]] * 5
    assert solution.group[0] != solution.group[9]
    assert abs(plane[:5, 0, 0].sum()) < 0.01 and abs(plane[5:, 0, 0].sum()) < 0.01


def test_no_samples_leave_the_frames_alone():
    nothing = SkySamples(np.zeros(0, np.int64), np.zeros(0), np.zeros(0), np.zeros((0, 3)))
    plane, solutions = solve_skies([nothing, nothing], np.ones((2, 3)), np.ones((2, 3)))
    assert plane.shape == (2, 3, 3) and not plane.any() and solutions == []


# --- applying it -----------------------------------------------------------------------------------------


def test_an_adjustment_is_gain_times_pixel_minus_plane():
    window = Window(40, 140, 300, 450)
    rng = np.random.default_rng(0)
    image = rng.normal(1000, 300, (3, 100, 150)).astype(np.float32)
    image[:, 7, 9] = np.nan
    adjustment = Adjustment(window, rng.uniform(0.5, 2, 3), rng.normal(0, [200, 50, 50], (3, 3)))
    out = np.empty_like(image)
    adjustment.apply(image, window, out)
    v, u = ((np.arange(n) - (n - 1) / 2) / (n / 2) for n in (100, 150))
    for c in range(3):
        level, slope_u, slope_v = adjustment.plane[c]
        wanted = adjustment.gain[c] * image[c].astype(float) - level - slope_u * u - slope_v * v[:, None]
        np.testing.assert_allclose(out[c], wanted, rtol=1e-6, atol=1e-3)
    # Cut into blocks it is the same to the last bit.
    for block in window.blocks(64):
        ys, xs = block.within(window)
        part = np.empty((3, *block.shape), np.float32)
        adjustment.apply(image[:, ys, xs], block, part)
        np.testing.assert_array_equal(part, out[:, ys, xs])


def test_full_equations_are_solved_without_forming_them(monkeypatch):
    """Eighty frames that all see the same 400 blocks: conjugate gradients find what the factorisation finds."""
    rng = np.random.default_rng(4)
    frames, blocks = 80, 400
    common, frame = np.tile(np.arange(blocks), frames), np.repeat(np.arange(frames), blocks)
    u, v = rng.uniform(-1, 1, (2, blocks))
    design = np.tile(np.c_[np.ones(blocks), u, v], (frames, 1))
    truth = rng.normal(0, [20, 10, 10], (frames, 3))
    value = rng.normal(600, 50, blocks)[common] + (design * truth[frame]).sum(axis=1) + rng.normal(0, 2, len(common))
    value[rng.random(len(value)) < 0.02] += 300
    arguments = common, frame, design, value, np.full(len(value), 2.0)
    prior = np.zeros((frames, 3)), np.tile([1e4, 30.0, 30.0], (frames, 1))
    direct = levels.solve_common(*arguments, *prior)
    monkeypatch.setattr(levels, "_DENSE_LIMIT", 0)
    iterated = levels.solve_common(*arguments, *prior)
    # The level that all share is nobody's to tell.
    apart = iterated.unknowns - direct.unknowns
    np.testing.assert_allclose(apart, np.broadcast_to(apart.mean(axis=0), apart.shape), atol=1e-3)
    np.testing.assert_allclose(apart[:, 1:], 0, atol=1e-3)
    assert iterated.rms == pytest.approx(direct.rms, rel=1e-4)
