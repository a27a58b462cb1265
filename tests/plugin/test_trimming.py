"""Batches without common padding: the same predictions and the same statistics as with it, from fewer positions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateurs.data import Dataset, Roles
from secateurs.forward import ignores_padding, predict, tensors, trimming
from secateurs.refit import paired_moments
from secateurs.sensitivity import output_sensitivity


class Classifier(nn.Module):
    """Attention over the tokens and a mean of them; `heed` forgets the mask in the mean, `fixed` allows one length only."""

    def __init__(self, length, *, heed=True, fixed=False, per_token=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 8)
        self.key, self.value, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.position = nn.Parameter(torch.randn(length, 8))
        self.heed, self.fixed, self.per_token = heed, fixed, per_token
        self.seen = 0

    def forward(self, input_ids, attention_mask):
        self.seen += input_ids.numel()
        position = self.position if self.fixed else self.position[: input_ids.shape[1]]
        hidden = self.embedding(input_ids) + position
        mask = attention_mask[:, None, :].bool()
        scores = (hidden @ self.key(hidden).transpose(1, 2)).masked_fill(~mask, float("-inf"))
        mixed = scores.softmax(2) @ self.value(hidden)
        if self.per_token:
            return self.head(mixed)
        weight = attention_mask[..., None].float() if self.heed else torch.ones_like(mixed[..., :1])
        return self.head((mixed * weight).sum(1) / weight.sum(1))


def texts(lengths, longest, seed=0, **options):
    generator = np.random.default_rng(seed)
    mask = (np.arange(longest) < np.asarray(lengths)[:, None]).astype(np.int64)
    ids = generator.integers(1, 20, mask.shape) * mask
    return Dataset({"input_ids": ids, "attention_mask": mask}, keyword=True, **options)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 5))
def test_batches_hold_every_token_and_no_common_padding(lengths, size):
    data = texts(lengths, 12, trims=True)
    rows, tokens = 0, []
    for batch in data.longest_first().batches(size):
        assert batch.tokens.any(0).all()
        assert batch.inputs["input_ids"].shape == batch.tokens.shape
        rows += len(batch)
        tokens += batch.inputs["input_ids"][batch.tokens].tolist()
    assert rows == len(lengths)
    assert sorted(tokens) == sorted(data.inputs["input_ids"][data.tokens].tolist())


def test_without_the_flag_nothing_is_cut_and_the_order_stays():
    data = texts([2, 9, 4], 12)
    assert data.longest_first() is data
    [batch] = data.batches(8)
    assert all(np.array_equal(batch.inputs[name], array) for name, array in data.inputs.items())


def test_padding_on_the_left_or_inside_stays():
    data = texts([3, 3], 6, trims=True)
    left = Dataset({name: array[:, ::-1] for name, array in data.inputs.items()}, keyword=True, trims=True)
    assert left.trimmed() is left
    empty = Dataset({name: array * 0 for name, array in data.inputs.items()}, keyword=True, trims=True)
    assert empty.trimmed().inputs["input_ids"].shape == (2, 1)


def test_predictions_are_the_same_in_the_same_order():
    lengths = [3, 12, 5, 1, 7, 7, 2] * 12
    plain, trimmed = texts(lengths, 16), texts(lengths, 16, trims=True)
    whole, short = Classifier(16), Classifier(16)
    torch.testing.assert_close(predict(short, trimmed), predict(whole, plain), rtol=0, atol=1e-6)
    assert short.seen < 0.6 * whole.seen


def test_moments_and_gradients_are_the_same():
    lengths = [3, 12, 5, 1, 7, 7, 2] * 12
    plain, trimmed = texts(lengths, 16), texts(lengths, 16, trims=True)
    model = Classifier(16)
    torch.manual_seed(1)
    other = Classifier(16)
    one, two = (paired_moments(other, model, "value", data) for data in (plain, trimmed))
    assert one.x.count == two.x.count == sum(lengths)
    torch.testing.assert_close(one.x.sum_xx, two.x.sum_xx, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(one.sum_yx, two.sum_yx, rtol=1e-5, atol=1e-4)


def test_sensitivity_sees_the_same_gradients():
    """One text many times, so that the drawn labels are the same whatever the order; the mean over them is what is compared."""
    model, data = Classifier(16), texts([5] * 64, 16)
    data = data.take([0] * 64)
    trimmed = texts([5] * 64, 16, trims=True).take([0] * 64)
    one, two = (output_sensitivity(model, ["value"], given)["value"] for given in (data, trimmed))
    assert one.min() > 0
    torch.testing.assert_close(one, two, rtol=1e-4, atol=0)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=300), st.integers(1, 4), st.integers(0, 9))
def test_an_order_of_like_lengths_is_an_order(lengths, size, seed):
    order = np.random.default_rng(seed).permutation(len(lengths))
    found = texts(lengths, 12, trims=True).like_lengths(order, size)
    assert sorted(found) == list(range(len(lengths)))
    assert np.array_equal(texts(lengths, 12).like_lengths(order, size), order)


def test_an_order_of_like_lengths_is_random_and_has_little_padding():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 60, 1000)
    data = texts(lengths, 60, trims=True)
    orders = [data.like_lengths(generator.permutation(1000), 8) for _ in range(2)]
    assert not np.array_equal(*orders)
    for order in orders:
        longest = lengths[order].reshape(-1, 8).max(1)
        assert 8 * longest.sum() < 1.1 * lengths.sum()
        assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3, "long and short batches are mixed"


def test_only_what_the_network_is_pruned_with_is_trimmed():
    data = texts([3, 5, 9, 12, 4], 16)
    roles = Roles(calibration=data, validation=data, evaluation=data)
    found = trimming(Classifier(16), roles)
    assert found.calibration.trims
    assert found.validation.trims
    assert found.training is None
    assert not found.evaluation.trims
    assert trimming(Classifier(16, heed=False), roles) is roles


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, True), ({"heed": False}, False), ({"fixed": True}, False), ({"per_token": True}, False)],
    ids=["masks", "averages padding", "one length", "one prediction per token"],
)
def test_only_networks_that_ignore_padding_are_given_less(options, expected):
    assert ignores_padding(Classifier(16, **options), texts([3, 5, 9, 12, 4], 16)) is expected


def test_a_network_that_asserts_its_length_is_not_trimmed():
    class Asserting(Classifier):
        def forward(self, input_ids, attention_mask):
            assert input_ids.shape[1] == len(self.position)
            return super().forward(input_ids, attention_mask)

    assert not ignores_padding(Asserting(16), texts([3, 5, 9, 12, 4], 16))


def test_there_is_nothing_to_trim_where_no_text_is_short_or_masked():
    model, data = Classifier(6), texts([6, 6, 6], 6)
    assert not ignores_padding(model, data)
    without = Dataset({"input_ids": data.inputs["input_ids"]}, keyword=True)
    assert not ignores_padding(lambda_of(model), without)
    assert tensors(without)["input_ids"].shape == (3, 6)


def lambda_of(model):
    class All(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids, torch.ones_like(input_ids))

    return All()
