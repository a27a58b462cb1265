r"""Search over widths for a cost that is no sum over layers: the maximum over time of what a network holds in memory, for example.

Such a cost is a black box with plateaus (two tensors at the peak have to shrink together) and steps upward (a width below the kernels' block).
From widths that are allowed, the search goes back up: each group in turn takes the option of least divergence that is still allowed, until no
group can improve. Which group chooses first decides the result, so that every group is tried as the first; then groups of the best choice are
narrowed, and the others filled up again, as long as that helps. Few combinations are tried one by one, which is exact.

References:
    Kurtic et al. 2023 (ZipLM) and Frantar and Alistarh 2022 (SPDY): a table of measured errors and a search over it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

__all__ = ["Option", "search"]

MAX_COMBINATIONS = 256
"""Combinations of options that are tried one by one; beyond it, the search goes up from allowed widths."""
EVALUATIONS = 4000
"""Different widths that are asked for at the most."""
BROKEN = 1e9
"""Stands for an infinite divergence, which could not be compared in a sum."""


@dataclass(frozen=True)
class Option:
    """One width of one group.

    Attributes:
        keep: units that stay.
        divergence: measured KL divergence from the dense network, in nats.
        criterion: the removal order it was measured with.
    """

    keep: int
    divergence: float
    criterion: str = ""


Choice = dict[str, Option]


def search(
    cost: Callable[[Mapping[str, int]], float], options: Mapping[str, Sequence[Option]], allowed: float
) -> Mapping[str, Option]:
    """Return one option per group so that the cost is allowed at a small summed divergence.

    Args:
        cost: of the whole network when `keep[root]` units of each group stay.
        options: per group, its widths with their divergence.
        allowed: cost that may not be passed.

    Returns:
        The choice: of least divergence where there are at most `MAX_COMBINATIONS`; the cheapest one found if none is allowed.
    """
    box = _Box(cost, allowed)
    ordered = {root: sorted(found, key=_worth) for root, found in options.items()}
    if math.prod(len(found) for found in ordered.values()) <= MAX_COMBINATIONS:
        every = (dict(zip(ordered, picked, strict=True)) for picked in product(*ordered.values()))
        for choice in sorted(every, key=_divergence):
            if box.allows(choice):
                return choice
        return box.cheapest
    starts = [choice for choice in _levels(options) if box.allows(choice)]
    if not starts:
        starts = [choice for choice in (_lowered(box, ordered),) if box.allows(choice)]
    best = min((_filled(box, ordered, start) for start in starts), key=_divergence, default=None)
    if best is None:
        return box.cheapest
    first = starts[-1]
    for root in ordered:
        best = min(best, _filled(box, ordered, first, root), key=_divergence)
    return _improved(box, ordered, best)


def _worth(option: Option) -> tuple[float, int]:
    return (min(option.divergence, BROKEN), -option.keep)


def _divergence(choice: Mapping[str, Option]) -> float:
    return sum(min(option.divergence, BROKEN) for option in choice.values())


class _Box:
    """The cost, asked once for every choice, and the cheapest one so far."""

    def __init__(self, cost: Callable[[Mapping[str, int]], float], allowed: float) -> None:
        self._cost, self._allowed = cost, allowed
        self._known: dict[tuple[int, ...], float] = {}
        self._least = math.inf
        self.cheapest: Choice = {}

    def cost(self, choice: Choice) -> float:
        """Return the cost of a choice; after `EVALUATIONS` of them, what was not asked is infinite."""
        key = tuple(option.keep for option in choice.values())
        if key not in self._known:
            if len(self._known) >= EVALUATIONS:
                return math.inf
            self._known[key] = value = self._cost({root: option.keep for root, option in choice.items()})
            if value < self._least:
                self._least, self.cheapest = value, choice
        return self._known[key]

    def allows(self, choice: Choice) -> bool:
        """Tell whether a choice is allowed."""
        return self.cost(choice) <= self._allowed


def _levels(options: Mapping[str, Sequence[Option]]) -> Iterator[Choice]:
    """Yield choices in which all groups are about equally narrow, from full width to the narrowest."""
    by_width = {root: sorted(found, key=lambda option: -option.keep) for root, found in options.items()}
    most = max(len(found) for found in by_width.values())
    for level in range(most):
        yield {root: found[round(level * (len(found) - 1) / max(most - 1, 1))] for root, found in by_width.items()}


def _lowered(box: _Box, ordered: Mapping[str, Sequence[Option]]) -> Choice:
    """Return the cheapest choice so far with each group in turn at the option that costs least, until it is allowed or none costs less."""
    choice = box.cheapest
    improved = True
    while improved and not box.allows(choice):
        improved = False
        for root in ordered:
            trial = min(({**choice, root: option} for option in ordered[root]), key=box.cost)
            if box.cost(trial) < box.cost(choice):
                choice, improved = trial, True
    return choice


def _filled(box: _Box, ordered: Mapping[str, Sequence[Option]], start: Choice, first: str = "") -> Choice:
    """Let each group take the best option that is allowed, the one that loses most before the others, until none improves."""
    choice = dict(start)
    improved = True
    while improved:
        improved = False
        for root in sorted(choice, key=lambda name: (name != first, -_worth(choice[name])[0], name)):
            for option in ordered[root]:
                if _worth(option) >= _worth(choice[root]):
                    break
                trial = {**choice, root: option}
                if box.allows(trial):
                    choice, improved = trial, True
                    break
    return choice


def _improved(box: _Box, ordered: Mapping[str, Sequence[Option]], best: Choice) -> Choice:
    """Narrow one group of a choice and fill up the others, as long as the divergence falls."""
    again = True
    while again:
        again = False
        for root in ordered:
            for option in ordered[root]:
                if _worth(option) <= _worth(best[root]):
                    continue
                # What one group may lose is at most what the others could win.
                if _worth(option)[0] - _worth(best[root])[0] >= _divergence(best) - _worth(best[root])[0]:
                    break
                trial = {**best, root: option}
                if not box.allows(trial):
                    continue
                filled = _filled(box, {**ordered, root: [option]}, trial)
                if _divergence(filled) < _divergence(best):
                    best, again = filled, True
                    break
    return best
