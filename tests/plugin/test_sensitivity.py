"""Output sensitivity against the exact expectation over the network's own labels."""

import copy

import numpy as np
import pytest
import torch
from networks import encoder, images, mlp, plain, residual, sequences, vectors

from secateurs.data import Dataset
from secateurs.sensitivity import output_sensitivity


def exact(model, name, data):
    """The mean over examples of the squared gradient of -log p(y), summed over positions, in expectation over y ~ p."""
    value = torch.from_numpy(next(iter(data.inputs.values())))
    total = 0.0
    for row in value.split(1):
        kept = {}
        handle = model.get_submodule(name).register_forward_hook(lambda _, __, output, k=kept: k.update(output=output))
        log_p = torch.log_softmax(model(row), -1)[0]
        handle.remove()
        for label in range(len(log_p)):
            (gradient,) = torch.autograd.grad(-log_p[label], kept["output"], retain_graph=True)
            squared = gradient.double().square()
            squared = squared.sum((0, 2, 3)) if squared.ndim == 4 else squared.flatten(0, -2).sum(0)
            total = total + float(log_p[label].detach().exp()) * squared
    return (total / len(value)).numpy()


CASES = {
    "linear": (mlp, vectors, ["0", "2", "4"]),
    "convolution": (plain, images, ["0", "2", "5"]),
    "residual": (residual, images, ["stem", "layers.2.projection.0", "layers.3.conv2"]),
    "tokens": (encoder, sequences, ["layers.0.up", "layers.1.attention.value"]),
}


@pytest.mark.parametrize(("build", "make", "names"), CASES.values(), ids=CASES)
def test_equals_the_expectation_over_the_networks_own_labels(build, make, names):
    model, few = build(), make(6)
    often = Dataset({key: np.tile(value, (150, *(1,) * (value.ndim - 1))) for key, value in few.inputs.items()})
    found = output_sensitivity(model, names, often, batch_size=100)
    for name in names:
        expected = exact(model, name, few)
        assert found[name].dtype == torch.float64
        assert found[name].shape == expected.shape
        large = expected > 0.1 * expected.max()
        np.testing.assert_allclose(found[name].numpy()[large], expected[large], rtol=0.25)
        assert found[name].sum() == pytest.approx(expected.sum(), rel=0.1)


def test_logits_have_the_variance_of_their_label():
    model, data = mlp(), vectors(4000)
    with torch.no_grad():
        p = torch.softmax(model(torch.from_numpy(data.inputs["input"])), -1)
    expected = (p * (1 - p)).mean(0)
    np.testing.assert_allclose(output_sensitivity(model, ["4"], data)["4"], expected, rtol=0.1)


def test_operations_in_place_do_not_change_it():
    data = images(16)
    names = ["0", "2", "5"]
    separate, in_place = (output_sensitivity(plain(in_place=flag), names, data) for flag in (False, True))
    for name in names:
        torch.testing.assert_close(in_place[name], separate[name], rtol=0, atol=0)


def test_a_dead_channel_matters_to_nobody():
    model = plain()
    with torch.no_grad():
        model[2].weight[:, 3] = 0
    found = output_sensitivity(model, ["0"], images(16))["0"]
    assert float(found[3]) == 0.0
    assert float(found.sum()) > 0


def test_batches_do_not_matter_where_labels_are_certain():
    model = mlp()
    with torch.no_grad():
        model[4].weight *= 200
        model[4].bias[0] += 1e4
    data = vectors(20)
    whole, parts = (output_sensitivity(model, ["2"], data, batch_size=size)["2"] for size in (20, 7))
    torch.testing.assert_close(whole, parts)


def test_the_model_and_the_random_state_are_untouched():
    model = residual().train()
    model.stem.weight.requires_grad_(False)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first, second = (output_sensitivity(model, ["stem"], images(8), seed=4)["stem"] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.stem.weight.requires_grad
    assert all(module.training and not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("build", "make", "names"), CASES.values(), ids=CASES)
def test_pairs_of_channels_have_single_channels_on_their_diagonal(build, make, names):
    model, data = build(), make(12)
    singles, pairs = (output_sensitivity(model, names, data, pairs=flag, batch_size=5) for flag in (False, True))
    for name in names:
        matrix = pairs[name]
        torch.testing.assert_close(matrix.diagonal(), singles[name])
        torch.testing.assert_close(matrix, matrix.T)
        assert float(torch.linalg.eigvalsh(matrix)[0]) > -1e-9 * float(matrix.trace())


def test_pairs_of_logits_have_the_covariance_of_their_labels():
    model, data = mlp(), vectors(4000)
    with torch.no_grad():
        p = torch.softmax(model(torch.from_numpy(data.inputs["input"])), -1)
    expected = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    found = output_sensitivity(model, ["4"], data, pairs=True)["4"]
    np.testing.assert_allclose(found, expected, atol=0.1 * float(expected.max()))
