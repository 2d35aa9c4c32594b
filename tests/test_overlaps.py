"""Panels and their overlaps, from invented corners: what is drawn is what must be found."""

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zemosaic.overlaps import OverlapGraph, overlap_graph, quad_areas, quad_mask

WIDTH, HEIGHT = 100.0, 180.0


def frame(x: float, y: float, turn: float = 0.0) -> np.ndarray:
    """Corners of a frame around (x, y)."""
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [WIDTH / 2, HEIGHT / 2]
    c, s = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))
    return corners @ np.array([[c, s], [-s, c]]) + [x, y]


def field(*panels: list[float]) -> OverlapGraph:
    """Panels in a row: the x of their frames."""
    corners = np.array([frame(x, 0) for panel in panels for x in panel])
    starts = np.cumsum([0, *map(len, panels)])
    return overlap_graph(corners, [range(a, b) for a, b in pairwise(starts)])


def test_a_regular_row_hangs_together():
    graph = field([0] * 8, [80] * 8, [160] * 8)
    assert [(link.a, link.b, link.frames_a, link.frames_b) for link in graph.links] == [(0, 1, 8, 8), (1, 2, 8, 8)]
    assert [link.area for link in graph.links] == pytest.approx([0.2, 0.2], abs=0.03)
    assert graph.islands == ((0, 1, 2),)
    assert graph.weak == ()


def test_a_panel_that_hangs_on_few_frames_is_named_with_their_number():
    # Only 2 of the 10 frames of the second panel reach over to the third.
    graph = field([0] * 10, [80] * 8 + [100] * 2, [190] * 12)
    (weak,) = graph.weak
    assert weak.panels == (2,)
    assert weak.frames == 12
    assert weak.on == ((1, 2, 10),)
    assert weak.area == pytest.approx(0.1, abs=0.03)


def test_all_frames_over_a_thin_strip_are_weak_too():
    (weak,) = field([0] * 6, [97] * 4).weak
    assert weak.panels == (1,)  # the smaller part hangs on the larger
    assert weak.frames == 4 and weak.on == ((0, 6, 6),)
    assert weak.area < 0.05


def test_several_panels_behind_one_weak_link_are_named_together():
    graph = field([0] * 10, [80] * 10, [160] * 8 + [177] * 2, [265] * 5, [345] * 5)
    (weak,) = graph.weak
    assert weak.panels == (3, 4)
    assert weak.on == ((2, 2, 10),)


def test_a_second_strong_way_round_is_no_weakness():
    # A ring of four: the thin side does not matter, the three others hold.
    at = [(0, 0), (80, 0), (80, 150), (-17, 150)]
    corners = np.array([frame(x, y) for x, y in at for _ in range(5)])
    graph = overlap_graph(corners, [range(5 * k, 5 * k + 5) for k in range(4)])
    assert any(link.area < 0.05 for link in graph.links)
    assert graph.weak == ()


def test_islands_come_by_size_and_are_no_weak_links():
    graph = field([0] * 3, [1000] * 5, [1080] * 5)
    assert graph.islands == ((1, 2), (0,))
    assert graph.weak == ()


def test_single_panel():
    graph = field([0.0, 3.0])
    assert graph.links == () and graph.weak == () and graph.islands == ((0,),)


def test_touching_by_less_than_a_hundredth_is_no_overlap():
    assert field([0] * 3, [99.9] * 3).links == ()


@settings(max_examples=60, deadline=None)
@given(
    x=st.floats(-30, 90),
    y=st.floats(-30, 90),
    turn=st.floats(0, 360),
    mirrored=st.booleans(),
)
def test_the_mask_of_a_quadrangle_is_its_inside(x: float, y: float, turn: float, mirrored: bool):
    quad = frame(x, y, turn) * 0.4
    quad = quad[::-1] if mirrored else quad
    box, mask = quad_mask(quad, (60, 50))
    whole = np.zeros((60, 50), bool)
    whole[box.slices] = mask
    gy, gx = np.mgrid[0:60, 0:50] + 0.5
    # Half planes, the slow and plain way; pixels within rounding of an edge may go either way.
    edges = zip(quad, np.roll(quad, -1, axis=0), strict=True)
    side = np.array([(b[0] - a[0]) * (gy - a[1]) - (b[1] - a[1]) * (gx - a[0]) for a, b in edges])
    inside, clear = (side > 0).all(axis=0) | (side < 0).all(axis=0), (np.abs(side) > 1e-6).all(axis=0)
    np.testing.assert_array_equal(whole[clear], inside[clear])


def test_areas():
    assert quad_areas(np.array([frame(5, 7, 33), frame(0, 0)[::-1]])) == pytest.approx([WIDTH * HEIGHT] * 2)


def test_five_thousand_frames_take_seconds_not_hours():
    rng = np.random.default_rng(4)
    panels = np.array([(80 * i, 150 * j) for j in range(8) for i in range(10)], float)
    corners = np.concatenate([[frame(*at) for at in p + rng.normal(0, 2, (62, 2))] for p in panels])
    start = time.process_time()
    graph = overlap_graph(corners, [range(62 * k, 62 * k + 62) for k in range(80)])
    assert time.process_time() - start < 5  # 12 million pairs overlap
    assert len(graph.islands) == 1 and graph.weak == ()
    assert len(graph.links) == 9 * 8 + 10 * 7 + 2 * 9 * 7
