"""Accuracy on files, against numpy and scipy."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from scipy import stats

from secateurs.data import Dataset
from secateurs.errors import DataError
from secateurs_adapters.accuracy import agreement, compare_accuracy, score
from secateurs_adapters.metrics import F1Macro, TopFiveAccuracy, accuracy
from secateurs_adapters.session import Session
from secateurs_adapters.value_metrics import MeanIoU

CLASSES = 7


def session(path, w):
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", w.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", w.shape[1]])],
        [numpy_helper.from_array(w.astype(np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return Session(path)


@pytest.fixture
def files(tmp_path):
    generator = np.random.default_rng(0)
    before = generator.normal(size=(6, CLASSES))
    after = before + 0.3 * generator.normal(size=before.shape)
    x = generator.normal(size=(300, 6)).astype(np.float32)
    truth = (x @ before + generator.normal(size=(300, CLASSES))).argmax(1)
    sessions = session(tmp_path / "a.onnx", before), session(tmp_path / "b.onnx", after)
    return sessions, Dataset({"x": x}, truth), x @ before, x @ after


def test_accuracy_drop_and_intervals_match_numpy_and_scipy(files):
    (before, after), data, scores_before, scores_after = files
    found = compare_accuracy(before, after, data, accuracy)
    right = [scores.argmax(1) == data.labels for scores in (scores_before, scores_after)]
    for side, hits in zip((found.baseline, found.candidate), right, strict=True):
        assert side.value == pytest.approx(hits.mean())
        expected = stats.binomtest(int(hits.sum()), 300).proportion_ci(0.95, "exact")
        assert side.ci95 == pytest.approx((expected.low, expected.high), abs=1e-9)
        assert (side.n, side.metric) == (300, "accuracy")
    lost, gained = (right[0] & ~right[1]).sum(), (~right[0] & right[1]).sum()
    assert found.drop.value == pytest.approx((lost - gained) / 300)
    low, high = found.drop.ci95
    half = 1.96 * np.sqrt(lost + gained - (lost - gained) ** 2 / 300) / 300
    assert half < found.drop.value - low < 1.4 * half
    assert half < high - found.drop.value < 1.4 * half


def test_a_candidate_that_is_better_has_a_negative_drop(files):
    (before, after), data, _, _ = files
    forward, back = (compare_accuracy(*pair, data, accuracy).drop for pair in ((before, after), (after, before)))
    assert forward.value == pytest.approx(-back.value)
    assert forward.value > 0


def test_a_metric_without_examples_has_no_interval_and_its_direction_counts(files):
    (before, after), data, _, _ = files

    class Loss:
        name = "loss"
        higher_is_better = False

        def per_example(self, outputs, labels):
            return None

        def value(self, outputs, labels):
            return float(-np.mean(outputs[np.arange(len(labels)), labels]))

    found = compare_accuracy(before, after, data, Loss())
    assert found.drop.value == pytest.approx(found.candidate.value - found.baseline.value)
    assert found.drop.ci95 is None
    assert found.baseline.ci95 is None


def test_top5_and_macro_f1_match_their_definitions(files):
    _, data, scores, _ = files
    ranks = (scores > scores[np.arange(300), data.labels][:, None]).sum(1)
    assert TopFiveAccuracy().value(scores, data.labels) == pytest.approx((ranks < 5).mean())
    predicted = scores.argmax(1)
    parts = []
    for label in range(CLASSES):
        true = ((predicted == label) & (data.labels == label)).sum()
        parts.append(2 * true / ((predicted == label).sum() + (data.labels == label).sum()))
    assert F1Macro().value(scores, data.labels) == pytest.approx(np.mean(parts), abs=1e-6)
    assert F1Macro().per_example(scores, data.labels) is None


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_the_metrics_agree_with_their_mean_over_examples(n, classes, seed):
    generator = np.random.default_rng(seed)
    outputs, labels = generator.normal(size=(n, classes)), generator.integers(0, classes, n)
    for metric in (accuracy, TopFiveAccuracy()):
        right = metric.per_example(outputs, labels)
        assert right.mean() == pytest.approx(metric.value(outputs, labels))
        assert score(metric, outputs, labels)[0].value == pytest.approx(right.mean())
    assert (accuracy.per_example(outputs, labels) <= TopFiveAccuracy().per_example(outputs, labels)).all()


def graph(path, nodes, outputs, constants=()):
    """Return a session of operators on `x` of shape (batch, 7)."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", CLASSES]) for name in ("x", *outputs)]
    body = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(v, k) for k, v in constants])
    onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return Session(path)


@pytest.fixture
def scored():
    x = np.random.default_rng(1).normal(size=(200, CLASSES)).astype(np.float32)
    return Dataset({"x": x}, x.argmax(1))


