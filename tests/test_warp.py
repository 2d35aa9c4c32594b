"""The pixel map against the exact WCS, and the one interpolation from frame to canvas against what was drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy.optimize import curve_fit
from scipy.special import ndtr

from zemosaic.demo import tangent_header
from zemosaic.tiles import Window
from zemosaic.warp import Crop, PixelMap, pixel_map, source_box, warp_block

pytestmark = pytest.mark.filterwarnings("error")

PATTERNS = ("RGGB", "GRBG", "GBRG", "BGGR")
SENSORS = pytest.mark.parametrize("sensor", [*PATTERNS, "mono", "rgb"])
SHAPE = (180, 210)
SKY, NOISE = 1000.0, 25.0  # ADU
EDGE = 5 * NOISE  # departure from the nearest pixel from which the ringing guard acts, as in a coadd
TOLERANCE = 0.01  # of the pixel map, pixels
UNGUARDED = float("inf")

Star = tuple[float, float, float]  # x, y, flux
Positions = tuple[NDArray[np.float64], NDArray[np.float64]]


# --- the pixel map ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """A frame, and a canvas whose tangent point is `away` degrees of right ascension and declination beside it."""

    frame: WCS
    shape: tuple[int, int]
    canvas: WCS
    window: Window

    @classmethod
    def of(
        cls,
        dec: float = 10.0,
        angle: float = 0.0,
        *,
        shape: tuple[int, int] = (300, 180),
        scale: float = 2.39,
        away: tuple[float, float] = (1.0, -0.3),
        **options: float,
    ) -> View:
        frame = WCS(tangent_header(83.0, dec, shape, scale=scale, angle_deg=angle, **options))  # type: ignore[arg-type]
        canvas = WCS(tangent_header(83.0 + away[0], dec + away[1], (1, 1), scale=scale))
        ny, nx = shape
        x, y = np.meshgrid(np.linspace(-0.5, nx - 0.5, 21), np.linspace(-0.5, ny - 0.5, 21))
        x, y = canvas.wcs_world2pix(*frame.all_pix2world(x.ravel(), y.ravel(), 0), 0)
        y0, x0, y1, x1 = (math.floor(v) for v in (y.min(), x.min(), y.max() + 2, x.max() + 2))
        return cls(frame, shape, canvas, Window(y0, y1, x0, x1))

    def map(self, **options: int) -> PixelMap:
        return pixel_map(self.frame, self.shape, self.canvas, self.window, **options)

    def exact(self, x: NDArray, y: NDArray) -> Positions:
        """Frame positions of canvas positions near the frame, through both WCS."""
        sky = self.canvas.wcs_pix2world(x, y, 0)
        return self.frame.all_world2pix(*sky, 0, tolerance=1e-7, maxiter=50)

    def scattered(self, n: int = 4000) -> tuple[NDArray, NDArray, NDArray, NDArray]:
        """Random canvas positions on the frame, and their exact frame positions."""
        rng = np.random.default_rng(0)
        ny, nx = self.shape
        fx, fy = rng.uniform(-0.5, nx - 0.5, n), rng.uniform(-0.5, ny - 0.5, n)
        x, y = self.canvas.wcs_world2pix(*self.frame.all_pix2world(fx, fy, 0), 0)
        return x, y, fx, fy


VIEWS = {
    "straight": View.of(),
    "turned by 69 deg": View.of(angle=69.0),
    "mirrored": View.of(angle=200.0, parity=-1),
    "4 px of distortion": View.of(sip_px=4.0),
    "distorted, turned, mirrored": View.of(72.0, 69.0, sip_px=-4.0, parity=-1),
    "near the pole": View.of(89.6, 30.0, away=(60.0, 0.2)),
    "on the pole": View.of(-90.0, 30.0, away=(120.0, 0.3), sip_px=1.7),
    "wide field": View.of(20.0, 69.0, scale=60.0, away=(6.0, -2.0), sip_px=2.0),
    "fisheye": View.of(20.0, 10.0, scale=120.0, away=(10.0, -3.0), sip_px=-6.0),
    "small": View.of(shape=(120, 100), sip_px=1.5),
}
OF_VIEWS = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())


@OF_VIEWS
def test_the_sparse_map_agrees_with_the_exact_one(view):
    x, y, fx, fy = view.scattered()
    mx, my = view.map().at(x, y)
    assert np.hypot(mx - fx, my - fy).max() < TOLERANCE


@OF_VIEWS
def test_the_map_says_how_exact_it_is(view):
    x, y, fx, fy = view.scattered()
    made = view.map()
    mx, my = made.at(x, y)
    assert np.hypot(mx - fx, my - fy).max() < 1.2 * made.error + 1e-4
    assert made.error < TOLERANCE


def test_distortion_makes_the_grid_finer_where_it_must():
    straight, bent, wild = VIEWS["straight"].map(), VIEWS["small"].map(), VIEWS["fisheye"].map()
    assert straight.step == 128 and straight.error < 0.01
    assert bent.step < 64 and wild.step < 64


@OF_VIEWS
def test_a_block_of_the_map_is_the_map_at_its_pixels(view):
    made, w = view.map(), view.window
    for block in (
        Window(w.y0, w.y0 + 90, w.x0, w.x1),
        Window(w.y0 + 7, w.y0 + 8, w.x0 + 3, w.x1 - 2),
        Window(w.y1 - 9, w.y1, w.x1 - 1, w.x1),
    ):
        y, x = np.mgrid[block.y0 : block.y1, block.x0 : block.x1]
        expected = made.at(x.ravel(), y.ravel())
        for found, value in zip(made.block(block), expected, strict=True):
            assert found.shape == block.shape
            np.testing.assert_allclose(found.ravel(), value, atol=1e-4)


def test_the_nodes_themselves_are_exact():
    view = VIEWS["4 px of distortion"]
    made = view.map()
    ny, nx = view.shape
    y, x = (n.ravel() for n in np.mgrid[: made.x.shape[0], : made.x.shape[1]] * made.step)
    on = (made.x.ravel() > 0) & (made.x.ravel() < nx) & (made.y.ravel() > 0) & (made.y.ravel() < ny)
    fx, fy = view.exact(x[on] + view.window.x0, y[on] + view.window.y0)
    np.testing.assert_allclose(made.x.ravel()[on], fx, atol=1e-4)
    np.testing.assert_allclose(made.y.ravel()[on], fy, atol=1e-4)


def test_a_distortion_that_runs_wild_outside_the_frame_does_no_harm_inside():
    """Its polynomial has no inverse out there; the nodes still are finite, and the frame is mapped right."""
    view = View.of(shape=(300, 400), sip_px=38.0)
    made = pixel_map(view.frame, view.shape, view.canvas, view.window.grow(300))
    assert np.isfinite(made.x).all() and np.isfinite(made.y).all()
    x, y, fx, fy = view.scattered()
    mx, my = made.at(x, y)
    assert np.hypot(mx - fx, my - fy).max() < TOLERANCE


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (2, 3)])
def test_tiny_windows_have_a_map_too(shape):
    view = VIEWS["4 px of distortion"]
    w = view.window
    block = Window(w.y0 + 200, w.y0 + 200 + shape[0], w.x0 + 100, w.x0 + 100 + shape[1])
    made = pixel_map(view.frame, view.shape, view.canvas, block)
    y, x = np.mgrid[block.y0 : block.y1, block.x0 : block.x1]
    np.testing.assert_allclose(made.block(block), np.reshape(view.exact(x.ravel(), y.ravel()), (2, *shape)), atol=0.01)


# --- pictures --------------------------------------------------------------------------------------------


def light_of(stars: Sequence[Star], fwhm: float, shape: tuple[int, int] = SHAPE) -> NDArray[np.float64]:
    """Gaussian stars, integrated over every pixel, ``(ny, nx)``."""
    ny, nx = shape
    light = np.zeros(shape)
    for x, y, flux in stars:
        row, column = (np.diff(ndtr((np.arange(n + 1) - 0.5 - at) / (fwhm / 2.3548))) for n, at in ((ny, y), (nx, x)))
        light += flux * np.outer(row, column)
    return light


def record(colours: NDArray, sensor: str) -> NDArray[np.float32]:
    """What a sensor makes of ``(ny, nx, 3)`` colours, or of a grey ``(ny, nx)``."""
    colours = np.broadcast_to(np.atleast_3d(colours), (*colours.shape[:2], 3)).astype(np.float32)
    if sensor == "rgb":
        return colours.copy()
    if sensor == "mono":
        return colours[..., 1].copy()
    y, x = np.indices(colours.shape[:2])
    filters = np.array(["RGB".index(letter) for letter in sensor])[2 * (y % 2) + x % 2]
    return np.take_along_axis(colours, filters[..., None], axis=-1)[..., 0]


def star_field(flux: float = 1e5) -> list[Star]:
    """Lonely stars at all phases of the pixel grid, far from the edges."""
    rng = np.random.default_rng(1)
    places = [(x, y) for y in range(30, SHAPE[0] - 30, 20) for x in range(30, SHAPE[1] - 30, 20)]
    return [(x + rng.uniform(0, 2), y + rng.uniform(0, 2), flux) for x, y in places]


def turned(angle: float = 8.0, shift: tuple[float, float] = (0.3, 0.7), shape: tuple[int, int] = SHAPE) -> Positions:
    """Where the pixels of a canvas of the frame's scale, turned about the middle of the frame, look at it."""
    y, x = np.indices(shape, float)
    cy, cx = (shape[0] - 1) / 2, (shape[1] - 1) / 2
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    return c * (x - cx) - s * (y - cy) + cx + shift[0], s * (x - cx) + c * (y - cy) + cy + shift[1]


