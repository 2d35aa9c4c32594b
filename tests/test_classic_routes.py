"""The routes without SDS, and the way down the fallback chain: a known sky goes in, and it must come out again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sep
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy.spatial import cKDTree

import zemosaic_sds
import zemosaic_worker
from zemosaic.demo import FieldTruth, make_field
from zemosaic.events import Cancelled, Event
from zemosaic.settings import Settings
from zemosaic.sphere import to_vectors
from zemosaic.tiles import Window
from zemosaic_worker import EXIT_ASKED, EXIT_FALLBACK, RunError, RunResult, run_hierarchical_mosaic
from zequalitymt import tile_metrics

FIELD = {"panels": (2, 1), "frames": 10, "shape": (120, 160), "star_density": 4000, "nebula": 60, "sky": 300}
CLEAN = {"trails": 0, "cosmics": 0, "hot_fraction": 0, "seed": 3}
BOX = 8  # px, side of the boxes that skies are compared in

ROUTES: dict[str, dict[str, Any]] = {
    "reproject": {"route": "master-tiles", "final_assembly_method": "reproject_coadd"},
    "incremental": {"route": "master-tiles", "final_assembly_method": "incremental"},
    "mosaic-first": {"route": "mosaic-first"},
}


@pytest.fixture(scope="session")
def colour(tmp_path_factory: pytest.TempPathFactory) -> FieldTruth:
    """Ten Bayer subs of two panels."""
    return make_field(tmp_path_factory.mktemp("colour") / "subs", **FIELD, **CLEAN)


@pytest.fixture(scope="session")
def mono(tmp_path_factory: pytest.TempPathFactory) -> FieldTruth:
    """Ten mono subs of two panels."""
    return make_field(tmp_path_factory.mktemp("mono") / "subs", pattern=None, **FIELD, **CLEAN)


def quick(**changes: object) -> Settings:
    """One worker; all of the few frames of a tiny field stay."""
    return Settings(**({"num_processing_workers": 1, "blur_filter": False, "resume": "off"} | changes))


def run(subs: FieldTruth | Path, out: Path, heard: list[Event] | None = None, **settings: object) -> RunResult:
    folder = subs if isinstance(subs, Path) else subs.paths[0].parent
    listen = heard.append if heard is not None else None
    return run_hierarchical_mosaic(folder, out, quick(**settings), progress_callback=listen)


@dataclass(frozen=True)
class Picture:
    """What a run left on disk."""

    path: Path

    @cached_property
    def image(self) -> NDArray[np.float64]:
        """``(H, W, C)``."""
        pixels = fits.getdata(self.path).astype(float)
        return np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 else pixels[..., None]

    @cached_property
    def coverage(self) -> NDArray[np.float64]:
        return fits.getdata(self.path, "COVERAGE").astype(float)

    @cached_property
    def header(self) -> fits.Header:
        return fits.getheader(self.path)

    @cached_property
    def wcs(self) -> WCS:
        return WCS(self.header, naxis=2)

    @cached_property
    def frames(self) -> Table:
        return Table.read(self.path, "FRAMES")


@dataclass(frozen=True)
class Likeness:
    """How a picture compares with the sky that it should show, per channel.

    `scale` is its brightness in units of the truth, `boxes` what is left of the boxes (robust scatter, ADU), `outliers`
    the share of boxes that are off by more than ten times that, and `stars` the scatter of the stars' flux ratios.
    """

    scale: NDArray[np.float64]
    boxes: NDArray[np.float64]
    outliers: float
    stars: float


def compare(picture: Picture, truth: FieldTruth) -> Likeness:
    """Boxes against boxes, but for a plane: no set of frames can tell the level and tilt that their skies share."""
    fwhm = float(np.median([frame.fwhm for frame in truth.frames]))
    light = np.atleast_3d(truth.render(picture.wcs, picture.coverage.shape, fwhm)).astype(float)
    seen, true = _boxes(picture.image), _boxes(light)
    whole = np.isfinite(seen).all(axis=2)
    y, x = np.nonzero(whole)
    scale, rest = [], []
    for c in range(seen.shape[2]):
        design = np.c_[true[..., c][whole], np.ones(len(x)), x, y]
        fitted, left = _robust_fit(design, seen[..., c][whole])
        scale.append(fitted[0])
        rest.append(left)
    sigma = np.array([_scatter(left) for left in rest])
    outliers = float(np.mean(np.abs(rest) > 10 * sigma[:, None]))
    return Likeness(np.array(scale), sigma, outliers, _scatter(_star_ratios(picture, light, truth)))


def _boxes(image: NDArray[np.float64]) -> NDArray[np.float64]:
    ny, nx = (size // BOX for size in image.shape[:2])
    return image[: ny * BOX, : nx * BOX].reshape(ny, BOX, nx, BOX, -1).mean(axis=(1, 3))


def _robust_fit(design: NDArray[np.float64], value: NDArray[np.float64]) -> tuple[NDArray, NDArray]:
    """Linear fit without outliers: coefficients, and residuals of all values."""
    keep = np.ones(len(value), bool)
    for _ in range(6):
        fitted = np.linalg.lstsq(design[keep], value[keep], rcond=None)[0]
        left = value - design @ fitted
        keep = np.abs(left) < 4 * _scatter(left)
    return fitted, left


def _scatter(values: NDArray[np.float64]) -> float:
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def _star_ratios(picture: Picture, light: NDArray[np.float64], truth: FieldTruth) -> NDArray[np.float64]:
    """Flux over true flux of bright single stars, all channels together."""
    x, y, index = truth.star_pixels(picture.wcs, picture.coverage.shape, -15)
    flux = truth.flux[index].mean(axis=1)
    alone = [
        flux[near].sum() < 1.1 * f
        for near, f in zip(cKDTree(np.c_[x, y]).query_ball_point(np.c_[x, y], 14), flux, strict=True)
    ]
    good = np.flatnonzero(np.array(alone) & (flux > 5000))
    grey = [np.ascontiguousarray(p.mean(axis=2)) for p in (picture.image, light)]
    seen, true = (sep.sum_circle(np.nan_to_num(p), x[good], y[good], 7.0, bkgann=(9.0, 13.0))[0] for p in grey)
    whole = [
        picture.coverage[round(b) - 14 : round(b) + 15, round(a) - 14 : round(a) + 15].min() > 0
        for a, b in zip(x[good], y[good], strict=True)
    ]
    return (seen / true)[np.array(whole)]


# --- the sky comes back -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def made(colour, mono, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], RunResult]:
    """A run of a field by a route, made only once."""
    results: dict[tuple[str, str], RunResult] = {}

    def make(kind: str, route: str) -> RunResult:
        if (kind, route) not in results:
            field = colour if kind == "colour" else mono
            results[kind, route] = run(field, tmp_path_factory.mktemp(f"{kind}-{route}"), **ROUTES[route])
        return results[kind, route]

    return make


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["colour", "mono"])
def test_every_route_rebuilds_the_known_sky(request, made, kind, route):
    """Photon noise alone would leave 1.1 ADU in a box, and 0.7 % in the flux of a star of 5000 ADU."""
    result = made(kind, route)
    assert (result.route, result.exit_status) == (ROUTES[route]["route"], EXIT_ASKED)
    likeness = compare(Picture(result.product), request.getfixturevalue(kind))
    np.testing.assert_allclose(likeness.scale, 1, atol=0.03)  # mean transparency of the frames
    assert likeness.scale.max() / likeness.scale.min() < 1.02
    assert (likeness.boxes < 2.5).all(), likeness
    assert likeness.outliers < 0.03  # cores of bright stars, rebuilt at another seeing than the truth's
    assert likeness.stars < 0.02


@pytest.mark.parametrize("kind", ["colour", "mono"])
def test_the_assemblies_agree_with_each_other_and_with_mosaic_first(made, kind):
    """The same frames on the same canvas: what differs is one more interpolation, and how outliers are found."""
    pictures = {route: Picture(made(kind, route).product) for route in ROUTES}
    for one, other in combinations(pictures.values(), 2):
        shift = np.rint(other.wcs.wcs_world2pix(one.wcs.wcs_pix2world([[0, 0]], 0), 0)[0]).astype(int)
        assert not shift.any()
        ny, nx = (min(a, b) for a, b in zip(one.coverage.shape, other.coverage.shape, strict=True))
        difference = (one.image[:ny, :nx] - other.image[:ny, :nx])[
            np.minimum(one.coverage[:ny, :nx], other.coverage[:ny, :nx]) > 2.5
        ]
        assert abs(np.median(difference)) < 0.5
        assert _scatter(difference) < 3


@pytest.mark.parametrize("route", ROUTES)
def test_the_ledger_closes(made, colour, route):
    result = made("colour", route)
    assert sorted(record.file for record in result.ledger) == sorted(path.name for path in colour.paths)
    assert result.ledger.counts() == {"used": 10, "partial": 0, "rejected": 0}
    picture = Picture(result.product)
    assert sorted(picture.frames["FILE"]) == sorted(path.name for path in colour.paths)
    assert (picture.header["NCOMBINE"], picture.header["TOTALEXP"]) == (10, 100)
    assert (picture.frames["REJECTED"] < 0.1).all()
    lots = [0] * 5 + [1] * 5 if ROUTES[route]["route"] == "master-tiles" else [-1] * 10
    assert list(picture.frames["LOT"]) == lots


def test_the_product_names_its_route_and_says_nothing_of_sds(made):
    for route, settings in ROUTES.items():
        header = Picture(made("mono", route).product).header
        assert (header["ROUTE"], header["FALLBACK"]) == (settings["route"], "none")
        assert not [card for card in header if card.startswith(("SDS", "NLOTS"))]
        if route != "mosaic-first":
            assert (header["NTILES"], header["ASSEMBLY"]) == (2, settings["final_assembly_method"])


def test_coverage_counts_the_frames(made):
    for route in ROUTES:
        coverage = Picture(made("mono", route).product).coverage
        assert 9.5 < coverage.max() < 10.01  # all frames meet in the overlap
        assert 4 < np.median(coverage[coverage > 0]) < 6


def test_the_result_does_not_depend_on_the_workers(mono, made, tmp_path):
    for route in ROUTES:
        alone = Picture(made("mono", route).product)
        three = Picture(run(mono, tmp_path / route, **ROUTES[route], num_processing_workers=3).product)
        np.testing.assert_array_equal(three.image, alone.image)
        np.testing.assert_array_equal(three.coverage, alone.coverage)


# --- master tiles -----------------------------------------------------------------------------------------


def tiles_of(result: RunResult) -> list[Picture]:
    assert result.product is not None
    return [Picture(path) for path in sorted((result.product.parent / "master_tiles").iterdir())]


def test_master_tiles_lie_beside_the_product(made, colour):
    result = made("colour", "reproject")
    tiles = tiles_of(result)
    assert [tile.path.name for tile in tiles] == ["master_tile_0001.fits", "master_tile_0002.fits"]
    by_panel = [sorted(f.path.name for f in colour.frames if f.panel == panel) for panel in (0, 1)]
    assert [sorted(tile.frames["FILE"]) for tile in tiles] == by_panel
    for tile, panel in zip(tiles, (0, 1), strict=True):
        assert (tile.header["NCOMBINE"], tile.header["TOTALEXP"]) == (5, 50)
        assert tile.coverage.max() == 5
        np.testing.assert_array_equal(np.isnan(tile.image).any(axis=2), tile.coverage == 0)
        middle = tile.wcs.wcs_pix2world([[s / 2 for s in tile.coverage.shape[::-1]]], 0)[0]
        aims = [f.wcs.wcs.crval for f in colour.frames if f.panel == panel]
        assert np.abs(middle - np.mean(aims, axis=0)).max() * 3600 < 40
    megatiles = Table.read(result.product, "MEGATILES")
    assert list(megatiles["FRAMES"]) == [5, 5]


def test_groups_are_split_where_tiles_shall_hold_fewer_frames(colour, tmp_path):
    result = run(colour, tmp_path, **ROUTES["incremental"], max_raw_per_master_tile=3)
    tiles = tiles_of(result)
    assert [tile.header["NCOMBINE"] for tile in tiles] == [3, 2, 3, 2]
    names = list(chain(*(tile.frames["FILE"] for tile in tiles)))
    assert sorted(names) == sorted(path.name for path in colour.paths)
    likeness = compare(Picture(result.product), colour)
    assert (likeness.boxes < 2.5).all() and likeness.stars < 0.02


def test_the_border_is_cut_off_as_configured(mono, made, tmp_path):
    cut = tiles_of(made("mono", "reproject"))
    whole = tiles_of(run(mono, tmp_path, **ROUTES["reproject"], apply_master_tile_crop=False))
    for small, large in zip(cut, whole, strict=True):
        assert small.coverage.shape == tuple(n - 2 * int(n * 0.03) for n in large.coverage.shape)


def test_a_second_run_leaves_the_tiles_of_the_first_alone(mono, tmp_path):
    first = run(mono, tmp_path, **ROUTES["incremental"])
    before = {tile.path: tile.path.read_bytes() for tile in tiles_of(first)}
    run(mono, tmp_path, **ROUTES["incremental"], max_raw_per_master_tile=2)
    assert {path: path.read_bytes() for path in before} == before


def test_a_tile_that_the_gate_rejects_lists_its_frames(mono, made, tmp_path):
    """A threshold between the scores of the two tiles: the poorer one goes, and the books name its frames."""
    tiles = tiles_of(made("mono", "reproject"))
    scores = [
        tile_metrics(tile.image[..., 0].astype(np.float32), tile.coverage.astype(np.float32), 20).score
        for tile in tiles
    ]
    gate = {"quality_gate_enabled": True, "quality_gate_edge_band_px": 20, "quality_gate_threshold": np.mean(scores)}
    heard: list[Event] = []
    result = run(mono, tmp_path, heard, **ROUTES["reproject"], **gate)
    poor = int(np.argmin(scores))
    assert scores[poor] < scores[1 - poor]
    rejected = {record.file: record.reason for record in result.ledger if record.status == "rejected"}
    assert sorted(rejected) == sorted(tiles[poor].frames["FILE"])
    assert all(f"master tile {poor + 1} was rejected: score" in reason for reason in rejected.values())
    assert result.ledger.counts()["used"] == 5
    (warning,) = [event for event in heard if event.key == "run_warn_tile_rejected"]
    assert "score" in warning.text
    assert [tile.path.name for tile in tiles_of(result)] == [f"master_tile_{2 - poor:04d}.fits"]
    assert Picture(result.product).coverage.max() == 5


# --- ready master tiles -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FieldTruth]:
    """Ready tiles of another program, without coverage: the second one dimmer and under another, tilted sky."""
    folder = tmp_path_factory.mktemp("uneven")
    wide = {"frames": 2, "shape": (240, 300), "overlap": 0.5, "pattern": None}
    truth = make_field(folder / "subs", **(FIELD | wide))
    (folder / "tiles").mkdir()
    rng = np.random.default_rng(5)
    for k, (gain, level, tilt) in enumerate([(1.0, 500, 0), (0.8, 630, 40)]):
        wcs, (ny, nx) = truth.frames[k].wcs, truth.recipe.shape
        noise = rng.normal(0, 5, (ny, nx))
        pixels = gain * (truth.render(wcs, (ny, nx), 3.0) + noise) + level + tilt * np.linspace(-0.5, 0.5, nx)
        fits.writeto(folder / "tiles" / f"tile_{k}.fits", pixels.astype(np.float32), wcs.to_header())
    return folder / "tiles", truth


@pytest.mark.parametrize("method", ["reproject_coadd", "incremental"])
def test_ready_tiles_of_different_gain_and_sky_are_matched(uneven, tmp_path, method):
    """The gain to 1 %; the noise of 5 ADU a pixel leaves 0.6 ADU in a box."""
    tiles, truth = uneven
    result = run(tiles, tmp_path, use_existing_master_tiles=True, final_assembly_method=method)
    assert (result.route, len(result.ledger.used)) == ("master-tiles", 2)
    assert not (tmp_path / "master_tiles").exists()
    picture = Picture(result.product)
    gains = np.asarray(picture.frames["GAIN"])
    assert gains[1] / gains[0] == pytest.approx(1 / 0.8, rel=0.01)
    likeness = compare(picture, truth)
    assert (likeness.boxes < 1.2).all(), likeness
    assert likeness.stars < 0.015


def test_ready_tiles_that_are_not_matched_show_their_seams(uneven, tmp_path):
    """What the matching is good for: without it the same tiles make a poor mosaic."""
    tiles, truth = uneven
    settings = {"use_existing_master_tiles": True, "intertile_photometric_match": False}
    likeness = compare(Picture(run(tiles, tmp_path, **settings).product), truth)
    assert (likeness.boxes > 6).all()


@pytest.mark.parametrize("kind", ["colour", "mono"])
def test_a_folder_of_our_own_master_tiles_makes_the_same_mosaic_again(request, made, kind, tmp_path):
    first = made(kind, "reproject")
    again = run(first.product.parent / "master_tiles", tmp_path, use_existing_master_tiles=True)
    assert sorted(record.file for record in again.ledger.used) == ["master_tile_0001.fits", "master_tile_0002.fits"]
    picture = Picture(again.product)
    likeness = compare(picture, request.getfixturevalue(kind))
    assert (likeness.boxes < 2.5).all() and likeness.stars < 0.02
    assert 9.5 < picture.coverage.max() < 10.01


# --- real tiles: M17 in the 2MASS survey ------------------------------------------------------------------


@pytest.fixture(scope="session")
def m17(shared_data: Path) -> Path:
    return shared_data / "m17-2mass"


@pytest.fixture(scope="session", params=["reproject_coadd", "incremental"])
def m17_mosaic(m17, request, tmp_path_factory: pytest.TempPathFactory) -> Picture:
    settings = {"use_existing_master_tiles": True, "final_assembly_method": request.param}
    return Picture(run(m17, tmp_path_factory.mktemp("m17"), **settings).product)


def border_steps(picture: Picture, aside: int = 0, side: int = 6) -> float:
    """Median step of level across the lines where the coverage changes, or that far aside of them, ADU.

    Means of `side` px on either side, less the slope that the next means show; a step towards more tiles counts
    positive, so that a seam adds up along its border and noise, stars and nebula do not.
    """
    steps = []
    for image, coverage in ((picture.image[..., 0], picture.coverage), (picture.image[..., 0].T, picture.coverage.T)):
        depth = np.rint(coverage)
        rows, columns = np.nonzero((depth[:, 1:] != depth[:, :-1]) & (depth[:, 1:] > 0) & (depth[:, :-1] > 0))
        sign = np.sign(depth[rows, columns + 1] - depth[rows, columns])
        inside = (columns + aside >= 3 * side) & (columns + aside < image.shape[1] - 3 * side)
        rows, at, sign = rows[inside], columns[inside] + aside + 1, sign[inside]
        total = np.pad(np.cumsum(np.nan_to_num(image), axis=1), ((0, 0), (1, 0)))
        before2, before, after, after2 = (
            (total[rows, at + k + side] - total[rows, at + k]) / side for k in (-2 * side, -side, 0, side)
        )
        steps.append(sign * ((after - before) - ((before - before2) + (after2 - after)) / 2))
    return float(np.median(np.concatenate(steps)))


def test_steps_at_the_borders_of_real_tiles_vanish_in_the_noise(m17_mosaic):
    """The noise of a pixel is 4 ADU. Lines beside the borders show what nebula and stars do to the measure."""
    controls = [abs(border_steps(m17_mosaic, aside)) for aside in (-25, -15, 15, 25)]
    assert abs(border_steps(m17_mosaic)) < max(0.6, 1.5 * max(controls))


def test_real_tiles_keep_their_zero_points(m17, m17_mosaic):
    """The survey's own calibration says that these tiles are on one scale: gains from their stars must agree."""
    zero = {path.name: fits.getheader(path)["MAGZP"] for path in m17.glob("*.fits.gz")}
    expected = np.array([10 ** (-0.4 * zero[name]) for name in m17_mosaic.frames["FILE"]])
    ratio = np.asarray(m17_mosaic.frames["GAIN"]) / expected
    np.testing.assert_allclose(ratio / ratio.mean(), 1, atol=0.02)


