"""Paper mode: losses of predictors against explained variance, redundant and useless units, seeds, and what it would cost."""

import numpy as np
import pytest
import torch
from networks import images, mlp, plain, vectors

from secateurs.predictive import (
    Effort,
    Reading,
    _alone,
    observed_readings,
    predictive_elimination,
    seconds_per_training,
    trainings,
)

BRIEF = Effort(hidden=16, epochs=40, brief=10, batch=128)
WEIGHT = np.array([[1.0, 0.6, 0.0, 0.4], [0.3, -0.7, 0.0, 0.5], [0.2, 0.1, 0.0, 0.9]])
"""Nothing reads unit 2."""


def reading(weight=WEIGHT, n=1000, seed=0, twin=None, b=1):
    """Rows of a noisy linear reader; unit i has b columns."""
    generator = np.random.default_rng(seed)
    units = weight.shape[1] // b
    x = generator.normal(size=(n, weight.shape[1]))
    if twin is not None:
        x[:, twin[1]] = x[:, twin[0]]
    y = x @ weight.T + 0.3 * generator.normal(size=(n, len(weight)))
    columns = torch.arange(weight.shape[1]).reshape(units, b)
    return Reading(torch.from_numpy(x).float(), torch.from_numpy(y).float(), torch.arange(n), columns)


def test_a_predictor_of_one_unit_leaves_the_variance_that_it_cannot_explain():
    found = _alone(reading(n=4000), Effort(hidden=16, epochs=60, brief=40), torch.Generator().manual_seed(0))
    explained = WEIGHT**2 / ((WEIGHT**2).sum(1, keepdims=True) + 0.09)
    np.testing.assert_allclose(found, 1 - explained.mean(0), atol=0.06)
    assert int(found.argmax()) == 2


def test_what_nobody_reads_goes_and_what_is_needed_stays():
    order = predictive_elimination([reading()], confidence=0.95, effort=BRIEF)
    assert order.units[: order.removable] == (2,)
    assert len(set(order.units)) == 3
    assert all(loss > 0.01 for loss in order.losses[1:])
    assert list(order.losses[1:]) == sorted(order.losses[1:])


@pytest.mark.parametrize("seed", range(3))
def test_of_two_identical_units_exactly_one_goes(seed):
    weight = WEIGHT[:, [0, 1, 0, 3]]
    order = predictive_elimination([reading(weight, twin=(0, 2))], confidence=0.95, effort=BRIEF, seed=seed)
    assert order.removable == 1
    assert order.units[0] in (0, 2)


def test_units_of_several_columns_go_as_one():
    weight = np.concatenate((WEIGHT[:, :2], np.zeros((3, 2)), WEIGHT[:, [3, 0]]), 1)
    order = predictive_elimination([reading(weight, b=2)], confidence=0.95, effort=BRIEF)
    assert order.units[: order.removable] == (1,)


def test_a_unit_that_one_of_two_readers_needs_stays():
    other = np.array([[0.0, 0.0, 1.0, 0.0]])
    alone = predictive_elimination([reading()], confidence=0.95, effort=BRIEF)
    both = predictive_elimination([reading(), reading(other)], confidence=0.95, effort=BRIEF)
    assert 2 in alone.units[: alone.removable]
    assert both.removable == 0


def test_the_surer_a_drop_must_be_the_more_units_go():
    weight = 0.12 * np.random.default_rng(1).normal(size=(3, 10))
    counts = [
        predictive_elimination([reading(weight, n=600)], confidence=confidence, effort=BRIEF).removable
        for confidence in (0.5, 0.99)
    ]
    assert counts[0] < counts[1]


def test_seeds_repeat_and_leave_the_generator_alone():
    state = torch.get_rng_state()
    first, second, third = (
        predictive_elimination([reading(n=300)], confidence=0.9, repeats=2, effort=BRIEF, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == second
    assert first.losses != third.losses
    assert torch.equal(torch.get_rng_state(), state)


def test_some_units_stay_whatever_the_confidence():
    order = predictive_elimination([reading(0 * WEIGHT, n=300)], confidence=0.99, keep=3, repeats=3, effort=BRIEF)
    assert order.removable == 1
    assert len(order.units) == 3


def test_a_constant_output_and_a_dead_unit_do_no_harm():
    found = reading(n=300)
    found.y[:, 1] = 4.0
    found.x[:, 3] = 0.0
    order = predictive_elimination([found], confidence=0.9, repeats=3, effort=BRIEF)
    assert np.isfinite(order.losses).all()
    assert 3 in order.units[: order.removable]


@pytest.mark.parametrize(("model", "data"), [(mlp(), vectors(50)), (plain(), images(50))], ids=["rows", "positions"])
def test_rows_are_what_the_layer_maps_to_its_output_and_stay_bounded(model, data):
    rows = observed_readings(model, ["2"], data, limit=40)["2"]
    assert len(rows.x) <= 40
    assert len(rows.x) == len(rows.y) == len(rows.examples)
    layer = model.get_submodule("2")
    expected = rows.x @ layer.weight.detach().flatten(1).T + (0 if layer.bias is None else layer.bias.detach())
    torch.testing.assert_close(rows.y, expected, rtol=1e-4, atol=1e-5)


def test_the_cost_is_told_beforehand():
    assert trainings(10, 1, 5) == 10 + 5 + 50
    assert trainings(10, 3, 5) == 3 * trainings(10, 1, 5)
    small, large = seconds_per_training(8, 8), seconds_per_training(2000, 500)
    assert 0 < small < large
