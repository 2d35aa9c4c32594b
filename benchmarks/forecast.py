"""How good the forecast of `zemosaic plan` is: memory and time against the real run, on any sets of subs.

    python benchmarks/forecast.py SUBS [SUBS ...] [-- options of zemosaic run and plan]

Plan and run are processes of their own. Other work on the machine changes the time on the clock between the two, so the
processor time is compared as well. Needs `os.wait4`, so Linux or macOS.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from run_sds import measure  # beside this file


def main(argv: Sequence[str] | None = None) -> None:
    """Plan, run, and print both."""
    parser = argparse.ArgumentParser(description="Compare forecasts with runs. What follows -- goes to both.")
    parser.add_argument("subs", nargs="+", type=Path, metavar="SUBS", help="folders of subs")
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    options, further = parser.parse_args(words[:end]), words[end + 1 :]
    print(f"{'':24s}{'forecast':>10s}{'range':>18s}{'real':>10s}{'forecast/real':>15s}")
    for subs in options.subs:
        compare(subs, further)


def compare(subs: Path, further: Sequence[str]) -> None:
    """One set of subs: three lines."""
    plan = planned(subs, further)
    with tempfile.TemporaryDirectory() as scratch:
        cost = measure(subs, Path(scratch, "out"), further)
    forecast = plan["forecast"]
    print(f"{subs}: {plan['files']['used']} subs, plan without probe {plan['plan_seconds']:.1f} s")
    for title, key, unit, real in (
        ("memory, GB", "memory_bytes", 2**30, cost.memory / 2**30),
        ("wall seconds", "wall_seconds", 1, cost.wall),
        ("CPU seconds", "cpu_seconds", 1, cost.cpu),
    ):
        value, low, high = (forecast[key][name] / unit for name in ("value", "low", "high"))
        print(f"  {title:22s}{value:10.2f}{f'{low:.2f} to {high:.2f}':>18s}{real:10.2f}{value / real:15.2f}")


def planned(subs: Path, further: Sequence[str]) -> dict[str, Any]:
    """What `zemosaic plan --json` says; its failure ends the program."""
    command = [sys.executable, "-m", "zemosaic", "plan", str(subs), "--sds", "--json", "-q", *further]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}")
    return json.loads(done.stdout)  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
