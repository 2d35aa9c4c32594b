"""The global pixel grid: it holds every frame wherever on the sky, and leaves out what is not of the field."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from astropy.wcs import WCS
from numpy.typing import NDArray

from zemosaic.canvas import (
    Canvas,
    CanvasError,
    find_strays,
    footprint,
    pixel_scale,
    plan_canvas,
)
from zemosaic.demo import tangent_header
from zemosaic.frames import Frame
from zemosaic.settings import Settings
from zemosaic.sphere import separation, to_radec, to_vectors
from zemosaic.tiles import Window

pytestmark = pytest.mark.filterwarnings("error")

SHAPE = (120, 200)  # (ny, nx)
SCALE = 2.39  # arcsec per pixel
STEP = 100 * SCALE / 3600  # degrees: half the width of a frame


def frame(
    ra: float,
    dec: float,
    angle: float = 0.0,
    *,
    parity: int = 1,
    scale: float = SCALE,
    sip: float = 0.0,
    shape: tuple[int, int] = SHAPE,
    **facts: object,
) -> Frame:
    """A frame that looks at this point, its y axis `angle` degrees from north."""
    wcs = WCS(tangent_header(ra, dec, shape, scale=scale, angle_deg=angle, parity=parity, sip_px=sip))
    wcs.pixel_shape = shape[::-1]
    return Frame(Path(f"{ra:.3f}{dec:+.3f}.fit"), shape, "bayer", "GRBG", wcs=wcs, **facts)  # type: ignore[arg-type]


def row(n: int, ra: float = 83.0, dec: float = 10.0, **options: object) -> list[Frame]:
    """Frames side by side along the right ascension, each overlapping the next by half."""
    return [frame(ra + i * STEP / np.cos(np.deg2rad(dec)), dec, **options) for i in range(n)]  # type: ignore[arg-type]


def on_canvas(canvas: Canvas, one: Frame) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Canvas positions of points all over a frame, out to the outer edges of its pixels."""
    ny, nx = one.shape
    y, x = np.mgrid[-0.5 : ny - 0.5 : 41j, -0.5 : nx - 0.5 : 41j]
    assert one.wcs is not None
    cx, cy = canvas.wcs.wcs_world2pix(*one.wcs.all_pix2world(x.ravel(), y.ravel(), 0), 0)
    return cx, cy


FIELDS = {
    "equator": row(3, 180.0, 0.0),
    "RA 0 inside": [frame(359.95, 10.0), frame(0.05, 10.03)],
    "dec 72": [frame(359.6 + 0.2 * i, 72 + 0.02 * i, 30 * i, parity=-1, sip=4.0) for i in range(5)],
    "dec -72": row(4, 0.0, -72.0, angle=40.0),
    "rotated": [frame(83.0, 10.0, angle, parity=p) for angle in (0, 45, 69, 90, 180, 250) for p in (1, -1)],
    "distorted": row(3, sip=4.0),
    "coarse": row(2, scale=60.0, sip=3.0),
    "single": [frame(83.0, 10.0)],
    "dec 88": row(4, 350.0, 88.0, angle=30.0),
    "dec -88": row(4, 350.0, -88.0, angle=30.0, parity=-1),
}
OF_FIELDS = pytest.mark.parametrize("frames", FIELDS.values(), ids=FIELDS.keys())


# --- the grid --------------------------------------------------------------------------------------------


@OF_FIELDS
@pytest.mark.parametrize("orientation", ["north_up", "median_pc"])
def test_every_frame_lies_wholly_on_the_canvas_and_in_its_window(frames, orientation):
    canvas = plan_canvas(frames, Settings(global_wcs_orientation=orientation, global_wcs_padding_percent=0.0))
    whole = Window.of_shape(canvas.shape)
    for one in frames:
        x, y = on_canvas(canvas, one)
        assert x.min() >= -0.5 and x.max() <= canvas.shape[1] - 0.5
        assert y.min() >= -0.5 and y.max() <= canvas.shape[0] - 0.5
        window = canvas.window_of(one)
        assert window.intersect(whole) == window
        # Every canvas pixel whose middle lies on the frame is in the window, and the window is not much larger.
        assert window.x0 <= np.ceil(x.min()) and window.x1 > np.floor(x.max())
        assert window.y0 <= np.ceil(y.min()) and window.y1 > np.floor(y.max())
        assert max(x.min() - window.x0, window.x1 - 1 - x.max(), y.min() - window.y0, window.y1 - 1 - y.max()) < 2


