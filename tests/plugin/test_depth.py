"""What layer-pruning passes share: budgets, sharing between them, and the layers to refit."""

import copy

import numpy as np
import pytest
import torch
from networks import encoder, images, plain, residual, sequences
from torch import nn

from secateurs import cost, prune
from secateurs.blocks import Block
from secateurs.data import Dataset
from secateurs.errors import RecipeError
from secateurs.forward import tensors
from secateurs.modules import Bypass
from secateurs.passes.base import Context
from secateurs.passes.block_baselines import BlockInfluence, RandomBlocks
from secateurs.passes.cka_cluster import CkaCluster
from secateurs.passes.cka_segment import CkaSegment
from secateurs.passes.compared import block_similarity, cka_matrix, live_blocks
from secateurs.passes.depth import DepthPass, Ranking, Removal, layers_after
from secateurs.plan import DropBlock, Plan
from secateurs.similarity import linear_cka


class Front(DepthPass):
    """Removes blocks from the front, and counts what it is asked for."""

    name = "front"
    asked = 0

    def choice(self, context, blocks):
        def order():
            for block in blocks:
                if block.removable:
                    type(self).asked += 1
                    yield Removal(block, "the first", {"number": type(self).asked})

        return Ranking(order(), {"kind": "front"})


def run(step, model, data):
    inputs = tensors(data)["input"]
    return prune(model, inputs[:2], [inputs], [step])


def dropped(result):
    return [edit.path for edit in result.plan.of(DropBlock)]


def test_a_count_of_blocks():
    result = run(Front(blocks=3), residual(3), images(24))
    assert dropped(result) == ["layers.0", "layers.1", "layers.2"]
    assert result.report.verdict == "pass"
    record = result.report.passes[0]
    assert record.details["kind"] == "front"
    assert [item["block"] for item in record.details["removals"]] == dropped(result)
    assert record.certificate.holds
    assert [(item.where, bool(item.reason)) for item in record.skipped] == [("layers.3", True)]


@pytest.mark.parametrize(("kind", "count"), [("macs", cost.macs), ("parameters", cost.parameters)])
def test_a_target_is_met_with_as_few_blocks_as_it_takes(kind, count):
    model, data = residual(4), images(24)
    whole = cost.total(count(model, data))
    for target in (0.95, 0.7, 0.5):
        result = run(Front(**{f"target_{kind}": target}), model, data)
        assert cost.total(count(result.model, data)) <= target * whole
        fewer = Plan(edits=tuple(edit for edit in result.plan.edits[:-1]))
        last = result.model.get_submodule(dropped(result)[-1])
        assert isinstance(last, Bypass)
        one_less = run(Front(blocks=len(fewer)), model, data).model if fewer else model
        assert cost.total(count(one_less, data)) > target * whole


def test_a_target_that_is_met_already_removes_nothing():
    result = run(Front(target_macs=1.0), residual(2), images(24))
    assert not result.plan


def test_a_count_that_cannot_be_reached_is_a_shortfall():
    model, data = residual(2), images(24)
    step = Front(blocks=9)
    result = run(step, model, data)
    assert dropped(result) == ["layers.0", "layers.1", "layers.3"]
    assert "`blocks` 9 was not reached: 3 went" in step.shortfall(Context(result.model, model, data))
    assert result.report.verdict == "fail"


def test_a_target_that_cannot_be_reached_is_a_shortfall():
    model, data = residual(2), images(24)
    step = Front(target_macs=0.01)
    result = run(step, model, data)
    assert len(dropped(result)) == 3
    models = {"macs": cost.macs}
    message = step.shortfall(Context(result.model, model, data, cost_models=models.__getitem__))
    left = cost.total(cost.macs(result.model, data)) / cost.total(cost.macs(model, data))
    assert f"`target_macs` 0.01 was not reached: {left:.4f} is left" in message


def test_passes_that_differ_in_their_budget_share_what_they_found():
    model, data = residual(4), images(24)
    Front.asked = 0
    step = Front()
    assert step.open
    context = Context(model, model, data)
    proposals = {count: step.aimed(count).propose(context) for count in (2, 5, 3)}
    assert Front.asked == 5
    for count, proposal in proposals.items():
        assert [edit.path for edit in proposal.plan.of(DropBlock)] == [
            edit.path for edit in Front(blocks=count).propose(context).plan.of(DropBlock)
        ]
    assert type(step.aimed(4)) is Front
    assert step.aimed(4).settings == Front(blocks=4).settings
    assert Front(target_macs=0.5).aimed(4).settings.target_macs is None


def test_copies_share_what_was_found():
    model, data = residual(3), images(24)
    Front.asked = 0
    step = Front(blocks=2)
    context = Context(model, model, data)
    first = step.propose(context)
    assert copy.deepcopy(step).propose(context).plan == first.plan
    assert Front.asked == 2
    assert not step.propose(context).plan


def test_another_network_is_looked_at_anew():
    first, second, data = encoder(4), encoder(3), sequences(8)
    step = Front()
    step.aimed(1).propose(Context(first, first, data))
    proposal = step.aimed(9).propose(Context(second, second, data))
    assert [edit.path for edit in proposal.plan.of(DropBlock)] == ["layers.0", "layers.1", "layers.2"]


def test_one_budget_is_wanted():
    with pytest.raises(RecipeError, match="got `blocks` and `target_macs`"):
        Front(blocks=2, target_macs=0.5)
    with pytest.raises(RecipeError, match="no target; give it one of `blocks`, `target_macs`, `target_parameters`"):
        run(Front(), residual(), images(8))


