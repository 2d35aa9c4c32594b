"""Master tiles into one mosaic, and master tiles on disk: a known sky is cut up, rebuilt and compared."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from numpy.typing import NDArray

from zemosaic.assembly import Method, assemble
from zemosaic.calibrate import NO_REPAIRS
from zemosaic.canvas import Canvas
from zemosaic.coadd import Sub
from zemosaic.demo import tangent_header
from zemosaic.events import Cancelled
from zemosaic.frames import Frame, FrameError, read_frame
from zemosaic.levels import Adjustment
from zemosaic.mastertile import TilePixels, read_master_tile, save_master_tile
from zemosaic.store import ArrayStore
from zemosaic.tiles import FloatImage, Mosaic, Window, alpha_of
from zemosaic.warp import pixel_map

METHODS: tuple[Method, Method] = ("reproject_coadd", "incremental")
SHAPE = (150, 210)
SCALE = 2.39
LEVEL = np.array([900.0, 1000.0, 800.0])
STAR_SIGMA = 1.3  # px
#: x, y (canvas pixels) and flux (ADU) of stars that do not touch each other.
STARS = np.array([(30.3, 40.7, 9e3), (75.5, 62.5, 4e4), (105.0, 75.0, 2e4), (140.8, 101.2, 6e4), (178.4, 110.6, 1e4)])

Piece = tuple[Sub, TilePixels]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param


def canvas_of(shape: tuple[int, int] = SHAPE) -> Canvas:
    wcs = WCS(tangent_header(359.97, 61.3, shape, scale=SCALE))
    wcs.pixel_shape = shape[::-1]
    return Canvas(wcs, shape, SCALE)


CANVAS = canvas_of()


def sky_at(x: NDArray, y: NDArray, channels: int = 1) -> FloatImage:
    """The sky at canvas positions: a constant, a gradient, a wide glow and stars; ``(..., C)``, or mono."""
    smooth = 0.2 * x - 0.15 * y + 60 * np.exp(-((x - 120) ** 2 + (y - 60) ** 2) / (2 * 25**2))
    stars = np.zeros_like(smooth)
    for cx, cy, flux in STARS:
        stars += flux / (2 * np.pi * STAR_SIGMA**2) * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * STAR_SIGMA**2))
    image = LEVEL[:channels] + (smooth + stars)[..., None] * np.array([1.0, 0.8, 1.2])[:channels]
    return (image[..., 0] if channels == 1 else image).astype(np.float32)


def truth(channels: int = 1) -> FloatImage:
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
    return sky_at(x, y, channels)


def piece(wcs: WCS, image: FloatImage, coverage: FloatImage | float = 1.0, canvas: Canvas = CANVAS) -> Piece:
    """A tile as the route hands it over: neither gain nor level is off."""
    shape, channels = image.shape[:2], image.shape[2] if image.ndim == 3 else 1
    frame = Frame(Path("tile.fits"), shape, "rgb" if channels == 3 else "mono", wcs=wcs)
    positions = pixel_map(wcs, shape, canvas.wcs, canvas.window_of(frame))
    adjustment = Adjustment(positions.window, np.ones(channels), np.zeros((channels, 3)))
    sub = Sub(frame, NO_REPAIRS, positions, adjustment, np.full(channels, 5.0), np.ones(channels))
    covered = np.broadcast_to(np.float32(coverage), shape) * np.isfinite(image.reshape(*shape, -1)).all(axis=2)
    return sub, TilePixels(image, np.ascontiguousarray(covered, np.float32))


def cut(box: Window, image: FloatImage, coverage: FloatImage | float = 1.0) -> Piece:
    """A part of a picture on the canvas, on the canvas's own pixels."""
    return piece(CANVAS.wcs[box.slices], image[box.slices].copy(), coverage)


