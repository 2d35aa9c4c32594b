"""The product: complete or absent, valid for every reader, and nobody else's file touched."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from astropy.io import fits
from astropy.time import Time
from astropy.wcs import WCS

from zemosaic import product
from zemosaic.demo import tangent_header
from zemosaic.ledger import FrameRecord, Ledger, LedgerError, TileRecord
from zemosaic.product import ProductError, ProductFacts, file_name, save_product, wcs_cards
from zemosaic.report.page import report_paths
from zemosaic.tiles import Mosaic, Window, alpha_of

FACTS = ProductFacts(
    "sds",
    object="M 42",
    filter="IRCUT",
    instrument="Seestar S50",
    cards=(("SDSMINB", 5, "least frames in a lot"), ("SDSSCOPE", "shared", "gain scope")),
    history=("coverage cut: 1 % of the pixels removed",),
)
TILES = [TileRecord(i, Window(0, 10, 5 * i, 5 * i + 10), 5, 600.0, 1.01, 0.3) for i in range(3)]


def mosaic_of(shape=(61, 83), colour=True, holes=True) -> Mosaic:
    """Noise with a star; a corner without data. The width is no multiple of four."""
    image = np.random.default_rng(5).normal(600, 20, (*shape, 3)).astype(np.float32)
    image[shape[0] // 2, shape[1] // 2] += 5000
    coverage = np.full(shape, 4, np.float32)
    if holes:
        image[:10, :12] = np.nan
        coverage[:10, :12] = 0
    wcs = WCS(tangent_header(83.8221234567891, -5.39, shape, scale=2.39, angle_deg=33))
    return Mosaic(image if colour else image[..., 1].copy(), coverage, alpha_of(coverage), wcs)


def ledger_of(channels=3) -> Ledger:
    """Four used frames of 10 s, a minute apart, and a rejected one with a name that is not ASCII."""
    ledger = Ledger(
        FrameRecord(
            file=f"Light_{i}.fit",
            status="partial" if i == 3 else "used",
            reason="its east half is cloudy" if i == 3 else "",
            lot=i // 2,
            exposure=10.0,
            date_obs=f"2025-02-01T21:0{i}:00.5",
            gain=(1.0, 1.1, 0.9)[:channels],
            level=(1.0, 2.0, 3.0)[:channels],
            weight=1.0,
            fwhm=2.8,
            sky=600.0,
            rejected_share=0.01,
        )
        for i in (2, 0, 3, 1)
    )
    ledger.add(FrameRecord("Lumière_α.fit", "rejected", "no star found"))
    return ledger


def save(folder, mosaic=None, name="M 42", **changes):
    options = {"facts": FACTS, "ledger": ledger_of(), "tiles": TILES, "settings_text": 'a = "é"\n'} | changes
    return save_product(folder, name, mosaic or mosaic_of(), **options)


@pytest.fixture
def strict():
    """Warnings of astropy are errors: a checksum that is wrong, a WCS that has to be mended."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("colour", [True, False])
@pytest.mark.parametrize("strip", [700, product.STRIP_BYTES])
def test_everything_is_read_back(tmp_path, strict, monkeypatch, colour, strip):
    monkeypatch.setattr(product, "STRIP_BYTES", strip)
    mosaic = mosaic_of(colour=colour)
    paths = save(tmp_path, mosaic)
    assert [path.name for path in (paths.fits, paths.preview, paths.settings)] == [
        "M_42_sds.fits",
        "M_42_sds.png",
        "M_42_sds.toml",
    ]
    assert paths.settings.read_text(encoding="utf-8") == 'a = "é"\n'
    assert cv2.imread(str(paths.preview), cv2.IMREAD_UNCHANGED).shape == (61, 83, 4)
    with fits.open(paths.fits, checksum=True) as hdus:
        assert all("CHECKSUM" in hdu.header and "DATASUM" in hdu.header for hdu in hdus)
        science = hdus[0].data
        assert hdus[0].header["BITPIX"] == -32
        np.testing.assert_array_equal(np.moveaxis(science, 0, -1) if colour else science, mosaic.image)
        np.testing.assert_array_equal(hdus["COVERAGE"].data, mosaic.coverage)
        np.testing.assert_array_equal(hdus["ALPHA"].data, mosaic.alpha)
        assert hdus["ALPHA"].data.dtype == np.uint8
        assert len(hdus["FRAMES"].data) == 5
        assert hdus["MEGATILES"].data["X1"].tolist() == [10, 15, 20]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in (paths.fits, paths.preview, paths.settings, paths.frames)
    )


