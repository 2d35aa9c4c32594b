"""Deep fields of many frames: the equations that are never formed have the solution of those that are."""

from __future__ import annotations

import numpy as np
import pytest

from zemosaic import reduced
from zemosaic.reduced import ReducedEquations

PANELS, EACH, NODES, STRIDE = 9, 14, 40, 24  # a row of panels, frames in each, nodes a frame sees, between two panels


def row_of_panels(width: int, panels: int = PANELS, seed: int = 1) -> tuple[np.ndarray, ...]:
    """``common, frame, design, value, sigma`` of frames along a line, every one with unknowns of its own."""
    rng = np.random.default_rng(seed)
    first = np.repeat(np.arange(panels) * STRIDE, EACH) + rng.integers(0, 6, panels * EACH)
    rng.shuffle(first)
    frame = np.repeat(np.arange(len(first)), NODES)
    position = np.tile(np.arange(NODES), len(first))
    common = np.unique(first[frame] + position, return_inverse=True)[1]
    u = position / (NODES - 1) * 2 - 1
    design = np.stack([np.ones(len(u)), u, rng.normal(0, 1, len(u))][:width], axis=1)
    truth = rng.normal(0, 1, (len(first), width))
    sky = rng.normal(0, 1, common.max() + 1)
    sigma = rng.uniform(0.05, 0.2, len(u))
    value = sky[common] + (design * truth[frame]).sum(axis=1) + rng.normal(0, sigma)
    return common, frame, design, value, sigma


def formed(common, frame, design, value, w, prior, prior_sigma) -> np.ndarray:
    """The solution with the common values among the unknowns, all in one dense matrix."""
    (frames, width), commons = prior.shape, common.max() + 1
    full = np.zeros((len(value), frames * width + commons))
    rows = np.arange(len(value))
    for p in range(width):
        full[rows, frame * width + p] = design[:, p]
    full[rows, frames * width + common] = 1
    precision = np.concatenate([1 / prior_sigma.ravel() ** 2, np.zeros(commons)])
    expected = np.concatenate([prior.ravel(), np.zeros(commons)])
    normal = full.T @ (w[:, None] * full) + np.diag(precision)
    return np.linalg.solve(normal, full.T @ (w * value) + precision * expected)[: frames * width].reshape(prior.shape)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_solution_is_that_of_the_whole_matrix(width, held):
    common, frame, design, value, sigma = row_of_panels(width)
    rng = np.random.default_rng(2)
    prior, prior_sigma = rng.normal(0, 0.1, (PANELS * EACH, width)), np.full((PANELS * EACH, width), 5.0)
    if held:
        prior_sigma[::3] = 1e-5
    equations = ReducedEquations(common, frame, design, value, prior, prior_sigma)
    for robust in (1.0, rng.uniform(0.1, 1, len(value))):  # the second solution leans on what the first has set up
        w = robust / sigma**2
        found = equations.solve(w, prior)
        np.testing.assert_allclose(found, formed(common, frame, design, value, w, prior, prior_sigma), atol=2e-6)


def test_frames_that_see_nothing_keep_what_was_expected():
    common, frame, design, value, sigma = row_of_panels(2)
    prior = np.zeros((PANELS * EACH + 1, 2))
    prior[-1] = 7, 8
    found = ReducedEquations(common, frame, design, value, prior, np.ones_like(prior)).solve(1 / sigma**2, prior)
    np.testing.assert_allclose(found[-1], (7, 8))


def test_nothing_depends_on_the_order_of_the_observations():
    case = row_of_panels(3)
    prior, wide = np.zeros((PANELS * EACH, 3)), np.ones((PANELS * EACH, 3))
    order = np.random.default_rng(5).permutation(len(case[0]))
    one, other = (
        ReducedEquations(*(v[pick] for v in case[:4]), prior, wide).solve(1 / case[4][pick] ** 2, prior)
        for pick in (slice(None), order)
    )
    np.testing.assert_allclose(one, other, atol=1e-8)


def test_parts_that_move_together_do_not_slow_it_down(monkeypatch):
    """Without the groups it takes many times as many steps: that is what they are for."""
    panels = 60
    case = row_of_panels(2, panels)
    prior, wide = np.zeros((panels * EACH, 2)), np.full((panels * EACH, 2), 1e3)

    def steps() -> int:
        count = 0
        multiplier = reduced._multiplier

        def counting(width):
            def multiply(*arguments):
                nonlocal count
                count += 1
                return multiplier(width)(*arguments)

            return multiply

        with monkeypatch.context() as patch:
            patch.setattr(reduced, "_multiplier", counting)
            ReducedEquations(*case[:4], prior, wide).solve(1 / case[4] ** 2, prior)
        return count

    together = steps()
    monkeypatch.setattr(reduced, "_COARSE", 0)
    assert steps() > 2.5 * together
