"""The SDS chain, step by step: lots → mega-tiles → gain renormalisation → global stack → polish."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from zemosaic.calibrate import NO_REPAIRS, Calibration
from zemosaic.canvas import Canvas
from zemosaic.coadd import Sub
from zemosaic.demo import make_field, tangent_header
from zemosaic.events import Event, Events
from zemosaic.frames import Frame
from zemosaic.intake import match, measure_all, place, scan
from zemosaic.job import Workbench
from zemosaic.levels import Adjustment
from zemosaic.settings import Settings, SettingsError, settings_from
from zemosaic.store import ArrayStore
from zemosaic.tiles import Mosaic, Tile, Window, alpha_of
from zemosaic.warp import PixelMap
from zemosaic_sds import (
    Lot,
    SdsError,
    SdsResult,
    assemble_global_mosaic_sds,
    build_megatile,
    choose_reference,
    plan_lots,
    polish,
    renormalise_gains,
    shared_ratio,
    stack_lot,
    stack_megatiles,
)

SKY = 1000.0


class Heard(list[Event]):
    """A listener that remembers everything a step says."""

    @property
    def events(self) -> Events:
        return Events(self.append)

    def of_kind(self, kind: str) -> list[str]:
        return [event.key for event in self if event.kind == kind]

    def values(self, key: str) -> dict:
        (event,) = [event for event in self if event.key == key]
        return dict(event.values)


@pytest.fixture
def heard() -> Heard:
    return Heard()


def canvas_of(shape: tuple[int, int]) -> Canvas:
    wcs = WCS(tangent_header(359.95, 71.3, shape, scale=2.39))
    wcs.pixel_shape = shape[::-1]
    return Canvas(wcs, shape, 2.39)


# --- lots -------------------------------------------------------------------------------------------------


def sub_at(box: Window, path: str | Path = "sub.fit") -> Sub:
    """A frame whose pixels lie exactly on the canvas pixels of `box`."""
    (ny, nx), one = box.shape, np.ones(1)
    step = max(ny, nx)
    y, x = np.mgrid[0:2, 0:2] * float(step)
    frame = Frame(Path(path), box.shape, "mono")
    adjustment = Adjustment(box, one, np.zeros((1, 3)))
    return Sub(frame, NO_REPAIRS, PixelMap(box, step, x, y, 0.0), adjustment, one, one)


def panel(k: int) -> Window:
    """One of several panels side by side, none of which overlap."""
    return Window(0, 30, 30 * k, 30 * (k + 1))


def lots_of(frames: Sequence[Window | Sub], **settings: float) -> list[tuple[int, ...]]:
    subs = [sub_at(each, f"{i}.fit") if isinstance(each, Window) else each for i, each in enumerate(frames)]
    return [lot.members for lot in plan_lots(subs, canvas_of((120, 120)), Settings(**settings), Events())]


def sizes(frames: Sequence[Window | Sub], **settings: float) -> list[int]:
    return [len(lot) for lot in lots_of(frames, **settings)]


def test_a_lot_closes_at_five_frames_that_cover_the_field():
    assert sizes([panel(0)] * 20) == [5, 5, 5, 5]


def test_a_lot_closes_at_ten_frames_however_little_they_cover():
    assert sizes([panel(0)] * 20 + [panel(1)] * 10) == [10, 10, 10]


def test_a_lot_waits_for_the_frames_that_complete_its_coverage():
    # Frames 0 to 6 see one panel; the 8th sees the other, and with it everything is covered.
    assert sizes([panel(0)] * 7 + [panel(1)] * 6) == [8, 5]


@pytest.mark.parametrize(("rows", "first"), [(88, 7), (96, 5)])
def test_92_percent_of_the_union_is_enough(rows, first):
    """Of 100 rows the first frames see 88 or 96; the 7th sees them all."""
    boxes = [Window(0, rows, 0, 100)] * 6 + [Window(0, 100, 0, 100)] * 6
    assert sizes(boxes)[0] == first


def test_coverage_counts_the_union_footprint_not_the_canvas():
    """Two panels in opposite corners cover all of the field and a ninth of the canvas around them."""
    corners = [Window(0, 25, 0, 25), Window(95, 120, 95, 120)]
    assert sizes(corners * 6) == [5, 7]


def test_coverage_counts_the_frames_not_their_windows():
    """A frame turned by 45 degrees covers half of its window: five of them do not cover what the sixth covers."""
    box = Window(0, 60, 0, 60)
    y, x = np.mgrid[0:2, 0:2] * 60.0
    diamond = PixelMap(box, 60, x - y + 21.2, x + y - 38.8, 0.0)
    turned = replace(sub_at(box), frame=Frame(Path("turned.fit"), (42, 42), "mono"), pixel_map=diamond)
    assert sizes([turned] * 5 + [box] * 6) == [6, 5]


@pytest.mark.parametrize(
    ("frames", "expected"),
    [(1, [1]), (4, [4]), (5, [5]), (9, [9]), (10, [5, 5]), (12, [5, 7]), (14, [5, 9]), (15, [5, 5, 5])],
)
def test_a_short_tail_joins_the_last_lot(frames, expected):
    assert sizes([panel(0)] * frames) == expected


def test_a_tail_that_is_long_enough_is_a_lot_although_it_covers_little():
    assert sizes([panel(0)] * 10 + [panel(1)] * 5 + [panel(0)] * 1 + [panel(1)] * 6) == [10, 6, 6]


def test_a_lot_may_be_a_single_frame():
    assert sizes([panel(0)] * 3, sds_min_batch_size=1, sds_target_batch_size=1) == [1, 1, 1]
    assert sizes([panel(0), panel(1)] * 2, sds_min_batch_size=1, sds_target_batch_size=10) == [2, 2]


@pytest.mark.parametrize("size", [0, -1])
def test_a_lot_of_no_frames_is_refused_by_the_settings(size):
    with pytest.raises(SettingsError, match="sds_min_batch_size"):
        settings_from({"sds_min_batch_size": size})


def test_no_frames_make_no_lots():
    assert lots_of([]) == []


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.integers(1, 8),
    st.integers(0, 8),
    st.sampled_from([0.1, 0.4, 0.6, 0.92]),
)
def test_the_rules_of_the_checklist_hold_for_any_run(panels, least, more, threshold):
    target = least + more
    lots = lots_of(
        [panel(k) for k in panels],
        sds_min_batch_size=least,
        sds_target_batch_size=target,
        sds_coverage_threshold=threshold,
    )

    def complete(members: Sequence[int]) -> bool:
        share = len({panels[i] for i in members}) / len(set(panels))
        return len(members) >= target or (len(members) >= least and share >= threshold)

    assert list(chain(*lots)) == list(range(len(panels)))  # every frame once, in order
    for lot in lots[:-1]:
        assert complete(lot)
    for lot in lots[:-1]:
        assert not any(complete(lot[:n]) for n in range(1, len(lot)))  # closed as soon as it was complete
    last = lots[-1]
    first = next((n for n in range(1, len(last)) if complete(last[:n])), len(last))
    assert len(last) - first < least  # what joined it was too short for a lot
    assert len(last) >= min(least, len(panels))


# --- lots that are given


def planned(heard: Heard, names: Sequence[str], groups: Sequence[Sequence[str | Path]], folder: Path) -> list[Lot]:
    subs = [sub_at(panel(0), folder / name) for name in names]
    groups = [[Path(path) for path in group] for group in groups]
    return plan_lots(subs, canvas_of((120, 120)), Settings(), heard.events, groups)


def test_given_lots_are_used_as_they_are_and_the_rest_is_planned(heard, tmp_path):
    names = [f"{i}.fit" for i in range(9)]
    lots = planned(heard, names, [[tmp_path / "7.fit"], [tmp_path / "2.fit", tmp_path / "0.fit"]], tmp_path)
    assert lots == [Lot((7,), True), Lot((2, 0), True), Lot((1, 3, 4, 5, 6, 8))]
    assert heard.values("sds_lots_planned") == {"lots": 3, "preplan": 3, "planned": 6}


def test_lots_for_all_frames_leave_nothing_to_plan(heard, tmp_path):
    assert planned(heard, ["a", "b"], [[tmp_path / "b"], [tmp_path / "a"]], tmp_path) == [
        Lot((1,), True),
        Lot((0,), True),
    ]
    assert heard.values("sds_lots_planned")["planned"] == 0


def test_frames_are_matched_by_their_raw_path_not_their_name(heard, tmp_path):
    """The same name in two nights' folders: only the path tells the frames apart."""
    lots = planned(heard, ["monday/1.fit", "tuesday/1.fit"], [[tmp_path / "tuesday/1.fit"]], tmp_path)
    assert lots == [Lot((1,), True), Lot((0,))]


