"""Runs without SDS stay put: their products are compared with golden files, pixel by pixel and card by card.

A run is the same to the last bit on one machine, whatever the number of workers. Another CPU, BLAS or OpenCV adds in
another order and multiplies with other instructions. With NumPy kept to SSE, OpenBLAS to its plainest kernels and
OpenCV 4 in place of 5, pixels moved by 2e-7 of their value, 0.001 ADU in the brightest star, and no sample crossed the
limit of rejection. A difference counts from 1e-5 of the value and 0.01 ADU on: ten times that, and a thousandth of the
noise of a pixel (8 ADU), so that any change of a method or of a constant shows. ``golden/bless.py`` replaces the files.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from golden.bless import CASES, HERE, difference, run_case

from zemosaic.settings import Settings

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_without_sds_makes_what_it_made(case, tmp_path):
    found = difference(case.golden, run_case(case, tmp_path))
    assert found.identical, found.report()


def test_the_golden_files_stay_small():
    files = [path for path in HERE.rglob("*") if path.suffix == ".gz"]
    assert len(files) == len(CASES) + 2 * 9
    assert sum(path.stat().st_size for path in files) <= 3e6


# --- the comparison itself --------------------------------------------------------------------------------


@pytest.fixture
def copy() -> Iterator[fits.HDUList]:
    """A golden file to be changed."""
    with fits.open(CASES[0].golden) as hdus:
        yield hdus


def same(hdus: fits.HDUList, folder: Path) -> bool:
    hdus.writeto(folder / "copy.fits")
    return bool(difference(CASES[0].golden, folder / "copy.fits").identical)


def test_time_and_version_do_not_count(copy, tmp_path):
    copy[0].header["DATE"], copy[0].header["SWVERS"] = "2031-01-01T00:00:00", "99.9"
    copy["MEGATILES"].data["SECONDS"] += 3
    assert same(copy, tmp_path)


def test_noise_of_the_arithmetic_does_not_count(copy, tmp_path):
    copy[0].data = copy[0].data * np.float32(1 + 3e-7)
    assert same(copy, tmp_path)


@pytest.mark.parametrize("lost", [False, True])
def test_a_single_pixel_counts(copy, tmp_path, lost):
    y, x = np.argwhere(np.isfinite(copy[0].data))[1000]
    copy[0].data[y, x] = np.nan if lost else copy[0].data[y, x] + 0.1
    assert not same(copy, tmp_path)


def test_a_frame_more_in_the_coverage_counts(copy, tmp_path):
    y, x = np.argwhere(copy["COVERAGE"].data > 2)[1000]
    copy["COVERAGE"].data[y, x] += 1
    assert not same(copy, tmp_path)


def test_a_card_counts(copy, tmp_path):
    copy[0].header["NCOMBINE"] = 8
    assert not same(copy, tmp_path)


def test_a_row_of_the_books_counts(copy, tmp_path):
    copy["FRAMES"].data["GAIN"][3] *= 1.1
    assert not same(copy, tmp_path)


def test_a_missing_extension_counts(copy, tmp_path):
    del copy["ALPHA"]
    assert not same(copy, tmp_path)


# --- nothing of SDS ---------------------------------------------------------------------------------------


SDS_SETTINGS = {
    "sds_mode_default": True,
    "sds_min_batch_size": 2,
    "sds_target_batch_size": 3,
    "sds_coverage_threshold": 0.3,
    "sds_gain_scope": "tile",
    "sds_min_coverage_keep": 0.9,
    "global_coadd_method": "median",
    "global_coadd_k": 1.0,
}

#: What no line of a module that was never imported can do is run.
PROBE = """
import sys
from pathlib import Path
import zemosaic_worker

field, out, settings = Path(sys.argv[1]), Path(sys.argv[2]), eval(sys.argv[3])
for number, changes in enumerate(({}, settings)):
    zemosaic_worker.run_hierarchical_mosaic(
        field,
        out / str(number),
        zemosaic_worker.Settings(**(eval(sys.argv[4]) | changes)),
        sds=False,
        preplan_path_groups=[sorted(field.iterdir())] if changes else None,
    )
    assert "zemosaic_sds" not in sys.modules, changes
"""


def test_a_run_without_sds_neither_imports_it_nor_heeds_its_settings(tmp_path):
    """In a process of its own, once with every SDS setting (and lots given), once with none: the same golden pixels."""
    case = CASES[0]
    settings = case.settings.model_dump(exclude_defaults=True)
    command = [sys.executable, "-c", PROBE, str(case.subs), str(tmp_path), repr(SDS_SETTINGS), repr(settings)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    products = [next((tmp_path / number).glob("*.fits")) for number in ("0", "1")]
    for product in products:
        found = difference(case.golden, product)
        assert found.identical, found.report()
    np.testing.assert_array_equal(*(fits.getdata(product) for product in products))
    np.testing.assert_array_equal(*(fits.getdata(product, "COVERAGE") for product in products))


def test_every_sds_setting_is_tried():
    """A new one has to join the list above."""
    names = {name for name in Settings.model_fields if name.startswith(("sds_", "global_coadd"))}
    assert names == set(SDS_SETTINGS)
