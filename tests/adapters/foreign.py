"""ONNX files as others write them, with inputs, outputs, state, axes and opsets that our exporters never make; and damage to any file."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    """Seeded float32 weights."""
    return np.random.default_rng([seed, *shape]).normal(0, 0.3, shape).astype(np.float32)


def save(
    path: Path,
    nodes: list[Any],
    inputs: list[Any],
    outputs: list[Any],
    constants: dict[str, np.ndarray],
    *,
    opset: int = 17,
    ir: int = 8,
    domains: tuple[tuple[str, int], ...] = (),
) -> Path:
    """Write a checked graph; IR versions below 4 list constants among the inputs, as they had to."""
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    given = [helper.make_tensor_value_info(*item) for item in inputs]
    if ir < 4:
        given += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in tensors]
    graph = helper.make_graph(nodes, "g", given, [helper.make_tensor_value_info(*item) for item in outputs], tensors)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(*domain) for domain in domains)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=ir)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def recurrent(path: Path, opset: int) -> Path:
    """An LSTM in ONNX's own layout: time first, and states with the examples on their second axis."""
    node = helper.make_node("LSTM", ["x", "w", "r", "", "", "h0", "c0"], ["y", "h", "c"], hidden_size=6)
    state = [1, "batch", 6]
    return save(
        path,
        [node],
        [("x", FLOAT, ["steps", "batch", 4]), ("h0", FLOAT, state), ("c0", FLOAT, state)],
        [("y", FLOAT, ["steps", 1, "batch", 6]), ("h", FLOAT, state), ("c", FLOAT, state)],
        {"w": weights(1, 24, 4), "r": weights(1, 24, 6)},
        opset=opset,
        ir=4 if opset < 10 else 8,
    )


def tokens(path: Path, opset: int) -> Path:
    """Token ids and a mask of integers, features of floats; a pooled output and one per token."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
        helper.make_node("Cast", ["attention_mask"], ["m"], to=FLOAT),
        helper.make_node("Reshape", ["m", "column"], ["mask"]),
        helper.make_node("Mul", ["embedded", "mask"], ["masked"]),
        helper.make_node("Add", ["masked", "features"], ["states"]),
        helper.make_node("GlobalMaxPool", ["states"], ["pooled"]),
    ]
    return save(
        path,
        nodes,
        [
            ("input_ids", INT64, ["batch", "sequence"]),
            ("attention_mask", INT64, ["batch", "sequence"]),
            ("features", FLOAT, ["batch", 1, 8]),
        ],
        [("states", FLOAT, ["batch", "sequence", 8]), ("pooled", FLOAT, ["batch", "sequence", 1])],
        {"table": weights(11, 8), "column": np.array([0, -1, 1], np.int64)},
        opset=opset,
    )


def cached(path: Path, opset: int) -> Path:
    """A step of a decoder: a cache whose length is free, and a mask as long as cache and tokens together."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["new"]),
        helper.make_node("Concat", ["past", "new"], ["present"], axis=1),
        helper.make_node("Cast", ["mask"], ["m"], to=FLOAT),
        helper.make_node("Reshape", ["m", "row"], ["rowed"]),
        helper.make_node("MatMul", ["rowed", "present"], ["mixed"]),
        helper.make_node("MatMul", ["mixed", "head"], ["logits"]),
    ]
    return save(
        path,
        nodes,
        [
            ("ids", INT64, ["batch_size", "sequence_length"]),
            ("mask", INT64, ["batch_size", "past_length + sequence_length"]),
            ("past", FLOAT, ["batch_size", "past_length", 8]),
        ],
        [("logits", FLOAT, ["batch_size", 1, 11]), ("present", FLOAT, ["batch_size", "total", 8])],
        {"table": weights(11, 8), "head": weights(8, 11), "row": np.array([0, 1, -1], np.int64)},
        opset=opset,
    )


