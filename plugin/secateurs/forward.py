"""Calling networks: inputs from a data set, outputs as a flat list of tensors, modes and weights left as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.data import Dataset, Roles

__all__ = [
    "DOES_NOT_RUN",
    "call",
    "examples_per_pass",
    "frozen_randomness",
    "ignores_padding",
    "inference",
    "logits",
    "modules_of",
    "output_tensors",
    "predict",
    "tensors",
    "to_dataset",
    "trimming",
]

DOES_NOT_RUN = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError)
"""What a network raises that cannot run as it was changed: shapes that do not fit, a value that is gone, its own checks."""
LIKE_LENGTHS = 32
"""Examples per forward pass, at the most, where batches are trimmed."""
PADDING_TOLERANCE = 1e-4
"""Share of the largest prediction by which it may differ without padding: rounding, as products of other sizes are summed in another order."""


def tensors(data: Dataset, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return the inputs of a data set as tensors on `device`, sharing memory where they can."""
    return {name: torch.as_tensor(array).to(device) for name, array in data.inputs.items()}


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer; the CPU where there is none."""
    first: Tensor | None = next(iter((*model.parameters(), *model.buffers())), None)
    return torch.device("cpu") if first is None else first.device


def call(model: nn.Module, data: Dataset) -> Any:
    """Call `model` with the inputs of `data`, by name if `data.keyword`, else in order."""
    inputs = tensors(data, device_of(model))
    return model(**inputs) if data.keyword else model(*inputs.values())


def output_tensors(outputs: Any) -> list[Tensor]:
    """Return the floating-point tensors of a network's output (tensor, tuple, list, mapping, dataclass), in a fixed order.

    Key-value caches are left out: they are the network's memory, not its answer, and a dropped layer keeps none.
    """
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, Mapping):
        kept = (value for name, value in outputs.items() if name != "past_key_values")
        return [tensor for value in kept for tensor in output_tensors(value)]
    if isinstance(outputs, Sequence) and not isinstance(outputs, str):
        return [tensor for value in outputs for tensor in output_tensors(value)]
    if hasattr(outputs, "__dict__"):
        return [tensor for value in vars(outputs).values() for tensor in output_tensors(value)]
    return []


def logits(outputs: Any) -> Tensor:
    """Return the prediction: the output called `logits` where there is one, else the first tensor."""
    named = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if isinstance(named, Tensor):
        return named
    found = output_tensors(outputs)
    if not found:
        raise TypeError(f"the network returned {type(outputs).__name__}, which holds no floating-point tensor")
    return found[0]


@contextmanager
def inference(*models: nn.Module) -> Iterator[None]:
    """Run a block in evaluation mode without gradients, and put every module's mode back after it."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def frozen_randomness(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator for a block and restore its state after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def predict(model: nn.Module, data: Dataset, batch_size: int = 256) -> Tensor:
    """Return the network's prediction for every example, in evaluation mode."""
    batches = data.longest_first().batches(examples_per_pass(data, batch_size))
    with inference(model):
        found = torch.cat([logits(call(model, batch)).detach() for batch in batches])
    return found[torch.as_tensor(np.argsort(data.by_length()), device=found.device)] if data.trims else found


def examples_per_pass(data: Dataset, most: int = 256) -> int:
    """Return how many examples a forward pass takes: fewer where batches are trimmed, as more would differ in length."""
    return min(most, LIKE_LENGTHS) if data.trims else most


def ignores_padding(model: nn.Module, data: Dataset) -> bool:
    """Tell whether a network makes one prediction per example, and the same one without the last positions of padding.

    Args:
        model: the network; it is not changed.
        data: examples; the shortest ones, with most padding, are tried.
    """
    few = replace(data, trims=True)
    few = few.take(few.by_length()[-4:])
    short = few.trimmed()
    if short is few:
        return False
    with inference(model):
        whole = logits(call(model, few))
        try:
            cut = logits(call(model, short))
        except DOES_NOT_RUN:  # a network of fixed length
            return False
    return cut.shape == whole.shape and float((cut - whole).abs().max()) <= PADDING_TOLERANCE * float(whole.abs().max())


def trimming(model: nn.Module, roles: Roles) -> Roles:
    """Return the roles with batches that leave out common padding, where `model` ignores padding; the evaluation role stays as it is."""
    if not ignores_padding(model, roles.calibration):
        return roles
    used = {name: getattr(roles, name) for name in ("calibration", "training", "validation")}
    return replace(roles, **{name: replace(data, trims=True) for name, data in used.items() if data is not None})


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module by qualified name, each object once, under its first name."""
    return dict(model.named_modules())


def to_dataset(batch: Any, *, origin: str = "") -> Dataset:
    """Turn a tensor, a tuple or mapping of tensors, or an (inputs, labels) pair into a `Dataset`.

    A pair whose second member is a one-dimensional integer tensor is read as inputs and labels.
    """
    labels = None
    if isinstance(batch, Mapping):
        named = dict(batch)
        labels = named.pop("labels", None)
        inputs = {name: value.detach().cpu().numpy() for name, value in named.items()}
        return Dataset(inputs, None if labels is None else labels.cpu().numpy(), origin, keyword=True)
    if isinstance(batch, Tensor):
        return Dataset({"input": batch.detach().cpu().numpy()}, None, origin)
    values = list(batch)
    if len(values) == 2 and isinstance(values[1], Tensor) and values[1].ndim == 1 and not values[1].is_floating_point():
        labels = values.pop().cpu().numpy()
        if isinstance(values[0], Mapping):
            inputs = {name: value.detach().cpu().numpy() for name, value in values[0].items()}
            return Dataset(inputs, labels, origin, keyword=True)
        if isinstance(values[0], (list, tuple)):
            values = list(values[0])
    names = ["input"] if len(values) == 1 else [f"input_{index}" for index in range(len(values))]
    return Dataset(
        {name: value.detach().cpu().numpy() for name, value in zip(names, values, strict=True)}, labels, origin
    )
