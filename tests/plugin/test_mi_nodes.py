"""`mi-nodes` as a pass: a planted duplicate, widths from the confidence, the order of groups, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from networks import encoder, images, mlp, plain, residual, sequences, vectors
from torch import nn

from secateurs import cost
from secateurs.errors import RecipeError
from secateurs.groups import find_groups
from secateurs.interfaces import WidthMultiple
from secateurs.moments import Moments
from secateurs.passes.base import Context
from secateurs.passes.mi_nodes import MiNodes
from secateurs.passes.ordering import Dropped, Scoring, from_output_to_input
from secateurs.passes.survey import Survey
from secateurs.plan import RemoveUnits
from secateurs.sensitivity import output_sensitivity
from secateurs.settings import MiNodesSettings

COSTS = {"macs": cost.macs}
ESTIMATORS = pytest.mark.parametrize("estimator", ["gaussian", "copula", "mlp"])


def removed(pass_, model, data):
    """The units that a pass removes, by root."""
    context = Context(model, model, data, cost_models=COSTS.__getitem__)
    pass_.requires(context)
    return {edit.root: set(edit.units) for edit in pass_.propose(context).plan.of(RemoveUnits)}


def duplicated():
    """One hidden layer of 6 units that are all needed; unit 4 is unit 1 again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5)).eval()
    with torch.no_grad():
        model[0].weight.copy_(2 * torch.linalg.qr(torch.randn(6, 6)).Q)
        model[0].bias.fill_(0.3)
        model[0].weight[4], model[0].bias[4] = model[0].weight[1], model[0].bias[1]
        model[2].weight.copy_(torch.randn(5, 6).sign())
        model[2].weight[:, 4] = model[2].weight[:, 1]
    return model


@ESTIMATORS
def test_of_two_identical_units_exactly_one_goes(estimator):
    options = {"criteria": ["information"]} if estimator != "mlp" else {}
    data = vectors(600, 6)
    step = MiNodes(estimator=estimator, target_units=5 / 6, refit="none", **options)
    [gone] = removed(step, duplicated(), data).values()
    assert gone in ({1}, {4})


@ESTIMATORS
def test_the_confidence_finds_the_duplicate_where_no_target_is_given(estimator):
    step = MiNodes(estimator=estimator, confidence=0.9)
    assert not step.open
    [gone] = removed(step, duplicated(), vectors(600, 6)).values()
    assert len(gone & {1, 4}) == 1
    assert len(gone) <= 2


@pytest.mark.parametrize("criterion", ["information", "residual"])
@pytest.mark.parametrize("weighting", ["none", "diagonal", "full"])
@pytest.mark.parametrize("sequential", [False, True])
def test_every_variant_finds_the_duplicate(criterion, weighting, sequential):
    step = MiNodes(
        target_units=5 / 6, criteria=[criterion], loss_weighting=weighting, sequential=sequential, refit="none"
    )
    [gone] = removed(step, duplicated(), vectors(600, 6)).values()
    assert gone in ({1}, {4})


def test_a_pass_without_target_and_confidence_is_open():
    assert MiNodes().open
    assert MiNodes(estimator="mlp").open
    assert not MiNodes(confidence=0.9).open
    assert not MiNodes(target_units=0.5, confidence=0.9).settles
    aimed = MiNodes(confidence=0.9).aimed("macs", 0.5)
    assert aimed.settings.target_macs == 0.5
    with pytest.raises(RecipeError, match="exactly one of"):
        MiNodes().requires(Context(mlp(), mlp(), vectors(8)))


def test_a_target_overrules_the_confidence():
    counts = [
        sum(map(len, removed(MiNodes(target_units=0.5, **options), mlp(), vectors(64)).values()))
        for options in ({}, {"confidence": 0.99})
    ]
    assert counts == [8 + 5, 8 + 5]


