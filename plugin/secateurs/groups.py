"""Groups: which (layer, dimension, indices) must shrink together. The only door to torch-pruning.

Torch-Pruning's dependency graph is built on a copy of the network (tracing needs gradients on and leaves modes changed), every group is
enumerated under a deadline and a size cap, and is translated into our own immutable description. What cannot be described is `Skipped` with
its reason; the rest of the network is still offered. A graph is never reused after surgery.

Two of its behaviours are mended while it runs, and restored after: the concatenation inside rotary embeddings, whose index mapping grows
without end, and the index maps, which are recomputed for every group although the graph does not change.

References:
    Fang et al. 2023, DepGraph; Torch-Pruning 1.6.1.
"""

from __future__ import annotations

import copy
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch_pruning
import torch_pruning.dependency.graph as tp_graph
import torch_pruning.dependency.index_mapping as tp_mapping
from torch import nn

from secateurs.data import Dataset
from secateurs.errors import GroupError
from secateurs.forward import call, output_tensors, tensors
from secateurs.layers import (
    CONVOLUTIONS,
    NORMS,
    Kind,
    is_depthwise,
    is_stored_transposed,
    slice_dimensions,
    width_attributes,
)
from secateurs.plan import Plan, RemoveUnits, SetAttribute, Slice
from secateurs.report import Skipped

__all__ = ["Group", "Limits", "Member", "WidthAttribute", "find_groups", "group_importances", "plan_removal"]

Index = npt.NDArray[np.int64]

_LOCK = threading.Lock()


@dataclass(frozen=True)
class Limits:
    """What enumerating the groups of one network may cost.

    Attributes:
        seconds: for building the graph, and again for each group.
        items: entries (layer, dimension) of one group, before merging.
    """

    seconds: float = 60.0
    items: int = 20_000


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


class _Refused(Exception):  # noqa: N818 - a decision, turned into `Skipped`
    """A group cannot be described; the message says why."""


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
    limits = limits or Limits()
    twin = _traceable(model)
    names = {module: name for name, module in twin.named_modules()}
    groups: list[Group] = []
    skipped: list[Skipped] = []
    with _mended(limits) as deadline, torch.enable_grad():
        deadline.restart()
        try:
            graph = _build(twin, example)
        except _Refused as error:
            raise GroupError(f"the dependency graph of the network cannot be built: {error}") from None
        seen: set[nn.Module] = set()
        for module in list(graph.module2node):
            if module in seen or not isinstance(module, (*CONVOLUTIONS, nn.Linear)) or is_depthwise(module):
                continue
            deadline.restart()
            try:
                items = _enumerate(graph, module)
                seen |= {item.dep.target.module for item in items if graph.is_out_channel_pruning_fn(item.dep.handler)}
                groups.append(_describe(items, graph, names))
            except _Refused as error:
                skipped.append(Skipped(where=names.get(module, "?"), reason=str(error)))
    order = {name: position for position, name in enumerate(names.values())}
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
    twin = _traceable(model)
    found: dict[str, list[float]] = {}
    with _mended(limits or Limits()) as deadline, torch.enable_grad():
        deadline.restart()
        try:
            graph = _build(twin, example)
            prepare(twin)
            for root in roots:
                deadline.restart()
                scores = importance(_enumerate(graph, twin.get_submodule(root)))
                if scores is None:
                    raise _Refused(f"the importance gives no score for the group of {root!r}")
                found[root] = scores.detach().double().tolist()
        except _Refused as error:
            raise GroupError(str(error)) from None
    return found


def _traceable(model: nn.Module) -> nn.Module:
    """Return a copy that torch-pruning can trace: gradients on, evaluation mode, only layers that it knows."""
    twin = copy.deepcopy(model).eval()
    for path, layer in list(twin.named_modules()):
        if is_stored_transposed(layer):
            old: Any = layer
            linear = nn.Linear(
                old.weight.shape[0], old.weight.shape[1], dtype=old.weight.dtype, device=old.weight.device
            )
            linear.weight, linear.bias = nn.Parameter(old.weight.detach().T.contiguous()), old.bias
            parent, _, name = path.rpartition(".")
            setattr(twin.get_submodule(parent), name, linear)
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return twin


def _build(twin: nn.Module, example: Dataset) -> Any:
    def forward(network: nn.Module, _: Any) -> Any:
        # Torch-Pruning would try `model(*tensor)` first; calling it ourselves keeps keyword inputs and single tensors apart.
        return [value for value in output_tensors(call(network, example)) if value.requires_grad]

    try:
        return torch_pruning.DependencyGraph().build_dependency(
            twin,
            example_inputs=tuple(tensors(example).values()),
            forward_fn=forward,
            customized_pruners={},
            ignored_layers=[],
            verbose=False,
        )
    except _Refused:
        raise
    except Exception as error:  # any failure inside a third party's tracer means: no graph
        raise GroupError(
            f"torch-pruning cannot trace the network ({type(error).__name__}: {error}). Check that it runs on the example inputs and "
            f"that its output depends on them through differentiable operations."
        ) from error


def _enumerate(graph: Any, module: nn.Module) -> Any:
    pruner = graph.get_pruner_of_module(module)
    try:
        width = pruner.get_out_channels(module)
        return graph.get_pruning_group(module, pruner.prune_out_channels, list(range(width)))
    except _Refused:
        raise
    except Exception as error:  # as above: a group that torch-pruning cannot follow is left alone
        raise _Refused(f"torch-pruning cannot follow its units ({type(error).__name__}: {error})") from None


