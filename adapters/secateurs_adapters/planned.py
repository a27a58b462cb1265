r"""Memory of a run, planned: which buffers live at each node, without running the network.

onnxruntime decides before the first run which tensor lies in which buffer. Its rules are followed here on the graph that it really runs: an
output lies in its input's buffer where the kernel allows it and nobody else needs that input; else in the buffer of a dead tensor of the same
shape, which then lives on from its first use to its last; else in a new buffer. With the packed weights and the scratch of the kernels, the
sequence of allocations is played through the arena, which gives the peak that onnxruntime's own profile shows.

Run as `python -m secateurs_adapters.planned REQUEST.json` this module plans one file.

References:
    onnxruntime's `allocation_planner.cc`, whose rules these are.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnx import numpy_helper

from secateurs.errors import DataError
from secateurs_adapters.arena import Arena
from secateurs_adapters.fresh import serve
from secateurs_adapters.kernels import SMALL_CONSTANT, KernelMemory, KernelTable
from secateurs_adapters.runtime_graph import RuntimeGraph, optimised_model, runtime_graph, written_model
from secateurs_adapters.session import Session, SessionOptions

__all__ = ["MemoryPlan", "Step", "plan_file", "plan_memory"]

_ALIASES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Kernels whose output is their first input, seen in another shape."""
_IN_PLACE = {
    **dict.fromkeys(
        (
            *("Cast", "Celu", "Clip", "Elu", "HardSigmoid", "LeakyRelu", "LogSoftmax", "Relu", "Selu", "Sigmoid"),
            *("Softmax", "Softplus", "Softsign", "Tanh", "ThresholdedRelu"),
        ),
        0,
    ),
    "com.microsoft.FusedConv": 3,
    "com.microsoft.nchwc.Conv": 3,
}
"""Kernels of the CPU that may write over an input, and which."""


@dataclass(frozen=True)
class Step:
    """One node of a run.

    Attributes:
        node: its name.
        op_type: its operator, with the domain where it is not ONNX's own.
        output_bytes: of the tensors that it puts out.
        live: buffers that are held while it runs, by the tensor that each was made for, in bytes.
        scratch_bytes: that its kernel takes beside them.
    """

    node: str
    op_type: str
    output_bytes: int
    live: Mapping[str, int]
    scratch_bytes: int

    @property
    def live_bytes(self) -> int:
        """Bytes of all buffers held while the node runs."""
        return sum(self.live.values())


@dataclass(frozen=True)
class MemoryPlan:
    """What a run of a graph holds; the caller's inputs are not counted.

    Attributes:
        steps: in the order in which the nodes run.
        tensor_bytes: of every tensor that a node puts out, by name.
        packed_bytes: weights in the kernels' own order.
        constant_bytes: constants that are copied into the arena.
        peak_bytes: the most that onnxruntime's arena holds, with all of these and with its own rounding.
        unknown: operators whose scratch and packed weights are not known and are left out.
    """

    steps: tuple[Step, ...]
    tensor_bytes: Mapping[str, int]
    packed_bytes: int
    constant_bytes: int
    peak_bytes: int
    unknown: tuple[str, ...] = ()

    @property
    def activation_bytes(self) -> int:
        """The most bytes of buffers held at any node, without scratch and weights."""
        return max((step.live_bytes for step in self.steps), default=0)

    @property
    def peak_step(self) -> Step | None:
        """The first node at which buffers take the most; None where nothing runs."""
        return max(self.steps, key=lambda step: step.live_bytes, default=None)

    @property
    def scratch_bytes(self) -> int:
        """The largest scratch of any kernel."""
        return max((step.scratch_bytes for step in self.steps), default=0)


