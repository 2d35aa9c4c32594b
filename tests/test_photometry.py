"""One photometric scale for all frames, judged against the clouds, hazes and skies that were put into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from numpy.typing import NDArray

from zemosaic.calibrate import Calibration
from zemosaic.canvas import Canvas
from zemosaic.demo import PEDESTAL, FieldTruth, make_field
from zemosaic.events import Events
from zemosaic.frames import Frame
from zemosaic.intake import Intake, measure_all, place, scan
from zemosaic.levels import canvas_nodes
from zemosaic.measure import FrameMeasure
from zemosaic.photometry import Photometry, frame_weights, match_frames
from zemosaic.settings import Settings
from zemosaic.stars import Stars
from zemosaic.warp import PixelMap, pixel_map

GLOW, GLOW_SIGMA = 500.0, 130.0  # ADU; pixels


@dataclass(frozen=True)
class Field:
    """A measured field and its truth, frame by frame in the same order."""

    truth: FieldTruth
    frames: list[Frame]
    measures: list[FrameMeasure]
    maps: list[PixelMap]
    canvas: Canvas

    @property
    def transparency(self) -> NDArray[np.float64]:
        """``(F, 1)``"""
        return np.array([[frame.transparency] for frame in self.truth.frames])

    def match(self, frames: Sequence[Frame] = (), measures: Sequence[FrameMeasure] = (), **options) -> Photometry:
        settings = Settings(**options)
        return match_frames(frames or self.frames, measures or self.measures, self.maps, self.canvas, settings)


def glow(truth: FieldTruth, ra: NDArray, dec: NDArray) -> NDArray[np.float64]:
    """A nebula that fills the panel in the middle and leaves little for those beside it, ADU per pixel."""
    x, y = truth.plane.wcs_world2pix(ra, dec, 0)
    return GLOW * np.exp(-(x**2 + y**2) / (2 * GLOW_SIGMA**2))


def add_glow(truth: FieldTruth) -> None:
    """Shine it into the files, through each frame's own air."""
    y, x = np.indices(truth.recipe.shape)
    rng = np.random.default_rng(0)
    for frame in truth.frames:
        light = frame.transparency * glow(truth, *frame.wcs.all_pix2world(x, y, 0))
        with fits.open(frame.path, mode="update") as hdus:
            hdus[0].data = np.clip(hdus[0].data + rng.poisson(light), 0, 65535).astype(np.uint16)


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Field:
    """Three panels in a row, three frames each, with clouds and sky gradients."""
    folder: Path = tmp_path_factory.mktemp("subs")
    truth = make_field(
        folder, panels=(3, 1), frames=9, shape=(300, 400), overlap=0.5, star_density=3500, nebula=30.0, fwhm=2.2
    )
    add_glow(truth)
    intake, events, settings = Intake([]), Events(), Settings()
    intake = scan([folder], 1, events)
    canvas = place(intake, settings, events, 2**30, Path(__file__).parent)
    measure_all(intake, Calibration(), settings, 1, events)
    maps = [pixel_map(f.wcs, f.shape, canvas.wcs, canvas.window_of(f)) for f in intake.frames]
    assert [f.path for f in intake.frames] == truth.paths
    return Field(truth, intake.frames, intake.measures, maps, canvas)


@pytest.fixture(scope="module")
def matched(field: Field) -> Photometry:
    return field.match()


def gains(photometry: Photometry) -> NDArray[np.float64]:
    """``(F, C)``"""
    return np.array([adjustment.gain for adjustment in photometry.adjustments])


def sky_errors(field: Field, photometry: Photometry) -> NDArray[np.float64]:
    """What matching left of the frames' own skies, ``(F, C)``: mean over each frame of adjusted minus true light.

    The one plane over the whole canvas that no data can tell from the sky is taken out.
    """
    scale = np.median(gains(photometry) * field.transparency, axis=0)
    rows, errors = [], []
    for i, (frame, chart, adjustment) in enumerate(
        zip(field.truth.frames, field.maps, photometry.adjustments, strict=True)
    ):
        _, x, y, u, v = canvas_nodes(chart.window, 16, field.canvas.shape[1])
        fx, fy = (np.rint(p).astype(int) for p in chart.at(x, y))
        ny, nx = field.truth.recipe.shape
        on = (fx >= 0) & (fx < nx) & (fy >= 0) & (fy < ny)
        x, y, u, v, fx, fy = (p[on] for p in (x, y, u, v, fx, fy))
        light = field.truth.nebula(frame.wcs, (ny, nx))[fy, fx]
        light = light + glow(field.truth, *frame.wcs.all_pix2world(fx, fy, 0))[:, None]
        seen = frame.transparency * light + frame.background((ny, nx))[fy, fx] + PEDESTAL
        level, slope_u, slope_v = adjustment.plane.T
        adjusted = adjustment.gain * seen - level - slope_u * u[:, None] - slope_v * v[:, None]
        rows.append(np.stack([np.ones_like(x), x, y, np.full_like(x, i)], axis=1))
        errors.append(adjusted - scale * light)
    table, error = np.concatenate(rows), np.concatenate(errors)
    frame_of, table = table[:, 3], table[:, :3]
    error -= table @ np.linalg.lstsq(table, error, rcond=None)[0]
    return np.array([error[frame_of == i].mean(axis=0) for i in range(len(rows))])


