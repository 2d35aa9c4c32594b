"""Frame and tile metrics on simulated nights whose faults are known."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy import ndimage

from zemosaic.calibrate import Calibration, Repairs
from zemosaic.events import Events
from zemosaic.frames import Frame, read_frame
from zemosaic.intake import Intake
from zemosaic.measure import FrameMeasure, choose_aperture, measure_frame
from zemosaic.night import compare, needed, nights
from zemosaic.settings import Settings
from zemosaic.stars import Aperture, Stars
from zemosaic_worker import gate, run_hierarchical_mosaic
from zequalitymt import (
    FrameMetrics,
    Verdict,
    copy_rejects,
    frame_metrics,
    gate_frames,
    judge,
    kept,
    main,
    tile_gate,
    tile_metrics,
)

SHAPE = (480, 640)
SKY, PEDESTAL = 600.0, 500.0  # e- (1 e- = 1 ADU), ADU
APERTURE = Aperture(7.0, 10.0, 14.0)
MARGIN = 60  # px of sky around the frame


@cache
def field(stars: int, seed: int) -> NDArray[np.float64]:
    """``(n, 3)`` x, y in px of the undithered frame, and flux of the stars of a field larger than a frame."""
    rng = np.random.default_rng(seed)
    ny, nx = SHAPE
    n = round(stars * (nx + 2 * MARGIN) * (ny + 2 * MARGIN) / (nx * ny))
    x, y = rng.uniform(-MARGIN, nx + MARGIN, n), rng.uniform(-MARGIN, ny + MARGIN, n)
    return np.c_[x, y, 1000 * 10 ** rng.exponential(0.6, n)]


def frame(
    fwhm: float = 3.0,
    stars: int = 100,
    transparency: float | Callable[..., NDArray] = 1.0,
    trail: float = 0.0,
    jump: tuple[float, float, float] = (0.0, 0.0, 0.0),
    hot: int = 60,
    seed: int = 0,
    beta: float | None = None,
    dither: tuple[float, float] = (0.0, 0.0),
    sky: float = SKY,
    glow: Callable[..., NDArray] | None = None,
    field_seed: int = 0,
    shape: tuple[int, int] = SHAPE,
) -> NDArray[np.float32]:
    """A mono frame of Gaussian (or Moffat, with `beta`) stars, ADU.

    `trail` px along 30 degrees; `jump` by dx, dy px for a share of the exposure; `glow(x, y)` e- on top of the sky.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    light = np.full(shape, sky) + (glow(x, y) if glow else 0)
    reach = int(2.5 * fwhm + trail / 2 + max(map(abs, jump[:2]))) + 4
    box = np.arange(-reach, reach + 1)
    steps = np.linspace(-trail / 2, trail / 2, 9 if trail else 1)
    where = [(s * math.cos(math.pi / 6), s * math.sin(math.pi / 6), (1 - jump[2]) / len(steps)) for s in steps]
    where += [(jump[0], jump[1], jump[2])] if jump[2] else []
    for sx, sy, flux in field(stars, field_seed) - [*dither, 0.0]:
        if not (reach <= sx < shape[1] - reach - 1 and reach <= sy < shape[0] - reach - 1):
            continue
        psf = sum(
            w * profile(box + int(sx) - sx - dx, box[:, None] + int(sy) - sy - dy, fwhm, beta) for dx, dy, w in where
        )
        share = transparency(sx, sy) if callable(transparency) else transparency
        light[int(sy) - reach : int(sy) + reach + 1, int(sx) - reach : int(sx) + reach + 1] += share * flux * psf
    image = light + np.sqrt(light + 16) * rng.standard_normal(shape)
    at = rng.integers(0, image.size, hot)
    image.ravel()[at] += rng.uniform(3000, 50000, hot)
    return (image + PEDESTAL).astype(np.float32)