def warp(pixels: NDArray[np.float32], sensor: str, at: Positions, edge: float = EDGE) -> NDArray[np.float32]:
    """The frame at these positions, ``(h, w, C)``."""
    whole = Window.of_shape(at[0].shape)
    return warp_on(pixels, sensor, PixelMap(whole, 1, *at, 0.0), whole, edge)


def warp_on(
    pixels: NDArray[np.float32], sensor: str, chart: PixelMap, block: Window, edge: float = EDGE
) -> NDArray[np.float32]:
    """A block of the canvas, ``(h, w, C)``."""
    out = np.empty((1 if sensor == "mono" else 3, *block.shape), np.float32)
    count = warp_block(
        Crop.whole(pixels), sensor if sensor in PATTERNS else None, chart, pixels.shape[:2], block, edge, out
    )
    if not np.isnan(pixels).any():
        assert count == np.isfinite(out[0]).sum()
    return np.moveaxis(out, 0, -1)


def fluxes(picture: NDArray, at: Positions, stars: Sequence[Star], radius: float) -> NDArray[np.float64]:
    """Light within `radius` frame pixels of every star, ``(n, C)``."""
    apart = [np.hypot(at[0] - x, at[1] - y) for x, y, _ in stars]
    return np.array([(picture[d < radius] - SKY).sum(axis=0, dtype=float) for d in apart])


