"""The node baselines against what their papers say, computed by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import mlp, vectors
from torch import nn
from torch.nn import functional as F

from secateurs.errors import GroupError
from secateurs.forward import predict
from secateurs.passes.base import Context
from secateurs.passes.baselines import Magnitude, RandomNodes, Taylor
from secateurs.passes.survey import Survey, checked_groups
from secateurs.settings import NodeSettings


@pytest.fixture
def setting():
    model, data = mlp().eval(), vectors(40)
    data = replace(data, labels=np.random.default_rng(0).integers(0, 3, len(data)))
    groups, _ = checked_groups(model, data.take(range(2)), NodeSettings())
    return model, data, Survey(model, groups, data, 0)


def orders(step, model, data, survey, seed=0):
    context = Context(model=model, baseline=model, calibration=data, seed=seed)
    return {root: found[step.name].units for root, found in step.orders(survey, context).items()}


def by_hand(model, survey, importance):
    """Return the sum of the importance over the weights that produce or read each unit."""
    found = {}
    for group in survey.groups:
        total = np.zeros(group.units)
        for member in group.members:
            values = importance(model.get_submodule(member.module).weight).detach().double()
            per_unit = (values.sum(0) if member.kind == "in" else values.flatten(1).sum(1))[member.index[:, 0]].numpy()
            total += per_unit
        found[group.root] = total
    return found


@pytest.mark.parametrize("labelled", [True, False])
def test_taylor_is_the_first_order_change_of_the_loss(setting, labelled):
    model, data, survey = setting
    given = data if labelled else replace(data, labels=None)
    labels = torch.from_numpy(data.labels) if labelled else predict(model, data).argmax(1)
    found = orders(Taylor(target_units=0.5), model, given, survey)
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.enable_grad():
        F.cross_entropy(model(torch.from_numpy(data.inputs["input"])), labels).backward()
    expected = by_hand(model, survey, lambda weight: (weight * weight.grad).abs())
    for root, units in found.items():
        assert list(units) == np.argsort(expected[root], kind="stable")[:-1].tolist()


class TwoHeads(nn.Module):
    """The prediction is the first output; the second head has no part in it."""

    def __init__(self):
        super().__init__()
        self.hidden, self.feature = nn.Linear(12, 8), nn.Linear(8, 6)
        self.classes, self.box = nn.Linear(6, 3), nn.Linear(6, 4)

    def forward(self, value):
        value = self.feature(self.hidden(value).relu()).relu()
        return self.classes(value), self.box(value)


def test_weights_that_the_prediction_does_not_use_have_no_part_in_taylor():
    model, data = TwoHeads().eval(), vectors(40)
    groups, _ = checked_groups(model, data.take(range(2)), NodeSettings())
    survey = Survey(model, groups, data, 0)
    found = orders(Taylor(target_units=0.5), model, data, survey)
    with torch.enable_grad():
        prediction = model(torch.from_numpy(data.inputs["input"]))[0]
        F.cross_entropy(prediction, prediction.argmax(1)).backward()
    model.box.weight.grad = torch.zeros_like(model.box.weight)
    expected = by_hand(model, survey, lambda weight: (weight * weight.grad).abs())
    assert {root: list(units) for root, units in found.items()} == {
        root: np.argsort(values, kind="stable")[:-1].tolist() for root, values in expected.items()
    }


def test_a_prediction_without_gradient_is_refused_by_taylor():
    model = mlp()
    step = Taylor(target_units=0.5)
    model.register_forward_hook(lambda _, __, output: output.detach())
    with pytest.raises(GroupError, match="'taylor' needs the gradient of the prediction"):
        step.prepare(model, vectors(8))


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_is_the_norm_of_a_units_weights(setting, p):
    model, data, survey = setting
    expected = by_hand(model, survey, lambda weight: weight.abs() ** p)
    for root, units in orders(Magnitude(target_units=0.5, p=p), model, data, survey).items():
        assert list(units) == np.argsort(expected[root], kind="stable")[:-1].tolist()


def test_chance_follows_the_seed(setting):
    step = RandomNodes(target_units=0.5)
    first, again, other = (orders(step, *setting, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    for group in setting[2].groups:
        assert len(set(first[group.root])) == group.units - 1


def test_a_pass_that_is_aimed_again_measures_again_for_another_seed_or_other_data(setting):
    model, data, _ = setting
    kept = RandomNodes()

    def removed(aimed_from, **options):
        context = Context(model=model, baseline=model, calibration=options.pop("data", data), **options)
        return aimed_from.aimed("units", 0.5).propose(context).plan

    plans = [removed(kept, seed=seed) for seed in (0, 1, 2, 0)]
    assert plans == [removed(RandomNodes(), seed=seed) for seed in (0, 1, 2, 0)]
    assert plans[0] != plans[1] != plans[2]
    survey = kept._known.survey
    removed(kept, seed=0)
    assert kept._known.survey is survey, "the same question is answered from what is known"
    removed(kept, seed=0, data=vectors(30, seed=4))
    assert kept._known.survey is not survey
