"""Masters, hot pixels and debayering on frames that are drawn here, so that the truth is known to the photon."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from numpy.typing import NDArray
from scipy.special import ndtr

from zemosaic.calibrate import (
    DEBAYER_MARGIN,
    NO_REPAIRS,
    Calibration,
    debayer,
    find_hot_pixels,
    load_calibration,
    normalise_flat,
    prepare,
)
from zemosaic.frames import FrameError, read_frame

pytestmark = pytest.mark.filterwarnings("error")  # NaN must pass through without a word

PATTERNS = ("RGGB", "GRBG", "GBRG", "BGGR")
SENSORS = pytest.mark.parametrize("pattern", [*PATTERNS, None])  # None is a mono sensor
SHAPE = (200, 260)
SKY, NOISE = 1000.0, 25.0  # ADU
WHITE = (1.0, 1.0, 1.0)

Star = tuple[float, float, float]  # x, y, flux


def light_of(stars: Sequence[Star], fwhm: float, shape: tuple[int, int] = SHAPE) -> NDArray[np.float64]:
    """Gaussian stars, integrated over every pixel, ``(ny, nx)``."""
    ny, nx = shape
    light = np.zeros(shape)
    for x, y, flux in stars:
        row, column = (np.diff(ndtr((np.arange(n + 1) - 0.5 - at) / (fwhm / 2.3548))) for n, at in ((ny, y), (nx, x)))
        light += flux * np.outer(row, column)
    return light


def behind_filters(light: NDArray, pattern: str | None, colour: Sequence[float] = WHITE) -> NDArray[np.float64]:
    """What the photosites of a sensor see of white light ``(ny, nx)`` that is dyed in `colour`."""
    return light if pattern is None else light * np.asarray(colour)[colour_of(pattern, light.shape)]


def colour_of(pattern: str, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """0, 1 or 2 for every photosite."""
    y, x = np.indices(shape[:2])
    return np.array(["RGB".index(letter) for letter in pattern])[2 * (y % 2) + x % 2]


def noisy(light: NDArray, seed: int = 0) -> NDArray[np.float32]:
    """The light on a noisy sky."""
    return (SKY + light + NOISE * np.random.default_rng(seed).standard_normal(light.shape)).astype(np.float32)


def star_field(fwhm: float, peak: tuple[float, float]) -> list[Star]:
    """Lonely stars at all phases of the pixel grid; `peak` from … to in units of the noise."""
    rng = np.random.default_rng(0)
    share = light_of([(10, 10, 1.0)], fwhm, (21, 21))[10, 10]
    places = [(x, y) for y in range(20, SHAPE[0] - 20, 30) for x in range(20, SHAPE[1] - 20, 30)]
    heights = np.geomspace(*peak, len(places))
    return [
        (x + rng.uniform(0, 2), y + rng.uniform(0, 2), h * NOISE / share)
        for (x, y), h in zip(places, heights, strict=True)
    ]


def sown(step: int = 13) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of pixels far apart, on all photosites of the 2x2 cell alike."""
    y, x = (a.ravel() for a in np.mgrid[9 : SHAPE[0] - 9 : step, 9 : SHAPE[1] - 9 : step])
    return y, x


def found_at(plane: NDArray, pattern: str | None) -> set[tuple[int, int]]:
    index = find_hot_pixels(plane, bayer=pattern is not None).index
    return set(zip(*(a.tolist() for a in np.unravel_index(index, plane.shape)), strict=True))


def expect_defects(plane: NDArray, pattern: str | None, y: NDArray, x: NDArray) -> None:
    """All of these are found, and nothing else but at most one peak of the noise among 52,000 pixels."""
    found, expected = found_at(plane, pattern), set(zip(y.tolist(), x.tolist(), strict=True))
    assert expected <= found
    assert len(found - expected) <= 1


def mended(plane: NDArray, pattern: str | None) -> NDArray[np.float32]:
    copy = plane.copy()
    find_hot_pixels(plane, bayer=pattern is not None).apply(copy)
    return copy


def relative_change(before: NDArray, after: NDArray, truth: NDArray, star: Star) -> float:
    """What the mending took from a star, as a share of its light."""
    box = np.s_[round(star[1]) - 8 : round(star[1]) + 9, round(star[0]) - 8 : round(star[0]) + 9]
    return float((before[box] - after[box]).sum() / truth[box].sum())