def seen(
    centre: tuple[float, float], turn_deg: float, shape: tuple[int, int], channels: int = 1, parity: int = -1
) -> Piece:
    """The sky on a pixel grid of its own: in its middle a canvas position, turned, mirrored or not."""
    ra, dec = CANVAS.wcs.wcs_pix2world(*centre, 0)
    wcs = WCS(tangent_header(float(ra), float(dec), shape, scale=SCALE, angle_deg=turn_deg, parity=parity))
    wcs.pixel_shape = shape[::-1]
    y, x = np.mgrid[: shape[0], : shape[1]]
    return piece(wcs, sky_at(*CANVAS.wcs.wcs_world2pix(*wcs.wcs_pix2world(x, y, 0), 0), channels))


def rebuilt(tiles: Sequence[Piece], method: Method, **options: object) -> Mosaic:
    channels = 3 if tiles and tiles[0][1].image.ndim == 3 else 1
    pixels = {id(sub.frame): tile for sub, tile in tiles}
    with ArrayStore(1 << 30) as store:
        return assemble(
            [sub for sub, _ in tiles],
            lambda frame: pixels[id(frame)],
            CANVAS,
            LEVEL[:channels],
            method,
            store,
            **options,
        )


def rows(channels: int = 1) -> list[Piece]:
    """Two by two overlapping tiles that cover the canvas but for a frame of 10 px."""
    boxes = [Window(y, y + 80, x, x + 110) for y in (10, 60) for x in (10, 90)]
    return [cut(box, truth(channels)) for box in boxes]


def turned(channels: int = 1) -> list[Piece]:
    """Overlapping tiles, each with a grid of its own, one of them mirrored."""
    return [
        seen((70.3, 70.8), 20, (110, 120), channels),
        seen((130.6, 80.1), -35, (120, 110), channels),
        seen((150.2, 60.4), 171, (90, 100), channels, parity=1),
    ]


def interior(mosaic: Mosaic, margin: int = 6) -> NDArray[np.bool_]:
    """Pixels with data that are some way from any without."""
    known = np.pad(mosaic.coverage > 0, margin)
    ny, nx = mosaic.shape
    windows = [known[dy : dy + ny, dx : dx + nx] for dy in (0, margin, 2 * margin) for dx in (0, margin, 2 * margin)]
    return np.logical_and.reduce(windows)


# --- the sky comes back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_tiles_on_the_canvas_grid_come_back_as_they_were(method, channels):
    """No interpolation at whole pixels: only float32 stands between."""
    mosaic = rebuilt(rows(channels), method)
    known = mosaic.coverage > 0
    assert known[10:140, 10:200].all()
    assert known.sum() == 130 * 190
    np.testing.assert_allclose(mosaic.image[known], truth(channels)[known], rtol=2e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_tiles_on_grids_of_their_own_come_back_within_the_error_of_interpolation(method, channels):
    """Smooth sky to 0.1 ADU of 900, and 1 ADU in the last pixel of a tile, where a kernel sees its mirror image; stars
    of 3 px FWHM, the sharpest to be expected, to 2 % of their peak (position rounded to 1/32 px)."""
    mosaic = rebuilt(turned(channels), method)
    inside = interior(mosaic)
    assert inside.mean() > 0.5
    error = np.abs(mosaic.image - truth(channels)).reshape(*SHAPE, channels).max(axis=2)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    away = np.min([np.hypot(x - cx, y - cy) for cx, cy, _ in STARS], axis=0)
    smooth = error[inside & (away > 12)]
    assert np.percentile(smooth, 99) < 0.1
    assert smooth.max() < 1
    peak = STARS[:, 2].max() / (2 * np.pi * STAR_SIGMA**2)
    assert error[inside].max() < 0.02 * 1.2 * peak


def test_both_methods_agree():
    coadd, own = (rebuilt(turned(), method) for method in METHODS)
    both = interior(coadd) & interior(own)
    np.testing.assert_allclose(coadd.coverage[both], own.coverage[both], atol=1e-3)
    difference = np.abs(coadd.image - own.image)[both]
    assert np.percentile(difference, 95) < 0.05
    assert difference.max() < 0.02 * STARS[:, 2].max() / (2 * np.pi * STAR_SIGMA**2)


def test_flux_is_conserved(method):
    """Stars within 0.3 %, in a tile, in an overlap and where one tile ends in another."""
    mosaic = rebuilt(turned(), method)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    without = truth() - sum(star(x, y, *each) for each in STARS)
    measured = 0
    for cx, cy, flux in STARS:
        near = np.hypot(x - cx, y - cy) < 9
        if np.isfinite(mosaic.image[near]).all():
            assert (mosaic.image - without)[near].sum() == pytest.approx(flux, rel=3e-3)
            measured += 1
    assert measured >= 4


def star(x: NDArray, y: NDArray, cx: float, cy: float, flux: float) -> NDArray:
    return flux / (2 * np.pi * STAR_SIGMA**2) * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * STAR_SIGMA**2))