@pytest.mark.parametrize("colour", [True, False])
def test_wcs_is_exact_for_every_image(tmp_path, strict, colour):
    mosaic = mosaic_of(colour=colour).crop(Window(7, 50, 9, 77))
    x, y = np.array([0.0, 3000.0, 20.5]), np.array([0.0, 1.0, -2000.0])
    with fits.open(save(tmp_path, mosaic).fits) as hdus:
        for hdu in (hdus[0], hdus["COVERAGE"], hdus["ALPHA"]):
            wcs = WCS(hdu.header).celestial
            back = mosaic.wcs.wcs_world2pix(*wcs.wcs_pix2world(x, y, 0), 0)
            np.testing.assert_allclose(back, (x, y), atol=1e-6)
        assert WCS(hdus[0].header).naxis == hdus[0].header["NAXIS"]


def test_a_distorted_wcs_is_refused():
    bent = WCS(tangent_header(10, 20, (50, 50), scale=2.0, sip_px=1.0))
    with pytest.raises(ValueError, match="distortion"):
        wcs_cards(bent)


def test_header_tells_the_run(tmp_path):
    created = Time("2026-01-02T03:04:05")
    mosaic = mosaic_of()
    mosaic.wcs.wcs.dateobs = "1999-09-09"  # a WCS can carry the date of the header that it came from
    header = fits.getheader(save(tmp_path, mosaic, facts=replace(FACTS, created=created)).fits)
    told = {
        "OBJECT": "M 42",
        "FILTER": "IRCUT",
        "INSTRUME": "Seestar S50",
        "BUNIT": "adu",
        "NCOMBINE": 4,
        "EXPTIME": 10.0,
        "TOTALEXP": 40.0,
        "EFFEXP": 40.0,
        "DATE-OBS": "2025-02-01T21:00:00.500",
        "DATE-END": "2025-02-01T21:03:10.500",
        "ROUTE": "sds",
        "FALLBACK": "none",
        "SDSMINB": 5,
        "SDSSCOPE": "shared",
        "DATE": "2026-01-02T03:04:05.000",
    }
    assert {keyword: header[keyword] for keyword in told} == told
    assert header["MJD-BEG"] == pytest.approx(Time("2025-02-01T21:00:00.5").mjd)
    assert list(header["HISTORY"]) == list(FACTS.history)


def test_effective_exposure_is_that_of_a_typical_pixel(tmp_path):
    mosaic = mosaic_of()
    mosaic.coverage[20:, :] = 2.5
    header = fits.getheader(save(tmp_path, mosaic).fits)
    assert header["EFFEXP"] == 25.0


def test_what_is_unknown_is_not_in_the_header(tmp_path):
    ledger = Ledger([FrameRecord("a.fit", "used", date_obs="yesterday"), FrameRecord("b.fit", "used")])
    facts = ProductFacts("sds", cards=(("REFMED", np.float32("nan"), ""), ("GAINMAX", float("inf"), "")))
    header = fits.getheader(save(tmp_path, facts=facts, ledger=ledger, tiles=()).fits)
    assert not {"REFMED", "GAINMAX", "OBJECT", "FILTER", "EXPTIME", "EFFEXP", "DATE-OBS", "MJD-OBS"} & set(header)
    assert header["NCOMBINE"] == 2


