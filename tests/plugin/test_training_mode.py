"""Training mode: what only it runs is not seen by what prunes, and must not break a training without a word."""

import random

import pytest
import torch
from networks import images, residual
from torch import nn
from torch.nn import functional as F

import secateurs
from secateurs.data import Roles
from secateurs.errors import ModelError, SecateursError
from secateurs.groups import find_groups, plan_removal
from secateurs.manager import create_manager
from secateurs.passes.base import Pass, Proposal
from secateurs.pipeline import Session, run_passes
from secateurs.plan import Plan
from secateurs.script import pruning_report
from secateurs.settings import RecoverySettings
from secateurs.surgery import applied
from secateurs.training_mode import Fault, check_trained_network, check_training_mode, training_fault, training_notes

DATA = images(32, labels=True)


class Auxiliary(nn.Module):
    """Two heads that training mode alone runs, each on its own layer, and a third layer that neither reads."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 16, 3)
        self.norm, self.drop = nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.aux = nn.ModuleList([nn.Linear(8, 5), nn.Linear(12, 5)])
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        a = F.relu(self.norm(self.first(x)))
        b = F.relu(self.second(a))
        y = self.head(self.drop(F.relu(self.third(b))).mean((2, 3)))
        if not self.training:
            return y
        random.random()
        return y + self.aux[0](a.mean((2, 3))) + self.aux[1](b.mean((2, 3)))


def halves(model, *roots):
    """A plan that removes half of each of the named groups, as it would be found in evaluation mode."""
    plan = Plan()
    for group in find_groups(model, DATA.take([0, 1]))[0]:
        if group.root in roots:
            plan += plan_removal(model, group, range(0, group.units, 2), "half", plan)
    assert len({edit.root for edit in plan.edits if edit.edit == "remove_units"}) == len(roots)
    return plan


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Auxiliary().eval()


def states():
    return torch.random.get_rng_state().tolist(), random.getstate()


def test_a_network_that_runs_has_no_fault_and_is_left_as_it_is(model):
    before, generators = {name: value.clone() for name, value in model.state_dict().items()}, states()
    assert training_fault(model, DATA) is None
    assert training_fault(model, DATA.take([0])) is None
    assert states() == generators
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_fault_names_the_layer(model):
    fault = training_fault(applied(model, halves(model, "second")), DATA)
    assert fault is not None
    assert fault.layer == "aux.1"
    assert "cannot be multiplied" in str(fault)
    assert str(Fault("", "no labels.", 0)) == "its `forward` raises: no labels"


@pytest.mark.parametrize(
    ("roots", "stay"),
    [
        (["first"], "['first']"),
        (["second", "third"], "['second']"),
        (["first", "second", "third"], "['first', 'second']"),
    ],
)
def test_exactly_the_layers_that_have_to_stay_are_named(model, roots, stay):
    plan = halves(model, *roots)
    with pytest.raises(SecateursError) as caught:
        check_trained_network(applied(model, plan), model, plan, DATA)
    assert f"`ignored_layers: {stay}`" in str(caught.value)
    notes = training_notes(applied(model, plan), model, plan, DATA)
    assert len(notes) == 1
    assert f"in evaluation mode alone: in training mode, layer 'aux.{int('first' not in roots)}'" in notes[0]
    assert f"`ignored_layers: {stay}`" in notes[0]


def test_what_only_the_third_layer_loses_is_fine(model):
    plan = halves(model, "third")
    check_trained_network(applied(model, plan), model, plan, DATA)
    assert training_notes(applied(model, plan), model, plan, DATA) == []


class Halve(Pass):
    """Proposes a plan that was made elsewhere, once."""

    name = "halve"

    def __init__(self, plan, epochs=0):
        super().__init__()
        self.rounds = [Proposal(plan, recovery_epochs=epochs)]

    def propose(self, context):
        return self.rounds.pop() if self.rounds else Proposal(Plan())


@pytest.mark.parametrize(("at_the_end", "in_the_pass"), [(1, 0), (0, 1)], ids=["recovery", "recovery_epochs"])
def test_a_training_that_cannot_be_is_refused_in_words(model, at_the_end, in_the_pass):
    session = Session(
        baseline=model, roles=Roles(DATA, training=DATA), cost_models=None, recovery=RecoverySettings(epochs=at_the_end)
    )
    with pytest.raises(SecateursError, match=r"not run in training mode.*layer 'aux\.1'.*ignored_layers: \['second'\]"):
        run_passes(session, [Halve(halves(model, "second"), in_the_pass)], create_manager(external=False))


def test_the_report_says_that_training_mode_is_lost(model):
    session = Session(baseline=model, roles=Roles(DATA), cost_models=None)
    outcome = run_passes(session, [Halve(halves(model, "second"))], create_manager(external=False))
    (note,) = pruning_report(session, outcome, outcome.model, 0.0).notes
    assert "layer 'aux.1' raises" in note


class Labelled(nn.Module):
    """Wants its labels in training mode, as networks for detection do."""

    def __init__(self):
        super().__init__()
        self.inner = residual()

    def forward(self, x, labels=None):
        if self.training and labels is None:
            raise RuntimeError("no labels")
        return self.inner(x)


def test_a_network_that_cannot_be_trained_is_refused_before_anything_is_computed():
    pixels, seen = torch.from_numpy(DATA.inputs["input"]), []
    with pytest.raises(ModelError, match=r"not run in training mode.*its `forward` raises: no labels\. Let `forward`"):
        secateurs.prune(
            Labelled().eval(),
            pixels[:2],
            [pixels],
            [{"magnitude": {"target_units": 0.5}}],
            training=[(pixels, torch.from_numpy(DATA.labels))],
            recovery={"epochs": 1},
            progress=seen.append,
        )
    assert seen == []
    model = Labelled().eval()
    plan = halves(model, "inner.layers.1.conv1")
    assert training_notes(applied(model, plan), model, plan, DATA) == []
    with pytest.raises(ModelError, match="no labels"):
        check_training_mode(model, DATA)
