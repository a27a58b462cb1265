"""Planted faults: pruned networks that run and are wrong. The certificate must refuse every one, and none of the right ones.

A fault is planted in the plan (its slices) or in the network that the right plan makes (its tensors, attributes, wiring). Each has to move the
output on examples that the certificate does not see; one that does not is no case.
"""

import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateurs.attention import describe
from secateurs.certificate import certify, certify_network, keep_certified
from secateurs.data import Dataset
from secateurs.errors import CertificateError
from secateurs.forward import call, inference, output_tensors
from secateurs.groups import plan_removal
from secateurs.passes.survey import checked_groups
from secateurs.plan import Plan, RemoveUnits
from secateurs.settings import NodeSettings
from secateurs.surgery import applied

VOCABULARY, LENGTH = 61, 10
MOVES = 1e-3
"""A fault moves the output by more than this share of its scale."""

# --- subjects ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A network, a right plan for it, the examples for the certificate and others to measure what a fault does."""

    model: nn.Module
    plan: Plan
    data: Dataset
    unseen: Dataset


def lively(model, seed=0):
    """Draw all parameters and statistics so that outputs depend on everything."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            owner = model.get_submodule(name.rpartition(".")[0])
            if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
                value.uniform_(0.5, 1.5)
            elif isinstance(value, nn.Parameter) or name.endswith("running_mean"):
                value.normal_(std=0.15 if isinstance(owner, nn.Conv2d) else 0.25)
    return model.eval()


def tokens(n, seed):
    """Return token ids, every other row padded on the right."""
    mask = np.ones((n, LENGTH), np.int64)
    mask[::2, -3:] = 0
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, (n, LENGTH))
    return Dataset({"input_ids": ids, "attention_mask": mask}, keyword=True)


def pictures(n, seed):
    """Return images of noise."""
    return Dataset({"input": np.random.default_rng(seed).normal(size=(n, 3, 8, 8)).astype(np.float32)})


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class Residual(nn.Module):
    """A stem, two residual blocks, a depthwise convolution, pooling and a head."""

    def __init__(self, width=12):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.pool = nn.AvgPool2d(2)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.depthwise(self.blocks(F.relu(self.bn(self.stem(x)))))
        return self.head(self.dropout(self.pool(x).mean((2, 3))))


def transformer(model, config, **options):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, model)(getattr(transformers, config)(vocab_size=VOCABULARY, **options))


BUILD = {
    "cnn": (Residual, pictures),
    "bert": (
        lambda: transformer(
            "BertForSequenceClassification",
            "BertConfig",
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=32,
        ),
        tokens,
    ),
    "gpt2": (
        lambda: transformer(
            "GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=2, n_head=4, n_positions=32, use_cache=False
        ),
        tokens,
    ),
    "llama": (
        lambda: transformer(
            "LlamaForCausalLM",
            "LlamaConfig",
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            intermediate_size=48,
            max_position_embeddings=32,
            tie_word_embeddings=True,
            use_cache=False,
        ),
        tokens,
    ),
}


def chosen(group, number):
    """Return half of the units, never the last one: an index that is one off must stay in range."""
    return sorted(np.random.default_rng(number).permutation(group.units - 1)[: group.units // 2].tolist())


@functools.cache
def subject(name):
    """Return an architecture with its right plan: half of the units of every group that may be pruned."""
    build, make = BUILD[name]
    model, data = lively(build()), make(8, 0)
    groups, _ = checked_groups(model, data.take(range(4)), NodeSettings(), describe)
    plan = Plan()
    for number, group in enumerate(groups):
        plan += plan_removal(model, group, chosen(group, number), "half", plan)
    return Subject(model, plan, data, make(8, 1))


def outputs(model, data):
    with inference(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return output_tensors(call(model, data))


def moved(right, wrong, data):
    """Return the largest difference of two networks' outputs as a share of the scale; both must run."""
    expected, got = outputs(right, data), outputs(wrong, data)
    assert [value.shape for value in expected] == [value.shape for value in got]
    scale = max(float(value.abs().max()) for value in expected)
    return max(float((a - b).abs().max()) for a, b in zip(expected, got, strict=True)) / scale


# --- faults of plans: from the right plan to a wrong one --------------------------------------------------------------


def sliced(change):
    """Return a fault that passes every slice of a plan through `change`."""

    def spoil(plan):
        edits = []
        for edit in plan.edits:
            if isinstance(edit, RemoveUnits):
                edit = edit.model_copy(update={"slices": tuple(change(piece) for piece in edit.slices)})
            edits.append(edit)
        return Plan(edits=tuple(edits))

    return spoil


