"""Certificates: right plans hold, planted faults do not, and what cannot be measured is an error."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
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
    sigmoid,
    tied,
    tokens,
    vectors,
    zero_padded,
)
from torch import nn

import secateurs.certificate
from secateurs.certificate import certify, certify_network, keep_certified, masks_of
from secateurs.data import Dataset
from secateurs.errors import CertificateError
from secateurs.forward import call
from secateurs.groups import find_groups, plan_removal
from secateurs.passes.survey import checked_groups
from secateurs.plan import DropBlock, Plan, RemoveUnits, SetAttribute, Slice
from secateurs.report import Certificate
from secateurs.settings import NodeSettings


def groups_of(model, data):
    return {group.root: group for group in find_groups(model, data.take(range(2)))[0]}


def removal(model, data, root, units):
    return plan_removal(model, groups_of(model, data)[root], units, "test")


def edited(plan, change):
    """Return the plan with every slice passed through `change`, which may return None to leave it out."""
    edits = []
    for edit in plan.edits:
        if isinstance(edit, RemoveUnits):
            slices = tuple(piece for piece in map(change, edit.slices) if piece is not None)
            edit = edit.model_copy(update={"slices": slices})
        edits.append(edit)
    return Plan(edits=tuple(edits))


def fails(model, plan, data):
    """Tell whether a plan is refused, by its difference or because it does not run."""
    try:
        return not certify(model, plan, data).holds
    except CertificateError:
        return True


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "constant"])
def test_every_checked_group_of_every_network_holds(name):
    build, make = NETWORKS[name]
    model, data = build(), make(16)
    groups, _ = checked_groups(model, data.take(range(4)), NodeSettings())
    assert groups
    for group in groups:
        units = np.random.default_rng(0).permutation(group.units)[: max(1, group.units // 2)]
        certificate = certify(model, plan_removal(model, group, units, "test"), data)
        assert certificate.holds
        assert certificate.max_abs <= 2e-6 * certificate.scale
        assert certificate.batch_sizes == [2, 5]


@pytest.mark.parametrize("name", ["residual", "separable", "dense"])
def test_whole_plans_of_double_precision_hold_to_1e_14(name):
    build, make = NETWORKS[name]
    model, data = build().double(), make(16)
    data = Dataset({key: value.astype(np.float64) for key, value in data.inputs.items()})
    plan = Plan()
    for group in groups_of(model, data).values():
        plan += plan_removal(model, group, range(0, group.units, 2), "test", plan)
    certificate = certify(model, plan, data)
    assert certificate.tolerance == 1e-9
    assert certificate.max_abs <= 1e-14 * certificate.scale * 100


def test_the_scale_is_the_largest_output_of_the_masked_original():
    model, data = mlp(), vectors(2)
    plan = removal(model, data, "0", [0, 1, 2])
    masked_weight = copy.deepcopy(model)
    with torch.no_grad():
        masked_weight[2].weight[:, :3] = 0
        expected = float(call(masked_weight, data).abs().max())
    certificate = certify(model, plan, data, batch_sizes=(2,))
    assert certificate.scale == pytest.approx(expected, rel=1e-6)


def test_zeroing_weights_is_not_masking_where_the_activation_of_zero_is_not_zero():
    model, data = sigmoid(), vectors(16)
    plan = removal(model, data, "0", [1, 2, 3])
    assert masks_of(model, plan, data) == {"2": (1, 2, 3)}
    certificate = certify(model, plan, data)
    assert certificate.max_abs <= 1e-6 * certificate.scale
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        zeroed[0].weight[[1, 2, 3]] = 0
        zeroed[0].bias[[1, 2, 3]] = 0
        difference = (call(zeroed, data) - call(model, data)).abs().max()
    assert float(difference) > 1e-3, "sigmoid(0) = 0.5 still reaches the reader"


def test_dropped_blocks_are_compared_with_bypassed_ones():
    model, data = residual(), images(16)
    certificate = certify(model, Plan(edits=(DropBlock(path="layers.1"), DropBlock(path="layers.3"))), data)
    assert certificate.max_abs == 0.0
    assert certificate.scale > 0


def test_blocks_and_units_hold_together():
    model, data = residual(), images(16)
    plan = Plan(edits=(DropBlock(path="layers.1"),))
    thinner = copy.deepcopy(model)
    thinner.layers[1] = nn.Identity()
    plan += removal(thinner, data, "stem", [0, 4]) + removal(thinner, data, "layers.0.conv1", [2])
    assert certify(model, plan, data).holds


# --- planted faults ---------------------------------------------------------------------------------------------------


def off_by_one(plan, module, step=1):
    """Shift the indices of one module's slices."""
    shift = lambda p: p.model_copy(update={"removed": tuple(i + step for i in p.removed)}) if p.module == module else p  # noqa: E731
    return edited(plan, shift)