def profile(u: NDArray, v: NDArray, fwhm: float, beta: float | None) -> NDArray:
    r2 = u**2 + v**2
    if beta is None:
        psf = np.exp(-r2 * 4 * math.log(2) / fwhm**2)
    else:
        psf = (1 + r2 * 4 * (2 ** (1 / beta) - 1) / fwhm**2) ** -beta
    return psf / psf.sum()


def header(dither: tuple[float, float], minute: float, wcs_error: tuple[float, float] = (0.0, 0.0)) -> fits.Header:
    """WCS of a dithered frame, off by `wcs_error` px, and the time."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [83.8, 10.0]
    wcs.wcs.crpix = [SHAPE[1] / 2 - dither[0] + wcs_error[0], SHAPE[0] / 2 - dither[1] + wcs_error[1]]
    wcs.wcs.cd = np.diag([-2.39, 2.39]) / 3600
    cards = wcs.to_header()
    cards["INSTRUME"], cards["EXPTIME"] = "Test S50", 10.0
    cards["DATE-OBS"] = f"2026-01-10T{20 + int(minute) // 60:02d}:{int(minute) % 60:02d}:00"
    return cards


def write(path: Path, pixels: NDArray[np.float32], cards: fits.Header | None = None) -> Path:
    fits.writeto(path, np.clip(np.round(pixels), 0, 65535).astype(np.uint16), cards)
    return path


@pytest.fixture
def measured(tmp_path):
    """Measure a frame made by `frame`, or given as pixels."""

    def measure(pixels: NDArray[np.float32] | None = None, **how) -> FrameMetrics:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.fit"
        write(path, frame(**how) if pixels is None else pixels)
        return frame_metrics(measure_frame(read_frame(path), Calibration(), APERTURE))

    return measure


# --- metrics of a frame ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seeing", [2.4, 3.0, 4.0, 6.0, 9.0])
def test_fwhm_of_gaussian_stars(measured, seeing):
    assert measured(fwhm=seeing, stars=150).fwhm == pytest.approx(seeing, rel=0.06)


def test_fwhm_rises_with_the_seeing_for_winged_stars_too(measured):
    widths = [measured(fwhm=seeing, stars=150, beta=3.0).fwhm for seeing in (2.4, 3.0, 4.0, 9.0)]
    assert np.all(np.diff(widths) > 0.3)
    assert widths[1] / 3.0 == pytest.approx(1.25, abs=0.1)  # the bias that the docstring states


def test_sky_and_noise(measured):
    metrics = measured()
    assert metrics.sky == pytest.approx(SKY + PEDESTAL, rel=0.01)
    assert metrics.noise == pytest.approx(math.sqrt(SKY + 16), rel=0.1)
    assert metrics.structure < 0.1 * metrics.noise


def test_structure_is_the_width_of_the_sky_about_a_plane(measured):
    tilted = measured(glow=lambda x, y: 0.5 * x + 0.3 * y, stars=60)
    assert tilted.structure < 0.15 * tilted.noise
    waves = measured(glow=lambda x, y: 40 * np.sin(x / 60) * np.cos(y / 60), stars=60)
    assert waves.structure == pytest.approx(20, rel=0.25)  # rms of the product of two sines of height 40


def test_trailing_shows_with_its_direction_and_round_stars_show_none(measured):
    trailed, still = measured(trail=6.0), measured()
    assert trailed.trailing > 0.25 and trailed.angle == pytest.approx(30, abs=6)
    assert trailed.ellipticity > 0.25
    assert still.trailing < 0.05 and still.ellipticity < 0.15


@pytest.mark.parametrize("jump", [(12.0, -5.0, 0.5), (0.0, 30.0, 0.4), (-70.0, 20.0, 0.6)])
def test_a_jump_doubles_the_stars(measured, jump):
    metrics = measured(jump=jump, stars=80)
    assert metrics.doubled > 0.5
    assert metrics.jump == pytest.approx(math.hypot(*jump[:2]), abs=1)


@pytest.mark.parametrize("stars", [60, 150, 600])
def test_chance_doubles_no_stars(measured, stars):
    assert measured(stars=stars).doubled < 0.15


def test_the_signal_to_noise_follows_transparency_and_sky(measured):
    clear, hazy, bright = measured(), measured(transparency=0.5), measured(sky=4 * SKY)
    assert hazy.snr / clear.snr == pytest.approx(0.5, abs=0.1)
    assert bright.snr / clear.snr == pytest.approx(0.5, abs=0.1)


def test_hot_pixels_are_no_stars(measured):
    clean, hot = measured(hot=0), measured(hot=120)  # twice the density of a real sensor
    assert hot.stars == pytest.approx(clean.stars, rel=0.1)
    assert hot.fwhm == pytest.approx(clean.fwhm, rel=0.02)
    assert measured(stars=0, hot=120).stars <= 1


def test_a_frame_without_stars(measured):
    metrics = measured(stars=0, hot=0)
    assert metrics.stars == 0
    assert all(math.isnan(getattr(metrics, name)) for name in ("fwhm", "trailing", "doubled", "snr"))
    assert metrics.sky == pytest.approx(SKY + PEDESTAL, rel=0.01)


@pytest.mark.parametrize("value", [0.0, 1000.0, 65535.0])
def test_a_frame_of_nothing_measures_nothing(measured, value):
    metrics = measured(np.full((120, 160), value, np.float32))
    assert metrics.stars == 0 and math.isnan(metrics.fwhm)


# --- a night ---------------------------------------------------------------------------------------------


class Night:
    """Frames of one field on disk, each measured once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.measures: dict[Path, FrameMeasure] = {}

    def take(self, name: str, number: int, wcs_error: tuple[float, float] = (0.0, 0.0), **how) -> Path:
        rng = np.random.default_rng(1000 + number)
        dither = tuple(rng.normal(0, 8, 2).tolist())
        usual = {
            "fwhm": 3 + 0.4 * abs(rng.normal()),
            "transparency": 1 + 0.08 * rng.normal(),
            "sky": rng.uniform(450, 750),
        }
        path = self.folder / f"{name}_{number:03d}.fit"
        pixels = frame(**{"dither": dither, "seed": number, "stars": 150} | usual | how)
        return write(path, pixels, header(dither, number, wcs_error))

    def judge(self, *paths: Path, **limits) -> list[Verdict]:
        frames = [read_frame(path) for path in paths]
        for one in frames:
            if one.path not in self.measures:
                self.measures[one.path] = measure_frame(one, Calibration(), APERTURE)
        return judge(frames, [self.measures[one.path] for one in frames], **limits)


