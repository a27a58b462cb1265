"""Groups: which (layer, dimension, indices) must shrink together.

Every group of torch-pruning's dependency graph is translated into our own immutable description. What cannot be described is `Skipped` with
its reason; the rest of the network is still offered. A graph is never reused after surgery.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.utils import parametrize

from secateurs.data import Dataset
from secateurs.errors import GroupError
from secateurs.layers import (
    CONVOLUTIONS,
    NORMS,
    Kind,
    is_depthwise,
    slice_dimensions,
    width_attributes,
)
from secateurs.plan import Plan, RemoveUnits, SetAttribute, Slice
from secateurs.report import Skipped
from secateurs.tracing import Limits, Refused, Trace, traced
from secateurs.unreached import named, unreached

__all__ = ["Group", "Limits", "Member", "WidthAttribute", "find_groups", "group_importances", "plan_removal"]

ROOTS = (*CONVOLUTIONS, nn.Linear)
"""Layers that a group can start from."""
Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Member:
    """One layer of a group.

    Attributes:
        module: qualified name.
        kind: `out`, the layer produces the units; `in`, it reads them; `pass`, it works on each unit by itself (BatchNorm, depthwise).
        index: shape `(units, per_unit)`: the indices of each unit along the layer's channel dimension.
    """

    module: str
    kind: Kind
    index: Index


@dataclass(frozen=True)
class WidthAttribute:
    """A plain attribute that counts units: it loses `per_unit` for each one that goes, or for each of `units` where it counts only some."""

    module: str
    name: str
    per_unit: int
    units: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Slot:
    """A dimension of a parameter beside the layers that has one entry per unit, for example a table of position biases per head."""

    module: str
    parameter: str
    dim: int


@dataclass(frozen=True)
class Group:
    """Units that can only be removed together, over all layers that they touch.

    Attributes:
        root: the layer the group is named after.
        units: how many there are.
        members: every layer that shrinks, producers first.
        attributes: attributes beyond the layers' own widths, for example a number of heads.
        slots: parameters beyond the layers' own weights.
        observed: whether it was found by watching the network, and is not what the dependency graph says.
    """

    root: str
    units: int
    members: tuple[Member, ...]
    attributes: tuple[WidthAttribute, ...] = ()
    slots: tuple[Slot, ...] = ()
    observed: bool = False

    def of(self, kind: Kind) -> tuple[Member, ...]:
        """Return the members of one kind."""
        return tuple(member for member in self.members if member.kind == kind)

    def refused(self, reason: str) -> Skipped:
        """Return that the group is left alone, with all layers that produce its units."""
        return _refused([self.root, *(member.module for member in self.of("out"))], reason)


def _refused(producers: Sequence[str], reason: str) -> Skipped:
    """Return that the units of some layers, of which the first stands for all, are left alone."""
    root, *others = dict.fromkeys(producers)
    together = f"; {named(others)} would lose the same units" if others else ""
    return Skipped(where=root, reason=f"{reason}{together}")


def find_groups(model: nn.Module, example: Dataset, limits: Limits | None = None) -> tuple[list[Group], list[Skipped]]:
    """Enumerate the groups of a network.

    Args:
        model: the network; it is not changed.
        example: inputs for one forward pass.
        limits: time and size.

    Returns:
        The groups in the order in which their roots are defined, and what was skipped.

    Raises:
        GroupError: no dependency graph could be built at all.
    """
    groups: list[Group] = []
    skipped: list[Skipped] = []
    with traced(model, example, limits or Limits()) as trace:
        seen: set[nn.Module] = set()
        for module in list(trace.graph.module2node):
            if module in seen or not isinstance(module, ROOTS) or is_depthwise(module):
                continue
            producers = [module]
            try:
                items = trace.items(module)
                producers += [item.dep.target.module for item in items if trace.produces(item)]
                groups.append(_describe(items, trace))
            except Refused as error:
                skipped.append(
                    _refused([trace.names[part] for part in producers if isinstance(part, ROOTS)], str(error))
                )
            seen.update(producers)
        order = {name: position for position, name in enumerate(trace.names.values())}
        reached = {name for module, name in trace.names.items() if module in trace.graph.module2node}
    skipped += unreached(model, example, reached)
    groups.sort(key=lambda group: order[group.root])
    return groups, skipped


def group_importances(
    model: nn.Module,
    example: Dataset,
    roots: Sequence[str],
    importance: Callable[[Any], torch.Tensor],
    limits: Limits | None = None,
    prepare: Callable[[nn.Module], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Score the units of some groups with one of torch-pruning's importances.

    Args:
        model: the network; a copy is used.
        example: inputs for one forward pass.
        roots: names of the groups' root layers.
        importance: called with torch-pruning's own group; returns one score per unit, higher is kept.
        limits: time and size.
        prepare: called with the copy before anything is scored, for example to give it gradients.

    Returns:
        The scores by root.

    Raises:
        GroupError: the graph or a group cannot be built, or the importance gives no score.
    """
    found: dict[str, list[float]] = {}
    with traced(model, example, limits or Limits()) as trace:
        prepare(trace.twin)
        for root in roots:
            try:
                scores = importance(trace.items(trace.twin.get_submodule(root)))
            except Refused as error:
                raise GroupError(f"the group of {root!r}: {error}") from None
            if scores is None:
                raise GroupError(f"the importance gives no score for the group of {root!r}")
            found[root] = scores.detach().double().tolist()
    return found


