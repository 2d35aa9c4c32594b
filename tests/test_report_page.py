"""The report of a run: one page that needs nothing else, whatever the frames are called, and its numbers as JSON."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import shutil
import string
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from report_field import Fault, invent

import zemosaic.report.mosaic as mosaic_module
import zemosaic.report.page as page_module
import zemosaic_worker
from zemosaic.demo import make_field
from zemosaic.events import Event, Events
from zemosaic.ledger import FrameRecord, Ledger, TileRecord
from zemosaic.product import ProductFacts
from zemosaic.report.chronicle import Chronicle, Phase
from zemosaic.report.evidence import Evidence
from zemosaic.report.page import PICTURE_BYTES, page, report_paths, write_report
from zemosaic.report.story import UNITS, Story, headline, report_json, sky_place
from zemosaic.report.verdict import Verdict, judge
from zemosaic.report.words import texts
from zemosaic.settings import Settings
from zemosaic.tiles import Window

HOSTILE = (
    "<script>document.title='taken'</script>.fit",
    "</script><img src=x onerror=alert(1)>.fit",
    "a\"b'c&amp;d\\e.fit",
    "two\nlines\u2028three.fit",
    "$x_1$ \x1b[31m \udcff {{ 7*7 }}.fit",
)
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


class Parsed(HTMLParser):
    """Tags with their attributes, texts by tag, and the title."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.titles: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "title"):
            (self.scripts if self._inside == "script" else self.titles).append(data)
            self._inside = ""


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return invent(Fault(gain=1.02))


@pytest.fixture(scope="module")
def verdict(evidence: Evidence) -> Verdict:
    return judge(evidence)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.full((280, 380, 3), 40, np.uint8)


def ledger_of(count: int, names: tuple[str, ...] = ()) -> Ledger:
    """Frames of three nights: every tenth rejected, every tenth used in part."""
    rng = np.random.default_rng(1)
    ledger = Ledger()
    for i in range(count):
        status = {0: "rejected", 5: "partial"}.get(i % 10, "used")
        ledger.add(
            FrameRecord(
                names[i] if i < len(names) else f"night_{i % 3}/Light_{i:05d}.fit",
                status,
                "" if status == "used" else "its stars are trailed (axis ratio 0.5)",
                lot=-1 if status == "rejected" else i % 40,
                exposure=10.0,
                date_obs=f"2026-01-{10 + i % 3:02d}T{20 + i // 1000 % 4:02d}:{i // 17 % 60:02d}:{i % 60:02d}.123",
                gain=tuple(rng.normal(1, 0.05, 3)),
                level=tuple(rng.normal(100, 20, 3)),
                weight=float(rng.uniform(0.5, 1.5)),
                fwhm=float(rng.normal(3, 0.2)) if i != 7 else np.nan,
                sky=float(rng.normal(600, 40)),
                rejected_share=0.003,
                stars=200 + i % 50,
                ellipticity=0.05,
                trailing=0.01,
                snr=100.0,
                transparency=0.97,
            )
        )
    return ledger


def story_of(evidence: Evidence, ledger: Ledger, language: str = "en", **changes: object) -> Story:
    """A story with every part, of a run with a warning in hostile words."""
    assert evidence.wcs is not None
    return Story(
        **{
            "name": "M_42_sds",
            "shape": evidence.shape,
            "facts": ProductFacts("sds", "<b>M 42</b>", history=("Coverage cut: 3 < 4 & 5",)),
            "ledger": ledger,
            "tiles": [TileRecord(i, Window(0, 300, 0, 400), 8, 600.0, 1.001, 2.5) for i in range(4)],
            "settings": Settings(language=language, output_name="<i>x</i>"),
            "phases": [Phase("scan", 0.0, 1.0, 0.5), Phase("save", 1.0, 3.0, 2.0)],
            "warnings": [Event("warning", "run_warn_settings", f"left out {HOSTILE[0]}")],
            "sky": sky_place(evidence.wcs, evidence.shape),
            **changes,
        }
    )


@pytest.fixture(scope="module")
def hostile(evidence: Evidence, verdict: Verdict, picture: np.ndarray) -> str:
    return page(story_of(evidence, ledger_of(12, HOSTILE)), verdict, picture)


# --- what is in it ------------------------------------------------------------------------------------------


