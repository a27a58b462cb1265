"""The strategy of the search against exhaustive search, on accuracy functions that are known."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateurs.strategy import Answer, Candidate, candidates

MOST = 60


@dataclass
class World:
    """Networks by depth and by the widths there are, with the drop of each.

    Attributes:
        costs: per depth, the costs of its networks, falling; the first is the depth alone.
        drops: of the same networks.
        allowed: the gate.
    """

    costs: list[list[float]]
    drops: list[list[float]]
    allowed: float

    def answer(self, candidate: Candidate) -> Answer:
        """Give the widest network within the target, as allocation does, or the narrowest if none is."""
        if candidate.blocks >= len(self.costs):
            return Answer(self.costs[-1][0], self.drops[-1][0] <= self.allowed, exhausted=True)
        costs, drops = self.costs[candidate.blocks], self.drops[candidate.blocks]
        target = float("inf") if candidate.target is None else candidate.target
        number = next((index for index, cost in enumerate(costs) if cost <= target), len(costs) - 1)
        return Answer(costs[number], drops[number] <= self.allowed)

    def best(self) -> float:
        """Return the least accepted cost of all networks, by trying all."""
        pairs = [pair for depth in zip(self.costs, self.drops, strict=True) for pair in zip(*depth, strict=True)]
        return min((cost for cost, drop in pairs if drop <= self.allowed), default=float("inf"))


def run(world, resolution, *, depth=True, width=True):
    """Return what was asked and answered."""
    strategy = candidates(depth=depth, width=width, resolution=resolution)
    seen, candidate = [], next(strategy)
    try:
        while True:
            answer = world.answer(candidate)
            seen.append((candidate, answer))
            assert len(seen) <= MOST, "it does not end"
            candidate = strategy.send(answer)
    except StopIteration:
        return seen


def cheapest(seen):
    return min((answer.cost for _, answer in seen if answer.accepted), default=float("inf"))


@st.composite
def worlds(draw, noise=0.0):
    """Draw a world in which less cost never means less drop, within a depth and for depths alone, but for the noise."""
    depths = draw(st.integers(1, 5))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    costs, drops, alone, loss = [], [], 1.0, 0.0
    for _ in range(depths):
        grid = alone * np.concatenate([[1.0], np.sort(generator.uniform(0.05, 1.0, draw(st.integers(0, 60))))[::-1]])
        steps = generator.exponential(size=len(grid)) * generator.uniform(0, 0.02)
        rising = loss + np.concatenate([[0.0], np.cumsum(steps[1:])])
        costs.append(grid.tolist())
        drops.append((rising + noise * generator.normal(size=len(grid))).tolist())
        alone, loss = alone * generator.uniform(0.6, 1.0), loss + generator.exponential() * 0.01
    return World(costs, drops, draw(st.sampled_from([0.0, 0.01, 0.03, 0.1])))


@given(worlds(), st.sampled_from([0.01, 0.02, 0.05, 0.2]))
def test_it_comes_within_the_resolution_of_exhaustive_search(world, resolution):
    seen = run(world, resolution)
    assert cheapest(seen) <= world.best() + resolution + 1e-9
    assert all(cost_of_asked(candidate) > 0 for candidate, _ in seen)


def cost_of_asked(candidate):
    return 1.0 if candidate.target is None else candidate.target


@given(worlds(noise=0.005), st.sampled_from([0.02, 0.05]))
def test_noise_costs_no_more_than_the_trials_that_it_misleads(world, resolution):
    """With noise the best may be missed; but the search ends, and tries no candidate twice."""
    seen = run(world, resolution)
    asked = [candidate for candidate, _ in seen]
    assert len(set(asked)) == len(asked)
    best = world.best()
    if best < float("inf") and cheapest(seen) == float("inf"):
        # Nothing was accepted: then every depth alone that was tried broke the gate.
        assert all(not answer.accepted for candidate, answer in seen if candidate.target is None)


@given(worlds(), st.sampled_from([0.02, 0.05]))
def test_open_in_one_direction_it_stays_in_it(world, resolution):
    assert {candidate.blocks for candidate, _ in run(world, resolution, depth=False)} == {0}
    alone = [candidate for candidate, _ in run(world, resolution, width=False)]
    assert {candidate.target for candidate in alone} == {None}
    assert [candidate.blocks for candidate in alone] == list(range(len(alone)))


def line(depths, allowed, slope):
    """Return a world of fine widths in which depth is free and the drop is `slope` times the cost saved by width."""
    grid = np.linspace(1.0, 0.05, 400)
    costs = [(grid * (1 - 0.1 * depth)).tolist() for depth in range(depths)]
    return World(costs, [(slope * (1 - grid)).tolist()] * depths, allowed)


def test_the_number_of_trials_of_a_plain_case():
    """Six trials halve (0, 1) to 1/64; each greater depth pays for itself with a few."""
    seen = run(line(1, 0.05, 0.1), 0.02, depth=False)
    assert len(seen) == 1 + 6
    assert cheapest(seen) == pytest.approx(0.5, abs=0.02)
    seen = run(line(3, 0.05, 0.1), 0.02)
    assert cheapest(seen) == pytest.approx(0.4, abs=0.02)
    assert len(seen) <= 20


def test_the_steps_of_a_depth_that_pays_grow():
    """From a best cost of 0.5 down to 0.3 are 20 steps of the resolution; they are taken in 1, 2, 4, 8 and 16, and the last is halved."""
    grid = np.linspace(1.0, 0.05, 400)
    world = World([grid.tolist(), (0.6 * grid).tolist()], [(0.1 * (1 - grid)).tolist()] * 2, 0.05)
    world.costs[1][0] = 0.9  # its blocks alone save little
    seen = run(world, 0.01)
    assert cheapest(seen) == pytest.approx(0.3, abs=0.01)
    assert sum(candidate.blocks == 1 and candidate.target is not None for candidate, _ in seen) <= 9


def test_a_depth_that_does_not_pay_is_left_after_two_trials():
    """Its blocks alone are accepted; a step below the best cost is not."""
    grid = np.linspace(1.0, 0.05, 400)
    free = (0.1 * (1 - grid)).tolist()
    dear = (0.045 + 0.1 * (1 - grid)).tolist()
    world = World([grid.tolist(), (0.95 * grid).tolist()], [free, dear], 0.05)
    seen = run(world, 0.02)
    assert [candidate.blocks for candidate, _ in seen].count(1) == 2


def test_it_stops_after_two_depths_in_a_row_that_break_the_gate():
    world = World([[1.0], [0.9], [0.8], [0.7], [0.6]], [[0.0], [0.2], [0.0], [0.2], [0.2]], 0.1)
    asked = [candidate for candidate, _ in run(world, 0.02, width=False)]
    assert [candidate.blocks for candidate in asked] == [0, 1, 2, 3, 4]


def test_the_narrowest_network_is_recognised():
    """When even the narrowest network is accepted, no lower target is tried more than once."""
    world = World([[1.0, 0.8, 0.6]], [[0.0, 0.0, 0.0]], 0.0)
    seen = run(world, 0.01, depth=False)
    assert cheapest(seen) == 0.6
    assert len(seen) <= 4
