"""The books of a run: they close, or say what does not."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest
from astropy.table import Table
from hypothesis import given
from hypothesis import strategies as st

from zemosaic.ledger import PARTIAL_SHARE, FrameRecord, Ledger, LedgerError, TileRecord, fate
from zemosaic.tiles import Window


def tile(index: int, frames: int) -> TileRecord:
    return TileRecord(index, Window(0, 10, 0, 10), frames, 1.0, 1.0, 0.1)


def in_lot(file: str, lot: int, used: bool = True) -> FrameRecord:
    return FrameRecord(file, "used" if used else "rejected", "" if used else "none of its pixels was used", lot)


BOOKS = [in_lot("a", 0), in_lot("b", 0), in_lot("c", 0, used=False), in_lot("d", 1), FrameRecord("e", "rejected", "x")]


@pytest.mark.parametrize("frames", [2, 3])  # with the one that gave no pixel, and without
def test_books_that_agree_with_the_tiles_close(frames):
    Ledger(BOOKS).check("abcde", [tile(0, frames), tile(1, 1)])


@pytest.mark.parametrize(
    ("tiles", "fault"),
    [
        ([tile(0, 1), tile(1, 1)], r"another number of frames than the ledger \(tile 0 has 1, the ledger 2\)"),
        ([tile(0, 4), tile(1, 1)], r"tile 0 has 4, the ledger 2"),
        ([tile(0, 2)], r"1 used but in no tile \(d\)"),
        ([tile(0, 2), tile(1, 1), tile(2, 0)], r"tile 2 has 0, the ledger 0"),
    ],
)
def test_tiles_that_contradict_the_frames_are_named(tiles, fault):
    with pytest.raises(LedgerError, match=fault):
        Ledger(BOOKS).check("abcde", tiles)


def test_a_route_without_tiles_closes_by_its_files():
    Ledger(BOOKS).check("abcde")
    with pytest.raises(LedgerError, match=r"1 missing from the ledger \(f\)"):
        Ledger(BOOKS).check("abcdef")


@given(st.integers(0, 10**7), st.integers(0, 10**7), st.sampled_from(["", "it is gone"]))
def test_every_frame_has_one_fate(used, rejected, lost):
    status, reason, share = fate(used, rejected, lost)
    record = FrameRecord("x", status, reason, rejected_share=share)  # which refuses a fate without a reason
    assert (status == "rejected") == bool(lost or not used)
    assert (status == "used") == (not record.reason)
    if used + rejected:
        assert 0 <= share <= 1
    else:
        assert math.isnan(share)


def test_a_frame_that_lost_a_tenth_of_its_pixels_is_used_in_part():
    least = round(PARTIAL_SHARE * 1000)
    assert fate(1000 - least, least)[:2] == ("used", "")
    assert fate(998 - least, least + 2)[:2] == ("partial", "10% of its pixels were rejected as outliers")


RICH = FrameRecord(
    'b, "odd".fit',
    "used",
    lot=2,
    exposure=10.0,
    date_obs="2026-01-10T20:00:00",
    gain=(1.5, 1.0, 0.25),
    level=(-3.0, 0.0, math.nan),
    weight=0.75,
    fwhm=3.25,
    sky=1100.5,
    rejected_share=0.0078125,
    stars=120,
    ellipticity=0.0625,
    trailing=0.03125,
    snr=85.5,
    transparency=0.5,
    remark="dimmed: its stars have 50% of their light",
)


def test_rows_are_plain_json_with_nothing_for_the_unknown():
    rows = Ledger([RICH, FrameRecord("a.fit", "rejected", "it cannot be read")]).rows()
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert [row["file"] for row in rows] == ["a.fit", RICH.file]
    assert rows[0]["fwhm"] is None and rows[0]["gain"] == []
    assert rows[1]["level"] == [-3.0, 0.0, None]
    assert rows[1] == {**vars(RICH), "gain": [1.5, 1.0, 0.25], "level": [-3.0, 0.0, None]}


def test_the_csv_has_a_column_for_every_fact_and_unit():
    text = Ledger([RICH, FrameRecord("Lumière.fit", "rejected", "it cannot be read")]).to_csv()
    other, rich = csv.DictReader(io.StringIO(text))
    assert other["file"] == "Lumière.fit"
    assert {name for name, value in other.items() if value} == {"file", "status", "reason"}
    assert rich["file"] == RICH.file and rich["lot"] == "2" and rich["stars"] == "120"
    numbers = {"gain_r": 1.5, "gain_g": 1.0, "gain_b": 0.25, "level_r_adu": -3.0, "level_g_adu": 0.0, "weight": 0.75}
    numbers |= {"fwhm_px": 3.25, "sky_adu": 1100.5, "exposure_s": 10.0, "rejected_share": 0.0078125, "snr": 85.5}
    assert {name: float(rich[name]) for name in numbers} == numbers
    assert rich["level_b_adu"] == ""


def test_the_csv_of_a_mono_run_and_of_none():
    mono = FrameRecord("a", "used", gain=(1.25,), level=(3.0,))
    (row,) = csv.DictReader(io.StringIO(Ledger([mono]).to_csv()))
    assert (row["gain"], row["level_adu"]) == ("1.25", "3")
    assert Ledger().to_csv().strip() == ""


def test_the_table_holds_the_same_facts_and_survives_fits(tmp_path):
    Ledger([RICH, FrameRecord("a.fit", "rejected", "it cannot be read")]).to_table().write(tmp_path / "t.fits")
    table = Table.read(tmp_path / "t.fits", mask_invalid=False)
    first, rich = table
    assert first["STARS"] == -1 and np.isnan(first["TRANSPAR"])
    assert (rich["STARS"], rich["TRANSPAR"], rich["SNR"], rich["ELLIP"]) == (120, 0.5, 85.5, 0.0625)
    assert rich["REMARK"] == RICH.remark.encode() or rich["REMARK"] == RICH.remark