@SENSORS
@pytest.mark.parametrize("angle", [0.0, 8.0, 69.0, 180.0])
def test_stars_keep_their_flux(sensor, angle):
    """Bayer: one by one they scatter by what debayering does to sharp stars."""
    stars, at = star_field(), turned(angle)
    picture = warp(record(SKY + light_of(stars, 2.5), sensor), sensor, at)
    ratio = fluxes(picture, at, stars, 9.0) / 1e5
    np.testing.assert_allclose(ratio.mean(axis=0), 1, atol=0.003)
    assert np.abs(ratio - 1).max() < (0.02 if sensor in PATTERNS else 0.004)


@SENSORS
@pytest.mark.parametrize("angle", [8.0, 69.0])
def test_stars_are_where_the_positions_say(sensor, angle):
    stars, at = star_field(), turned(angle)
    picture = warp(record(SKY + light_of(stars, 2.5), sensor), sensor, at) - np.float32(SKY)
    errors = []
    for x, y, _ in stars:
        near = np.hypot(at[0] - x, at[1] - y) < 6
        weight = picture[near].mean(axis=1)
        errors.append([np.average(p[near], weights=weight) - true for p, true in zip(at, (x, y), strict=True)])
    assert np.abs(np.mean(errors, axis=0)).max() < 0.004
    assert np.abs(errors).max() < 0.04