# --- gains and skies -------------------------------------------------------------------------------------


def test_gains_undo_the_clouds(field, matched):
    product = gains(matched) * field.transparency
    before = field.transparency.std() / field.transparency.mean()
    after = (product / np.median(product, axis=0)).std(axis=0)
    assert (after < 0.02).all() and (before > 4 * after).all()
    assert matched.unmatched == () and len(set(matched.star_groups)) == 1
    assert 0.5 < matched.star_scatter < 2


def test_skies_agree_after_matching(field, matched):
    before = np.array([frame.sky for frame in field.truth.frames]).std(axis=0)
    after = sky_errors(field, matched).std(axis=0)
    assert (before > 50).all() and (after < 2).all()
    assert len(set(matched.sky_groups)) == 1


def test_a_nebula_that_fills_the_frame_is_not_taken_for_sky(field, matched):
    """Setting every frame's median to the same value erases what is brighter in one panel than in another."""
    middle = np.array([frame.panel == 1 for frame in field.truth.frames])
    erased, kept = (
        errors[~middle].mean(axis=0) - errors[middle].mean(axis=0)
        for errors in (sky_errors(field, field.match(stacking_normalize_method="sky_mean")), sky_errors(field, matched))
    )
    assert (erased > 0.3 * GLOW).all()
    assert (np.abs(kept) < 0.01 * GLOW).all()


def test_sky_mean_gives_every_frame_the_same_median(field):
    photometry = field.match(stacking_normalize_method="sky_mean")
    assert (gains(photometry) == 1).all()
    sky = np.array([m.sky - a.plane[:, 0] for m, a in zip(field.measures, photometry.adjustments, strict=True)])
    mean = np.mean([m.sky for m in field.measures], axis=0)
    np.testing.assert_allclose(sky, np.broadcast_to(mean, sky.shape), rtol=1e-12)
    np.testing.assert_allclose(photometry.sky, mean, rtol=1e-12)
    assert not any(a.plane[:, 1:].any() for a in photometry.adjustments)


def test_none_leaves_the_frames_alone(field):
    photometry = field.match(stacking_normalize_method="none")
    assert (gains(photometry) == 1).all() and not any(a.plane.any() for a in photometry.adjustments)
    assert np.isnan(photometry.star_scatter) and photometry.unmatched == ()


def test_without_background_match_only_gains_are_solved(field, matched):
    photometry = field.match(match_background_for_final=False)
    np.testing.assert_array_equal(gains(photometry), gains(matched))
    assert not any(a.plane.any() for a in photometry.adjustments)


def test_windows_noise_and_sky_are_those_of_the_adjusted_frames(field, matched):
    assert [a.window for a in matched.adjustments] == [m.window for m in field.maps]
    gain, level = gains(matched), np.array([a.plane[:, 0] for a in matched.adjustments])
    np.testing.assert_allclose(matched.noise, gain * np.array([m.noise for m in field.measures]))
    np.testing.assert_allclose(matched.sky, np.median(gain * [m.sky for m in field.measures] - level, axis=0))


# --- exposures, pixels, missing stars ----------------------------------------------------------------------


def exposed(frame: Frame, measure: FrameMeasure, times: float) -> tuple[Frame, FrameMeasure]:
    """The same frame exposed so many times as long: more of everything."""
    stars = replace(measure.stars, flux=measure.stars.flux * times, error=measure.stars.error * times)
    measure = replace(
        measure,
        stars=stars,
        sky=measure.sky * times,
        noise=measure.noise * times,
        blocks=measure.blocks * np.float32(times),
        block_noise=measure.block_noise * times,
    )
    assert frame.exposure is not None
    return replace(frame, exposure=frame.exposure * times), measure


def some_exposed_longer(field: Field) -> tuple[list[Frame], list[FrameMeasure], NDArray[np.float64]]:
    """Every third frame of 20 s among frames of 10 s."""
    times = np.where(np.arange(len(field.frames)) % 3 == 2, 2.0, 1.0)
    pairs = [exposed(f, m, t) for f, m, t in zip(field.frames, field.measures, times, strict=True)]
    return [f for f, _ in pairs], [m for _, m in pairs], times[:, None]


def test_frames_of_20_s_come_onto_the_scale_of_those_of_10_s(field, matched):
    frames, measures, times = some_exposed_longer(field)
    mixed = field.match(frames, measures)
    ratio = gains(mixed) * times / gains(matched)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[0], ratio.shape), rtol=1e-6)
    np.testing.assert_allclose(np.median(gains(mixed), axis=0), 1, rtol=0.01)  # the typical frame is one of 10 s
    np.testing.assert_allclose(
        [a.plane / ratio[0][:, None] for a in mixed.adjustments], [a.plane for a in matched.adjustments], atol=0.5
    )


