"""Golden files: what runs without SDS make of two small fields, to the pixel and to the card.

``test_golden.py`` compares every run with them. Where a change of the results is wanted,

    python tests/golden/bless.py

shows what is new in every file that differs, and replaces it; the commit says why. ``subs/`` holds the frames of the
fields (nine of 120 x 160 px, colour and mono). They are kept as files, not made anew by `make_field`, so that neither
the simulator nor NumPy's random numbers can move the results; ``--subs`` makes them again all the same.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from astropy.io.fits import FITSDiff

from zemosaic.demo import make_field
from zemosaic.settings import Settings
from zemosaic_worker import run_hierarchical_mosaic

HERE = Path(__file__).resolve().parent

FIELD: dict[str, Any] = {
    "panels": (2, 1),
    "frames": 9,
    "shape": (120, 160),
    "overlap": 0.45,
    "dither_px": 8,
    "fwhm": 2.3,
    "star_density": 4500,
    "nebula": 60,
    "sky": 300,
    "trails": 0.2,
    "seed": 2,
    "name": "Golden",
}

#: What may differ from run to run: when it was, how long it took, and by which version.
IGNORED_CARDS = ["DATE", "CHECKSUM", "DATASUM", "SWVERS"]
IGNORED_COLUMNS = ["SECONDS"]

#: Relative and absolute (ADU, frames, and whatever a column holds) differences that are none.
RTOL, ATOL = 1e-5, 0.01


class Case(NamedTuple):
    """One golden file: the field, and the settings that it is made with."""

    field: str
    assembly: str
    max_raw: int

    @property
    def name(self) -> str:
        return f"{self.field}-{self.assembly}-{self.max_raw}"

    @property
    def golden(self) -> Path:
        return HERE / f"{self.name}.fits.gz"

    @property
    def subs(self) -> Path:
        return HERE / "subs" / self.field

    @property
    def settings(self) -> Settings:
        return Settings(
            output_name=self.name,
            final_assembly_method=self.assembly,
            max_raw_per_master_tile=self.max_raw,
            num_processing_workers=1,
            global_wcs_autocrop_margin_px=0,  # the empty border would only make the files larger
        )


CASES = tuple(
    Case(field, assembly, max_raw)
    for field in ("mono", "colour")
    for assembly in ("reproject_coadd", "incremental")
    for max_raw in (0, 3)
)


def run_case(case: Case, folder: Path) -> Path:
    """Make the mosaic of a case and return its FITS file."""
    product = run_hierarchical_mosaic(case.subs, folder, case.settings, sds=False).product
    assert product is not None
    return product


def difference(golden: Path, product: Path) -> FITSDiff:
    """All differences that count, pixel by pixel and card by card."""
    return FITSDiff(
        str(golden),
        str(product),
        ignore_keywords=IGNORED_CARDS,
        ignore_comments=["*"],  # some are worded by astropy and wcslib, each version in its own way
        ignore_fields=IGNORED_COLUMNS,
        rtol=RTOL,
        atol=ATOL,
    )


def make_subs() -> None:
    """Write the frames of both fields."""
    for field, pattern in (("colour", "GRBG"), ("mono", None)):
        with tempfile.TemporaryDirectory() as folder:
            truth = make_field(folder, pattern=pattern, **FIELD)
            target = HERE / "subs" / field
            target.mkdir(parents=True, exist_ok=True)
            for path in truth.paths:
                _pack(path, target / f"{path.name}.gz")


def bless(case: Case) -> str:
    """Replace one golden file if its run has another result now, and tell the differences."""
    with tempfile.TemporaryDirectory() as folder:
        product = run_case(case, Path(folder))
        if case.golden.exists():
            found = difference(case.golden, product)
            if found.identical:
                return f"{case.name}: as it was\n"
            report = str(found.report())
        else:
            report = "new\n"
        _pack(product, case.golden)
    return f"{case.name}: {report}"


def _pack(source: Path, target: Path) -> None:
    target.write_bytes(gzip.compress(source.read_bytes(), mtime=0))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Replace the golden files by what runs make today.")
    parser.add_argument("--subs", action="store_true", help="make the frames anew as well")
    if parser.parse_args().subs:
        make_subs()
    for case in CASES:
        sys.stdout.write(bless(case))


if __name__ == "__main__":
    main()
