"""Applying a plan to a module tree: slices, attributes and bypassed blocks, nothing else.

Surgery never traces and never guesses. Parameters keep `requires_grad`, dtype, device and sharing: two names of one tensor are sliced together
and stay one tensor.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.errors import PlanError
from secateurs.modules import Bypass, SeparateAttention, plain_facts
from secateurs.plan import AddBias, DropBlock, Edit, Plan, RemoveUnits, SetAttribute, Slice, SplitAttention

__all__ = ["Bypass", "applied", "apply_plan", "is_splittable", "keep_indices"]


def applied(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a pruned copy of `model`; the model given is not changed."""
    return apply_plan(copy.deepcopy(model), plan)


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Apply every edit of `plan` to `model` in place and return it.

    Raises:
        PlanError: an edit names a module, parameter, index or attribute that the network does not have.
    """
    for number, edit in enumerate(plan.edits):
        try:
            _apply(model, edit)
        except PlanError as error:
            raise PlanError(f"edit {number} ({edit.edit}) does not fit the network: {error}") from None
    return model


def _apply(model: nn.Module, edit: Edit) -> None:
    match edit:
        case DropBlock():
            _drop_block(model, edit.path, edit.elements)
            for path in edit.also:
                _drop_block(model, path, None)
        case RemoveUnits():
            _remove_units(model, edit)
        case SetAttribute():
            _set_attribute(model, edit)
        case AddBias():
            _add_bias(model, edit.module)
        case SplitAttention():
            _split_attention(model, edit.module)


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise PlanError(f"there is no module {path!r}; build the network that the plan was made for.") from None


def _drop_block(model: nn.Module, path: str, elements: int | None) -> None:
    block = _module(model, path)
    if not path:
        raise PlanError("the network itself cannot be bypassed; name a block.")
    bypass = Bypass(elements)
    for name, value in plain_facts(block).items():
        setattr(bypass, name, value)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, bypass)


def _split_attention(model: nn.Module, path: str) -> None:
    original = _module(model, path)
    if not path or not is_splittable(original):
        raise PlanError(f"module {path!r} is no torch.nn.MultiheadAttention whose projections can be put apart.")
    assert isinstance(original, nn.MultiheadAttention)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, SeparateAttention(original))
    while parent:  # torch's encoder makes nested tensors of padded input for its own attention only
        parent = parent.rpartition(".")[0]
        around = model.get_submodule(parent)
        if isinstance(around, nn.TransformerEncoder):
            around.use_nested_tensor = False


def is_splittable(module: nn.Module) -> bool:
    """Tell whether a module is a `torch.nn.MultiheadAttention` of two heads or more without extra keys and values."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and module.num_heads > 1
        and module.bias_k is None
        and not module.add_zero_attn
    )


def _set_attribute(model: nn.Module, edit: SetAttribute) -> None:
    owner: object = _module(model, edit.module)
    *path, name = edit.name.split(".")
    for part in path:
        owner = getattr(owner, part, None)
    private = any(part.startswith("_") for part in (*path, name))
    value = getattr(owner, name, None)
    held = isinstance(owner, nn.Module) and any(
        name in kind for kind in (owner._parameters, owner._buffers, owner._modules)
    )
    if private or held or not hasattr(owner, name) or isinstance(value, Tensor) or callable(value):
        raise PlanError(f"module {edit.module!r} has no plain attribute {edit.name!r}.")
    setattr(owner, name, edit.value)


def _add_bias(model: nn.Module, path: str) -> None:
    layer: Any = _module(model, path)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or getattr(layer, "bias", False) is not None:
        raise PlanError(f"module {path!r} cannot take a bias: it has one already, or no weight.")
    width = weight.shape[1] * layer.groups if getattr(layer, "transposed", False) else weight.shape[0]
    layer.bias = nn.Parameter(weight.new_zeros(int(width)), requires_grad=weight.requires_grad)


def keep_indices(size: int, removed: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Return the indices of `range(size)` that stay, sorted."""
    if removed and max(removed) >= size:
        raise PlanError(f"index {max(removed)} is out of range for a dimension of size {size}.")
    mask = torch.ones(size, dtype=torch.bool, device=device)
    mask[torch.tensor(removed, dtype=torch.long, device=device)] = False
    if not bool(mask.any()):
        raise PlanError(f"all {size} indices of a dimension would be removed.")
    return mask.nonzero().squeeze(1)


def _remove_units(model: nn.Module, edit: RemoveUnits) -> None:
    owners = _owners(model)
    by_tensor: dict[int, list[Slice]] = defaultdict(list)
    found: dict[int, Tensor] = {}
    for piece in edit.slices:
        tensor = getattr(_module(model, piece.module), piece.parameter, None)
        if not isinstance(tensor, Tensor):
            raise PlanError(f"module {piece.module!r} has no tensor {piece.parameter!r}.")
        if piece.dim >= tensor.ndim:
            raise PlanError(
                f"{piece.module}.{piece.parameter} has {tensor.ndim} dimensions; there is no dimension {piece.dim}."
            )
        by_tensor[id(tensor)].append(piece)
        found[id(tensor)] = tensor
    for key, pieces in by_tensor.items():
        tensor = found[key]
        if key not in owners:
            piece = pieces[0]
            raise PlanError(
                f"{piece.module}.{piece.parameter} is computed from other parameters (a parametrisation); remove it first."
            )
        data = tensor.detach()
        # A tensor with two names may carry the same slice under each: apply it once.
        for dim, removed in dict.fromkeys((piece.dim, piece.removed) for piece in pieces):
            data = data.index_select(dim, keep_indices(data.shape[dim], removed, data.device))
        fresh = data.clone(memory_format=torch.preserve_format)
        for module, name in owners[key]:
            if isinstance(tensor, nn.Parameter):
                shared = getattr(owners[key][0][0], owners[key][0][1])
                module._parameters[name] = (
                    shared if shared is not tensor else nn.Parameter(fresh, requires_grad=tensor.requires_grad)
                )
            else:
                module._buffers[name] = fresh


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Map each parameter and buffer, by identity, to every (module, name) that holds it."""
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                owners[id(tensor)].append((module, name))
    return owners