def plan_memory(model: Any, inputs: Mapping[str, Sequence[int]], kernels: KernelTable | None = None) -> MemoryPlan:
    """Plan the memory of one run of a graph.

    Args:
        model: an `onnx.ModelProto`, taken as it is; `plan_file` plans a file as onnxruntime optimises it.
        inputs: shape of every graph input.
        kernels: scratch and packed weights of the provider's kernels; None leaves both out.

    Raises:
        DataError: an input is missing or has another rank, or a tensor does not hold numbers.
    """
    graph = runtime_graph(model, inputs)
    nodes = list(model.graph.node)
    buffer = _buffers(graph)
    needs = [KernelMemory() if kernels is None else kernels.memory(graph, node) for node in nodes]
    sizes = [(tensor.name, graph.bytes_of(tensor.name)) for tensor in model.graph.initializer]
    constants = sum(size for _, size in sizes if size < SMALL_CONSTANT)
    packs = _packs(graph, needs)
    arena = Arena(constants + sum(need.packed for need in packs if not need.pooled))
    for number, need in enumerate(packs):
        if need.pooled:
            arena.allocate(f"packed {number}", need.packed)
    steps = []
    live: dict[str, int] = {}
    for node, need, dying in zip(nodes, needs, _deaths(model, buffer), strict=True):
        outputs = [name for name in node.output if name]
        for name in outputs:
            if buffer[name] == name and name not in live:
                live[name] = graph.bytes_of(name)
                arena.allocate(name, live[name])
        arena.allocate("scratch", need.scratch)
        arena.release("scratch")
        steps.append(
            Step(
                node=node.name,
                op_type=_name(node),
                output_bytes=sum(graph.bytes_of(name) for name in outputs),
                live=dict(live),
                scratch_bytes=need.scratch,
            )
        )
        for name in dying:
            live.pop(name, None)
            arena.release(name)
    tensors = {name: graph.bytes_of(name) for node in nodes for name in node.output if name}
    unknown = () if kernels is None else tuple(sorted({_name(node) for node in nodes} & kernels.unknown))
    return MemoryPlan(tuple(steps), tensors, sum(need.packed for need in packs), constants, arena.peak, unknown)


def plan_file(
    path: Path,
    batch_size: int,
    options: SessionOptions | None = None,
    kernels: KernelTable | None = None,
    *,
    length: int | None = None,
    written: Path | None = None,
) -> MemoryPlan:
    """Plan the memory of one run of a file, as a session optimises it.

    Sessions may order independent nodes differently; a plan is that of one session.

    Args:
        path: the file.
        batch_size: size of the axis of every input that holds the examples, where that is free.
        options: provider and threads.
        kernels: a table to use and to fill; None starts one.
        length: size of other free axes; None takes the default of the seeded inputs.
        written: the graph that a session wrote; None builds a session that writes one.

    Raises:
        DataError: the file cannot be planned: it holds subgraphs, what is no tensor of numbers, or inputs of another size.
    """
    options = options or SessionOptions()
    model = optimised_model(path, options) if written is None else written_model(written, path)
    nested = sorted(
        {_name(node) for node in model.graph.node if any(a.HasField("g") or a.graphs for a in node.attribute)}
    )
    if nested:
        raise DataError(f"what {', '.join(nested)} runs, and how often, is only known when it runs; profile the file.")
    shapes = Session(path, replace(options, optimise=False)).signature.shapes(batch_size, length)
    return plan_memory(model, shapes, kernels or KernelTable(options))


def _name(node: Any) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else str(node.op_type)


def _packs(graph: RuntimeGraph, needs: Sequence[KernelMemory]) -> list[KernelMemory]:
    """Return what the nodes pack, each content once: kernels of one kind share the packed form of equal weights."""
    constants = {tensor.name: tensor for tensor in graph.model.graph.initializer}
    packs: dict[tuple[Any, ...], KernelMemory] = {}
    for node, need in zip(graph.model.graph.node, needs, strict=True):
        if need.packed:
            content = [
                hash(numpy_helper.to_array(constants[name]).tobytes()) for name in node.input if name in constants
            ]
            packs[(_name(node), *content)] = need
    return list(packs.values())