def test_a_tile_of_another_scale_keeps_the_surface_brightness(method):
    """A tile with pixels 1.3 times as coarse, of a sky without stars: the level is that of the canvas."""
    shape = (60, 80)
    ra, dec = CANVAS.wcs.wcs_pix2world(100, 70, 0)
    wcs = WCS(tangent_header(float(ra), float(dec), shape, scale=1.3 * SCALE, angle_deg=12))
    y, x = np.mgrid[: shape[0], : shape[1]]
    u, v = CANVAS.wcs.wcs_world2pix(*wcs.wcs_pix2world(x, y, 0), 0)
    mosaic = rebuilt([piece(wcs, (1000 + u - 0.5 * v).astype(np.float32))], method)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    inside = interior(mosaic)
    assert inside.sum() > 4000
    np.testing.assert_allclose(mosaic.image[inside], (1000 + x - 0.5 * y)[inside], atol=0.1)


def test_the_result_carries_the_canvas(method):
    mosaic = rebuilt(rows(), method)
    assert mosaic.shape == SHAPE
    assert mosaic.wcs is not CANVAS.wcs and mosaic.wcs.wcs.compare(CANVAS.wcs.wcs)
    np.testing.assert_array_equal(mosaic.alpha, alpha_of(mosaic.coverage))
    np.testing.assert_array_equal(np.isnan(mosaic.image), mosaic.coverage == 0)


def test_the_result_does_not_depend_on_the_workers(method):
    one, three = (rebuilt(turned(3), method, workers=n) for n in (1, 3))
    np.testing.assert_array_equal(one.image, three.image)
    np.testing.assert_array_equal(one.coverage, three.coverage)


def test_tiles_that_miss_the_canvas_do_no_harm(method):
    away = [(-500.0, 70.0), (100.0, 900.0)]
    alone = rebuilt(rows(), method)
    company = rebuilt([*rows(), *(seen(at, 10, (50, 60)) for at in away)], method)
    np.testing.assert_array_equal(company.image, alone.image)


def test_no_tile_at_all_is_no_data(method):
    mosaic = rebuilt([], method)
    assert np.isnan(mosaic.image).all() and not mosaic.coverage.any() and not mosaic.alpha.any()


def test_a_stop_is_heard_before_every_block(method):
    def stop() -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        rebuilt(rows(), method, check_stop=stop)


# --- weights ----------------------------------------------------------------------------------------------


def flat(value: float, channels: int = 1) -> FloatImage:
    return np.full((*SHAPE, channels) if channels == 3 else SHAPE, value, np.float32)


LEFT, RIGHT = Window(20, 120, 10, 120), Window(20, 120, 80, 200)
COMMON = LEFT.intersect(RIGHT).slices


