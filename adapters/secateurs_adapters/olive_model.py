"""Networks between Olive and Secateurs: what an Olive handler gives, and folders that one reloads by name.

Olive writes every handler as JSON between two passes, so that a network must be found again by names in files. A pruned
one is a folder with the plan, the weights, how the original structure is built, and a script of one line that Olive imports.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from olive.model import HfModelHandler, PyTorchModelHandler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateurs import checkpoint
from secateurs.errors import ModelError
from secateurs.files import plain_json, read_file, write_text
from secateurs.forward import tensors
from secateurs.plan import Plan
from secateurs_adapters.hf_models import FOLDER
from secateurs_adapters.hf_models import load_pruned as load_pruned_hf

if TYPE_CHECKING:
    from secateurs.data import Dataset

__all__ = ["Given", "dummy_inputs", "load_pruned", "read_handler", "write_handler"]

SOURCE = "olive.json"
"""How the original structure is built, and of what kind the dummy inputs are."""
DUMMIES = "dummy_inputs.safetensors"
SCRIPT = "secateurs_loader.py"
_SCRIPT_TEXT = '''"""Reloads the pruned network of this folder; Olive imports it."""

from secateurs_adapters.olive_model import dummy_inputs, load_pruned

__all__ = ["dummy_inputs", "load_pruned"]
'''
_log = logging.getLogger("olive.secateurs")


@dataclass(frozen=True)
class Given:
    """What an Olive handler gives to a pass.

    Attributes:
        network: loaded, in evaluation mode.
        plan: the edits that led to it, where an earlier pass of Secateurs pruned it.
        source: how the structure before that plan is built, by names; empty where transformers builds it.
    """

    network: nn.Module
    plan: Plan = field(default_factory=Plan)
    source: Mapping[str, Any] = field(default_factory=dict)


def read_handler(handler: Any) -> Given:
    """Load the network of a handler, and find out how another process could build it again.

    Args:
        handler: a `PyTorchModelHandler` or a `HfModelHandler`.

    Raises:
        ModelError: it is of another kind, holds no `torch.nn.Module`, or its loader has no name that can be found again.
    """
    if isinstance(handler, HfModelHandler):
        if handler.adapter_path:
            raise ModelError(
                f"the network has the adapter {handler.adapter_path!r}; merge it first, for example with Olive's "
                f"`MergeAdapterWeights`."
            )
        return Given(_module(handler.load_model()))
    if not isinstance(handler, PyTorchModelHandler):
        raise ModelError(
            f"Secateurs prunes PyTorch networks, got a {type(handler).__name__}; put the pass before `OnnxConversion`."
        )
    home = Path(handler.model_path) if handler.model_path else None
    if home is not None and (home / SOURCE).is_file():
        source = _told(home / SOURCE)["source"]
        return Given(_module(handler.load_model()), Plan.load(home / checkpoint.PLAN), source)
    return Given(_module(handler.load_model()), source=_named(handler))


def write_handler(handler: Any, given: Given, plan: Plan, folder: Path, example: Dataset) -> Any:
    """Finish the folder of a pruned network, and return the Olive handler that reloads it.

    Args:
        handler: the one that the pass was given.
        given: what `read_handler` made of it.
        plan: the edits of this pass.
        folder: with the weights, and with `huggingface/` where it is a network of transformers.
        example: calibration examples, for dummy inputs where the handler has none.

    Returns:
        A `HfModelHandler` where one was given and `from_pretrained` reloads the network; a `PyTorchModelHandler` otherwise.
    """
    (given.plan + plan).save(folder / checkpoint.PLAN)
    mark = folder / FOLDER / checkpoint.MARK
    hugging = mark.is_file()
    if isinstance(handler, HfModelHandler):
        if hugging and _told(mark)["plain"]:
            return HfModelHandler(**{**handler.to_json()["config"], "model_path": str(folder / FOLDER)})
        _log.warning("no configuration describes the pruned network: it goes on as a PyTorchModel")
    kind = _write_dummies(_dummies(handler, example), folder)
    body = {"schema_version": 1, "source": {} if hugging else dict(given.source), "dummy_inputs": kind}
    write_text(folder / SOURCE, json.dumps(body, indent=2) + "\n")
    write_text(folder / SCRIPT, _SCRIPT_TEXT)
    return PyTorchModelHandler(
        model_path=str(folder),
        model_loader="load_pruned",
        model_script=str(folder / SCRIPT),
        io_config=_io_config(handler),
        dummy_inputs_func="dummy_inputs",
        model_attributes=handler.model_attributes,
    )


# --- what the script of a folder exports ------------------------------------------------------------------------------------------------


def load_pruned(folder: str) -> nn.Module:
    """Rebuild the pruned network of a folder, in evaluation mode; Olive calls this as `model_loader`.

    Args:
        folder: what `write_handler` finished.

    Raises:
        ModelError: the original structure cannot be built, or the weights do not fit.
    """
    home = Path(folder)
    if (home / FOLDER / "config.json").is_file():
        return load_pruned_hf(home)
    source = _told(home / SOURCE)["source"]
    return checkpoint.load(home, build=lambda: _module(_build(source)))


def dummy_inputs(handler: Any) -> Any:
    """Return the inputs with which a pruned network is exported; Olive calls this as `dummy_inputs_func`.

    Args:
        handler: whose `model_path` is the folder.

    Returns:
        A tensor, a tuple of tensors, or tensors by name: what the handler before pruning gave.
    """
    home = Path(handler.model_path)
    kind = _told(home / SOURCE)["dummy_inputs"]
    found = load_file(home / DUMMIES)
    if kind["form"] == "dict":
        return {name: found[name] for name in kind["names"]}
    ordered = tuple(found[name] for name in kind["names"])
    return ordered[0] if kind["form"] == "tensor" else ordered


# --- names ------------------------------------------------------------------------------------------------------------------------------


def _module(network: Any) -> nn.Module:
    if not isinstance(network, nn.Module) or isinstance(network, torch.jit.ScriptModule):
        raise ModelError(
            f"the model loader returned {type(network).__name__}; Secateurs needs the torch.nn.Module itself."
        )
    return network.eval()


def _told(path: Path) -> dict[str, Any]:
    """Return what a file of a pruned folder says."""
    told = plain_json(read_file(path, "file", ModelError), f"the file {str(path)!r}", ModelError)
    if not isinstance(told, dict):
        raise ModelError(
            f"the file {str(path)!r} holds {type(told).__name__}; prune again, it is not what was written."
        )
    return told


def _named(handler: Any) -> dict[str, Any]:
    """Return the names by which another process builds the handler's network."""
    path = str(Path(handler.model_path).resolve()) if handler.model_path else None
    loader = handler.model_loader
    if isinstance(loader, str):
        paths = {key: getattr(handler, key) for key in ("model_script", "script_dir")}
        found = {key: str(Path(value).resolve()) for key, value in paths.items() if value}
        return {"model_path": path, "model_loader": loader, **found}
    name, module = getattr(loader, "__qualname__", ""), getattr(loader, "__module__", "__main__")
    if not inspect.isfunction(loader) or module == "__main__" or not name.isidentifier():
        raise ModelError(
            f"the model loader {name or loader!r} of {module!r} cannot be found again by name, which Olive needs after the pass. "
            f"Put it into a file, and give `model_script` and the function's name as `model_loader`."
        )
    return {"model_path": path, "module": module, "model_loader": name}