def width_of(picture: NDArray, at: Positions, stars: Sequence[Star]) -> float:
    """FWHM of a Gaussian fitted to all pixels of all stars at once."""
    apart, value = [], []
    for x, y, flux in stars:
        distance = np.hypot(at[0] - x, at[1] - y)
        near = distance < 6
        apart.append(distance[near])
        value.append((picture[near] - SKY) / flux)

    def gauss(r: NDArray, height: float, fwhm: float) -> NDArray:
        return height * np.exp(-4 * np.log(2) * (r / fwhm) ** 2)

    (_, fwhm), _ = curve_fit(gauss, np.concatenate(apart), np.concatenate(value), (0.1, 3.0))
    return float(abs(fwhm))


@pytest.mark.parametrize("fwhm", [2.0, 2.5, 3.5])
def test_stars_stay_as_sharp_as_they_were(fwhm):
    stars = star_field()
    pixels = record(SKY + light_of(stars, fwhm), "mono")
    before = width_of(pixels, tuple(np.indices(SHAPE, float)[::-1]), stars)
    after = width_of(warp(pixels, "mono", turned(8.0))[..., 0], turned(8.0), stars)
    assert after == pytest.approx(before, rel=0.02)


@pytest.mark.parametrize("channel", range(3))
def test_stars_of_a_bayer_frame_come_out_as_sharp_as_they_were(channel):
    stars = star_field()
    light = SKY + light_of(stars, 2.5)
    before = width_of(light, tuple(np.indices(SHAPE, float)[::-1]), stars)
    after = width_of(warp(record(light, "GRBG"), "GRBG", turned(8.0))[..., channel], turned(8.0), stars)
    assert after == pytest.approx(before, rel=0.03)


def test_noise_stays_noise():
    """Bilinear interpolation would pass 0.67 of it and fake a depth that is not there."""
    noise = np.random.default_rng(0).normal(SKY, NOISE, SHAPE).astype(np.float32)
    picture = warp(noise, "mono", turned(8.0))
    assert np.nanstd(picture) == pytest.approx(0.9 * NOISE, rel=0.05)
    assert np.nanmean(picture) == pytest.approx(SKY, abs=0.5)


@SENSORS
def test_a_constant_colour_stays_constant(sensor):
    colour = np.array([1200.0, 1000.0, 700.0])
    picture = warp(record(np.broadcast_to(colour, (*SHAPE, 3)), sensor), sensor, turned(33.0))
    inside = np.isfinite(picture)
    assert inside.mean() > 0.7
    expected = np.broadcast_to(colour[1:2] if sensor == "mono" else colour, picture.shape)
    np.testing.assert_allclose(picture[inside], expected[inside], rtol=1e-5)


