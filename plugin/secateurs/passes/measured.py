"""Measured divergence: prune and refit one group alone, at each width and in each removal order, and compare with the dense network.

References:
    Kurtic et al. 2023 (ZipLM): a table of measured errors, one group at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.allocation import Option
from secateurs.data import Dataset
from secateurs.forward import predict
from secateurs.groups import Group
from secateurs.information import Order
from secateurs.layers import as_weight, weight_matrix
from secateurs.moments import Moments, PairedMoments
from secateurs.outputs import kl_divergence, unsure_temperature
from secateurs.passes.base import Context
from secateurs.passes.survey import Survey
from secateurs.plan import Plan
from secateurs.prefix import Prefix, Timeline
from secateurs.refit import refit, solve
from secateurs.selection import removed_units
from secateurs.settings import NodeSettings
from secateurs.surgery import applied

__all__ = ["Trial", "best_orders", "divergence_after_refit", "pruned_alone"]


Trial = tuple[str, int, str]
"""A group's root, how many units it keeps, and the name of the removal order."""


def best_orders(
    survey: Survey,
    dense: nn.Module,
    orders: Mapping[str, Mapping[str, Order]],
    counts: Mapping[str, Sequence[int]],
    held_out: Dataset,
    settings: NodeSettings,
    measured: dict[Trial, float],
    progress: Callable[[int, int, str], None],
) -> dict[str, list[Option]]:
    """Return, per group and width, the removal order of least divergence when that group alone is pruned and refitted.

    Args:
        survey: groups and statistics of the network that is pruned.
        dense: the network that it should behave like; where it has been pruned already, the divergences are the increases of what it has.
        orders: removal orders by group and criterion.
        counts: the widths to try, by group.
        held_out: examples that the statistics were not gathered on.
        settings: of the refit.
        measured: divergences that are known; new ones are added.
        progress: called with trials done, their total, and a word on the current one.
    """
    reference, now = predict(dense, held_out), 0.0
    temperature = unsure_temperature(reference)
    if dense is not survey.model:
        now = kl_divergence(reference, predict(survey.model, held_out), temperature)
    timeline = Timeline(survey.model, held_out.take(range(min(2, len(held_out)))))
    total = sum(len(counts[group.root]) * len(orders[group.root]) for group in survey.groups)
    table: dict[str, list[Option]] = {}
    prefix: Prefix | None = None
    done = 0
    for group in survey.groups:
        unknown = any(
            (group.root, keep, name) not in measured for keep in counts[group.root] for name in orders[group.root]
        )
        if unknown:
            readers = [member.module for member in group.of("in")]
            prefix = Prefix(survey.model, held_out, readers, timeline, start=prefix)
        table[group.root] = []
        for keep in counts[group.root]:
            options = []
            for criterion, order in orders[group.root].items():
                done += 1
                progress(done, total, f"{group.root} {keep}/{group.units}")
                trial = (group.root, keep, criterion)
                if trial not in measured and prefix is not None:
                    units = removed_units(order.units, group.units, keep)
                    with pruned_alone(survey, group, units, settings):
                        measured[trial] = (
                            kl_divergence(reference, prefix.predict(), temperature) - now if units else 0.0
                        )
                options.append(Option(keep, measured[trial], criterion))
            table[group.root].append(min(options, key=lambda option: option.divergence))
    return table


def divergence_after_refit(
    context: Context, plan: Plan, consumers: Sequence[str], held_out: Dataset, settings: NodeSettings
) -> float:
    """Return the divergence of the whole network with `plan` applied and `consumers` refitted, from the network that the pass found.

    Args:
        context: network and data.
        plan: removals from `context.model`.
        consumers: the layers to refit, in order of execution; none for no refit.
        held_out: examples that the statistics were not gathered on.
        settings: of the refit.
    """
    dense = context.entry or context.model
    pruned = applied(context.model, plan)
    refit(pruned, dense, context.done + plan, consumers, context.calibration, ridge=settings.ridge, seed=context.seed)
    reference = predict(dense, held_out)
    return kl_divergence(reference, predict(pruned, held_out), unsure_temperature(reference))


@contextmanager
def pruned_alone(survey: Survey, group: Group, units: Sequence[int], settings: NodeSettings) -> Any:
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
