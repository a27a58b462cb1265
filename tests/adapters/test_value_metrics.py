"""Metrics that are no share of examples, against numpy, scipy and scikit-learn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax
from scipy.stats import spearmanr
from sklearn.metrics import jaccard_score

from secateurs.data import IGNORED
from secateurs.errors import DataError
from secateurs_adapters.metrics import Accuracy, F1Macro
from secateurs_adapters.value_metrics import (
    MeanAbsoluteError,
    MeanIoU,
    MeanSquaredError,
    Perplexity,
    Spearman,
)

ALL = [Perplexity, MeanSquaredError, MeanAbsoluteError, Spearman, MeanIoU]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def integers(high, *shape, seed=1):
    return np.random.default_rng(seed).integers(0, high, shape)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(2, 9), st.integers(0, 99))
def test_perplexity_is_of_the_token_that_each_position_predicts(n, length, vocabulary, seed):
    outputs, tokens = 3 * normal(n, length, vocabulary, seed=seed), integers(vocabulary, n, length, seed=seed)
    scores = log_softmax(outputs.astype(np.float64), -1)
    picked = [scores[i, t, tokens[i, t]] for i in range(n) for t in range(length)]
    assert Perplexity().value(outputs, tokens) == pytest.approx(np.exp(-np.mean(picked)), rel=1e-4)


def test_padding_does_not_count_for_perplexity():
    outputs, tokens = normal(2, 5, 7), integers(7, 2, 5)
    padded = np.pad(outputs, ((0, 0), (0, 3), (0, 0))), np.pad(tokens, ((0, 0), (0, 3)), constant_values=IGNORED)
    assert Perplexity().value(*padded) == pytest.approx(Perplexity().value(outputs, tokens), rel=1e-6)


@pytest.mark.parametrize("shape", [(50,), (50, 1)])
def test_errors_and_correlation_of_values(shape):
    outputs, labels = normal(*shape), normal(50, seed=3).astype(np.float64)
    flat = outputs.reshape(50).astype(np.float64)
    assert MeanSquaredError().value(outputs, labels) == pytest.approx(((flat - labels) ** 2).mean())
    assert MeanAbsoluteError().value(outputs, labels) == pytest.approx(np.abs(flat - labels).mean())
    assert Spearman().value(outputs, labels) == pytest.approx(spearmanr(flat, labels).statistic, abs=1e-6)


@given(st.integers(2, 5), st.integers(0, 99))
def test_mean_iou_is_over_all_images_and_the_classes_that_occur(classes, seed):
    outputs, labels = normal(3, classes, 4, 5, seed=seed), integers(classes, 3, 4, 5, seed=seed)
    labels[0, 0] = IGNORED
    counted = labels != IGNORED
    expected = jaccard_score(labels[counted], outputs.argmax(1)[counted], average="macro")
    assert MeanIoU().value(outputs, labels) == pytest.approx(expected, abs=1e-6)


def test_scores_of_a_lower_resolution_are_interpolated():
    labels = np.zeros((1, 8, 8), np.int64)
    labels[:, :, 4:] = 1
    outputs = np.zeros((1, 2, 2, 2), np.float32)
    outputs[0, 0, :, 0] = outputs[0, 1, :, 1] = 1
    assert MeanIoU().value(outputs, labels) == 1


def test_tokens_that_do_not_count_are_left_out_of_the_metrics_of_classes():
    outputs, labels = normal(4, 6, 3), integers(3, 4, 6)
    labels[:, 4:] = IGNORED
    for metric in (Accuracy(), F1Macro()):
        kept = metric.value(outputs[:, :4], labels[:, :4])
        assert metric.value(outputs, labels) == pytest.approx(kept)
    hits = outputs[:, :4].argmax(-1) == labels[:, :4]
    assert Accuracy().value(outputs, labels) == pytest.approx(hits.mean())


@pytest.mark.parametrize("metric", ALL)
def test_none_has_an_interval_and_each_says_what_it_needs(metric):
    assert metric().per_example(normal(4, 3), integers(3, 4)) is None
    with pytest.raises(DataError, match=f"metric {metric.name!r} needs"):
        metric().value(normal(4, 3, 2), integers(3, 9))


@pytest.mark.parametrize(
    ("metric", "shape", "labels"), [(Perplexity, (2, 3, 5), (2, 3)), (MeanIoU, (2, 5, 3, 3), (2, 3, 3))]
)
def test_labels_out_of_range_or_of_nothing_are_refused(metric, shape, labels):
    with pytest.raises(DataError, match="labels must lie in 0 to 4"):
        metric().value(normal(*shape), np.full(labels, 5))
    with pytest.raises(DataError, match="counts for nothing"):
        metric().value(normal(*shape), np.full(labels, IGNORED))


def test_directions():
    assert {metric.name for metric in ALL if metric.higher_is_better} == {"spearman", "mean-iou"}