@SENSORS
def test_whole_pixel_positions_copy_the_frame(sensor):
    """No interpolation where none is needed: what was recorded comes back to the last bit."""
    rng = np.random.default_rng(0)
    colours = rng.normal(SKY, NOISE, (*SHAPE, 3))
    pixels = record(colours, sensor)
    y, x = np.indices((100, 120), float)
    picture = warp(pixels, sensor, (x + 37, y + 25))
    window = np.s_[25:125, 37:157]
    if sensor in PATTERNS:
        recorded = np.isclose(picture, pixels[window][..., None], rtol=0, atol=1e-3).any(axis=-1)
        assert recorded.all()
    else:
        np.testing.assert_allclose(picture, np.atleast_3d(pixels[window]), rtol=0, atol=1e-3)


# --- where there is no data ------------------------------------------------------------------------------


@SENSORS
@pytest.mark.parametrize("angle", [0.0, 30.0])
def test_the_picture_ends_where_the_frame_ends(sensor, angle):
    """The outer edges of the frame's pixels: half a pixel beyond their middles."""
    at = turned(angle, (0.3 - 40, 0.7 - 40), (SHAPE[0] + 80, SHAPE[1] + 80))
    picture = warp(np.full((*SHAPE, 3) if sensor == "rgb" else SHAPE, 7, np.float32), sensor, at)
    ny, nx = SHAPE
    on = (at[0] >= -0.5) & (at[0] <= nx - 0.5) & (at[1] >= -0.5) & (at[1] <= ny - 0.5)
    assert 0 < on.sum() < on.size
    np.testing.assert_array_equal(np.isfinite(picture), np.broadcast_to(on[..., None], picture.shape))


@pytest.mark.parametrize("shift", [(1000.0, 0.0), (0.0, -64.6), (SHAPE[1] + 0.0, SHAPE[0] + 0.0)])
@pytest.mark.parametrize("sensor", ["GRBG", "mono"])
def test_a_block_beside_the_frame_has_no_data(sensor, shift):
    y, x = np.indices((64, 64), float)
    assert np.isnan(warp(np.ones(SHAPE, np.float32), sensor, (x + shift[0], y + shift[1]))).all()


def test_positions_that_do_not_exist_have_no_data():
    """A canvas pixel behind the tangent plane of the frame."""
    x, y = turned(8.0)
    x[:40] = np.nan
    picture = warp(np.ones(SHAPE, np.float32), "mono", (x, y))
    assert np.isnan(picture[:40]).all() and np.isfinite(picture[60:120, 60:120]).all()
    assert np.isnan(warp(np.ones(SHAPE, np.float32), "mono", (np.full_like(x, np.nan), y))).all()


@SENSORS
def test_gain_and_plane_are_applied_on_the_way(sensor):
    pixels = record(SKY + light_of(star_field(), 2.5), sensor)
    whole = Window.of_shape(SHAPE)
    chart = PixelMap(whole, 1, *turned(8.0), 0.0)
    plain = np.moveaxis(warp_on(pixels, sensor, chart, whole), -1, 0)
    gain, plane = np.array([1.1, 0.9, 1.3])[: len(plain)], np.array([[5.0, 0.1, -0.2]] * 3)[: len(plain)]
    made = np.empty_like(plain)
    bayer = sensor if sensor in PATTERNS else None
    warp_block(Crop.whole(pixels), bayer, chart, SHAPE, whole, EDGE, made, gain, plane)
    y, x = np.indices(SHAPE)
    expected = plain * gain[:, None, None] - (5 + 0.1 * x - 0.2 * y)
    np.testing.assert_allclose(made, expected, rtol=1e-6)


@SENSORS
def test_holes_stay_holes_and_spread_no_further_than_they_must(sensor):
    """The nearest pixel and its neighbours are gone, with two more where debayering looked at the hole."""
    pixels = record(np.full((*SHAPE, 3), SKY), sensor)
    pixels[60, 80] = pixels[90:100, 120:140] = np.nan
    at = turned(20.0)
    picture = warp(pixels, sensor, at)
    hole = np.isnan(pixels if pixels.ndim == 2 else pixels[..., 0])
    rows, columns = np.nonzero(hole)
    inside = (at[0] > 0) & (at[0] < SHAPE[1] - 1) & (at[1] > 0) & (at[1] < SHAPE[0] - 1)
    apart = np.full(at[0].shape, np.inf)
    for y, x in zip(rows, columns, strict=True):
        np.minimum(apart, np.maximum(np.abs(at[0] - x), np.abs(at[1] - y)), out=apart)
    lost = np.isnan(picture).any(axis=-1)
    assert lost[inside & (apart < 1.4)].all()
    assert not lost[inside & (apart > 1.6 + 2 * (sensor in PATTERNS))].any()
    np.testing.assert_allclose(picture[inside & ~lost], SKY, rtol=1e-5)