def shifted(module, by=1, parameters=("weight", "bias"), dim=None):
    """Shift the indices of one layer's slices."""

    def change(piece):
        if piece.module != module or piece.parameter not in parameters or dim not in (None, piece.dim):
            return piece
        return piece.model_copy(update={"removed": tuple(index + by for index in piece.removed)})

    return sliced(change)


def other_head(module, head, stop, start=0):
    """Remove as many other heads from the channels `start` to `stop` of one projection: each one further, the last one the first."""

    def moved_on(index):
        return start + (index - start + head) % (stop - start) if start <= index < stop else index

    def change(piece):
        if piece.module != module:
            return piece
        return piece.model_copy(update={"removed": tuple(sorted(moved_on(index) for index in piece.removed))})

    return sliced(change)


def exchanged(first, second):
    """Cut each of two layers as the other should be."""
    names = {first: second, second: first}
    return sliced(lambda piece: piece.model_copy(update={"module": names.get(piece.module, piece.module)}))


# --- faults of networks: change the pruned network in place -----------------------------------------------------------


def tensor(path, change):
    """Return a fault that writes `change(tensor)` into one parameter or buffer."""

    def plant(model):
        owner, _, name = path.rpartition(".")
        value = getattr(model.get_submodule(owner), name)
        with torch.no_grad():
            value.copy_(change(value.detach().clone()))

    return plant


def all_of(*faults):
    """Return a fault that plants several at once."""

    def plant(model):
        for fault in faults:
            fault(model)

    return plant


def permuted(dim, order):
    """Permute the first indices of a dimension; the others stay."""
    return lambda value: value.index_select(
        dim, torch.tensor([*order, *range(len(order), value.shape[dim])], dtype=torch.long)
    )


def zeroed(dim, index):
    return lambda value: value.index_fill(dim, torch.tensor(index), 0)


def attribute(path, **values):
    """Return a fault that sets attributes which exist."""

    def plant(model):
        module = model.get_submodule(path)
        for name, value in values.items():
            assert getattr(module, name) != value
            setattr(module, name, value)

    return plant


def wired(path, change):
    """Return a fault that passes the arguments of one module through `change`, which edits them in place."""

    def plant(model):
        def pre_hook(_, args, kwargs):
            args = list(args)
            change(args, kwargs)
            return tuple(args), kwargs

        model.get_submodule(path).register_forward_pre_hook(pre_hook, with_kwargs=True)

    return plant


def no_residual(args, _):
    args[1] = torch.zeros_like(args[1])


def no_mask(_, kwargs):
    kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])


def not_causal(_, kwargs):
    mask = kwargs["attention_mask"]
    kwargs["attention_mask"] = torch.zeros_like(mask) if mask.is_floating_point() else torch.ones_like(mask)


def silent(path):
    """Return a fault that makes a module return zeros."""

    def plant(model):
        def hook(_, __, output):
            if isinstance(output, tuple):
                return (torch.zeros_like(output[0]), *output[1:])
            return torch.zeros_like(output)

        model.get_submodule(path).register_forward_hook(hook)

    return plant


def always_dropping(path):
    """Return a fault that leaves a dropout active in evaluation mode."""

    def plant(model):
        assert isinstance(model.get_submodule(path), nn.Dropout)
        model.get_submodule(path).register_forward_hook(lambda _, __, output: F.dropout(output, 0.3, training=True))

    return plant


def rounded(dtype):
    """Return a fault that rounds every weight to a narrower type and back."""

    def plant(model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype).float())

    return plant


def untied(noise):
    """Give the head a perturbed copy of the embedding."""

    def plant(model):
        weight = model.get_input_embeddings().weight.detach()
        assert model.lm_head.weight is model.get_input_embeddings().weight
        disturbed = weight + noise * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
        model.lm_head.weight = nn.Parameter(disturbed)

    return plant


def swapped_heads(size, first=0, second=1):
    """Return an order that swaps two kept heads of `size` channels."""
    order = list(range((max(first, second) + 1) * size))
    a, b = first * size, second * size
    order[a : a + size], order[b : b + size] = order[b : b + size], order[a : a + size]
    return order


ROTATED = [4, 5, 6, 7, 0, 1, 2, 3]
"""The two rotary halves of a head of 8, swapped."""
TILED = [channel for head in (0, 2, 1, 3) for channel in range(head * 8, head * 8 + 8)]
"""Four query heads of 8 that meet two key-value heads in turn (`tile`) instead of in pairs (`repeat_interleave`)."""

