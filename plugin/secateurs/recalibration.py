"""Recalibration of BatchNorm statistics on calibration data: no gradients, and kept only where it helps."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from secateurs.data import Dataset
from secateurs.forward import call, predict
from secateurs.layers import NORMS
from secateurs.outputs import kl_divergence

__all__ = ["estimate_statistics", "recalibrate"]


def recalibrate(
    model: nn.Module, dense: nn.Module, calibration: Dataset, held_out: Dataset, *, batch_size: int = 128
) -> bool:
    """Re-estimate the running statistics of every BatchNorm in place, and keep them only if the held-out divergence falls.

    Args:
        model: the pruned network.
        dense: the network whose predictions it should keep.
        calibration: examples for the statistics.
        held_out: other examples, for the decision.
        batch_size: examples per forward pass.

    Returns:
        Whether the new statistics were kept.
    """
    norms = _norms(model)
    if not norms:
        return False
    reference = predict(dense, held_out)
    before = kl_divergence(reference, predict(model, held_out))
    saved = [copy.deepcopy(norm.state_dict()) for norm in norms]
    estimate_statistics(model, calibration, batch_size=batch_size)
    if kl_divergence(reference, predict(model, held_out)) < before:
        return True
    for norm, state in zip(norms, saved, strict=True):
        norm.load_state_dict(state)
    return False


def estimate_statistics(model: nn.Module, data: Dataset, *, batch_size: int = 128) -> bool:
    """Set the running statistics of every BatchNorm to the mean over the batches of `data`, in place.

    Args:
        model: the network; modes and momenta come out as they went in.
        data: the examples; a batch of one is left out.
        batch_size: examples per forward pass.

    Returns:
        Whether there is any BatchNorm with running statistics.
    """
    norms = _norms(model)
    momenta = [norm.momentum for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
            norm.train()
        with torch.no_grad():
            for batch in data.batches(batch_size) if norms else ():
                if len(batch) > 1:
                    call(model, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    return bool(norms)


def _norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, NORMS) and module.track_running_stats]