class Gated(nn.Module):
    """A residual block whose first argument is no part of the stream."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(192, 8), nn.Linear(8, 192)

    def forward(self, mask, value):
        return value + mask * self.down(self.up(value).relu())


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList(Gated() for _ in range(3)), nn.Linear(192, 3)

    def forward(self, value):
        value = value.flatten(1)
        for layer in self.layers:
            value = layer(torch.ones_like(value), value)
        return self.head(value)


@pytest.mark.parametrize(
    ("model", "looked"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), "keeps the shape. Describe"),
        (Masked(), "'layers.*' are not like that"),
    ],
    ids=["none", "masked"],
)
@pytest.mark.parametrize(
    "step", [Front(blocks=1), CkaCluster(max_blocks=1), CkaSegment(blocks=1)], ids=lambda step: step.name
)
def test_a_network_without_blocks_is_left_alone_and_the_reason_says_what_a_block_is(step, model, looked):
    inputs = tensors(images(8))["input"]
    result = prune(model.eval(), inputs[:2], [inputs], [copy.deepcopy(step)], evaluate=lambda _: 1.0)
    assert not result.plan
    [told] = result.report.passes[0].skipped
    assert told.where == "the network"
    assert looked in told.reason


def test_plain_stacks_lose_a_convolution_with_its_normalisation():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()
    [block] = [block for block in live_blocks(Context(model, model, images(4))) if block.also]
    assert block.paths == ("2", "3")
    result = run(Front(target_macs=0.6), model, images(16))
    assert dropped(result) == ["3"]
    assert isinstance(result.model[2], Bypass)


def test_the_layers_to_refit_run_behind_the_first_removal():
    model, data = residual(2), images(4)
    plan = Plan(edits=(DropBlock(path="layers.1"), DropBlock(path="layers.3")))
    assert layers_after(model, data, plan) == (
        "layers.2.conv1",
        "layers.2.conv2",
        "layers.2.projection.0",
        "head",
    )
    assert layers_after(model, data, Plan()) == ()


@pytest.mark.parametrize("step", [RandomBlocks, BlockInfluence])
def test_refit_can_be_switched_off(step):
    model, data = residual(3), images(24)
    context = Context(model, model, data)
    assert step(blocks=1).propose(context).consumers
    assert step(blocks=1, refit="none").propose(context).consumers == ()


def test_similarity_leaves_constant_blocks_out():
    model, data = encoder(3), sequences(16)
    with torch.no_grad():
        for parameter in model.layers[1].parameters():
            parameter.zero_()
    model.layers[1].register_forward_hook(lambda *_: torch.ones(len(_[2]), 6, 16))
    blocks = [Block(f"layers.{index}", True) for index in range(2)]
    found = block_similarity(Context(model, model, data), blocks)
    assert [block.path for block in found.blocks] == ["layers.0"]
    assert found.cka.tolist() == [[1.0]]
    assert [(item.where, "same for every example" in item.reason) for item in found.skipped] == [("layers.1", True)]


def test_no_blocks_have_no_similarity():
    model = plain()
    assert block_similarity(Context(model, model, images(8)), []).cka.shape == (0, 0)


def test_removals_are_numbered_from_a_seed():
    model, data = encoder(6), sequences(8)
    context = Context(model, model, data, seed=3)
    paths = lambda step: [edit.path for edit in step.propose(context).plan.of(DropBlock)]  # noqa: E731
    assert paths(RandomBlocks(blocks=4)) == paths(RandomBlocks(blocks=4, seed=3))
    assert len({tuple(paths(RandomBlocks(blocks=4, seed=seed))) for seed in range(8)}) > 4
    first = [paths(RandomBlocks(blocks=1, seed=seed))[0] for seed in range(300)]
    counts = np.unique(first, return_counts=True)[1]
    assert len(counts) == 6
    assert 30 <= counts.min() <= counts.max() <= 75


class Tokens(nn.Module):
    """Two layers on embedded tokens, without attention: padding changes nothing for the others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.one, self.two = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask=None):
        return self.two(self.one(self.embedding(input_ids)).relu())


def texts(*, masked, left=False, n=40, length=9):
    generator = np.random.default_rng(3)
    lengths = generator.integers(1, length + 1, n) if masked else np.full(n, length)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
    mask = mask[:, ::-1] if left else mask
    ids = generator.integers(1, 30, mask.shape)
    return Dataset({"input_ids": ids, **({"attention_mask": mask} if masked else {})}, keyword=True), mask


@pytest.mark.parametrize(
    ("masked", "left"), [(True, False), (True, True), (False, False)], ids=["right", "left", "whole"]
)
def test_a_sequence_is_the_mean_of_its_tokens_but_the_first(masked, left):
    model, (data, mask) = Tokens(), texts(masked=masked, left=left)
    rows = {"one": [], "two": []}
    with torch.no_grad():
        for ids, real in zip(data.inputs["input_ids"], mask, strict=True):
            kept = [int(token) for token, counts in zip(ids, real, strict=True) if counts]
            hidden = model.one(model.embedding(torch.tensor(kept[1:] or kept)))
            rows["one"].append(hidden.mean(0))
            rows["two"].append(model.two(hidden.relu()).mean(0))
    expected = linear_cka(torch.stack(rows["one"]), torch.stack(rows["two"]))
    assert cka_matrix(model, ["one", "two"], data)[0, 1] == pytest.approx(float(expected), abs=1e-5)


def test_what_stands_in_padding_has_no_part_in_similarity():
    model, (data, mask) = Tokens(), texts(masked=True)
    other = Dataset({**data.inputs, "input_ids": np.where(mask, data.inputs["input_ids"], 7)}, keyword=True)
    names = ["one", "two"]
    torch.testing.assert_close(cka_matrix(model, names, data), cka_matrix(model, names, other), rtol=0, atol=1e-7)
