"""Global refinement on simulated star lists whose true WCSs are known, and on real subs."""

from __future__ import annotations

import runpy
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.wcs import WCS
from scipy.spatial.transform import Rotation

from zemosaic.calibrate import Calibration
from zemosaic.frames import read_frame
from zemosaic.measure import measure_frame
from zemosaic.solve.adjust import Equations, adjust
from zemosaic.solve.merge import label_stars, medians, seen_once
from zemosaic.solve.pointing import Camera, read_pointings, tangent_axes, turn_to_pole
from zemosaic.solve.refine import Observation, Refinement, refine
from zemosaic.sphere import to_vectors
from zemosaic.stars import Aperture

_BENCH = runpy.run_path(str(Path(__file__).resolve().parents[1] / "benchmarks" / "refine.py"))
Setup, simulate, score = (_BENCH[name] for name in ("Setup", "simulate", "score"))

SMALL: dict[str, Any] = {"frames": 24, "panels": (2, 2), "shape": (1000, 700), "stars": 150, "dither": 15.0}


@cache
def field(**options: Any) -> tuple[Any, Any]:
    """A setup and its simulation."""
    setup = Setup(**{**SMALL, **options})
    return setup, simulate(setup)


def states(result: Refinement) -> dict[str, int]:
    return dict(Counter(frame.state for frame in result.frames))


def accuracy(setup: Any, simulation: Any, result: Refinement) -> tuple[float, float, float]:
    """Relative median and 95th percentile (px), absolute rms (arcsec), against the truth."""
    found: tuple[float, float, float] = score(simulation, [frame.wcs for frame in result.frames], setup.shape)
    return found


def apart(one: WCS, other: WCS, shape: tuple[int, int]) -> np.ndarray:
    """Pixels between what two WCSs say, on a grid over the frame."""
    ny, nx = shape
    x, y = (g.ravel() for g in np.meshgrid(np.linspace(0, nx - 1, 9), np.linspace(0, ny - 1, 9)))
    back = np.array(other.all_world2pix(*one.all_pix2world(x, y, 0), 0, quiet=True))
    return np.hypot(*(back - [x, y]))


def same(one: WCS, other: WCS) -> bool:
    """Whether two WCSs are the same to the last bit."""
    points = np.random.default_rng(1).uniform(0, 700, (50, 2))
    return np.array_equal(one.all_pix2world(points, 0), other.all_pix2world(points, 0))


def spoilt(wcs: WCS, how: str) -> WCS | None:
    """The WCS with one of the faults that headers have."""
    bad = wcs.deepcopy()
    if how == "2 arcmin off":
        bad.wcs.crval = bad.wcs.crval + [0.03, 0.02]
    elif how == "5 degrees off":
        bad.wcs.crval = bad.wcs.crval + [4.0, 3.0]
    elif how == "doubled":
        bad.wcs.pc = bad.wcs.get_pc() * 2
    elif how == "mirrored":
        bad.wcs.pc = bad.wcs.get_pc() @ np.diag([-1, 1])
    elif how == "turned":
        bad.wcs.pc = bad.wcs.get_pc() @ np.array([[0, -1], [1, 0]])
    elif how == "a camera lens":
        bad.wcs.pc = bad.wcs.get_pc() * 40
    elif how == "1 % too large":
        bad.wcs.pc = bad.wcs.get_pc() * 1.01
    return None if how == "missing" else bad


# ------------------------------------------------------------------------------------------------ accuracy


