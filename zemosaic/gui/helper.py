"""The process that looks at subs for the window: headers, measures, thumbnails, coverage, lots. No Qt here.

Requests come in as lines of JSON on stdin, ``{"job": N, "what": NAME, ...}``; every answer is a line that carries the
same ``job``, the last one with ``"done": true``. ``{"what": "cancel", "target": N}`` ends job N early. Frames are
numbered in the order of the scan. Started as ``python -m zemosaic.gui.helper``.
"""

from __future__ import annotations

import base64
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO, cast

import numpy as np
from numpy.typing import NDArray

from zemosaic.canvas import find_strays, footprint, plan_canvas
from zemosaic.events import Events
from zemosaic.frames import Frame, FrameError, find_files, read_pixels
from zemosaic.gui.protocol import json_line
from zemosaic.intake import scan
from zemosaic.preview import encode_png
from zemosaic.settings import settings_from
from zemosaic.sphere import to_radec
from zemosaic.tiles import FloatImage

_CHUNK = 50  # rows to one answer: the window takes one in well under a frame of the screen
_DEPTH_SIDE = 700  # pixels of the longer side of the coverage map
_FRAME_DISTANCE = 90.0  # degrees from the middle at which a footprint is no longer drawn

Say = Callable[..., None]


@dataclass(frozen=True)
class Stretch:
    """One tone for several subs: sky ``(C,)`` and depth of the noise, ADU."""

    sky: FloatImage
    noise: float

    def apply(self, image: FloatImage) -> NDArray[np.uint8]:
        """Picture ``(h, w, 4)`` uint8 of an image ``(h, w, C)``: the sky of the first sub becomes dark grey."""
        signal = (image - self.sky) / (12 * self.noise)
        tone = 0.16 + 0.84 * np.arcsinh(np.nan_to_num(signal)) / math.asinh(60)
        rgb = np.broadcast_to(np.clip(255 * tone, 0, 255).astype(np.uint8), (*image.shape[:2], 3))
        return np.concatenate([rgb, np.full((*image.shape[:2], 1), 255, np.uint8)], axis=-1)


