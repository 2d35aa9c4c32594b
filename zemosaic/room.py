"""Whether the mega-tiles of a run have room: in memory, in kept results, in scratch files. Known from headers alone.

A disk that is full is otherwise noticed when the lots are being stacked, hours after the start.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zemosaic.canvas import CanvasError
from zemosaic.settings import Settings

if TYPE_CHECKING:
    from zemosaic.layout import Sizes  # which needs the SDS route


@dataclass(frozen=True)
class Room:
    """Where the tiles of a run may lie.

    Parameters
    ----------
    resident : int
        Bytes of them that may stay in memory.
    scratch : Path
        Folder of scratch files; need not exist.
    results : Path
        Folder of kept results, in the output folder; need not exist.
    product : int
        Bytes that the disk of the output folder must have left for the product.
    """

    resident: int
    scratch: Path
    results: Path
    product: int = 0


def check_tile_room(sizes: Sizes, settings: Settings, room: Room) -> int:
    """Refuse a run of the SDS route whose mega-tiles would not find room.

    Parameters
    ----------
    sizes : Sizes
        Of the run, as far as is known.
    settings : Settings
        What is kept depends on them.
    room : Room

    Returns
    -------
    int
        Bytes of all mega-tiles.

    Raises
    ------
    zemosaic.canvas.CanvasError
        If they would not find room, with the numbers and what to do.
    """
    need = sizes.tile_px * 4 * (sizes.channels + 2)  # image, coverage and weight
    place, free = _disk_room(settings, room)
    if need > room.resident + free:
        raise CanvasError(
            f"the mega-tiles take {need / 2**30:.3g} GB, of which {room.resident / 2**30:.3g} GB stay in memory, and "
            f"{place} has {free / 2**30:.3g} GB left for the others: make room, choose another scratch folder "
            "(coadd_memmap_dir) or allow more memory (memory_gb)"
        )
    return need


def _disk_room(settings: Settings, room: Room) -> tuple[Path, float]:
    """The folder that scratch files go to, and the bytes that all disks have for tiles."""
    scratch, output = _existing(room.scratch), _existing(room.results)
    # Tiles of an earlier run count as room: they are used again, or make way.
    there = sum(path.stat().st_size for path in room.results.rglob("*.results")) if room.results.is_dir() else 0
    besides = max(0, shutil.disk_usage(output).free - room.product)
    kept = {"off": 0.0, "auto": settings.resume_cache_gb * 2**30, "force": math.inf}[settings.resume]
    kept = min(kept, besides + there)
    if scratch.stat().st_dev == output.stat().st_dev:
        return scratch, besides + (there if kept else 0)
    return scratch, shutil.disk_usage(scratch).free + kept


def _existing(folder: Path) -> Path:
    return next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