@pytest.mark.parametrize(
    "options",
    [
        {"sip": 4.0},
        {"sip": 4.0, "parity": -1, "center": (0.02, -30.0)},
        {"sip": 2.0, "center": (120.0, 90.0), "rotation": 180.0},
        {"sip": 2.0, "center": (300.0, -89.9)},
        {"sip": 3.0, "scale": 20.0},  # 10 degrees across
        {"overlap": 0.08, "dither": 4.0, "panels": (3, 2)},
    ],
    ids=["distorted", "mirrored, RA 0", "north pole", "south pole", "wide", "thin overlap"],
)
def test_frames_agree_to_a_twentieth_of_a_pixel(options: dict[str, Any]) -> None:
    setup, simulation = field(**options)
    before = score(simulation, [o.wcs for o in simulation.observations], setup.shape)
    result = refine(simulation.observations)
    median, p95, absolute = accuracy(setup, simulation, result)
    assert before[0] > 0.08 and before[1] > 0.2  # there was something to do
    assert median < 0.03 and p95 < 0.08
    assert absolute < min(before[2], 0.3 * setup.scale)  # the mean of the input says where everything is
    assert result.median < 0.05 and result.p95 < 0.15
    assert "wrong" not in states(result) and "alone" not in states(result)


def test_one_distortion_is_found_for_all_frames_and_none_where_there_is_none() -> None:
    setup, simulation = field(sip=4.0)
    (found,) = refine(simulation.observations).distortions
    assert found.corner == pytest.approx(4.0, abs=0.15)
    assert found.shape == setup.shape
    assert refine(field(sip=0.0)[1].observations).distortions == ()


def test_noise_is_not_mistaken_for_scale_or_distortion() -> None:
    """Making all frames smaller makes their noise smaller: with one pointing nothing else would object."""
    setup, simulation = field(panels=(1, 1), noise=0.25, rotation=80.0, dither=5.0, sip=0.0)
    result = refine(simulation.observations)
    assert result.distortions == ()
    assert accuracy(setup, simulation, result)[2] < 0.2


def test_frames_of_few_noisy_stars_profit_from_each_other() -> None:
    setup, simulation = field(stars=60, noise=0.2, solved=0.2)
    before = score(simulation, [o.wcs for o in simulation.observations], setup.shape)
    after = accuracy(setup, simulation, refine(simulation.observations))
    assert after[0] < 0.6 * before[0] and after[1] < 0.6 * before[1]


def test_blends_and_doubles_do_not_pull() -> None:
    rng = np.random.default_rng(11)
    setup, simulation = field(stars=150, noise=0.05)
    observations = []
    for o in simulation.observations:
        blended = np.where(rng.random(len(o.x)) < 0.15, rng.exponential(0.8, len(o.x)), 0.0)  # always towards +x
        observations.append(replace(o, x=o.x + blended))
    assert accuracy(setup, simulation, refine(observations))[1] < 0.04
    first = simulation.observations[0]
    twice = {
        name: np.r_[getattr(first, name), getattr(first, name)[:30] + (name == "x")] for name in ("x", "y", "flux")
    }
    whole, doubled = (refine([one, *simulation.observations[1:]]) for one in (first, replace(first, **twice)))
    assert doubled.frames[0].matched <= whole.frames[0].matched - 20


def test_few_reference_stars_a_frame_are_enough_for_many_frames() -> None:
    setup, simulation = field(shape=(500, 400), panels=(3, 3), frames=27, stars=60, solved=0.5, dither=10.0)
    catalogue = simulation.catalogue[np.arange(0, len(simulation.catalogue), 6)]  # three in a frame
    result = refine(simulation.observations, catalogue)
    assert len(catalogue) > result.anchors > 10
    assert accuracy(setup, simulation, result)[2] < accuracy(setup, simulation, refine(simulation.observations))[2]


def test_refined_wcs_is_a_tan_sip_about_the_centre_that_says_its_size() -> None:
    setup, simulation = field(sip=4.0)
    ny, nx = setup.shape
    for frame in refine(simulation.observations).frames:
        assert frame.wcs is not None
        assert list(frame.wcs.wcs.ctype) == ["RA---TAN-SIP", "DEC--TAN-SIP"]
        assert frame.wcs.pixel_shape == (nx, ny)
        np.testing.assert_array_equal(frame.wcs.wcs.crpix, [(nx + 1) / 2, (ny + 1) / 2])
        read_back = WCS(frame.wcs.to_header(relax=True))
        assert apart(frame.wcs, read_back, setup.shape).max() < 1e-3


