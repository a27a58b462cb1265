"""Streams through paddings: units, attributes and certificates, on networks whose couplings are known by construction."""

import pytest
import torch
from networks import images, zero_padded
from torch import nn
from torch.nn import functional as F

from secateurs.certificate import certify
from secateurs.groups import Group, find_groups, plan_removal
from secateurs.passes.survey import checked_groups
from secateurs.plan import Plan
from secateurs.settings import NodeSettings
from secateurs.streams import observed_groups
from secateurs.surgery import applied


class Pad(nn.Module):
    """Channels of zeros around the others."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x):
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


class Widened(nn.Module):
    """Two convolutions around a stream that a padding widens: `8 -> before + 8 + after`."""

    def __init__(self, pad: nn.Module, width: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body, self.body_norm = nn.Conv2d(8, width, 3, padding=1), nn.BatchNorm2d(width)
        self.pad, self.act = pad, nn.PReLU(width)
        self.last = nn.Conv2d(width, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, value):
        x = F.relu(self.norm(self.stem(value)))
        x = self.act(self.body_norm(self.body(x)) + self.pad(x))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


def widened(before, after):
    torch.manual_seed(0)
    return Widened(Pad(before, after), before + 8 + after).eval()


def stream_of(model):
    return max(find_groups(model, images(2))[0], key=lambda group: len(group.of("out")))


def by_root(groups):
    return {group.root: group for group in groups}


def test_units_go_where_the_padding_puts_them():
    model = widened(3, 2)
    groups, skipped = observed_groups(model, images(4), stream_of(model))
    found = by_root(groups)
    assert skipped == []
    assert set(found) == {"stem", "body"}
    index = {(m.module, m.kind): m.index[:, 0].tolist() for m in found["stem"].members}
    assert index == {
        ("stem", "out"): list(range(8)),
        ("body", "out"): list(range(3, 11)),
        ("norm", "pass"): list(range(8)),
        ("body_norm", "pass"): list(range(3, 11)),
        ("act", "pass"): list(range(3, 11)),
        ("body", "in"): list(range(8)),
        ("last", "in"): list(range(3, 11)),
    }
    assert found["stem"].attributes == ()
    added = found["body"]
    assert {(m.module, m.kind) for m in added.members} == {
        ("body", "out"), ("body_norm", "pass"), ("act", "pass"), ("last", "in")
    }  # fmt: skip
    assert added.members[0].index[:, 0].tolist() == [0, 1, 2, 11, 12]
    assert {(a.module, a.name, a.units) for a in added.attributes} == {
        ("pad", "before", (0, 1, 2)),
        ("pad", "after", (3, 4)),
    }


@pytest.mark.parametrize(("before", "after"), [(4, 0), (0, 4), (2, 2), (1, 3)])
def test_every_removal_is_certified(before, after):
    model = widened(before, after)
    groups, skipped = observed_groups(model, images(4), stream_of(model))
    assert (len(groups), skipped) == (2, [])
    plan = Plan()
    for group in groups:
        plan += plan_removal(model, group, range(0, group.units, 2), "half", plan)
    certificate = certify(model, plan, images(8))
    assert certificate.holds
    pruned = applied(model, plan)
    kept = before + after - len(range(0, before + after, 2))
    assert (pruned.pad.before + pruned.pad.after, pruned.body.out_channels) == (kept, kept + 4)


def test_one_number_for_both_sides_makes_pairs():
    model = zero_padded().eval()
    groups, skipped = observed_groups(model, images(4), stream_of(model))
    added = by_root(groups)["layers.2.conv2"]
    assert skipped == []
    assert added.members[0].index.tolist() == [[0, 12], [1, 13], [2, 14], [3, 15]]
    # The block's `pad` counts the channels of both sides together.
    assert [(a.module, a.name, a.per_unit) for a in added.attributes] == [("layers.2", "pad", 2)]
    plan = plan_removal(model, added, [1, 3], "two pairs")
    assert certify(model, plan, images(8)).holds
    assert applied(model, plan).layers[2].conv2.out_channels == 12


def test_a_padding_that_nothing_counts_is_reported():
    class Fixed(Pad):
        def forward(self, x):
            return F.pad(x, (0, 0, 0, 0, 3, 2))

    torch.manual_seed(0)
    model = Widened(Fixed(0, 0), 13).eval()
    groups, skipped = observed_groups(model, images(4), stream_of(model))
    assert [group.root for group in groups] == ["stem"]
    assert [(item.where, "no attribute" in item.reason) for item in skipped] == [("body", True)]


def test_a_reader_that_mixes_channels_ends_the_search():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.last, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

        def forward(self, value):
            x = F.relu(self.stem(value))
            return self.head(self.last((x + self.body(x)).softmax(1)).mean((2, 3)))

    torch.manual_seed(0)
    model = Mixed().eval()
    assert observed_groups(model, images(4), stream_of(model)) == ([], [])


def test_the_survey_offers_the_parts_and_leaves_out_the_whole():
    model = widened(3, 2)
    groups, skipped = checked_groups(model, images(4), NodeSettings())
    assert {group.root for group in groups} >= {"stem", "body", "last"}
    assert {item.where for item in skipped} == {"head"}
    assert all(isinstance(group, Group) for group in groups)
