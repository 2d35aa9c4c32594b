"""The right half of the main window: the picture as it grows, the log, how far the run is, and what came of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PySide6.QtCore import QTimer, QUrl, Signal
from PySide6.QtGui import QDesktopServices
from PySide6.QtWidgets import (
    QHBoxLayout,
    QPlainTextEdit,
    QProgressBar,
    QTabWidget,
    QVBoxLayout,
    QWidget,
)

from zemosaic.cli import EXIT_PARTLY
from zemosaic.gui.i18n import tr
from zemosaic.gui.pictures import PictureLoader
from zemosaic.gui.progress import RunProgress, clock_text
from zemosaic.gui.widgets import Card, PictureView, Switch, button, label

_MARKS = {"warning": "⚠  ", "error": "✖  ", "failed": "✖  ", "done": "✔  ", "phase": "▸  "}
_LOG_LINES = 5000
_LOG_AT_ONCE = 300  # lines a beat: a few milliseconds
_BEAT_MS = 200  # how often the log and the bar are brought up to date


@dataclass(frozen=True)
class Verdict:
    """What a finished mosaic was judged to be: PASS, WARN or FAIL (empty: not judged), in a sentence, on a page."""

    grade: str = ""
    headline: str = ""
    page: Path | None = None


class ResultBanner(Card):
    """What came of the run, and the ways to it."""

    def __init__(self) -> None:
        super().__init__()
        self.product: Path | None = None
        self.report: Path | None = None
        self.headline = label("", "headline", wrap=True)
        self.detail = label("", "dim", wrap=True)
        self.open_report = button(tr("open_report"), tip=tr("open_report_tip"))
        self.open_folder = button(tr("open_folder"), tip=tr("open_folder_tip"))
        self.open_picture = button(tr("open_picture"), tip=tr("open_picture_tip"))
        self.open_report.clicked.connect(lambda: _open(self.report))
        self.open_folder.clicked.connect(lambda: _open(self.product and self.product.parent))
        self.open_picture.clicked.connect(lambda: _open(self.product and self.product.with_suffix(".png")))
        row = QHBoxLayout()
        for widget in (self.open_report, self.open_picture, self.open_folder):
            row.addWidget(widget)
        row.addStretch(1)
        for text in (self.headline, self.detail):
            self.body.addWidget(text)
        self.body.addLayout(row)
        self.hide()

    def tell(self, result: Mapping[str, Any], verdict: Verdict, *, stopped: bool) -> None:
        """Show the result of a run and what it was judged to be."""
        self.product = Path(result["product"]) if result.get("product") else None
        self.report = verdict.page if self.product else None
        if self.product:
            ready = tr("result_fallback" if result["exit_status"] == EXIT_PARTLY else "result_done")
            self.headline.setText(f"{ready} {verdict.headline}".strip())
            self.detail.setText(f"{result['summary']}\n{self.product}")
        elif stopped:
            self.headline.setText(tr("result_stopped"))
            self.detail.setText(tr("result_stopped_detail"))
        elif result.get("crashed"):
            self.headline.setText(tr("result_crashed"))
            self.detail.setText(tr("result_crashed_detail", reason=result["summary"] or result["exit_status"]))
        else:
            self.headline.setText(tr("result_failed"))
            self.detail.setText(result["summary"] or tr("result_see_log"))
        if self.product and result["exit_status"] == 0:
            kind = {"WARN": "warn", "FAIL": "bad"}.get(verdict.grade, "good")
        else:
            kind = "warn" if self.product or stopped else "bad"
        self.headline.setProperty("kind", kind)
        self.headline.style().unpolish(self.headline)
        self.headline.style().polish(self.headline)
        self.open_report.setVisible(self.report is not None)
        self.open_folder.setVisible(self.product is not None)
        self.open_picture.setVisible(self.product is not None)
        self.show()


def _open(path: Path | None) -> None:
    if path is not None:
        QDesktopServices.openUrl(QUrl.fromLocalFile(str(path)))


class RunView(QWidget):
    """Follows a run. Signals: ``stop()`` and ``kill()`` when the user wants an end."""

    stop = Signal()
    kill = Signal()

    def __init__(self, settings_page: QWidget) -> None:
        super().__init__()
        self.progress: RunProgress | None = None  # of the run that is under way
        self._phase_title = ""
        self._stage_text = ""
        self._stopping = False
        self._verdict = Verdict()
        self._log_waiting: deque[str] = deque(maxlen=_LOG_LINES)
        self.picture = PictureView(tr("picture_empty"))
        self.coverage = PictureView(tr("coverage_live_empty"))
        self._picture_loader, self._coverage_loader = PictureLoader(self), PictureLoader(self)
        self._picture_loader.loaded.connect(self.picture.show_image)
        self._coverage_loader.loaded.connect(self.coverage.show_image)
        self.banner = ResultBanner()
        self.tabs = QTabWidget()
        self.tabs.setDocumentMode(True)
        self.tabs.addTab(self.picture, tr("tab_picture"))
        self.tabs.addTab(self.coverage, tr("tab_coverage"))
        self.tabs.addTab(self._log_page(), tr("tab_log"))
        self.tabs.addTab(settings_page, tr("tab_settings"))
        card = Card()
        card.body.addWidget(self.tabs)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(10)
        layout.addWidget(self.banner)
        layout.addWidget(card, 1)
        layout.addWidget(self._strip())
        self._beat = QTimer(self)
        self._beat.setInterval(_BEAT_MS)
        self._beat.timeout.connect(self._refresh)

    def _log_page(self) -> QWidget:
        self.log = QPlainTextEdit()
        self.log.setReadOnly(True)
        self.log.setMaximumBlockCount(_LOG_LINES)
        self.log.setAccessibleName(tr("tab_log"))
        self.details = Switch(tr("log_details"))
        page = QWidget()
        layout = QVBoxLayout(page)
        layout.setContentsMargins(0, 6, 0, 0)
        layout.addWidget(self.log, 1)
        layout.addWidget(self.details)
        return page

    def _strip(self) -> Card:
        self.strip = Card()
        self.phase = label("", "title")
        self.eta = label("", "dim")
        self.bar = QProgressBar()
        self.bar.setRange(0, 1000)
        self.bar.setTextVisible(False)
        self.bar.setAccessibleName(tr("progress"))
        self.stop_button = button(tr("stop"), tip=tr("stop_tip"))
        self.stop_button.clicked.connect(self._ask_stop)
        row = QHBoxLayout()
        row.addWidget(self.phase)
        row.addStretch(1)
        row.addWidget(self.eta)
        low = QHBoxLayout()
        low.addWidget(self.bar, 1)
        low.addWidget(self.stop_button)
        self.strip.body.addLayout(row)
        self.strip.body.addLayout(low)
        self.strip.hide()
        return self.strip

    # --- a run

    def begin(self, progress: RunProgress) -> None:
        """A run starts."""
        self.progress, self._stopping = progress, False
        self._verdict = Verdict()
        self._log_waiting.clear()
        self._phase_title, self._stage_text = tr("starting"), ""
        self.banner.hide()
        self.log.clear()
        self.picture.show_text(tr("picture_waiting"))
        self.coverage.show_text(tr("picture_waiting"))
        self.picture.fit()
        self.tabs.setCurrentIndex(0)
        self.stop_button.setText(tr("stop"))
        self.stop_button.setToolTip(tr("stop_tip"))
        self.strip.show()
        self._refresh()
        self._beat.start()

    def hear(self, event: Mapping[str, Any]) -> None:
        """One event of the run; what is slow to show waits for the next beat."""
        if self.progress is None:
            return
        kind, values = event.get("event"), event.get("values", {})
        self.progress.hear(event)
        if event.get("key") == "live_preview":
            self._show_preview(Path(values["path"]))
            return
        if event.get("key") == "report_verdict":
            self._verdict = replace(self._verdict, grade=values["grade"], headline=values["headline"])
        elif event.get("key") == "report_written":
            self._verdict = replace(self._verdict, page=Path(values["path"]))
        if kind == "phase":
            self._phase_title, self._stage_text = event["text"], ""
        elif kind == "progress" and values.get("total"):
            self._stage_text = f"{event['text']} {values['current']}/{values['total']}"
        if kind in ("info", "warning", "error", "phase", "done", "failed") or (
            kind == "detail" and self.details.isChecked()
        ):
            self._log_waiting.append(_MARKS.get(kind, "     ") + event["text"])

    def _show_preview(self, path: Path) -> None:
        self._picture_loader.load(path)
        self._coverage_loader.load(path.with_name(f"{path.stem}_coverage{path.suffix}"))

    def finish(self, result: Mapping[str, Any]) -> dict[str, float]:
        """The run is over; returns what its phases took, if it went to the end."""
        self._beat.stop()
        while self._log_waiting:
            self._write_log()
        self._refresh()
        self.banner.tell(result, self._verdict, stopped=self._stopping)
        seconds = self.progress.finish() if self.progress and self.banner.product else {}
        self.progress = None
        self.strip.hide()
        if self.banner.product:
            self._picture_loader.load(self.banner.product.with_suffix(".png"))
            self.tabs.setCurrentIndex(0)
        elif not self._stopping:
            self.tabs.setCurrentIndex(2)
        return seconds

    def _ask_stop(self) -> None:
        if self._stopping:
            self.kill.emit()
            return
        self._stopping = True
        self.stop_button.setText(tr("stop_now"))
        self.stop_button.setToolTip(tr("stop_now_tip"))
        self._refresh()
        self.stop.emit()

    def _refresh(self) -> None:
        if self._log_waiting:
            self._write_log()
        if self.progress is None:
            return
        self.bar.setValue(round(1000 * self.progress.fraction))
        if self._stopping:
            self.phase.setText(tr("stopping"))
        else:
            self.phase.setText(" · ".join(filter(None, (self._phase_place(), self._phase_title, self._stage_text))))
        left = self.progress.remaining
        elapsed = clock_text(self.progress.elapsed)
        if left is None:
            self.eta.setText(tr("elapsed", elapsed=elapsed))
        else:
            self.eta.setText(tr("elapsed_left", elapsed=elapsed, left=clock_text(left)))

    def _write_log(self) -> None:
        lines = [self._log_waiting.popleft() for _ in range(min(_LOG_AT_ONCE, len(self._log_waiting)))]
        self.log.appendPlainText("\n".join(lines))

    def _phase_place(self) -> str:
        progress = self.progress
        if progress is None or progress.phase not in progress.phases:
            return ""
        return f"{progress.phases.index(progress.phase) + 1}/{len(progress.phases)}"
