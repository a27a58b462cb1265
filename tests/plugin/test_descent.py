"""The search for costs that are no sums, against all combinations."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs import descent
from secateurs.allocation import ROUNDING, allocate
from secateurs.descent import Option, search


class Peak:
    """A maximum over time of sums of buffers, each padded to a block: what a planned memory looks like."""

    additive = False

    def __init__(self, steps, block):
        self.steps, self.block = steps, block
        self.asked = 0

    def __call__(self, keep):
        self.asked += 1
        return max(
            sum(size * -(-keep[name] // self.block) * self.block for name, size in step.items()) for step in self.steps
        )


@st.composite
def problems(draw, most=4):
    names = [f"g{number}" for number in range(draw(st.integers(1, most)))]
    options = {}
    for name in names:
        widths = sorted(draw(st.sets(st.integers(1, 15), min_size=1, max_size=3)))
        losses = sorted((draw(st.floats(0.01, 5)) for _ in widths), reverse=True)
        options[name] = [Option(16, 0.0), *(Option(k, loss) for k, loss in zip(widths, losses, strict=True))]
    steps = draw(
        st.lists(st.dictionaries(st.sampled_from(names), st.integers(1, 9), min_size=1), min_size=1, max_size=5)
    )
    cost = Peak(steps, draw(st.sampled_from([1, 4])))
    full = cost(dict.fromkeys(names, 16))
    return cost, options, full * draw(st.floats(0.2, 1.0))


def exact(cost, options, allowed):
    found = [
        sum(option.divergence for option in choice)
        for choice in product(*options.values())
        if cost({name: option.keep for name, option in zip(options, choice, strict=True)}) <= allowed * (1 + ROUNDING)
    ]
    return min(found, default=None)


@given(problems())
def test_few_combinations_are_solved_exactly(problem):
    cost, options, allowed = problem
    choice = allocate(cost, options, allowed)
    best = exact(cost, options, allowed)
    if best is None:
        narrowest = min(
            cost(dict(zip(options, k, strict=True))) for k in product(*([o.keep for o in f] for f in options.values()))
        )
        assert cost({name: option.keep for name, option in choice.items()}) == narrowest
    else:
        assert cost({name: option.keep for name, option in choice.items()}) <= allowed * (1 + ROUNDING)
        assert sum(option.divergence for option in choice.values()) == pytest.approx(best)


@settings(max_examples=200)
@given(problems())
def test_many_are_searched_within_a_factor_and_never_beyond_what_is_allowed(problem):
    cost, options, allowed = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(descent, "MAX_COMBINATIONS", 1)
        choice = search(cost, options, allowed)
    best = exact(cost, options, allowed)
    if best is not None and cost({name: option.keep for name, option in choice.items()}) <= allowed:
        assert sum(option.divergence for option in choice.values()) <= 3 * best + 1e-9
    elif best is not None:
        # Only widths that no even narrowing reaches are missed.
        levels = list(descent._levels(options))
        assert all(cost({name: option.keep for name, option in level.items()}) > allowed for level in levels)


def test_a_plateau_of_two_tensors_that_have_to_shrink_together():
    cost = Peak([{"a": 1}, {"b": 1}, {"c": 1}], block=1)
    options = {name: [Option(16, 0.0), Option(8, 1.0), Option(4, 3.0)] for name in "abc"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(descent, "MAX_COMBINATIONS", 1)
        choice = search(cost, options, 8)
    assert {name: option.keep for name, option in choice.items()} == {"a": 8, "b": 8, "c": 8}


def test_a_step_upward_below_the_block():
    """Sixteen wide is cheap and one less is not, so that the neighbour has to give more."""

    class Stairs(Peak):
        def __call__(self, keep):
            return 10 * (keep["a"] % 16 != 0) + keep["a"] + keep["b"]

    options = {
        "a": [Option(32, 0.0), Option(24, 0.1), Option(16, 2.0)],
        "b": [Option(32, 0.0), Option(24, 0.5), Option(16, 0.7)],
    }
    choice = search(Stairs([], 1), options, 50)
    assert {name: option.keep for name, option in choice.items()} == {"a": 32, "b": 16}


def test_what_is_not_allowed_at_all_gives_the_cheapest():
    options = {"a": [Option(16, 0.0), Option(2, 9.0)], "b": [Option(16, 0.0), Option(4, float("inf"))]}
    choice = search(Peak([{"a": 1, "b": 1}], 1), options, 1)
    assert {name: option.keep for name, option in choice.items()} == {"a": 2, "b": 4}


def test_widths_that_are_allowed_but_not_alike_are_found():
    """The narrowest of one group and the widest of the other, which no even narrowing reaches."""

    class Crossed(Peak):
        def __call__(self, keep):
            return keep["a"] + 100 * (keep["b"] < 16) + sum(keep.values()) / 100

    names = ["a", "b", "c", "d", "e"]
    options = {name: [Option(16, 0.0), Option(8, 1.0), Option(4, 2.0), Option(2, 3.0)] for name in names}
    choice = search(Crossed([], 1), options, 5)
    assert {name: option.keep for name, option in choice.items()} == {"a": 4, "b": 16, "c": 16, "d": 16, "e": 16}


def test_groups_that_are_not_at_the_peak_keep_everything():
    cost = Peak([{"a": 4}, {"b": 1}], block=1)
    names = ["a", "b", *(f"other{number}" for number in range(8))]
    options = {name: [Option(16, 0.0), Option(8, 0.5), Option(4, 1.0)] for name in names}
    choice = search(cost, options, 32)
    assert choice["a"].keep == 8
    assert all(choice[name].keep == 16 for name in names[1:])
    assert cost.asked < 400