class Desk:
    """What the helper knows: the frames of the last scan.

    Parameters
    ----------
    out : text file
        Where the answers go.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lock = threading.Lock()
        self._frames: list[Frame | None] = []
        self._outlines: list[NDArray[np.float64] | None] = []
        self._middle: NDArray[np.float64] | None = None  # unit vector of the plane's centre
        self._cancelled: set[int] = set()
        self._slow, self._quick = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def handle(self, request: Mapping[str, Any]) -> None:
        """Start a job; `cancel` acts at once."""
        if request["what"] == "cancel":
            self._cancelled.add(request["target"])
            return
        slow = {"scan": self.scan, "measure": self.measure, "lots": self.lots}
        quick = {"thumbs": self.thumbs, "coverage": self.coverage}
        name = request["what"]
        work = (slow | quick)[name]
        pool = self._slow if name in slow else self._quick
        pool.submit(self._run, work, request)

    def finish(self) -> None:
        """Wait for what was asked."""
        self._slow.shutdown()
        self._quick.shutdown()

    def _run(self, work: Callable[[Mapping[str, Any], Say], None], request: Mapping[str, Any]) -> None:
        job = request["job"]

        def say(**answer: Any) -> None:
            if job in self._cancelled:
                raise _Cancelled
            with self._lock:
                self._out.write(json_line({"job": job, **answer}))
                self._out.flush()

        try:
            work(request, say)
            say(done=True)
        except _Cancelled:
            return
        except Exception as problem:  # whatever it is: the window must hear of it instead of waiting for ever
            say(done=True, error=str(problem) or type(problem).__name__)

    def scan(self, request: Mapping[str, Any], say: Say) -> None:
        """``inputs`` → ``rows`` in chunks, then ``reasons`` of frames that are of another field."""
        self._frames, self._outlines, self._middle = [], [], None
        files = find_files([Path(path) for path in request["inputs"]])
        say(total=len(files))
        for chunk in _chunks(files):
            rows = [self._row(path) for path in chunk]
            middle = None if self._middle is None else to_radec(self._middle)
            say(rows=rows, middle=middle)
        placed = [i for i, frame in enumerate(self._frames) if frame is not None and frame.wcs is not None]
        strays = find_strays([cast(Frame, self._frames[i]) for i in placed])
        say(reasons={i: reason for i, reason in zip(placed, strays, strict=True) if reason})

    def _row(self, path: Path) -> dict[str, Any]:
        self._outlines.append(None)
        found = scan([path], 1, Events())  # the engine's own verdict on the file
        if not found.frames:
            self._frames.append(None)
            return {"path": str(path), "problem": next(iter(found.rejected.values()), "")}
        frame = found.frames[0]
        self._frames.append(frame)
        row = {
            "path": str(path),
            "date": frame.date_obs,
            "night": night_of(frame.date_obs),
            "exposure": frame.exposure,
            "instrument": frame.instrument,
            "filter": frame.filter,
            "object": frame.object,
            "wcs": frame.wcs_source or "",
        }
        if frame.wcs is None:
            return row | {"problem": frame.wcs_problem, "unsolved": True}
        outline = footprint(frame.wcs, frame.shape, points=2)
        if not np.isfinite(outline).all():
            return row | {"wcs": "", "problem": "its WCS does not map its corners onto the sky"}
        if self._middle is None:
            self._middle = outline.mean(axis=0) / np.linalg.norm(outline.mean(axis=0))
        self._outlines[-1] = flat = on_plane(outline, self._middle).round(6)
        return row | {"outline": flat.tolist()}

    def measure(self, request: Mapping[str, Any], say: Say) -> None:
        """``ids`` → ``measures``: id → FWHM (px), stars, sky (ADU); a frame that cannot be read has a ``problem``."""
        from zemosaic.calibrate import Calibration
        from zemosaic.execute import one_thread_each
        from zemosaic.measure import choose_aperture, measure_frame

        frames = {i: frame for i in request["ids"] if (frame := self._frames[i]) is not None}
        if not frames:
            return
        calibration = Calibration()
        with one_thread_each():
            aperture = choose_aperture(list(frames.values()), calibration)
            for i, frame in frames.items():
                try:
                    made = measure_frame(frame, calibration, aperture)
                except FrameError as problem:
                    say(measures={i: {"problem": str(problem)}})
                    continue
                sky = float(np.mean(made.sky))
                say(measures={i: {"fwhm": made.fwhm, "stars": made.detected, "sky": sky}})

    def thumbs(self, request: Mapping[str, Any], say: Say) -> None:
        """``ids``, ``size`` → one PNG each, all in the tone of the first."""
        stretch: Stretch | None = None
        for i in request["ids"]:
            frame = self._frames[i]
            if frame is None:
                continue
            try:
                image = shrink(read_pixels(frame), frame.bayer, request["size"])
            except FrameError as problem:
                say(id=i, problem=str(problem))
                continue
            stretch = stretch or measure_stretch(image)
            say(id=i, png=_base64(stretch.apply(image)[::-1]))  # FITS counts rows upwards, pictures downwards

    def coverage(self, request: Mapping[str, Any], say: Say) -> None:
        """``ids`` → a PNG of how many of these frames cover each point, and the greatest number."""
        depth = depth_map([outline for i in request["ids"] if (outline := self._outlines[i]) is not None])
        if depth is not None:
            say(png=_base64(colour_depth(depth)), deepest=int(depth.max()))

    def lots(self, request: Mapping[str, Any], say: Say) -> None:
        """``ids``, ``settings`` → the lots that the engine itself would make of these frames."""
        import zemosaic_sds
        from zemosaic.warp import pixel_map

        settings, _ = settings_from(request["settings"])
        ids = [i for i in request["ids"] if self._usable(i)]
        frames = [cast(Frame, self._frames[i]) for i in ids]
        if not frames:
            raise ValueError("no sub has a WCS: solve them first")
        order = sorted(range(len(ids)), key=lambda k: (frames[k].date_obs, frames[k].path.name, str(frames[k].path)))
        canvas = plan_canvas(frames, settings)
        subs = []
        for k in order:
            frame = frames[k]
            mapped = pixel_map(frame.wcs, frame.shape, canvas.wcs, canvas.window_of(frame))
            subs.append(SimpleNamespace(frame=frame, pixel_map=mapped, window=mapped.window))
            if len(subs) % _CHUNK == 0:
                say(progress=len(subs) / len(order))
        planned = zemosaic_sds.plan_lots(cast(Any, subs), canvas, settings, Events())
        say(lots=[[ids[order[member]] for member in lot.members] for lot in planned])

    def _usable(self, i: int) -> bool:
        frame = self._frames[i]
        return frame is not None and frame.wcs is not None


class _Cancelled(Exception):
    """The window no longer wants the answer."""


def night_of(date_obs: str) -> str:
    """The date on which the night of an observation began: UTC less half a day; empty where the date is unknown."""
    try:
        return str((datetime.fromisoformat(date_obs[:19]) - timedelta(hours=12)).date())
    except ValueError:
        return ""


def on_plane(vectors: NDArray[np.float64], middle: NDArray[np.float64]) -> NDArray[np.float64]:
    """Azimuthal equidistant projection: defined all over the sky, so that a stray sub has a place too.

    Parameters
    ----------
    vectors : ndarray
        ``(n, 3)`` unit vectors.
    middle : ndarray
        ``(3,)`` unit vector of the centre.

    Returns
    -------
    ndarray
        ``(n, 2)`` degrees: x to the west, as the sky is seen, y to the north (Calabretta & Greisen 2002, ARC).
    """
    west = np.array([middle[1], -middle[0], 0.0])
    length = float(np.linalg.norm(west))
    west = west / length if length > 1e-9 else np.array([1.0, 0.0, 0.0])  # at a pole any direction will do
    north = np.cross(west, middle)
    x, y, z = vectors @ west, vectors @ north, vectors @ middle
    flat = np.hypot(x, y)
    away = np.rad2deg(np.arctan2(flat, z))
    scale = np.divide(away, flat, out=np.full_like(away, np.rad2deg(1.0)), where=flat > 0)
    return np.stack([x * scale, y * scale], axis=-1)


def shrink(pixels: FloatImage, bayer: str | None, size: int) -> FloatImage:
    """A small picture of a sub ``(h, w, C)``, its longer side near `size`; a Bayer cell becomes one pixel."""
    import cv2

    if bayer is not None:
        ny, nx = (length // 2 * 2 for length in pixels.shape)
        cells = {"R": [], "G": [], "B": []}  # type: dict[str, list[FloatImage]]
        for k, letter in enumerate(bayer):
            cells[letter].append(pixels[k // 2 : ny : 2, k % 2 : nx : 2])
        pixels = np.stack([np.mean(cells[letter], axis=0) for letter in "RGB"], axis=-1)
    image = np.atleast_3d(pixels)
    factor = min(1.0, size / max(image.shape[:2]))
    wanted = max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor))
    small = cv2.resize(np.nan_to_num(image, nan=float(np.nanmedian(image))), wanted, interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32).reshape(wanted[1], wanted[0], -1)


def measure_stretch(image: FloatImage) -> Stretch:
    """The tone of a picture ``(h, w, C)``: its sky, and the noise from the scatter around it."""
    sky = np.median(image, axis=(0, 1))
    noise = 1.4826 * float(np.median(np.abs(image - sky)))
    return Stretch(sky.astype(np.float32), noise or 1.0)


def depth_map(outlines: Sequence[NDArray[np.float64]]) -> NDArray[np.int32] | None:
    """How many frames cover each point, ``(h, w)``, north up; frames far away from the others are left out."""
    import cv2

    near = [outline for outline in outlines if np.hypot(*outline.T).max() < _FRAME_DISTANCE]
    if not near:
        return None
    points = np.concatenate(near)
    low, high = points.min(axis=0), points.max(axis=0)
    scale = (_DEPTH_SIDE - 1) / max(*(high - low), 1e-9)
    width, height = (math.ceil(float(span) * scale) + 1 for span in (high - low))
    depth = np.zeros((height, width), np.int32)
    for outline in near:
        xy = np.rint((outline - low) * scale).astype(np.int32)
        (x0, y0), (x1, y1) = xy.min(axis=0), xy.max(axis=0) + 1
        mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
        cv2.fillConvexPoly(mask, xy - (x0, y0), 1)
        depth[y0:y1, x0:x1] += mask
    return depth[::-1]


_DEPTH_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 144, 141), (93, 201, 99), (253, 231, 37))


def colour_depth(depth: NDArray[np.int32]) -> NDArray[np.uint8]:
    """The depth as a picture ``(h, w, 4)``; transparent where nothing is."""
    stops = np.linspace(0, 1, len(_DEPTH_COLOURS))
    share = depth / max(1, int(depth.max()))
    channels = [np.interp(share, stops, [colour[c] for colour in _DEPTH_COLOURS]) for c in range(3)]
    return np.stack([*channels, np.where(depth > 0, 255, 0)], axis=-1).astype(np.uint8)


def _base64(rgba: NDArray[np.uint8]) -> str:
    return base64.b64encode(encode_png(np.ascontiguousarray(rgba))).decode("ascii")


def _chunks(files: Sequence[Path]) -> Iterator[Sequence[Path]]:
    yield files[:1]  # the first one at once: the window sees that something happens
    for start in range(1, len(files), _CHUNK):
        yield files[start : start + _CHUNK]


def main(lines: Iterable[str], out: TextIO) -> None:
    """Answer requests until there are none."""
    desk = Desk(out)
    for line in lines:
        desk.handle(json.loads(line))


if __name__ == "__main__":
    main(sys.stdin, sys.stdout)
    os._exit(0)  # the window is gone: nobody waits for what is still being done
