"""What all node-pruning passes share: groups, widths and refit; a subclass brings the removal orders.

The groups of the dependency graph are checked against the readers observed on the running network before anything is scored, so that a graph
that couples the wrong channels is refused with a reason and the rest is still pruned.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.allocation import Option, WidthCost, allocate, allocate_uniform
from secateurs.attention import DescribeAttention, attention_groups
from secateurs.data import Dataset
from secateurs.errors import RecipeError
from secateurs.forward import kl_divergence, predict
from secateurs.groups import Group, Limits, find_groups, plan_removal
from secateurs.information import Order
from secateurs.interfaces import ProgressEvent
from secateurs.layers import as_weight, is_matrix_layer, weight_dims, weight_matrix, widths_of
from secateurs.moments import Moments, PairedMoments, Positions, output_positions, patches, unit_columns
from secateurs.passes.base import Context, Pass, Proposal
from secateurs.plan import Plan, SplitAttention
from secateurs.probe import execution_order, sweep
from secateurs.readers import observe_readers
from secateurs.refit import ROWS, following_norms, refittable, solve
from secateurs.report import Skipped
from secateurs.selection import keep_counts, keep_for_ratio, removed_units
from secateurs.settings import NodeSettings
from secateurs.surgery import is_splittable

__all__ = ["NodePass", "Survey", "checked_groups", "norm_order"]


class Survey:
    """The groups of one structure and the statistics of everything that reads them, gathered in one sweep.

    Attributes:
        model: the dense network.
        groups: the groups that may be pruned.
        moments: of each reader's input, by reader.
        norms: the BatchNorm behind each consumer that has one.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], calibration: Dataset, seed: int) -> None:
        self.model = model
        self.groups = list(groups)
        self.norms = following_norms(model, calibration.take(range(min(2, len(calibration)))))
        names = list(dict.fromkeys(member.module for group in groups for member in group.of("in")))
        self.moments = _reader_moments(
            model, [name for name in names if refittable(model.get_submodule(name))], calibration, seed
        )

    def columns(self, name: str, index: np.ndarray) -> Tensor:
        """Return the weight columns of each unit for one reader, shape `(units, b)`."""
        return unit_columns(self.model.get_submodule(name), torch.as_tensor(index))

    def constant(self, name: str) -> bool:
        """Tell whether a refit of this consumer may fit a constant term."""
        return self.model.get_submodule(name).bias is not None or name in self.norms


def checked_groups(
    model: nn.Module, example: Dataset, settings: NodeSettings, describing: DescribeAttention | None = None
) -> tuple[list[Group], list[Skipped]]:
    """Return the groups that may be pruned, and what was skipped.

    Attention heads come from descriptions; the dependency graph's own groups through the same projections, which would cut heads apart, are
    left out. Of every group, the readers observed on the running network must be those that it tells. In uniform mode, the groups of one kind
    stay or go together.

    Args:
        model: the network; it is not changed.
        example: inputs for the forward passes.
        settings: which groups are wanted, and the limits of the search.
        describing: the hook `secateurs_describe_attention`.
    """
    found, skipped = find_groups(model, example, Limits(settings.time_limit, settings.max_group_items))
    heads, refused = attention_groups(model, describing) if describing is not None else ([], [])
    projections = {member.module for group in heads for member in group.of("out")}
    groups = [group for group in found if not projections & {member.module for member in group.of("out")}] + heads
    skipped = [item for item in skipped if item.where not in projections] + refused
    with_heads = {group.root for group in heads}
    kept: list[Group] = []
    for group in groups:
        if group.root in with_heads and not settings.heads:
            skipped.append(Skipped(where=group.root, reason="its units are attention heads, and `heads` is off"))
            continue
        reason = _disagreement(model, example, group)
        if reason is None and not settings.coupled and len(group.of("out")) > 1:
            reason = "coupled with other layers through additions, and `coupled` is off"
        if reason is None and group.units < 2:
            reason = "it has a single unit"
        if reason is None:
            kept.append(group)
        else:
            skipped.append(Skipped(where=group.root, reason=reason))
    return _whole_kinds(model, kept, skipped) if settings.uniform else (kept, skipped)


def _kind(group: Group) -> tuple[str, int]:
    """Return what groups that a config file gives one width have in common."""
    return _unnumbered(group.root), group.units


