"""The loop of `cka-cluster`: rounds, granularity, what is measured again, and what recovery may train."""

from dataclasses import replace

import pytest
import torch
from networks import encoder, images, residual, sequences
from torch import nn

from secateurs import prune
from secateurs.data import Dataset
from secateurs.errors import RecipeError
from secateurs.forward import predict, tensors
from secateurs.modules import Bypass
from secateurs.passes.base import Context
from secateurs.passes.cka_cluster import CkaCluster, neighbours
from secateurs.passes.compared import cka_matrix, live_blocks
from secateurs.plan import DropBlock, Plan
from secateurs.recipe import settings_from
from secateurs.settings import CkaClusterSettings
from secateurs.surgery import applied


def layers_left(model):
    return sum(not isinstance(layer, Bypass) for layer in model.layers)


def run(model, data, step, least=0, **options):
    """Prune with a metric that is 1 while `least` layers are left, and 0 after that."""
    inputs = tensors(data)["input"]
    return prune(
        model, inputs[:2], [inputs], [step], evaluate=lambda network: float(layers_left(network) >= least), **options
    )


def rounds(result):
    return [(item["edits"], item["accepted"]) for item in result.report.passes[0].details["rounds"]]


def test_granularity_grows_after_each_rejection_and_stays_after_an_accepted_round():
    """One cluster of five: k = 1 takes four, k = 2 takes two; of the three that are left, k = 2 and k = 3 take one."""
    result = run(encoder(5), sequences(24), CkaCluster(threshold=0.0, tolerance=0.5), least=3)
    assert rounds(result) == [(4, False), (2, True), (1, False), (1, False)]
    assert [edit.path for edit in result.plan.of(DropBlock)] == ["layers.3", "layers.1"]
    assert layers_left(result.model) == 3


def test_convolutional_blocks_go_the_same_way_and_stage_entries_stay():
    """Eight blocks, one cluster: k = 1 would leave the anchor and the stage entry."""
    result = run(residual(4), images(24), CkaCluster(threshold=0.0, tolerance=0.5), least=4)
    assert rounds(result) == [(6, False), (4, True), (2, False), (1, False)]
    assert [edit.path for edit in result.plan.of(DropBlock)] == ["layers.7", "layers.5", "layers.3", "layers.1"]
    reasons = [item.reason for item in result.report.passes[0].skipped if item.where == "layers.4"]
    assert any("its input has shape (8, 8, 8), its output (16, 4, 4)" in reason for reason in reasons)


def test_a_round_that_would_remove_nothing_counts_as_rejected():
    """A cluster of two whose second member is a stage entry: without that rule the loop would never end."""
    model = residual(1)
    step = CkaCluster(threshold=0.0)
    result = run(model, images(24), step)
    assert not result.plan
    assert rounds(result) == []
    assert step._granularity == 4
    assert {item.where for item in result.report.passes[0].skipped} == {"layers.0", "layers.1"}


def test_where_nothing_goes_each_block_says_why():
    """No two blocks are alike enough: every one of them is named with its CKA and the threshold."""
    model, data = encoder(4), sequences(24)
    result = run(model, data, CkaCluster(threshold=1.0))
    assert not result.plan
    reasons = {item.where: item.reason for item in result.report.passes[0].skipped}
    assert reasons.pop("layers.0") == "the first block, with which the next ones are compared"
    cka = cka_matrix(model, [f"layers.{number}" for number in range(4)], data)
    assert reasons == {
        f"layers.{number}": f"CKA {cka[number - 1, number]:.4f} with layers.{number - 1}, below `threshold` 1"
        for number in (1, 2, 3)
    }


def test_a_first_granularity_beyond_the_last_is_refused():
    with pytest.raises(ValueError, match="`granularity` 3 is above `max_granularity` 2, so that no round would run"):
        CkaCluster(granularity=3, max_granularity=2)
    with pytest.raises(RecipeError, match="`granularity` 3 is above `max_granularity` 2"):
        settings_from(CkaClusterSettings, {"granularity": 3, "max_granularity": 2}, "passes.cka-cluster")
    assert CkaCluster(granularity=2, max_granularity=2).settings.granularity == 2


def test_similarity_is_measured_again_on_the_network_that_was_recovered():
    model, data = encoder(5), sequences(24)
    step = CkaCluster(threshold=0.0, granularity=3, tolerance=0.0)
    evaluate = lambda _: 1.0  # noqa: E731
    first = step.propose(Context(model, model, data, evaluate=evaluate))
    step.answer(True)
    recovered = applied(model, first.plan)
    with torch.no_grad():
        for parameter in recovered.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    second = step.propose(Context(recovered, model, data, evaluate=evaluate))
    assert second.details["blocks"] == ["layers.0", "layers.2", "layers.3"]
    expected = cka_matrix(recovered, second.details["blocks"], data)
    assert torch.tensor(second.details["cka"]) == pytest.approx(expected, abs=1e-6)
    before = cka_matrix(applied(model, first.plan), second.details["blocks"], data)
    assert float((before - expected).abs().max()) > 1e-3


def test_a_rejected_round_measures_nothing_again():
    model, data = encoder(4), sequences(24)
    step = CkaCluster(threshold=0.0)
    context = Context(model, model, data, evaluate=lambda _: 1.0)
    step.propose(context)
    measured = step._measure(context)
    step.answer(False)
    step.propose(context)
    assert step._measure(context) is measured


