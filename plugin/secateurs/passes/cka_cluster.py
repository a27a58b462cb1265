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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from secateurs.blocks import Block, no_blocks
from secateurs.errors import DataError
from secateurs.passes.base import Context, Pass, Proposal
from secateurs.passes.compared import Similarity, block_similarity, live_blocks
from secateurs.passes.depth import layers_after, renumbered
from secateurs.plan import DropBlock, Plan
from secateurs.report import Skipped
from secateurs.segmentation import anchored_clusters, removed_members
from secateurs.settings import CkaClusterSettings

__all__ = ["CkaCluster", "neighbours", "plan_clusters"]


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


def neighbours(blocks: Sequence[Block], plan: Plan) -> tuple[str, ...]:
    """Return the blocks that are left right before and right after each run of dropped blocks, in order of execution."""
    dropped = {edit.path for edit in plan.of(DropBlock)}
    near = set()
    for index, block in enumerate(blocks):
        if block.path in dropped:
            near.add(next((other.path for other in blocks[index::-1] if other.path not in dropped), None))
            near.add(next((other.path for other in blocks[index:] if other.path not in dropped), None))
    return tuple(path for block in blocks if block.path in near for path in block.paths)


@dataclass
class _Measured:
    """The blocks of one network and how similar they are."""

    context: Context | None = None
    blocks: list[Block] = field(default_factory=list)
    similarity: Similarity = field(default_factory=lambda: Similarity((), torch.zeros(0, 0, dtype=torch.float64)))


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
        self._first = _Measured()
        self._latest = _Measured()

    def aimed(self, blocks: int) -> Self:
        """Return a fresh pass that removes at most `blocks` blocks and shares what was measured on the first network.

        Args:
            blocks: how many may go, at least 1.
        """
        twin = type(self)(type(self.settings).model_validate({**self.settings.model_dump(), "max_blocks": blocks}))
        twin._first = self._first
        return twin

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
        measured = self._measure(context)
        live, similarity = measured.blocks, measured.similarity
        skipped = [Skipped(where=block.path, reason=block.reason) for block in live if not block.removable]
        skipped += similarity.skipped if live else [no_blocks(context.model)]
        blocks = list(similarity.blocks)
        while self._granularity <= settings.max_granularity and blocks:
            plan, blocked = plan_clusters(
                similarity.cka,
                blocks,
                threshold=settings.threshold,
                granularity=self._granularity,
                max_blocks=self._left(),
            )
            skipped += blocked
            if plan:
                self._proposed = len(plan)
                return self._round(context, live, plan, skipped, self._details(similarity))
            self._granularity += 1
        if not self._proposed:
            skipped += _anchors(similarity.cka, blocks, settings.threshold)
        return Proposal(Plan(), _last_words(skipped), details=self._details(similarity))

    def _round(
        self, context: Context, live: Sequence[Block], plan: Plan, skipped: Sequence[Skipped], details: dict[str, Any]
    ) -> Proposal:
        settings = self.settings
        trainable = neighbours(live, plan) if settings.freeze else ()
        refitted = layers_after(context.model, context.example, plan) if settings.refit == "dense" else ()
        return Proposal(
            plan + renumbered(context.model, plan),
            _last_words(skipped),
            consumers=refitted,
            recovery_epochs=0 if settings.freeze and not trainable else settings.recovery_epochs,
            tolerance=settings.tolerance,
            recalibrate=True,
            trainable=trainable,
            details=details,
        )

    def answer(self, accepted: bool) -> None:
        """Measure again after an accepted round; after a rejected one, remove fewer members of each cluster."""
        if accepted:
            self._rounds += 1
            self._removed += self._proposed
        else:
            self._granularity += 1

    def _left(self) -> int | None:
        return None if self.settings.max_blocks is None else self.settings.max_blocks - self._removed

    def _measure(self, context: Context) -> _Measured:
        """Return the blocks of the network and their similarity, measured once per network."""
        if self._first.context is None:
            self._latest = self._first
        for known in (self._first, self._latest):
            if context.asks_as(known.context):
                return known
        if self._latest.context is not None:
            self._latest = _Measured()
        known = self._latest
        known.context, known.blocks = context, live_blocks(context, self.settings.ignored_layers)
        known.similarity = block_similarity(
            context, known.blocks, batch_size=self.settings.batch_size, estimator=self.settings.estimator
        )
        return known

    def _details(self, similarity: Similarity) -> dict[str, Any]:
        cka = similarity.cka
        return {
            "blocks": [block.path for block in similarity.blocks],
            "cka": [[round(value, 6) for value in row] for row in cka.tolist()],
            "clusters": anchored_clusters(cka.numpy(), self.settings.threshold) if similarity.blocks else [],
            "granularity": self._granularity,
        }


def _anchors(similarity: Tensor, blocks: Sequence[Block], threshold: float) -> Iterator[Skipped]:
    """Yield why each block that could go is the first of its cluster, and so stays at every granularity."""
    anchors = [cluster[0] for cluster in anchored_clusters(similarity.numpy(), threshold)]
    for before, anchor in zip([None, *anchors], anchors, strict=False):
        if not blocks[anchor].removable:
            continue
        reason = "the first block, with which the next ones are compared"
        if before is not None:
            value = float(similarity[before, anchor])
            reason = f"CKA {value:.4f} with {blocks[before].path}, below `threshold` {threshold:g}"
        yield Skipped(where=blocks[anchor].path, reason=reason)


def _last_words(skipped: Sequence[Skipped]) -> tuple[Skipped, ...]:
    """Return one reason for each block, the one that was found last."""
    return tuple({item.where: item for item in skipped}.values())
