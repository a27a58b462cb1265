"""Removal scores against log-determinants of the joint covariance, against least squares and against all subsets."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs import information
from secateurs.errors import DataError
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


def square(values):
    """A diagonal matrix for a vector."""
    return np.diag(values) if values.ndim == 1 else values


def coupled(size, seed):
    """A random positive definite matrix."""
    factor = np.random.default_rng(seed).normal(size=(size, size + 1))
    return factor @ factor.T / size


def mutual_information(covariance, weight, noise, kept):
    """I(X_kept; Y) of the joint Gaussian of X and Y = WX + noise, from three determinants."""
    joint = np.block(
        [[covariance, covariance @ weight.T], [weight @ covariance, weight @ covariance @ weight.T + square(noise)]]
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
    return float(np.trace(square(importance) @ weight[:, gone] @ left @ weight[:, gone].T))


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


@sizes
def test_noise_and_weights_of_pairs_of_outputs(units, b):
    covariance, weight, _, _, columns = problem(units, b, outputs=4, seed=3)
    pairs = coupled(4, seed=units)
    lost = made(InformationLoss, covariance, weight, pairs, columns)
    increase = made(ResidualIncrease, covariance, weight, pairs, columns)
    left = set(range(units))
    for removed in [None, 1, 3]:
        if removed is not None:
            lost.remove(removed)
            increase.remove(removed)
            left.discard(removed)
        now = columns_of(columns, left)
        for unit in left:
            less = columns_of(columns, left - {unit})
            nats = mutual_information(covariance, weight, pairs, now) - mutual_information(
                covariance, weight, pairs, less
            )
            error = residual(covariance, weight, pairs, less) - residual(covariance, weight, pairs, now)
            assert float(lost.scores()[unit]) == pytest.approx(nats, abs=1e-9)
            assert float(increase.scores()[unit]) == pytest.approx(error, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("criterion", [InformationLoss, ResidualIncrease])
def test_a_diagonal_matrix_of_pairs_is_the_vector(criterion):
    covariance, weight, noise, _, columns = problem(5, 2, outputs=14, seed=8)
    vector, matrix = (made(criterion, covariance, weight, third, columns) for third in (noise, np.diag(noise)))
    for removed in (1, 4):
        torch.testing.assert_close(vector.scores(), matrix.scores(), rtol=1e-8, atol=1e-10)
        vector.remove(removed)
        matrix.remove(removed)


def test_an_unwanted_direction_of_the_outputs_carries_no_weight():
    """Two outputs of which only the sum matters: the unit that moves them apart is worth nothing."""
    pairs = np.array([[1.0, 1.0], [1.0, 1.0]])
    weight = np.array([[1.0, 1.0], [1.0, -1.0]])  # unit 0 moves the sum, unit 1 the difference
    columns = np.arange(2)[:, None]
    scores = made(ResidualIncrease, np.eye(2), weight, pairs, columns).scores()
    torch.testing.assert_close(scores, torch.tensor([4.0, 0.0], dtype=torch.float64), atol=1e-6, rtol=1e-6)
    floor = noise_floor(torch.ones(2, dtype=torch.float64), 0.1, torch.from_numpy(pairs))
    nats = made(InformationLoss, np.eye(2), weight, floor.numpy(), columns).scores()
    assert float(nats[0]) > 1000 * float(nats[1])


def test_a_floor_for_pairs_agrees_with_the_floor_for_single_outputs():
    variance, weights = torch.tensor([1.0, 3.0, 8.0]).double(), torch.tensor([1.0, 2.0, 6.0]).double()
    floor = noise_floor(variance, 0.1, weights.diag())
    torch.testing.assert_close(floor, noise_floor(variance, 0.1, weights).diag(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("units", "b"), [(40, 1), (16, 3)], ids=["neurons", "heads"])
@pytest.mark.parametrize("criterion", [InformationLoss, ResidualIncrease])
def test_waiting_down_dates_give_the_order_of_immediate_ones(criterion, units, b, monkeypatch):
    covariance, weight, noise, _, columns = problem(units, b, outputs=7, seed=2)
    orders = []
    for pending, panel in ((1, 512), (7, 5), (10**6, 512)):
        monkeypatch.setattr(information, "PENDING", pending)
        monkeypatch.setattr(information, "PANEL", panel)
        orders.append(backward_elimination([made(criterion, covariance, weight, noise, columns)], units))
    for order in orders[1:]:
        assert order.units == orders[0].units
        assert order.losses == pytest.approx(orders[0].losses, rel=1e-8, abs=1e-11)
    gone = list(itertools.accumulate([u] for u in orders[0].units))
    for before, after, loss in zip([[], *gone], gone, orders[1].losses, strict=False):
        kept = [columns_of(columns, set(range(units)) - set(some)) for some in (before, after)]
        if criterion is InformationLoss:
            first, second = (mutual_information(covariance, weight, noise, some) for some in kept)
            assert loss == pytest.approx(first - second, abs=1e-8)
        else:
            first, second = (residual(covariance, weight, noise, some) for some in kept)
            assert loss == pytest.approx(second - first, rel=1e-6, abs=1e-8)


def test_an_order_that_stops_early_is_the_beginning_of_the_whole_one():
    covariance, weight, noise, _, columns = problem(12, 2, outputs=5, seed=4)
    whole, part = (
        backward_elimination([made(InformationLoss, covariance, weight, noise, columns)], 12, keep) for keep in (1, 7)
    )
    assert len(part.units) == 5
    assert whole.units[:5] == part.units
    assert whole.losses[:5] == part.losses


def test_the_criteria_leave_the_precision_as_it_is():
    covariance, weight, noise, _, columns = problem(6, 2, outputs=3, seed=4)
    shared = precision(torch.from_numpy(covariance))
    before = shared.clone()
    for criterion in (InformationLoss, ResidualIncrease):
        backward_elimination([criterion(shared, *tensors(weight, noise, columns))], 6)
        assert torch.equal(shared, before)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), units=st.integers(2, 7), b=st.integers(1, 2))
def test_the_first_removal_is_the_best_of_all(seed, units, b):
    covariance, weight, noise, importance, columns = problem(units, b, outputs=3, seed=seed)
    subsets = [set(range(units)) - {unit} for unit in range(units)]
    nats = [mutual_information(covariance, weight, noise, columns_of(columns, left)) for left in subsets]
    errors = [residual(covariance, weight, importance, columns_of(columns, left)) for left in subsets]
    first = backward_elimination([made(InformationLoss, covariance, weight, noise, columns)], units, units - 1)
    second = backward_elimination([made(ResidualIncrease, covariance, weight, importance, columns)], units, units - 1)
    assert nats[first.units[0]] == pytest.approx(max(nats), abs=1e-9)
    assert errors[second.units[0]] == pytest.approx(min(errors), abs=1e-9)


@pytest.mark.parametrize("criterion", [InformationLoss, ResidualIncrease])
def test_greedy_removal_finds_the_best_subset_of_every_size_where_units_are_independent(criterion):
    """Independent units that are read by outputs of their own: what they carry adds up, so greedy is optimal."""
    generator = np.random.default_rng(1)
    units, b = 6, 2
    factors = [generator.normal(size=(b, b + 1)) for _ in range(units)]
    covariance = np.zeros((units * b, units * b))
    weight = np.zeros((units, units * b))
    for unit, factor in enumerate(factors):
        block = slice(unit * b, unit * b + b)
        covariance[block, block] = factor @ factor.T
        weight[unit, block] = generator.normal(size=b)
    third, columns = generator.uniform(0.5, 2, units), np.arange(units * b).reshape(units, b)
    order = backward_elimination([made(criterion, covariance, weight, third, columns)], units)
    for count in range(1, units):
        kept = set(range(units)) - set(order.units[: units - count])

        def worth(some):
            index = columns_of(columns, some)
            if criterion is InformationLoss:
                return mutual_information(covariance, weight, third, index)
            return -residual(covariance, weight, third, index)

        assert kept == max(map(set, itertools.combinations(range(units), count)), key=worth)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), units=st.integers(2, 5), b=st.integers(1, 3))
def test_an_invertible_map_within_a_units_block_changes_nothing(seed, units, b):
    covariance, weight, noise, importance, columns = problem(units, b, outputs=3, seed=seed)
    generator = np.random.default_rng(seed + 1)
    change = np.zeros_like(covariance)
    for index in columns:
        change[np.ix_(index, index)] = np.linalg.qr(generator.normal(size=(b, b)))[0] @ np.diag(
            generator.uniform(0.3, 3, b)
        )
    other = change @ covariance @ change.T, weight @ np.linalg.inv(change)
    for criterion, third in ((InformationLoss, noise), (ResidualIncrease, importance)):
        first, second = made(criterion, covariance, weight, third, columns), made(criterion, *other, third, columns)
        for removed in (None, 0):
            if removed is not None:
                first.remove(removed)
                second.remove(removed)
            torch.testing.assert_close(first.scores()[1:], second.scores()[1:], rtol=1e-6, atol=1e-8)


def test_a_vanishing_ridge_gives_the_exact_loss_and_a_large_one_the_norms_of_the_columns():
    covariance, weight, _noise, _, columns = problem(6, 1, outputs=4, seed=9)
    exact = made(ResidualIncrease, covariance, weight, np.ones(4), columns).scores()
    for ridge, tolerance in ((1e-4, 1e-2), (1e-8, 1e-6)):
        found = made(
            ResidualIncrease, ridged(torch.from_numpy(covariance), ridge), weight, np.ones(4), columns
        ).scores()
        torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)
    ridge = 1e8
    found = made(ResidualIncrease, ridged(torch.from_numpy(covariance), ridge), weight, np.ones(4), columns).scores()
    norms = (weight**2).sum(0)[columns[:, 0]]
    scaled = found / (ridge * np.diag(covariance).mean())
    torch.testing.assert_close(scaled, torch.from_numpy(norms), rtol=1e-6, atol=0)


@pytest.mark.parametrize("criterion", [InformationLoss, ResidualIncrease])
def test_a_matrix_that_is_no_covariance_is_refused(criterion):
    broken = torch.diag(torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64))
    made_of_it = criterion(broken, *tensors(np.eye(3), np.ones(3), np.arange(3)[:, None]))
    with pytest.raises(DataError, match="larger `ridge`"):
        made_of_it.remove(1)
