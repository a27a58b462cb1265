"""Planned memory against onnxruntime's own profile, byte for byte, and the arena against its rules."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file
from torch import nn

from secateurs.data import Dataset
from secateurs.errors import DataError
from secateurs.groups import find_groups, plan_removal
from secateurs.plan import Plan
from secateurs.surgery import applied
from secateurs_adapters.arena import Arena
from secateurs_adapters.export import dynamo
from secateurs_adapters.kernels import KernelTable
from secateurs_adapters.models import load_factory
from secateurs_adapters.planned import plan_file, plan_memory
from secateurs_adapters.runtime_graph import optimised_model, runtime_graph
from secateurs_adapters.session import Session, SessionOptions, seeded_inputs

ROOT = Path(__file__).resolve().parents[2]


def images(channels, size):
    values = np.random.default_rng(0).standard_normal((4, channels, size, size)).astype(np.float32)
    return Dataset({"input": values})


def sequences():
    return Dataset({"input": np.random.default_rng(0).standard_normal((4, 12, 64)).astype(np.float32)})


def resnet20():
    return load_factory("cifar_resnet:build", arguments={"depth": 20}, weights=None, folder=ROOT / "examples").eval()


def pruned_resnet20():
    """Half of the inner channels gone: below the kernels' block in the first stage."""
    model, data = resnet20(), images(3, 32)
    plan = Plan()
    for group in find_groups(model, data)[0]:
        if group.root != "conv1":
            plan += plan_removal(model, group, range(0, group.units, 2), "half", plan)
    return applied(model, plan)


def quickstart():
    model = load_factory("digits_resnet:build", arguments={}, weights=None, folder=ROOT / "examples")
    model.load_state_dict(load_file(ROOT / "examples" / "digits_resnet.safetensors"))
    return model.eval()


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
    "separable": (separable, images(3, 16)),
    "upsampling": (upsampling, images(3, 16)),
    "transformer": (transformer, sequences()),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Export each network once."""
    files = {}

    def export(name):
        if name not in files:
            build, data = NETWORKS[name]
            torch.manual_seed(0)
            files[name] = tmp_path_factory.mktemp(name) / "model.onnx"
            model = build()
            model(torch.from_numpy(data.inputs["input"]))
            dynamo(model.eval(), data, files[name], opset=20)
        return files[name]

    return export


@pytest.mark.parametrize("batch", [1, 4, 32])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_plan_is_what_onnxruntime_profiles(exported, tmp_path, name, batch):
    # One session profiles and writes what it runs: another may order independent nodes otherwise.
    written = tmp_path / "optimised.onnx"
    options = SessionOptions(memory_pattern=False, profile=tmp_path / "profile", optimised=written)
    session = Session(exported(name), options)
    session.run(seeded_inputs(session, batch))
    nodes = session.end_profiling()
    _, data = NETWORKS[name]
    shape = (batch, *data.inputs["input"].shape[1:])
    plan = plan_memory(onnx.load(str(written)), {"input": shape}, KernelTable())
    assert [step.output_bytes for step in plan.steps] == [int(node["output_size"]) for node in nodes]
    profiled = max(int(node["mem_in_use_peak"]) for node in nodes)
    assert profiled <= plan.peak_bytes <= 1.05 * profiled
    assert plan.activation_bytes <= plan.peak_bytes


def test_the_known_figures_of_resnet20(exported):
    plan = plan_file(exported("resnet20"), 1)
    assert plan.activation_bytes == 196_608
    assert plan.packed_bytes == 4096
    # The transition to the second stage: two maps of stage 1, and two of stage 2.
    assert max(plan.steps, key=lambda step: step.live_bytes).live_bytes == 2 * 16 * 32 * 32 * 4 + 2 * 32 * 16 * 16 * 4


def test_without_kernels_only_tensors_are_planned(exported):
    model = onnx.load(str(exported("upsampling")))
    alone, whole = (plan_memory(model, {"input": (1, 3, 16, 16)}, kernels) for kernels in (None, KernelTable()))
    assert alone.packed_bytes == alone.scratch_bytes == 0
    assert whole.packed_bytes > 0
    assert whole.scratch_bytes > 0
    assert alone.activation_bytes == whole.activation_bytes


# --- the rules, one by one --------------------------------------------------------------------------------------------------------------

IN_PLACE = (
    "Relu",
    "Sigmoid",
    "Tanh",
    "LeakyRelu",
    "Elu",
    "Selu",
    "HardSigmoid",
    "Softplus",
    "Softsign",
    "Celu",
    "Clip",
)
FRESH = ("Neg", "Abs", "Sqrt", "Erf", "Exp")


def chain(op, **attributes):
    """A model Neg -> op -> Neg -> Neg, whose last output alone is the caller's."""
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node(op, ["a"], ["b"], **attributes),
        helper.make_node("Neg", ["b"], ["c"]),
        helper.make_node("Neg", ["c"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64]) for name in ("x", "y")]
    return model_of(nodes, ends[:1], ends[1:])


def model_of(nodes, inputs, outputs, weights=()):
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(v, n) for n, v in weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def profiled(model, tmp_path, feeds):
    path = tmp_path / "chain.onnx"
    onnx.save(model, str(path))
    session = Session(path, SessionOptions(memory_pattern=False, optimise=False, profile=tmp_path / "profile"))
    session.run(feeds)
    return max(int(node["mem_in_use_peak"]) for node in session.end_profiling())


