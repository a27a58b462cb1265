"""Recalibration: the statistics it estimates, and that it never does harm."""

import copy

import numpy as np
import torch
from networks import images, mlp, residual, vectors
from torch import nn

from secateurs.forward import predict
from secateurs.outputs import kl_divergence
from secateurs.recalibration import recalibrate


def normed():
    """One norm on the input, so that its statistics are those of the data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 5))
    return model.eval()


def test_recalibration_averages_the_batches_and_restores_everything_else():
    data = images(48)
    values = data.inputs["input"].astype(np.float64)
    dense = normed()
    batches = [values[:24], values[24:]]
    mean = np.mean([batch.mean((0, 2, 3)) for batch in batches], axis=0)
    variance = np.mean([batch.transpose(1, 0, 2, 3).reshape(3, -1).var(1, ddof=1) for batch in batches], axis=0)
    dense[0].running_mean.copy_(torch.from_numpy(mean))
    dense[0].running_var.copy_(torch.from_numpy(variance))
    model = copy.deepcopy(dense)
    model[0].running_mean += 2
    model[0].running_var *= 5
    model[2].train()
    assert recalibrate(model, dense, data, images(32, seed=1), batch_size=24)
    np.testing.assert_allclose(model[0].running_mean, mean, atol=1e-5)
    np.testing.assert_allclose(model[0].running_var, variance, rtol=1e-5)
    assert model[0].momentum == 0.1
    assert [module.training for module in model.modules()] == [False, False, False, True]
    assert torch.equal(model[2].weight, dense[2].weight)


def test_recalibration_that_does_not_help_is_undone():
    model = residual()
    dense = copy.deepcopy(model)  # the same function: no statistics can be better
    state = copy.deepcopy(model.state_dict())
    assert recalibrate(model, dense, images(48), images(32, seed=1)) is False
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(module.momentum == 0.1 for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_recalibration_never_raises_the_held_out_divergence():
    calibration, held_out = images(64), images(64, seed=1)
    for seed in range(4):
        dense = residual(seed=seed)
        model = copy.deepcopy(dense)
        with torch.no_grad():
            model.layers[1].conv2.weight[:, :3] = 0
            model.bn.running_mean += 0.3 * seed
        reference = predict(dense, held_out)
        before = kl_divergence(reference, predict(model, held_out))
        kept = recalibrate(model, dense, calibration, held_out)
        after = kl_divergence(reference, predict(model, held_out))
        assert (after < before) if kept else (after == before)


def test_a_network_without_norms_has_nothing_to_recalibrate():
    assert recalibrate(mlp(), mlp(), vectors(8), vectors(8)) is False