@OF_FIELDS
def test_the_canvas_is_no_larger_than_it_must_be(frames):
    canvas = plan_canvas(frames, Settings(global_wcs_padding_percent=0.0))
    x, y = np.concatenate([on_canvas(canvas, one) for one in frames], axis=1)
    assert canvas.shape[1] - np.ptp(x) < 4 and canvas.shape[0] - np.ptp(y) < 4


@OF_FIELDS
def test_the_grid_is_a_plain_tangent_plane_about_the_middle_of_the_field(frames):
    canvas = plan_canvas(frames, Settings())
    assert list(canvas.wcs.wcs.ctype) == ["RA---TAN", "DEC--TAN"]
    assert canvas.wcs.sip is None and canvas.wcs.wcs.radesys == "ICRS"
    assert canvas.wcs.pixel_shape == canvas.shape[::-1]
    middle = (np.array(canvas.shape[::-1]) + 1) / 2
    np.testing.assert_allclose(canvas.wcs.wcs.crpix, middle, atol=1)
    assert pixel_scale(canvas.wcs) == pytest.approx(canvas.scale, rel=1e-9)
    assert np.linalg.det(canvas.wcs.pixel_scale_matrix) < 0  # east to the left, as on the sky


def test_north_is_up_and_east_left():
    canvas = plan_canvas(row(3, angle=69.0), Settings())
    ra, dec = canvas.wcs.wcs.crval
    x, y = canvas.wcs.wcs_world2pix([ra, ra, ra + 0.01], [dec, dec + 0.01, dec], 0)
    assert y[1] > y[0] and x[1] == pytest.approx(x[0], abs=1e-6)
    assert x[2] < x[0] and y[2] == pytest.approx(y[0], abs=1e-2)


@pytest.mark.parametrize("angle", [-60.0, 0.0, 30.0, 89.0])
@pytest.mark.parametrize("parity", [1, -1])
def test_median_pc_lays_the_frames_straight(angle, parity):
    """Frames turned by half a turn, as after a meridian flip, lie as straight as the others."""
    frames = [frame(83.0, 10.0, angle + turn, parity=parity) for turn in (-2, 0, 2, 180, 182, 178)]
    canvas = plan_canvas(frames, Settings(global_wcs_orientation="median_pc"))
    assert frames[1].wcs is not None
    x, y = canvas.wcs.wcs_world2pix(*frames[1].wcs.all_pix2world([50, 50, 150], [20, 100, 20], 0), 0)
    assert x[1] == pytest.approx(x[0], abs=0.2) and y[2] == pytest.approx(y[0], abs=0.2)
    assert max(canvas.shape) < 1.2 * max(SHAPE)


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"global_wcs_pixelscale_mode": "min"}, 2.3),
        ({"global_wcs_pixelscale_mode": "median"}, 2.4),
        ({"global_wcs_pixelscale_mode": "max"}, 2.6),
        ({"global_wcs_pixelscale_mode": "max", "global_wcs_res_override": 5.0}, 5.0),
    ],
)
def test_the_scale_is_the_one_asked_for(options, scale):
    frames = [frame(83.0, 10.0, scale=s) for s in (2.3, 2.4, 2.6)]
    canvas = plan_canvas(frames, Settings(**options))
    assert canvas.scale == pytest.approx(scale, rel=1e-6)
    assert pixel_scale(canvas.wcs) == pytest.approx(scale, rel=1e-6)
    assert canvas.shape[1] * scale == pytest.approx(200 * 2.6 * 1.04, abs=3 * scale)


def test_padding_is_added_on_every_side():
    bare, padded = (plan_canvas(row(3), Settings(global_wcs_padding_percent=percent)).shape for percent in (0.0, 10.0))
    assert padded == (pytest.approx(1.2 * bare[0], abs=2), pytest.approx(1.2 * bare[1], abs=2))


