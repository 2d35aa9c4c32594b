"""What of a run is kept for the next, and under which keys: every number that goes into a result is part of its key.

So nothing here has to know which setting touches what. A setting that is changed changes the numbers that reach a step,
and exactly the results of that step and of those behind it are made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray

from zemosaic.cache import Cache, Stamp, code_version, fingerprint
from zemosaic.calibrate import Calibration
from zemosaic.coadd import Sub, hull
from zemosaic.frames import Frame, FrameError
from zemosaic.headers import pack_wcs
from zemosaic.measure import FrameMeasure
from zemosaic.settings import Settings
from zemosaic.solve.locate import Place
from zemosaic.solve.placement import linear_tan
from zemosaic.stacking import Stack
from zemosaic.stars import Aperture
from zemosaic.tiles import Tile, Window

Made = TypeVar("Made")

#: How a stack comes about: asks for stacks of some frames, is sent them, and ends with the one that is good.
Steps = Generator[list[int], "Stack | None", Stack]

#: The settings that `stack_subs` looks at itself; all others reach it as numbers.
STACK_SETTINGS = (
    "stacking_rejection_algorithm",
    "stacking_kappa_low",
    "stacking_kappa_high",
    "stacking_final_combine_method",
)
#: The settings that decide who solves a frame, and how.
SOLVER_SETTINGS = (
    "solver_method",
    "solver_fallback",
    "astap_executable_path",
    "astap_data_directory_path",
    "astap_default_search_radius",
    "astap_default_downsample",
    "astrometry_local_path",
)
CHANGED = "it has changed since the run began: it may still be written to, run again when it is whole"


@dataclass(frozen=True)
class Results:
    """The results that a run keeps and finds; without arguments it keeps none.

    Parameters
    ----------
    cache : Cache
        Where they lie.
    stamps : mapping
        File → what it was like when its header was read. A frame without one is taken as it is.
    calibration : str
        Fingerprint of the master frames.
    names : mapping
        File → fingerprint of the file and of the WCS that was read with it, in a sidecar maybe.
    origin : tuple of int
        ``(y, x)`` on the canvas where the pixels of kept tiles are counted from: a canvas may have grown.
    """

    cache: Cache = field(default_factory=lambda: Cache(None))
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)
    calibration: str = ""
    names: Mapping[Path, str] = field(default_factory=dict)
    origin: tuple[int, int] = (0, 0)

    @classmethod
    def of_run(
        cls, cache: Cache, stamps: Mapping[Path, Stamp], calibration: Calibration, frames: Sequence[Frame] = ()
    ) -> Results:
        """With the master frames of the run, and its frames as they were read."""
        results = cls(cache, stamps, fingerprint(calibration))
        names = {f.path: fingerprint(results._source(f), _told(f.wcs)) for f in frames}
        return replace(results, names=names)

    def changed(self, frame: Frame) -> bool:
        """Whether the file is not any more what it was when its header was read."""
        stamp = self.stamps.get(frame.path)
        return stamp is not None and not stamp.fits(frame.path)

    def aperture(self, frames: Sequence[Frame], make: Callable[[], Aperture]) -> Aperture:
        """The aperture that was chosen for these frames, or is now."""
        key = self._key("zemosaic.measure", [self._source(frame) for frame in frames])
        return self._recall("aperture", key, Aperture, make)

    def measure(
        self, frame: Frame, aperture: Aperture, hot_sigma: float | None, make: Callable[[], FrameMeasure]
    ) -> FrameMeasure:
        """The measures of a frame, kept or made now.

        Raises
        ------
        FrameError
            Of `make`, and for a file that has changed since its header was read.
        """

        def made() -> FrameMeasure:
            measure = make()
            if self.changed(frame):
                raise FrameError(CHANGED, frame.path)
            return measure

        if self.changed(frame):
            raise FrameError(CHANGED, frame.path)
        key = self._key("zemosaic.measure", self._source(frame), aperture, hot_sigma)
        return self._recall("measures", key, FrameMeasure, made)

    def place(self, frame: Frame, settings: Settings, make: Callable[[], Place]) -> Place:
        """Where a solver found a frame, kept or made now; that it found nothing is not kept."""
        hints = (frame.ra, frame.dec, frame.focal_length, frame.pixel_size, frame.instrument, frame.date_obs)
        asked = [getattr(settings, name) for name in SOLVER_SETTINGS]
        key = self._key("zemosaic.solve.locate", self._source(frame), hints, asked)
        arrays = self.cache.get("places", key)
        if arrays is not None:
            return _unpack_place(arrays, frame)
        place = make()
        if place.wcs is not None:
            self.cache.put("places", key, _pack_place(place))
        return place

    def stack(
        self,
        members: Sequence[int],
        subs: Sequence[Sub],
        sky: NDArray[np.float64],
        settings: Settings,
        make: Callable[[list[int]], Stack],
        *,
        window: Window | None = None,
        mapped: bool = False,
    ) -> Callable[[], Stack]:
        """A stack of frames, kept or made now, without those that have changed since their headers were read.

        Parameters
        ----------
        members : sequence of int
            Which of `subs`.
        subs, sky, settings
            All that `make` uses of the run, but the master frames.
        make : callable
            Stacks the frames that it is given: a part of `members`.
        window : Window, optional
            Canvas pixels to make; the hull of the frames' windows if not given.
        mapped : bool
            A kept tile stays on the disk, read-only, and so does a new one as soon as it is kept.

        Returns
        -------
        callable
            To be called once, by another core maybe: keeps what was made, and returns it. Frames that changed are
            `lost`.
        """
        steps = self.steps(members, subs, sky, settings, window=window, mapped=mapped)
        asked = go_on(steps)
        made = [asked if isinstance(asked, Stack) else make(asked)]

        def finish() -> Stack:
            # Handed over without being held here: it may then be let go of as soon as it is kept.
            found = asked if isinstance(asked, Stack) else go_on(steps, made.pop())
            while not isinstance(found, Stack):  # a frame has changed meanwhile
                found = go_on(steps, make(found))
            return found

        return finish

    def steps(
        self,
        members: Sequence[int],
        subs: Sequence[Sub],
        sky: NDArray[np.float64],
        settings: Settings,
        *,
        window: Window | None = None,
        mapped: bool = False,
    ) -> Steps:
        """What `stack` does, for those who make several stacks at a time; to be driven by `go_on`."""
        gone = {i: CHANGED for i in members if self.changed(subs[i].frame)}
        while there := [i for i in members if i not in gone]:
            key = self._key("zemosaic.stacking", self._ingredients(there, subs, settings), sky, self._home(window))
            arrays = self.cache.get("tiles", key, mapped=mapped)
            if arrays is not None:
                return self._unpack(arrays, there, gone)
            stack = yield there
            assert stack is not None
            gone |= stack.lost | {i: CHANGED for i in there if self.changed(subs[i].frame)}
            if any(stack.used[i] + stack.rejected[i] for i in gone if i in stack.used):
                continue  # something of a frame that was no good is in the tile
            if gone.keys().isdisjoint(there) and self.cache.put("tiles", key, self._pack(stack)) and mapped:
                arrays = self.cache.get("tiles", key, mapped=True)
                stack = stack if arrays is None else self._unpack(arrays, there, {})
            return _with_lost(stack, gone)
        return _nothing(window or hull([subs[i].window for i in members]), len(sky), gone)

    def _ingredients(self, members: Sequence[int], subs: Sequence[Sub], settings: Settings) -> list[object]:
        """All that goes into a tile but its sky and window."""
        taken = [
            (self._source(s.frame), s.repairs, self._home(s.pixel_map), self._home(s.adjustment), s.noise, s.weight)
            for s in (subs[i] for i in members)
        ]
        return [taken, [getattr(settings, name) for name in STACK_SETTINGS]]

    def _home(self, thing: Any) -> Any:
        """A window, or something that has one, in pixels that are counted from the origin."""
        if thing is None or isinstance(thing, Window):
            return thing and thing.shift(-self.origin[0], -self.origin[1])
        return replace(thing, window=self._home(thing.window))

    def _source(self, frame: Frame) -> tuple[object, ...]:
        """What the pixels of a frame depend on."""
        stamp = self.stamps.get(frame.path)
        known = str(frame.path) if stamp is None else stamp
        return known, frame.shape, frame.colour, frame.bayer, frame.saturation

    def _pack(self, stack: Stack) -> dict[str, NDArray[Any]]:
        tile = stack.tile
        home = self._home(tile.window)
        return {
            "window": np.array([home.y0, home.y1, home.x0, home.x1]),
            "image": tile.image,
            "coverage": tile.coverage,
            "depth": tile.depth,
            "used": np.array(list(stack.used.values()), np.int64),
            "rejected": np.array(list(stack.rejected.values()), np.int64),
        }

    def _unpack(self, arrays: Mapping[str, NDArray[Any]], members: Sequence[int], gone: dict[int, str]) -> Stack:
        window = Window(*arrays["window"].tolist()).shift(*self.origin)
        tile = Tile(window, arrays["image"], arrays["coverage"], arrays["depth"])
        used, rejected = (dict(zip(members, arrays[name].tolist(), strict=True)) for name in ("used", "rejected"))
        return _with_lost(Stack(tile, used, rejected, {}), gone)

    def _key(self, module: str, *parts: object) -> str:
        return fingerprint(code_version(module), self.calibration, *parts)

    def _recall(self, kind: str, key: str, cls: type[Made], make: Callable[[], Made]) -> Made:
        arrays = self.cache.get(kind, key)
        if arrays is not None:
            return rebuild(cls, arrays)
        made = make()
        self.cache.put(kind, key, flatten(made))
        return made


def go_on(steps: Steps, made: Stack | None = None) -> list[int] | Stack:
    """Hand in the stack that was asked for (None at first); returns the frames to stack next, or the finished stack."""
    try:
        return steps.send(made)
    except StopIteration as end:
        finished: Stack = end.value
        return finished


def flatten(thing: Any, prefix: str = "") -> dict[str, NDArray[Any]]:
    """A dataclass of numbers, arrays and dataclasses of these as arrays by name: ``stars.x``."""
    arrays: dict[str, NDArray[Any]] = {}
    for item in fields(thing):
        value = getattr(thing, item.name)
        if is_dataclass(value):
            arrays |= flatten(value, f"{prefix}{item.name}.")
        else:
            arrays[f"{prefix}{item.name}"] = np.asarray(value)
    return arrays


def rebuild(cls: type[Made], arrays: Mapping[str, NDArray[Any]], prefix: str = "") -> Made:
    """What `flatten` took apart."""
    values: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        if is_dataclass(hint):
            values[name] = rebuild(hint, arrays, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            array = arrays[f"{prefix}{name}"]
            values[name] = hint(array.item()) if hint in (int, float, str, bool) else array
    return cls(**values)


def _told(wcs: WCS | None) -> object:
    """The numbers of a WCS."""
    packed = wcs and pack_wcs(wcs)
    return packed.to_header_string(relax=True) if isinstance(packed, WCS) else packed


def _pack_place(place: Place) -> dict[str, NDArray[Any]]:
    """Solvers give linear TAN; its numbers are kept to the last bit."""
    assert place.wcs is not None
    core = place.wcs.wcs
    return {
        **{name: np.array(getattr(core, name), np.float64) for name in ("crval", "crpix", "cd")},
        "found": np.array([place.residual, place.matched]),
        "source": np.array(place.source),
    }


def _unpack_place(arrays: Mapping[str, NDArray[Any]], frame: Frame) -> Place:
    wcs = linear_tan(arrays["crval"], arrays["crpix"], arrays["cd"], frame.shape)
    residual, matched = arrays["found"].tolist()
    return Place(wcs, arrays["source"].item(), True, residual, int(matched))


def _with_lost(stack: Stack, gone: dict[int, str]) -> Stack:
    none = dict.fromkeys(gone, 0)
    return Stack(stack.tile, stack.used | none, stack.rejected | none, stack.lost | gone)


def _nothing(window: Window, channels: int, gone: dict[int, str]) -> Stack:
    shape = (*window.shape, channels) if channels == 3 else window.shape
    tile = Tile(window, np.full(shape, np.nan, np.float32), *(np.zeros(window.shape, np.float32) for _ in range(2)))
    return Stack(tile, dict.fromkeys(gone, 0), dict.fromkeys(gone, 0), gone)
