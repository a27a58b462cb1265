"""Removal scores against log-determinants of the joint covariance and against least squares."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs.information import (
    InformationLoss,
    ResidualIncrease,
    backward_elimination,
    noise_floor,
    precision,
    ridged,
)


def problem(units, b, outputs, seed):
    """A random covariance, reader, noise, importance and a scattered assignment of columns to units."""
    generator = np.random.default_rng(seed)
    d = units * b
    factor = generator.normal(size=(d, d + 3))
    covariance = factor @ factor.T / d + 0.05 * np.eye(d)
    weight = generator.normal(size=(outputs, d))
    noise = generator.uniform(0.1, 1.0, outputs)
    importance = generator.uniform(0.0, 2.0, outputs)
    columns = generator.permutation(d).reshape(units, b)
    return covariance, weight, noise, importance, columns


def tensors(*arrays):
    return tuple(torch.from_numpy(np.asarray(array)) for array in arrays)


def made(criterion, covariance, weight, third, columns):
    """A criterion for the inverse of a covariance."""
    covariance, *others = tensors(covariance, weight, third, columns)
    return criterion(precision(covariance), *others)


def mutual_information(covariance, weight, noise, kept):
    """I(X_kept; Y) of the joint Gaussian of X and Y = WX + noise, from three determinants."""
    joint = np.block(
        [[covariance, covariance @ weight.T], [weight @ covariance, weight @ covariance @ weight.T + np.diag(noise)]]
    )
    d = len(covariance)
    x, y = np.asarray(kept, dtype=int), np.arange(d, len(joint))
    both = np.concatenate((x, y))
    logdet = [np.linalg.slogdet(joint[np.ix_(index, index)])[1] if len(index) else 0.0 for index in (x, y, both)]
    return 0.5 * (logdet[0] + logdet[1] - logdet[2])


def residual(covariance, weight, importance, kept):
    """The weighted error of the best linear map from X_kept to WX, from the Schur complement."""
    gone = np.setdiff1d(np.arange(len(covariance)), kept)
    cross = covariance[np.ix_(gone, kept)]
    left = covariance[np.ix_(gone, gone)] - cross @ np.linalg.solve(covariance[np.ix_(kept, kept)], cross.T)
    return float(np.trace(np.diag(importance) @ weight[:, gone] @ left @ weight[:, gone].T))


def columns_of(columns, units):
    return np.sort(columns[list(units)].ravel())


sizes = pytest.mark.parametrize(("units", "b"), [(6, 1), (5, 3), (4, 9)], ids=["neurons", "heads", "filters"])


@sizes
def test_information_is_the_difference_of_two_mutual_informations(units, b):
    covariance, weight, noise, _, columns = problem(units, b, outputs=4, seed=units)
    criterion = made(InformationLoss, covariance, weight, noise, columns)
    left = set(range(units))
    for removed in [None, 2, 0, units - 1]:
        if removed is not None:
            criterion.remove(removed)
            left.discard(removed)
        whole = mutual_information(covariance, weight, noise, columns_of(columns, left))
        scores = criterion.scores()
        for unit in left:
            less = mutual_information(covariance, weight, noise, columns_of(columns, left - {unit}))
            assert float(scores[unit]) == pytest.approx(whole - less, abs=1e-9)


@sizes
def test_the_losses_of_an_elimination_add_up_to_all_information(units, b):
    covariance, weight, noise, _, columns = problem(units, b, outputs=3, seed=1)
    order = backward_elimination([made(InformationLoss, covariance, weight, noise, columns)], units)
    assert len(set(order.units)) == units - 1
    (last,) = set(range(units)) - set(order.units)
    whole = mutual_information(covariance, weight, noise, np.arange(units * b))
    rest = mutual_information(covariance, weight, noise, columns[last])
    assert sum(order.losses) + rest == pytest.approx(whole, abs=1e-8)


@sizes
def test_residual_is_the_exact_increase_of_the_least_squares_error(units, b):
    covariance, weight, _, importance, columns = problem(units, b, outputs=4, seed=units + 10)
    criterion = made(ResidualIncrease, covariance, weight, importance, columns)
    left = set(range(units))
    for removed in [None, 1, 3]:
        if removed is not None:
            criterion.remove(removed)
            left.discard(removed)
        now = residual(covariance, weight, importance, columns_of(columns, left))
        scores = criterion.scores()
        for unit in left:
            later = residual(covariance, weight, importance, columns_of(columns, left - {unit}))
            assert float(scores[unit]) == pytest.approx(later - now, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("b", [1, 2])
def test_residual_agrees_with_least_squares_on_samples(b):
    generator = np.random.default_rng(5)
    units, n = 5, 400
    x = generator.normal(size=(n, units * b)) @ generator.normal(size=(units * b, units * b))
    x -= x.mean(0)
    weight = generator.normal(size=(3, units * b))
    y = x @ weight.T
    columns = np.arange(units * b).reshape(units, b)
    order = backward_elimination([made(ResidualIncrease, x.T @ x / n, weight, np.ones(3), columns)], units, keep=2)
    kept = columns_of(columns, set(range(units)) - set(order.units))
    solution = np.linalg.lstsq(x[:, kept], y, rcond=None)[0]
    error = ((y - x[:, kept] @ solution) ** 2).sum() / n
    assert sum(order.losses) == pytest.approx(error, rel=1e-8)


@pytest.mark.parametrize("criterion", [InformationLoss, ResidualIncrease])
def test_of_two_identical_units_exactly_one_goes(criterion):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(500, 5))
    x[:, 4] = x[:, 0]  # twins
    weight = np.diag([3.0, 2.0, 1.5, 1.0, 3.0])
    covariance = ridged(torch.from_numpy(np.cov(x.T, bias=True)), 1e-3)
    third = torch.full((5,), 0.1 if criterion is InformationLoss else 1.0, dtype=torch.float64)
    order = backward_elimination([made(criterion, covariance, weight, third, np.arange(5)[:, None])], units=5)
    assert order.units[0] in (0, 4)
    assert len({0, 4} & set(order.units)) == 1, "the other twin carries the most and stays to the end"


@pytest.mark.parametrize("criterion", [InformationLoss, ResidualIncrease])
@pytest.mark.parametrize("b", [1, 3])
def test_a_dead_unit_goes_first_at_no_cost(criterion, b):
    covariance, weight, noise, _, _ = problem(4, b, outputs=3, seed=3)
    columns = np.arange(4 * b).reshape(4, b)
    covariance[columns[2]] = 0
    covariance[:, columns[2]] = 0
    safe = ridged(torch.from_numpy(covariance), 1e-3)
    order = backward_elimination([made(criterion, safe, weight, noise, columns)], units=4)
    assert order.units[0] == 2
    assert order.losses[0] < 0.1 * order.losses[1]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    units=st.integers(2, 7),
    b=st.integers(1, 3),
    rank=st.integers(1, 6),
    steps=st.integers(0, 3),
)
def test_scores_are_never_negative_even_for_singular_covariances(seed, units, b, rank, steps):
    generator = np.random.default_rng(seed)
    factor = generator.normal(size=(units * b, rank))
    covariance = ridged(torch.from_numpy(factor @ factor.T), 1e-3)
    weight = torch.from_numpy(generator.normal(size=(3, units * b)))
    columns = torch.arange(units * b).reshape(units, b)
    for criterion in (
        made(InformationLoss, covariance, weight, np.full(3, 1e-2), columns),
        made(ResidualIncrease, covariance, weight, np.ones(3), columns),
    ):
        left = list(range(units))
        for _ in range(min(steps, units - 1)):
            criterion.remove(left.pop(0))
        scores = criterion.scores()[left]
        assert bool(scores.isfinite().all())
        assert float(scores.min()) >= 0


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), units=st.integers(2, 6), b=st.integers(1, 3))
def test_permuting_the_units_permutes_the_scores(seed, units, b):
    covariance, weight, noise, _, columns = problem(units, b, outputs=3, seed=seed)
    order = np.random.default_rng(seed).permutation(units)
    for criterion in (InformationLoss, ResidualIncrease):
        plain, shuffled = (made(criterion, covariance, weight, noise, index) for index in (columns, columns[order]))
        torch.testing.assert_close(shuffled.scores(), plain.scores()[torch.from_numpy(order)])


def test_the_readers_of_a_group_are_summed():
    first, second = (problem(4, 1, outputs=3, seed=seed) for seed in (0, 1))
    plain = [made(InformationLoss, p[0], p[1], p[2], p[4]).scores() for p in (first, second)]
    order = backward_elimination(
        [made(InformationLoss, p[0], p[1], p[2], p[4]) for p in (first, second)], units=4, keep=3
    )
    total = plain[0] + plain[1]
    assert order.units == (int(total.argmin()),)
    assert order.losses[0] == pytest.approx(float(total.min()))


def test_the_noise_floor_follows_the_weights_and_not_each_variance():
    variance = torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64)
    torch.testing.assert_close(noise_floor(variance, 0.1), torch.full((3,), 0.4, dtype=torch.float64))
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    expected = 0.4 / (weights / 2.0)
    torch.testing.assert_close(noise_floor(variance, 0.1, weights), expected)
    torch.testing.assert_close(noise_floor(variance, 0.1, 1000 * weights), expected)
    assert bool(noise_floor(variance, 0.1, torch.tensor([0.0, 0.0, 1.0])).isfinite().all())


def test_an_output_nobody_cares_for_carries_no_weight():
    covariance = torch.eye(2, dtype=torch.float64)
    weight = torch.eye(2, dtype=torch.float64)
    noise = noise_floor(torch.ones(2, dtype=torch.float64), 0.1, torch.tensor([1.0, 0.0], dtype=torch.float64))
    scores = made(InformationLoss, covariance, weight, noise, np.arange(2)[:, None]).scores()
    assert float(scores[0]) > 1000 * float(scores[1])


def test_ridge_is_relative_to_the_mean_variance():
    covariance = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    expected = torch.diag(torch.tensor([1.02, 3.02], dtype=torch.float64))
    torch.testing.assert_close(ridged(covariance, 0.01), expected)
    assert float(torch.linalg.slogdet(ridged(torch.zeros(3, 3, dtype=torch.float64), 1e-3))[0]) == 1.0
