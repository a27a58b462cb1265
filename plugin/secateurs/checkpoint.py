"""Saving and rebuilding a pruned network: plan.json beside model.safetensors, no pickle, strict and exact.

Rebuilding takes the original structure, replays the plan, and loads the weights strictly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from secateurs.errors import ModelError
from secateurs.files import atomic_path
from secateurs.plan import Plan
from secateurs.surgery import apply_plan

__all__ = ["MARK", "PLAN", "WEIGHTS", "load", "load_weights", "save", "save_weights", "saved_tensors"]

PLAN, WEIGHTS = "plan.json", "model.safetensors"
MARK = "secateurs.json"
"""A file that says that a run wrote the folder around it, so that a later run may replace that folder."""


def save(model: nn.Module, plan: Plan, folder: str | Path) -> None:
    """Write `plan.json` and `model.safetensors` into `folder`, each whole or not at all.

    Args:
        model: the pruned network.
        plan: the edits that lead to it from the original structure.
        folder: created if it is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder / WEIGHTS)
    plan.save(folder / PLAN)


def save_weights(model: nn.Module, path: Path) -> None:
    """Write all parameters and buffers: tensors that share memory once, parts of a larger tensor as tensors of their own.

    Raises:
        ModelError: as for `saved_tensors`.
    """
    written: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in sorted(saved_tensors(model).items()):
        kept = first.setdefault(_memory(tensor), name) if _is_whole(tensor) else name
        if kept == name:
            written[name] = tensor.contiguous() if _is_whole(tensor) else tensor.clone().contiguous()
        else:
            shared[name] = kept
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(written, str(temporary), shared or None)


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return everything of a network that is saved, by name.

    Raises:
        ModelError: a module has a state that is no tensor (`get_extra_state`), which the file cannot hold, or a tensor has no values.
    """
    state = {name: value for name, value in model.state_dict().items() if value is not None}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"the state {name!r} of the network is a {type(value).__name__}, and model.safetensors holds tensors alone. "
                "Let `get_extra_state` return a tensor, or take it out of the class before saving."
            )
        if value.is_meta:
            raise ModelError(f"{name!r} is on the meta device and has no values; build the network on a real one.")
    return state


def _is_whole(tensor: Tensor) -> bool:
    """Tell whether a tensor is all of the memory that it lies in, not a slice or an expansion of it."""
    return 0 < tensor.nbytes == tensor.untyped_storage().nbytes()


def _memory(tensor: Tensor) -> object:
    return tensor.device, tensor.untyped_storage().data_ptr()


def load(folder: str | Path, build: Callable[[], nn.Module] | nn.Module) -> nn.Module:
    """Rebuild a pruned network.

    Args:
        folder: what `save` or `secateurs run` wrote.
        build: returns the *original*, unpruned structure (its weights do not matter), or is such a network.

    Returns:
        The pruned network in evaluation mode, with exactly the saved weights; in the number types of `build`, which may be wider.

    Raises:
        PlanError: the plan is missing, malformed, or made for another structure.
        ModelError: `build` returns no module, or the weights do not fit.
    """
    folder = Path(folder)
    plan = Plan.load(folder / PLAN)
    model = copy.deepcopy(build) if isinstance(build, nn.Module) else build()
    if not isinstance(model, nn.Module):
        raise ModelError(f"`build` must return a torch.nn.Module, got {type(model).__name__}.")
    apply_plan(model, plan)
    return load_weights(model, folder / WEIGHTS)


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Load a safetensors file strictly into `model` and return it in evaluation mode.

    Raises:
        ModelError: the file is missing, is not safetensors, or does not fit: other names, other shapes, or numbers that the network's
            types would round.
    """
    if not path.is_file():
        raise ModelError(f"the weights {str(path)!r} do not exist.")
    try:
        saved = safetensors.torch.load_file(str(path))
    except safetensors.SafetensorError as error:
        raise ModelError(
            f"{str(path)!r} is not a safetensors file: {error}. Pickled checkpoints are never read."
        ) from None
    try:
        _fill(model, saved)
    except RuntimeError as error:
        raise ModelError(f"the weights {str(path)!r} do not fit the network: {' '.join(str(error).split())}") from None
    return model.eval()


def _fill(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Copy the tensors of a file into a network.

    Raises:
        RuntimeError: they are not exactly those that the network has.
    """
    own = saved_tensors(model)
    whole = [_memory(own[name]) for name in saved if name in own and _is_whole(own[name])]
    missing = [name for name, tensor in own.items() if name not in saved and _memory(tensor) not in whole]
    unknown = [name for name in saved if name not in own]
    if missing or unknown:
        raise RuntimeError(f"the file lacks {missing[:8]}, and the network has no {unknown[:8]}.")
    if len(set(whole)) < len(whole):
        raise RuntimeError("tensors that are one in the network are several in the file.")
    for name, value in saved.items():
        if not _holds(own[name].dtype, value.dtype):
            raise RuntimeError(
                f"{name!r} is {value.dtype} in the file and {own[name].dtype} in the network, which would round it; build the network "
                f"in {value.dtype}, load it, and convert it then."
            )
    for module in model.modules():
        for name, tensor in module._buffers.items():
            if tensor is not None and 0 in tensor.stride():
                module._buffers[name] = tensor.clone()  # an expanded buffer cannot be written to
    model.load_state_dict(saved, strict=False)


def _holds(own: torch.dtype, other: torch.dtype) -> bool:
    """Tell whether one type has every value of another: itself, or a narrower one of its kind."""
    if own == other:
        return True
    return own.is_floating_point == other.is_floating_point and torch.promote_types(own, other) == own