def test_catalogue_anchors_the_field() -> None:
    setup, simulation = field(sip=4.0, stars=300, solved=0.5)
    free = accuracy(setup, simulation, refine(simulation.observations))
    result = refine(simulation.observations, simulation.catalogue)
    tied = accuracy(setup, simulation, result)
    assert tied[2] < 0.15 < free[2]
    assert tied[0] < 0.03
    assert result.anchors > 50
    assert 0.3 < result.absolute < 0.6  # the catalogue's own errors are 0.3 arcsec per axis


def test_catalogue_of_another_sky_is_ignored() -> None:
    """Simulated fields have invented stars: real ones among them must not pull at anything."""
    _, simulation = field()
    _, other = field(seed=99)
    result = refine(simulation.observations, other.catalogue)
    assert result.anchors == 0 and np.isnan(result.absolute)
    for frame, without in zip(result.frames, refine(simulation.observations).frames, strict=True):
        assert same(frame.wcs, without.wcs)


def test_residuals_tell_the_noise_of_every_frame() -> None:
    rng = np.random.default_rng(5)
    _, simulation = field(noise=0.1)
    observations = list(simulation.observations)
    shaky = observations[3]
    observations[3] = replace(shaky, x=shaky.x + rng.normal(0, 0.4, len(shaky.x)))
    frames = refine(observations).frames
    assert np.median([frame.residual for frame in frames]) == pytest.approx(
        0.13, rel=0.1
    )  # 6 stars to a mean: 0.1 * sqrt(2 * 5 / 6)
    assert frames[3].residual > 0.35
    assert all(90 < frame.matched <= 150 for frame in frames)


def test_result_is_the_same_every_time() -> None:
    _, simulation = field(sip=2.0)
    once, again = (refine(simulation.observations) for _ in range(2))
    assert once.median == again.median
    assert all(same(a.wcs, b.wcs) for a, b in zip(once.frames, again.frames, strict=True))


# ---------------------------------------------------------------------------------------- what must not change


@pytest.mark.parametrize("sip", [0.0, 4.0])
def test_exact_wcs_is_kept_to_the_last_bit(sip: float) -> None:
    _, simulation = field(solved=0.0, sip=sip)
    result = refine(simulation.observations)
    assert states(result) == {"kept": 24}
    for observation, frame in zip(simulation.observations, result.frames, strict=True):
        assert same(observation.wcs, frame.wcs)


def test_exact_frames_stay_exact_beside_wrong_ones() -> None:
    _, simulation = field(solved=0.0, sip=2.0)
    observations = list(simulation.observations)
    for i, shift in ((2, 0.3), (9, 3.0), (17, 60.0)):  # pixels
        bad = observations[i].wcs.deepcopy()
        bad.wcs.crpix = bad.wcs.crpix + [shift, 0]
        bad.sip.crpix[:] = bad.wcs.crpix
        observations[i] = replace(observations[i], wcs=bad)
    frames = refine(observations).frames
    assert [frames[i].state for i in (2, 9, 17)] == ["refined", "refined", "rescued"]
    for i, frame in enumerate(frames):
        if i in (2, 9, 17):
            error = apart(simulation.truth[i], frame.wcs, SMALL["shape"])
            assert np.sqrt((error**2).mean()) < 0.06
        else:
            assert frame.state == "kept" and same(simulation.truth[i], frame.wcs)


