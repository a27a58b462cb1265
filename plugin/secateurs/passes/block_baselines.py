r"""The depth baselines that everybody compares with: random blocks, block influence, and greedy removal by loss.

Block influence is $\mathrm{BI} = 1 - \mathbb E\cos(x_{in}, x_{out})$ over tokens or positions: the lower, the less a block changes its input.
The lowest go first, scored once on the network as it is. Greedy removal evaluates every remaining block after each removal and takes the one
whose removal leaves the lowest loss, without mending.

References:
    Men et al. 2024, ShortGPT (block influence); Song et al. 2024, SLEB (greedy removal by loss).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.blocks import Block
from secateurs.data import Dataset
from secateurs.forward import predict
from secateurs.layers import channel_dim, mixes
from secateurs.outputs import kl_divergence
from secateurs.passes.base import Context
from secateurs.passes.depth import Choice, DepthPass, Ranking, Removal, dropping
from secateurs.passes.trials import Trial, greedy, label_loss
from secateurs.probe import sweep
from secateurs.settings import BlockInfluenceSettings, LossGreedySettings, RandomBlocksSettings
from secateurs.surgery import applied

__all__ = ["BlockInfluence", "LossGreedy", "RandomBlocks", "block_influence"]

BATCH = 64
"""Examples per forward pass."""


class RandomBlocks(DepthPass):
    """Bypass blocks drawn at random."""

    name: ClassVar[str] = "random-blocks"
    Settings: ClassVar[type[RandomBlocksSettings]] = RandomBlocksSettings
    settings: RandomBlocksSettings

    def choice(self, context: Context, blocks: Sequence[Block]) -> Choice:
        """Return the blocks in a seeded random order."""
        seed = context.seed if self.settings.seed is None else self.settings.seed
        removable = [block for block in blocks if block.removable]
        order = np.random.default_rng(seed).permutation(len(removable))
        return Ranking(Removal(removable[index], f"drawn at random with seed {seed}") for index in order)


class BlockInfluence(DepthPass):
    """Bypass the blocks that change the direction of their input least."""

    name: ClassVar[str] = "block-influence"
    Settings: ClassVar[type[BlockInfluenceSettings]] = BlockInfluenceSettings
    settings: BlockInfluenceSettings

    def choice(self, context: Context, blocks: Sequence[Block]) -> Choice:
        """Return the blocks by ascending influence."""
        removable = [block for block in blocks if block.removable]
        influence = block_influence(context.model, removable, context.calibration)
        order = sorted(removable, key=lambda block: influence[block.path])
        return Ranking(
            Removal(block, f"block influence {influence[block.path]:.4g}", {"influence": influence[block.path]})
            for block in order
        )


def block_influence(model: nn.Module, blocks: Sequence[Block], data: Dataset) -> Mapping[str, float]:
    r"""Return $1 - \mathbb E\cos(x_{in}, x_{out})$ of each block, by path.

    The mean is over examples and positions, padding left out; a vector holds the channels of one position. A position where both vectors are
    zero was not changed and counts as a cosine of 1; where only one is zero, as 0.

    Args:
        model: the network; it is not changed.
        blocks: blocks whose output has the shape of their input.
        data: calibration examples.
    """
    sums = {block.path: torch.zeros((), dtype=torch.float64) for block in blocks}
    counts = dict.fromkeys(sums, 0)
    inputs: dict[str, Tensor] = {}
    taps: dict[str, Callable[[Tensor, Tensor], None]] = {}
    for block in blocks:
        axis = _channel_axis(model, block)

        def remember(before: Tensor, _: Tensor, path: str = block.path) -> None:
            inputs[path] = before.clone()  # a layer behind may work in place

        def compare(before: Tensor, after: Tensor, path: str = block.path, axis: Callable[..., int] = axis) -> None:
            before = inputs.pop(path, before)
            cosine = _cosine(before, after, axis(after))
            if batch.tokens is not None and cosine.shape == batch.tokens.shape:
                cosine = cosine[torch.from_numpy(batch.tokens).to(cosine.device)]
            sums[path] += cosine.sum(dtype=torch.float64).cpu()
            counts[path] += cosine.numel()

        taps[block.path] = compare
        if block.also:
            taps[block.also[0]] = remember
    for batch in data.longest_first().batches(BATCH):
        sweep(model, batch, taps, batch_size=BATCH)
    return {path: 1 - float(total) / max(counts[path], 1) for path, total in sums.items()}


def _channel_axis(model: nn.Module, block: Block) -> Callable[[Tensor], int]:
    """Return which axis of a block's tensors holds the channels: that of the first layer inside that mixes them."""
    inside = (module for path in block.paths for module in model.get_submodule(path).modules())
    first = next((module for module in inside if mixes(module)), nn.Identity())
    return partial(channel_dim, first)


def _cosine(before: Tensor, after: Tensor, axis: int) -> Tensor:
    a, b = before.detach().float(), after.detach().float()
    norms = a.norm(dim=axis) * b.norm(dim=axis)
    cosine: Tensor = (a * b).sum(axis) / norms.clamp_min(torch.finfo(torch.float32).tiny)
    unchanged = (a == 0).all(axis) & (b == 0).all(axis)
    return cosine.masked_fill(unchanged, 1.0)


class LossGreedy(DepthPass):
    """Bypass, one after the other, the block without which the loss on calibration data is lowest."""

    name: ClassVar[str] = "loss-greedy"
    Settings: ClassVar[type[LossGreedySettings]] = LossGreedySettings
    settings: LossGreedySettings

    def choice(self, context: Context, blocks: Sequence[Block]) -> Choice:
        """Return the blocks in the order of greedy removal."""
        data = context.calibration.take(np.arange(min(self.settings.samples, len(context.calibration))))
        reference = predict(context.model, data)
        labelled = label_loss(reference, data) is not None

        def attempt(network: nn.Module, block: Block, _: Sequence[Block]) -> Trial:
            pruned = applied(network, dropping(network, [Removal(block, "on trial")]))
            prediction = predict(pruned, data)
            loss = label_loss(prediction, data) if labelled else None
            return Trial(kl_divergence(reference, prediction) if loss is None else loss, pruned)

        def candidates(gone: Sequence[Block]) -> list[Block]:
            return [block for block in blocks if block.removable and block not in gone]

        word = "cross-entropy" if labelled else "divergence"
        order: Iterator[Removal] = greedy(context, blocks, candidates, attempt, word)
        return Ranking(order, {"loss": word})
