"""What all node-pruning passes share: groups, widths and refit; a subclass brings the removal orders."""

from __future__ import annotations

import abc
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from secateurs.allocation import Option, allocate, allocate_uniform
from secateurs.certificate import keep_certified
from secateurs.data import Dataset
from secateurs.errors import RecipeError
from secateurs.groups import Group, plan_removal
from secateurs.information import Order
from secateurs.interfaces import ProgressEvent
from secateurs.passes.base import Context, Pass, Proposal
from secateurs.passes.measured import Trial, best_orders, divergence_after_refit
from secateurs.passes.survey import Survey, checked_groups, fused_attention, merged
from secateurs.passes.targets import COSTS, Prices, Rounding
from secateurs.plan import Plan, RemoveUnits, SplitAttention
from secateurs.probe import execution_order
from secateurs.refit import refittable
from secateurs.report import Skipped
from secateurs.selection import keep_counts, keep_for_ratio, removed_units
from secateurs.settings import NodeSettings

__all__ = ["NodePass"]

TARGETS = (*COSTS, "units")
"""What a node pass can be given a target for."""
_CHOICES = ", ".join(f"`target_{kind}`" for kind in TARGETS)


class NodePass(Pass):
    """Base of the passes that remove units."""

    Settings: ClassVar[type[NodeSettings]] = NodeSettings
    settings: NodeSettings

    def __init__(self, settings: NodeSettings | None = None, **options: Any) -> None:
        super().__init__(settings, **options)
        self._step = 0
        self._split = False
        self._searched = False
        self._units: dict[str, int] = {}
        self._known = _Known()
        given = self._given()
        if len(given) > 1:
            got = ", ".join(f"target_{kind}" for kind in given)
            raise RecipeError(f"pass {self.name!r} needs exactly one of {_CHOICES}; got {got}.")

    @property
    def open(self) -> bool:
        """Whether no target is given, so that somebody has to choose one (`aimed`)."""
        return not self._given() and not self.settles

    @property
    def settles(self) -> bool:
        """Whether no target is given because the removal orders tell how many units go (`Order.removable`)."""
        return False

    @property
    def folds(self) -> int:
        """Folds of the calibration examples that the removal orders need the statistics of."""
        return 1

    def aimed(self, kind: str, ratio: float) -> Self:
        """Return a fresh pass with the target `target_<kind>: ratio` that shares what was found out about a network.

        What is shared must not depend on the target, or the first of several twins would decide for the others.

        Args:
            kind: one of `TARGETS`.
            ratio: candidate / baseline, in (0, 1].
        """
        targets = {f"target_{other}": None for other in TARGETS} | {f"target_{kind}": ratio}
        twin = type(self)(type(self.settings).model_validate({**self.settings.model_dump(), **targets}))
        twin._known, twin._searched = self._known, True
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
        """Return every group's removals, for the target of the next step; before the first, once, what makes heads removable."""
        if self._step == self.settings.steps:
            return Proposal(Plan())
        fused = [] if self._split or not self.settings.heads else fused_attention(context.model)
        self._split = True
        if fused:
            why = "its heads can go only with its projections apart"
            return Proposal(Plan(edits=tuple(SplitAttention(module=path, reason=why) for path in fused)))
        self._step += 1
        self._find_out(context)
        known = self._known
        if known.survey is None:
            self._step = self.settings.steps
            return Proposal(Plan(), known.skipped)
        for group in known.survey.groups:
            self._units.setdefault(group.root, group.units)
        choices, details = self._allocate(known.survey, context)
        if len(choices) > 1:
            self._certify(known.survey, choices.values(), context)
        plans = {
            name: self._plan(known.survey, chosen, context, without=known.refused) for name, chosen in choices.items()
        }
        best, compared = self._compare(plans, context)
        return Proposal(
            plans[best],
            known.skipped,
            consumers=self._consumers(context, plans[best]),
            ridge=self.settings.ridge,
            details={**details, **compared},
        )

    def shortfall(self, context: Context) -> str | None:
        """Return by how much the target is missed, or None if it is met or none is given."""
        if not self._given():
            return None
        kind, target = self._target()
        if kind == "units":
            return None
        prices = Prices(context, kind)
        left = prices.total(context.model) / prices.total(context.baseline)
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
        if context.asks_as(self._known.context):
            return
        groups, skipped = checked_groups(context.model, context.example, self.settings, context.describe_attention)
        survey = Survey(context.model, groups, context.calibration, context.seed, self.folds) if groups else None
        orders = {} if survey is None else self.orders(survey, context)
        self._known.replace(context, survey, orders, tuple(skipped))

    def _plan(
        self,
        survey: Survey,
        chosen: Mapping[str, Option],
        context: Context,
        *,
        only: Collection[str] | None = None,
        without: Collection[str] = (),
    ) -> Plan:
        """Return the removals of an allocation, of some groups or of all."""
        plan = Plan()
        for group in survey.groups:
            if group.root in without or (only is not None and group.root not in only):
                continue
            option = chosen[group.root]
            units = removed_units(self._known.orders[group.root][option.criterion].units, group.units, option.keep)
            if units:
                share = f"{len(units)} of {group.units} units by {option.criterion}"
                plan += plan_removal(context.model, group, units, share, plan)
        return plan

    def _certify(self, survey: Survey, choices: Iterable[Mapping[str, Option]], context: Context) -> None:
        """Find out which groups cannot go, before whole networks are built: what no certificate holds for may not even run."""
        known = self._known
        for chosen in choices:
            smaller = {group.root for group in survey.groups if chosen[group.root].keep < group.units}
            unknown = smaller - known.sound - known.refused
            if unknown:
                certified = keep_certified(
                    context.model, self._plan(survey, chosen, context, only=unknown), context.calibration
                )
                known.skipped += certified.vetoed
                known.sound |= {edit.root for edit in certified.plan.of(RemoveUnits)}
                known.refused |= unknown - known.sound

    def _compare(self, plans: Mapping[str, Plan], context: Context) -> tuple[str, dict[str, Any]]:
        """Return which plan leaves the network closest to what it was, refitted as a whole; the first one where there is nothing to compare."""
        distinct = {
            name: plan for number, (name, plan) in enumerate(plans.items()) if plan not in list(plans.values())[:number]
        }
        if len(distinct) == 1:
            return next(iter(plans)), {}
        found: dict[str, float] = {}
        for name, plan in distinct.items():
            context.progress(ProgressEvent(f"{self.name}: whole networks", len(found) + 1, len(distinct), name))
            found[name] = divergence_after_refit(
                context, plan, self._consumers(context, plan), self._held_out(context, whole=True), self.settings
            )
        return min(found, key=lambda name: found[name]), {"whole networks": found}

    def _consumers(self, context: Context, plan: Plan) -> tuple[str, ...]:
        """Return the layers to refit, in order of execution."""
        assert self._known.survey is not None
        gone = {edit.root for edit in plan.of(RemoveUnits)}
        if self.settings.refit == "none":
            return ()
        readers = {
            member.module for group in self._known.survey.groups if group.root in gone for member in group.of("in")
        }
        order = [
            name
            for name in execution_order(context.model, context.example)
            if refittable(context.model.get_submodule(name))
        ]
        if self.settings.refit_scope == "consumers":
            return tuple(name for name in order if name in readers)
        first = min((order.index(name) for name in readers if name in order), default=len(order))
        return tuple(order[first:])

    def _allocate(self, survey: Survey, context: Context) -> tuple[dict[str, Mapping[str, Option]], dict[str, Any]]:
        """Return allocations by name: over all removal orders together, and over each of them alone."""
        settings, orders = self.settings, self._known.orders
        if self.settles:
            rounding = Rounding(settings, "", context)
            settled = {"confidence": self._settled(survey, rounding)}
            return settled, {"allocation": "confidence", "rounding": rounding.why}
        kind, target = self._target()
        rounding = Rounding(settings, kind, context)

        def widths(group: Group) -> dict[str, int]:
            return {"min_units": settings.min_units, "round_to": rounding.of(group)}

        def uniform(ratio: float) -> Mapping[str, int]:
            return {
                group.root: min(group.units, keep_for_ratio(self._units[group.root], ratio, **widths(group)))
                for group in survey.groups
            }

        share = self._step / settings.steps
        if kind == "units":
            target **= share
            tables = self._tables({root: [count] for root, count in uniform(target).items()}, context)
            return {name: {root: options[0] for root, options in table.items()} for name, table in tables.items()}, {
                "allocation": "target_units"
            }
        prices = Prices(context, kind)
        allowed = target * prices.total(context.baseline)
        if share < 1:
            entry = prices.total(context.entry or context.model)
            allowed = entry * min(1.0, allowed / entry) ** share
        apart = [(group, [group]) for group in survey.groups]
        if settings.allocation == "uniform":
            keep = allocate_uniform(prices.of_widths(context.model, apart), uniform, allowed)
            return {"uniform": {root: Option(count, 0.0, next(iter(orders[root]))) for root, count in keep.items()}}, {
                "allocation": "uniform",
                "rounding": rounding.why,
            }
        counts = {group.root: keep_counts(group.units, settings.grid, **widths(group)) for group in survey.groups}
        kinds = merged(survey.groups) if settings.uniform else apart
        cost = prices.of_widths(context.model, kinds)
        tables = self._tables(counts, context)

        def chosen(table: Mapping[str, list[Option]]) -> Mapping[str, Option]:
            summed = {whole.root: _summed([table[group.root] for group in like]) for whole, like in kinds}
            of_kinds = allocate(cost, summed, allowed)
            return {
                group.root: next(o for o in table[group.root] if o.keep == of_kinds[whole.root].keep)
                for whole, like in kinds
                for group in like
            }

        details = {"allocation": "measured", "rounding": rounding.why, "divergences": _as_details(tables["all"])}
        return {name: chosen(table) for name, table in tables.items()}, details

    def _settled(self, survey: Survey, rounding: Rounding) -> Mapping[str, Option]:
        """Return the widths that the orders tell, rounded up; in uniform mode the widest of a kind."""
        settings, chosen = self.settings, dict[str, Option]()
        kinds = merged(survey.groups) if settings.uniform else [(group, [group]) for group in survey.groups]
        for _, like in kinds:
            firsts = {group.root: next(iter(self._known.orders[group.root].items())) for group in like}
            wanted = max(group.units - (firsts[group.root][1].removable or 0) for group in like)
            multiple = max(rounding.of(group) for group in like)
            rounded = -(-max(wanted, settings.min_units) // multiple) * multiple
            for group in like:
                chosen[group.root] = Option(min(group.units, rounded), 0.0, firsts[group.root][0])
        return chosen

    def _held_out(self, context: Context, *, whole: bool = False) -> Dataset:
        """Return the examples that divergences are measured on: four times as many for the few networks that are compared as a `whole`."""
        source = context.validation or context.calibration
        return source.take(range(min(self.settings.held_out * (4 if whole else 1), len(source))))

    def _tables(self, counts: Mapping[str, Sequence[int]], context: Context) -> dict[str, dict[str, list[Option]]]:
        """Return the measured options of each group: of the best removal order at each width (`all`), and of each order alone."""
        known = self._known
        assert known.survey is not None
        best = best_orders(
            known.survey,
            context.entry or context.model,
            known.orders,
            counts,
            self._held_out(context),
            self.settings,
            known.measured,
            lambda done, total, word: context.progress(ProgressEvent(f"{self.name}: allocation", done, total, word)),
        )
        names = list(dict.fromkeys(name for orders in known.orders.values() for name in orders))
        if not self.settings.compare or len(names) == 1 or any(set(o) != set(names) for o in known.orders.values()):
            return {"all": best}
        alone = {
            name: {
                root: [Option(keep, known.measured[root, keep, name], name) for keep in widths]
                for root, widths in counts.items()
            }
            for name in names
        }
        return {"all": best, **alone}


@dataclass
class _Known:
    """What was found out about one network: passes that differ only in their target share it."""

    context: Context | None = None
    survey: Survey | None = None
    orders: Mapping[str, Mapping[str, Order]] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()
    measured: dict[Trial, float] = field(default_factory=dict)
    sound: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)

    def replace(
        self,
        context: Context,
        survey: Survey | None,
        orders: Mapping[str, Mapping[str, Order]],
        skipped: tuple[Skipped, ...],
    ) -> None:
        """Forget the network before, and remember another one."""
        self.context, self.survey, self.orders, self.skipped = context, survey, orders, skipped
        self.measured, self.sound, self.refused = {}, set(), set()


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