# --- hot pixels: all of them -----------------------------------------------------------------------------


@SENSORS
@pytest.mark.parametrize("excess", [25, 400, 2000, -35])  # in units of the noise; negative = dead
def test_every_hot_or_dead_pixel_is_found_and_nothing_else(pattern, excess):
    plane = noisy(np.zeros(SHAPE))
    y, x = sown()
    plane[y, x] += np.float32(excess * NOISE)
    expect_defects(plane, pattern, y, x)
    assert np.abs(mended(plane, pattern) - SKY).max() < 6 * NOISE


@SENSORS
def test_noise_alone_holds_no_hot_pixel(pattern):
    assert len(find_hot_pixels(noisy(np.zeros(SHAPE)), bayer=bool(pattern)).index) == 0


@SENSORS
@pytest.mark.parametrize("neighbour", [(0, 1), (1, 0), (1, 1), (1, -1), (0, 2)])
def test_two_hot_pixels_side_by_side_do_not_hide_each_other(pattern, neighbour):
    plane = noisy(np.zeros(SHAPE))
    y, x = sown()
    beside = y + neighbour[0], x + neighbour[1]
    plane[y, x] += 60 * NOISE
    plane[beside] += 80 * NOISE
    expect_defects(plane, pattern, np.append(y, beside[0]), np.append(x, beside[1]))


@SENSORS
def test_the_colours_of_the_sky_are_kept_apart(pattern):
    """Between red and green photosites lies a step of 12 sigma that is no defect."""
    plane = noisy(behind_filters(np.full(SHAPE, 600.0), pattern, (0.5, 1.0, 0.2)))
    y, x = sown()
    clean = plane.copy()
    plane[y, x] += 30 * NOISE
    expect_defects(plane, pattern, y, x)
    np.testing.assert_allclose(mended(plane, pattern), clean, atol=6 * NOISE)


@pytest.mark.parametrize("shape", [(61, 75), (2, 2), (1, 9), (9, 1), (3, 3), (0, 0)])
@pytest.mark.parametrize("bayer", [True, False])
def test_any_shape_will_do(shape, bayer):
    assert len(find_hot_pixels(np.full(shape, 7, np.float32), bayer=bayer).index) == 0


@SENSORS
def test_hot_pixels_in_the_corners_have_few_neighbours_but_are_found(pattern):
    plane = noisy(np.zeros((61, 75)))
    corners = {(0, 0), (0, 74), (60, 0), (60, 74)}
    for at in corners:
        plane[at] = 30000
    assert found_at(plane, pattern) == corners


# --- hot pixels: never a star ----------------------------------------------------------------------------


@SENSORS
@pytest.mark.parametrize("fwhm", [1.6, 2.0, 2.8, 4.0])
@pytest.mark.parametrize("colour", [WHITE, (1.0, 0.5, 0.25), (0.25, 0.5, 1.0)], ids=["white", "very red", "very blue"])
def test_stars_are_never_touched(pattern, fwhm, colour):
    """The peak of a star on a red photosite towers over its own colour two pixels away; its green neighbours tell."""
    plane = noisy(behind_filters(light_of(star_field(fwhm, (60, 2000)), fwhm), pattern, colour))
    assert found_at(plane, pattern) == set()


@SENSORS
@pytest.mark.parametrize("fwhm", [1.6, 2.8])
def test_faint_stars_keep_their_light_on_average(pattern, fwhm):
    stars = star_field(fwhm, (6, 30))
    truth = behind_filters(light_of(stars, fwhm), pattern)
    plane = noisy(truth)
    assert (plane - mended(plane, pattern)).sum() / truth.sum() < 0.003


@SENSORS
@pytest.mark.parametrize("fwhm", [1.6, 2.0, 2.8])
def test_close_pairs_lose_no_light(pattern, fwhm):
    rng = np.random.default_rng(5)
    pairs: list[Star] = []
    for x, y, flux in star_field(fwhm, (100, 400)):
        angle, apart = rng.uniform(0, 2 * np.pi), fwhm * rng.uniform(0.8, 2.5)
        pairs += [(x, y, flux), (x + apart * np.cos(angle), y + apart * np.sin(angle), flux * rng.uniform(0.2, 1))]
    truth = behind_filters(light_of(pairs, fwhm), pattern)
    plane = noisy(truth)
    after = mended(plane, pattern)
    assert max(relative_change(plane, after, truth, pair) for pair in pairs[::2]) < 0.003


