"""What all node-pruning passes share: groups, widths and refit; a subclass brings the removal orders."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import nn

from secateurs.allocation import Option, WidthCost, allocate, allocate_uniform
from secateurs.errors import RecipeError
from secateurs.groups import Group, plan_removal
from secateurs.information import Order
from secateurs.interfaces import ProgressEvent
from secateurs.passes.base import Context, Pass, Proposal
from secateurs.passes.measured import Trial, best_orders
from secateurs.passes.survey import Survey, checked_groups, fused_attention, merged, sizes
from secateurs.plan import Plan, SplitAttention
from secateurs.probe import execution_order
from secateurs.refit import refittable
from secateurs.report import Skipped
from secateurs.selection import keep_counts, keep_for_ratio, removed_units
from secateurs.settings import NodeSettings

__all__ = ["NodePass"]

TARGETS = ("macs", "parameters", "units")
"""What a node pass can be given a target for."""
_CHOICES = ", ".join(f"`target_{kind}`" for kind in TARGETS)


class NodePass(Pass):
    """Base of the passes that remove units."""

    Settings: ClassVar[type[NodeSettings]] = NodeSettings
    settings: NodeSettings

    def __init__(self, settings: NodeSettings | None = None, **options: Any) -> None:
        super().__init__(settings, **options)
        self._done = False
        self._split = False
        self._known = _Known()
        given = self._given()
        if len(given) > 1:
            got = ", ".join(f"target_{kind}" for kind in given)
            raise RecipeError(f"pass {self.name!r} needs exactly one of {_CHOICES}; got {got}.")

    @property
    def open(self) -> bool:
        """Whether no target is given, so that somebody has to choose one (`aimed`)."""
        return not self._given()

    def aimed(self, kind: str, ratio: float) -> Self:
        """Return a fresh pass with the target `target_<kind>: ratio` that shares what was found out about a network.

        Args:
            kind: one of `TARGETS`.
            ratio: candidate / baseline, in (0, 1].
        """
        targets = {f"target_{other}": None for other in TARGETS} | {f"target_{kind}": ratio}
        twin = type(self)(type(self.settings).model_validate({**self.settings.model_dump(), **targets}))
        twin._known = self._known
        return twin

    def requires(self, context: Context) -> None:
        """Check for calibration data and a target."""
        super().requires(context)
        if self.open:
            raise RecipeError(
                f"pass {self.name!r} needs exactly one of {_CHOICES}; got none. With `budget.accuracy_drop` the smallest network is searched."
            )

    @abc.abstractmethod
    def orders(self, survey: Survey, context: Context) -> Mapping[str, Mapping[str, Order]]:
        """Return the removal orders of each group, by root and by the name of the criterion."""

    def propose(self, context: Context) -> Proposal:
        """Return every group's removals, for the target of the whole network; before it, once, what makes heads removable."""
        if self._done:
            return Proposal(Plan())
        fused = [] if self._split or not self.settings.heads else fused_attention(context.model)
        self._split = True
        if fused:
            why = "its heads can go only with its projections apart"
            return Proposal(Plan(edits=tuple(SplitAttention(module=path, reason=why) for path in fused)))
        self._done = True
        self._find_out(context)
        known = self._known
        if known.survey is None:
            return Proposal(Plan(), known.skipped)
        chosen, details = self._allocate(known.survey, context)
        plan = Plan()
        for group in known.survey.groups:
            option = chosen[group.root]
            units = removed_units(known.orders[group.root][option.criterion].units, group.units, option.keep)
            if units:
                share = f"{len(units)} of {group.units} units by {option.criterion}"
                plan += plan_removal(context.model, group, units, share, plan)
        pruned = [group for group in known.survey.groups if chosen[group.root].keep < group.units]
        return Proposal(
            plan, known.skipped, consumers=self._consumers(context, pruned), ridge=self.settings.ridge, details=details
        )

    def shortfall(self, context: Context) -> str | None:
        """Return by how much the target is missed, or None if it is met."""
        kind, target = self._target()
        if kind == "units":
            return None
        model_cost = context.cost_models(kind)
        left = sum(model_cost(context.model, context.example).values()) / sum(
            model_cost(context.baseline, context.example).values()
        )
        if left <= target * (1 + 1e-9):
            return None
        return f"{self.name}: `target_{kind}` {target:g} was not reached: {left:.4f} is left; what was not pruned is listed with its reason"

    def _given(self) -> list[str]:
        return [kind for kind in TARGETS if getattr(self.settings, f"target_{kind}") is not None]

    def _target(self) -> tuple[str, float]:
        [kind] = self._given()
        return kind, getattr(self.settings, f"target_{kind}")

    def _find_out(self, context: Context) -> None:
        """Fill `_known` for the network of the context, unless it is there."""
        if self._known.model is context.model:
            return
        groups, skipped = checked_groups(context.model, context.example, self.settings, context.describe_attention)
        survey = Survey(context.model, groups, context.calibration, context.seed) if groups else None
        orders = {} if survey is None else self.orders(survey, context)
        self._known.replace(context.model, survey, orders, tuple(skipped))

    def _consumers(self, context: Context, pruned: Sequence[Group]) -> tuple[str, ...]:
        """Return the layers to refit, in order of execution."""
        if self.settings.refit == "none":
            return ()
        readers = {member.module for group in pruned for member in group.of("in")}
        order = [
            name
            for name in execution_order(context.model, context.example)
            if refittable(context.model.get_submodule(name))
        ]
        if self.settings.refit_scope == "consumers":
            return tuple(name for name in order if name in readers)
        first = min((order.index(name) for name in readers if name in order), default=len(order))
        return tuple(order[first:])

    def _allocate(self, survey: Survey, context: Context) -> tuple[Mapping[str, Option], dict[str, Any]]:
        settings, orders = self.settings, self._known.orders
        widths = {"min_units": settings.min_units, "round_to": settings.round_to}

        def uniform(ratio: float) -> Mapping[str, int]:
            return {group.root: keep_for_ratio(group.units, ratio, **widths) for group in survey.groups}

        kind, target = self._target()
        if kind == "units":
            table = self._options({root: [count] for root, count in uniform(target).items()}, context)
            return {root: options[0] for root, options in table.items()}, {"allocation": "target_units"}
        model_cost = context.cost_models(kind)
        costs, known_sizes = model_cost(context.model, context.example), sizes(context.model, survey.groups)
        allowed = target * sum(model_cost(context.baseline, context.example).values())
        if settings.allocation == "uniform":
            keep = allocate_uniform(WidthCost(costs, survey.groups, known_sizes), uniform, allowed)
            return {root: Option(count, 0.0, next(iter(orders[root]))) for root, count in keep.items()}, {
                "allocation": "uniform"
            }
        counts = {group.root: keep_counts(group.units, settings.grid, **widths) for group in survey.groups}
        table = self._options(counts, context)
        kinds = merged(survey.groups) if settings.uniform else [(group, [group]) for group in survey.groups]
        summed = {whole.root: _summed([table[group.root] for group in like]) for whole, like in kinds}
        of_kinds = allocate(WidthCost(costs, [whole for whole, _ in kinds], known_sizes), summed, allowed)
        chosen = {
            group.root: next(o for o in table[group.root] if o.keep == of_kinds[whole.root].keep)
            for whole, like in kinds
            for group in like
        }
        return chosen, {"allocation": "measured", "divergences": _as_details(table)}

    def _options(self, counts: Mapping[str, Sequence[int]], context: Context) -> dict[str, list[Option]]:
        """Return the best removal order of each group at each width, measured on held-out examples."""
        known = self._known
        assert known.survey is not None
        source = context.validation or context.calibration
        return best_orders(
            known.survey,
            known.orders,
            counts,
            source.take(range(min(self.settings.held_out, len(source)))),
            self.settings,
            known.measured,
            lambda done, total, word: context.progress(ProgressEvent(f"{self.name}: allocation", done, total, word)),
        )


@dataclass
class _Known:
    """What was found out about one network: passes that differ only in their target share it."""

    model: nn.Module | None = None
    survey: Survey | None = None
    orders: Mapping[str, Mapping[str, Order]] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()
    measured: dict[Trial, float] = field(default_factory=dict)

    def replace(
        self,
        model: nn.Module,
        survey: Survey | None,
        orders: Mapping[str, Mapping[str, Order]],
        skipped: tuple[Skipped, ...],
    ) -> None:
        """Forget the network before, and remember another one."""
        self.model, self.survey, self.orders, self.skipped = model, survey, orders, skipped
        self.measured = {}


def _as_details(table: Mapping[str, Sequence[Option]]) -> dict[str, list[dict[str, Any]]]:
    return {
        root: [{"keep": o.keep, "criterion": o.criterion, "kl": round(o.divergence, 6)} for o in options]
        for root, options in table.items()
    }


def _summed(tables: Sequence[Sequence[Option]]) -> list[Option]:
    """Return the options of several groups of one size that all take the same width; divergences add up."""
    return [
        Option(same[0].keep, sum(option.divergence for option in same), same[0].criterion)
        for same in zip(*tables, strict=True)
    ]
