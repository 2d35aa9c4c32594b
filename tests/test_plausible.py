"""Input that is well-formed and wrong, or right and unusual: what a run makes of it, as docs/reliability.md says."""

from __future__ import annotations

import gzip
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from numpy.typing import NDArray

from zemosaic.canvas import find_strays
from zemosaic.demo import PEDESTAL, FieldTruth, make_field
from zemosaic.events import Event
from zemosaic.frames import Frame
from zemosaic.misfits import duplicates, filters_mixed, in_other_units, of_another_kind, of_impossible_size
from zemosaic.settings import Settings
from zemosaic_worker import RunError, run_hierarchical_mosaic

SMALL = {"shape": (200, 260), "star_density": 5000, "nebula": 0, "sky": 300, "trails": 0}
ONE_PANEL = {**SMALL, "panels": (1, 1)}
CD = ("CD1_1", "CD1_2", "CD2_1", "CD2_2")


@dataclass
class Run:
    """What a run made, and said."""

    folder: Path
    product: Path = field(init=False)
    said: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        out = self.folder.parent / f"{self.folder.name}-out"
        settings = Settings(num_processing_workers=1, solver_method="none")
        made = run_hierarchical_mosaic(self.folder, out, settings, sds=True, progress_callback=self.said.append)
        assert made.product is not None and made.exit_status == 0
        self.product = made.product
        self.fates = {record.file: record.reason or record.status for record in made.ledger}
        self.records = {record.file: record for record in made.ledger}

    @property
    def used(self) -> set[str]:
        return {record.file for record in self.records.values() if record.status != "rejected"}

    @property
    def image(self) -> NDArray[np.float32]:
        """``(H, W)`` mean of the colours."""
        pixels = fits.getdata(self.product)
        return pixels.mean(axis=0) if pixels.ndim == 3 else pixels

    def warned_of(self, key: str) -> list[dict[str, Any]]:
        return [dict(event.values) for event in self.said if event.key == key]


def altered(source: Path, target: Path, pixels: Callable[[NDArray], NDArray] | None = None, **cards: Any) -> None:
    """A copy of a sub with other pixels and other cards; ``None`` takes a card away."""
    with fits.open(source) as hdus:
        data, header = hdus[0].data, hdus[0].header.copy()
    if pixels is not None:
        data = pixels(data)
    for key in ("BZERO", "BSCALE"):
        header.remove(key, ignore_missing=True)
    for key, value in cards.items():
        key = key.replace("DASH", "-")
        if value is None:
            header.remove(key, ignore_missing=True)
        else:
            header[key] = value
    fits.writeto(target, data, header)


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


# --- one of each among good subs ------------------------------------------------------------------------