@SENSORS
@pytest.mark.parametrize("fwhm", [1.6, 2.8, 4.0])
@pytest.mark.parametrize("heat", [0.1, 1.0, 5.0])
def test_a_hot_pixel_two_fwhm_from_a_star_goes_and_the_star_stays(pattern, fwhm, heat):
    stars = star_field(fwhm, (400, 400))
    truth = behind_filters(light_of(stars, fwhm), pattern)
    clean = noisy(truth)
    angles = np.random.default_rng(1).uniform(0, 2 * np.pi, len(stars))
    x, y = (
        np.rint([star[k] + 2.1 * fwhm * f(a) for star, a in zip(stars, angles, strict=True)]).astype(int)
        for k, f in ((0, np.cos), (1, np.sin))
    )
    plane = clean.copy()
    plane[y, x] += np.float32(heat * 400 * NOISE)
    expect_defects(plane, pattern, y, x)
    after = mended(plane, pattern)
    assert max(abs(relative_change(clean, after, truth, star)) for star in stars) < 0.003


@SENSORS
def test_a_grain_of_dust_is_no_dead_pixel(pattern):
    """A shadow with soft edges is shared by the neighbours, as a star is."""
    shadow = light_of(star_field(2.5, (60, 300)), 2.5)
    assert found_at(noisy(behind_filters(20000 - shadow, pattern)), pattern) == set()


@SENSORS
def test_photon_noise_in_a_bright_nebula_is_no_defect(pattern):
    """Its middle scatters more than twice as much as the sky that the threshold is taken from."""
    y, x = np.indices(SHAPE)
    light = 600 + 3000 * np.exp(-((y - 100) ** 2 + (x - 70) ** 2) / (2 * 30.0**2))
    assert light.max() > 5 * np.median(light)
    plane = np.random.default_rng(0).poisson(light).astype(np.float32)
    assert len(found_at(plane, pattern)) <= 2


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_saturated_core_is_no_defect(pattern):
    plane = np.minimum(noisy(behind_filters(light_of(star_field(2.5, (1e4, 1e5)), 2.5), pattern)), 65535)
    assert found_at(plane, pattern) == set()


# --- hot pixels: missing data ----------------------------------------------------------------------------


@SENSORS
def test_missing_data_stay_missing_and_hide_no_defect(pattern):
    plane = noisy(np.zeros(SHAPE))
    plane[20:60, 30:80] = np.nan
    plane[::17, 100] = np.nan
    y, x = np.array([(19, 40), (60, 50), (10, 101), (100, 99), (150, 200)]).T  # most right beside a hole
    plane[y, x] = 9000
    expect_defects(plane, pattern, y, x)
    np.testing.assert_array_equal(np.isnan(mended(plane, pattern)), np.isnan(plane))


@pytest.mark.parametrize("bayer", [True, False])
def test_a_frame_without_data_has_no_defects(bayer):
    assert find_hot_pixels(np.full((40, 50), np.nan, np.float32), bayer=bayer) is NO_REPAIRS


