"""Attention heads as units: a head (under grouped-query attention a key-value head with its query heads) goes whole.

A description says where a module's projections are and which attributes depend on the number of heads. Descriptions come through the hook
`secateurs_describe_attention`; `describe` is the built-in one and knows the usual names of children. A description is a claim, not a promise:
readers are observed and edits certified as for every other group, so that a wrong description is refused, not believed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import nn

from secateurs.groups import Group, Index, Member, Slot, WidthAttribute
from secateurs.layers import is_matrix_layer, widths_of
from secateurs.plan import unnumbered
from secateurs.report import Skipped

__all__ = ["AttentionHeads", "DescribeAttention", "attention_groups", "describe"]

Layout = Literal["stacked", "interleaved"]


@dataclass(frozen=True)
class AttentionHeads:
    """Where the heads of one attention module are.

    Attributes:
        queries: name of the query projection, relative to the module; the three names are the same where they are fused.
        keys: of the key projection.
        values: of the value projection.
        output: of the projection that reads the heads.
        heads: query heads.
        kv_heads: key and value heads; each serves `heads / kv_heads` query heads in a row.
        attributes: attributes (dotted, relative to the module) to how much each removed unit takes from them.
        tables: parameters (dotted, relative to the module) with the dimension that has one entry per key-value head.
        coupled: whether the modules whose paths differ only by numbers share something per head, so that their heads go together.
        layout: of a fused projection: `stacked` (3, heads, dim) or `interleaved` (heads, 3, dim).
    """

    queries: str
    keys: str
    values: str
    output: str
    heads: int
    kv_heads: int
    attributes: tuple[tuple[str, int], ...] = ()
    layout: Layout = "stacked"
    tables: tuple[tuple[str, int], ...] = ()
    coupled: bool = False


DescribeAttention = Callable[[nn.Module], "AttentionHeads | None"]

_SEPARATE: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("q_proj", "k_proj", "v_proj", ("o_proj", "out_proj", "dense", "proj", "c_proj")),
    ("query", "key", "value", ("dense", "out", "proj", "out_proj")),
    ("q", "k", "v", ("o", "out", "proj")),
    ("q_lin", "k_lin", "v_lin", ("out_lin",)),
    ("to_q", "to_k", "to_v", ("to_out.0", "to_out")),
    ("self.query", "self.key", "self.value", ("output.dense",)),
    ("attention.query", "attention.key", "attention.value", ("output.dense",)),
)
_FUSED: tuple[tuple[str, tuple[str, ...], Layout], ...] = (
    ("c_attn", ("c_proj",), "stacked"),
    ("qkv", ("proj", "out_proj"), "stacked"),
    ("qkv_proj", ("o_proj", "out_proj"), "stacked"),
    ("Wqkv", ("out_proj", "Wo"), "stacked"),
    ("query_key_value", ("dense",), "interleaved"),
)
_BIAS = "relative_attention_bias"
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_WIDTHS = ("all_head_size", "inner_dim", "split_size", "attn_dim", "embed_dim", "dim", "hidden_size")


def describe(module: nn.Module) -> AttentionHeads | None:
    """Describe an attention module by the names of its children, or return None if they are not those of one."""
    for queries, keys, values, outputs in _SEPARATE:
        if all(_layer(module, name) is not None for name in (queries, keys, values)):
            for output in outputs:
                if _layer(module, output) is not None:
                    return _described(module, (queries, keys, values), output, "stacked")
    for fused, outputs, layout in _FUSED:
        for output in outputs:
            if _layer(module, fused) is not None and _layer(module, output) is not None:
                return _described(module, (fused, fused, fused), output, layout)
    return None


def _layer(module: nn.Module, path: str) -> nn.Module | None:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None) if isinstance(found, nn.Module) else None
    return found if isinstance(found, nn.Module) and is_matrix_layer(found) else None


def _described(
    module: nn.Module, projections: tuple[str, str, str], output: str, layout: Layout
) -> AttentionHeads | None:
    prefix = projections[0].rpartition(".")[0]
    owner: Any = module.get_submodule(prefix)
    width = widths_of(module.get_submodule(output))[0]
    config = getattr(owner, "config", None)
    head_dim = _integer(owner, ("head_dim", "attention_head_size", "key_value_proj_dim", "dim_head", "dim_per_head"))
    # A configuration tells what the network was built with; after a first removal only the module itself knows.
    heads = _integer(owner, _HEADS) or (width // head_dim if head_dim else 0) or _integer(config, _HEADS)
    if not heads or width % heads:
        return None
    kv_heads = heads
    if projections[0] != projections[1]:
        kv_width = widths_of(module.get_submodule(projections[1]))[1]
        kv_heads = kv_width // (width // heads)
    if not kv_heads or heads % kv_heads:
        return None
    per_unit = heads // kv_heads
    found: list[tuple[str, int]] = []
    for place, holder in dict.fromkeys(((prefix, owner), ("", module))):
        for names, value, amount in (
            (_HEADS, heads, per_unit),
            (_KV_HEADS, kv_heads, 1),
            (_WIDTHS, width, width // kv_heads),
        ):
            found += [(f"{place}.{name}".lstrip("."), amount) for name in names if getattr(holder, name, None) == value]
    tables, coupled = _tables(owner, prefix, heads)
    return AttentionHeads(*projections, output, heads, kv_heads, tuple(dict.fromkeys(found)), layout, tables, coupled)


def _tables(owner: Any, prefix: str, heads: int) -> tuple[tuple[tuple[str, int], ...], bool]:
    """Find position biases per head: a table in the module itself (Swin), or an embedding that the whole stack shares (T5)."""
    found = []
    for name in ("relative_position_bias_table", f"{_BIAS}.weight"):
        holder, _, parameter = name.rpartition(".")
        module = getattr(owner, holder, None) if holder else owner
        tensor = getattr(module, parameter, None)
        if isinstance(tensor, nn.Parameter) and tensor.ndim == 2 and tensor.shape[1] == heads:
            found.append((f"{prefix}.{name}".lstrip("."), 1))
    return tuple(found), hasattr(owner, "has_relative_attention_bias")


def _integer(holder: object, names: tuple[str, ...]) -> int:
    return next((value for name in names if isinstance(value := getattr(holder, name, None), int) and value > 0), 0)


def attention_groups(model: nn.Module, describing: DescribeAttention) -> tuple[list[Group], list[Skipped]]:
    """Return one group per described attention module, its heads as units, and what was skipped.

    Args:
        model: the network; it is not changed.
        describing: the hook `secateurs_describe_attention`.
    """
    coupled: dict[str, list[Group]] = {}
    skipped: list[Skipped] = []
    taken: set[str] = set()
    for path, module in model.named_modules():
        if any(path == other or path.startswith(other + ".") for other in taken):
            continue
        description = describing(module)
        if description is None:
            continue
        taken.add(path)
        reason = _refusal(module, description)
        root = f"{path}.{description.queries}".lstrip(".")
        if reason is not None:
            skipped.append(Skipped(where=path, reason=f"its heads cannot be removed: {reason}"))
            continue
        shared = _shared_bias(model, path, description.heads)
        group = Group(
            root,
            description.kv_heads,
            tuple(_members(path, module, description)),
            _attributes(path, description),
            (*_slots(path, description), *((Slot(shared, "weight", 1),) if shared else ())),
        )
        together = shared or (unnumbered(path) if description.coupled else path)
        coupled.setdefault(together, []).append(group)
    groups = [_joined(together) for together in coupled.values()]
    return groups, skipped


def _shared_bias(model: nn.Module, path: str, heads: int) -> str:
    """Return the path of the position biases per head that a module around `path` adds to all its layers (MPNet); empty where there is none."""
    while path:
        path = path.rpartition(".")[0]
        found = getattr(model.get_submodule(path), _BIAS, None)
        if isinstance(found, nn.Embedding) and found.embedding_dim == heads:
            return f"{path}.{_BIAS}".lstrip(".")
    return ""


def _joined(groups: list[Group]) -> Group:
    """Return groups whose heads go together as one."""
    members = sorted((member for group in groups for member in group.members), key=lambda member: member.kind != "out")
    return Group(
        groups[0].root,
        groups[0].units,
        tuple(members),
        tuple(attribute for group in groups for attribute in group.attributes),
        tuple(dict.fromkeys(slot for group in groups for slot in group.slots)),
    )


def _refusal(module: nn.Module, heads: AttentionHeads) -> str | None:
    if heads.kv_heads < 2:
        return "there is only one"
    widths = [widths_of(module.get_submodule(name))[1] for name in (heads.queries, heads.keys, heads.values)]
    if heads.queries == heads.keys and (heads.heads != heads.kv_heads or widths[0] % (3 * heads.heads)):
        return f"a fused projection of width {widths[0]} does not hold queries, keys and values of {heads.heads} heads"
    if heads.queries != heads.keys and (
        widths[0] % heads.heads or widths[1] % heads.kv_heads or widths[2] % heads.kv_heads
    ):
        return f"projections of widths {widths} do not divide into {heads.heads} and {heads.kv_heads} heads"
    return None


def _members(path: str, module: nn.Module, heads: AttentionHeads) -> Iterator[Member]:
    def name(part: str) -> str:
        return f"{path}.{part}".lstrip(".")

    units = heads.kv_heads
    if heads.queries == heads.keys:
        yield Member(
            name(heads.queries),
            "out",
            _fused_index(widths_of(module.get_submodule(heads.queries))[1], units, heads.layout),
        )
    else:
        for part in (heads.queries, heads.keys, heads.values):
            yield Member(name(part), "out", _even(widths_of(module.get_submodule(part))[1], units))
    yield Member(name(heads.output), "in", _even(widths_of(module.get_submodule(heads.output))[0], units))


def _even(width: int, units: int) -> Index:
    return np.arange(width, dtype=np.int64).reshape(units, -1)


def _fused_index(width: int, units: int, layout: Layout) -> Index:
    index = np.arange(width, dtype=np.int64)
    if layout == "interleaved":
        return index.reshape(units, -1)
    return index.reshape(3, units, -1).transpose(1, 0, 2).reshape(units, -1)


def _slots(path: str, heads: AttentionHeads) -> tuple[Slot, ...]:
    found = []
    for dotted, dim in heads.tables:
        owner, _, name = f"{path}.{dotted}".lstrip(".").rpartition(".")
        found.append(Slot(owner, name, dim))
    return tuple(found)


def _attributes(path: str, heads: AttentionHeads) -> tuple[WidthAttribute, ...]:
    found = []
    for dotted, amount in heads.attributes:
        owner, _, name = f"{path}.{dotted}".lstrip(".").rpartition(".")
        found.append(WidthAttribute(owner, name, amount))
    return tuple(found)
