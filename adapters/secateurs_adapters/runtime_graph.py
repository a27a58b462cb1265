"""The graph that onnxruntime really runs: fused and laid out for its provider, with the shape of every tensor.

A session fuses normalisations, activations and additions into convolutions and changes their layout, so what is alive when, and how large it
is, can only be read from the graph that it wrote itself. Shapes come from onnxruntime's own inference, which knows its own operators: every
tensor is asked for as if it were an output, once with symbolic dimensions (what the session's memory planner sees) and once bound.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from secateurs.errors import DataError
from secateurs_adapters.session import Session, SessionOptions, TensorSpec, seeded_inputs

__all__ = ["RuntimeGraph", "optimised_model", "runtime_graph", "written_model"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class RuntimeGraph:
    """A graph with the type and shape of everything that its nodes put out.

    Attributes:
        model: the graph, as it runs.
        symbolic: tensor name to its dimensions before inputs are known: a size, a name, or None.
        shapes: tensor name, inputs and constants among them, to its shape.
        dtypes: tensor name, inputs and constants among them, to its element type.
    """

    model: Any
    symbolic: Mapping[str, tuple[int | str | None, ...]]
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, np.dtype[Any]]

    def bytes_of(self, name: str) -> int:
        """Return the bytes of one tensor."""
        return int(np.prod(self.shapes[name], dtype=np.int64)) * self.dtypes[name].itemsize


def optimised_model(path: Path, options: SessionOptions | None = None) -> Any:
    """Return the graph of a file as a session rewrites it, an `onnx.ModelProto`.

    Args:
        path: the file.
        options: the session's provider and threads.

    Raises:
        SecateursError: onnxruntime cannot load the file.
    """
    with tempfile.TemporaryDirectory(prefix="secateurs-") as folder:
        written = Path(folder) / "optimised.onnx"
        Session(path, replace(options or SessionOptions(), optimised=written))
        return written_model(written, path)


def written_model(written: Path, path: Path) -> Any:
    """Return the graph that a session wrote, an `onnx.ModelProto`, its nodes in the order in which that session runs them.

    Args:
        written: what the session wrote.
        path: the file that it loaded.
    """
    model, original = onnx.load(str(written)), onnx.load(str(path), load_external_data=False)
    if _makers(model.graph) == _makers(original.graph):
        ordered = _execution_order(model.graph)
        del model.graph.node[:]
        model.graph.node.extend(ordered)
    return model


def _makers(graph: Any) -> list[tuple[str, tuple[str, ...]]]:
    return [(node.op_type, tuple(node.output)) for node in graph.node]


def _execution_order(graph: Any) -> list[Any]:
    """Return the nodes in the order in which onnxruntime runs a graph that it did not rewrite, and therefore wrote as it was.

    It goes backwards from the last nodes, depth first; of a node's makers, the one that stands last in the file comes first.
    """
    nodes = list(graph.node)
    maker = {name: number for number, node in enumerate(nodes) for name in node.output if name}
    sources = [sorted({maker[name] for name in node.input if name in maker}) for node in nodes]
    read = {number for found in sources for number in found}
    stack = [(number, False) for number in range(len(nodes)) if number not in read]
    seen: set[int] = set()
    order: list[int] = []
    while stack:
        number, leaving = stack.pop()
        if leaving:
            order.append(number)
        elif number not in seen:
            seen.add(number)
            stack.append((number, True))
            stack.extend((source, False) for source in sources[number] if source not in seen)
    return [nodes[number] for number in order]


def runtime_graph(model: Any, inputs: Mapping[str, Sequence[int]]) -> RuntimeGraph:
    """Infer the type and shape of every tensor of a graph, for inputs of given shapes.

    Args:
        model: an `onnx.ModelProto`, taken as it is: a graph is optimised before, with `optimised_model`.
        inputs: shape of every graph input.

    Raises:
        DataError: an input is missing or has another rank, a tensor does not hold numbers, or onnxruntime does not know an operator.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    dimensions: dict[str, int] = {}
    shapes: dict[str, Shape] = {}
    dtypes: dict[str, np.dtype[Any]] = {}
    for value in model.graph.input:
        if value.name in constants:
            continue
        shapes[value.name] = _bind(value, inputs, dimensions)
        dtypes[value.name] = _dtype(value.type.tensor_type.elem_type)
    for name, tensor in constants.items():
        shapes[name], dtypes[name] = tuple(tensor.dims), _dtype(tensor.data_type)
    with tempfile.TemporaryDirectory(prefix="secateurs-") as folder:
        path = Path(folder) / "every.onnx"
        onnx.save(_every_output(model), str(path))
        options = SessionOptions(optimise=False, prepack=False)
        symbolic = {spec.name: spec.shape for spec in Session(path, options).output_specs()}
        session = Session(path, replace(options, dimensions=dimensions))
        bound = session.output_specs()
        if not all(_known(spec) for spec in bound):
            batch = next(iter(shapes.values()))[0]
            values = session.run(seeded_inputs(session, batch))
            bound = tuple(TensorSpec(spec.name, spec.dtype, values[spec.name].shape) for spec in bound)
    shapes |= {spec.name: tuple(int(size or 0) for size in spec.shape) for spec in bound}
    dtypes |= {spec.name: spec.dtype for spec in bound}
    return RuntimeGraph(model, symbolic, shapes, dtypes)


def _bind(value: Any, inputs: Mapping[str, Sequence[int]], dimensions: dict[str, int]) -> Shape:
    """Return the shape of one input, and note the sizes of its symbolic dimensions."""
    if value.name not in inputs:
        raise DataError(f"the shape of the input {value.name!r} is not given; give one for each of the graph's inputs.")
    dims, shape = value.type.tensor_type.shape.dim, tuple(int(size) for size in inputs[value.name])
    if len(dims) != len(shape) or any(
        d.HasField("dim_value") and d.dim_value != n for d, n in zip(dims, shape, strict=True)
    ):
        wanted = [d.dim_param or d.dim_value for d in dims]
        raise DataError(
            f"the input {value.name!r} takes the shape {wanted}, got {list(shape)}; give a shape that fits."
        )
    dimensions.update({d.dim_param: size for d, size in zip(dims, shape, strict=True) if d.dim_param})
    return shape


def _dtype(code: int) -> np.dtype[Any]:
    found: np.dtype[Any] = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(code))
    return found


def _known(spec: TensorSpec) -> bool:
    return all(isinstance(size, int) and size >= 0 for size in spec.shape)


def _every_output(model: Any) -> Any:
    """Return the model with everything that its nodes put out among the outputs."""
    every = onnx.ModelProto()
    every.CopyFrom(model)
    known = {value.name for value in every.graph.output}
    names = dict.fromkeys(name for node in every.graph.node for name in node.output if name and name not in known)
    every.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    return every
