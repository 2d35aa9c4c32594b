"""Files that are broken, absurd or made to hurt, among good subs: each is named, none is let in, nothing gives way."""

from __future__ import annotations

import ast
import gzip
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from astropy.table import Table
from fuzz.reader import BLOCK, CARD, WCS, cards, check, hdu, mutate, plain_sub, seeds

from zemosaic.canvas import find_strays
from zemosaic.demo import make_field
from zemosaic.events import Event, Events
from zemosaic.frames import FrameError, find_files, read_frame, read_pixels
from zemosaic.headers import printable
from zemosaic.intake import scan

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SECONDS = 10  # for one file
GB = 1 << 30
MEMORY = GB  # for a run, libraries included
IMAGE = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": 260, "NAXIS2": 200}


# --- making hostile files -------------------------------------------------------------------------------


def packed(*parts: bytes, zeros: int = 0) -> bytes:
    """A gzip stream of these parts, and of any number of zeros after the first of them."""
    press = zlib.compressobj(6, wbits=31)
    stream = [press.compress(parts[0])]
    stream += [press.compress(bytes(1 << 20)) for _ in range(zeros >> 20)]
    return b"".join([*stream, *(press.compress(part) for part in parts[1:]), press.flush()])


def with_cards(sub: bytes, **values: object) -> bytes:
    """A sub whose header has these cards, in the place of those of the same name or before the others."""
    lines = [sub[i : i + CARD] for i in range(0, len(sub), CARD)]
    end = next(i for i, line in enumerate(lines) if line.rstrip() == b"END")
    fresh = {line[:8]: line for line in (cards(**{key: value}) for key, value in values.items())}
    kept = [fresh.pop(line[:8], line) for line in lines[:end]]
    data = sub[-(-(end + 1) * CARD // BLOCK) * BLOCK :]
    return hdu(b"".join([*kept[:6], *fresh.values(), *kept[6:]]), data)


def tiny_tiles() -> bytes:
    """400,000 tiles of one pixel each."""
    count = 400_000
    table = {"XTENSION": "'BINTABLE'", "BITPIX": 8, "NAXIS": 2, "NAXIS1": 8, "NAXIS2": count, "PCOUNT": 4, "GCOUNT": 1}
    column = {"TFIELDS": 1, "TTYPE1": "'COMPRESSED_DATA'", "TFORM1": "'1PB(4)'", "ZIMAGE": "T", "ZBITPIX": 16}
    image = {"ZNAXIS": 2, "ZNAXIS1": 800, "ZNAXIS2": 500, "ZTILE1": 1, "ZTILE2": 1, "ZCMPTYPE": "'RICE_1'"}
    rows = np.tile(np.array([4, 0], ">i4"), count).tobytes()
    return hdu(cards(SIMPLE="T", BITPIX=8, NAXIS=0)) + hdu(cards(**table, **column, **image), rows + b"\0\1\0\0")


def broken_files() -> dict[str, tuple[bytes, str]]:
    """What is no frame at all: name, bytes, and what is said of it."""
    many = [hdu(cards(XTENSION="'IMAGE'", BITPIX=8, NAXIS=0))] * 600
    first = hdu(cards(SIMPLE="T", BITPIX=8, NAXIS=0))
    table = cards(SIMPLE="T", BITPIX=8, NAXIS=1, NAXIS1=40 * GB)
    return {
        "empty.fit": (b"", "is empty"),
        "text.fit": (b"It was a dark and stormy night.\n" * 99, "not a FITS file"),
        "picture.fit": (b"\x89PNG\r\n\x1a\n" + bytes(9999), "not a FITS file"),
        "twice.fit.gz": (gzip.compress(gzip.compress(plain_sub())), "not a FITS file"),
        "cut.fit.gz": (gzip.compress(plain_sub())[:900], "end-of-stream"),
        "torn.fit.gz": (gzip.compress(plain_sub())[:-4] + b"\0\0\0\0", "cannot be read"),
        "endless.fit": (b"".join([cards(SIMPLE="T")] * 30_000), "header without an end"),
        "chain.fit": (b"".join([first, *many]), "no 2-D or 3-D image"),
        "naxis.fit": (hdu(cards(SIMPLE="T", BITPIX=16, NAXIS=10**9)), "no valid NAXIS1"),
        "endless-axis.fit": (hdu(cards(**IMAGE | {"NAXIS1": 10**40})), "truncated"),
        "minus.fit": (hdu(cards(**IMAGE | {"NAXIS2": -200})), "impossible axes"),
        "bits.fit": (hdu(cards(**IMAGE | {"BITPIX": 17}), bytes(104_000)), "unknown type"),
        "table-bomb.fit.gz": (packed(hdu(table), plain_sub(), zeros=1 << 24), "no 2-D or 3-D image"),
        "image-bomb.fit.gz": (
            packed(hdu(cards(**IMAGE | {"NAXIS1": 10**6, "NAXIS2": 10**4})), zeros=1 << 24),
            "truncated",
        ),
        "tile-bomb.fit.gz": (packed(tiny_tiles()), "400000 tiles"),
    }


def broken_wcs(good: bytes) -> dict[str, tuple[bytes, str]]:
    """A good sub with a WCS that cannot be: name, bytes, and what is said of it."""
    sip = {"CTYPE1": "'RA---TAN-SIP'", "CTYPE2": "'DEC--TAN-SIP'", "A_ORDER": 2, "B_ORDER": 2}
    pc = {key: "" for key in WCS if key[:2] == "CD"}
    tpv = {"CTYPE1": "'RA---TPV'", "CTYPE2": "'DEC--TPV'", "PV1_1": 1.0, "PV2_1": 1.0}
    changes: dict[str, tuple[dict[str, object], str]] = {
        "nan.fit": ({"CRVAL1": "NaN"}, "CRVAL1 is not a number"),
        "inf.fit": ({"CD1_1": "inf"}, "CD1_1 is not a number"),
        "overflow.fit": ({"CD1_1": "1e999"}, "CD1_1 is not a number"),
        "words.fit": ({"CRPIX1": "'left'"}, "CRPIX1 is not a number"),
        "flat.fit": ({"CD1_1": 0.0, "CD1_2": 0.0}, "without a finite scale"),
        "point.fit": ({key: 0.0 for key in WCS if key[:2] == "CD"}, "without a finite scale"),
        "no-scale.fit": ({**pc, "CDELT1": 0.0, "CDELT2": 0.0}, "without a finite scale"),
        "half-scale.fit": ({"CD2_1": 0.0, "CD2_2": 1e-300}, "wcslib refuses|stretches|one-to-one|camera"),
        "vast.fit": ({"CD1_1": 1e300, "CD2_2": 1e300}, "undefined|one-to-one|wcslib|camera"),
        "beyond.fit": ({"CRPIX1": 1e300}, "undefined|one-to-one"),
        "pole.fit": ({"CRVAL2": 91.0}, "wcslib refuses|undefined|deg away"),
        "folded.fit": ({**sip, "A_2_0": 0.5}, "one-to-one"),
        "bent.fit": ({**sip, "A_2_0": 0.012, "B_0_2": 0.012}, "bent|one-to-one"),
        "steep.fit": ({**sip, "A_2_0": 1e300}, "undefined|one-to-one"),
        "order.fit": ({**sip, "A_ORDER": 10**9}, "SIP distortion with A_ORDER"),
        "tpv.fit": ({**tpv, "PV1_5": 1e30}, "undefined|one-to-one"),
        "table.fit": ({"CTYPE1": "'RA---TAB'", "CTYPE2": "'DEC--TAB'"}, "look-up table"),
        "unknown.fit": ({"CTYPE1": "'RA---XYZ'", "CTYPE2": "'DEC--XYZ'"}, "wcslib refuses"),
        "lonely.fit": ({"CTYPE2": "'LINEAR'"}, "no celestial WCS"),
    }
    return {name: (with_cards(good, **values), words) for name, (values, words) in changes.items()}


def odd_names() -> list[bytes]:
    """Names that a shell, a terminal or a table stumbles over."""
    plain = [
        "with space.fit",
        "-o.fit",
        "--help.fit",
        "é星.fit",
        "new\nline.fit",
        "red\x1b[31m.fit",
        "a" * 250 + ".fit",
    ]
    return [os.fsencode(name) for name in plain] + [b"$(touch owned)`x`'\".fit", b"no utf-8 \xff\xfe.fit"]


def corpus_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The conformance files as they are, the collected headers in front of random pixels."""
    for path in sorted(folder.glob("fits-conformance/*/*")):
        yield f"{path.parent.name}-{path.name}", path.read_bytes()
    for path in sorted(folder.glob("headers/*/*")):
        text = path.read_bytes()
        lines = text.splitlines() if text.count(b"\n") > 5 else [text[i : i + CARD] for i in range(0, len(text), CARD)]
        first = (b"SIMPLE", b"BITPIX", b"EXTEND", b"NAXIS", b"END ", b"BSCALE", b"BZERO")
        rest = b"".join(line.ljust(CARD)[:CARD] for line in lines if not line.startswith(first))
        noise = np.random.default_rng(1).normal(900, 30, 52_000).astype(">i2").tobytes()
        yield f"{path.parent.name}-{path.stem}.fit", hdu(cards(**IMAGE) + rest, noise)


def as_sub(name: str) -> str:
    """A name that a scan looks at."""
    return name if re.search(r"\.(fits?|fts|fz)(\.gz)?$", name) else f"{name}.fit"


# --- one file at a time ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    options = {"shape": (200, 260), "star_density": 9000, "nebula": 0, "sky": 300, "trails": 0, "panels": (1, 1)}
    return make_field(tmp_path_factory.mktemp("good"), frames=9, **options).paths


def verdict(path: Path) -> str:
    """What is said of a file as a sub, or an empty string; in the time that is allowed."""
    start = time.perf_counter()
    try:
        frame = read_frame(path)
        read_pixels(frame)
        return frame.wcs_problem or find_strays([frame])[0]
    except FrameError as refusal:
        return str(refusal)
    finally:
        assert time.perf_counter() - start < SECONDS


BROKEN = broken_files()
BROKEN_WCS = broken_wcs(plain_sub())


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_in_time(tmp_path, name):
    data, words = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    said = verdict(tmp_path / name)
    assert re.search(words, said), said


@pytest.mark.parametrize("name", BROKEN_WCS)
def test_a_wcs_that_cannot_be_is_named(tmp_path, name):
    data, words = BROKEN_WCS[name]
    (tmp_path / name).write_bytes(data)
    said = verdict(tmp_path / name)
    assert re.search(words, said), said
    assert read_pixels(read_frame(tmp_path / name)).shape == (36, 40), "the pixels are as good as ever"


def test_a_sub_with_cards_exchanged_is_still_a_sub(tmp_path):
    """The means of the test above do no harm themselves."""
    (tmp_path / "a.fit").write_bytes(with_cards(plain_sub(), CRVAL1=83.8, FILTER="'L'"))
    assert verdict(tmp_path / "a.fit") == ""
    assert read_frame(tmp_path / "a.fit").filter == "L"


@pytest.mark.parametrize("declared", [(1 << 25, 2), (4000, 4000)])
def test_what_is_unpacked_for_one_file_is_limited(tmp_path, monkeypatch, declared):
    """A gzipped file that keeps its word: the limit, 1 GiB, is lowered for the test."""
    monkeypatch.setattr("zemosaic.frames._MAX_UNPACKED", 1 << 24)
    (tmp_path / "a.fit.gz").write_bytes(
        packed(hdu(cards(**IMAGE | {"NAXIS1": declared[0], "NAXIS2": declared[1]})), zeros=1 << 26)
    )
    assert "too many for a gzipped file; unpack it first" in verdict(tmp_path / "a.fit.gz")


@pytest.mark.parametrize("seed", range(8))
def test_mutated_files_are_read_or_refused(tmp_path, seed):
    """The fuzzer's own check on some of its inputs; see tests/fuzz/reader.py for the long run."""
    rng = random.Random(seed)
    pool = seeds()
    for _ in range(60):
        data = rng.choice(pool)
        for _ in range(rng.choice([1, 1, 2, 5])):
            data = mutate(data, rng)
        start = time.perf_counter()
        check(data, tmp_path)
        assert time.perf_counter() - start < SECONDS


# --- all together, as a run of the program ---------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    """A run of the program over hostile files that has come to its end."""

    out: Path
    status: int
    stderr: str
    trace: str
    touched: list[str]

    @property
    def fates(self) -> dict[str, tuple[str, str]]:
        """What the product says became of every file: status and reason."""
        (product,) = self.out.glob("*.fits")
        return {row["FILE"]: (row["STATUS"], row["REASON"]) for row in Table.read(product, "FRAMES")}


@pytest.fixture(scope="module")
def attack(subs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Attack:
    """`zemosaic run` over nine good subs under odd names and all the files above, in 1 GB of memory.

    Every call to the system that names a file is traced if strace is installed.
    """
    base = tmp_path_factory.mktemp("attack")
    folders = [base / name for name in ("subs\n-o", "home", "scratch")]
    for folder in folders:
        folder.mkdir()
    fill(folders[0], subs)
    before = [snapshot(folder) for folder in folders]
    trace = base / "trace"
    strace = ["strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=%file", "-o", str(trace)]
    command = [sys.executable, "-m", "zemosaic", "run", str(folders[0]), "-o", str(base / "out"), "--sds"]
    made = subprocess.run(
        [*(strace if shutil.which("strace") else []), *command, "--memory", "1", "--set", "solver_method=none"],
        capture_output=True,
        cwd=base,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "HOME": str(folders[1]), "TMPDIR": str(folders[2])}
        | {"MPLCONFIGDIR": str(base / "matplotlib")},
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_DATA, (MEMORY, MEMORY)),
        timeout=120,
        check=False,
    )
    after = [snapshot(folder) for folder in folders]
    touched = [str(folder) for folder, old, new in zip(folders, before, after, strict=True) if old != new]
    told = made.stderr.decode("utf-8", "replace")
    return Attack(base / "out", made.returncode, told, trace.read_text() if trace.exists() else "", touched)


def fill(folder: Path, subs: list[Path]) -> None:
    """Good subs, hostile files, links that lead nowhere or round in circles, and things that are no files."""
    (folder / "below").mkdir()
    for name, path in zip(odd_names(), subs, strict=True):
        shutil.copy(path, os.path.join(os.fsencode(folder), name))
    good = subs[0].read_bytes()
    for name, (data, _) in (BROKEN | broken_wcs(good)).items():
        (folder / "below" / name).write_bytes(data)
    for name, data in corpus_files(SHARED):
        (folder / "below" / as_sub(name)).write_bytes(data)
    sparse = folder / "below" / "sparse.fit"
    sparse.write_bytes(with_cards(good, NAXIS1=40_000, NAXIS2=40_000))
    os.truncate(sparse, 3_300_000_000)
    (folder / "bad \x1b[31m\n.fit").write_text("no")
    (folder / "loop").symlink_to(folder)
    (folder / "self.fit").symlink_to("self.fit")
    (folder / "gone.fit").symlink_to("nowhere.fit")
    (folder / "endless.fit").symlink_to("/dev/zero")
    (folder / "folder.fit").mkdir()
    os.mkfifo(folder / "pipe.fit")


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything in a folder."""
    found = [folder, *folder.rglob("*")]
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in found}


def test_a_run_among_hostile_files_ends_well(attack):
    assert attack.status == 0, attack.stderr
    assert "Traceback" not in attack.stderr


def test_the_good_subs_are_used_and_no_other(attack):
    used = {name for name, (status, _) in attack.fates.items() if status != "rejected"}
    assert used == {printable(os.fsdecode(name)).encode("ascii", "backslashreplace").decode() for name in odd_names()}


def test_every_hostile_file_is_in_the_books_with_its_reason(attack):
    assert len(attack.fates) == 9 + len(BROKEN) + len(BROKEN_WCS) + len(list(corpus_files(SHARED))) + 1 + 5
    for name, (_, words) in BROKEN.items():
        status, reason = attack.fates[f"below/{name}"]
        assert status == "rejected" and re.search(f"{words}|no celestial WCS", reason), (name, reason)
    for name, (status, reason) in attack.fates.items():
        assert status != "rejected" or re.fullmatch(r"[ -~]{10,}", reason), (name, reason)
    assert "takes 35.8 GB of memory" in attack.fates["below/sparse.fit"][1]


def test_names_cannot_command_a_terminal_or_break_the_lines_of_a_log(attack):
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", attack.stderr)
    assert any(line.startswith("Left out bad ") and "not a FITS file" in line for line in attack.stderr.splitlines())


def test_nothing_is_written_outside_the_output_folder(attack):
    """Not the frames, nor anything in the folders of the user; and by the trace, nothing elsewhere either."""
    assert attack.touched == []
    # Python and numba keep what they compiled beside the program.
    allowed = rf"{re.escape(str(attack.out))}|/dev/(null|tty)|/proc/self/|.*(__pycache__|\.nb[ic])"
    paths = [path for path in written(attack.trace) if "/matplotlib" not in path]  # its list of fonts
    assert not [path for path in paths if not re.match(allowed, path)]
    assert not attack.trace or any(path.startswith(str(attack.out)) for path in paths), (
        "the trace shows what is written"
    )


def written(trace: str) -> list[str]:
    """Paths that a traced program made, changed or removed."""
    changing = r"(?:open.*(?:O_WRONLY|O_RDWR|O_CREAT)|(?:mkdir|rename|unlink|rmdir|link|symlink|truncate|chmod|mknod))"
    lines = [line for line in trace.splitlines() if re.search(rf"^\d+ +{changing}", line) and "= -1" not in line]
    return [path for line in lines for path in re.findall(r'"([^"]+)"', line)]


# --- many files, and the program itself -----------------------------------------------------------------


def test_twenty_thousand_files_are_found_and_read_in_seconds(tmp_path):
    """Hard links to one sub; of all the names, and of the headers of a part."""
    (tmp_path / "0.fit").write_bytes(plain_sub())
    for i in range(1, 20_000):
        os.link(tmp_path / "0.fit", tmp_path / f"{i}.fit")
    start = time.perf_counter()
    files = find_files([tmp_path])
    assert len(files) == 20_000
    assert time.perf_counter() - start < 10
    said: list[Event] = []
    start = time.perf_counter()
    intake = scan(files[:500], 1, Events(said.append))
    assert len(intake.frames) == 500
    assert time.perf_counter() - start < 5
    assert len(said) < 200, "a long scan does not flood whoever listens"


def test_thousands_of_frames_of_one_field_do_not_take_memory_by_the_square(tmp_path):
    (tmp_path / "0.fit").write_bytes(plain_sub())
    frame = read_frame(tmp_path / "0.fit")
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not any(find_strays([frame] * 4000))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - usage < 100_000  # KB; all pairs are 900 MB


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, object]]]:
    """Every call by its dotted name, with the keywords that are constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {k.arg: k.value.value for k in node.keywords if k.arg and isinstance(k.value, ast.Constant)}
            yield ast.unparse(node.func), keywords


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.py"), *ROOT.glob("zemosaic/**/*.py")]), ids=lambda p: p.name)
def test_no_shell_no_code_and_no_pickle_from_outside(path):
    forbidden = {"eval", "exec", "os.system", "os.popen", "pickle.load", "shelve.open", "joblib.load", "marshal.loads"}
    for name, keywords in calls(ast.parse(path.read_text(encoding="utf-8"))):
        assert name not in forbidden, name
        assert not keywords.get("shell") and not keywords.get("allow_pickle"), name