def test_any_text_makes_valid_cards(tmp_path, strict):
    facts = replace(
        FACTS,
        object="Nébuleuse d'Orion – β\n\t☉ " + "'quoted' " * 20,
        fallback="no usable lot: " + "x" * 100,
        history=("é" * 200, "tab\tand\nline"),
        cards=(("LONG", "z" * 60, "a comment that has no room left beside so long a value"),),
    )
    with fits.open(save(tmp_path, facts=facts).fits) as hdus:
        hdus.verify("exception")
        header = hdus[0].header
    assert header["OBJECT"].startswith("Nebuleuse d'Orion ? ? ? 'quoted'")
    assert "CONTINUE" not in header
    assert header["LONG"] == "z" * 60
    assert "".join(header["HISTORY"]).count("e") > 200
    assert "fallback: no usable lot" in "".join(header["HISTORY"])


@pytest.mark.parametrize("keyword", ["NCOMBINE", "lower", "TOO-LONG-A-KEYWORD"])
def test_a_card_cannot_replace_another(tmp_path, keyword):
    with pytest.raises(ValueError, match=keyword):
        save(tmp_path, facts=replace(FACTS, cards=((keyword, 1, ""),)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("NGC 7023", "NGC_7023"),
        ("../../etc/passwd", "etc_passwd"),
        ("--help", "help"),
        ("C:\\a|b\0\n", "C_a_b"),
        ("Nébuleuse", "Nebuleuse"),
        ("星雲", "mosaic"),
        ("", "mosaic"),
        ("Sh2-101.5+3", "Sh2-101.5+3"),
        ("x" * 300, "x" * 80),
    ],
)
def test_file_names_are_safe(text, safe):
    assert file_name(text) == safe


def test_nothing_is_ever_overwritten(tmp_path):
    first = save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert save(tmp_path).fits.name == "M_42_sds_2.fits"
    # One file of a former product is enough to keep its name, be it a link to nowhere.
    (tmp_path / "M_42_sds_3.png").symlink_to("nowhere")
    fourth = save(tmp_path)
    assert {fourth.fits.name, fourth.preview.name, fourth.settings.name} == {
        "M_42_sds_4.fits",
        "M_42_sds_4.png",
        "M_42_sds_4.toml",
    }
    assert {path: path.read_bytes() for path in before} == before
    assert first.fits in before


@pytest.mark.parametrize("report", ["html", "json"])
def test_the_report_of_a_former_product_keeps_its_name_too(tmp_path, report):
    former = getattr(report_paths(tmp_path / "M_42_sds.fits"), report)
    former.write_text("all that is left of it")
    assert save(tmp_path).fits.name == "M_42_sds_2.fits"
    assert former.read_text() == "all that is left of it"


