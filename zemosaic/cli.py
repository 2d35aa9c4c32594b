"""The command line: parse, start the engine, show what it says, end with its status.

Results go to stdout (the path of the product on the last line), everything else to stderr. Exit status:
0 product made as asked, 3 product made by a fallback route, 1 no product, 2 wrong use or settings,
130 / 143 stopped by Ctrl-C / SIGTERM. Whatever is heavy is imported where it is used, so that
``zemosaic --help`` answers at once.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from zemosaic import __version__

if TYPE_CHECKING:
    from zemosaic.events import Event
    from zemosaic.settings import Settings

EXIT_NO_PRODUCT = 1
EXIT_USAGE = 2

_SECONDS_BETWEEN_LINES = 5.0

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Many short telescope exposures in, one large, photometrically sound mosaic out.",
)

Out = Annotated[Path, typer.Option("--out", "-o", metavar="OUT", file_okay=False, help="Output folder.")]
Lang = Annotated[str | None, typer.Option("--lang", metavar="en|fr", help="Language of the messages.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show details too.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and errors only.")]


def _file_option(name: str, text: str) -> Any:
    return typer.Option(name, metavar="FILE", exists=True, dir_okay=False, help=text)


def main() -> None:
    """Run the command line as a program."""
    app(prog_name="zemosaic")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"zemosaic {__version__}")
        raise typer.Exit


@app.command()
def run(
    subs: Annotated[list[Path], typer.Argument(metavar="SUBS", exists=True, help="Frames, or folders of frames.")],
    out: Out,
    sds: Annotated[bool | None, typer.Option("--sds/--no-sds", help="Use the SDS route, or not.")] = None,
    route: Annotated[
        str | None,
        typer.Option(metavar="ROUTE", help="sds, mosaic-first or master-tiles; those after it are its fallbacks."),
    ] = None,
    config: Annotated[Path | None, _file_option("--config", "Settings: TOML, or a zemosaic_config.json.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated."),
    ] = None,
    lots: Annotated[Path | None, _file_option("--lots", "Lots to use as given: JSON or TOML.")] = None,
    dark: Annotated[Path | None, _file_option("--dark", "Master dark.")] = None,
    flat: Annotated[Path | None, _file_option("--flat", "Master flat.")] = None,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Workers that run at the same time.")] = None,
    memory: Annotated[float | None, typer.Option(metavar="GB", help="Memory the run may use.")] = None,
    lang: Lang = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Make a mosaic.

    Options win over --set, and --set wins over the file of --config.
    """
    from zemosaic.lots import read_lots
    from zemosaic.settings import SettingsError

    if route and sds is not None:
        _refuse("--route and --sds/--no-sds exclude each other")
    options = {
        "route": route,
        "master_dark_path": dark,
        "master_flat_path": flat,
        "num_processing_workers": workers,
        "memory_gb": memory,
        "language": lang,
    }
    try:
        settings, warnings = _settings(config, changes or [], options)
        groups = read_lots(lots) if lots else None
    except SettingsError as error:
        _refuse(str(error))
    with _session(settings, warnings, _shown(verbose, quiet)) as mosaic:
        result = mosaic(subs, out, sds=sds, preplan_path_groups=groups)
    _finish(result, quiet)


