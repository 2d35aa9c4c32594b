"""A known sky is observed, cut up, rebuilt by the whole chain, and compared with what it was.

All fields are small, so that the tests are quick: their mosaics hold some fifteen bright stars, and the photon noise of
those sets most of the limits below.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from typer.testing import CliRunner

import zemosaic_worker
from zemosaic.calibrate import debayer
from zemosaic.cli import app
from zemosaic.demo import FieldTruth, make_field
from zemosaic.events import Events
from zemosaic.intake import scan
from zemosaic.settings import Settings
from zemosaic_worker import run_hierarchical_mosaic

ROOT = Path(__file__).resolve().parents[1]
FIELD = {"panels": (2, 1), "shape": (240, 320), "star_density": 4000, "nebula": 60, "sky": 300}
CLEAN = {"trails": 0, "cosmics": 0, "hot_fraction": 0}
BOX = 16  # px, side of the boxes that the sky is compared in
STAMP = 14  # px, half side of the stamp around a star


@dataclass(frozen=True)
class Rebuilt:
    """A mosaic beside the sky that it should show."""

    product: Path
    truth: FieldTruth

    @cached_property
    def image(self) -> NDArray[np.float64]:
        """``(H, W, C)``."""
        pixels = fits.getdata(self.product).astype(float)
        return np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 else pixels[..., None]

    @cached_property
    def coverage(self) -> NDArray[np.float64]:
        return fits.getdata(self.product, "COVERAGE").astype(float)

    @cached_property
    def wcs(self) -> WCS:
        return WCS(fits.getheader(self.product)).celestial

    @cached_property
    def nebula(self) -> NDArray[np.float64]:
        return np.atleast_3d(self.truth.nebula(self.wcs, self.coverage.shape)).astype(float)

    @cached_property
    def light(self) -> NDArray[np.float64]:
        """Nebula and stars, at the typical seeing of the subs."""
        fwhm = float(np.median([frame.fwhm for frame in self.truth.frames]))
        return np.atleast_3d(self.truth.render(self.wcs, self.coverage.shape, fwhm)).astype(float)

    def stars(self) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Bright, single stars.

        Returns
        -------
        index : ndarray
            ``(n,)`` which stars of the truth they are.
        ratio : ndarray
            ``(n, C)`` flux over true flux.
        distance : ndarray
            ``(n,)`` from the true position, px.
        """
        x, y, index = self.truth.star_pixels(self.wcs, self.coverage.shape, -STAMP - 1)
        flux = self.truth.flux[index].mean(axis=1)
        company = cKDTree(np.c_[x, y]).query_ball_point(np.c_[x, y], STAMP)
        found = []
        for i in np.flatnonzero(flux > 10000):
            row, column = round(y[i]), round(x[i])
            stamp = np.s_[row - STAMP : row + STAMP + 1, column - STAMP : column + STAMP + 1]
            if self.coverage[stamp].min() < 4 or flux[company[i]].sum() > 1.1 * flux[i]:
                continue
            (seen, here), (true, there) = (_flux_and_centroid(p[stamp]) for p in (self.image, self.light))
            found.append((index[i], seen / true, np.hypot(*(here - there))))
        stars, ratios, distances = zip(*found, strict=True)
        return np.array(stars), np.array(ratios), np.array(distances)

    @cached_property
    def scale(self) -> NDArray[np.float64]:
        """``(C,)`` ADU of the mosaic to one ADU of a sub at transparency 1, by the stars."""
        return np.median(self.stars()[1], axis=0)

    @cached_property
    def dark(self) -> NDArray[np.bool_]:
        """``(H, W)`` where next to no starlight falls."""
        return ((self.light - self.nebula).max(axis=2) < 1) & (self.coverage >= 4)

    def nebula_share(self) -> NDArray[np.float64]:
        """``(C,)`` brightness of the nebula in units of its true one, and of the stars'."""
        shares = []
        for c in range(self.image.shape[2]):
            design = np.c_[self._plane[self.dark], self.nebula[..., c][self.dark]]
            shares.append(np.linalg.lstsq(design, self.image[..., c][self.dark], rcond=None)[0][3] / self.scale[c])
        return np.array(shares)

    @cached_property
    def rest(self) -> NDArray[np.float64]:
        """``(H, W, C)`` the picture less its truth, ADU of a sub; the stars are only roughly gone.

        The level and tilt that all frames have in common cannot be known from the frames: a plane is taken off.
        """
        rest = self.image / self.scale - self.light
        rest -= self._plane @ np.linalg.lstsq(self._plane[self.dark], rest[self.dark], rcond=None)[0]
        return rest

    def sky_boxes(self) -> NDArray[np.float64]:
        """``(n, C)`` medians of what is left of the sky in boxes, ADU."""
        ny, nx = (size // BOX for size in self.dark.shape)
        left = np.where(self.dark[..., None], self.rest, np.nan)[: ny * BOX, : nx * BOX]
        boxes = left.reshape(ny, BOX, nx, BOX, -1).swapaxes(1, 2).reshape(ny * nx, BOX**2, -1)
        return np.nanmedian(boxes[np.isfinite(boxes[..., 0]).sum(axis=1) > BOX**2 / 2], axis=1)

    def defects(self) -> float:
        """Share of the sky's pixels that stand out by 7 sigma of what their coverage makes likely."""
        noise = (self.rest * np.sqrt(self.coverage)[..., None])[self.dark]
        return float(np.mean((noise > 7 * robust_scatter(noise)).any(axis=1)))

    @property
    def _plane(self) -> NDArray[np.float64]:
        rows, columns = np.indices(self.coverage.shape)
        return np.stack([np.ones(rows.shape), rows, columns], axis=-1)


def _flux_and_centroid(stamp: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Aperture flux per channel over the ring around it, and windowed centroid of all channels together."""
    y, x = np.mgrid[-STAMP : STAMP + 1, -STAMP : STAMP + 1]
    r = np.hypot(x, y)
    stamp = stamp - np.median(stamp[(r > 10) & (r < 14)], axis=0)
    grey, centre = stamp.sum(axis=2), np.zeros(2)
    for _ in range(15):
        window = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / 4.5) * grey
        centre = centre + 2 * (np.array([(window * y).sum(), (window * x).sum()]) / window.sum() - centre)
    return stamp[r < 7.5].sum(axis=0), centre


def robust_scatter(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1.4826 * np.median(np.abs(values - np.median(values, axis=0)), axis=0)


def sds(inputs: Path | Sequence[Path], out: Path, **settings: object) -> Path:
    """The product of a run, which must be made by the SDS route and no fallback."""
    settings = Settings(**({"num_processing_workers": 1} | settings))
    result = run_hierarchical_mosaic(inputs, out, settings, sds=True)
    assert (result.route, result.exit_status) == ("sds", 0)
    return result.product


@pytest.fixture(scope="session")
def field(tmp_path_factory: pytest.TempPathFactory) -> FieldTruth:
    """24 Bayer subs of two panels: a nebula, hot pixels, cosmic rays, satellites, clouds, moonlight from all sides."""
    return make_field(tmp_path_factory.mktemp("field") / "subs", frames=24, trails=0.25, **FIELD)


@pytest.fixture(scope="session")
def subs(field: FieldTruth) -> Path:
    return field.paths[0].parent


@pytest.fixture(scope="session")
def rebuilt(field: FieldTruth, subs: Path, tmp_path_factory: pytest.TempPathFactory) -> Rebuilt:
    return Rebuilt(sds(subs, tmp_path_factory.mktemp("out")), field)


# --- a known sky rebuilt --------------------------------------------------------------------------------


def assert_rebuilt(rebuilt: Rebuilt) -> None:
    """Colours, photometry, astrometry, sky and nebula of a mosaic are those of the sky that was observed."""
    _, ratio, distance = rebuilt.stars()
    assert len(ratio) >= 10
    assert np.ptp(rebuilt.scale) < 0.02  # the colours are kept
    assert (robust_scatter(ratio / rebuilt.scale) < 0.02).all()
    assert np.abs(ratio / rebuilt.scale - 1).max() < 0.08  # nor was the core of a single one eaten
    assert np.median(distance) < 0.02 and distance.max() < 0.05
    boxes = rebuilt.sky_boxes()
    assert len(boxes) > 300
    assert (boxes.std(axis=0) < 1.5).all() and np.abs(boxes).max() < 6  # the subs' own skies differ by 75 ADU
    np.testing.assert_allclose(rebuilt.nebula_share(), 1, atol=0.05)
    assert rebuilt.defects() < 50e-6


def test_a_known_sky_is_rebuilt(rebuilt):
    """With satellites, hot pixels, cosmic rays and clouds; 0.5 % of the sky is what differing skies may leave."""
    assert_rebuilt(rebuilt)
    _, ratio, _ = rebuilt.stars()
    assert np.abs(ratio / rebuilt.scale - 1).max() < 0.04
    assert (rebuilt.sky_boxes().std(axis=0) < 1).all()
    np.testing.assert_allclose(rebuilt.nebula_share(), 1, atol=0.025)


def test_without_rejection_the_satellites_stay(rebuilt, subs, tmp_path):
    """What the rejection is good for."""
    product = sds(subs, tmp_path, stacking_rejection_algorithm="none", global_coadd_method="mean")
    trailed = Rebuilt(product, rebuilt.truth)
    assert trailed.defects() > 0.01
    assert trailed.sky_boxes().std() > 3 * rebuilt.sky_boxes().std()


def test_without_levels_the_frames_keep_their_own_skies(rebuilt, subs, tmp_path):
    """What the solved gains and levels are good for."""
    patchwork = Rebuilt(sds(subs, tmp_path, stacking_normalize_method="none"), rebuilt.truth)
    assert patchwork.sky_boxes().std() > 10 * rebuilt.sky_boxes().std()


def test_the_ledger_knows_the_transparency_of_every_frame(rebuilt):
    """Gain times transparency is one number: all frames were brought to one scale, that of the typical frame."""
    transparency = {frame.path.name: frame.transparency for frame in rebuilt.truth.frames}
    frames = Table.read(rebuilt.product, "FRAMES")
    assert len(frames) == len(transparency)
    scale = np.array([row["GAIN"] * transparency[row["FILE"]] for row in frames])
    np.testing.assert_allclose(scale, np.broadcast_to(rebuilt.scale, scale.shape), rtol=0.05)


def test_no_data_is_no_data_in_every_image(rebuilt):
    covered = rebuilt.coverage > 0
    np.testing.assert_array_equal(np.isfinite(rebuilt.image).all(axis=2), covered)
    np.testing.assert_array_equal(np.isfinite(rebuilt.image).any(axis=2), covered)
    np.testing.assert_array_equal(fits.getdata(rebuilt.product, "ALPHA") > 0, covered)
    assert 0.5 < covered.mean() < 1


def as_rgb(truth: FieldTruth) -> None:
    """Turn Bayer subs into the colour cubes that other cameras write."""
    for path in truth.paths:
        pixels, header = fits.getdata(path), fits.getheader(path)
        for keyword in ("BAYERPAT", "BZERO", "BSCALE"):
            del header[keyword]
        colour = debayer(pixels.astype(np.float32), truth.recipe.pattern or "")
        fits.writeto(path, np.moveaxis(colour, -1, 0), header, overwrite=True)


@pytest.mark.parametrize(
    ("options", "cubes"),
    [
        pytest.param({"pattern": "RGGB", "center": (10.0, 89.9)}, False, id="RGGB-pole"),
        pytest.param({"pattern": "BGGR", "parity": -1}, False, id="BGGR-mirrored"),
        pytest.param({"pattern": "GBRG", "sip_px": 1.7, "center": (359.9, 72.0)}, False, id="GBRG-sip-ra0-dec72"),
        pytest.param({"pattern": None}, False, id="mono"),
        pytest.param({}, True, id="rgb-cubes"),
    ],
)
def test_any_camera_anywhere_in_the_sky(tmp_path, options, cubes):
    truth = make_field(tmp_path / "subs", frames=12, **FIELD | CLEAN | options)
    if cubes:
        as_rgb(truth)
    rebuilt = Rebuilt(sds(tmp_path / "subs", tmp_path / "out"), truth)
    assert rebuilt.image.shape[2] == truth.flux.shape[1]
    assert fits.getval(rebuilt.product, "NCOMBINE") == 12
    assert_rebuilt(rebuilt)


# --- the same result, however it is made ----------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 24])
def test_stars_do_not_depend_on_the_size_of_the_lots(rebuilt, subs, tmp_path, size):
    """Against lots of 10 and more: 3 mmag, of the 7 that the photon noise makes."""
    other = Rebuilt(sds(subs, tmp_path, sds_min_batch_size=size, sds_target_batch_size=size), rebuilt.truth)
    assert fits.getval(other.product, "NLOTS") == 24 // size != fits.getval(rebuilt.product, "NLOTS")
    stars = [dict(zip(*r.stars()[:2], strict=True)) for r in (rebuilt, other)]
    common = stars[0].keys() & stars[1].keys()
    assert len(common) >= 8
    mmag = np.array([-2500 * np.log10(stars[1][i] / stars[0][i]) for i in common])
    assert (np.abs(np.median(mmag, axis=0)) < 3).all()
    assert (robust_scatter(mmag) < 3).all()


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> FieldTruth:
    """Eight small subs, half of them with a trail."""
    folder = tmp_path_factory.mktemp("few") / "subs"
    return make_field(folder, frames=8, trails=0.5, **FIELD | {"shape": (160, 200), "star_density": 6000})


@pytest.fixture(scope="session")
def expected(few: FieldTruth, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one worker makes of them in three lots."""
    return sds(few.paths, tmp_path_factory.mktemp("out"), **THREE_LOTS)


THREE_LOTS = {"sds_min_batch_size": 2, "sds_target_batch_size": 3, "blur_filter": False}


def content(product: Path, *names: str) -> dict[str, bytes]:
    """The bytes of the data of these HDUs; the first image is called PRIMARY."""
    with fits.open(product) as hdus:
        return {name: hdus[name].data.tobytes() for name in names}


IMAGES = ("PRIMARY", "COVERAGE", "ALPHA")


def test_the_number_of_workers_changes_not_a_bit(few, expected, tmp_path):
    product = sds(few.paths, tmp_path, num_processing_workers=2, **THREE_LOTS)
    assert content(product, *IMAGES, "FRAMES") == content(expected, *IMAGES, "FRAMES")


def test_the_order_of_the_files_changes_not_a_bit(few, expected, tmp_path):
    """Copied in another order to a folder of another name, and given one by one in yet another order."""
    (tmp_path / "elsewhere").mkdir()
    copies = [Path(shutil.copy(path, tmp_path / "elsewhere")) for path in few.paths[::-1]]
    product = sds(copies[::2] + copies[1::2], tmp_path / "out", **THREE_LOTS)
    assert content(product, *IMAGES, "FRAMES") == content(expected, *IMAGES, "FRAMES")


def test_the_names_of_the_files_change_not_a_bit_of_the_picture(few, expected, tmp_path):
    (tmp_path / "subs").mkdir()
    for letter, path in zip("hgfedcba", few.paths, strict=True):
        shutil.copy(path, tmp_path / "subs" / f"été {letter}.fits")
    product = sds(tmp_path / "subs", tmp_path / "out", **THREE_LOTS)
    assert content(product, *IMAGES) == content(expected, *IMAGES)


# --- the command line -----------------------------------------------------------------------------------


def zemosaic(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """``zemosaic`` as a program of its own."""
    command = [sys.executable, "-m", "zemosaic", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_run_with_every_option(few, expected, tmp_path):
    """A camera with a dark and a dusty flat; its masters undo both. Lots from a file, messages in French."""
    shape = few.recipe.shape
    y, x = np.indices(shape)
    flat = (1 - 0.3 * np.hypot(y - shape[0] / 2, x - shape[1] / 2) / 130).astype(np.float32)
    dark = np.random.default_rng(5).uniform(50, 150, shape).astype(np.float32)
    (tmp_path / "subs").mkdir()
    for path in few.paths:
        pixels = np.rint(fits.getdata(path) * flat + dark).clip(0, 65535).astype(np.uint16)
        fits.writeto(tmp_path / "subs" / path.name, pixels, fits.getheader(path))
    fits.writeto(tmp_path / "dark.fits", dark)
    fits.writeto(tmp_path / "flat.fits", 20000 * flat, fits.Header({"BAYERPAT": few.recipe.pattern}))
    lots = [[f"subs/{path.name}" for path in few.paths[part]] for part in (np.s_[:3], np.s_[3:6], np.s_[6:])]
    (tmp_path / "lots.json").write_text(json.dumps(lots))
    (tmp_path / "c.toml").write_text("sds_mode_default = true\nblur_filter = true\noutput_name = 'M 1'\n")

    done = zemosaic(
        *("run", "subs", "-o", "out", "--config", "c.toml", "--set", "blur_filter=false", "--lots", "lots.json"),
        *("--dark", "dark.fits", "--flat", "flat.fits", "--workers", 1, "--memory", 2, "--lang", "fr"),
        folder=tmp_path,
    )

    assert done.returncode == 0, done.stderr
    summary, product = done.stdout.splitlines()
    assert "8 fichiers" in summary
    assert "8 fichiers trouvés." in done.stderr.splitlines()
    assert product == "out/M_1_sds.fits"
    tiles = Table.read(tmp_path / product, "MEGATILES")
    assert list(tiles["FRAMES"]) == [3, 3, 2]
    ratio = fits.getdata(tmp_path / product) / fits.getdata(expected)
    assert np.nanpercentile(ratio / np.nanmedian(ratio), (1, 99)) == pytest.approx((1, 1), abs=0.01)


def test_a_run_without_product_ends_with_status_1(tmp_path):
    (tmp_path / "subs").mkdir()
    done = CliRunner().invoke(app, ["run", str(tmp_path / "subs"), "-o", str(tmp_path / "out"), "--sds"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "No mosaic was made" in done.stderr


def test_a_product_made_by_a_fallback_ends_with_status_3(few, tmp_path, monkeypatch):
    def fail(_: object) -> None:
        raise ValueError("no")

    routes = {"sds": fail, "mosaic-first": zemosaic_worker.ROUTES["sds"]}
    monkeypatch.setattr(zemosaic_worker, "ROUTES", routes)
    monkeypatch.setattr(zemosaic_worker, "routes_for", lambda *_: list(routes))
    subs = [str(path) for path in few.paths[:3]]
    done = CliRunner().invoke(app, ["run", *subs, "-o", str(tmp_path), "--sds", "-q", "--set", "blur_filter=false"])
    assert done.exit_code == 3
    assert fits.getval(done.stdout.splitlines()[-1], "ROUTE") == "mosaic-first"
    assert "sds" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_stops_a_run_at_once_and_leaves_nothing(subs, tmp_path):
    command = [sys.executable, "-m", "zemosaic", "run", str(subs), "-o", str(tmp_path / "out"), "--sds"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "Canvas" in line)
        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        stdout, _ = process.communicate(timeout=20)
        assert time.monotonic() - begun < 5
    assert (process.returncode, stdout) == (130, "")
    # Nothing but what the next run can go on from.
    assert [path.name for path in (tmp_path / "out").glob("*")] in ([], [".zemosaic"])
    assert not list(tmp_path.rglob("*.part"))


# --- real subs ------------------------------------------------------------------------------------------


def test_real_seestar_panels(shared_data, tmp_path):
    """Six gzipped raws with a WCS beside each: all used, and no hole where any of them has data."""
    product = sds(shared_data / "seestar-ngc7023-panels", tmp_path, global_wcs_res_override=4.8)
    frames = Table.read(product, "FRAMES")
    assert len(frames) == 6 and set(frames["STATUS"]) == {"used"}
    image, wcs = fits.getdata(product), WCS(fits.getheader(product)).celestial
    rows, columns = np.mgrid[0 : image.shape[1] : 4, 0 : image.shape[2] : 4]
    ra, dec = wcs.wcs_pix2world(columns, rows, 0)
    inside = np.zeros(rows.shape, bool)
    for frame in scan([shared_data / "seestar-ngc7023-panels"], 1, Events()).frames:
        x, y = frame.wcs.wcs_world2pix(ra, dec, 0)
        ny, nx = frame.shape
        inside |= (x > 8) & (x < nx - 9) & (y > 8) & (y < ny - 9)
    assert inside.mean() > 0.4
    assert np.isfinite(image[:, rows[inside], columns[inside]]).all()