def test_a_hole_in_one_colour_is_a_hole():
    pixels = np.full((*SHAPE, 3), SKY, np.float32)
    pixels[90:100, 120:140, 1] = np.nan
    holes = np.isnan(warp(pixels, "rgb", turned(0.0)))[20:-20, 20:-20]
    assert holes.any() and (holes.any(axis=2) == holes.all(axis=2)).all()


@SENSORS
def test_a_frame_without_data_gives_none(sensor):
    pixels = np.full((*SHAPE, 3) if sensor == "rgb" else SHAPE, np.nan, np.float32)
    assert np.isnan(warp(pixels, sensor, turned(8.0))).all()


# --- the ringing guard -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fwhm", [2.0, 2.5, 3.5])
@pytest.mark.parametrize("sensor", ["mono", "rgb", "GRBG"])
def test_honest_stars_are_not_shaped_by_the_guard(sensor, fwhm):
    """Their peaks between pixels rise above all pixels around, and are right to."""
    stars, at = star_field(1e6), turned(8.0)
    pixels = record(SKY + light_of(stars, fwhm), sensor)
    guarded, free = (fluxes(warp(pixels, sensor, at, edge), at, stars, 9.0) for edge in (EDGE, UNGUARDED))
    np.testing.assert_allclose(guarded, free, rtol=0.01)
    np.testing.assert_allclose(guarded.mean(axis=0), free.mean(axis=0), rtol=0.002)


def test_noise_is_not_shaped_by_the_guard():
    noise = np.random.default_rng(0).normal(SKY, NOISE, SHAPE).astype(np.float32)
    guarded, free = (warp(noise, "mono", turned(8.0), edge) for edge in (EDGE, UNGUARDED))
    np.testing.assert_array_equal(guarded, free)


@pytest.mark.parametrize("sensor", ["mono", "rgb"])
def test_between_saturated_pixels_the_kernel_may_not_overshoot_without_limit(sensor):
    """Four bright pixels: half-way between them Lanczos alone makes 1.4 times their height."""
    pixels = record(np.full(SHAPE, SKY), sensor)
    pixels[80:82, 100:102] = 65000
    y, x = np.indices((21, 21), float)
    at = x / 4 + 98, y / 4 + 78
    guarded, free = (warp(pixels, sensor, at, edge) for edge in (EDGE, UNGUARDED))
    assert free.max() > SKY + 1.4 * 64000
    assert guarded.max() < SKY + 1.31 * 64000
    calm = warp(np.where(pixels > SKY, np.float32(SKY + EDGE), pixels), sensor, at)
    assert calm.max() > SKY + 1.4 * EDGE  # what departs by less than the edge is left alone


# --- blocks ----------------------------------------------------------------------------------------------


BLOCKS_OF = (120, 150)


def in_blocks(pixels: NDArray[np.float32], sensor: str, chart: PixelMap, step: int) -> NDArray[np.float32]:
    """The frame over its window of the canvas, made in blocks of this size."""
    whole = np.empty((*chart.window.shape, 1 if sensor == "mono" else 3), np.float32)
    for block in chart.window.blocks(step):
        whole[block.within(chart.window)] = warp_on(pixels, sensor, chart, block)
    return whole


