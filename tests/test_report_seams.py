"""Seams: a known step is measured where it is; nebulae and noise make none; the worst are named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from report_field import FRAME, NOISE, SHAPE, blank, invent, measured
from scipy.special import ndtr

from zemosaic.report.evidence import Evidence
from zemosaic.report.seams import block_steps, measure_seams
from zemosaic.report.surface import measure_surface

DEEP = NOISE / np.sqrt(8)  # ADU, noise of the invented mosaic where one panel is


@pytest.fixture(scope="module")
def plain() -> Evidence:
    return invent(stars=25)


def stepped(evidence: Evidence, height: float) -> tuple[Evidence, np.ndarray]:
    """The mosaic with a step along the outline of its first frame, and x, y of that frame's inner corner."""
    x0, y0 = np.round(evidence.frames.outline[0].min(axis=0) + 0.5).astype(int)
    image = evidence.image.copy()
    image[y0 : y0 + FRAME[0], x0 : x0 + FRAME[1]] += np.float32(height)
    return replace(evidence, image=image), np.array([x0 + FRAME[1], y0 + FRAME[0]])


def test_mosaic_without_steps_has_none(plain: Evidence):
    figures = measure_seams(plain, measure_surface(plain))
    assert figures.pieces > 200
    assert figures.p95.max() < 0.1
    assert figures.control_p95.max() < 0.6  # pieces of 40 px in noise


@pytest.mark.parametrize("height", [1.0, 3.0, 30.0])
def test_step_is_measured_and_named(plain: Evidence, height: float):
    evidence, corner = stepped(plain, height * DEEP)
    figures = measure_seams(evidence, measure_surface(evidence))
    worst = figures.worst[0]
    assert abs(worst.step_adu) == pytest.approx(height * DEEP, rel=0.25)
    assert (np.abs([worst.x, worst.y] - corner) < 20).any()
    # Of frames that end a few pixels apart any may be named; all of them are brighter inside.
    assert np.abs(plain.frames.outline[worst.frame].max(axis=0) - corner).min() < 26
    assert worst.step > 0 and worst.lot == plain.frames.lot[worst.frame]
    assert figures.max.max() > 0.7 * height


def test_taller_steps_give_larger_figures(plain: Evidence):
    figures = [measure_seams(e, measure_surface(e)) for e in (stepped(plain, h * DEEP)[0] for h in (0, 2, 6))]
    assert np.all(np.diff([f.p95.max() for f in figures]) > 0.1)
    assert np.all(np.diff([f.max_adu.max() for f in figures]) > DEEP)


def test_slope_and_nebula_are_no_seam(plain: Evidence):
    yy, xx = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(np.float32)
    glow = 0.3 * xx + 200 * np.exp(-0.5 * (((xx - 380) / 200) ** 2 + ((yy - 280) / 180) ** 2)).astype(np.float32)
    figures = measure_seams(replace(plain, image=plain.image + glow[..., None]), measure_surface(plain))
    assert figures.p95.max() < 0.1


def rim(height: float, x0: float, width: float = 9.0) -> np.ndarray:
    """A sky that rises by `height` within some 2 x `width` px around the column `x0`, ``(ny, nx, 1)``."""
    return (height * ndtr((np.arange(SHAPE[1]) - x0) / width)).astype(np.float32)[None, :, None]


def test_rim_of_a_nebula_on_a_border_is_no_seam_but_a_step_there_is(plain: Evidence):
    edge = plain.frames.outline[0, :, 0].max()
    rimmed = replace(plain, image=plain.image + rim(25 * DEEP, edge))
    figures = measure_seams(rimmed, measure_surface(rimmed))
    assert figures.max.max() < 1.5 and figures.p95.max() < 0.25
    stepped_too, _ = stepped(rimmed, 6 * DEEP)
    assert measure_seams(stepped_too, measure_surface(stepped_too)).max.max() > 3


def test_every_seam_says_what_chance_makes_there(plain: Evidence):
    evidence, _ = stepped(plain, 5 * DEEP)
    worst = measure_seams(evidence, measure_surface(evidence)).worst
    assert abs(worst[0].step) > 2 * worst[0].chance > 0


def test_steps_beyond_chance_are_rare():
    found = [measure_seams(e, measure_surface(e)).max for e in (invent(stars=1, seed=s, channels=1) for s in range(8))]
    assert sum(float(top[0]) > 0 for top in found) <= 2


def test_worst_seams_lie_apart_and_have_pictures(plain: Evidence):
    evidence, _ = stepped(plain, 4 * DEEP)
    worst = measure_seams(evidence, measure_surface(evidence)).worst
    places = np.array([(s.x, s.y) for s in worst])
    distance = np.hypot(*(places[:, None] - places).transpose(2, 0, 1)) + 1e3 * np.eye(len(worst))
    assert len(worst) == 10 and distance.min() > 90
    assert np.all(np.diff([abs(s.step) for s in worst]) <= 0)
    for seam in worst:
        assert seam.thumbnail.shape == seam.window.shape and seam.thumbnail.ndim == 2


def test_coverage_alone_shows_the_borders(plain: Evidence):
    evidence, corner = stepped(plain, 5 * DEEP)
    figures = measure_seams(replace(evidence, frames=None), measure_surface(evidence))
    assert figures.pieces > 200
    assert figures.worst[0].lot == figures.worst[0].frame == -1
    assert (np.abs([figures.worst[0].x, figures.worst[0].y] - corner) < 25).any()
    assert figures.max.max() > 2


def test_nothing_is_known_without_borders():
    figures = measure_seams(Evidence(blank()), measure_surface(Evidence(blank())))
    assert figures.pieces == 0 and figures.worst == ()
    assert np.isnan(figures.p95).all() and np.isnan(figures.map).all()


def test_block_steps_are_those_of_the_noise():
    noise = 6.0
    steps = block_steps(measure_surface(Evidence(blank((800, 1000), noise))))
    # 24-px means of white noise: noise / 24; a difference, 2.58 sigma; the slope around adds a few percent.
    assert steps[0] == pytest.approx(2.58 * np.sqrt(2) * noise / 24, rel=0.15)


@pytest.mark.parametrize("height", [2.0, 20.0, 2000.0])
@pytest.mark.parametrize("tilt", [0.0, 0.4])
def test_block_steps_see_a_seam_of_any_height(height: float, tilt: float):
    image = blank((600, 800))
    yy, xx = np.mgrid[:600, :800]
    image += np.float32(5 * height) * (xx + tilt * yy > 450)
    assert block_steps(measure_surface(Evidence(image)))[0] > 0.5 * 5 * height


def test_masked_stars_leave_no_trace_in_the_sky():
    evidence = invent(stars=130, seed=5)
    surface, _ = measured(evidence)
    truth = measure_surface(invent(stars=1, seed=5)).sky
    difference = surface.sky - truth
    covered = surface.valid > 0.99
    assert np.isfinite(difference[covered]).mean() > 0.8
    assert abs(np.nanmedian(difference[covered])) < 0.1
