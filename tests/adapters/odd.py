"""Small ONNX files of kinds that exporters of ours never write, and of kinds that cannot be fed; each by what is odd about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from foreign import weights
from onnx import TensorProto as T
from onnx import helper, numpy_helper

node = helper.make_node
ROWS = ("x", T.FLOAT, ["n", 4])
W = {"w": weights(4, 3)}
LABEL = {"keys_int64s": [0, 1, 2], "values_strings": ["a", "b", "c"], "domain": "ai.onnx.ml"}
ML, MICROSOFT, LOCAL = ("ai.onnx.ml", 2), ("com.microsoft", 1), ("local", 1)
NORM = {"s": weights(3), "b": weights(3), "m": weights(3), "v": np.ones(3, np.float32)}
SEQUENCE = helper.make_sequence_type_proto(helper.make_tensor_type_proto(T.FLOAT, ["n", 4]))
OPTIONAL = helper.make_optional_type_proto(helper.make_tensor_type_proto(T.FLOAT, ["n", 4]))


def subgraph(nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> Any:
    given, results = ([helper.make_tensor_value_info(*item) for item in items] for items in (inputs, outputs))
    return helper.make_graph(nodes, "body", given, results)


def loop() -> Any:
    """Doubles a tensor at every step."""
    doubled = [node("Add", ["v", "v"], ["v2"]), node("Identity", ["c"], ["c2"])]
    inputs = [("i", T.INT64, []), ("c", T.BOOL, []), ("v", T.FLOAT, None)]
    return subgraph(doubled, inputs, [("c2", T.BOOL, []), ("v2", T.FLOAT, None)])


def scan() -> Any:
    """Sums up rows."""
    steps = [node("Add", ["state", "row"], ["next"]), node("Identity", ["next"], ["out"])]
    values = [(name, T.FLOAT, [4]) for name in ("state", "row", "next", "out")]
    return subgraph(steps, values[:2], values[2:])


TWICE = helper.make_function(
    "local", "Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
)
MATMUL = [node("MatMul", ["x", "w"], ["y"])]
SCORES = ("y", T.FLOAT, ["n", 3])
LABELS = [*MATMUL, node("ArgMax", ["y"], ["l"], axis=1, keepdims=0), node("LabelEncoder", ["l"], ["t"], **LABEL)]
NAMED = ("t", T.STRING, ["n"])
STATE = [(name, T.FLOAT, [4]) for name in ("s0", "sn")]

Parts = tuple[list[Any], list[Any], list[Any], dict[str, np.ndarray], dict[str, Any]]
RUN: dict[str, Parts] = {
    "text first": (LABELS, [ROWS], [NAMED, SCORES], W, {"domains": [ML]}),
    "text only": (LABELS, [ROWS], [NAMED], W, {"domains": [ML]}),
    "half": (
        MATMUL,
        [("x", T.FLOAT16, ["n", 4])],
        [("y", T.FLOAT16, ["n", 3])],
        {"w": weights(4, 3).astype(np.float16)},
        {},
    ),
    "double": (
        MATMUL,
        [("x", T.DOUBLE, ["n", 4])],
        [("y", T.DOUBLE, ["n", 3])],
        {"w": weights(4, 3).astype(np.float64)},
        {},
    ),
    "bytes": (
        [node("Cast", ["x"], ["f"], to=T.FLOAT), node("MatMul", ["f", "w"], ["y"])],
        [("x", T.UINT8, ["n", 4])],
        [SCORES],
        W,
        {},
    ),
    "booleans out": (
        [node("Greater", ["x", "z"], ["y"])],
        [ROWS],
        [("y", T.BOOL, ["n", 4])],
        {"z": np.array(0, np.float32)},
        {},
    ),
    "eight bits out": (
        [node("Cast", ["x"], ["y"], to=T.FLOAT8E4M3FN)],
        [ROWS],
        [("y", T.FLOAT8E4M3FN, ["n", 4])],
        {},
        {"opset": 19, "ir": 9},
    ),
    "constants that are inputs": (MATMUL, [ROWS, ("w", T.FLOAT, [4, 3])], [SCORES], W, {"opset": 9, "ir": 3}),
    "inputs with defaults": (MATMUL, [ROWS, ("w", T.FLOAT, [4, 3])], [SCORES], W, {}),
    "sometimes nothing": (
        [*MATMUL, node("Greater", ["y", "most"], ["c"]), node("NonZero", ["c"], ["z"])],
        [ROWS],
        [("z", T.INT64, [2, None]), SCORES],
        W | {"most": np.array(1e9, np.float32)},
        {},
    ),
    "an empty cache": (
        [node("Concat", ["past", "x"], ["y"], axis=1)],
        [ROWS, ("past", T.FLOAT, ["n", 0])],
        [("y", T.FLOAT, ["n", 4])],
        {},
        {},
    ),
    "a scalar first": (
        [node("Mul", ["x", "s"], ["y"])],
        [("s", T.FLOAT, []), ROWS],
        [("y", T.FLOAT, ["n", 4])],
        {},
        {},
    ),
    "scalars only": ([node("Neg", ["s"], ["y"])], [("s", T.FLOAT, [])], [("y", T.FLOAT, [])], {}, {}),
    "one number for all": ([node("ReduceMean", ["x"], ["y"], keepdims=0)], [ROWS], [("y", T.FLOAT, [])], {}, {}),
    "a sequence out": (
        [node("SplitToSequence", ["x"], ["q"], axis=1), node("Neg", ["x"], ["y"])],
        [ROWS],
        [("q", SEQUENCE), ("y", T.FLOAT, ["n", 4])],
        {},
        {},
    ),
    "no batch": (MATMUL, [("x", T.FLOAT, [7, 4])], [("y", T.FLOAT, [7, 3])], W, {}),
    "no inputs": ([node("Neg", ["w"], ["y"])], [], [("y", T.FLOAT, [4, 3])], W, {}),
    "no shape": ([node("Relu", ["x"], ["y"])], [("x", T.FLOAT, None)], [("y", T.FLOAT, None)], {}, {}),
    "names shared": (
        [node("MatMul", ["a", "b"], ["y"])],
        [("a", T.FLOAT, ["n", "k"]), ("b", T.FLOAT, ["k", "m"])],
        [("y", T.FLOAT, ["n", "m"])],
        {},
        {},
    ),
    "square": ([node("MatMul", ["a", "a"], ["y"])], [("a", T.FLOAT, ["n", "n"])], [("y", T.FLOAT, ["n", "n"])], {}, {}),
    "operators of Microsoft's": (
        [node("MatMul", ["x", "w"], ["h"]), node("Gelu", ["h"], ["y"], domain="com.microsoft")],
        [ROWS],
        [SCORES],
        W,
        {"domains": [MICROSOFT]},
    ),
    "functions": (
        [node("Twice", ["x"], ["h"], domain="local"), node("MatMul", ["h", "w"], ["y"])],
        [ROWS],
        [SCORES],
        W,
        {"domains": [LOCAL], "functions": [TWICE]},
    ),
    "loop": (
        [node("Loop", ["count", "", "x"], ["y"], body=loop())],
        [ROWS],
        [("y", T.FLOAT, ["n", 4])],
        {"count": np.array(3, np.int64)},
        {},
    ),
    "loop as asked": (
        [node("Loop", ["count", "", "x"], ["y"], body=loop())],
        [ROWS, ("count", T.INT64, [])],
        [("y", T.FLOAT, ["n", 4])],
        {},
        {},
    ),
    "scan": (
        [node("Scan", ["s0", "x"], ["sn", "y"], body=scan(), num_scan_inputs=1)],
        [STATE[0], ("x", T.FLOAT, ["time", 4])],
        [STATE[1], ("y", T.FLOAT, ["time", 4])],
        {},
        {},
    ),
    "normalisation with statistics": (
        [node("BatchNormalization", ["x", *NORM], ["y", "m1", "v1", "m2", "v2"])],
        [("x", T.FLOAT, ["n", 3, 8, 8])],
        [("y", T.FLOAT, ["n", 3, 8, 8])],
        NORM,
        {"opset": 9, "ir": 4},
    ),
    "a batch of one in fact": (
        [node("Reshape", ["x", "to"], ["y"])],
        [ROWS],
        [("y", T.FLOAT, [1, 4])],
        {"to": np.array([1, 4], np.int64)},
        {},
    ),
    "not a number": ([node("Log", ["x"], ["y"])], [ROWS], [("y", T.FLOAT, ["n", 4])], {}, {}),
    "odd names": (
        [node("MatMul", ["in put/0:0", "w"], ["out:0"])],
        [("in put/0:0", T.FLOAT, ["n", 4])],
        [("out:0", T.FLOAT, ["n", 3])],
        W,
        {},
    ),
}
"""Files that run: nodes, inputs, outputs, constants, and what else `write` takes."""
REFUSED: dict[str, Parts] = {
    "is tensor(string)": (
        [node("LabelEncoder", ["t"], ["l"], domain="ai.onnx.ml", keys_strings=["a"], values_int64s=[0])],
        [NAMED],
        [("l", T.INT64, ["n"])],
        {},
        {"domains": [ML]},
    ),
    "is tensor(bfloat16)": (
        [node("Cast", ["x"], ["y"], to=T.FLOAT)],
        [("x", T.BFLOAT16, ["n", 4])],
        [("y", T.FLOAT, ["n", 4])],
        {},
        {},
    ),
    "is seq(tensor(float))": (
        [node("ConcatFromSequence", ["q"], ["y"], axis=0)],
        [("q", SEQUENCE)],
        [("y", T.FLOAT, ["m", 4])],
        {},
        {},
    ),
    "is optional(tensor(float))": (
        [node("OptionalGetElement", ["o"], ["y"])],
        [("o", OPTIONAL)],
        [("y", T.FLOAT, ["n", 4])],
        {},
        {"opset": 18},
    ),
    "Tensor Type. bfloat16": (
        [node("Cast", ["x"], ["y"], to=T.BFLOAT16)],
        [ROWS],
        [("y", T.BFLOAT16, ["n", 4])],
        {},
        {},
    ),
    "0 outputs that can be compared": (
        [node("SplitToSequence", ["x"], ["q"], axis=1)],
        [ROWS],
        [("q", SEQUENCE)],
        {},
        {},
    ),
    "Reshape node": (
        [node("Reshape", ["x", "to"], ["y"])],
        [ROWS],
        [("y", T.FLOAT, [8, 4])],
        {"to": np.array([8, 4], np.int64)},
        {},
    ),
    "not a registered function": (
        [node("Magic", ["x"], ["y"], domain="acme")],
        [ROWS],
        [("y", T.FLOAT, ["n", 4])],
        {},
        {"domains": [("acme", 1)]},
    ),
}
"""Files that cannot be fed, run or compared, by what is said of them."""


def write(path: Path, parts: Parts) -> Path:
    """Write a file, unchecked."""
    nodes, inputs, outputs, constants, more = parts

    def value(item: Any) -> Any:
        return helper.make_value_info(*item) if len(item) == 2 else helper.make_tensor_value_info(*item)

    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", [value(i) for i in inputs], [value(o) for o in outputs], tensors)
    imports = [
        helper.make_opsetid("", more.get("opset", 17)),
        *(helper.make_opsetid(*d) for d in more.get("domains", ())),
    ]
    functions = more.get("functions", ())
    model = helper.make_model(graph, opset_imports=imports, ir_version=more.get("ir", 8), functions=functions)
    onnx.save(model, str(path))
    return path