def busy(sensor: str) -> NDArray[np.float32]:
    """Noise and stars, some of them saturated."""
    rng = np.random.default_rng(3)
    stars = [(*rng.uniform(0, 120, 2), 10 ** rng.uniform(3, 6.5)) for _ in range(25)]
    light = light_of(stars, 2.5, BLOCKS_OF)[..., None] + rng.normal(SKY, NOISE, (*BLOCKS_OF, 3))
    return record(np.minimum(light, 65535), sensor)


BLOCK_VIEWS = {
    "turned": View.of(angle=33.0, shape=BLOCKS_OF),
    "half a turn": View.of(angle=180.0, parity=-1, away=(0.001, 0.0), shape=BLOCKS_OF),
    "distorted": View.of(angle=69.0, shape=BLOCKS_OF, sip_px=4.0),
}


@SENSORS
@pytest.mark.parametrize("view", BLOCK_VIEWS.values(), ids=BLOCK_VIEWS.keys())
def test_the_result_does_not_depend_on_how_the_window_is_cut_into_blocks(sensor, view):
    pixels, chart = busy(sensor), view.map()
    whole = in_blocks(pixels, sensor, chart, 4096)
    assert np.isfinite(whole).mean() > 0.3
    for step in (19, 64):
        part = in_blocks(pixels, sensor, chart, step)
        if sensor in PATTERNS:
            np.testing.assert_allclose(part, whole, rtol=0, atol=0.02)
        else:
            np.testing.assert_array_equal(part, whole)


@SENSORS
@pytest.mark.parametrize("view", BLOCK_VIEWS.values(), ids=BLOCK_VIEWS.keys())
def test_the_source_box_holds_all_that_a_block_needs(sensor, view):
    pixels, chart = busy(sensor), view.map()
    bayer = sensor if sensor in PATTERNS else None
    for block in chart.window.blocks(37):
        box = source_box(chart, block, pixels.shape[:2], bayer=bool(bayer))
        outside = np.full_like(pixels, np.nan)
        outside[box.slices] = pixels[box.slices]
        made, wanted, cut = (np.empty((1 if sensor == "mono" else 3, *block.shape), np.float32) for _ in range(3))
        for crop, out in (
            (Crop.whole(pixels), wanted),
            (Crop.whole(outside), made),
            (Crop(pixels[box.slices].copy(), box), cut),
        ):
            warp_block(crop, bayer, chart, pixels.shape[:2], block, EDGE, out)
        np.testing.assert_array_equal(made, wanted)
        np.testing.assert_array_equal(cut, wanted)


@SENSORS
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("view", BLOCK_VIEWS.values(), ids=BLOCK_VIEWS.keys())
def test_bit_identical_however_the_window_is_cut_into_blocks(sensor, holes, view):
    pixels, chart = busy(sensor), view.map()
    if holes:
        pixels[np.random.default_rng(0).random(pixels.shape) < 1e-3] = np.nan
        pixels[30:60, 40:70] = np.nan
    whole = in_blocks(pixels, sensor, chart, 4096)
    for step in (19, 32, 64):
        np.testing.assert_array_equal(in_blocks(pixels, sensor, chart, step), whole)


@pytest.mark.parametrize("sensor", ["mono", "rgb"])
@pytest.mark.parametrize("kind", ["disc", "edge", "star"])
def test_beside_a_saturated_plateau_the_sky_is_not_undershot(sensor, kind):
    y, x = np.indices(SHAPE)
    light = {
        "disc": np.where(np.hypot(x - 100.3, y - 90.6) < 8, 64000.0, 0.0),
        "edge": np.where(x < 100, 64000.0, 0.0),
        "star": np.minimum(light_of([(100.3, 90.6, 4e6)], 2.8), 64000),
    }[kind]
    for angle in (0.0, 8.0, 45.0):
        picture = warp(record(SKY + light, sensor), sensor, turned(angle))
        assert np.nanmin(picture) > SKY - 0.05 * 64000 - 6 * NOISE
