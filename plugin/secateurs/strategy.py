"""Which depth and width to try next: the pure part of the search for the smallest network that a gate accepts.

A candidate is a number of bypassed blocks and a target for the width, as a ratio of the whole network's cost. Widths of one depth are
bisected. A greater depth has to show that it pays: first alone, then a step below the best cost so far, then in growing steps.

If acceptance is monotone (a larger target of one depth is accepted if a smaller one is, and depth alone is accepted if more depth alone is),
the cost found is at most `resolution` above the smallest acceptable one. If it is not, what is found is still the cheapest accepted trial.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from itertools import count

__all__ = ["Answer", "Candidate", "candidates"]

PATIENCE = 2
"""Depths in a row whose blocks alone break the gate before no more are tried."""


@dataclass(frozen=True)
class Candidate:
    """A network to try.

    Attributes:
        blocks: how many blocks are bypassed.
        target: cost that the width pass may leave, candidate / baseline; None leaves it out.
    """

    blocks: int
    target: float | None = None


@dataclass(frozen=True)
class Answer:
    """What came of a candidate.

    Attributes:
        cost: really reached, candidate / baseline.
        accepted: whether the gate holds.
        exhausted: fewer blocks could go than asked for.
    """

    cost: float
    accepted: bool
    exhausted: bool = False


def candidates(*, depth: bool, width: bool, resolution: float) -> Generator[Candidate, Answer, None]:
    """Yield candidates, and receive the answer to each with `send`.

    Args:
        depth: whether the number of blocks is open.
        width: whether the target is open.
        resolution: difference of two costs below which they count as the same.
    """
    best, broken = float("inf"), 0
    for blocks in count():
        answer = yield Candidate(blocks)
        if answer.exhausted:
            return
        broken = 0 if answer.accepted else broken + 1
        if answer.accepted and width:
            best = yield from _narrow(blocks, min(best, answer.cost), resolution)
        if not depth or broken == PATIENCE:
            return


def _narrow(blocks: int, best: float, resolution: float) -> Generator[Candidate, Answer, float]:
    """Search the widths of one depth below the best cost so far; return the best cost then.

    Args:
        blocks: the depth.
        best: the least accepted cost of all, and no more than that of the depth alone.
        resolution: see `candidates`.
    """
    low, high, stuck = 0.0, best, float("inf")
    # Without a better depth before it, the answer may lie anywhere: bisect at once. With one, it lies close below, if at all.
    step = resolution if blocks else float("inf")
    while high - low > resolution * (1 + 1e-9):
        target = max(high - step, (low + high) / 2)
        answer = yield Candidate(blocks, target)
        if not answer.accepted:
            low, step = max(target, answer.cost), float("inf")
            continue
        best, high, step = min(best, answer.cost), min(target, answer.cost), 2 * step
        if answer.cost > target and answer.cost >= stuck:
            break  # the narrowest network there is
        stuck = answer.cost
    return best