@pytest.fixture(scope="module")
def night(tmp_path_factory) -> Night:
    return Night(tmp_path_factory.mktemp("night"))


@pytest.fixture(scope="module")
def good(night) -> list[Path]:
    return [night.take("good", i) for i in range(14)]


def bank(x, y):
    """A cloud over the right half."""
    return np.where(x > SHAPE[1] / 2, 0.65, 1.0)


FAULTS = {
    "doubled": {"jump": (9.0, 6.0, 0.4)},
    "trailed": {"trail": 6.0},
    "blurred": {"fwhm": 8.0},
    "misplaced": {"wcs_error": (30.0, -20.0)},
    "misplaced a little": {"wcs_error": (1.5, 1.0)},
    "clouded here and there": {"transparency": bank},
    "clouded sky": {"glow": lambda x, y: 90 * np.exp(-((x - 200) ** 2 + (y - 150) ** 2) / (2 * 90.0**2))},
    "clouded wholly": {"transparency": 0.02},
    "dimmed": {"transparency": 0.6},
    "dimmed a little under a bright sky": {"transparency": 0.72, "sky": 1.7 * SKY},
}


def test_no_good_frame_has_a_fault(night, good):
    verdicts = night.judge(*good)
    assert [v.reason for v in verdicts] == [""] * len(good)
    assert {v.night for v in verdicts} == {"Test S50 2026-01-10T20:00"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(night, good, fault):
    bad = night.take(fault.replace(" ", "_"), 50, **FAULTS[fault])
    *others, verdict = night.judge(*good, bad)
    assert verdict.fault == fault.split()[0], verdict
    assert not any(v.reason for v in others)


def test_transparency_is_that_of_the_stars_whatever_the_sky_does(night, good):
    for share, sky in ((0.5, 1200.0), (0.9, 300.0)):
        bad = night.take(f"share_{share}", 60, transparency=share, sky=sky)
        *others, verdict = night.judge(*good, bad)
        clear = np.median([1 + 0.08 * np.random.default_rng(1000 + i).normal(size=3)[2] for i in range(14)])
        assert verdict.metrics.transparency == pytest.approx(share / clear, rel=0.1)
        assert others[0].metrics.transparency == pytest.approx(1, abs=0.3)


def test_verdicts_do_not_depend_on_the_order(night, good):
    bad = night.take("order", 61, fwhm=9.0)
    forth, back = night.judge(*good, bad), night.judge(bad, *good[::-1])
    assert [v.reason for v in forth] == [v.reason for v in back[::-1]]


def test_a_night_of_haze_is_not_thrown_away(night, good):
    hazy = [night.take("hazy", 70 + i, transparency=0.5) for i in range(6)]
    assert not any(v.reason for v in night.judge(*hazy))
    assert [v.fault for v in night.judge(*good, *hazy)] == [""] * 14 + ["dimmed"] * 6


def test_without_a_wcs_frames_are_judged_by_themselves(night, good):
    def blind(path: Path) -> Frame:
        return replace(read_frame(path), wcs=None)

    frames = [
        blind(path) for path in (*good, night.take("blind", 62, fwhm=9.0), night.take("dark", 63, transparency=0.02))
    ]
    measures = [measure_frame(one, Calibration(), APERTURE) for one in frames]
    verdicts = judge(frames, measures)
    assert [v.fault for v in verdicts] == [""] * 14 + ["blurred", "clouded"]
    assert all(math.isnan(v.metrics.transparency) for v in verdicts)
    assert all(np.isnan(column).all() for column in vars(compare(frames, measures)).values())


def test_nights_end_where_no_frame_was_taken_for_hours():
    def at(date: str, **facts) -> Frame:
        return Frame(
            **{"path": Path("a"), "shape": SHAPE, "colour": "mono", "instrument": "S50", "date_obs": date} | facts
        )

    one = [at("2026-01-10T20:00:00"), at("2026-01-11T01:59:00"), at("2026-01-11T19:00:00"), at("2026-01-10T21:00:00")]
    labels = nights(one)
    assert labels == ["S50 2026-01-10T20:00"] * 2 + ["S50 2026-01-11T19:00", "S50 2026-01-10T20:00"]
    others = [at("2026-01-10T20:00:00", gain=80.0), at("2026-01-10T20:00:00", exposure=20.0), at("", instrument="")]
    assert len(set(nights([*one, *others]))) == 5
    assert nights([at(""), at("")]) == ["S50", "S50"]


# --- the gate on bare figures ------------------------------------------------------------------------------

USUAL = FrameMetrics(
    stars=100,
    fwhm=3.0,
    trailing=0.05,
    doubled=0.03,
    sky=1100.0,
    noise=25.0,
    structure=2.0,
    transparency=1.0,
    patchiness=0.03,
    unevenness=1.0,
    placed=1.0,
    offset=0.15,
)


def usual(count: int) -> list[FrameMetrics]:
    rng = np.random.default_rng(7)
    return [
        replace(USUAL, fwhm=3 * (1 + 0.15 * abs(rng.normal())), transparency=1 + 0.08 * rng.normal(), stars=int(s))
        for s in rng.uniform(70, 140, count)
    ]


def test_a_night_of_poor_seeing_is_not_thrown_away():
    assert not any(gate_frames([replace(m, fwhm=2.5 * m.fwhm, trailing=0.4 + m.trailing) for m in usual(60)]))


def test_panels_of_sparse_sky_pass():
    mixed = [replace(m, stars=m.stars * (1 if i % 2 else 8), transparency=math.nan) for i, m in enumerate(usual(60))]
    assert not any(gate_frames(mixed))


def test_of_few_frames_only_gross_outliers_go():
    three = [USUAL] * 3
    for little, much in (({"fwhm": 6.0}, {"fwhm": 10.0}), ({"transparency": 0.6}, {"transparency": 0.4})):
        assert gate_frames([*three, replace(USUAL, **little)]) == [""] * 4
        assert [bool(r) for r in gate_frames([*three, replace(USUAL, **much)])] == [False] * 3 + [True]
    assert gate_frames([USUAL]) == [""]
    assert gate_frames([]) == []


def test_frames_without_any_star_pass_only_where_all_are_like_this():
    empty = FrameMetrics(stars=0, sky=1100.0, noise=12.0)
    assert gate_frames([empty] * 6) == [""] * 6
    assert gate_frames([*usual(10), empty])[-1].startswith("clouded: 0 stars")


def test_the_limits_are_the_callers():
    metrics = [*[USUAL] * 8, replace(USUAL, fwhm=4.0), replace(USUAL, transparency=0.8)]
    assert not any(gate_frames(metrics))
    reasons = gate_frames(metrics, blur_factor=1.2, transparency=0.9)
    assert [r[:7] for r in reasons[8:]] == ["blurred", "dimmed:"] and not any(reasons[:8])


# --- what must stay ------------------------------------------------------------------------------------------


def aimed(x: float, y: float) -> Frame:
    """A frame whose middle lies x, y px from the field's."""
    cards = header((x, y), 0)
    wcs = WCS(cards)
    wcs.pixel_shape = SHAPE[::-1]
    return Frame(Path(f"{x}_{y}"), SHAPE, "mono", wcs=wcs)


def test_dimmed_frames_stay_where_they_are_the_rule():
    rng = np.random.default_rng(3)
    clear = [aimed(*rng.normal(0, 10, 2)) for _ in range(10)]
    haze = [aimed(500 + dx, dy) for dx, dy in rng.normal(0, 10, (10, 2))]
    few = [aimed(*rng.normal(0, 10, 2)) for _ in range(3)]
    dimmed = np.array([False] * 10 + [True] * 13)
    assert needed([*clear, *haze, *few], dimmed).tolist() == [False] * 10 + [True] * 10 + [False] * 3
    assert not needed(clear, np.zeros(10, bool)).any()


def test_only_dimmed_frames_are_spared():
    there = [aimed(0.0, float(i)) for i in range(10)]
    alone = aimed(5000.0, 0.0)

    def verdicts(reason: str) -> list[Verdict]:
        return [Verdict(one, USUAL, why, "") for one, why in zip([*there, alone], [""] * 10 + [reason], strict=True)]

    assert kept(verdicts("dimmed: x"), {"dimmed"}) == [True] * 11
    assert kept(verdicts("blurred: x"), {"dimmed", "blurred"}) == [True] * 10 + [False]
    assert kept(verdicts("blurred: x"), {"dimmed"}) == [True] * 11


# --- in a run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(night, good) -> list[Path]:
    """A night with a dimmed, a blurred and a clouded frame at its end."""
    faults = [night.take(name, 80, **FAULTS[name]) for name in ("dimmed", "blurred")]
    return [*good, *faults, night.take("patchy", 80, **FAULTS["clouded here and there"])]


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({}, ["blurred", "clouded"]),
        ({"cloud_filter_dimmed": True}, ["dimmed", "blurred", "clouded"]),
        ({"cloud_filter_dimmed": True, "cloud_filter_transparency": 0.4}, ["blurred", "clouded"]),
        ({"cloud_filter": False, "blur_filter_factor": 9.0}, []),
        ({"blur_filter": False}, ["clouded"]),
    ],
)
def test_settings_say_which_faults_are_left_out(night, mixed, settings, left_out):
    night.judge(*mixed)
    frames = [read_frame(path) for path in mixed]
    intake = Intake(list(mixed), frames=frames, measures=[night.measures[path] for path in mixed])
    verdicts = gate(intake, Settings(**settings), Events())
    assert [reason.partition(":")[0] for reason in intake.rejected.values()] == left_out
    assert len(intake.frames) == len(intake.measures) == len(mixed) - len(left_out)
    assert [verdicts[path].fault != "" for path in mixed[:14]] == [False] * 14  # metrics of all of them are there


