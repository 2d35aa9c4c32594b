"""The wires to the other processes: the engine that makes the mosaic, commands, and the helper that looks at subs."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
from PySide6.QtCore import QByteArray, QObject, QProcess, QProcessEnvironment, QTimer, Signal

from zemosaic.gui.protocol import STOP_LINE, json_line, write_paths
from zemosaic.settings import Settings

_SLICE_S = 0.008
_TAIL = 4000  # characters of stderr that are kept: the end of a traceback
# Below the window, which must answer while all cores are at work; what a person waits for goes before the engine.
ENGINE_NICENESS, HELPER_NICENESS = 5, 2


@dataclass(frozen=True)
class RunRequest:
    """What a run is to do.

    Parameters
    ----------
    inputs : tuple of Path
        Folders and files.
    output : Path
        Folder of the product.
    settings : Settings
        All of them.
    only : tuple of str, optional
        The frames to use; None = all that the inputs hold.
    lots : tuple of tuple of str, optional
        Lots as built or edited in the filter window; None = the engine plans its own.
    """

    inputs: tuple[Path, ...]
    output: Path
    settings: Settings
    only: tuple[str, ...] | None = None
    lots: tuple[tuple[str, ...], ...] | None = None

    def arguments(self, folder: Path) -> list[str]:
        """Arguments of ``zemosaic`` for inputs, settings and choices; their files are written into `folder`."""
        config = folder / "settings.json"  # not the TOML with its comments, which takes 20 ms to write
        config.write_text(self.settings.model_dump_json(), encoding="utf-8")
        arguments = [*map(str, self.inputs), "--config", str(config)]
        if self.only is not None:
            write_paths(folder / "only.txt", self.only)
            arguments += ["--only", str(folder / "only.txt")]
        if self.lots is not None:
            save_lots(folder / "lots.json", self.lots)
            arguments += ["--lots", str(folder / "lots.json")]
        return arguments


def save_lots(path: Path, lots: Sequence[Sequence[str]]) -> None:
    """Write lots as ``--lots`` and existing installations read them."""
    document = {"preplan_path_groups": [list(lot) for lot in lots]}
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")


class LineProcess(QObject):
    """A process of this Python that says lines on stdout.

    Signals: ``line(str)`` for each, ``ended(int, str)`` with the exit status (-1 = it crashed) and the end of stderr.
    """

    line = Signal(str)
    ended = Signal(int, str)

    def __init__(self, parent: QObject | None = None, niceness: int | None = None) -> None:
        super().__init__(parent)
        self._niceness = ENGINE_NICENESS if niceness is None else niceness
        self._process: QProcess | None = None
        self.given_way = False  # whether its priority has been lowered
        self._rest = b""
        self._lines: deque[bytes] = deque()
        self._later = QTimer(self)
        self._later.setSingleShot(True)
        self._later.timeout.connect(self._hand_out)
        self._errors = ""

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self, arguments: Sequence[str]) -> None:
        """Start ``python ARGUMENTS``; it must not run already."""
        if self._process is not None:
            raise RuntimeError("the process runs already")
        self._rest, self._errors, self.given_way = b"", "", False
        self._lines.clear()
        process = QProcess(self)
        environment = QProcessEnvironment.systemEnvironment()
        environment.insert("PYTHONIOENCODING", "utf-8")
        process.setProcessEnvironment(environment)
        process.readyReadStandardOutput.connect(self._read)
        process.readyReadStandardError.connect(self._read_errors)
        process.finished.connect(self._finished)
        process.errorOccurred.connect(self._failed)
        self._process = process
        process.started.connect(self._give_way)
        process.start(sys.executable, list(arguments))

    def write(self, line: str) -> None:
        """Say a line to the process, if it runs."""
        if self._process is not None:
            self._process.write(QByteArray(line.encode()))

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()

    def wait(self, milliseconds: int) -> None:
        """Wait until it has ended; for the end of the program only."""
        if self._process is not None:
            self._process.waitForFinished(milliseconds)

    def _give_way(self) -> None:
        """Lower the priority of the process, before it has threads or children of its own; they inherit it."""
        if self._process is None:
            return
        with contextlib.suppress(psutil.Error):  # it has ended already, or may not be asked
            process = psutil.Process(self._process.processId())
            lower = psutil.BELOW_NORMAL_PRIORITY_CLASS if psutil.WINDOWS else max(process.nice(), self._niceness)
            process.nice(lower)
        self.given_way = True

    def _read(self) -> None:
        if self._process is None:
            return
        *lines, self._rest = (self._rest + bytes(self._process.readAllStandardOutput().data())).split(b"\n")
        self._lines.extend(lines)
        self._hand_out()

    def _hand_out(self) -> None:
        """Pass lines on, a few milliseconds of work at a time: a busy machine delivers many at once."""
        deadline = perf_counter() + _SLICE_S
        while self._lines and perf_counter() < deadline:
            self.line.emit(self._lines.popleft().decode("utf-8", "replace"))
        if self._lines:
            self._later.start()

    def _read_errors(self) -> None:
        if self._process is not None:
            text = bytes(self._process.readAllStandardError().data()).decode("utf-8", "replace")
            self._errors = (self._errors + text)[-_TAIL:]

    def _failed(self, error: QProcess.ProcessError) -> None:
        # Only this one is not followed by `finished`.
        if error == QProcess.ProcessError.FailedToStart and self._process is not None:
            self._errors = self._process.errorString()
            self._end(-1)

    def _finished(self, status: int, how: QProcess.ExitStatus) -> None:
        self._read()
        self._read_errors()
        while self._lines:
            self._hand_out()
        self._later.stop()
        self._end(status if how == QProcess.ExitStatus.NormalExit else -1)

    def _end(self, status: int) -> None:
        if self._process is not None:
            self._process.deleteLater()
        self._process = None
        self.ended.emit(status, self._errors.strip())


class Engine(QObject):
    """One run at a time of ``zemosaic run``.

    Signals: ``heard(dict)`` for every event of the run; ``finished(dict)`` once, with the result as `protocol` has it;
    a run that crashed gets one made up here.
    """

    heard = Signal(dict)
    finished = Signal(dict)

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._process = LineProcess(self)
        self._process.line.connect(self._read)
        self._process.ended.connect(self._ended)
        self._folder: Path | None = None
        self._result: dict[str, Any] | None = None
        self.command: list[str] = []

    @property
    def running(self) -> bool:
        return self._process.running

    def start(self, request: RunRequest) -> None:
        """Start a run; one that was stopped goes on where it was if the request is the same."""
        self._folder = Path(tempfile.mkdtemp(prefix="zemosaic-"))
        self._result = None
        options = ["--out", str(request.output), "--progress", "json"]
        self.command = ["-m", "zemosaic", "run", *request.arguments(self._folder), *options]
        self._process.start(self.command)

    def stop(self) -> None:
        """Ask the run to end in good order."""
        self._process.write(STOP_LINE + "\n")

    def kill(self) -> None:
        """End the run at once."""
        self._process.kill()

    def wait(self, milliseconds: int) -> None:
        self._process.wait(milliseconds)

    def _read(self, line: str) -> None:
        event = parse_line(line)
        if event is None:
            return
        if event.get("event") == "result":
            self._result = event
        else:
            self.heard.emit(event)

    def _ended(self, status: int, errors: str) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        result = self._result or {
            "event": "result",
            "product": None,
            "route": "",
            "exit_status": status,
            "summary": last_line(errors),
        }
        result["crashed"] = self._result is None
        self.finished.emit(result)


class Command(QObject):
    """A command of ``zemosaic`` that is run once: ``plan``, ``solve``.

    Signals: ``line(str)``, ``ended(int, str, str)`` with exit status, all of stdout and the end of stderr.
    """

    line = Signal(str)
    ended = Signal(int, str, str)

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._process = LineProcess(self)
        self._process.line.connect(self._heard)
        self._process.ended.connect(self._ended)
        self._lines: list[str] = []
        self._folder: Path | None = None

    @property
    def running(self) -> bool:
        return self._process.running

    def start(self, name: str, arguments: Sequence[str], folder: Path | None = None) -> None:
        """Start it; `folder` with its files is removed when it ends."""
        self._lines, self._folder = [], folder
        self._process.start(["-m", "zemosaic", name, *arguments])

    def kill(self) -> None:
        self._process.kill()

    def wait(self, milliseconds: int) -> None:
        self._process.wait(milliseconds)

    def _heard(self, line: str) -> None:
        self._lines.append(line)
        self.line.emit(line)

    def _ended(self, status: int, errors: str) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self.ended.emit(status, "\n".join(self._lines), errors)


class Helper(QObject):
    """The process that looks at subs for the window (`zemosaic.gui.helper`); started when first asked.

    Signals: ``answer(int, dict)`` with the number of the request; ``lost(str)`` when the process has died, and with it
    whatever was asked.
    """

    answer = Signal(int, dict)
    lost = Signal(str)

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._process = LineProcess(self, HELPER_NICENESS)
        self._process.line.connect(self._heard)
        self._process.ended.connect(self._ended)
        self._number = 0
        self._closing = False

    def ask(self, what: str, **details: Any) -> int:
        """Ask for something; the answers carry the number that is returned."""
        if not self._process.running:
            self._process.start(["-m", "zemosaic.gui.helper"])
        self._number += 1
        self._process.write(json_line({"job": self._number, "what": what, **details}))
        return self._number

    def close(self) -> None:
        """End the process with the window; it is not waited for."""
        self._closing = True
        self._process.kill()

    def wait(self, milliseconds: int) -> None:
        self._process.wait(milliseconds)

    def _heard(self, line: str) -> None:
        message = parse_line(line)
        if message is not None and "job" in message:
            self.answer.emit(message.pop("job"), message)

    def _ended(self, status: int, errors: str) -> None:
        if not self._closing:
            self.lost.emit(last_line(errors) or str(status))


def last_line(text: str) -> str:
    """The last line of a text: of a traceback it is the one that says something."""
    return text.splitlines()[-1] if text else ""


def parse_line(line: str) -> dict[str, Any] | None:
    """A line of JSON; None for anything else that a library may have printed."""
    try:
        document = json.loads(line)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None
