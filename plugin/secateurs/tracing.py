"""Tracing: the dependency graph of torch-pruning, built on a copy of the network. The only door to torch-pruning.

Tracing needs gradients on and leaves modes changed, hence the copy. Every group is enumerated under a deadline and a size cap. Some of
torch-pruning's behaviour is mended while it runs, and restored after: the concatenation inside rotary embeddings, whose index mapping grows
without end; an operation that it cannot map, which costs the groups through it and not the whole network; and the index maps, which are
recomputed for every group although the graph does not change.

References:
    Fang et al. 2023, DepGraph; Torch-Pruning 1.6.1.
"""

from __future__ import annotations

import copy
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
import torch_pruning.dependency.graph as tp_graph
import torch_pruning.dependency.index_mapping as tp_mapping
from torch import nn

from secateurs.data import Dataset
from secateurs.errors import GroupError
from secateurs.forward import call, output_tensors, tensors
from secateurs.layers import is_stored_transposed

__all__ = ["Limits", "Refused", "Trace", "traced"]

OPERATIONS = {
    "concat": "concatenation",
    "split": "split",
    "reshape": "reshape",
    "unbind": "unbinding",
    "expand": "expansion",
    "slice": "slice",
}
"""What torch-pruning maps indices through, by its own word."""

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


class Refused(Exception):  # noqa: N818 - a decision, turned into `Skipped`
    """A group cannot be described; the message says why."""


@dataclass(frozen=True)
class Trace:
    """The dependency graph of a network.

    Attributes:
        twin: the copy that was traced.
        names: of its modules.
        graph: torch-pruning's.
    """

    twin: nn.Module
    names: dict[nn.Module, str]
    graph: Any
    _deadline: _Deadline

    def items(self, module: nn.Module) -> Any:
        """Return torch-pruning's group of all output channels of a layer.

        Raises:
            Refused: it cannot be followed, or not within the limits.
        """
        self._deadline.restart()
        pruner = self.graph.get_pruner_of_module(module)
        try:
            width = pruner.get_out_channels(module)
            return self.graph.get_pruning_group(module, pruner.prune_out_channels, list(range(width)))
        except Refused:
            raise
        except Exception as error:  # any failure inside a third party's code means: a group that is left alone
            raise Refused(f"torch-pruning cannot follow its units ({type(error).__name__}: {error})") from None

    def produces(self, item: Any) -> bool:
        """Tell whether an entry of a group cuts what a layer puts out, not what it reads."""
        return bool(self.graph.is_out_channel_pruning_fn(item.dep.handler))


@contextmanager
def traced(model: nn.Module, example: Dataset, limits: Limits) -> Iterator[Trace]:
    """Trace a network for the length of a block, with torch-pruning mended and gradients on.

    Args:
        model: the network; it is not changed.
        example: inputs for one forward pass.
        limits: time and size.

    Raises:
        GroupError: no dependency graph could be built at all.
    """
    twin = _traceable(model)
    with _mended(limits) as deadline, torch.enable_grad():
        deadline.restart()
        try:
            graph = _build(twin, example)
        except Refused as error:
            raise GroupError(f"the dependency graph of the network cannot be built: {error}") from None
        yield Trace(twin, {module: name for name, module in twin.named_modules()}, graph, deadline)


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
    except Refused:
        raise
    except Exception as error:  # as above: no graph
        raise GroupError(
            f"torch-pruning cannot trace the network ({type(error).__name__}: {error}). Check that it runs on the example inputs and "
            f"that its output depends on them through differentiable operations."
        ) from error


# --- mending torch-pruning while it runs ------------------------------------------------------------------------------------------------


class _Deadline:
    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._end = 0.0

    def restart(self) -> None:
        self._end = time.monotonic() + self._limits.seconds

    def check(self, items: int = 0) -> None:
        if items > self._limits.items:
            raise Refused(
                f"the group has more than {self._limits.items} entries; raise `max_group_items` to try harder"
            )
        if time.monotonic() > self._end:
            raise Refused(f"enumerating took longer than {self._limits.seconds:g} s; raise `time_limit` to try harder")


@contextmanager
def _mended(limits: Limits) -> Iterator[_Deadline]:
    """Replace functions of torch-pruning for the length of a block: deadline, rotary cure, lost operations, index maps computed once."""
    deadline = _Deadline(limits)
    names = {operation: f"update_{operation}_index_mapping" for operation in OPERATIONS}
    originals = {name: getattr(tp_mapping, name) for name in (*names.values(), "update_index_mapping")}
    original_group = tp_graph.Group
    mapped: set[int] = set()
    lost: dict[Any, str] = {}

    class BoundedGroup(original_group):  # type: ignore[misc, valid-type]  # torch-pruning is untyped
        def add_dep(self, dep: Any, idxs: Any) -> None:
            deadline.check(len(self._group))
            if dep.target in lost:
                raise Refused(lost[dep.target])
            super().add_dep(dep, idxs)

    def careful(operation: str) -> Callable[[Any, Any], None]:
        def update(graph: Any, node: Any) -> None:
            deadline.check()
            if operation == "concat" and _is_rotary(node):
                node.enable_index_mapping = False
                return
            try:
                originals[names[operation]](graph, node)
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                lost[node] = f"torch-pruning cannot follow its units through a {OPERATIONS[operation]} ({what})"

        return update

    def update_once(graph: Any) -> None:
        if id(graph) not in mapped:
            mapped.add(id(graph))
            originals["update_index_mapping"](graph)

    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch-pruning warns of is refused or certified here
        try:
            tp_graph.Group = BoundedGroup
            for operation, name in names.items():
                setattr(tp_mapping, name, careful(operation))
            tp_mapping.update_index_mapping = update_once
            yield deadline
        finally:
            tp_graph.Group = original_group
            for name, original in originals.items():
                setattr(tp_mapping, name, original)


def _is_rotary(node: Any) -> bool:
    """Tell whether a concatenation is `cat((-x2, x1), -1)`: not on the channel axis, with a negated input."""
    dim = getattr(node.grad_fn, "_saved_dim", 1)
    return dim != 1 and any("Neg" in str(getattr(source.grad_fn, "name", lambda: "")()) for source in node.inputs)
