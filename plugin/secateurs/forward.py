"""Calling networks: inputs from a data set, outputs as a flat list of tensors, modes and weights left as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.data import Dataset, Roles
from secateurs.errors import DataError, SecateursError, first_line
from secateurs.outputs import joined

__all__ = [
    "DOES_NOT_RUN",
    "call",
    "examples_per_pass",
    "frozen_randomness",
    "gathered",
    "ignores_padding",
    "inference",
    "leaves",
    "logits",
    "output_tensors",
    "predict",
    "tensors",
    "to_dataset",
    "trimming",
]

DOES_NOT_RUN = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError)
"""What `call` raises of a network that cannot run as it was changed: shapes that do not fit, a value that is gone, its own checks."""
_CACHE = "past_key_values"
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
    """Call `model` with the inputs of `data`, by name if `data.keyword`, else in order.

    The inputs are copies, which the network may change in place.

    Raises:
        Exception: one of `DOES_NOT_RUN`, whatever the network raises.
    """
    inputs = {name: value.clone() for name, value in tensors(data, device_of(model)).items()}
    try:
        return model(**inputs) if data.keyword else model(*inputs.values())
    except (*DOES_NOT_RUN, SecateursError, MemoryError):
        raise
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {first_line(error)}") from error


def leaves(outputs: Any) -> list[Tensor]:
    """Return everything in a network's output that can be compared, as tensors in a fixed order: numbers of any kind and dtype.

    Containers are tuples, lists, mappings, dataclasses and other objects with attributes. Key-value caches are left out: they are the
    network's memory, not its answer, and a dropped layer keeps none.
    """
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, (bool, int, float, complex, np.ndarray, np.generic)):
        value = torch.as_tensor(outputs)
        return [value.float() if isinstance(outputs, float) else value]
    if isinstance(outputs, Mapping):
        return [leaf for name, value in outputs.items() if not _is_cache(name, value) for leaf in leaves(value)]
    if isinstance(outputs, Sequence) and not isinstance(outputs, (str, bytes)):
        return [leaf for value in outputs for leaf in leaves(value)]
    if isinstance(outputs, (nn.Module, type)) or callable(outputs):
        return []
    slots = (name for kind in type(outputs).__mro__ for name in getattr(kind, "__slots__", ()))
    names = (*getattr(outputs, "__dict__", ()), *slots)
    return leaves({name: getattr(outputs, name, None) for name in names})


def _is_cache(name: Any, value: Any) -> bool:
    return name == _CACHE and not isinstance(value, Tensor)


def output_tensors(outputs: Any) -> list[Tensor]:
    """Return the floating-point tensors among the `leaves` of a network's output."""
    return [value for value in leaves(outputs) if value.is_floating_point()]


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
    """Run a block in evaluation mode without gradients, and put every module's mode back after it.

    Torch's fused path through attention, which calls no submodules and makes nested tensors, is off meanwhile.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
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
        found = joined([logits(call(model, batch)).detach() for batch in batches])
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
        if not whole.ndim or len(whole) != len(few):
            return False
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


def gathered(batches: Iterable[Any], origin: str, like: Dataset | None = None) -> Dataset:
    """Join the batches of a data loader into one data set.

    Args:
        batches: as for `to_dataset`.
        origin: what the batches are called in messages, and the origin of the data set.
        like: what the network is called with: the data set takes its names, and batches are read as so many inputs. None takes the
            first batch's.

    Raises:
        DataError: there is no batch, batches differ in their inputs, or they are not those that the network takes.
    """
    parts = [to_dataset(batch, origin=origin, inputs=None if like is None else len(like.inputs)) for batch in batches]
    if not parts:
        raise DataError(f"`{origin}` has no batches; give an iterable of at least one.")
    first = like or parts[0]
    names = list(first.inputs)
    for part in parts:
        known = set(part.inputs) == set(names) if part.keyword else len(part.inputs) == len(names)
        if not known or (part.keyword and not first.keyword):
            taken = f"named {names}" if first.keyword else f"{len(names)}, without names"
            raise DataError(
                f"a batch of `{origin}` has the inputs {list(part.inputs)}, and the network takes {taken}; give all batches like that."
            )
    columns = {
        name: [part.inputs[name] if part.keyword else list(part.inputs.values())[number] for part in parts]
        for number, name in enumerate(names)
    }
    for name, arrays in columns.items():
        shapes = sorted({array.shape[1:] for array in arrays})
        if len(shapes) > 1:
            raise DataError(
                f"the batches of `{origin}` have examples of the shapes {shapes[:4]} in {name!r}; pad or crop them to one."
            )
    labels = [part.labels for part in parts if part.labels is not None]
    joined = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    return Dataset(joined, np.concatenate(labels) if len(labels) == len(parts) else None, origin, keyword=first.keyword)


def to_dataset(batch: Any, *, origin: str = "", inputs: int | None = None) -> Dataset:
    """Turn a tensor, a tuple or mapping of tensors, or an (inputs, labels) pair into a `Dataset`.

    Args:
        batch: inputs, or a pair of inputs and labels. Of a mapping, `labels` are the labels.
        origin: of the data set.
        inputs: how many the network takes: of one, the second tensor of a pair is the labels. None reads a pair so if its second member is a
            one-dimensional tensor of integers, or its first a tuple or mapping.

    Raises:
        DataError: something in it is no tensor.
    """
    labels = None
    if not isinstance(batch, (Mapping, Tensor, np.ndarray)):
        if not isinstance(batch, Iterable):
            raise DataError(f"a batch is a {type(batch).__name__}; batches are tensors, tuples or mappings of them.")
        values = list(batch)
        if len(values) == 2 and _are_labels(values, inputs):
            batch, labels = values
    if isinstance(batch, Mapping):
        named = dict(batch)
        labels = named.pop("labels", labels)
    elif isinstance(batch, (Tensor, np.ndarray)):
        named = {"input": batch}
    else:
        given = list(batch)
        named = {"input" if len(given) == 1 else f"input_{number}": value for number, value in enumerate(given)}
    arrays = {str(name): _array(value, str(name)) for name, value in named.items()}
    return Dataset(
        arrays, None if labels is None else _array(labels, "labels"), origin, keyword=isinstance(batch, Mapping)
    )


def _are_labels(pair: Sequence[Any], inputs: int | None) -> bool:
    first, second = pair
    if not isinstance(second, (Tensor, np.ndarray)):
        return False
    if inputs == 1 or isinstance(first, (Mapping, list, tuple)):
        return True
    whole = not torch.as_tensor(second).is_floating_point()
    return inputs is None and second.ndim == 1 and whole


def _array(value: Any, name: str) -> Any:
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, Tensor):
        raise DataError(
            f"{name!r} of a batch is a {type(value).__name__}; batches are tensors, tuples or mappings of them."
        )
    if value.dtype is torch.bfloat16:
        raise DataError(
            f"{name!r} of a batch is bfloat16, which numpy does not know; give float32, and a bfloat16 network as `model.float()`."
        )
    return value.detach().cpu().numpy()