def test_the_order_of_the_frames_does_not_matter():
    frames = FIELDS["dec 72"]
    one, other = plan_canvas(frames, Settings()), plan_canvas(frames[::-1], Settings())
    assert one.shape == other.shape
    np.testing.assert_allclose(one.wcs.wcs.crval, other.wcs.wcs.crval, atol=1e-9)


def test_a_window_beside_the_canvas_is_empty():
    canvas = plan_canvas(row(2), Settings())
    assert canvas.window_of(frame(90.0, 10.0)).area == 0


@pytest.mark.parametrize("place", [(263.0, -10.0), (173.2, 0.0)], ids=["opposite", "on the horizon"])
def test_a_frame_on_the_far_side_of_the_sky_has_no_window(place):
    canvas = plan_canvas(row(2), Settings())
    with pytest.raises(CanvasError, match=r"\.fit looks away from the canvas: run it on its own"):
        canvas.window_of(frame(*place))


@pytest.mark.parametrize("ras", [(0, 180), (0, 65, 130), (300, 0, 70)])
def test_more_sky_than_a_tangent_plane_can_show_is_refused(ras):
    with pytest.raises(CanvasError, match="more than 120 deg"):
        plan_canvas([frame(ra, 0.0) for ra in ras], Settings())


def test_a_hundred_degrees_still_fit():
    canvas = plan_canvas([frame(ra, 0.0, scale=60.0) for ra in (310, 0, 50)], Settings())
    assert canvas.shape[1] > 100 * 60


def test_no_frame_makes_no_canvas():
    with pytest.raises(CanvasError, match="no frame with a usable WCS"):
        plan_canvas([], Settings())


# --- the sphere ------------------------------------------------------------------------------------------


def test_vectors_and_angles_agree():
    rng = np.random.default_rng(0)
    ra, dec = rng.uniform(0, 360, 50), rng.uniform(-90, 90, 50)
    vectors = to_vectors(ra, dec)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1)
    np.testing.assert_allclose([to_radec(3.0 * v) for v in vectors], np.c_[ra, dec], atol=1e-9)


@pytest.mark.parametrize("angle", [1e-7, 1e-3, 1.0, 90.0, 179.0, 180.0])
def test_separation_is_exact_for_small_and_large_angles(angle):
    a, b = to_vectors(np.array([10.0, 10.0]), np.array([-90.0, -90.0 + angle]))
    assert separation(a, b) == pytest.approx(angle, rel=1e-6)


@pytest.mark.parametrize("dec", [0.0, 72.0, 90.0])
def test_a_footprint_goes_once_around_the_outer_edges_of_the_pixels(dec):
    one = frame(0.0, dec, 30.0)
    assert one.wcs is not None
    outline = footprint(one.wcs, one.shape)
    ra, line = np.array([to_radec(v) for v in outline]).T
    x, y = one.wcs.all_world2pix(ra, line, 0)
    ny, nx = SHAPE
    on_edge = np.isclose(np.abs(x - (nx - 1) / 2), nx / 2, atol=1e-6) | np.isclose(
        np.abs(y - (ny - 1) / 2), ny / 2, atol=1e-6
    )
    assert on_edge.all()
    closed = np.hypot(np.diff(x, append=x[0]), np.diff(y, append=y[0]))
    assert closed.sum() == pytest.approx(2 * (nx + ny)) and closed.max() < 1.01 * nx / 8


@pytest.mark.parametrize("parity", [1, -1])
@pytest.mark.parametrize("dec", [0.0, 72.0, -89.9])
def test_pixel_scale_is_that_of_the_optics(parity, dec):
    one = frame(10.0, dec, 33.0, parity=parity, sip=2.0)
    assert one.wcs is not None
    assert pixel_scale(one.wcs) == pytest.approx(SCALE, rel=1e-6)


# --- strays ----------------------------------------------------------------------------------------------


def strays(frames: Sequence[Frame]) -> dict[int, str]:
    """Number of every frame that is left out, and why."""
    reasons = find_strays(frames)
    assert len(reasons) == len(frames)
    return {i: reason for i, reason in enumerate(reasons) if reason}


@OF_FIELDS
def test_a_real_field_has_no_strays(frames):
    assert strays(frames) == {}


