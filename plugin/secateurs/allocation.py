r"""Allocation: how many units each group gives up so that the whole network meets a target.

*Measured* allocation prunes and refits one group at a time, at each width of a grid and for each removal order, and measures the divergence
$\mathrm{KL}(\text{dense}\,\|\,\text{pruned})$ on held-out examples; then it picks the widths of least summed divergence that meet the
target. Raw scores are never compared across groups. Where the cost is a sum over layers, groups that share no layer add up in it and are
solved by a dynamic program; the others (residual streams, whose widths multiply those of the groups they feed) are searched around it.
Any other cost, such as a maximum over time, is searched as a black box (`secateurs.descent`).

References:
    Kurtic et al. 2023 (ZipLM) and Frantar and Alistarh 2022 (SPDY): a table of measured errors and a search over it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Protocol, runtime_checkable

import numpy as np

from secateurs.descent import Option, search
from secateurs.groups import Group
from secateurs.interfaces import StructureCost

__all__ = ["LayeredCost", "Option", "WidthCost", "allocate", "allocate_uniform"]

BROKEN = 1e9
"""Stands for an infinite divergence (a network that returns NaN) in the dynamic program, where infinities cannot be compared."""
BINS = 4096
"""Steps into which the dynamic program divides the allowed cost."""
ROUNDING = 1e-12
"""Relative difference of two sums of costs that is rounding and no excess."""
MAX_COMBINATIONS = 512
"""Combinations of shared groups' widths that are searched exhaustively; beyond it, one group at a time."""


MAX_SLOW_COMBINATIONS = 16
"""The same, where a cost is not computed but asked for."""
TIGHTENINGS = 8
"""How often a choice that costs more than its parts did is sought again with less allowed."""


@runtime_checkable
class SeparableCost(Protocol):
    """A cost of widths that is a sum over layers, as far as it is known which groups meet in a layer."""

    def shared(self) -> set[str]:
        """Return a small set of groups without which no layer has two groups."""

    def __call__(self, keep: Mapping[str, int]) -> float:
        """Return the cost of the whole network when `keep[root]` units of each group stay; absent groups keep all."""


class WidthCost:
    """Predicts the cost of widths: each layer's cost is proportional to the product of its input and output width.

    A width that several groups make up (a concatenation) is the sum of their parts.

    Args:
        costs: cost of each module of the dense network, by name.
        groups: the groups whose widths vary.
        sizes: channels of a module's side (`in` or `out`), where groups make up only a part of them; absent sides are all groups'.
    """

    def __init__(
        self, costs: Mapping[str, float], groups: Sequence[Group], sizes: Mapping[tuple[str, str], int] | None = None
    ) -> None:
        parts: dict[str, dict[str, dict[str, int]]] = {}
        self._units = {group.root: group.units for group in groups}
        for group in groups:
            for member in group.members:
                side = parts.setdefault(member.module, {}).setdefault("in" if member.kind == "in" else "out", {})
                side[group.root] = side.get(group.root, 0) + member.index.size
        known = sizes or {}
        self._fixed = sum(value for name, value in costs.items() if name not in parts)
        self._terms: list[tuple[float, tuple[Mapping[str, float], ...]]] = []
        for name, value in costs.items():
            sides = []
            for side_name, side in parts.get(name, {}).items():
                size = known.get((name, side_name), sum(side.values()))
                sides.append({root: entries / size for root, entries in side.items()})
            if sides:
                self._terms.append((value, tuple(sides)))

    def shared(self) -> set[str]:
        """Return a small set of groups without which no layer has two groups: those that share most layers."""
        return _shared([set().union(*sides) for _, sides in self._terms])

    def __call__(self, keep: Mapping[str, int]) -> float:
        """Return the cost of the whole network when `keep[root]` units of each group stay; absent groups keep all."""
        gone = {root: 1 - keep.get(root, units) / units for root, units in self._units.items()}
        return self._fixed + sum(
            value * math.prod(1 - sum(part * gone[root] for root, part in side.items()) for side in sides)
            for value, sides in self._terms
        )


class LayeredCost:
    """A cost that is asked for and is a sum over layers: what one group's width adds depends on the groups in the same layers alone.

    Args:
        cost: of widths.
        groups: the groups whose widths vary.
    """

    def __init__(self, cost: StructureCost, groups: Sequence[Group]) -> None:
        self._cost = cost
        self._layers: dict[str, set[str]] = {}
        for group in groups:
            for member in group.members:
                self._layers.setdefault(member.module, set()).add(group.root)

    def shared(self) -> set[str]:
        """Return a small set of groups without which no layer has two groups: those that share most layers."""
        return _shared(list(self._layers.values()))

    def __call__(self, keep: Mapping[str, int]) -> float:
        """Return the cost of the whole network when `keep[root]` units of each group stay; absent groups keep all."""
        return self._cost(keep)


def _shared(layers: Sequence[set[str]]) -> set[str]:
    chosen: set[str] = set()
    while True:
        clashes: dict[str, set[str]] = {}
        for roots in layers:
            distinct = roots - chosen
            for root in distinct:
                clashes.setdefault(root, set()).update(distinct - {root})
        worst = max(clashes, key=lambda root: (len(clashes[root]), root), default=None)
        if worst is None or not clashes[worst]:
            return chosen
        chosen.add(worst)


