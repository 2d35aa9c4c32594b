"""How long the window keeps a person waiting: a heart beats while 5,000 subs stream in and are worked with in a run.

    QT_QPA_PLATFORM=offscreen python benchmarks/gui_latency.py [--subs 5000] [--limit 50]

Two figures for every step: the longest time on the clock between two turns of the event loop, and the longest time that
the window's own thread worked in one go (what is left when the machine is busy with other things). A run is under way
all the time. Exit status 1: a step worked longer than the limit.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

import numpy as np
from astropy.io import fits
from PySide6.QtCore import QCoreApplication, QEvent, QEventLoop, QPoint, QPointF, QSettings, Qt, QTimer
from PySide6.QtGui import QMouseEvent
from PySide6.QtWidgets import QApplication, QWidget

from zemosaic.demo import make_field, tangent_header
from zemosaic.gui.app import Desk
from zemosaic.gui.exclude_bar import RULES
from zemosaic.gui.filter_window import FilterWindow
from zemosaic.gui.sky_view import COLOUR_MODES
from zemosaic.gui.table_model import COLUMNS

LEFT, NONE = Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier


class Heart:
    """Beats as often as the event loop lets it."""

    def __init__(self) -> None:
        self.reset()
        self.timer = QTimer()
        self.timer.setTimerType(Qt.TimerType.PreciseTimer)
        self.timer.timeout.connect(self.beat)
        self.timer.start(2)

    def reset(self) -> None:
        self.wall, self.work = time.perf_counter(), time.thread_time()
        self.longest_wall = self.longest_work = 0.0

    def beat(self) -> None:
        wall, work = time.perf_counter(), time.thread_time()
        self.longest_wall = max(self.longest_wall, wall - self.wall)
        self.longest_work = max(self.longest_work, work - self.work)
        self.wall, self.work = wall, work


class Bench:
    """The program with a run under way, and what is measured of it."""

    def __init__(self, app: QApplication, desk: Desk) -> None:
        self.app, self.desk, self.heart = app, desk, Heart()
        self.worst_work = 0.0

    def turn(self, test: Callable[[], object], limit: float = 300) -> None:
        """Let the event loop go round until something is true."""
        end = time.perf_counter() + limit
        while not test() and time.perf_counter() < end:
            self.app.processEvents(QEventLoop.ProcessEventsFlag.AllEvents, 1)
            self.app.sendPostedEvents(None, QEvent.Type.DeferredDelete)

    def rest(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        self.turn(lambda: time.perf_counter() > end)

    def step(self, what: str, *acts: Callable[[], object], done: Callable[[], object] = lambda: True) -> None:
        """Do something (each act in a turn of its own), wait until it is done and all that follows is too."""
        self.rest(0.05)
        self.heart.reset()
        for act in acts:
            act()
            self.rest(0.003)
        self.turn(done)
        self.rest(0.5)
        self.heart.beat()
        work = 1000 * self.heart.longest_work
        print(f"{what:44s} clock {1000 * self.heart.longest_wall:6.0f} ms   work {work:6.0f} ms", flush=True)
        self.worst_work = max(self.worst_work, work)
        if not self.desk.window.engine.running:
            self.desk.window.start()
            self.rest(1.0)


def make_headers(folder: Path, count: int) -> None:
    """Small frames with the headers of a wide mosaic."""
    folder.mkdir()
    pixels = np.full((48, 27), 1000, np.uint16)
    for i in range(count):
        header = tangent_header(80 + i % 70 * 0.03, 20 + i // 70 * 0.03, pixels.shape, scale=96.0, angle_deg=i % 7)
        header["EXPTIME"], header["INSTRUME"] = 10.0, f"S{50 - i % 2 * 20}"
        header["DATE-OBS"] = f"2026-01-{1 + i * 20 // count:02d}T20:{i // 60 % 60:02d}:{i % 60:02d}"
        fits.PrimaryHDU(pixels, header).writeto(folder / f"sub_{i:05d}.fit")


def mouse(widget: QWidget, kind: QEvent.Type, point: QPoint) -> None:
    held = LEFT if kind != QEvent.Type.MouseButtonRelease else Qt.MouseButton.NoButton
    button = Qt.MouseButton.NoButton if kind == QEvent.Type.MouseMove else LEFT
    where = QPointF(point)
    event = QMouseEvent(kind, where, QPointF(widget.mapToGlobal(point)), button, held, NONE)
    QCoreApplication.sendEvent(widget, event)


def drag(widget: QWidget, points: list[QPoint]) -> list[Callable[[], object]]:
    """The moves of a hand that drags; each is an act."""
    kinds = [QEvent.Type.MouseButtonPress, *[QEvent.Type.MouseMove] * (len(points) - 1), QEvent.Type.MouseButtonRelease]
    return [lambda k=k, p=p: mouse(widget, k, p) for k, p in zip(kinds, [*points, points[-1]], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--subs", type=int, default=5000)
    parser.add_argument("--limit", type=float, default=50.0, metavar="MS")
    given = parser.parse_args()
    started = time.perf_counter()
    app = QApplication(sys.argv[:1])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        desk = Desk(app, QSettings(str(folder / "memory.ini"), QSettings.Format.IniFormat), folder)
        app.processEvents()
        print(f"window shown {time.perf_counter() - started:.2f} s after QApplication")
        make_headers(folder / "subs", given.subs)
        make_field(folder / "field", frames=60, panels=(3, 2), shape=(640, 480))
        bench = Bench(app, desk)
        main_window(bench, folder)
        filter_window(bench, folder, given.subs)
        whole_program(bench)
        load = ", ".join(f"{each:.1f}" for each in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
        print(f"{os.cpu_count()} cores, load {load}")
        desk.window.engine.kill()
        desk.window.engine.wait(5000)
        desk.window.close()
    sys.exit(bench.worst_work > given.limit)


def main_window(bench: Bench, folder: Path) -> None:
    """From the first look to a run, and the settings while it goes."""
    window = bench.desk.window
    bench.step("settings panel is made", done=lambda: len(window.panel.rows) > 60)
    window.set_inputs([folder / "field"])
    bench.turn(lambda: not window.scanner.busy("scan"))
    window.refresh()
    bench.step("a run starts", window.start, done=lambda: window.view.log.toPlainText())
    for n, place in enumerate(("picture", "coverage", "log", "settings")):
        bench.step(f"tab: {place}", lambda n=n: window.view.tabs.setCurrentIndex(n))
    search = window.panel.search
    typed = [lambda k=k: search.setText("hot pixel"[:k]) for k in range(10)]
    bench.step("type in the settings search", *typed, search.clear)
    bench.step("changed settings only", lambda: window.panel.only_changed.setChecked(True))
    bench.step("all settings", lambda: window.panel.only_changed.setChecked(False))
    bench.step("reset all settings", lambda: window.panel.set_value("hot_pixel_sigma", 7.0), window.panel.reset.click)
    window.view.tabs.setCurrentIndex(0)


def filter_window(bench: Bench, folder: Path, count: int) -> None:
    """5,000 subs."""
    window = bench.desk.window
    store = window.store
    everything_is_there = lambda: len(store.rows) == count and not window.scanner.busy("scan")  # noqa: E731
    bench.step(f"{count} headers stream in", lambda: window.set_inputs([folder / "subs"]), done=everything_is_there)
    bench.step("filter window opens", window.open_filter, done=lambda: window.filter and window.filter.ready)
    filters = window.filter
    assert filters is not None
    bench.step(
        f"{count} headers stream into it",
        lambda: window.set_inputs([folder / "subs"]),
        done=lambda: everything_is_there() and filters.sky.settled,
    )
    _sky(bench, filters)
    _table(bench, filters, count)
    _rules_and_lots(bench, filters, count)


def _sky(bench: Bench, filters: FilterWindow) -> None:
    sky = filters.sky
    settled = lambda: sky.settled  # noqa: E731
    bench.step("measures come in", *_measures(filters), done=settled)
    for mode in (*COLOUR_MODES[1:], COLOUR_MODES[0]):
        bench.step(f"colour by {mode}", lambda m=mode: sky.set_mode(m), done=settled)
    bench.step("zoom", *[lambda: sky.zoom(1.2, QPointF(200, 200))] * 5, done=settled)
    width, height = sky.width(), sky.height()
    bench.step("move", *drag(sky, [QPoint(width // 2 + 5 * k, height // 2) for k in range(20)]), done=settled)
    bench.step("fit", sky.fit, done=settled)
    around = [
        QPoint(round(width * (0.5 + 0.3 * np.cos(a))), round(height * (0.5 + 0.3 * np.sin(a))))
        for a in np.linspace(0, 2 * np.pi, 60)
    ]
    sky.set_tool("lasso")
    bench.step("lasso", *drag(sky, around), done=settled)
    sky.set_tool("rectangle")
    bench.step(
        "rectangle", *drag(sky, [QPoint(width // 3, height // 3), QPoint(width // 2, height // 2)]), done=settled
    )
    sky.set_tool("pan")
    bench.step("click on a sub", *drag(sky, [QPoint(width // 2, height // 2)]), done=settled)


def _measures(filters: FilterWindow) -> list[Callable[[], object]]:
    store = filters.store
    facts = [{"fwhm": 2 + i % 100 / 50, "stars": 50 + i % 37, "sky": 900 + i % 211} for i in range(len(store.rows))]
    return [
        lambda first=first: store.update(dict(enumerate(facts[first : first + 20], first)))
        for first in range(0, len(facts), 20)
    ]


def _table(bench: Bench, filters: FilterWindow, count: int) -> None:
    table, store, settled = filters.table, filters.store, lambda: filters.sky.settled
    header = table.horizontalHeader()
    bench.step("select every other sub", lambda: store.select(range(0, count, 2)), done=settled)
    for k, column in enumerate(COLUMNS):
        for down in (False, True):
            way = Qt.SortOrder.DescendingOrder if down else Qt.SortOrder.AscendingOrder
            bench.step(f"sort by {column.key}{', down' * down}", lambda k=k, way=way: header.setSortIndicator(k, way))
    bench.step("scroll", *[lambda k=k: table.verticalScrollBar().setValue(k) for k in range(0, count, 50)])
    bench.step("select all", table.selectAll, done=settled)
    bench.step("select none", lambda: store.select(()), done=settled)


def _rules_and_lots(bench: Bench, filters: FilterWindow, count: int) -> None:
    store, bar, lots = filters.store, filters.exclude, filters.lots
    settled = lambda: filters.sky.settled  # noqa: E731
    for k, rule in enumerate(RULES):
        bench.step(f"rule: {rule.key}", lambda k=k: bar.rule.setCurrentIndex(k))
        if rule.measure is not None:
            turns = [lambda v=rule.start * v / 10: bar.limit.setValue(v) for v in range(10, 0, -1)]
            bench.step(f"limit of {rule.key}", *turns)
            bench.step(f"leave out by {rule.key}", bar.apply.click, done=settled)
            bench.step("let all in again", bar.restore.click, done=settled)
    store.select(range(0, count, 2))
    bench.step("leave the selection out", bar.selected.click, done=settled)
    bench.step("undo", filters.undo.undo, done=settled)
    bench.step("redo", filters.undo.redo, done=settled)
    bench.step("let all in again", bar.restore.click, done=settled)
    bench.step("coverage map", lambda: filters.tabs.setCurrentIndex(1), done=lambda: not filters.depth_map.empty)
    bench.step("back to the sky", lambda: filters.tabs.setCurrentIndex(0))
    if not filters.sds.isChecked():
        filters.sds.click()
    groups = [range(k, k + 10) for k in range(0, count - 9, 10)]
    bench.step(f"{len(groups)} lots are set", lambda: store.set_lots(groups), done=settled)
    bench.step("a lot is chosen", lambda: lots.choose([7]), done=settled)
    bench.step("two lots are merged", lambda: lots.choose([3, 4]), lots.merge.click, done=settled)
    bench.step("a lot is split", lambda: lots.choose([3]), lots.split.click, done=settled)
    bench.step("subs are moved", lambda: store.select(range(100, 200)), lambda: store.move_to_lot(range(100, 200), 7))
    bench.step("lots are offered", lots.move_button.click)
    bench.step("all lots are chosen", lots.table.selectAll, done=settled)
    bench.step("lots are forgotten", lambda: store.set_lots([]), done=settled)
    bench.step("filter window closes", filters.close)


def whole_program(bench: Bench) -> None:
    """Looks and languages, with both windows open."""
    desk = bench.desk
    desk.window.open_filter()
    bench.turn(lambda: desk.window.filter and desk.window.filter.ready)
    for theme in ("dark", "light"):
        bench.step(f"theme: {theme}", lambda t=theme: desk.window.choose_theme(t), done=lambda: not desk.skin.changing)
    desk.window.engine.kill()
    bench.turn(lambda: not desk.window.engine.running)
    for language in ("fr", "en"):
        bench.step(
            f"language: {language}",
            lambda c=language: desk.change_language(c),
            done=lambda: (
                not desk.changing and not desk.window.scanner.busy("scan") and len(desk.window.panel.rows) > 60
            ),
        )


if __name__ == "__main__":
    main()
