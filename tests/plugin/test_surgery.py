"""Surgery: what changes, what must not, and what is refused."""

import copy

import pytest
import torch
from networks import NETWORKS, mlp, plain, residual, reused, separable, tied
from torch import nn

from secateurs.errors import PlanError
from secateurs.forward import call
from secateurs.groups import find_groups, plan_removal
from secateurs.plan import AddBias, DropBlock, Plan, RemoveUnits, SetAttribute, Slice
from secateurs.surgery import applied, apply_plan, keep_indices


def cut(*pieces):
    """One edit from (module, parameter, dim, removed) tuples."""
    slices = tuple(
        Slice(module=module, parameter=parameter, dim=dim, removed=removed)
        for module, parameter, dim, removed in pieces
    )
    return Plan(edits=(RemoveUnits(root="test", units=pieces[0][3], slices=slices),))


HIDDEN = cut(("0", "weight", 0, (1, 4)), ("0", "bias", 0, (1, 4)), ("2", "weight", 1, (1, 4)))


def test_slices_take_away_exactly_the_named_indices():
    model = mlp()
    pruned = applied(model, HIDDEN)
    kept = [index for index in range(16) if index not in (1, 4)]
    assert torch.equal(pruned[0].weight, model[0].weight[kept])
    assert torch.equal(pruned[0].bias, model[0].bias[kept])
    assert torch.equal(pruned[2].weight, model[2].weight[:, kept])
    assert torch.equal(pruned[2].bias, model[2].bias)


def test_applied_leaves_the_model_and_shares_nothing():
    model = mlp()
    state = copy.deepcopy(model.state_dict())
    pruned = applied(model, HIDDEN)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.fill_(7)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_apply_plan_changes_in_place_and_returns_the_model():
    model = mlp()
    assert apply_plan(model, HIDDEN) is model
    assert model[0].weight.shape == (14, 12)


def test_edits_refer_to_the_structure_left_by_those_before():
    model = mlp()
    twice = cut(("0", "weight", 0, (0,)), ("0", "bias", 0, (0,)), ("2", "weight", 1, (0,)))
    pruned = applied(model, twice + twice)
    assert torch.equal(pruned[0].weight, model[0].weight[2:])
    assert torch.equal(pruned[2].weight, model[2].weight[:, 2:])


def test_two_dimensions_of_one_tensor_go_in_one_edit():
    model = residual()
    pruned = applied(model, cut(("layers.1.conv1", "weight", 0, (0,)), ("layers.1.conv1", "weight", 1, (2, 3))))
    expected = model.layers[1].conv1.weight[1:, [0, 1, 4, 5, 6, 7]]
    assert torch.equal(pruned.layers[1].conv1.weight, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_dtype_and_requires_grad_are_kept(dtype, trainable):
    model = mlp().to(dtype)
    model[0].weight.requires_grad_(trainable)
    pruned = applied(model, HIDDEN)
    assert pruned[0].weight.dtype == dtype
    assert pruned[0].weight.requires_grad is trainable
    assert pruned[0].bias.requires_grad
    assert isinstance(pruned[0].weight, nn.Parameter)
    assert pruned[0].weight.is_leaf


def test_modes_are_kept():
    model = plain().train()
    model[5].eval()
    pruned = applied(model, cut(("0", "weight", 0, (1,)), ("0", "bias", 0, (1,)), ("2", "weight", 1, (1,))))
    assert [module.training for module in pruned.modules()] == [module.training for module in model.modules()]


@pytest.mark.parametrize("named", [("embedding",), ("head",), ("embedding", "head")], ids="+".join)
def test_tied_tensors_are_sliced_once_and_stay_tied(named):
    model = tied()
    pieces = [(name, "weight", 1, (2, 5)) for name in named]
    pieces += [("up", "weight", 1, (2, 5)), ("down", "weight", 0, (2, 5)), ("down", "bias", 0, (2, 5))]
    pruned = applied(model, cut(*pieces))
    assert pruned.head.weight is pruned.embedding.weight
    assert torch.equal(pruned.head.weight, model.head.weight[:, [0, 1, 3, 4, 6, 7]])
    assert len(list(pruned.parameters())) == len(list(model.parameters()))
    assert pruned(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, 20)


def test_a_module_with_two_names_is_sliced_once():
    model = reused()
    pieces = [(name, "weight", dim, (3,)) for name in ("shared", "alias") for dim in (0, 1)]
    pieces += [("shared", "bias", 0, (3,)), ("first", "weight", 0, (3,)), ("first", "bias", 0, (3,))]
    pruned = applied(model, cut(*pieces, ("hidden", "weight", 1, (3,))))
    assert pruned.shared is pruned.alias
    assert pruned.shared.weight.shape == (7, 7)
    assert pruned(torch.zeros(2, 12)).shape == (2, 5)


def test_shared_buffers_stay_shared():
    model = nn.Module()
    model.a, model.b = nn.Module(), nn.Module()
    model.a.register_buffer("table", torch.arange(5.0))
    model.b.register_buffer("table", model.a.table)
    pruned = applied(model, cut(("a", "table", 0, (1, 2))))
    assert pruned.a.table is pruned.b.table
    assert pruned.a.table.tolist() == [0.0, 3.0, 4.0]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_group_of_every_network_still_runs_with_matching_attributes(name):
    build, make = NETWORKS[name]
    model, data = build(), make(2)
    for group in find_groups(model, data)[0]:
        if group.root.endswith("attention.value"):
            continue  # cut heads need other attributes; see the certificates
        pruned = applied(model, plan_removal(model, group, [0], "test"))
        assert call(pruned, data).shape == call(model, data).shape
        for layer in pruned.modules():
            if isinstance(layer, nn.Linear):
                assert layer.weight.shape == (layer.out_features, layer.in_features)
            elif isinstance(layer, nn.Conv2d):
                assert layer.weight.shape[:2] == (layer.out_channels, layer.in_channels // layer.groups)
            elif isinstance(layer, nn.BatchNorm2d):
                assert {len(layer.weight), len(layer.bias), len(layer.running_mean), len(layer.running_var)} == {
                    layer.num_features
                }


def test_a_dropped_block_is_the_identity():
    model = residual()
    pruned = applied(model, Plan(edits=(DropBlock(path="layers.1"),)))
    value = torch.randn(2, 8, 4, 4)
    assert pruned.layers[1](value) is value
    assert isinstance(model.layers[1], type(model.layers[0]))


def test_a_bias_is_added_as_zeros():
    model = residual()
    pruned = applied(model, Plan(edits=(AddBias(module="stem"),)))
    assert torch.equal(pruned.stem.bias, torch.zeros(8))
    assert pruned.stem.bias.requires_grad
    value = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(pruned(value), model(value))


def test_a_bias_of_a_transposed_convolution_has_its_output_width():
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False))
    pruned = applied(model, Plan(edits=(AddBias(module="0"),)))
    assert pruned[0].bias.shape == (6,)
    assert pruned(torch.zeros(1, 4, 3, 3)).shape == (1, 6, 4, 4)


