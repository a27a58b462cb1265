"""The dynamic program against all combinations, and predicted cost against the cost of what surgery builds."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import dense, encoder, images, residual, separable, sequences

from secateurs import cost
from secateurs.allocation import BINS, ROUNDING, Option, WidthCost, allocate, allocate_uniform
from secateurs.groups import Group, Member, plan_removal
from secateurs.passes.survey import checked_groups, sizes
from secateurs.plan import Plan
from secateurs.settings import NodeSettings
from secateurs.surgery import applied


def group(root, units, readers):
    """A group produced by `root` and read by `readers`."""
    index = np.arange(units)[:, None]
    return Group(root, units, (Member(root, "out", index), *(Member(name, "in", index) for name in readers)))


@st.composite
def tables(draw, shared):
    """Two to four groups in a chain (`shared`: neighbours meet in a layer) or apart, with random costs and divergences."""
    count = draw(st.integers(2, 4))
    units = [draw(st.integers(2, 6)) for _ in range(count)]
    names = [f"g{number}" for number in range(count)]
    readers = [[names[number + 1]] if shared and number + 1 < count else [f"r{number}"] for number in range(count)]
    groups = [group(*item) for item in zip(names, units, readers, strict=True)]
    layers = {*names, *(reader for found in readers for reader in found), "other"}
    costs = {name: draw(st.floats(1, 100)) for name in sorted(layers)}
    options = {}
    for name, width in zip(names, units, strict=True):
        keeps = draw(st.sets(st.integers(1, width - 1), min_size=1, max_size=3))
        options[name] = [Option(width, 0.0), *(Option(keep, draw(st.floats(0, 5))) for keep in sorted(keeps))]
    return WidthCost(costs, groups), options, sum(costs.values()) * draw(st.floats(0.2, 1.0))


def best(cost_of, options, allowed):
    """The least summed divergence of all combinations within `allowed`; infinite if there is none."""
    found = [
        sum(option.divergence for option in choice)
        for choice in product(*options.values())
        if cost_of({root: option.keep for root, option in zip(options, choice, strict=True)}) <= allowed
    ]
    return min(found, default=float("inf"))


def check(problem, bins=BINS):
    cost_of, options, allowed = problem
    choice = allocate(cost_of, options, allowed)
    assert set(choice) == set(options)
    assert all(choice[root] in options[root] for root in options)
    spent = cost_of({root: option.keep for root, option in choice.items()})
    narrowest = {root: min(o.keep for o in found) for root, found in options.items()}
    if cost_of(narrowest) > allowed * (1 + ROUNDING):
        assert {root: option.keep for root, option in choice.items()} == narrowest
        return
    assert spent <= allowed * (1 + ROUNDING)
    value = sum(option.divergence for option in choice.values())
    # Costs are rounded up to bins, one bin per group at the most: the result is optimal for a budget that is smaller by that.
    slack = len(options) * (allowed - cost_of(dict.fromkeys(options, 0))) / bins
    least = best(cost_of, options, allowed * (1 + ROUNDING))
    assert least - 1e-9 <= value <= best(cost_of, options, allowed - slack) + 1e-9


@given(tables(shared=False))
def test_groups_apart_are_allocated_optimally(problem):
    assert problem[0].shared() == set()
    check(problem)


@given(tables(shared=True))
def test_groups_that_share_layers_are_allocated_optimally(problem):
    assert problem[0].shared()
    check(problem)


@settings(max_examples=25)
@given(tables(shared=True))
def test_searching_one_group_at_a_time_never_passes_what_is_allowed(problem):
    cost_of, options, allowed = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateurs.allocation.MAX_COMBINATIONS", 1)
        choice = allocate(cost_of, options, allowed)
    narrowest = cost_of({root: min(o.keep for o in found) for root, found in options.items()})
    assert cost_of({root: option.keep for root, option in choice.items()}) <= max(allowed, narrowest) * (1 + 1e-12)


@pytest.mark.parametrize("bins", [1, 4, 16])
@given(problem=tables(shared=False))
def test_coarse_steps_cost_optimality_and_never_the_limit(bins, problem):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateurs.allocation.BINS", bins)
        check(problem, bins)


def test_by_hand():
    cost_of = WidthCost({"a": 10.0, "b": 10.0, "c": 5.0}, [group("a", 4, []), group("b", 4, [])])
    options = {
        "a": [Option(4, 0.0), Option(2, 1.0), Option(1, 5.0)],
        "b": [Option(4, 0.0), Option(2, 3.0), Option(1, 3.5)],
    }
    assert {r: o.keep for r, o in allocate(cost_of, options, 25.0).items()} == {"a": 4, "b": 4}
    assert {r: o.keep for r, o in allocate(cost_of, options, 20.1).items()} == {"a": 2, "b": 4}
    assert {r: o.keep for r, o in allocate(cost_of, options, 17.6).items()} == {"a": 4, "b": 1}
    assert {r: o.keep for r, o in allocate(cost_of, options, 12.6).items()} == {"a": 2, "b": 1}
    assert {r: o.keep for r, o in allocate(cost_of, options, 1.0).items()} == {"a": 1, "b": 1}


@pytest.mark.parametrize("allowed", [10.0, 15.0])
def test_broken_networks_are_taken_only_when_nothing_else_is_allowed(allowed):
    cost_of = WidthCost({"a": 10.0, "b": 10.0}, [group("a", 4, []), group("b", 4, [])])
    broken = float("inf")
    options = {"a": [Option(4, 0.0), Option(2, broken)], "b": [Option(4, 0.0), Option(2, 7.0)]}
    keep = {root: option.keep for root, option in allocate(cost_of, options, allowed).items()}
    assert keep == ({"a": 4, "b": 2} if allowed == 15.0 else {"a": 2, "b": 2})


def test_uniform_takes_the_largest_ratio_that_is_allowed():
    cost_of = WidthCost({"a": 100.0, "b": 60.0}, [group("a", 10, ["b"])])

    def counts(ratio):
        return {"a": max(1, round(10 * ratio))}

    assert allocate_uniform(cost_of, counts, 160.0) == {"a": 10}
    assert allocate_uniform(cost_of, counts, 100.0) == {"a": 6}
    assert allocate_uniform(cost_of, counts, 1.0) == {"a": 1}


NETWORKS = {
    "coupled": (residual, images),
    "depthwise": (separable, images),
    "concatenation": (dense, images),
    "transformer": (encoder, sequences),
}


@pytest.mark.parametrize("kind", ["parameters", "macs"])
@pytest.mark.parametrize(("build", "make"), NETWORKS.values(), ids=NETWORKS)
def test_predicted_cost_is_that_of_the_pruned_network(build, make, kind):
    model, data = build(), make(4)
    groups, _ = checked_groups(model, data, NodeSettings())
    measure = getattr(cost, kind)
    predicted = WidthCost(measure(model, data), groups, sizes(model, groups))
    generator = np.random.default_rng(0)
    plan, keep = Plan(), {}
    for found in groups:
        gone = generator.permutation(found.units)[: found.units // 2]
        keep[found.root] = found.units - len(gone)
        plan += plan_removal(model, found, gone, "test", plan)
    assert predicted({}) == pytest.approx(sum(measure(model, data).values()))
    # A layer's bias shrinks with its output alone; all else is a product of widths.
    rel = 1e-9 if kind == "macs" else 0.03
    assert predicted(keep) == pytest.approx(sum(measure(applied(model, plan), data).values()), rel=rel)


def test_a_part_of_a_concatenation_shrinks_only_its_part():
    index = np.arange(6)[:, None]
    groups = [group("a", 6, []), group("b", 6, [])]
    groups = [
        Group(found.root, 6, (*found.members, Member("reader", "in", index + offset)))
        for found, offset in zip(groups, (0, 6), strict=True)
    ]
    costs = {"a": 6.0, "b": 6.0, "reader": 120.0}
    assert WidthCost(costs, groups)({"a": 3}) == pytest.approx(3 + 6 + 90)
    assert WidthCost(costs, groups, {("reader", "in"): 24})({"a": 3, "b": 3}) == pytest.approx(3 + 3 + 90)