def test_the_ledger_of_a_run_tells_of_every_frame(mixed, tmp_path):
    settings = Settings(num_processing_workers=1, global_wcs_res_override=6.0)
    result = run_hierarchical_mosaic(mixed, tmp_path, settings, sds=True)
    rows = {row["file"]: row for row in result.ledger.rows()}
    assert result.ledger.counts() == {"used": 15, "partial": 0, "rejected": 2}
    dimmed, blurred = rows["dimmed_080.fit"], rows["blurred_080.fit"]
    assert dimmed["status"] == "used" and dimmed["remark"].startswith("dimmed")
    assert dimmed["transparency"] == pytest.approx(0.6, abs=0.06) and dimmed["weight"] < 0.6
    assert blurred["reason"].startswith("blurred") and blurred["fwhm"] == pytest.approx(8, rel=0.15)
    assert blurred["date_obs"] and blurred["exposure"] == 10 and blurred["lot"] == -1
    remarks = fits.getdata(result.product, "FRAMES")["REMARK"]
    lines = (tmp_path / f"{result.product.stem}_frames.csv").read_text(encoding="utf-8").splitlines()
    assert len(remarks) == len(lines) - 1 == len(mixed)
    assert set(remarks) == {"", dimmed["remark"]}


# --- the promise ---------------------------------------------------------------------------------------------


