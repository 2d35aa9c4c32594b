"""Stars and sky measured on rendered frames: places, fluxes, widths and noise against what was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sep
from astropy.io import fits
from numpy.typing import NDArray
from scipy.special import ndtr

from zemosaic.apertures import half_light_radii
from zemosaic.calibrate import NO_REPAIRS, Calibration
from zemosaic.frames import Frame, FrameError, read_frame
from zemosaic.measure import FrameMeasure, choose_aperture, measure_frame
from zemosaic.stars import (
    Aperture,
    Detection,
    Plane,
    Stars,
    block_medians,
    cells_of,
    colour_planes,
    detect,
    photometry,
    plane_noise,
)

pytestmark = pytest.mark.filterwarnings("error")

PATTERNS = ("RGGB", "GRBG", "GBRG", "BGGR")
SENSORS = pytest.mark.parametrize("sensor", [*PATTERNS, "mono", "rgb"])
SHAPE = (300, 380)
SKY, NOISE = 1000.0, 25.0  # ADU
WHITE = (1.0, 1.0, 1.0)
APERTURE = Aperture()

Star = tuple[float, float, float]  # x, y, flux


def light_of(stars: Sequence[Star], fwhm: float, shape: tuple[int, int] = SHAPE) -> NDArray[np.float64]:
    """Gaussian stars, integrated over every pixel, ``(ny, nx)``."""
    ny, nx = shape
    light = np.zeros(shape)
    for x, y, flux in stars:
        row, column = (np.diff(ndtr((np.arange(n + 1) - 0.5 - at) / (fwhm / 2.3548))) for n, at in ((ny, y), (nx, x)))
        light += flux * np.outer(row, column)
    return light


def record(
    light: NDArray, sensor: str, colour: Sequence[float] = WHITE, noise: float = NOISE, seed: int = 0
) -> NDArray[np.float32]:
    """Pixels of a sensor that sees this light in this colour on a flat sky."""
    rng = np.random.default_rng(seed)
    dyed = light[..., None] * np.asarray(colour)
    if sensor == "mono":
        seen = dyed[..., 1]
    elif sensor == "rgb":
        seen = dyed
    else:
        y, x = np.indices(light.shape)
        filters = np.array(["RGB".index(letter) for letter in sensor])[2 * (y % 2) + x % 2]
        seen = np.take_along_axis(dyed, filters[..., None], axis=-1)[..., 0]
    return (SKY + seen + noise * rng.standard_normal(seen.shape)).astype(np.float32)


def star_field(flux: tuple[float, float], step: int = 44, seed: int = 1) -> list[Star]:
    """Lonely stars at all phases of the pixel grid, their fluxes from … to."""
    rng = np.random.default_rng(seed)
    places = [(x, y) for y in range(28, SHAPE[0] - 28, step) for x in range(28, SHAPE[1] - 28, step)]
    fluxes = np.geomspace(*flux, len(places))
    return [(x + rng.uniform(0, 2), y + rng.uniform(0, 2), f) for (x, y), f in zip(places, fluxes, strict=True)]


@dataclass(frozen=True)
class Look:
    planes: list[Plane]
    found: Detection
    stars: Stars

    def nearest(self, star: Star) -> int:
        """Index of the measured star at this place."""
        distance = np.hypot(self.stars.x - star[0], self.stars.y - star[1])
        assert distance.min() < 2
        return int(distance.argmin())


def look_at(
    pixels: NDArray[np.float32], sensor: str, *, saturation: float = np.inf, aperture: Aperture = APERTURE
) -> Look:
    """The steps of `measure_frame` without a file."""
    ny, nx = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
    cells = np.stack([np.atleast_3d(pixels)[y:ny:2, x:nx:2] for y in (0, 1) for x in (0, 1)])
    planes = colour_planes(pixels, sensor if sensor in PATTERNS else None)
    found = detect(cells.mean(axis=(0, -1), dtype=np.float32))
    noise = np.array([plane_noise(plane.data) for plane in planes])
    stars = photometry(
        planes, found, saturation=saturation, peak=cells.max(axis=(0, -1)), noise=noise, aperture=aperture
    )
    return Look(planes, found, stars)


# --- planes of one colour --------------------------------------------------------------------------------


@SENSORS
def test_every_plane_knows_where_its_light_was_sampled(sensor):
    """The pixels hold their own x or y, so a cell's value is the place where it was sampled."""
    y, x = (a.astype(np.float32) for a in np.indices((12, 18)))
    for ramp, axis in ((x, 1), (y, 0)):
        pixels = np.repeat(ramp[..., None], 3, axis=-1) if sensor == "rgb" else ramp
        for plane in colour_planes(pixels, sensor if sensor in PATTERNS else None):
            start = plane.x0 if axis else plane.y0
            np.testing.assert_array_equal(plane.data, start + 2 * np.indices((6, 9))[axis])


