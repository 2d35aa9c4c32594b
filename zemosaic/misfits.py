"""Frames that do not belong with the others, though each is fine by itself; whoever is in the majority stays.

Every function takes all frames and gives one sentence a frame, empty for one that may stay.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from zemosaic.frames import Frame
from zemosaic.headers import printable
from zemosaic.measure import FrameMeasure

# The same filter under the names that capture programs give it, upper case, letters and digits only.
_SAME_FILTER = {
    "LUMINANCE": "L",
    "LUM": "L",
    "CLEAR": "L",
    "RED": "R",
    "GREEN": "G",
    "BLUE": "B",
    "HALPHA": "HA",
    "H": "HA",
    "O3": "OIII",
    "O": "OIII",
    "S2": "SII",
    "S": "SII",
}
_LEAST_SIDE = 32  # pixels
_BYTES_PER_VALUE = 24  # of a frame while it is read and measured
_UNIT_RANGE = 300.0  # noise over the usual; exposures and camera gains make it differ by some ten times
_MANY_STARS = 10  # where this many are usual, a frame of sky has at least one


def not_lights(frames: Sequence[Frame], *, tiles: bool = False) -> list[str]:
    """Darks, biases and flats, by their headers; what this program made itself, unless `tiles` lets it in."""
    calibration = "its header says that it is a {}, not a light: calibration frames are no part of a mosaic"
    reasons = []
    for frame in frames:
        if not tiles and _ours(frame):
            reasons.append("it is a mosaic or master tile made by this program, not a sub")
        else:
            reasons.append("" if frame.kind in ("light", "stack") else calibration.format(frame.kind))
    return reasons


def _ours(frame: Frame) -> bool:
    return bool(re.fullmatch(r"ZeMosaic( \d.*)?", frame.creator))


def of_another_kind(frames: Sequence[Frame]) -> list[str]:
    """Mono among colour; a stack among the single exposures that it may hold; other filters of a mono camera.

    What two filters of a mono camera let through is not the same sky: a star has another flux in each, and no gain
    makes a mosaic of both. In colour, where filters only cut parts off, they are mixed (see `filters_mixed`).
    """
    reasons = [""] * len(frames)
    for kind_of in (_colour, _stacking, _band):
        kinds = [kind_of(frame) if not reason else "" for frame, reason in zip(frames, reasons, strict=True)]
        common = max(counts := Counter(filter(None, kinds)), key=lambda kind: counts[kind], default="")
        for i, kind in enumerate(kinds):
            if kind not in ("", common):
                reasons[i] = f"it is {kind} and most frames are {common}: run it on its own"
    return reasons


def _colour(frame: Frame) -> str:
    return "mono" if frame.colour == "mono" else "in colour"


def _stacking(frame: Frame) -> str:
    return "stacked" if frame.kind == "stack" or _ours(frame) else "not stacked"


def _band(frame: Frame) -> str:
    """What a mono frame was taken through; empty in colour, and where the header does not say."""
    return f"taken through filter {_filter(frame)}" if frame.colour == "mono" and frame.filter else ""


def _filter(frame: Frame) -> str:
    plain = re.sub(r"[^A-Z0-9]", "", frame.filter.upper())
    return _SAME_FILTER.get(plain, plain)


def filters_mixed(frames: Sequence[Frame]) -> dict[str, int]:
    """Frames for each filter where colour frames come through several; empty where all agree."""
    counts = Counter(_filter(frame) for frame in frames if frame.filter and frame.colour != "mono")
    return dict(counts) if len(counts) > 1 else {}


def of_impossible_size(frames: Sequence[Frame], budget: int) -> list[str]:
    """Frames too small to be an exposure of the sky, or too large to be worked on within `budget` bytes of memory.

    1 GB is always granted: few cameras need more, and nobody gains by a small budget if every frame is refused.
    """
    small = "an image of {} x {} px is too small for a sub: leave it out"
    large = "an image of {} x {} px takes {:.1f} GB of memory and the run may use {:.1f} GB: leave it out"
    reasons = []
    for frame in frames:
        ny, nx = frame.shape
        need = ny * nx * (3 if frame.colour == "rgb" else 1) * _BYTES_PER_VALUE
        if min(frame.shape) < _LEAST_SIDE:
            reasons.append(small.format(nx, ny))
        else:
            fits = need <= max(budget, 1 << 30)
            reasons.append("" if fits else large.format(nx, ny, need / 2**30, budget / 2**30))
    return reasons


def in_other_units(measures: Sequence[FrameMeasure]) -> list[str]:
    """Frames whose values are of another order than the others', as those that were saved as 0 to 1.

    Their gains could be solved, but a gain of 65535 is no exposure's, and would be taken into the scale of the mosaic.
    """
    noises = np.array([np.median(m.noise) for m in measures])
    usual = float(np.median(noises)) if measures else 1.0
    sentence = "its pixel values are {:.2g} times those of most frames: it is saved in other units"
    return [sentence.format(n / usual) if not 1 / _UNIT_RANGE < n / usual < _UNIT_RANGE else "" for n in noises]


def without_stars(frames: Sequence[Frame], measures: Sequence[FrameMeasure]) -> list[str]:
    """Single exposures in which nothing was found, while the usual frame has stars in plenty."""
    usual = sorted(m.detected for m in measures)[len(measures) // 2] if measures else 0
    reason = f"no star is found in it and the usual frame shows {usual}: it is a dark, a flat, or of thick cloud"
    dark = [not m.detected and _stacking(f) == "not stacked" for f, m in zip(frames, measures, strict=True)]
    return [reason if usual >= _MANY_STARS and it else "" for it in dark]


def duplicates(frames: Sequence[Frame], measures: Sequence[FrameMeasure]) -> list[str]:
    """The same pixels under another name; the first of them stays, so all must be fit to be used.

    No file is read for it: that the sky and the hot pixels of two exposures agree to the last bit in a thousand
    places is impossible. So a copy is found whatever its header, its WCS and its packing.
    """
    first: dict[bytes, Frame] = {}
    reasons = []
    for frame, measure in zip(frames, measures, strict=True):
        digest = hashlib.sha256(measure.blocks.tobytes())
        digest.update(measure.repairs.index.tobytes() + measure.repairs.value.tobytes())
        original = first.setdefault(digest.digest(), frame)
        name = printable(original.path.name)
        reasons.append("" if original is frame else f"it holds the same pixels as {name}, which is used once")
    return reasons