@pytest.mark.parametrize("estimator", ["gaussian", "copula"])
def test_the_surer_the_more_goes_and_widths_keep_their_multiples(estimator):
    model, data = residual(), images(120)
    counts = []
    for confidence in (0.5, 0.999):
        gone = removed(MiNodes(estimator=estimator, confidence=confidence, min_units=3), model, data)
        counts.append(sum(map(len, gone.values())))
        sizes = {group.root: group.units for group in find_groups(model, data.take([0, 1]))[0]}
        assert all(sizes[root] - len(units) >= 3 for root, units in gone.items())
    assert counts[0] < counts[1]
    rounded = removed(MiNodes(estimator=estimator, confidence=0.999, round_to=4), model, data)
    assert all(len(units) % 4 == 0 for units in rounded.values())


@pytest.mark.parametrize("channels", [2, 4])
def test_widths_from_the_confidence_keep_the_multiple_that_the_target_likes(channels):
    model, data = residual(), images(120)
    likes = WidthMultiple(channels, "the device computes so many at once")
    context = Context(model, model, data, cost_models=COSTS.__getitem__, width_multiple=lambda: likes)
    found = MiNodes(confidence=0.999, round_to="auto").propose(context)
    sizes = {group.root: group.units for group in find_groups(model, data.take([0, 1]))[0]}
    kept = [sizes[edit.root] - len(edit.units) for edit in found.plan.of(RemoveUnits) if sizes[edit.root] > channels]
    assert kept
    assert math.gcd(*kept) % channels == 0
    assert found.details["rounding"] == f"multiples of {channels}: the device computes so many at once"


def test_groups_of_one_kind_get_one_width_from_the_confidence():
    model, data = encoder(), sequences(60)
    gone = removed(MiNodes(confidence=0.999, estimator="copula", uniform=True), model, data)
    assert len({len(units) for units in gone.values()}) == 1
    assert len(gone) == 2


def test_the_pass_reports_no_shortfall_without_a_target():
    model, data = mlp(), vectors(64)
    assert MiNodes(confidence=0.9).shortfall(Context(model, model, data)) is None


@pytest.mark.parametrize(
    ("given", "expected"), [(True, "diagonal"), (False, "none"), ("full", "full"), ("diagonal", "diagonal")]
)
def test_a_switch_is_read_as_a_weighting(given, expected):
    assert MiNodesSettings(loss_weighting=given).loss_weighting == expected


@pytest.mark.parametrize("options", [{"confidence": 0.4}, {"confidence": 1}, {"repeats": 1}, {"estimator": "knn"}])
def test_settings_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MiNodesSettings(**options)


def test_paper_mode_is_refused_with_its_time_where_it_is_hopeless():
    step = MiNodes(estimator="mlp", target_units=0.5, max_trainings=20)
    with pytest.raises(RecipeError, match=r"166 predictors, about [\d.]+ hours.*allows 20.*`estimator: gaussian`"):
        removed(step, mlp(), vectors(32))


def surveyed(build, data):
    model = build()
    groups, _ = find_groups(model, data.take([0, 1]))
    return model, Survey(model, groups, data, 0)


def test_groups_come_from_the_output_to_the_input():
    _, survey = surveyed(residual, images(16))
    places = {name: number for number, name in enumerate(survey.moments)}
    last = [max(places[m.module] for m in group.of("in")) for group in from_output_to_input(survey)]
    assert last == sorted(last, reverse=True)
    assert len(last) == len(survey.groups)