def test_photometry_holds_across_real_tiles(m17, m17_mosaic):
    """Stars that two tiles share, once the gains are applied: the same flux to 2 % (and twice the error of that)."""
    gains = dict(zip(m17_mosaic.frames["FILE"], m17_mosaic.frames["GAIN"], strict=True))
    stars = {name: _tile_stars(m17 / name) for name in gains}
    compared = 0
    for one, other in combinations(gains, 2):
        (place, flux), (there, theirs) = stars[one], stars[other]
        distance, match = cKDTree(there).query(place)
        ratio = np.log(theirs[match] / flux)[distance < np.deg2rad(1.5 / 3600)]
        if len(ratio) < 5:
            continue
        error = 1.25 * _scatter(ratio) / np.sqrt(len(ratio))
        assert abs(np.median(ratio) + np.log(gains[other] / gains[one])) < 0.02 + 2 * error, (one, other)
        compared += 1
    assert compared >= 4


def _tile_stars(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions (unit vectors) and aperture fluxes of the stars of a real tile that are bright, single and whole."""
    pixels, header = fits.getdata(path, header=True)
    holes = np.isnan(pixels)
    pixels = np.ascontiguousarray(np.where(holes, np.nanmedian(pixels), pixels), np.float32)
    sky = sep.Background(pixels, bw=32, bh=32)
    found = sep.extract(pixels - sky.back(), 8, err=sky.globalrms, mask=holes)
    flux, error, _ = sep.sum_circle(pixels, found["x"], found["y"], 6.0, err=sky.globalrms, bkgann=(9.0, 14.0))
    inside = (np.abs(found["x"] - 255.5) < 240) & (np.abs(found["y"] - 511.5) < 496)
    good = inside & (flux > 40 * error) & (found["peak"] < 15000) & (found["flag"] == 0)
    return to_vectors(*WCS(header).wcs_pix2world(found["x"][good], found["y"][good], 0)), flux[good]


def test_all_of_the_real_tiles_is_in_the_mosaic(m17, m17_mosaic):
    """Tiles and mosaic have pixels of 1 arcsec: coverage adds up to their number, but for the rims."""
    valid = sum(int(np.isfinite(fits.getdata(path)).sum()) for path in m17.glob("*.fits.gz"))
    assert 0.98 * valid < m17_mosaic.coverage.sum() < valid
    np.testing.assert_array_equal(np.isnan(m17_mosaic.image[..., 0]), m17_mosaic.coverage == 0)


def test_a_real_tile_of_another_gain_and_sky_is_matched(m17, tmp_path):
    """One of the four made dimmer, under a brighter sky: its gain comes back, and no step is left at its borders."""
    spoilt = sorted(m17.glob("*.fits.gz"))[2]
    (tmp_path / "tiles").mkdir()
    for path in m17.glob("*.fits.gz"):
        (tmp_path / "tiles" / path.name).symlink_to(path)
    (tmp_path / "tiles" / spoilt.name).unlink()
    pixels, header = fits.getdata(spoilt, header=True)
    fits.writeto(tmp_path / "tiles" / spoilt.stem, (0.8 * pixels + 170).astype(np.float32), header)
    settings = {"use_existing_master_tiles": True, "final_assembly_method": "incremental"}
    picture = Picture(run(tmp_path / "tiles", tmp_path / "out", **settings).product)
    gains = np.asarray(picture.frames["GAIN"]) * np.where(picture.frames["FILE"] == spoilt.stem, 0.8, 1)
    np.testing.assert_allclose(gains / gains.mean(), 1, atol=0.03)
    assert abs(border_steps(picture)) < 1


# --- fallback: every step of the chain, broken in every way -----------------------------------------------


STEPS = ("plan_lots", "build_megatile", "renormalise_gains", "stack_megatiles", "polish")
ERRORS = (ValueError("the step broke"), MemoryError(), zemosaic_sds.SdsError("the step gave up"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> FieldTruth:
    """Four mono subs of one panel: for runs that only have to fail."""
    small = {"panels": (1, 1), "frames": 4, "shape": (80, 100), "pattern": None, "star_density": 8000}
    return make_field(tmp_path_factory.mktemp("tiny") / "subs", **(FIELD | small), **CLEAN)


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def fall(tiny: FieldTruth, out: Path, **settings: object) -> tuple[RunResult, list[Event]]:
    heard: list[Event] = []
    settings = {"sds_min_batch_size": 2, "sds_target_batch_size": 2} | settings
    return run(tiny, out, heard, route="sds", **settings), heard


def leftovers(out: Path) -> list[Path]:
    """Everything below a folder that no run should leave: half-written files, and folders that hold nothing."""
    found = sorted(out.rglob("*")) if out.exists() else []
    return [p for p in found if p.suffix == ".part" or p.name[0] == "." or (p.is_dir() and not any(p.iterdir()))]


def assert_fell_to(route: str, result: RunResult, heard: list[Event], *reasons: str) -> None:
    """The product is whole and sound; product, status and log name the route and the reasons."""
    assert (result.route, result.exit_status) == (route, EXIT_FALLBACK)
    assert route in result.summary
    picture = Picture(result.product)
    assert result.product.stem.endswith(f"_{route}")
    assert picture.header["ROUTE"] == route
    assert picture.header["FALLBACK"].startswith("sds: ")
    history = " ".join(str(picture.header["HISTORY"]).split())
    errors = [event.text for event in heard if event.kind == "error"]
    for reason in reasons:
        assert reason in history
        assert any(reason in text for text in errors)
    assert [event.key for event in heard].count("run_warn_fallback") == len(errors) == len(reasons)
    assert result.ledger.counts()["used"] == len(result.ledger) == 4
    assert np.isfinite(picture.image).mean() > 0.5
    np.testing.assert_array_equal(np.isnan(picture.image[..., 0]), picture.coverage == 0)
    assert not leftovers(result.product.parent)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_sds_that_raises_ends_in_mosaic_first(tiny, tmp_path, monkeypatch, step, error):
    monkeypatch.setattr(zemosaic_sds, step, raising(error))
    assert_fell_to("mosaic-first", *fall(tiny, tmp_path), str(error) or "MemoryError")


def test_a_fallback_makes_what_its_route_makes(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(zemosaic_sds, "stack_megatiles", raising(ValueError("broken")))
    fallen, _ = fall(tiny, tmp_path / "fallen")
    asked = run(tiny, tmp_path / "asked", route="mosaic-first")
    np.testing.assert_array_equal(Picture(fallen.product).image, Picture(asked.product).image)


def nan_of(step: Callable[..., Any], without_coverage: bool) -> Callable[..., Any]:
    """A step that does its work and then loses all of its pixels, or all of its gains."""

    def spoil(*arguments: Any, **options: Any) -> Any:
        made = step(*arguments, **options)
        if isinstance(made, zemosaic_sds.Gains):
            return replace(made, gains=tuple(np.nan for _ in made.gains))
        picture = made[0] if isinstance(made, tuple) else made
        picture.image[:] = np.nan
        if without_coverage:
            picture.coverage[:] = 0
        return made

    return spoil


NOTHING: dict[str, tuple[str, Any, str]] = {
    "no lots": ("plan_lots", [], "no lot has a frame"),
    "no plan": ("plan_lots", None, "NoneType"),
    "no mega-tile": ("build_megatile", None, "no lot has a frame"),
    "no gains": ("renormalise_gains", None, "NoneType"),
    "no mosaic": ("stack_megatiles", None, "NoneType"),
    "no picture": ("polish", None, "NoneType"),
}


@pytest.mark.parametrize(("step", "value", "reason"), NOTHING.values(), ids=NOTHING)
def test_a_step_of_sds_that_gives_nothing_usable_ends_in_mosaic_first(tiny, tmp_path, monkeypatch, step, value, reason):
    monkeypatch.setattr(zemosaic_sds, step, lambda *_, **__: value)
    assert_fell_to("mosaic-first", *fall(tiny, tmp_path), reason)


@pytest.mark.parametrize("without_coverage", [False, True])
@pytest.mark.parametrize("step", ["build_megatile", "renormalise_gains", "stack_megatiles", "polish"])
def test_a_step_of_sds_that_gives_nan_everywhere_ends_in_mosaic_first(
    tiny, tmp_path, monkeypatch, step, without_coverage
):
    monkeypatch.setattr(zemosaic_sds, step, nan_of(getattr(zemosaic_sds, step), without_coverage))
    assert_fell_to("mosaic-first", *fall(tiny, tmp_path), "no valid pixel")


@pytest.fixture
def broken_mosaic_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDS and Mosaic-First fail: of the classic routes only the latter stacks onto the whole canvas."""
    stack = zemosaic_worker.stack_subs

    def stack_tiles_only(*arguments: Any, **options: Any) -> Any:
        if any(isinstance(argument, Window) for argument in (*arguments, *options.values())):
            raise MemoryError("the canvas is too large")
        return stack(*arguments, **options)

    monkeypatch.setattr(zemosaic_sds, "plan_lots", raising(ValueError("no plan")))
    monkeypatch.setattr(zemosaic_worker, "stack_subs", stack_tiles_only)


@pytest.mark.usefixtures("broken_mosaic_first")
@pytest.mark.parametrize("method", ["reproject_coadd", "incremental"])
def test_where_mosaic_first_fails_as_well_master_tiles_are_made(tiny, tmp_path, method):
    result, heard = fall(tiny, tmp_path, final_assembly_method=method)
    assert_fell_to("master-tiles", result, heard, "no plan", "the canvas is too large")
    assert Picture(result.product).header["ASSEMBLY"] == method
    assert len(tiles_of(result)) == 1


LAST = ("cluster_frames", "stack_subs", "save_master_tile", "match_tiles", "read_master_tile", "assemble")


@pytest.mark.usefixtures("broken_mosaic_first")
@pytest.mark.parametrize("step", LAST)
def test_when_every_route_fails_the_run_says_so_and_leaves_nothing_half_written(tiny, tmp_path, monkeypatch, step):
    monkeypatch.setattr(zemosaic_worker, step, raising(OSError(f"{step} broke")))
    heard: list[Event] = []
    with pytest.raises(RunError, match=rf"sds: no plan; mosaic-first: .*; master-tiles: .*{step} broke"):
        run(tiny, tmp_path / "out", heard, route="sds")
    assert heard[-1].kind == "failed"
    assert not leftovers(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.fits"))


def test_a_route_that_was_asked_for_falls_only_to_those_behind_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(zemosaic_worker, "assemble", raising(ValueError("broken")))
    with pytest.raises(RunError, match=r"\(master-tiles: broken\)"):
        run(tiny, tmp_path, route="master-tiles")


@pytest.mark.parametrize("step", STEPS)
def test_a_stop_during_sds_is_no_failure(tiny, tmp_path, monkeypatch, step):
    monkeypatch.setattr(zemosaic_sds, step, raising(Cancelled()))
    heard: list[Event] = []
    with pytest.raises(Cancelled):
        run(tiny, tmp_path / "out", heard, route="sds")
    assert not {"run_warn_fallback", "run_error_route_failed"} & {event.key for event in heard}
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("step", ["stack_subs", "match_tiles", "assemble"])
def test_a_stop_during_the_classic_routes_is_no_failure(tiny, tmp_path, monkeypatch, step):
    monkeypatch.setattr(zemosaic_worker, step, raising(Cancelled()))
    heard: list[Event] = []
    with pytest.raises(Cancelled):
        run(tiny, tmp_path / "out", heard, route="mosaic-first" if step == "stack_subs" else "master-tiles")
    assert "run_warn_fallback" not in {event.key for event in heard}
    assert not leftovers(tmp_path / "out")
