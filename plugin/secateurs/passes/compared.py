"""The blocks of a network that are left, and how similar their outputs are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from secateurs.blocks import Block, find_blocks
from secateurs.data import Dataset
from secateurs.passes.base import Context, ignoring
from secateurs.probe import Tap, sweep
from secateurs.report import Skipped
from secateurs.similarity import CkaAccumulator, Estimator, pooled
from secateurs.surgery import Bypass

__all__ = ["Similarity", "block_similarity", "cka_matrix", "live_blocks"]


def live_blocks(context: Context, ignored: Sequence[str] = ()) -> list[Block]:
    """Return the blocks of `context.model` that are not bypassed yet, in order of execution.

    Args:
        context: the network and what finds its blocks.
        ignored: patterns of layers that stay: a block that is one, is inside of one or holds one cannot be removed.
    """
    found = [
        block
        for block in find_blocks(context.model, context.example, context.describe_blocks)
        if not isinstance(context.model.get_submodule(block.path), (nn.Identity, Bypass))
    ]
    return [_kept(context.model, block, ignored) for block in found]


def _kept(model: nn.Module, block: Block, ignored: Sequence[str]) -> Block:
    """Return the block, not removable where its removal would take an ignored layer away."""
    if not block.removable or not ignored:
        return block
    for path in block.paths:
        for name, _ in model.get_submodule(path).named_modules(prefix=path):
            pattern = ignoring(name, ignored)
            if pattern is not None:
                return replace(block, removable=False, reason=f"`ignored_layers` names {pattern!r}: {name!r} stays")
    return block


def cka_matrix(
    model: nn.Module, names: list[str], data: Dataset, *, batch_size: int = 64, estimator: Estimator = "unbiased"
) -> Tensor:
    """Return the CKA of the outputs of some modules, all pairs, from one sweep over `data`.

    An output of shape `(n, length, d)` whose positions are those of the attention mask, or of an integer input, is one row per sequence:
    the mean over its tokens but the first (`secateurs.similarity.pooled`). All other outputs are flattened.

    Args:
        model: the network; it is not changed.
        names: the modules, in order.
        data: calibration examples; a last batch of fewer than 4 is left out.
        batch_size: examples per Gram matrix.
        estimator: see `secateurs.similarity`.

    Returns:
        Shape `(L, L)`, float64.

    Raises:
        DataError: a module is constant or not finite.
    """
    return _compared(model, names, data, batch_size, estimator).compute()


def _compared(
    model: nn.Module, names: list[str], data: Dataset, batch_size: int, estimator: Estimator
) -> CkaAccumulator:
    accumulator = CkaAccumulator(names, estimator)
    masks: dict[tuple[int, ...], Tensor] = {}

    def begin(batch: Dataset) -> None:
        masks.clear()
        masks.update(_masks(batch))

    taps = {name: _pooling(accumulator.tap(name), masks) for name in names}
    sweep(model, data, taps, batch_size=batch_size, before_batch=begin, after_batch=accumulator.end_batch)
    return accumulator


def _masks(batch: Dataset) -> dict[tuple[int, ...], Tensor]:
    """Return which positions are tokens, by shape: of a mask, or else all of an integer input."""
    masks = {} if batch.tokens is None else {tuple(batch.tokens.shape): torch.from_numpy(batch.tokens)}
    for array in batch.inputs.values():
        if array.ndim == 2 and array.dtype.kind in "iu":
            masks.setdefault(tuple(array.shape), torch.ones(array.shape, dtype=torch.bool))
    return masks


def _pooling(tap: Tap, masks: Mapping[tuple[int, ...], Tensor]) -> Tap:
    """Return a tap that gets one row per sequence where outputs are tokens by the masks of the batch."""

    def pooled_tap(inputs: Tensor, outputs: Tensor) -> None:
        tokens = masks.get(tuple(outputs.shape[:2])) if outputs.ndim == 3 else None
        tap(inputs, outputs if tokens is None else pooled(outputs.detach(), tokens.to(outputs.device)))

    return pooled_tap


@dataclass(frozen=True)
class Similarity:
    """The CKA of blocks with each other.

    Attributes:
        blocks: those that can be compared, in order of execution.
        cka: of their outputs, shape `(L, L)`, float64.
        skipped: those whose outputs are the same for every example.
    """

    blocks: tuple[Block, ...]
    cka: Tensor
    skipped: tuple[Skipped, ...] = ()


def block_similarity(
    context: Context, blocks: Sequence[Block], *, batch_size: int = 64, estimator: Estimator = "unbiased"
) -> Similarity:
    """Compare the outputs of blocks on the calibration data; a block whose output is constant has no CKA and is left out."""
    if not blocks:
        return Similarity((), torch.zeros(0, 0, dtype=torch.float64))
    names = [block.path for block in blocks]
    found = _compared(context.model, names, context.calibration, batch_size, estimator)
    constant = set(found.constant)
    skipped = tuple(
        Skipped(where=name, reason="its outputs are the same for every example, so that it has no CKA")
        for name in names
        if name in constant
    )
    kept = tuple(block for block in blocks if block.path not in constant)
    return Similarity(kept, found.compute([block.path for block in kept]), skipped)
