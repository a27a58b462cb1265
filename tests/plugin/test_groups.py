"""Groups of small networks: who belongs to them, what is refused and why, and that torch-pruning comes out unharmed."""

import copy
import re

import numpy as np
import pytest
import torch
import torch_pruning
import torch_pruning.dependency.graph as tp_graph
import torch_pruning.dependency.index_mapping as tp_mapping
from networks import (
    NETWORKS,
    constant,
    dense,
    encoder,
    images,
    mlp,
    plain,
    residual,
    separable,
    sequences,
    vectors,
    zero_padded,
)
from torch import nn

from secateurs.certificate import keep_certified
from secateurs.errors import GroupError
from secateurs.groups import Limits, find_groups, group_importances, plan_removal
from secateurs.passes.survey import checked_groups
from secateurs.plan import Plan
from secateurs.settings import NodeSettings

READERS = {
    "residual": {
        "stem": {"layers.0.conv1", "layers.1.conv1", "layers.2.conv1", "layers.2.projection.0"},
        "layers.0.conv1": {"layers.0.conv2"},
        "layers.1.conv1": {"layers.1.conv2"},
        "layers.2.conv1": {"layers.2.conv2"},
        "layers.2.projection.0": {"layers.3.conv1", "head"},
        "layers.3.conv1": {"layers.3.conv2"},
    },
    "plain": {"0": {"2"}, "2": {"5"}, "5": {"7"}},
    "separable": {
        "1.squeeze": {"1.excite"},
        "1.excite": {"1.project", "1.squeeze"},
        "2.squeeze": {"2.excite"},
        "2.excite": {"2.project", "2.squeeze"},
        "2.project": {"1.expand", "2.expand", "5"},
    },
    "dense": {"first": {"second", "third", "head"}, "second": {"third", "head"}, "third": {"head"}},
    "encoder": {"layers.0.up": {"layers.0.down"}, "layers.1.up": {"layers.1.down"}},
    "group_normed": {"3": {"5"}, "5": {"8"}},
    "layer_normed": {"3": {"5"}},
    "mlp": {"0": {"2"}, "2": {"4"}},
    "sigmoid": {"0": {"2"}, "2": {"4"}},
    "recurrent": {"hidden": {"head"}},
    "tied": {"up": {"down"}},
    "reused": {"shared": {"shared", "hidden"}, "hidden": {"head"}},
    "zero_padded": {
        **{f"layers.{number}.conv1": {f"layers.{number}.conv2"} for number in range(4)},
        # What the stream has from the start, and what its second stage adds.
        "stem": {"layers.0.conv1", "layers.1.conv1", "layers.2.conv1", "layers.3.conv1", "head"},
        "layers.2.conv2": {"layers.3.conv1", "head"},
    },
    "constant": {"0": {"2"}},
}
REFUSALS = {
    "encoder": {
        "layers.0.attention.value": r"graph is wrong about 'layers.0.attention.out'",
        "layers.1.attention.value": r"graph is wrong about 'layers.1.attention.out'",
        "layers.1.down": "is a LayerNorm",
    },
    "group_normed": {"0": "is a GroupNorm"},
    "layer_normed": {"0": "is a LayerNorm"},
    "recurrent": {"embed": "'lstm' is a LSTM", "lstm": "it is a LSTM"},
    "tied": {"down": "is a Embedding"},
}


@pytest.mark.parametrize("name", READERS)
def test_groups_and_refusals_of_every_network(name):
    build, make = NETWORKS[name]
    model = build()
    groups, skipped = checked_groups(model, make(4), NodeSettings())
    assert {group.root: {member.module for member in group.of("in")} for group in groups} == READERS[name]
    expected = REFUSALS.get(name, {})
    reasons = {item.where: item.reason for item in skipped}
    last = list(dict(model.named_modules()))[-1]
    assert "output of the network" in reasons.pop("head" if hasattr(model, "head") else last)
    assert set(reasons) == set(expected)
    for where, pattern in expected.items():
        assert re.search(pattern, reasons[where]), reasons[where]


def named(groups):
    return {group.root: group for group in groups}


def test_members_of_a_residual_stream():
    group = named(find_groups(residual(), images(2))[0])["stem"]
    assert group.units == 8
    assert {m.module for m in group.of("out")} == {"stem", "layers.0.conv2", "layers.1.conv2"}
    assert {m.module for m in group.of("pass")} == {"bn", "layers.0.bn2", "layers.1.bn2"}
    for member in group.members:
        np.testing.assert_array_equal(member.index, np.arange(8)[:, None])


def test_members_around_a_depthwise_convolution():
    group = named(find_groups(separable(), images(2))[0])["1.excite"]
    assert {m.module for m in group.of("out")} == {"1.expand", "1.excite"}
    assert {m.module for m in group.of("pass")} == {"1.bn1", "1.depthwise", "1.bn2"}


