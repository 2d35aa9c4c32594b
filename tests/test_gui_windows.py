"""The windows, driven by mouse and keyboard as a person would; skipped where PySide6 or its libraries are missing."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
pytest.importorskip("PySide6.QtWidgets", reason="no PySide6: pip install 'zemosaic[gui]'", exc_type=ImportError)

from astropy.io import fits
from PySide6.QtCore import QEvent, QEventLoop, QMimeData, QPoint, QPointF, QSettings, Qt, QTimer, QUrl
from PySide6.QtGui import QDropEvent, QImage
from PySide6.QtTest import QTest
from PySide6.QtWidgets import QApplication, QFileDialog, QWidget

from zemosaic.demo import make_field
from zemosaic.gui import engine
from zemosaic.gui.app import Desk
from zemosaic.gui.engine import LineProcess, RunRequest
from zemosaic.gui.filter_window import FilterWindow
from zemosaic.gui.forecast import read_plan
from zemosaic.gui.frame_store import FrameStore, row_from
from zemosaic.gui.i18n import words
from zemosaic.gui.main_window import MainWindow
from zemosaic.gui.progress import RunProgress
from zemosaic.gui.settings_panel import ELSEWHERE, GROUPS, SettingsPanel, group_of, make_editor
from zemosaic.gui.slices import Slices
from zemosaic.gui.table_model import export_csv
from zemosaic.settings import Settings, describe_settings, load_settings

# Eight small subs are too few to judge one of them; the report is made once, in the test of the whole way.
KEEP_ALL = {"blur_filter": False, "cloud_filter": False, "report": False}
LEFT = Qt.MouseButton.LeftButton


@pytest.fixture(scope="session")
def app() -> QApplication:
    made = QApplication.instance() or QApplication([])
    assert isinstance(made, QApplication)
    return made


@pytest.fixture(scope="module")
def subs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("field") / "subs"
    make_field(folder, frames=8, panels=(2, 1), shape=(120, 160))
    return folder


@pytest.fixture(autouse=True)
def ordinary_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that give way would hardly get a turn while other tests have the machine."""
    monkeypatch.setattr(engine, "ENGINE_NICENESS", 0)
    monkeypatch.setattr(engine, "HELPER_NICENESS", 0)


@pytest.fixture
def desk(app: QApplication, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """The program with memory of its own; an exception in a slot, which Qt would only print, fails the test."""
    troubles: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: troubles.append(error))
    memory = QSettings(str(tmp_path / "memory.ini"), QSettings.Format.IniFormat)
    memory.setValue("language", "en")
    made = Desk(app, memory, tmp_path / "config")
    yield made
    made.window.engine.kill()
    made.window.engine.wait(5000)
    made.window.close()
    made.window.scanner.wait(5000)
    for widget in app.topLevelWidgets():
        widget.deleteLater()
    app.sendPostedEvents(None, QEvent.Type.DeferredDelete)
    assert not troubles, troubles


