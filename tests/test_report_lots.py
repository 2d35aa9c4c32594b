"""Lots against each other: offsets of brightness, position and sky, and the figures made of stars."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from hypothesis import given, settings
from hypothesis import strategies as st
from report_field import PLACE_NOISE, STAR_NOISE, Fault, blank, invent, measured

from zemosaic.report.astrometry import match_catalogue, measure_astrometry
from zemosaic.report.evidence import Catalogue, Evidence
from zemosaic.report.levels import measure_levels
from zemosaic.report.lots import agreeing, average, combined, lot_offsets, match_stars, shares, stacked_offsets, sure
from zemosaic.report.photometry import GRID, between_variance, measure_photometry
from zemosaic.report.surface import MosaicStars


@pytest.fixture(scope="module")
def good() -> tuple[Evidence, MosaicStars]:
    evidence = invent()
    return evidence, measured(evidence)[1]


def chain(offset: np.ndarray, seed: int = 0, shared: int = 60, noise: float = 1.0):
    """Lots that overlap like the links of a chain: common thing, lot, value of each."""
    rng = np.random.default_rng(seed)
    common, lot = [], []
    for left in range(len(offset) - 1):
        things = left * shared + np.arange(shared)
        for side in (left, left + 1):
            common.append(things)
            lot.append(np.full(shared, side))
    common, lot = np.concatenate(common), np.concatenate(lot)
    truth = rng.normal(0, 100, common.max() + 1)
    return common, lot, (truth[common] + offset[lot] + noise * rng.normal(size=len(lot)))[:, None]


def test_offset_of_one_lot_in_a_chain():
    offset = np.array([0, 0, 5.0, 0, 0])
    common, lot, value = chain(offset)
    found = lot_offsets(common, lot, value, np.ones_like(value), 5, 1000.0)
    assert np.allclose(found.value[:, 0] - np.median(found.value), offset, atol=4 * found.error.max())
    assert found.error.max() < 0.4
    assert found.shared.tolist() == [60, 120, 120, 120, 60]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 100))
def test_offsets_do_not_depend_on_the_scale(seed: int, factor: float):
    common, lot, value = chain(np.array([1.0, -2.0, 0.5]), seed)
    sigma = np.ones_like(value)
    one = lot_offsets(common, lot, value, sigma, 3, 1e3)
    other = lot_offsets(common, lot, factor * value, factor * sigma, 3, factor * 1e3)
    assert np.allclose(other.value, factor * one.value, rtol=1e-3, atol=1e-3 * factor)
    assert np.allclose(other.error, factor * one.error, rtol=1e-2)


def test_stated_errors_are_true():
    pulls = []
    for seed in range(30):
        common, lot, value = chain(np.zeros(3), seed)
        found = lot_offsets(common, lot, value, np.ones_like(value), 3, 1e3)
        pulls.append(found.value[[0, 2], 0] / found.error[[0, 2], 0])
    assert 0.6 < np.std(pulls) < 1.6


def test_few_shared_things_raise_no_alarm():
    """Of lots that share a dozen stars, each with an error of its own, hardly one in a thousand may seem off."""
    alarms = 0
    for seed in range(150):
        common, lot, value = chain(np.zeros(4), seed, shared=6)
        found = lot_offsets(common, lot, value, np.ones_like(value), 4, 1e3)
        alarms += int((sure(found) > 0).sum())
    assert alarms <= 1


@pytest.mark.parametrize(("shared", "least", "most"), [(4, 2.0, 30.0), (400, 1.0, 1.1)])
def test_errors_are_wider_than_standard_errors_where_few_are_shared(shared: int, least: float, most: float):
    common, lot, value = chain(np.zeros(4), 3, shared=shared)
    found = lot_offsets(common, lot, value, np.ones_like(value), 4, 1e3)
    known = np.isfinite(found.error)
    assert known.any()
    assert np.all(
        (found.error[known] >= least * found.sigma[known]) & (found.error[known] <= most * found.sigma[known])
    )


def test_few_values_that_agree_by_chance_do_not_make_errors_small():
    """Two stars a lot, all alike: that the errors are as large as stated counts for some degrees of freedom."""
    common, lot, value = chain(np.zeros(3), shared=5, noise=1e-3)
    one, other = (lot_offsets(common, lot, value, np.ones_like(value), 3, 1e3, stated=s) for s in (0.0, 5.0))
    assert one.sigma.max() < 0.01 < 0.2 < other.sigma.min()
    common, lot, value = chain(np.zeros(3), shared=2000, noise=0.5)
    one, other = (lot_offsets(common, lot, value, np.ones_like(value), 3, 1e3, stated=s) for s in (0.0, 5.0))
    assert other.sigma == pytest.approx(one.sigma, rel=0.02)


def test_a_floor_stays_however_many_are_shared():
    common, lot, value = chain(np.zeros(3), shared=4000, noise=0.1)
    found = lot_offsets(common, lot, value, np.ones_like(value), 3, 1e3, floor=1.0)
    assert np.all((found.error >= 1) & (found.error < 1.01))


def test_what_shares_do_not_tell_apart_is_not_blamed():
    """Lots of shuffled frames: every star shows nearly the same mixture."""
    rng = np.random.default_rng(5)
    share = 1 / 6 + 0.004 * rng.normal(size=(150, 6))
    share /= share.sum(axis=1, keepdims=True)
    assert sure(stacked_offsets(share, rng.normal(size=(150, 1)))).max() == 0


def test_wild_values_do_not_matter():
    common, lot, value = chain(np.array([0, 4.0, 0]))
    value[::15] += 300
    found = lot_offsets(common, lot, value, np.ones_like(value), 3, 1e3)
    assert found.value[1, 0] == pytest.approx(4, abs=0.8)


def test_lot_without_overlap_is_unknown():
    common, lot, value = chain(np.zeros(3))
    lonely = lot_offsets(
        np.r_[common, common.max() + 1 + np.arange(9)],
        np.r_[lot, np.full(9, 3)],
        np.r_[value, np.ones((9, 1))],
        np.ones((len(value) + 9, 1)),
        4,
        1e3,
    )
    assert np.isnan(lonely.value[3]).all() and np.isfinite(lonely.value[:3]).all()
    assert sure(lonely)[3] == 0


def test_average_is_a_weighted_mean():
    common, group = np.array([7, 7, 7, 9]), np.array([0, 0, 1, 1])
    star, lot, mean, total = average(common, group, np.array([[1.0], [4], [5], [6]]), np.array([[1.0], [2], [1], [1]]))
    assert star.tolist() == [7, 7, 9] and lot.tolist() == [0, 1, 1]
    assert mean[:, 0].tolist() == [3, 5, 6] and total[:, 0].tolist() == [3, 1, 1]


def test_shares_add_up():
    share = shares(np.array([3, 3, 5]), np.array([0, 1, 1]), np.array([1.0, 3.0, 2.0]), 3)
    assert share.tolist() == [[0.25, 0.75, 0], [0, 1, 0]]


def test_what_stacking_did_to_a_lot():
    rng = np.random.default_rng(2)
    share = rng.dirichlet([0.5] * 4, 400)
    residual = share @ np.array([[0.0], [0], [6], [0]]) + rng.normal(size=(400, 1))
    found = stacked_offsets(share, residual)
    assert sure(found)[:, 0].nonzero()[0].tolist() == [2]
    assert found.value[2, 0] == pytest.approx(6, abs=4 * found.error[2, 0])
    nothing = stacked_offsets(share, rng.normal(size=(400, 1)))
    assert combined(found, nothing).value == pytest.approx(found.value)


def test_stars_of_frames_are_found_in_the_mosaic(good: tuple[Evidence, MosaicStars]):
    evidence, mosaic = good
    matched = match_stars(evidence, mosaic)
    assert matched is not None
    assert len(matched) > 0.85 * len(evidence.stars.x)
    assert len(np.unique(matched.star * 1000 + matched.frame)) == len(matched)
    assert np.hypot(matched.x - mosaic.stars.x[matched.star], matched.y - mosaic.stars.y[matched.star]).max() < 1


def test_photometry_of_a_good_mosaic(good: tuple[Evidence, MosaicStars]):
    evidence, mosaic = good
    figures = measure_photometry(evidence, mosaic, match_stars(evidence, mosaic))
    # Eight frames a panel; the invented mosaic has noise of its own besides.
    least = 1000 * STAR_NOISE / np.sqrt(8)
    assert np.all((figures.scatter > least) & (figures.scatter < 3 * least))
    assert figures.repeat_median.max() < 2 * least
    assert np.all(figures.uniformity < figures.scatter)
    assert figures.map.shape == (GRID, GRID) and np.isfinite(figures.map).mean() > 0.4
    assert sure(figures.lots).max() < 2.5


def test_every_frame_tells_how_noisy_the_mean_is():
    """Not only its halves: from sky to sky of the same quality the figure varies by a few percent."""
    scatters = []
    for seed in range(40, 46):
        evidence = invent(seed=seed)
        mosaic = measured(evidence)[1]
        figures = measure_photometry(evidence, mosaic, match_stars(evidence, mosaic))
        scatters.append(figures.scatter)
        # A robust scatter of as many stars is known to that.
        assert figures.scatter_chance == pytest.approx(1.16 * figures.scatter / np.sqrt(figures.stars), rel=0.25)
    assert np.std(scatters) < 0.08 * np.mean(scatters)


@pytest.mark.parametrize("fault", [Fault(gain=1.03), Fault(fwhm=5.0)], ids=["gain", "blurred"])
def test_bright_stars_scatter_where_a_lot_is_off(good: tuple[Evidence, MosaicStars], fault: Fault):
    evidence = invent(fault)
    mosaic = measured(evidence)[1]
    clean, found = (measure_photometry(e, m, match_stars(e, m)) for e, m in (good, (evidence, mosaic)))
    assert np.all(found.scatter > 1.4 * clean.scatter)
    assert found.photons == pytest.approx(clean.photons, rel=0.1)


def test_companion_is_no_error_of_the_zero_point():
    """The brightest star of the emptiest quarter is a pair, as its frames saw it too."""
    evidence = invent()
    mosaic = measured(evidence)[1]
    figures = measure_photometry(evidence, mosaic, match_stars(evidence, mosaic))
    inner = (mosaic.points > 40).all(axis=1) & (mosaic.points < [280, 190]).all(axis=1)
    star = np.flatnonzero(inner)[np.argmax(mosaic.stars.flux[inner, 1])]
    x, y = mosaic.points[star]
    yy, xx = np.mgrid[: evidence.shape[0], : evidence.shape[1]]
    light = np.exp(-0.5 * ((xx - x - 6.0) ** 2 + (yy - y) ** 2) / 1.27**2) / (2 * np.pi * 1.27**2)
    image = evidence.image + (0.25 * mosaic.stars.flux[star] * light[..., None]).astype(np.float32)
    near = np.hypot(evidence.stars.x - x, evidence.stars.y - y) < 2
    flux = np.where(near[:, None], 1.25, 1.0) * evidence.stars.flux
    paired = replace(evidence, image=image, stars=replace(evidence.stars, flux=flux))
    mosaic = measured(paired)[1]
    wide = np.hypot(*(mosaic.points - [x, y]).T) < 3
    assert np.all(mosaic.fwhm[wide] > 1.2 * mosaic.typical_fwhm)
    found = measure_photometry(paired, mosaic, match_stars(paired, mosaic))
    assert found.stars == figures.stars - 1 and np.nanmax(np.abs(found.map - figures.map)) < 5


def test_gain_error_of_a_lot_shows_in_the_map(good: tuple[Evidence, MosaicStars]):
    evidence = invent(Fault(lot=3, gain=1.05))  # upper right panel
    mosaic = measured(evidence)[1]
    figures = measure_photometry(evidence, mosaic, match_stars(evidence, mosaic))
    right, left = np.nanmedian(figures.map[4:, 4:]), np.nanmedian(figures.map[:2, :2])
    assert right - left == pytest.approx(-2500 * np.log10(1.05), rel=0.25)
    assert figures.uniformity.min() > 8


def test_hot_pixel_in_one_frame_is_no_gain_of_its_lot(good: tuple[Evidence, MosaicStars]):
    """One frame in eight sees every fifth star half as bright again: neither lots nor scatter may tell of it."""
    evidence, mosaic = good
    flux = evidence.stars.flux.copy()
    hit = (evidence.stars.frame == 17) & (np.arange(len(flux)) % 5 == 0)
    flux[hit, 0] *= 1.5
    spotted = replace(evidence, stars=replace(evidence.stars, flux=flux))
    matched = match_stars(spotted, mosaic)
    wrong = ~agreeing(matched, 0.01)
    assert wrong.sum() > 5 and np.all(matched.frame[wrong] == 17)
    clean, found = (measure_photometry(e, mosaic, match_stars(e, mosaic)) for e in (evidence, spotted))
    assert found.scatter == pytest.approx(clean.scatter, rel=0.05)
    assert found.lots.value == pytest.approx(clean.lots.value, abs=1.0)


def test_positions_of_a_good_mosaic(good: tuple[Evidence, MosaicStars]):
    evidence, mosaic = good
    figures = measure_astrometry(evidence, mosaic, match_stars(evidence, mosaic))
    assert figures.median == pytest.approx(PLACE_NOISE * 1.18, rel=0.15)  # median of a Rayleigh distribution
    assert figures.position_median < PLACE_NOISE
    assert figures.vectors.shape == (32, 4)
    assert np.abs(figures.vectors[:, 2:]).max() < 0.05
    assert np.all(figures.vectors[:, 0] > 0) and figures.scale == pytest.approx(2.4)


def test_shifted_lot_shows_in_the_vectors():
    evidence = invent(Fault(lot=1, shift=0.5))
    mosaic = measured(evidence)[1]
    vectors = measure_astrometry(evidence, mosaic, match_stars(evidence, mosaic)).vectors
    bad = evidence.frames.lot == 1
    assert np.allclose(vectors[bad, 2], 0.5, atol=0.06)
    assert np.abs(vectors[~bad, 2]).max() < 0.06 and np.abs(vectors[:, 3]).max() < 0.06


def test_catalogue_tells_scatter_and_shift(good: tuple[Evidence, MosaicStars]):
    evidence, mosaic = good
    ra, dec = evidence.wcs.all_pix2world(mosaic.stars.x + 0.4, mosaic.stars.y, 0)
    magnitude = 20 - 2.5 * np.log10(np.maximum(mosaic.stars.flux[:, 1], 1))
    catalogue = Catalogue(ra, dec, magnitude + np.random.default_rng(1).normal(0, 0.03, len(ra)))
    known = replace(evidence, catalogue=catalogue)
    assert len(match_catalogue(known, mosaic)[0]) > 60
    assert measure_astrometry(known, mosaic, None).catalogue_median == pytest.approx(0.4, abs=0.02)
    assert measure_photometry(known, mosaic, None).catalogue == pytest.approx(30, rel=0.35)
    apart = SkyCoord(0, -80, unit="deg")
    empty = replace(evidence, catalogue=Catalogue(np.array([apart.ra.deg]), np.array([apart.dec.deg]), np.array([5.0])))
    assert len(match_catalogue(empty, mosaic)[0]) == 0


def test_level_map_shows_what_the_mosaic_alone_has(good: tuple[Evidence, MosaicStars]):
    evidence = good[0]
    surface, _ = measured(evidence)
    flat = measure_levels(evidence, surface)
    image = evidence.image.copy()
    image[:, 500:] += 10
    stepped = replace(evidence, image=image)
    bent = measure_levels(stepped, measured(stepped)[0])
    assert np.nanmean(bent.residual[:, -4:]) - np.nanmean(bent.residual[:, :6]) == pytest.approx(10, abs=1.5)
    assert flat.rms.max() < 0.5 < 3 < bent.rms.min()


def test_level_map_has_no_noise_in_its_figure():
    """Nodes ten times as noisy do not make the sky uneven; patches do."""
    evidence = invent(seed=8)
    noisy = evidence.sky.value + np.random.default_rng(1).normal(0, 15, evidence.sky.value.shape)
    sky = replace(evidence.sky, value=noisy, error=10 * evidence.sky.error)
    assert measure_levels(replace(evidence, sky=sky), measured(evidence)[0]).rms.max() < 1.5


@pytest.mark.parametrize("shuffled", [False, True], ids=["one lot a panel", "all lots everywhere"])
def test_lot_counts_as_far_as_it_leaves_a_patch(good: tuple[Evidence, MosaicStars], shuffled: bool):
    evidence = good[0] if shuffled else invent(Fault(sky=4.0))
    if shuffled:  # a quarter of the frames at every place belong to the lot: the mosaic is brighter, but evenly so
        lot = np.arange(32) % 4
        sky = replace(evidence.sky, value=evidence.sky.value + 4.0 * (lot == 2)[evidence.sky.frame, None])
        evidence = replace(evidence, frames=replace(evidence.frames, lot=lot), sky=sky)
    found = measure_levels(evidence, measured(evidence)[0])
    assert found.lots.value[2] == pytest.approx(4, abs=0.5)
    size = sure(found.shown)[2]
    assert np.all(size < 1.2) if shuffled else np.all(size > 2.4)


def test_stars_on_uneven_sky_are_not_calm(good: tuple[Evidence, MosaicStars]):
    evidence, mosaic = good
    column = np.arange(evidence.shape[1], dtype=np.float32)
    ripple = 60 * np.sin(column / 7) * (column < 300)
    uneven = measured(replace(evidence, image=evidence.image + ripple[None, :, None]))[1]
    left, faint = uneven.points[:, 0] < 270, uneven.stars.flux.mean(axis=1) < 4e4
    assert mosaic.calm.mean() > 0.9
    assert uneven.calm[~left].mean() > 0.85 and uneven.calm[left & faint].mean() < 0.3


def test_variance_between_cells_is_that_beyond_their_errors():
    rng = np.random.default_rng(4)
    error = rng.uniform(1, 20, 4000)
    assert between_variance(error * rng.normal(size=4000), error) < 0.5
    assert between_variance(5 * rng.normal(size=4000) + error * rng.normal(size=4000), error) == pytest.approx(
        25, rel=0.2
    )
    assert np.isnan(between_variance(np.array([1.0, 2, np.nan]), np.ones(3)))


def test_variance_between_cells_is_not_that_of_the_best_known_alone():
    """A lot is off by 20, but the cells that are best known are all of the others."""
    value, error = np.r_[np.zeros(6), np.full(6, 20.0)], np.r_[np.full(6, 0.5), np.full(6, 3.0)]
    assert between_variance(value, error) == pytest.approx(np.var(value, ddof=1), rel=0.1)


def test_large_scale_slope_is_reported_and_taken_off():
    tilted = Evidence(blank() + np.linspace(0, 90, 500, dtype=np.float32))
    figures = measure_levels(tilted, measured(tilted)[0])
    assert figures.gradient == pytest.approx(90, rel=0.05)
    assert np.nanmax(np.abs(figures.sky[:, :-1])) < 2  # the last region is cut
