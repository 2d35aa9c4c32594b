"""The way through: plan → route → save. What a run promises, whatever it is fed and however it ends."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

import zemosaic_worker
from zemosaic.demo import FieldTruth, make_field
from zemosaic.events import Cancelled, Event
from zemosaic.settings import Settings, load_settings
from zemosaic_worker import EXIT_ASKED, EXIT_FALLBACK, RunError, RunResult, run_hierarchical_mosaic

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"panels": (1, 1), "shape": (120, 160), "star_density": 8000, "nebula": 30, "trails": 0, "sky": 300}


@pytest.fixture(scope="session")
def field(tmp_path_factory: pytest.TempPathFactory) -> FieldTruth:
    """Six tiny Bayer subs; tests only read them."""
    return make_field(tmp_path_factory.mktemp("field") / "subs", frames=6, **SMALL)


@pytest.fixture(scope="session")
def subs(field: FieldTruth) -> Path:
    return field.paths[0].parent


def quick(**changes: object) -> Settings:
    """One worker; all of the few frames of a tiny field stay."""
    return Settings(**({"num_processing_workers": 1, "blur_filter": False, "resume": "off"} | changes))


def tables(product: Path | None) -> tuple[fits.Header, Table, Table]:
    assert product is not None
    return fits.getheader(product), Table.read(product, "FRAMES"), Table.read(product, "MEGATILES")


# --- a run and what it leaves ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def told() -> list[Event]:
    return []


@pytest.fixture(scope="session")
def result(subs: Path, told: list[Event], tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """One run in two lots, with everything it said in `told`."""
    settings = quick(sds_min_batch_size=3, sds_target_batch_size=3)
    return run_hierarchical_mosaic(
        subs, tmp_path_factory.mktemp("out"), settings, sds=True, progress_callback=told.append
    )


def test_a_run_names_its_product_its_route_and_its_frames(result):
    assert result.product is not None and result.product.name == "Demo_Nebula_sds.fits"
    assert (result.route, result.exit_status) == ("sds", EXIT_ASKED)
    assert "6 of 6 files" in result.summary
    assert result.ledger.counts() == {"used": 6, "partial": 0, "rejected": 0}


def test_picture_and_settings_lie_beside_the_product(result):
    assert sorted(p.name for p in result.product.parent.iterdir()) == [
        "Demo_Nebula_sds.fits",
        "Demo_Nebula_sds.png",
        "Demo_Nebula_sds.toml",
        "Demo_Nebula_sds_frames.csv",
        "Demo_Nebula_sds_report.html",
        "Demo_Nebula_sds_report.json",
    ]
    settings, warnings = load_settings(result.product.with_suffix(".toml"))
    assert settings == quick(sds_min_batch_size=3, sds_target_batch_size=3)
    assert not warnings


def test_the_product_tells_its_own_story(result, field):
    header, frames, tiles = tables(result.product)
    assert (header["ROUTE"], header["FALLBACK"], header["OBJECT"]) == ("sds", "none", field.recipe.name)
    assert (header["NCOMBINE"], header["NLOTS"]) == (6, 2)
    assert header["TOTALEXP"] == 60
    assert (header["SDSMIN"], header["SDSTARG"], header["SDSSCOPE"]) == (3, 3, "shared")
    assert sorted(frames["FILE"]) == sorted(path.name for path in field.paths)
    assert list(frames["LOT"]) == [0, 0, 0, 1, 1, 1]
    assert set(frames["STATUS"]) == {"used"}
    assert list(tiles["FRAMES"]) == [3, 3]
    assert tiles["GAIN"][header["SDSREF"]] == 1
    assert (tiles["SECONDS"] > 0).all()
    assert "Coverage cut" in str(header["HISTORY"])


def test_phases_come_in_order_and_the_end_comes_last(result, told):
    assert [e.values["n"] for e in told if e.kind == "phase"] == list(range(1, 11))
    assert told[-1].kind == "done"


def test_existing_front_ends_hear_what_they_know(result, told):
    heard = [event.legacy() for event in told]
    assert heard[-1] == "PROCESS_DONE"
    assert "PHASE_UPDATE:1" in heard and "STAGE_PROGRESS(phase1_scan, 6, 6)" in heard


def test_a_second_run_overwrites_nothing(result, subs):
    before = result.product.read_bytes()
    again = run_hierarchical_mosaic(subs, result.product.parent, quick(), sds=True)
    assert again.product.name == "Demo_Nebula_sds_2.fits"
    assert result.product.read_bytes() == before


def test_messages_in_french(subs, tmp_path):
    said: list[Event] = []
    made = run_hierarchical_mosaic(subs, tmp_path, quick(language="fr"), sds=True, progress_callback=said.append)
    assert "6 fichiers trouvés." in [event.text for event in said]
    assert "6 fichiers" in made.summary


# --- SDS on and off -------------------------------------------------------------------------------------


def test_without_sds_nothing_of_it_is_imported(subs, tmp_path):
    """In a process of its own: with SDS off a run never comes near a line of `zemosaic_sds`."""
    code = f"""if True:
        import sys
        from pathlib import Path
        from zemosaic.settings import Settings
        import zemosaic_worker as worker
        assert "zemosaic_sds" not in sys.modules
        settings = Settings(num_processing_workers=1, blur_filter=False)
        try:
            worker.run_hierarchical_mosaic(Path({str(subs)!r}), Path({str(tmp_path)!r}), settings, sds=False)
        except worker.RunError as error:
            print(error)
        print("zemosaic_sds" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(("default", "flag", "sds"), [(True, None, True), (False, True, True), (True, False, False)])
def test_the_setting_decides_about_sds_unless_the_call_does(subs, tmp_path, monkeypatch, default, flag, sds):
    class Asked(Exception): ...

    def ask(*arguments: object) -> list[str]:
        raise Asked(*arguments)

    real = zemosaic_worker.routes_for
    monkeypatch.setattr(zemosaic_worker, "routes_for", ask)
    with pytest.raises(Asked) as caught:
        run_hierarchical_mosaic(subs, tmp_path, quick(sds_mode_default=default), sds=flag)
    try:
        routes = real(*caught.value.args)
    except RunError:
        routes = []
    assert ("sds" in routes[:1]) is sds


# --- the ledger -----------------------------------------------------------------------------------------


def altered(source: Path, target: Path, pixels: np.ndarray | None = None, **cards: object) -> None:
    """A copy with other pixels and cards; a card that is None goes."""
    data, header = fits.getdata(source), fits.getheader(source)
    for keyword, value in cards.items():
        if value is None:
            del header[keyword]
        else:
            header[keyword] = value
    fits.writeto(target, data if pixels is None else pixels.astype(data.dtype), header)


NOT_FRAMES = {
    "text.fit": "not a FITS file",
    "truncated.fit": "truncated",
    "no_wcs.fit": "no celestial WCS",
    "mono.fit": "it is mono and most frames are in colour",
    "stray.fit": "points .* deg away",
    "doubled.fit": '"/px but the other frames',
    "saturated.fit": "empty or saturated",
}


@pytest.fixture(scope="session")
def mess(tmp_path_factory: pytest.TempPathFactory) -> FieldTruth:
    """Eight good subs, one out of focus, and one file for each thing that can be wrong."""
    folder = tmp_path_factory.mktemp("mess")
    truth = make_field(folder, frames=9, blurred=0.12, **SMALL | {"star_density": 15000, "nebula": 0})
    good = next(frame.path for frame in truth.frames if not frame.blurred)
    header, shape = fits.getheader(good), truth.recipe.shape
    (folder / "text.fit").write_text("It was a dark and stormy night.\n" * 200)
    (folder / "truncated.fit").write_bytes(good.read_bytes()[:20000])
    altered(good, folder / "no_wcs.fit", CTYPE1=None, CTYPE2=None)
    altered(good, folder / "mono.fit", BAYERPAT=None)
    altered(good, folder / "stray.fit", CRVAL2=header["CRVAL2"] + 40)
    altered(good, folder / "doubled.fit", **{k: 2 * header[k] for k in ("CD1_1", "CD1_2", "CD2_1", "CD2_2")})
    altered(good, folder / "saturated.fit", np.full(shape, 65535))
    (folder / "notes.txt").write_text("not asked for")
    return truth


def test_the_books_close_on_every_file(mess, tmp_path):
    said: list[Event] = []
    settings = Settings(num_processing_workers=1)
    folder = mess.paths[0].parent
    made = run_hierarchical_mosaic(folder, tmp_path, settings, sds=True, progress_callback=said.append)
    records = {record.file: record for record in made.ledger}
    assert len(made.ledger) == len(records) == 9 + len(NOT_FRAMES)
    blurred = {frame.path.name: "blurred" for frame in mess.frames if frame.blurred}
    warnings = "\n".join(event.text for event in said if event.kind == "warning")
    for name, reason in (NOT_FRAMES | blurred).items():
        assert records[name].status == "rejected"
        assert re.search(reason, records[name].reason), records[name]
        assert name in warnings
    used = {record.file for record in made.ledger.used}
    assert used == {frame.path.name for frame in mess.frames if not frame.blurred}
    _, frames, _ = tables(made.product)
    assert sorted(frames["FILE"]) == sorted(records)
    assert "8 of 16 files" in made.summary


def test_frames_of_the_same_name_in_two_folders_stay_apart(field, tmp_path):
    for night, path in zip(("monday", "tuesday"), field.paths, strict=False):
        (tmp_path / "subs" / night).mkdir(parents=True)
        shutil.copy(path, tmp_path / "subs" / night / "1.fit")
    made = run_hierarchical_mosaic(tmp_path / "subs", tmp_path / "out", quick(), sds=True)
    assert [record.file for record in made.ledger.used] == ["monday/1.fit", "tuesday/1.fit"]


def test_single_files_are_taken_as_well_as_folders(field, tmp_path):
    made = run_hierarchical_mosaic(field.paths[:2], tmp_path, quick(), sds=True)
    assert len(made.ledger) == 2


# --- raw frames are sacred ------------------------------------------------------------------------------


def fingerprint(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and time of change of everything in a folder, and of the folder itself."""
    return {
        str(path): ("" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in [folder, *folder.rglob("*")]
    }


def test_raw_frames_are_never_touched(field, tmp_path):
    """Raws, sidecar, dark and a file that is no frame, in a folder that cannot be written to."""
    folder = tmp_path / "subs"
    shutil.copytree(field.paths[0].parent, folder)
    fits.PrimaryHDU(header=field.frames[0].cards).writeto(folder / f"{field.paths[0].stem}.wcs.fits")
    (folder / "broken.fit").write_text("no frame at all")
    fits.writeto(tmp_path / "dark.fits", np.zeros(field.recipe.shape, np.float32))
    folder.chmod(0o555)
    before = fingerprint(folder), fingerprint(tmp_path / "dark.fits")
    settings = quick(master_dark_path=str(tmp_path / "dark.fits"))
    made = run_hierarchical_mosaic(folder, tmp_path / "out", settings, sds=True)
    assert (fingerprint(folder), fingerprint(tmp_path / "dark.fits")) == before
    assert made.ledger.counts()["used"] == 6
    folder.chmod(0o755)


# --- failures -------------------------------------------------------------------------------------------


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A scratch folder that must be empty again in the end."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    yield folder
    assert not list(folder.iterdir())


def tight(scratch: Path) -> Settings:
    """So little memory that most of the mega-tiles go to the scratch folder."""
    lots = {"sds_min_batch_size": 2, "sds_target_batch_size": 2}
    return quick(num_processing_workers=2, memory_gb=0.0025, coadd_memmap_dir=str(scratch), **lots)


def test_little_memory_makes_the_same_mosaic(subs, scratch, tmp_path):
    spilled: list[Path] = []
    little = run_hierarchical_mosaic(
        subs, tmp_path / "out", tight(scratch), sds=True, progress_callback=lambda _: spilled.extend(scratch.iterdir())
    )
    assert spilled
    plenty = tight(scratch).model_copy(update={"memory_gb": None})
    expected = run_hierarchical_mosaic(subs, tmp_path / "out", plenty, sds=True)
    np.testing.assert_array_equal(fits.getdata(little.product), fits.getdata(expected.product))


def test_a_canvas_beyond_the_memory_is_refused_with_the_numbers(subs, tmp_path):
    with pytest.raises(RunError, match=r"needs \d+\.\d\d GB of memory and the run may use 0\.50 GB: allow more"):
        run_hierarchical_mosaic(subs, tmp_path, quick(memory_gb=0.5, global_wcs_res_override=0.02), sds=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "settings", "words"),
    [
        ("empty", {}, "no frame"),
        ("gone", {}, "does not exist"),
        ("text.fit", {}, "no frame"),
        ("subs", {"master_dark_path": "gone.fits"}, "gone.fits"),
    ],
)
def test_a_run_that_cannot_start_says_why(field, tmp_path, source, settings, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.fit").write_text("not a frame")
    (tmp_path / "subs").symlink_to(field.paths[0].parent)
    said: list[Event] = []
    with pytest.raises(RunError, match=words) as caught:
        run_hierarchical_mosaic(
            tmp_path / source, tmp_path / "out", quick(**settings), sds=True, progress_callback=said.append
        )
    assert said[-1].legacy() == "PROCESS_ERROR"
    assert str(caught.value) in said[-1].text
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_a_file_is_told(subs, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(RunError, match="another output folder"):
        run_hierarchical_mosaic(subs, tmp_path / "out", quick(), sds=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_full_disk_leaves_nothing_half_written(subs, scratch, tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="no room left"):
        run_hierarchical_mosaic(subs, tmp_path / "out", tight(scratch), sds=True)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def broken_sds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first route that fails, followed by one that works."""

    def fail(_: object) -> None:
        raise ZeroDivisionError("a step of the chain broke")

    routes = {"sds": fail, "mosaic-first": zemosaic_worker.ROUTES["sds"]}
    monkeypatch.setattr(zemosaic_worker, "ROUTES", routes)
    monkeypatch.setattr(zemosaic_worker, "routes_for", lambda *_: list(routes))


@pytest.mark.usefixtures("broken_sds")
def test_a_fallback_is_told_by_product_log_and_status(subs, tmp_path):
    said: list[Event] = []
    made = run_hierarchical_mosaic(subs, tmp_path, quick(), sds=True, progress_callback=said.append)
    assert (made.route, made.exit_status) == ("mosaic-first", EXIT_FALLBACK)
    assert "mosaic-first" in made.summary
    (error,) = [event for event in said if event.kind == "error"]
    assert "a step of the chain broke" in error.text
    assert "run_warn_fallback" in [event.key for event in said]
    header = fits.getheader(made.product)
    assert header["ROUTE"] == "mosaic-first"
    assert "a step of the chain broke" in header["FALLBACK"]
    assert made.product.name == "Demo_Nebula_mosaic-first.fits"


@pytest.mark.usefixtures("broken_sds")
def test_when_no_route_is_left_every_reason_is_told(subs, tmp_path, monkeypatch):
    monkeypatch.setitem(zemosaic_worker.ROUTES, "mosaic-first", zemosaic_worker.ROUTES["sds"])
    with pytest.raises(RunError, match=r"sds: a step .* broke; mosaic-first: a step .* broke"):
        run_hierarchical_mosaic(subs, tmp_path, quick(), sds=True)
    assert not list(tmp_path.iterdir())


# --- stopping -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", range(1, 10))
def test_a_run_can_be_stopped_in_every_phase(subs, scratch, tmp_path, phase):
    """Stopped as soon as a phase begins. Polishing and saving (8, 9) are short and may come to their end."""
    seen: list[int] = []

    def listen(event: Event) -> None:
        if event.kind == "phase":
            seen.append(event.values["n"])

    try:
        run_hierarchical_mosaic(
            subs,
            tmp_path / "out",
            tight(scratch),
            sds=True,
            progress_callback=listen,
            stop_requested=lambda: phase in seen,
        )
    except Cancelled:
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    else:
        assert phase >= 8
        left = [path.suffix for path in sorted((tmp_path / "out").iterdir())]
        assert left in (WRITTEN, WRITTEN[:4])  # the report comes last, and is stopped like everything else


WRITTEN = [".fits", ".png", ".toml", ".csv", ".html", ".json"]


def test_a_stopped_run_is_no_failed_route(subs, tmp_path, monkeypatch):
    """No other route is tried after a stop."""
    tried = []

    def stopped(_: object) -> None:
        tried.append("sds")
        raise Cancelled

    monkeypatch.setattr(zemosaic_worker, "ROUTES", {"sds": stopped, "mosaic-first": stopped})
    monkeypatch.setattr(zemosaic_worker, "routes_for", lambda *_: ["sds", "mosaic-first"])
    with pytest.raises(Cancelled):
        run_hierarchical_mosaic(subs, tmp_path, quick(), sds=True)
    assert tried == ["sds"]
