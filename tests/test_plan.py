"""The plan of a run: fields of header-only subs whose every overlap is known."""

import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from astropy.io import fits
from typer.testing import CliRunner

import zemosaic_sds
import zemosaic_worker
from zemosaic import intake as steps
from zemosaic.canvas import plan_canvas
from zemosaic.cli import app
from zemosaic.demo import make_field, tangent_header
from zemosaic.events import Cancelled, Events
from zemosaic.layout import lay_out
from zemosaic.lots import read_lots
from zemosaic.plan import Plan, PlanError, coverage_png, make_plan, plan_json, plan_lines, save_plan
from zemosaic.plan_output import duration, lots_text
from zemosaic.settings import Settings
from zemosaic.warp import pixel_map

SHAPE = (192, 108)  # ny, nx
SCALE = 24.0  # arcsec/px: a frame is 0.72 x 1.28 deg
WIDTH = 108 * SCALE / 3600


def write_sub(path: Path, ra: float, dec: float, second: int = 0, wcs: bool = True, **cards: Any) -> Path:
    """A sub of a header and a hole where its pixels would be."""
    header = fits.Header({"SIMPLE": True, "BITPIX": 16, "NAXIS": 2, "NAXIS1": SHAPE[1], "NAXIS2": SHAPE[0]})
    if wcs:
        header.update(tangent_header(ra, dec, SHAPE, scale=SCALE))
    header.update({"RA": ra, "DEC": dec, "BAYERPAT": "GRBG", "INSTRUME": "Cam", "OBJECT": "Veil", "EXPTIME": 10.0})
    header["DATE-OBS"] = f"2025-01-01T{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}"
    header.update(cards)
    text = header.tostring().encode()
    path.write_bytes(text)
    os.truncate(path, len(text) + -(-SHAPE[0] * SHAPE[1] * 2 // 2880) * 2880)
    return path


def write_row(folder: Path, *panels: list[float], **cards: Any) -> Path:
    """Panels along the equator: the x of their frames, in widths of a frame."""
    folder.mkdir(exist_ok=True)
    for second, x in enumerate(x for panel in panels for x in panel):
        write_sub(folder / f"s{second:03d}.fit", 100 + x * WIDTH, 0.0, second, **cards)
    return folder


def planned(folder: Path, **options: Any) -> Plan:
    return make_plan([folder], Settings(**options), probe=False)


@pytest.fixture
def row(tmp_path: Path) -> Path:
    """Two panels of 6 and 4 frames that overlap by a quarter."""
    return write_row(tmp_path / "row", [0.0] * 6, [0.75] * 4)


def test_canvas_and_coverage_are_those_of_the_frames(row: Path):
    plan = planned(row)
    facts = plan_json(plan)
    assert facts["files"] == {"found": 10, "used": 10, "left_out": 0}
    canvas = facts["canvas"]
    assert canvas["scale_arcsec_per_px"] == pytest.approx(SCALE)
    assert canvas["centre_ra_deg"] == pytest.approx(100 + 0.375 * WIDTH, abs=0.01)
    assert canvas["width_px"] == pytest.approx(1.75 * 108 * 1.04, abs=4)  # 2 % of padding on either side
    # The panels have 6 and 4 frames, 10 where they overlap; east is on the left.
    line = plan.coverage[plan.coverage.shape[0] // 2]
    assert line[0] == line[-1] == 0
    assert line[line > 0][[0, -1]].tolist() == [4, 6]
    shares = np.array([(line == depth).sum() for depth in (6, 10, 4)]) / 108
    assert shares == pytest.approx([0.75, 0.25, 0.75], abs=0.03)
    coverage = facts["coverage"]
    assert coverage["most_frames"] == 10
    assert coverage["total_exposure_s"] == 100
    assert coverage["covered_deg2"] == pytest.approx(1.75 * WIDTH * 192 * SCALE / 3600, rel=0.03)


def test_panels_links_and_sentences(tmp_path: Path):
    # Two frames of the second panel reach the third; a fourth lies apart.
    row = write_row(tmp_path / "row", [0.0] * 5, [0.8] * 8 + [0.95] * 2, [1.85] * 6, [3.2] * 2)
    plan = planned(row)
    facts = plan_json(plan)
    assert [panel["frames"] for panel in facts["panels"]] == [5, 10, 6, 2]
    assert [link["panels"] for link in facts["links"]] == [[1, 2], [2, 3]]
    assert facts["islands"] == [[1, 2, 3], [4]]
    (weak,) = facts["weak_links"]
    assert weak["panels"] == [3] and weak["hangs_on"] == [{"panel": 2, "frames": 2, "of_frames": 10}]
    assert "panel 3 hangs" in weak["sentence"] and "2 of 10 frames of panel 2" in weak["sentence"]
    english, french = "\n".join(plan_lines(plan)), "\n".join(plan_lines(plan, "fr"))
    assert "panel 3 hangs" in english and "No sky in common with the rest of the field: panel 4" in english
    assert "panneau 3 tient" in french and "2 des 10 brutes du panneau 2" in french


def test_frames_without_wcs_are_listed_with_their_hint_and_not_covered(row: Path):
    write_sub(row / "lost.fit", 100 + 0.75 * WIDTH + 0.1, 0.1, wcs=False)
    write_sub(row / "astray.fit", 250.0, 40.0, wcs=False)
    write_sub(row / "mute.fit", 0.0, 0.0, wcs=False)  # what capture programs write when they do not know
    plan = planned(row)
    listed = {Path(item["path"]).name: item for item in plan_json(plan)["left_out"]}
    assert set(listed) == {"lost.fit", "astray.fit", "mute.fit"}
    assert all(item["lacks_wcs"] for item in listed.values())
    assert listed["lost.fit"]["hint_panel"] == 2
    assert listed["astray.fit"]["hint_panel"] is None and listed["astray.fit"]["hint_ra_deg"] == 250
    assert listed["mute.fit"]["hint_ra_deg"] is None
    assert plan.coverage.max() == 10
    text = "\n".join(plan_lines(plan))
    assert "3 frames lack a WCS; the headers of 2 say where they point" in text and "A run tries to solve them" in text
    assert "A run tries" not in "\n".join(plan_lines(planned(row, solver_method="none")))


def test_what_differs_between_the_frames_is_counted(row: Path):
    for name, cards in {"a": {"FILTER": "LP"}, "b": {"FILTER": "IRCUT"}, "c": {"EXPTIME": 20.0}}.items():
        write_sub(row / f"{name}.fit", 100.0, 0.0, 100 + ord(name), **cards)
    mixed = plan_json(planned(row))["mixed"]
    assert mixed == {"filter": {"LP": 1, "IRCUT": 1}, "exposure_s": {"10": 12, "20": 1}}


def test_copies_are_left_out_once_their_pixels_agree(row: Path):
    (row / "copy.fit").write_bytes((row / "s003.fit").read_bytes())
    other = bytearray((row / "s004.fit").read_bytes())
    other[-2880] = 7  # the same second, other pixels: a second telescope
    (row / "twin.fit").write_bytes(other)
    plan = planned(row)
    (item,) = plan.left_out
    assert {item.path.name} < {"copy.fit", "s003.fit"} and "same pixels" in item.reason
    assert len(plan.layout.frames) == 11


def test_lots_are_those_of_the_engine(tmp_path: Path):
    make_field(tmp_path, panels=(2, 2), frames=22, shape=(96, 128), seed=5, sip_px=1.5, parity=-1)
    settings = Settings(sds_min_batch_size=2, sds_target_batch_size=6)
    intake = steps.scan([tmp_path], 1, Events())
    steps.select(intake, Events())
    canvas = plan_canvas(intake.frames, settings)
    subs = []
    for frame in intake.frames:
        where = pixel_map(frame.wcs, frame.shape, canvas.wcs, canvas.window_of(frame))
        subs.append(SimpleNamespace(frame=frame, pixel_map=where))
    engine = zemosaic_sds.plan_lots(subs, canvas, settings, Events())
    layout = lay_out(intake.frames, settings)
    assert layout.lots == tuple(lot.members for lot in engine)
    assert len(engine) > 2
    assert layout.windows == tuple(sub.pixel_map.window for sub in subs)


@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_lots_go_into_a_file_that_a_run_takes(row: Path, tmp_path: Path, suffix: str):
    plan = planned(row, sds_target_batch_size=5)
    path = tmp_path / f"lots{suffix}"
    assert save_plan(plan, None, path) == [path]
    lots = read_lots(path)
    assert [len(lot) for lot in lots] == [5, 5]
    assert sorted(p for lot in lots for p in lot) == sorted(row.glob("*.fit"))
    # A plan with these lots, and other sizes in the settings, keeps them.
    again = make_plan([row], Settings(sds_target_batch_size=7), probe=False, given_lots=lots)
    assert again.layout.lots == plan.layout.lots


def test_lots_into_another_kind_of_file_are_refused(row: Path, tmp_path: Path):
    with pytest.raises(PlanError, match=r"lots\.txt: a file of lots must end in \.toml or \.json"):
        save_plan(planned(row), None, tmp_path / "lots.txt")
    with pytest.raises(ValueError, match=r"\.toml or \.json"):
        lots_text(planned(row), "")


def test_json_is_plain_and_says_its_version(row: Path):
    plan = planned(row)
    facts = plan_json(plan)
    assert (facts["schema"], facts["schema_version"]) == ("zemosaic-plan", 1)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["forecast"] is None and facts["problems"] == []


def test_a_plan_can_be_pickled(row: Path):
    plan = planned(row)
    again = pickle.loads(pickle.dumps(plan))
    assert again.graph == plan.graph and again.layout.lots == plan.layout.lots
    np.testing.assert_array_equal(again.coverage, plan.coverage)
    assert list(plan_lines(again)) == list(plan_lines(plan))


def red_pixels(plan: Plan, language: str = "en") -> int:
    picture = cv2.imdecode(np.frombuffer(coverage_png(plan, language), np.uint8), cv2.IMREAD_COLOR).astype(int)
    assert min(picture.shape[:2]) > 300
    blue, green, red = np.moveaxis(picture, 2, 0)
    return int(((red > 230) & (green < 120) & (blue < 120)).sum())


def test_the_map_shows_weak_links_in_red(row: Path, tmp_path: Path):
    assert red_pixels(planned(row)) == 0
    assert red_pixels(planned(write_row(tmp_path / "weak", [0.0] * 6, [0.97] * 4)), "fr") > 100


def test_a_canvas_without_room_is_a_problem_not_an_error(row: Path):
    plan = planned(row, memory_gb=1e-4)
    (problem,) = plan.problems
    assert "allow more (memory_gb)" in problem
    assert len(plan.layout.frames) == 10


def test_tiles_without_room_are_a_problem_of_the_sds_route_alone(row: Path, tmp_path: Path, monkeypatch):
    ny, nx = planned(row).layout.canvas.shape
    nearly_full = shutil.disk_usage(tmp_path)._replace(free=18 * ny * nx)  # 17 bytes a pixel of product, 20 of a tile
    monkeypatch.setattr(shutil, "disk_usage", lambda _: nearly_full)
    monkeypatch.setattr(zemosaic_worker, "_RESIDENT_TILES", 0)
    (problem,) = make_plan([row], Settings(route="sds"), probe=False, output_folder=tmp_path).problems
    assert "the mega-tiles take" in problem
    assert not make_plan([row], Settings(route="mosaic-first"), probe=False, output_folder=tmp_path).problems


def test_nothing_to_plan_is_one_sentence(tmp_path: Path):
    with pytest.raises(PlanError, match="no frame was found"):
        make_plan([tmp_path], probe=False)
    with pytest.raises(PlanError, match="does not exist"):
        make_plan([tmp_path / "nowhere"], probe=False)
    write_sub(tmp_path / "a.fit", 10.0, 10.0, wcs=False)
    with pytest.raises(PlanError, match="none of 1 frames has a WCS"):
        make_plan([tmp_path], probe=False)


def test_a_probe_that_fails_leaves_the_plan_without_forecast(row: Path):
    # The subs hold no sky at all.
    plan = make_plan([row], Settings())
    assert plan.forecast is None
    assert "the probe failed" in plan.problems[0]


def test_a_plan_can_be_stopped(row: Path):
    with pytest.raises(Cancelled):
        make_plan([row], Settings(), Events(stop_requested=lambda: True), probe=False)


def test_progress_is_told_and_single_frames_are_not(row: Path):
    write_sub(row / "lost.fit", 100.0, 0.0, wcs=False)
    heard = []
    make_plan([row], Settings(), Events(heard.append), probe=False)
    assert {event.kind for event in heard} <= {"progress", "eta"}
    assert [event.values["current"] for event in heard if event.kind == "progress"][-1] == 11


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.21, "3.2 s"), (59.7, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


# --- command line -------------------------------------------------------------------------------------------


def zemosaic(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_prints_json_and_nothing_else(row: Path, tmp_path: Path):
    done = zemosaic("plan", row, "--no-probe", "--json", "-o", tmp_path / "p", "--lots-out", tmp_path / "lots.json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["files"]["used"] == 10
    assert json.loads((tmp_path / "p" / "plan.json").read_text())["lots"][0]["number"] == 1
    assert (tmp_path / "p" / "coverage.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_lots(tmp_path / "lots.json")) == 1


def test_command_speaks_french(row: Path):
    done = zemosaic("plan", row, "--no-probe", "--lang", "fr")
    assert done.exit_code == 0
    assert "10 fichiers : 10 sont utilisables" in done.stdout


def test_command_ends_with_a_sentence_and_a_status(tmp_path: Path, row: Path):
    (tmp_path / "empty").mkdir()
    nothing = zemosaic("plan", tmp_path / "empty", "--no-probe")
    assert nothing.exit_code == 1
    assert nothing.stderr.startswith("No plan can be made: no frame was found")
    small = zemosaic("plan", row, "--no-probe", "--memory", 1e-4)
    assert small.exit_code == 1
    assert "Problem: a canvas of" in small.stdout
    assert zemosaic("plan", row, "--set", "nonsense=1").exit_code == 2
    assert zemosaic("plan", row, "--sds", "--route", "sds").exit_code == 2


def test_plan_is_of_the_same_choice_of_frames_as_the_run(tmp_path: Path) -> None:
    folder = write_row(tmp_path / "subs", [0.0, 0.1], [0.5, 0.6], [9.0])
    chosen = tmp_path / "only.txt"
    chosen.write_text("".join(f"subs/s{i:03d}.fit\n" for i in (0, 1, 3)))
    plans = []
    for options in ([], ["--only", str(chosen)]):
        done = CliRunner().invoke(app, ["plan", str(folder), "--no-probe", "--json", *options])
        assert done.exit_code == 0, done.stderr
        plans.append(json.loads(done.stdout))
    assert [plan["files"]["found"] for plan in plans] == [5, 3]
    assert plans[1]["files"]["used"] == 3 and not plans[1]["left_out"]
    missing = CliRunner().invoke(app, ["plan", str(folder), "--only", str(tmp_path / "no.txt")])
    assert missing.exit_code == 2


def test_plan_looks_for_room_where_the_run_will_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = write_row(tmp_path / "subs", [0.0, 0.1]), []
    monkeypatch.setattr(steps, "check_room", lambda *call: asked.append(call[3]))
    assert CliRunner().invoke(app, ["plan", str(folder), "--no-probe", "--into", str(tmp_path / "out")]).exit_code == 0
    assert asked == [tmp_path / "out"] and not (tmp_path / "out").exists()
