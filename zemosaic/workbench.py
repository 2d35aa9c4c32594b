"""What every step of a route works with, handed on as one thing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zemosaic.calibrate import Calibration
from zemosaic.events import Events
from zemosaic.live import LivePreview
from zemosaic.resume import Results
from zemosaic.settings import Settings
from zemosaic.store import ArrayStore

if TYPE_CHECKING:
    from zemosaic.remote import RemoteLots


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """The means of a run.

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
