"""External solvers: the real programs on rendered stars, and everything that a program can do wrong."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from astap_catalogue import write_database
from astropy.wcs import WCS

from zemosaic.events import Cancelled
from zemosaic.settings import Settings, settings_from
from zemosaic.solve import external
from zemosaic.solve.astap import AstapOptions, astap_options, binned_copy, find_database, solve_astap
from zemosaic.solve.astrometry_net import AstrometryOptions, astrometry_options, solve_astrometry_net
from zemosaic.solve.catalogue import load_catalogue
from zemosaic.solve.embedded import SolveError
from zemosaic.solve.external import find_astap, find_solve_field, linear_wcs, run_program, solver_order
from zemosaic.solve.hint import Hint

SHAPE = (1920, 1080)
SCALE = 2.37
FIELD = (100.0, 20.0)  # 60 catalogue stars in a frame
ELSEWHERE = Hint(ra=300.0, dec=-40.0, radius=1.0, scale=SCALE, scale_error=0.05)
ODD_NAME = "- star base, étoiles 星"
posix = pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins for programs are shell scripts")


# -------------------------------------------------------------------------------------- frames with stars


def true_wcs(ra: float, dec: float, *, angle: float = 20.0, parity: int = 1, shape: tuple[int, int] = SHAPE) -> WCS:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval, wcs.wcs.crpix = [ra, dec], [shape[1] / 2, shape[0] / 3]
    wcs.wcs.lonpole = 180.0  # as every solver means it; the default at a declination of exactly 90 is another
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    wcs.wcs.cd = SCALE / 3600 * np.array([[parity * cos, -sin], [parity * sin, cos]])
    wcs.pixel_shape = shape[::-1]
    return wcs


def stars_in(wcs: WCS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y (0-based) and flux of the catalogue's stars in a frame."""
    near = load_catalogue().cone(*wcs.wcs.crval, 1.0)
    x, y = wcs.all_world2pix(near.ra, near.dec, 0)
    inside = (x > 0) & (x < wcs.pixel_shape[0] - 1) & (y > 0) & (y < wcs.pixel_shape[1] - 1)
    return x[inside], y[inside], 3000 * 10 ** (-0.4 * (near.mag[inside] - 12))


