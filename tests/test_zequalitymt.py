"""Frame and tile metrics on simulated nights whose faults are known."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from astropy.io import fits
from numpy.typing import NDArray
from scipy import ndimage

from zequalitymt import (
    FrameMetrics,
    binned_luminance,
    frame_metrics,
    gate_frames,
    main,
    tile_gate,
    tile_metrics,
)

SHAPE = (480, 640)  # full frame; measured in 2x2 cells
SKY, PEDESTAL = 600.0, 500.0  # e- (1 e- = 1 ADU), ADU


def frame(
    fwhm: float = 3.0,
    stars: int = 100,
    transparency: float = 1.0,
    trail: float = 0.0,
    hot: int = 60,
    seed: int = 0,
    shape: tuple[int, int] = SHAPE,
    beta: float | None = None,
) -> NDArray[np.float32]:
    """A frame of Gaussian (or Moffat, with `beta`) stars, trailed by `trail` px along 30 degrees; ADU."""
    rng = np.random.default_rng(seed)
    light = np.full(shape, SKY)
    reach = int(2.5 * fwhm + trail / 2) + 4
    box = np.arange(-reach, reach + 1)
    sigma = fwhm / math.sqrt(8 * math.log(2))
    alpha = fwhm / 2 / math.sqrt(2 ** (1 / (beta or 3)) - 1)
    shifts = np.linspace(-trail / 2, trail / 2, 9 if trail else 1)
    for _ in range(stars):
        x, y = rng.uniform(reach, shape[1] - reach - 1), rng.uniform(reach, shape[0] - reach - 1)
        flux = transparency * 1000 * 10 ** rng.exponential(0.6)
        u = box + int(x) - x - shifts[:, None, None] * math.cos(math.pi / 6)
        v = box[:, None] + int(y) - y - shifts[:, None, None] * math.sin(math.pi / 6)
        r2 = u**2 + v**2
        psf = (1 + r2 / alpha**2) ** -beta if beta else np.exp(-r2 / (2 * sigma**2))
        psf = psf.mean(axis=0)
        light[int(y) - reach : int(y) + reach + 1, int(x) - reach : int(x) + reach + 1] += flux * psf / psf.sum()
    image = light + np.sqrt(light + 16) * rng.standard_normal(shape)
    where = rng.integers(0, image.size, hot)
    image.ravel()[where] += rng.uniform(3000, 50000, hot)
    return (image + PEDESTAL).astype(np.float32)


def measure(**how) -> FrameMetrics:
    return frame_metrics(*binned_luminance(frame(**how)))


# --- metrics of a frame ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seeing", [2.4, 3.0, 4.0, 6.0, 9.0])
def test_fwhm_of_gaussian_stars_on_the_binned_frame(seeing):
    assert measure(fwhm=seeing, stars=150).fwhm == pytest.approx(seeing, rel=0.06)


def test_fwhm_rises_with_the_seeing_for_winged_stars_too():
    widths = [measure(fwhm=seeing, stars=150, beta=3.0).fwhm for seeing in (2.4, 3.0, 4.0, 9.0)]
    assert np.all(np.diff(widths) > 0.3)
    assert widths[1] / 3.0 == pytest.approx(1.25, abs=0.1)  # the bias that the docstring states


def test_sky_noise_and_scale():
    metrics = measure()
    assert metrics.sky == pytest.approx(SKY + PEDESTAL, rel=0.01)
    assert metrics.noise == pytest.approx(math.sqrt(SKY + 16) / 2, rel=0.1)
    luminance = binned_luminance(frame())[0]
    assert frame_metrics(luminance, 1.0).fwhm == pytest.approx(metrics.fwhm / 2)


def test_trailing_shows_with_its_direction_and_round_stars_show_none():
    trailed, still = measure(trail=6.0), measure()
    assert trailed.trailing > 0.25 and trailed.angle == pytest.approx(30, abs=6)
    assert trailed.ellipticity > 0.25
    assert still.trailing < 0.05 and still.ellipticity < 0.15


def test_hot_pixels_are_no_stars():
    clean, hot = measure(hot=0), measure(hot=120)  # twice the density of a real sensor
    assert hot.stars == pytest.approx(clean.stars, rel=0.2)  # those that carry a hot pixel are dropped
    assert hot.fwhm == pytest.approx(clean.fwhm, rel=0.02)
    assert measure(stars=0, hot=400).stars <= 1


def test_a_frame_without_stars():
    metrics = measure(stars=0, hot=0)
    assert metrics.stars == 0
    assert math.isnan(metrics.fwhm) and math.isnan(metrics.trailing) and math.isnan(metrics.snr)
    assert metrics.sky == pytest.approx(SKY + PEDESTAL, rel=0.01)


def test_regions_without_data_are_left_out():
    image = frame(stars=200)
    whole = frame_metrics(*binned_luminance(image))
    image[:, :200] = np.nan
    image[100:140, 300:500] = np.nan
    part = frame_metrics(*binned_luminance(image))
    assert part.fwhm == pytest.approx(whole.fwhm, rel=0.05)
    assert part.sky == pytest.approx(whole.sky, rel=0.005)
    assert 0.4 < part.stars / whole.stars < 0.9


@pytest.mark.parametrize("value", [np.nan, 0.0, 1000.0, 65535.0])
def test_a_frame_of_nothing_measures_nothing(value):
    metrics = frame_metrics(np.full((120, 160), value, np.float32))
    assert metrics.stars == 0 and math.isnan(metrics.fwhm)


def test_saturated_stars_do_not_shape_the_result():
    image = frame(stars=80, seed=3)
    rng = np.random.default_rng(1)
    for _ in range(40):  # burnt-out discs
        y, x = rng.integers(10, SHAPE[0] - 20), rng.integers(10, SHAPE[1] - 20)
        image[y : y + 10, x : x + 10] = 65535
    burnt = frame_metrics(*binned_luminance(image))
    sound = frame_metrics(*binned_luminance(image), saturation=60000)
    assert burnt.fwhm > 4
    assert sound.fwhm == pytest.approx(3.0, rel=0.1)


def test_the_frame_is_not_changed():
    luminance = binned_luminance(frame())[0]
    before = luminance.copy()
    frame_metrics(luminance)
    np.testing.assert_array_equal(luminance, before)


def test_colour_and_odd_frames_are_binned_too():
    image = frame(stars=150)
    colour = np.repeat(image[:, :, None], 3, axis=2)
    assert frame_metrics(*binned_luminance(colour)).fwhm == pytest.approx(measure(stars=150).fwhm, rel=1e-3)
    assert binned_luminance(image[:-1, :-1])[0].shape == (239, 319)


def test_a_full_size_frame_takes_little_time():
    luminance = binned_luminance(frame(stars=1500, shape=(1080, 1920), hot=400))[0]
    frame_metrics(luminance)
    start = time.process_time()
    frame_metrics(luminance)
    assert time.process_time() - start < 0.15  # 0.03 s on a quiet machine; 0.06 s is the budget


# --- the night -------------------------------------------------------------------------------------------


@cache
def night(size: int = 110) -> tuple[FrameMetrics, ...]:
    """Good frames: seeing 3.0 to 4.2 px, transparency 0.5 to 1.2, star density varying twofold."""
    rng = np.random.default_rng(5)
    return tuple(
        measure(
            fwhm=3 * (1 + 0.15 * abs(rng.normal())),
            transparency=float(np.clip(1 + 0.15 * rng.normal(), 0.5, 1.2)),
            stars=int(rng.uniform(70, 140)),
            trail=float(rng.uniform(0, 1.5)),
            seed=100 + i,
        )
        for i in range(size)
    )


@cache
def faulty(fault: str, size: int = 12) -> tuple[FrameMetrics, ...]:
    how = {"blurred": {"fwhm": 9.0}, "trailed": {"trail": 6.0}, "clouded": {"transparency": 0.05}}[fault]
    return tuple(measure(**how, stars=100, seed=500 + i) for i in range(size))


def test_no_good_frame_of_a_good_night_is_lost():
    assert sum(map(bool, gate_frames(night()))) <= 0.01 * len(night())


def test_faulty_frames_are_found_by_their_fault_and_good_ones_kept():
    frames = [("", m) for m in night()]
    for fault in ("blurred", "trailed", "clouded"):
        frames += [(fault, m) for m in faulty(fault)]
    reasons = gate_frames([m for _, m in frames])
    truth = [fault for fault, _ in frames]
    lost = [r for t, r in zip(truth, reasons, strict=True) if not t and r]
    found = [r for t, r in zip(truth, reasons, strict=True) if t and r]
    named = [r for t, r in zip(truth, reasons, strict=True) if t and r.startswith(t)]
    assert len(lost) <= 0.01 * len(night())
    assert len(found) >= 0.95 * 36 and len(named) >= 0.9 * 36


def test_verdicts_do_not_depend_on_the_order():
    metrics = [*night(20), *faulty("blurred", 3)]
    assert gate_frames(metrics[::-1]) == gate_frames(metrics)[::-1]


def test_a_night_of_poor_seeing_is_not_thrown_away():
    poor = [replace(m, fwhm=2.5 * m.fwhm, trailing=0.4 + m.trailing) for m in night()]
    assert not any(gate_frames(poor))


def test_panels_of_sparse_sky_pass():
    rich = [replace(m, stars=8 * m.stars) for m in night()[::2]]
    assert not any(gate_frames([*rich, *night()[1::2]]))


def test_of_few_frames_only_gross_outliers_go():
    good = list(night()[:3])
    assert gate_frames([*good, replace(good[0], fwhm=1.8 * good[0].fwhm)]) == [""] * 4
    assert [bool(r) for r in gate_frames([*good, replace(good[0], fwhm=10.0)])] == [False] * 3 + [True]
    assert gate_frames([replace(good[0], fwhm=10.0)]) == [""]
    assert gate_frames([]) == []


def test_frames_without_any_star_pass_only_where_all_are_like_this():
    empty = FrameMetrics(stars=0, sky=1100.0, noise=12.0)
    assert gate_frames([empty] * 6) == [""] * 6
    assert gate_frames([*night()[:10], empty])[-1].startswith("clouded: 0 stars")


# --- tiles -----------------------------------------------------------------------------------------------


def tile(shape: tuple[int, int] = (800, 900), seed: int = 0) -> tuple[NDArray, NDArray]:
    """A tile of 10 frames with a nebula, fewer frames at the rim and no data around."""
    rng = np.random.default_rng(seed)
    coverage = np.zeros(shape, np.float32)
    for i in range(10):
        coverage[4 * i : -40 + 4 * i, 20 : -20 - 3 * i] += 1
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]]
    light = 1100 + 700 * np.exp(-((y - 300) ** 2 + (x - 500) ** 2) / (2 * 150.0**2)) + 0.1 * x
    image = light[..., None] + 25 * rng.standard_normal((*shape, 3)) / np.sqrt(np.maximum(coverage, 1))[..., None]
    image[coverage == 0] = np.nan
    return image.astype(np.float32), coverage


def test_a_good_tile_passes():
    metrics = tile_metrics(*tile())
    assert metrics.noise == pytest.approx(25 / math.sqrt(3), rel=0.1)
    assert metrics.score > 0.9 and tile_gate(metrics) == ""


def test_stars_are_no_steps_of_level():
    image, coverage = tile()
    rng = np.random.default_rng(0)
    stars = np.zeros(coverage.shape)
    stars[rng.integers(0, 800, 1500), rng.integers(0, 900, 1500)] = 1000 * 10 ** rng.exponential(0.6, 1500)
    stars = ndimage.gaussian_filter(stars, 1.3)[..., None]
    assert tile_metrics((image + stars).astype(np.float32), coverage).score > 0.9


def test_a_tile_with_bad_edges_fails():
    image, coverage = tile()
    rng = np.random.default_rng(2)
    for edge in (np.s_[:110], np.s_[-110:], np.s_[:, :110], np.s_[:, -110:]):
        image[edge] += 40 * rng.standard_normal(image[edge].shape).astype(np.float32)
    metrics = tile_metrics(image, coverage)
    assert metrics.edge < 0.2 and metrics.uniformity > 0.5
    assert tile_gate(metrics).startswith("score")
    assert tile_gate(metrics, threshold=0.0) == ""


def test_a_patchwork_tile_fails():
    image, coverage = tile()
    patches = np.kron(np.random.default_rng(3).choice([0.0, 300.0], (8, 9)), np.ones((100, 100)))
    metrics = tile_metrics((image + patches[..., None]).astype(np.float32), coverage)
    assert metrics.uniformity < 0.48 and tile_gate(metrics).startswith("score")


def test_a_tile_too_small_to_judge_passes():
    ones = np.ones((40, 40), np.float32)
    metrics = tile_metrics(ones, ones)
    assert math.isnan(metrics.noise) and tile_gate(metrics) == ""


# --- the command line ------------------------------------------------------------------------------------


def test_the_command_line_prints_metrics_and_verdicts(tmp_path, capsys):
    for i in range(6):
        image = np.clip(frame(fwhm=9.0 if i == 4 else 3.0, seed=i), 0, 65535).astype(np.uint16)
        fits.writeto(tmp_path / f"light_{i}.fit", image)
    assert main([str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["reason"][:7] for row in rows] == [""] * 4 + ["blurred", ""]
    assert rows[0]["fwhm"] == pytest.approx(3.0, rel=0.1)
    assert main([str(tmp_path)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 7 and "OUT: blurred" in table[5]


def test_the_command_line_names_what_it_cannot_read_and_goes_on(tmp_path, capsys):
    (tmp_path / "a.fits").write_text("no FITS")
    fits.writeto(tmp_path / "b.fits", np.full((200, 200), 7, np.int16))
    assert main([str(tmp_path), "--json"]) == 1
    captured = capsys.readouterr()
    assert "a.fits" in captured.err
    assert [(row["stars"], row["fwhm"]) for row in json.loads(captured.out)] == [(0, None)]
