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
EXIT_PARTLY = 3

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


Only = Annotated[Path | None, _file_option("--only", "Use only the frames of this list, one path a line.")]


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
    only: Only = None,
    resolve: Annotated[
        bool, typer.Option("--resolve", help="Ignore every WCS there is, sidecars too, and solve anew.")
    ] = False,
    dark: Annotated[Path | None, _file_option("--dark", "Master dark.")] = None,
    flat: Annotated[Path | None, _file_option("--flat", "Master flat.")] = None,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Workers that run at the same time.")] = None,
    memory: Annotated[float | None, typer.Option(metavar="GB", help="Memory the run may use.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Dask cluster that stacks the lots of SDS: tcp://HOST:8786.")
    ] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Do not judge the mosaic, write no report.")] = False,
    lang: Lang = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    progress: Annotated[
        str | None,
        typer.Option(metavar="json", help="Tell every event and the result as a line of JSON on stdout."),
    ] = None,
) -> None:
    """Make a mosaic.

    Options win over --set, and --set wins over the file of --config.
    """
    from zemosaic.lots import read_lots
    from zemosaic.settings import SettingsError

    if route and sds is not None:
        _refuse("--route and --sds/--no-sds exclude each other")
    if progress not in (None, "json"):
        _refuse(f"--progress takes json, not {progress!r}")
    options = {
        "route": route,
        "force_resolve_existing_wcs": resolve or None,
        "master_dark_path": dark,
        "master_flat_path": flat,
        "num_processing_workers": workers,
        "memory_gb": memory,
        "scheduler": scheduler,
        "report": "false" if no_report else None,
        "language": lang,
    }
    try:
        settings, warnings = _settings(config, changes or [], options)
        groups = read_lots(lots) if lots else None
        subs = _chosen(subs, only)
    except (SettingsError, OSError, UnicodeDecodeError) as error:
        _refuse(str(error))
    if progress:
        from zemosaic.gui.protocol import json_progress

        with json_progress() as listener:
            with _session(settings, warnings, listener) as mosaic:
                result = mosaic(subs, out, sds=sds, preplan_path_groups=groups, live_preview=True)
            listener.result(result.exit_status, result.product, result.route, result.summary)
        raise typer.Exit(result.exit_status)
    with _session(settings, warnings, _listener(_shown(verbose, quiet))) as mosaic:
        result = mosaic(subs, out, sds=sds, preplan_path_groups=groups)
    _finish(result, quiet)


