"""Single kernels of a provider: the scratch, the packed weights and the time of one node at one shape, measured and remembered.

A node of the graph that really runs (`runtime_graph.optimised_model`) becomes a model of its own with its shapes fixed,
and is run in a session that rewrites nothing. The table is the cost model of the provider: what a kernel needs is asked of
it, not derived, so that a new onnxruntime or another instruction set changes the answers and no formula here.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
from onnx import helper, numpy_helper

from secateurs.errors import SecateursError
from secateurs_adapters.arena import FIRST_REGION
from secateurs_adapters.runtime_graph import RuntimeGraph
from secateurs_adapters.session import Session, SessionOptions, seeded_inputs

__all__ = ["SMALL_CONSTANT", "KernelMemory", "KernelTable"]

T = TypeVar("T")

SMALL_CONSTANT = 128
"""Constants of fewer bytes are copied into the arena; larger ones stay where the file was read."""
_PLAIN = frozenset(
    {
        "com.microsoft.nchwc.Conv",
        "com.microsoft.nchwc.MaxPool",
        "com.microsoft.nchwc.AveragePool",
        "com.microsoft.nchwc.GlobalAveragePool",
        "com.microsoft.nchwc.ReorderInput",
        "com.microsoft.nchwc.ReorderOutput",
        *("Add", "Clip", "Concat", "Div", "Flatten", "GlobalAveragePool", "HardSigmoid", "Identity", "LeakyRelu"),
        *(
            "MaxPool",
            "Mul",
            "Pad",
            "Relu",
            "Reshape",
            "Shape",
            "Sigmoid",
            "Slice",
            "Squeeze",
            "Sub",
            "Tanh",
            "Transpose",
        ),
        "Unsqueeze",
    }
)
"""Kernels of the CPU that take no scratch and pack no weights; the others are measured."""
_SLICE_MS = 4.0
"""How long one measurement of a kernel's time lasts at least, in milliseconds."""
_SLICES = 5


@dataclass(frozen=True)
class KernelMemory:
    """Bytes beside a kernel's inputs and outputs.

    Attributes:
        scratch: held while it runs.
        packed: weights in the kernel's own order, held as long as the session.
        pooled: whether they lie in the arena's regions, and not beside them.
    """

    scratch: int = 0
    packed: int = 0
    pooled: bool = False


class KernelTable:
    """What the kernels of one provider need, by operator, attributes and shapes; every entry is measured at most once.

    Args:
        options: provider and threads of the sessions.

    Attributes:
        unknown: operators whose nodes cannot run alone, so that what they need is not known and counts as nothing.
    """

    def __init__(self, options: SessionOptions | None = None) -> None:
        self._options = replace(options or SessionOptions(), optimise=False)
        self._memory: dict[Hashable, KernelMemory] = {}
        self._time: dict[Hashable, float] = {}
        self._idle: float | None = None
        self.unknown: set[str] = set()

    def memory(self, graph: RuntimeGraph, node: Any) -> KernelMemory:
        """Return the bytes that a node of a graph takes beside its inputs and outputs."""
        if _name(node) in _PLAIN:
            return KernelMemory()
        key = _key(graph, node)
        if key not in self._memory:
            self._memory[key] = self._alone(graph, node, self._measure_memory, KernelMemory())
        return self._memory[key]

    def milliseconds(self, graph: RuntimeGraph, node: Any) -> float:
        """Return the time of a node of a graph, without what every run costs."""
        if self._idle is None:
            self._idle = 0.0
            self._idle = self._time_file(_idle_model())
        key = _key(graph, node)
        if key not in self._time:
            taken = self._alone(graph, node, self._measure_time, self._idle)
            self._time[key] = max(0.0, taken - self._idle)
        return self._time[key]

    @property
    def idle_ms(self) -> float:
        """What a run costs beside its kernels, in milliseconds; 0 before anything was timed."""
        return self._idle or 0.0

    def _alone(self, graph: RuntimeGraph, node: Any, measure: Callable[[Path], T], otherwise: T) -> T:
        """Measure a node in a model of its own; a node that cannot run alone counts as nothing."""
        with tempfile.TemporaryDirectory(prefix="secateurs-") as folder:
            path = Path(folder) / "node.onnx"
            onnx.save(_model_of(graph, node), str(path))
            try:
                return measure(path)
            except SecateursError:  # its inputs decide its shapes, as those of a computed Reshape
                self.unknown.add(_name(node))
                return otherwise

    def _measure_memory(self, path: Path) -> KernelMemory:
        options = replace(self._options, memory_pattern=False, profile=path.with_suffix(""))
        session = Session(path, options)
        session.run(seeded_inputs(session, session.fixed_batch() or 1))
        figures = session.end_profiling()[0]
        after, delta = int(figures["mem_bytes_in_use"]), int(figures["mem_in_use_delta"])
        constants = sum(
            size for tensor in onnx.load(str(path)).graph.initializer if (size := _bytes(tensor)) < SMALL_CONSTANT
        )
        packed = max(0, after - delta - constants)
        # Regions are whole mebibytes; what is beside them is not.
        pooled = (int(figures["mem_arena_held"]) - constants - packed) % FIRST_REGION != 0
        return KernelMemory(int(figures["mem_in_use_peak"]) - after, packed, pooled)

    def _measure_time(self, path: Path) -> float:
        session = Session(path, self._options)
        feeds = seeded_inputs(session, session.fixed_batch() or 1)
        return _median_ms(session.bind(feeds, session.run(feeds)))

    def _time_file(self, model: Any) -> float:
        with tempfile.TemporaryDirectory(prefix="secateurs-") as folder:
            path = Path(folder) / "idle.onnx"
            onnx.save(model, str(path))
            return self._measure_time(path)