def _buffers(graph: RuntimeGraph) -> dict[str, str]:
    """Return, for every tensor, the tensor whose buffer it lies in: itself, or one that came before."""
    body = graph.model.graph
    outside = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
    results = {value.name for value in body.output}
    uses = _uses(body)
    buffer = {name: name for name in outside}
    free: list[str] = []
    for node in body.node:
        for position, name in enumerate(node.output):
            if not name:
                continue
            buffer[name] = name
            if name in results:
                continue
            original = _reused_input(graph, node, position, buffer, uses)
            if original is None:
                original = next((other for other in free if _same_size(graph, other, name)), None)
                if original is not None:
                    free.remove(original)
            if original is not None:
                buffer[name] = original
                uses[original] += uses[name]
        for name in (*node.input, *node.output):
            if name:
                original = buffer[name]
                uses[original] -= 1
                if uses[original] == 0:
                    free.insert(0, original)
    return buffer


def _uses(body: Any) -> Counter[str]:
    """Count the uses of every tensor: by its maker, by its readers, and by the caller."""
    uses: Counter[str] = Counter(value.name for value in (*body.input, *body.output))
    uses.update(tensor.name for tensor in body.initializer)
    uses.update(name for node in body.node for name in (*node.input, *node.output) if name)
    return uses


def _reused_input(
    graph: RuntimeGraph, node: Any, position: int, buffer: Mapping[str, str], uses: Mapping[str, int]
) -> str | None:
    """Return the buffer of the input that an output lies in, or None."""
    name = _name(node)
    if position == 0 and name in _ALIASES and node.input[0]:
        return buffer[node.input[0]]
    which = _IN_PLACE.get(name)
    if position != 0 or which is None or which >= len(node.input) or not node.input[which]:
        return None
    source = node.input[which]
    fits = uses[buffer[source]] == 1 and _same_size(graph, source, node.output[0])
    return buffer[source] if fits else None


def _same_size(graph: RuntimeGraph, first: str, second: str) -> bool:
    """Tell whether two tensors have one size for every input: the same named and fixed dimensions, elements of one size."""
    a, b = (graph.symbolic.get(name) for name in (first, second))
    if not a or not b or len(a) != len(b):
        return False
    return graph.dtypes[first].itemsize == graph.dtypes[second].itemsize and all(
        x is not None and x == y for x, y in zip(a, b, strict=True)
    )


def _deaths(model: Any, buffer: Mapping[str, str]) -> Iterator[list[str]]:
    """Yield, for each node, the buffers that nobody needs after it."""
    kept = {buffer[value.name] for value in model.graph.output}
    last: dict[str, int] = {}
    for number, node in enumerate(model.graph.node):
        last |= {buffer[name]: number for name in (*node.input, *node.output) if name}
    dying: dict[int, list[str]] = {}
    for name, number in last.items():
        if name not in kept:
            dying.setdefault(number, []).append(name)
    return (dying.get(number, []) for number in range(len(model.graph.node)))


def _plan_here(request: dict[str, Any]) -> Mapping[str, Any]:
    options = SessionOptions(
        provider=request["provider"], threads=request["threads"], provider_options=request["options"]
    )
    written = None if request["written"] is None else Path(request["written"])
    plan = plan_file(Path(request["file"]), request["batch_size"], options, length=request["length"], written=written)
    peak = plan.peak_step
    return {
        "peak_bytes": plan.peak_bytes,
        "tensor_bytes": plan.activation_bytes,
        "scratch_bytes": plan.scratch_bytes,
        "packed_bytes": plan.packed_bytes,
        "constant_bytes": plan.constant_bytes,
        "live_bytes": [step.live_bytes for step in plan.steps],
        "peak_node": None if peak is None else f"{peak.op_type} {peak.node}".strip(),
        "unknown": list(plan.unknown),
    }


if __name__ == "__main__":
    serve(_plan_here, sys.argv[1:])