def test_passes_that_differ_in_their_number_of_blocks_share_the_first_measurement():
    model, data = encoder(5), sequences(24)
    context = Context(model, model, data, evaluate=lambda _: 1.0)
    step = CkaCluster(threshold=0.0)
    twins = {count: step.aimed(count) for count in (1, 3)}
    plans = {count: twin.propose(context).plan for count, twin in twins.items()}
    assert {count: len(plan) for count, plan in plans.items()} == {1: 1, 3: 3}
    assert twins[1]._measure(context) is twins[3]._measure(context)
    twins[1].answer(True)
    pruned = applied(model, plans[1])
    later = Context(pruned, model, data, evaluate=lambda _: 1.0)
    assert [block.path for block in twins[1]._measure(later).blocks] != [block.path for block in live_blocks(context)]
    assert twins[3]._measure(context) is step.aimed(2)._measure(context)
    assert step.aimed(2).settings == CkaCluster(threshold=0.0, max_blocks=2).settings


def test_blocks_with_constant_outputs_are_left_out():
    """Behind the third block nothing depends on the input any more: those blocks have no CKA, and the others are still pruned."""
    model = encoder(5)
    model.layers.insert(3, _Constant())
    context = Context(model, model, sequences(24), evaluate=lambda _: 1.0)
    proposal = CkaCluster(threshold=0.0).propose(context)
    assert [edit.path for edit in proposal.plan.of(DropBlock)] == ["layers.2", "layers.1"]
    assert proposal.details["blocks"] == ["layers.0", "layers.1", "layers.2"]
    constant = {item.where for item in proposal.skipped if "the same for every example" in item.reason}
    assert constant == {"layers.4", "layers.5"}


class _Constant(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x) + torch.linspace(-1, 1, x.shape[-1])


# --- what recovery trains ----------------------------------------------------------------------------------------------------------------


def test_neighbours_are_the_blocks_around_each_run():
    model, data = encoder(7), sequences(8)
    blocks = live_blocks(Context(model, model, data))
    dropped = [DropBlock(path=f"layers.{index}") for index in (1, 2, 6)]
    assert neighbours(blocks, Plan(edits=tuple(dropped))) == ("layers.0", "layers.3", "layers.5")
    assert neighbours(blocks, Plan(edits=tuple(DropBlock(path=f"layers.{index}") for index in range(7)))) == ()


class Once(CkaCluster):
    """One round, mended by training alone."""

    def propose(self, context):
        return replace(super().propose(context), recalibrate=False, consumers=())


def trained(freeze):
    """Return what changed in a residual network that lost layers.2, by module."""
    data = images(48, labels=True)
    model = residual(4)
    model.layers[0].conv1.weight.requires_grad_(False)
    inputs = tensors(data)["input"]
    step = Once(
        threshold=0.0, granularity=3, max_blocks=1, max_rounds=1, tolerance=1.0, recovery_epochs=2, freeze=freeze
    )
    result = prune(
        model,
        inputs[:2],
        [inputs],
        [step],
        evaluate=lambda _: 1.0,
        training=[(inputs + 0.01, torch.as_tensor(data.labels))],
        recovery={"learning_rate": 1e-2, "batch_size": 16},
    )
    [dropped] = [edit.path for edit in result.plan.of(DropBlock)]
    before, after = model.state_dict(), result.model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    return dropped, changed, result.model


def test_freezing_trains_the_neighbours_of_the_removed_block_and_nothing_else():
    dropped, changed, model = trained(freeze=True)
    index = int(dropped.rpartition(".")[2])
    near = {f"layers.{index - 1}", f"layers.{index + 1}"} & {f"layers.{i}" for i in range(8)}
    assert {".".join(name.split(".")[:2]) for name in changed} == near
    assert any("running_mean" in name for name in changed)
    assert any("conv2.weight" in name for name in changed)
    assert [name for name, value in model.named_parameters() if not value.requires_grad] == ["layers.0.conv1.weight"]


def test_without_freezing_everything_is_trained_but_what_was_frozen_before():
    _, changed, _ = trained(freeze=False)
    assert {"head.weight", "stem.weight", "bn.running_mean"} <= changed
    assert "layers.0.conv1.weight" not in changed


def test_freezing_without_any_neighbour_trains_nothing():
    step = CkaCluster(threshold=0.0, freeze=True, recovery_epochs=3, tolerance=1.0)
    model, data = encoder(3), sequences(24)
    proposal = step.propose(Context(model, model, data, evaluate=lambda _: 1.0))
    assert (proposal.trainable, proposal.recovery_epochs) == (("layers.0",), 3)
    live = live_blocks(Context(model, model, data))
    everything = Plan(edits=tuple(block.dropped("a test") for block in live))
    assert step._round(Context(model, model, data), live, everything, (), {}).recovery_epochs == 0


def test_the_prediction_follows_the_plan():
    """The refit may be switched off; then the pruned network is the masked original."""
    model, data = encoder(4), sequences(24)
    result = run(model, data, CkaCluster(threshold=0.0, max_blocks=1, tolerance=1.0, refit="none"))
    expected = predict(applied(model, result.plan), data)
    assert torch.equal(predict(result.model, Dataset(data.inputs)), expected)
