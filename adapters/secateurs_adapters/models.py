"""Model loaders: build a network from the model section of a recipe.

The built-in loader is `factory`: a function in a module beside the recipe, or in an installed package. Naming it is the
one way in which a recipe runs code. Weights are read from safetensors only, and strictly.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from secateurs.errors import ModelError, unknown_name

__all__ = ["load_factory", "load_weights"]

LISTED = 10
"""Names that an error lists at the most, of each kind."""
_ARCHIVES = {b"PK\x03\x04": "a zip archive as `torch.save` writes it", b"\x80": "a pickle"}
_log = logging.getLogger(__name__)
_homes: dict[str, Path] = {}
"""The recipe's folder that each module came from, by its name in `sys.modules`."""


def load_factory(value: str, *, arguments: Mapping[str, Any], weights: Path | None, folder: Path) -> nn.Module:
    """Call a factory and return its network in evaluation mode; implements `secateurs.interfaces.ModelLoader`.

    Args:
        value: `package.module:function`. A module in `folder` comes before installed ones, also where a module of that
            name was imported from another recipe's folder before.
        arguments: keyword arguments of the function.
        weights: a safetensors file to load strictly; None keeps the weights that the function gives.
        folder: the recipe's folder; on `sys.path` while the factory is imported and called.

    Raises:
        ModelError: there is no such module or function, it raises, it returns something else than a network, or the
            weights do not fit.
    """
    name, _, attribute = value.partition(":")
    if not all(part.isidentifier() for part in name.split(".")) or not attribute.isidentifier():
        raise ModelError(f"`factory` is {value!r}; write `package.module:function`, for example `my_net:build`.")
    with _importable(folder):
        factory = _attribute(_module(name, folder), attribute)
        try:
            network = factory(**arguments)
        except (Exception, SystemExit) as error:
            raise ModelError(
                f"calling the factory {value!r} with {dict(arguments)} raised {_said(error)} {_parameters(factory)}Change "
                f"`arguments`, or mend the factory."
            ) from error
    if not isinstance(network, nn.Module):
        raise ModelError(f"the factory {value!r} returned {_kind(network)}; return an instance of `torch.nn.Module`.")
    if weights is not None:
        load_weights(network, weights)
    return network.eval()


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a safetensors file into a network, in place and strictly.

    Every parameter and buffer must be in the file with its shape, and nothing else. As in torch, a parameter that is
    tied to a loaded one and BatchNorm's `num_batches_tracked` may be absent.

    Raises:
        ModelError: the file is missing or not safetensors, or names or shapes differ; the message lists them.
    """
    tensors = _read(path)
    state = network.state_dict(keep_vars=True)
    shapes = [
        f"{name} is {tuple(tensors[name].shape)} in the file, {tuple(state[name].shape)} in the network"
        for name in state
        if name in tensors and tensors[name].shape != state[name].shape
    ]
    problems = _listed("shapes differ", shapes)
    if not problems:
        outcome = _filled(network, tensors)
        loaded = {id(state[name]) for name in tensors if name in state}
        missing = [name for name in outcome.missing_keys if name not in state or id(state[name]) not in loaded]
        problems = _listed("missing in the file", missing) + _listed("unexpected in the file", outcome.unexpected_keys)
    else:
        problems += _listed("missing in the file", (name for name in state if name not in tensors))
        problems += _listed("unexpected in the file", (name for name in tensors if name not in state))
    if problems:
        raise ModelError(
            f"the weights {str(path)!r} do not fit {type(network).__name__}:\n{problems}Give the weights of this "
            f"network, or the `arguments` with which they were trained."
        )


def _filled(network: nn.Module, tensors: dict[str, Any]) -> Any:
    try:
        return network.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise ModelError(
            f"{type(network).__name__} does not take the weights: {_said(error)} Mend its hooks."
        ) from error


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"the weights file {str(path)!r} does not exist; give a safetensors file in `weights`.")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        # Only now: the length that a safetensors file begins with can look like another format's first bytes.
        with path.open("rb") as file:
            start = file.read(4)
        for magic, what in _ARCHIVES.items():
            if start.startswith(magic):
                raise ModelError(
                    f"the weights file {str(path)!r} is {what}; reading one can run code, so only safetensors are read. "
                    f"Convert it once: `safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW_FILE)`."
                ) from None
        raise ModelError(
            f"the weights file {str(path)!r} cannot be read as safetensors: {_said(error)} Write it with "
            f"`safetensors.torch.save_file(network.state_dict(), FILE)`."
        ) from error


def _listed(title: str, names: Iterable[str]) -> str:
    every = list(names)
    more = f", and {len(every) - LISTED} more" if len(every) > LISTED else ""
    return f"  {len(every)} {title}: {', '.join(every[:LISTED])}{more}\n" if every else ""


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Put a folder first on `sys.path`, and forget the modules that came from another recipe's folder."""
    home = folder.resolve()
    for name in [name for name, other in _homes.items() if other != home]:
        sys.modules.pop(name, None)
        del _homes[name]
    before, saved = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(home))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = saved
        for name in set(sys.modules) - before:
            file = _file(name, home)
            if file is not None and file == _source(sys.modules[name]):
                _homes[name] = home


def _file(name: str, home: Path) -> Path | None:
    """Return where a module of this name lies in a folder, or None."""
    stem = home.joinpath(*name.split("."))
    return next((file.resolve() for file in (stem / "__init__.py", stem.with_suffix(".py")) if file.is_file()), None)


def _module(name: str, folder: Path) -> ModuleType:
    """Import a module, from `folder` if it is there."""
    local = _file(name, folder.resolve())
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and local is None and f"{name}.".startswith(f"{error.name}."):
            known = [file.stem for file in folder.glob("*.py")] if folder.is_dir() else []
            raise ModelError(
                f"{unknown_name('module', name, known)} Those are the modules in the recipe's folder "
                f"{str(folder)!r}; no installed package has that name either."
            ) from error
        raise ModelError(
            f"importing the module {name!r} raised {_said(error)} Mend it, or install what it needs."
        ) from error
    source = _source(module)
    if local is not None and source != local:
        raise ModelError(
            f"the module {name!r} is {str(local)!r} in the recipe's folder, but {str(source or 'a built-in module')!r} "
            f"has that name already; rename the file."
        )
    if local is None:
        _log.info("the factory's module %r comes from %s, not from the recipe's folder", name, source)
    return module


def _source(module: ModuleType | None) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if isinstance(file, str) else None


def _attribute(module: ModuleType, attribute: str) -> Any:
    found = getattr(module, attribute, None)
    if callable(found):
        return found
    exported = getattr(module, "__all__", None)
    names = exported if exported is not None else [name for name in vars(module) if not name.startswith("_")]
    known = [name for name in names if callable(getattr(module, name, None))]
    if found is not None:
        raise ModelError(f"{attribute!r} of {module.__name__!r} is {_kind(found)}; a factory is a function or a class.")
    raise ModelError(f"{str(_source(module) or module.__name__)!r}: {unknown_name('function', attribute, known)}")


def _parameters(factory: Any) -> str:
    try:
        names = list(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        return ""
    return f"It takes {', '.join(names) or 'no arguments'}. "


def _kind(value: object) -> str:
    return f"the class {value.__name__!r}" if isinstance(value, type) else f"an object of type {type(value).__name__!r}"


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": .") + "."