#: By what a header tells: file, and what is said of it.
BY_HEADER = {
    "dark.fit": "its header says that it is a dark",
    "flat.fit": "its header says that it is a flat",
    "doubled.fit": '4.78"/px but the other frames of this camera have 2.39"/px',
    "coarse.fit": 'it has 47.8"/px and most frames have 2.39"/px',
    "stretched.fit": "a WCS that stretches the pixels 2.00 times",
    "shrunk.fit": "\"/px, which is no camera's",
    "mono.fit": "it is mono and most frames are in colour",
    "stacked.fit": "it is stacked and most frames are not stacked",
    "tiny.fit": "an image of 24 x 20 px is too small",
    "far.fit": "it points 30.0 deg away from the main field",
}
#: By what is seen in the pixels.
BY_PIXELS = {
    "z-copy.fit": "the same pixels as good",
    "z-packed.fit.gz": "the same pixels as good",
    "z-renamed.fit": "the same pixels as good",
    "black.fit": "empty or saturated",
    "white.fit": "empty or saturated",
    "covered.fit": "no star is found in it",
    "cloud.fit": "no star is found in it",
    "dome.fit": "no star is found in it",
    "share.fit": "saved in other units",
    "half-copied.fit": "cut short or is still being copied",
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eight good subs of one panel, named in order of time."""
    truth = make_field(tmp_path_factory.mktemp("good"), frames=8, **ONE_PANEL)
    return [path.rename(path.with_name(f"good{i}.fit")) for i, path in enumerate(truth.paths)]


@pytest.fixture(scope="module")
def clean(good: list[Path]) -> Run:
    return Run(good[0].parent)


def wrong_by_header(good: Sequence[Path], folder: Path) -> None:
    header = fits.getheader(good[3])
    cd = {key: header[key] for key in CD}
    changes: dict[str, dict[str, Any]] = {
        "dark.fit": {"IMAGETYP": "Dark Frame"},
        "flat.fit": {"IMAGETYP": "FLAT"},
        "doubled.fit": {key: 2 * value for key, value in cd.items()},
        "coarse.fit": {key: 20 * value for key, value in cd.items()} | {"INSTRUME": "all-sky", "FOCALLEN": 12.5},
        "stretched.fit": {key: 2 * cd[key] for key in CD[:2]},
        "shrunk.fit": {key: 1e-9 * value for key, value in cd.items()},
        "mono.fit": {"BAYERPAT": None},
        "stacked.fit": {"STACKCNT": 187},
        "far.fit": {"CRVAL2": header["CRVAL2"] - 30},
    }
    for name, cards in changes.items():
        altered(good[3], folder / name, **cards)
    altered(good[3], folder / "tiny.fit", lambda p: p[:20, :24])


def wrong_by_pixels(good: Sequence[Path], folder: Path) -> None:
    shape = fits.getdata(good[0]).shape
    shutil.copy(good[2], folder / "z-copy.fit")
    (folder / "z-packed.fit.gz").write_bytes(gzip.compress(good[3].read_bytes()))
    # Solved by another program, which also put the start of the night into it.
    step = 1.0001 * fits.getheader(good[4])["CD1_1"]
    altered(good[4], folder / "z-renamed.fit", DATEDASHOBS="2030-01-01T00:00:00", CD1_1=step, OBJECT="?")
    pixels: dict[str, Callable[[NDArray], NDArray]] = {
        "black.fit": np.zeros_like,
        "white.fit": lambda p: np.full_like(p, 65535),
        "covered.fit": lambda p: rng().normal(PEDESTAL, 5, shape).astype(np.uint16),
        "cloud.fit": lambda p: rng().normal(3000, 50, shape).astype(np.uint16),
        "dome.fit": lambda p: rng().normal(30000, 150, shape).astype(np.uint16),
        "share.fit": lambda p: (p / 65535).astype(np.float32),
        "half-copied.fit": lambda p: np.where(np.arange(len(p))[:, None] < 0.7 * len(p), p, 32768).astype(np.uint16),
    }
    for name, change in pixels.items():
        altered(good[5], folder / name, change)


@pytest.fixture(scope="module")
def crowd(good: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The good subs and everything that is wrong."""
    folder = tmp_path_factory.mktemp("crowd") / "subs"
    shutil.copytree(good[0].parent, folder)
    wrong_by_header(good, folder)
    wrong_by_pixels(good, folder)
    return Run(folder)


@pytest.mark.parametrize(("name", "words"), (BY_HEADER | BY_PIXELS).items())
def test_what_is_wrong_is_left_out_and_named(crowd, name, words):
    record = crowd.records[name]
    assert record.status == "rejected"
    assert re.search(words, record.reason), record.reason
    assert any(event.kind == "warning" and name in event.text for event in crowd.said)


def test_nothing_else_is_left_out_and_the_books_close(crowd, good):
    assert crowd.used == {path.name for path in good}
    assert len(crowd.records) == len(good) + len(BY_HEADER) + len(BY_PIXELS)


def test_the_mosaic_is_that_of_the_good_subs(crowd, clean):
    """Bad frames have no say but in the size of the photometric aperture, and so by some thousandths in the gains."""
    assert crowd.image.shape == clean.image.shape
    difference = np.abs(crowd.image / clean.image - 1)
    assert np.nanmedian(difference) < 3e-3 and np.nanmax(difference) < 0.02


# --- frames that are fit, but not for each other ---------------------------------------------------------


def a_frame(name: str = "a.fit", **facts: Any) -> Frame:
    return Frame(Path(name), **({"shape": (100, 100), "colour": "mono"} | facts))


def test_filters_of_a_mono_camera_are_not_mixed():
    """Names differ from program to program; a frame without one may be anything."""
    names = ["R", "red", " R ", "Ha", "", "Red"]
    reasons = of_another_kind([a_frame(filter=name) for name in names])
    assert [i for i, reason in enumerate(reasons) if reason] == [3]
    assert reasons[3] == "it is taken through filter HA and most frames are taken through filter R: run it on its own"


def test_filters_of_a_colour_camera_are_mixed_with_a_warning():
    frames = [a_frame(colour="bayer", filter=name) for name in ("IRCUT", "IRCUT", "LP", "")]
    assert not any(of_another_kind(frames))
    assert filters_mixed(frames) == {"IRCUT": 2, "LP": 1}
    assert filters_mixed(frames[:2] + frames[3:]) == {}


def test_stacks_alone_are_a_mosaic_like_any_other():
    assert not any(of_another_kind([a_frame(kind="stack")] * 3))
    assert [bool(r) for r in of_another_kind([a_frame(kind=k) for k in ("stack", "light", "stack")])] == [0, 1, 0]


@pytest.mark.parametrize(
    ("shape", "budget", "words"),
    [
        ((32, 32), 0, ""),
        ((31, 4000), 1 << 40, "too small"),
        ((5000, 7000), 1 << 20, ""),
        ((50000, 50000), 1 << 34, "50000 x 50000 px takes 55.9 GB of memory and the run may use 16.0 GB"),
    ],
)
def test_frames_of_impossible_size(shape, budget, words):
    (reason,) = of_impossible_size([a_frame(shape=shape)], budget)
    assert (words in reason) and bool(reason) == bool(words)


def measure(value: float, noise: float = 20.0) -> Any:
    blocks = np.full((4, 4, 1), value, np.float32)
    return SimpleNamespace(
        blocks=blocks, noise=np.array([noise]), repairs=SimpleNamespace(index=np.zeros(0, int), value=np.zeros(0))
    )


def test_of_many_copies_the_first_stays():
    frames = [a_frame(f"{i}.fit") for i in range(5)]
    reasons = duplicates(frames, [measure(v) for v in (1.0, 2.0, 1.0, 2.0, 1.0)])
    assert [reason[:33] for reason in reasons] == ["", ""] + [
        f"it holds the same pixels as {n}" for n in ("0.fit", "1.fit", "0.fit")
    ]


def test_exposures_and_gains_that_differ_are_no_other_units():
    assert not any(in_other_units([measure(1, noise) for noise in (2.0, 8.0, 20.0, 150.0, 400.0)]))
    assert [bool(r) for r in in_other_units([measure(1, noise) for noise in (20.0, 20.0, 20.0 / 65535)])] == [0, 0, 1]


def test_a_scale_like_no_other_is_left_out_even_of_another_camera(good):
    from zemosaic.frames import read_frame

    frames = [read_frame(path) for path in good[:3]]
    odd = read_frame(good[3])
    odd.wcs.wcs.cd = odd.wcs.wcs.cd * 11
    odd.wcs.wcs.set()
    odd = Frame(odd.path, odd.shape, odd.colour, odd.bayer, wcs=odd.wcs, instrument="finder")
    assert find_strays([*frames, odd]) == [
        "",
        "",
        "",
        'it has 26.3"/px and most frames have 2.39"/px: run it on its own',
    ]


# --- whole runs of what is right and unusual -------------------------------------------------------------


@pytest.fixture(scope="module")
def mono(tmp_path_factory: pytest.TempPathFactory) -> FieldTruth:
    """Six subs of a mono camera, all with the same transparency."""
    return make_field(
        tmp_path_factory.mktemp("mono"), frames=6, pattern=None, transparency_scatter=0, name="M", **ONE_PANEL
    )


def as_folder(truth: FieldTruth, folder: Path, change: Callable[[int, Path, Path], None]) -> Path:
    """A folder of the subs of a field, each by itself changed on the way: number, source, target."""
    folder.mkdir()
    for i, path in enumerate(truth.paths):
        change(i, path, folder / f"{i}.fit")
    return folder


def test_mixed_exposures_end_on_one_scale(mono, tmp_path):
    """Every third sub is exposed four times as long: its gain is a quarter, its weight greater."""

    def change(i: int, source: Path, target: Path) -> None:
        times = 4 if i % 3 == 0 else 1
        altered(source, target, lambda p: ((p - PEDESTAL) * times + PEDESTAL).astype(np.float32), EXPTIME=10.0 * times)

    run = Run(as_folder(mono, tmp_path / "subs", change))
    assert len(run.used) == 6
    gain = np.array([run.records[f"{i}.fit"].gain[0] for i in range(6)])
    np.testing.assert_allclose(gain / np.median(gain), [0.25, 1, 1, 0.25, 1, 1], rtol=0.06)


def test_mixed_cameras_end_in_one_mosaic(mono, tmp_path):
    """Two of the subs come from a camera with pixels twice as large."""

    def change(i: int, source: Path, target: Path) -> None:
        if i % 3:
            shutil.copy(source, target)
            return
        header = fits.getheader(source)
        cards = {key: 2 * header[key] for key in (*CD, "XPIXSZ")}
        cards |= {f"CRPIX{k}": (header[f"CRPIX{k}"] + 0.5) / 2 for k in (1, 2)}
        binned = lambda p: p.reshape(100, 2, 130, 2).mean(axis=(1, 3)).astype(np.float32)  # noqa: E731
        altered(source, target, binned, INSTRUME="Other", **cards)

    run = Run(as_folder(mono, tmp_path / "subs", change))
    assert len(run.used) == 6
    gain = np.array([run.records[f"{i}.fit"].gain[0] for i in range(6)])
    np.testing.assert_allclose(gain / np.median(gain), 1, atol=0.08)


def test_a_run_through_two_filters_is_told_or_split(good, mono, tmp_path):
    colour = tmp_path / "colour"
    colour.mkdir()
    for i, path in enumerate(good[:4]):
        altered(path, colour / path.name, FILTER="LP" if i % 2 else "IRCUT")
    run = Run(colour)
    assert len(run.used) == 4
    assert run.warned_of("run_warn_filters_mixed") == [{"filters": "IRCUT (2), LP (2)"}]
    split = Run(as_folder(mono, tmp_path / "mono", lambda i, a, b: altered(a, b, FILTER="Ha" if i in (1, 4) else "R")))
    assert split.used == {"0.fit", "2.fit", "3.fit", "5.fit"}


@pytest.mark.parametrize("count", [1, 2])
def test_few_frames_make_a_mosaic_of_few_frames(good, clean, tmp_path, count):
    (tmp_path / "subs").mkdir()
    for path in good[:count]:
        shutil.copy(path, tmp_path / "subs")
    run = Run(tmp_path / "subs")
    assert len(run.used) == count
    assert fits.getdata(run.product, "COVERAGE").max() == count
    sky = {name: np.nanmedian(one.image) for name, one in (("few", run), ("all", clean))}
    assert sky["few"] == pytest.approx(sky["all"], rel=0.3)
    assert np.isfinite(run.image).mean() > 0.4


def islands(folder: Path, away: float) -> Path:
    """Two fields of four and three subs, the second `away` degrees south of the first."""
    first = make_field(folder / "north", frames=4, name="North", **ONE_PANEL)
    ra, dec = first.recipe.center
    make_field(folder / "south", frames=3, center=(ra, dec - away), name="South", seed=2, **ONE_PANEL)
    return folder


def test_two_islands_near_each_other_share_a_canvas_and_a_warning(tmp_path):
    run = Run(islands(tmp_path / "subs", 0.25))
    assert len(run.used) == 7
    assert run.warned_of("run_warn_levels_groups") == [{"groups": 2}]
    covered = np.isfinite(run.image)
    assert not covered[len(covered) // 2].any()  # the gap stays a gap
    # Each island has the level that its own frames have on average, not one bent to the other's.
    top, bottom = run.image[: len(covered) // 2], run.image[len(covered) // 2 :]
    assert np.nanmedian(top) == pytest.approx(np.nanmedian(bottom), rel=0.5)


def test_of_two_islands_far_apart_the_larger_is_made(tmp_path):
    run = Run(islands(tmp_path / "subs", 5.0))
    assert len(run.used) == 4 and all(name.startswith("north/") for name in run.used)
    assert {fate for name, fate in run.fates.items() if name.startswith("south/")} == {
        "it points 5.0 deg away from the main field: run it on its own"
    }


@pytest.mark.parametrize("center", [(0.0, 10.0), (0.0, 0.0), (120.0, 90.0), (120.0, -89.95)])
def test_neither_the_poles_nor_ra_0_are_special(tmp_path, center):
    truth = make_field(tmp_path / "subs", panels=(2, 1), frames=6, center=center, overlap=0.4, **SMALL)
    run = Run(tmp_path / "subs")
    assert len(run.used) == 6
    (ny, nx), (height, width) = truth.canvas()[1], run.image.shape
    assert ny * nx / 2 < height * width < 2.5 * ny * nx
    assert len(run.warned_of("run_warn_levels_groups")) == 0


def test_when_everything_is_wrong_the_run_says_what_is_wrong_most(good, tmp_path):
    for i, path in enumerate(good[:3]):
        altered(path, tmp_path / f"dark{i}.fit", IMAGETYP="DARK")
    (tmp_path / "text.fit").write_text("no")
    with pytest.raises(RunError, match=r"no frame is left of 4 files; of 3 it is said: its header says that it is a d"):
        run_hierarchical_mosaic(tmp_path, tmp_path / "out", Settings(solver_method="none"), sds=True)