@app.command("plan")
def plan_run(
    subs: Annotated[list[Path], typer.Argument(metavar="SUBS", exists=True, help="Frames, or folders of frames.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", file_okay=False, help="Folder for plan and map.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    into: Annotated[
        Path | None, typer.Option(metavar="OUT", file_okay=False, help="Output folder of the run: has it room?")
    ] = None,
    lots_out: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Write the lots for run --lots: JSON or TOML.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Forecast memory and time by a short trial.")
    ] = True,
    sds: Annotated[bool | None, typer.Option("--sds/--no-sds", help="Plan for the SDS route, or not.")] = None,
    route: Annotated[str | None, typer.Option(metavar="ROUTE", help="sds, mosaic-first or master-tiles.")] = None,
    config: Annotated[Path | None, _file_option("--config", "Settings: TOML, or a zemosaic_config.json.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
    ] = None,
    lots: Annotated[Path | None, _file_option("--lots", "Lots to use as given: JSON or TOML.")] = None,
    only: Only = None,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Workers that run at the same time.")] = None,
    memory: Annotated[float | None, typer.Option(metavar="GB", help="Memory the run may use.")] = None,
    lang: Lang = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Say what a run would find, make and cost, from the headers and a short trial.

    Exit status 1: there is no plan, or a run would refuse to start.
    """
    from zemosaic.lots import read_lots
    from zemosaic.settings import SettingsError

    if route and sds is not None:
        _refuse("--route and --sds/--no-sds exclude each other")
    options = {"route": route, "num_processing_workers": workers, "memory_gb": memory, "language": lang}
    try:
        settings, warnings = _settings(config, changes or [], options)
        groups = read_lots(lots) if lots else None
        subs = _chosen(subs, only)
    except (SettingsError, OSError, UnicodeDecodeError) as error:
        _refuse(str(error))
    with _speaking(settings, warnings, _listener(_shown(verbose, quiet))) as (listen, stop):
        from zemosaic.events import Events
        from zemosaic.plan import PlanError, make_plan, plan_json, plan_lines, process_cost, save_plan

        say = Events(listen, settings.language, stop.requested)
        place, startup = into or out or Path(), process_cost()  # what this program took to start, a run takes too
        try:
            made = make_plan(
                subs, settings, say, probe, sds=sds, given_lots=groups, output_folder=place, startup=startup
            )
            for path in save_plan(made, out, lots_out, settings.language):
                say.info("plan_written", path=path)
        except PlanError as error:
            say.error("plan_failed", reason=error)
            raise typer.Exit(EXIT_NO_PRODUCT) from error
        if as_json:
            typer.echo(json.dumps(plan_json(made), indent=1))
        else:
            typer.echo("\n".join(plan_lines(made, settings.language)))
    raise typer.Exit(EXIT_NO_PRODUCT if made.problems else 0)


@app.command()
def solve(
    subs: Annotated[list[Path], typer.Argument(metavar="SUBS", exists=True, help="Frames, or folders of frames.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", file_okay=False, help="Folder for solutions.csv and WCS files."),
    ] = None,
    write_sidecars: Annotated[
        bool, typer.Option("--write-sidecars", help="Write NAME.wcs.fits beside each frame that had no good WCS.")
    ] = False,
    resolve: Annotated[bool, typer.Option("--resolve", help="Ignore every WCS there is and solve anew.")] = False,
    only: Only = None,
    config: Annotated[Path | None, _file_option("--config", "Settings: TOML, or a zemosaic_config.json.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
    ] = None,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Workers that run at the same time.")] = None,
    lang: Lang = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Find frames on the sky, offline, and say where each is.

    Exit status 0: all were found; 3: some were not; 1: none was.
    """
    from zemosaic.settings import SettingsError

    options = {"num_processing_workers": workers, "language": lang, "force_resolve_existing_wcs": resolve or None}
    try:
        settings, warnings = _settings(config, changes or [], options)
        subs = _chosen(subs, only)
    except (SettingsError, OSError, UnicodeDecodeError) as error:
        _refuse(str(error))
    with _speaking(settings, warnings, _listener(_shown(verbose, quiet))) as (listen, stop):
        from zemosaic.events import Events
        from zemosaic.solve.command import SolvingError, solve_files, solved_lines

        say = Events(listen, settings.language, stop.requested)
        try:
            solved = solve_files(subs, settings, say, folder=out, sidecars=write_sidecars)
        except SolvingError as error:
            say.error("run_error_failed", reason=error)
            raise typer.Exit(EXIT_NO_PRODUCT) from error
        typer.echo("\n".join(solved_lines(solved)))
    raise typer.Exit(EXIT_PARTLY if solved.left_out else 0)


@app.command()
def gui() -> None:
    """Open the window."""
    try:
        from zemosaic.gui.app import main as open_window
    except ImportError as error:
        if not (error.name or "").startswith(("PySide6", "shiboken6")):
            raise
        _refuse(f"The window needs PySide6 ({error}): install it with  pip install 'zemosaic[gui]'")
    raise typer.Exit(open_window())


@app.command()
def clean(
    out: Annotated[Path, typer.Argument(metavar="OUT", exists=True, file_okay=False, help="Output folder of a run.")],
    lang: Lang = None,
) -> None:
    """Remove the results that runs have kept for later runs; products stay."""
    from zemosaic.events import render
    from zemosaic.workplace import HIDDEN, WorkplaceError, remove_results

    try:
        size = remove_results(out)
    except WorkplaceError as problem:
        typer.echo(str(problem), err=True)
        raise typer.Exit(EXIT_NO_PRODUCT) from problem
    typer.echo(render("clean_done", {"size_gb": size / 2**30, "folder": out / HIDDEN}, lang or "en"))


@app.command()
def demo(
    out: Out = Path("zemosaic-demo"),
    keep_subs: Annotated[bool, typer.Option("--keep-subs", help="Keep the simulated frames in OUT/subs.")] = False,
    lang: Lang = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Simulate a small field, find its frames on the sky and make their mosaic by the SDS route."""
    from zemosaic.settings import SettingsError

    try:
        settings, warnings = _settings(None, [], {"language": lang})
    except SettingsError as error:
        _refuse(str(error))
    kept = out / "subs"
    if keep_subs and kept.exists():
        _refuse(f"{kept} exists already; choose another folder with -o")
    folder: AbstractContextManager[Any] = nullcontext(kept) if keep_subs else tempfile.TemporaryDirectory()
    with _session(settings, warnings, _listener(_shown(verbose, quiet))) as mosaic, folder as subs:
        from zemosaic.demo import make_demo

        make_demo(Path(subs))
        result = mosaic([Path(subs)], out, sds=True)
    _finish(result, quiet)


@app.command("check")
def check_file(
    mosaic: Annotated[Path, typer.Argument(metavar="MOSAIC.fits", exists=True, dir_okay=False, help="Any mosaic.")],
    subs: Annotated[
        list[Path] | None, typer.Argument(metavar="SUBS", exists=True, help="Its frames, or folders of frames.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", dir_okay=False, help="Write the verdict to this file too.")
    ] = None,
    catalogue: Annotated[
        Path | None, _file_option("--catalogue", "Reference stars: a table with ra, dec (degrees, ICRS) and mag.")
    ] = None,
    config: Annotated[Path | None, _file_option("--config", "Settings: TOML, or a zemosaic_config.json.")] = None,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Workers that run at the same time.")] = None,
    lang: Lang = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Judge a mosaic: seams, levels, photometry, positions, noise, sharpness, defects.

    Exit status 1: the verdict is FAIL.
    """
    from zemosaic.settings import SettingsError

    options = {"num_processing_workers": workers, "language": lang}
    try:
        settings, warnings = _settings(config, [], options)
    except SettingsError as error:
        _refuse(str(error))
    with _speaking(settings, warnings, _listener(_shown(verbose, quiet))) as (listen, stop):
        from zemosaic.events import Events
        from zemosaic.report.check import CheckError, check_mosaic
        from zemosaic.report.verdict import write_json

        say = Events(listen, settings.language, stop.requested)
        try:
            checked = check_mosaic(mosaic, subs or [], catalogue=catalogue, settings=settings, events=say)
            if json_file:
                write_json(checked.verdict, json_file, settings.language)
        except (CheckError, OSError) as error:
            _refuse(str(error))
    typer.echo("\n".join(checked.lines))
    raise typer.Exit(checked.exit_status)


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


def _chosen(subs: list[Path], only: Path | None) -> list[Path]:
    """The frames of ``--only``, if it is given, instead of the inputs."""
    if only is None:
        return subs
    from zemosaic.gui.protocol import read_paths

    return read_paths(only)


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
def _session(
    settings: Settings, warnings: list[str], listener: AbstractContextManager[Callable[[Event], None]]
) -> Iterator[Callable[..., Any]]:
    """Yield the engine, wired to a listener and to the signals; its failures end in a sentence and a status."""
    with _speaking(settings, warnings, listener) as (listen, stop):
        from zemosaic.events import Events
        from zemosaic_worker import RunError, run_hierarchical_mosaic

        try:
            yield partial(
                run_hierarchical_mosaic,
                settings=settings,
                progress_callback=listen,
                stop_requested=stop.requested,
            )
        except RunError as error:
            Events(listen, settings.language).error("run_error_failed", reason=error)
            raise typer.Exit(EXIT_NO_PRODUCT) from error


@contextmanager
def _speaking(
    settings: Settings, warnings: list[str], listener: AbstractContextManager[Callable[[Event], None]]
) -> Iterator[tuple[Callable[[Event], None], _Stop]]:
    """Yield a listener and the wish to stop; a stop, and OpenCV without its libraries, end in sentence and status."""
    from zemosaic.events import Cancelled, Events, render

    notice = render("run_warn_stopping", {}, settings.language)
    with _stoppable(notice) as stop, listener as listen:
        say = Events(listen, settings.language)
        for text in warnings:
            say.warning("run_warn_settings", text=text)
        try:
            yield listen, stop
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
    return f"{rate:.1f}/s" if rate >= 1 else f"1 / {1 / rate:.1f} s"