def _median_ms(run: Callable[[], None]) -> float:
    """Return the least over slices of a run's median time in each, in milliseconds: what it takes when nothing else interferes."""
    run()
    clock = time.perf_counter_ns
    best = []
    for _ in range(_SLICES):
        samples: list[int] = []
        while sum(samples) < _SLICE_MS * 1e6 / _SLICES or len(samples) < 3:
            start = clock()
            run()
            samples.append(clock() - start)
        best.append(statistics.median(samples))
    return min(best) / 1e6


def _name(node: Any) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else str(node.op_type)


def _key(graph: RuntimeGraph, node: Any) -> Hashable:
    constants = {tensor.name: tensor for tensor in graph.model.graph.initializer}
    inputs = tuple(
        (name in constants, graph.shapes.get(name), graph.dtypes.get(name), _meaning(constants.get(name)))
        for name in node.input
    )
    attributes = tuple(sorted(attribute.SerializeToString() for attribute in node.attribute))
    return _name(node), attributes, inputs


def _meaning(tensor: Any | None) -> bytes:
    """Return the content of a constant that decides shapes: integers, not weights."""
    if tensor is None or tensor.data_type == onnx.TensorProto.FLOAT:
        return b""
    return bytes(numpy_helper.to_array(tensor).tobytes())


def _bytes(tensor: Any) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64)) * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _model_of(graph: RuntimeGraph, node: Any) -> Any:
    """Return a model of one node with all shapes fixed; floating-point constants are replaced by a ramp of the same shape."""
    constants = {tensor.name: tensor for tensor in graph.model.graph.initializer}
    names = [name for name in dict.fromkeys(node.input) if name]
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(graph.dtypes[name]), graph.shapes[name])
        for name in names
        if name not in constants
    ]
    weights = [_stand_in(constants[name]) for name in names if name in constants]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
    alone = helper.make_graph([node], "node", inputs, outputs, weights)
    return helper.make_model(alone, opset_imports=list(graph.model.opset_import), ir_version=graph.model.ir_version)


def _stand_in(tensor: Any) -> Any:
    if tensor.data_type != onnx.TensorProto.FLOAT:
        return tensor
    size = int(np.prod(tensor.dims, dtype=np.int64))
    return numpy_helper.from_array(np.linspace(-1, 1, size, dtype=np.float32).reshape(tuple(tensor.dims)), tensor.name)


def _idle_model() -> Any:
    one = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "idle", one[:1], one[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