def test_bad_frames_of_the_benchmark_are_found(shared_data, tmp_path):
    """One small set; docs/quality.md has the figures of ten."""
    script = shared_data.parent / "bench" / "simulate.py"
    options = {"panels": "2x1", "frames": "30", "shape": "300x480", "blurred": "0.1", "clouds": "0.15", "seed": "5"}
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    subprocess.run([sys.executable, script, tmp_path / "S", *arguments], check=True, capture_output=True)
    truth = {f["name"]: f for f in json.loads((tmp_path / "S_truth" / "frames.json").read_text())["frames"]}
    frames = [read_frame(path) for path in sorted((tmp_path / "S").iterdir())]
    aperture = choose_aperture(frames, Calibration())
    found = judge(frames, [measure_frame(one, Calibration(), aperture) for one in frames])
    bad = [truth[v.frame.path.name]["blurred"] or truth[v.frame.path.name]["cloud"] for v in found]
    assert sum(bad) >= 5
    assert [bool(v.reason) for v in found] == bad


def fake_measure(x: NDArray, y: NDArray, flux: NDArray) -> FrameMeasure:
    """Stars in one colour, and nothing else that is worth looking at."""
    flux = flux[:, None]
    stars = Stars(x, y, flux, 0.01 * flux, np.ones(len(flux), bool))
    some = np.ones(1)
    return FrameMeasure(
        repairs=Repairs(np.zeros(0, np.int64), np.zeros(0, np.float32)),
        stars=stars,
        detected=len(x),
        fwhm=3.0,
        ellipticity=0.05,
        trailing=0.05,
        angle=0.0,
        doubled=0.0,
        jump=math.nan,
        snr=50.0,
        structure=2.0,
        sky=some,
        noise=some,
        blocks=np.ones((4, 4, 1), np.float32),
        block_noise=some,
        block_px=16,
    )