def render(wcs: WCS, *, bayer: bool = True, hot: int = 100, seed: int = 1) -> np.ndarray:
    """A frame of stars (FWHM 3 px), sky, noise and hot pixels, as a camera would record it; ADU."""
    rng = np.random.default_rng(seed)
    width, height = wcs.pixel_shape
    frame = np.full((height, width), 600.0)
    box = np.arange(-10, 11)
    for x, y, flux in zip(*stars_in(wcs), strict=True):
        rows, columns = np.rint(y).astype(int) + box, np.rint(x).astype(int) + box
        rows, columns = rows[(rows >= 0) & (rows < height)], columns[(columns >= 0) & (columns < width)]
        light = np.exp(-((rows[:, None] - y) ** 2 + (columns - x) ** 2) / (2 * 1.27**2)) / (2 * np.pi * 1.27**2)
        frame[np.ix_(rows, columns)] += flux * light
    if bayer:
        frame *= np.tile([[1.0, 0.7], [0.5, 1.0]], (height // 2 + 1, width // 2 + 1))[:height, :width]
    frame += rng.normal(size=frame.shape) * np.sqrt(frame)
    frame[rng.integers(height, size=hot), rng.integers(width, size=hot)] += rng.uniform(2000, 40000, hot)
    return np.clip(frame, 0, 65535).astype(np.float32)


def hint_near(wcs: WCS, **changes: float | None) -> Hint:
    """Half a degree and 1 % off, as mounts and headers are."""
    ra, dec = wcs.wcs.crval
    dec = min(dec + 0.3, 89.9)
    hint = Hint(
        ra=(ra + 0.3 / np.cos(np.radians(dec))) % 360, dec=dec, radius=3.0, scale=SCALE * 1.01, scale_error=0.05
    )
    return replace(hint, **changes)


def worst_error(found: WCS, truth: WCS) -> float:
    """Largest distance between two WCSs over the frame, pixels."""
    width, height = truth.pixel_shape
    x, y = (axis.ravel() for axis in np.meshgrid(np.linspace(0, width - 1, 5), np.linspace(0, height - 1, 5)))
    back = found.all_world2pix(*truth.all_pix2world(x, y, 0), 0)
    return float(np.hypot(back[0] - x, back[1] - y).max())


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Temporary folders lie in one with an awkward name, which must be empty in the end."""
    folder = tmp_path / f"{ODD_NAME} tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


# ---------------------------------------------------------------------------------------- the real ASTAP


@pytest.fixture(scope="module")
def astap(tmp_path_factory: pytest.TempPathFactory) -> AstapOptions:
    program = find_astap()
    if program is None:
        pytest.skip("ASTAP is not installed")
    folder = tmp_path_factory.mktemp("astap") / ODD_NAME
    folder.mkdir()
    stars = load_catalogue()
    write_database(folder, stars.ra, stars.dec, stars.mag)
    return AstapOptions(program, database=folder, timeout=30)


@pytest.mark.parametrize(
    ("kind", "parity", "field", "shape"),
    [
        ("bayer", 1, FIELD, SHAPE),
        ("mono", -1, FIELD, SHAPE),
        ("rgb", 1, FIELD, (1079, 1919)),
        ("bayer", -1, (0.05, 62.0), SHAPE),
        ("holes", 1, (300.0, 35.0), SHAPE),
        ("unit", 1, (84.0, -5.0), SHAPE),
    ],
)
def test_astap_solves_and_leaves_nothing(astap, scratch, kind, parity, field, shape):
    truth = true_wcs(*field, parity=parity, shape=shape)
    pixels = render(truth, bayer=kind == "bayer")
    if kind == "rgb":
        pixels = np.stack([pixels, 0.5 * pixels, 2 * pixels], axis=-1)
    elif kind == "holes":
        pixels[:300] = np.nan
        pixels[::50, ::50] = np.nan
    elif kind == "unit":
        pixels /= 65535
    before = pixels.copy()
    found = solve_astap(pixels, hint_near(truth), astap)
    assert worst_error(found, truth) < 0.7
    assert found.pixel_shape == truth.pixel_shape
    assert found.sip is None
    np.testing.assert_array_equal(pixels, before)
    assert not list(scratch.iterdir())


def test_astap_finds_nothing_at_a_wrong_place_or_in_an_empty_sky(astap, scratch):
    truth = true_wcs(*FIELD)
    frame = render(truth)
    with pytest.raises(SolveError, match="ASTAP found no solution"):
        solve_astap(frame, ELSEWHERE, astap)
    with pytest.raises(SolveError, match=r"ASTAP found (no solution|too few stars)"):
        solve_astap(np.random.default_rng(3).normal(600, 20, SHAPE).astype(np.float32), hint_near(truth), astap)
    assert not list(scratch.iterdir())


def test_astap_without_a_hint_of_the_scale(astap):
    truth = true_wcs(*FIELD)
    assert worst_error(solve_astap(render(truth), hint_near(truth, scale=None), astap), truth) < 0.7


def test_astap_without_star_database_says_so(astap, tmp_path):
    (tmp_path / "none").mkdir()
    truth = true_wcs(*FIELD, shape=(400, 400))
    with pytest.raises(SolveError, match="astap_data_directory_path"):
        solve_astap(render(truth), hint_near(truth), replace(astap, database=tmp_path / "none"))


def test_hot_pixels_are_out_of_astaps_copy():
    truth = true_wcs(*FIELD, shape=(600, 600))
    noise = binned_copy(render(truth, hot=0)).std()
    assert abs(binned_copy(render(truth, hot=300)) - binned_copy(render(truth, hot=0))).std() < 0.2 * noise


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((10, 2000), np.float32), "too small"),
        (np.full((200, 200), 7, np.float32), "flat"),
        (np.full((200, 200), np.nan, np.float32), "no data"),
    ],
)
def test_frames_that_astap_is_not_even_started_for(pixels, words):
    with pytest.raises(SolveError, match=words):
        binned_copy(pixels)


# --------------------------------------------------------------------------------- the real solve-field


@pytest.fixture(scope="module")
def solve_field() -> AstrometryOptions:
    program = find_solve_field()
    if program is None:
        pytest.skip("solve-field is not installed")
    if not list(Path("/usr/share/astrometry").glob("index-tycho2-0[78]*")):
        pytest.skip("there are no index files for fields of one degree (astrometry-data-tycho2-08)")
    return AstrometryOptions(program, timeout=30)


def noisy_list(truth: WCS, *, junk: int = 30, seed: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What detection would find: most of the stars, 0.15 px off, and things that are in no catalogue."""
    rng = np.random.default_rng(seed)
    stars = np.array(stars_in(truth))[:, rng.random(len(stars_in(truth)[0])) > 0.1]
    stars[:2] += rng.normal(0, 0.15, stars[:2].shape)
    width, height = truth.pixel_shape
    others = rng.uniform(0, [[width], [height], [2000]], (3, junk))
    return tuple(np.concatenate([stars, others], axis=1))


@pytest.mark.parametrize(
    ("field", "parity", "changes"),
    [
        (FIELD, 1, {}),
        ((0.05, -60.0), -1, {}),
        ((210.0, 89.7), 1, {}),
        ((300.0, 35.0), -1, {"ra": None, "dec": None}),
        ((190.0, 27.0), 1, {"scale": None}),
    ],
)
def test_solve_field_solves_and_leaves_nothing(solve_field, scratch, field, parity, changes):
    truth = true_wcs(*field, parity=parity)
    found = solve_astrometry_net(*noisy_list(truth), SHAPE, hint_near(truth, **changes), solve_field)
    assert worst_error(found, truth) < 0.7
    assert found.pixel_shape == truth.pixel_shape
    assert found.sip is None
    assert not list(scratch.iterdir())


def test_solve_field_takes_index_files_from_an_odd_folder(solve_field, tmp_path):
    folder = tmp_path / ODD_NAME
    folder.mkdir()
    for file in Path("/usr/share/astrometry").glob("index-tycho2-0[78]*"):
        (folder / file.name).symlink_to(file)
    options = astrometry_options(Settings(astrometry_local_path=str(folder)))
    assert options.program == solve_field.program and options.indexes == folder
    truth = true_wcs(*FIELD)
    assert worst_error(solve_astrometry_net(*noisy_list(truth), SHAPE, hint_near(truth), options), truth) < 0.7


def test_solve_field_finds_nothing_at_a_wrong_place(solve_field):
    stars = noisy_list(true_wcs(*FIELD))
    with pytest.raises(SolveError, match="solve-field found no solution"):
        solve_astrometry_net(
            *stars, SHAPE, Hint(ra=300.0, dec=-40.0, radius=1.0, scale=SCALE, scale_error=0.02), solve_field
        )


def test_solve_field_says_why_it_cannot(solve_field, tmp_path):
    truth = true_wcs(*FIELD)
    config = tmp_path / "empty.cfg"
    config.write_text("autoindex\n")
    with pytest.raises(SolveError, match="has no index files"):
        solve_astrometry_net(*noisy_list(truth), SHAPE, hint_near(truth), replace(solve_field, config=config))
    with pytest.raises(SolveError, match="2 stars are too few"):
        solve_astrometry_net([1, 2], [1, 2], [1, 2], SHAPE, hint_near(truth), solve_field)


# ------------------------------------------------------------------------- programs that do what they want


def stand_in(folder: Path, script: str, name: str = "astap_cli") -> Path:
    """A program that is a shell script, in a folder with an awkward name."""
    (folder / ODD_NAME).mkdir(exist_ok=True)
    program = folder / ODD_NAME / name
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    return program


def gone(pid: int, patience: float = 5.0) -> bool:
    """Whether a process is dead (a zombie that init has not reaped yet counts as dead)."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


STARS = np.random.default_rng(0).uniform(1, 900, (3, 20))
FRAME = np.random.default_rng(0).normal(600, 20, (100, 120)).astype(np.float32)
HINT = Hint(ra=FIELD[0], dec=FIELD[1], radius=3.0, scale=SCALE, scale_error=0.05)
ANSWER = (
    "PLTSOLVD=T\\nCRPIX1= 3.05E+001\\nCRPIX2=25.5\\nCRVAL1=100\\nCRVAL2=20\\n"
    "CD1_1=1E-3\\nCD1_2=0\\nCD2_1=0\\nCD2_2=1E-3\\n"
)


@posix
@pytest.mark.parametrize("leaves", ["", "exit 0"])
def test_slow_program_is_killed_with_its_children(tmp_path, scratch, leaves):
    pids = tmp_path / "pids"
    # A child in the group, one that has left it, and (second case) a program that ends before its child.
    note = f'>> "{pids}"'
    script = f"sleep 60 & echo $! {note}\n{leaves}\nsetsid sleep 60 & echo $! {note}\necho $$ {note}\nsleep 60"
    options = AstapOptions(stand_in(tmp_path, script), timeout=0.5)
    start = time.monotonic()
    with pytest.raises(SolveError, match="without an answer" if leaves else r"astap_cli had not ended after 0\.5 s"):
        solve_astap(FRAME, HINT, options)
    assert time.monotonic() - start < 5
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == (1 if leaves else 3)
    assert all(gone(pid) for pid in started)
    assert not list(scratch.iterdir())


@posix
def test_slow_solve_field_is_killed_too(tmp_path, scratch):
    program = stand_in(tmp_path, f'echo $$ > "{tmp_path}/pid"; exec sleep 60', "solve-field")
    with pytest.raises(SolveError, match=r"solve-field had not ended after 0\.3 s"):
        solve_astrometry_net(*STARS, SHAPE, HINT, AstrometryOptions(program, timeout=0.3))
    assert gone(int((tmp_path / "pid").read_text()))
    assert not list(scratch.iterdir())


@posix
def test_request_to_stop_kills_the_program_and_goes_on_upwards(tmp_path):
    program = stand_in(tmp_path, f'echo $$ > "{tmp_path}/pid"; sleep 60')

    def check_stop() -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        solve_astap(FRAME, HINT, AstapOptions(program, timeout=30, check_stop=check_stop))
    assert gone(int((tmp_path / "pid").read_text()))


@posix
def test_astaps_answer_is_read_and_scaled_to_the_frame(tmp_path):
    program = stand_in(tmp_path, f'printf "{ANSWER}" > solution.ini')
    found = solve_astap(FRAME, HINT, AstapOptions(program))
    assert found.pixel_shape == (120, 100)
    np.testing.assert_allclose(found.all_pix2world([[59.5, 49.5]], 0), [[100, 20]], atol=1e-9)
    np.testing.assert_allclose(found.wcs.cd, [[5e-4, 0], [0, 5e-4]])


@posix
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("exit 1", "ASTAP found no solution"),
        ("exit 2", "ASTAP found too few stars"),
        ("exit 32", "astap_data_directory_path"),
        ("printf 'PLTSOLVD=F\\nERROR=No star database found.\\n' > solution.ini; exit 1", "astap_data_directory_path"),
        ("exit 0", "without an answer"),
        ("echo 'cannot open display' >&2; exit 99", r"exit status 99 \(cannot open display\)"),
        ("kill -SEGV $$", "exit status -11"),
        ("head -c 3000000 /dev/urandom > solution.ini", "ASTAP"),
        ("head -c 3000000 /dev/urandom; exit 7", "exit status 7"),
        ("echo PLTSOLVD=T > solution.ini", "no usable CRPIX1"),
        (f'printf "{ANSWER}" | sed s/CD2_2.*/CD2_2=NaN/ > solution.ini', "no usable CD2_2"),
        (f'printf "{ANSWER}" | sed s/CD2_2.*/CD2_2=0/ > solution.ini', "the solution of ASTAP has a WCS"),
        (f'printf "{ANSWER}" | sed s/CRVAL2.*/CRVAL2=200/ > solution.ini', "the solution of ASTAP has a WCS"),
        ("mkdir solution.ini", "the temporary folder cannot be used"),
    ],
)
def test_whatever_astap_does_is_one_sentence(tmp_path, scratch, script, words):
    with pytest.raises(SolveError, match=words) as caught:
        solve_astap(FRAME, HINT, AstapOptions(stand_in(tmp_path, script)))
    message = str(caught.value)
    assert message.isprintable() and len(message) < 300
    assert not list(scratch.iterdir())


@posix
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("exit 0", "solve-field found no solution"),
        ("echo 'error while loading shared libraries: libgsl'; exit 127", r"exit status 127 \(error while loading"),
        ("head -c 3000000 /dev/urandom > solution.wcs", "the solution of solve-field has no usable CRPIX1"),
        ("touch solution.wcs", "solve-field found no solution"),
    ],
)
def test_whatever_solve_field_does_is_one_sentence(tmp_path, scratch, script, words):
    with pytest.raises(SolveError, match=words) as caught:
        solve_astrometry_net(*STARS, SHAPE, HINT, AstrometryOptions(stand_in(tmp_path, script, "solve-field")))
    assert str(caught.value).isprintable()
    assert not list(scratch.iterdir())


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_bytes(b"\x7fELF junk")]
)
def test_program_that_cannot_be_started(tmp_path, make):
    program = tmp_path / "astap_cli"
    make(program)
    if program.is_file():
        program.chmod(0o755)
    with pytest.raises(SolveError, match="astap_cli cannot be started"):
        run_program([str(program)], tmp_path, 5.0)


@posix
@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_instances_than_allowed(tmp_path, limit):
    program = stand_in(tmp_path, f'date +%s.%N >> "{tmp_path}/$$"; sleep 0.15; date +%s.%N >> "{tmp_path}/$$"; exit 1')
    options = AstapOptions(program, instances=limit)

    def attempt(_: int) -> None:
        with pytest.raises(SolveError):
            solve_astap(FRAME, HINT, options)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(attempt, range(6)))
    spans = np.array([[float(line) for line in file.read_text().split()] for file in tmp_path.glob("[0-9]*")])
    together = max(int(((spans[:, 0] <= moment) & (spans[:, 1] > moment)).sum()) for moment in spans[:, 0])
    assert len(spans) == 6
    assert together <= limit
    assert limit == 1 or together > 1


def test_waiting_for_an_instance_can_be_stopped():
    program, stop = Path("/nowhere/astap_cli"), threading.Event()

    def check_stop() -> None:
        if stop.is_set():
            raise Cancelled("stop")

    def wait() -> None:
        with external.instance(program, 1, check_stop):
            raise AssertionError("there was no free instance")

    with external.instance(program, 1), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait)
        stop.set()
        with pytest.raises(Cancelled):
            waiting.result(timeout=5)


def test_temporary_folder_that_is_not_there(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere/at/all")
    with pytest.raises(SolveError, match="temporary folder cannot be used"):
        solve_astap(FRAME, HINT, AstapOptions(Path("/nowhere/astap_cli")))


# ------------------------------------------------------------------------------------------ finding and order


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without solvers; the folder returned is the only one in PATH."""
    folder = tmp_path / "path"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(external, "_ASTAP_PLACES_UNIX", ())
    monkeypatch.setattr(external, "_SOLVE_FIELD_PLACES_UNIX", ())
    monkeypatch.setattr(external, "_ASTAP_PLACES", {})
    monkeypatch.setattr(external, "_SOLVE_FIELD_PLACES", {})
    return folder


@posix
def test_programs_are_found_as_set_or_in_path_or_in_the_usual_places(bare_machine, tmp_path, monkeypatch):
    assert find_astap() is None and find_solve_field() is None
    program = stand_in(tmp_path, "exit 0")
    folder = program.parent
    assert find_astap(str(program)) == find_astap(folder) == program
    monkeypatch.chdir(tmp_path)
    assert find_astap(os.path.join(ODD_NAME, "astap_cli")) == program  # its own folder is not where it will run
    bundle = tmp_path / "ASTAP.app" / "Contents" / "MacOS"
    bundle.mkdir(parents=True)
    shutil.copy(program, bundle / "astap")
    assert find_astap(tmp_path / "ASTAP.app") == bundle / "astap"
    assert find_astap(tmp_path / "missing") is None
    assert find_astap(tmp_path / "path") is None
    program.chmod(0o644)
    assert find_astap(program) is None
    program.chmod(0o755)
    monkeypatch.setattr(external, "_ASTAP_PLACES_UNIX", ("/nowhere", str(folder)))
    assert find_astap() == program
    shutil.copy(program, bare_machine / "astap_cli")
    assert find_astap() == bare_machine / "astap_cli"
    assert find_astap(tmp_path / "missing") is None  # whoever set it meant that one


@posix
def test_solve_field_is_searched_when_only_its_data_are_named(bare_machine, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    assert find_solve_field(data) is None
    (data / "index-tycho2-08.fits").touch()
    program = stand_in(tmp_path, "exit 0", "solve-field")
    shutil.copy(program, bare_machine / "solve-field")
    assert find_solve_field(data) == find_solve_field("my.cfg") == bare_machine / "solve-field"
    assert find_solve_field(program.parent) == program
    assert astrometry_options(Settings(astrometry_local_path=str(data))).indexes == data
    assert astrometry_options(Settings(astrometry_local_path="my.cfg")).config == Path("my.cfg").absolute()


@posix
def test_star_database_is_found_beside_the_program_or_as_set(bare_machine, tmp_path):
    program = stand_in(tmp_path, "exit 0")
    (program.parent / "d50_0101.1476").touch()
    assert find_database("", program) == program.parent
    shutil.copy(program, bare_machine / "astap_cli")
    link = bare_machine / "astap"
    link.symlink_to(program)
    assert find_database("", link) == program.parent
    options = astap_options(
        Settings(astap_data_directory_path=str(tmp_path), solver_timeout_s=7, astap_max_instances=3)
    )
    assert (options.program, options.database) == (bare_machine / "astap_cli", tmp_path)
    assert (options.timeout, options.instances) == (7, 3)


@posix
def test_order_of_the_solvers(bare_machine):
    def order(method: str, fallback: bool = True) -> tuple[str, ...]:
        return solver_order(Settings(solver_method=method, solver_fallback=fallback))

    for method in ("auto", "embedded", "astap", "astrometry"):
        assert order(method) == ("embedded",)
    for method in ("astap", "astrometry"):
        with pytest.raises(SolveError, match="was not found: install"):
            order(method, fallback=False)
        with pytest.raises(SolveError, match="was not found: install"):
            (astap_options if method == "astap" else astrometry_options)(Settings())
    for name in ("astap", "solve-field"):
        (bare_machine / name).write_text("#!/bin/sh\n")
        (bare_machine / name).chmod(0o755)
    assert order("auto") == order("embedded") == ("embedded", "astap", "astrometry")
    assert order("astap") == ("astap", "embedded", "astrometry")
    assert order("astrometry") == ("astrometry", "embedded", "astap")
    assert order("astrometry", fallback=False) == ("astrometry",)
    assert order("auto", fallback=False) == ("embedded",)
    assert order("none") == ()


def test_solver_settings_of_existing_configurations():
    settings, warnings = settings_from({"solver_method": "ansvr", "astap_max_instances": 2, "astrometry_api_key": ""})
    assert (settings.solver_method, settings.astap_max_instances) == ("astrometry", 2)
    assert any("ansvr" in warning for warning in warnings)
    assert settings_from({"solver_method": "astap"})[1] == []


# -------------------------------------------------------------------------------------------------- the WCS


@pytest.mark.parametrize("binning", [1, 2, 3])
@pytest.mark.parametrize("parity", [1, -1])
@pytest.mark.parametrize("field", [FIELD, (0.0, 90.0), (359.99, -89.5)])
def test_binned_solution_is_that_of_the_frame(binning, parity, field):
    truth = true_wcs(*field, parity=parity, shape=(401, 300))
    cards = {"CTYPE1": "RA---TAN-SIP", "A_ORDER": 2, "A_2_0": 1e-3}
    # Pixel X (from 1) of the binned image is centred on frame pixel (X - 1) * binning + (binning + 1) / 2.
    for axis in (1, 2):
        cards[f"CRPIX{axis}"] = (truth.wcs.crpix[axis - 1] - (binning + 1) / 2) / binning + 1
        cards[f"CRVAL{axis}"] = truth.wcs.crval[axis - 1]
        for j in (1, 2):
            cards[f"CD{axis}_{j}"] = truth.wcs.cd[axis - 1, j - 1] * binning
    found = linear_wcs(cards, (401, 300), "ASTAP", binning)
    assert worst_error(found, truth) < 1e-6
    assert np.sign(np.linalg.det(found.wcs.cd)) == parity
    assert (found.sip, found.wcs.radesys, found.pixel_shape) == (None, "ICRS", (300, 401))
