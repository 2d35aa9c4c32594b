"""The books of a run: what became of every frame, and of every mega-tile or master tile.

A frame that was found is used, used in part, or rejected with a reason, exactly once: `Ledger.check`
says so or raises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from astropy import units as u
from astropy.table import Table
from numpy.typing import NDArray

from zemosaic.tiles import Window

Status = Literal["used", "partial", "rejected"]


class LedgerError(ValueError):
    """The books do not balance."""


@dataclass(frozen=True)
class FrameRecord:
    """What became of one sub.

    Parameters
    ----------
    file : str
        Its path or name, the same words that `Ledger.check` gets.
    status : {"used", "partial", "rejected"}
        "partial" frames are used, but not with all that they cover.
    reason : str
        Why it was not fully used; "" for a used one.
    lot : int
        Index of its lot, -1 for none.
    exposure : float
        Seconds; NaN where unknown.
    date_obs : str
        Start of the exposure, ISO 8601, UTC; "" where unknown.
    gain, level : tuple of float
        Per channel: factor that was applied, and level (ADU) that was subtracted. Empty if never
        measured.
    weight : float
        In the coadd, relative to the other subs.
    fwhm : float
        Pixels.
    sky : float
        ADU.
    rejected_share : float
        Share of its pixels that rejection left out, 0 to 1.
    """

    file: str
    status: Status
    reason: str = ""
    lot: int = -1
    exposure: float = np.nan
    date_obs: str = ""
    gain: tuple[float, ...] = ()
    level: tuple[float, ...] = ()
    weight: float = np.nan
    fwhm: float = np.nan
    sky: float = np.nan
    rejected_share: float = np.nan

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(f"{self.file}: no such status as {self.status!r}")
        if self.status != "used" and not self.reason:
            raise ValueError(f"{self.file} is {self.status}: a reason is needed")


@dataclass(frozen=True)
class TileRecord:
    """One mega-tile (or master tile).

    Parameters
    ----------
    index : int
        Of the lot that it was made of.
    window : Window
        Where it lies on the canvas, before any crop of the mosaic.
    frames : int
        Subs that it is made of.
    median : float
        Robust median of its covered pixels, ADU, before `gain`.
    gain : float
        Factor that brought it to the scale of the reference tile.
    seconds : float
        Time that it took.
    """

    index: int
    window: Window
    frames: int
    median: float
    gain: float
    seconds: float


class Ledger:
    """Collects one `FrameRecord` for every frame of a run."""

    def __init__(self, records: Iterable[FrameRecord] = ()) -> None:
        self._records: list[FrameRecord] = list(records)

    def add(self, record: FrameRecord) -> None:
        """Enter one frame."""
        self._records.append(record)

    def __iter__(self) -> Iterator[FrameRecord]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def used(self) -> list[FrameRecord]:
        """The frames whose light is in the mosaic, wholly or in part."""
        return [record for record in self if record.status != "rejected"]

    def counts(self) -> dict[str, int]:
        """How many frames have each status; every status is there."""
        found = Counter(record.status for record in self)
        return {status: found[status] for status in get_args(Status)}

    def check(self, expected_files: Iterable[str]) -> None:
        """Make sure that every expected file is entered exactly once, and nothing else.

        Parameters
        ----------
        expected_files : iterable of str
            Every file that the run found.

        Raises
        ------
        LedgerError
            Names files that are missing, entered twice or never expected.
        """
        entered = Counter(record.file for record in self)
        expected = set(expected_files)
        faults = {
            "missing from the ledger": sorted(expected - entered.keys()),
            "in the ledger more than once": sorted(file for file, times in entered.items() if times > 1),
            "in the ledger but never found": sorted(entered.keys() - expected),
        }
        words = [f"{len(files)} {what} ({_some(files)})" for what, files in faults.items() if files]
        if words:
            raise LedgerError("the books do not balance: " + "; ".join(words))

    def to_table(self) -> Table:
        """One row per frame, sorted by file.

        Returns
        -------
        astropy.table.Table
            GAIN and LEVEL hold a vector per row if the frames are in colour. Text is ASCII (other
            characters as ``\\xe9``, ``\\u03b1``); what is unknown is NaN.
        """
        rows = sorted(self, key=lambda record: record.file)
        channels = max([1, *(max(len(row.gain), len(row.level)) for row in rows)])
        table = Table(
            {
                "FILE": _text([row.file for row in rows]),
                "LOT": np.array([row.lot for row in rows], np.int32),
                "STATUS": _text([row.status for row in rows]),
                "REASON": _text([row.reason for row in rows]),
                "GAIN": _vectors([row.gain for row in rows], channels),
                "LEVEL": _vectors([row.level for row in rows], channels),
                "WEIGHT": np.array([row.weight for row in rows], float),
                "FWHM": np.array([row.fwhm for row in rows], float),
                "SKY": np.array([row.sky for row in rows], float),
                "EXPOSURE": np.array([row.exposure for row in rows], float),
                "DATE_OBS": _text([row.date_obs for row in rows]),
                "REJECTED": np.array([row.rejected_share for row in rows], float),
            }
        )
        table["EXPOSURE"].unit = u.s
        table["FWHM"].unit = u.pix
        table["LEVEL"].unit = table["SKY"].unit = u.adu
        return table


def tile_table(tiles: Sequence[TileRecord]) -> Table:
    """One row per tile, in the order given; windows in canvas pixels, half-open, counted from 0."""
    table = Table(
        {
            "TILE": np.array([tile.index for tile in tiles], np.int32),
            "Y0": np.array([tile.window.y0 for tile in tiles], np.int32),
            "Y1": np.array([tile.window.y1 for tile in tiles], np.int32),
            "X0": np.array([tile.window.x0 for tile in tiles], np.int32),
            "X1": np.array([tile.window.x1 for tile in tiles], np.int32),
            "FRAMES": np.array([tile.frames for tile in tiles], np.int32),
            "MEDIAN": np.array([tile.median for tile in tiles], float),
            "GAIN": np.array([tile.gain for tile in tiles], float),
            "SECONDS": np.array([tile.seconds for tile in tiles], float),
        }
    )
    table["MEDIAN"].unit = u.adu
    table["SECONDS"].unit = u.s
    return table


def _text(words: Sequence[str]) -> NDArray[np.bytes_]:
    """ASCII bytes of one width, never of width 0 (which FITS readers stumble over)."""
    encoded = [word.encode("ascii", "backslashreplace") for word in words]
    return np.array(encoded, dtype=f"S{max([1, *map(len, encoded)])}")


def _vectors(values: Sequence[tuple[float, ...]], channels: int) -> NDArray[np.float64]:
    """``(n,)`` for one channel, else ``(n, channels)``; NaN where a frame has no value."""
    filled = np.full((len(values), channels), np.nan)
    for row, value in zip(filled, values, strict=True):
        row[: len(value)] = value
    return filled[:, 0] if channels == 1 else filled


def _some(files: Sequence[str], most: int = 3) -> str:
    return ", ".join(files[:most]) + (", ..." if len(files) > most else "")
