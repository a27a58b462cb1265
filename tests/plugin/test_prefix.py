"""Forward passes that start in the middle equal whole ones, whatever lies between the layers."""

import copy
from types import SimpleNamespace

import pytest
import torch
from networks import dense, encoder, images, plain, residual, separable, sequences, vectors
from torch import nn

from secateurs.forward import inference, output_tensors, predict
from secateurs.prefix import Prefix, Timeline
from secateurs.probe import execution_order


def calls_of(model):
    """Count the forward passes of every layer with weights; returns the counts, which go on counting."""
    counts = {}
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            original = module.forward

            def counted(*args, name=name, original=original, **kwargs):
                counts[name] = counts.get(name, 0) + 1
                return original(*args, **kwargs)

            module.forward = counted
    return counts


@pytest.mark.parametrize(
    ("build", "make"),
    [(plain, images), (residual, images), (separable, images), (dense, images), (encoder, sequences)],
)
def test_a_resumed_pass_equals_a_whole_one_at_every_layer(build, make):
    model, data = build().eval(), make(10)
    timeline, expected = Timeline(model, data.take([0, 1])), predict(model, data, 4)
    earlier = None
    for name in execution_order(model, data.take([0, 1])):
        earlier = Prefix(model, data, [name], timeline, batch_size=4, start=earlier)
        assert torch.equal(earlier.predict(), expected)
    assert earlier.modules
    assert torch.equal(predict(model, data, 4), expected)  # nothing is left behind


class Reduced(nn.Module):
    """An encoder whose output has another first axis than the examples."""

    def __init__(self, reduce):
        super().__init__()
        self.encoder, self.reduce = encoder(), reduce

    def forward(self, *inputs):
        return self.reduce(self.encoder(*inputs))


@pytest.mark.parametrize(
    "reduce",
    [
        lambda found: found.transpose(0, 1).unsqueeze(-1) * torch.arange(3.0),
        lambda found: found.view(-1, 2, found.shape[-1])[:, 0],
        lambda found: found.square().mean(),
    ],
    ids=["(classes, n, 3)", "pairs", "scalar"],
)
def test_predictions_without_one_row_per_example_are_replayed_too(reduce):
    model, data = Reduced(reduce).eval(), sequences(10)
    names = execution_order(model, data.take([0, 1]))
    timeline = Timeline(model, data.take([0, 1]))
    found = Prefix(model, data, [names[-1]], timeline, batch_size=4)
    assert found.modules
    with inference(model):
        parts = [model(*map(torch.from_numpy, batch.inputs.values())) for batch in data.batches(4)]
    assert [value.tolist() for value in found.predict().flatten()] == [
        v for part in parts for v in part.flatten().tolist()
    ]


def test_what_lies_before_is_not_computed_again_and_changes_behind_it_count():
    model, data = residual().eval(), images(8)
    order = [name for name in execution_order(model, data) if isinstance(model.get_submodule(name), nn.Conv2d)]
    target = order[-1]
    prefix = Prefix(model, data, [target], Timeline(model, data))
    with torch.no_grad():
        model.get_submodule(target).weight.mul_(1.5)
    counts = calls_of(model)
    changed = prefix.predict()
    assert counts[target] == 1
    assert set(counts) & set(order) == {target}
    assert torch.equal(changed, predict(copy.deepcopy(model), data))


class Counting(nn.Module):
    """Its second layer depends on how often the first one ran: a side effect that a recording would lose."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.first.register_forward_hook(lambda *_: None)
        self.ran = 0
        inner = self.first.forward

        def forward(x):
            self.ran += 1
            return inner(x)

        self.first.forward = forward

    def forward(self, x):
        self.ran = 0
        return self.second(self.first(x)) * (1 + self.ran)


def test_a_network_with_side_effects_is_run_whole():
    torch.manual_seed(0)
    model, data = Counting().eval(), vectors(6, 4)
    prefix = Prefix(model, data, ["second"], Timeline(model, data))
    assert prefix.modules == ()
    assert torch.equal(prefix.predict(), predict(model, data))
    with inference(model):
        assert model.ran == 1


def test_a_recording_that_is_too_large_is_not_made():
    model, data = plain().eval(), images(8)
    last = execution_order(model, data)[-1]
    assert Prefix(model, data, [last], Timeline(model, data)).modules
    small = Prefix(model, data, [last], Timeline(model, data), limit=100)
    assert small.modules == ()
    assert torch.equal(small.predict(), predict(model, data))


class Output(dict):
    """A mapping like those that transformers return."""


class Translator(nn.Module):
    """Every layer of the decoder reads what the encoder returned, in a container of the network's own."""

    def __init__(self, wrap, read):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 64), Wrapping(wrap))
        self.decoder = nn.ModuleList([nn.Linear(64, 4), nn.Linear(64, 4)])
        self.head = nn.Linear(4, 3)
        self.read = read

    def forward(self, x):
        memory = self.encoder(x)
        for layer in self.decoder:
            x = x + layer(self.read(memory))
        return self.head(x)


class Wrapping(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(x)


CONTAINERS = pytest.mark.parametrize(
    ("wrap", "read"),
    [
        (lambda x: Output(last=x), lambda memory: memory["last"]),
        (lambda x: {"last": x}, lambda memory: memory["last"]),
        (lambda x: (x, None), lambda memory: memory[0]),
        (lambda x: SimpleNamespace(last=x), lambda memory: memory.last),
    ],
    ids=["model output", "dict", "tuple", "object"],
)
BYTES = 4 * 20
"""Of one channel of 20 examples."""


@CONTAINERS
def test_what_is_still_read_counts_towards_the_limit_in_every_container(monkeypatch, wrap, read):
    monkeypatch.setattr("secateurs.prefix.SMALL", 0)
    model, data = Translator(wrap, read).eval(), vectors(20, 4)
    timeline, before = Timeline(model, data.take([0, 1])), ["decoder.1"]
    prefix = Prefix(model, data, before, timeline)
    assert prefix.modules == ("encoder", "decoder.0")
    assert torch.equal(prefix.predict(), predict(model, data))
    assert Prefix(model, data, before, timeline, limit=(64 + 4) * BYTES).modules
    assert Prefix(model, data, before, timeline, limit=(64 + 4) * BYTES - 1).modules == ()


@CONTAINERS
def test_what_is_not_read_any_more_takes_no_memory(monkeypatch, wrap, read):
    monkeypatch.setattr("secateurs.prefix.SMALL", 0)
    model, data = Translator(wrap, read).eval(), vectors(20, 4)
    timeline = Timeline(model, data.take([0, 1]))
    held = 64 if isinstance(wrap(torch.zeros(1)), SimpleNamespace) else 0  # whose tensors cannot be exchanged
    prefix = Prefix(model, data, ["head"], timeline, limit=(held + 8) * BYTES)
    assert prefix.modules == ("encoder", "decoder.0", "decoder.1")
    assert torch.equal(prefix.predict(), predict(model, data))
    stored = output_tensors(prefix._recorded[0]["encoder"])
    assert sum(tensor.untyped_storage().nbytes() for tensor in stored) == (held * BYTES or 4)


def test_recording_ends_with_the_last_module_that_is_recorded():
    model, data = residual(4), images(24)
    before = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)][3]
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    Prefix(model, data, [before], Timeline(model, data.take([0, 1])), batch_size=4)
    whole = len(calls)
    calls.clear()
    Prefix(model, data.take(range(4)), [before], Timeline(model, data.take([0, 1])), batch_size=4)
    assert whole == len(calls), "the batches behind the first one do not reach the end of the network"