def image(path: Path, opset: int, *, shape: tuple[Any, ...] = ("N", 3, "H", "W"), side: int = 1) -> Path:
    """A convolution of images whose sides are free; `side` strides make small images too small."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c0"], kernel_shape=[3, 3]),
        *(
            helper.make_node("MaxPool", [f"c{n}"], [f"c{n + 1}"], kernel_shape=[3, 3], strides=[2, 2])
            for n in range(side)
        ),
        helper.make_node("GlobalAveragePool", [f"c{side}"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "v", "bias"], ["y"]),
    ]
    constants = {"w": weights(8, 3, 3, 3), "v": weights(8, 5), "bias": weights(5)}
    return save(path, nodes, [("x", FLOAT, list(shape))], [("y", FLOAT, [shape[0], 5])], constants, opset=opset)


def nameless(path: Path, opset: int) -> Path:
    """Free axes without names, on several inputs, one of them a scalar."""
    nodes = [
        helper.make_node("Add", ["a", "b"], ["s"]),
        helper.make_node("Mul", ["s", "scale"], ["y"]),
        helper.make_node("Neg", ["y"], ["z"]),
    ]
    inputs = [("a", FLOAT, [None, 7]), ("b", FLOAT, [None, 7]), ("scale", FLOAT, [])]
    return save(path, nodes, inputs, [("y", FLOAT, [None, 7]), ("z", FLOAT, [None, 7])], {}, opset=opset)


def graph_network(path: Path, opset: int) -> Path:
    """Nodes and edges: two free axes that have nothing to do with each other."""
    nodes = [
        helper.make_node("Gather", ["x", "edges"], ["messages"]),
        helper.make_node("MatMul", ["messages", "w"], ["out"]),
    ]
    inputs = [("x", FLOAT, ["num_nodes", 4]), ("edges", INT64, ["num_edges"])]
    return save(path, nodes, inputs, [("out", FLOAT, ["num_edges", 3])], {"w": weights(4, 3)}, opset=opset)


def classes(path: Path, opset: int) -> Path:
    """What converters of scikit-learn write: a label first, and scores as a sequence of maps."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["scores"]),
        helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0),
        helper.make_node("ZipMap", ["scores"], ["maps"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2]),
    ]
    tensors = [numpy_helper.from_array(weights(4, 3), "w")]
    element = helper.make_map_type_proto(INT64, helper.make_tensor_type_proto(FLOAT, []))
    outputs = [
        helper.make_tensor_value_info("label", INT64, ["n"]),
        helper.make_value_info("maps", helper.make_sequence_type_proto(element)),
    ]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", FLOAT, ["n", 4])], outputs, tensors)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 2)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), str(path))
    return path


def data_dependent(path: Path, opset: int) -> Path:
    """Control flow, a constant that is an output, and an output whose size depends on the values."""
    sums = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["twice"])],
        "then",
        [],
        [helper.make_tensor_value_info("twice", FLOAT, None)],
    )
    same = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["minus"])], "else", [], [helper.make_tensor_value_info("minus", FLOAT, None)]
    )
    nodes = [
        helper.make_node("If", ["flag"], ["y"], then_branch=sums, else_branch=same),
        helper.make_node("NonZero", ["y"], ["where"]),
        helper.make_node("Identity", ["constant"], ["fixed"]),
    ]
    inputs = [("x", FLOAT, ["batch", 4]), ("flag", TensorProto.BOOL, [])]
    outputs = [("y", FLOAT, ["batch", 4]), ("where", INT64, [2, None]), ("fixed", FLOAT, [3])]
    return save(path, nodes, inputs, outputs, {"constant": weights(3)}, opset=opset)


FAMILIES: dict[str, Callable[[Path, int], Path]] = {
    "recurrent": recurrent,
    "tokens": tokens,
    "cached": cached,
    "image": image,
    "strided": lambda path, opset: image(path, opset, side=4),
    "fixed": lambda path, opset: image(path, opset, shape=(3, 3, 20, 20)),
    "nameless": nameless,
    "graph": graph_network,
    "classes": classes,
    "data-dependent": data_dependent,
}
"""Writers of files, by what is foreign about them; each takes a path and an opset."""