def allocate_uniform(
    cost: Callable[[Mapping[str, int]], float],
    counts: Callable[[float], Mapping[str, int]],
    allowed: float,
    *,
    steps: int = 200,
) -> Mapping[str, int]:
    """Return the widths of the largest common ratio that meets the target.

    Args:
        cost: of widths.
        counts: ratio in (0, 1] to the widths of all groups.
        allowed: cost of the whole network that may not be passed.
        steps: ratios to try.

    Returns:
        The widths; those of the smallest ratio if none is allowed.
    """
    best = counts(1.0)
    for ratio in np.linspace(1.0, 1.0 / steps, steps):
        best = counts(float(ratio))
        if cost(best) <= allowed:
            break
    return best


def allocate(
    cost: SeparableCost | StructureCost, options: Mapping[str, Sequence[Option]], allowed: float
) -> Mapping[str, Option]:
    """Return one option per group so that the cost is allowed at the least summed divergence.

    Args:
        cost: of widths; one that says which groups are `shared` is taken for a sum over layers, any other for a black box.
        options: per group, its widths with their divergence; each group has its full width among them.
        allowed: cost of the whole network that may not be passed.

    Returns:
        The choice; the cheapest one found if none is allowed.
    """
    if not isinstance(cost, SeparableCost):
        return search(cost, options, allowed * (1 + ROUNDING))
    choice = _separable(cost, options, allowed)
    # A cost that is measured is a sum over layers only nearly.
    aim = allowed
    for _ in range(TIGHTENINGS):
        spent = cost(_widths(choice))
        if spent <= allowed * (1 + ROUNDING):
            break
        aim *= min(allowed / spent, 1 - ROUNDING)
        choice = _separable(cost, options, aim)
    return choice


def _widths(choice: Mapping[str, Option]) -> dict[str, int]:
    return {root: option.keep for root, option in choice.items()}


def _separable(cost: SeparableCost, options: Mapping[str, Sequence[Option]], allowed: float) -> Mapping[str, Option]:
    shared = sorted(cost.shared() & set(options))
    free = [root for root in options if root not in shared]
    cheapest = {root: min(options[root], key=lambda option: option.keep) for root in options}
    if cost(_widths(cheapest)) > allowed * (1 + ROUNDING):
        return cheapest

    def solve(fixed: Mapping[str, Option]) -> tuple[float, Mapping[str, Option]]:
        choice = _dynamic_program(cost, fixed, {root: options[root] for root in free}, allowed)
        if choice is None:
            return float("inf"), {}
        whole = {**fixed, **choice}
        return sum(option.divergence for option in whole.values()), whole

    most = MAX_COMBINATIONS if isinstance(cost, WidthCost) else MAX_SLOW_COMBINATIONS
    if np.prod([len(options[root]) for root in shared], dtype=float) <= most:
        trials = (
            dict(zip(shared, combination, strict=True)) for combination in product(*(options[root] for root in shared))
        )
        return min((solve(trial) for trial in trials), key=lambda result: result[0])[1] or cheapest
    return _coordinate_search(solve, shared, options) or cheapest


def _coordinate_search(
    solve: Callable[[Mapping[str, Option]], tuple[float, Mapping[str, Option]]],
    shared: Sequence[str],
    options: Mapping[str, Sequence[Option]],
) -> Mapping[str, Option]:
    """Improve one shared group at a time, from full width and from the narrowest, until nothing improves."""
    best: tuple[float, Mapping[str, Option]] = (float("inf"), {})
    for extreme in (max, min):
        fixed = {root: extreme(options[root], key=lambda option: option.keep) for root in shared}
        value, choice = solve(fixed)
        improved = True
        while improved:
            improved = False
            for root in shared:
                for option in options[root]:
                    trial_value, trial = solve({**fixed, root: option})
                    if trial_value < value:
                        value, choice, fixed, improved = trial_value, trial, {**fixed, root: option}, True
        best = min(best, (value, choice), key=lambda result: result[0])
    return best[1]


def _dynamic_program(
    cost: SeparableCost, fixed: Mapping[str, Option], options: Mapping[str, Sequence[Option]], allowed: float
) -> Mapping[str, Option] | None:
    """Choose widths of groups that share no layer; None if the allowed cost cannot be met.

    Costs are rounded up to bins, so that the sum never passes what is allowed.
    """
    widths = {root: option.keep for root, option in fixed.items()}
    narrowest = {root: min(option.keep for option in choices) for root, choices in options.items()}
    base = cost({**widths, **narrowest})
    slack = ROUNDING * abs(allowed)
    if base > allowed + slack:
        return None
    bin_size = max((allowed - base) / BINS, 1e-12)

    def bins_of(root: str, option: Option) -> int:
        extra = cost({**widths, **narrowest, root: option.keep}) - base - slack
        return max(0, math.ceil(extra / bin_size - 1e-9))

    table = np.zeros(BINS + 1)
    picks: list[tuple[str, np.ndarray]] = []
    for root, choices in options.items():
        fresh = np.full(BINS + 1, np.inf)
        pick = np.zeros(BINS + 1, dtype=np.int64)
        for number, option in enumerate(choices):
            bins = bins_of(root, option)
            if bins > BINS:
                continue
            trial = np.full(BINS + 1, np.inf)
            trial[bins:] = table[: BINS + 1 - bins] + min(option.divergence, BROKEN)
            pick = np.where(trial < fresh, number, pick)
            fresh = np.minimum(trial, fresh)
        picks.append((root, pick))
        table = fresh
    choice: dict[str, Option] = {}
    position = BINS
    for root, pick in reversed(picks):
        option = options[root][int(pick[position])]
        choice[root] = option
        position -= bins_of(root, option)
    return choice