def test_frame_without_company_keeps_its_wcs() -> None:
    _, simulation = field(solved=0.3)
    few = replace(
        simulation.observations[0], **{k: getattr(simulation.observations[0], k)[:3] for k in ("x", "y", "flux")}
    )
    none = replace(simulation.observations[1], x=np.zeros(0), y=np.zeros(0), flux=np.zeros(0))
    nowhere = replace(none, wcs=None)
    result = refine([few, none, nowhere, *simulation.observations[2:]])
    assert [frame.state for frame in result.frames[:3]] == ["alone"] * 3
    assert same(result.frames[0].wcs, few.wcs) and same(result.frames[1].wcs, none.wcs)
    assert result.frames[2].wcs is None
    single = refine([simulation.observations[0]]).frames[0]
    assert single.state == "alone" and single.matched == 0 and np.isnan(single.residual)
    assert same(single.wcs, simulation.observations[0].wcs)


def test_nothing_in_nothing_out() -> None:
    assert refine([]).frames == ()
    _, simulation = field()
    lost = [replace(o, wcs=None) for o in simulation.observations[:3]]
    assert states(refine(lost)) == {"alone": 3}


def test_stars_without_a_position_are_left_out() -> None:
    _, simulation = field(frames=8, panels=(1, 1))
    observations = [
        replace(o, x=np.r_[o.x, np.nan], y=np.r_[o.y, 5.0], flux=np.r_[o.flux, 1.0]) for o in simulation.observations
    ]
    whole, holed = refine(simulation.observations), refine(observations)
    assert all(same(a.wcs, b.wcs) for a, b in zip(whole.frames, holed.frames, strict=True))


# --------------------------------------------------------------------------------------------- wrong and lost


@pytest.mark.parametrize("anchored", [False, True])
def test_wrong_and_missing_wcs_are_found_out_and_replaced(anchored: bool) -> None:
    setup, simulation = field(sip=2.0, frames=32)
    faults = ("2 arcmin off", "5 degrees off", "doubled", "mirrored", "turned", "a camera lens", "missing")
    observations = list(simulation.observations)
    hit = np.random.default_rng(7).permutation(32)[: len(faults)]
    for i, fault in zip(hit, faults, strict=True):
        observations[i] = replace(observations[i], wcs=spoilt(observations[i].wcs, fault))
    result = refine(observations, simulation.catalogue if anchored else None)
    assert {int(i) for i in np.flatnonzero([f.state == "rescued" for f in result.frames])} == set(hit.tolist())
    median, p95, _ = accuracy(setup, simulation, result)
    assert median < 0.03 and p95 < 0.08


def test_scale_wrong_by_a_percent_is_mended() -> None:
    setup, simulation = field()
    observations = list(simulation.observations)
    observations[5] = replace(observations[5], wcs=spoilt(observations[5].wcs, "1 % too large"))
    result = refine(observations)
    assert result.frames[5].state in ("refined", "rescued")
    assert accuracy(setup, simulation, result)[1] < 0.08


def test_majority_wins_over_frames_that_are_wrong_together() -> None:
    setup, simulation = field()
    observations = list(simulation.observations)
    hit = list(range(0, 24, 3))
    for i in hit:
        observations[i] = replace(observations[i], wcs=spoilt(observations[i].wcs, "2 arcmin off"))
    result = refine(observations)
    assert [i for i, frame in enumerate(result.frames) if frame.state == "rescued"] == hit
    assert accuracy(setup, simulation, result)[2] < 0.5


def test_catalogue_outvotes_a_wrong_majority() -> None:
    setup, simulation = field(stars=300)
    observations = list(simulation.observations)
    right = list(range(0, 24, 3))
    for i in set(range(24)) - set(right):
        observations[i] = replace(observations[i], wcs=spoilt(observations[i].wcs, "2 arcmin off"))
    result = refine(observations, simulation.catalogue)
    assert all(result.frames[i].state in ("kept", "refined") for i in right)
    assert states(result)["rescued"] == 16
    assert accuracy(setup, simulation, result)[2] < 0.2


