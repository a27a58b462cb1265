"""Segments, and removals by measured divergence within them."""

import copy

import numpy as np
import pytest
import torch
from networks import encoder, images, residual, sequences
from torch import nn

from secateurs import prune
from secateurs.errors import RecipeError
from secateurs.forward import predict, tensors
from secateurs.outputs import kl_divergence, unsure_temperature
from secateurs.passes.base import Context
from secateurs.passes.cka_segment import CkaSegment, segments_of
from secateurs.passes.compared import Similarity, cka_matrix, live_blocks
from secateurs.passes.trials import Trials, held_out, label_loss
from secateurs.plan import DropBlock, Plan
from secateurs.recalibration import estimate_statistics
from secateurs.segmentation import elbow, optimal_losses, optimal_segments
from secateurs.settings import CkaSegmentSettings
from secateurs.surgery import applied

FAST = {"held_out": 32, "statistics": 16}


def context_of(model, data, **options):
    return Context(model, model, data, **options)


def divergence_of(reference, network, data):
    return kl_divergence(reference, predict(network, data), unsure_temperature(reference))


def paths_of(proposal):
    return [edit.path for edit in proposal.plan.of(DropBlock)]


def graded(strengths, seed=0):
    """Return an encoder whose layers change their input as much as the strengths say."""
    model = encoder(len(strengths), seed=seed)
    with torch.no_grad():
        for layer, strength in zip(model.layers, strengths, strict=True):
            for last in (layer.attention.out, layer.down):
                last.weight.mul_(strength)
                last.bias.mul_(strength)
    return model


# --- segments ----------------------------------------------------------------------------------------------------------------------------


def test_segments_are_the_optimal_partition_of_the_rows():
    model, data = residual(4), images(48)
    context = context_of(model, data)
    proposal = CkaSegment(blocks=1, **FAST).propose(context)
    names = [block.path for block in live_blocks(context)]
    matrix = cka_matrix(model, names, data).numpy()
    count = elbow(optimal_losses(matrix))
    expected = [[names[index] for index in segment] for segment in optimal_segments(matrix, count)]
    assert proposal.details["segments"] == expected
    assert proposal.details["compared"] == names
    assert np.array(proposal.details["cka"]) == pytest.approx(matrix, abs=1e-6)


def test_paper_mode_sees_only_the_sums_of_the_columns():
    matrix = torch.tensor(np.kron(np.eye(2), np.ones((3, 3))))
    matrix[5, 5] = 1.2
    blocks = tuple(live_blocks(context_of(encoder(6), sequences(4))))
    similarity = Similarity(blocks, matrix)

    def sizes(**options):
        found = segments_of(similarity, CkaSegmentSettings(segments=2, **options))
        return [len(segment) for segment in found]

    assert sizes() == [3, 3]
    assert sizes(representation="sum") == [5, 1]


def test_more_segments_than_blocks_are_refused():
    with pytest.raises(RecipeError, match="`segments` is 5, and there are 3 blocks"):
        CkaSegment(blocks=1, segments=5, **FAST).propose(context_of(encoder(3), sequences(16)))


@pytest.mark.parametrize("segments", [1, 2, 4, 6])
def test_every_segment_keeps_a_block(segments):
    model, data = encoder(6), sequences(24)
    step = CkaSegment(blocks=6, segments=segments, refit="none", **FAST)
    proposal = step.propose(context_of(model, data))
    gone = set(paths_of(proposal))
    assert len(gone) == 6 - segments
    for segment in proposal.details["segments"]:
        assert set(segment) - gone
    pruned = applied(model, proposal.plan)
    message = step.shortfall(context_of(pruned, data))
    assert f"`blocks` 6 was not reached: {6 - segments} went; every segment keeps a block" in message
    alone = {item.where for item in proposal.skipped if "segment of its own" in item.reason}
    assert alone == {segment[0] for segment in proposal.details["segments"] if len(segment) == 1}


def test_a_stage_entry_is_what_its_segment_keeps():
    model, data = residual(2), images(24)
    proposal = CkaSegment(blocks=4, segments=1, **FAST).propose(context_of(model, data))
    assert sorted(paths_of(proposal)) == ["layers.0", "layers.1", "layers.3"]


def test_blocks_with_constant_outputs_stay():
    model = encoder(5)
    model.layers.insert(3, _Constant())
    proposal = CkaSegment(blocks=9, segments=1, **FAST).propose(context_of(model, sequences(24)))
    assert len(paths_of(proposal)) == 2
    assert {item.where for item in proposal.skipped if "same for every example" in item.reason} == {
        "layers.4",
        "layers.5",
    }


class _Constant(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x) + torch.linspace(-1, 1, x.shape[-1])


# --- the score ---------------------------------------------------------------------------------------------------------------------------


def test_the_blocks_that_change_least_go_first():
    strengths = [1.0, 0.02, 0.8, 0.3, 0.001, 0.1]
    proposal = CkaSegment(blocks=4, segments=1, **FAST).propose(context_of(graded(strengths), sequences(32)))
    assert paths_of(proposal) == ["layers.4", "layers.1", "layers.5", "layers.3"]


