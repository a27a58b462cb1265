"""What a search has to find: the passes of a recipe that leave open how much they remove."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from secateurs.errors import RecipeError
from secateurs.passes.base import Pass
from secateurs.passes.depth import DepthPass
from secateurs.passes.width import NodePass
from secateurs.strategy import Candidate

__all__ = ["Aims", "Step", "find_aims"]


@runtime_checkable
class _TakesBlocks(Protocol):
    def aimed(self, blocks: int) -> Pass: ...


@dataclass(frozen=True)
class Step:
    """A pass on the way to a candidate.

    Attributes:
        position: of the pass in the recipe.
        aim: the number of blocks or the target that it was given; None if it has its own.
        run: the pass, ready for one run.
    """

    position: int
    aim: float | None
    run: Pass


@dataclass(frozen=True)
class Aims:
    """The passes of a search, and which of them the search aims.

    Attributes:
        passes: all, in order; none of them runs itself.
        cost: for which the width pass gets its target.
        depth: position of the pass whose number of blocks is searched.
        width: position of the pass whose target is searched.
    """

    passes: tuple[Pass, ...]
    cost: str
    depth: int | None = None
    width: int | None = None

    def steps(self, candidate: Candidate) -> list[Step]:
        """Return the passes that lead to a candidate, fresh."""
        found = []
        for position, step in enumerate(self.passes):
            if position == self.depth:
                if candidate.blocks:
                    assert isinstance(step, _TakesBlocks)
                    found.append(Step(position, candidate.blocks, step.aimed(candidate.blocks)))
            elif position == self.width:
                if candidate.target is not None:
                    assert isinstance(step, NodePass)
                    found.append(Step(position, candidate.target, step.aimed(self.cost, candidate.target)))
            else:
                found.append(Step(position, None, copy.deepcopy(step)))
        return found


def find_aims(passes: Sequence[Pass], *, accuracy_drop: float | None, cost: str, asked: bool) -> Aims | None:
    """Return what a search has to find, or None where every pass has its target.

    A pass that removes all blocks that it may (`max_blocks` not given) is searched beside one that is open, or if the search is asked for.

    Args:
        passes: in order.
        accuracy_drop: of the budget, to which is searched.
        cost: for which a width pass gets its target.
        asked: whether the recipe has a `search` section.

    Raises:
        RecipeError: a target is missing and there is no budget to search to, nothing is open, or too much is.
    """
    width = [index for index, step in enumerate(passes) if isinstance(step, NodePass) and step.open]
    depth = [index for index, step in enumerate(passes) if isinstance(step, DepthPass) and step.open]
    if not width and not depth and not asked:
        return None
    depth = depth or [
        index
        for index, step in enumerate(passes)
        if isinstance(step, _TakesBlocks) and getattr(step.settings, "max_blocks", 0) is None
    ]
    if not width and not depth:
        raise RecipeError(
            "`search` is given, and every pass has its target; leave out `search`, or the target that it should find."
        )
    first = passes[[*width, *depth][0]]
    if accuracy_drop is None:
        raise RecipeError(
            f"pass {first.name!r} has no target; give it one of {_targets(first)}, or give `budget.accuracy_drop`, to which the smallest "
            f"network is then searched."
        )
    for kind, found in (("width", width), ("depth", depth)):
        if len(found) > 1:
            names = " and ".join(repr(passes[index].name) for index in found)
            raise RecipeError(
                f"the search finds one target of {kind}, and {names} leave theirs open; give all but one a target."
            )
    if width and f"target_{cost}" not in type(first.settings).model_fields:
        raise RecipeError(
            f"`search.cost` is {cost!r}, for which pass {first.name!r} takes no target; it takes {_targets(first)}."
        )
    return Aims(tuple(passes), cost, depth[0] if depth else None, width[0] if width else None)


def _targets(step: Pass) -> str:
    """Return the settings that say how much goes, for messages."""
    names = type(step.settings).model_fields
    return ", ".join(f"`{name}`" for name in names if name.startswith("target_") or name in ("blocks", "max_blocks"))