def test_frames_are_placed_from_neighbour_to_neighbour() -> None:
    """Only one panel of a row has a WCS: the next is placed by it, the one after by that."""
    setup, simulation = field(panels=(3, 1), overlap=0.35, frames=9)
    observations = [replace(o, wcs=o.wcs if i < 3 else None) for i, o in enumerate(simulation.observations)]
    result = refine(observations)
    assert [frame.state for frame in result.frames[3:]] == ["rescued"] * 6
    assert accuracy(setup, simulation, result)[1] < 0.1


def test_false_stars_of_many_frames_do_not_hide_the_real_ones() -> None:
    """Every frame has its own false stars, so the merged catalogue has more of them than of real ones."""
    _, simulation = field(frames=80, panels=(1, 1), stars=100, false=0.35, missing=0.3, rotation=90.0)
    observations = [replace(o, wcs=None if i % 20 == 0 else o.wcs) for i, o in enumerate(simulation.observations)]
    result = refine(observations)
    assert [result.frames[i].state for i in range(0, 80, 20)] == ["rescued"] * 4


def test_frame_of_another_sky_stays_wrong() -> None:
    rng = np.random.default_rng(2)
    _, simulation = field()
    observations = list(simulation.observations)
    observations[4] = replace(
        observations[4], x=rng.uniform(0, 699, 150), y=rng.uniform(0, 999, 150), flux=rng.random(150)
    )
    result = refine(observations)
    assert result.frames[4].state == "wrong"
    assert same(result.frames[4].wcs, observations[4].wcs)
    assert states(result)["refined"] >= 20


def test_random_lists_are_never_placed() -> None:
    rng = np.random.default_rng(3)
    setup, simulation = field(frames=8)
    ny, nx = setup.shape
    chance = [
        Observation(rng.uniform(0, nx, n), rng.uniform(0, ny, n), rng.random(n), None, setup.shape, "camera")
        for n in rng.integers(5, 100, 20)
    ]
    result = refine([*simulation.observations, *chance])
    assert all(frame.wcs is None and frame.state == "alone" for frame in result.frames[8:])


# --------------------------------------------------------------------------------------------- islands, cameras


def test_islands_are_refined_each_for_itself() -> None:
    (setup, one), (_, two) = field(), field(center=(263.8, -10.0), seed=2)  # on the other side of the sky
    result = refine([*one.observations, *two.observations])
    assert set(states(result)) <= {"kept", "refined"}
    for simulation, frames in ((one, result.frames[:24]), (two, result.frames[24:])):
        assert score(simulation, [frame.wcs for frame in frames], setup.shape)[1] < 0.08


def test_cameras_of_different_scale_share_one_sky() -> None:
    coarse, sky = field(sip=3.0, frames=16, panels=(1, 1), scale=4.0, stars=400)
    rng = np.random.default_rng(8)
    fine = replace(coarse, scale=1.5, sip=1.0, shape=(900, 1200), frames=12, panels=(2, 2), parity=-1)
    plane = WCS(_BENCH["tangent_header"](*fine.center, (1, 1), scale=fine.scale))
    flux = rng.random(len(sky.ra))
    observations, truth = list(sky.observations), list(sky.truth)
    for aim in np.repeat(_BENCH["panel_centres"](fine), 3, axis=0):
        truth.append(_BENCH["pointing"](fine, plane, aim + rng.normal(0, 15, 2), rng))
        x, y, brightness = _BENCH["list_stars"](fine, truth[-1], (sky.ra, sky.dec, flux), rng)
        given = _BENCH["solved"](fine, truth[-1], rng)
        observations.append(Observation(x, y, brightness, given, fine.shape, "other camera"))
    result = refine(observations, sky.catalogue)
    assert set(states(result)) <= {"kept", "refined"}
    errors = [
        np.sqrt((apart(t, f.wcs, o.shape) ** 2).mean())
        for t, f, o in zip(truth, result.frames, observations, strict=True)
    ]
    assert np.median(errors[:16]) < 0.05 and np.median(errors[16:]) < 0.1  # a coarse pixel is 2.7 fine ones
    assert {d.instrument for d in result.distortions} == {"camera", "other camera"}


