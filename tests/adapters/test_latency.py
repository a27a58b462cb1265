"""Latency: the same file costs the same, a bigger one more, and the statistics are numpy's and scipy's."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from scipy import stats

from secateurs.errors import DataError
from secateurs.settings import TargetSettings
from secateurs_adapters.latency import latency_summary, measure_latency, ratio_estimate

QUICK = TargetSettings.model_validate({"batch_size": 8, "repeats": 20, "warmup": 5})


def layers(path, count, width=256):
    """A chain of `count` square layers."""
    generator = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for index in range(count):
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [f"m{index}"]))
        nodes.append(helper.make_node("Relu", [f"m{index}"], [f"h{index}"]))
        weights.append(
            numpy_helper.from_array(generator.normal(0, 0.05, (width, width)).astype(np.float32), f"w{index}")
        )
        last = f"h{index}"
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])  # noqa: E731
    graph = helper.make_graph(nodes, "g", [value("x")], [value(last)], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.alone
def test_two_copies_of_one_file_have_a_ratio_of_one(tmp_path):
    path, copy = layers(tmp_path / "a.onnx", 8), layers(tmp_path / "b.onnx", 8)
    # A 95 % interval misses one time in twenty; three misses in a row are a defect.
    for _ in range(3):
        found = measure_latency(path, copy, QUICK)
        low, high = found.ratio.ci95
        if low <= 1 <= high:
            break
    assert low <= 1 <= high
    assert 0.8 < found.ratio.value < 1.25
    assert len(found.log_ratios) == 5
    runs = 5 * 2 * QUICK.repeats
    assert (found.baseline.latency.n, found.candidate.latency.n) == (runs, runs)
    assert found.baseline.session_ms > 0
    assert found.baseline.first_run_ms > 0


@pytest.mark.alone
def test_a_network_eight_times_bigger_is_slower_and_found_so(tmp_path):
    steps = []
    found = measure_latency(
        layers(tmp_path / "small.onnx", 2),
        layers(tmp_path / "big.onnx", 16),
        QUICK,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert found.ratio.ci95[0] > 2
    assert found.candidate.latency.p50 > 2 * found.baseline.latency.p50
    assert steps == [(n, 5) for n in range(1, 6)]


@pytest.mark.alone
def test_more_processes_are_taken_while_undecided(tmp_path):
    path = layers(tmp_path / "a.onnx", 1, width=16)
    asked = []

    def decided(estimate):
        asked.append(estimate)
        return len(asked) == 2

    quick = QUICK.model_copy(update={"repeats": 4, "max_processes": 7})
    assert len(measure_latency(path, path, quick, decided=decided).log_ratios) == 6
    assert len(asked) == 2
    assert len(measure_latency(path, path, quick, decided=lambda _: False).log_ratios) == 7


def test_a_file_that_fails_is_an_error(tmp_path):
    with pytest.raises(DataError, match="missing"):
        measure_latency(tmp_path / "none.onnx", tmp_path / "none.onnx", QUICK)


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=15))
def test_the_interval_is_scipys(logs):
    found = ratio_estimate(logs)
    mean, error = np.mean(logs), stats.sem(logs)
    half = stats.t.ppf(0.975, len(logs) - 1) * error
    assert found.value == pytest.approx(np.exp(mean))
    assert found.ci95 == pytest.approx((np.exp(mean - half), np.exp(mean + half)), rel=1e-6)


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(0.01, 100), min_size=2, max_size=60), min_size=1, max_size=6))
def test_percentiles_only_where_there_are_runs_beyond_them(processes):
    found = latency_summary(processes)
    samples = [sample for process in processes for sample in process]
    assert (found.n, found.processes) == (len(samples), len(processes))
    assert found.p50 == pytest.approx(np.median(samples))
    assert (found.p95 is None) == (len(samples) < 40)
    assert (found.p99 is None) == (len(samples) < 200)
    assert found.cv == pytest.approx(np.std(samples, ddof=1) / np.mean(samples), abs=1e-12)
    assert (found.p50_ci95 is None) == (len(processes) == 1)
    if len(processes) > 1:
        logs = np.log([np.median(process) for process in processes])
        half = stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs)
        assert found.p50_ci95 == pytest.approx((np.exp(logs.mean() - half), np.exp(logs.mean() + half)), rel=1e-6)
