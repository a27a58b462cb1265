r"""GradNorm of freshly initialised networks, SGLP's measure of which layers of a segment to keep.

For a segment and a set $S$ of its layers to keep, a copy of the whole network is initialised at random, the trained weights of $S$ are written
into it and the other layers of the segment are bypassed. The score is $\lVert \nabla_\theta \mathcal L \rVert_2$ over all parameters, the mean
over a few batches with batch statistics; the set with the largest one stays. Every set gets its own fresh copy, initialised from one seed.

A segment of n layers has $\binom{n}{m}$ ways to lose m. Up to a limit all are tried; beyond it, the best way to lose m - 1 is extended by the
best further layer. The paper sets by hand how many layers each segment loses; here one budget goes, block by block, to the segment whose best
set then loses the smallest further share of its GradNorm.

References:
    Li et al. 2024, SGLP (arXiv 2410.14720); Abdelfattah et al. 2021, Zero-Cost Proxies (GradNorm). The released code initialises once, so that
    the weights of earlier sets stay in the network that scores later ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import nn

from secateurs.blocks import Block
from secateurs.data import IGNORED, Dataset
from secateurs.errors import ModelError
from secateurs.forward import call, frozen_randomness, logits, predict
from secateurs.interfaces import ProgressEvent
from secateurs.outputs import label_loss, own_labels, prediction_rows
from secateurs.passes.base import Context
from secateurs.passes.depth import Removal, dropping
from secateurs.report import Skipped
from secateurs.surgery import apply_plan

__all__ = ["GradNormChoice", "fresh", "gradient_norm", "labelled"]


def fresh(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy of a network with the weights that its layers start from.

    Args:
        model: the network; it is not changed.
        seed: of the initialisation.

    Raises:
        ModelError: a module has parameters of its own and no `reset_parameters`.
    """
    twin = copy.deepcopy(model)
    with frozen_randomness(seed):
        for name, module in twin.named_modules():
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset):
                reset()
            elif next(module.parameters(recurse=False), None) is not None:
                raise ModelError(
                    f"GradNorm needs a freshly initialised network, and module {name!r} ({type(module).__name__}) has parameters but no "
                    f"`reset_parameters` method; add one, or choose `score: bypass`."
                )
    return twin


def labelled(context: Context, most: int) -> Dataset:
    """Return up to `most` examples with class labels: training or validation data, or calibration data labelled by the network itself."""
    for source in (context.training, context.validation):
        if source is not None and source.labels is not None and np.issubdtype(source.labels.dtype, np.integer):
            return source.take(np.arange(min(most, len(source))))
    data = context.calibration.take(np.arange(min(most, len(context.calibration))))
    return replace(data, labels=own_labels(predict(context.model, data)).cpu().numpy())


def gradient_norm(model: nn.Module, data: Dataset, *, batch_size: int = 64, seed: int = 0) -> float:
    r"""Return $\lVert \nabla_\theta \mathcal L \rVert_2$ over all parameters, the mean over batches, with cross-entropy and batch statistics.

    Args:
        model: the network; its gradients, modes and BatchNorm statistics change.
        data: examples with class labels.
        batch_size: examples per gradient; a last batch of one is left out.
        seed: of dropout.
    """
    model.train().requires_grad_(True)
    norms = []
    with frozen_randomness(seed), torch.enable_grad():
        for batch in data.batches(batch_size):
            if len(batch) < 2:
                continue  # BatchNorm cannot train on a single example
            model.zero_grad(set_to_none=True)
            prediction = logits(call(model, batch))
            labels = torch.as_tensor(batch.labels, device=prediction.device)
            (label_loss(prediction_rows(prediction), labels) / max(1, int((labels != IGNORED).sum()))).backward()
            squares = [float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None]
            norms.append(math.sqrt(sum(squares)))
    return sum(norms) / len(norms) if norms else 0.0


class GradNormChoice:
    """Which blocks go, by the GradNorm of what stays of their segments.

    Args:
        context: of the network.
        segments: the blocks of each segment, in order.
        batches: of `batch_size` examples each.
        batch_size: examples per gradient.
        limit: ways to choose the blocks of a segment up to which all are tried.
        details: for the report.
        skipped: blocks that are left alone.
    """

    def __init__(
        self,
        context: Context,
        segments: Sequence[Sequence[Block]],
        *,
        batches: int,
        batch_size: int,
        limit: int,
        details: Mapping[str, Any],
        skipped: Sequence[Skipped] = (),
    ) -> None:
        self.details = details
        self.skipped = skipped
        self._context = context
        self._segments = segments
        self._data = labelled(context, batches * batch_size)
        self._batch_size = batch_size
        self._limit = limit
        self._best: dict[tuple[int, int], tuple[frozenset[str], float]] = {}

    def first(self, count: int) -> Sequence[Removal]:
        """Return the blocks that go if `count` may."""
        losing = [0] * len(self._segments)
        for _ in range(count):
            costs = {
                number: self._share(number, losing[number]) - self._share(number, losing[number] + 1)
                for number, segment in enumerate(self._segments)
                if losing[number] < most_removable(segment)
            }
            if not costs:
                break
            losing[min(costs, key=lambda number: costs[number])] += 1
        return [removal for number, lost in enumerate(losing) for removal in self._removals(number, lost)]

    def _removals(self, number: int, lost: int) -> Iterable[Removal]:
        gone, norm = self._best_of(number, lost)
        for block in self._segments[number]:
            if block.path in gone:
                reason = f"segment {number} keeps GradNorm {norm:.4g} without {lost} of its {len(self._segments[number])} blocks"
                yield Removal(block, reason, {"segment": number, "gradnorm": norm, "share": self._share(number, lost)})

    def _share(self, number: int, lost: int) -> float:
        """Return the GradNorm with `lost` blocks gone, relative to that of the whole segment."""
        whole = self._best_of(number, 0)[1]
        return self._best_of(number, lost)[1] / whole if whole > 0 else 0.0

    def _best_of(self, number: int, lost: int) -> tuple[frozenset[str], float]:
        """Return the blocks of a segment to remove, and the GradNorm of what stays."""
        if (number, lost) not in self._best:
            removable = [block.path for block in self._segments[number] if block.removable]
            if math.comb(len(removable), lost) <= self._limit:
                options = [frozenset(paths) for paths in combinations(removable, lost)]
            else:
                before = self._best_of(number, lost - 1)[0]
                options = [before | {path} for path in removable if path not in before]
            scored = []
            for index, gone in enumerate(options, start=1):
                word = f"segment {number} without {lost}"
                self._context.progress(ProgressEvent("GradNorm", index, len(options), word))
                scored.append((gone, self._norm(number, gone)))
            self._best[number, lost] = max(scored, key=lambda option: option[1])
        return self._best[number, lost]

    def _norm(self, number: int, gone: frozenset[str]) -> float:
        model, seed = self._context.model, self._context.seed
        network = fresh(model, seed)
        for block in self._segments[number]:
            for path in () if block.path in gone else block.paths:
                network.get_submodule(path).load_state_dict(model.get_submodule(path).state_dict())
        removals = [Removal(block, "on trial") for block in self._segments[number] if block.path in gone]
        return gradient_norm(
            apply_plan(network, dropping(model, removals)), self._data, batch_size=self._batch_size, seed=seed
        )


def most_removable(segment: Sequence[Block]) -> int:
    """Return how many blocks a segment may lose: all that can be bypassed, but never its last."""
    removable = sum(block.removable for block in segment)
    return min(removable, len(segment) - 1)