def test_hundreds_of_frames_are_compared():
    rng = np.random.default_rng(0)
    sky = rng.uniform(0, 600, (120, 2))
    flux = 1e4 * np.linspace(1, 20, len(sky))
    shifts, clear = rng.normal(0, 5, (400, 2)), rng.uniform(0.9, 1.1, 400)
    clear[::10] = 0.5
    frames = [aimed(*shift) for shift in shifts]
    noise = np.exp(0.01 * rng.standard_normal((400, len(sky))))
    measures = [fake_measure(*(sky - d).T, c * flux * n) for d, c, n in zip(shifts, clear, noise, strict=True)]
    told = compare(frames, measures)
    np.testing.assert_allclose(told.transparency, clear / np.median(clear[clear > 0.72]), rtol=0.01)
    assert (told.placed == 1).all() and told.offset.max() < 0.01


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


def fingerprint(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture(scope="module")
def subs(tmp_path_factory) -> Path:
    """Six frames in two folders, one of them blurred."""
    folder = tmp_path_factory.mktemp("subs")
    for i in range(6):
        target = folder / ("a" if i < 3 else "b") / f"light_{i}.fit"
        target.parent.mkdir(exist_ok=True)
        write(target, frame(fwhm=9.0 if i == 4 else 3.0, seed=i, dither=(5 * i, 0)), header((5 * i, 0), i))
    return folder


def test_the_command_line_prints_metrics_and_verdicts(subs, capsys):
    before = fingerprint(subs)
    assert main([str(subs), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["fault"] for row in rows] == [""] * 4 + ["blurred", ""]
    assert rows[4]["reason"].startswith("blurred: FWHM")
    assert rows[0]["fwhm"] == pytest.approx(3.0, rel=0.1)
    assert rows[0]["transparency"] == pytest.approx(1.0, abs=0.05)
    assert main([str(subs), "--blur-factor", "5"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 7 and "blurred" not in table[5]
    assert fingerprint(subs) == before


def test_rejects_are_copied_and_nothing_is_ever_changed(subs, tmp_path, capsys):
    before = fingerprint(subs)
    out = tmp_path / "rejects"
    assert main([str(subs), "--move-rejects", str(out)]) == 0
    assert fingerprint(subs) == before
    assert fingerprint(out) == {"b/light_4.fit": before["b/light_4.fit"]}
    (out / "b" / "light_4.fit").write_text("mine")
    assert main([str(subs), "--move-rejects", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert (out / "b" / "light_4.fit").read_text() == "mine"


def test_rejects_that_cannot_be_copied_are_named(tmp_path):
    gone = Verdict(replace(aimed(0.0, 0.0), path=tmp_path / "gone.fit"), USUAL, "blurred: x", "")
    (problem,) = copy_rejects([gone], tmp_path / "out")
    assert "gone.fit cannot be copied" in problem
    assert list((tmp_path / "out").iterdir()) == []  # not even a part of it


def test_the_command_line_names_what_it_cannot_read_and_goes_on(tmp_path, capsys):
    (tmp_path / "a.fits").write_text("no FITS")
    fits.writeto(tmp_path / "b.fits", np.full((200, 200), 7, np.int16))
    assert main([str(tmp_path), "--json"]) == 1
    captured = capsys.readouterr()
    assert "a.fits" in captured.err
    assert [(row["stars"], row["fwhm"]) for row in json.loads(captured.out)] == [(0, None)]
    assert main([str(tmp_path / "missing")]) == 1
    assert "does not exist" in capsys.readouterr().err