def test_weights_are_the_coverage_and_coverage_adds_up(method):
    mosaic = rebuilt([cut(LEFT, flat(1000), 12.0), cut(RIGHT, flat(1040), 4.0)], method)
    np.testing.assert_allclose(mosaic.image[COMMON], 1010, rtol=1e-6)
    np.testing.assert_allclose(mosaic.coverage[COMMON], 16, rtol=1e-6)
    np.testing.assert_allclose(mosaic.coverage[20:120, 10:80], 12, rtol=1e-6)
    np.testing.assert_allclose(mosaic.image[20:120, 120:200], 1040, rtol=1e-6)
    assert mosaic.coverage.sum(dtype=float) == pytest.approx(4 * 100 * (3 * 110 + 120))


def test_coverage_that_varies_within_a_tile_is_followed(method):
    ramp = np.linspace(3, 12, 110, dtype=np.float32)[None, :] * np.ones((100, 1), np.float32)
    mosaic = rebuilt([cut(LEFT, flat(1000), ramp), cut(RIGHT, flat(1040), 5.0)], method)
    share = ramp[:, 70:] / (ramp[:, 70:] + 5)
    np.testing.assert_allclose(mosaic.image[COMMON], 1040 - 40 * share, rtol=1e-5)
    np.testing.assert_allclose(mosaic.coverage[COMMON], ramp[:, 70:] + 5, rtol=1e-5)


def test_coverage_is_conserved_on_a_turned_grid(method):
    """The canvas has as many pixels to the square degree as the tile has: the sum stays, up to the rim."""
    sub, pixels = seen((100, 75), 25, (90, 100))
    mosaic = rebuilt([(sub, replace(pixels, coverage=np.full((90, 100), 7, np.float32)))], method)
    assert mosaic.coverage[interior(mosaic)] == pytest.approx(7, rel=1e-3)
    assert mosaic.coverage.sum() == pytest.approx(7 * 90 * 100, rel=0.03)


def test_a_step_of_coverage_within_a_tile_makes_no_hole_and_no_ghost(method):
    """From 20 frames to 1, as at the rim of a rosette: weights stay between the two, and no pixel is lost."""
    sub, pixels = seen((100, 75), 33, (90, 100))
    coverage = np.ones((90, 100), np.float32)
    even = rebuilt([(sub, TilePixels(pixels.image, coverage.copy()))], method)
    coverage[:, :50] = 20
    stepped = rebuilt([(sub, TilePixels(pixels.image, coverage))], method)
    np.testing.assert_array_equal(stepped.coverage > 0, even.coverage > 0)
    known = stepped.coverage[stepped.coverage > 0]
    assert known.min() >= 1 - 1e-6 and known.max() <= 20 + 1e-4


def test_gain_and_level_are_applied_before_tiles_are_mixed(method):
    """A tile that is dimmer, with a sky of its own that rises to one side, ends in step with its neighbour."""
    good, (sub, pixels) = cut(LEFT, truth()), cut(RIGHT, truth())
    window = sub.window
    u = (np.arange(RIGHT.x0, RIGHT.x1) - (window.x0 + window.x1 - 1) / 2) / (window.shape[1] / 2)
    pixels = replace(pixels, image=(pixels.image / 2 + 70 + 30 * u).astype(np.float32))
    adjustment = Adjustment(window, np.array([2.0]), np.array([[140.0, 60.0, 0.0]]))
    mosaic = rebuilt([good, (replace(sub, adjustment=adjustment), pixels)], method)
    known = mosaic.coverage > 0
    np.testing.assert_allclose(mosaic.image[known], truth()[known], rtol=1e-6)


# --- shallow parts ----------------------------------------------------------------------------------------

TRAIL = (slice(60, 62), slice(85, 115))  # on the canvas, in what LEFT and RIGHT share


def with_trail(box: Window, coverage: FloatImage | float) -> Piece:
    image = truth()
    image[TRAIL] += 150
    return cut(box, image, coverage)


def test_a_trail_in_a_shallow_tile_does_not_reach_the_mosaic_where_deeper_ones_know_better(method):
    mosaic = rebuilt([with_trail(LEFT, 2.0), cut(RIGHT, truth(), 8.0)], method)
    np.testing.assert_allclose(mosaic.image[TRAIL], truth()[TRAIL], rtol=2e-6)
    np.testing.assert_allclose(mosaic.coverage[TRAIL], 8, rtol=1e-6)
    np.testing.assert_allclose(mosaic.coverage[70:110, 85:115], 10, rtol=1e-6)  # what agrees counts as ever