def _unnumbered(path: str) -> str:
    """Return a path with `*` for each index into a list: `layer.0.fc1` becomes `layer.*.fc1`."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _whole_kinds(
    model: nn.Module, kept: Sequence[Group], skipped: Sequence[Skipped]
) -> tuple[list[Group], list[Skipped]]:
    """Leave out every group of which a like one was skipped, with the reason of that one.

    What was skipped is a layer, or an attention module whose heads could not be described.
    """

    def width(path: str) -> int | None:
        layer = model.get_submodule(path)
        return widths_of(layer)[1] if is_matrix_layer(layer) else None

    whole: list[Group] = []
    found = list(skipped)
    for group in kept:
        like = (
            item
            for item in skipped
            if f"{_unnumbered(group.root)}.".startswith(f"{_unnumbered(item.where)}.")
            and width(item.where) in (width(group.root), None)
        )
        first = next(like, None)
        if first is None:
            whole.append(group)
        else:
            reason = f"`uniform` is on, and {first.where!r} of its kind is left alone: {first.reason}"
            found.append(Skipped(where=group.root, reason=reason))
    return whole, found


def _merged(groups: Sequence[Group]) -> list[tuple[Group, list[Group]]]:
    """Return one group for each kind, which stands for the cost of all of them, with the groups of that kind."""
    kinds: dict[tuple[str, int], list[Group]] = {}
    for group in groups:
        kinds.setdefault(_kind(group), []).append(group)
    return [
        (replace(like[0], members=tuple(member for group in like for member in group.members)), like)
        for like in kinds.values()
    ]


def _disagreement(model: nn.Module, example: Dataset, group: Group) -> str | None:
    """Disturb every other unit of a group and compare who reads it with what the graph says."""
    some = np.arange(0, group.units, 2)
    reading = observe_readers(model, example, {member.module: _flat(member.index[some]) for member in group.of("out")})
    if reading.reaches_output:
        return "its units reach the output of the network"
    expected = {member.module: set(_flat(member.index[some])) for member in group.of("in")}
    for name in sorted({*expected, *reading.readers}):
        seen, told = set(reading.readers.get(name, ())), expected.get(name, set())
        # A dead unit shows nowhere, so fewer channels than the graph tells are no contradiction; the certificate has the last word.
        if seen and seen <= told:
            continue
        return (
            f"the dependency graph is wrong about {name!r}: it reads {len(seen)} channels of these units where the graph says "
            f"{len(told)}{' (others)' if len(seen) == len(told) else ''}; a normalisation, padding or reshape mixes them"
        )
    return None


def _sizes(model: nn.Module, groups: Sequence[Group]) -> dict[tuple[str, str], int]:
    """Return the channels of every side of a layer that a group takes part in."""
    sizes: dict[tuple[str, str], int] = {}
    for member in (member for group in groups for member in group.members):
        layer = model.get_submodule(member.module)
        weight = getattr(layer, "weight", None)
        if weight is not None:
            out_dim, in_dim = weight_dims(layer)
            side, dim = ("in", in_dim) if member.kind == "in" else ("out", out_dim)
            sizes[member.module, side] = weight.shape[dim]
    return sizes


def _fused_attention(model: nn.Module) -> list[str]:
    """Return the attention modules of torch's own kind, each object once; one that is shared under two names is left as it is."""
    names: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path and is_splittable(module):
            names.setdefault(module, []).append(path)
    return [paths[0] for paths in names.values() if len(paths) == 1]


def _flat(index: np.ndarray) -> tuple[int, ...]:
    return tuple(int(value) for value in np.sort(index.ravel()))


