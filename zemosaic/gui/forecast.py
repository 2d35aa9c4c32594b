"""What a run will need, as ``zemosaic plan --json`` foresees it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PySide6.QtCore import QObject, Signal

from zemosaic.gui.engine import Command, RunRequest, last_line
from zemosaic.gui.i18n import tr, words
from zemosaic.gui.progress import clock_text


class Forecast(QObject):
    """Asks for the plan of a run.

    Signals: ``ready(str, dict)`` what to tell the user, and the seconds that each phase will take.
    """

    ready = Signal(str, dict)

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._command = Command(self)
        self._command.ended.connect(self._ended)
        self._wanted = False

    def start(self, request: RunRequest) -> None:
        """Ask; while an answer is on its way nothing new is asked."""
        if self._command.running:
            return
        folder = Path(tempfile.mkdtemp(prefix="zemosaic-"))
        self._wanted = True
        options = ["--into", str(request.output), "--json"]
        self._command.start("plan", [*request.arguments(folder), *options], folder)

    def cancel(self) -> None:
        """The answer is no longer wanted."""
        self._wanted = False
        self._command.kill()

    def _ended(self, status: int, text: str, errors: str) -> None:
        if not self._wanted:
            return
        try:
            plan = json.loads(text)
        except ValueError:
            plan = {}
        if plan.get("canvas"):
            self.ready.emit(*read_plan(plan))
        else:
            self.ready.emit(tr("forecast_failed", reason=last_line(errors) or status), {})


def read_plan(plan: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """The figures of a plan in plain words, and the seconds of its phases (without ``phase_``)."""
    canvas, cost = plan["canvas"], plan.get("forecast")
    used = plan["files"]["used"]
    lines = [tr("forecast_canvas", width=canvas["width_px"], height=canvas["height_px"], frames=used)]
    phases: dict[str, float] = {}
    if cost:
        wall = cost["wall_seconds"]
        parts = [
            tr("forecast_time", time=clock_text(wall["value"]), longest=clock_text(wall["high"])),
            tr("forecast_memory", size=words.size(cost["memory_bytes"]["value"])),
            tr("forecast_disk", size=words.size(cost["disk_bytes"]["value"] + cost["scratch_bytes"])),
        ]
        lines.append("  ·  ".join(parts))
        phases = {each["phase"].removeprefix("phase_"): each["wall_seconds"] for each in cost["phases"]}
    lines += [tr("forecast_problem", problem=problem) for problem in plan.get("problems", ())]
    if plan.get("weak_links"):
        lines.append(tr("forecast_weak", n=len(plan["weak_links"])))
    if len(plan.get("islands", ())) > 1:
        lines.append(tr("forecast_islands", n=len(plan["islands"])))
    return "\n".join(lines), phases