def test_which_tile_comes_first_makes_no_difference_to_that(method):
    tiles = [with_trail(LEFT, 2.0), cut(RIGHT, truth(), 8.0)]
    np.testing.assert_allclose(rebuilt(tiles, method).image, rebuilt(tiles[::-1], method).image, rtol=1e-6)


def test_only_the_shallow_part_of_a_tile_is_judged(method):
    """The same trail in the deep part of a tile is what most frames saw: it stays."""
    coverage = np.full(SHAPE, 2, np.float32)
    coverage[:, 100:] = 8
    mosaic = rebuilt([with_trail(LEFT, coverage[LEFT.slices]), cut(RIGHT, truth(), 8.0)], method)
    excess = mosaic.image[TRAIL] - truth()[TRAIL]
    assert np.abs(excess[:, :14]).max() < 0.01
    np.testing.assert_allclose(excess[:, 16:], 75, rtol=1e-4)


def test_shallow_tiles_alone_are_all_there_is(method):
    mosaic = rebuilt([with_trail(LEFT, 2.0), cut(RIGHT, truth(), 2.0)], method)
    np.testing.assert_allclose((mosaic.image - truth())[TRAIL], 75, rtol=1e-4)


# --- holes ------------------------------------------------------------------------------------------------


def holed(tile: Piece, hole: tuple[slice, slice]) -> Piece:
    sub, pixels = tile
    image, coverage = pixels.image.copy(), pixels.coverage.copy()
    image[hole], coverage[hole] = np.nan, 0
    return sub, TilePixels(image, coverage)


