"""The growing mosaic: means of blocks, pictures that appear whole, and seldom enough."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

import zemosaic.live as live_module
from zemosaic.demo import make_field
from zemosaic.events import Event, Events
from zemosaic.live import COVERAGE, PICTURE, LivePreview, coverage_rgba
from zemosaic.settings import Settings
from zemosaic.tiles import Tile, Window
from zemosaic_worker import run_hierarchical_mosaic


class Clock:
    """Time that passes only when it is told to, and a little with every look."""

    def __init__(self) -> None:
        self.now, self.tick = 100.0, 0.0

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def tile_in(window: Window, rng: np.random.Generator, channels: int = 3) -> Tile:
    """Random light and depth; one pixel in four has no data."""
    coverage = rng.integers(1, 9, window.shape).astype(np.float32)
    image = rng.normal(1000, 50, (*window.shape, channels)).astype(np.float32)
    hole = rng.random(window.shape) < 0.25
    coverage[hole], image[hole] = 0, np.nan
    return Tile(window, image if channels == 3 else image[..., 0], coverage)


def read(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("longest", [900, 30])
def test_blocks_hold_the_mean_weighted_by_coverage(tmp_path, monkeypatch, channels, longest):
    monkeypatch.setattr(live_module, "LONGEST_SIDE", longest)
    ny, nx = 61, 95
    step = 1 if longest == 900 else 4
    rng = np.random.default_rng(1)
    tiles = [
        tile_in(box, rng, channels) for box in (Window(0, 61, 0, 40), Window(7, 60, 33, 95), Window(9, 11, 90, 91))
    ]
    live = LivePreview(tmp_path, (ny, nx), Events())
    light, depth = np.zeros((ny, nx, channels)), np.zeros((ny, nx))
    for tile in tiles:
        live.add(tile)
        light[tile.window.slices] += np.nan_to_num(np.atleast_3d(tile.image)) * tile.coverage[..., None]
        depth[tile.window.slices] += tile.coverage
    image, coverage = live.so_far()
    assert image.dtype == coverage.dtype == np.float32
    assert image.shape == coverage.shape + ((3,) if channels == 3 else ())
    assert coverage.shape == (-(-ny // step), -(-nx // step))
    for row, column in np.ndindex(coverage.shape):
        block = np.s_[row * step : (row + 1) * step, column * step : (column + 1) * step]
        assert coverage[row, column] == pytest.approx(depth[block].mean(), rel=1e-5)
        seen = np.atleast_3d(image)[row, column]
        if depth[block].any():
            np.testing.assert_allclose(seen, light[block].sum((0, 1)) / depth[block].sum(), rtol=1e-5)
        else:
            assert np.isnan(seen).all()


def test_pictures_lie_the_same_way_up_and_are_clear_where_nothing_is(tmp_path):
    said: list[Event] = []
    live = LivePreview(tmp_path, (60, 80), Events(said.append))
    live.add(tile_in(Window(0, 20, 0, 30), np.random.default_rng(2)))
    assert [(event.key, event.values["path"]) for event in said] == [("live_preview", tmp_path / PICTURE)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([PICTURE, COVERAGE])
    for name in (PICTURE, COVERAGE):
        clear = read(tmp_path / name)[::-1, :, 3] == 0  # FITS rows go up, those of pictures down
        assert clear.shape == (60, 80)
        assert clear[20:].all() and clear[:, 30:].all()
        assert 0.6 < 1 - clear[:20, :30].mean() < 0.9


def test_depth_goes_from_blue_to_yellow():
    picture = coverage_rgba(np.array([[0, 1], [4, 8]], np.float32))[::-1]
    assert (picture[0, 0] == 0).all()
    assert (picture[[0, 1, 1], [1, 0, 1], 3] == 255).all()
    red, _, blue, _ = picture[1, 1].astype(int)
    assert red > 200 > blue
    red, _, blue, _ = picture[0, 1].astype(int)
    assert blue > red


def test_pictures_come_seldom_and_the_last_one_always(tmp_path):
    said: list[Event] = []
    clock, rng = Clock(), np.random.default_rng(3)
    live = LivePreview(tmp_path, (60, 80), Events(said.append), clock=clock)
    live.draw()
    assert not said  # nothing to draw
    times = []
    for _ in range(100):
        live.add(tile_in(Window(0, 20, 0, 30), rng))
        if len(said) > len(times):
            times.append(clock.now)
        clock.now += 0.5
    assert times[0] == 100
    assert all(3 <= later - earlier <= 3.5 for earlier, later in pairwise(times))
    before = (tmp_path / PICTURE).read_bytes()
    live.draw()
    assert (tmp_path / PICTURE).read_bytes() != before
    drawn = len(said)
    live.draw()
    assert len(said) == drawn  # nothing new


def test_slow_drawing_takes_a_hundredth_of_the_time(tmp_path):
    said: list[Event] = []
    clock, tile = Clock(), tile_in(Window(0, 20, 0, 30), np.random.default_rng(4))
    live = LivePreview(tmp_path, (60, 80), Events(said.append), clock=clock)
    clock.tick = 2.0
    live.add(tile)
    clock.tick = 0.0
    clock.now += 199
    live.add(tile)
    assert len(said) == 1
    clock.now += 1
    live.add(tile)
    assert len(said) == 2


def test_a_new_route_begins_with_nothing(tmp_path):
    live, rng = LivePreview(tmp_path, (60, 80), Events()), np.random.default_rng(5)
    live.add(tile_in(Window(0, 20, 0, 30), rng))
    live.clear()
    second = tile_in(Window(30, 50, 0, 30), rng)
    live.add(second)
    assert live.so_far()[1].sum() == second.coverage.sum()


def test_a_folder_that_takes_no_file_does_no_harm(tmp_path):
    said: list[Event] = []
    live = LivePreview(tmp_path / "gone", (60, 80), Events(said.append))
    live.add(tile_in(Window(0, 20, 0, 30), np.random.default_rng(6)))
    assert not said
    (tmp_path / "gone").mkdir()
    live.draw()
    assert len(said) == 1


def test_a_tile_without_data_is_an_empty_picture(tmp_path):
    window = Window(0, 20, 0, 30)
    empty = Tile(window, np.full(window.shape, np.nan, np.float32), np.zeros(window.shape, np.float32))
    LivePreview(tmp_path, (60, 80), Events()).add(empty)
    assert not read(tmp_path / PICTURE).any()
    assert not read(tmp_path / COVERAGE).any()


@pytest.fixture(scope="module")
def subs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("subs")
    make_field(folder, frames=8, panels=(2, 1), shape=(96, 128), star_density=9000.0, nebula=40.0, trails=0.0)
    return folder


SETTINGS = Settings(
    num_processing_workers=1,
    report=False,
    solver_method="none",
    resume="off",
    sds_min_batch_size=2,
    sds_target_batch_size=4,
)


@pytest.mark.parametrize("sds", [True, False])
def test_a_run_shows_its_tiles_if_someone_looks(subs, tmp_path, sds):
    said: list[Event] = []
    run_hierarchical_mosaic(subs, tmp_path, SETTINGS, sds=sds, progress_callback=said.append, live_preview=True)
    hidden = tmp_path / ".zemosaic"
    assert {event.values["path"] for event in said if event.key == "live_preview"} == {hidden / PICTURE}
    last = read(hidden / PICTURE)
    assert (last[..., 3] > 0).mean() > 0.6  # both panels are there
    assert read(hidden / COVERAGE).shape == last.shape


def test_a_run_that_nobody_looks_at_leaves_no_pictures(subs, tmp_path):
    run_hierarchical_mosaic(subs, tmp_path, SETTINGS, sds=True)
    assert not (tmp_path / ".zemosaic").exists()
