"""What node pruning looks at before it removes anything: the groups that may go, and the statistics of everything that reads them.

The groups of the dependency graph are checked against the readers observed on the running network before anything is scored, so that a graph
that couples the wrong channels is refused with a reason and the rest is still pruned.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.attention import DescribeAttention, attention_groups
from secateurs.data import Dataset
from secateurs.errors import first_line
from secateurs.forward import DOES_NOT_RUN
from secateurs.groups import Group, Limits, find_groups
from secateurs.information import Order
from secateurs.layers import is_matrix_layer, weight_dims, widths_of
from secateurs.moments import unit_columns
from secateurs.passes.base import ignoring
from secateurs.plan import unnumbered
from secateurs.probe import execution_order
from secateurs.readers import observe_readers
from secateurs.refit import following_norms, refittable
from secateurs.report import Skipped
from secateurs.rows import reader_moments
from secateurs.settings import NodeSettings
from secateurs.streams import observed_groups
from secateurs.surgery import is_splittable

__all__ = ["Survey", "checked_groups", "fused_attention", "merged", "norm_order", "sizes", "weight_order"]


class Survey:
    """The groups of one structure and the statistics of everything that reads them, gathered in one sweep.

    Attributes:
        model: the dense network.
        groups: the groups that may be pruned.
        moments: of each reader's input, by reader.
        folds: the same moments, apart for each of several folds of the examples; empty for a single fold.
        norms: the BatchNorm behind each consumer that has one.

    Args:
        model: the dense network.
        groups: the groups that may be pruned.
        calibration: examples for the statistics.
        seed: of the drawn positions.
        folds: into which the examples are dealt.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], calibration: Dataset, seed: int, folds: int = 1
    ) -> None:
        self.model = model
        self.groups = list(groups)
        self.norms = following_norms(model, calibration.take(range(min(2, len(calibration)))))
        names = list(dict.fromkeys(member.module for group in groups for member in group.of("in")))
        readers = [name for name in names if refittable(model.get_submodule(name))]
        apart = reader_moments(model, readers, calibration, folds=folds, seed=seed)
        self.moments = {name: functools.reduce(operator.add, parts) for name, parts in apart.items()}
        self.folds = apart if folds > 1 else {}

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
    left out. Of every group, the readers observed on the running network must be those that it tells; a stream of which they are not is taken
    apart by watching it. In uniform mode, the groups of one kind stay or go together.

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
    idle = _idle(model, example)
    kept: list[Group] = []
    for group in groups:
        if group.root in with_heads and not settings.heads:
            skipped.append(group.refused("its units are attention heads, and `heads` is off"))
            continue
        reason = _refusal(model, example, group, settings) or _unknown_reader(model, group, idle)
        watched = settings.coupled and len(group.of("out")) > 1 and group.root not in with_heads
        found, left = observed_groups(model, example, group) if reason is not None and watched else ([], [])
        found = [part for part in found if _refusal(model, example, part, settings) is None]
        if reason is None:
            kept.append(group)
        elif found:
            kept += found
            skipped += left
        else:
            skipped.append(group.refused(reason))
    return _whole_kinds(model, kept, skipped) if settings.uniform else (kept, skipped)


def _refusal(model: nn.Module, example: Dataset, group: Group, settings: NodeSettings) -> str | None:
    """Return why a group may not be pruned, or None."""
    for member in group.members:
        pattern = None if member.kind == "in" else ignoring(member.module, settings.ignored_layers)
        if pattern is not None:
            return f"`ignored_layers` names {pattern!r}, and {member.module!r} would lose outputs"
    reason = _disagreement(model, example, group)
    if reason is None and not settings.coupled and len(group.of("out")) > 1:
        return "coupled with other layers through additions, and `coupled` is off"
    if reason is None and group.units < 2:
        return "it has a single unit"
    return reason


def _idle(model: nn.Module, example: Dataset) -> dict[str, int]:
    """Return the layers that the network has and did not call, with the channels they read: what these are cannot be observed."""
    layers = {name: module for name, module in model.named_modules() if is_matrix_layer(module)}
    parts = {
        child for module in model.modules() if isinstance(module, nn.MultiheadAttention) for child in module.modules()
    }
    called = set(execution_order(model, example))
    return {name: widths_of(layer)[0] for name, layer in layers.items() if name not in called and layer not in parts}


def _unknown_reader(model: nn.Module, group: Group, idle: Mapping[str, int]) -> str | None:
    """Return why a layer that was not called may read a group, or None: it reads as many channels as one that does."""
    widths = {widths_of(model.get_submodule(member.module))[0] for member in group.of("in")}
    name = next((name for name, width in idle.items() if width in widths), None)
    if name is None:
        return None
    return (
        f"{name!r} was not called with the first calibration examples, and reads as many channels as the readers of these units: whether it "
        "reads them in training or with other inputs is not known. Remove it from the network, or put examples that call it first"
    )


def _kind(group: Group) -> tuple[str, int]:
    """Return what groups that a config file gives one width have in common."""
    return unnumbered(group.root), group.units


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
            if f"{unnumbered(group.root)}.".startswith(f"{unnumbered(item.where)}.")
            and width(item.where) in (width(group.root), None)
        )
        first = next(like, None)
        if first is None:
            whole.append(group)
        else:
            reason = f"`uniform` is on, and {first.where!r} of its kind is left alone: {first.reason}"
            found.append(group.refused(reason))
    return whole, found


def merged(groups: Sequence[Group]) -> list[tuple[Group, list[Group]]]:
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
    disturbed = {member.module: _flat(member.index[some]) for member in group.of("out")}
    try:
        reading = observe_readers(model, example, disturbed)
    except DOES_NOT_RUN as error:
        return f"who reads its units cannot be observed, since the network does not run with other values in them: {first_line(error)}"
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


def sizes(model: nn.Module, groups: Sequence[Group]) -> dict[tuple[str, str], int]:
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


def fused_attention(model: nn.Module) -> list[str]:
    """Return the attention modules of torch's own kind, each object once; one that is shared under two names is left as it is."""
    names: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path and is_splittable(module):
            names.setdefault(module, []).append(path)
    return [paths[0] for paths in names.values() if len(paths) == 1]


def _flat(index: np.ndarray) -> tuple[int, ...]:
    return tuple(int(value) for value in np.sort(index.ravel()))


def norm_order(model: nn.Module, group: Group) -> Order:
    """Order units by the squared norm of all weights that produce or read them."""
    return weight_order(model, group, lambda weight: weight.detach().double().square())


def weight_order(model: nn.Module, group: Group, weigh: Callable[[nn.Parameter], Tensor]) -> Order:
    """Order units by a quantity summed over all weights that produce or read them.

    Args:
        model: the network.
        group: the units.
        weigh: a weight to what each of its entries counts, same shape.
    """
    total = torch.zeros(group.units, dtype=torch.float64)
    for member in group.members:
        layer: Any = model.get_submodule(member.module)
        if layer.weight.ndim < 2:
            continue
        out_dim, in_dim = weight_dims(layer)
        dim = in_dim if member.kind == "in" else out_dim
        per_channel = weigh(layer.weight).double().movedim(dim, 0).flatten(1).sum(1)
        total += per_channel[torch.as_tensor(member.index)].sum(1).cpu()
    order = total.argsort()[:-1]
    return Order(tuple(order.tolist()), tuple(total[order].tolist()))
