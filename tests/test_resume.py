"""What a run has finished is used again by the next, if and only if nothing that went into it has changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from astropy.io.fits import FITSDiff
from astropy.wcs import WCS
from typer.testing import CliRunner

import zemosaic_worker
from zemosaic import carry, intake
from zemosaic.cache import Cache
from zemosaic.calibrate import Calibration
from zemosaic.cli import app
from zemosaic.demo import FieldTruth, make_field
from zemosaic.events import Event, Events
from zemosaic.frames import read_frame
from zemosaic.job import Job
from zemosaic.measure import FrameMeasure, measure_frame
from zemosaic.resume import STACK_SETTINGS, Results, flatten, rebuild
from zemosaic.settings import Settings
from zemosaic.stacking import stack_subs
from zemosaic.stars import Aperture
from zemosaic_worker import RunResult, run_hierarchical_mosaic

TINY = {"panels": (1, 1), "shape": (96, 128), "star_density": 9000, "nebula": 30, "trails": 0, "sky": 300}
LOTS: dict[str, Any] = {"sds_min_batch_size": 3, "sds_target_batch_size": 3, "max_raw_per_master_tile": 3}
FIXED: dict[str, Any] = {"num_processing_workers": 1, "blur_filter": False, "report": False}
#: What may differ: when it was, and how long it took.
IGNORED = {"ignore_keywords": ["DATE", "CHECKSUM", "DATASUM"], "ignore_fields": ["SECONDS"]}


@pytest.fixture(scope="session")
def field(tmp_path_factory: pytest.TempPathFactory) -> FieldTruth:
    """Nine tiny subs; tests only read them."""
    return make_field(tmp_path_factory.mktemp("field") / "subs", frames=9, **TINY)


@pytest.fixture(scope="session")
def subs(field: FieldTruth) -> Path:
    return field.paths[0].parent


@pytest.fixture
def own_subs(subs: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(subs, tmp_path / "subs")
    return tmp_path / "subs"


class Run(RunResult):
    """A run's result, with how many results of earlier runs it used."""

    measures: int
    tiles: int


def run(subs: Path, out: Path, *, sds: bool = True, **changes: Any) -> Run:
    heard: list[Event] = []
    result = run_hierarchical_mosaic(
        subs, out, Settings(**(FIXED | LOTS | changes)), sds=sds, progress_callback=heard.append
    )
    used = next((event.values for event in heard if event.key == "run_info_reused"), {"measures": 0, "tiles": 0})
    object.__setattr__(result, "measures", used["measures"])
    object.__setattr__(result, "tiles", used["tiles"])
    return result  # type: ignore[return-value]


def same(a: RunResult, b: RunResult) -> bool:
    """Same pixels, coverage, alpha, books and cards, to the last bit."""
    return bool(FITSDiff(str(a.product), str(b.product), **IGNORED).identical)