@SENSORS
def test_a_star_is_at_its_place_in_every_plane(sensor):
    place = (41.3, 36.8)
    pixels = record(light_of([(*place, 1e5)], 3.5, (80, 90)), sensor, noise=0) - np.float32(SKY)
    for plane in colour_planes(pixels, sensor if sensor in PATTERNS else None):
        cy, cx = (np.indices(plane.data.shape) * plane.data).sum(axis=(1, 2)) / plane.data.sum()
        assert (2 * cx + plane.x0, 2 * cy + plane.y0) == pytest.approx(place, abs=0.01)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_planes_come_in_the_order_red_green_blue(pattern):
    y, x = np.indices((8, 10))
    pixels = np.array([10.0, 20.0, 30.0], np.float32)[
        np.array(["RGB".index(letter) for letter in pattern])[2 * (y % 2) + x % 2]
    ]
    planes = colour_planes(pixels, pattern)
    assert [float(np.unique(plane.data)[0]) for plane in planes] == [10, 20, 30]
    assert [plane.pixels_per_cell for plane in planes] == [1, 2, 1]


@SENSORS
def test_the_noise_of_a_cell_is_that_of_the_pixels_in_it(sensor):
    pixels = record(np.zeros(SHAPE), sensor)
    for plane in colour_planes(pixels, sensor if sensor in PATTERNS else None):
        assert plane.data.std() == pytest.approx(NOISE / np.sqrt(plane.pixels_per_cell), rel=0.03)