# --- debayering ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_constant_colour_is_kept_exactly_up_to_the_edge(pattern):
    colour = np.array([300.0, 1000.0, 70.0], np.float32)
    cfa = colour[colour_of(pattern, (31, 42))]
    np.testing.assert_array_equal(debayer(cfa, pattern), np.broadcast_to(colour, (31, 42, 3)))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_ramp_of_its_own_in_every_colour_is_kept_exactly(pattern):
    y, x = np.indices((31, 42))
    ramps = np.stack([1000 + 3 * x - 2 * y, 500 + x + 4 * y, 700 - 2 * x + y], axis=-1).astype(np.float32)
    cfa = np.take_along_axis(ramps, colour_of(pattern, (31, 42))[..., None], axis=-1)[..., 0]
    inner = np.s_[DEBAYER_MARGIN:-DEBAYER_MARGIN, DEBAYER_MARGIN:-DEBAYER_MARGIN]
    np.testing.assert_allclose(debayer(cfa, pattern)[inner], ramps[inner], rtol=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_was_recorded_is_not_interpolated(pattern):
    cfa = noisy(np.zeros((30, 40)))
    own = np.take_along_axis(debayer(cfa, pattern), colour_of(pattern, cfa.shape)[..., None], axis=-1)
    np.testing.assert_array_equal(own[..., 0], cfa)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_twice_the_light_gives_twice_the_picture(pattern):
    """Linear, so that a star's flux does not depend on its brightness."""
    cfa = noisy(light_of([(20.3, 14.8, 1e6)], 2.5, (30, 40)))
    np.testing.assert_allclose(debayer(2 * cfa, pattern), 2 * debayer(cfa, pattern), rtol=1e-6, atol=0.05)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("fwhm", "scatter"), [(1.6, 0.15), (2.0, 0.05), (2.5, 0.01), (4.0, 0.001)])
@pytest.mark.parametrize("colour", [WHITE, (1.0, 0.4, 0.1)], ids=["white", "red"])
def test_a_star_keeps_its_flux_in_every_colour(pattern, fwhm, scatter, colour):
    """Red and blue are sampled every other pixel: single fluxes of sharp stars scatter, their mean is right."""
    fluxes = []
    for phase_y, phase_x in np.ndindex(8, 8):
        light = light_of([(20 + phase_x / 4, 20 + phase_y / 4, 1e4)], fwhm, (41, 41))
        fluxes.append(debayer(behind_filters(light, pattern, colour).astype(np.float32), pattern).sum(axis=(0, 1)))
    ratio = np.array(fluxes) / (1e4 * np.array(colour))
    np.testing.assert_allclose(ratio.mean(axis=0), 1, atol=0.002)
    assert ratio.std(axis=0).max() < scatter


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_hole_spreads_two_pixels_at_most_and_changes_nothing_else(pattern):
    whole = noisy(np.zeros((40, 50)))
    for y, x in ((20, 20), (20, 21), (21, 20), (21, 21)):
        cfa = whole.copy()
        cfa[y, x] = np.nan
        colour = debayer(cfa, pattern)
        assert np.isnan(colour[y, x]).any()
        far = np.ones(cfa.shape, bool)
        far[y - 2 : y + 3, x - 2 : x + 3] = False
        np.testing.assert_array_equal(colour[far], debayer(whole, pattern)[far])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_part_cut_at_even_pixels_gives_the_same_colours(pattern):
    cfa = noisy(light_of([(40, 30, 1e6)], 2.5, (60, 80)))
    part = debayer(cfa[10:50, 20:70], pattern)
    inner = np.s_[DEBAYER_MARGIN:-DEBAYER_MARGIN, DEBAYER_MARGIN:-DEBAYER_MARGIN]
    np.testing.assert_allclose(part[inner], debayer(cfa, pattern)[10:50, 20:70][inner], rtol=1e-5, atol=0.02)


# --- masters ---------------------------------------------------------------------------------------------

VIGNETTE_SHAPE = (60, 80)


def vignette() -> NDArray[np.float64]:
    """1 in the middle, 0.6 in the corners, and a grain of dust."""
    y, x = np.indices(VIGNETTE_SHAPE)
    fall = 1 - 0.4 * ((y / 59 - 0.5) ** 2 + (x / 79 - 0.5) ** 2) / 0.5
    return fall * (1 - 0.3 * (np.hypot(y - 20, x - 33) < 4))


def save(path: Path, pixels: NDArray, pattern: str | None = None) -> Path:
    header = fits.Header({"BAYERPAT": pattern} if pattern else {})
    fits.PrimaryHDU(pixels.astype(np.float32), header).writeto(path)
    return path


def masters(folder: Path, pattern: str | None, lamp: Sequence[float]) -> Calibration:
    """Masters of a camera with a pedestal and the vignette, its flat lit by a lamp of this colour."""
    dark = 500 + np.random.default_rng(1).integers(0, 50, VIGNETTE_SHAPE)
    flat = behind_filters(20000 * vignette(), pattern, lamp)
    return load_calibration(save(folder / "dark.fits", dark, pattern), save(folder / "flat.fits", flat, pattern))


