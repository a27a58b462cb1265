"""What a plan took from a network, in the words of a report: blocks that are bypassed, and units kept of each group."""

from __future__ import annotations

from typing import Any

from torch import nn

from secateurs.plan import DropBlock, Plan, RemoveUnits, Slice

__all__ = ["changes"]


def changes(pruned: nn.Module, plan: Plan) -> dict[str, Any]:
    """Return what `plan` removed, with the reason of each edit.

    Args:
        pruned: the network that `plan` led to.
        plan: its edits.

    Returns:
        `dropped`: for each bypassed block its `block` and `reason`; `units`: for each group `root`, `before` and `kept` (units) and
        `reason`, in the order of the plan. A group that lies in a bypassed block is left out, as nothing of it is left.
    """
    units: dict[str, dict[str, Any]] = {}
    for edit in plan.of(RemoveUnits):
        kept = _kept(pruned, edit)
        if kept is None:
            continue
        row = units.setdefault(edit.root, {"root": edit.root, "before": kept, "kept": kept, "reason": edit.reason})
        row["before"] += len(edit.units)
        row["reason"] = edit.reason
    return {
        "dropped": [{"block": edit.path, "reason": edit.reason} for edit in plan.of(DropBlock)],
        "units": list(units.values()),
    }


def _kept(pruned: nn.Module, edit: RemoveUnits) -> int | None:
    """Return the units of a group that are left, or None where its root is gone.

    A unit may be several indices of a tensor (a head), so that a size counts in indices per removed unit.
    """
    piece: Slice = next((one for one in edit.slices if one.module == edit.root), edit.slices[0])
    try:
        tensor = getattr(pruned.get_submodule(piece.module), piece.parameter)
        size = int(tensor.shape[piece.dim])
    except (AttributeError, IndexError):
        return None
    return round(size * len(edit.units) / len(piece.removed))