@pytest.mark.parametrize("shape", [(1, 8), (8, 1, 3), (5, 7), (1029, 9, 3)])
def test_cells_are_means_of_four_pixels_whatever_the_size(shape):
    """Also of a picture that is averaged in strips; and a cell that misses a pixel has no value."""
    pixels = np.random.default_rng(5).normal(100, 10, shape).astype(np.float32)
    pixels[0, 0] = np.nan
    cells = cells_of(pixels, None)
    whole = np.atleast_3d(pixels[: shape[0] // 2 * 2, : shape[1] // 2 * 2])
    fours = whole.reshape(shape[0] // 2, 2, shape[1] // 2, 2, whole.shape[2])
    wanted = fours.astype(np.float64).mean(axis=(1, 3))
    for plane, colour in zip(cells.planes, np.moveaxis(wanted, 2, 0), strict=True):
        np.testing.assert_allclose(plane.data, colour, rtol=1e-6)
    np.testing.assert_allclose(cells.luminance, wanted.mean(axis=2), rtol=1e-6)
    np.testing.assert_array_equal(cells.peak, fours.max(axis=(1, 3, 4)))


def test_an_odd_last_row_and_column_are_left_out():
    assert [plane.data.shape for plane in colour_planes(np.zeros((7, 11), np.float32), "GRBG")] == [(3, 5)] * 3


# --- detection -------------------------------------------------------------------------------------------


@SENSORS
@pytest.mark.parametrize("fwhm", [2.5, 4.0])
def test_places_are_right_to_a_tenth_of_a_pixel(sensor, fwhm):
    stars = star_field((2e5, 4e5))
    look = look_at(record(light_of(stars, fwhm), sensor), sensor)
    assert len(look.stars) == len(stars)
    at = [look.nearest(star) for star in stars]
    errors = np.c_[look.stars.x[at], look.stars.y[at]] - np.array(stars)[:, :2]
    assert np.hypot(*errors.T).max() < 0.1
    assert np.abs(errors.mean(axis=0)).max() < 0.01


@pytest.mark.parametrize(
    ("pattern", "side"), [("RGGB", (1, 1)), ("GRBG", (-1, 1)), ("GBRG", (1, -1)), ("BGGR", (-1, -1))]
)
def test_a_coloured_star_is_found_off_by_the_place_of_its_filter(pattern, side):
    """A cell counts for its middle, but red light came in half a pixel beside it: a quarter pixel at the very most."""
    colour = np.array((1.0, 0.6, 0.2))
    stars = star_field((2e5, 4e5))
    look = look_at(record(light_of(stars, 2.5), pattern, colour), pattern)
    at = [look.nearest(star) for star in stars]
    errors = np.c_[look.stars.x[at], look.stars.y[at]] - np.array(stars)[:, :2]
    expected = 0.5 * (colour[0] - colour[2]) / (colour @ (1, 2, 1))
    np.testing.assert_allclose(errors.mean(axis=0), expected * np.array(side), atol=0.02)


def test_the_brightest_come_first_and_the_rest_is_left_out():
    stars = star_field((2e4, 4e5))
    luminance = record(light_of(stars, 5.0), "mono")
    every, few = detect(luminance), detect(luminance, limit=10)
    assert len(every.x) == len(stars) and (np.diff(every.flux) <= 0).all()
    np.testing.assert_array_equal(few.x, every.x[:10])
    brightest = sorted(stars, key=lambda star: -star[2])[:10]
    np.testing.assert_allclose(sorted(few.x), sorted(star[0] for star in brightest), atol=0.1)


def test_a_higher_threshold_finds_fewer():
    luminance = record(light_of(star_field((1e3, 1e4)), 4.0), "mono")
    found = [len(detect(luminance, sigma=sigma).x) for sigma in (3, 5, 10, 20)]
    assert found == sorted(found, reverse=True) and found[0] > found[-1]


def test_a_picture_searched_in_parts_shows_every_star_once(monkeypatch):
    stars = star_field((3e3, 4e5))
    luminance = record(light_of(stars, 5.0), "mono")
    whole = detect(luminance)
    assert min(luminance.shape) > 100  # several parts each way
    for part in (50, 97):  # some stars lie on their borders
        monkeypatch.setattr("zemosaic.stars._PART", part)
        parted = detect(luminance)
        for name in vars(whole):
            np.testing.assert_allclose(getattr(parted, name), getattr(whole, name), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fwhm", [2.0, 3.0, 4.0, 6.0])
def test_half_the_light_of_a_gaussian_is_within_half_its_width(fwhm):
    stars = star_field((1e5, 1e5))
    image = light_of(stars, fwhm).astype(np.float32)
    x, y = np.array(stars)[:, :2].T
    radii = half_light_radii(image, x, y, 3 * fwhm)
    width = np.sqrt(fwhm**2 + 2 * 2.3548**2 / 12)  # pixels widen it as they take the light, and as they are counted
    np.testing.assert_allclose(2 * radii, width, rtol=0.06)
    assert np.mean(2 * radii) == pytest.approx(width, rel=0.01)


def test_half_light_needs_light_and_a_whole_circle():
    image = np.zeros((40, 60), np.float32)
    middle = np.array([[30.0, 20.0], [7.9, 20.0], [8.0, 8.0], [51.1, 20.0], [51.0, 31.0], [30.0, 31.1]])
    found = half_light_radii(image, *middle.T, 8.0)
    np.testing.assert_array_equal(found, [0, np.nan, 0, np.nan, 0, np.nan])


def test_the_width_of_a_star_is_its_fwhm_and_grows_with_it():
    widths = [float(np.median(detect(record(light_of(star_field((1e5, 2e5)), w), "mono")).fwhm)) for w in range(2, 9)]
    assert (np.diff(widths) > 0.7).all()
    np.testing.assert_allclose(widths[2:], range(4, 9), rtol=0.06)


def test_knots_of_a_nebula_do_not_pass_for_the_width_of_the_stars():
    stars, knots = (
        light_of(star_field((1e5, 2e5), step=70), 4.0),
        light_of(star_field((1e5, 2e5), step=40, seed=3), 14.0),
    )
    alone, together = detect(record(stars, "mono")), detect(record(stars + knots, "mono"))
    assert np.median(together.fwhm) > 1.5 * alone.typical_fwhm()
    assert together.typical_fwhm() == pytest.approx(alone.typical_fwhm(), rel=0.1)


def test_round_stars_are_round_and_trailed_ones_know_their_direction():
    stars = star_field((2e5, 4e5))
    assert np.median(detect(record(light_of(stars, 4.0), "mono")).ellipticity) < 0.04
    for angle in (0.0, 0.6, -1.1):
        steps = np.linspace(-5, 5, 21)
        trailed = [(x + s * np.cos(angle), y + s * np.sin(angle), f / 21) for x, y, f in stars for s in steps]
        found = detect(record(light_of(trailed, 4.0), "mono"))
        assert np.median(found.ellipticity) > 0.3
        np.testing.assert_allclose(np.sin(found.angle - angle), 0, atol=0.1)


def test_a_single_bright_pixel_is_no_star():
    luminance = record(light_of([(100, 100, 1e5)], 4.0), "mono")
    luminance[50, 60] += 20000
    luminance[200, 60:62] += 20000
    found = detect(luminance)
    assert (found.x, found.y) == (pytest.approx([100], abs=0.1), pytest.approx([100], abs=0.1))


def test_a_star_cut_by_the_edge_is_left_out():
    found = detect(record(light_of([(0.5, 100, 1e5), (100, SHAPE[0] - 1, 1e5), (100, 100, 1e5)], 4.0), "mono"))
    assert found.x == pytest.approx([100], abs=0.1)


def test_stars_beside_missing_data_are_found():
    luminance = record(light_of(star_field((1e5, 2e5)), 4.0), "mono")
    whole = detect(luminance)
    luminance[:100] = np.nan
    luminance[150, ::20] = np.nan
    part = detect(luminance)
    assert len(part.x) > 0 and part.y.min() > 100
    assert len(part.x) == pytest.approx((whole.y > 100).sum(), abs=2)
    assert np.isnan(luminance[0]).all()  # the picture that came in is as it was


@pytest.mark.parametrize("shape", [(200, 300), (8, 8), (4, 4), (1, 50), (0, 0)])
@pytest.mark.parametrize("value", [0.0, 7.0, 65535.0, np.nan])
def test_a_frame_without_anything_in_it_has_no_stars(shape, value):
    found = detect(np.full(shape, value, np.float32))
    assert [len(column) for column in vars(found).values()] == [0] * len(vars(found))


def test_a_noisy_empty_sky_has_hardly_any_stars():
    assert len(detect(record(np.zeros(SHAPE), "mono")).x) <= 1


def test_too_many_sources_are_cut_down_to_the_bright_ones():
    """sep gives up when its buffer is full; the threshold is raised until the bright ones fit."""
    luminance = record(light_of([(60, 60, 4e6), (200, 150, 4e6)], 4.0), "mono")
    before = sep.get_extract_pixstack()
    sep.set_extract_pixstack(300)
    try:
        found = detect(luminance, sigma=0.5)
    finally:
        sep.set_extract_pixstack(before)
    assert sorted(found.x) == pytest.approx([60, 200], abs=0.1)


# --- photometry ------------------------------------------------------------------------------------------


@SENSORS
@pytest.mark.parametrize(("fwhm", "scatter"), [(2.5, 0.007), (3.5, 0.001)])
def test_without_noise_the_flux_is_all_of_the_light_in_every_colour(sensor, fwhm, scatter):
    """Single red and blue fluxes of sharp stars scatter: their photosites are 2 px apart."""
    colour = np.array([1.0, 0.8, 0.6])
    stars = star_field((4e4, 4e5))
    look = look_at(record(light_of(stars, fwhm), sensor, colour, noise=0.5), sensor)
    at = [look.nearest(star) for star in stars]
    truth = np.array(stars)[:, 2:] * (colour[1:2] if sensor == "mono" else colour)
    ratio = look.stars.flux[at] / truth
    np.testing.assert_allclose(ratio.mean(axis=0), 1, atol=0.003)
    assert ratio.std(axis=0).max() < scatter
    assert look.stars.clean.all()


@SENSORS
def test_fluxes_scatter_by_their_stated_error(sensor):
    """The error is that of the aperture; that of the sky around it makes the scatter up to half as much larger."""
    scores = []
    for seed in range(6):
        stars = star_field((1.5e4, 3e4), seed=seed)
        look = look_at(record(light_of(stars, 3.0), sensor, seed=seed), sensor)
        at = [look.nearest(star) for star in stars]
        scores.append((look.stars.flux[at] - np.array(stars)[:, 2:]) / look.stars.error[at])
    score = np.concatenate(scores)
    assert np.abs(score.mean(axis=0)).max() < 0.4
    assert (score.std(axis=0) > 0.95).all() and (score.std(axis=0) < 1.6).all()


def test_the_local_sky_is_taken_off():
    light = light_of([(100, 100, 1e5), (250, 200, 1e5)], 3.0)
    slope = np.linspace(0, 1500, SHAPE[1])[None, :] + np.linspace(0, 1000, SHAPE[0])[:, None]
    flat, tilted = (look_at(record(light + sky, "GRBG", noise=1), "GRBG").stars.flux for sky in (0, slope))
    np.testing.assert_allclose(tilted, flat, rtol=0.005)


@SENSORS
def test_saturated_stars_are_not_clean(sensor):
    """One photosite near the limit is enough, whatever the mean of its cell."""
    stars = [(80.0, 80.0, 1e5), (200.0, 80.0, 3.2e5), (80.0, 200.0, 9e5), (200.0, 200.0, 2e5)]
    pixels = np.minimum(record(light_of(stars, 2.5), sensor), 40000)
    look = look_at(pixels, sensor, saturation=40000)
    assert [bool(look.stars.clean[look.nearest(star)]) for star in stars] == [True, False, False, True]


def crowded(stars: Sequence[Star], distance: float, share: float) -> Look:
    """The field with a companion beside each of these stars."""
    company = [(x + distance, y, flux * share) for x, y, flux in stars]
    return look_at(record(light_of([*star_field((4e5, 8e5)), *company], 2.5), "GRBG", noise=2), "GRBG")


@pytest.mark.parametrize(
    ("distance", "share", "clean"), [(12, 0.5, False), (12, 0.05, True), (12, 0.005, True), (22, 0.5, True)]
)
def test_stars_with_a_neighbour_that_matters_are_not_clean(distance, share, clean):
    stars = star_field((4e5, 8e5))
    look = crowded(stars[:6], distance, share)
    assert [bool(look.stars.clean[look.nearest(star)]) for star in stars] == [clean] * 6 + [True] * 42


def test_a_small_neighbour_makes_a_flux_less_certain():
    stars = star_field((4e5, 8e5))
    look = crowded(stars[:6], 12, 0.05)
    relative = look.stars.error / look.stars.flux
    at = [look.nearest(star) for star in stars]
    np.testing.assert_allclose(relative[at[:6]], 0.3 * 0.05, rtol=0.3)
    assert (relative[at[6:]] < 0.003).all()


def test_where_hardly_a_star_stands_alone_faint_company_is_tolerated_but_no_equal():
    stars = star_field((4e5, 8e5))
    faint, equal = crowded(stars, 12, 0.04), crowded(stars, 12, 1.0)
    assert [bool(faint.stars.clean[faint.nearest(star)]) for star in stars] == [True] * 48
    assert not equal.stars.clean.any()


def test_a_piece_of_a_trail_is_not_clean():
    stars, steps = star_field((2e5, 4e5))[1:], np.linspace(-8, 8, 33)
    trail = [(28 + s, 28 + s / 3, 1e4) for s in steps]
    look = look_at(record(light_of([*stars, *trail], 2.5), "GRBG"), "GRBG")
    assert not look.stars.clean[look.nearest((28, 28, 0))]
    assert all(look.stars.clean[look.nearest(star)] for star in stars)


@SENSORS
def test_stars_whose_ring_leaves_the_frame_are_not_measured(sensor):
    ny, nx = SHAPE
    inside = (60.0, 60.0, 1e5)
    outside = [(21.0, 150.0, 1e5), (nx - 21.0, 150.0, 1e5), (150.0, 21.0, 1e5), (150.0, ny - 21.0, 1e5)]
    pixels = record(light_of([inside, *outside], 3.0), sensor)
    look = look_at(pixels, sensor, aperture=Aperture(8, 14, 30))
    assert len(look.found.x) == 5
    assert look.stars.x == pytest.approx([60], abs=0.1)
    assert look.stars.flux.shape == look.stars.error.shape == (1, len(look.planes))


def test_a_hole_in_the_aperture_makes_a_star_unclean_and_its_flux_unknown():
    pixels = record(light_of([(100, 100, 1e5), (250, 200, 1e5)], 3.0), "GRBG")
    pixels[100:102, 104:106] = np.nan
    look = look_at(pixels, "GRBG")
    holed, whole = look.nearest((100, 100, 0)), look.nearest((250, 200, 0))
    assert np.isnan(look.stars.flux[holed]).any() and not look.stars.clean[holed]
    assert np.isfinite(look.stars.flux[whole]).all() and look.stars.clean[whole]


def test_no_stars_make_an_empty_table():
    look = look_at(np.full(SHAPE, 7, np.float32), "GRBG")
    assert len(look.stars) == 0 and look.stars.flux.shape == (0, 3)


# --- sky and noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", [2, 5, 16])
def test_block_medians_are_medians_of_what_is_there(cells):
    rng = np.random.default_rng(0)
    data = rng.normal(1000, 25, (50, 70)).astype(np.float32)
    data[rng.random(data.shape) < 0.3] = np.nan
    data[:20, :30] = np.nan
    blocks = block_medians([Plane(data, 0, 0, 1), Plane(2 * data, 0, 0, 1)], cells)
    assert blocks.shape == (50 // cells, 70 // cells, 2)
    for i, j in np.ndindex(blocks.shape[:2]):
        box = data[i * cells : (i + 1) * cells, j * cells : (j + 1) * cells]
        enough = 2 * np.isfinite(box).sum() >= box.size
        expected = np.median(box[np.isfinite(box)]) if enough else np.nan
        np.testing.assert_allclose(blocks[i, j], [expected, 2 * expected], rtol=1e-6)


@pytest.mark.parametrize("shape", [(300, 380), (40, 2000), (2000, 40)])
def test_plane_noise_is_that_of_a_pixel(shape):
    plane = np.random.default_rng(1).normal(1000, 25, shape).astype(np.float32)
    assert plane_noise(plane) == pytest.approx(25, rel=0.02)


def test_plane_noise_is_blind_to_gradients_stars_and_holes():
    rng = np.random.default_rng(1)
    y, x = np.indices(SHAPE)
    plane = rng.normal(1000, 25, SHAPE) + 2 * x + 8 * y + 400 * np.sin(x / 200) * np.cos(y / 50)
    plane += light_of(star_field((1e4, 1e6), step=80), 3.0)
    plane[rng.random(SHAPE) < 0.2] = np.nan
    assert np.nanstd(plane) > 20 * 25
    assert plane_noise(plane.astype(np.float32)) == pytest.approx(25, rel=0.08)


def test_plane_noise_of_nothing_is_unknown():
    assert np.isnan(plane_noise(np.full((20, 20), np.nan, np.float32)))
    assert np.isnan(plane_noise(np.zeros((20, 2), np.float32)))


# --- a whole frame ---------------------------------------------------------------------------------------


def saved(path: Path, pixels: NDArray, sensor: str = "GRBG") -> Frame:
    """A sub on disk, as whole numbers up to 65535."""
    stored = np.rint(pixels).astype(np.uint16)
    header = fits.Header({"BAYERPAT": sensor} if sensor in PATTERNS else {})
    fits.PrimaryHDU(np.moveaxis(stored, -1, 0) if stored.ndim == 3 else stored, header).writeto(path)
    return read_frame(path)


def measure(frame: Frame) -> FrameMeasure:
    return measure_frame(frame, Calibration(), APERTURE)


@SENSORS
def test_a_frame_is_measured_as_it_was_drawn(tmp_path, sensor):
    stars = star_field((5e4, 3e5), step=80)
    pixels = record(light_of(stars, 3.5), sensor, (1.0, 0.9, 0.8))
    found = measure(saved(tmp_path / "sub.fit", pixels, sensor))
    channels = 1 if sensor == "mono" else 3
    assert found.detected == len(found.stars) == len(stars)
    np.testing.assert_allclose(found.sky, [SKY] * channels, atol=1)
    np.testing.assert_allclose(found.noise, [NOISE] * channels, rtol=0.05)
    assert found.fwhm == pytest.approx(3.5, rel=0.2)  # cells of two pixels widen a star
    assert found.ellipticity < 0.06 and found.trailing < 0.02
    assert found.repairs.index.size == 0
    assert found.blocks.shape == (SHAPE[0] // found.block_px, SHAPE[1] // found.block_px, channels)


def test_the_stated_error_of_a_sky_block_is_its_scatter(tmp_path):
    found = measure(saved(tmp_path / "sub.fit", record(np.zeros((600, 800)), "GRBG")))
    np.testing.assert_allclose(found.block_noise, found.blocks.std(axis=(0, 1)), rtol=0.1)


def test_hot_pixels_are_mended_before_the_stars_are_looked_for(tmp_path):
    stars = star_field((5e4, 3e5))
    pixels = record(light_of(stars, 3.0), "GRBG")
    pixels[12::40, 14::40] += 30000
    frame = saved(tmp_path / "sub.fit", pixels)
    found = measure(frame)
    assert found.repairs.index.size == len(pixels[12::40, 0]) * len(pixels[0, 14::40])
    assert found.detected == len(stars)
    assert measure_frame(frame, Calibration(), APERTURE, hot_sigma=None).repairs is NO_REPAIRS


def test_trailing_is_what_the_stars_have_in_common(tmp_path):
    """Stars drawn out in one direction are trailed; drawn out each in its own, they are not."""
    rng = np.random.default_rng(2)
    stars, steps = star_field((2e5, 4e5)), np.linspace(-4, 4, 17)
    values = []
    for spread in (0.0, np.pi):
        angles = 0.7 + spread * rng.uniform(-0.5, 0.5, len(stars))
        drawn = [
            (x + s * np.cos(a), y + s * np.sin(a), f / 17)
            for (x, y, f), a in zip(stars, angles, strict=True)
            for s in steps
        ]
        found = measure(saved(tmp_path / f"{spread:.0f}.fit", record(light_of(drawn, 3.0), "GRBG")))
        assert found.ellipticity > 0.3
        values.append(found.trailing)
    assert values[0] > 0.4 > 0.2 > values[1]


def test_masters_are_applied_before_measuring(tmp_path):
    frame = saved(tmp_path / "sub.fit", record(np.zeros(SHAPE), "GRBG"))
    calibration = Calibration(dark=np.full(SHAPE, 400, np.float32), flat=np.full(SHAPE, 2, np.float32))
    found = measure_frame(frame, calibration, APERTURE)
    np.testing.assert_allclose(found.sky, (SKY - 400) / 2, atol=1)
    np.testing.assert_allclose(found.noise, NOISE / 2, rtol=0.05)


def test_a_frame_without_stars_says_so(tmp_path):
    found = measure(saved(tmp_path / "sub.fit", np.zeros(SHAPE)))
    assert found.detected == len(found.stars) == 0
    assert np.isnan([found.fwhm, found.ellipticity, found.trailing]).all()
    assert (found.noise == 0).all() and (found.sky == 0).all()


def test_one_saturated_photosite_is_enough_whatever_the_mean_of_its_cell(tmp_path):
    share = light_of([(20, 20, 1.0)], 2.5, (40, 40))[20, 20]
    stars = [(80.0, 80.0, 0.8 * 64000 / share), (200.0, 80.0, 0.95 * 64000 / share)]
    found = measure(saved(tmp_path / "sub.fit", record(light_of(stars, 2.5), "GRBG")))
    assert dict(zip(np.rint(found.stars.x), found.stars.clean, strict=True)) == {80: True, 200: False}


# --- the aperture of a run -------------------------------------------------------------------------------


@pytest.mark.parametrize("fwhm", [3.0, 5.0])
def test_the_aperture_follows_the_seeing_and_holds_the_light(tmp_path, fwhm):
    stars = star_field((2e5, 4e5))
    frames = [saved(tmp_path / f"{i}.fit", record(light_of(stars, fwhm), "GRBG", seed=i)) for i in range(3)]
    aperture = choose_aperture(frames, Calibration())
    assert aperture.radius == pytest.approx(2.3 * fwhm, rel=0.2)
    assert aperture.radius < aperture.inner < aperture.outer
    flux = measure_frame(frames[0], Calibration(), aperture).stars.flux
    assert np.median(flux[:, 1]) == pytest.approx(np.median([star[2] for star in stars]), rel=0.01)


def test_frames_that_cannot_be_read_or_hold_no_star_do_not_choose_the_aperture(tmp_path):
    empty = saved(tmp_path / "empty.fit", np.zeros(SHAPE))
    gone = saved(tmp_path / "gone.fit", np.zeros(SHAPE))
    gone.path.unlink()
    with pytest.raises(FrameError):
        measure(gone)
    assert choose_aperture([empty, gone], Calibration()) == Aperture(7.0, pytest.approx(9.8), 14.0)
    assert choose_aperture([], Calibration()).radius == Aperture().radius


def test_a_frame_too_small_for_a_sky_block_has_no_blocks(tmp_path):
    found = measure(saved(tmp_path / "sub.fit", np.zeros((6, 10))))
    assert found.blocks.shape == (0, 1, 3) and np.isnan(found.sky).all()
