"""Planned memory against onnxruntime's own profile, byte for byte, and the arena against its rules."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from shipped import NETWORKS

from secateurs.errors import DataError
from secateurs.settings import TargetSettings
from secateurs_adapters.arena import Arena
from secateurs_adapters.kernels import KernelTable
from secateurs_adapters.planned import plan_file, plan_memory
from secateurs_adapters.runtime_graph import optimised_model, runtime_graph, written_model
from secateurs_adapters.session import Session, SessionOptions, seeded_inputs
from secateurs_adapters.views import plan_in_process


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
    plan = plan_memory(written_model(written, exported(name)), {"input": shape}, KernelTable())
    assert plan.unknown == ()
    assert [step.output_bytes for step in plan.steps] == [int(node["output_size"]) for node in nodes]
    profiled = max(int(node["mem_in_use_peak"]) for node in nodes)
    assert profiled <= plan.peak_bytes <= 1.05 * profiled
    assert plan.activation_bytes <= plan.peak_bytes


def branches():
    """Two independent chains of unlike sizes, which a session may run in either order."""
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node("Tile", ["a", "n"], ["b"]),
        helper.make_node("Abs", ["x"], ["c"]),
        helper.make_node("Tile", ["c", "m"], ["d"]),
        *(helper.make_node("ReduceMax", [name, "axes"], [f"{name}1"], keepdims=1) for name in "bd"),
        helper.make_node("Add", ["b1", "d1"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1]) for name in ("x", "y")]
    sizes = {"n": 5000, "m": 300}
    weights = [(name, np.array([1, size], np.int64)) for name, size in sizes.items()]
    return model_of(nodes, ends[:1], ends[1:], [*weights, ("axes", np.array([1], np.int64))])


def test_a_plan_is_that_of_the_session_whose_graph_it_is_given(tmp_path):
    """Sessions may order independent nodes differently: each is compared with its own plan."""
    file = tmp_path / "branches.onnx"
    onnx.save(branches(), str(file))
    for trial in range(4):
        written = tmp_path / f"{trial}.onnx"
        options = SessionOptions(memory_pattern=False, profile=tmp_path / f"profile{trial}", optimised=written)
        session = Session(file, options)
        session.run(seeded_inputs(session, 3))
        profiled = max(int(node["mem_in_use_peak"]) for node in session.end_profiling())
        plan = plan_file(file, 3, written=written)
        assert profiled <= plan.peak_bytes <= 1.05 * profiled


def test_the_curve_is_what_lives_at_each_node(tmp_path):
    """By hand, of 25 floats per example: x of the caller is not counted; a; a and b; b and the sum."""
    nodes = [
        helper.make_node("Neg", ["x"], ["a"], name="first"),
        helper.make_node("Concat", ["a", "a"], ["b"], axis=1, name="second"),
        helper.make_node("ReduceSum", ["b", "axes"], ["y"], name="third"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", w]) for n, w in (("x", 25), ("y", 1))]
    file = tmp_path / "chain.onnx"
    onnx.save(model_of(nodes, ends[:1], ends[1:], [("axes", np.array([1], np.int64))]), str(file))
    plan = plan_in_process(file, TargetSettings(batch_size=3))
    assert plan["live_bytes"] == [300, 900, 612]
    assert max(plan["live_bytes"]) == plan["tensor_bytes"]
    assert plan["peak_node"] == "Concat second"


def test_what_cannot_be_planned_is_refused(tmp_path):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    body = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["z"])], "b", [], [helper.make_empty_tensor_value_info("z")]
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "zero"], ["flag"]),
        helper.make_node("If", ["flag"], ["y"], then_branch=body, else_branch=body),
    ]
    model = model_of(nodes, ends[:1], ends[1:], [("zero", np.zeros((), np.float32))])
    onnx.save(model, str(tmp_path / "if.onnx"))
    with pytest.raises(DataError, match="what If runs"):
        plan_file(tmp_path / "if.onnx", 2)


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