KINDS = ("truncated", "flipped", "renamed", "without_data", "huge", "retyped")
"""Of damage, in the order in which `mutants` does it."""


def mutants(
    folder: Path, count: int, seed: int = 0, files: Mapping[str, Path] | None = None
) -> list[tuple[Path, Path]]:
    """Write `count` damaged files, of every kind in turn: truncated, bits flipped, inputs renamed, data missing, shapes declared huge.

    Args:
        folder: where to write.
        count: how many.
        seed: of the damage.
        files: whole files to damage, by a name for each; None damages one of every family here.

    Returns:
        The file as it was, and the damaged one, of each.
    """
    generator = random.Random(seed)
    if files is None:
        files = {name: make(folder / f"{name}.onnx", generator.choice([11, 13, 17])) for name, make in FAMILIES.items()}
    damage = (_truncated, _flipped, _renamed, _without_data, _huge, _retyped)
    pairs = []
    for number in range(count):
        name, kind = generator.choice(list(files)), number % len(KINDS)
        path = folder / f"{number:03}-{name}-{KINDS[kind]}.onnx"
        path.write_bytes(files[name].read_bytes())
        damage[kind](path, generator)
        pairs.append((files[name], path))
    return pairs


def _truncated(path: Path, generator: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: generator.randrange(len(content))])


def _flipped(path: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(generator.choice([1, 1, 4, 32])):
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(bytes(content))


def _renamed(path: Path, generator: random.Random) -> None:
    model = onnx.load(str(path))
    value = generator.choice(model.graph.input)
    old, value.name = value.name, generator.choice(["renamed", "", "../x", "\u0007", "y" * 2000])
    for node in model.graph.node if generator.random() < 0.7 else []:
        node.input[:] = [value.name if name == old else name for name in node.input]
    onnx.save(model, str(path))


def _without_data(path: Path, generator: random.Random) -> None:
    model = onnx.load(str(path))
    for tensor in model.graph.initializer:
        data = path.with_name(f"{path.name}.{tensor.name}.data")
        data.write_bytes(tensor.raw_data)
        size = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        where = generator.choice([data.name, "missing.data", "../outside.data", "/dev/zero", ""])
        far = generator.choice([0, 0, 1 << 40, -1])
        for key, value in (
            ("location", where),
            ("offset", str(far)),
            ("length", generator.choice([str(size), "many"])),
        ):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
    path.write_bytes(model.SerializeToString())


def _huge(path: Path, generator: random.Random) -> None:
    model = onnx.load(str(path))
    values = [value for value in model.graph.input if value.type.tensor_type.shape.dim]
    tensors = list(model.graph.initializer)
    size = generator.choice([1 << 12, 1 << 20, 1 << 31, 1 << 40, 1 << 62, -1])
    if tensors and generator.random() < 0.4:
        tensor = generator.choice(tensors)
        if tensor.dims:
            tensor.dims[generator.randrange(len(tensor.dims))] = size
    else:
        dims = generator.choice(values).type.tensor_type.shape.dim
        for dim in dims if generator.random() < 0.5 else [generator.choice(dims)]:
            dim.dim_value = size
    path.write_bytes(model.SerializeToString())


def _retyped(path: Path, generator: random.Random) -> None:
    model = onnx.load(str(path))
    choices: list[Any] = [value.type.tensor_type for value in model.graph.input]
    generator.choice(choices).elem_type = generator.choice([0, 6, 8, 16, 17, 23, 99])
    for tensor in model.graph.initializer if generator.random() < 0.3 else []:
        tensor.data_type = generator.choice([0, 8, 22, 99])
    path.write_bytes(model.SerializeToString())
