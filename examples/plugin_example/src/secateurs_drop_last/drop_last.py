"""`drop-last-block`: bypass the last removable blocks, a baseline that any measure of similarity has to beat."""

from __future__ import annotations

from typing import ClassVar

from secateurs.blocks import find_blocks
from secateurs.passes.base import Context, Pass, Proposal
from secateurs.plan import Plan
from secateurs.report import Skipped
from secateurs_drop_last.settings import DropLastBlockSettings

__all__ = ["DropLastBlock"]


class DropLastBlock(Pass):
    """Bypass the last `count` blocks that can be bypassed."""

    name: ClassVar[str] = "drop-last-block"
    Settings: ClassVar[type[DropLastBlockSettings]] = DropLastBlockSettings
    settings: DropLastBlockSettings

    def __init__(self, settings: DropLastBlockSettings | None = None, **options: int) -> None:
        super().__init__(settings, **options)
        self._done = False

    def propose(self, context: Context) -> Proposal:
        """Return the one proposal of this pass, then an empty plan, which ends it."""
        if self._done:
            return Proposal(Plan())
        self._done = True
        blocks = find_blocks(context.model, context.example, context.describe_blocks)
        removable = [block for block in blocks if block.removable]
        skipped = [Skipped(where=block.path, reason=block.reason) for block in blocks if not block.removable]
        count = self.settings.count
        if len(removable) < count:
            reason = f"`count` is {count}, and only {len(removable)} of {len(blocks)} blocks can be bypassed"
            skipped.append(Skipped(where="the network", reason=reason))
        last = list(reversed(removable))[:count]
        edits = [
            block.dropped(f"number {number} from the output of {len(removable)} removable blocks")
            for number, block in enumerate(last, start=1)
        ]
        return Proposal(Plan(edits=tuple(edits)), tuple(skipped), recalibrate=True)
