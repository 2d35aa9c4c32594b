"""`zemosaic check`, and the evidence of a real run: small simulated fields through the whole engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from report_field import Fault, blank, invent
from typer.testing import CliRunner

import zemosaic_worker
from zemosaic.cli import app
from zemosaic.demo import FieldTruth, make_field
from zemosaic.product import wcs_cards
from zemosaic.report.check import CheckError, check_mosaic, read_catalogue, read_mosaic
from zemosaic.report.evidence import Evidence, evidence_of_run
from zemosaic.report.verdict import judge
from zemosaic.settings import Settings

PANEL = 10  # frames


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> FieldTruth:
    folder = tmp_path_factory.mktemp("subs")
    options = {"panels": (2, 1), "shape": (270, 360), "star_density": 6000, "nebula": 60, "sky": 400, "overlap": 0.4}
    return make_field(folder, frames=2 * PANEL, trails=0, cosmics=0, seed=4, **options)


@pytest.fixture(scope="module")
def runs(field: FieldTruth, tmp_path_factory: pytest.TempPathFactory):
    """Run the engine with something wrong in the second panel; gives the evidence and the product."""
    lots = [field.paths[:PANEL], field.paths[PANEL:]]
    made: dict[tuple, tuple[Evidence, Path]] = {}

    def run(gain: float = 1.0, sky: float = 0.0, most: int = 400_000) -> tuple[Evidence, Path]:
        if (gain, sky, most) in made:
            return made[gain, sky, most]
        seen: list[Evidence] = []
        match, books = zemosaic_worker.steps.match, zemosaic_worker.write_ledger

        def faulty(*args, **options):
            subs, photometry = match(*args, **options)
            bad = {path.name for path in lots[1]}
            for i, sub in enumerate(subs):
                if sub.frame.path.name in bad:
                    own = sub.adjustment
                    plane = own.plane * gain
                    plane[:, 0] += photometry.sky * (gain - 1) - sky  # about the sky: its level stays but for `sky`
                    subs[i] = replace(sub, adjustment=replace(own, gain=own.gain * gain, plane=plane))
            adjustments = tuple(sub.adjustment for sub in subs)
            return subs, replace(photometry, adjustments=adjustments)

        def listen(intake, job, result):
            seen.append(evidence_of_run(job, intake, result))
            return books(intake, job, result)

        out = tmp_path_factory.mktemp("out")
        settings = Settings(num_processing_workers=1, blur_filter=False, report=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(zemosaic_worker.steps, "match", faulty)
            patch.setattr("zemosaic.report.evidence._MOST_SAMPLES", most)
            patch.setattr(zemosaic_worker, "write_ledger", listen)
            result = zemosaic_worker.run_hierarchical_mosaic(
                field.paths[0].parent, out, settings, sds=True, preplan_path_groups=lots
            )
        made[gain, sky, most] = seen[0], result.product
        return made[gain, sky, most]

    return run


def save(path: Path, evidence: Evidence, *, zeros: bool = False, coverage: bool = False) -> Path:
    """A mosaic as another program may have written it."""
    image = np.nan_to_num(evidence.image) if zeros else evidence.image
    planes = 1 if image.ndim == 2 else 3
    header = wcs_cards(evidence.wcs, planes) if evidence.wcs is not None else None
    hdus = fits.HDUList([fits.PrimaryHDU(np.moveaxis(image, -1, 0) if planes == 3 else image, header)])
    if coverage:
        hdus.append(fits.ImageHDU(evidence.coverage, name="COVERAGE"))
    hdus.writeto(path)
    return path


def test_evidence_of_a_run_agrees_with_the_truth(runs, field: FieldTruth):
    evidence, _ = runs()
    frames = evidence.frames
    assert len(frames) == 2 * PANEL and frames.lot.tolist() == [0] * PANEL + [1] * PANEL
    # A middle of a frame lies where its true WCS puts it.
    ny, nx = field.recipe.shape
    ra, dec = np.array([f.wcs.all_pix2world((nx - 1) / 2, (ny - 1) / 2, 0) for f in field.frames]).T
    truth = np.stack(evidence.wcs.wcs_world2pix(ra, dec, 0), axis=1)
    assert np.abs(frames.outline.mean(axis=1) - truth).max() < 0.3
    transparency = np.array([f.transparency for f in field.frames])
    product = frames.gain[:, 1] * transparency
    assert np.std(product / product.mean()) < 0.02
    # The sky of all frames agrees after adjustment.
    sky = evidence.sky
    node = np.bincount(sky.node, sky.value[:, 1]) / np.maximum(np.bincount(sky.node), 1)
    assert np.median(np.abs(sky.value[:, 1] - node[sky.node])) < 4
    matching = (sky.x >= 0) & (sky.x < evidence.shape[1]) & (sky.y >= 0) & (sky.y < evidence.shape[0])
    assert matching.mean() > 0.9


def test_many_frames_compare_their_skies_at_fewer_places(runs):
    all_of, some = runs(sky=5.0)[0].sky, runs(sky=5.0, most=400)[0].sky
    assert 150 < len(some.node) <= 400 < len(all_of.node)
    places = {(x, y): tuple(value) for x, y, value in zip(all_of.x, all_of.y, all_of.value, strict=True)}
    assert {(x, y) for x, y in zip(some.x, some.y, strict=True)} <= places.keys()
    verdict = judge(runs(sky=5.0, most=400)[0])
    assert verdict.figure("lot_sky").value == pytest.approx(judge(runs(sky=5.0)[0]).figure("lot_sky").value, rel=0.2)


def test_run_without_fault_has_none(runs):
    verdict = judge(runs()[0])
    # In so small and full a field a cluster of stars on a border may pass for a seam, but no lot is blamed.
    assert not [f.text() for f in verdict.findings if f.grade == "FAIL" or not f.key.startswith("seam")]
    assert 0.75 < verdict.figure("noise_ratio").value < 1.1
    assert verdict.figure("fwhm_ratio").value == pytest.approx(1, abs=0.08)
    assert verdict.figure("level_rms").grade == "PASS"


def test_fault_put_into_a_run_is_named(runs):
    evidence, _ = runs(gain=1.05)
    found = {f.key: f for f in judge(evidence).findings}
    assert found["lot_gain"].lot == 1
    assert found["lot_gain"].values["mmag"] == pytest.approx(-53, rel=0.3)


def test_gain_that_renormalisation_made_of_a_sky_step_is_named(runs):
    # Mega-tiles are compared by the medians they share: a step of the sky becomes a gain.
    verdict = judge(runs(sky=20.0)[0])
    assert {f.key for f in verdict.findings} & {"lot_gain", "lot_sky"}
    assert verdict.grade in ("WARN", "FAIL")


def test_product_with_its_subs(runs, field: FieldTruth):
    good, bad = (
        check_mosaic(product, [field.paths[0].parent], settings=Settings(num_processing_workers=1))
        for product in (runs()[1], runs(gain=1.05)[1])
    )
    assert len(good.verdict.frames) == 2 * PANEL and good.exit_status == 0
    assert good.lines[-1] == f"Compared with {2 * PANEL} of its subs."
    # The gains that the product's own table tells are compared.
    assert [(f.key, f.lot) for f in bad.verdict.findings if f.key == "lot_gain"] == [("lot_gain", 1)]
    assert bad.exit_status == 1


def test_mosaic_of_another_program_with_subs(runs, field: FieldTruth, tmp_path: Path):
    evidence, _ = runs()
    image = evidence.image.copy()
    image[:, image.shape[1] * 3 // 5 :] += 8
    path = save(tmp_path / "other.fits", replace(evidence, image=0.01 * image), zeros=True)
    verdict = check_mosaic(path, field.paths, settings=Settings(num_processing_workers=1)).verdict
    assert verdict.grade == "FAIL"
    assert len(verdict.lots) == 2  # panels, as there are no lots


def test_mosaic_alone_on_the_command_line(tmp_path: Path):
    good = save(tmp_path / "good.fits", invent(), coverage=True)
    result = CliRunner().invoke(app, ["check", str(good), "--json", str(tmp_path / "v.json"), "-q"])
    assert result.exit_code == 0, result.output
    assert "Verdict: PASS" in result.stdout and "Measured from the mosaic alone" in result.stdout
    assert json.loads((tmp_path / "v.json").read_text())["grade"] == "PASS"
    holed = invent()
    holed.image[200:260, 300:380] = np.nan
    result = CliRunner().invoke(app, ["check", str(save(tmp_path / "bad.fits", holed)), "-q", "--lang", "fr"])
    assert result.exit_code == 1 and "Verdict : FAIL" in result.stdout and "Trous sans données" in result.stdout


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_layout_is_read(tmp_path: Path, zeros: bool, channels: int):
    evidence = invent(Fault(), channels=channels, stars=30, lots=2)
    _, read = read_mosaic(save(tmp_path / "m.fits", evidence, zeros=zeros))
    assert read.coverage is None and read.shape == evidence.shape
    assert np.array_equal(np.isnan(read.image), np.isnan(evidence.image))


def test_measured_zeros_stay(tmp_path: Path):
    image = blank()
    image[5, 5] = 0
    fits.PrimaryHDU(image).writeto(tmp_path / "m.fits")
    _, evidence = read_mosaic(tmp_path / "m.fits")
    assert evidence.wcs is None and np.isfinite(evidence.image).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no fits", "not a FITS file"), (None, "no data")],
    ids=["garbage", "empty"],
)
def test_unusable_mosaic_is_refused(tmp_path: Path, content: bytes | None, message: str):
    path = tmp_path / "m.fits"
    if content:
        path.write_bytes(content)
    else:
        fits.PrimaryHDU(np.full((50, 50), np.nan, np.float32)).writeto(path)
    with pytest.raises(CheckError, match=message):
        check_mosaic(path)
    assert CliRunner().invoke(app, ["check", str(path)]).exit_code == 2


def test_subs_need_a_mosaic_with_a_wcs(tmp_path: Path, field: FieldTruth):
    fits.PrimaryHDU(blank()).writeto(tmp_path / "m.fits")
    with pytest.raises(CheckError, match="WCS"):
        check_mosaic(tmp_path / "m.fits", field.paths[:3])


def test_subs_of_another_field_are_refused(tmp_path: Path, field: FieldTruth):
    path = save(tmp_path / "m.fits", replace(invent(), wcs=_elsewhere()))
    with pytest.raises(CheckError, match="none of the subs lies on"):
        check_mosaic(path, field.paths[:4], settings=Settings(num_processing_workers=1))


def _elsewhere():
    wcs = invent(stars=1).wcs.deepcopy()
    wcs.wcs.crval = [200.0, -40.0]
    wcs.wcs.set()
    return wcs


def test_catalogue_is_read_whatever_its_names(tmp_path: Path):
    table = Table({"RA": [83.8, np.nan, 83.9], "DEC": [10.0, 10.0, 10.1]})
    table.write(tmp_path / "stars.csv")
    catalogue = read_catalogue(tmp_path / "stars.csv")
    assert catalogue.ra.tolist() == [83.8, 83.9] and np.isnan(catalogue.mag).all()
    Table({"x": [1]}).write(tmp_path / "other.csv")
    with pytest.raises(CheckError, match="no columns ra and dec"):
        read_catalogue(tmp_path / "other.csv")
    (tmp_path / "odd.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckError):
        read_catalogue(tmp_path / "odd.csv")