def test_nothing_that_a_file_is_called_becomes_markup(hostile: str):
    parsed = Parsed(hostile)
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("script") == 2
    assert parsed.titles == ["<b>M 42</b>: report"]
    assert not [tag for tag, attributes in parsed.tags if any(name.startswith("on") for name in attributes)]
    assert all((a.get("src") or "").startswith("data:image/") for tag, a in parsed.tags if tag == "img")
    rows = json.loads(parsed.scripts[0])["rows"]
    assert {row[0] for row in rows} >= set(HOSTILE)


def test_the_page_needs_nothing_else(hostile: str):
    parsed = Parsed(hostile)
    targets = [a[name] or "" for _, a in parsed.tags for name in ("src", "href", "xlink:href", "action") if name in a]
    assert targets and all(target.startswith(("#", "data:image/")) for target in targets)
    assert not {"link", "iframe", "object", "base", "form"} & {tag for tag, _ in parsed.tags}
    assert not re.search(r"url\((?!#)|@import|@font-face", hostile)
    policy = next(a["content"] or "" for tag, a in parsed.tags if tag == "meta" and "http-equiv" in a)
    wanted = base64.b64encode(hashlib.sha256(parsed.scripts[1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{wanted}'" in policy


def test_every_figure_stands_beside_its_threshold(hostile: str, verdict: Verdict):
    plain = html.unescape(re.sub(r"<svg.*?</svg>", "", hostile, flags=re.DOTALL))
    gain = verdict.figure("lot_gain")
    assert gain.grade == "FAIL"
    row = re.search(r"<span>Brightness of the lot that is off most.*?</li>", plain, re.DOTALL)
    assert row and f"{gain.value:.1f}" in row[0] and "good below 5, fault from 10" in row[0] and "chip FAIL" in row[0]
    scatter = verdict.figure("phot_scatter")
    assert re.search(rf"{scatter.value:.2f}\s±\s[0-9.]+\smmag", plain)  # by how much it varies by chance
    for figure in verdict.figures:
        assert page_module.render(f"verdict_{figure.key}", {}, "en") in plain
    for finding in verdict.findings:
        assert finding.text() in plain
    assert "Faults:" in plain and headline(verdict) in plain


def test_the_json_holds_what_the_verdict_and_the_books_hold(evidence: Evidence, verdict: Verdict):
    story = story_of(evidence, ledger_of(12, HOSTILE))
    data = json.loads(json.dumps(report_json(story, verdict), allow_nan=False))
    assert data["schema"] == "zemosaic.report/1"
    assert (data["grade"], data["product"]["object"]) == ("FAIL", "<b>M 42</b>")
    assert data["ledger"]["counts"] == {"used": 9, "partial": 1, "rejected": 2}
    assert sorted(row["file"] for row in data["ledger"]["frames"]) == sorted(r.file for r in story.ledger)
    assert data["verdict"]["figures"]["lot_gain"]["value"] == pytest.approx(verdict.figure("lot_gain").value, rel=1e-5)
    assert data["run"]["seconds"] == 4.0
    assert data["run"]["warnings"][0]["text"] == f"left out {HOSTILE[0]}"
    assert data["product"]["centre_ra_deg"] == pytest.approx(83.8, abs=0.01)
    assert data["product"]["scale_arcsec_px"] == pytest.approx(2.4, rel=1e-4)
    assert data["product"]["north_x_y"] == pytest.approx([0, 1], abs=1e-3)
    assert data["product"]["east_x_y"] == pytest.approx([-1, 0], abs=1e-3)


def test_every_number_of_the_json_has_a_unit(evidence: Evidence, verdict: Verdict):
    """By the end of its name, beside it, or in the table of units; counts and indices have none."""
    data = json.loads(json.dumps(report_json(story_of(evidence, ledger_of(12)), verdict)))
    counts = {"lot", "frames", "channel", "frame", "tile", "stars", "weight"}
    suffix = re.compile(r"_(px|adu|s|deg|seconds|arcsec_px|x_y|px2)$|^seconds$|^ellipticity$|^gain$")

    def lacking(where: str, value: object) -> list[str]:
        if isinstance(value, list):
            return [each for item in value[:3] for each in lacking(where, item)]
        if not isinstance(value, dict):
            return []
        units = UNITS.get(where, {})
        found = []
        for name, item in value.items():
            path = f"{where}.{name}".lstrip(".")
            if path in ("verdict.figures", "verdict.maps", "settings", "run.cards", "ledger.counts", "units"):
                continue
            if isinstance(item, float) and name not in units and name not in counts and not suffix.search(name):
                found.append(path)
            found += lacking(path, item) if name != "values" else []
        return found

    assert lacking("", data | {"ledger": data["ledger"]}) in ([], ["verdict.arcsec_per_px"])
    assert all("unit" in figure for figure in data["verdict"]["figures"].values())


def test_a_verdict_is_not_needed(evidence: Evidence, picture: np.ndarray):
    story = story_of(
        evidence, ledger_of(5), problem="a picture of 9 x 9 px is too small", sky=None, phases=(), tiles=()
    )
    text = page(story, None, picture)
    assert "No verdict: a picture of 9 x 9 px is too small." in text and "Not judged" in text
    assert report_json(story, None)["verdict"] is None


@pytest.mark.parametrize("channels", [1, 3])
def test_frames_are_not_needed(channels: int, picture: np.ndarray):
    alone = replace(invent(channels=channels), frames=None, stars=None, sky=None)
    assert "Noise of a pixel (ADU)" in page(story_of(alone, Ledger(), tiles=()), judge(alone), picture)


def test_one_frame_of_unknown_date_can_be_drawn(evidence: Evidence, picture: np.ndarray):
    ledger = Ledger([FrameRecord("a.fit", "used", date_obs="yesterday", fwhm=3.0), FrameRecord("b.fit", "used")])
    assert "frame, in order of time" in page(story_of(evidence, ledger), None, picture)


def test_a_picture_of_noise_stays_small(evidence: Evidence):
    noise = np.random.default_rng(0).integers(0, 255, (2900, 3200, 3), np.uint8)
    text = page(story_of(evidence, ledger_of(3)), None, noise)
    data = re.search(r'id="picture" src="data:image/jpeg;base64,([^"]+)"', text)
    assert data
    content = base64.b64decode(data[1])
    assert len(content) <= PICTURE_BYTES
    shown = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert shown.shape[1] / shown.shape[0] == pytest.approx(3200 / 2900, rel=0.01)


def test_a_step_is_seen_in_the_thumbnail_of_its_seam(evidence: Evidence, verdict: Verdict, picture: np.ndarray):
    """Half a noise to the right of x = 50, on a steep slope, at the edge of the mosaic."""
    rng = np.random.default_rng(2)
    y, x = np.mgrid[0:96, 0:60]
    part = (rng.normal(0, 10, x.shape) + 3 * x + 2 * y + 8 * (x >= 30)).astype(np.float32)
    seam = replace(
        verdict.measures.seams.worst[0], x=30.0, y=48.0, angle=90.0, window=Window(0, 96, 0, 60), thumbnail=part
    )
    seams = replace(verdict.measures.seams, worst=(seam,))
    text = page(
        story_of(evidence, ledger_of(3)),
        replace(verdict, measures=replace(verdict.measures, seams=seams)),
        picture,
    )
    data = re.search(r'class="thumb"><img src="data:image/png;base64,([^"]+)"', text)
    assert data
    grey = cv2.imdecode(np.frombuffer(base64.b64decode(data[1]), np.uint8), cv2.IMREAD_GRAYSCALE).astype(float)
    assert grey.shape == (96, 96) and (grey[:, :18] == 0).all()
    near_left, near_right = grey[:, 34:46].mean(), grey[:, 50:62].mean()
    assert near_right - near_left > 12


def test_both_languages_say_the_same_things():
    english, french = texts("en"), texts("fr")
    assert list(english) == list(french)
    fields = {
        key: [
            sorted(name for _, name, _, _ in string.Formatter().parse(each[key]) if name) for each in (english, french)
        ]
        for key in english
    }
    assert not [key for key, (a, b) in fields.items() if a != b]


def test_french_page_writes_french_numbers(evidence: Evidence, verdict: Verdict, picture: np.ndarray):
    text = page(story_of(evidence, ledger_of(12), "fr"), verdict, picture)
    assert '<html lang="fr">' in text and "bon en dessous de 0,15" in text and "Raccords" in text
    ticks = re.findall(r">−?\d+([.,])\d+</text>", text)
    assert ticks and set(ticks) == {","}


# --- how it is written --------------------------------------------------------------------------------------


def test_the_chronicle_remembers_phases_and_warnings_and_passes_everything_on(monkeypatch: pytest.MonkeyPatch):
    clock = iter([(0.0, 0.0), (1.0, 0.5), (3.0, 1.0), (7.0, 4.0)])
    monkeypatch.setattr(Chronicle, "_now", staticmethod(lambda: next(clock)))
    heard: list[Event] = []
    chronicle = Chronicle(heard.append)
    events = Events(chronicle)
    events.phase(1, "scan")
    events.warning("run_warn_settings", text="odd")
    events.info("run_info_scan_found", n=3)
    events.phase(9, "save")
    assert chronicle.phases() == [Phase("scan", 1.0, 2.0, 0.5), Phase("save", 3.0, 4.0, 3.0)]
    assert [event.text for event in chronicle.warnings] == ["odd"]
    assert [event.kind for event in heard] == ["phase", "warning", "info", "phase"]


def test_nothing_half_written_stays(evidence: Evidence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cv2.imwrite(str(tmp_path / "M.png"), np.zeros((20, 30, 4), np.uint8))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_report(story_of(evidence, ledger_of(3)), None, tmp_path / "M.fits", tmp_path / "M.png")
    assert [path.name for path in tmp_path.iterdir()] == ["M.png"]


@pytest.fixture(scope="module")
def subs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = {"panels": (1, 1), "shape": (120, 160), "star_density": 8000, "nebula": 30, "trails": 0, "sky": 300}
    return make_field(tmp_path_factory.mktemp("field") / "subs", frames=6, **small).paths[0].parent


def run(subs: Path, out: Path, route: str = "sds", **changes: object) -> tuple[SimpleNamespace, list[Event]]:
    told: list[Event] = []
    settings = Settings(
        **{"num_processing_workers": 1, "blur_filter": False, "resume": "off", "route": route, **changes}
    )
    result = zemosaic_worker.run_hierarchical_mosaic(subs, out, settings, progress_callback=told.append)
    return result, told


@pytest.mark.parametrize("route", ["sds", "mosaic-first", "master-tiles"])
def test_every_run_writes_its_report(subs: Path, tmp_path: Path, route: str):
    result, told = run(subs, tmp_path, route)
    paths = report_paths(result.product)
    data = json.loads(paths.json.read_text())
    assert data["run"]["route"] == route and data["product"]["name"] == result.product.stem
    assert [phase["name"] for phase in data["run"]["phases"]][-2:] == ["save", "report"]
    assert len(data["ledger"]["frames"]) == 6 and len(data["verdict"]["frames"]) == 6
    assert paths.html.read_text(encoding="utf-8").endswith("</html>\n") or paths.html.stat().st_size > 50_000
    assert not list(tmp_path.glob("*.part"))
    assert [e.key for e in told if e.kind == "info"][-3:-1] == ["report_verdict", "report_written"]


def test_a_report_that_fails_does_not_cost_the_product(subs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(mosaic_module, "report_mosaic", fail)
    result, told = run(subs, tmp_path)
    assert result.product.exists() and result.exit_status == 0
    assert [e.text for e in told if e.key == "run_warn_no_report"] == [
        "The report could not be made (a bug); the mosaic itself is whole."
    ]
    assert told[-1].kind == "done"


def test_a_stop_while_the_product_is_saved_does_without_a_report(subs: Path, tmp_path: Path):
    told: list[Event] = []
    result = zemosaic_worker.run_hierarchical_mosaic(
        subs,
        tmp_path,
        Settings(num_processing_workers=1, blur_filter=False, resume="off"),
        sds=True,
        progress_callback=told.append,
        stop_requested=lambda: any(event.key == "phase_save" for event in told),
    )
    assert result.product.exists() and not report_paths(result.product).html.exists()
    assert told[-1].kind == "done"


def test_a_report_that_is_not_wanted_is_not_made(subs: Path, tmp_path: Path):
    result, told = run(subs, tmp_path, report=False)
    assert not report_paths(result.product).html.exists() and not report_paths(result.product).json.exists()
    assert "phase_report" not in [e.key for e in told]


# --- in a browser -------------------------------------------------------------------------------------------

browser = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium on this machine")

# Run after the page's own script; what it finds is written into the document, which Chromium prints.
PROBE = """
const found = {};
const rows = () => [...document.querySelectorAll("#ledger-table tbody tr")];
const column = (i) => rows().map((row) => row.cells[i].textContent);
const heads = document.querySelectorAll("#ledger-table th");
const until = () => document.getElementById("ledger-page").textContent;
found.first = [rows().length, until()];
heads[10].click();
found.rising = column(10).slice(0, 100).map(Number);
heads[10].click();
found.falling = column(10).slice(0, 100).map(Number);
const status = document.getElementById("ledger-status"), filter = document.getElementById("ledger-filter");
status.value = "rejected"; status.onchange();
found.rejected = [until(), [...new Set(column(1))]];
status.value = "all"; filter.value = "light_01999"; filter.oninput();
found.filtered = column(0);
filter.value = "no such frame"; filter.oninput();
found.none = until();
filter.value = ""; filter.oninput();
document.getElementById("ledger-next").click();
found.second = until();
const viewer = document.getElementById("viewer");
found.zoom = [+viewer.dataset.zoom];
document.querySelector("[data-do=in]").click();
found.zoom.push(+viewer.dataset.zoom);
document.querySelector(".goto").click();
found.zoom.push(+viewer.dataset.zoom);
const box = viewer.getBoundingClientRect(), mark = document.getElementById("target").getBoundingClientRect();
found.marked = [(mark.x + mark.width / 2 - box.x) / box.width, (mark.y + mark.height / 2 - box.y) / box.height];
document.querySelector("[data-over=lots-over]").click();
found.lots = document.querySelectorAll("#lots-over:not([hidden]) polygon").length;
const times = performance.getEntriesByType("navigation")[0];
found.opened = times.domContentLoadedEventEnd;
found.dark = matchMedia("(prefers-color-scheme: dark)").matches;
found.page = getComputedStyle(document.body).backgroundColor;
const note = document.createElement("pre");
note.id = "found";
note.textContent = JSON.stringify(found);
document.body.append(note);
"""


def browse(file: Path, *options: str) -> str:
    """What Chromium makes of a page."""
    profile = f"--user-data-dir={file.parent / 'profile'}"
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", profile, "--dump-dom")
    done = subprocess.run(
        [CHROMIUM, *fixed, *options, file.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    faults = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not faults
    return done.stdout


def answer(dom: str) -> dict:
    text = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert text, dom[-2000:]
    return json.loads(html.unescape(text[1]))


@browser
def test_a_page_of_2000_frames_opens_at_once_and_can_be_searched(
    evidence: Evidence, verdict: Verdict, picture: np.ndarray, tmp_path: Path
):
    text = page(story_of(evidence, ledger_of(2000)), verdict, picture)
    assert len(text.encode()) + PICTURE_BYTES * 4 / 3 < 5e6
    file = tmp_path / "page.html"
    # The policy lets only the page's own script run.
    file.write_text(
        re.sub("<meta http-equiv[^>]*>", "", text).replace("</body>", f"<script>{PROBE}</script></body>"),
        encoding="utf-8",
    )
    found = answer(browse(file, "--window-size=1400,900"))
    assert found["first"] == [100, "1 to 100 of 2000"]
    assert found["rising"] == sorted(found["rising"]) and found["falling"] == sorted(found["falling"])[::-1]
    assert found["falling"][0] > found["rising"][-1]
    assert found["rejected"] == ["1 to 100 of 200", ["rejected"]]
    assert found["filtered"] == ["night_1/Light_01999.fit"]
    assert found["none"] == "No file is like that."
    assert found["second"] == "101 to 200 of 2000"
    whole, nearer, there = found["zoom"]
    assert whole <= 1 < nearer and there >= 2.4
    assert all(0 < place < 1 for place in found["marked"])
    assert found["lots"] == 4
    assert found["opened"] < 3000, "ms"
    assert not found["dark"] and found["page"] == "rgb(244, 245, 247)"


@browser
def test_the_page_as_it_is_works_in_the_dark_on_a_phone(hostile: str, tmp_path: Path):
    """In a frame of 390 px, with its policy in force: the table is filled, and nothing is wider than the screen."""
    phone = tmp_path / "phone.html"
    phone.write_text(
        f"""<!doctype html><meta charset="utf-8"><iframe style="width: 390px; height: 844px; border: 0"
        srcdoc="{html.escape(hostile.encode("utf-8", "backslashreplace").decode())}"></iframe><pre id="found"></pre>
        <script>onload = () => {{
          const page = document.querySelector("iframe").contentDocument;
          document.getElementById("found").textContent = JSON.stringify({{
            width: page.documentElement.scrollWidth,
            rows: [...page.querySelectorAll("#ledger-table tbody tr")].map((row) => row.cells[0].textContent),
            title: page.title,
            page: page.defaultView.getComputedStyle(page.body).backgroundColor,
            columns: page.defaultView.getComputedStyle(page.querySelector("section:not(.wide)")).gridTemplateColumns,
          }});
        }};</script>""",
        encoding="utf-8",
    )
    found = answer(browse(phone, "--blink-settings=preferredColorScheme=0"))
    assert found["width"] <= 390
    assert len(found["rows"]) == 12 and set(HOSTILE[:4]) <= set(found["rows"])
    assert found["title"] == "<b>M 42</b>: report"
    assert found["page"] == "rgb(15, 18, 23)"
    assert len(found["columns"].split()) == 1
