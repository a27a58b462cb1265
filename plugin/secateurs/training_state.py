"""Where a training stands, in memory and in a file that an interrupted training goes on from.

The file is one safetensors file, with the numbers as JSON in its header: it appears whole or not at all, and reading it runs no code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from secateurs.data import Dataset
from secateurs.files import atomic_path
from secateurs.loops import Loop, tensors_of

__all__ = ["TrainingState", "digest", "read", "restore", "snapshot", "write"]

FILE = "training.safetensors"
_HEADER = "secateurs"


class _Numbers(BaseModel):
    """The numbers of a file."""

    model_config = ConfigDict(extra="forbid")

    digest: str
    epoch: int
    step: int
    stale: int
    best: float | None
    loop: dict[str, Any]


@dataclass
class TrainingState:
    """How far a training is.

    Attributes:
        epoch: finished epochs.
        step: finished steps.
        stale: epochs since the metric last rose.
        best: the highest metric, or None without one.
        kept: the weights that reached it.
    """

    epoch: int = 0
    step: int = 0
    stale: int = 0
    best: float | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every parameter and buffer."""
    return {name: tensor.clone() for name, tensor in tensors_of(model).items()}


def restore(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Put the values of a snapshot back, in place; a cache that the network made or grew since then is left alone."""
    for name, tensor in tensors_of(model).items():
        if name in saved and saved[name].shape == tensor.shape:
            tensor.copy_(saved[name])


def digest(model: nn.Module, teacher: nn.Module | None, data: Dataset, *said: object) -> str:
    """Return a hash of everything that a training's result depends on.

    Args:
        model: before training.
        teacher: the network to learn from.
        data: training examples.
        said: settings and the like, hashed by their `repr`.
    """
    hashed = hashlib.blake2b(digest_size=16)
    arrays: list[tuple[str, np.ndarray[Any, Any]]] = [*sorted(data.inputs.items())]
    if data.labels is not None:
        arrays.append(("labels", data.labels))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    hashed.update(repr((said, data.keyword, data.trims, trained)).encode())
    for name, array in arrays:
        _absorb(hashed, name, array.dtype, array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    for network in (model, *([] if teacher is None else [teacher])):
        for name, tensor in tensors_of(network).items():
            raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            _absorb(hashed, name, tensor.dtype, tuple(tensor.shape), raw)
    return hashed.hexdigest()


def _absorb(hashed: Any, name: str, dtype: object, shape: object, raw: np.ndarray[Any, Any]) -> None:
    hashed.update(repr((name, str(dtype), shape)).encode())
    hashed.update(raw.data)


def write(
    folder: Path, key: str, state: TrainingState, model: nn.Module, optimiser: torch.optim.Optimizer, loop: Loop
) -> None:
    """Write everything that going on needs into `folder`; the file of the epoch before is replaced.

    Args:
        folder: created if it is missing.
        key: from `digest`; only the same training reads the file.
        state: after an epoch.
        model: as trained so far.
        optimiser: its moments are kept.
        loop: its own state is kept.
    """
    moments = {
        f"{number}.{name}": value
        for number, entry in optimiser.state_dict()["state"].items()
        for name, value in entry.items()
    }
    tensors = {
        f"{kind}/{name}": tensor.detach().cpu().contiguous()
        for kind, group in (("model", tensors_of(model)), ("kept", state.kept), ("optimiser", moments))
        for name, tensor in group.items()
    }
    numbers = _Numbers(
        digest=key, epoch=state.epoch, step=state.step, stale=state.stale, best=state.best, loop=loop.state()
    )
    # Not pydantic's JSON, which has no infinity: a metric may be one.
    header = {_HEADER: json.dumps(numbers.model_dump())}
    with atomic_path(folder / FILE) as temporary:
        safetensors.torch.save_file(_apart(tensors), str(temporary), header)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors that share memory with an earlier one: a safetensors file holds each by itself."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return result


@dataclass(frozen=True)
class Found:
    """What a file holds, checked but not yet put to use."""

    state: TrainingState
    weights: dict[str, Tensor]
    moments: dict[int, dict[str, Tensor]]
    loop: dict[str, Any]

    def apply(self, model: nn.Module, optimiser: torch.optim.Optimizer, loop: Loop) -> TrainingState:
        """Put model, optimiser and loop where they stood, and return the state."""
        restore(model, self.weights)
        optimiser.load_state_dict({**optimiser.state_dict(), "state": self.moments})
        loop.restore(self.loop)
        return self.state


def read(folder: Path, key: str, model: nn.Module, trained: Iterable[nn.Parameter]) -> Found | None:
    """Return what `folder` holds of this very training; None where there is no file, or one of another training, or a broken one.

    Args:
        folder: what `write` was given.
        key: from `digest`.
        model: to check the shapes against.
        trained: the parameters of the optimiser, in its order.
    """
    try:
        with safetensors.safe_open(str(folder / FILE), framework="pt") as file:
            numbers = _Numbers.model_validate(json.loads((file.metadata() or {})[_HEADER]))
            if numbers.digest != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, RecursionError, ValidationError):
        return None
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "kept": {}, "optimiser": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        groups.setdefault(kind, {})[rest] = tensor
    shapes = {name: tensor.shape for name, tensor in tensors_of(model).items()}
    for weights in (groups["model"], groups["kept"] or groups["model"]):
        if {name: tensor.shape for name, tensor in weights.items()} != shapes:
            return None
    moments = _moments(groups["optimiser"], list(trained))
    if moments is None or (numbers.best is None) == bool(groups["kept"]):
        return None
    state = TrainingState(numbers.epoch, numbers.step, numbers.stale, numbers.best, groups["kept"])
    return Found(state, groups["model"], moments, numbers.loop)


def _moments(given: Mapping[str, Tensor], trained: list[nn.Parameter]) -> dict[int, dict[str, Tensor]] | None:
    """Return the optimiser's tensors by parameter, or None where they do not fit."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in given.items():
        number, _, rest = name.partition(".")
        if not number.isdecimal() or int(number) >= len(trained):
            return None
        if tensor.ndim and tensor.shape != trained[int(number)].shape:
            return None
        found.setdefault(int(number), {})[rest] = tensor
    return found