def _describe(items: Any, trace: Trace) -> Group:
    names = trace.names
    root = items[0].dep.target.module
    units = len(items[0].idxs)
    merged: dict[tuple[str, Kind], Index] = {}
    for item in items:
        node = item.dep.target
        module = node.module
        if isinstance(module, nn.Parameter):
            name = trace.graph._param_to_name.get(module, "?")
            raise Refused(f"the parameter {name!r} belongs to no known kind of layer")
        if module not in names:
            continue  # an operation without parameters: torch-pruning's own placeholder
        kind = _kind(module, names[module], trace.produces(item))
        if kind is None:
            continue
        index = _per_unit(item, units, names[module])
        _check_range(module, kind, index, names[module])
        earlier = merged.setdefault((names[module], kind), index)
        if earlier.shape != index.shape or (earlier != index).any():
            raise Refused(f"{names[module]!r} would be cut in two different ways")
    members = tuple(Member(module, kind, index) for (module, kind), index in merged.items())
    if not any(member.kind == "in" for member in members):
        raise Refused(_why_unread([item.dep.target for item in items]))
    return Group(
        names[root], units, tuple(sorted(members, key=lambda member: ("out", "pass", "in").index(member.kind)))
    )


def _why_unread(nodes: Sequence[Any]) -> str:
    """Return why no layer reads the units that pass some nodes of the graph: the network ends there, or torch-pruning goes no further."""
    if any(not node.outputs for node in nodes):
        return "nothing reads its units: they are an output of the network"
    passed = set(nodes)
    ahead = [after.grad_fn for node in nodes for after in node.outputs if after not in passed]
    stops = {re.sub(r"Backward\d*$", "", function.name()).lower() for function in ahead if hasattr(function, "name")}
    where = f": it cannot follow them through {' or '.join(sorted(stops))}" if stops else ""
    return f"torch-pruning does not find what reads its units{where}"


def _kind(module: nn.Module, name: str, produces: bool) -> Kind | None:
    """Tell how a layer takes part, or refuse layers whose part is not described here."""
    if parametrize.is_parametrized(module):
        tensors: Any = module.parametrizations
        tensor = next(iter(tensors))
        raise Refused(
            f"{name!r} is parametrised: its {tensor} is computed and cannot be cut; make it plain with "
            f"`torch.nn.utils.parametrize.remove_parametrizations(layer, {tensor!r})`"
        )
    if isinstance(module, NORMS):
        return "pass" if module.affine or module.track_running_stats else None
    if is_depthwise(module):
        return "pass"
    if isinstance(module, CONVOLUTIONS):
        if module.groups > 1:
            raise Refused(f"{name!r} is a grouped convolution ({module.groups} groups)")
        return "out" if produces else "in"
    if isinstance(module, nn.Linear):
        return "out" if produces else "in"
    if isinstance(module, nn.PReLU):
        return "pass" if module.num_parameters > 1 else None
    if next(module.parameters(), None) is None and next(module.buffers(), None) is None:
        return None
    raise Refused(f"{name!r} is a {type(module).__name__}, whose units cannot be removed yet")


