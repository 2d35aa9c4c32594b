"""The books of a run: what became of every frame, and of every mega-tile or master tile.

A frame that was found is used, used in part, or rejected with a reason, exactly once, and every tile is made of
frames that are in the books: `Ledger.check` says so or raises.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import numpy as np
from astropy import units as u
from astropy.table import Table
from numpy.typing import NDArray

from zemosaic.tiles import Window

Status = Literal["used", "partial", "rejected"]
Entry = str | int | float | None

#: A frame that lost more of its pixels than this is used in part. Satellites and cosmic rays take a hundredth at most.
PARTIAL_SHARE = 0.1

_UNITS = {"exposure": "_s", "level": "_adu", "fwhm": "_px", "sky": "_adu"}  # of the columns of the CSV


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
    stars : int
        Sources found; -1 if never measured.
    ellipticity, trailing, snr, transparency : float
        See `zequalitymt.FrameMetrics`.
    remark : str
        What was noticed but did not keep it out.
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
    stars: int = -1
    ellipticity: float = np.nan
    trailing: float = np.nan
    snr: float = np.nan
    transparency: float = np.nan
    remark: str = ""

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(f"{self.file}: no such status as {self.status!r}")
        if self.status != "used" and not self.reason:
            raise ValueError(f"{self.file} is {self.status}: a reason is needed")


def fate(used: int, rejected: int, lost: str = "") -> tuple[Status, str, float]:
    """What became of a frame that reached the stack.

    Parameters
    ----------
    used, rejected : int
        Its pixels that contributed, and that were rejected.
    lost : str
        Why it could not be used after all.

    Returns
    -------
    status : {"used", "partial", "rejected"}
    reason : str
        "" for a used one.
    share : float
        Share of its pixels that were rejected, NaN if it has none.
    """
    share = rejected / (used + rejected) if used + rejected else math.nan
    if lost or not used:
        return "rejected", lost or "none of its pixels was used", share
    if share > PARTIAL_SHARE:
        return "partial", f"{share:.0%} of its pixels were rejected as outliers", share
    return "used", "", share


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

    def check(self, expected_files: Iterable[str], tiles: Sequence[TileRecord] = ()) -> None:
        """Make sure that every expected file is entered exactly once, and nothing else, and that the tiles agree.

        Parameters
        ----------
        expected_files : iterable of str
            Every file that the run found.
        tiles : sequence of TileRecord
            What the mosaic is made of, if it has tiles: a used frame must be in the lot of one of them, and a tile
            is made of the used frames of its lot and at most those that gave no pixel.

        Raises
        ------
        LedgerError
            Names files that are missing, entered twice or never expected, and tiles that do not agree.
        """
        entered = Counter(record.file for record in self)
        expected = set(expected_files)
        faults = {
            "missing from the ledger": sorted(expected - entered.keys()),
            "in the ledger more than once": sorted(file for file, times in entered.items() if times > 1),
            "in the ledger but never found": sorted(entered.keys() - expected),
            **self._against(tiles),
        }
        words = [f"{len(files)} {what} ({_some(files)})" for what, files in faults.items() if files]
        if words:
            raise LedgerError("the books do not balance: " + "; ".join(words))

    def _against(self, tiles: Sequence[TileRecord]) -> dict[str, list[str]]:
        """Where the frames contradict the tiles, by the kind of contradiction."""
        if not tiles:
            return {}
        used, all_of = Counter(record.lot for record in self.used), Counter(record.lot for record in self)
        known = {tile.index for tile in tiles}
        odd = [tile for tile in tiles if not max(1, used[tile.index]) <= tile.frames <= all_of[tile.index]]
        return {
            "used but in no tile": sorted(record.file for record in self.used if record.lot not in known),
            "tiles with another number of frames than the ledger": [
                f"tile {tile.index} has {tile.frames}, the ledger {used[tile.index]}" for tile in odd
            ],
        }

    def rows(self) -> list[dict[str, Entry | list[Entry]]]:
        """One dictionary per frame, sorted by file, ready for JSON: tuples are lists, what is unknown is None.

        The keys are the fields of `FrameRecord`.
        """
        return [
            {name: [*map(_known, v)] if isinstance(v, tuple) else _known(v) for name, v in asdict(record).items()}
            for record in sorted(self, key=lambda record: record.file)
        ]

    def to_csv(self) -> str:
        """One line per frame, sorted by file, below a line of column names.

        Gain and level have a column for each channel (``gain_r``, ``gain_g``, ``gain_b``; ``gain`` if there is only
        one); what is unknown is empty.
        """
        channels = max([1, *(max(len(record.gain), len(record.level)) for record in self)])
        endings = ["_r", "_g", "_b"][:channels] if channels > 1 else [""]
        lines = [dict(_cells(row, endings)) for row in self.rows()]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return text.getvalue()

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
                "STARS": np.array([row.stars for row in rows], np.int32),
                "ELLIP": np.array([row.ellipticity for row in rows], float),
                "TRAILING": np.array([row.trailing for row in rows], float),
                "SNR": np.array([row.snr for row in rows], float),
                "TRANSPAR": np.array([row.transparency for row in rows], float),
                "REMARK": _text([row.remark for row in rows]),
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


def _known(value: Entry) -> Entry:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cells(row: dict[str, Entry | list[Entry]], endings: Sequence[str]) -> Iterator[tuple[str, Entry]]:
    """Column name and content; a list takes as many columns as there are `endings`."""
    for name, value in row.items():
        values = [*value, *[None] * len(endings)] if isinstance(value, list) else [value]
        for ending, one in zip(endings if isinstance(value, list) else [""], values, strict=False):
            unknown = name in ("lot", "stars") and one == -1
            yield (
                f"{name}{ending}{_UNITS.get(name, '')}",
                (None if unknown else f"{one:.6g}" if isinstance(one, float) else one),
            )


def _some(files: Sequence[str], most: int = 3) -> str:
    return ", ".join(files[:most]) + (", ..." if len(files) > most else "")
