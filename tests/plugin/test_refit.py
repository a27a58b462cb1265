"""Refit against numpy's least squares, and what it does to the output of a pruned network."""

import copy

import numpy as np
import pytest
import torch
from networks import dense, images, mlp, plain, residual, separable, vectors
from torch import nn
from torch.nn import functional as F

from secateurs.data import Dataset
from secateurs.forward import call, predict
from secateurs.groups import find_groups, plan_removal
from secateurs.moments import PairedMoments
from secateurs.outputs import kl_divergence
from secateurs.plan import Plan
from secateurs.prefix import Prefix, Timeline
from secateurs.probe import execution_order
from secateurs.refit import following_norms, paired_moments, refit, refittable, solve
from secateurs.rows import reader_moments
from secateurs.surgery import applied


def removal(model, data, **units):
    """Return a plan that removes units of some groups; dots in root names are written as double underscores."""
    groups = {group.root: group for group in find_groups(model, data.take(range(2)))[0]}
    plan = Plan()
    for root, indices in units.items():
        name = root.strip("_").replace("__", ".")
        plan += plan_removal(model, groups[name], indices, "test", plan)
    return plan


def observed(model, name, data):
    """Return the input and the output of one layer."""
    seen = {}
    handle = model.get_submodule(name).register_forward_hook(
        lambda _, args, output: seen.update(x=args[0].detach().clone(), y=output.detach().clone())
    )
    with torch.no_grad():
        call(model, data)
    handle.remove()
    return seen["x"], seen["y"]


def gathered(x, y):
    moments = PairedMoments.zeros(x.shape[1], y.shape[1])
    moments.update(torch.from_numpy(x), torch.from_numpy(y))
    return moments


@pytest.fixture
def rows():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(200, 6)) @ generator.normal(size=(6, 6)) + 1.5
    y = x @ generator.normal(size=(6, 4)) + generator.normal(size=(200, 4)) + 3
    return x, y


