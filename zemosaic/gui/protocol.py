"""What ``zemosaic run --progress json`` says to the window that started it, and hears from it.

One JSON object a line on stdout. ``{"event": KIND, "key": KEY, "text": TEXT, "values": {...}}`` is an `Event` of the
run; the last line is ``{"event": "result", "product": PATH or null, "route": ROUTE, "exit_status": N,
"summary": TEXT}``. The line ``stop`` on stdin asks the run to end, like SIGTERM: Windows has no such signal.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from zemosaic.events import Event

STOP_LINE = "stop"


def json_line(document: Mapping[str, Any]) -> str:
    """One line of strict JSON; paths and foreign numbers become text and numbers, NaN and infinity null."""
    return json.dumps(_plain(document), ensure_ascii=False, allow_nan=False) + "\n"


class JsonProgress:
    """A listener that writes every event as a line; deaf to a reader that has gone, because the run goes on.

    As a context (where signals are handled already) it also hears the line that asks for an end.

    Parameters
    ----------
    stream : text file, optional
        Standard output if not given.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream: TextIO | None = stream or sys.stdout
        self.trouble = ""  # the last that went wrong: what a failed run is summed up by

    def __enter__(self) -> JsonProgress:
        listen_for_stop()
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, event: Event) -> None:
        if event.kind in ("error", "failed"):
            self.trouble = event.text
        self._write({"event": event.kind, "key": event.key, "text": event.text, "values": event.values})

    def result(self, exit_status: int, product: Path | None = None, route: str = "", summary: str = "") -> None:
        """The last line."""
        self._write(
            {"event": "result", "product": product, "route": route, "exit_status": exit_status, "summary": summary}
        )

    def _write(self, document: Mapping[str, Any]) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(json_line(document))
            self._stream.flush()
        except OSError:  # the window is gone
            self._stream = None
            # What is left in the buffer must not fail once more when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def json_progress() -> Iterator[JsonProgress]:
    """The listener of a run that a window started; says the result of a run that ends without one."""
    progress = JsonProgress()
    try:
        yield progress
    except BaseException as end:  # typer's Exit among them, which carries the status
        status = getattr(end, "exit_code", None)
        reason = progress.trouble or (repr(end) if status is None else "")
        progress.result(1 if status is None else status, summary=reason)
        raise


def listen_for_stop() -> None:
    """Raise SIGTERM in this process when the line ``stop`` comes in on stdin, unless a person types there."""
    try:
        descriptor = sys.stdin.fileno()
    except (AttributeError, OSError):  # no stdin, or one that is no file
        return
    if not os.isatty(descriptor):
        threading.Thread(target=_await_stop, args=(descriptor,), daemon=True).start()


def _await_stop(descriptor: int) -> None:
    # Not sys.stdin: a thread that waits in its buffer would hold a lock that the interpreter wants at its end.
    said = b""
    while chunk := os.read(descriptor, 256):
        said += chunk
        *lines, said = said.split(b"\n")
        if STOP_LINE.encode() in (line.strip() for line in lines):
            signal.raise_signal(signal.SIGTERM)
            return


def read_paths(path: Path) -> list[Path]:
    """The paths of a text file, one a line; relative ones start at the folder of the file.

    Raises
    ------
    OSError, UnicodeDecodeError
        If the file cannot be read.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Path(os.path.abspath(path.parent / line)) for line in lines if line.strip()]


def write_paths(path: Path, paths: Iterable[Path | str]) -> None:
    """Write what `read_paths` reads."""
    path.write_text("".join(f"{each}\n" for each in paths), encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "item"):  # a NumPy scalar
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