FAULTS = {
    "off by one in a reader": (mlp, vectors, "0", [1, 5], lambda plan: off_by_one(plan, "2")),
    "off by one in a producer": (mlp, vectors, "0", [1, 5], lambda plan: off_by_one(plan, "0")),
    "off by one in one of several readers": (
        residual,
        images,
        "stem",
        [1, 5],
        lambda plan: off_by_one(plan, "layers.1.conv1"),
    ),
    "off by one in one producer of a stream": (
        residual,
        images,
        "stem",
        [1, 5],
        lambda plan: off_by_one(plan, "layers.0.conv2"),
    ),
    "off by one after flatten": (plain, images, "2", [1, 5], lambda plan: off_by_one(plan, "5")),
    "off by one in a concatenation": (dense, images, "second", [0, 2], lambda plan: off_by_one(plan, "head")),
    "off by one in a depthwise layer": (
        separable,
        images,
        "1.excite",
        [0, 2],
        lambda plan: off_by_one(plan, "1.depthwise"),
    ),
    "wrong statistics": (
        residual,
        images,
        "layers.0.conv1",
        [0, 3],
        lambda plan: edited(
            plan,
            lambda p: p.model_copy(update={"removed": (1, 2)}) if p.parameter.startswith("running") else p,
        ),
    ),
    "forgotten statistics": (
        residual,
        images,
        "layers.0.conv1",
        [0, 3],
        lambda plan: edited(plan, lambda p: None if p.parameter.startswith("running") else p),
    ),
    "forgotten bias": (
        mlp,
        vectors,
        "0",
        [0, 3],
        lambda plan: edited(plan, lambda p: None if p.parameter == "bias" else p),
    ),
    "forgotten reader": (
        residual,
        images,
        "stem",
        [0, 3],
        lambda plan: edited(plan, lambda p: None if p.module == "layers.2.projection.0" else p),
    ),
    "missing groups attribute": (
        separable,
        images,
        "1.excite",
        [0, 2],
        lambda plan: Plan(edits=tuple(edit for edit in plan.edits if getattr(edit, "name", "") != "groups")),
    ),
}