def test_relative_paths_and_links_name_the_same_frame(heard, tmp_path, monkeypatch):
    (tmp_path / "subs").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "subs" / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "subs" / "b")
    monkeypatch.chdir(tmp_path)
    lots = planned(heard, ["a", "b", "c"], [["subs/a", tmp_path / "link", "subs/../subs/c"]], tmp_path / "subs")
    assert lots == [Lot((0, 1, 2), True)]


def test_paths_that_match_no_frame_are_counted_and_named(heard, tmp_path):
    unknown = [tmp_path / f"gone{i}.fit" for i in range(5)]
    lots = planned(heard, ["a", "b"], [[tmp_path / "a", *unknown[:4]], unknown[4:]], tmp_path)
    assert lots == [Lot((0,), True), Lot((1,))]
    told = heard.values("sds_preplan_unmatched")
    assert told["n"] == 5
    assert str(unknown[0]) in told["examples"]


def test_a_frame_that_is_given_twice_is_used_once(heard, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    assert planned(heard, ["a", "b"], [[a, a], [a, b]], tmp_path) == [Lot((0,), True), Lot((1,), True)]
    assert heard.values("sds_lots_planned")["preplan"] == 2


# --- gains ------------------------------------------------------------------------------------------------


def tile_at(
    box: Window, image: NDArray | float, coverage: NDArray | float = 1.0, weight: NDArray | float | None = None
) -> Tile:
    """A mono mega-tile; numbers fill it, and where the coverage is 0 there is no data."""

    def full(value: NDArray | float) -> NDArray[np.float32]:
        return np.broadcast_to(np.asarray(value, np.float32), box.shape).copy()

    image, coverage = full(image), full(coverage)
    image[coverage == 0] = np.nan
    return Tile(box, image, coverage, None if weight is None else full(weight))


WHOLE = Window(0, 100, 0, 100)
LEFT, RIGHT = Window(0, 100, 0, 60), Window(0, 100, 40, 100)  # 20 columns are shared
STRIP = [Window(0, 100, 80 * k, 80 * k + 100) for k in range(4)]  # a row of tiles, each overlapping the next only


@pytest.mark.parametrize("scope", ["shared", "tile"])
def test_gain_is_the_reference_median_over_the_own_median(scope):
    tiles = [tile_at(WHOLE, 1000, 3), tile_at(WHOLE, 800), tile_at(WHOLE, 1250), tile_at(WHOLE, 1000)]
    gains = renormalise_gains(tiles, scope)
    assert gains.reference == 0
    assert gains.gains == pytest.approx((1, 1.25, 0.8, 1))
    assert gains.medians == (1000, 800, 1250, 1000)
    assert gains.replaced == gains.isolated == ()


def test_medians_see_only_covered_pixels():
    """Outside its coverage a tile holds no data; a bright corner is no business of the median either."""
    image = np.full((100, 100), 500.0)
    image[:30, :30] = 60000
    coverage = np.ones((100, 100))
    coverage[:, 70:] = 0
    tiles = [tile_at(WHOLE, 1000, 3), tile_at(WHOLE, image, coverage)]
    for scope in ("shared", "tile"):
        assert renormalise_gains(tiles, scope).gains == pytest.approx((1, 2))


def test_scopes_differ_where_the_tiles_see_different_sky():
    """Both tiles have the same gain 2 apart, but the right one also sees a nebula five times the sky."""
    light = np.full((100, 60), 500.0)
    light[:, 20:] = 2500
    tiles = [tile_at(LEFT, 1000, 3), tile_at(RIGHT, light)]
    assert renormalise_gains(tiles, "shared").gains == pytest.approx((1, 2))
    assert renormalise_gains(tiles, "tile").gains == pytest.approx((1, 0.4))


def test_medians_of_whole_tiles_mistake_a_brighter_sky_for_a_gain():
    """Sky of 1500 instead of 1000 and equal transparency: scope "tile" makes the stars 0.44 mag too faint."""
    brighter = np.full((100, 60), 1500.0)
    brighter[:, :20] = 1000  # what the two tiles share is the same sky, at the same level
    tiles = [tile_at(LEFT, 1000, 3), tile_at(RIGHT, brighter)]
    _, wrong = renormalise_gains(tiles, "tile").gains
    assert wrong == pytest.approx(1000 / 1500)
    assert -2.5 * np.log10(wrong) == pytest.approx(0.44, abs=0.005)
    assert renormalise_gains(tiles, "shared").gains == (1, 1)


def test_shared_scope_carries_gains_along_a_chain():
    """A-B-C-D, where only neighbours overlap, each tile half as bright as the one before it."""
    tiles = [tile_at(box, SKY / 2**k, 3 if k == 0 else 1) for k, box in enumerate(STRIP)]
    gains = renormalise_gains(tiles, "shared")
    assert gains.gains == pytest.approx((1, 2, 4, 8))
    assert gains.isolated == ()


def test_a_chain_starts_at_its_reference_wherever_that_lies():
    tiles = [tile_at(box, SKY / 2**k, 9 if k == 2 else 1) for k, box in enumerate(STRIP)]
    gains = renormalise_gains(tiles, "shared")
    assert (gains.reference, gains.gains) == (2, pytest.approx((0.25, 0.5, 1, 2)))


def test_a_tile_that_meets_two_others_listens_to_each_by_the_pixels_they_share():
    """Where it meets the left one it is as bright, where it meets the right one 10 % fainter: 15 columns against 5."""
    left, right, middle = Window(0, 150, 0, 80), Window(0, 150, 120, 200), Window(0, 100, 65, 125)
    reference = Window(100, 200, 0, 200)  # meets the left and the right one, but not the one in the middle
    fainter = np.where(np.arange(65, 125) < 100, SKY, 0.9 * SKY)
    tiles = [tile_at(reference, SKY, 9), tile_at(left, SKY), tile_at(right, SKY), tile_at(middle, fainter)]
    gains = renormalise_gains(tiles, "shared").gains
    assert gains[:3] == (1, 1, 1)
    assert np.log(gains[3]) == pytest.approx(np.log(1 / 0.9) * 5 / 20)


def test_a_tile_without_overlap_gets_the_ratio_of_whole_tiles_and_is_named():
    tiles = [tile_at(STRIP[0], 1000, 3), tile_at(STRIP[1], 500), tile_at(STRIP[3], 800)]
    gains = renormalise_gains(tiles, "shared")
    assert gains.gains == pytest.approx((1, 2, 1.25))
    assert gains.isolated == (2,)
    assert renormalise_gains(tiles, "tile").isolated == ()


def test_windows_that_overlap_without_a_shared_pixel_are_no_overlap():
    coverage = np.ones((100, 100))
    coverage[:, 50:] = 0
    tiles = [tile_at(WHOLE, 1000, 3 * coverage), tile_at(WHOLE, 500, 1 - coverage)]
    assert renormalise_gains(tiles, "shared").isolated == (1,)


def test_a_thin_overlap_still_counts():
    tiles = [tile_at(Window(0, 100, 0, 51), 1000, 3), tile_at(Window(0, 100, 50, 100), 500)]
    assert renormalise_gains(tiles, "shared").gains == pytest.approx((1, 2))


@pytest.mark.parametrize("scope", ["shared", "tile"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -700.0])
def test_no_gain_that_is_not_finite_and_positive_is_ever_applied(value, scope):
    tiles = [tile_at(WHOLE, 1000, 3), tile_at(WHOLE, value), tile_at(WHOLE, 500)]
    gains = renormalise_gains(tiles, scope)
    assert gains.gains == (1, 1, 2)
    assert gains.replaced == (1,)


@pytest.mark.parametrize("scope", ["shared", "tile"])
@pytest.mark.parametrize("value", [np.nan, 0.0, -700.0])
def test_a_reference_without_a_usable_median_leaves_every_tile_as_it_is(value, scope):
    tiles = [tile_at(WHOLE, value, 3), tile_at(WHOLE, 1000), tile_at(WHOLE, 500)]
    gains = renormalise_gains(tiles, scope)
    assert gains.reference == 0
    assert gains.gains == (1, 1, 1)
    assert set(gains.replaced) >= {1, 2}


def reference_of(tiles: Sequence[Tile]) -> int:
    reference = choose_reference([tile.window for tile in tiles], [float(tile.coverage.sum()) for tile in tiles])
    assert renormalise_gains(tiles, "shared").reference == reference
    return reference


def test_the_reference_has_the_greatest_coverage_weight():
    """Neither the largest tile nor the deepest pixel: the sum of the coverage counts."""
    large, deep = tile_at(Window(0, 100, 0, 100), SKY, 2), np.ones((60, 60))
    deep[:20] = 15
    assert reference_of([large, tile_at(Window(0, 60, 0, 60), SKY, deep)]) == 1
    assert reference_of([large, tile_at(Window(0, 60, 0, 60), SKY, 5)]) == 0
    assert reference_of([large, large, large]) == 0


def test_without_coverage_the_central_tile_is_the_reference_or_else_the_first():
    assert reference_of([tile_at(box, SKY, 0) for box in STRIP[:3]]) == 1
    assert reference_of([tile_at(WHOLE, SKY, 0)] * 3) == 0


def nebula(noise: float, seed: int) -> Tile:
    """The same bright nebula on the same sky, seen with more or less noise."""
    y, x = np.mgrid[0:400, 0:400]
    light = SKY + 4000 * np.exp(-np.hypot(x - 200, y - 200) / 40)
    rng = np.random.default_rng(seed)
    return tile_at(Window(0, 400, 0, 400), light + rng.normal(0, noise, light.shape), 10 / max(noise, 1))


def test_a_noisy_tile_of_a_nebula_gets_the_same_gain_as_a_clean_one():
    clean, noisy = nebula(1, 0), nebula(60, 1)
    plain = np.median(clean.image) / np.median(noisy.image)
    assert abs(plain - 1) > 0.01  # what a median over single pixels makes of the noise
    assert renormalise_gains([clean, noisy], "shared").gains == pytest.approx((1, 1), abs=1e-3)


def test_the_shared_ratio_is_that_of_the_common_pixels():
    coverage = np.ones((100, 60))
    coverage[:50] = 0
    left, right = tile_at(LEFT, 1000), tile_at(RIGHT, 700, coverage)
    assert shared_ratio(left, right) == (pytest.approx(10 / 7), 50 * 20)
    assert shared_ratio(right, left) == (pytest.approx(7 / 10), 50 * 20)
    assert shared_ratio(tile_at(STRIP[0], 1), tile_at(STRIP[2], 1))[1] == 0


def test_large_tiles_are_compared_by_boxes_that_both_cover_wholly():
    """Tiles at any offset meet in the canvas's grid of boxes; a box that is half covered does not count."""
    rng = np.random.default_rng(11)
    sky = SKY + 300 * rng.random((460, 460))
    bare = np.ones((400, 400))
    bare[100:117, 200:] = 0
    one = sky[:400, :400].copy()
    one[100:117, 200:] = 9e4  # where nothing counts
    tiles = [tile_at(Window(0, 400, 0, 400), one, bare), tile_at(Window(39, 439, 27, 427), sky[39:439, 27:427] / 1.3)]
    ratio, pixels = shared_ratio(*tiles)
    assert ratio == pytest.approx(1.3, abs=1e-4) and pixels == 361 * 373 - 17 * 200
    gains = renormalise_gains(tiles, "shared").gains  # the second is the reference: it is covered wholly
    assert gains == pytest.approx((1 / 1.3, 1), abs=1e-4)


def test_a_steep_nebula_under_two_thin_stacks_makes_no_gain():
    """Sorted apart, each stack's median lies on another place of the slope; box by box they agree."""
    off = [abs(renormalise_gains([nebula(60, 2 * i), nebula(60, 2 * i + 1)], "shared").gains[1] - 1) for i in range(5)]
    assert max(off) < 1e-3


def test_a_sky_about_zero_tells_no_gain():
    rng = np.random.default_rng(3)
    tiles = [tile_at(WHOLE, rng.normal(0, 5, (100, 100))) for _ in range(2)]
    made = renormalise_gains(tiles, "shared")
    assert made.gains == (1, 1) or made.isolated


# --- global stack -----------------------------------------------------------------------------------------


def bench_of(settings: Settings, **means: Any) -> Workbench:
    return Workbench(**({"events": Events(), "store": ArrayStore(1 << 30)} | means), settings=settings)


def stack(tiles: Sequence[Tile], gains: Sequence[float] | None = None, *, workers: int = 1, **settings: object):
    canvas = canvas_of((100, 160))
    settings = Settings(**({"global_coadd_method": "mean"} | settings))
    gains = gains or [1.0] * len(tiles)
    sky = np.array([SKY])
    return stack_megatiles(tiles, gains, canvas, sky, bench_of(settings, workers=workers))


def noisy_tile(box: Window, level: float = SKY, coverage: float = 5, seed: int = 0) -> Tile:
    noise = np.random.default_rng(seed).normal(0, 20 / np.sqrt(coverage), box.shape)
    return tile_at(box, level + noise, coverage)


def test_tiles_are_weighted_by_their_coverage_pixel_by_pixel():
    depth = np.ones((100, 100))
    depth[50:] = 9
    mosaic = stack([tile_at(WHOLE, 100, 1), tile_at(WHOLE, 120, depth)])
    np.testing.assert_allclose(mosaic.image[:50, :100], 110, rtol=1e-6)
    np.testing.assert_allclose(mosaic.image[50:, :100], (100 + 9 * 120) / 10, rtol=1e-6)
    np.testing.assert_array_equal(mosaic.coverage[:50, :100], 2)
    np.testing.assert_array_equal(mosaic.coverage[50:, :100], 10)


def test_cloudy_frames_cover_a_pixel_but_weigh_little():
    mosaic = stack([tile_at(WHOLE, 100, 4), tile_at(WHOLE, 120, 4, weight=1)])
    assert mosaic.image[5, 5] == pytest.approx(104)
    assert mosaic.coverage[5, 5] == 8


def test_gains_multiply():
    mosaic = stack([tile_at(WHOLE, 100, 1), tile_at(WHOLE, 80, 1)], gains=(1, 1.25))
    np.testing.assert_allclose(mosaic.image[:, :100], 100, rtol=1e-6)


def test_nothing_there_is_nothing_everywhere():
    mosaic = stack([tile_at(WHOLE, 100)])
    assert np.isnan(mosaic.image[:, 100:]).all()
    assert not mosaic.coverage[:, 100:].any() and not mosaic.alpha[:, 100:].any()
    assert (mosaic.alpha[:, :100] == 255).all()


@pytest.mark.parametrize("method", ["mean", "median", "kappa_sigma", "winsorized"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_stay_float32(method, channels):
    tiles = [noisy_tile(WHOLE, seed=seed) for seed in range(3)]
    if channels == 3:
        tiles = [replace(t, image=np.stack([t.image] * 3, axis=-1)) for t in tiles]
    mosaic = stack_megatiles(
        tiles,
        [1.0, np.float64(1.01), 0.99],
        canvas_of((100, 100)),
        np.full(channels, SKY),
        bench_of(Settings(global_coadd_method=method)),
    )
    assert mosaic.image.shape == ((100, 100, 3) if channels == 3 else (100, 100))
    assert (mosaic.image.dtype, mosaic.coverage.dtype, mosaic.alpha.dtype) == (np.float32, np.float32, np.uint8)


def test_the_median_ignores_what_a_mean_follows():
    tiles = [tile_at(WHOLE, value) for value in (100, 101, 400)]
    assert stack(tiles).image[0, 0] == pytest.approx(601 / 3)
    assert stack(tiles, global_coadd_method="median").image[0, 0] == 101


@pytest.mark.parametrize("method", ["kappa_sigma", "winsorized"])
def test_a_trail_in_one_of_two_tiles_is_rejected(method):
    """A faint trail, 8 sigma of its own tile, which held too few frames to notice it."""
    clean, crossed = noisy_tile(WHOLE, coverage=6, seed=1), noisy_tile(WHOLE, coverage=5, seed=2)
    trail = np.s_[48:52, :100]
    crossed.image[trail] += 8 * 20 / np.sqrt(5)
    assert np.mean(stack([clean, crossed]).image[trail]) - SKY > 30  # what a plain mean leaves of it
    mosaic = stack([clean, crossed], global_coadd_method=method, global_coadd_k=3.0)
    assert abs(np.mean(mosaic.image[trail]) - SKY) < 2
    assert np.mean(mosaic.coverage[trail] == 6) > 0.98  # the frames that are left there
    assert np.mean(np.delete(mosaic.coverage[:, :100], trail[0], axis=0) == 11) > 0.98


def test_the_shallower_of_two_tiles_gives_way():
    deep, shallow = noisy_tile(WHOLE, coverage=20, seed=1), noisy_tile(WHOLE, coverage=2, seed=2)
    for bad, left in ((shallow, 20), (deep, 20)):
        tiles = [replace(t, image=t.image + np.float32(200)) if t is bad else t for t in (deep, shallow)]
        mosaic = stack(tiles, global_coadd_method="kappa_sigma", global_coadd_k=3.0)
        assert np.mean(mosaic.coverage[:, :100] == left) > 0.99


def test_levels_are_not_matched_here():
    """Two tiles that really differ by 30 ADU keep their step: background matching belongs to the lots."""
    low, high = noisy_tile(LEFT, SKY, seed=1), noisy_tile(Window(0, 100, 40, 160), SKY + 30, seed=2)
    mosaic = stack([low, high])
    assert np.mean(mosaic.image[:, :40]) == pytest.approx(SKY, abs=1)
    assert np.mean(mosaic.image[:, 40:60]) == pytest.approx(SKY + 15, abs=1)
    assert np.mean(mosaic.image[:, 60:]) == pytest.approx(SKY + 30, abs=1)


def test_the_tiles_are_only_read():
    tiles = [noisy_tile(LEFT, seed=1), noisy_tile(RIGHT, seed=2)]
    before = [(t.image.copy(), t.coverage.copy()) for t in tiles]
    stack(tiles, gains=(1, 2), global_coadd_method="kappa_sigma")
    for tile, (image, coverage) in zip(tiles, before, strict=True):
        np.testing.assert_array_equal(tile.image, image)
        np.testing.assert_array_equal(tile.coverage, coverage)


# --- polish -----------------------------------------------------------------------------------------------

STEPS = {
    "two_pass_coverage_renorm": "two_pass",
    "quality_crop_enabled": "quality_crop",
    "altaz_cleanup_enabled": "altaz_cleanup",
    "global_wcs_autocrop_enabled": "autocrop",
}
STAR = (210, 333)  # where a picture for the polish has its only star


def picture(colour: bool = True) -> Mosaic:
    """Ten frames deep with a narrow rim of one, a noisy band at one side, one bright pixel, no data around."""
    coverage = np.zeros((480, 640), np.float32)
    coverage[62:418, 82:578] = 1
    coverage[70:410, 90:570] = 10
    noise = 20 / np.sqrt(np.maximum(coverage, 1))
    noise[70:140] *= 4
    image = SKY + noise[..., None] * np.random.default_rng(3).standard_normal((*coverage.shape, 3))
    image[STAR] += 5000
    image[coverage == 0] = np.nan
    image = image.astype(np.float32)
    wcs = canvas_of(coverage.shape).wcs
    return Mosaic(image if colour else image[..., 1], coverage, alpha_of(coverage), wcs)


def steps(heard: Heard) -> list[str]:
    """Steps of the polish that spoke up, in order."""
    return [key.partition("_")[2] for key in heard.of_kind("info")]


@pytest.mark.parametrize("colour", [True, False])
def test_the_steps_of_the_polish_come_in_the_order_of_the_checklist(heard, colour):
    _, history = polish(picture(colour), Settings(**dict.fromkeys(STEPS, True)), heard.events)
    assert steps(heard) == ["coverage_cut", *STEPS.values()]
    assert list(history) == [event.text for event in heard]


@pytest.mark.parametrize("only", STEPS)
def test_each_step_can_be_switched_on_alone(heard, only):
    polish(picture(), Settings(**(dict.fromkeys(STEPS, False) | {only: True})), heard.events)
    assert steps(heard) == ["coverage_cut", STEPS[only]]


def test_with_everything_off_the_picture_stays_what_it_was():
    mosaic = picture()
    polished, _ = polish(mosaic, Settings(sds_min_coverage_keep=0, **dict.fromkeys(STEPS, False)), Events())
    assert polished is mosaic


def test_the_coverage_cut_takes_the_thin_rim_and_says_how_much(heard):
    mosaic = picture()
    before = mosaic.coverage.copy()
    rim = before == 1
    polished, _ = polish(mosaic, Settings(**dict.fromkeys(STEPS, False)), heard.events)
    assert heard[0].values["n"] == rim.sum()
    assert np.isnan(polished.image[rim]).all()
    assert not polished.coverage[rim].any() and not polished.alpha[rim].any()
    np.testing.assert_array_equal(polished.coverage[~rim], before[~rim])


@pytest.mark.parametrize("only", [*STEPS, None])
def test_image_coverage_alpha_and_wcs_stay_in_step(heard, only):
    """After any of the steps, and after all of them, the star is where the WCS says it is."""
    mosaic = picture()
    switches = dict.fromkeys(STEPS, only is None) | ({only: True} if only else {})
    polished, _ = polish(mosaic, Settings(global_wcs_autocrop_margin_px=7, **switches), heard.events)
    covered = polished.coverage > 0
    np.testing.assert_array_equal(np.isfinite(polished.image).all(axis=-1), covered)
    np.testing.assert_array_equal(polished.alpha > 0, covered)
    y, x = np.unravel_index(np.nanargmax(polished.image[..., 0]), polished.shape)
    back = mosaic.wcs.wcs_world2pix(*polished.wcs.wcs_pix2world(x, y, 0), 0)
    np.testing.assert_allclose(back, STAR[::-1], atol=1e-6)
    if only in (None, "quality_crop_enabled", "global_wcs_autocrop_enabled"):
        assert polished.shape < mosaic.shape
        assert polished.wcs.pixel_shape == polished.shape[::-1]


def test_the_polish_leaves_the_levels_of_a_flat_sky_alone(heard):
    mosaic = picture()
    polished, _ = polish(mosaic, Settings(), heard.events)
    box = heard[-1].values
    window = np.s_[box["y0"] : box["y0"] + box["height"], box["x0"] : box["x0"] + box["width"]]
    kept = polished.coverage > 0
    np.testing.assert_array_equal(polished.image[kept], mosaic.image[window][kept])


# --- the chain on real files ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What the chain gets from the steps before it."""

    subs: list[Sub]
    canvas: Canvas
    sky: NDArray[np.float64]
    settings: Settings


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Twelve small Bayer subs of two panels, matched and ready for the route, which makes two lots of them."""
    folder = tmp_path_factory.mktemp("subs")
    make_field(folder, panels=(2, 1), frames=12, shape=(160, 200), star_density=6000, nebula=40, trails=0, sky=300)
    settings = Settings(num_processing_workers=1, sds_target_batch_size=6, blur_filter=False)
    intake = scan([folder], 1, Events())
    canvas = place(intake, settings, Events(), budget=1 << 33, output_folder=Path(__file__).parent)
    measure_all(intake, Calibration(), settings, 1, Events())
    subs, photometry = match(intake, canvas, settings, 1, Events())
    return Job(subs, canvas, photometry.sky, settings)


@pytest.fixture
def assemble(job: Job, heard: Heard) -> Callable[..., SdsResult]:
    """The whole chain on the small field, with anything changed."""

    def run(
        subs: Sequence[Sub] | None = None,
        store: ArrayStore | None = None,
        *,
        workers: int = 1,
        preplan_path_groups: Sequence[Sequence[Path]] | None = None,
    ) -> SdsResult:
        return assemble_global_mosaic_sds(
            job.subs if subs is None else subs,
            job.canvas,
            job.sky,
            bench_of(job.settings, events=heard.events, store=store or ArrayStore(1 << 30), workers=workers),
            preplan_path_groups,
        )

    return run


def test_the_chain_reads_like_its_name(assemble, heard):
    made = assemble()
    assert heard.of_kind("phase") == ["phase_lots", "phase_gains", "phase_stack", "phase_polish"]
    assert [len(report.lot.members) for report in made.lots] == [6, 6]
    assert made.mosaic.image.dtype == made.mosaic.coverage.dtype == np.float32
    assert np.nanmax(made.mosaic.coverage) == 12


def test_the_log_tells_every_lot_and_the_gains(assemble, heard):
    made = assemble()
    lots = [event for event in heard if event.key == "sds_lot_done"]
    assert all(event.kind == "info" for event in lots)
    assert [(e.values["index"], e.values["lots"], e.values["frames"]) for e in lots] == [(1, 2, 6), (2, 2, 6)]
    assert all(e.values["seconds"] > 0 for e in lots)
    gains = made.gains
    reference = heard.values("sds_reference")
    assert reference == {"index": gains.reference + 1, "median": gains.medians[gains.reference]}
    told = heard.values("sds_gains")
    assert (told["min"], told["max"]) == (min(gains.gains), max(gains.gains))
    assert f"{made.gains.gains[1 - gains.reference]:.4f}" in told["examples"]


def test_matched_lots_need_only_a_trim(assemble):
    """The frames come in on one photometric scale: the renormalisation has next to nothing left to do."""
    assert assemble().gains.gains == pytest.approx((1, 1), abs=0.01)


def test_every_pixel_of_every_frame_is_used_or_rejected(assemble, job):
    for report in assemble().lots:
        for i, used, rejected in zip(report.lot.members, report.used, report.rejected, strict=True):
            ny, nx = job.subs[i].frame.shape
            assert 0.95 * ny * nx < used + rejected <= 1.02 * ny * nx
            assert rejected < 0.03 * used


def test_memory_mapped_tiles_and_many_workers_make_the_same_mosaic(assemble, tmp_path):
    expected = assemble().mosaic
    with ArrayStore(0, tmp_path) as store:
        mosaic = assemble(store=store, workers=3).mosaic
    np.testing.assert_array_equal(mosaic.image, expected.image)
    np.testing.assert_array_equal(mosaic.coverage, expected.coverage)
    assert not list(tmp_path.iterdir())


def test_the_own_plan_given_as_lots_makes_the_same_mosaic(assemble, job):
    planned = assemble()
    groups = [[job.subs[i].frame.path for i in report.lot.members] for report in planned.lots]
    mosaic = assemble(preplan_path_groups=groups).mosaic
    np.testing.assert_array_equal(mosaic.image, planned.mosaic.image)


def missing(sub: Sub) -> Sub:
    return replace(sub, frame=replace(sub.frame, path=sub.frame.path.with_name("gone.fit")))


def test_a_frame_that_has_gone_is_named_and_the_lot_goes_on(job):
    subs = [missing(sub) if i == 2 else sub for i, sub in enumerate(job.subs)]
    bench = bench_of(job.settings)
    made = build_megatile(stack_lot(Lot((1, 2, 3)), subs, job.sky, bench), bench.store)
    assert made is not None
    tile, report = made
    assert list(report.lost) == [2]
    assert "No such file" in report.lost[2]
    assert report.used[1] == report.rejected[1] == 0
    assert report.used[0] > 0 and report.used[2] > 0
    assert tile.coverage.max() == 2


def test_no_frames_are_a_failure_that_says_so(assemble):
    with pytest.raises(SdsError, match="no lot"):
        assemble([])


def test_lots_whose_frames_have_all_gone_are_a_failure(assemble, job):
    with pytest.raises(SdsError, match="no lot has a frame that can be used"):
        assemble([missing(sub) for sub in job.subs[:3]])


def test_one_lot_that_has_gone_costs_only_itself(assemble, job):
    made = assemble([missing(sub) for sub in job.subs[:6]] + list(job.subs[6:]))
    assert [report.lot.members for report in made.lots] == [(6, 7, 8, 9, 10, 11)]
    assert len(made.gains.gains) == 1


def test_a_mosaic_without_a_single_pixel_is_a_failure(assemble, job, tmp_path):
    empty = tmp_path / "empty.fit"
    first = job.subs[0]
    header = fits.getheader(first.frame.path)
    del header["BZERO"], header["BSCALE"]
    fits.writeto(empty, np.full(first.frame.shape, np.nan, np.float32), header)
    nothing = replace(first, frame=replace(first.frame, path=empty), repairs=NO_REPAIRS)
    with pytest.raises(SdsError, match="no valid pixel"):
        assemble([nothing] * 3)