def test_nan_is_no_answer():
    """Label 0 is what `argmax` makes of NaN."""
    scores, labels = np.random.default_rng(1).normal(size=(200, CLASSES)), np.zeros(200, np.int64)
    scores[:, 0] += 9
    scores[::4, 3] = np.nan
    for metric in (accuracy, TopFiveAccuracy()):
        assert metric.value(scores, labels) == 0.75
    assert F1Macro().value(scores, labels) == pytest.approx((2 * 0.75 / 1.75) / 2), (
        "of the classes 0 and 1, the one chosen instead"
    )
    maps = np.zeros((1, 2, 4, 4), np.float32)
    maps[:, 0] = 1
    assert MeanIoU().value(maps, np.zeros((1, 4, 4), np.int64)) == 1.0
    assert MeanIoU().value(np.full_like(maps, np.nan), np.zeros((1, 4, 4), np.int64)) == 0.0


def test_unsigned_scores_are_ranked_by_their_size():
    scores = np.array([[0, 1, 2, 3, 4, 200, 7]], np.uint8)
    assert TopFiveAccuracy().value(scores, np.array([5])) == 1.0
    assert TopFiveAccuracy().value(scores, np.array([0])) == 0.0
    low = np.array([[-128, 1, 2, 3, 4, 100, 7]], np.int8)
    assert TopFiveAccuracy().value(low, np.array([0])) == 0.0


def test_files_that_mix_the_examples_of_a_batch_run_at_the_batch_size_asked_for(scored, tmp_path):
    plain = graph(tmp_path / "a.onnx", [helper.make_node("Identity", ["x"], ["y"])], ["y"])
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "m"], ["y"]),
    ]
    centred = graph(tmp_path / "b.onnx", nodes, ["y"])
    at_one = compare_accuracy(plain, centred, scored, accuracy, batch_size=1)
    assert at_one.baseline.value == 1.0
    assert at_one.candidate.value == pytest.approx((scored.labels == 0).mean()), "x - x is 0 for every class"
    assert compare_accuracy(plain, centred, scored, accuracy, batch_size=200).candidate.value > 0.8
    assert agreement(plain, centred, inputs=scored.inputs)["y"] == pytest.approx((scored.labels == 0).mean())


def test_the_candidates_output_is_the_one_of_the_baselines_name(scored, tmp_path):
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["z"])]
    first, second = graph(tmp_path / "a.onnx", nodes, ["y", "z"]), graph(tmp_path / "b.onnx", nodes, ["z", "y"])
    found = compare_accuracy(first, second, scored, accuracy)
    assert (found.baseline.value, found.candidate.value) == (1.0, 1.0)


def test_a_baseline_of_nothing_but_nan_is_refused(scored, tmp_path):
    constants = [("minus", np.full(CLASSES, -1, np.float32))]
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("Mul", ["a", "minus"], ["b"]),
        helper.make_node("Log", ["b"], ["y"]),
    ]
    broken = graph(tmp_path / "a.onnx", nodes, ["y"], constants)
    fine = graph(tmp_path / "b.onnx", [helper.make_node("Identity", ["x"], ["y"])], ["y"])
    with pytest.raises(DataError, match=r"a\.onnx' returns nothing but NaN"):
        compare_accuracy(broken, fine, scored, accuracy)
    found = compare_accuracy(fine, broken, Dataset(scored.inputs, np.zeros(200, np.int64)), accuracy)
    assert found.candidate.value == 0.0, "argmax of NaN is 0, and no answer"
    assert agreement(fine, broken, inputs=scored.inputs)["y"] == 0.0


def test_one_label_per_token_gives_a_share_without_interval():
    outputs = np.eye(3)[np.array([[0, 1], [2, 2]])]
    labels = np.array([[0, 0], [2, 2]])
    assert accuracy.per_example(outputs, labels) is None
    assert accuracy.value(outputs, labels) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        (np.zeros((3, 2)), np.zeros(3), "integer class labels"),
        (np.zeros((3, 2)), np.zeros(4, int), "outputs of shape"),
        (np.zeros((3, 1)), np.zeros(3, int), "at least 2 classes"),
        (np.zeros((3, 2)), np.array([0, 1, 2]), "labels go from 0 to 2, but the network has 2 classes"),
    ],
)
def test_labels_that_do_not_fit_are_explained(outputs, labels, message):
    for metric in (accuracy, F1Macro()):
        with pytest.raises(DataError, match=message):
            metric.value(outputs, labels)


def test_unlabelled_data_has_no_metric(files):
    (before, after), data, _, _ = files
    with pytest.raises(DataError, match="no labels"):
        compare_accuracy(before, after, Dataset(data.inputs), accuracy)


def test_agreement(files, tmp_path):
    (before, after), data, scores_before, scores_after = files
    expected = (scores_before.argmax(1) == scores_after.argmax(1)).mean()
    assert agreement(before, after, inputs=data.inputs) == {"y": pytest.approx(expected)}
    assert agreement(before, before) == {"y": 1.0}
    assert 0 < agreement(before, after)["y"] < 1
    assert agreement(before, after) == agreement(before, after)


def test_agreement_of_values_is_within_a_tolerance(tmp_path):
    column = np.ones((4, 1))
    first, near, far = (session(tmp_path / f"{scale}.onnx", column * scale) for scale in (1, 1.001, 2))
    assert agreement(first, near) == {"y": 1.0}
    assert agreement(first, far)["y"] < 0.2
    with pytest.raises(DataError, match="same task"):
        agreement(first, session(tmp_path / "other.onnx", np.ones((4, 3))))