# --------------------------------------------------------------------------------------------------- pieces


def test_detections_are_merged_by_place_alone() -> None:
    rng = np.random.default_rng(1)
    centre = to_vectors(rng.uniform(0, 360, 300), np.degrees(np.arcsin(rng.uniform(-1, 1, 300))))
    number = rng.integers(0, 300, 3000)
    scattered = centre[number] + rng.normal(0, 2e-7, (3000, 3))
    label = label_stars(scattered / np.linalg.norm(scattered, axis=1)[:, None], 1e-5)
    assert len(np.unique(label)) == len(np.unique(number))
    assert len(np.unique(label * 300 + number)) == len(np.unique(number))


def test_two_detections_of_a_frame_at_one_star_are_both_dropped() -> None:
    star, frame = np.array([0, 0, 0, 1, 1]), np.array([5, 5, 6, 5, 6])
    np.testing.assert_array_equal(seen_once(star, frame), [False, False, True, True, True])


def test_medians_by_label() -> None:
    median, count = medians(np.array([2, -1, 0, 2, 2, 0]), np.array([5.0, 9.0, 1.0, 7.0, 6.0, 3.0]), 4)
    np.testing.assert_array_equal(median, [1.0, 0.0, 6.0, 0.0])
    np.testing.assert_array_equal(count, [2, 0, 3, 0])


def test_tangent_axes_are_right_angled_and_smooth() -> None:
    direction = to_vectors(np.linspace(0, 359, 500), np.linspace(-80, 90, 500))
    axes = tangent_axes(direction)
    np.testing.assert_allclose(np.einsum("nak,nbk->nab", axes, axes), np.tile(np.eye(2), (500, 1, 1)), atol=1e-12)
    np.testing.assert_allclose(np.einsum("nak,nk->na", axes, direction), 0, atol=1e-12)
    np.testing.assert_allclose(np.cross(axes[:, 0], axes[:, 1]), direction, atol=1e-12)
    np.testing.assert_allclose(tangent_axes(np.array([1e-9, 0, 1.0])), [[1, 0, -1e-9], [0, 1, 0]], atol=1e-12)


@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_no_frame_ends_up_opposite_the_pole(spread: float) -> None:
    turned = Rotation.from_rotvec([0.3, 1.2, -0.4]).apply(to_vectors(np.array([0, spread, 180]), np.zeros(3))[:2])
    opposite = np.r_[turned, -turned]
    for directions in (turned, opposite):
        turn = turn_to_pole(directions)
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(turn) == pytest.approx(1)
        assert (directions @ turn.T)[:, 2].min() > -0.95


@pytest.mark.parametrize("sip", [0.0, 5.0])
@pytest.mark.parametrize("dec", [90.0, 12.0, -89.99])
def test_pointings_read_and_write_a_wcs(dec: float, sip: float) -> None:
    header = _BENCH["tangent_header"](350.0, dec, (1400, 2000), scale=3.0, angle_deg=77.0, sip_px=sip)
    wcs, turn = _BENCH["as_wcs"](header, (1400, 2000)), turn_to_pole(to_vectors(np.array([340.0]), np.array([80.0])))
    pointings = read_pointings([wcs, None], [(1400, 2000), (7, 9)], ["a", "b"], turn)
    np.testing.assert_array_equal(pointings.placed, [True, False])
    assert apart(wcs, pointings.wcs(0, turn), (1400, 2000)).max() < 1e-4


def test_distortion_terms_are_what_sip_says() -> None:
    rng = np.random.default_rng(4)
    camera, bend = Camera("any", (1000, 1600)), rng.normal(0, 2, (9, 2))
    offset = rng.uniform(-500, 500, (40, 2))
    matrix, coefficients = camera.sip(bend)
    direct = offset + camera.terms(offset) @ bend
    np.testing.assert_allclose((offset + camera.sip_terms(offset) @ coefficients) @ matrix.T, direct, atol=1e-9)