def test_flattening_gives_every_unit_its_positions():
    group = named(find_groups(plain(), images(2))[0])["2"]
    (reader,) = group.of("in")
    np.testing.assert_array_equal(reader.index, np.arange(8 * 16).reshape(8, 16))


def test_concatenation_shifts_the_indices_of_later_parts():
    groups = named(find_groups(dense(), images(2))[0])
    offsets = {"first": 0, "second": 6, "third": 10}
    for root, offset in offsets.items():
        expected = np.arange(groups[root].units)[:, None] + offset
        for name in ("head", "norm"):
            (member,) = [m for m in groups[root].members if m.module == name]
            np.testing.assert_array_equal(member.index, expected)


def test_the_zero_padded_shortcut_is_grouped_wrongly_and_only_the_check_exposes_it():
    model, data = zero_padded(), images(4)
    unchecked = named(find_groups(model, data)[0])
    assert "layers.2.conv2" in {member.module for member in unchecked["stem"].members}, "8 units coupled with 16"
    checked, _ = checked_groups(model, data, NodeSettings())
    members = {member.module: member.index[:, 0].tolist() for member in named(checked)["stem"].members}
    assert members["layers.2.conv2"] == list(range(4, 12)), "8 units, behind the 4 that the padding puts in front"
    alone, skipped = checked_groups(model, data, NodeSettings(coupled=False))
    assert "stem" not in named(alone)
    (reason,) = [item.reason for item in skipped if item.where == "stem"]
    assert "the dependency graph is wrong" in reason


def test_coupled_groups_can_be_left_alone():
    checked, skipped = checked_groups(residual(), images(4), NodeSettings(coupled=False))
    assert all(len(group.of("out")) == 1 for group in checked)
    assert "coupled with other layers" in {item.where: item.reason for item in skipped}["stem"]


def test_a_single_unit_is_not_offered():
    model = nn.Sequential(nn.Linear(12, 1), nn.ReLU(), nn.Linear(1, 5)).eval()
    checked, skipped = checked_groups(model, vectors(4), NodeSettings())
    assert checked == []
    assert skipped[-1].reason == "it has a single unit"


class OwnConvolution(nn.Conv2d):
    """A subclass is a convolution too."""


def test_subclasses_of_layers_are_checked_along_their_channels():
    model = nn.Sequential(
        OwnConvolution(3, 6, 3), nn.ReLU(), OwnConvolution(6, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    ).eval()
    checked, _ = checked_groups(model, images(4), NodeSettings())
    assert {group.root for group in checked} == {"0", "2"}


def test_grouped_convolutions_are_refused_by_name():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 5))
    reasons = {item.where: item.reason for item in find_groups(model.eval(), images(2))[1]}
    assert reasons["0"] == "'2' is a grouped convolution (2 groups)"
    assert reasons["2"] == "'2' is a grouped convolution (2 groups)"


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(items=1), "more than 1 entries; raise `max_group_items`"),
        (Limits(seconds=1e-9), "longer than 1e-09 s; raise `time_limit`"),
    ],
    ids=["items", "seconds"],
)
def test_a_limit_skips_the_group_with_its_reason(limits, reason):
    groups, skipped = find_groups(residual(), images(2), limits)
    assert groups == []
    assert reason in {item.where: item.reason for item in skipped}["stem"]
    assert find_groups(residual(), images(2))[0], "the next call is not affected"


def test_limits_leave_small_groups_alone():
    groups, skipped = find_groups(residual(), images(2), Limits(items=10))
    assert "layers.0.conv1" in named(groups)
    assert "stem" in {item.where for item in skipped}


class Joined(nn.Module):
    """Reads a concatenation of which torch-pruning cannot tell how wide its parts are."""

    def __init__(self, doubled):
        super().__init__()
        self.doubled = doubled
        self.first, self.second, self.third = nn.Conv2d(3, 16, 1), nn.Conv2d(32, 8, 1), nn.Conv2d(8, 6, 1)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, value):
        value = self.first(value)
        if self.doubled:
            half, gate = value.chunk(2, 1)
            half = half * torch.sigmoid(gate)
            parts = [half, half, half, half]
        else:
            parts = [value, (2 * self.scale).expand_as(value)]
        return self.third(self.second(torch.cat(parts, 1)).relu()).mean((2, 3))


@pytest.mark.parametrize(
    ("doubled", "reason"), [(True, "cannot follow its units"), (False, "its units through a concatenation")]
)
def test_an_operation_that_cannot_be_followed_costs_its_group_only(doubled, reason):
    groups, skipped = checked_groups(Joined(doubled).eval(), images(4), NodeSettings())
    assert {group.root for group in groups} == {"second"}
    assert reason in {item.where: item.reason for item in skipped}["first"]


def patched():
    names = [name for name in vars(tp_mapping) if name.startswith("update_")]
    return (tp_graph.Group, *(getattr(tp_mapping, name) for name in names))


ORIGINALS = patched()


