"""Where nodes ran, and when that breaks a claim."""

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateurs.settings import TargetSettings
from secateurs_adapters.one_node import ONE_NODE
from secateurs_adapters.placement import Placement, find_placement, place, violation

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def asked(provider=CUDA, **more):
    return TargetSettings.model_validate({"provider": provider, **more})


def test_the_one_node_model_is_what_it_says():
    model = onnx.load_from_string(ONE_NODE)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Relu"]
    assert [entry.version for entry in model.opset_import] == [17]


def test_a_file_on_the_cpu_is_there_with_all_its_time(tmp_path):
    (tmp_path / "m.onnx").write_bytes(ONE_NODE)
    found = place(tmp_path / "m.onnx", TargetSettings())
    assert found == Placement(CPU, {CPU: 1}, {CPU: 1.0})
    assert violation("candidate", found, TargetSettings()) is None


def test_time_decides_what_was_obtained_and_nodes_are_counted_once():
    events = [("a", CUDA, 6.0), ("b", CPU, 1.0), ("c", CPU, 1.0)] * 3
    found = find_placement(None, events, CUDA)
    assert found == Placement(CUDA, {CUDA: 1, CPU: 2}, {CUDA: 0.75, CPU: 0.25})
    assert find_placement({CUDA: 5, CPU: 1}, events, CUDA).nodes == {CUDA: 5, CPU: 1}
    assert find_placement(None, [], CPU) == Placement(CPU, None, None)


@pytest.mark.parametrize(
    ("nodes", "time", "allowed", "part"),
    [
        ({CUDA: 9}, {CUDA: 1.0}, 0.0, None),
        ({CUDA: 9, CPU: 1}, {CUDA: 0.97, CPU: 0.03}, 0.0, "1 of 10 nodes"),
        ({CUDA: 9, CPU: 1}, {CUDA: 0.97, CPU: 0.03}, 0.05, None),
        ({CUDA: 9, CPU: 1}, {CUDA: 0.9, CPU: 0.1}, 0.05, "10.00% of the time"),
        ({CUDA: 9, CPU: 1}, None, 0.05, "1 of 10 nodes"),
        ({CUDA: 9, CPU: 1}, None, 0.1, None),
        ({CUDA: 1, CPU: 9}, {CUDA: 0.6, CPU: 0.4}, 0.5, None),
        ({CUDA: 9, CPU: 1}, {CUDA: 0.2, CPU: 0.8}, 0.5, "ran on CPUExecutionProvider"),
        ({CUDA: 9, CPU: 1}, {CUDA: 1.0}, 0.0, "1 of 10 nodes"),
        (None, None, 1.0, "does not tell"),
    ],
)
def test_a_claim_stands_within_the_share_that_is_allowed(nodes, time, allowed, part):
    known = time or nodes or {CUDA: 1}
    placement = Placement(max(known, key=known.get), nodes, time)
    found = violation("candidate", placement, asked(allow_elsewhere=allowed))
    assert (found is None) == (part is None)
    assert part is None or part in found


@given(st.dictionaries(st.sampled_from([CUDA, CPU, "Third"]), st.floats(0.1, 1e6), min_size=1), st.floats(0, 1))
def test_shares_add_up_and_more_allowance_never_breaks_a_claim(spent, allowed):
    placement = find_placement(None, [(name, name, value) for name, value in spent.items()], CUDA)
    assert sum(placement.time.values()) == pytest.approx(1.0)
    strict = violation("candidate", placement, asked())
    lax = violation("candidate", placement, asked(allow_elsewhere=allowed))
    assert lax is None or strict is not None
