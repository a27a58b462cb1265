"""From removal orders to units: how many may stay, and which go.

Widths follow three rules: a floor, a multiple that the target device likes, and a grid that allocation tries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["keep_counts", "keep_for_ratio", "removed_units"]


def keep_for_ratio(units: int, ratio: float, *, min_units: int = 1, round_to: int = 1) -> int:
    """Return how many of `units` stay when about `ratio` of them should.

    The count is the nearest multiple of `round_to` (at least one multiple), never below `min_units` and never above `units`.

    >>> keep_for_ratio(64, 0.3, round_to=8)
    16
    >>> keep_for_ratio(10, 0.01)
    1
    """
    kept = max(round(units * ratio / round_to), 1) * round_to
    floor = -(-min_units // round_to) * round_to
    return min(units, max(kept, floor))


def keep_counts(units: int, grid: int, *, min_units: int = 1, round_to: int = 1) -> list[int]:
    """Return the counts to try, from all units down: at most `grid` even steps, all distinct and allowed.

    >>> keep_counts(16, 4)
    [16, 12, 8, 4]
    >>> keep_counts(16, 8, round_to=8)
    [16, 8]
    """
    ratios = (np.arange(grid, 0, -1) / grid).tolist()
    counts = {keep_for_ratio(units, ratio, min_units=min_units, round_to=round_to) for ratio in ratios}
    return sorted(counts | {units}, reverse=True)


def removed_units(order: Sequence[int], units: int, keep: int) -> tuple[int, ...]:
    """Return the units that go when `keep` of `units` stay: the head of the removal order, sorted.

    >>> removed_units([2, 0, 1], 4, 2)
    (0, 2)
    """
    count = units - keep
    if not 0 <= count <= len(order):
        raise ValueError(f"`keep` must be between {units - len(order)} and {units}, got {keep}")
    return tuple(sorted(int(unit) for unit in order[:count]))
