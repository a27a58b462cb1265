"""Trials: networks without one more block, mended a little and measured, and the greedy order that follows from them.

A block is not removed alone: what a removal costs depends on those before it, and on what mending can repair. So each step bypasses every
candidate in turn on the network that the steps before left, mends it, and removes the one that does least harm. Mending is a small version of
what the pipeline does after the removal: BatchNorm is recalibrated, or the layers up to the end of the next blocks are refitted towards the
network before all removals; either is kept only if the held-out divergence falls. The divergence is taken at a temperature at which the network
has doubts, since images that it has learned by heart show little of what a removal does to others.

References:
    Song et al. 2024, SLEB (greedy removal, measured again after each); the refit is that of `secateurs.refit`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from secateurs.blocks import Block
from secateurs.data import Dataset
from secateurs.forward import predict
from secateurs.interfaces import ProgressEvent
from secateurs.outputs import kl_divergence, prediction_rows, unsure_temperature
from secateurs.passes.base import Context
from secateurs.passes.depth import Removal, dropping, layers_after, within
from secateurs.plan import Plan
from secateurs.recalibration import estimate_statistics
from secateurs.refit import refit
from secateurs.surgery import applied

__all__ = ["Trial", "Trials", "greedy", "held_out", "label_loss"]


@dataclass(frozen=True)
class Trial:
    """A network without one more block.

    Attributes:
        score: what the removal costs; lower is better.
        network: the pruned network, mended.
    """

    score: float
    network: nn.Module


def held_out(context: Context, most: int) -> Dataset:
    """Return up to `most` examples for measuring: validation data, which statistics are not gathered on, or else calibration data."""
    source = context.validation or context.calibration
    return source.take(np.arange(min(most, len(source))))


def label_loss(prediction: Tensor, data: Dataset) -> float | None:
    """Return the mean cross-entropy of class labels, one per prediction; None where the labels are of another kind.

    Args:
        prediction: logits; see `secateurs.outputs`.
        data: the examples that were predicted.
    """
    if data.labels is None or not np.issubdtype(data.labels.dtype, np.integer) or prediction.ndim < 2:
        return None
    flat = prediction_rows(prediction)
    labels = np.asarray(data.labels, dtype=np.int64).reshape(-1)
    if len(labels) != len(flat) or labels.min() < 0 or labels.max() >= flat.shape[1]:
        return None
    return float(F.cross_entropy(flat.double(), flat.new_tensor(labels).long()))


class Trials:
    """Removes blocks of one network on trial, and measures the divergence from the network before.

    Attributes:
        temperature: at which the divergence is taken.

    Args:
        context: of the network.
        measured_on: examples for the divergence.
        statistics: examples for refit and recalibration.
        reach: how many of the blocks behind the removed one are refitted; 0 refits none and recalibrates BatchNorm instead.
    """

    def __init__(self, context: Context, *, measured_on: Dataset, statistics: Dataset, reach: int) -> None:
        self.context = context
        self.measured_on = measured_on
        self.statistics = statistics
        self.reach = reach
        self._reference = predict(context.model, measured_on)
        self.temperature = unsure_temperature(self._reference)

    def without(self, network: nn.Module, block: Block, following: Sequence[Block]) -> Trial:
        """Return `network` without one more block, mended.

        Args:
            network: the network that earlier removals left; it is not changed.
            block: what goes.
            following: the blocks behind it that are left.
        """
        plan = dropping(network, [Removal(block, "on trial")])
        plain = self._measured(applied(network, plan))
        mended = copy.deepcopy(plain.network)
        if self.reach:
            dense, consumers = self.context.model, self._consumers(network, plan, following)
            changed = bool(refit(mended, dense, Plan(), consumers, self.statistics, seed=self.context.seed))
        else:
            changed = estimate_statistics(mended, self.statistics)
        return min(plain, self._measured(mended), key=lambda trial: trial.score) if changed else plain

    def _measured(self, network: nn.Module) -> Trial:
        return Trial(kl_divergence(self._reference, predict(network, self.measured_on), self.temperature), network)

    def _consumers(self, network: nn.Module, plan: Plan, following: Sequence[Block]) -> list[str]:
        """Return the layers behind the dropped block, up to the end of the last block in reach."""
        behind = layers_after(network, self.context.example, plan)
        if len(following) < self.reach:
            return list(behind)
        last = following[self.reach - 1].paths
        inside = [index for index, name in enumerate(behind) if within(name, last)]
        return list(behind[: max(inside) + 1]) if inside else []


def greedy(
    context: Context,
    blocks: Sequence[Block],
    candidates: Callable[[Sequence[Block]], Sequence[Block]],
    attempt: Callable[[nn.Module, Block, Sequence[Block]], Trial],
    word: str,
) -> Iterator[Removal]:
    """Yield blocks, each the one whose removal costs least after those before it; every step tries all candidates anew.

    Args:
        context: of the network.
        blocks: all blocks that are left, in order of execution.
        candidates: the blocks that may go next, given those that went.
        attempt: from a network, a block of it and the blocks behind that, the network without the block and its score.
        word: what the score is, for reasons.
    """
    network, gone = context.model, list[Block]()
    while options := candidates(gone):
        scores: dict[str, float] = {}
        best: tuple[float, nn.Module, Block] | None = None
        for number, block in enumerate(options, start=1):
            told = ProgressEvent(f"removal {len(gone) + 1}", number, len(options), block.path)
            context.progress(told)
            following = [other for other in blocks[blocks.index(block) + 1 :] if other not in gone]
            trial = attempt(network, block, following)
            scores[block.path] = trial.score
            if best is None or trial.score < best[0]:
                best = (trial.score, trial.network, block)
        assert best is not None
        score, network, block = best
        gone.append(block)
        reason = f"{word} {score:.4g} without it, the lowest of {len(options)} after {len(gone) - 1} removals"
        yield Removal(block, reason, {"score": score, "scores": scores})
