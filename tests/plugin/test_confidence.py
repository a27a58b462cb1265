"""Removal by confidence: its bound against scipy, planted units without information, and units that carry it."""

import functools
import operator

import numpy as np
import pytest
import torch
from scipy import stats

from secateurs.confidence import HALF_A_BIT, confident_elimination, lower_bound
from secateurs.information import InformationLoss, precision
from secateurs.moments import Moments

FOLDS = 5


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95, 0.999])
@pytest.mark.parametrize("count", [2, 5, 30])
def test_the_bound_is_students(confidence, count):
    values = np.random.default_rng(count).normal(1, 2, count)
    expected = values.mean() - stats.t.ppf(confidence, count - 1) * values.std(ddof=1) / count**0.5
    assert lower_bound(values.tolist(), confidence) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("values", "confidence"), [([1.0], 0.9), ([1.0, 2.0], 1.0), ([1.0, 2.0], 0.4)])
def test_a_bound_that_means_nothing_is_refused(values, confidence):
    with pytest.raises(ValueError, match="confidence in"):
        lower_bound(values, confidence)


def sampled(weight, n, seed, twin=None):
    """Criteria of a reader that is observed with noise, on all rows and without each fold; unit i is column i."""
    generator = np.random.default_rng(seed)
    d = weight.shape[1]
    x = generator.normal(size=(n, d))
    if twin is not None:
        x[:, twin[1]] = x[:, twin[0]] + 0.01 * generator.normal(size=n)
    y = x @ weight.T + generator.normal(size=(n, len(weight)))
    rows = torch.from_numpy(np.concatenate((x, y), 1))
    parts = []
    for fold in range(FOLDS):
        part = Moments.zeros(rows.shape[1])
        part.update(rows[fold::FOLDS])
        parts.append(part)
    whole = functools.reduce(operator.add, parts)

    def criterion(moments):
        covariance = moments.covariance
        inverse = precision(covariance[:d, :d])
        maps = covariance[d:, :d] @ inverse
        noise = covariance[d:, d:] - maps @ covariance[:d, d:]
        return InformationLoss(inverse, maps, noise, torch.arange(d)[:, None])

    return [criterion(whole)], [[criterion(whole - part)] for part in parts]


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_a_unit_of_noise_goes_at_the_stated_rate_and_units_with_information_stay(confidence):
    weight = np.array([[1.0, 0.5, 0.0, 0.3], [0.0, 0.8, 0.0, -0.6]])  # nothing reads unit 2
    seeds, gone = 300, 0
    for seed in range(seeds):
        order = confident_elimination(*sampled(weight, 300, seed), 4, confidence=confidence)
        removed = order.units[: order.removable]
        assert not {0, 1, 3} & set(removed)
        gone += removed == (2,)
    assert stats.binomtest(gone, seeds, confidence, alternative="less").pvalue > 0.01


def test_the_more_sure_a_unit_must_be_the_more_units_go():
    weight = np.random.default_rng(0).normal(scale=0.08, size=(3, 12))
    counts = [
        confident_elimination(*sampled(weight, 400, 1), 12, confidence=confidence).removable
        for confidence in (0.5, 0.8, 0.95, 0.999)
    ]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_of_two_nearly_identical_units_exactly_one_stays():
    weight = np.array([[1.0, 0.5, 1.0, 0.3], [0.4, 0.8, 0.4, -0.6]])
    order = confident_elimination(*sampled(weight, 500, 3, twin=(0, 2)), 4, confidence=0.95)
    assert order.removable == 1
    assert order.units[0] in (0, 2)


def test_a_unit_that_carries_less_than_the_margin_goes():
    weight = np.array([[3.0, 0.5]])  # 1.15 and .11 nats
    sure = confident_elimination(*sampled(weight, 20_000, 0), 2, confidence=0.95)
    relaxed = confident_elimination(*sampled(weight, 20_000, 0), 2, confidence=0.95, margin=HALF_A_BIT)
    assert (sure.removable, relaxed.removable) == (0, 1)
    assert relaxed.units[0] == 1
    assert relaxed.losses[0] == pytest.approx(0.5 * np.log(1.25), abs=0.02)


def test_some_units_stay_whatever_the_confidence():
    weight = np.zeros((2, 5))
    order = confident_elimination(*sampled(weight, 300, 0), 5, confidence=0.999, keep=3)
    assert order.removable == 2
    assert len(set(order.units)) == 4