def test_stars_find_the_gain_of_an_exposure_that_the_header_keeps_to_itself(field, matched):
    frames, measures, times = some_exposed_longer(field)
    untold = field.match([replace(f, exposure=None) for f in frames], measures)
    ratio = gains(untold) * times / gains(matched)
    np.testing.assert_allclose(ratio / np.median(ratio, axis=0), 1, atol=0.01)


def test_sky_mean_takes_the_gains_from_the_exposures(field):
    frames, measures, times = some_exposed_longer(field)
    np.testing.assert_array_equal(
        gains(field.match(frames, measures, stacking_normalize_method="sky_mean")), np.tile(1 / times, 3)
    )
    frames[0] = replace(frames[0], exposure=None)
    frames[1] = replace(frames[1], exposure=0.0)
    gain = gains(field.match(frames, measures, stacking_normalize_method="sky_mean"))
    assert (gain[:2] == 1).all() and (gain[2] == gain[5]).all()


def test_coarser_pixels_collect_more_sky_and_nebula_but_no_more_star(field, matched):
    """Binned 2x2, a frame holds four times the surface brightness and the same star fluxes: its gain is a quarter."""
    stars, frames, measures = field.measures[4].stars, list(field.frames), list(field.measures)
    binned = frames[4].wcs.deepcopy()
    binned.wcs.cd *= 2
    binned.wcs.crpix = binned.wcs.crpix / 2 + 0.25
    frames[4] = replace(frames[4], wcs=binned)
    measures[4] = replace(measures[4], stars=replace(stars, x=(stars.x - 0.5) / 2, y=(stars.y - 0.5) / 2))
    gain = gains(field.match(frames, measures, match_background_for_final=False))
    ratio = gain / gains(matched)
    np.testing.assert_allclose(ratio[4] / np.median(ratio, axis=0), 0.25, rtol=3e-3)


def without_stars(measure: FrameMeasure) -> FrameMeasure:
    nothing = np.zeros((0, measure.stars.flux.shape[1]))
    return replace(measure, stars=Stars(np.zeros(0), np.zeros(0), nothing, nothing, np.zeros(0, bool)))


def test_a_frame_without_stars_is_reported_and_trusts_its_exposure(field, matched):
    frames, measures, _ = some_exposed_longer(field)
    measures[5] = without_stars(measures[5])  # of 20 s
    photometry = field.match(frames, measures)
    assert photometry.unmatched == (5,)
    others = np.delete(np.arange(9), [2, 5, 8])  # of 10 s
    np.testing.assert_allclose(gains(photometry)[5], gains(photometry)[others].mean(axis=0) / 2, rtol=0.1)
    assert len(set(photometry.sky_groups)) == 1  # its sky is matched all the same


def test_without_any_stars_all_frames_are_reported(field):
    photometry = field.match(field.frames, [without_stars(m) for m in field.measures])
    assert photometry.unmatched == tuple(range(9))
    np.testing.assert_allclose(gains(photometry), 1, rtol=1e-12)


# --- weights ---------------------------------------------------------------------------------------------

NOISE = np.array([[10.0, 8.0, 12.0], [20.0, 16.0, 24.0], [10.0, 8.0, 12.0], [5.0, 4.0, 6.0], [10.0, 8.0, 12.0]])
FWHM = np.array([2.5, 2.5, 5.0, 2.5, 2.5])


def test_weight_falls_with_the_square_of_the_noise():
    weight = frame_weights(NOISE, FWHM, "noise_variance")
    np.testing.assert_allclose(weight, np.tile([[1], [0.25], [1], [4], [1]], 3))


def test_weight_falls_with_the_area_a_star_is_spread_over():
    weight = frame_weights(NOISE, FWHM, "noise_fwhm")
    np.testing.assert_allclose(weight, np.tile([[1], [0.25], [0.25], [4], [1]], 3))


def test_all_frames_weigh_the_same():
    np.testing.assert_array_equal(frame_weights(NOISE, FWHM, "none"), np.ones((5, 3)))


@pytest.mark.parametrize("method", ["noise_variance", "noise_fwhm"])
def test_the_typical_frame_weighs_one_in_any_unit(method):
    rng = np.random.default_rng(0)
    noise, fwhm = rng.uniform(5, 50, (21, 3)), rng.uniform(2, 6, 21)
    weight = frame_weights(noise, fwhm, method)
    np.testing.assert_allclose(np.median(weight, axis=0), 1)
    np.testing.assert_allclose(frame_weights(noise * 7, fwhm * 3, method), weight)


def test_an_unknown_fwhm_counts_as_typical():
    unknown = FWHM.copy()
    unknown[[1, 4]] = np.nan
    np.testing.assert_allclose(frame_weights(NOISE, unknown, "noise_fwhm"), frame_weights(NOISE, FWHM, "noise_fwhm"))
    nothing = np.full(5, np.nan)
    np.testing.assert_allclose(
        frame_weights(NOISE, nothing, "noise_fwhm"), frame_weights(NOISE, FWHM, "noise_variance")
    )
