r"""Removal by confidence: a unit stays only if it surely carries information that the units beside it do not.

Units are tried in turn, the one that loses least first. The loss $\theta$ of the unit is estimated from all examples and, for each of $k$
folds, from the others ($\theta_{-r}$, the delete-one jackknife). The pseudo-values $k\theta - (k-1)\theta_{-r}$ have a mean free of the bias of
order $1/n$ that a plug-in estimate of information has, and a one-sided Student interval with $k-1$ degrees of freedom. If its lower end is
above the margin, the unit stays for good; otherwise it goes, and the next one is tried against what is left.

References:
    Westphal et al. 2024 (MIPP: keep a unit only if more than x % sure); Miller 1974 (jackknife).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import lru_cache

import torch

from secateurs.information import Criterion, Order
from secateurs.intervals import student_interval

__all__ = ["HALF_A_BIT", "confident_elimination", "lower_bound"]

HALF_A_BIT = 0.5 * math.log(2.0)
"""Information of one variable that is as large as the noise, in nats."""


@lru_cache(maxsize=64)
def _one_sided_quantile(confidence: float, count: int) -> float:
    """Return Student's t at `confidence`, one-sided, for the mean of `count` values."""
    values = [1.0] + [0.0] * (count - 1)
    low, _ = student_interval(values, 2 * confidence - 1)
    return (statistics.fmean(values) - low) * math.sqrt(count) / statistics.stdev(values)


def lower_bound(values: Sequence[float], confidence: float) -> float:
    """Return the number that the mean of a population exceeds with a confidence, one-sided, by Student's t.

    Args:
        values: a few independent values, at least two.
        confidence: from .5, which gives the mean of the values, to below 1.

    >>> round(lower_bound([1.0, 2.0, 3.0], 0.95), 3)
    0.314
    """
    if len(values) < 2 or not 0.5 <= confidence < 1:
        raise ValueError(f"at least 2 values and a confidence in [0.5, 1), got {len(values)} and {confidence}")
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - _one_sided_quantile(confidence, len(values)) * spread


def confident_elimination(
    whole: Sequence[Criterion],
    left_out: Sequence[Sequence[Criterion]],
    units: int,
    *,
    confidence: float,
    margin: float = 0.0,
    keep: int = 1,
) -> Order:
    """Remove every unit that does not surely cost more than a margin.

    Args:
        whole: one criterion per reader, on all examples; they are used up.
        left_out: the same, for each fold, on the examples of all others.
        units: how many units the group has.
        confidence: with which a unit's loss must be above the margin for it to stay; in [0.5, 1). The higher, the more goes.
        margin: in the criteria's unit.
        keep: how many stay at the least.

    Returns:
        The units that go, as they went, then those that stay, the least loss first; the last unit is left out.
    """
    folds = len(left_out)
    settled = torch.zeros(units, dtype=torch.bool)
    removed: list[tuple[int, float]] = []
    stays: list[tuple[int, float]] = []
    while len(removed) < units - keep and len(removed) + len(stays) < units:
        totals = torch.stack([criterion.scores() for criterion in whole]).sum(0).masked_fill(settled, float("inf"))
        unit = int(totals.argmin())
        settled[unit] = True
        loss = float(totals[unit])
        without = [sum(float(criterion.scores()[unit]) for criterion in fold) for fold in left_out]
        if lower_bound([folds * loss - (folds - 1) * value for value in without], confidence) > margin:
            stays.append((unit, loss))
            continue
        removed.append((unit, loss))
        for criterion in (*whole, *(criterion for fold in left_out for criterion in fold)):
            criterion.remove(unit)
    rest = torch.stack([criterion.scores() for criterion in whole]).sum(0)
    stays += [(unit, float(rest[unit])) for unit in range(units) if not settled[unit]]
    order = removed + sorted(stays, key=lambda item: item[1])
    found = order[: units - 1]
    return Order(tuple(unit for unit, _ in found), tuple(loss for _, loss in found), min(len(removed), len(found)))
