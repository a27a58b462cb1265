"""Networks as they ship, and files of a known size: what the tests of memory and of the fits-test share."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file
from torch import nn

from secateurs.data import Dataset
from secateurs.groups import find_groups, plan_removal
from secateurs.plan import Plan
from secateurs.surgery import applied
from secateurs_adapters.export import dynamo
from secateurs_adapters.models import load_factory

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT.parent / "shared" / "data" / "weights_resnet20_cifar10.safetensors"


def images(channels, size):
    values = np.random.default_rng(0).standard_normal((4, channels, size, size)).astype(np.float32)
    return Dataset({"input": values})


def sequences():
    return Dataset({"input": np.random.default_rng(0).standard_normal((4, 12, 64)).astype(np.float32)})


def resnet20():
    """The trained network."""
    if not WEIGHTS.is_file():
        pytest.skip(f"needs {WEIGHTS.name}, which is not in {WEIGHTS.parent}")
    return load_factory("cifar_resnet:build", arguments={"depth": 20}, weights=WEIGHTS, folder=ROOT / "examples").eval()


def half_of(model, data, keep=()):
    """Take every other unit of every group but those of the roots `keep`."""
    plan = Plan()
    for group in find_groups(model, data)[0]:
        if group.root not in keep:
            plan += plan_removal(model, group, range(0, group.units, 2), "half", plan)
    return applied(model, plan)


def pruned_resnet20():
    """Half of the inner channels gone: below the kernels' block in the first stage."""
    return half_of(resnet20(), images(3, 32), keep=("conv1",))


def quickstart():
    model = load_factory("digits_resnet:build", arguments={}, weights=None, folder=ROOT / "examples")
    model.load_state_dict(load_file(ROOT / "examples" / "digits_resnet.safetensors"))
    return model.eval()


def pruned_quickstart():
    return half_of(quickstart(), images(1, 8))


def separable():
    layers = []
    for width in (24, 40):
        layers += [
            nn.LazyConv2d(width, 1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.Hardswish(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10))


def upsampling():
    """Odd widths, transposed convolutions: plain kernels with scratch and packed weights."""
    down = [
        nn.Conv2d(3, 13, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(13, 27, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(27, 20, 3, padding=1),
    ]
    return nn.Sequential(*down, nn.ConvTranspose2d(20, 9, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(9 * 256, 40))


def transformer():
    layers = [nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu") for _ in range(2)]
    return nn.Sequential(*layers, nn.LayerNorm(64), nn.Softmax(-1))


NETWORKS = {
    "resnet20": (resnet20, images(3, 32)),
    "resnet20-pruned": (pruned_resnet20, images(3, 32)),
    "quickstart": (quickstart, images(1, 8)),
    "quickstart-pruned": (pruned_quickstart, images(1, 8)),
    "separable": (separable, images(3, 16)),
    "upsampling": (upsampling, images(3, 16)),
    "transformer": (transformer, sequences()),
}


def export(name, path):
    """Export one of the networks."""
    build, data = NETWORKS[name]
    torch.manual_seed(0)
    model = build()
    model(torch.from_numpy(data.inputs["input"]))
    dynamo(model.eval(), data, path, opset=20)
    return path


def save(path, nodes, shape_in, shape_out, weights=()):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape_in)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape_out)],
        [numpy_helper.from_array(value, name) for name, value in weights],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def wide(path, size):
    """One activation of `size` floats per example, made by tiling a scalar and summed up again; hardly any weights."""
    nodes = [
        helper.make_node("Tile", ["x", "n"], ["a"]),
        helper.make_node("ReduceMax", ["a"], ["y"], axes=[1], keepdims=1),
    ]
    return save(path, nodes, ["batch", 1], ["batch", 1], [("n", np.array([1, size], np.int64))])


def heavy(path, size):
    """A vector of `size` weights."""
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["h"]),
        helper.make_node("ReduceMax", ["h"], ["y"], axes=[1], keepdims=1),
    ]
    weights = np.random.default_rng(0).normal(size=(1, size)).astype(np.float32)
    return save(path, nodes, ["batch", 1], ["batch", 1], [("w", weights)])