PLANS = {
    "cnn": {
        "off by one in a reader": shifted("blocks.0.conv2", dim=1),
        "off by one in a producer": shifted("blocks.0.conv1", dim=0),
        "off by one in one producer of a stream": shifted("blocks.1.conv2", dim=0),
        "off by one in one reader of a stream": shifted("blocks.1.conv1", dim=1),
        "off by one behind the pooling": shifted("head", dim=1),
        "statistics of other units": shifted("blocks.0.bn1", parameters=("running_mean", "running_var")),
        "affine parameters of other units": shifted("bn"),
        "bias of other units": shifted("blocks.1.conv1", parameters=("bias",)),
        "depthwise filters of other units": shifted("depthwise", parameters=("weight",)),
        "slices of another block": exchanged("blocks.0.conv1", "blocks.1.conv1"),
    },
    "bert": {
        "off by one in a reader": shifted("bert.encoder.layer.0.output.dense", dim=1),
        "off by one in a producer": shifted("bert.encoder.layer.1.intermediate.dense"),
        "bias of other units": shifted("bert.encoder.layer.0.intermediate.dense", parameters=("bias",)),
        "keys of other heads": other_head("bert.encoder.layer.0.attention.self.key", 8, 32),
        "values of other heads": other_head("bert.encoder.layer.1.attention.self.value", 8, 32),
        "heads cut a channel too far": shifted("bert.encoder.layer.0.attention.self.query"),
        "slices of another layer": exchanged(
            "bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.1.intermediate.dense"
        ),
    },
    "gpt2": {
        "off by one in a reader": shifted("transformer.h.0.mlp.c_proj", dim=0),
        "off by one in a producer": shifted("transformer.h.1.mlp.c_fc"),
        "bias of other units": shifted("transformer.h.0.mlp.c_fc", parameters=("bias",)),
        "keys of other heads in a fused projection": other_head("transformer.h.0.attn.c_attn", 8, 64, start=32),
        "values of other heads in a fused projection": other_head("transformer.h.1.attn.c_attn", 8, 96, start=64),
        "output projection of other heads": other_head("transformer.h.0.attn.c_proj", 8, 32),
    },
    "llama": {
        "off by one in a reader": shifted("model.layers.0.mlp.down_proj", dim=1),
        "off by one in a producer": shifted("model.layers.1.mlp.up_proj"),
        "gate of other units": shifted("model.layers.0.mlp.gate_proj"),
        "query heads one off inside their groups": other_head("model.layers.0.self_attn.q_proj", 8, 64),
        "keys of other heads": other_head("model.layers.0.self_attn.k_proj", 8, 32),
        "values of other heads": other_head("model.layers.1.self_attn.v_proj", 8, 32),
        "rotary pairs mixed": shifted("model.layers.1.self_attn.k_proj"),
    },
}