@pytest.mark.parametrize("value", [5, True, 0.5, "word", None, (1, 2)], ids=repr)
def test_attributes_are_set(value):
    pruned = applied(mlp(), Plan(edits=(SetAttribute(module="0", name="out_features", value=value),)))
    assert pruned[0].out_features == value


def test_attributes_of_plain_objects_are_reached_by_dots():
    class Config:
        heads = 4

    model = mlp()
    model.config = Config()
    pruned = applied(model, Plan(edits=(SetAttribute(module="", name="config.heads", value=2),)))
    assert pruned.config.heads == 2
    assert model.config.heads == 4


def attribute(name, module="0"):
    return Plan(edits=(SetAttribute(module=module, name=name, value=3),))


REFUSED = {
    "no such module": (cut(("9", "weight", 0, (0,))), "no module '9'"),
    "no such parameter": (cut(("0", "scale", 0, (0,))), "no tensor 'scale'"),
    "not a tensor": (cut(("0", "in_features", 0, (0,))), "no tensor 'in_features'"),
    "no such dimension": (cut(("0", "weight", 2, (0,))), "no dimension 2"),
    "out of range": (cut(("0", "weight", 0, (16,))), "index 16 is out of range for a dimension of size 16"),
    "everything": (cut(("0", "weight", 0, tuple(range(16)))), "all 16 indices"),
    "no such block": (Plan(edits=(DropBlock(path="layers.7"),)), "no module 'layers.7'"),
    "the whole network": (Plan(edits=(DropBlock(path=""),)), "the network itself"),
    "a second bias": (Plan(edits=(AddBias(module="0"),)), "cannot take a bias"),
    "a bias without a weight": (Plan(edits=(AddBias(module="1"),)), "cannot take a bias"),
    "unknown attribute": (attribute("depth"), "no plain attribute 'depth'"),
    "a parameter": (attribute("weight"), "no plain attribute 'weight'"),
    "a parameter that is not there": (attribute("bias"), "no plain attribute 'bias'"),
    "a module": (attribute("0", module=""), "no plain attribute '0'"),
    "a method": (attribute("forward"), "no plain attribute 'forward'"),
    "a private attribute": (attribute("_parameters"), "no plain attribute"),
    "the class": (attribute("__class__.training"), "no plain attribute"),
    "a missing path": (attribute("config.heads"), "no plain attribute"),
}


@pytest.mark.parametrize(("plan", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(plan, message):
    with pytest.raises(PlanError, match=message) as caught:
        applied(mlp(), plan)
    assert str(caught.value).startswith("edit 0 (")


def test_a_parametrised_tensor_is_refused_and_not_silently_left():
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(PlanError, match="parametrisation"):
        applied(model, HIDDEN)


def test_depthwise_attributes_shrink_together():
    model = separable()
    group = next(group for group in find_groups(model, NETWORKS["separable"][1](2))[0] if group.root == "1.excite")
    pruned = applied(model, plan_removal(model, group, [0, 5], "test"))
    depthwise = pruned[1].depthwise
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (10, 10, 10)


def test_keep_indices():
    assert keep_indices(5, (0, 3)).tolist() == [1, 2, 4]
    assert keep_indices(3, ()).tolist() == [0, 1, 2]