def test_outputs_that_are_gone_carry_no_weight():
    """Removing units of the second hidden layer changes what the first is worth: as if the reader had never had those outputs."""
    model, survey = surveyed(mlp, vectors(100))
    second, first = from_output_to_input(survey)
    options = MiNodesSettings(criteria=("information", "residual"), loss_weighting="none")
    dropped = Dropped()
    dropped.add(second, [0, 3, 4])
    assert dropped.left("2", 10).tolist() == [1, 2, 5, 6, 7, 8, 9]
    found = Scoring(survey, options).orders(first, dropped=dropped)
    narrow = nn.Linear(16, 7)
    with torch.no_grad():
        narrow.weight.copy_(model[2].weight[dropped.left("2", 10)])
    model[2] = narrow
    expected = Scoring(survey, options).orders(first)
    for name in found:
        assert found[name].units == expected[name].units
        assert found[name].losses == pytest.approx(expected[name].losses)
    assert expected["residual"].losses != pytest.approx(
        Scoring(surveyed(mlp, vectors(100))[1], options).orders(first)["residual"].losses
    )


@pytest.mark.parametrize("criterion", ["information", "residual"])
def test_a_plan_does_not_depend_on_what_was_aimed_at_before(criterion):
    model, data = mlp(), vectors(64)
    context = Context(model, model, data, cost_models=COSTS.__getitem__)

    def aim(step, *targets):
        twins = [step.aimed("macs", target) for target in targets]
        return [twin.propose(context).plan for twin in twins]

    options = {"sequential": True, "criteria": [criterion], "loss_weighting": "none", "refit": "none", "held_out": 16}
    *_, after = aim(MiNodes(**options), 0.9, 0.3)
    [directly] = aim(MiNodes(**options), 0.3)
    assert after == directly


def test_the_full_weighting_uses_pairs_of_outputs():
    model, survey = surveyed(mlp, vectors(100))
    group = survey.groups[0]
    options = MiNodesSettings(criteria=("information", "residual"))
    singles, pairs = (
        output_sensitivity(model, list(survey.moments), vectors(100), pairs=flag) for flag in (False, True)
    )
    diagonal = {name: values.diag() for name, values in singles.items()}
    plainly, as_matrix, whole = (
        Scoring(survey, options, sensitivity=values).orders(group) for values in (singles, diagonal, pairs)
    )
    for name in plainly:
        assert as_matrix[name].losses == pytest.approx(plainly[name].losses, rel=1e-3)
        assert whole[name].losses != pytest.approx(plainly[name].losses, rel=1e-3)


def test_orders_reach_the_narrowest_width_of_the_grid_and_end_there():
    model, data = mlp(), vectors(64)
    context = Context(model, model, data, cost_models=COSTS.__getitem__)
    for options, fewest in (
        ({"target_macs": 0.5}, 1),
        ({"target_macs": 0.5, "grid": 2}, 4),
        ({"target_units": 0.5}, 1),
    ):
        step = MiNodes(criteria=["information"], **options)
        step._find_out(context)
        [first] = [order["information"] for root, order in step._known.orders.items() if root == "0"]
        assert len(first.units) == 16 - fewest
        assert step.propose(context).plan


def test_statistics_by_fold_are_those_of_the_whole():
    model, data = plain(), images(40)
    groups, _ = find_groups(model, data.take([0, 1]))
    whole, apart = Survey(model, groups, data, 0), Survey(model, groups, data, 0, folds=4)
    assert not whole.folds
    for name, moments in apart.moments.items():
        assert isinstance(moments, Moments)
        torch.testing.assert_close(moments.covariance, whole.moments[name].covariance, rtol=1e-4, atol=1e-6)
        left = moments - apart.folds[name][1]
        torch.testing.assert_close((left + apart.folds[name][1]).second, moments.second)
        assert left.count < moments.count


def test_a_reader_that_has_no_outputs_left_is_left_out():
    _, survey = surveyed(mlp, vectors(50))
    second, first = from_output_to_input(survey)
    dropped = Dropped()
    dropped.add(second, list(range(10)))
    order = Scoring(survey, MiNodesSettings(criteria=("information",))).orders(first, dropped=dropped)["information"]
    assert len(order.units) == 15
    assert np.isfinite(order.losses).all()
    assert Scoring(survey, MiNodesSettings(confidence=0.9)).confident(first, dropped).removable == 0