def test_every_step_measures_again_on_what_the_steps_before_left():
    """Without mending, the score is the plain divergence of the network without the blocks, and the lowest goes."""
    model, data = encoder(5), sequences(24)
    proposal = CkaSegment(blocks=3, segments=1, refit="none", **FAST).propose(context_of(model, data))
    reference = predict(model, data)
    gone: list[str] = []
    for removal in proposal.details["removals"]:
        expected = {}
        for path in (f"layers.{index}" for index in range(5)):
            if path not in gone:
                plan = Plan(edits=tuple(DropBlock(path=name) for name in (*gone, path)))
                expected[path] = divergence_of(reference, applied(model, plan), data)
        assert removal["scores"] == pytest.approx(expected, rel=1e-9)
        assert removal["block"] == min(expected, key=expected.get)
        assert removal["score"] == min(expected.values())
        gone.append(removal["block"])
    first, second = (removal["scores"] for removal in proposal.details["removals"][:2])
    assert sorted(first, key=first.get)[1:] != sorted(second, key=second.get) or first != second
    assert all(f"{len(gone)}" and edit.reason.startswith("divergence") for edit in proposal.plan.of(DropBlock))


def changed_layers(before, after):
    """Return the layers whose weights two networks do not share; statistics do not count."""
    state = before.state_dict()
    return {
        name.rpartition(".")[0]
        for name, value in after.state_dict().items()
        if "running" not in name and "num_batches" not in name and not torch.equal(value, state[name])
    }


def settled():
    """Return a residual network whose BatchNorm statistics are those of the data, as after training."""
    model = residual(3)
    estimate_statistics(model, images(96))
    return model


@pytest.mark.parametrize("reach", [1, 2, 9])
def test_a_trial_refits_the_blocks_in_reach_and_scores_the_result(reach):
    model, data = settled(), images(96)
    context = context_of(model, data)
    blocks = live_blocks(context)
    trials = Trials(context, measured_on=data, statistics=data, reach=reach)
    reference = predict(model, data)
    better = 0
    for index, block in enumerate(blocks):
        if not block.removable:
            continue
        trial = trials.without(model, block, blocks[index + 1 :])
        assert trial.score == divergence_of(reference, trial.network, data)
        plain = applied(model, Plan(edits=(block.dropped("a test"),)))
        divergence = divergence_of(reference, plain, data)
        if trial.score == divergence:
            assert not changed_layers(model, trial.network)
            continue
        assert trial.score < divergence
        better += 1
        behind = {
            f"{other.path}.{layer}" for other in blocks[index + 1 : index + 1 + reach] for layer in ("conv1", "conv2")
        }
        behind |= {"layers.3.projection.0"} if any(name.startswith("layers.3") for name in behind) else set()
        behind |= {"head"} if index + reach >= len(blocks) else set()
        assert changed_layers(model, trial.network) == behind
    assert better >= 3


def test_without_refit_a_trial_recalibrates_where_that_helps():
    model, data = settled(), images(96)
    context = context_of(model, data)
    trials = Trials(context, measured_on=data, statistics=data, reach=0)
    reference = predict(model, data)
    recalibrated = 0
    for block in (block for block in live_blocks(context) if block.removable):
        trial = trials.without(model, block, [])
        plain = divergence_of(reference, applied(model, Plan(edits=(block.dropped("a test"),))), data)
        assert not changed_layers(model, trial.network)
        assert trial.score == divergence_of(reference, trial.network, data) <= plain
        recalibrated += trial.score < plain
    assert recalibrated


def test_trials_leave_the_network_as_it_was():
    model, data = residual(2), images(32)
    before = copy.deepcopy(model.state_dict())
    CkaSegment(blocks=2, **FAST).propose(context_of(model, data))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_budgets_share_the_trials():
    model, data = encoder(5), sequences(24)
    told = []
    context = context_of(model, data, progress=told.append)
    step = CkaSegment(segments=1, **FAST)
    three = step.aimed(3).propose(context)
    count = len(told)
    assert count == 5 + 4 + 3
    one, four = step.aimed(1).propose(context), step.aimed(4).propose(context)
    assert len(told) == count + 2
    assert paths_of(one) == paths_of(three)[:1]
    assert paths_of(four)[:3] == paths_of(three)


def test_divergence_is_measured_on_validation_data():
    model, data, other = encoder(4), sequences(24), sequences(40, seed=5)
    assert held_out(context_of(model, data, validation=other), 32).inputs["input"].shape[0] == 32
    proposal = CkaSegment(blocks=1, segments=1, refit="none", held_out=40).propose(
        context_of(model, data, validation=other)
    )
    [removal] = proposal.details["removals"]
    plan = Plan(edits=(DropBlock(path=removal["block"]),))
    assert removal["score"] == divergence_of(predict(model, other), applied(model, plan), other)


def test_a_whole_run_meets_its_target_and_certifies():
    model, data = residual(4), images(64)
    inputs = tensors(data)["input"]
    result = prune(model, inputs[:2], [inputs], [{"cka-segment": {"target_macs": 0.8, **FAST}}])
    record = result.report.passes[0]
    assert result.report.verdict == "pass"
    assert record.certificate.holds
    assert record.details["rounds"][0]["kl_refitted"] >= 0


def test_label_loss_by_hand():
    data = images(8, labels=True)
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    expected = -torch.log_softmax(logits.double(), 1)[torch.arange(8), torch.as_tensor(data.labels)].mean()
    assert label_loss(logits, data) == pytest.approx(float(expected))
    assert label_loss(logits, images(8)) is None
    assert label_loss(logits[:, :1], data) is None
