"""What can be pruned and what cannot: blocks, groups, CKA map and cost of a network, as data and as a tree for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.tree import Tree

from secateurs import cost
from secateurs.blocks import find_blocks
from secateurs.passes.compared import block_similarity
from secateurs.passes.survey import checked_groups
from secateurs.pipeline import Session
from secateurs.settings import NodeSettings
from secateurs.similarity import MINIMUM_EXAMPLES
from secateurs.terminal import escape

__all__ = ["inspect", "render"]


def inspect(session: Session) -> dict[str, Any]:
    """Return the blocks, groups, refusals, CKA map and cost of the baseline network, as plain data.

    The rows and columns of the map are `cka_blocks`: blocks with a constant output have no CKA and are among `skipped`. Where there is no map
    though there are blocks, `cka_reason` says why.
    """
    context = session.context(session.baseline)
    model, example = context.model, context.example
    blocks = find_blocks(model, example, context.describe_blocks)
    given = len(context.calibration)
    few = given < MINIMUM_EXAMPLES and bool(blocks)
    similarity = block_similarity(context, [] if few else blocks)
    groups, skipped = checked_groups(model, example, NodeSettings(), context.describe_attention)
    macs, parameters = cost.macs(model, example), cost.parameters(model)
    return {
        "macs": cost.total(macs),
        "parameters": cost.total(parameters),
        "blocks": [
            {
                "path": block.path,
                "removable": block.removable,
                "reason": block.reason,
                "macs": _within(macs, block.path),
                "parameters": _within(parameters, block.path),
            }
            for block in blocks
        ],
        "cka": [[round(value, 6) for value in row] for row in similarity.cka.tolist()],
        "cka_blocks": [block.path for block in similarity.blocks],
        "cka_reason": f"CKA needs at least {MINIMUM_EXAMPLES} calibration examples, got {given}" if few else "",
        "groups": [
            {
                "root": group.root,
                "units": group.units,
                "members": [{"module": m.module, "kind": m.kind} for m in group.members],
            }
            for group in groups
        ],
        "skipped": [item.model_dump() for item in (*skipped, *similarity.skipped)],
    }


def _within(costs: Mapping[str, float], path: str) -> int:
    return round(sum(value for name, value in costs.items() if name == path or name.startswith(path + ".")))


def render(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield what the terminal shows of `inspect`'s result."""
    tree = Tree(f"network: {found['parameters']:,} parameters, {found['macs']:,} MACs")
    removable = sum(block["removable"] for block in found["blocks"])
    blocks = tree.add(f"[bold]blocks[/]: {removable} of {len(found['blocks'])} can be bypassed whole")
    for block in found["blocks"]:
        share = f"{block['macs'] / max(found['macs'], 1):.1%} of the MACs"
        colour, why = ("green", "") if block["removable"] else ("yellow", f", kept: {escape(block['reason'])}")
        blocks.add(f"[{colour}]{escape(block['path'])}[/] [dim]{share}{why}[/]")
    units = sum(group["units"] for group in found["groups"])
    groups = tree.add(f"[bold]groups[/]: {len(found['groups'])} with {units:,} units that can go one by one")
    for group in found["groups"]:
        _add_group(groups, group)
    if found["skipped"]:
        skipped = tree.add("[bold]not prunable[/]")
        for item in found["skipped"]:
            skipped.add(f"[yellow]{escape(item['where'])}[/] [dim]{escape(item['reason'])}[/]")
    yield tree
    if found["cka"]:
        yield _cka_table(found["cka_blocks"], found["cka"])
    elif found["cka_reason"]:
        yield f"[dim]no map of the blocks' similarity: {found['cka_reason']}[/]"


def _add_group(tree: Tree, group: Mapping[str, Any]) -> None:
    """Add a group: on one line where its root alone produces the units, with the layers that must shrink with it where there are more."""
    kinds: dict[str, list[str]] = {}
    for member in group["members"]:
        kinds.setdefault(member["kind"], []).append(member["module"])
    title = f"[green]{escape(group['root'])}[/] {group['units']} units"
    readers = escape(", ".join(kinds.get("in", [])))
    others = [name for name in kinds.get("out", []) if name != group["root"]]
    if not others:
        tree.add(f"{title} [dim]read by[/] {readers}")
        return
    branch = tree.add(title)
    branch.add(f"[dim]together with[/] {escape(', '.join(others))}")
    branch.add(f"[dim]read by[/] {readers}")


def _cka_table(names: list[str], matrix: list[list[float]]) -> Table:
    table = Table(title="CKA of the blocks' outputs", show_lines=False, padding=(0, 1))
    table.add_column("")
    for number in range(len(names)):
        table.add_column(str(number), justify="right")
    for number, (name, row) in enumerate(zip(names, matrix, strict=True)):
        shown = [
            f"[{'green' if value >= 0.98 else 'yellow' if value >= 0.9 else 'dim'}]{value:.2f}[/]" for value in row
        ]
        table.add_row(f"{number} {escape(name)}", *shown)
    return table