@pytest.fixture
def window(desk: Desk) -> MainWindow:
    return desk.window


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What engines would be started with: arguments and files; none is."""
    calls: list[dict[str, str]] = []

    def start(self: LineProcess, arguments: list[str]) -> None:
        files = {Path(each).name: Path(each).read_text() for each in arguments if "zemosaic-" in each}
        calls.append(files | {"command": " ".join(arguments)})

    monkeypatch.setattr("zemosaic.gui.engine.LineProcess.start", start)
    return calls


def wait_until(test: Callable[[], object], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < end, "nothing happened"
        QApplication.processEvents(QEventLoop.ProcessEventsFlag.AllEvents, 10)


def click(widget: QWidget) -> None:
    assert widget.isEnabled()
    QTest.mouseClick(widget, LEFT, Qt.KeyboardModifier.NoModifier, QPoint(20, widget.height() // 2))


def take(window: MainWindow, subs: Path, out: Path) -> None:
    """Choose the subs and wait until they are known."""
    window.set_inputs([subs])
    window.form.set_output(out)
    wait_until(lambda: len(window.store.rows) == 8 and not window.scanner.busy("scan"))
    window.refresh()


def open_filter(window: MainWindow) -> FilterWindow:
    """The filter window, when all its parts are made."""
    window.open_filter()
    assert window.filter is not None
    window.filter.build_all()
    wait_until(window.filter.isVisible)
    return window.filter


def know(window: MainWindow, subs: Path, out: Path) -> None:
    """The same without asking the helper, which takes seconds to start; runs go without a report, too."""
    window.panel.set_value("report", False)
    window.form.set_inputs([subs])
    window.form.set_output(out)
    window.store.append([row_from({"path": str(path), "wcs": "header"}) for path in sorted(subs.glob("*.fit"))])
    window.refresh()


def fake_rows(first: int, count: int) -> list[dict[str, Any]]:
    rows = []
    for i in range(first, first + count):
        x, y = i % 100 / 40, i // 100 / 40
        outline = [[x, y], [x + 0.7, y], [x + 0.7, y + 1.2], [x, y + 1.2]]
        facts = {"night": f"2026-01-{1 + i % 9:02d}", "exposure": 10.0, "instrument": f"S{i % 2}", "wcs": "header"}
        rows.append({"path": f"/subs/sub_{i:05d}.fit", "date": f"2026-01-01T{i:06d}", "outline": outline, **facts})
    return rows


def fake_store(count: int) -> FrameStore:
    store = FrameStore()
    store.append([row_from(row) for row in fake_rows(0, count)])
    return store


# --- from the first click to the mosaic


def test_three_clicks_make_the_mosaic_that_the_command_line_makes(
    window: MainWindow, subs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QFileDialog, "getExistingDirectory", lambda *_: str(subs))
    assert not window.form.start_button.isEnabled()
    click(window.form.folder_button)  # and the one in the dialogue
    wait_until(window.form.start_button.isEnabled)
    assert window.form.output() == subs.parent / "subs-mosaic"
    phases: list[str] = []
    window.engine.heard.connect(lambda event: phases.append(event["key"]) if event["event"] == "phase" else None)
    click(window.form.start_button)
    assert window.view.progress is not None
    window_phases = [f"phase_{phase}" for phase in window.view.progress.phases]
    wait_until(lambda: not window.engine.running)
    assert phases == window_phases  # the bar knows every phase, and no other
    product = window.view.banner.product
    assert product is not None and product.parent == subs.parent / "subs-mosaic"
    assert window.view.banner.isVisible() and "of 8 files" in window.view.banner.detail.text()
    wait_until(lambda: not window.view.picture.empty)
    assert "Saved" in window.view.log.toPlainText()
    command = [sys.executable, "-m", "zemosaic", "run", str(subs), "-o", str(tmp_path / "cli"), "-q"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    theirs = Path(done.stdout.strip().splitlines()[-1])
    clock = {"ignore_keywords": ["DATE", "CHECKSUM", "DATASUM"], "ignore_fields": ["SECONDS"]}
    assert fits.FITSDiff(str(theirs), str(product), **clock).identical  # but for the time of day, to the last bit
    assert fits.getdata(theirs).tobytes() == fits.getdata(product).tobytes()
    assert theirs.with_suffix(".png").read_bytes() == product.with_suffix(".png").read_bytes()


def test_dropped_folder_is_taken(window: MainWindow, subs: Path) -> None:
    mime = QMimeData()
    mime.setUrls([QUrl.fromLocalFile(str(subs))])
    copy = Qt.DropAction.CopyAction
    event = QDropEvent(QPointF(5, 5), copy, mime, LEFT, Qt.KeyboardModifier.NoModifier)
    window.form.drop.dropEvent(event)
    assert window.form.inputs == [subs]
    assert window.scanner.busy("scan") and window.form.filter_button.isEnabled()


def test_stop_and_resume(window: MainWindow, subs: Path, tmp_path: Path) -> None:
    know(window, subs, tmp_path / "out")
    click(window.form.start_button)
    wait_until(lambda: window.view.log.toPlainText())  # it is at work, and far from its end
    click(window.view.stop_button)
    assert window.view.stop_button.text() == "Stop at once"
    wait_until(lambda: not window.engine.running)
    assert window.view.banner.product is None and "stopped" in window.view.banner.headline.text()
    assert window.form.start_button.text() == "Resume"
    window.panel.set_value("blur_filter", False)
    window.refresh()
    assert window.form.start_button.text() == "Make the mosaic"  # it would be another run
    window.panel.set_value("blur_filter", True)
    window.refresh()
    click(window.form.start_button)
    wait_until(lambda: not window.engine.running)
    assert window.view.banner.product is not None and window.view.banner.product.is_file()
    assert window.form.start_button.text() == "Make the mosaic"


def test_a_crash_of_the_engine_is_told_and_survived(window: MainWindow, subs: Path, tmp_path: Path) -> None:
    know(window, subs, tmp_path / "out")
    click(window.form.start_button)
    wait_until(lambda: window.view.log.toPlainText())
    window.engine.kill()
    wait_until(lambda: not window.engine.running)
    assert "unexpectedly" in window.view.banner.headline.text()
    assert window.form.start_button.isEnabled() and window.form.start_button.text() == "Resume"


def test_closing_while_a_run_is_under_way_asks(
    window: MainWindow, subs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(window, subs, tmp_path / "out")
    click(window.form.start_button)
    monkeypatch.setattr(window, "_agrees_to_stop", lambda: False)
    assert not window.close() and window.isVisible() and window.engine.running
    monkeypatch.setattr(window, "_agrees_to_stop", lambda: True)
    assert window.close() and not window.engine.running


# --- what the worker gets


def test_the_toggle_reaches_the_filter_window_and_the_worker(
    window: MainWindow, subs: Path, tmp_path: Path, started: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window, "problems", lambda: [])
    window.form.set_inputs([subs])
    filters = open_filter(window)
    assert not filters.sds.isChecked() and not filters.lots.isEnabled()
    click(window.form.sds)
    window.refresh()
    assert window.panel.value("sds_mode_default") is True and filters.sds.isChecked() and filters.lots.isEnabled()
    window.start()
    assert json.loads(started[-1]["settings.json"])["sds_mode_default"] is True
    click(filters.sds)
    assert not window.form.sds.isChecked()
    window.start()
    assert json.loads(started[-1]["settings.json"])["sds_mode_default"] is False
    assert started[-1]["command"].startswith(f"-m zemosaic run {subs} --config")
    assert "--lots" not in started[-1]["command"] and "--only" not in started[-1]["command"]


def test_lots_and_exclusions_reach_the_worker(window: MainWindow, subs: Path, tmp_path: Path) -> None:
    window.panel.set_values({"sds_mode_default": True, "sds_min_batch_size": 2, "sds_target_batch_size": 2} | KEEP_ALL)
    take(window, subs, tmp_path / "out")
    filters = open_filter(window)
    click(filters.lots.build_button)
    wait_until(lambda: filters.lots.model.rowCount() == 4)
    assert window.request().lots is None  # the engine plans the same ones itself
    filters.lots.choose([0, 1])
    assert window.store.selection == {0, 1, 2, 3}
    click(filters.lots.merge)
    assert [len(lot) for lot in window.store.lots] == [4, 2, 2]
    filters.table.selectRow(7)
    assert window.store.selection == {7}
    click(filters.exclude.selected)
    assert "left out by hand" in filters.table.frames.index(7, 8).data()
    request = window.request()
    names = [path.name for path in sorted(subs.glob("*.fit"))]
    assert request.lots is not None and request.only is not None
    assert [[Path(path).name for path in lot] for lot in request.lots] == [names[:4], names[4:6], names[6:7]]
    assert [Path(path).name for path in request.only] == names[:7]
    window.start()
    wait_until(lambda: not window.engine.running)
    assert "7 of 7 files" in window.view.banner.detail.text()
    assert "3 lots: 7 frames as given" in window.view.log.toPlainText()


def test_request_files_are_what_the_engine_reads(tmp_path: Path) -> None:
    settings = Settings(memory_gb=2.5, sds_mode_default=True)
    request = RunRequest((Path("/subs"),), Path("/out"), settings, ("/subs/a.fit",), (("/subs/a.fit",),))
    arguments = request.arguments(tmp_path)
    assert arguments[:3] == ["/subs", "--config", str(tmp_path / "settings.json")]
    assert load_settings(tmp_path / "settings.json") == (settings, [])
    assert json.loads((tmp_path / "lots.json").read_text()) == {"preplan_path_groups": [["/subs/a.fit"]]}
    assert (tmp_path / "only.txt").read_text() == "/subs/a.fit\n"


# --- settings


def test_every_setting_has_a_field_that_keeps_its_value(app: QApplication) -> None:
    steps: dict[type, Callable[[Any], Any]] = {
        bool: lambda value: not value,
        int: lambda value: value + 1,
        float: lambda value: round(0.984 * value, 4),
    }
    for info in describe_settings():
        editor = make_editor(info.name, info.unit)
        editor.set_value(info.default)
        assert editor.value() == info.default, info.name
        if type(info.default) in steps:
            other = steps[type(info.default)](info.default)
            editor.set_value(other)
            assert editor.value() == pytest.approx(other), info.name


def test_every_setting_is_in_one_group_and_has_a_title_there(app: QApplication) -> None:
    names = [info.name for info in describe_settings() if info.name not in ELSEWHERE]
    hits = {name: [group for group, starts in GROUPS.items() if name.startswith(starts)] for name in names}
    assert not {name: groups for name, groups in hits.items() if len(groups) != 1}, "see GROUPS"
    assert {group_of(name) for name in names} == set(GROUPS)
    assert group_of("report") == "picture"
    with pytest.raises(LookupError, match="colour_of_the_cat"):
        group_of("colour_of_the_cat")
    for language in ("en", "fr"):
        texts = words.catalogue(language)
        assert not [group for group in GROUPS if f"group_{group}" not in texts]
        assert not [name for name in names if f"label.{name}" not in texts], language
        explained = {name for name in names if Settings.model_fields[name].description} if language == "en" else set()
        assert not [name for name in names if f"help.{name}" not in texts and name not in explained], language


def test_panel_marks_searches_and_resets(app: QApplication) -> None:
    panel = SettingsPanel()
    assert panel.value("hot_pixel_sigma") == 6.0  # before any field is made
    panel.set_value("hot_pixel_sigma", 7.5)
    panel.build_all()
    assert set(panel.rows) == set(Settings.model_fields) - {"language", "output_name"}
    row = panel.rows["hot_pixel_sigma"]
    assert row.editor.value() == 7.5 and row.title.text().startswith("●") and not row.back.isHidden()
    panel.search.setText("hot pixel")
    wait_until(lambda: not panel.filtering)
    assert {name for name, each in panel.rows.items() if not each.title.isHidden()} >= {"hot_pixel_sigma"}
    assert panel.rows["memory_gb"].title.isHidden()
    panel.search.clear()
    panel.only_changed.setChecked(True)
    wait_until(lambda: not panel.filtering)
    assert [name for name, each in panel.rows.items() if not each.title.isHidden()] == ["hot_pixel_sigma"]
    row.back.click()
    assert panel.values() == {k: v for k, v in Settings().model_dump().items() if k not in ("language", "output_name")}


def test_form_and_panel_are_one(window: MainWindow) -> None:
    window.panel.build_all()
    for name, switch in window.form.switches.items():
        before = window.panel.value(name)
        click(switch)
        assert window.panel.value(name) is not before
        window.panel.set_value(name, before)
        assert switch.isChecked() is before


def test_settings_are_imported_and_what_is_wrong_is_said(window: MainWindow, tmp_path: Path) -> None:
    good = tmp_path / "zemosaic_config.json"
    good.write_text(json.dumps({"sds_mode_default": True, "stacking_kappa_low": 2.25, "use_gpu_phase5": True}))
    window.load_settings_file(good)
    assert window.settings()[0].stacking_kappa_low == 2.25 and window.form.sds.isChecked()
    assert "use_gpu_phase5" in window.form.message.text()
    good.write_text(json.dumps({"stacking_kappa_lo": 2}))
    window.load_settings_file(good)
    assert "stacking_kappa_low" in window.form.message.text() and window.settings()[0].stacking_kappa_low == 2.25
    window.save_preset("mine")
    window.apply_settings(Settings())
    window._load_preset("mine")
    assert window.settings()[0].stacking_kappa_low == 2.25


def test_impossible_settings_are_said_before_the_start(window: MainWindow, subs: Path, tmp_path: Path) -> None:
    know(window, subs, tmp_path / "out")
    window.panel.set_value("sds_min_batch_size", 50)
    window.refresh()
    assert not window.form.start_button.isEnabled()
    assert "sds_min_batch_size" in window.form.message.text()


# --- filter window


def test_five_thousand_subs_stream_in_without_a_rebuild(app: QApplication, window: MainWindow) -> None:
    filters = open_filter(window)
    resets: list[int] = []
    filters.table.frames.modelReset.connect(lambda: resets.append(1))
    window.scanner._jobs["scan"] = 99
    slow = []
    for first in range(0, 5000, 50):
        start = time.thread_time()
        window.scanner._heard(99, {"total": 5000, "rows": fake_rows(first, 50)})
        app.processEvents()
        slow.append(time.thread_time() - start)
    window.scanner._heard(99, {"done": True})
    assert filters.table.frames.rowCount() == len(window.store.rows) == 5000 and not resets
    assert sorted(slow)[len(slow) // 2] < 0.05, "a chunk must not hold up the window"
    wait_until(lambda: filters.sky.settled)
    start = time.thread_time()
    filters.table.frames.sort(0, Qt.SortOrder.DescendingOrder)
    window.store.select(range(0, 5000, 2))
    app.processEvents()
    assert time.thread_time() - start < 1
    assert filters.table.frames.index(0, 0).data() == "sub_04999.fit"
    wait_until(lambda: not filters.table.marking)
    assert len(filters.table.selectionModel().selectedRows()) == 2500
    filters.table.frames.sort(0, Qt.SortOrder.AscendingOrder)
    wait_until(lambda: not filters.table.marking)
    assert {index.row() for index in filters.table.selectionModel().selectedRows()} == set(range(0, 5000, 2))


def test_rectangle_and_lasso_select_in_the_table_and_back(window: MainWindow) -> None:
    window.store.append([row_from(row) for row in fake_rows(0, 100)])
    filters = open_filter(window)
    sky = filters.sky
    wait_until(lambda: sky.width() > 200 and sky.settled)
    centre = [sky._view.transform(sky.size()).map(row.middle).toPoint() for row in window.store.rows]
    sky.set_tool("rectangle")
    drag(sky, [centre[10] - QPoint(2, 20), centre[20] + QPoint(2, 20)])
    assert window.store.selection == set(range(10, 21))
    wait_until(lambda: not filters.table.marking)
    assert {index.row() for index in filters.table.selectionModel().selectedRows()} == set(range(10, 21))
    sky.set_tool("lasso")
    up, down = QPoint(0, 30), QPoint(0, -30)
    drag(sky, [centre[50] + up, centre[60] + up, centre[60] + down, centre[50] + down, centre[50] + up])
    assert set(range(51, 60)) <= window.store.selection <= set(range(50, 61))
    filters.table.selectRow(3)
    assert window.store.selection == {3}
    QTest.keyClick(sky, Qt.Key.Key_Escape)
    assert not window.store.selection and not filters.table.selectionModel().selectedRows()


def drag(widget: QWidget, points: list[QPoint]) -> None:
    QTest.mousePress(widget, LEFT, Qt.KeyboardModifier.NoModifier, points[0])
    for point in points[1:]:
        QTest.mouseMove(widget, point)
    QTest.mouseRelease(widget, LEFT, Qt.KeyboardModifier.NoModifier, points[-1])


def test_rules_leave_subs_out_and_let_them_in(window: MainWindow) -> None:
    store = window.store
    store.append([row_from(row) for row in fake_rows(0, 30)])
    store.update({i: {"fwhm": 2.0 + i, "stars": 100 - i, "sky": 500.0} for i in range(10)})
    bar = open_filter(window).exclude

    def choose(key: str, limit: float) -> None:
        bar.rule.setCurrentIndex(next(k for k in range(bar.rule.count()) if bar.rule.itemData(k).key == key))
        bar.limit.setValue(limit)

    choose("fwhm", 8.5)
    assert bar.matching() == [7, 8, 9] and bar.apply.text() == "Leave out 3"
    click(bar.apply)
    assert len(store.used()) == 27 and "FWHM above 8.5" in store.rows[7].excluded
    choose("stars", 96)
    assert bar.matching() == [5, 6]
    choose("distance", 0.2)
    assert bar.matching() and 14 not in bar.matching()
    choose("instrument", 0)
    bar.value.setCurrentText("S1")
    assert bar.matching() == [i for i in store.used() if i % 2]
    click(bar.restore)
    assert len(store.used()) == 30


def test_lots_are_merged_split_moved_saved_and_loaded(window: MainWindow, tmp_path: Path) -> None:
    store = window.store
    store.append([row_from(row) for row in fake_rows(0, 12)])
    panel = open_filter(window).lots
    store.set_lots([range(4), range(4, 8)], edited=False)
    assert not store.edited and store.rows[5].lot == 1
    store.split_lot(0)  # four nights: the last one is cut off
    assert store.lots == [[0, 1, 2], [3], [4, 5, 6, 7]] and store.edited
    store.move_to_lot([3, 9], 2)
    assert store.lots == [[0, 1, 2], [4, 5, 6, 7, 3, 9]]
    store.move_to_lot([0], 99)
    assert store.lots[-1] == [0] and store.rows[0].lot == 2
    store.merge_lots([0, 2])
    assert store.lots[0] == [1, 2, 0]
    panel.save(tmp_path / "lots.json")
    saved = [list(lot) for lot in store.lots]
    store.exclude([1], "bad")
    assert store.lots[0] == [2, 0]
    store.exclude([1], "")
    panel.load(tmp_path / "lots.json")
    assert store.lots == saved
    (tmp_path / "lots.json").write_text("[[]]")
    panel.load(tmp_path / "lots.json")
    assert "not loaded" in panel.note.text() and store.lots == saved


def test_pictures_of_the_selection_blink_in_one_tone(window: MainWindow, subs: Path, tmp_path: Path) -> None:
    take(window, subs, tmp_path / "out")
    filters = open_filter(window)
    filters.tabs.setCurrentIndex(2)
    window.store.select([1, 2])
    wait_until(lambda: len(filters.blink.images) == 2)
    assert filters.blink.strip.count() == 2 and not filters.blink.picture.empty
    filters.blink._next()
    assert filters.blink.strip.currentRow() == 1
    filters.tabs.setCurrentIndex(1)
    wait_until(lambda: not filters.depth_map.empty)
    window.store.select([0, 1])
    click(filters.measure)
    wait_until(lambda: window.store.rows[1].stars == window.store.rows[1].stars)


def test_what_was_decided_is_undone_and_redone(window: MainWindow) -> None:
    store = window.store
    store.append([row_from(row) for row in fake_rows(0, 12)])
    filters = open_filter(window)
    store.set_lots([range(6), range(6, 12)])
    steps: list[Callable[[], object]] = [
        lambda: store.exclude([0, 7], "bad"),
        lambda: store.exclude([0], "worse"),
        lambda: store.merge_lots([0, 1]),
        lambda: store.exclude([7], ""),
        lambda: store.split_lot(0),
        lambda: store.move_to_lot([3], 9),
        lambda: store.drop_lots([1]),
    ]
    states = [window.choices()]
    for step in steps:
        step()
        states.append(window.choices())
    assert all(a != b for a, b in pairwise(states))
    wait_until(lambda: filters.isActiveWindow() or filters.activateWindow())  # the desk may come to the front late
    for state in states[-2::-1]:
        QTest.keyClick(filters, Qt.Key.Key_Z, Qt.KeyboardModifier.ControlModifier)
        assert window.choices() == state
        assert [row.lot for row in store.rows] == [lot_of(store, i) for i in range(12)]
    for state in states[1:]:
        QTest.keyClick(filters, Qt.Key.Key_Y, Qt.KeyboardModifier.ControlModifier)
        assert window.choices() == state
    store.exclude([1], "")  # nothing changes: nothing to undo
    assert store.undo.count() == len(steps) + 1
    window.store.clear()
    assert not store.undo.canUndo()


def lot_of(store: FrameStore, i: int) -> int:
    return next((number for number, lot in enumerate(store.lots) if i in lot), -1)


def test_subs_are_moved_to_a_lot_nearby(app: QApplication) -> None:
    store = fake_store(100)
    store.set_lots([range(k, k + 5) for k in range(0, 100, 5)])
    assert store.near_lots([51, 52], 3) == [9, 10, 11]
    assert store.near_lots([51], 50) == list(range(20))


def test_missing_places_are_solved_with_the_settings_of_the_run(
    window: MainWindow, started: list[dict[str, str]], tmp_path: Path
) -> None:
    window.form.set_inputs([tmp_path])
    window.store.append([row_from({"path": f"/subs/{i}.fit", "wcs": "header" if i else ""}) for i in range(3)])
    window.panel.set_value("solver_timeout_s", 7.0)
    filters = open_filter(window)
    filters.refresh()
    click(filters.solve)
    assert started[-1]["command"].startswith(f"-m zemosaic solve {tmp_path}")
    assert "--write-sidecars" in started[-1]["command"] and started[-1]["only.txt"] == "/subs/0.fit\n"
    assert json.loads(started[-1]["settings.json"])["solver_timeout_s"] == 7.0
    rescans: list[int] = []
    filters.rescan.connect(lambda: rescans.append(1))
    filters._solved(3, "0.fit: not solved: too few stars\n1.fit: 10 20", "")
    assert rescans == [1] and "0.fit: not solved: too few stars" in filters.message.text()
    filters._solved(1, "", "no stars")
    assert rescans == [1] and "no stars" in filters.message.text()


def test_csv_has_every_sub(tmp_path: Path, app: QApplication) -> None:
    store = fake_store(3)
    store.update({0: {"fwhm": 2.5}})
    store.exclude([1], "left, out")
    export_csv(store, tmp_path / "subs.csv")
    with (tmp_path / "subs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["used"] for row in rows] == ["1", "0", "1"] and rows[1]["reason"] == "left, out"
    assert rows[0]["fwhm"] == "2.5" and rows[2]["fwhm"] == "" and rows[0]["path"] == "/subs/sub_00000.fit"


# --- never in the way


def test_slices_let_the_window_live_and_are_dropped_for_newer_work(app: QApplication) -> None:
    done: list[str] = []

    def work(name: str, steps: int) -> Iterator[None]:
        for _ in range(steps):
            end = time.perf_counter() + 0.002
            while time.perf_counter() < end:
                pass
            done.append(name)
            yield

    slices, beats = Slices(app), []
    slices.start(work("a", 10**6))
    QTimer.singleShot(0, lambda: beats.append(len(done)))
    wait_until(lambda: beats)
    assert beats[0] < 100  # it did not wait for all of it
    slices.start(work("b", 30))
    wait_until(lambda: not slices.busy)
    assert done.count("b") == 30 and done[-1] == "b"
    slices.start(work("c", 3))
    slices.finish()
    assert done[-3:] == ["c"] * 3 and not slices.busy


@pytest.mark.skipif(not hasattr(os, "getpriority"), reason="priorities are other things here")
def test_other_processes_give_way_to_the_window(app: QApplication) -> None:
    seen: list[int] = []
    process = LineProcess(niceness=4)
    process.line.connect(lambda line: seen.append(int(line)))
    # It says its priority when it hears something, and by then the window has lowered it.
    process.start(["-c", "import os; input(); print(os.getpriority(os.PRIO_PROCESS, 0))"])
    wait_until(lambda: process.given_way)
    process.write("now\n")
    wait_until(lambda: seen)
    wait_until(lambda: not process.running)
    assert seen == [max(4, os.getpriority(os.PRIO_PROCESS, 0))]


def test_no_click_makes_a_long_piece_of_work_with_thousands_of_subs(window: MainWindow, app: QApplication) -> None:
    """The time of the window's own thread in one go; the figures are in benchmarks/README.md."""
    window.store.append([row_from(row) for row in fake_rows(0, 5000)])
    filters = open_filter(window)
    store, table = window.store, filters.table
    store.set_lots([range(k, k + 10) for k in range(0, 5000, 10)])
    wait_until(lambda: filters.sky.settled)
    acts: list[Callable[[], object]] = [
        lambda: store.select(range(0, 5000, 2)),
        lambda: table.frames.sort(8, Qt.SortOrder.DescendingOrder),
        table.selectAll,
        filters.exclude.selected.click,
        store.undo.undo,
        lambda: store.merge_lots([3, 4]),
        lambda: filters.sky.set_mode("night"),
    ]
    longest = []
    for act in acts:
        pieces = []
        start = time.thread_time()
        act()
        for _ in range(200):
            app.processEvents()
            pieces.append(time.thread_time() - start)
            start = time.thread_time()
            if filters.sky.settled and not table.marking:
                break
        longest.append(max(pieces))
    assert sorted(longest)[len(longest) // 2] < 0.05 and max(longest) < 0.25, longest  # on a busy machine, too


# --- looks, languages, results


def test_another_language_keeps_everything(desk: Desk, subs: Path, tmp_path: Path) -> None:
    know(desk.window, subs, tmp_path / "out")
    desk.window.panel.set_value("hot_pixel_sigma", 9.0)
    desk.window.store.exclude([2], "x")
    desk.reopen("fr")
    window = desk.window
    assert window.form.start_button.text() == "Créer la mosaïque"
    wait_until(lambda: len(window.store.rows) == 8 and window.store.rows[2].excluded)
    assert window.panel.value("hot_pixel_sigma") == 9.0 and window.form.output() == tmp_path / "out"
    assert window.settings()[0].language == "fr"


def test_places_and_sizes_are_remembered(desk: Desk) -> None:
    first = desk.window
    first.resize(790, 700)  # no larger than the screen of the test
    first._splits["main/split"].setSizes([390, 300])
    open_filter(first)._splits["filter/split_right"].setSizes([200, 400])
    parts = [first.size(), first._splits["main/split"].sizes(), first.filter._splits["filter/split_right"].sizes()]
    desk.reopen("en")
    again = desk.window
    assert [again.size(), again._splits["main/split"].sizes()] == parts[:2]
    upper, lower = open_filter(again)._splits["filter/split_right"].sizes()
    assert upper / lower == pytest.approx(parts[2][0] / parts[2][1], rel=0.02)


def test_themes_change_the_palette(desk: Desk, app: QApplication) -> None:
    shades = {}
    for theme in ("light", "dark"):
        desk.window.choose_theme(theme)
        wait_until(lambda: not desk.skin.changing)
        shades[theme] = app.palette().window().color().lightness()
    assert shades["dark"] < 60 < 200 < shades["light"]


def test_the_picture_grows_while_the_run_goes(window: MainWindow, tmp_path: Path) -> None:
    for name in ("preview.png", "preview_coverage.png"):
        image = QImage(40, 30, QImage.Format.Format_RGB32)
        image.fill(Qt.GlobalColor.red)
        image.save(str(tmp_path / name))
    window.view.begin(RunProgress("sds"))
    event = {"event": "info", "key": "live_preview", "text": "", "values": {"path": str(tmp_path / "preview.png")}}
    window.view.hear(event)
    wait_until(lambda: not (window.view.picture.empty or window.view.coverage.empty))
    assert window.view.log.toPlainText() == ""


def test_the_verdict_and_its_page_are_told_with_the_result(window: MainWindow, tmp_path: Path) -> None:
    view = window.view
    view.begin(RunProgress("sds"))
    for key, values in (
        ("report_verdict", {"grade": "PASS", "headline": "All 9 checks passed."}),
        ("report_written", {"path": "r.html"}),
    ):
        view.hear({"event": "info", "key": key, "text": key, "values": values})
    view.finish({"product": str(tmp_path / "m.fits"), "exit_status": 0, "summary": "", "route": "sds"})
    assert view.banner.headline.text() == "The mosaic is ready. All 9 checks passed."
    assert view.banner.report == Path("r.html") and not view.banner.open_report.isHidden()
    view.begin(RunProgress("sds"))
    view.finish({"product": None, "exit_status": 1, "summary": "no room", "route": ""})
    assert view.banner.report is None and view.banner.open_report.isHidden()


def test_the_forecast_is_of_the_run_that_would_start(
    window: MainWindow, subs: Path, tmp_path: Path, started: list[dict[str, str]]
) -> None:
    know(window, subs, tmp_path / "out")
    paths = [row.path for row in window.store.rows]
    window.store.set_lots([range(4), range(4, 8)])
    window.store.exclude([7], "bad")
    window.refresh()
    click(window.form.estimate_button)
    window.start()
    plan, run = started
    assert plan["command"].startswith("-m zemosaic plan") and run["command"].startswith("-m zemosaic run")
    assert plan["only.txt"] == run["only.txt"] == "".join(f"{path}\n" for path in paths[:7])
    assert plan["lots.json"] == run["lots.json"] and plan["settings.json"] == run["settings.json"]


def test_plan_is_told_in_plain_words(app: QApplication) -> None:
    spread = {"value": 90.0, "low": 60.0, "high": 130.0}
    phases = [{"phase": "phase_lots", "wall_seconds": 60.0}]
    size = {"value": 2.0 * 2**30}
    cost = {"wall_seconds": spread, "memory_bytes": size, "disk_bytes": size, "scratch_bytes": 0.0, "phases": phases}
    canvas = {"width_px": 4000, "height_px": 3000}
    text, seconds = read_plan({"files": {"used": 60}, "canvas": canvas, "forecast": cost, "weak_links": [1, 2]})
    assert "4000 x 3000" in text and "1:30" in text and "2:10" in text and "2.0 GB of memory" in text
    assert seconds == {"lots": 60.0}
