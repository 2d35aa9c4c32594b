"""How long the window keeps a person waiting: a heart beats while 5,000 subs stream in and are worked with in a run.

    QT_QPA_PLATFORM=offscreen python benchmarks/gui_latency.py [--subs 5000]

Two figures for every step: the longest time on the clock between two turns of the event loop, and the longest time that
the window's own thread worked in one go (what is left when the machine is busy with other things).
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
from PySide6.QtCore import QEventLoop, QPointF, QSettings, Qt, QTimer
from PySide6.QtWidgets import QApplication

from zemosaic.demo import make_field, tangent_header
from zemosaic.gui.app import Desk


class Heart:
    """Beats as often as the event loop lets it."""

    def __init__(self) -> None:
        self.timer = QTimer()
        self.timer.setTimerType(Qt.TimerType.PreciseTimer)
        self.timer.timeout.connect(self.beat)
        self.timer.start(2)
        self.reset()

    def reset(self) -> None:
        self.wall, self.work = time.perf_counter(), time.thread_time()
        self.longest_wall = self.longest_work = 0.0

    def beat(self) -> None:
        wall, work = time.perf_counter(), time.thread_time()
        self.longest_wall = max(self.longest_wall, wall - self.wall)
        self.longest_work = max(self.longest_work, work - self.work)
        self.wall, self.work = wall, work


def make_headers(folder: Path, count: int) -> None:
    """Small frames with the headers of a wide mosaic."""
    folder.mkdir()
    pixels = np.full((48, 27), 1000, np.uint16)
    for i in range(count):
        header = tangent_header(80 + i % 70 * 0.03, 20 + i // 70 * 0.03, pixels.shape, scale=96.0, angle_deg=i % 7)
        header["EXPTIME"], header["INSTRUME"] = 10.0, f"S{50 - i % 2 * 20}"
        header["DATE-OBS"] = f"2026-01-{1 + i * 20 // count:02d}T20:{i // 60 % 60:02d}:{i % 60:02d}"
        fits.PrimaryHDU(pixels, header).writeto(folder / f"sub_{i:05d}.fit")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--subs", type=int, default=5000)
    count = parser.parse_args().subs
    started = time.perf_counter()
    app = QApplication(sys.argv[:1])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        desk = Desk(app, QSettings(str(folder / "memory.ini"), QSettings.Format.IniFormat), folder)
        app.processEvents()
        print(f"window shown {time.perf_counter() - started:.2f} s after QApplication")
        make_headers(folder / "subs", count)
        make_field(folder / "field", frames=60, panels=(3, 2), shape=(480, 320))
        measure(app, desk, folder, count)
        desk.window.engine.kill()
        desk.window.engine.wait(5000)
        desk.window.close()


def measure(app: QApplication, desk: Desk, folder: Path, count: int) -> None:
    """Every step while an engine works."""
    window, heart = desk.window, Heart()

    def turn(test: Callable[[], bool], limit: float = 300) -> None:
        end = time.perf_counter() + limit
        while not test() and time.perf_counter() < end:
            app.processEvents(QEventLoop.ProcessEventsFlag.AllEvents, 5)

    def step(what: str, act: Callable[[], object], done: Callable[[], bool] = lambda: True) -> None:
        turn(lambda: True)
        heart.reset()
        act()
        turn(done)
        end = time.perf_counter() + 0.5
        turn(lambda: time.perf_counter() > end)
        if not window.engine.running:
            window.start()
        print(f"{what:42s} clock {1000 * heart.longest_wall:6.0f} ms   work {1000 * heart.longest_work:6.0f} ms")

    step("settings panel is made", lambda: None, lambda: len(window.panel.rows) > 60)
    window.set_inputs([folder / "field"])
    turn(lambda: not window.scanner.busy("scan"))
    window.refresh()
    step("run starts", window.start)
    step("filter window opens", window.open_filter)
    filters, store = window.filter, window.store
    assert filters is not None
    step(
        f"{count} headers stream in",
        lambda: window.set_inputs([folder / "subs"]),
        lambda: len(store.rows) == count and not window.scanner.busy("scan"),
    )
    sky, table = filters.sky, filters.table
    step("colour by night", lambda: sky.set_mode("night"), lambda: sky.settled)
    step("zoom", lambda: [sky.zoom(1.2, QPointF(200, 200)) for _ in range(5)], lambda: sky.settled)
    step("fit", sky.fit, lambda: sky.settled)
    step("select half of the subs", lambda: store.select(range(0, count, 2)), lambda: sky.settled)
    step("sort by date", lambda: table.frames.sort(1, Qt.SortOrder.DescendingOrder))
    step("scroll", lambda: [table.verticalScrollBar().setValue(k) for k in range(0, count, 50)])
    step("leave the selection out", filters.exclude.selected.click, lambda: sky.settled)
    step("let all in again", filters.exclude.restore.click, lambda: sky.settled)
    step("coverage map", lambda: filters.tabs.setCurrentIndex(1), lambda: not filters.depth_map.empty)
    step("500 lots are set", lambda: store.set_lots([range(k, k + 10) for k in range(0, count - 9, 10)]))
    step("a lot is merged", lambda: store.merge_lots([3, 4]))


if __name__ == "__main__":
    main()
