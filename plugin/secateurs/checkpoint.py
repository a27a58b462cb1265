"""Saving and rebuilding a pruned network: plan.json beside model.safetensors, no pickle, strict and exact.

Rebuilding takes the original structure, replays the plan, and loads the weights strictly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
from torch import nn

from secateurs.errors import ModelError
from secateurs.files import atomic_path
from secateurs.plan import Plan
from secateurs.surgery import apply_plan

__all__ = ["MARK", "PLAN", "WEIGHTS", "load", "load_weights", "save", "save_weights"]

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
    """Write all parameters and buffers; tensors that share memory are written once."""
    with atomic_path(path) as temporary:
        safetensors.torch.save_model(model, str(temporary))


def load(folder: str | Path, build: Callable[[], nn.Module] | nn.Module) -> nn.Module:
    """Rebuild a pruned network.

    Args:
        folder: what `save` or `secateurs run` wrote.
        build: returns the *original*, unpruned structure (its weights do not matter), or is such a network.

    Returns:
        The pruned network in evaluation mode, with exactly the saved weights.

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
        ModelError: the file is missing, is not safetensors, or does not fit.
    """
    if not path.is_file():
        raise ModelError(f"the weights {str(path)!r} do not exist.")
    try:
        safetensors.torch.load_model(model, str(path), strict=True)
    except safetensors.SafetensorError as error:
        raise ModelError(
            f"{str(path)!r} is not a safetensors file: {error}. Pickled checkpoints are never read."
        ) from None
    except RuntimeError as error:
        raise ModelError(f"the weights {str(path)!r} do not fit the network: {' '.join(str(error).split())}") from None
    return model.eval()