@pytest.mark.parametrize(("build", "make", "root", "units", "spoil"), FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_found(build, make, root, units, spoil):
    model, data = build(), make(16)
    plan = removal(model, data, root, units)
    assert certify(model, plan, data).holds
    spoiled = spoil(plan)
    assert spoiled != plan
    assert fails(model, spoiled, data)


def test_swapped_slices_of_two_layers_are_found():
    model, data = residual(), images(16)
    plan = removal(model, data, "layers.0.conv1", [0, 3]) + removal(model, data, "layers.1.conv1", [2, 6])
    assert certify(model, plan, data).holds
    swap = {"layers.0.conv2": "layers.1.conv2", "layers.1.conv2": "layers.0.conv2"}
    swapped = edited(plan, lambda p: p.model_copy(update={"module": swap.get(p.module, p.module)}))
    assert fails(model, swapped, data)


def attention_removal(dims, head_dim=None):
    """Remove feature dimensions from the attention of layer 0: queries, keys, values and the input of the output layer."""
    prefix = "layers.0.attention"
    slices = [
        Slice(module=f"{prefix}.{name}", parameter=parameter, dim=0, removed=dims)
        for name in ("query", "key", "value")
        for parameter in ("weight", "bias")
    ]
    slices.append(Slice(module=f"{prefix}.out", parameter="weight", dim=1, removed=dims))
    edits = [RemoveUnits(root=f"{prefix}.value", units=dims, slices=tuple(slices))]
    if head_dim is not None:
        edits.append(SetAttribute(module=prefix, name="head_dim", value=head_dim))
    return Plan(edits=tuple(edits))


def test_a_whole_head_can_go():
    model, data = encoder(), sequences(16)
    certificate = certify(model, attention_removal((4, 5, 6, 7)), data)
    assert certificate.holds


@pytest.mark.parametrize(
    ("dims", "head_dim"),
    [((0, 1, 4, 5), None), ((3, 7, 11, 15), None), ((0, 1, 4, 5, 8, 9, 12, 13), 4), ((4, 5, 6, 7), 6)],
    ids=["heads cut anew", "one of each head", "half of each head, head_dim kept", "wrong head_dim"],
)
def test_heads_cut_in_another_way_are_found(dims, head_dim):
    model, data = encoder(), sequences(16)
    assert fails(model, attention_removal(dims, head_dim), data)


def test_the_wrong_grouping_of_a_zero_padded_shortcut_is_found():
    model, data = zero_padded(), images(16)
    assert fails(model, removal(model, data, "stem", [0, 4]), data)


def test_tied_embeddings_cut_by_hand_are_refused():
    """One feature of a residual stream that starts in an embedding, with a reader that is one index off."""
    model, data = tied(), tokens(16)
    plan = Plan(
        edits=(
            RemoveUnits(
                root="down",
                units=(2,),
                slices=(
                    Slice(module="down", parameter="weight", dim=0, removed=(2,)),
                    Slice(module="down", parameter="bias", dim=0, removed=(2,)),
                    Slice(module="up", parameter="weight", dim=1, removed=(3,)),
                    Slice(module="embedding", parameter="weight", dim=1, removed=(2,)),
                ),
            ),
        )
    )
    assert fails(model, plan, data)


class Scores(nn.Module):
    """Scores, and what a network may return beside or instead of them."""

    def __init__(self, returned):
        super().__init__()
        torch.manual_seed(0)
        self.score = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
        self.place = nn.Linear(12, 4)
        self.returned = returned

    def forward(self, inputs):
        return self.returned(self, inputs, self.score(inputs))


FORBIDDEN = torch.tensor([False, True, False])
HIDING = {
    "coordinates beside": lambda net, x, y: {"places": 1e5 * net.place(x), "scores": y},
    "empty outputs beside": lambda net, x, y: (y, x[:, :0]),
    "a mask": lambda net, x, y: y.masked_fill(FORBIDDEN, -1e9),
    "the least number": lambda net, x, y: y.masked_fill(FORBIDDEN, torch.finfo(y.dtype).min),
    "forbidden classes": lambda net, x, y: y.masked_fill(FORBIDDEN, -torch.inf),
    "masked scores beside": lambda net, x, y: {"scores": y, "masked": y.masked_fill(FORBIDDEN, -1e9)},
    "an offset": lambda net, x, y: 1e5 + 100 * y,
    "a mask that moves": lambda net, x, y: y.masked_fill(x[:, :3] > 0.5, -1e9),
}


@pytest.mark.parametrize("returned", HIDING.values(), ids=HIDING)
def test_large_numbers_do_not_hide_wrong_ones(returned):
    model, data = Scores(returned).eval(), vectors(16)
    plan = removal(model, data, "score.0", [1, 5])
    assert certify(model, plan, data).holds
    wrong = off_by_one(plan, "score.2")
    certificate = certify(model, wrong, data)
    assert not certificate.holds
    assert certificate.worst > 10
    assert "times what is allowed" in next(
        item.reason for item in keep_certified(model, wrong, data).vetoed if item.where == "score.0"
    )


@pytest.mark.parametrize("offset", [0.0, 30.0, 1e5])
def test_rounding_beside_a_large_constant_is_no_difference(offset):
    model, data = Scores(lambda net, x, y: y + offset).eval(), vectors(16)
    assert certify(model, removal(model, data, "score.0", [1, 5]), data).holds


@dataclass(slots=True)
class Slotted:
    hidden: object


HIDDEN = {
    "whole numbers": lambda h: h.argmax(1),
    "truth values": lambda h: h > 0.3,
    "complex numbers": lambda h: torch.fft.fft(h.sum(1)),
    "a number of python": lambda h: h.norm().item(),
    "an array": lambda h: h.detach().numpy(),
    "slots": Slotted,
    "a tensor called like a cache": lambda h: {"past_key_values": h},
}


@pytest.mark.parametrize("form", HIDDEN.values(), ids=HIDDEN)
def test_units_that_are_returned_in_any_form_are_not_removed(form):
    def returned(net, x, y):
        return y, form(net.score[1](net.score[0](x)))

    model, data = Scores(returned).eval(), vectors(16)
    with pytest.raises(CertificateError, match="reach the output"):
        certify(model, removal(model, data, "score.0", [1, 5]), data)


def test_a_choice_beside_the_scores_must_be_the_same():
    model, data = Scores(lambda net, x, y: (y, y.argmax(1))).eval(), vectors(16)
    plan = removal(model, data, "score.0", [1, 5])
    assert certify(model, plan, data).holds
    other = copy.deepcopy(model)
    other.returned = lambda net, x, y: (y, y.argmax(1) + 1)
    assert certify_network(model, other, Plan(), data).worst == np.inf


def test_units_that_a_norm_switched_off_can_go():
    """Their constant, what the norm adds, goes with them, in the masked original as in the pruned network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        model[1].weight[8:] = 0
        model[1].bias[8:] = torch.linspace(-1, 1, 8)
    before, data = copy.deepcopy(model.state_dict()), vectors(16)
    for units in (range(8, 16), [1, 15]):
        plan = removal(model, data, "0", units)
        assert masks_of(model, plan, data) == {"3": tuple(units)}
        assert certify(model, plan, data).holds
        assert not certify(model, off_by_one(plan, "3", -1), data).holds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_that_are_called_by_name_are_masked():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 3)

        def forward(self, inputs):
            return self.second(input=self.first(input=inputs).relu())

    model, data = Named().eval(), vectors(16)
    plan = removal(model, data, "first", [1, 5])
    assert masks_of(model, plan, data) == {"second": (1, 5)}
    assert certify(model, plan, data).holds


@pytest.mark.parametrize("most", [1, 7, 40])
def test_large_outputs_are_compared_in_parts(monkeypatch, most):
    model, data = Scores(lambda net, x, y: y[:, :, None] * x[:, None]).eval(), vectors(16)
    plan = removal(model, data, "score.0", [1, 5])
    wrong = off_by_one(plan, "score.2")
    whole = certify(model, wrong, data)
    monkeypatch.setattr(secateurs.certificate, "MOST", most)
    parts = certify(model, wrong, data)
    assert certify(model, plan, data).holds
    assert not parts.holds
    assert (parts.max_abs, parts.scale) == (whole.max_abs, whole.scale)


def test_a_single_number_for_all_examples_is_compared():
    model, data = Scores(lambda net, x, y: y.square().mean()).eval(), vectors(16)
    plan = removal(model, data, "score.0", [1, 5])
    assert certify(model, plan, data).holds
    assert not certify(model, off_by_one(plan, "score.2"), data).holds


def test_networks_that_draw_at_random_draw_the_same():
    model, data = Scores(lambda net, x, y: y + 0.1 * torch.randn_like(y)).eval(), vectors(16)
    plan = removal(model, data, "score.0", [1, 5])
    assert certify(model, plan, data).holds
    assert not certify(model, off_by_one(plan, "score.2"), data).holds


def test_inputs_that_are_changed_in_place_stay_as_they_were():
    def returned(net, x, y):
        return net.score(x.sub_(0.5))

    model, data = Scores(returned).eval(), vectors(16)
    before = {name: array.copy() for name, array in data.inputs.items()}
    assert certify(model, removal(model, data, "score.0", [1, 5]), data).holds
    assert all(np.array_equal(array, before[name]) for name, array in data.inputs.items())


class Strange(Exception):
    """An error that is none of python's."""


def test_edits_that_do_not_hold_together_are_left_out_from_the_last_on():
    """The network raises an error of its own where it has lost units of more than one layer."""

    class Needs(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(*[nn.Linear(12, 12) for _ in range(4)])

        def forward(self, inputs):
            if sum(layer.out_features < 12 for layer in self.layers) > 2:
                raise Strange("too narrow")
            for layer in self.layers:
                inputs = layer(inputs).tanh()
            return inputs

    model, data = Needs().eval(), vectors(16)
    plan = Plan()
    for root in ("layers.0", "layers.1", "layers.2"):
        plan += removal(model, data, root, [1])
    alone = keep_certified(model, plan, data)
    assert [edit.root for edit in alone.plan.of(RemoveUnits)] == ["layers.0", "layers.1"]
    assert alone.certificate.holds
    assert "Strange: too narrow" in alone.vetoed[0].reason


def test_the_longest_part_of_a_plan_that_holds_is_found(monkeypatch):
    """Differences add up over edits: a limit below what four of them add leaves the first three."""
    model, data = mlp(), vectors(16)
    steps = [removal(model, data, "0", [unit]) for unit in range(6)]
    for holding in range(7):
        joined = [len(Plan.join(steps[:count]).edits) for count in range(7)]

        def judge(original, plan, data, holding=holding, joined=joined):
            worst = 0.5 if len(plan.edits) <= joined[holding] else 2.0
            return Certificate(max_abs=0.0, scale=1.0, worst=worst)

        monkeypatch.setattr(secateurs.certificate, "certify", judge)
        count, certificate, why = secateurs.certificate._together(model, steps, data)
        assert count == holding
        assert ("2 times what is allowed" in why) == (holding < 6)
        assert (certificate is not None) == (holding > 0)


# --- what cannot be measured ------------------------------------------------------------------------------------------


def test_constant_outputs_certify_nothing():
    model, data = constant(), vectors(16)
    with pytest.raises(CertificateError, match="same for every example"):
        certify(model, removal(model, data, "0", [0, 1]), data)


def test_a_network_that_returns_its_choice_certifies_nothing():
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = mlp()

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.scores(inputs).argmax(1)

    data = vectors(16)
    plan = edited(removal(mlp(), data, "0", [0]), lambda p: p.model_copy(update={"module": f"scores.{p.module}"}))
    plan = Plan(edits=tuple(edit.model_copy(update={"root": "scores.0"}) for edit in plan.of(RemoveUnits)))
    with pytest.raises(CertificateError, match="return the scores instead"):
        certify(Chooses().eval(), plan, data)


def test_outputs_that_are_not_finite_certify_nothing():
    model, data = mlp(), vectors(16)
    with torch.no_grad():
        model[4].bias[0] = float("nan")
    with pytest.raises(CertificateError, match="returns NaN"):
        certify(model, removal(model, data, "0", [0]), data)


def test_units_of_the_output_certify_nothing():
    piece = Slice(module="4", parameter="weight", dim=0, removed=(0,))
    plan = Plan(edits=(RemoveUnits(root="4", units=(0,), slices=(piece,)),))
    with pytest.raises(CertificateError, match="'4' reach the output"):
        certify(mlp(), plan, vectors(8))


def test_a_plan_that_removes_nothing_from_a_producer_certifies_nothing():
    piece = Slice(module="2", parameter="weight", dim=1, removed=(0,))
    plan = Plan(edits=(RemoveUnits(root="0", units=(0,), slices=(piece,)),))
    with pytest.raises(CertificateError, match="no layer reads the units of '0'"):
        certify(mlp(), plan, vectors(8))


def test_a_plan_that_does_not_fit_is_a_certificate_error():
    model, data = mlp(), vectors(8)
    plan = edited(
        removal(model, data, "0", [0]), lambda p: p.model_copy(update={"removed": (99,)}) if p.module == "2" else p
    )
    with pytest.raises(CertificateError, match="index 99 is out of range"):
        certify(model, plan, data)


def test_the_original_is_untouched():
    model, data = residual().train(), images(16)
    state = copy.deepcopy(model.state_dict())
    plan = removal(model, data, "stem", [0, 3])
    certify(model, plan, data)
    keep_certified(model, plan, data)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("path", ["layers.9", "stem"], ids=["missing", "no block"])
def test_blocks_that_cannot_be_dropped_are_certificate_errors(path):
    with pytest.raises(CertificateError, match=r"no module 'layers.9'|masked original does not run"):
        certify(residual(), Plan(edits=(DropBlock(path=path),)), images(8))


def test_few_examples_are_reused():
    model, data = mlp(), vectors(3)
    assert certify(model, removal(model, data, "0", [0]), data).batch_sizes == [2, 3]


# --- vetoes -----------------------------------------------------------------------------------------------------------


def test_the_faulty_edit_is_vetoed_and_the_good_ones_are_kept():
    model, data = residual(), images(16)
    good = [removal(model, data, root, [0, 2]) for root in ("layers.0.conv1", "layers.3.conv1")]
    faulty = off_by_one(removal(model, data, "layers.1.conv1", [0, 2]), "layers.1.conv2")
    block = Plan(edits=(DropBlock(path="layers.2"),))  # a stage entry: its shapes differ
    certified = keep_certified(model, good[0] + faulty + block + good[1], data)
    assert certified.plan == good[0] + good[1]
    assert certified.certificate.holds
    assert [item.where for item in certified.vetoed] == ["layers.1.conv1", "layers.2"]
    assert "differs from the masked original by" in certified.vetoed[0].reason
    assert "does not run" in certified.vetoed[1].reason


def test_attributes_stand_and_fall_with_their_edit():
    model, data = separable(), images(16)
    good = removal(model, data, "1.excite", [0])
    faulty = off_by_one(removal(model, data, "2.excite", [0]), "2.project")
    certified = keep_certified(model, faulty + good, data)
    assert certified.plan == good


def test_an_attribute_alone_is_checked_too():
    model, data = encoder(), sequences(16)
    wrong = Plan(edits=(SetAttribute(module="layers.0.attention", name="head_dim", value=8),))
    certified = keep_certified(model, wrong, data)
    assert not certified.plan
    assert certified.certificate is None
    assert certified.vetoed[0].where == "layers.0.attention"


def test_nothing_left_has_no_certificate():
    model, data = constant(), vectors(16)
    certified = keep_certified(model, removal(model, data, "0", [0]), data)
    assert not certified.plan
    assert certified.certificate is None
    assert "same for every example" in certified.vetoed[0].reason
