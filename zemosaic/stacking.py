"""A group of frames into one tile, as every route does it: read and mend them, then coadd as the settings say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from zemosaic.calibrate import Calibration, prepare
from zemosaic.coadd import Coadd, Sub, coadd
from zemosaic.combine import Clip
from zemosaic.events import Events
from zemosaic.execute import thread_map
from zemosaic.frames import FrameError
from zemosaic.settings import Settings
from zemosaic.store import ArrayStore
from zemosaic.tiles import FloatImage, Window


def load_pixels(
    members: Iterable[int],
    subs: Sequence[Sub],
    calibration: Calibration,
    events: Events,
    store: ArrayStore,
    workers: int,
) -> tuple[dict[int, FloatImage], dict[int, str]]:
    """Prepared pixels of some frames, in the order of `members`, and why others cannot be read any more."""
    lost: dict[int, str] = {}

    def load(i: int) -> FloatImage | None:
        events.check_stop()
        try:
            return store.keep(prepare(subs[i].frame, calibration, subs[i].repairs)[0])
        except FrameError as problem:
            lost[i] = str(problem)
            return None

    members = list(members)
    loaded = dict(zip(members, thread_map(load, members, workers), strict=True))
    return {i: pixels for i, pixels in loaded.items() if pixels is not None}, lost


def stack_subs(
    subs: Sequence[Sub],
    pixels: Sequence[FloatImage],
    sky: NDArray[np.float64],
    settings: Settings,
    events: Events,
    store: ArrayStore,
    *,
    workers: int = 1,
    window: Window | None = None,
) -> Coadd:
    """Coadd frames with the ``stacking_*`` settings; `store` is where their pixels are kept."""
    return coadd(
        subs,
        pixels,
        sky,
        Clip(settings.stacking_rejection_algorithm, settings.stacking_kappa_low, settings.stacking_kappa_high),
        use_median=settings.stacking_final_combine_method == "median",
        workers=workers,
        window=window,
        check_stop=events.check_stop,
        rest=store.release,
    )
