"""Predictions as rows of classes or as values: how far two of them are apart, and how wrong one is."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax
from torch import nn
from torch.nn import functional

from secateurs.data import IGNORED
from secateurs.outputs import (
    joined,
    kl_divergence,
    label_loss,
    own_labels,
    prediction_rows,
    sampled_loss,
    soft_loss,
    unsure_temperature,
)
from secateurs.script import prune


def logits(n=50, classes=10, scale=1.0, seed=0):
    return scale * torch.from_numpy(np.random.default_rng(seed).normal(size=(n, classes)))


@pytest.mark.parametrize(("axis", "shape"), [(0, (5, 3)), (0, (5, 3, 4, 4)), (1, (7, 5, 3))])
def test_joined_predictions_have_the_rows_of_all_batches(axis, shape):
    found = torch.randn(shape)
    parts = found.split([3, 2], axis)
    rows = prediction_rows(joined(parts))
    assert torch.equal(rows, torch.cat([prediction_rows(part) for part in parts]))
    assert axis or torch.equal(joined(parts), found)


def test_the_divergence_of_a_single_value_is_relative_to_it():
    assert kl_divergence(torch.tensor([4.0]), torch.tensor([3.0])) == pytest.approx(1 / 32)


def test_joined_scalars_are_values():
    assert joined([torch.tensor(1.0), torch.tensor(2.0)]).tolist() == [1.0, 2.0]


@given(st.floats(0.5, 16), st.integers(2, 20), st.integers(0, 100))
def test_the_divergence_is_that_of_the_softened_distributions(temperature, classes, seed):
    r, c = logits(7, classes, 3, seed), logits(7, classes, 3, seed + 1000)
    p, q = (softmax(values.numpy() / temperature, axis=1) for values in (r, c))
    expected = temperature**2 * rel_entr(p, q).sum(1).mean()
    assert kl_divergence(r, c, temperature) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_broken_network_is_infinitely_far():
    broken = logits()
    broken[3, 2] = float("nan")
    assert kl_divergence(logits(), broken, 4.0) == float("inf")


@given(st.floats(0.1, 200), st.integers(0, 50))
def test_the_temperature_is_the_least_that_leaves_doubt(scale, seed):
    r = logits(scale=scale, seed=seed)
    found = unsure_temperature(r)

    def doubt(temperature):
        p = softmax(r.numpy() / temperature, axis=1)
        return -(p * np.log(np.maximum(p, 1e-300))).sum(1).mean() / np.log(10)

    assert found in (1, 2, 4, 8, 16)
    assert found == 16 or doubt(found) >= 0.2 - 1e-12
    assert found == 1 or doubt(found / 2) < 0.2


def test_maps_have_their_classes_on_axis_one():
    r, c = logits(2 * 5 * 6, 4, seed=1), logits(2 * 5 * 6, 4, seed=2)
    maps = [values.reshape(2, 5, 6, 4).permute(0, 3, 1, 2) for values in (r, c)]
    assert kl_divergence(*maps) == pytest.approx(kl_divergence(r, c), rel=1e-12)
    assert unsure_temperature(30 * maps[0]) == unsure_temperature(30 * r)
    assert torch.equal(prediction_rows(maps[0]), r)
    assert torch.equal(own_labels(maps[0]), r.argmax(-1).reshape(2, 5, 6))


@pytest.mark.parametrize("shape", [(40,), (40, 1), (4, 1, 5, 2)])
def test_values_are_compared_as_gaussians(shape):
    """A softmax over one class is constant: by it, every pruned regression would be perfect."""
    generator = np.random.default_rng(0)
    r, c = (torch.from_numpy(3 + 2 * generator.normal(size=shape)) for _ in range(2))
    spread = r.numpy().var()
    assert kl_divergence(r, c) == pytest.approx(((r - c).numpy() ** 2).mean() / (2 * spread))
    assert kl_divergence(r, r) == 0
    assert kl_divergence(torch.ones(shape), torch.zeros(shape)) == float("inf")
    assert unsure_temperature(r) == 1
    assert torch.equal(own_labels(r).flatten(), r.flatten())


def test_losses_by_labels_of_classes_and_of_values():
    rows, labels = logits(6, 3), torch.tensor([[0, 2, IGNORED], [1, 1, IGNORED]])
    kept = [0, 1, 3, 4]
    expected = functional.cross_entropy(rows[kept], labels.flatten()[kept], reduction="sum")
    assert float(label_loss(rows, labels)) == pytest.approx(float(expected))
    values = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    assert float(label_loss(values, torch.tensor([0.0, 1.0]))) == pytest.approx(5)
    assert soft_loss(values, torch.zeros(2, 1), 4.0).tolist() == pytest.approx([0.5, 4.5])
    r, c = logits(7, 4, 3, 1), logits(7, 4, 3, 2)
    assert float(soft_loss(c, r, 2.0).mean()) == pytest.approx(kl_divergence(r, c, 2.0))


@pytest.mark.parametrize("classes", [1, 5])
def test_gradients_at_drawn_labels_have_mean_zero_and_the_information_as_variance(classes):
    torch.manual_seed(0)
    rows = logits(1, classes).repeat(20000, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(sampled_loss(rows), rows)
    p = torch.softmax(rows[0].detach(), -1)
    fisher = torch.eye(1).double() if classes == 1 else p.diag() - p.outer(p)
    assert gradient.mean(0).abs().max() < 0.03
    assert torch.allclose(gradient.T @ gradient / len(rows), fisher, atol=0.03)


def test_the_allocation_of_a_regression_looks_at_its_values():
    """Half of the units of the first layer reach the output through a weight near zero; measured allocation has to see that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    with torch.no_grad():
        model[2].weight[:, ::2] *= 1e-4
    x = torch.randn(256, 6)
    result = prune(model, x[:2], [x], [{"mi-nodes": {"target_macs": 0.6, "grid": 4}}])
    assert result.model[0].out_features < 12
    with torch.no_grad():
        error = (result.model(x) - model(x)).square().mean() / model(x).var()
    assert float(error) < 0.1