def test_solve_with_a_constant_is_ordinary_least_squares(rows):
    x, y = rows
    solution = solve(gathered(x, y), torch.zeros(4, 6), constant=True, ridge=1e-12)
    expected = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)[0].T
    np.testing.assert_allclose(solution.weight, expected[:, :6], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(solution.shift, expected[:, 6], rtol=1e-6, atol=1e-8)


def test_solve_without_a_constant_uses_the_uncentred_moments(rows):
    x, y = rows
    solution = solve(gathered(x, y), torch.zeros(4, 6), constant=False, ridge=1e-12)
    np.testing.assert_allclose(solution.weight, np.linalg.lstsq(x, y, rcond=None)[0].T, rtol=1e-6, atol=1e-8)
    assert solution.shift is None


def test_the_ridge_pulls_towards_the_current_weight(rows):
    x, y = rows
    current = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for constant in (True, False):
        solution = solve(gathered(x, y), current, constant=constant, ridge=1e9)
        torch.testing.assert_close(solution.weight, current, rtol=0, atol=1e-6)


def test_solve_is_the_ridge_regression_of_the_difference(rows):
    x, y = rows
    current = np.random.default_rng(1).normal(size=(4, 6))
    ridge = 0.3
    solution = solve(gathered(x, y), torch.from_numpy(current), constant=False, ridge=ridge)
    damping = np.sqrt(len(x) * ridge * (x**2).mean()) * np.eye(6)
    stacked = np.linalg.lstsq(np.r_[x, damping], np.r_[y - x @ current.T, np.zeros((6, 4))], rcond=None)[0]
    np.testing.assert_allclose(solution.weight, current + stacked.T, rtol=1e-8)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_refitted_linear_consumer_is_the_least_squares_map_to_the_dense_output(bias):
    original, data = mlp(bias=bias), vectors(400)
    plan = removal(original, data, _0=[1, 4, 5, 9, 12])
    pruned = applied(original, plan)
    names = list(pruned.state_dict())
    assert refit(pruned, original, plan, ["2"], data, ridge=1e-9) == ["2"]
    x, _ = observed(pruned, "2", data)
    _, y = observed(original, "2", data)
    x, y = x.double().numpy(), y.double().numpy()
    if bias:
        x = np.c_[x, np.ones(len(x))]
    expected = np.linalg.lstsq(x, y, rcond=None)[0].T
    np.testing.assert_allclose(pruned[2].weight.detach(), expected[:, :11], atol=2e-3)
    if bias:
        np.testing.assert_allclose(pruned[2].bias.detach(), expected[:, 11], atol=2e-3)
    assert list(pruned.state_dict()) == names, "refit adds no parameter"


def test_only_the_outputs_that_are_left_are_targets():
    original, data = mlp(), vectors(400)
    plan = removal(original, data, _0=[0, 7], _2=[2, 3])
    pruned = applied(original, plan)
    refit(pruned, original, plan, ["2"], data, ridge=1e-9)
    x, _ = observed(pruned, "2", data)
    _, y = observed(original, "2", data)
    kept = [index for index in range(10) if index not in (2, 3)]
    expected = np.linalg.lstsq(np.c_[x.double(), np.ones(len(x))], y.double()[:, kept], rcond=None)[0].T
    np.testing.assert_allclose(pruned[2].weight.detach(), expected[:, :-1], atol=2e-3)


def test_the_constant_of_a_convolution_is_folded_into_the_norm_behind_it():
    original, data = residual(), images(32)
    plan = removal(original, data, layers__0__conv1=[0, 3, 5])
    pruned = applied(original, plan)
    statistics = copy.deepcopy(pruned.layers[0].bn2.state_dict())
    refit(pruned, original, plan, ["layers.0.conv2"], data, ridge=1e-9)
    x, _ = observed(pruned, "layers.0.conv2", data)
    _, y = observed(original, "layers.0.conv2", data)
    rows = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1).double().numpy()
    targets = y.flatten(2).transpose(1, 2).flatten(0, 1).double().numpy()
    expected = np.linalg.lstsq(np.c_[rows, np.ones(len(rows))], targets, rcond=None)[0].T
    conv, norm = pruned.layers[0].conv2, pruned.layers[0].bn2
    np.testing.assert_allclose(conv.weight.detach().flatten(1), expected[:, :-1], atol=2e-3)
    assert conv.bias is None
    mean = original.layers[0].bn2.running_mean.double().numpy() - expected[:, -1]
    np.testing.assert_allclose(norm.running_mean, mean, atol=2e-3)
    for key in ("weight", "bias", "running_var"):
        assert torch.equal(norm.state_dict()[key], statistics[key])
    # What the norm puts out is the best affine fit of what it put out before.
    fitted = (np.c_[rows, np.ones(len(rows))] @ expected.T - original.layers[0].bn2.running_mean.numpy()) / np.sqrt(
        norm.running_var.numpy() + norm.eps
    )
    fitted = fitted * norm.weight.detach().numpy() + norm.bias.detach().numpy()
    _, out = observed(pruned, "layers.0.bn2", data)
    np.testing.assert_allclose(out.flatten(2).transpose(1, 2).flatten(0, 1), fitted, atol=5e-3)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_nothing_changes_when_nothing_was_removed(bias):
    original, data = mlp(bias=bias), vectors(200)
    twin = copy.deepcopy(original)
    refit(twin, original, Plan(), ["0", "2", "4"], data)
    for before, after in zip(original.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


CASES = {
    "residual stream": (residual, images, {"stem": [0, 2, 5], "layers__1__conv1": [1, 4], "layers__3__conv1": [3, 4, 5]}),
    "plain": (plain, images, {"_0": [1, 4], "_2": [0, 3, 5], "_5": [2, 6]}),
    "concatenation": (dense, images, {"first": [1, 2], "second": [0], "third": [3, 4]}),
    "depthwise": (separable, images, {"_1__excite": [1, 2, 7, 9], "_2__project": [0, 5]}),
    "mlp": (mlp, vectors, {"_0": [0, 3, 4, 8, 11], "_2": [2, 5, 9]}),
}  # fmt: skip


@pytest.mark.parametrize(("build", "make", "units"), CASES.values(), ids=CASES)
def test_refit_lowers_the_held_out_divergence(build, make, units):
    original, data, held_out = build(), make(128), make(64, seed=1)
    plan = removal(original, data, **units)
    pruned = applied(original, plan)
    state = copy.deepcopy(original.state_dict())
    reference = predict(original, held_out)
    before = kl_divergence(reference, predict(pruned, held_out))
    readers = {piece.module for edit in plan.of(type(plan.edits[0])) for piece in edit.slices if piece.dim == 1}
    order = [name for name in execution_order(pruned, data.take([0, 1])) if name in readers]
    seen = []
    done = refit(pruned, original, plan, order, data, progress=lambda number, total: seen.append((number, total)))
    assert done == order
    assert seen == [(number, len(order)) for number in range(len(order))]
    after = kl_divergence(reference, predict(pruned, held_out))
    assert after < 0.7 * before
    assert all(torch.equal(value, state[key]) for key, value in original.state_dict().items())


def test_layers_that_cannot_be_refitted_are_left_out():
    original, data = separable(), images(16)
    assert not refittable(original[1].depthwise)
    assert refit(copy.deepcopy(original), original, Plan(), ["1.depthwise", "1.project"], data) == ["1.project"]


def test_moments_are_the_same_for_any_batch_size_and_bounded_by_rows():
    original, data = residual(), images(24)
    pruned = applied(original, removal(original, data, layers__0__conv1=[0]))
    whole, parts = (paired_moments(pruned, original, "layers.0.conv2", data, batch_size=size) for size in (24, 7))
    assert whole.x.count == parts.x.count == 24 * 64
    np.testing.assert_allclose(whole.cross, parts.cross, rtol=1e-4, atol=1e-5)
    few = paired_moments(pruned, original, "layers.0.conv2", data, batch_size=8, rows=240)
    assert few.x.count == 240


NORMED = {
    "straight": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), {"0": "1"}),
    "through relu": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), {}),
    "through relu in place": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4)), {}),
    "without statistics": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), {}),
    "depthwise between": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4)), {}),
}


