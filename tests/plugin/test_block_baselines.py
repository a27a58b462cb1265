"""The depth baselines: block influence against a naive one, and greedy removal by loss against every alternative."""

import numpy as np
import pytest
import torch
from networks import encoder, images, residual, separable, sequences
from torch import nn

from secateurs.blocks import Block
from secateurs.data import Dataset
from secateurs.forward import predict
from secateurs.outputs import kl_divergence
from secateurs.passes.base import Context
from secateurs.passes.block_baselines import BlockInfluence, LossGreedy, block_influence
from secateurs.passes.compared import live_blocks
from secateurs.plan import DropBlock, Plan
from secateurs.surgery import applied


def context_of(model, data, **options):
    return Context(model, model, data, **options)


def paths_of(proposal):
    return [edit.path for edit in proposal.plan.of(DropBlock)]


def naive_influence(model, path, data, axis):
    """Return 1 - mean cosine of a block's input and output, vector by vector."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    predict(model, data)
    handle.remove()
    cosines = []
    for before, after in seen:
        a, b = (value.movedim(axis, -1).flatten(0, -2).double().numpy() for value in (before, after))
        for x, y in zip(a, b, strict=True):
            norms = np.linalg.norm(x) * np.linalg.norm(y)
            cosines.append(x @ y / norms if norms else float(not x.any() and not y.any()))
    return 1 - np.mean(cosines)


@pytest.mark.parametrize(
    ("model", "data", "axis"),
    [(encoder(3), sequences(10), -1), (residual(3), images(70), 1), (separable(), images(10), 1)],
    ids=["tokens", "positions", "depthwise"],
)
def test_influence_is_that_of_the_definition(model, data, axis):
    blocks = [block for block in live_blocks(context_of(model, data)) if block.removable]
    found = block_influence(model, blocks, data)
    for block in blocks:
        assert found[block.path] == pytest.approx(naive_influence(model, block.path, data, axis), abs=1e-5)


def test_padding_has_no_influence():
    class Shift(nn.Module):
        def forward(self, x, attention_mask=None):
            return self.block(x)

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.block = nn.Linear(4, 4)

    x = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
    mask = (np.arange(5) < np.array([5, 1, 3, 2, 4, 1])[:, None]).astype(np.int64)
    model, data = Shift(), Dataset({"x": x, "attention_mask": mask}, keyword=True)
    with torch.no_grad():
        cosine = torch.cosine_similarity(torch.from_numpy(x), model.block(torch.from_numpy(x)), dim=-1).numpy()
    expected = 1 - cosine[mask.astype(bool)].mean()
    assert abs(expected - (1 - cosine.mean())) > 1e-3
    assert block_influence(model, [Block("block", True)], data)["block"] == pytest.approx(expected, abs=1e-6)


def test_an_identity_has_no_influence_and_a_reversal_has_two():
    class Turned(nn.Module):
        def forward(self, x):
            return -x

    model = nn.Sequential(nn.Identity(), Turned())
    found = block_influence(model, [Block("0", True), Block("1", True)], sequences(5))
    assert found == pytest.approx({"0": 0.0, "1": 2.0}, abs=1e-6)


def test_vectors_of_zeros_are_unchanged():
    model = nn.Sequential(nn.Identity())
    data = Dataset({"input": np.array([[0.0, 0.0], [1.0, 2.0]], dtype=np.float32)})
    assert block_influence(model, [Block("0", True)], data) == pytest.approx({"0": 0.0}, abs=1e-6)


def test_a_convolution_with_its_normalisation_is_compared_as_one():
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)).eval()
    data = images(6)
    before = torch.as_tensor(data.inputs["input"])
    after = predict(model, data)
    expected = 1 - float(torch.cosine_similarity(before, after, dim=1).mean())
    assert block_influence(model, [Block("1", True, also=("0",))], data)["1"] == pytest.approx(expected, abs=1e-5)


def test_the_lowest_influence_goes_first_and_is_scored_once():
    model, data = residual(4), images(40)
    context = context_of(model, data)
    proposal = BlockInfluence(blocks=4).propose(context)
    removable = [block for block in live_blocks(context) if block.removable]
    influence = block_influence(model, removable, data)
    assert paths_of(proposal) == sorted(influence, key=influence.get)[:4]
    assert proposal.plan.edits[0].reason == f"block influence {min(influence.values()):.4g}"


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "no labels"])
def test_greedy_removal_takes_the_lowest_loss_at_each_step(labels):
    model, data = residual(3), images(48, labels=labels)
    proposal = LossGreedy(blocks=3, samples=40).propose(context_of(model, data))
    used = data.take(range(40))
    reference = predict(model, used)

    def loss(paths):
        prediction = predict(applied(model, Plan(edits=tuple(DropBlock(path=path) for path in paths))), used)
        if labels:
            return float(nn.functional.cross_entropy(prediction.double(), torch.as_tensor(used.labels)))
        return kl_divergence(reference, prediction)

    gone: list[str] = []
    for step in proposal.details["removals"]:
        left = [f"layers.{index}" for index in (0, 1, 2, 4, 5) if f"layers.{index}" not in gone]
        losses = {path: loss([*gone, path]) for path in left}
        assert step["scores"] == pytest.approx(losses, rel=1e-6)
        gone.append(min(losses, key=losses.get))
        assert step["block"] == gone[-1]
    assert proposal.details["loss"] == ("cross-entropy" if labels else "divergence")
