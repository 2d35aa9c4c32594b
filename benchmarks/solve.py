"""How well frames are found on the sky: the embedded plate solver on star lists with real star positions.

    python benchmarks/solve.py [CASE ...] [--frames 300] [--seed 1] [--any-scale 30] [--random 1000] [--wrong 300]

Every case is a camera and a way to spoil its frames; without CASE all are run. A frame is looked for near a hint
(centre off by 0.7 degrees per axis, scale by 2 %), on the whole sky with its scale known, and the first few with
nothing known at all. `wrong` counts solutions more than 5 pixels rms off. Then come lists of random points, a third of
them with clumps, and frames whose hint points elsewhere, for which every solution is wrong. Star lists are made by
`tests/real_sky.py`: catalogue stars where they are; fainter ones, misses, blends and phantoms invented.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from zemosaic.solve.catalogue import Catalogue, load_catalogue
from zemosaic.solve.embedded import CERTAIN, Solution, SolveError, solve
from zemosaic.solve.hint import Hint

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from real_sky import Camera, StarList, anywhere, observe, off

Place = Callable[[np.random.Generator], tuple[float, float]]

_SUSPICIOUS = 10.0  # log odds of random lists that are told
S50 = Camera()
NORTH_POLE_OF_GALAXY = (192.86, 27.13)


def _around(ra: float, dec: float, spread: float) -> Place:
    def place(rng: np.random.Generator) -> tuple[float, float]:
        return float((ra + rng.uniform(-spread, spread)) % 360), float(
            np.clip(dec + rng.uniform(-spread, spread), -90, 90)
        )

    return place


def _at_poles(rng: np.random.Generator) -> tuple[float, float]:
    return float(rng.uniform(0, 360)), float(rng.choice([-1, 1]) * rng.uniform(88.5, 90))


def _at_ra_zero(rng: np.random.Generator) -> tuple[float, float]:
    return float(rng.uniform(-0.5, 0.5) % 360), float(rng.uniform(-85, 85))


CASES: dict[str, tuple[Camera, Place]] = {
    "S50 0.7x1.3 deg": (S50, anywhere),
    "S30 1.2x2.1 deg": (replace(S50, scale=3.99), anywhere),
    "S30 Pro 2.2x4.0 deg": (replace(S50, scale=3.74, shape=(3840, 2160)), anywhere),
    "Dwarf 3 1.7x2.9 deg": (replace(S50, scale=2.75, shape=(2160, 3840)), anywhere),
    "wide 3.8x5.0 deg": (replace(S50, scale=4.5, shape=(3000, 4000)), anywhere),
    "small 0.4x0.54 deg": (replace(S50, scale=1.48, shape=(976, 1304)), anywhere),
    "small 0.5x0.7 deg": (replace(S50, scale=1.0, shape=(1800, 2500)), anywhere),
    "S50 poles": (S50, _at_poles),
    "S50 RA 0": (S50, _at_ra_zero),
    "S50 galactic pole": (S50, _around(*NORTH_POLE_OF_GALAXY, 8)),
    "S50 Milky Way": (S50, _around(290, 11, 6)),
    "S50 shallow": (replace(S50, depth=0.8), anywhere),
    "S50 half clouded": (replace(S50, cloud=0.5, depth=1.0), anywhere),
    "S50 blurred 3x": (replace(S50, noise=0.9, depth=1.2, blend=15, colour=0.5), anywhere),
    "S50 trailed": (replace(S50, noise=0.7, depth=1.3, blend=9, invented=0.1), anywhere),
    "S50 half cropped": (replace(S50, shape=(960, 1080)), anywhere),
    "S50 distorted 4 px": (replace(S50, distortion=4), anywhere),
    "S50 10 % phantoms": (replace(S50, invented=0.1, missed=0.2), anywhere),
    "240x320 at 20 arcsec": (replace(S50, scale=20, shape=(240, 320)), anywhere),
}


@dataclass
class Score:
    """What became of the frames of one case."""

    found: int = 0
    wrong: int = 0
    seconds: list[float] = field(default_factory=list)
    off: list[float] = field(default_factory=list)
    odds: list[float] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cases and print a line for each."""
    parser = argparse.ArgumentParser(description="Measure the embedded plate solver.")
    parser.add_argument("case", nargs="*", metavar="CASE", help=f"of: {', '.join(CASES)}")
    parser.add_argument("--frames", type=int, default=300, help="of each case (300)")
    parser.add_argument(
        "--any-scale", type=int, default=30, help="of which are also looked for with nothing known (30)"
    )
    parser.add_argument("--random", type=int, default=1000, help="lists of random points (1000)")
    parser.add_argument("--wrong", type=int, default=300, help="frames with a wrong hint (300)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    catalogue = load_catalogue()
    if options.frames:
        print(f"{'':22}hinted   blind  any scale  wrong    hinted    blind   off px       least log odds")
        for name, (camera, place) in CASES.items():
            if not options.case or name in options.case:
                print(f"{name:22}" + line(camera, place, catalogue, options), flush=True)
    if options.random:
        print(random_lists(catalogue, options.random, options.seed))
    if options.wrong:
        print(wrong_hints(catalogue, options.wrong, options.seed))


def line(camera: Camera, place: Place, catalogue: Catalogue, options: argparse.Namespace) -> str:
    """Figures of one case."""
    rng = np.random.default_rng(options.seed)
    hinted, blind, any_scale = Score(), Score(), Score()
    for i in range(options.frames):
        ra, dec = place(rng)
        frame = observe(catalogue, ra, dec, camera, rng)
        hint = Hint(*_nearby(ra, dec, 0.7, rng), scale=camera.scale * rng.uniform(0.98, 1.02))
        _judge(hinted, frame, camera, (hint,), catalogue, blind=False)
        _judge(blind, frame, camera, (Hint(scale=hint.scale),), catalogue, blind=True)
        if i < options.any_scale:
            _judge(any_scale, frame, camera, (Hint(),), catalogue, blind=True)
    shares = "".join(f"{100 * score.found / max(1, len(score.seconds)):7.1f}%" for score in (hinted, blind, any_scale))
    wrong = hinted.wrong + blind.wrong + any_scale.wrong
    times = "".join(f"{1e3 * np.median(score.seconds):6.0f} ms" for score in (hinted, blind))
    distance = f"{np.median(hinted.off or [np.nan]):6.2f} (95 %: {np.percentile(hinted.off or [np.nan], 95):.2f})"
    return f"{shares}  {wrong:7}  {times}  {distance}{min(hinted.odds, default=np.nan):8.0f}"


def _nearby(ra: float, dec: float, spread: float, rng: np.random.Generator) -> tuple[float, float]:
    east, north = rng.normal(0, spread, 2)
    dec = float(np.clip(dec + north, -90, 90))
    return float((ra + east / max(np.cos(np.radians(dec)), 0.01)) % 360), dec


def _judge(
    score: Score, frame: StarList, camera: Camera, hints: tuple[Hint, ...], catalogue: Catalogue, *, blind: bool
) -> None:
    start = time.process_time()
    solution = _solved(frame.x, frame.y, frame.flux, camera.shape, hints, catalogue, blind=blind)
    score.seconds.append(time.process_time() - start)
    if solution is None:
        return
    distance = off(solution.wcs, frame.wcs)
    score.found += distance <= 5
    score.wrong += distance > 5
    score.off.append(distance)
    score.odds.append(solution.log_odds)


def _solved(
    x: np.ndarray,
    y: np.ndarray,
    flux: np.ndarray,
    shape: tuple[int, int],
    hints: tuple[Hint, ...],
    catalogue: Catalogue,
    *,
    blind: bool,
    **more: float,
) -> Solution | None:
    try:
        return solve(x, y, flux, shape, hints, catalogue, blind=blind, **more)
    except SolveError:
        return None


def random_lists(catalogue: Catalogue, count: int, seed: int) -> str:
    """Lists of points that are no stars; every tenth is looked for on the whole sky."""
    rng = np.random.default_rng(seed)
    solved, nearest = 0, _SUSPICIOUS
    start = time.process_time()
    for i in range(count):
        ny, nx = shape = [(1920, 1080), (976, 1304), (768, 616), (2160, 3840)][i % 4]
        number = int(np.exp(rng.uniform(np.log(6), np.log(400))))
        points = rng.uniform(0, [nx, ny], (number, 2))
        if i % 3 == 0:
            clump = number // 2
            points[:clump] = np.clip(rng.normal([nx / 2, ny / 2], [nx / 12, ny / 12], (clump, 2)), 0, [nx - 1, ny - 1])
        hint = Hint(*anywhere(rng), scale=float(rng.choice([1.5, 2.37, 3.99])))
        flux = rng.random(number)
        solution = _solved(*points.T, flux, shape, (hint,), catalogue, blind=i % 10 == 0, certain=_SUSPICIOUS)
        if solution is not None:
            nearest = max(nearest, solution.log_odds)
            solved += solution.log_odds >= CERTAIN
    seconds = (time.process_time() - start) / count
    return f"{count} random lists: {solved} solved, largest log odds at most {nearest:.1f}, {seconds:.2f} s each"


def wrong_hints(catalogue: Catalogue, count: int, seed: int) -> str:
    """Frames of a Seestar whose hint is somewhere else, and that are not looked for on the whole sky."""
    rng = np.random.default_rng(seed)
    solved = 0
    for _ in range(count):
        frame = observe(catalogue, *anywhere(rng), S50, rng)
        hint = Hint(*anywhere(rng), scale=S50.scale)
        solution = _solved(frame.x, frame.y, frame.flux, S50.shape, (hint,), catalogue, blind=False)
        solved += solution is not None and off(solution.wcs, frame.wcs) > 5
    return f"{count} wrong hints: {solved} solved wrong"


if __name__ == "__main__":
    main()