def _dense_solution(e: Equations) -> tuple[np.ndarray, np.ndarray]:
    """The same least squares written out with the stars as unknowns."""
    n, frames, stars = len(e.star), len(e.width), int(e.star.max()) + 1
    rows = np.zeros((2 * n, 6 * frames + 18 + 2 * stars))
    for i in range(n):
        for axis in range(2):
            at = rows[2 * i + axis]
            for p in range(3):
                at[6 * e.frame[i] + 2 * p + axis] = e.place[i, p]
            for t in range(9):
                for b in range(2):
                    at[6 * frames + 2 * t + b] = e.turn[e.frame[i], axis, b] * e.terms[i, t]
            at[6 * frames + 18 + 2 * e.star[i] + axis] = 1
    root = np.repeat(np.sqrt(e.weight), 2)[:, None]
    prior = np.zeros((6 * frames + 18, rows.shape[1]))
    scale = np.r_[np.repeat(1 / e.width.ravel(), 2), np.full(18, 1 / 3.0)]
    prior[:, : len(scale)] = np.diag(scale)
    right = np.r_[e.miss.ravel() * root[:, 0], -scale * np.r_[e.moved.ravel(), e.bent.ravel()]]
    found = np.linalg.lstsq(np.concatenate([rows * root, prior]), right, rcond=None)[0]
    return found[: 6 * frames].reshape(frames, 3, 2), found[6 * frames :][:18].reshape(1, 9, 2)


def test_linear_pass_is_the_least_squares_solution() -> None:
    rng = np.random.default_rng(6)
    n, frames = 120, 4
    equations = Equations(
        star=np.arange(n) // 4,
        frame=np.arange(n) % 4,
        place=np.c_[np.ones(n), rng.normal(0, 1, (n, 2))],
        turn=Rotation.from_rotvec(np.outer(rng.uniform(0, 6, frames), [0, 0, 1])).as_matrix()[:, :2, :2],
        terms=rng.uniform(-1, 1, (n, 9)),
        camera=np.zeros(n, np.int64),
        miss=rng.normal(0, 1, (n, 2)),
        weight=rng.uniform(0.1, 1, n),
        moved=rng.normal(0, 0.1, (frames, 3, 2)),
        width=rng.uniform(0.1, 1, (frames, 3)),
        bent=rng.normal(0, 1, (1, 9, 2)),
    )
    result = adjust(equations, np.array([True]))
    move, bend = _dense_solution(equations)
    np.testing.assert_allclose(result.move, move, atol=1e-3)
    np.testing.assert_allclose(result.bend, bend, atol=1e-3)


# -------------------------------------------------------------------------------------------------- real subs


def test_real_subs_find_their_places_among_their_neighbours(shared_data: Path) -> None:
    """Two nights of NGC 7023 and six panels cut from one of them: one sub has a WCS, the rest are placed by it."""
    subs = [
        _observed(path)
        for name in ("", "-panels")
        for path in sorted((shared_data / f"seestar-ngc7023{name}").glob("*.fit.gz"))
    ]
    truth = [sub.wcs for sub in subs]
    lost = [replace(sub, wcs=sub.wcs if i == 0 else None) for i, sub in enumerate(subs)]
    result = refine(lost)
    assert [frame.state for frame in result.frames] == ["kept"] + ["rescued"] * 7
    for sub, true, frame in zip(subs, truth, result.frames, strict=True):
        assert np.sqrt((apart(true, frame.wcs, sub.shape) ** 2).mean()) < 0.5


def _observed(path: Path) -> Observation:
    frame = read_frame(path)
    stars = measure_frame(frame, Calibration(), Aperture()).stars
    return Observation(stars.x, stars.y, stars.flux.sum(axis=1), frame.wcs, frame.shape, frame.instrument)
