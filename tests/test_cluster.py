"""Which frames make one master tile: every frame in exactly one group, groups by pointing and orientation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from astropy.wcs import WCS
from hypothesis import given
from hypothesis import strategies as st

from zemosaic.cluster import cluster_frames
from zemosaic.demo import tangent_header
from zemosaic.frames import Frame

SHAPE = (40, 60)
PLACES = [(83.8, 10.0), (0.0, 0.0), (359.99, -45.0), (123.0, 89.9), (0.0, 90.0), (0.0, -90.0)]
Offset = tuple[float, float]


def frames_at(
    offsets: Sequence[Offset], place: Offset = PLACES[0], turns: Sequence[float] = (), parity: int = 1
) -> list[Frame]:
    """Frames aimed at offsets (degrees, on the tangent plane of a place) and turned there against its +y axis."""
    plane = WCS(tangent_header(*place, (1, 1), scale=3600))
    frames = []
    for i, (x, y) in enumerate(offsets):
        wcs = WCS(naxis=2)
        wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
        wcs.wcs.crval = plane.wcs_pix2world([[x, y]], 0)[0]
        wcs.wcs.crpix = (SHAPE[1] + 1) / 2, (SHAPE[0] + 1) / 2
        wcs.wcs.cd = local_matrix(plane, (x, y), turns[i] if turns else 0.0, parity)
        wcs.wcs.set()
        frames.append(Frame(Path(f"{i}.fit"), SHAPE, "mono", wcs=wcs))
    return frames


def local_matrix(plane: WCS, at: Offset, turn_deg: float, parity: int) -> np.ndarray:
    """CD matrix of a camera that is turned by an angle against the plane's axes at a point of the plane."""
    step = 2.4 / 3600
    ra, dec = plane.wcs_pix2world([at[0], at[0] + step, at[0]], [at[1], at[1], at[1] + step], 0)
    there = WCS(naxis=2)
    there.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    there.wcs.crval = ra[0], dec[0]
    there.wcs.set()
    east, north = there.wcs_world2pix(ra, dec, 1)  # of the plane's x and y axes, degrees
    axes = np.array([[east[1], east[2]], [north[1], north[2]]])
    c, s = np.cos(np.deg2rad(turn_deg)), np.sin(np.deg2rad(turn_deg))
    return axes @ np.array([[c, -s], [s, c]]) @ np.diag([parity, 1])


def dithered(panels: Sequence[int], dithers: Sequence[Offset], spacing: float = 1.0) -> list[Offset]:
    """Pointings at panels in a row, each a little off."""
    return [(spacing * panel + dx, dy) for panel, (dx, dy) in zip(panels, dithers, strict=True)]


def by_panel(panels: Sequence[int]) -> set[tuple[int, ...]]:
    return {tuple(i for i, panel in enumerate(panels) if panel == k) for k in set(panels)}


dither = st.tuples(st.floats(-0.12, 0.12), st.floats(-0.12, 0.12))
anywhere = st.tuples(st.floats(-1.5, 1.5), st.floats(-1.5, 1.5))


# --- whatever the frames ----------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(anywhere, st.floats(-180, 180)), min_size=1, max_size=14),
    st.sampled_from(PLACES),
    st.sampled_from([0.0, 0.05, 0.5, 5.0]),
    st.sampled_from([0.0, 10.0]),
    st.integers(0, 4),
)
def test_every_frame_is_in_exactly_one_group(frames, place, threshold, split, most):
    groups = cluster_frames(
        frames_at([at for at, _ in frames], place, [turn for _, turn in frames]), threshold, split, most
    )
    assert sorted(chain(*groups)) == list(range(len(frames)))
    assert all(groups) and all(list(group) == sorted(group) for group in groups)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)  # in order of their first frame
    if most > 1:
        assert max(map(len, groups)) <= most


@given(st.lists(st.tuples(st.integers(0, 2), dither), min_size=1, max_size=14), st.sampled_from(PLACES))
def test_groups_are_the_panels_whatever_the_dither_and_the_order(frames, place):
    """Panels 1 deg apart, dithered by up to 0.17 deg, taken in any order: 0.45 deg holds one and reaches no other."""
    panels = [panel for panel, _ in frames]
    pointings = dithered(panels, [offset for _, offset in frames])
    assert set(cluster_frames(frames_at(pointings, place), 0.45)) == by_panel(panels)


