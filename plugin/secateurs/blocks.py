"""Blocks: what can be bypassed whole, found by running the network.

A block is an element of a list of like modules (a child of `Sequential` or `ModuleList`, or one of several numbered attributes of one class)
through which its input reaches its output without passing a layer that mixes channels: a residual path. The innermost such elements are the
blocks; their siblings of the same class without such a path (stage entries) are blocks too, but not removable. In a network without any, the
convolutions of its `Sequential` containers are the blocks, each with the normalisation behind it; those that keep the shape are removable (the
activation stays: applied twice, it changes nothing more). Whether a block can go is decided by a real forward pass with the block bypassed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.data import Dataset
from secateurs.errors import first_line
from secateurs.forward import DOES_NOT_RUN, call, frozen_randomness, inference, output_tensors
from secateurs.layers import CONVOLUTIONS, NORMS, is_matrix_layer
from secateurs.plan import DropBlock
from secateurs.probe import first_tensor
from secateurs.readers import masked
from secateurs.report import Skipped
from secateurs.unreached import named

__all__ = ["Block", "Describe", "find_blocks", "no_blocks"]


@dataclass(frozen=True)
class Block:
    """A part of the network that can perhaps be bypassed.

    Attributes:
        path: qualified name of the module.
        removable: whether it can be bypassed.
        reason: why not; empty if it can.
        elements: how many values it returns as a tuple; None where it returns a tensor.
        also: further modules that are bypassed with it.
    """

    path: str
    removable: bool
    reason: str = ""
    elements: int | None = None
    also: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Every module that is bypassed, in order of execution."""
        return (*self.also, self.path)

    def dropped(self, reason: str) -> DropBlock:
        """Return the edit that bypasses this block."""
        return DropBlock(path=self.path, elements=self.elements, also=self.also, reason=reason)


Describe = Callable[[nn.Module], "list[Block] | None"]


@dataclass
class _Call:
    inputs: Tensor | None
    outputs: Tensor | None
    count: int
    elements: int | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def again(self, block: nn.Module, first: Tensor) -> Any:
        """Call the block as it was called, with another first input."""
        if self.args:
            return block(first, *self.args[1:], **self.kwargs)
        name = next(iter(self.kwargs))
        return block(**{**self.kwargs, name: first})


def find_blocks(model: nn.Module, example: Dataset, describe: Describe | None = None) -> list[Block]:
    """Return the blocks of a network in order of execution.

    Args:
        model: the network; it is not changed.
        example: inputs for the forward passes.
        describe: asked first (the hook `secateurs_describe_blocks`); None or an answer of None leaves it to the search here.
    """
    described = describe(model) if describe is not None else None
    if described is not None:
        return [_checked(model, example, block) for block in described]
    candidates = _list_elements(model)
    calls = _record_calls(model, example, candidates)
    residual = {path for path in calls if _has_residual_path(model.get_submodule(path), calls[path])}
    innermost = {path for path in residual if not any(other.startswith(path + ".") for other in residual)}
    classes = {type(model.get_submodule(path)) for path in innermost}
    chosen = [
        path
        for path in calls
        if path in innermost
        or (type(model.get_submodule(path)) in classes and not any(o.startswith(path + ".") for o in innermost))
    ]
    if not chosen:
        return [_checked(model, example, block) for block in _plain_blocks(model, example)]
    return [_checked(model, example, _judged(path, calls[path], path in innermost)) for path in chosen]


def no_blocks(model: nn.Module) -> Skipped:
    """Return that no block was found in a network, what a block is, and what was looked at."""
    elements = _list_elements(model)
    looked = f" {named(elements)} {'is' if len(elements) == 1 else 'are'} not like that." if elements else ""
    reason = (
        "no block was found. A block is an element of a list of like modules (`Sequential`, `ModuleList`, numbered attributes) whose first "
        "tensor goes past its layers with weights to its output, in the same shape; or, in a network without such elements, a convolution of "
        f"a `Sequential` that keeps the shape.{looked} Describe other blocks with the hook `secateurs_describe_blocks`"
    )
    return Skipped(where="the network", reason=reason)