@pytest.fixture(scope="session")
def fresh(subs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder after one run of three lots; tests copy it."""
    out = tmp_path_factory.mktemp("fresh") / "out"
    assert run(subs, out).tiles == 0
    return out


@pytest.fixture
def out(fresh: Path, tmp_path: Path) -> Path:
    shutil.copytree(fresh, tmp_path / "out")
    return tmp_path / "out"


# --- used again -------------------------------------------------------------------------------------------------


def test_a_second_run_uses_everything_and_makes_the_same_bytes(subs, out):
    again = run(subs, out)
    assert (again.measures, again.tiles) == (9, 3)
    again_without = run(subs, out, resume="off")
    assert (again_without.measures, again_without.tiles) == (0, 0)
    assert same(again, again_without)


def test_neither_memory_nor_workers_are_part_of_a_key(subs, out):
    assert run(subs, out, num_processing_workers=2, memory_gb=0.01).tiles == 3


def test_force_keeps_beyond_the_limit_and_auto_does_not(subs, tmp_path):
    for mode, kept in (("auto", 0), ("force", 3)):
        run(subs, tmp_path / mode, resume=mode, resume_cache_gb=0)
        assert run(subs, tmp_path / mode).tiles == kept


def test_off_keeps_nothing(subs, tmp_path):
    run(subs, tmp_path / "out", resume="off")
    assert not (tmp_path / "out" / ".zemosaic").exists()


@pytest.mark.parametrize("route", ["mosaic-first", "master-tiles"])
def test_the_classic_routes_resume_too(subs, tmp_path, route):
    first = run(subs, tmp_path, sds=None, route=route)
    again = run(subs, tmp_path, sds=None, route=route)
    assert (again.measures, again.tiles) == (9, 3 if route == "master-tiles" else 1)
    assert same(first, again)


def test_a_result_may_come_from_another_output_folder(subs, fresh, tmp_path):
    (tmp_path / "new").mkdir()
    shutil.copytree(fresh / ".zemosaic", tmp_path / "new" / ".zemosaic")
    assert run(subs, tmp_path / "new").tiles == 3


def test_frames_may_be_moved_and_renamed(subs, out, tmp_path):
    shutil.copytree(subs, tmp_path / "elsewhere", copy_function=shutil.copy2)
    assert run(tmp_path / "elsewhere", out).tiles == 3


def test_clean_removes_what_is_kept(subs, out):
    done = CliRunner().invoke(app, ["clean", str(out)])
    assert done.exit_code == 0 and ".zemosaic" in done.output
    assert not (out / ".zemosaic").exists() and list(out.glob("*.fits"))
    assert run(subs, out).tiles == 0


# --- and not used again -----------------------------------------------------------------------------------------

MEASURES, TILES = 9, 3
#: Setting → what of the measures and of the mega-tiles may still be used.
TOUCHED: dict[str, tuple[Any, int, int]] = {
    "output_name": ("other", MEASURES, TILES),
    "global_coadd_method": ("mean", MEASURES, TILES),
    "stacking_rejection_algorithm": ("kappa_sigma", MEASURES, 0),
    "stacking_kappa_low": (2.5, MEASURES, 0),
    "stacking_final_combine_method": ("median", MEASURES, 0),
    "stacking_weighting_method": ("none", MEASURES, 0),
    "stacking_normalize_method": ("sky_mean", MEASURES, 0),
    "global_wcs_res_override": (2.5, MEASURES, 0),
    "sds_target_batch_size": (5, MEASURES, 0),
    "hot_pixel_sigma": (3.0, 0, 0),
    "hot_pixel_correction": (False, 0, 0),
}


@pytest.mark.parametrize("name", TOUCHED)
def test_a_setting_redoes_exactly_what_depends_on_it(subs, out, name):
    value, measures, tiles = TOUCHED[name]
    again = run(subs, out, **{name: value})
    assert (again.measures, again.tiles) == (measures, tiles)
    assert again.measures == measures


def test_a_changed_setting_makes_the_bytes_of_a_fresh_run(subs, out, tmp_path):
    changes = {"stacking_weighting_method": "noise_fwhm", "stacking_kappa_low": 2.0}
    assert same(run(subs, out, **changes), run(subs, tmp_path / "clean", resume="off", **changes))


@pytest.mark.parametrize("master", ["dark", "flat"])
def test_other_master_frames_redo_everything(subs, out, tmp_path, master):
    value = 3.0 if master == "dark" else np.linspace(0.9, 1.1, 128)
    fits.writeto(tmp_path / "m.fits", np.full((96, 128), value, np.float32))
    again = run(subs, out, **{f"master_{master}_path": str(tmp_path / "m.fits")})
    assert (again.measures, again.tiles) == (0, 0)


def test_a_frame_with_other_pixels_is_measured_again(own_subs, tmp_path, monkeypatch):
    monkeypatch.setattr(intake, "probe_aperture", lambda *_, **__: Aperture())  # which follows the frames
    out = tmp_path / "out"
    run(own_subs, out)
    path = sorted(own_subs.iterdir())[4]
    pixels, header = fits.getdata(path, header=True)
    fits.writeto(path, pixels + np.uint16(7), header, overwrite=True)
    again = run(own_subs, out)
    assert again.measures == 8
    assert same(again, run(own_subs, tmp_path / "clean", resume="off"))


def test_a_sidecar_with_another_wcs_redoes_the_tiles_only(own_subs, field, tmp_path):
    out = tmp_path / "out"
    run(own_subs, out)
    cards = field.frames[2].cards.copy()
    cards["CRVAL2"] += 2 / 3600
    fits.PrimaryHDU(header=cards).writeto(own_subs / f"{field.paths[2].stem}.wcs.fits")
    again = run(own_subs, out)
    assert (again.measures, again.tiles) == (9, 0)
    assert same(again, run(own_subs, tmp_path / "clean", resume="off"))


def test_other_code_uses_nothing_of_the_old(subs, out, monkeypatch):
    monkeypatch.setattr("zemosaic.resume.code_version", lambda module: f"another {module}")
    assert run(subs, out).measures == 0


@pytest.mark.parametrize("kind", ["measures", "tiles", "aperture"])
def test_damaged_results_are_made_again(subs, out, kind):
    first = next(out.glob("*.fits"))
    for path in (out / ".zemosaic" / "results" / kind).iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2 :: 99] = bytes(len(data[len(data) // 2 :: 99]))
        data[-9] ^= 1
        path.write_bytes(data)
    again = run(subs, out)
    assert (again.measures, again.tiles) == {"measures": (0, 3), "tiles": (9, 0), "aperture": (9, 3)}[kind]
    assert FITSDiff(str(first), str(again.product), **IGNORED).identical


# --- the keys leave nothing out ---------------------------------------------------------------------------------


def read_settings(settings: Settings, seen: set[str]) -> Settings:
    """Settings that note which of them are looked at."""

    class Watched(Settings):
        def __getattribute__(self, name: str) -> Any:
            if name in Settings.model_fields:
                seen.add(name)
            return super().__getattribute__(name)

    watched = Watched(**settings.model_dump())
    seen.clear()
    return watched


def test_the_key_of_a_tile_holds_every_setting_that_its_stack_looks_at(subs, tmp_path, monkeypatch):
    seen: set[str] = set()

    def watched(
        members: Any, subs: Any, sky: Any, calibration: Any, settings: Settings, *more: Any, **named: Any
    ) -> Any:
        return stack_subs(members, subs, sky, calibration, read_settings(settings, seen), *more, **named)

    monkeypatch.setattr("zemosaic_sds.stack_subs", watched)
    run(subs, tmp_path)
    assert seen == set(STACK_SETTINGS)


def test_a_measure_comes_back_as_it_was(field):
    measure = measure_frame(read_frame(field.paths[0]), Calibration(), Aperture())
    again = rebuild(FrameMeasure, flatten(measure))
    for name, array in flatten(measure).items():
        found = flatten(again)[name]
        assert found.dtype == array.dtype and found.tobytes() == array.tobytes(), name
    assert type(again.detected) is int and type(again.fwhm) is float
    assert len(again.stars) == len(measure.stars) > 0


# --- files that change meanwhile --------------------------------------------------------------------------------


def when(key: str, then: Callable[[], None], stage: str = "") -> Callable[[Event], None]:
    """Do something when an event is heard for the first time."""
    done: list[bool] = []

    def listen(event: Event) -> None:
        if not done and event.key == key and event.values.get("stage", "") == stage:
            done.append(True)
            then()

    return listen


def grow(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(bytes(2880))


def rewrite(path: Path) -> None:
    """Other pixels, of the same size."""
    pixels, header = fits.getdata(path, header=True)
    fits.writeto(path, pixels[::-1], header, overwrite=True)


FATES = {"gone": Path.unlink, "grown": grow, "rewritten": rewrite, "cut": lambda path: path.write_bytes(b"SIMPLE")}


@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("phase", ["phase_measure", "phase_lots"])
def test_a_frame_that_changes_during_the_run_is_left_out_and_named(own_subs, tmp_path, fate, phase):
    victim = sorted(own_subs.iterdir())[4]
    heard = when(phase, lambda: FATES[fate](victim))
    settings = Settings(
        num_processing_workers=1, report=False, blur_filter=False, sds_min_batch_size=3, sds_target_batch_size=3
    )
    made = run_hierarchical_mosaic(own_subs, tmp_path / "out", settings, sds=True, progress_callback=heard)
    record = next(record for record in made.ledger if record.file == victim.name)
    assert record.status == "rejected"
    assert "has changed since the run began" in record.reason
    assert len(made.ledger.used) == 8


def test_a_frame_that_changes_while_it_is_stacked_leaves_no_trace(own_subs, tmp_path, monkeypatch):
    """The lot is stacked once more, without it."""
    victim = sorted(own_subs.iterdir())[4]
    calls: list[list[int]] = []

    def stack(members: Any, *more: Any, **named: Any) -> Any:
        calls.append(list(members))
        made = stack_subs(members, *more, **named)
        if 4 in members:
            grow(victim)
        return made

    monkeypatch.setattr("zemosaic_sds.stack_subs", stack)
    made = run(own_subs, tmp_path / "out")
    assert calls == [[0, 1, 2], [3, 4, 5], [3, 5], [6, 7, 8]]
    assert len(made.ledger.used) == 8
    assert fits.getdata(made.product, "COVERAGE").max() == 8


def test_a_lot_whose_frames_all_changed_is_no_lot(own_subs, tmp_path):
    def touch() -> None:
        for path in sorted(own_subs.iterdir())[3:6]:
            grow(path)

    settings = Settings(
        num_processing_workers=1, report=False, blur_filter=False, sds_min_batch_size=3, sds_target_batch_size=3
    )
    heard = when("phase_lots", touch)
    made = run_hierarchical_mosaic(own_subs, tmp_path, settings, sds=True, progress_callback=heard)
    assert len(made.ledger.used) == 6
    assert len(fits.getdata(made.product, "MEGATILES")) == 2
    heard = when("phase_mosaic_first", touch)
    settings = settings.model_copy(update={"route": "mosaic-first"})
    made = run_hierarchical_mosaic(own_subs, tmp_path, settings, progress_callback=heard)
    assert len(made.ledger.used) == 6


def test_a_frame_that_changes_while_its_header_is_read_is_left_out(own_subs, monkeypatch):
    def read(path: Path) -> Any:
        frame = read_frame(path)
        if path.name == victim:
            grow(path)
        return frame

    victim = sorted(own_subs.iterdir())[4].name
    monkeypatch.setattr(intake, "read_frame", read)
    found = intake.scan([own_subs], 1, Events())
    assert [(path.name, "still be written" in why) for path, why in found.rejected.items()] == [(victim, True)]


def test_nothing_of_a_changed_frame_is_kept(own_subs, tmp_path):
    """Its measures are not stored under the stamp that it had before."""
    out, victim = tmp_path / "out", sorted(own_subs.iterdir())[4]
    settings = Settings(**FIXED)
    heard = when("phase_measure", lambda: rewrite(victim))
    run_hierarchical_mosaic(own_subs, out, settings, sds=True, progress_callback=heard)
    assert same(run(own_subs, out), run(own_subs, tmp_path / "clean", resume="off"))


def test_every_route_gets_the_results(subs, tmp_path, monkeypatch):
    """A new route cannot forget them: they come with its job."""
    jobs: list[Job] = []
    route = zemosaic_worker.ROUTES["sds"]
    monkeypatch.setitem(zemosaic_worker.ROUTES, "sds", lambda job: jobs.append(job) or route(job))
    run(subs, tmp_path)
    assert len(jobs[0].results.stamps) == 9 and jobs[0].results.cache.folder is not None


# --- a folder that grows ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def nights(tmp_path_factory: pytest.TempPathFactory) -> FieldTruth:
    """Two panels; the second night, of six frames, belongs to the second of them."""
    options = {**TINY, "panels": (2, 1), "shape": (128, 160), "overlap": 0.4, "dither_px": 6, "rotation_deg": 3}
    return make_field(tmp_path_factory.mktemp("nights") / "subs", frames=18, seed=5, **options)


def night(nights: FieldTruth, folder: Path, count: int) -> Path:
    """A folder with the first frames."""
    folder.mkdir(exist_ok=True)
    for path in nights.paths[:count]:
        if not (folder / path.name).exists():
            shutil.copy2(path, folder)
    return folder


def book(result: RunResult) -> dict[str, Any]:
    return {record.file: record for record in result.ledger}


def test_a_night_that_is_added_leaves_the_old_lots_as_they_were(nights, tmp_path):
    out = tmp_path / "out"
    first = run(night(nights, tmp_path / "subs", 12), out)
    second = run(night(nights, tmp_path / "subs", 18), out)
    assert (second.measures, second.tiles) == (12, 4)
    assert len(fits.getdata(second.product, "MEGATILES")) == 6
    old, new = book(first), book(second)
    for name, record in old.items():
        for what in ("gain", "level", "weight", "lot", "rejected_share"):
            assert getattr(new[name], what) == getattr(record, what), what
    grown = fits.getheader(second.product)
    assert grown["CRVAL1"] == fits.getheader(first.product)["CRVAL1"]
    assert abs((grown["CRPIX1"] - fits.getheader(first.product)["CRPIX1"]) % 1) < 1e-9


def test_the_new_frames_get_the_gains_and_skies_that_are_true(nights, tmp_path):
    run(night(nights, tmp_path / "subs", 12), tmp_path / "out")
    records = book(run(night(nights, tmp_path / "subs", 18), tmp_path / "out"))
    fresh = book(run(tmp_path / "subs", tmp_path / "fresh", resume="off"))
    names = [path.name for path in nights.paths]
    true = np.array([frame.transparency for frame in nights.frames])

    def spread(found: dict[str, Any]) -> np.ndarray:
        """Grey gain times transparency: the same for all frames if the gains are right."""
        return np.log(np.mean([found[name].gain for name in names], axis=1) * true)

    held, all_anew = spread(records), spread(fresh)
    offset = held[12:].mean() - held[:12].mean()
    assert abs(offset) < 0.02 + abs(all_anew[12:].mean() - all_anew[:12].mean())
    assert held[12:].std() < 1.3 * all_anew.std() + 0.01
    levels, fresh_levels = (np.array([b[name].level for name in names]) for b in (records, fresh))
    step, fresh_step = (level[12:].mean(axis=0) - level[:12].mean(axis=0) for level in (levels, fresh_levels))
    np.testing.assert_allclose(step, fresh_step, atol=0.03 * np.abs(fresh_levels).max() + 3)


def test_the_sky_of_a_grown_mosaic_is_even(nights, tmp_path):
    """Against a mosaic of all frames at once: no step where new frames meet old ones."""
    whole = {"global_wcs_autocrop_enabled": False}
    run(night(nights, tmp_path / "subs", 12), tmp_path / "out", **whole)
    grown = run(night(nights, tmp_path / "subs", 18), tmp_path / "out", **whole)
    assert grown.tiles == 4
    fresh = run(tmp_path / "subs", tmp_path / "fresh", resume="off", **whole)
    (a, wa), (b, wb) = ((fits.getdata(r.product)[1], WCS(fits.getheader(r.product)).celestial) for r in (grown, fresh))
    y, x = (grid.ravel() for grid in np.mgrid[20 : b.shape[0] - 20 : 3, 20 : b.shape[1] - 20 : 3])
    px, py = (np.rint(p).astype(int) for p in wa.wcs_world2pix(*wb.wcs_pix2world(x, y, 0), 0))
    on = (px >= 0) & (px < a.shape[1]) & (py >= 0) & (py < a.shape[0])
    ratio = a[py[on], px[on]] / b[y[on], x[on]]
    left, right = (np.nanmedian(ratio[half]) for half in (x[on] < np.median(x), x[on] > np.median(x)))
    assert abs(left / right - 1) < 0.01


def test_a_third_run_over_the_same_folder_changes_nothing(nights, tmp_path):
    run(night(nights, tmp_path / "subs", 12), tmp_path / "out")
    second = run(night(nights, tmp_path / "subs", 18), tmp_path / "out")
    third = run(tmp_path / "subs", tmp_path / "out")
    assert third.tiles == 6
    assert same(second, third)


def test_what_was_lost_of_a_grown_mosaic_is_made_again_bit_by_bit(nights, tmp_path):
    out = tmp_path / "out"
    run(night(nights, tmp_path / "subs", 12), out)
    second = run(night(nights, tmp_path / "subs", 18), out)
    shutil.rmtree(out / ".zemosaic" / "results" / "tiles")
    assert same(second, run(tmp_path / "subs", out))


@pytest.mark.parametrize("change", ["gone", "setting"])
def test_without_its_old_frames_or_settings_the_solution_is_a_fresh_one(nights, tmp_path, change):
    run(night(nights, tmp_path / "subs", 12), tmp_path / "out")
    night(nights, tmp_path / "subs", 18)
    settings = {"stacking_weighting_method": "none"} if change == "setting" else {}
    if change == "gone":
        (tmp_path / "subs" / nights.paths[3].name).unlink()
    grown = run(tmp_path / "subs", tmp_path / "out", **settings)
    assert grown.tiles == 0
    assert same(grown, run(tmp_path / "subs", tmp_path / "fresh", resume="off", **settings))


def test_the_lots_of_another_route_are_not_taken_over(nights, tmp_path):
    run(night(nights, tmp_path / "subs", 12), tmp_path / "out", sds=None, route="master-tiles")
    made = run(tmp_path / "subs", tmp_path / "out")
    fresh = run(tmp_path / "subs", tmp_path / "fresh", resume="off")
    assert [r.lot for r in made.ledger] == [r.lot for r in fresh.ledger]


def test_frames_beyond_the_old_tangent_plane_are_not_squeezed_onto_it(nights, tmp_path):
    run(night(nights, tmp_path / "subs", 12), tmp_path / "out")
    found = intake.scan([tmp_path / "subs"], 1, Events())
    kept = Cache(tmp_path / "out" / ".zemosaic" / "results")
    found.results = Results.of_run(kept, found.stamps, Calibration(), found.frames)
    carried = carry.recall(found.results, found.frames, Settings(**FIXED, **LOTS), None)
    assert carried is not None and carried.reaches(found.frames)
    far = found.frames[0].wcs.deepcopy()
    far.wcs.crval = far.wcs.crval + [70, 0]
    assert not carried.reaches([*found.frames, replace(found.frames[0], wcs=far)])
