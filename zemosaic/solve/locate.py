"""Every frame finds its place: check what headers claim, solve the rest, then make all agree.

Nothing is trusted: a WCS from a header or a sidecar is held against the catalogue and the frame's own stars. But a sky
that the catalogue does not know (as in simulations) must not cost good frames their WCS: if no frame of the run can be
confirmed and none of a sample can be solved, the headers are believed, and only checked against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from astropy.wcs import WCS

from zemosaic.canvas import pixel_scale
from zemosaic.events import Events
from zemosaic.execute import thread_map
from zemosaic.frames import Frame, FrameError, read_pixels
from zemosaic.measure import FrameMeasure
from zemosaic.settings import Settings
from zemosaic.solve.astap import AstapOptions, astap_options, solve_astap
from zemosaic.solve.astrometry_net import AstrometryOptions, astrometry_options, solve_astrometry_net
from zemosaic.solve.catalogue import Catalogue, load_catalogue
from zemosaic.solve.embedded import SolveError, solve
from zemosaic.solve.external import Solver, solver_order
from zemosaic.solve.field import Observation
from zemosaic.solve.hint import Hint, hint_of
from zemosaic.solve.placement import brightest_first
from zemosaic.solve.refine import RefinedFrame, Refinement, refine
from zemosaic.solve.siblings import Sibling, place_among
from zemosaic.solve.verify import verify
from zemosaic.sphere import to_radec, to_vectors

Source = Literal["header", "sidecar", "embedded", "astap", "astrometry", "neighbours"]

_SAMPLE = 3  # frames whose failure shows that the catalogue does not know this sky
_HOPELESS = 4  # frames that were not found anywhere on the sky, after which nobody looks that far any more
_ENOUGH = 12  # stars with which a WCS that came with a frame may be corrected
_KIN = 9  # frames that tell about another of the same camera
_NEAR_OTHERS = 5.0  # degrees around frames that were solved


@dataclass(frozen=True, eq=False)
class Place:
    """Where a frame is, and how that is known.

    Parameters
    ----------
    wcs : WCS or None
        None if it could not be found.
    source : str or None
        ``header`` or ``sidecar``: as the file came, perhaps corrected a little; a solver; or ``neighbours``.
    checked : bool
        Whether the catalogue or other frames confirm it.
    residual : float
        rms distance of its stars from the merged catalogue, pixels; NaN if unknown.
    matched : int
        Stars that this is taken from.
    reason : str
        Why there is none, or why it cannot be trusted; else empty.
    """

    wcs: WCS | None
    source: Source | None
    checked: bool = False
    residual: float = float("nan")
    matched: int = 0
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Places:
    """What became of all frames, and how well they agree: see `refine`."""

    frames: tuple[Place, ...]
    agreement: Refinement | None


def locate(
    frames: Sequence[Frame],
    measures: Sequence[FrameMeasure],
    settings: Settings,
    events: Events,
    *,
    workers: int = 1,
    said: Mapping[Path, Place] | None = None,
    recall: Callable[[Frame, Callable[[], Place]], Place] = lambda _, make: make(),
) -> Places:
    """Find, check and refine the WCS of all frames of a run.

    Parameters
    ----------
    frames : sequence of Frame
        With the WCS of their header or sidecar, if any.
    measures : sequence of FrameMeasure
        Their stars.
    settings : Settings
        The ``solver_*`` settings; ``solver_method = "none"`` leaves everything as it came.
    events : Events
        Hears of the progress.
    workers : int
        Threads.
    said : mapping, optional
        File → what `header_check` has said of its WCS, as far as that was asked before.
    recall : callable
        Gets a frame and what solves it; returns an earlier solution of the same frame, or makes it.

    Raises
    ------
    SolveError
        If the solver that was chosen is not installed and no other may take its place.
    """
    order = solver_order(settings)
    if not order:
        return Places(tuple(_as_it_came(frame) for frame in frames), None)
    if settings.solver_method not in ("auto", order[0]):
        events.warning("run_warn_solver_missing", wanted=settings.solver_method, used=order[0])
    catalogue = load_catalogue()
    places = _believed(frames, measures, said or {}, settings, events, workers)
    todo = [i for i, place in enumerate(places) if place.wcs is None or place.reason]
    if todo:
        solved = _Solving(frames, measures, catalogue, order, settings, events, workers, recall).all_of(todo, places)
        places = [solved.get(i, place) for i, place in enumerate(places)]
    known = any(place.checked for place in places)
    found = refine(_observations(frames, measures, places), catalogue if known else None)
    return Places(tuple(_settled(place, one) for place, one in zip(places, found.frames, strict=True)), found)


def _as_it_came(frame: Frame) -> Place:
    return Place(frame.wcs, frame.wcs_source, reason="" if frame.wcs is not None else _missing(frame))


def _missing(frame: Frame) -> str:
    return frame.wcs_problem or "it has no WCS"


def header_check(settings: Settings) -> Callable[[Frame, FrameMeasure], Place] | None:
    """What tells, of one frame, its own WCS, with a reason where its stars speak against it; None if nobody asks.

    Nor where the solver that was chosen is missing: that is for `locate` to say.
    """
    try:
        if not solver_order(settings):
            return None
    except SolveError:
        return None
    catalogue = load_catalogue()

    def check(frame: Frame, measure: FrameMeasure) -> Place:
        stars = measure.stars
        if frame.wcs is None or settings.force_resolve_existing_wcs:
            return Place(None, None, reason=_missing(frame))
        found = verify(frame.wcs, stars.x, stars.y, stars.flux, frame.shape, catalogue)
        why = "its WCS does not fit its stars" if found.state == "wrong" else ""
        return Place(frame.wcs, frame.wcs_source, found.state == "good", found.rms, found.matched, why)

    return check


def _believed(
    frames: Sequence[Frame],
    measures: Sequence[FrameMeasure],
    said: Mapping[Path, Place],
    settings: Settings,
    events: Events,
    workers: int,
) -> list[Place]:
    """What headers and sidecars say."""
    check = header_check(settings)
    assert check is not None

    def one(pair: tuple[Frame, FrameMeasure]) -> Place:
        events.check_stop()
        return said.get(pair[0].path) or check(*pair)

    return list(thread_map(one, list(zip(frames, measures, strict=True)), workers))


@dataclass(frozen=True)
class _Solving:
    """All that solving frames takes."""

    frames: Sequence[Frame]
    measures: Sequence[FrameMeasure]
    catalogue: Catalogue
    order: Sequence[Solver]
    settings: Settings
    events: Events
    workers: int
    recall: Callable[[Frame, Callable[[], Place]], Place]

    def all_of(self, todo: Sequence[int], places: Sequence[Place]) -> dict[int, Place]:
        """New places for the frames in `todo`; those that are not found keep what they had.

        First all near their hints; then those that are left near the others, and at last anywhere on the sky.
        """
        doubted = [i for i in todo if places[i].wcs is not None]
        if doubted and not any(place.checked for place in places):
            # No header of the run is confirmed. Before all are thrown away, a few must turn out to be elsewhere.
            sample = doubted[:: max(1, len(doubted) // _SAMPLE)][:_SAMPLE]
            tried = self._near(sample)
            if not any(place.wcs is not None for place in tried.values()):
                self.events.info("run_info_sky_unknown", frames=len(doubted))
                believed = {i: Place(places[i].wcs, places[i].source) for i in doubted}
                return believed | self._lost([i for i in todo if i not in believed], [])
        found = self._near(todo)
        known = {i: place for i, place in enumerate(places) if place.checked} | {
            i: place for i, place in found.items() if place.wcs is not None
        }
        found |= self._among_siblings([i for i in todo if found[i].wcs is None], known)
        left = [i for i in todo if found[i].wcs is None]
        near = [p.wcs for p in (*found.values(), *places) if p.wcs is not None and p.checked]
        found |= self._lost(left, near)
        return {i: _better(places[i], found[i]) for i in todo}

    def _near(self, todo: Sequence[int]) -> dict[int, Place]:
        return self._each(todo, [hint_of(self.frames[i]) for i in todo], "solve", lost=False)

    def _among_siblings(self, todo: Sequence[int], known: Mapping[int, Place]) -> dict[int, Place]:
        """Frames too shallow to be recognised, by what they have in common with others of the same camera."""
        found: dict[int, Place] = {}
        for i in todo:
            frame, stars = self.frames[i], self.measures[i].stars
            # The nearest in time: an alt-az mount turns the sky.
            kin = sorted((j for j in known if self.frames[j].camera == frame.camera), key=lambda j: abs(j - i))
            siblings = [
                Sibling(wcs, pointing)
                for j in kin[:_KIN]
                if (wcs := known[j].wcs) is not None and (pointing := _pointing(self.frames[j])) is not None
            ]
            pointing = _pointing(frame)
            if pointing is None or not siblings:
                continue
            points = brightest_first(stars.x, stars.y, stars.flux, frame.shape)
            wcs = place_among(points, frame.shape, pointing, siblings, self.catalogue)
            if wcs is not None:
                check = verify(wcs, stars.x, stars.y, stars.flux, frame.shape, self.catalogue)
                found[i] = Place(wcs, "embedded", True, check.rms, check.matched)
        return found

    def _lost(self, todo: Sequence[int], known: Sequence[WCS]) -> dict[int, Place]:
        """Frames that are not where their headers say: near the others, then anywhere, until that is hopeless."""
        found: dict[int, Place] = {}
        hints = _hints_near(known)
        misses = 0
        # In parts of a fixed size, whatever the number of workers: when to give up must not depend on that.
        for start in range(0, len(todo), _HOPELESS):
            part = todo[start : start + _HOPELESS]
            wide = [(*hints, *hint_of(self.frames[i])) for i in part]
            new = self._each(part, wide, "solve_lost", lost=True, blind=misses < _HOPELESS)
            misses += sum(place.wcs is None for place in new.values())
            if any(place.wcs is not None for place in new.values()):
                misses = 0
            found |= new
        return found

    def _each(
        self, todo: Sequence[int], hints: Sequence[tuple[Hint, ...]], stage: str, *, lost: bool, blind: bool = False
    ) -> dict[int, Place]:
        def work(pair: tuple[int, tuple[Hint, ...]]) -> Place:
            self.events.check_stop()
            i, near = pair
            return self.recall(self.frames[i], lambda: self._one(i, near, lost, blind))

        found: dict[int, Place] = {}
        pairs = list(zip(todo, hints, strict=True))
        for n, (i, place) in enumerate(zip(todo, thread_map(work, pairs, self.workers), strict=True), start=1):
            found[i] = place
            self.events.progress(stage, n, len(todo))
        return found

    def _one(self, i: int, hints: tuple[Hint, ...], lost: bool, blind: bool) -> Place:
        """The first solution, of all solvers in order, that the catalogue confirms."""
        frame, stars = self.frames[i], self.measures[i].stars
        reasons = []
        for solver in self.order if lost else self.order[:1]:
            try:
                wcs = self._by(solver, frame, self.measures[i], hints, lost, blind)
            except (SolveError, FrameError) as problem:
                reasons.append(f"{solver}: {problem}" if len(self.order) > 1 else str(problem))
                continue
            check = verify(wcs, stars.x, stars.y, stars.flux, frame.shape, self.catalogue)
            if check.state == "good" or (solver == "embedded" and check.state == "unchecked"):
                return Place(wcs, solver, True, check.rms, check.matched)
            reasons.append(f"{solver}: its solution does not fit the stars")
        return Place(None, None, reason="; ".join(reasons))

    def _by(
        self, solver: Solver, frame: Frame, measure: FrameMeasure, hints: tuple[Hint, ...], lost: bool, blind: bool
    ) -> WCS:
        stars, shape = measure.stars, frame.shape
        if solver == "embedded":
            return solve(stars.x, stars.y, stars.flux, shape, hints, self.catalogue, wider=lost, blind=blind).wcs
        brightness = stars.flux.sum(axis=1)
        if solver == "astrometry":
            return solve_astrometry_net(stars.x, stars.y, brightness, shape, hints[0], self._astrometry)
        return solve_astap(read_pixels(frame), hints[0], self._astap)

    @cached_property
    def _astrometry(self) -> AstrometryOptions:
        return astrometry_options(self.settings, self.events.check_stop)

    @cached_property
    def _astap(self) -> AstapOptions:
        return astap_options(self.settings, self.events.check_stop)


def _pointing(frame: Frame) -> tuple[float, float] | None:
    return None if frame.ra is None or frame.dec is None else (frame.ra, frame.dec)


def _better(before: Place, after: Place) -> Place:
    """The new place if there is one, else the old one with all that speaks against it."""
    if after.wcs is not None:
        return after
    reason = "; ".join(filter(None, (before.reason, after.reason)))
    return replace(before, checked=False, reason=reason)


def _hints_near(known: Sequence[WCS]) -> tuple[Hint, ...]:
    """A hint around the middle of frames whose place is known."""
    if not known:
        return ()
    centre = np.array([wcs.all_pix2world([[(n - 1) / 2 for n in wcs.pixel_shape]], 0)[0] for wcs in known])
    ra, dec = to_radec(to_vectors(*centre.T).mean(axis=0))
    scale = float(np.median([pixel_scale(wcs) for wcs in known]))
    return (Hint(ra, dec, _NEAR_OTHERS, scale, 0.05),)


def _observations(
    frames: Sequence[Frame], measures: Sequence[FrameMeasure], places: Sequence[Place]
) -> list[Observation]:
    return [
        Observation(
            measure.stars.x,
            measure.stars.y,
            measure.stars.flux.sum(axis=1),
            place.wcs,
            frame.shape,
            frame.camera,
        )
        for frame, measure, place in zip(frames, measures, places, strict=True)
    ]


def _settled(place: Place, refined: RefinedFrame) -> Place:
    """The place of a frame after all were made to agree."""
    if refined.state == "refined" and place.source in ("header", "sidecar") and refined.matched < _ENOUGH:
        # So few stars prove a WCS right, but their own errors are too large to better it.
        return Place(place.wcs, place.source, True, refined.residual, refined.matched)
    if refined.state in ("kept", "refined"):
        return Place(refined.wcs, place.source, True, refined.residual, refined.matched)
    if refined.state == "rescued":
        return Place(refined.wcs, "neighbours", True, refined.residual, refined.matched)
    if refined.state == "wrong":
        why = place.reason or "its WCS contradicts those of its neighbours, and it could not be placed among them"
        return Place(None, None, reason=why)
    if place.wcs is None or place.reason:
        return Place(None, None, reason=place.reason)
    return place
