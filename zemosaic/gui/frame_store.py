"""The subs of the filter window, what is known of them, which are selected, left out, and in which lot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PySide6.QtCore import QObject, QPointF, QRectF, Signal
from PySide6.QtGui import QPolygonF, QUndoCommand, QUndoStack

from zemosaic.gui.i18n import tr

_UNDO_STEPS = 100


@dataclass(slots=True)
class FrameRow:
    """One sub.

    Parameters
    ----------
    path : str
    problem : str
        Why the engine will not use it; empty if it will.
    excluded : str
        Why the user left it out; empty if it is in.
    unsolved : bool
        Whether the problem is only that its place on the sky is not known yet: a run will look for it.
    outline : QPolygonF
        Footprint on the plane of the view, degrees, x to the west; empty without a WCS.
    middle : QPointF
        Its centre.
    box : QRectF
        What holds it.
    lot : int
        Counted from 0; -1 = in none.
    """

    path: str
    problem: str = ""
    excluded: str = ""
    unsolved: bool = False
    date: str = ""
    night: str = ""
    exposure: float = math.nan
    instrument: str = ""
    filter: str = ""
    object: str = ""
    wcs: str = ""
    fwhm: float = math.nan
    stars: float = math.nan
    sky: float = math.nan
    lot: int = -1
    outline: QPolygonF = field(default_factory=QPolygonF)
    middle: QPointF = field(default_factory=QPointF)
    box: QRectF = field(default_factory=QRectF)
    name: str = ""

    @property
    def used(self) -> bool:
        return not self.problem and not self.excluded

    @property
    def coming(self) -> bool:
        """Whether a run will at least try to use it."""
        return self.used or (self.unsolved and not self.excluded)


def row_from(document: Mapping[str, Any]) -> FrameRow:
    """A row as the helper tells it."""
    points = [QPointF(x, y) for x, y in document.get("outline", ())]
    middle = QPointF()
    if points:
        middle = QPointF(sum(p.x() for p in points) / len(points), sum(p.y() for p in points) / len(points))
    outline = QPolygonF(points)
    exposure = document.get("exposure")
    texts = {
        key: document.get(key, "") for key in ("night", "instrument", "filter", "object", "wcs", "problem", "date")
    }
    return FrameRow(
        path=document["path"],
        exposure=math.nan if exposure is None else exposure,
        outline=outline,
        middle=middle,
        box=outline.boundingRect(),
        unsolved=document.get("unsolved", False),
        name=Path(document["path"]).name,
        **texts,
    )


@dataclass(frozen=True)
class Choices:
    """What the user decided: why rows are left out (number → reason, of some rows only), and the lots."""

    excluded: Mapping[int, str]
    lots: Sequence[Sequence[int]]
    edited: bool


class _Change(QUndoCommand):
    """One step that can be taken back."""

    def __init__(self, text: str, store: FrameStore, before: Choices, after: Choices) -> None:
        super().__init__(text)
        self._store, self._before, self._after = store, before, after

    def undo(self) -> None:
        self._store.take(self._before)

    def redo(self) -> None:  # Qt calls it for the first time as well
        self._store.take(self._after)


class FrameStore(QObject):
    """All subs, by number; everything that shows them listens here. What the user decides can be undone (`undo`).

    Signals: ``added(first, end)`` rows; ``changed(set)`` numbers whose facts changed; ``selected()``;
    ``lots_changed()``; ``cleared()``.
    """

    added = Signal(int, int)
    changed = Signal(set)
    selected = Signal()
    lots_changed = Signal()
    cleared = Signal()

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self.rows: list[FrameRow] = []
        self.selection: frozenset[int] = frozenset()
        self.lots: list[list[int]] = []
        self.edited = False  # whether the lots are the user's: only then the engine is given them
        self.undo = QUndoStack(self)
        self.undo.setUndoLimit(_UNDO_STEPS)

    def clear(self) -> None:
        """Forget everything."""
        self.rows = []
        self.selection, self.lots, self.edited = frozenset(), [], False
        self.undo.clear()
        self.cleared.emit()

    def append(self, rows: Sequence[FrameRow]) -> None:
        """Add rows at the end."""
        first = len(self.rows)
        self.rows += rows
        self.added.emit(first, len(self.rows))

    def update(self, changes: Mapping[int, Mapping[str, Any]]) -> None:
        """Set facts of rows; None becomes NaN."""
        for i, facts in changes.items():
            for name, value in facts.items():
                setattr(self.rows[i], name, math.nan if value is None else value)
        self.changed.emit(set(changes))

    def select(self, numbers: Iterable[int]) -> None:
        """Select exactly these rows."""
        selection = frozenset(numbers)
        if selection != self.selection:
            self.selection = selection
            self.selected.emit()

    def exclude(self, numbers: Iterable[int], reason: str) -> None:
        """Leave rows out (or, with an empty reason, let them in again); they leave their lots."""
        numbers = {i for i in numbers if self.rows[i].excluded != reason}
        if not numbers:
            return
        lots, edited = self.lots, self.edited
        if reason and any(self.rows[i].lot >= 0 for i in numbers):
            lots, edited = [[i for i in lot if i not in numbers] for lot in self.lots], True
        text = tr("undo_exclude" if reason else "undo_include", n=len(numbers))
        self._decide(text, Choices(dict.fromkeys(numbers, reason), lots, edited))

    def _decide(self, text: str, after: Choices) -> None:
        before = Choices({i: self.rows[i].excluded for i in after.excluded}, self.lots, self.edited)
        self.undo.push(_Change(text, self, before, after))

    def take(self, choices: Choices) -> None:
        """Put choices into force, without a way back."""
        for i, reason in choices.excluded.items():
            self.rows[i].excluded = reason
        changed = set(choices.excluded)
        other = choices.lots is not self.lots
        if other:
            changed |= self._number_lots(choices.lots)
        self.edited = choices.edited and bool(self.lots)
        self.changed.emit(changed)
        if other:
            self.lots_changed.emit()

    def _number_lots(self, lots: Sequence[Sequence[int]]) -> set[int]:
        """Take lots over, without empty ones; returns the rows that are in another lot now."""
        self.lots = [list(lot) for lot in lots if lot]
        before = {i: row.lot for i, row in enumerate(self.rows) if row.lot >= 0}
        after = {i: number for number, lot in enumerate(self.lots) for i in lot}
        moved = {i for i in before.keys() | after.keys() if before.get(i, -1) != after.get(i, -1)}
        for i in moved:
            self.rows[i].lot = after.get(i, -1)
        return moved

    def used(self) -> list[int]:
        """Numbers of the rows that the engine will get."""
        return [i for i, row in enumerate(self.rows) if row.used]

    def matching(self, test: Callable[[FrameRow], bool]) -> list[int]:
        """Numbers of the used rows that pass a test."""
        return [i for i in self.used() if test(self.rows[i])]

    # --- lots

    def set_lots(self, lots: Iterable[Iterable[int]], *, edited: bool = True) -> None:
        """Set all lots; empty ones vanish."""
        self._decide(tr("undo_lots"), Choices({}, [list(lot) for lot in lots], edited))

    def merge_lots(self, numbers: Sequence[int]) -> None:
        """Join lots; the result takes the place of the first."""
        first, *others = sorted(set(numbers))
        merged = [i for number in (first, *others) for i in self.lots[number]]
        self.set_lots(
            merged if number == first else lot for number, lot in enumerate(self.lots) if number not in others
        )

    def split_lot(self, number: int) -> None:
        """Make two lots of one: by night if it spans several, else in halves, in order of time."""
        lot = sorted(self.lots[number], key=lambda i: (self.rows[i].date, self.rows[i].path))
        nights = [self.rows[i].night for i in lot]
        cut = nights.index(nights[-1]) if nights[0] != nights[-1] else len(lot) // 2
        if cut:
            self.set_lots([*self.lots[:number], lot[:cut], lot[cut:], *self.lots[number + 1 :]])

    def move_to_lot(self, numbers: Iterable[int], target: int) -> None:
        """Move rows to a lot; a `target` beyond the last makes a new one."""
        moving = [i for i in sorted(set(numbers)) if self.rows[i].used]
        gone = set(moving)
        lots = [[i for i in lot if i not in gone] for lot in self.lots]
        if target < len(lots):
            lots[target] += moving
        else:
            lots.append(moving)
        self.set_lots(lots)

    def near_lots(self, numbers: Iterable[int], most: int) -> list[int]:
        """Numbers of the lots whose middles are nearest to that of some rows, ascending; at most so many."""
        here = self._middle(numbers)
        away = [(self._middle(lot) - here).manhattanLength() for lot in self.lots]
        return sorted(sorted(range(len(away)), key=away.__getitem__)[:most])

    def _middle(self, numbers: Iterable[int]) -> QPointF:
        middles = [self.rows[i].middle for i in numbers if self.rows[i].wcs]
        total = sum(middles, QPointF())
        return total / len(middles) if middles else total

    def drop_lots(self, numbers: Iterable[int]) -> None:
        """Take lots apart; the engine plans their subs itself."""
        gone = set(numbers)
        self.set_lots(lot for number, lot in enumerate(self.lots) if number not in gone)

    def lot_paths(self) -> tuple[tuple[str, ...], ...]:
        """The lots as paths."""
        return tuple(tuple(self.rows[i].path for i in lot) for lot in self.lots)

    def restore(self, excluded: Mapping[str, str], lots: Sequence[Sequence[str]]) -> None:
        """Decide as before on rows that were read anew: path → why it is left out, and the lots, if any."""
        self.take(Choices({i: excluded.get(row.path, "") for i, row in enumerate(self.rows)}, self.lots, self.edited))
        if lots:
            self.take_lot_paths([[Path(path) for path in lot] for lot in lots])
        self.undo.clear()

    def take_lot_paths(self, lots: Iterable[Iterable[Path]]) -> int:
        """Set the lots from paths; returns how many of them are no used row."""
        where = {row.path: i for i, row in enumerate(self.rows) if row.used}
        found = [[where.get(str(path)) for path in lot] for lot in lots]
        self.set_lots([i for i in lot if i is not None] for lot in found)
        return sum(i is None for lot in found for i in lot)