@SENSORS
def test_dark_and_flat_take_out_pedestal_and_vignette(tmp_path, pattern):
    calibration = masters(tmp_path, pattern, (0.4, 1.0, 0.7))
    sky = behind_filters(np.full(VIGNETTE_SHAPE, 1500.0), pattern, (0.8, 1.0, 0.6))
    recorded = (sky * vignette() + calibration.dark).astype(np.float32)
    assert np.ptp(recorded) > 600
    result = calibration.apply(recorded, tmp_path / "sub.fit")
    # The flat is 1 where the vignette has its median: the same factor for every photosite, to 0.1 %.
    ratio = result / sky
    np.testing.assert_allclose(ratio, np.median(ratio), rtol=2e-3)
    assert np.median(ratio) == pytest.approx(np.median(vignette()), rel=2e-3)
    assert result.dtype == np.float32


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("lamp", [(1.0, 1.0, 1.0), (0.2, 1.0, 0.5), (1.0, 0.7, 0.1)])
def test_the_colour_of_the_lamp_does_not_reach_the_picture(pattern, lamp):
    flat = normalise_flat(behind_filters(30000 * vignette(), pattern, lamp).astype(np.float32))
    for colour in range(3):
        assert np.median(flat[colour_of(pattern, flat.shape) == colour]) == pytest.approx(1, rel=2e-3)
    np.testing.assert_allclose(flat / np.median(flat), vignette() / np.median(vignette()), rtol=4e-3)


def test_a_mono_flat_keeps_its_pattern_of_pixels(tmp_path):
    """Columns that see less light are just that, unless they are a colour of their own."""
    flat = np.tile(np.array([1.0, 0.9], np.float32), (40, 20))
    mono, bayer = (
        load_calibration("", save(tmp_path / f"{pattern}.fits", 20000 * flat, pattern)).flat
        for pattern in (None, "RGGB")
    )
    np.testing.assert_allclose(mono, flat / 0.95, rtol=1e-6)
    np.testing.assert_allclose(bayer, 1, rtol=1e-6)


def test_a_pixel_that_the_flat_cannot_correct_is_no_data():
    flat = np.full((20, 20), 1000, np.float32)
    for at, value in (((3, 4), 0), ((5, 5), 49), ((6, 6), -10), ((7, 7), np.nan)):
        flat[at] = value
    flat[8, 8] = 60
    result = Calibration(flat=normalise_flat(flat)).apply(np.full((20, 20), 500, np.float32), Path("sub.fit"))
    assert np.argwhere(np.isnan(result)).tolist() == [[3, 4], [5, 5], [6, 6], [7, 7]]
    assert result[8, 8] == pytest.approx(500 / 0.06)


@pytest.mark.parametrize("kind", ["dark", "flat"])
def test_a_master_of_another_size_is_refused_with_both_sizes(kind):
    calibration = Calibration(**{kind: np.ones((30, 40), np.float32)})
    with pytest.raises(FrameError, match=f"master {kind} is 40x30 px but the frame is 60x50") as caught:
        calibration.apply(np.ones((50, 60), np.float32), Path("night/sub.fit"))
    assert caught.value.path == Path("night/sub.fit")


def test_a_mono_master_serves_all_colours_of_a_frame():
    flat = np.linspace(0.5, 1.5, 12, dtype=np.float32).reshape(3, 4)
    dark = np.full((3, 4), 10, np.float32)
    colour = np.arange(36, dtype=np.float32).reshape(3, 4, 3)
    result = Calibration(dark, flat).apply(colour, Path("sub.fit"))
    np.testing.assert_allclose(result, (colour - 10) / flat[..., None], rtol=1e-6)


def test_without_masters_the_pixels_are_handed_through():
    pixels = np.ones((5, 6), np.float32)
    assert load_calibration() == Calibration()
    assert Calibration().apply(pixels, Path("sub.fit")) is pixels


def test_masters_are_never_changed():
    dark, flat = np.full((8, 8), 100, np.float32), np.full((8, 8), 2, np.float32)
    pixels = np.full((8, 8), 500, np.float32)
    assert (Calibration(dark, flat).apply(pixels, Path("sub.fit")) == 200).all()
    assert (dark == 100).all() and (flat == 2).all() and (pixels == 500).all()