def _plain_blocks(model: nn.Module, example: Dataset) -> list[Block]:
    """Return the convolutions of plain stacks, each with the normalisation behind it, in order of execution."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        children = [(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()]
        for (name, child), (after, follower) in pairwise([*children, ("", nn.Identity())]):
            if isinstance(child, CONVOLUTIONS) and is_matrix_layer(child):
                found.append((after, (name,)) if isinstance(follower, NORMS) else (name, ()))
    calls = _record_calls(model, example, [name for last, first in found for name in (last, *first)])
    blocks = []
    for last, first in found:
        if not all(name in calls for name in (last, *first)):
            continue
        whole = replace(calls[last], inputs=calls[first[0] if first else last].inputs)
        blocks.append(replace(_judged(last, whole, True), also=first))
    return blocks


def _list_elements(model: nn.Module) -> list[str]:
    found = []
    for path, module in model.named_modules():
        children = list(module.named_children())
        for name, child in children:
            listed = isinstance(module, (nn.Sequential, nn.ModuleList))
            numbered = name[-1:].isdigit() and sum(type(other) is type(child) for _, other in children) > 1
            if (
                (listed or numbered)
                and not isinstance(child, (nn.Sequential, nn.ModuleList))
                and next(child.children(), None) is not None
            ):
                found.append(f"{path}.{name}" if path else name)
    return found


def _record_calls(model: nn.Module, example: Dataset, paths: Sequence[str]) -> dict[str, _Call]:
    calls: dict[str, _Call] = {}
    with inference(model), ExitStack() as stack:
        for path in paths:

            def hook(_: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                count = calls.pop(path).count + 1 if path in calls else 1
                elements = len(output) if isinstance(output, tuple) else None
                calls[path] = _Call(first_tensor((args, kwargs)), first_tensor(output), count, elements, args, kwargs)

            stack.callback(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True).remove)
        call(model, example)
    return calls


def _has_residual_path(block: nn.Module, record: _Call) -> bool:
    """Tell whether the block's output still depends on its input while every layer inside that mixes channels is silenced."""
    if record.inputs is None or record.outputs is None or record.inputs.shape != record.outputs.shape:
        return False
    with inference(block), frozen_randomness(0), ExitStack() as stack:
        for module in block.modules():
            if any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False)):

                def silence(_: nn.Module, __: Any, output: Any) -> Any:
                    value = first_tensor(output)
                    silent = None if value is None else torch.zeros_like(value)
                    return (silent, *output[1:]) if isinstance(output, tuple) else silent

                stack.callback(module.register_forward_hook(silence).remove)
        try:
            plain = first_tensor(record.again(block, record.inputs))
            moved = first_tensor(record.again(block, record.inputs + torch.rand_like(record.inputs)))
        except DOES_NOT_RUN:
            return False  # it needs values that silencing took away
    return plain is not None and moved is not None and not torch.equal(plain, moved)


def _judged(path: str, record: _Call, residual: bool) -> Block:
    if record.inputs is None or record.outputs is None:
        return Block(path, False, "it passes no floating-point tensor")
    if record.inputs.shape != record.outputs.shape:
        return Block(
            path,
            False,
            f"its input has shape {tuple(record.inputs.shape[1:])}, its output {tuple(record.outputs.shape[1:])}",
        )
    if record.count > 1:
        return Block(path, False, f"it runs {record.count} times in one forward pass: its weights are shared")
    if not residual:
        return Block(
            path, False, "its input reaches its output only through layers with weights: a projection shortcut"
        )
    return Block(path, True, elements=record.elements)


def _checked(model: nn.Module, example: Dataset, block: Block) -> Block:
    """Bypass a block on a real forward pass; it is removable only if that runs and stays finite."""
    if not block.removable:
        return block
    try:
        with inference(model), masked(model, {}, (block.path, *block.also)):
            outputs = output_tensors(call(model, example))
    except DOES_NOT_RUN as error:
        return Block(block.path, False, f"the network does not run without it: {first_line(error)}")
    if not all(bool(value.isfinite().all()) for value in outputs):
        return Block(block.path, False, "the network returns NaN or infinite values without it")
    return block
