"""Every layer that could have units is in a group or has a reason, whatever hides it from the trace."""

import re

import pytest
import torch
from networks import images, sequences
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from secateurs.groups import find_groups
from secateurs.passes.survey import checked_groups
from secateurs.plan import unnumbered
from secateurs.settings import NodeSettings
from secateurs.unreached import named


class Stack(nn.Module):
    """Two convolutions and a head, in parts that the networks below replace."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Linear(12, 5)

    def hidden(self, value):
        return self.first(value).relu()

    def forward(self, value):
        return self.head(self.second(self.hidden(value)).relu().mean((2, 3)))


class WithoutGradient(Stack):
    @torch.no_grad()
    def forward(self, value):
        return super().forward(value)


class Choosing(Stack):
    def forward(self, value):
        return super().forward(value).argmax(1)


class Detached(Stack):
    def hidden(self, value):
        return super().hidden(value).detach()


class Uncalled(Stack):
    def hidden(self, value):
        return self.first.forward(value).relu()


class FromTheEnd(Stack):
    def hidden(self, value):
        return super().hidden(value)[:, -8:]


class Repeated(Stack):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)

    def hidden(self, value):
        return super().hidden(value).repeat_interleave(2, 1)


class Spectral(Stack):
    def __init__(self):
        super().__init__()
        self.second = spectral_norm(self.second)


class WeightNormed(Stack):
    def __init__(self):
        super().__init__()
        self.first = weight_norm(self.first)


class Upsampling(Stack):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)

    def hidden(self, value):
        return self.up(super().hidden(value))


class Stream(Stack):
    def __init__(self):
        super().__init__()
        self.second, self.norm = nn.Conv2d(8, 12, 3), nn.LayerNorm(12)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, value):
        value = self.second(self.hidden(value)).mean((2, 3))
        for layer in self.layers:
            value = value + layer(self.norm(value))
        return self.head(value)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 5))

    def forward(self, value):
        return value.mean((2, 3)) @ self.weight


END = {"head": "an output of the network"}
CASES = {
    WithoutGradient: {"the network": r"\('first', 'second' and 'head'\): its outputs have no gradient"},
    Choosing: {"the network": "returns no floating-point tensor"},
    Detached: {**END, "first": "behind it is a `detach`"},
    Uncalled: {**END, "first": "it was not called.*`layer.forward"},
    FromTheEnd: {**END, "first": "does not find what reads its units: it cannot follow them through slice"},
    Repeated: {**END, "first": "does not find what reads its units: it cannot follow them through expand"},
    Spectral: {**END, "first": "'second' is parametrised: its weight", "second": r"remove_parametrizations\(layer, 'weight'\)"},
    WeightNormed: {**END, "first": "'first' is parametrised"},
    Upsampling: {**END, "first": "'up' is a ConvTranspose2d", "up": "it is a ConvTranspose2d"},
    Stream: {**END, "layers.2": r"'norm' is a LayerNorm.*'layers\.\*' and 'second' would lose the same units"},
    Bare: {"the network": "no linear layer and no convolution"},
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_every_layer_has_a_group_or_a_true_reason(kind):
    torch.manual_seed(0)
    model = kind().eval()
    groups, skipped = checked_groups(model, images(4), NodeSettings())
    reasons = {item.where: item.reason for item in skipped}
    assert len(reasons) == len(skipped), "one entry for each layer"
    assert set(reasons) == set(CASES[kind])
    for where, pattern in CASES[kind].items():
        assert re.search(pattern, reasons[where]), reasons
    told = {member.module for group in groups for member in group.of("out")} | set(reasons)
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            shown = any(repr(form) in reason for reason in reasons.values() for form in (name, unnumbered(name)))
            assert name in told or shown, name


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiled_parts_are_named():
    inner = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    for model, where in (
        (torch.jit.script(inner), "the network"),
        (nn.Sequential(nn.Conv2d(3, 3, 1), torch.jit.script(inner)), "1"),
    ):
        _, skipped = find_groups(model.eval(), images(2))
        assert [item.where for item in skipped if "compiled by torch.jit" in item.reason] == [where]


def test_a_layer_that_attention_computes_with_is_told():
    encoder = nn.TransformerEncoderLayer(16, 4, 48, batch_first=True).eval()
    _, skipped = find_groups(encoder, sequences(4, 6, 16))
    assert "'self_attn', a MultiheadAttention, computes" in {i.where: i.reason for i in skipped}["self_attn.out_proj"]


def test_names_of_one_kind_are_told_once():
    assert named(["head"]) == "'head'"
    assert named(["layers.0.up", "head", "layers.1.up"]) == "'layers.*.up' and 'head'"
    assert named(["a", "b", "c.3"]) == "'a', 'b' and 'c.3'"
