"""GradNorm of fresh networks, against gradients computed by hand and all sets there are."""

from itertools import combinations

import numpy as np
import pytest
import torch
from networks import encoder, images, mlp, residual, sequences, vectors
from torch import nn

from secateurs.errors import ModelError
from secateurs.forward import predict
from secateurs.passes.base import Context
from secateurs.passes.cka_segment import CkaSegment
from secateurs.passes.compared import live_blocks
from secateurs.passes.gradnorm import GradNormChoice, fresh, gradient_norm, labelled
from secateurs.plan import DropBlock, Plan
from secateurs.surgery import apply_plan


def context_of(model, data, **options):
    return Context(model, model, data, **options)


def test_the_norm_by_hand():
    """One linear layer and softmax: the gradient is (p - y) x^T."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    data = vectors(6, 3)
    labels = np.array([0, 1, 0, 1, 1, 0])
    norms = []
    for part in (slice(0, 4), slice(4, 6)):
        x = data.inputs["input"][part].astype(np.float64)
        p = torch.softmax(torch.tensor(x) @ model[0].weight.detach().double().T, 1).numpy()
        norms.append(np.linalg.norm((p - np.eye(2)[labels[part]]).T @ x / len(x)))
    found = gradient_norm(model, type(data)(data.inputs, labels), batch_size=4)
    assert found == pytest.approx(np.mean(norms), rel=1e-5)


def test_a_fresh_network_keeps_nothing_and_is_the_same_for_a_seed():
    model = residual()
    first, again, other = fresh(model, 7), fresh(model, 7), fresh(model, 8)
    weights = [name for name, value in model.named_parameters() if value.ndim > 1]
    for name in weights:
        assert not torch.equal(first.get_parameter(name), model.get_parameter(name))
        assert torch.equal(first.get_parameter(name), again.get_parameter(name))
        assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
    assert torch.equal(first.bn.running_mean, torch.zeros(8))
    assert torch.equal(first.bn.weight, torch.ones(8))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


def test_a_module_that_cannot_be_initialised_is_named():
    with pytest.raises(
        ModelError, match=r"module '1' \(Scaled\) has parameters but no `reset_parameters`.*`score: bypass`"
    ):
        fresh(nn.Sequential(nn.Linear(3, 3), Scaled()), 0)


def test_labels_come_from_training_then_validation_then_the_network():
    model, plain, with_labels = mlp(), vectors(20), vectors(30, seed=1)
    with_labels = type(plain)(with_labels.inputs, np.arange(30) % 5)
    context = context_of(model, plain, validation=with_labels)
    assert labelled(context, 16).labels.tolist() == [index % 5 for index in range(16)]
    own = labelled(context_of(model, plain), 16)
    assert own.labels.tolist() == predict(model, plain.take(range(16))).argmax(1).tolist()


def expected_norm(model, segment, gone, data, seed=0):
    """Return the GradNorm of a fresh network with the weights of the blocks of a segment that stay."""
    network = fresh(model, seed)
    for path in segment:
        if path not in gone:
            network.get_submodule(path).load_state_dict(model.get_submodule(path).state_dict())
    apply_plan(network, Plan(edits=tuple(DropBlock(path=path) for path in gone)))
    return gradient_norm(network, data, batch_size=64, seed=seed)


def choice_of(context, segments, limit):
    blocks = {block.path: block for block in live_blocks(context)}
    named = [[blocks[path] for path in segment] for segment in segments]
    return GradNormChoice(context, named, batches=2, batch_size=64, limit=limit, details={})


def test_of_all_sets_the_one_of_the_largest_norm_stays_and_none_leaks_into_another():
    model, data = encoder(4), sequences(24)
    context = context_of(model, data)
    segment = [f"layers.{index}" for index in range(4)]
    choice = choice_of(context, [segment], limit=100)
    used = labelled(context, 128)
    for lost in (1, 2, 3):
        norms = {gone: expected_norm(model, segment, gone, used) for gone in combinations(segment, lost)}
        best = max(norms, key=norms.get)
        assert tuple(removal.block.path for removal in choice.first(lost)) == best
        assert choice.first(lost)[0].figures["gradnorm"] == pytest.approx(norms[best], rel=1e-6)


def test_beyond_the_limit_sets_grow_one_by_one():
    model, data = encoder(4), sequences(24)
    context = context_of(model, data)
    segment = [f"layers.{index}" for index in range(4)]
    used = labelled(context, 128)
    gone: tuple[str, ...] = ()
    for _ in range(2):
        left = [path for path in segment if path not in gone]
        gone = max(((*gone, path) for path in left), key=lambda paths: expected_norm(model, segment, paths, used))
    found = {removal.block.path for removal in choice_of(context, [segment], limit=1).first(2)}
    assert found == set(gone)


def test_the_budget_goes_where_the_smallest_share_is_lost():
    model, data = encoder(4), sequences(24)
    context = context_of(model, data)
    segments = [["layers.0", "layers.1"], ["layers.2", "layers.3"]]
    used = labelled(context, 128)
    shares = {}
    for segment in segments:
        whole = expected_norm(model, segment, (), used)
        for path in segment:
            shares[path] = expected_norm(model, segment, (path,), used) / whole
    best = [max(segment, key=shares.get) for segment in segments]
    choice = choice_of(context, segments, limit=10)
    assert [removal.block.path for removal in choice.first(1)] == [max(best, key=shares.get)]
    assert [removal.block.path for removal in choice.first(2)] == best
    assert len(choice.first(9)) == 2


@pytest.mark.parametrize(("model", "data"), [(residual(3), images(40)), (encoder(4), sequences(24))])
def test_paper_mode_of_the_pass(model, data):
    options = {"estimator": "biased", "representation": "sum", "score": "gradnorm", "segments": 2}
    proposal = CkaSegment(blocks=2, **options).propose(context_of(model, data))
    gone = [edit.path for edit in proposal.plan.of(DropBlock)]
    assert len(gone) == 2
    assert all(set(segment) - set(gone) for segment in proposal.details["segments"])
    assert all("GradNorm" in edit.reason for edit in proposal.plan.of(DropBlock))
    assert [removal["block"] for removal in proposal.details["removals"]] == gone