def _check_range(module: nn.Module, kind: Kind, index: Index, name: str) -> None:
    for parameter, dim in slice_dimensions(module, kind):
        tensor = getattr(module, parameter, None)
        if tensor is not None and tensor.ndim > dim and int(index.max()) >= tensor.shape[dim]:
            raise Refused(
                f"the dependency graph names channel {int(index.max())} of {name!r}, which has {tensor.shape[dim]}; a split, "
                f"concatenation or reshape is not followed rightly"
            )


def _per_unit(item: Any, units: int, name: str) -> Index:
    roots = item.root_idxs
    if roots is None or any(root is None for root in roots):
        raise Refused(f"the units of {name!r} cannot be traced back to the root")
    buckets: list[list[int]] = [[] for _ in range(units)]
    for index, root in zip(item.idxs, roots, strict=True):
        buckets[int(root)].append(int(index))
    if len({len(bucket) for bucket in buckets}) != 1 or not buckets[0]:
        raise Refused(f"{name!r} gives its units different numbers of indices")
    index = np.sort(np.array(buckets, dtype=np.int64), axis=1)
    if np.unique(index).size != index.size:
        raise Refused(f"two units share an index of {name!r}")
    return index


# --- from units to edits ----------------------------------------------------------------------------------------------------------------


def plan_removal(
    model: nn.Module, group: Group, units: Sequence[int], reason: str, earlier: Plan | None = None
) -> Plan:
    """Return the edits that remove `units` of `group` from `model`: the slices, then the attributes that depend on widths.

    Args:
        model: the network that the group was found in.
        group: one of its groups.
        units: which of them go.
        reason: for the plan.
        earlier: edits of other groups of `model` that will be applied first; a layer that reads a concatenation is shared with them.
    """
    earlier = earlier or Plan()
    chosen = np.unique(np.asarray(units, dtype=np.int64))
    pieces: list[Slice] = []
    attributes: list[SetAttribute] = []
    for member in group.members:
        layer: Any = model.get_submodule(member.module)
        gone = {int(value) for value in member.index[chosen].ravel()}
        before = 0
        for parameter, dim in slice_dimensions(layer, member.kind):
            tensor = getattr(layer, parameter, None)
            if tensor is not None:
                left = earlier.kept(member.module, parameter, dim, tensor.shape[dim])
                before = tensor.shape[dim] - len(left)
                removed = tuple(position for position, index in enumerate(left) if index in gone)
                pieces.append(Slice(module=member.module, parameter=parameter, dim=dim, removed=removed))
        for name in width_attributes(layer, member.kind):
            value = int(getattr(layer, name)) - before - len(gone)
            attributes.append(
                SetAttribute(module=member.module, name=name, value=value, reason=f"{len(gone)} units of {group.root}")
            )
    for slot in group.slots:
        gone_units = tuple(int(unit) for unit in chosen)
        pieces.append(Slice(module=slot.module, parameter=slot.parameter, dim=slot.dim, removed=gone_units))
    for attribute in group.attributes:
        counted = chosen if attribute.units is None else np.intersect1d(chosen, attribute.units)
        value = int(getattr(model.get_submodule(attribute.module), attribute.name)) - attribute.per_unit * len(counted)
        why = f"{len(counted)} units of {group.root}"
        attributes.append(SetAttribute(module=attribute.module, name=attribute.name, value=value, reason=why))
    edit = RemoveUnits(root=group.root, units=tuple(int(unit) for unit in chosen), slices=tuple(pieces), reason=reason)
    return Plan(edits=(edit, *attributes))