def test_runs_that_end_together_get_a_name_each(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: save(tmp_path, mosaic_of((20, 20))).fits, range(12)))
    assert len(set(paths)) == 12
    assert len(list(tmp_path.iterdir())) == 48
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("step", ["_write_table", "encode_png", "preview_rgba"])
@pytest.mark.parametrize(
    ("fault", "raised", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            ProductError,
            "no room left in .* Free some space",
        ),
        (OSError(errno.EIO, "Input/output error"), ProductError, "cannot be written: Input/output error"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch, step, fault, raised, words):
    def fail(*args, **kwargs):
        raise fault

    monkeypatch.setattr(product, step, fail)
    with pytest.raises(raised, match=words):
        save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_last_rename_takes_the_rest_back(tmp_path, monkeypatch):
    rename = os.replace

    def fail_for_fits(source, target):
        if Path(target).suffix == ".fits":
            raise OSError(errno.EIO, "Input/output error", str(target))
        rename(source, target)

    monkeypatch.setattr(product.os, "replace", fail_for_fits)
    with pytest.raises(ProductError, match=r"M_42_sds.fits cannot be written"):
        save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder_is_told(tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(ProductError, match=r"taken cannot be written"):
        save(tmp_path / "taken")


def test_memory_is_that_of_a_strip(tmp_path, monkeypatch):
    monkeypatch.setattr(product, "STRIP_BYTES", 1 << 18)
    mosaic = mosaic_of((1000, 1100))
    tracemalloc.start()
    try:
        with (tmp_path / "x.fits").open("wb") as stream:
            product._write_fits(stream, mosaic, FACTS, ledger_of(), TILES)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.3 * mosaic.image.nbytes


def test_ledger_balances_or_names_what_is_wrong():
    ledger = Ledger([FrameRecord("a", "used"), FrameRecord("b", "rejected", "blurred")])
    ledger.check(["b", "a"])
    assert ledger.counts() == {"used": 1, "partial": 0, "rejected": 1}
    ledger.add(FrameRecord("a", "used"))
    with pytest.raises(LedgerError, match=r"1 missing .*\(c\); 1 .*more than once \(a\); 1 .*never found \(b\)"):
        ledger.check(["a", "c"])


@pytest.mark.parametrize("bad", [{"status": "lost"}, {"status": "rejected"}, {"status": "partial"}])
def test_a_record_needs_a_known_status_and_a_reason(bad):
    with pytest.raises(ValueError, match=r"x\.fit"):
        FrameRecord("x.fit", **bad)


@pytest.mark.parametrize("channels", [3, 1])
def test_ledger_table(channels):
    table = ledger_of(channels).to_table()
    assert list(table["FILE"]) == [*(f"Light_{i}.fit" for i in range(4)), "Lumi\\xe8re_\\u03b1.fit"]
    assert table["GAIN"].shape == ((5, 3) if channels == 3 else (5,))
    assert np.isnan(table["GAIN"][4]).all()
    assert table["LOT"].tolist() == [0, 0, 1, 1, -1]
    assert list(table["STATUS"][3:]) == ["partial", "rejected"]
    assert len(Ledger().to_table()) == 0


@pytest.mark.skipif(shutil.which("fitsverify") is None, reason="no fitsverify on this machine")
@pytest.mark.parametrize(
    ("colour", "ledger", "tiles"),
    [(True, ledger_of(), TILES), (False, ledger_of(1), []), (True, Ledger(), [])],
)
def test_fitsverify_finds_nothing(tmp_path, colour, ledger, tiles):
    facts = replace(FACTS, object="d'Orion " * 20, fallback="no lot " * 30)
    path = save(tmp_path, mosaic_of(colour=colour), facts=facts, ledger=ledger, tiles=tiles).fits
    said = subprocess.run(["fitsverify", str(path)], capture_output=True, text=True, check=False)
    assert "Verification found 0 warning(s) and 0 error(s)" in said.stdout, said.stdout


@pytest.mark.skipif(shutil.which("siril-cli") is None, reason="no siril-cli on this machine")
@pytest.mark.filterwarnings("ignore:.*datfix")
@pytest.mark.parametrize("colour", [True, False])
def test_siril_loads_it_with_its_wcs(tmp_path, colour):
    mosaic = mosaic_of(colour=colour, holes=False)
    save(tmp_path, mosaic)
    save(tmp_path, mosaic_of(colour=colour, holes=True), name="holes")
    script = tmp_path / "script.ssf"
    script.write_text(f"requires 1.0.0\ncd {tmp_path}\nload holes_sds\nload M_42_sds\nstat\nsave back\nclose\n")
    # A home of its own: Siril writes its settings there.
    home = {**os.environ, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    said = subprocess.run(
        ["siril-cli", "-s", str(script)], capture_output=True, text=True, env=home, timeout=60, check=False
    )
    log = said.stdout + said.stderr
    assert said.returncode == 0, log
    assert log.count("Reading FITS") == 2, log
    means = [float(value) for value in re.findall(r"Mean: ([\d.]+)", log)]
    np.testing.assert_allclose(means, np.atleast_3d(mosaic.image).mean(axis=(0, 1)), rtol=1e-3)
    back = WCS(fits.getheader(tmp_path / "back.fit")).celestial
    np.testing.assert_allclose(back.wcs_pix2world(5, 9, 0), mosaic.wcs.wcs_pix2world(5, 9, 0), rtol=1e-9)
