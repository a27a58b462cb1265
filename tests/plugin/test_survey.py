"""What node pruning leaves alone because nobody can know who reads it, with the reason; the rest of the network is still offered."""

import pytest
import torch
from networks import images, vectors
from torch import nn

import secateurs
from secateurs.passes.survey import checked_groups
from secateurs.settings import NodeSettings


class Auxiliary(nn.Module):
    """A head that only training calls, as in GoogLeNet and DeepLab."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 16), nn.Linear(16, 24), nn.Linear(24, 3)
        self.aside = nn.Linear(16, 3)

    def forward(self, x):
        hidden = self.first(x).relu()
        scores = self.third(self.second(hidden).relu())
        return (scores, self.aside(hidden)) if self.training else scores


class Guarded(nn.Module):
    """A layer whose values are checked, and one that is called as often as they say."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 16), nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, x):
        hidden = self.first(x).sigmoid()
        assert float(self.second(hidden).abs().max()) < 4, "out of range"
        return self.third(self.second(hidden).relu())


class Attends(nn.Module):
    """Torch's encoder with padding, which makes nested tensors of its own accord."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.inside, self.encoder, self.out = nn.Linear(3, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        padding = torch.arange(tokens.shape[1]).expand(len(tokens), -1) >= tokens.shape[1] - 3
        return self.out(self.encoder(self.inside(tokens), src_key_padding_mask=padding).mean(1))


def roots_and_reasons(model, data):
    groups, skipped = checked_groups(model.eval(), data.take(range(4)), NodeSettings())
    return [group.root for group in groups], {item.where: item.reason for item in skipped}


def test_units_that_a_layer_may_read_that_was_not_called_stay():
    torch.manual_seed(0)
    roots, reasons = roots_and_reasons(Auxiliary(), vectors(16))
    assert roots == ["second"]
    assert "'aside' was not called with the first calibration examples" in reasons["first"]
    assert "Remove it from the network" in reasons["first"]


class Experts(nn.Module):
    """A residual stream through two experts, of which one gets no example."""

    def __init__(self):
        super().__init__()
        self.first, self.third = nn.Linear(12, 16), nn.Linear(16, 3)
        self.experts = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, x):
        hidden = self.first(x).relu()
        chosen = (x[:, 0] > 100).long()
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            out[chosen == number] = expert(hidden[chosen == number])
        return self.third(hidden + out)


def test_units_that_an_expert_without_examples_may_read_are_judged_without_error():
    torch.manual_seed(0)
    model, batches = Experts().eval(), [torch.as_tensor(vectors(16).inputs["input"]) for _ in range(2)]
    result = secateurs.prune(model, batches[0], batches, [{"magnitude": {"target_units": 0.5}}])
    others = torch.cat([torch.full((3, 1), 200.0), batches[0][:3, 1:]], 1)
    assert result.model(others).shape == (3, 3), "the other expert runs too"


def test_units_that_the_network_checks_stay():
    torch.manual_seed(0)
    roots, reasons = roots_and_reasons(Guarded(), vectors(16))
    assert "first" in roots
    assert "out of range" in reasons["second"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoders_that_make_nested_tensors_are_pruned():
    torch.manual_seed(0)
    model, batches = Attends().eval(), [torch.as_tensor(images(16).inputs["input"]) for _ in range(2)]
    result = secateurs.prune(model, batches[0], batches, [{"magnitude": {"target_units": 0.5}}])
    assert [layer.linear1.out_features for layer in result.model.encoder.layers] == [16, 16]
    assert result.report.passes[0].certificate.holds
