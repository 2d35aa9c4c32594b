"""The median that is quick is numpy's."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from zemosaic.robust import median


@given(arrays(np.float32, array_shapes(max_dims=2), elements=st.floats(-1e6, 1e6, width=32)))
def test_it_is_the_median(values):
    before = values.copy()
    assert median(values) == np.median(values)
    assert np.array_equal(values, before)  # of a copy


@pytest.mark.parametrize("count", [1, 2, 1001, 1002])
def test_what_is_not_finite_does_not_count(count):
    values = np.random.default_rng(count).normal(size=count)
    known = median(values)
    assert median(np.r_[np.nan, values, np.inf, -np.inf]) == known == np.median(values)


def test_of_nothing_it_is_nan():
    assert math.isnan(median(np.zeros(0))) and math.isnan(median(np.full(3, np.nan)))