@pytest.mark.parametrize("op", [*IN_PLACE, *FRESH, "Softmax", "LogSoftmax", "Identity"])
def test_which_kernels_write_over_their_input(op, tmp_path):
    feeds = {"x": -np.random.default_rng(0).random((8, 64), dtype=np.float32)}
    plan = plan_memory(chain(op), {"x": (8, 64)}, KernelTable())
    assert plan.peak_bytes == profiled(chain(op), tmp_path, feeds)
    assert (plan.steps[1].live_bytes == 8 * 64 * 4) == (op not in FRESH)


def test_an_input_that_others_need_is_not_written_over(tmp_path):
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64]) for name in ("x", "y")]
    model = model_of(nodes, ends[:1], ends[1:])
    plan = plan_memory(model, {"x": (8, 64)})
    assert [step.live_bytes for step in plan.steps] == [2048, 4096, 6144]
    assert plan.peak_bytes == profiled(model, tmp_path, {"x": np.ones((8, 64), np.float32)})


def test_a_dead_buffer_is_used_again_only_for_the_same_shape():
    def plan_for(width):
        nodes = [
            helper.make_node("Neg", ["x"], ["a"]),
            helper.make_node("MatMul", ["a", "w"], ["b"]),
            helper.make_node("MatMul", ["b", "v"], ["c"]),
            helper.make_node("Neg", ["c"], ["y"]),
        ]
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64]) for name in ("x", "y")]
        weights = [("w", np.ones((64, width), np.float32)), ("v", np.ones((width, 64), np.float32))]
        return plan_memory(model_of(nodes, ends[:1], ends[1:], weights), {"x": (1, 64)})

    # The third result takes the first one's buffer, which therefore lives through the second node.
    assert plan_for(32).steps[2].live == {"a": 256, "b": 128}
    assert plan_for(64).steps[2].live == {"a": 256, "b": 256}


def test_shapes_that_only_a_run_shows(tmp_path):
    nodes = [helper.make_node("NonZero", ["x"], ["a"]), helper.make_node("Cast", ["a"], ["y"], to=TensorProto.FLOAT)]
    shapes = {"x": ["batch", 4], "y": [2, None]}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = runtime_graph(model_of(nodes, ends[:1], ends[1:]), {"x": (2, 4)})
    assert graph.shapes["a"] == (2, 8)
    assert graph.bytes_of("a") == 2 * 8 * 8


@pytest.mark.parametrize(
    ("shapes", "says"), [({}, "is not given"), ({"x": (1, 2, 3)}, "takes the shape"), ({"x": (1, 63)}, "takes")]
)
def test_inputs_that_do_not_fit(shapes, says):
    with pytest.raises(DataError, match=says):
        plan_memory(chain("Relu"), shapes)


# --- the arena ------------------------------------------------------------------------------------------------------------------------

MIB = 2**20


def test_regions_double_and_chunks_are_not_cut_too_small():
    arena = Arena(reserved=100)
    arena.allocate("a", MIB)
    arena.allocate(
        "b", 3 * MIB
    )  # the next region has 2 MiB, doubled until it fits; the rest is smaller than the request
    assert arena.in_use == 100 + MIB + 4 * MIB
    arena.release("b")
    arena.allocate("c", 2 * MIB)
    assert arena.in_use == 100 + 3 * MIB
    assert arena.peak == 100 + 5 * MIB


def test_neighbours_join():
    arena = Arena()
    for name in "abcd":
        arena.allocate(name, MIB // 4)
    for name in "bc":
        arena.release(name)
    arena.allocate("e", MIB // 2)
    assert arena.peak == MIB


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3 * MIB)), max_size=60))
def test_what_is_given_back_is_free_again(requests):
    arena, held = Arena(), {}
    for slot, size in requests:
        name = str(slot)
        if name in held:
            arena.release(name)
            del held[name]
        else:
            arena.allocate(name, size)
            held[name] = size
        assert sum(held.values()) <= arena.in_use <= arena.peak
        # Nothing wastes more than its own size and the alignment.
        assert arena.in_use <= sum(2 * size + 512 for size in held.values() if size)
    for name in held:
        arena.release(name)
    assert arena.in_use == 0


def test_the_arena_is_onnxruntimes(tmp_path):
    """Tensors of all sizes that overlap in time, against the profile."""
    generator = np.random.default_rng(0)
    for trial in range(5):
        sizes = (2 ** generator.uniform(6, 20, 8)).astype(int)
        nodes, weights = [], []
        for number, size in enumerate(sizes):
            weights.append((f"n{number}", np.array([1, int(size)], np.int64)))
            nodes.append(helper.make_node("Tile", ["x", f"n{number}"], [f"t{number}"]))
        order = generator.permutation(len(sizes))
        for number in order:
            nodes.append(helper.make_node("ReduceMax", [f"t{number}", "axes"], [f"m{number}"], keepdims=1))
        nodes.append(helper.make_node("Sum", [f"m{number}" for number in order], ["y"]))
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1]) for name in ("x", "y")]
        model = model_of(nodes, ends[:1], ends[1:], [*weights, ("axes", np.array([1], np.int64))])
        folder = tmp_path / str(trial)
        folder.mkdir()
        peak = profiled(model, folder, {"x": np.ones((3, 1), np.float32)})
        # onnxruntime runs independent nodes in an order of its own.
        ordered = optimised_model(folder / "chain.onnx", SessionOptions(optimise=False))
        assert plan_memory(ordered, {"x": (3, 1)}, KernelTable()).peak_bytes == peak
