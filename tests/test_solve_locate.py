"""Every frame of a run finds its place: headers that lie are found out, the rest is solved, shallow frames follow."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from real_sky import Camera, StarList, aim, observe, off
from typer.testing import CliRunner

from zemosaic.calibrate import NO_REPAIRS
from zemosaic.cli import app
from zemosaic.demo import make_field
from zemosaic.events import Event, Events
from zemosaic.frames import Frame, read_frame
from zemosaic.measure import FrameMeasure
from zemosaic.settings import Settings
from zemosaic.solve.catalogue import load_catalogue
from zemosaic.solve.embedded import SolveError
from zemosaic.solve.locate import Places, header_check, locate
from zemosaic.solve.placement import brightest_first
from zemosaic.solve.siblings import Sibling, place_among
from zemosaic.stars import Stars

CYGNUS = (305.0, 40.0)
CAMERA = Camera()
EMBEDDED = Settings(solver_method="embedded", solver_fallback=False)


def frame_of(number: int, shape: tuple[int, int], wcs: WCS | None, pointing: tuple[float, float]) -> Frame:
    return Frame(
        path=Path(f"{number:03d}.fit"),
        shape=shape,
        colour="mono",
        wcs=wcs,
        wcs_source=None if wcs is None else "header",
        ra=pointing[0],
        dec=pointing[1],
        focal_length=250.0,
        pixel_size=2.9,
        instrument="Test",
        date_obs=f"2025-02-01T21:{number:02d}:00",
    )


def measure_of(stars: StarList) -> FrameMeasure:
    """Only the stars count here."""
    flux = stars.flux[:, None]
    found = Stars(stars.x, stars.y, flux, np.ones_like(flux), np.ones(len(flux), bool))
    values = {"repairs": NO_REPAIRS, "stars": found, "detected": len(found)}
    rest = {name: np.nan for name in FrameMeasure.__dataclass_fields__ if name not in values}
    return FrameMeasure(**values, **rest)  # type: ignore[arg-type]


def night(count: int = 6, *, seed: int = 1, spread: float = 0.15, parity: int = 1) -> list[StarList]:
    """Overlapping frames around one place, all turned alike."""
    rng = np.random.default_rng(seed)
    places = [(CYGNUS[0] + spread * (i % 3), CYGNUS[1] + spread * (i // 3)) for i in range(count)]
    return [observe(load_catalogue(), *place, CAMERA, rng, parity=parity) for place in places]


def found(
    stars: Sequence[StarList], claims: Sequence[WCS | None], settings: Settings = EMBEDDED, **options: object
) -> tuple[Places, list[Event]]:
    """`locate` on frames whose headers claim this; pointings are 0.1 degrees off."""
    frames = []
    for i, (one, claim) in enumerate(zip(stars, claims, strict=True)):
        ra, dec = one.wcs.wcs.crval
        frames.append(frame_of(i, CAMERA.shape, claim, (ra + 0.1, dec - 0.05)))
    heard: list[Event] = []
    places = locate(frames, [measure_of(one) for one in stars], settings, Events(heard.append), workers=1)
    return places, heard


def moved(wcs: WCS, *, arcmin: float = 0.0, scale: float = 1.0, mirror: bool = False) -> WCS:
    other = wcs.deepcopy()
    other.wcs.crval = other.wcs.crval + [arcmin / 60, 0.0]
    other.wcs.cd = other.wcs.cd * scale @ np.diag([-1.0 if mirror else 1.0, 1.0])
    other.wcs.set()
    return other


def test_frames_without_a_wcs_are_solved():
    stars = night()
    places, _ = found(stars, [None] * len(stars))
    assert [place.source for place in places.frames] == ["embedded"] * len(stars)
    for one, place in zip(stars, places.frames, strict=True):
        assert place.wcs is not None and place.checked
        assert off(place.wcs, one.wcs) < 0.3
    assert places.agreement is not None and places.agreement.median < 0.15


@pytest.mark.parametrize("lie", [{"arcmin": 2.0}, {"scale": 2.0}, {"mirror": True}], ids=str)
def test_a_header_that_lies_is_found_out(lie):
    stars = night()
    claims: list[WCS | None] = [one.wcs for one in stars]
    claims[2] = moved(stars[2].wcs, **lie)
    places, _ = found(stars, claims)
    for i, (one, place) in enumerate(zip(stars, places.frames, strict=True)):
        assert place.wcs is not None
        assert off(place.wcs, one.wcs) < 0.3
        assert (place.source == "header") == (i != 2)


def test_good_headers_are_kept_to_the_last_bit():
    stars = night()
    places, _ = found(stars, [one.wcs for one in stars])
    assert all(place.wcs is one.wcs for place, one in zip(places.frames, stars, strict=True))


def invented(stars: StarList, seed: int) -> StarList:
    """The same sky for all frames, which no catalogue knows."""
    rng = np.random.default_rng(7)
    ra, dec = CYGNUS[0] + rng.uniform(-1, 1.5, 1500), CYGNUS[1] + rng.uniform(-1, 1.5, 1500)
    flux = 10 ** rng.uniform(2, 5, 1500)
    x, y = stars.wcs.wcs_world2pix(ra, dec, 0)
    ny, nx = CAMERA.shape
    on = (x > 0) & (x < nx) & (y > 0) & (y < ny)
    noise = np.random.default_rng(seed).normal(0, 0.1, (2, int(on.sum())))
    return replace(stars, x=x[on] + noise[0], y=y[on] + noise[1], flux=flux[on])


def test_a_sky_that_the_catalogue_does_not_know_costs_nobody_a_wcs():
    stars = [invented(one, i) for i, one in enumerate(night())]
    places, heard = found(stars, [one.wcs for one in stars])
    assert all(place.wcs is one.wcs for place, one in zip(places.frames, stars, strict=True))
    assert "run_info_sky_unknown" in {event.key for event in heard}


def test_in_an_unknown_sky_a_liar_is_placed_by_its_neighbours():
    stars = [invented(one, i) for i, one in enumerate(night())]
    claims: list[WCS | None] = [one.wcs for one in stars]
    claims[4] = moved(stars[4].wcs, arcmin=2.0)
    places, _ = found(stars, claims)
    assert places.frames[4].source == "neighbours"
    for one, place in zip(stars, places.frames, strict=True):
        assert place.wcs is not None
        assert off(place.wcs, one.wcs) < 0.5


def test_what_cannot_be_found_says_why():
    rng = np.random.default_rng(3)
    stars = night(3)
    ny, nx = CAMERA.shape
    stars[1] = replace(stars[1], x=rng.uniform(0, nx, 3), y=rng.uniform(0, ny, 3), flux=rng.uniform(1, 2, 3))
    places, _ = found(stars, [None] * 3)
    assert [place.wcs is None for place in places.frames] == [False, True, False]
    assert "its 3 stars are too few" in places.frames[1].reason


def test_solver_none_leaves_everything_as_it_came():
    stars = night(3)
    claims = [stars[0].wcs, moved(stars[1].wcs, arcmin=2.0), None]
    places, _ = found(stars, claims, Settings(solver_method="none"))
    assert [place.wcs for place in places.frames] == claims
    assert places.frames[2].reason == "it has no WCS"


def test_the_options_of_a_solver_are_gathered_once(monkeypatch):
    asked: list[Settings] = []
    used: list[object] = []

    def refuse(pixels: object, hint: object, options: object) -> None:
        used.append(options)
        raise SolveError("there is no solution")

    monkeypatch.setattr("zemosaic.solve.locate.solver_order", lambda _: ("astap",))
    monkeypatch.setattr("zemosaic.solve.locate.read_pixels", lambda _: None)
    monkeypatch.setattr("zemosaic.solve.locate.astap_options", lambda settings, _: asked.append(settings) or object())
    monkeypatch.setattr("zemosaic.solve.locate.solve_astap", refuse)
    places, _ = found(night(3), [None] * 3, Settings(solver_method="astap", solver_fallback=False))
    assert all("there is no solution" in place.reason for place in places.frames)
    assert len(used) > 3 and len(set(used)) == len(asked) == 1


def test_resolving_ignores_good_headers():
    stars = night(3)
    settings = Settings(solver_method="embedded", solver_fallback=False, force_resolve_existing_wcs=True)
    places, _ = found(stars, [one.wcs for one in stars], settings)
    assert [place.source for place in places.frames] == ["embedded"] * 3


def test_earlier_solutions_are_used_again():
    stars = night(3)
    frames = [frame_of(i, CAMERA.shape, None, tuple(one.wcs.wcs.crval)) for i, one in enumerate(stars)]  # type: ignore[arg-type]
    measures = [measure_of(one) for one in stars]
    kept = {}

    def recall(frame, make):
        kept[frame.path] = kept.get(frame.path) or make()
        return kept[frame.path]

    first = locate(frames, measures, EMBEDDED, Events(), recall=recall)
    again = locate(frames, measures, EMBEDDED, Events(), recall=lambda frame, _: kept[frame.path])
    for one, other in zip(first.frames, again.frames, strict=True):
        assert one.wcs is not None and other.wcs is not None
        np.testing.assert_array_equal(one.wcs.wcs.cd, other.wcs.wcs.cd)


def test_what_was_said_of_headers_before_is_not_asked_again(monkeypatch):
    stars = night()
    claims = [one.wcs for one in stars]
    claims[2] = moved(stars[2].wcs, arcmin=2.0)
    frames = [frame_of(i, CAMERA.shape, claim, tuple(claim.wcs.crval)) for i, claim in enumerate(claims)]  # type: ignore[arg-type]
    measures = [measure_of(one) for one in stars]
    check = header_check(EMBEDDED)
    said = {frame.path: check(frame, measure) for frame, measure in zip(frames, measures, strict=True)}
    assert [bool(place.reason) for place in said.values()] == [i == 2 for i in range(len(stars))]
    asked = locate(frames, measures, EMBEDDED, Events())
    del frames[0], measures[0]  # one that was left out meanwhile
    monkeypatch.setattr("zemosaic.solve.locate.header_check", lambda settings: lambda *_: pytest.fail("asked again"))
    told = locate(frames, measures, EMBEDDED, Events(), said=said)
    assert [place.source for place in told.frames] == [place.source for place in asked.frames[1:]]
    assert [place.source for place in told.frames].count("header") == len(stars) - 2


def test_nobody_asks_headers_where_nobody_solves(monkeypatch):
    assert header_check(Settings(solver_method="none")) is None

    def missing(settings):
        raise SolveError("ASTAP is not installed")

    monkeypatch.setattr("zemosaic.solve.locate.solver_order", missing)
    assert header_check(EMBEDDED) is None
    with pytest.raises(SolveError, match="not installed"):
        locate([], [], EMBEDDED, Events())


# --- siblings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parity", [-1, 1])
def test_four_stars_place_a_frame_among_its_siblings(parity):
    """Header 0.2 degrees off, turned by a degree against them, seven detections of which four are catalogued."""
    catalogue, rng = load_catalogue(), np.random.default_rng(5)
    wrong = 0
    for trial in range(12):
        ra, dec = CYGNUS[0] + rng.uniform(-3, 3), CYGNUS[1] + rng.uniform(-3, 3)
        siblings = []
        for k in range(4):
            place = ra + 0.3 * k, dec + 0.2 * (k % 2)
            wcs = aim(*place, CAMERA, rotation=0.3 + 0.004 * k, parity=parity)
            siblings.append(Sibling(wcs, (place[0] + 0.2 + rng.normal(0, 0.004), place[1] + rng.normal(0, 0.003))))
        truth = aim(ra - 0.2, dec, CAMERA, rotation=0.3 + math.radians(1.0), parity=parity)
        ny, nx = CAMERA.shape
        x, y = truth.wcs_world2pix(*(getattr(catalogue.cone(ra - 0.2, dec, 0.8), n) for n in ("ra", "dec")), 0)
        on = np.flatnonzero((x > 20) & (x < nx - 20) & (y > 20) & (y < ny - 20))[:5]
        assert len(on) == 5, trial
        points = np.c_[
            np.r_[x[on], rng.uniform(0, nx, 3)] + rng.normal(0, 0.2, 8),
            np.r_[y[on], rng.uniform(0, ny, 3)] + rng.normal(0, 0.2, 8),
        ]
        stars = brightest_first(points[:, 0], points[:, 1], np.ones(8), CAMERA.shape)
        found = place_among(stars, CAMERA.shape, (ra, dec), siblings, catalogue)
        wrong += found is None or off(found, truth) > 3.0
    assert wrong <= 2


def test_random_stars_are_placed_nowhere_among_siblings():
    catalogue, rng = load_catalogue(), np.random.default_rng(6)
    ny, nx = CAMERA.shape
    for _ in range(60):
        ra, dec = float(rng.uniform(0, 360)), float(rng.uniform(-60, 60))
        siblings = [
            Sibling(aim(ra + 0.3 * k, dec, CAMERA, rotation=0.3, parity=1), (ra + 0.3 * k + 0.1, dec)) for k in range(3)
        ]
        count = int(rng.integers(4, 40))
        points = np.c_[rng.uniform(-nx / 2, nx / 2, count), rng.uniform(-ny / 2, ny / 2, count)]
        assert place_among(points, CAMERA.shape, (ra, dec), siblings, catalogue) is None


# --- the command ----------------------------------------------------------------------------------------------


def test_the_command_writes_what_it_found_and_never_into_a_raw(tmp_path):
    truth = make_field(tmp_path / "subs", panels=(2, 1), frames=4, shape=(120, 160), trails=0.0)
    before = {path: path.read_bytes() for path in truth.paths}
    done = CliRunner().invoke(app, ["solve", str(tmp_path / "subs"), "-o", str(tmp_path / "out"), "-q"])
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) == 4
    rows = list(csv.DictReader((tmp_path / "out" / "solutions.csv").open()))
    assert [row["source"] for row in rows] == ["header"] * 4
    for path in truth.paths:
        header = fits.getheader(tmp_path / "out" / f"{path.stem}.wcs.fits")
        wcs = read_frame(path).wcs
        assert wcs is not None
        np.testing.assert_array_equal(WCS(header).pixel_scale_matrix, wcs.pixel_scale_matrix)
    assert {path: path.read_bytes() for path in truth.paths} == before
    assert sorted(path.name for path in (tmp_path / "subs").iterdir()) == sorted(path.name for path in truth.paths)


def test_nothing_solved_is_an_error_with_a_reason(tmp_path):
    make_field(tmp_path / "subs", panels=(1, 1), frames=2, shape=(120, 160), with_wcs=False, trails=0.0)
    done = CliRunner().invoke(app, ["solve", str(tmp_path / "subs"), "-q", "--set", "solver_fallback=false"])
    assert done.exit_code == 1
    assert "none of 2 files has a place on the sky" in done.stderr


# --- real subs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "count"), [("seestar-ngc7023-panels", 6), ("seestar-ngc7023", 2), ("asi224-m27", 2)]
)
def test_real_subs_are_where_they_are(shared_data, tmp_path, folder, count):
    options = ["--resolve", "--set", "solver_fallback=false", "--set", "solver_method=embedded", "-q"]
    done = CliRunner().invoke(app, ["solve", str(shared_data / folder), "-o", str(tmp_path), *options])
    assert done.exit_code == 0, done.output
    files = sorted(path for path in (shared_data / folder).glob("*.wcs.fits"))
    assert len(files) == count
    for path in files:
        mine = fits.getheader(tmp_path / path.name)
        nx, ny = mine["IMAGEW"], mine["IMAGEH"]
        x, y = (grid.ravel() for grid in np.meshgrid(np.linspace(0, nx - 1, 12), np.linspace(0, ny - 1, 12)))
        truth = WCS(fits.getheader(path))
        tx, ty = truth.all_world2pix(*WCS(mine).all_pix2world(x, y, 0), 0)
        assert np.sqrt(np.mean((tx - x) ** 2 + (ty - y) ** 2)) < 1.0
