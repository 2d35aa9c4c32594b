"""Statistics that a few outliers do not move."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def median(values: NDArray) -> float:
    """Median of the finite values of an array of any shape; NaN if there is none.

    The same number as ``numpy.median`` finds, but of many values several times sooner: that asks for three ranks at
    once, which numpy selects one value after the other, and for a single one with vectors.
    """
    values = values[np.isfinite(values)]
    if not values.size:
        return math.nan
    half = values.size // 2
    values.partition(half)
    if values.size % 2:
        return float(values[half])
    return float((values[:half].max() + values[half]) / 2)
