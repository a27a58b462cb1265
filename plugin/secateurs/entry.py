"""What is given at the doors, checked before any work: a network that can be copied and runs, batches, a list of passes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from secateurs.data import Dataset
from secateurs.errors import DataError, ModelError, RecipeError, first_line
from secateurs.faults import told
from secateurs.forward import call, inference

__all__ = ["check_arguments", "copied", "outputs_on", "plain_network"]

_COMPILED = "_orig_mod"
"""The name under which what `torch.compile` returns holds the network."""


def plain_network(model: Any) -> nn.Module:
    """Return the network that was given; of a compiled one, the network that was compiled.

    Raises:
        ModelError: it is no network, a part of it is compiled, or a weight has no values yet.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"the network must be a torch.nn.Module, got {_described(model)}")
    inner = dict(model.named_children()).get(_COMPILED)
    network: nn.Module = model if inner is None else inner
    for path, module in network.named_modules():
        if _COMPILED in module._modules:
            raise ModelError(f"module {path!r} is compiled; put the module itself in its place: its `{_COMPILED}`.")
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if torch.nn.parameter.is_lazy(tensor):
            raise ModelError(
                f"{name!r} has no shape before the first call; call the network once on an example: model(example)."
            )
        if tensor.is_meta:
            raise ModelError(f"{name!r} is on the meta device and has no values; build the network on a real one.")
    return network


def _described(given: object) -> str:
    if isinstance(given, type):
        return f"the class {given.__name__}; build one: {given.__name__}(...)."
    if isinstance(given, Mapping):
        return f"one of {type(given).__name__}; build the network, and give it the weights with `load_state_dict`."
    return f"one of {type(given).__name__}; put what computes the outputs into the `forward` of a module."


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of a network.

    Raises:
        ModelError: it cannot be copied; the message says what to remove.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever an attribute of a user's network raises
        if told(error) is not None:
            raise
        reason = next(_not_copied(model), f"{type(error).__name__}: {first_line(error)}")
        raise ModelError(f"the network cannot be copied: {reason}") from error


def _not_copied(model: nn.Module) -> Iterator[str]:
    """Yield what keeps a network from being copied, and what to do about it."""
    for path, module in model.named_modules():
        layer = f"model.get_submodule({path!r})"
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                name = hook._tensor_name
                yield f"torch.nn.utils.prune masks {name!r} of {path!r}; first call torch.nn.utils.prune.remove({layer}, {name!r})."
            elif type(hook).__name__ in ("WeightNorm", "SpectralNorm"):
                remove = "remove_weight_norm" if type(hook).__name__ == "WeightNorm" else "remove_spectral_norm"
                yield f"{path!r} computes its weight in a hook ({type(hook).__name__}); first call torch.nn.utils.{remove}({layer})."
        for name, value in (*vars(module).items(), *module._buffers.items()):
            if name not in ("_modules", "_parameters", "_buffers") and (why := _refused(value)):
                where = f"{path}.{name}" if path else name
                yield f"its attribute {where!r} is {why}."


def _refused(value: object) -> str | None:
    """Return what is wrong with a value that cannot be copied, and what to do about it."""
    if isinstance(value, Tensor) and not value.is_leaf:
        return "a tensor that was computed with gradients; delete it first, or keep it detached"
    try:
        copy.deepcopy(value)
    except Exception as error:  # as above
        return f"a {type(value).__name__}, which cannot be copied ({first_line(error)}); delete it first"
    return None


def outputs_on(model: nn.Module, data: Dataset) -> Any:
    """Return what a network makes of the first two examples of the calibration data.

    Raises:
        DataError: it does not run on them.
    """
    example = data.take(range(min(2, len(data))))
    try:
        with inference(model):
            return call(model, example)
    except Exception as error:  # whatever a user's network raises on the user's data
        if told(error) is not None:
            raise
        shapes = {name: tuple(array.shape[1:]) for name, array in example.inputs.items()}
        types = ", ".join(sorted({str(array.dtype) for array in example.inputs.values()}))
        raise DataError(
            f"the network does not run on the calibration data (shapes per example {shapes}, {types}): "
            f"{first_line(error).rstrip('.')}. Give inputs as the network takes them{_half(model)}."
        ) from error


def _half(model: nn.Module) -> str:
    if not any(parameter.dtype is torch.bfloat16 for parameter in model.parameters()):
        return ""
    return "; its weights are bfloat16, which data cannot be: give `model.float()`, and turn the pruned network back with `.bfloat16()`"


def check_arguments(example: object, batches: Mapping[str, object], passes: object) -> None:
    """Refuse arguments that are not of the form that a script gives.

    Args:
        example: what the network is called with.
        batches: iterables of batches, by the name of their argument.
        passes: the list of passes.

    Raises:
        UserError: with the argument, what it is, and what to give.
    """
    if not isinstance(example, (Tensor, np.ndarray, Mapping, list, tuple)):
        raise DataError(
            f"`example_inputs` is {_kind(example)}; give what the network is called with: a tensor, a tuple, or a dict of tensors by name."
        )
    for name, given in batches.items():
        if not _is_list(given):
            raise DataError(
                f"`{name}` is {_kind(given)}; give an iterable of batches: a DataLoader, or a list `[batch]`."
            )
    if not _is_list(passes):
        raise RecipeError(f"`passes` is {_kind(passes)}; give a list: `[{{'mi-nodes': {{'target_macs': 0.5}}}}]`.")


def _is_list(given: object) -> bool:
    return isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping))


def _kind(value: object) -> str:
    return "None" if value is None else f"one of {type(value).__name__}"
