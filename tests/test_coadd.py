"""The coadd: a known sky, cut up into frames, comes back; every sample is accounted for, on any number of cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from zemosaic import coadd as coadd_module
from zemosaic.calibrate import Calibration, prepare
from zemosaic.coadd import Coadd, Sub, block_side, coadd, deepest
from zemosaic.combine import Clip
from zemosaic.demo import PEDESTAL, READ_NOISE, FieldTruth, FrameTruth, make_field
from zemosaic.frames import read_frame
from zemosaic.levels import Adjustment
from zemosaic.tiles import FloatImage, Window
from zemosaic.warp import Crop, PixelMap, pixel_map

SKY = 600.0  # ADU, where the adjustments put it
NO_CLIP = Clip("none")


@dataclass(frozen=True)
class Field:
    """Subs whose adjustments come from the truth, their pixels, and the canvas."""

    truth: FieldTruth
    subs: list[Sub]
    pixels: list[FloatImage]
    wcs: WCS
    shape: tuple[int, int]

    def coadd(self, clip: Clip = NO_CLIP, **options) -> Coadd:
        options = {"window": Window.of_shape(self.shape)} | options
        return coadd(self.subs, crops(self.pixels), np.full(self.channels, SKY), clip, **options)

    @property
    def channels(self) -> int:
        return self.truth.flux.shape[1]

    @cached_property
    def light(self) -> FloatImage:
        """What the coadd should show, in the typical seeing: ``(ny, nx)`` or ``(ny, nx, 3)``."""
        fwhm = float(np.median([frame.fwhm for frame in self.truth.frames]))
        return self.truth.render(self.wcs, self.shape, fwhm) + np.float32(SKY)


def crops(pixels: Sequence[FloatImage]) -> list[Crop]:
    return [Crop.whole(each) for each in pixels]


def true_adjustment(frame: FrameTruth, chart: PixelMap, shape: tuple[int, int]) -> Adjustment:
    """Gain and plane that bring a sub to transparency 1 over a flat `SKY`."""
    v, u = np.mgrid[-1:1:9j, -1:1:9j].reshape(2, -1)
    ny, nx = chart.window.shape
    x = (chart.window.x0 + chart.window.x1 - 1) / 2 + u * nx / 2
    y = (chart.window.y0 + chart.window.y1 - 1) / 2 + v * ny / 2
    fx, fy = chart.at(x, y)
    rise = frame.slope[0] * ((fx + 0.5) / shape[1] - 0.5) + frame.slope[1] * ((fy + 0.5) / shape[0] - 0.5)
    sky = (PEDESTAL + (1 + rise[:, None]) * frame.sky) / frame.transparency - SKY
    plane = np.linalg.lstsq(np.stack([np.ones_like(u), u, v], axis=1), sky, rcond=None)[0].T
    return Adjustment(chart.window, np.full(len(plane), 1 / frame.transparency), plane)


def build(folder: Path, **options) -> Field:
    truth = make_field(folder, **options)
    wcs, shape = truth.canvas()
    subs, pixels = [], []
    noise = np.array([np.sqrt(f.sky + READ_NOISE**2) / f.transparency for f in truth.frames], float)
    weight = np.median(noise, axis=0) ** 2 / noise**2
    for one, n, w in zip(truth.frames, noise, weight, strict=True):
        frame = read_frame(one.path)
        data, repairs = prepare(frame, Calibration())
        chart = pixel_map(frame.wcs, frame.shape, wcs, Window.of_shape(shape))
        subs.append(Sub(frame, repairs, chart, true_adjustment(one, chart, frame.shape), n, w))
        pixels.append(data)
    return Field(truth, subs, pixels, wcs, shape)


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Field:
    """Colour: clouds, gradients, satellites, cosmic rays and hot pixels."""
    return build(
        tmp_path_factory.mktemp("colour"), panels=(2, 1), frames=10, shape=(150, 200), trails=0.3, nebula=150.0
    )


@pytest.fixture(scope="module")
def mono(tmp_path_factory: pytest.TempPathFactory) -> Field:
    """Mono and free of defects."""
    options = {"pattern": None, "trails": 0.0, "cosmics": 0, "hot_fraction": 0.0, "rotation_deg": 20.0}
    return build(tmp_path_factory.mktemp("mono"), panels=(2, 1), frames=6, shape=(120, 160), nebula=50.0, **options)


@pytest.fixture(scope="module")
def plain(field: Field) -> Coadd:
    return field.coadd()


@pytest.fixture(scope="module")
def clipped(field: Field) -> Coadd:
    return field.coadd(Clip())


def covered(field: Field, margin: float = 0.0) -> NDArray[np.bool_]:
    """Which canvas pixels lie on which frame, `margin` px or more inside its edge: ``(n, ny, nx)``."""
    y, x = np.indices(field.shape)
    sky = field.wcs.wcs_pix2world(x.ravel(), y.ravel(), 0)
    inside = []
    for frame in field.truth.frames:
        fx, fy = frame.wcs.all_world2pix(*sky, 0)
        ny, nx = field.truth.recipe.shape
        on = (np.abs(fx - (nx - 1) / 2) <= nx / 2 - margin) & (np.abs(fy - (ny - 1) / 2) <= ny / 2 - margin)
        inside.append(on.reshape(field.shape))
    return np.array(inside)


# --- the sky comes back --------------------------------------------------------------------------------------


def test_nebula_and_sky_come_back(field, clipped):
    made = clipped.tile
    starless = field.truth.nebula(field.wcs, field.shape) + np.float32(SKY)
    empty = (np.abs(field.light - starless).max(axis=2) < 1) & (made.coverage >= 3)
    assert empty.sum() > 10_000
    error = (made.image - starless)[empty]
    np.testing.assert_allclose(np.median(error, axis=0), 0, atol=1.0)
    # Noise as it should be: photon and read noise of one frame, less for many, interpolated once.
    pull = error * np.sqrt(made.coverage[empty])[:, None] / np.median([s.noise for s in field.subs], axis=0)
    spread = 1.4826 * np.median(np.abs(pull), axis=0)
    assert ((spread > 0.6) & (spread < 1.05)).all()


def test_star_fluxes_come_back(field, clipped):
    made, light = clipped.tile, field.light
    x, y, star = field.truth.star_pixels(field.wcs, field.shape, -10)
    ratio = []
    for cx, cy, flux in zip(x, y, field.truth.flux[star], strict=True):
        box = np.s_[round(cy) - 8 : round(cy) + 9, round(cx) - 8 : round(cx) + 9]
        if flux.min() > 1e4 and (made.coverage[box] >= 4).all():
            ratio.append((made.image[box] - SKY).sum(axis=(0, 1)) / (light[box] - SKY).sum(axis=(0, 1)))
    assert len(ratio) >= 5
    np.testing.assert_allclose(np.median(ratio, axis=0), 1, atol=0.01)
    np.testing.assert_allclose(ratio, 1, atol=0.05)


def test_rejection_removes_satellites_and_cosmic_rays_and_nothing_else(field, plain, clipped):
    starless = field.truth.nebula(field.wcs, field.shape) + np.float32(SKY)
    empty = np.abs(field.light - starless).max(axis=2) < 1

    def defects(made: Coadd) -> int:
        deep = empty & (made.tile.coverage >= 3)
        noise = np.median([s.noise for s in field.subs], axis=0) / np.sqrt(made.tile.coverage[deep])[:, None]
        return int(((made.tile.image - starless)[deep] > 6 * noise).any(axis=1).sum())

    assert defects(plain) > 300
    assert defects(clipped) < 0.02 * defects(plain)
    trailed = np.array([frame.trail for frame in field.truth.frames])
    share = clipped.rejected / (clipped.used + clipped.rejected)
    assert (share[trailed] > share[~trailed].max()).all()
    assert (share < 0.06).all()


@pytest.mark.parametrize("method", ["winsorized_sigma_clip", "kappa_sigma", "linear_fit_clip", "none"])
def test_median_and_mean_agree_on_the_sky(mono, method):
    mean, median = (mono.coadd(Clip(method), use_median=use).tile for use in (False, True))
    np.testing.assert_array_equal(mean.coverage, median.coverage)
    deep = mean.coverage >= 3
    assert abs(np.median((mean.image - median.image)[deep])) < 0.3
    assert np.std((mean.image - median.image)[deep]) > 0.5  # they are not the same thing


def test_a_mono_field_gives_a_mono_tile(mono):
    made = mono.coadd(Clip()).tile
    assert made.image.shape == made.coverage.shape == mono.shape


# --- every sample is accounted for -------------------------------------------------------------------------


def test_coverage_counts_the_frames_that_lie_there(mono):
    tile = mono.coadd().tile
    surely, perhaps = covered(mono, 0.02), covered(mono, -0.02)
    clear = (surely == perhaps).all(axis=0)
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(tile.coverage[clear], surely.sum(axis=0)[clear])
    np.testing.assert_array_equal(np.isnan(tile.image), tile.coverage == 0)
    assert (tile.coverage == 0).any() and tile.coverage.max() >= 5


def test_used_and_rejected_samples_add_up(plain, clipped):
    assert clipped.rejected.all() and not plain.rejected.any()
    np.testing.assert_array_equal(clipped.used + clipped.rejected, plain.used)
    for made in (plain, clipped):
        assert made.tile.coverage.sum() == made.used.sum()


def test_weight_is_that_of_the_frames_that_contributed(mono):
    tile = mono.coadd().tile
    on = covered(mono, 0.02)
    clear = (on == covered(mono, -0.02)).all(axis=0)
    weight = np.array([sub.weight.mean() for sub in mono.subs])
    np.testing.assert_allclose(tile.depth[clear], np.tensordot(weight, on, axes=1)[clear], rtol=1e-5)
    assert np.ptp(weight) > 0.1
    clipped = mono.coadd(Clip(low=1.5, high=1.5)).tile
    lost = clipped.coverage < tile.coverage
    assert 0.02 < lost.mean() < 0.5
    assert (clipped.depth[lost] < tile.depth[lost]).all() and (clipped.depth[~lost] == tile.depth[~lost]).all()


def test_the_mean_is_weighted(mono):
    """Frames of constant light show the weights themselves."""
    flat = [np.full_like(data, 1000 * i) for i, data in enumerate(mono.pixels)]
    plain = [replace(s, adjustment=Adjustment(s.window, np.ones(1), np.zeros((1, 3)))) for s in mono.subs]
    tile = coadd(plain, crops(flat), np.full(1, SKY), NO_CLIP, window=Window.of_shape(mono.shape)).tile
    on = covered(mono, 0.02)
    clear = (on == covered(mono, -0.02)).all(axis=0) & on.any(axis=0)
    weight = np.array([sub.weight[0] for sub in mono.subs])[:, None, None] * on
    value = 1000 * np.arange(len(flat))[:, None, None]
    np.testing.assert_allclose(
        tile.image[clear], ((weight * value).sum(axis=0)[clear] / weight.sum(axis=0)[clear]), rtol=1e-5
    )


def test_a_hole_in_a_frame_is_a_hole_in_its_coverage_only(mono):
    holed = [data.copy() for data in mono.pixels]
    holed[0][50:60, 70:90] = np.nan
    before, after = (
        mono.coadd(),
        coadd(mono.subs, crops(holed), np.full(1, SKY), NO_CLIP, window=Window.of_shape(mono.shape)),
    )
    lost = before.tile.coverage - after.tile.coverage
    assert set(np.unique(lost)) == {0, 1}
    assert 200 <= lost.sum() <= 22 * 12 * 1.5  # the hole and what a kernel would have mixed with it
    assert before.used[0] - after.used[0] == lost.sum()
    out_of_reach = ~binary_dilation(lost > 0, iterations=6)
    np.testing.assert_array_equal(after.tile.image[out_of_reach], before.tile.image[out_of_reach])


# --- what the result does not depend on ----------------------------------------------------------------------


def same_bytes(one: Coadd, other: Coadd) -> bool:
    return all(
        getattr(one.tile, name).tobytes() == getattr(other.tile, name).tobytes()
        for name in ("image", "coverage", "depth")
    ) and (one.used.tolist(), one.rejected.tolist()) == (other.used.tolist(), other.rejected.tolist())


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_byte(field, workers, monkeypatch):
    monkeypatch.setattr(coadd_module, "_BLOCK_SAMPLES", 200_000)  # so that there are many blocks
    assert same_bytes(field.coadd(Clip()), field.coadd(Clip(), workers=workers))


def test_memory_mapped_pixels_change_no_byte(field, clipped, tmp_path):
    mapped = []
    for i, data in enumerate(field.pixels):
        np.save(tmp_path / f"{i}.npy", data)
        mapped.append(np.load(tmp_path / f"{i}.npy", mmap_mode="r"))
    assert same_bytes(clipped, replace(field, pixels=mapped).coadd(Clip()))


# At one sigma a third of the samples hang in the balance, at a pixel's own level and that of its neighbours.
HARD = Clip(low=1.0, high=1.0)


@pytest.mark.parametrize("samples", [1, 100_000])
def test_the_size_of_the_blocks_changes_no_pixel(field, samples, monkeypatch):
    whole = field.coadd(HARD)
    monkeypatch.setattr(coadd_module, "_BLOCK_SAMPLES", samples)
    pieces = field.coadd(HARD)
    np.testing.assert_array_equal(pieces.tile.coverage, whole.tile.coverage)
    np.testing.assert_array_equal(pieces.tile.image, whole.tile.image)
    assert pieces.rejected.tolist() == whole.rejected.tolist()


def test_a_window_is_cut_out_of_the_whole(field):
    whole, window = field.coadd(HARD), Window(21, 113, 77, 201)
    part = field.coadd(HARD, window=window)
    assert part.tile.window == window
    np.testing.assert_array_equal(part.tile.coverage, whole.tile.coverage[window.slices])
    np.testing.assert_array_equal(part.tile.image, whole.tile.image[window.slices])


def test_without_a_window_the_frames_set_it(field):
    first = [
        replace(s, pixel_map=pixel_map(s.frame.wcs, s.frame.shape, field.wcs, w))
        for s, w in zip(field.subs, [Window(10, 200, 5, 150), Window(0, 90, 40, 230)], strict=False)
    ]
    assert coadd(first, crops(field.pixels[:2]), np.full(3, SKY), NO_CLIP).tile.window == Window(0, 200, 5, 230)


def test_where_no_frame_lies_there_is_no_data(mono):
    ny, nx = mono.shape
    tile = mono.coadd(window=Window(ny + 500, ny + 530, nx + 500, nx + 540)).tile
    assert tile.image.shape == (30, 40) and np.isnan(tile.image).all()
    assert not tile.coverage.any() and not tile.depth.any()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stop_is_heard_before_the_next_block(field, workers, monkeypatch):
    monkeypatch.setattr(coadd_module, "_BLOCK_SAMPLES", 1)
    asked = []

    def stop() -> None:
        asked.append(1)
        if len(asked) >= 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        field.coadd(check_stop=stop, workers=workers)
    assert len(asked) <= 3 + 2 * workers


@pytest.mark.parametrize("channels", [1, 3])
def test_blocks_are_powers_of_two_that_keep_the_stack_small(channels):
    sides = [block_side(n, channels) for n in range(1, 2000)]
    assert set(sides) <= {32, 64, 128, 256}
    assert sides == sorted(sides, reverse=True) and sides[0] == 256 and sides[-1] == 32
    assert all(side == 32 or n * channels * side**2 <= 1_000_000 for n, side in enumerate(sides, start=1))
    assert all(side == 256 or n * channels * (2 * side) ** 2 > 1_000_000 for n, side in enumerate(sides, start=1))


def test_what_counts_is_how_many_frames_meet():
    row = [Window(0, 1000, 1500 * i, 1500 * i + 1000) for i in range(40)]
    assert deepest(row) == 1
    assert deepest(row + [Window(300, 400, 200, 60_000)]) == 2
    assert deepest([Window(-700, 300, -200, 800)] * 7 + row) == 8