# --- pointing ---------------------------------------------------------------------------------------------


def test_the_threshold_is_the_distance_from_a_groups_first_frame():
    frames = frames_at([(0, 0), (0.10, 0)])
    assert cluster_frames(frames, 0.11) == [(0, 1)]
    assert cluster_frames(frames, 0.09) == [(0,), (1,)]


def test_a_first_frame_that_was_off_does_not_keep_frames_of_the_next_panel():
    """The first frame points between two panels; the last is nearer to it, but to the middle of the other panel."""
    frames = frames_at([(0.4, 0), (0, 0), (0, 0), (0, 0), (1, 0), (0.65, 0)])
    assert cluster_frames(frames, 0.5) == [(0, 1, 2, 3), (4, 5)]


def test_a_threshold_of_zero_sets_frames_apart_that_differ_at_all():
    assert cluster_frames(frames_at([(0, 0), (0.001, 0), (0.002, 0)]), 0.0) == [(0,), (1,), (2,)]


def test_one_frame_is_a_group():
    assert cluster_frames(frames_at([(0, 0)]), 0.05, 5.0, 3) == [(0,)]


# --- orientation ------------------------------------------------------------------------------------------


TWO_NIGHTS = [0, 1, -1, 69, 70, 68]


@pytest.mark.parametrize("place", PLACES)
def test_nights_of_different_orientation_are_split_where_asked_for(place):
    """Around a pole too, where north turns by more from one dithered frame to the next than the field does."""
    dithers = [(0.02, 0.01), (-0.02, 0.01), (0.01, -0.02), (0.0, 0.0), (0.02, 0.02), (-0.01, -0.02)]
    frames = frames_at(dithers, place, TWO_NIGHTS)
    assert cluster_frames(frames, 0.1, 10.0) == [(0, 1, 2), (3, 4, 5)]
    assert cluster_frames(frames, 0.1, 0.0) == [(0, 1, 2, 3, 4, 5)]


def test_half_a_turn_is_the_greatest_difference_and_a_full_turn_is_none():
    frames = frames_at([(0, 0)] * 5, turns=[-179, 179, 541, 0, 359])
    assert cluster_frames(frames, 0.05, 10.0) == [(0, 1, 2), (3, 4)]


def test_orientation_and_pointing_both_count():
    frames = frames_at([(0, 0), (1, 0)] * 4, turns=[0, 0, 90, 90] * 2)
    assert cluster_frames(frames, 0.3, 20.0) == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_mirrored_frames_that_point_up_alike_belong_together():
    frames = frames_at([(0, 0)]) + frames_at([(0, 0)], parity=-1)
    assert cluster_frames(frames, 0.05, 10.0) == [(0, 1)]


# --- size -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, 1])
def test_groups_are_whole_unless_a_size_is_asked_for(most):
    assert cluster_frames(frames_at([(0, 0)] * 9), 0.05, 0.0, most) == [tuple(range(9))]


@pytest.mark.parametrize(
    ("frames", "most", "sizes"),
    [(7, 3, [3, 2, 2]), (6, 3, [3, 3]), (4, 3, [2, 2]), (3, 3, [3]), (5, 2, [2, 2, 1]), (11, 10, [6, 5])],
)
def test_large_groups_are_cut_in_order_into_parts_of_nearly_equal_size(frames, most, sizes):
    groups = cluster_frames(frames_at([(0, 0)] * frames), 0.05, 0.0, most)
    assert [len(group) for group in groups] == sizes
    assert list(chain(*groups)) == list(range(frames))


def test_parts_of_panels_that_were_taken_in_turns_come_in_order_of_their_first_frame():
    groups = cluster_frames(frames_at([(0, 0), (1, 0)] * 4), 0.3, 0.0, 2)
    assert groups == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert all(a[0] < b[0] for a, b in pairwise(groups))