def test_torch_prunings_functions_are_restored():
    class Broken(nn.Module):
        def forward(self, value):
            raise RuntimeError("broken")

    find_groups(mlp(), vectors(2))
    assert patched() == ORIGINALS
    find_groups(mlp(), vectors(2), Limits(items=1))
    assert patched() == ORIGINALS
    with pytest.raises(GroupError):
        find_groups(nn.Sequential(nn.Linear(12, 4), Broken()), vectors(2))
    assert patched() == ORIGINALS


def test_nothing_leaks_over_repeated_calls():
    model, data = separable(), images(2)
    first = find_groups(model, data)
    other = find_groups(encoder(), sequences(2))
    for _ in range(3):
        groups, skipped = find_groups(model, data)
        assert skipped == first[1]
        assert [group.root for group in groups] == [group.root for group in first[0]]
        for group, before in zip(groups, first[0], strict=True):
            assert [(m.module, m.kind, m.index.tolist()) for m in group.members] == [
                (m.module, m.kind, m.index.tolist()) for m in before.members
            ]
    assert [group.root for group in find_groups(encoder(), sequences(2))[0]] == [group.root for group in other[0]]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_the_model_given_is_untouched(grad):
    model = residual().train()
    model.layers[1].eval()
    model.stem.weight.requires_grad_(False)
    model.head.register_forward_hook(lambda *_: None)
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    random = torch.get_rng_state()
    with torch.set_grad_enabled(grad):
        find_groups(model, images(2))
        checked_groups(model, images(4), NodeSettings())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()] == hooks
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_frozen_networks_have_groups_too():
    model = plain()
    model.requires_grad_(False)
    assert {group.root for group in find_groups(model, images(2))[0]} == {"0", "2", "5"}


def test_a_network_that_does_not_run_is_a_group_error():
    with pytest.raises(GroupError, match="cannot trace the network"):
        find_groups(mlp(), vectors(2, width=3))


def test_importances_are_torch_prunings_own():
    model, data = mlp(), vectors(2)
    scores = group_importances(
        model, data, ["0", "2"], torch_pruning.importance.GroupMagnitudeImportance(p=2, normalizer=None)
    )
    # The squared norms of what produces and what reads a unit, averaged over the two.
    produced = model[0].weight.detach().double().square().sum(1)
    read = model[2].weight.detach().double().square().sum(0)
    np.testing.assert_allclose(scores["0"], (produced + read) / 2, rtol=1e-5)
    assert len(scores["2"]) == 10


def test_an_importance_without_a_score_is_a_group_error():
    with pytest.raises(GroupError, match="no score for the group of '0'"):
        group_importances(mlp(), vectors(2), ["0"], lambda _: None)


def test_removals_hold_slices_for_every_member_and_new_widths():
    model = separable()
    group = named(find_groups(model, images(2))[0])["1.excite"]
    plan = plan_removal(model, group, [3, 1, 3], "why")
    edit, *attributes = plan.edits
    assert (edit.root, edit.units, edit.reason) == ("1.excite", (1, 3), "why")
    cut = {(piece.module, piece.parameter, piece.dim) for piece in edit.slices}
    assert cut == {
        ("1.expand", "weight", 0),
        ("1.excite", "weight", 0),
        ("1.excite", "bias", 0),
        ("1.depthwise", "weight", 0),
        ("1.project", "weight", 1),
        ("1.squeeze", "weight", 1),
        *((f"1.{norm}", name, 0) for norm in ("bn1", "bn2") for name in ("weight", "bias", "running_mean", "running_var")),
    }  # fmt: skip
    assert all(piece.removed == (1, 3) for piece in edit.slices)
    assert {(a.module, a.name, a.value) for a in attributes} == {
        ("1.expand", "out_channels", 10),
        ("1.excite", "out_channels", 10),
        ("1.depthwise", "in_channels", 10),
        ("1.depthwise", "out_channels", 10),
        ("1.depthwise", "groups", 10),
        ("1.bn1", "num_features", 10),
        ("1.bn2", "num_features", 10),
        ("1.project", "in_channels", 10),
        ("1.squeeze", "in_channels", 10),
    }


@pytest.mark.parametrize("order", [("first", "second", "third"), ("third", "first", "second")], ids=">".join)
def test_removals_from_parts_of_a_concatenation_fit_each_other(order):
    model, data = dense(), images(16)
    groups = named(find_groups(model, data.take(range(2)))[0])
    plan = Plan()
    for root in order:
        plan += plan_removal(model, groups[root], [0, groups[root].units - 1], "test", plan)
    certified = keep_certified(model, plan, data)
    assert certified.vetoed == ()
    assert certified.plan == plan
    assert certified.certificate.holds
    widths = {(edit.module, edit.name): edit.value for edit in plan.edits if edit.edit == "set_attribute"}
    assert widths["head", "in_features"] == 9
    assert widths["norm", "num_features"] == 9
    assert widths["third", "in_channels"] == 6


def test_a_constant_network_still_has_groups():
    assert {group.root for group in find_groups(constant(), vectors(2))[0]} == {"0"}
