"""A bad night in miniature: many small subs, some of every kind broken, little memory, and a run that is cut short.

    python benchmarks/night.py [--subs 2000] [--share 0.05] [--cuts 5] [--memory 0.5] [--folder FOLDER]

Simulates a field, adds broken and foreign files of every kind, and runs `zemosaic run --sds` over them under a limit of
memory (of the process, by the system). The run is killed, stopped and killed again, at moments drawn by lot; meanwhile
files vanish and half-written ones are finished. The last run is let through, and its product compared with that of one
uninterrupted run over the good subs alone. The exit status is 0 if the books are closed and the pixels are the same.
"""

from __future__ import annotations

import argparse
import gzip
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from astropy.io import fits
from astropy.table import Table

from zemosaic.demo import make_field

FIELD = {"panels": (8, 8), "shape": (64, 96), "star_density": 30000, "nebula": 60, "sky": 300, "scale": 4.0}
ADDRESS_SPACE_GB = 3.0  # of which the libraries alone take more than one


class Ended(NamedTuple):
    """How a run ended: exit status, seconds on the clock and of processor time, peak memory in bytes, its words."""

    status: int
    wall: float
    cpu: float
    memory: int
    words: str


# --- what can be wrong with a file --------------------------------------------------------------------------


def _cards(path: Path, **cards: object) -> None:
    with fits.open(path, mode="update") as hdus:
        hdus[0].header.update(cards)