def _build(source: Mapping[str, Any]) -> Any:
    if "module" not in source:
        return PyTorchModelHandler(**source).load_model()
    return getattr(importlib.import_module(source["module"]), source["model_loader"])(source["model_path"])


# --- what exporters ask a handler for ---------------------------------------------------------------------------------------------------


def _io_config(handler: Any) -> Any:
    """Return names and axes of inputs and outputs as data; a function's name would be looked up in our script."""
    try:
        return handler.io_config
    except (
        ImportError,
        ValueError,
        KeyError,
        AttributeError,
    ) as error:  # Olive asks optimum, which knows some networks
        _log.warning("the input model has no io_config (%s); give one where a later pass needs it", error)
        return None


def _dummies(handler: Any, example: Dataset) -> Any:
    try:
        found = handler.get_dummy_inputs()
    except (ImportError, ValueError, KeyError, AttributeError):
        found = None
    values = list(found.values()) if isinstance(found, Mapping) else found
    plain = values if isinstance(values, (list, tuple)) else [values]
    if plain and all(isinstance(value, Tensor) for value in plain):
        return found
    own = tensors(example.take(range(min(2, len(example)))))
    return own if example.keyword else tuple(own.values())


def _write_dummies(values: Any, folder: Path) -> dict[str, Any]:
    """Write dummy inputs, and return their form and the order of their names."""
    if isinstance(values, Tensor):
        form, named = "tensor", {"input": values}
    elif isinstance(values, Mapping):
        form, named = "dict", dict(values)
    else:
        form, named = "tuple", {str(number): value for number, value in enumerate(values)}
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in named.items()}, folder / DUMMIES)
    return {"form": form, "names": list(named)}
