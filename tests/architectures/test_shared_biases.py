"""Heads of networks whose layers share one table of position biases per head: they go together, and the table with them."""

from __future__ import annotations

import pytest
import torch
from table import ARCHITECTURES
from torch import nn

from secateurs.attention import attention_groups, describe
from secateurs.certificate import certify
from secateurs.errors import CertificateError
from secateurs.forward import to_dataset
from secateurs.groups import plan_removal
from secateurs.plan import Plan, RemoveUnits

pytestmark = pytest.mark.hf
pytest.importorskip("transformers", reason="needs the extra `hf`")

TABLES = {
    "mpnet": [("mpnet.encoder.relative_attention_bias", 2)],
    "t5": [
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", 2),
        ("decoder.block.0.layer.0.SelfAttention.relative_attention_bias", 2),
        (None, 2),
    ],
}
"""Per network, in order of execution: the table that a group's layers share, and how many these are."""


@pytest.fixture(params=TABLES)
def found(request):
    """Return a network whose biases matter, its inputs, its groups of heads, and what is expected of them."""
    row = next(row for row in ARCHITECTURES if row.name == request.param)
    torch.manual_seed(0)
    model = row.build().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.25)
    groups, refused = attention_groups(model, describe)
    assert not refused
    return model, to_dataset(row.inputs(16, 12)), groups, TABLES[request.param]


def spoiled(plan, table, change):
    """Return the plan with every slice of `table` passed through `change`, which may return None to leave it out."""
    edits = []
    for edit in plan.edits:
        if isinstance(edit, RemoveUnits):
            slices = (change(piece) if piece.module == table else piece for piece in edit.slices)
            edit = edit.model_copy(update={"slices": tuple(piece for piece in slices if piece is not None)})
        edits.append(edit)
    return Plan(edits=tuple(edits))


def test_heads_that_share_biases_are_one_group(found):
    _, _, groups, expected = found
    assert [(group.slots[0].module if group.slots else None, len(group.of("in"))) for group in groups] == expected
    assert [group.units for group in groups] == [4] * len(expected)


def test_a_head_goes_with_its_biases(found):
    model, data, groups, expected = found
    for group, (table, _) in zip(groups, expected, strict=True):
        plan = plan_removal(model, group, [1, 2], "test")
        assert certify(model, plan, data).holds
        if table is not None:
            other = spoiled(plan, table, lambda piece: piece.model_copy(update={"removed": (0, 1)}))
            assert not certify(model, other, data).holds, "the biases of other heads"
            with pytest.raises(CertificateError, match="does not run"):
                certify(model, spoiled(plan, table, lambda piece: None), data)
