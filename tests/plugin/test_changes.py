"""What a report says that a plan removed."""

import torch
from networks import mlp, residual
from torch import nn

from secateurs.changes import changes
from secateurs.plan import DropBlock, Plan, RemoveUnits, Slice
from secateurs.surgery import applied


def removal(root, units, indices, reason=""):
    pieces = (Slice(module=root, parameter="weight", dim=0, removed=indices),)
    return RemoveUnits(root=root, units=units, slices=pieces, reason=reason)


def test_units_before_and_kept_are_those_of_the_tensors():
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3))
    plan = Plan(edits=(removal("0", (1, 4, 9), (1, 4, 9), "3 of 10 units by magnitude"),))
    found = changes(applied(model, plan), plan)
    assert found["units"] == [{"root": "0", "before": 10, "kept": 7, "reason": "3 of 10 units by magnitude"}]
    assert found["dropped"] == []


def test_a_unit_of_several_indices_counts_once():
    """Two of four heads of three channels each: six of twelve rows go."""
    model = nn.Sequential(nn.Linear(4, 12))
    plan = Plan(edits=(removal("0", (0, 2), (0, 1, 2, 6, 7, 8)),))
    (row,) = changes(applied(model, plan), plan)["units"]
    assert (row["before"], row["kept"]) == (4, 2)


def test_rounds_of_one_group_add_up_and_the_last_reason_counts():
    model = mlp(hidden=16)
    root = next(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    plan = Plan(edits=(removal(root, (0, 1), (0, 1), "first"), removal(root, (3,), (3,), "second")))
    (row,) = changes(applied(model, plan), plan)["units"]
    assert (row["before"], row["kept"], row["reason"]) == (16, 13, "second")


def test_a_bypassed_block_is_named_and_groups_inside_it_are_left_out():
    model = residual(3)
    path = next(name for name, module in model.named_modules() if name.endswith(".conv1"))
    block = path.rsplit(".", 1)[0]
    plan = Plan(edits=(removal(path, (0,), (0,)), DropBlock(path=block, reason="CKA 0.99")))
    with torch.no_grad():
        found = changes(applied(model, plan), plan)
    assert found == {"dropped": [{"block": block, "reason": "CKA 0.99"}], "units": []}


def test_nothing_removed_is_nothing_told():
    assert changes(mlp(), Plan()) == {"dropped": [], "units": []}