@pytest.mark.parametrize("place", [0, 2, 5])
def test_a_pointing_far_away_is_left_out_with_a_sentence(place):
    frames = row(5)
    frames.insert(place, frame(124.0, 10.0))
    (number, reason), *others = strays(frames).items()
    assert number == place and not others
    assert "40.2 deg away from the main field" in reason and "run it on its own" in reason


def test_a_pointing_on_the_other_side_of_the_sky_is_left_out():
    assert list(strays([*row(5), frame(263.0, -10.0)])) == [5]


def test_a_scale_twice_that_of_the_same_camera_is_left_out():
    frames = row(5)
    frames[3] = frame(83.2, 10.0, scale=2 * SCALE)
    assert strays(frames) == {
        3: 'its WCS says 4.78"/px but the other frames of this camera have 2.39"/px: solve it again'
    }


def test_a_scale_that_contradicts_the_optics_is_left_out_even_if_the_frame_is_alone():
    optics = {"focal_length": 250.0, "pixel_size": 2.9}
    assert strays([frame(83.0, 10.0, **optics)]) == {}
    assert strays([frame(83.0, 10.0, scale=2 * SCALE, **optics)]) == {
        0: 'its WCS says 4.78"/px but its focal length and pixel size give 2.39"/px: solve it again'
    }


def test_another_camera_may_have_another_scale():
    assert strays([*row(4, instrument="Seestar S50"), *row(4, instrument="Dwarf 3", scale=4.8)]) == {}


def test_a_wcs_that_leaves_the_sky_is_left_out():
    """An orthographic projection ends at the horizon; these pixels lie beyond it."""
    wild = frame(83.0, 10.0)
    assert wild.wcs is not None
    wild.wcs.wcs.ctype = ["RA---SIN", "DEC--SIN"]
    wild.wcs.wcs.crpix = [-2e5, 0]
    wild.wcs.wcs.set()
    reason = "its WCS does not map the frame's corners onto the sky: solve it again"
    assert strays([*row(4), wild]) == {4: reason}
    assert strays([wild]) == {0: reason}


@pytest.mark.parametrize(("gap", "kept"), [(0.5, True), (8.0, False), (100.0, False)])
def test_of_two_equal_islands_the_far_one_is_named(gap, kept):
    """Near ones share a canvas; far ones would stretch it over empty sky. `gap` in widths of an island."""
    width = 5 * STEP
    islands = [*row(4), *row(4, 83.0 + (1 + gap) * width)]
    lost = strays(islands)
    assert list(lost) == ([] if kept else [4, 5, 6, 7])
    assert all("deg away from the main field" in reason for reason in lost.values())


def test_the_larger_group_stays_wherever_it_comes_in_the_list():
    assert list(strays([*row(2, 120.0), *row(5)])) == [0, 1]


def test_a_chain_of_overlapping_frames_is_one_field_however_long():
    assert strays(row(60)) == {}


def test_no_frames_have_no_strays():
    assert find_strays([]) == []


def test_when_all_are_left_out_each_has_its_reason():
    optics = {"focal_length": 250.0, "pixel_size": 2.9}
    assert list(strays([frame(83.0, 10.0, scale=9.0, **optics), frame(84.0, 10.0, scale=9.0, **optics)])) == [0, 1]


POLES = {
    "north pole": [frame(20.0, 90.0, 30.0)],
    "south pole": [frame(20.0, -90.0, 30.0)],
    "round the north pole": [frame(ra, 89.95, ra / 3) for ra in (0, 90, 200)],
    "round the south pole": [frame(ra, -89.95, ra / 3, parity=-1) for ra in (10, 130, 250)],
    "beside the pole": row(3, 20.0, 89.6),
}
OF_POLES = pytest.mark.parametrize("frames", POLES.values(), ids=POLES.keys())


@OF_POLES
@pytest.mark.parametrize("orientation", ["north_up", "median_pc"])
def test_poles_every_frame_lies_wholly_on_the_canvas(frames, orientation):
    test_every_frame_lies_wholly_on_the_canvas_and_in_its_window(frames, orientation)


@OF_POLES
def test_poles_the_canvas_is_no_larger_than_it_must_be(frames):
    test_the_canvas_is_no_larger_than_it_must_be(frames)


@OF_POLES
def test_poles_have_no_strays(frames):
    assert strays(frames) == {}