def _pixels(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    pixels, header = fits.getdata(path, header=True)
    fits.writeto(path, change(pixels), header, overwrite=True)


def _header_text(path: Path, old: bytes, new: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(old, new.ljust(len(old)), 1))


def _zip_torn(path: Path) -> None:
    data = gzip.compress(path.read_bytes())
    path.unlink()
    path.with_name(path.name + ".gz").write_bytes(data[: len(data) // 2])


def _no_number(pixels: np.ndarray) -> np.ndarray:
    return np.full(pixels.shape, np.nan, np.float32)


WIDTH = b"NAXIS1  =                   96"
FAULTS: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: path.write_bytes(b"") and None,
    "text": lambda path: path.write_text("not a frame\n") and None,
    "cut": lambda path: os.truncate(path, path.stat().st_size * 2 // 3),
    "header_only": lambda path: os.truncate(path, 2880),
    "absurd_size": lambda path: _header_text(path, WIDTH, WIDTH.replace(b"         96", b"99999999999")),
    "torn_gzip": _zip_torn,
    "dark": lambda path: _cards(path, IMAGETYP="Dark"),
    "zero": lambda path: _pixels(path, np.zeros_like),
    "saturated": lambda path: _pixels(path, lambda pixels: np.full_like(pixels, 65535)),
    "no_number": lambda path: _pixels(path, _no_number),
    "elsewhere": lambda path: _cards(path, CRVAL1=200.0, CRVAL2=-40.0),
    "no_wcs": lambda path: _header_text(path, b"CTYPE1  = 'RA---TAN'", b"CTYPE1  = 'NOTHING'"),
}
#: Bad as long as the night lasts: they are gone, or whole, when it ends.
PASSING = ("vanishing", "unfinished")


def break_some(good: Path, night: Path, share: float, chance: random.Random) -> dict[str, list[Path]]:
    """Put all good subs into the night, and beside them some of every kind of bad file; returns these by kind."""
    shutil.copytree(good, night)
    paths = sorted(night.iterdir())
    bad: dict[str, list[Path]] = {"duplicate": []}
    for kind in [*FAULTS, "duplicate", "vanishing"]:
        bad[kind] = []
        for original in chance.sample(paths, max(1, round(share * len(paths)))):
            copy = original.with_name(f"{kind}_{original.name}")
            shutil.copy2(original, copy)
            if kind in FAULTS:
                FAULTS[kind](copy)
            elif kind == "vanishing":
                _pixels(copy, lambda pixels: pixels + np.uint16(1))
            bad[kind].append(copy)
    bad["unfinished"] = chance.sample(paths, max(1, round(share * len(paths))))
    for path in bad["unfinished"]:
        os.truncate(path, path.stat().st_size // 2)
    return bad


# --- runs ---------------------------------------------------------------------------------------------------


def command(subs: Path, out: Path, memory: float, options: Sequence[str]) -> list[str]:
    """One run; what else is the same for all."""
    fixed = ["--set=report=false", f"--memory={memory}", "--workers=2", *options]
    return [sys.executable, "-m", "zemosaic", "run", str(subs), "-o", str(out), "--sds", *fixed]


def limit() -> None:
    """What the system allows the process."""
    size = int(ADDRESS_SPACE_GB * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def run(words: list[str], cut: tuple[float, int] | None = None, meanwhile: Callable[[], None] | None = None) -> Ended:
    """Run to the end, or send a signal after some seconds; `meanwhile` is called half way there."""
    start = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, preexec_fn=limit, env=environment)
        if cut is not None:
            _wait(process, cut[0] / 2)
            if meanwhile is not None:
                meanwhile()
            if _wait(process, cut[0] / 2):
                process.send_signal(cut[1])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        text = log.read()
    cpu = usage.ru_utime + usage.ru_stime
    return Ended(process.returncode, time.monotonic() - start, cpu, usage.ru_maxrss * 1024, text)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it is still running after that time; the process is not collected."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(0.02)
    return True


def product(ended: Ended) -> Path:
    """What a run made: the path on its last line."""
    return Path(ended.words.strip().rpartition("\n")[2])


# --- judgement ----------------------------------------------------------------------------------------------


def differences(clean: Path, found: Path) -> list[str]:
    """Where the pixels, or what the books say of the good subs, are not the same."""
    wrong = []
    for name in ("PRIMARY", "ALPHA", "COVERAGE"):
        a, b = fits.getdata(clean, name), fits.getdata(found, name)
        if a.shape != b.shape:
            wrong.append(f"{name} is {b.shape}, not {a.shape}")
        elif a.tobytes() != b.tobytes():
            off = np.nanmax(np.abs(a.astype(float) - b))
            wrong.append(f"{name} differs in {np.mean(a != b):.2%} of its pixels, by {off:.3g} at most")
    books, all_books = (Table.read(path, "FRAMES") for path in (clean, found))
    rows = {row["FILE"]: row for row in all_books}
    for row in books:
        other = rows.get(row["FILE"])
        same = other is not None and all(_alike(row[name], other[name]) for name in books.colnames)
        if not same:
            wrong.append(f"the books differ about {row['FILE']}")
    return wrong


def _alike(a: object, b: object) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes() or str(a) == str(b)


def open_books(found: Path, night: Path, bad: dict[str, list[Path]]) -> list[str]:
    """Files that are not in the books exactly once, and bad files that were let in."""
    books = Table.read(found, "FRAMES")
    entered = Counter(str(name) for name in books["FILE"])
    wrong = [
        f"{path.name} is in the books {entered[path.name]} times" for path in night.iterdir() if entered[path.name] != 1
    ]
    status = {str(row["FILE"]): (str(row["STATUS"]), str(row["REASON"])) for row in books}
    for kind, paths in bad.items():
        names = [p.name for path in paths for p in (path, path.with_name(path.name + ".gz")) if p.exists()]
        if kind not in PASSING:
            wrong += [f"{name} was let in" for name in names if status.get(name, ("used", ""))[0] != "rejected"]
    return wrong


def main() -> int:
    """The whole night."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--subs", type=int, default=2000, help="good subs (2000)")
    parser.add_argument("--share", type=float, default=0.05, help="bad files of every kind, as a share of them (0.05)")
    parser.add_argument("--cuts", type=int, default=5, help="interruptions (5)")
    parser.add_argument("--memory", type=float, default=0.5, help="GB that the run is told to use (0.5)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if not given")
    options, further = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        return night_of(Path(options.folder or scratch), options, further)


def night_of(folder: Path, options: argparse.Namespace, further: Sequence[str]) -> int:
    """Simulate, run clean, run through the night, judge."""
    say, chance = sys.stdout.write, random.Random(options.seed)
    good, night = folder / "good", folder / "night"
    panels = tuple(max(1, min(most, round((options.subs / 31) ** 0.5))) for most in FIELD["panels"])
    make_field(good, frames=options.subs, seed=options.seed, **(FIELD | {"panels": panels}))
    whole = {path.name: path.read_bytes() for path in sorted(good.iterdir())}
    bad = break_some(good, night, options.share, chance)
    say(f"{len(whole)} good subs, {sum(map(len, bad.values()))} bad ones of {len(bad)} kinds\n")
    clean = run(command(good, folder / "clean", options.memory, ["--set=resume=off", *further]))
    say(_line("clean run", clean))

    def mend() -> None:  # in the middle of a run
        for path in bad["vanishing"]:
            path.unlink(missing_ok=True)

    words = command(night, folder / "out", options.memory, further)
    for number in range(options.cuts):
        signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL)
        cut = (chance.uniform(0.2, 0.9) * clean.wall / (1 + number / 2), signals[number % len(signals)])
        say(_line(f"cut {number + 1}", run(words, cut, mend if number == options.cuts // 3 else None)))
        if number == options.cuts // 2:
            for path in bad["unfinished"]:
                path.write_bytes(whole[path.name])
    last = run(words)
    say(_line("last run", last))
    reused = re.search(r"measures of .* tiles", last.words)
    say(f"  reused: {reused[0] if reused else 'nothing'}\n")
    if last.status or clean.status:
        say(last.words[-3000:] + clean.words[-3000:])
        return 1
    wrong = open_books(product(last), night, bad) + differences(product(clean), product(last))
    say(
        "".join(f"WRONG: {text}\n" for text in wrong[:20])
        or "books closed; pixels and books of the good subs the same\n"
    )
    return bool(wrong)


def _line(name: str, ended: Ended) -> str:
    return (
        f"{name:10} status {ended.status:4d}  {ended.wall:7.1f} s  CPU {ended.cpu:7.1f} s  "
        f"memory {ended.memory / 2**30:.2f} GB\n"
    )


if __name__ == "__main__":
    sys.exit(main())
