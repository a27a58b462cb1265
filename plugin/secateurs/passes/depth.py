"""What all layer-pruning passes share: the layers to refit, and removal until a budget is met.

A pass with a budget brings a `Choice`: which blocks go first. It is asked for more blocks until the budget is met, and passes that differ only
in their budget share it (`aimed`), so that nothing is measured twice.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

from torch import nn

from secateurs.blocks import Block, no_blocks
from secateurs.data import Dataset
from secateurs.errors import RecipeError
from secateurs.passes.base import Context, Pass, Proposal
from secateurs.passes.compared import live_blocks
from secateurs.plan import DropBlock, Plan, SetAttribute
from secateurs.probe import execution_order
from secateurs.refit import refittable
from secateurs.report import Skipped
from secateurs.settings import DepthSettings
from secateurs.surgery import Bypass

__all__ = [
    "Choice",
    "DepthPass",
    "Ranking",
    "Removal",
    "dropping",
    "layers_after",
    "renumbered",
    "within",
]

BUDGETS = ("blocks", "target_macs", "target_parameters")
"""The settings of which exactly one says how much goes."""
_NUMBERS = ("layer_idx", "layer_id", "layer_number")


# --- plans -------------------------------------------------------------------------------------------------------------------------------


def dropping(model: nn.Module, removals: Sequence[Removal]) -> Plan:
    """Return the plan that bypasses blocks, and renumbers the layers behind them."""
    plan = Plan(edits=tuple(removal.block.dropped(removal.reason) for removal in removals))
    return plan + renumbered(model, plan)


def renumbered(model: nn.Module, plan: Plan) -> Plan:
    """Return the edits that close the gaps in the numbers that layers of a list know of themselves (`layer_idx`), which address caches."""
    dropped = _dropped_paths(plan)
    edits = []
    for name, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList) or not any(path.rpartition(".")[0] == name for path in dropped):
            continue
        left = 0
        for position, layer in enumerate(layers):
            path = f"{name}.{position}"
            if path in dropped or isinstance(layer, Bypass):
                continue
            for inner, module in layer.named_modules(prefix=path):
                for attribute in _NUMBERS:
                    number = getattr(module, attribute, None)
                    if isinstance(number, int) and number != left and number <= position:
                        why = f"{position - left} layers before it are gone"
                        edits.append(SetAttribute(module=inner, name=attribute, value=left, reason=why))
            left += 1
    return Plan(edits=tuple(edits))


def _dropped_paths(plan: Plan) -> set[str]:
    return {path for edit in plan.of(DropBlock) for path in edit.paths}


def layers_after(model: nn.Module, example: Dataset, plan: Plan) -> tuple[str, ...]:
    """Return every layer that can be refitted and runs after the first dropped block, outside the dropped blocks, in order of execution.

    Args:
        model: the network before the plan.
        example: inputs for a forward pass.
        plan: what drops blocks.
    """
    dropped = _dropped_paths(plan)
    order = [name for name in execution_order(model, example) if refittable(model.get_submodule(name))]
    inside = [index for index, name in enumerate(order) if within(name, dropped)]
    return tuple(name for name in order[min(inside) :] if not within(name, dropped)) if inside else ()


def within(name: str, paths: Iterable[str]) -> bool:
    """Tell whether a module is one of some modules, or inside one."""
    return any(name == path or name.startswith(path + ".") for path in paths)


# --- removal until a budget is met -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removal:
    """A block that goes.

    Attributes:
        block: the block.
        reason: why it goes, for the plan.
        figures: behind the choice, for the report.
    """

    block: Block
    reason: str
    figures: Mapping[str, Any] = field(default_factory=dict)


class Choice(Protocol):
    """Which blocks of one network go, for any budget."""

    @property
    def details(self) -> Mapping[str, Any]:
        """Figures for the report, beside those of the removals."""
        ...

    @property
    def skipped(self) -> Sequence[Skipped]:
        """What can be bypassed and is left alone, with reasons."""
        ...

    def first(self, count: int) -> Sequence[Removal]:
        """Return the blocks that go if `count` may; fewer where no more can."""
        ...


class Ranking:
    """A choice in which a larger budget takes the same blocks and further ones; looked for only as far as a budget asks.

    Args:
        order: the blocks, the first to go first.
        details: for the report.
        skipped: blocks that are left alone.
    """

    def __init__(
        self, order: Iterator[Removal], details: Mapping[str, Any] | None = None, skipped: Sequence[Skipped] = ()
    ) -> None:
        self.details: Mapping[str, Any] = details or {}
        self.skipped = skipped
        self._order = order
        self._found: list[Removal] = []

    def first(self, count: int) -> Sequence[Removal]:
        """Return the first `count` blocks."""
        while len(self._found) < count:
            removal = next(self._order, None)
            if removal is None:
                break
            self._found.append(removal)
        return self._found[:count]


@dataclass
class _Known:
    """What was found out about one network: passes that differ only in their budget share it."""

    context: Context | None = None
    blocks: list[Block] = field(default_factory=list)
    choice: Choice | None = None


class DepthPass(Pass):
    """Base of the passes that bypass blocks until a budget is met."""

    Settings: ClassVar[type[DepthSettings]] = DepthSettings
    settings: DepthSettings
    limit: ClassVar[str] = "the blocks that cannot be bypassed are listed with the reason"
    """What a user should know whose budget is missed."""

    def __init__(self, settings: DepthSettings | None = None, **options: Any) -> None:
        super().__init__(settings, **options)
        self._known = _Known()
        self._proposed: list[str] | None = None
        given = self._given()
        if len(given) > 1:
            raise RecipeError(
                f"pass {self.name!r} takes one budget; got {' and '.join(f'`{name}`' for name in given)}."
            )

    @property
    def open(self) -> bool:
        """Whether no budget is given, so that somebody has to choose one (`aimed`)."""
        return not self._given()

    def aimed(self, blocks: int) -> Self:
        """Return a fresh pass that removes `blocks` blocks and shares what was measured on a network.

        Args:
            blocks: how many go, at least 1.
        """
        budget = dict.fromkeys(BUDGETS) | {"blocks": blocks}
        twin = type(self)(type(self.settings).model_validate({**self.settings.model_dump(), **budget}))
        twin._known = self._known
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a fresh pass that shares what was measured on a network: a search runs copies of a pass again and again."""
        twin = type(self)(self.settings)
        twin._known = self._known
        return twin

    def requires(self, context: Context) -> None:
        """Check for calibration data and a budget."""
        super().requires(context)
        if self.open:
            choices = ", ".join(f"`{name}`" for name in BUDGETS)
            raise RecipeError(f"pass {self.name!r} has no budget; give one of {choices}.")

    @abc.abstractmethod
    def choice(self, context: Context, blocks: Sequence[Block]) -> Choice:
        """Return which of the blocks of `context.model` go first; asked once per network.

        Args:
            context: of the network.
            blocks: those that are not bypassed yet, in order of execution, removable or not.
        """

    def propose(self, context: Context) -> Proposal:
        """Return the blocks that the budget takes, in one round."""
        if self._proposed is not None:
            return Proposal(Plan())
        known = self._find_out(context)
        assert known.choice is not None
        removals = self._within_budget(context, known.choice)
        self._proposed = [removal.block.path for removal in removals]
        plan = dropping(context.model, removals)
        fixed = [Skipped(where=block.path, reason=block.reason) for block in known.blocks if not block.removable]
        if not known.blocks:
            fixed.append(no_blocks(context.model))
        details = {
            "blocks": [block.path for block in known.blocks],
            **known.choice.details,
            "removals": [{"block": removal.block.path, **removal.figures} for removal in removals],
        }
        return Proposal(
            plan,
            (*fixed, *known.choice.skipped),
            consumers=layers_after(context.model, context.example, plan) if self.settings.refit == "dense" else (),
            ridge=self.settings.ridge,
            recalibrate=True,
            details=details,
        )

    def shortfall(self, context: Context) -> str | None:
        """Return by how much the budget is missed, or None if it is met."""
        name, wanted = self._budget()
        if name == "blocks":
            gone = sum(isinstance(context.model.get_submodule(path), Bypass) for path in self._proposed or ())
            return (
                None
                if gone >= wanted
                else f"{self.name}: `blocks` {wanted:g} was not reached: {gone} went; {self.limit}"
            )
        left, whole = self._costs(context)
        if sum(left.values()) <= wanted * whole * (1 + 1e-9):
            return None
        return (
            f"{self.name}: `{name}` {wanted:g} was not reached: {sum(left.values()) / whole:.4f} is left; {self.limit}"
        )

    def _given(self) -> list[str]:
        return [name for name in BUDGETS if getattr(self.settings, name) is not None]

    def _budget(self) -> tuple[str, float]:
        [name] = self._given()
        return name, getattr(self.settings, name)

    def _costs(self, context: Context) -> tuple[Mapping[str, float], float]:
        """Return the cost of every module of the network now, and the whole cost of the baseline."""
        model_cost = context.cost_models(self._budget()[0].removeprefix("target_"))
        return (
            model_cost(context.model, context.example),
            sum(model_cost(context.baseline, context.example).values()),
        )

    def _find_out(self, context: Context) -> _Known:
        known = self._known
        if not context.asks_as(known.context):
            blocks = live_blocks(context, self.settings.ignored_layers)
            known.context, known.blocks, known.choice = context, blocks, self.choice(context, blocks)
        return known

    def _within_budget(self, context: Context, choice: Choice) -> Sequence[Removal]:
        name, wanted = self._budget()
        if name == "blocks":
            return choice.first(int(wanted))
        costs, whole = self._costs(context)
        removals: Sequence[Removal] = ()
        while True:
            gone = {path for removal in removals for path in removal.block.paths}
            left = sum(cost for module, cost in costs.items() if not within(module, gone))
            if left <= wanted * whole * (1 + 1e-9):
                return removals
            more = choice.first(len(removals) + 1)
            if len(more) <= len(removals):
                return removals
            removals = more