def _reader_moments(
    model: nn.Module, names: Sequence[str], data: Dataset, seed: int, batch_size: int = 64
) -> dict[str, Moments]:
    batches = max(1, -(-len(data) // batch_size))
    positions = Positions(max(ROWS // batches, 1), seed)
    found: dict[str, Moments] = {}

    def tap_for(name: str, layer: nn.Module) -> Any:
        def tap(inputs: Tensor, output: Tensor) -> None:
            x = patches(layer, inputs, positions.draw(len(output), output_positions(layer, output)))
            found.setdefault(name, Moments.zeros(x.shape[1])).update(x)

        return tap

    sweep(model, data, {name: tap_for(name, model.get_submodule(name)) for name in names}, batch_size=batch_size)
    return found


def norm_order(model: nn.Module, group: Group) -> Order:
    """Order units by the squared norm of all weights that produce or read them."""
    norm = torch.zeros(group.units, dtype=torch.float64)
    for member in group.members:
        layer: Any = model.get_submodule(member.module)
        weight = layer.weight.detach().double()
        if weight.ndim < 2:
            continue
        out_dim, in_dim = weight_dims(layer)
        dim = in_dim if member.kind == "in" else out_dim
        per_channel = weight.movedim(dim, 0).flatten(1).square().sum(1)
        norm += per_channel[torch.as_tensor(member.index)].sum(1)
    order = norm.argsort()[:-1]
    return Order(tuple(order.tolist()), tuple(norm[order].tolist()))


class NodePass(Pass):
    """Base of the passes that remove units."""

    Settings: ClassVar[type[NodeSettings]] = NodeSettings
    settings: NodeSettings

    def __init__(self, settings: NodeSettings | None = None, **options: Any) -> None:
        super().__init__(settings, **options)
        self._done = False
        self._split = False
        given = [
            name
            for name in ("target_macs", "target_parameters", "target_units")
            if getattr(self.settings, name) is not None
        ]
        if len(given) != 1:
            raise RecipeError(
                f"pass {self.name!r} needs exactly one of `target_macs`, `target_parameters` and `target_units`; got "
                f"{', '.join(given) or 'none'}."
            )

    @abc.abstractmethod
    def orders(self, survey: Survey, context: Context) -> Mapping[str, Mapping[str, Order]]:
        """Return the removal orders of each group, by root and by the name of the criterion."""

    def propose(self, context: Context) -> Proposal:
        """Return every group's removals, for the target of the whole network; before it, once, what makes heads removable."""
        if self._done:
            return Proposal(Plan())
        fused = [] if self._split or not self.settings.heads else _fused_attention(context.model)
        self._split = True
        if fused:
            why = "its heads can go only with its projections apart"
            return Proposal(Plan(edits=tuple(SplitAttention(module=path, reason=why) for path in fused)))
        self._done = True
        groups, skipped = checked_groups(context.model, context.example, self.settings, context.describe_attention)
        if not groups:
            return Proposal(Plan(), tuple(skipped))
        survey = Survey(context.model, groups, context.calibration, context.seed)
        orders = self.orders(survey, context)
        chosen, details = self._allocate(survey, orders, context)
        plan = Plan()
        for group in groups:
            option = chosen[group.root]
            units = removed_units(orders[group.root][option.criterion].units, group.units, option.keep)
            if units:
                share = f"{len(units)} of {group.units} units by {option.criterion}"
                plan += plan_removal(context.model, group, units, share, plan)
        return Proposal(
            plan,
            tuple(skipped),
            consumers=self._consumers(context, [group for group in groups if chosen[group.root].keep < group.units]),
            ridge=self.settings.ridge,
            details=details,
        )

    def shortfall(self, context: Context) -> str | None:
        """Return by how much the target is missed, or None if it is met."""
        if self.settings.target_units is not None:
            return None
        kind, target = self._target()
        model_cost = context.cost_models(kind)
        left = sum(model_cost(context.model, context.example).values()) / sum(
            model_cost(context.baseline, context.example).values()
        )
        if left <= target * (1 + 1e-9):
            return None
        return f"{self.name}: `target_{kind}` {target:g} was not reached: {left:.4f} is left; what was not pruned is listed with its reason"

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

    def _allocate(
        self, survey: Survey, orders: Mapping[str, Mapping[str, Order]], context: Context
    ) -> tuple[Mapping[str, Option], dict[str, Any]]:
        settings = self.settings
        first = {group.root: next(iter(orders[group.root])) for group in survey.groups}
        widths = {"min_units": settings.min_units, "round_to": settings.round_to}

        def uniform(ratio: float) -> Mapping[str, int]:
            return {group.root: keep_for_ratio(group.units, ratio, **widths) for group in survey.groups}

        if settings.target_units is not None:
            keep = uniform(settings.target_units)
            table = self._measure(survey, orders, {root: [count] for root, count in keep.items()}, context)
            best = {root: min(options, key=lambda option: option.divergence) for root, options in table.items()}
            return best, {"allocation": "target_units"}
        kind, target = self._target()
        model_cost = context.cost_models(kind)
        kinds = _merged(survey.groups) if settings.uniform else [(group, [group]) for group in survey.groups]
        costs, sizes = model_cost(context.model, context.example), _sizes(context.model, survey.groups)
        allowed = target * sum(model_cost(context.baseline, context.example).values())
        if settings.allocation == "uniform":
            keep = allocate_uniform(WidthCost(costs, survey.groups, sizes), uniform, allowed)
            return {root: Option(count, 0.0, first[root]) for root, count in keep.items()}, {"allocation": "uniform"}
        counts = {group.root: keep_counts(group.units, settings.grid, **widths) for group in survey.groups}
        table = self._measure(survey, orders, counts, context)
        summed = {whole.root: _summed([table[group.root] for group in like]) for whole, like in kinds}
        widths_of_kinds = allocate(WidthCost(costs, [whole for whole, _ in kinds], sizes), summed, allowed)
        chosen = {
            group.root: next(o for o in table[group.root] if o.keep == widths_of_kinds[whole.root].keep)
            for whole, like in kinds
            for group in like
        }
        divergences = {
            root: [{"keep": o.keep, "criterion": o.criterion, "kl": round(o.divergence, 6)} for o in options]
            for root, options in table.items()
        }
        return chosen, {"allocation": "measured", "divergences": divergences}

    def _target(self) -> tuple[str, float]:
        if self.settings.target_macs is not None:
            return "macs", self.settings.target_macs
        assert self.settings.target_parameters is not None
        return "parameters", self.settings.target_parameters

    def _measure(
        self,
        survey: Survey,
        orders: Mapping[str, Mapping[str, Order]],
        counts: Mapping[str, Sequence[int]],
        context: Context,
    ) -> dict[str, list[Option]]:
        """Prune and refit each group alone, at each width and in each order, and measure the divergence from the dense network."""
        source = context.validation or context.calibration
        held_out = source.take(range(min(self.settings.held_out, len(source))))
        reference = predict(survey.model, held_out)
        trials = sum(len(widths) * len(orders[root]) for root, widths in counts.items())
        table: dict[str, list[Option]] = {}
        done = 0
        for group in survey.groups:
            table[group.root] = []
            for keep in counts[group.root]:
                options = []
                for criterion, order in orders[group.root].items():
                    done += 1
                    context.progress(
                        ProgressEvent(f"{self.name}: allocation", done, trials, f"{group.root} {keep}/{group.units}")
                    )
                    if keep == group.units:
                        options.append(Option(keep, 0.0, criterion))
                        break
                    units = removed_units(order.units, group.units, keep)
                    with _pruned_alone(survey, group, units, self.settings):
                        options.append(
                            Option(keep, kl_divergence(reference, predict(survey.model, held_out)), criterion)
                        )
                table[group.root].append(min(options, key=lambda option: option.divergence))
        return table


def _summed(tables: Sequence[Sequence[Option]]) -> list[Option]:
    """Return the options of several groups of one size that all take the same width; divergences add up."""
    return [
        Option(same[0].keep, sum(option.divergence for option in same), same[0].criterion)
        for same in zip(*tables, strict=True)
    ]


@contextmanager
def _pruned_alone(survey: Survey, group: Group, units: Sequence[int], settings: NodeSettings) -> Any:
    """Make the dense network behave as if `units` of one group were removed and their readers refitted, for the length of a block."""
    with ExitStack() as stack:
        for member in group.of("in"):
            layer: Any = survey.model.get_submodule(member.module)
            weight, shift = _without(survey, member.module, member.index[list(units)], settings)
            original = layer.weight.detach().clone()

            def restore(layer: Any = layer, original: Tensor = original) -> None:
                with torch.no_grad():
                    layer.weight.copy_(original)

            stack.callback(restore)
            with torch.no_grad():
                layer.weight.copy_(weight)
            if shift is not None:
                shaped = shift.to(original.dtype)
                if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                    shaped = shaped.reshape(-1, *(1,) * len(layer.kernel_size))

                def add(_: nn.Module, __: Any, output: Tensor, shaped: Tensor = shaped) -> Tensor:
                    return output + shaped

                stack.callback(layer.register_forward_hook(add).remove)
        yield


def _without(survey: Survey, name: str, index: np.ndarray, settings: NodeSettings) -> tuple[Tensor, Tensor | None]:
    """Return a reader's weight without some of its input channels, refitted, and the constant to add to its output."""
    layer: Any = survey.model.get_submodule(name)
    flat = weight_matrix(layer).double()
    removed = survey.columns(name, index).flatten()
    mask = torch.ones(flat.shape[1], dtype=torch.bool)
    mask[removed] = False
    kept = mask.nonzero().squeeze(1)
    weight = torch.zeros_like(flat)
    if settings.refit == "none" or name not in survey.moments:
        weight[:, kept] = flat[:, kept]
        return as_weight(layer, weight), None
    full = survey.moments[name]
    bias = torch.zeros(len(flat), dtype=torch.float64) if layer.bias is None else layer.bias.detach().double()
    mean_y = flat @ full.mean + bias
    part = Moments(full.count, full.sum_x[kept], full.sum_xx[kept][:, kept])
    cross = flat @ full.second[:, kept] + torch.outer(bias, full.mean[kept])
    paired = PairedMoments(part, mean_y * full.count, cross * full.count)
    solution = solve(paired, flat[:, kept], constant=survey.constant(name), ridge=settings.ridge)
    weight[:, kept] = solution.weight
    shift = None if solution.shift is None else solution.shift - bias
    return as_weight(layer, weight), shift
