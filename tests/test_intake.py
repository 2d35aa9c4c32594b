"""What every route begins with: files → frames → canvas → measures → one photometric scale."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from zemosaic import execute
from zemosaic.calibrate import Calibration
from zemosaic.canvas import CanvasError
from zemosaic.demo import FieldTruth, make_field
from zemosaic.events import Event, Events
from zemosaic.frames import Frame
from zemosaic.intake import Intake, match, measure_all, place, scan
from zemosaic.resume import flatten
from zemosaic.settings import Settings

PLENTY = 1 << 33  # bytes of memory
HERE = Path(__file__).parent  # a folder on a disk with room


@pytest.fixture(scope="session")
def field(tmp_path_factory: pytest.TempPathFactory) -> FieldTruth:
    """Two overlapping panels of three subs each; tests only read them."""
    options = {"panels": (2, 1), "overlap": 0.5, "shape": (200, 260), "star_density": 6000, "nebula": 0, "sky": 300}
    return make_field(tmp_path_factory.mktemp("field"), frames=6, trails=0, **options)


@pytest.fixture
def intake(field: FieldTruth) -> Intake:
    return scan(field.paths, 1, Events())


def measured(intake: Intake, calibration: Calibration | None = None) -> Intake:
    measure_all(intake, calibration or Calibration(), Settings(), 1, Events())
    return intake


def test_measured_in_processes_or_here_is_the_same(field, monkeypatch):
    monkeypatch.setattr(execute, "_WORTH", 1)
    alone, spread = (scan(field.paths, 1, Events()) for _ in range(2))
    for intake, workers in ((alone, 1), (spread, 2)):
        intake.frames[1] = replace(intake.frames[1], path=field.paths[0].with_name("gone.fit"))
        measure_all(intake, Calibration(), Settings(memory_gb=100), workers, Events())
    assert list(alone.rejected) == list(spread.rejected) == [field.paths[0].with_name("gone.fit")]
    assert len(alone.measures) == 5
    for one, other in zip(alone.measures, spread.measures, strict=True):
        first, second = flatten(one), flatten(other)
        assert list(first) == list(second)
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])
    assert list(alone.said) == [frame.path for frame in alone.frames] and set(spread.said) == set(alone.said)
    assert [alone.said[path].matched for path in alone.said] == [spread.said[path].matched for path in alone.said]


def with_pixels(frame: Frame, folder: Path, pixels: np.ndarray) -> Frame:
    """The same frame with other pixels in its file."""
    header = fits.getheader(frame.path)
    for keyword in ("BZERO", "BSCALE"):
        header.remove(keyword, ignore_missing=True)
    path = folder / f"{len(list(folder.iterdir()))}.fit"
    fits.writeto(path, pixels, header)
    return replace(frame, path=path)


# --- scan -----------------------------------------------------------------------------------------------


def test_frames_come_in_order_of_time_whatever_their_names(field, tmp_path):
    for name, path in zip("fbdaec", field.paths, strict=True):
        shutil.copy(path, tmp_path / f"{name}.fit")
    intake = scan([tmp_path], 1, Events())
    assert [path.stem for path in intake.files] == list("abcdef")
    assert [frame.path.stem for frame in intake.frames] == list("fbdaec")


def test_frames_of_the_same_instant_come_in_order_of_their_names(field, tmp_path):
    for name in ("z/2.fit", "a/3.fit", "m/1.fit"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(field.paths[0], tmp_path / name)
    assert [frame.path.name for frame in scan([tmp_path], 1, Events()).frames] == ["1.fit", "2.fit", "3.fit"]


def test_a_file_that_is_no_frame_is_named_and_the_scan_goes_on(field, tmp_path):
    shutil.copy(field.paths[0], tmp_path / "good.fit")
    (tmp_path / "bad.fit").write_text("no frame")
    said: list[Event] = []
    intake = scan([tmp_path], 1, Events(said.append))
    assert [frame.path.name for frame in intake.frames] == ["good.fit"]
    assert list(intake.rejected) == [tmp_path / "bad.fit"]
    (warning,) = [event.text for event in said if event.kind == "warning"]
    assert "bad.fit" in warning and intake.rejected[tmp_path / "bad.fit"] in warning
    assert [event.values for event in said if event.kind == "progress"][-1]["current"] == 2


def test_many_workers_find_the_same_frames(field, intake):
    assert scan(field.paths, 3, Events()).frames == intake.frames


# --- leaving frames out ---------------------------------------------------------------------------------


def test_what_is_left_out_has_a_reason_and_what_stays_keeps_its_measure(intake):
    intake.measures = [str(frame.path) for frame in intake.frames]
    intake.drop(["", "cloud", "", "", "plane", ""], Events())
    assert list(intake.rejected.values()) == ["cloud", "plane"]
    assert intake.measures == [str(frame.path) for frame in intake.frames]
    assert {frame.path for frame in intake.frames} | intake.rejected.keys() == set(intake.files)


# --- canvas ---------------------------------------------------------------------------------------------


def test_the_canvas_holds_every_frame_at_the_scale_of_the_frames(intake, field):
    canvas = place(intake, Settings(), Events(), PLENTY, HERE)
    assert canvas.scale == pytest.approx(field.recipe.scale, rel=1e-3)
    ny, nx = canvas.shape
    for frame in intake.frames:
        corners = canvas.wcs.wcs_world2pix(frame.wcs.calc_footprint(center=False), 0)
        assert (corners >= -0.5).all() and (corners <= [nx - 0.5, ny - 0.5]).all()


def test_a_frame_without_a_wcs_is_left_out_with_the_reason_its_header_gave(intake):
    intake.frames[2] = replace(intake.frames[2], wcs=None, wcs_problem="the sidecar is of another image")
    intake.frames[4] = replace(intake.frames[4], wcs=None)
    left_out = [intake.frames[i].path for i in (2, 4)]
    place(intake, Settings(), Events(), PLENTY, HERE)
    assert intake.rejected[left_out[0]] == "the sidecar is of another image"
    assert "solve it first" in intake.rejected[left_out[1]]


@pytest.mark.parametrize(("common", "odd", "word"), [("bayer", "mono", "mono"), ("mono", "rgb", "in colour")])
def test_mono_and_colour_do_not_mix(intake, common, odd, word):
    intake.frames = [replace(frame, colour=odd if i == 3 else common) for i, frame in enumerate(intake.frames)]
    path = intake.frames[3].path
    place(intake, Settings(), Events(), PLENTY, HERE)
    assert list(intake.rejected) == [path]
    assert intake.rejected[path].startswith(f"it is {word} ")


def test_bayer_and_rgb_are_both_colour(intake):
    intake.frames[3] = replace(intake.frames[3], colour="rgb", bayer=None)
    place(intake, Settings(), Events(), PLENTY, HERE)
    assert not intake.rejected


def test_a_stray_pointing_does_not_make_a_monstrous_canvas(intake):
    shape = place(intake, Settings(), Events(), PLENTY, HERE).shape
    away = intake.frames[0].wcs.deepcopy()
    away.wcs.crval = away.wcs.crval + [0, 40]
    stray = replace(intake.frames[0], path=Path("stray.fit"), wcs=away)
    intake.frames.append(stray)
    assert place(intake, Settings(), Events(), PLENTY, HERE).shape == shape
    assert "40.0 deg" in intake.rejected[stray.path]


def test_memory_is_counted_before_it_is_needed(intake):
    said: list[Event] = []
    ny, nx = place(intake, Settings(), Events(said.append), PLENTY, HERE).shape
    (forecast,) = [event for event in said if event.key == "run_info_memory_forecast"]
    need = round(forecast.values["need_gb"] * 2**30)
    assert need >= ny * nx * 4 * 4  # three colours and the coverage at least
    place(intake, Settings(), Events(), need, HERE)
    with pytest.raises(CanvasError, match=rf"canvas of {nx} x {ny} px needs .* GB of memory and the run may use .* GB"):
        place(intake, Settings(), Events(), need - 1, HERE)


def test_nothing_left_to_place_is_an_error():
    with pytest.raises(CanvasError, match=r"no .*frame"):
        place(Intake([]), Settings(), Events(), PLENTY, HERE)


# --- measures -------------------------------------------------------------------------------------------


def test_the_sky_is_measured_and_stars_are_found(intake, field):
    """The sky to 1 %, and stars in every frame to match it by."""
    measured(intake)
    truth = {frame.path: frame for frame in field.frames}
    for frame, measure in zip(intake.frames, intake.measures, strict=True):
        np.testing.assert_allclose(measure.sky, truth[frame.path].sky + 500, rtol=0.01)
        assert measure.stars.clean.sum() >= 5


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (lambda shape: np.full(shape, np.nan, np.float32), "no valid pixels"),
        (lambda shape: np.full(shape, 60000, np.float32), "empty or saturated"),
        (lambda shape: np.zeros((7, 9), np.float32), "changed"),
    ],
)
def test_a_frame_that_cannot_be_measured_leaves_with_its_reason(intake, tmp_path, pixels, reason):
    bad = with_pixels(intake.frames[1], tmp_path, pixels(intake.frames[1].shape))
    intake.frames[1] = bad
    good = [frame.path for frame in intake.frames if frame != bad]
    measured(intake)
    assert reason in intake.rejected[bad.path]
    assert [frame.path for frame in intake.frames] == good
    assert len(intake.measures) == len(good)


def test_a_dark_of_another_camera_is_told_by_every_frame_of_the_wrong_size(intake, tmp_path):
    wrong = with_pixels(intake.frames[0], tmp_path, np.random.default_rng(0).normal(500, 20, (100, 130)))
    intake.frames[0] = replace(wrong, shape=(100, 130))
    measured(intake, Calibration(dark=np.zeros((200, 260), np.float32)))
    assert list(intake.rejected) == [wrong.path]
    assert "master dark is 260x200 px but the frame is 130x100" in intake.rejected[wrong.path]


# --- one photometric scale ------------------------------------------------------------------------------


def test_every_frame_becomes_a_sub_on_one_photometric_scale(intake, field):
    """Gain times transparency is one number, to the few per cent that the few stars of a tiny field allow."""
    canvas = place(intake, Settings(), Events(), PLENTY, HERE)
    subs, photometry = match(measured(intake), canvas, Settings(), 1, Events())
    assert [sub.frame for sub in subs] == intake.frames
    truth = {frame.path: frame for frame in field.frames}
    scale = np.array([sub.adjustment.gain * truth[sub.frame.path].transparency for sub in subs])
    np.testing.assert_allclose(scale / np.median(scale, axis=0), 1, atol=0.05)
    assert len(set(photometry.star_groups)) == 1


def test_as_the_settings_say_frames_are_left_as_they_are(intake):
    settings = Settings(stacking_normalize_method="none", stacking_weighting_method="none")
    canvas = place(intake, settings, Events(), PLENTY, HERE)
    subs, _ = match(measured(intake), canvas, settings, 1, Events())
    for sub in subs:
        assert (sub.adjustment.gain == 1).all() and not sub.adjustment.plane.any()
        assert (sub.weight == 1).all()


def test_a_mosaic_that_the_disk_cannot_hold_is_refused_with_the_numbers(intake, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CanvasError, match=r"takes 0\.\d\d GB and .* has 0\.00 GB left"):
        place(intake, Settings(), Events(), PLENTY, tmp_path / "not" / "there" / "yet")
