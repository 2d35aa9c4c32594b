"""Leaving subs out by a rule: distance, instrument, filter, night, or how good they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from PySide6.QtCore import QPointF
from PySide6.QtWidgets import QComboBox, QDoubleSpinBox, QHBoxLayout, QStackedWidget, QWidget

from zemosaic.gui.frame_store import FrameRow, FrameStore
from zemosaic.gui.i18n import tr
from zemosaic.gui.widgets import button, label


@dataclass(frozen=True)
class Rule:
    """A rule with a limit, or (without a unit) with one of the values that occur.

    Parameters
    ----------
    key : str
        In the catalogue: ``rule_<key>``; for values also the fact of `FrameRow`.
    unit : str
        Of the limit; empty for a rule with values.
    measure : callable, optional
        The fact that is compared, given the row and the middle of the field.
    above : bool
        Whether what exceeds the limit leaves, or what falls short of it.
    start : float
        Limit to begin with.
    """

    key: str
    unit: str = ""
    measure: Callable[[FrameRow, QPointF], float] | None = None
    above: bool = True
    start: float = 0.0


def _distance(row: FrameRow, middle: QPointF) -> float:
    return math.hypot(row.middle.x() - middle.x(), row.middle.y() - middle.y()) if row.wcs else math.nan


RULES = (
    Rule("fwhm", "px", lambda row, _: row.fwhm, start=5.0),
    Rule("stars", "", lambda row, _: row.stars, above=False, start=20.0),
    Rule("sky", "ADU", lambda row, _: row.sky, start=3000.0),
    Rule("distance", "°", _distance, start=2.0),
    Rule("instrument"),
    Rule("filter"),
    Rule("night"),
    Rule("no_wcs"),
)


class ExcludeBar(QWidget):
    """Choose a rule, see how many subs it takes, leave them out; or the selected ones; or let all in again."""

    def __init__(self, store: FrameStore) -> None:
        super().__init__()
        self._store = store
        self.rule = QComboBox()
        self.rule.setAccessibleName(tr("exclude_title"))
        for rule in RULES:
            self.rule.addItem(tr(f"rule_{rule.key}"), rule)
        self.limit = QDoubleSpinBox()
        self.limit.setRange(0, 1e6)
        self.limit.setDecimals(1)
        self.limit.setAccessibleName(tr("exclude_limit"))
        self.value = QComboBox()
        self.value.setAccessibleName(tr("exclude_value"))
        self._stack = QStackedWidget()
        for widget in (self.limit, self.value, QWidget()):
            self._stack.addWidget(widget)
        self._stack.setFixedWidth(150)
        self.apply = button("")
        self.apply.clicked.connect(self.leave_out)
        self.selected = button(tr("exclude_selected"), tip=tr("exclude_selected_tip"))
        self.selected.clicked.connect(lambda: store.exclude(store.selection, tr("reason_by_hand")))
        self.restore_selected = button(tr("include_selected"), tip=tr("include_selected_tip"))
        self.restore_selected.clicked.connect(lambda: store.exclude(store.selection, ""))
        self.restore = button(tr("include_all"), "link")
        self.restore.clicked.connect(lambda: store.exclude(range(len(store.rows)), ""))
        row = QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        row.addWidget(label(tr("exclude_title"), "dim"))
        for widget in (self.rule, self._stack, self.apply, self.selected, self.restore_selected, self.restore):
            row.addWidget(widget)
        row.addStretch(1)
        self.rule.currentIndexChanged.connect(self._rule_changed)
        self.limit.valueChanged.connect(self.refresh)
        self.value.currentIndexChanged.connect(self.refresh)
        store.selected.connect(self._selection_changed)
        self._rule_changed()

    def matching(self) -> list[int]:
        """Numbers of the subs that the rule takes."""
        rule: Rule = self.rule.currentData()
        if rule.key == "no_wcs":
            # These have a problem already; the rule lets a user say that it is meant.
            return [i for i, row in enumerate(self._store.rows) if not row.wcs and not row.excluded]
        if rule.measure is None:
            wanted = self.value.currentText()
            return self._store.matching(lambda row: bool(wanted) and getattr(row, rule.key) == wanted)
        measure, limit = rule.measure, self.limit.value()
        middle = self._middle() if measure is _distance else QPointF()
        if rule.above:
            return self._store.matching(lambda row: measure(row, middle) > limit)
        return self._store.matching(lambda row: measure(row, middle) < limit)

    def leave_out(self) -> None:
        """Leave out what the rule takes."""
        self._store.exclude(self.matching(), tr("reason_rule", rule=self.rule.currentText(), value=self._value_text()))
        self.refresh()

    def refresh(self) -> None:
        """Say how many subs the rule takes now."""
        n = len(self.matching())
        self.apply.setText(tr("exclude_apply", n=n))
        self.apply.setEnabled(n > 0)
        self._selection_changed()

    def _selection_changed(self) -> None:
        self.selected.setEnabled(bool(self._store.selection))
        self.restore_selected.setEnabled(any(self._store.rows[i].excluded for i in self._store.selection))

    def refresh_values(self) -> None:
        """Offer the values that occur now."""
        rule: Rule = self.rule.currentData()
        if rule.measure is None and rule.key != "no_wcs":
            values = sorted({getattr(row, rule.key) for row in self._store.rows} - {""})
            if values != [self.value.itemText(k) for k in range(self.value.count())]:
                self.value.clear()
                self.value.addItems(values)
        self.refresh()

    def _rule_changed(self) -> None:
        rule: Rule = self.rule.currentData()
        if rule.measure is not None:
            self._stack.setCurrentIndex(0)
            self.limit.setSuffix(f" {rule.unit}" if rule.unit else "")
            self.limit.setValue(rule.start)
        else:
            self._stack.setCurrentIndex(2 if rule.key == "no_wcs" else 1)
        self.refresh_values()

    def _value_text(self) -> str:
        rule: Rule = self.rule.currentData()
        if rule.measure is not None:
            return self.limit.text()
        return "" if rule.key == "no_wcs" else self.value.currentText()

    def _middle(self) -> QPointF:
        """Median of the middles of the used subs, on the plane."""
        middles = [row.middle for row in self._store.rows if row.used and row.wcs]
        if not middles:
            return QPointF()
        half = len(middles) // 2
        return QPointF(sorted(p.x() for p in middles)[half], sorted(p.y() for p in middles)[half])