NETWORKS = {
    "cnn": {
        "swapped rows of two kept units in one producer": tensor("blocks.1.conv2.weight", permuted(0, [1, 0])),
        "two kept units swapped in the reader only": tensor("blocks.0.conv2.weight", permuted(1, [2, 1, 0])),
        "a kept unit zeroed": tensor("blocks.0.conv1.weight", zeroed(0, [0, 1])),
        "epsilon of another norm": attribute("bn", eps=0.1),
        "norm shifted": tensor("blocks.1.bn2.bias", lambda value: value + 0.05),
        "stale padding": attribute("blocks.0.conv1", padding_mode="circular"),
        "residual dropped": silent("blocks.1.shortcut"),
        "dropout left active": always_dropping("dropout"),
        "weights through bfloat16": rounded(torch.bfloat16),
    },
    "bert": {
        "heads cut anew": attribute(
            "bert.encoder.layer.0.attention.self", num_attention_heads=4, attention_head_size=4
        ),
        "heads merged into one": attribute(
            "bert.encoder.layer.1.attention.self", num_attention_heads=1, attention_head_size=16
        ),
        "two kept heads swapped in the reader only": tensor(
            "bert.encoder.layer.0.attention.output.dense.weight", permuted(1, swapped_heads(8))
        ),
        "swapped rows of two kept units in one producer": tensor(
            "bert.encoder.layer.0.attention.self.query.weight", permuted(0, swapped_heads(8))
        ),
        "a kept unit zeroed": tensor("bert.encoder.layer.0.output.dense.weight", zeroed(1, [0])),
        "epsilon of another norm": attribute("bert.encoder.layer.0.output.LayerNorm", eps=0.1),
        "norm shifted": tensor("bert.encoder.layer.1.attention.output.LayerNorm.weight", lambda value: value + 0.05),
        "residual dropped": wired("bert.encoder.layer.0.attention.output", no_residual),
        "mask dropped": wired("", no_mask),
        "dropout left active": always_dropping("bert.encoder.layer.1.output.dropout"),
        "positions shifted": tensor("bert.embeddings.position_embeddings.weight", lambda value: value.roll(1, 0)),
        "weights through float16": rounded(torch.float16),
    },
    "gpt2": {
        "wrong head_dim": attribute("transformer.h.0.attn", head_dim=4),
        "wrong head_dim, heads merged": attribute("transformer.h.1.attn", head_dim=16),
        "two kept heads swapped in the reader only": tensor(
            "transformer.h.0.attn.c_proj.weight", permuted(0, swapped_heads(8))
        ),
        "swapped rows of two kept units in one producer": tensor(
            "transformer.h.0.mlp.c_fc.weight", permuted(1, [1, 0])
        ),
        "a kept unit zeroed": tensor("transformer.h.1.mlp.c_proj.weight", zeroed(0, [3])),
        "epsilon of another norm": attribute("transformer.ln_f", eps=0.1),
        "norm shifted": tensor("transformer.h.0.ln_2.bias", lambda value: value + 0.05),
        "attention dropped": silent("transformer.h.1.attn"),
        "mask dropped": wired("", no_mask),
        "dropout left active": always_dropping("transformer.h.0.attn.resid_dropout"),
        "embedding untied": untied(0.02),
        "weights through float16": rounded(torch.float16),
    },
    "llama": {
        "rotary halves of a kept query head swapped": tensor(
            "model.layers.0.self_attn.q_proj.weight", permuted(0, ROTATED)
        ),
        "wrong kv repetition": all_of(
            tensor("model.layers.0.self_attn.q_proj.weight", permuted(0, TILED)),
            tensor("model.layers.0.self_attn.o_proj.weight", permuted(1, TILED)),
        ),
        "stale scaling": attribute("model.layers.1.self_attn", scaling=16**-0.5),
        "rotary frequencies of another base": tensor(
            "model.rotary_emb.inv_freq", lambda value: 500.0 ** -torch.linspace(0, 0.75, len(value))
        ),
        "two kept units swapped in the reader only": tensor("model.layers.0.mlp.down_proj.weight", permuted(1, [1, 0])),
        "swapped rows of two kept units in one producer": tensor(
            "model.layers.1.mlp.gate_proj.weight", permuted(0, [1, 0])
        ),
        "a kept unit zeroed": tensor("model.layers.1.mlp.down_proj.weight", zeroed(1, [0])),
        "epsilon of another norm": attribute("model.norm", variance_epsilon=0.1),
        "norm shifted": tensor("model.layers.0.input_layernorm.weight", lambda value: value + 0.05),
        "attention dropped": silent("model.layers.0.self_attn"),
        "causal mask dropped": wired("model.layers.1.self_attn", not_causal),
        "mask dropped": wired("", no_mask),
        "embedding untied": untied(0.02),
        "weights through float16": rounded(torch.float16),
    },
}


def marked(architecture, *values):
    """Return a case of the table below; all but the convolutional network need transformers."""
    return pytest.param(
        architecture,
        *values,
        marks=() if architecture == "cnn" else pytest.mark.hf,
        id="-".join([architecture, *values]),
    )


ARCHITECTURES = [marked(name) for name in BUILD]
PLAN_CASES = [marked(name, fault) for name, faults in PLANS.items() for fault in faults]
NETWORK_CASES = [marked(name, fault) for name, faults in NETWORKS.items() for fault in faults]


def caught(measure, *args):
    """Tell whether a certificate does not hold or cannot be given."""
    try:
        return not measure(*args).holds
    except CertificateError:
        return True


def test_there_are_enough_cases():
    assert len(PLAN_CASES) + len(NETWORK_CASES) >= 30
    assert all(len(PLANS[name]) + len(NETWORKS[name]) >= 10 for name in BUILD)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_right_plan_is_not_vetoed(architecture):
    given = subject(architecture)
    assert len(list(given.plan.of(RemoveUnits))) >= 3
    certificate = certify(given.model, given.plan, given.data)
    assert certificate.holds
    assert certificate.max_abs <= 1e-5 * certificate.scale
    certified = keep_certified(given.model, given.plan, given.data)
    assert certified.vetoed == ()
    assert certified.plan == given.plan
    assert certify_network(given.model, applied(given.model, given.plan), given.plan, given.data) == certificate


