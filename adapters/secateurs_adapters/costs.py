"""Cost models of a target: the peak memory and the latency of a network at any widths, before it is built.

Both export the network, ask onnxruntime how it would run it on the target's provider (`runtime_graph`), and add up: the
peak of the planned buffers with scratch and packed weights (`planned`), or the measured times of the kernels (`kernels`).
Widths that are not there yet are written into the exported file (`narrowing`), so that padding to the provider's block,
layout changes and kernels that need scratch are part of the answer. What a verdict rests on is measured on the file that
ships; these figures only steer the search.
"""

from __future__ import annotations

import copy
import tempfile
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from secateurs.errors import ExportError
from secateurs.forward import device_of
from secateurs_adapters.kernels import KernelTable
from secateurs_adapters.narrowing import NarrowedExport, exported_model
from secateurs_adapters.parity import network_outputs
from secateurs_adapters.planned import plan_memory
from secateurs_adapters.runtime_graph import optimised_model, runtime_graph
from secateurs_adapters.session import SessionOptions, check_provider

if TYPE_CHECKING:
    from torch import nn

    from secateurs.data import Dataset
    from secateurs.groups import Group
    from secateurs.settings import TargetSettings

__all__ = ["LatencyCost", "PeakMemoryCost", "latency", "peak_memory"]

_NARROWED: weakref.WeakKeyDictionary[nn.Module, tuple[Hashable, NarrowedExport]] = weakref.WeakKeyDictionary()
"""Exports of the networks that are still in use, with what they were made of: both cost models ask for the same."""


class _Predicted:
    """Implements `secateurs.interfaces.StructureCost`: every widths' file is made and asked about once."""

    def __init__(self, narrowed: NarrowedExport, cost: Callable[[Any], float], additive: bool) -> None:
        self.additive = additive
        self._narrowed, self._cost = narrowed, cost
        self._known: dict[tuple[tuple[str, int], ...], float] = {}

    def __call__(self, keep: Mapping[str, int]) -> float:
        key = tuple(sorted(keep.items()))
        if key not in self._known:
            self._known[key] = self._cost(self._narrowed.at(keep))
        return self._known[key]


class _TargetCost:
    """What both cost models share; subclasses say what a file costs.

    One instance serves a process: what it measured of a provider's kernels holds for every network.
    """

    additive = False

    def __init__(self) -> None:
        self._tables: dict[str, KernelTable] = {}

    def total(self, model: nn.Module, example: Dataset, target: TargetSettings) -> float:
        """Return the cost of a network on a target; see `StructureCostModel`."""
        check_provider(target.provider)
        measured = _as_measured(model, example, target)
        return self._of_file(exported_model(model, measured), measured, target)

    def structure(
        self, model: nn.Module, example: Dataset, groups: Sequence[Group], target: TargetSettings
    ) -> _Predicted:
        """Return the cost of a network at any widths on a target; see `StructureCostModel`."""
        check_provider(target.provider)
        measured = _as_measured(model, example, target)
        narrowed = _narrowed(model, measured, groups)
        return _Predicted(narrowed, lambda exported: self._of_file(exported, measured, target), self.additive)

    def _of_file(self, exported: Any, example: Dataset, target: TargetSettings) -> float:
        options = SessionOptions(
            provider=target.provider, threads=target.threads, provider_options=dict(target.options)
        )
        table = self._tables.setdefault(repr(options), KernelTable(options))
        with tempfile.TemporaryDirectory(prefix="secateurs-") as folder:
            path = Path(folder) / "model.onnx"
            onnx.save(exported, str(path))
            running = optimised_model(path, options)
        shapes = {name: (target.batch_size, *array.shape[1:]) for name, array in example.inputs.items()}
        return self._cost(running, {value.name: shapes[value.name] for value in exported.graph.input}, table)

    def _cost(self, running: Any, shapes: Mapping[str, tuple[int, ...]], table: KernelTable) -> float:
        raise NotImplementedError


def _as_measured(model: nn.Module, example: Dataset, target: TargetSettings) -> Dataset:
    """Return the example at the target's sequence length; as it is where none is given or the network, of fixed length, does not run at it."""
    length = target.sequence_length
    if length is None or example.length in (None, length):
        return example
    longer = example.at_length(length)
    # A position beyond a network's table fails on the CPU; on a GPU it would end the process.
    network = model if device_of(model).type == "cpu" else copy.deepcopy(model).cpu()
    try:
        network_outputs(network, longer.take([0]))
    except ExportError:
        return example
    return longer


def _narrowed(model: nn.Module, example: Dataset, groups: Sequence[Group]) -> NarrowedExport:
    """Return the export of a network, the one of the call before where that was for the same shapes and groups."""
    made_of = (
        example.keyword,
        tuple((name, array.dtype.str, array.shape[1:]) for name, array in example.inputs.items()),
        frozenset(_content(group) for group in groups),
    )
    if model not in _NARROWED or _NARROWED[model][0] != made_of:
        _NARROWED[model] = made_of, NarrowedExport(model, example, groups)
    return _NARROWED[model][1]


def _content(group: Group) -> Hashable:
    """Return all that a group says, for comparison: its indices are arrays, which have no truth value."""
    members = tuple(
        (member.module, member.kind, member.index.shape, member.index.tobytes()) for member in group.members
    )
    return group.root, group.units, members, group.attributes, group.slots


class PeakMemoryCost(_TargetCost):
    """Bytes that onnxruntime's arena holds at the peak of a run: buffers, packed weights and scratch, as its own profile counts them.

    A maximum over time is no sum over layers: two widths may have to shrink together, and one that shrinks below the provider's
    block may raise it.
    """

    def _cost(self, running: Any, shapes: Mapping[str, tuple[int, ...]], table: KernelTable) -> float:
        return float(plan_memory(running, shapes, table).peak_bytes)


class LatencyCost(_TargetCost):
    """Milliseconds of one run: the measured times of the kernels, each alone, and what a run costs without any."""

    additive = True

    def _cost(self, running: Any, shapes: Mapping[str, tuple[int, ...]], table: KernelTable) -> float:
        graph = runtime_graph(running, shapes)
        return sum(table.milliseconds(graph, node) for node in running.graph.node) + table.idle_ms


latency = LatencyCost()
peak_memory = PeakMemoryCost()
