"""`cka-segment`: layer pruning by segments of similar layers (SGLP).

The rows of the CKA matrix are split into contiguous segments by Fisher's optimal segmentation. One budget, a count of blocks or a target for
the whole network, is spent where a removal costs least, and every segment keeps at least one block. What a removal costs is measured: each
candidate is bypassed, mended a little, and the divergence of the network's output on held-out data is taken, anew after every removal. Blocks
that cannot be bypassed (stage entries) stay.

References:
    Li et al. 2024, SGLP (arXiv 2410.14720). Paper mode is `estimator: biased`, `representation: sum`, `score: gradnorm` and `segments` set by
    hand. We differ by the unbiased estimator, by whole CKA rows instead of their sums, by the measured score, by one global budget instead
    of counts per segment, and by leaving stage entries alone (the released code initialises them at random).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np

from secateurs.blocks import Block
from secateurs.errors import RecipeError
from secateurs.passes.base import Context
from secateurs.passes.compared import Similarity, block_similarity
from secateurs.passes.depth import Choice, DepthPass, Ranking
from secateurs.passes.gradnorm import GradNormChoice
from secateurs.passes.trials import Trials, greedy, held_out
from secateurs.report import Skipped
from secateurs.segmentation import elbow, optimal_losses, optimal_segments
from secateurs.settings import CkaSegmentSettings

__all__ = ["CkaSegment", "segments_of"]


def segments_of(similarity: Similarity, settings: CkaSegmentSettings) -> list[list[Block]]:
    """Return the segments of the blocks, in order.

    Args:
        similarity: of the blocks.
        settings: the number of segments, or None for the elbow of the losses; and what represents a block.

    Raises:
        RecipeError: there are fewer blocks than segments.
    """
    blocks, rows = similarity.blocks, similarity.cka.numpy()
    if not blocks:
        return []
    samples = rows if settings.representation == "row" else rows.sum(0)
    if settings.segments is not None and settings.segments > len(blocks):
        raise RecipeError(
            f"pass 'cka-segment': `segments` is {settings.segments}, and there are {len(blocks)} blocks to split; give at most that many, or "
            f"leave it out."
        )
    count = settings.segments or elbow(optimal_losses(samples))
    return [[blocks[index] for index in segment] for segment in optimal_segments(samples, count)]


class CkaSegment(DepthPass):
    """Bypass the blocks whose removal costs least, and keep at least one of every segment of similar blocks."""

    name: ClassVar[str] = "cka-segment"
    Settings: ClassVar[type[CkaSegmentSettings]] = CkaSegmentSettings
    settings: CkaSegmentSettings
    limit: ClassVar[str] = (
        "every segment keeps a block; give fewer `segments` to let more go. Blocks that cannot be bypassed are listed with the reason"
    )

    def choice(self, context: Context, blocks: Sequence[Block]) -> Choice:
        """Return the blocks of the lowest measured cost, or of the largest GradNorm of what stays."""
        settings = self.settings
        similarity = block_similarity(context, blocks, batch_size=settings.batch_size, estimator=settings.estimator)
        segments = segments_of(similarity, settings)
        details = _details(similarity, segments)
        skipped = (*similarity.skipped, *_alone(segments))
        if settings.score == "gradnorm":
            return GradNormChoice(
                context,
                segments,
                batches=settings.gradnorm_batches,
                batch_size=64,
                limit=settings.max_combinations,
                details=details,
                skipped=skipped,
            )
        measured_on = held_out(context, settings.held_out)
        count = min(settings.statistics, len(context.calibration))
        trials = Trials(
            context,
            measured_on=measured_on,
            statistics=context.calibration.take(np.arange(count)),
            reach=settings.reach,
        )
        order = greedy(context, blocks, partial(_candidates, segments), trials.without, "divergence")
        return Ranking(order, {**details, "temperature": trials.temperature}, skipped)


def _candidates(segments: Sequence[Sequence[Block]], gone: Sequence[Block]) -> list[Block]:
    """Return the blocks that can be bypassed and are not the last of their segment."""
    found = []
    for segment in segments:
        left = [block for block in segment if block not in gone]
        if len(left) > 1:
            found += [block for block in left if block.removable]
    return found


def _alone(segments: Sequence[Sequence[Block]]) -> list[Skipped]:
    reason = "it is a segment of its own, and every segment keeps a block"
    return [
        Skipped(where=segment[0].path, reason=reason)
        for segment in segments
        if len(segment) == 1 and segment[0].removable
    ]


def _details(similarity: Similarity, segments: Sequence[Sequence[Block]]) -> dict[str, Any]:
    return {
        "compared": [block.path for block in similarity.blocks],
        "cka": [[round(value, 6) for value in row] for row in similarity.cka.tolist()],
        "segments": [[block.path for block in segment] for segment in segments],
    }
