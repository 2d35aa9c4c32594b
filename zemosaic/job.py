"""What a route gets, and what it hands back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from zemosaic.calibrate import Calibration
from zemosaic.canvas import Canvas
from zemosaic.coadd import Sub
from zemosaic.events import Events
from zemosaic.ledger import TileRecord
from zemosaic.live import LivePreview
from zemosaic.photometry import Photometry
from zemosaic.resume import Results
from zemosaic.settings import Settings
from zemosaic.store import ArrayStore
from zemosaic.tiles import Mosaic
from zequalitymt import Verdict

if TYPE_CHECKING:
    from zemosaic.remote import RemoteLots


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """The means of a run, handed on as one thing.

    Parameters
    ----------
    settings : Settings
        Of the run.
    events : Events
        Hears what there is to tell; asked for a wish to stop.
    store : ArrayStore
        Holds tiles, in memory or memory-mapped.
    calibration : Calibration
        Master frames.
    workers : int
        Threads.
    results : Results
        Stacks of earlier runs, and where to keep those of this one.
    live : LivePreview, optional
        Shows tiles as they are finished.
    remote : RemoteLots, optional
        A cluster that stacks the lots of SDS; else this machine does.
    """

    settings: Settings
    events: Events
    store: ArrayStore
    calibration: Calibration = field(default_factory=Calibration)
    workers: int = 1
    results: Results = field(default_factory=Results)
    live: LivePreview | None = None
    remote: RemoteLots | None = None


@dataclass(frozen=True, kw_only=True)
class Job(Workbench):
    """What a route gets: matched frames and the means to stack them."""

    subs: Sequence[Sub]
    photometry: Photometry
    canvas: Canvas
    output_folder: Path
    preplan_path_groups: Sequence[Sequence[Path]] | None
    verdicts: Mapping[Path, Verdict]
    old_lots: Sequence[Sequence[Path]] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of one frame in a route: its lot, and how many of its pixels were used or rejected."""

    lot: int
    used: int
    rejected: int
    lost: str = ""


@dataclass(frozen=True)
class RouteResult:
    """What every route hands back: the mosaic, the books of frames and tiles, the steps of the polish."""

    mosaic: Mosaic
    outcomes: Sequence[Outcome]
    tiles: Sequence[TileRecord]
    history: Sequence[str]
    cards: Sequence[tuple[str, str | int | float, str]] = ()
