"""`cka-cluster`: layer pruning by clusters of similar representations (MPruner).

Blocks whose outputs have a CKA of at least `threshold` with the first block of their cluster are redundant; granularity k removes members
1, 1+k, 1+2k, ... of each cluster. After recovery, a round is accepted if the drop on validation data is within the tolerance, and CKA is
measured again; otherwise the round is undone and k grows. Only blocks that can be bypassed go; a round that would
remove nothing counts as rejected.

References:
    Hu et al. 2024, MPruner (arXiv 2408.13482). We differ by the unbiased estimator, by decisions on validation data, and by checking each
    bypass on a real forward pass.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateurs.blocks import Block, find_blocks
from secateurs.data import Dataset
from secateurs.errors import DataError
from secateurs.passes.base import Context, Pass, Proposal
from secateurs.plan import DropBlock, Plan, SetAttribute
from secateurs.probe import execution_order, sweep
from secateurs.refit import refittable
from secateurs.report import Skipped
from secateurs.segmentation import anchored_clusters, removed_members
from secateurs.settings import CkaClusterSettings
from secateurs.similarity import CkaAccumulator, Estimator
from secateurs.surgery import Bypass

__all__ = ["CkaCluster", "cka_matrix", "plan_clusters", "renumbered"]

_NUMBERS = ("layer_idx", "layer_id", "layer_number")


def cka_matrix(
    model: nn.Module, names: list[str], data: Dataset, *, batch_size: int = 64, estimator: Estimator = "unbiased"
) -> Tensor:
    """Return the CKA of the outputs of some modules, all pairs, from one sweep over `data`.

    Args:
        model: the network; it is not changed.
        names: the modules, in order.
        data: calibration examples; a last batch of fewer than 4 is left out.
        batch_size: examples per Gram matrix.
        estimator: see `secateurs.similarity`.

    Returns:
        Shape `(L, L)`, float64.
    """
    accumulator = CkaAccumulator(names, estimator)
    taps = {name: accumulator.tap(name) for name in names}
    sweep(model, data, taps, batch_size=batch_size, after_batch=accumulator.end_batch)
    return accumulator.compute()


def plan_clusters(
    similarity: Tensor, blocks: list[Block], *, threshold: float, granularity: int, max_blocks: int | None = None
) -> tuple[Plan, list[Skipped]]:
    """Return the blocks that one round removes, and those it would remove if they could go.

    Args:
        similarity: CKA of the blocks' outputs, shape `(L, L)`.
        blocks: the blocks, in order.
        threshold: of the clusters.
        granularity: k.
        max_blocks: remove at most this many, the most similar to their anchors; None for all.
    """
    clusters = anchored_clusters(similarity.numpy(), threshold)
    anchors = {member: cluster[0] for cluster in clusters for member in cluster}
    chosen, skipped = [], []
    for index in removed_members(clusters, granularity):
        block, value = blocks[index], float(similarity[anchors[index], index])
        if block.removable:
            chosen.append((value, index))
        else:
            skipped.append(
                Skipped(
                    where=block.path, reason=f"CKA {value:.4f} with {blocks[anchors[index]].path}, but {block.reason}"
                )
            )
    if max_blocks is not None:
        chosen = sorted(chosen, reverse=True)[:max_blocks]
    edits = tuple(
        blocks[index].dropped(f"CKA {value:.4f} with {blocks[anchors[index]].path}")
        for value, index in sorted(chosen, key=lambda item: -item[1])
    )
    return Plan(edits=edits), skipped


def renumbered(model: nn.Module, plan: Plan) -> Plan:
    """Return the edits that close the gaps in the numbers that layers of a list know of themselves (`layer_idx`), which address caches."""
    dropped = {path for edit in plan.of(DropBlock) for path in edit.paths}
    edits = []
    for name, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList) or not any(path.rpartition(".")[0] == name for path in dropped):
            continue
        left = 0
        for position, layer in enumerate(layers):
            path = f"{name}.{position}"
            if path in dropped or isinstance(layer, Bypass):
                continue
            for inner, module in layer.named_modules(prefix=path):
                for attribute in _NUMBERS:
                    number = getattr(module, attribute, None)
                    if isinstance(number, int) and number != left and number <= position:
                        why = f"{position - left} layers before it are gone"
                        edits.append(SetAttribute(module=inner, name=attribute, value=left, reason=why))
            left += 1
    return Plan(edits=tuple(edits))


class CkaCluster(Pass):
    """Bypass blocks whose representations barely differ."""

    name: ClassVar[str] = "cka-cluster"
    Settings: ClassVar[type[CkaClusterSettings]] = CkaClusterSettings
    settings: CkaClusterSettings

    def __init__(self, settings: CkaClusterSettings | None = None, **options: Any) -> None:
        super().__init__(settings, **options)
        self._granularity = self.settings.granularity
        self._rounds = 0
        self._removed = 0
        self._proposed = 0
        self._measured: tuple[nn.Module, list[Block], Tensor] | None = None

    def requires(self, context: Context) -> None:
        """Check for validation data, which decides each round."""
        super().requires(context)
        if context.evaluate is None:
            raise DataError(
                f"pass {self.name!r} decides its rounds on labelled validation data, and there are none; give calibration labels, or a "
                f"`validation` role (in Python: `evaluate=`)."
            )

    def propose(self, context: Context) -> Proposal:
        """Return the next round: the blocks of one granularity, or an empty plan when there is nothing left to try."""
        settings = self.settings
        if self._rounds >= settings.max_rounds or self._left() == 0:
            return Proposal(Plan())
        blocks, similarity = self._measure(context)
        skipped = [Skipped(where=block.path, reason=block.reason) for block in blocks if not block.removable]
        while self._granularity <= settings.max_granularity and blocks:
            plan, blocked = plan_clusters(
                similarity, blocks, threshold=settings.threshold, granularity=self._granularity, max_blocks=self._left()
            )
            if plan:
                self._proposed = len(plan)
                plan += renumbered(context.model, plan)
                known = {item.where: item for item in (*skipped, *blocked)}
                return Proposal(
                    plan,
                    tuple(known.values()),
                    consumers=self._consumers(context, plan),
                    recovery_epochs=settings.recovery_epochs,
                    tolerance=settings.tolerance,
                    recalibrate=True,
                    details=self._details(blocks, similarity),
                )
            skipped += blocked
            self._granularity += 1
        return Proposal(
            Plan(), tuple({item.where: item for item in skipped}.values()), details=self._details(blocks, similarity)
        )

    def answer(self, accepted: bool) -> None:
        """Measure again after an accepted round; after a rejected one, remove fewer members of each cluster."""
        if accepted:
            self._rounds += 1
            self._removed += self._proposed
            self._measured = None
        else:
            self._granularity += 1

    def _left(self) -> int | None:
        return None if self.settings.max_blocks is None else self.settings.max_blocks - self._removed

    def _measure(self, context: Context) -> tuple[list[Block], Tensor]:
        if self._measured is None or self._measured[0] is not context.model:
            blocks = [
                block
                for block in find_blocks(context.model, context.example, context.describe_blocks)
                if not isinstance(context.model.get_submodule(block.path), (nn.Identity, Bypass))
            ]
            names = [block.path for block in blocks]
            similarity = torch.zeros(0, 0)
            if names:
                similarity = cka_matrix(
                    context.model,
                    names,
                    context.calibration,
                    batch_size=self.settings.batch_size,
                    estimator=self.settings.estimator,
                )
            self._measured = (context.model, blocks, similarity)
        return self._measured[1], self._measured[2]

    @staticmethod
    def _consumers(context: Context, plan: Plan) -> tuple[str, ...]:
        """Return every layer that runs after the first dropped block, outside the dropped blocks."""
        dropped = [path for edit in plan.of(DropBlock) for path in edit.paths]
        order = [
            name
            for name in execution_order(context.model, context.example)
            if refittable(context.model.get_submodule(name))
        ]
        inside = [
            index
            for index, name in enumerate(order)
            if any(name == path or name.startswith(path + ".") for path in dropped)
        ]
        after = order[min(inside) :] if inside else []
        return tuple(name for name in after if not any(name == path or name.startswith(path + ".") for path in dropped))

    def _details(self, blocks: list[Block], similarity: Tensor) -> dict[str, Any]:
        return {
            "blocks": [block.path for block in blocks],
            "cka": [[round(value, 6) for value in row] for row in similarity.tolist()],
            "clusters": anchored_clusters(similarity.numpy(), self.settings.threshold) if blocks else [],
            "granularity": self._granularity,
        }
