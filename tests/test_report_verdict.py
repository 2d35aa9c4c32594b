"""The verdict as a whole: a good mosaic passes, every fault is found and named, whatever is missing is left out."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from report_field import Fault, blank, invent, line

from zemosaic.report.evidence import Evidence
from zemosaic.report.measures import TooLittle
from zemosaic.report.thresholds import THRESHOLDS, Threshold
from zemosaic.report.verdict import SCHEMA, Verdict, as_json, judge, write_json


@pytest.fixture(scope="module")
def good() -> Verdict:
    return judge(invent())


def test_good_mosaic_passes_without_a_finding(good: Verdict):
    assert good.findings == ()
    assert good.grade == "PASS", [(f.key, f.value) for f in good.figures if f.grade in ("WARN", "FAIL")]
    unmeasured = {f.key for f in good.figures if not np.isfinite(f.value)}
    assert unmeasured == {"catalogue_scatter", "catalogue_median"}


@pytest.mark.parametrize("hidden", [False, True], ids=["told by the frames", "shown by the mosaic alone"])
@pytest.mark.parametrize(
    ("fault", "key", "value", "expected"),
    [
        (Fault(gain=1.02), "lot_gain", "mmag", -21.5),
        (Fault(lot=1, sky=3.0), "lot_sky", "adu", 3.0),
        (Fault(lot=3, shift=0.3), "lot_shift", "dx", 0.3),
        (Fault(fwhm=4.8), "lot_fwhm", "ratio", 1.6),
    ],
)
def test_fault_of_one_lot_is_found_and_named(fault: Fault, key: str, value: str, expected: float, hidden: bool):
    verdict = judge(invent(fault, hidden=hidden))
    found = [f for f in verdict.findings if f.key == key]
    if hidden and key == "lot_fwhm":
        # Frames that are sharp cannot tell which lot was smeared; the mosaic's own stars still show it.
        assert not found and verdict.figure("fwhm_evenness").grade != "PASS"
        return
    assert [f.lot for f in found] == [fault.lot]
    assert found[0].grade == "FAIL" == verdict.grade
    assert found[0].values[value] == pytest.approx(expected, rel=0.25)
    assert f"Lot {fault.lot + 1} (8 frames)" in found[0].text()
    assert f"Lot {fault.lot + 1} (8 images)" in found[0].text("fr")


def test_one_percent_gain_error_is_found():
    verdict = judge(invent(Fault(gain=1.01)))
    assert [(f.key, f.lot) for f in verdict.findings] == [("lot_gain", 2)]
    assert verdict.findings[0].values["mmag"] == pytest.approx(-10.8, abs=2.5)


def test_faults_show_only_where_they_are(good: Verdict):
    shifted, brighter = judge(invent(Fault(shift=0.3))), judge(invent(Fault(sky=3.0)))
    for key in ("lot_sky", "level_rms"):
        assert shifted.figure(key).value == pytest.approx(good.figure(key).value, abs=0.05)
        assert brighter.figure(key).value > good.figure(key).value
    assert brighter.figure("lot_shift").value == good.figure("lot_shift").value == 0


def test_two_lots_compare_with_each_other():
    verdict = judge(invent(Fault(lot=1, sky=4.0), lots=2))
    assert [(f.key, f.lot) for f in verdict.findings if f.key == "lot_sky"] == [("lot_sky", 1)]


def test_photon_noise_is_no_fault_of_the_mosaic(good: Verdict):
    photons = good.measures.photometry.photons
    figure = good.figure("phot_scatter")
    assert figure.warn == pytest.approx(np.hypot(10, photons[np.argmax(figure.channels)]))
    assert good.figure("fwhm_ratio").warn == THRESHOLDS["fwhm_ratio"].warn


def test_single_lot_has_no_offset():
    verdict = judge(invent(lots=1))
    assert np.isnan(verdict.figure("lot_gain").value) and verdict.figure("lot_gain").grade == "NONE"
    assert np.isfinite(verdict.figure("phot_scatter").value)


def test_trail_is_named_with_its_ends():
    evidence = invent()
    image = np.stack([line(c, (100, 90), (620, 400), 12.0) for c in np.moveaxis(evidence.image, 2, 0)], axis=2)
    verdict = judge(replace(evidence, image=image))
    (found,) = verdict.findings
    assert found.key == "trail"
    ends = sorted([(found.values["x0"], found.values["y0"]), (found.values["x1"], found.values["y1"])])
    assert np.allclose(ends, [(100, 90), (620, 400)], atol=30)


def test_mono():
    verdict = judge(invent(Fault(sky=4.0), channels=1))
    assert [(f.key, f.lot) for f in verdict.findings] == [("lot_sky", 2)]
    assert len(verdict.figure("lot_sky").channels) == 1


def test_picture_alone_is_judged_by_what_it_shows():
    whole = invent()
    alone = judge(Evidence(whole.image))
    assert alone.grade == "PASS"
    known = {f.key for f in alone.figures if np.isfinite(f.value)}
    assert known == {"block_step_p99", "block_step_p99_adu", "fwhm_evenness", "ellipticity", "trail", "holes"}
    assert alone.lots == () and alone.frames is None
    assert {"sky", "noise", "fwhm"} <= set(alone.maps)


def test_coverage_adds_borders_and_evenness():
    whole = invent()
    verdict = judge(Evidence(whole.image, whole.coverage))
    assert verdict.measures.seams.pieces > 100
    assert verdict.figure("seam_p95").grade == verdict.figure("noise_evenness").grade == "PASS"


@pytest.mark.parametrize(
    "image",
    [
        blank((64, 64)),
        np.full((200, 200), 7, np.float32),
        np.where(np.arange(400) < 390, np.float32(np.nan), blank()[:, :400]),
        blank() * np.float32(1e-4),
        -blank(),
        np.stack([blank(seed=s) for s in range(3)], axis=2),
    ],
    ids=["small", "constant", "mostly empty", "0 to 1", "negative", "colour"],
)
@pytest.mark.filterwarnings("error")
def test_odd_pictures_are_judged(image: np.ndarray):
    json.dumps(as_json(judge(Evidence(image))), allow_nan=False)


@pytest.mark.parametrize("shape", [(1, 1), (3, 500), (31, 200)])
def test_too_small_a_picture_is_refused(shape: tuple[int, int]):
    with pytest.raises(TooLittle, match="too small"):
        judge(Evidence(blank(shape)))


def test_empty_picture_is_refused():
    with pytest.raises(TooLittle, match="hardly any data"):
        judge(Evidence(np.full((100, 100), np.nan, np.float32)))


def test_json_carries_units_thresholds_and_no_nan(good: Verdict, tmp_path):
    write_json(good, tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert data["schema"] == SCHEMA and data["grade"] == "PASS"
    assert set(data["figures"]) == set(THRESHOLDS)
    gain, scatter = data["figures"]["lot_gain"], data["figures"]["phot_scatter"]
    assert gain["unit"] == "mmag" and gain["warn"] == THRESHOLDS["lot_gain"].warn
    assert scatter["label"] == "Error of a bright star's magnitude" and len(scatter["channels"]) == 3
    assert 0 < scatter["chance"] < scatter["value"] and data["figures"]["seam_p50"]["chance"] is None
    assert data["figures"]["catalogue_median"]["value"] is None
    assert len(data["frames"]) == 32 and {"gain", "fwhm_px", "dx_px"} <= set(data["frames"][0])
    assert len(data["lots"]) == 4 and data["lots"][0]["frames"] == 8
    assert len((tmp_path / "report.json").read_bytes()) < 100_000


def test_every_figure_and_group_has_a_label_in_both_languages(good: Verdict):
    for language in ("en", "fr"):
        labels = as_json(good, language)["figures"]
        assert all(labels[key]["label"] for key in THRESHOLDS)


def test_maps_are_small_enough_for_a_page(good: Verdict):
    for each in good.maps.values():
        assert max(each.values.shape) <= 256 and each.values.dtype == np.float32
        assert each.values.shape[0] * each.height >= good.shape[0] - each.height


def test_same_evidence_gives_the_same_verdict(good: Verdict):
    assert as_json(judge(invent())) == as_json(good)


def test_threshold_grades():
    limit = Threshold("seams", "px", 1.0, 2.0)
    assert [limit.grade(v) for v in (0.0, 0.99, 1.0, 2.0, float("nan"))] == ["PASS", "PASS", "WARN", "FAIL", "NONE"]
    assert Threshold("seams", "px").grade(9.0) == "NONE"