@pytest.mark.parametrize(("architecture", "fault"), PLAN_CASES)
def test_faults_of_plans_are_caught(architecture, fault):
    given = subject(architecture)
    spoiled = PLANS[architecture][fault](given.plan)
    assert spoiled != given.plan
    assert moved(applied(given.model, given.plan), applied(given.model, spoiled), given.unseen) > MOVES
    assert caught(certify, given.model, spoiled, given.data)


@pytest.mark.parametrize(("architecture", "fault"), NETWORK_CASES)
def test_faults_of_networks_are_caught(architecture, fault):
    given = subject(architecture)
    right, wrong = applied(given.model, given.plan), applied(given.model, given.plan)
    NETWORKS[architecture][fault](wrong)
    assert moved(right, wrong, given.unseen) > MOVES
    assert caught(certify_network, given.model, wrong, given.plan, given.data)


# --- a second length --------------------------------------------------------------------------------------------------


class Sequences(nn.Module):
    """Embedded tokens through two layers, then the mean over the tokens that the mask keeps, or all of them flattened."""

    def __init__(self, flat=False):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8 * LENGTH, 5) if flat else None
        self.total = False
        self.seen = set()

    def forward(self, ids, mask=None, other=None):
        self.seen.add((ids.shape[1], None if other is None else other.shape[1]))
        x = self.down(F.relu(self.up(self.embedding(ids))))
        if self.head is not None:
            return self.head(x.flatten(1))
        kept = torch.ones_like(ids) if mask is None else mask
        x = (x * kept[..., None]).sum(1) / (LENGTH if self.total else kept.sum(1, keepdim=True))
        return x if other is None else x + self.embedding(other).mean(1)


def numbers(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, (8, length))


def sequences_subject(data, flat=False):
    model = lively(Sequences(flat))
    group = next(group for group in checked_groups(model, data, NodeSettings())[0] if group.root == "up")
    model.seen.clear()
    return model, plan_removal(model, group, [1, 4, 5], "test")


def test_what_is_right_for_one_length_only_is_caught():
    data = Dataset({"ids": numbers(LENGTH)})
    model, plan = sequences_subject(data)
    wrong = applied(model, plan)
    wrong.total = True  # the mean divides by the length that it was made for
    assert moved(applied(model, plan), wrong, Dataset({"ids": numbers(LENGTH, 1)})) <= 1e-6
    assert moved(applied(model, plan), wrong, Dataset({"ids": numbers(LENGTH // 2, 1)})) > MOVES
    assert certify(model, plan, data).holds
    assert caught(certify_network, model, wrong, plan, data)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [((10, 6), (5, 3)), ((10, 3), (5, 3)), ((3, 7), (3, 3)), ((3, 3), (3, 3))],
    ids=["each by its own half", "short ones stay", "the second alone", "nothing to cut"],
)
def test_each_sequence_is_cut_to_half_of_its_own_length(lengths, expected):
    data = Dataset({"ids": numbers(lengths[0]), "mask": np.ones((8, lengths[0]), bool), "other": numbers(lengths[1])})
    model, plan = sequences_subject(data)
    certificate = certify(model, plan, data)
    assert certificate.holds
    assert certificate.batch_sizes == [2, 5]
    assert model.seen == {lengths, expected}


def test_networks_of_one_length_are_compared_at_that_one():
    data = Dataset({"ids": numbers(LENGTH)})
    model, plan = sequences_subject(data, flat=True)
    assert certify(model, plan, data).holds
    assert model.seen == {(LENGTH, None), (LENGTH // 2, None)}


def test_halves_on_which_the_original_is_not_finite_are_left_out():
    mask = np.ones((8, LENGTH), np.int64)
    mask[:, : LENGTH // 2] = 0
    data = Dataset({"ids": numbers(LENGTH), "mask": mask})
    model, plan = sequences_subject(data)
    assert certify(model, plan, data).holds


def test_a_network_that_does_not_run_at_the_second_length_is_caught():
    data = Dataset({"ids": numbers(LENGTH)})
    model, plan = sequences_subject(data)
    wrong = applied(model, plan)

    def refuse(_, args):
        if args[0].shape[1] != LENGTH:
            raise ValueError("another length")

    wrong.embedding.register_forward_pre_hook(refuse)
    with pytest.raises(CertificateError, match="the pruned network does not run: another length"):
        certify_network(model, wrong, plan, data)