def _describe(items: Any, graph: Any, names: dict[nn.Module, str]) -> Group:
    root = items[0].dep.target.module
    units = len(items[0].idxs)
    merged: dict[tuple[str, Kind], Index] = {}
    for item in items:
        node = item.dep.target
        module = node.module
        if isinstance(module, nn.Parameter):
            name = graph._param_to_name.get(module, "?")
            raise _Refused(f"the parameter {name!r} belongs to no known kind of layer")
        if module not in names:
            continue  # an operation without parameters: torch-pruning's own placeholder
        kind = _kind(module, names[module], graph.is_out_channel_pruning_fn(item.dep.handler))
        if kind is None:
            continue
        index = _per_unit(item, units, names[module])
        _check_range(module, kind, index, names[module])
        earlier = merged.setdefault((names[module], kind), index)
        if earlier.shape != index.shape or (earlier != index).any():
            raise _Refused(f"{names[module]!r} would be cut in two different ways")
    members = tuple(Member(module, kind, index) for (module, kind), index in merged.items())
    if not any(member.kind == "in" for member in members):
        raise _Refused("nothing reads its units: they are an output of the network")
    return Group(
        names[root], units, tuple(sorted(members, key=lambda member: ("out", "pass", "in").index(member.kind)))
    )


def _kind(module: nn.Module, name: str, produces: bool) -> Kind | None:
    """Tell how a layer takes part, or refuse layers whose part is not described here."""
    if isinstance(module, NORMS):
        return "pass" if module.affine or module.track_running_stats else None
    if is_depthwise(module):
        return "pass"
    if isinstance(module, CONVOLUTIONS):
        if module.groups > 1:
            raise _Refused(f"{name!r} is a grouped convolution ({module.groups} groups)")
        return "out" if produces else "in"
    if isinstance(module, nn.Linear):
        return "out" if produces else "in"
    if isinstance(module, nn.PReLU):
        return "pass" if module.num_parameters > 1 else None
    if next(module.parameters(), None) is None and next(module.buffers(), None) is None:
        return None
    raise _Refused(f"{name!r} is a {type(module).__name__}, whose units cannot be removed yet")


def _check_range(module: nn.Module, kind: Kind, index: Index, name: str) -> None:
    for parameter, dim in slice_dimensions(module, kind):
        tensor = getattr(module, parameter, None)
        if tensor is not None and tensor.ndim > dim and int(index.max()) >= tensor.shape[dim]:
            raise _Refused(
                f"the dependency graph names channel {int(index.max())} of {name!r}, which has {tensor.shape[dim]}; a split, "
                f"concatenation or reshape is not followed rightly"
            )


def _per_unit(item: Any, units: int, name: str) -> Index:
    roots = item.root_idxs
    if roots is None or any(root is None for root in roots):
        raise _Refused(f"the units of {name!r} cannot be traced back to the root")
    buckets: list[list[int]] = [[] for _ in range(units)]
    for index, root in zip(item.idxs, roots, strict=True):
        buckets[int(root)].append(int(index))
    if len({len(bucket) for bucket in buckets}) != 1 or not buckets[0]:
        raise _Refused(f"{name!r} gives its units different numbers of indices")
    index = np.sort(np.array(buckets, dtype=np.int64), axis=1)
    if np.unique(index).size != index.size:
        raise _Refused(f"two units share an index of {name!r}")
    return index


# --- mending torch-pruning while it runs ------------------------------------------------------------------------------------------------


class _Deadline:
    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._end = 0.0

    def restart(self) -> None:
        self._end = time.monotonic() + self._limits.seconds

    def check(self, items: int = 0) -> None:
        if items > self._limits.items:
            raise _Refused(
                f"the group has more than {self._limits.items} entries; raise `max_group_items` to try harder"
            )
        if time.monotonic() > self._end:
            raise _Refused(f"enumerating took longer than {self._limits.seconds:g} s; raise `time_limit` to try harder")


@contextmanager
def _mended(limits: Limits) -> Iterator[_Deadline]:
    """Replace three functions of torch-pruning for the length of a block: deadline, rotary cure, index maps computed once."""
    deadline = _Deadline(limits)
    original_group, original_update = tp_graph.Group, tp_mapping.update_index_mapping
    original_concat = tp_mapping.update_concat_index_mapping
    mapped: set[int] = set()

    class BoundedGroup(original_group):  # type: ignore[misc, valid-type]  # torch-pruning is untyped
        def add_dep(self, dep: Any, idxs: Any) -> None:
            deadline.check(len(self._group))
            super().add_dep(dep, idxs)

    def concat(graph: Any, node: Any) -> None:
        deadline.check()
        if _is_rotary(node):
            node.enable_index_mapping = False
            return
        original_concat(graph, node)

    def update(graph: Any) -> None:
        if id(graph) not in mapped:
            mapped.add(id(graph))
            original_update(graph)

    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch-pruning warns of is refused or certified here
        try:
            tp_graph.Group = BoundedGroup
            tp_mapping.update_concat_index_mapping = concat
            tp_mapping.update_index_mapping = update
            yield deadline
        finally:
            tp_graph.Group = original_group
            tp_mapping.update_concat_index_mapping = original_concat
            tp_mapping.update_index_mapping = original_update


def _is_rotary(node: Any) -> bool:
    """Tell whether a concatenation is `cat((-x2, x1), -1)`: not on the channel axis, with a negated input."""
    dim = getattr(node.grad_fn, "_saved_dim", 1)
    return dim != 1 and any("Neg" in str(getattr(source.grad_fn, "name", lambda: "")()) for source in node.inputs)


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