@pytest.mark.parametrize("turn", [0.0, 33.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_holes_stay_holes_and_spread_no_zeros(method, turn, channels):
    """A hole, single bad pixels and a ragged rim in a sky of 1000 ± 0: what has data is 1000 at every pixel."""
    sub, pixels = seen((100, 75), turn, (90, 100), channels)
    even = replace(pixels, image=np.full_like(pixels.image, 1000))
    tile = holed(holed((sub, even), (slice(30, 50), slice(40, 45))), (slice(70, 71), slice(10, 90, 7)))
    mosaic = rebuilt([holed(tile, (slice(0, 12), slice(0, 60)))], method)
    known = mosaic.coverage > 0
    np.testing.assert_allclose(mosaic.image[known], 1000, rtol=1e-5)
    assert np.isnan(mosaic.image[~known]).all()
    assert not known[70:72, 92:94].any() or turn  # the middle of the hole
    holes = 20 * 5 + 12 + 12 * 60
    assert 0.6 * (90 * 100 - holes) < known.sum() <= 90 * 100 - holes + 250  # the rim of a turned grid is rounded


def test_a_hole_is_filled_by_the_tile_below(method):
    hole = (slice(40, 60), slice(75, 95))
    mosaic = rebuilt([holed(cut(LEFT, truth(), 4.0), hole), cut(RIGHT, truth(), 2.0)], method)
    at = (slice(60, 80), slice(85, 105))
    np.testing.assert_allclose(mosaic.image[at], truth()[at], rtol=2e-6)
    np.testing.assert_allclose(mosaic.coverage[at], 2, rtol=1e-6)


def test_a_colour_that_is_missing_makes_the_pixel_no_data(method):
    sub, pixels = cut(LEFT, truth(3))
    image = pixels.image.copy()
    image[40:50, 40:50, 1] = np.nan
    mosaic = rebuilt([(sub, TilePixels(image, pixels.coverage))], method)
    assert np.isnan(mosaic.image[60:70, 50:60]).all()
    assert not mosaic.coverage[60:70, 50:60].any()


# --- master tiles on disk ---------------------------------------------------------------------------------


def master(channels: int = 1) -> Mosaic:
    """A tile with a hole, a WCS of its own and a coverage of 0 to 12 frames."""
    box = Window(30, 90, 40, 120)
    image = truth(channels)[box.slices].copy()
    coverage = np.linspace(1, 12, 80, dtype=np.float32)[None, :] * np.ones((60, 1), np.float32)
    image[10:20, 30:35], coverage[10:20, 30:35] = np.nan, 0
    return Mosaic(image, coverage, alpha_of(coverage), CANVAS.wcs[box.slices])


NAMES = ["Light_001.fit", "Light_néb_002.fit", "Light_003.fit"]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_master_tile_comes_back_from_disk_as_it_was(tmp_path, channels):
    tile, path = master(channels), tmp_path / "master_tile_0001.fits"
    save_master_tile(path, tile, NAMES, 30.0)
    frame = read_frame(path)
    back = read_master_tile(frame)
    assert (frame.colour, frame.shape) == ("rgb" if channels == 3 else "mono", (60, 80))
    np.testing.assert_array_equal(back.image, tile.image)
    np.testing.assert_array_equal(back.coverage, tile.coverage)
    corners = np.array([[0.0, 0.0], [79.0, 0.0], [0.0, 59.0], [79.0, 59.0]])
    there = frame.wcs.wcs_world2pix(tile.wcs.wcs_pix2world(corners, 0), 0)
    np.testing.assert_allclose(there, corners, atol=1e-8)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_master_tile_is_a_sound_fits_file_that_tells_its_story(tmp_path, channels):
    save_master_tile(tmp_path / "tile.fits", master(channels), NAMES, 30.0)
    with fits.open(tmp_path / "tile.fits", checksum=True) as hdus:
        hdus.verify("exception")
        header = hdus[0].header
        assert (header["NCOMBINE"], header["TOTALEXP"], header["BUNIT"]) == (3, 30.0, "adu")
        assert header["CREATOR"].startswith("ZeMosaic")
        assert list(hdus["FRAMES"].data["FILE"]) == ["Light_001.fit", "Light_n?b_002.fit", "Light_003.fit"]
        shared = [WCS(hdu.header, naxis=2).wcs_pix2world([[3.0, 7.0]], 0) for hdu in hdus[:2]]
        np.testing.assert_array_equal(*shared)
    assert [path.name for path in tmp_path.iterdir()] == ["tile.fits"]


def test_an_exposure_that_is_unknown_is_not_invented(tmp_path):
    save_master_tile(tmp_path / "tile.fits", master(), NAMES, float("nan"))
    assert "TOTALEXP" not in fits.getheader(tmp_path / "tile.fits")


def fail_to_write(hdus: fits.HDUList, path: Path, **_: object) -> None:
    """A disk that is full after the first bytes."""
    Path(path).write_bytes(b"SIMPLE  =")
    raise OSError(28, "No space left on device", str(path))


def fail_to_rename(source: Path, target: Path) -> None:
    raise OSError(13, "Permission denied", str(target))


@pytest.mark.parametrize(
    ("owner", "name", "failure"), [(fits.HDUList, "writeto", fail_to_write), (os, "replace", fail_to_rename)]
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_master_tile_is_written_whole_or_not_at_all(
    tmp_path, monkeypatch, owner: object, name: str, failure: Callable[..., None], existing
):
    path = tmp_path / "tile.fits"
    if existing:
        save_master_tile(path, master(), NAMES[:1], 10.0)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(owner, name, failure)
    with pytest.raises(OSError, match=r"No space|Permission"):
        save_master_tile(path, master(3), NAMES, 30.0)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("channels", [1, 3])
def test_a_ready_tile_without_coverage_counts_once_where_it_has_data(tmp_path, channels):
    """Another program's tile: its WCS and NaN for no data is all there is."""
    tile = master(channels)
    data = np.moveaxis(tile.image, -1, 0) if channels == 3 else tile.image
    fits.writeto(tmp_path / "tile.fits", data, tile.wcs.to_header())
    back = read_master_tile(read_frame(tmp_path / "tile.fits"))
    np.testing.assert_array_equal(back.image, tile.image)
    np.testing.assert_array_equal(back.coverage, (tile.coverage > 0).astype(np.float32))


def test_a_coverage_of_another_shape_is_not_this_tiles(tmp_path):
    tile = master()
    hdus = [fits.PrimaryHDU(tile.image, tile.wcs.to_header()), fits.ImageHDU(np.ones((3, 4)), name="COVERAGE")]
    fits.HDUList(hdus).writeto(tmp_path / "tile.fits")
    back = read_master_tile(read_frame(tmp_path / "tile.fits"))
    np.testing.assert_array_equal(back.coverage, np.isfinite(tile.image).astype(np.float32))


def test_pixels_without_coverage_do_not_count(tmp_path, method):
    """A tile of another program that holds zeros where it has no data, and says so by its coverage."""
    image, coverage = flat(1000)[LEFT.slices].copy(), np.full(LEFT.shape, 2, np.float32)
    image[:50], coverage[:50] = 0, 0
    wcs = CANVAS.wcs[LEFT.slices]
    hdus = [fits.PrimaryHDU(image, wcs.to_header()), fits.ImageHDU(coverage, name="COVERAGE")]
    fits.HDUList(hdus).writeto(tmp_path / "tile.fits")
    back = read_master_tile(read_frame(tmp_path / "tile.fits"))
    assert np.isnan(back.image[:50]).all()
    mosaic = rebuilt([(cut(LEFT, flat(1000))[0], back)], method)
    assert np.isnan(mosaic.image[:70]).all()
    known = mosaic.coverage > 0
    assert known[78:120, 10:120].all()
    np.testing.assert_allclose(mosaic.image[known], 1000, rtol=1e-5)


def test_a_table_named_coverage_is_no_map(tmp_path):
    tile = master()
    table = fits.BinTableHDU.from_columns([fits.Column("N", "J", array=[1, 2])], name="COVERAGE")
    fits.HDUList([fits.PrimaryHDU(tile.image, tile.wcs.to_header()), table]).writeto(tmp_path / "tile.fits")
    back = read_master_tile(read_frame(tmp_path / "tile.fits"))
    np.testing.assert_array_equal(back.coverage, np.isfinite(tile.image).astype(np.float32))


def test_a_tile_with_a_stored_coverage_outweighs_one_without(tmp_path, method):
    """The whole way: two tiles from disk, of 6 frames and of an unknown number."""
    deep, shallow = flat(1000)[LEFT.slices], flat(1028)[RIGHT.slices]
    coverage = np.full(LEFT.shape, 6, np.float32)
    tile = Mosaic(deep, coverage, alpha_of(coverage), CANVAS.wcs[LEFT.slices])
    save_master_tile(tmp_path / "deep.fits", tile, NAMES, 60.0)
    fits.writeto(tmp_path / "shallow.fits", shallow, CANVAS.wcs[RIGHT.slices].to_header())
    tiles = []
    for name in ("deep.fits", "shallow.fits"):
        frame = read_frame(tmp_path / name)
        pixels = read_master_tile(frame)
        sub, _ = piece(frame.wcs, pixels.image)
        tiles.append((replace(sub, frame=frame), pixels))
    mosaic = rebuilt(tiles, method)
    inner = (slice(25, 115), slice(85, 115))
    np.testing.assert_allclose(mosaic.image[inner], 1004, rtol=1e-6)
    np.testing.assert_allclose(mosaic.coverage[inner], 7, rtol=1e-6)


def test_a_tile_that_is_gone_is_a_frame_error(tmp_path):
    save_master_tile(tmp_path / "tile.fits", master(), NAMES, 30.0)
    frame = read_frame(tmp_path / "tile.fits")
    frame.path.unlink()
    with pytest.raises(FrameError):
        read_master_tile(frame)
