"""What stands in for other modules must compute what they compute."""

import pytest
import torch
from torch import nn

import secateurs
from secateurs.modules import Bypass, SeparateAttention, plain_facts
from secateurs.plan import Plan, RemoveUnits, SplitAttention
from secateurs.surgery import applied

PADDING = torch.arange(9).expand(3, 9) > 6
GENERATOR = torch.Generator().manual_seed(0)
CALLS = {
    "plain": {},
    "padding": {"key_padding_mask": PADDING},
    "float mask": {"attn_mask": torch.randn(7, 9, generator=GENERATOR)},
    "mask per head": {"attn_mask": torch.randn(12, 7, 9, generator=GENERATOR)},
    "boolean mask": {"attn_mask": torch.rand(7, 9, generator=GENERATOR) > 0.8},
    "without weights": {"need_weights": False, "key_padding_mask": PADDING},
    "weights of each head": {"average_attn_weights": False},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    "options", [{}, {"kdim": 24, "vdim": 24}, {"bias": False}], ids=["one width", "other keys", "no bias"]
)
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
def test_separate_attention_computes_what_torchs_does(options, batch_first, call):
    torch.manual_seed(0)
    original = nn.MultiheadAttention(32, 4, batch_first=batch_first, **options).eval()
    query, key = torch.randn(3, 7, 32), torch.randn(3, 9, options.get("kdim", 32))
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    expected, expected_weights = original(query, key, key, **call)
    got, weights = SeparateAttention(original)(query, key, key, **call)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights, atol=1e-5, rtol=0)


def test_separate_attention_takes_unbatched_inputs():
    torch.manual_seed(0)
    original, x = nn.MultiheadAttention(8, 2).eval(), torch.randn(5, 8)
    for expected, got in zip(original(x, x, x), SeparateAttention(original)(x, x, x), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_bypass_returns_its_input_in_the_form_of_the_block():
    x = torch.ones(2)
    assert Bypass()(x, "mask") is x
    assert Bypass(3)(hidden_states=x, mask=None) == (x, None, None)


class Base(nn.Module):
    """Keeps facts of its construction, and in `forward` and what that calls, numbers of the last batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.kind, self.window, self.scale, self.sizes, self._private = "full", 7, 0.5, (1, 2), 3
        self.fit(1)

    def fit(self, calls):
        self.calls = calls

    def forward(self, x):
        self.mean = float(x.mean())
        return x + self.linear(x)

    def note(self, x):
        def inside():
            self.longest = x.shape[1]

        inside()


class Notes(Base):
    @torch.no_grad()
    def forward(self, x):
        self.note(x)
        return super().forward(x)


def test_facts_of_a_block_are_those_of_its_construction():
    block = Notes()
    built = plain_facts(block)
    assert built == {"kind": "full", "window": 7, "scale": 0.5, "sizes": (1, 2), "calls": 1}
    block(torch.rand(2, 4))
    assert {"mean", "longest"} <= vars(block).keys()
    assert plain_facts(block) == built


class Sums(nn.Module):
    """Reads what its blocks note in a forward pass, as a mixture of experts reads the balance of its layers."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Notes() for _ in range(4)])
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x), sum(block.mean for block in self.blocks)


def test_a_block_whose_note_is_read_stays():
    x = torch.rand(32, 4)
    result = secateurs.prune(Sums().eval(), x[:2], [x], [{"random-blocks": {"blocks": 1, "refit": "none"}}])
    assert not result.plan.removes
    assert any("no attribute 'mean'" in item.reason for item in result.report.passes[0].skipped)


class Encoder(nn.Module):
    """Torch's own encoder between two linear layers."""

    def __init__(self, batch_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first)
        self.first, self.encoder, self.last = (
            nn.Linear(8, 32),
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            nn.Linear(32, 5),
        )
        self.batch_first = batch_first

    def forward(self, x):
        y = self.first(x)
        y = self.encoder(y) if self.batch_first else self.encoder(y.transpose(0, 1)).transpose(0, 1)
        return self.last(y.mean(1))


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
def test_torchs_encoder_loses_heads_and_neurons(batch_first, tmp_path):
    torch.manual_seed(0)
    model = Encoder(batch_first).eval()
    batches = [torch.randn(32, 10, 8) for _ in range(3)]
    result = secateurs.prune(model, batches[0], batches, passes=[{"mi-nodes": {"target_units": 0.5}}])
    record = result.report.passes[0]
    assert record.edits == 4, record.skipped
    assert record.certificate.holds
    assert {layer.self_attn.num_heads for layer in result.model.encoder.layers} == {2}
    result.save(tmp_path)
    with torch.no_grad():
        assert torch.equal(secateurs.load(tmp_path, build=model)(batches[0]), result.model(batches[0]))
        split = applied(model, Plan(edits=tuple(result.plan.of(SplitAttention))))
        torch.testing.assert_close(split(batches[0]), model(batches[0]), atol=1e-5, rtol=0)
    assert isinstance(model.encoder.layers[0].self_attn, nn.MultiheadAttention), "the model given was changed"


def test_heads_stay_together_where_they_are_not_wanted():
    torch.manual_seed(0)
    batches = [torch.randn(32, 10, 8) for _ in range(3)]
    result = secateurs.prune(
        Encoder(True).eval(), batches[0], batches, passes=[{"mi-nodes": {"target_units": 0.5, "heads": False}}]
    )
    assert not list(result.plan.of(SplitAttention))
    assert len(list(result.plan.of(RemoveUnits))) == 2
