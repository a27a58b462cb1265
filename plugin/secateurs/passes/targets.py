"""What a node pass aims at: the cost of whole networks, and of the widths that it may choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from secateurs.allocation import LayeredCost, WidthCost
from secateurs.cost import TargetedCost
from secateurs.groups import Group
from secateurs.interfaces import StructureCost, WidthMultiple
from secateurs.passes.base import Context
from secateurs.passes.survey import sizes
from secateurs.settings import NodeSettings

__all__ = ["COSTS", "Prices", "Rounding"]

COSTS = ("macs", "parameters", "latency", "peak_memory")
"""Costs of a network that a pass can be given a target for."""
MEASURED = ("latency", "peak_memory")
"""Those of them that depend on how a provider pads and lays out channels."""


class Prices:
    """The cost of networks and of widths, for one kind of cost.

    Args:
        context: whose cost models are asked.
        kind: one of `COSTS`.
    """

    def __init__(self, context: Context, kind: str) -> None:
        self._context = context
        self._model = context.cost_models(kind)

    def total(self, model: nn.Module) -> float:
        """Return the cost of a network."""
        return sum(self._model(model, self._context.example).values())

    def of_widths(
        self, model: nn.Module, wholes: Sequence[tuple[Group, Sequence[Group]]]
    ) -> WidthCost | LayeredCost | StructureCost:
        """Return the cost of widths, for `allocate`.

        Args:
            model: the network that is pruned.
            wholes: each group that gets one width, with the groups of the network that it stands for.
        """
        groups = [group for group, _ in wholes]
        every = [group for _, like in wholes for group in like]
        if not isinstance(self._model, TargetedCost):
            return WidthCost(self._model(model, self._context.example), groups, sizes(model, every))
        known = self._model.structure(model, self._context.example, every)
        cost = _ByWhole(known, wholes)
        return LayeredCost(cost, groups) if known.additive else cost


class _ByWhole:
    """The cost of widths that several groups share; implements `StructureCost`."""

    def __init__(self, cost: StructureCost, wholes: Sequence[tuple[Group, Sequence[Group]]]) -> None:
        self.additive = cost.additive
        self._cost = cost
        self._roots = {whole.root: [group.root for group in like] for whole, like in wholes}

    def __call__(self, keep: Mapping[str, int]) -> float:
        return self._cost({root: count for whole, count in keep.items() for root in self._roots[whole]})


class Rounding:
    """Which multiples widths are rounded to.

    Args:
        settings: of the pass.
        kind: what the target is for.
        context: whose target is asked, where the settings leave it to the target.

    Attributes:
        why: for the report.
    """

    def __init__(self, settings: NodeSettings, kind: str, context: Context) -> None:
        asked = settings.round_to or ("auto" if kind in MEASURED else 1)
        self._auto = asked == "auto"
        found = context.width_multiple() if asked == "auto" else WidthMultiple(asked, "as given")
        self._channels, self.why = found.channels, f"multiples of {found.channels}: {found.reason}"

    def of(self, group: Group) -> int:
        """Return the multiple for one group; one that a provider likes says nothing of widths below it."""
        per_unit = max(member.index.shape[1] for member in group.of("out"))
        channels = group.units * per_unit
        if not self._auto:
            return self._channels
        return 1 if channels <= self._channels else max(1, self._channels // per_unit)