@pytest.mark.parametrize(("model", "expected"), NORMED.values(), ids=NORMED)
def test_following_norms(model, expected):
    assert following_norms(model.eval(), images(2)) == expected


def test_following_norms_of_a_residual_network():
    found = following_norms(residual(), images(2))
    assert found["stem"] == "bn"
    assert found["layers.2.projection.0"] == "layers.2.projection.1"
    assert "head" not in found


class Tokens(nn.Module):
    """Two linear layers on embedded tokens; the mask is not used, as padding changes nothing for other tokens."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.first = nn.Linear(8, 6)
        self.second = nn.Linear(6, 4)

    def forward(self, input_ids, attention_mask):
        return self.second(torch.relu(self.first(self.embedding(input_ids))))


def padded(lengths, length=12, seed=0):
    generator = np.random.default_rng(seed)
    ids = generator.integers(1, 30, size=(len(lengths), length))
    mask = (np.arange(length) < np.array(lengths)[:, None]).astype(np.int64)
    return Dataset({"input_ids": ids * mask, "attention_mask": mask}, keyword=True)


def test_padding_has_no_part_in_the_statistics():
    torch.manual_seed(0)
    model, data = Tokens().eval(), padded([3, 12, 7, 1, 9] * 4)
    moments = paired_moments(model, model, "second", data, batch_size=8)
    x, y = observed(model, "second", data)
    real = torch.from_numpy(data.tokens)
    assert moments.x.count == data.tokens.sum()
    assert torch.allclose(moments.x.mean, x[real].double().mean(0), atol=1e-6)
    assert torch.allclose(moments.mean_y, y[real].double().mean(0), atol=1e-6)
    survey = reader_moments(model, ["second"], data, batch_size=8)["second"][0]
    assert survey.count == data.tokens.sum()
    assert torch.allclose(survey.second, moments.x.second, atol=1e-6)


def test_moments_from_resumed_passes_are_those_from_whole_ones():
    original, data = residual(), images(24)
    pruned = applied(original, removal(original, data, layers__0__conv1=[0, 3]))
    name = "layers.1.conv2"
    ends = tuple(Prefix(network, data, [name], Timeline(network, data), batch_size=8) for network in (pruned, original))
    assert all(prefix.modules for prefix in ends)
    whole = paired_moments(pruned, original, name, data, batch_size=8)
    resumed = paired_moments(pruned, original, name, data, batch_size=8, prefixes=ends)
    assert torch.equal(whole.x.sum_xx, resumed.x.sum_xx)
    assert torch.equal(whole.sum_yx, resumed.sum_yx)