# --- from the file to mended pixels ----------------------------------------------------------------------


@SENSORS
def test_repairs_reapplied_give_the_same_pixels(tmp_path, pattern):
    y, x = sown(7)
    plane = noisy(np.zeros(SHAPE))
    plane[y, x] = 20000
    frame = read_frame(save(tmp_path / "sub.fit", plane, pattern))
    calibration = Calibration(dark=np.full(SHAPE, 300, np.float32))
    pixels, repairs = prepare(frame, calibration)
    assert len(repairs.index) == len(y) and pixels.max() < SKY
    again, same = prepare(frame, calibration, repairs)
    np.testing.assert_array_equal(again, pixels)
    assert same is repairs


def test_hot_pixels_can_be_left_alone(tmp_path):
    plane = noisy(np.zeros(SHAPE))
    plane[50, 60] = 20000
    frame = read_frame(save(tmp_path / "sub.fit", plane, "RGGB"))
    pixels, repairs = prepare(frame, Calibration(), hot_sigma=None)
    np.testing.assert_array_equal(pixels, plane)
    assert repairs is NO_REPAIRS


def test_a_colour_frame_was_debayered_by_others_and_is_not_searched(tmp_path):
    colour = np.stack([noisy(np.zeros(SHAPE), seed) for seed in range(3)], axis=-1)
    colour[50, 60] = 20000
    frame = read_frame(save(tmp_path / "sub.fit", np.moveaxis(colour, -1, 0)))
    pixels, repairs = prepare(frame, Calibration())
    np.testing.assert_array_equal(pixels, colour)
    assert repairs is NO_REPAIRS


@SENSORS
@pytest.mark.parametrize("fwhm", [1.6, 2.0, 2.8])
def test_the_gap_between_two_stars_is_no_dead_pixel(
    pattern, fwhm
):  # the two-sided form of ..._close_pairs_lose_no_light
    rng = np.random.default_rng(5)
    pairs: list[Star] = []
    for x, y, flux in star_field(fwhm, (100, 400)):
        angle, apart = rng.uniform(0, 2 * np.pi), fwhm * rng.uniform(0.8, 2.5)
        pairs += [(x, y, flux), (x + apart * np.cos(angle), y + apart * np.sin(angle), flux * rng.uniform(0.2, 1))]
    truth = behind_filters(light_of(pairs, fwhm), pattern)
    plane = noisy(truth)
    after = mended(plane, pattern)
    assert max(abs(relative_change(plane, after, truth, pair)) for pair in pairs[::2]) < 0.003


@pytest.mark.parametrize("fwhm", [2.0, 2.5, 3.0, 4.0])
def test_a_saturated_core_of_a_mono_frame_is_no_defect(fwhm):  # None joins PATTERNS in ..._saturated_core_...
    plane = np.minimum(noisy(light_of(star_field(fwhm, (1e4, 1e5)), fwhm)), 65535)
    assert found_at(plane, None) == set()


@SENSORS
def test_a_hole_in_a_star_or_on_a_slope_is_not_filled(pattern):
    plane = noisy(light_of([(60, 60, 5e4), (100, 40, 5e4)], 2.5)) + np.linspace(0, 1500, SHAPE[1], dtype=np.float32)
    plane[60, 60] = plane[90, 3] = plane[90, 255] = plane[40:43, 99:103] = np.nan
    np.testing.assert_array_equal(np.isnan(mended(plane, pattern)), np.isnan(plane))


def test_colour_masters_serve_colour_frames_and_keep_their_balance(tmp_path):
    flat = 20000 * vignette()[..., None] * np.array([0.4, 1.0, 0.7])
    dark = np.full((*VIGNETTE_SHAPE, 3), 500.0)
    paths = [save(tmp_path / f"{name}.fits", np.moveaxis(a, -1, 0)) for name, a in (("dark", dark), ("flat", flat))]
    sky = np.array([0.8, 1.0, 0.6]) * 1500
    recorded = (sky * vignette()[..., None] + dark).astype(np.float32)
    ratio = load_calibration(*paths).apply(recorded, tmp_path / "sub.fit") / sky
    np.testing.assert_allclose(ratio, np.median(ratio), rtol=2e-3)