@app.command()
def demo(
    out: Out = Path("zemosaic-demo"),
    keep_subs: Annotated[bool, typer.Option("--keep-subs", help="Keep the simulated frames in OUT/subs.")] = False,
    lang: Lang = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Simulate a small field and make its mosaic by the SDS route."""
    from zemosaic.settings import SettingsError

    try:
        settings, warnings = _settings(None, [], {"language": lang})
    except SettingsError as error:
        _refuse(str(error))
    kept = out / "subs"
    if keep_subs and kept.exists():
        _refuse(f"{kept} exists already; choose another folder with -o")
    folder: AbstractContextManager[Any] = nullcontext(kept) if keep_subs else tempfile.TemporaryDirectory()
    with _session(settings, warnings, _shown(verbose, quiet)) as mosaic, folder as subs:
        from zemosaic.demo import make_field

        make_field(Path(subs))
        result = mosaic([Path(subs)], out, sds=True)
    _finish(result, quiet)


@app.command("settings")
def list_settings(
    toml: Annotated[bool, typer.Option("--toml", help="Print the defaults as a file for --config.")] = False,
) -> None:
    """Print every setting with its default, unit and meaning."""
    from zemosaic.settings import Settings, describe_settings, settings_toml

    if toml:
        typer.echo(settings_toml(Settings()), nl=False)
        return
    for row in describe_settings():
        default = "none" if row.default is None else json.dumps(row.default)
        typer.echo(f"{row.name} = {default} {row.unit}".rstrip())
        typer.echo(f"    {row.description} ({row.allowed})")


def _settings(config: Path | None, changes: list[str], options: Mapping[str, object]) -> tuple[Settings, list[str]]:
    from zemosaic.settings import load_settings, parse_overrides

    given = {name: str(value) for name, value in options.items() if value is not None}
    return load_settings(config, parse_overrides(changes) | given)


def _shown(verbose: bool, quiet: bool) -> frozenset[str]:
    """The kinds of events to show."""
    if verbose and quiet:
        _refuse("--verbose and --quiet exclude each other")
    kinds = {"warning", "error"}
    if not quiet:
        kinds |= {"info", "phase", "progress", "done"}
    if verbose:
        kinds.add("detail")
    return frozenset(kinds)


def _refuse(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(EXIT_USAGE)


def _finish(result: Any, quiet: bool) -> NoReturn:
    if result.summary and not quiet:
        typer.echo(result.summary)
    if result.product is not None:
        typer.echo(str(result.product))
    raise typer.Exit(result.exit_status)


@contextmanager
def _session(settings: Settings, warnings: list[str], shown: frozenset[str]) -> Iterator[Callable[..., Any]]:
    """Yield the engine, wired to the terminal and to the signals; its failures end in a sentence and a status."""
    from zemosaic.events import Cancelled, Events, render

    notice = render("run_warn_stopping", {}, settings.language)
    with _stoppable(notice) as stop, _listener(shown) as listen:
        say = Events(listen, settings.language)
        for text in warnings:
            say.warning("run_warn_settings", text=text)
        try:
            from zemosaic_worker import RunError, run_hierarchical_mosaic

            try:
                yield partial(
                    run_hierarchical_mosaic,
                    settings=settings,
                    progress_callback=listen,
                    stop_requested=stop.requested,
                )
            except RunError as error:
                say.error("run_error_failed", reason=error)
                raise typer.Exit(EXIT_NO_PRODUCT) from error
        except Cancelled as error:
            say.warning("run_warn_cancelled")
            raise typer.Exit(stop.status) from error
        except ImportError as error:
            if not _opencv_lacks_libraries(error):
                raise
            say.error("run_error_opencv", reason=error)
            raise typer.Exit(EXIT_NO_PRODUCT) from error


def _opencv_lacks_libraries(error: ImportError) -> bool:
    # opencv-python links against the desktop libraries that a slim machine does not have.
    return error.name == "cv2" or bool(re.search(r"lib(GL|gthread|glib)\S*\.so", str(error)))


class _Stop:
    """The first SIGINT or SIGTERM asks the engine to stop, a second one ends the program at once."""

    def __init__(self, notice: str) -> None:
        self._notice = notice
        self._signal = 0
        self._process = os.getpid()

    def requested(self) -> bool:
        return self._signal != 0

    @property
    def status(self) -> int:
        """Exit status of a shell for a program that ended by this signal."""
        return 128 + (self._signal or signal.SIGINT)

    def handle(self, number: int, _frame: object) -> None:
        if os.getpid() != self._process:  # a forked worker inherits this handler; only its parent decides
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        # Unbuffered, because a signal may arrive in the middle of a write to sys.stderr.
        if self._signal:
            show_cursor = b"\x1b[?25h" if os.isatty(2) else b""
            os.write(2, show_cursor)
            os._exit(128 + number)
        self._signal = number
        os.write(2, f"\r{self._notice}\n".encode())


@contextmanager
def _stoppable(notice: str) -> Iterator[_Stop]:
    stop = _Stop(notice)
    before = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _listener(shown: frozenset[str]) -> Iterator[Callable[[Event], None]]:
    """Something that shows events on stderr: bars on a terminal, else plain lines."""
    if not sys.stderr.isatty():
        yield _Lines(shown)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield _Bars(shown, bars)


class _Lines:
    """Events as plain lines; a stage reports every few seconds and at its end."""

    def __init__(self, shown: frozenset[str]) -> None:
        self._shown = shown
        self._said: dict[str, float] = {}  # stage -> when it was last heard of

    def __call__(self, event: Event) -> None:
        if event.kind not in self._shown:
            return
        if event.kind == "progress":
            self.progress(event.text, **event.values)
        else:
            self.line(event.text)

    def line(self, text: str) -> None:
        typer.echo(text, err=True)

    def progress(self, title: str, *, stage: str, current: int, total: int, rate: float) -> None:
        now = time.monotonic()
        if current < total and now - self._said.setdefault(stage, now) < _SECONDS_BETWEEN_LINES:
            return
        self._said[stage] = now
        parts = [f"{title}: {current}/{total}", _speed(rate)]
        if rate and current < total:
            parts.append(f"{(total - current) / rate:.0f} s left")
        self.line(", ".join(filter(None, parts)))


class _Bars(_Lines):
    """Events on a terminal: a bar a stage, messages above the bars."""

    def __init__(self, shown: frozenset[str], bars: Any) -> None:
        super().__init__(shown)
        self._bars = bars
        self._tasks: dict[str, Any] = {}

    def line(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def progress(self, title: str, *, stage: str, current: int, total: int, rate: float) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(title, speed="")
        self._bars.update(self._tasks[stage], completed=current, total=total, speed=_speed(rate))


def _speed(rate: float) -> str:
    if not rate:
        return ""
    return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
