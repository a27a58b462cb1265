"""Normal scores against scipy's ranks; what they are invariant to; memory that batches do not add to."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import images, mlp, plain, vectors
from scipy import stats
from torch import nn

from secateurs.copula import NormalScores, copula_moments
from secateurs.data import Dataset
from secateurs.rows import ROWS, observe_rows, reader_moments


def values(rows, channels, seed=0):
    """Distinct numbers far enough apart for any map below."""
    generator = np.random.default_rng(seed)
    grid = [generator.permutation(rows) for _ in range(channels)]
    return torch.from_numpy(np.stack(grid, 1) / rows * 4 - 2)


def test_scores_are_normal_quantiles_of_ranks():
    x = values(101, 3)
    expected = stats.norm.ppf(stats.rankdata(x.numpy(), axis=0) / 102)
    np.testing.assert_allclose(NormalScores(x)(x), expected, rtol=1e-5, atol=1e-6)


def test_equal_values_share_their_middle_rank():
    x = torch.relu(torch.randn(400, 2, generator=torch.Generator().manual_seed(0)))
    expected = stats.norm.ppf(stats.rankdata(x.numpy(), axis=0) / 401)
    np.testing.assert_allclose(NormalScores(x)(x), expected, rtol=1e-4, atol=1e-5)


def test_neighbouring_columns_belong_to_one_channel():
    sample, x = values(50, 2), values(50, 2, seed=1)
    scores = NormalScores(sample)
    patches = torch.stack((x[:, 0], x[:, 0] + 1, x[:, 1], x[:, 1] - 1), 1)
    found = scores(patches)
    torch.testing.assert_close(found[:, [0, 2]], scores(x))
    torch.testing.assert_close(found[:, [1, 3]], scores(torch.stack((x[:, 0] + 1, x[:, 1] - 1), 1)))


MAPS = {
    "exp": torch.exp,
    "cube": lambda x: x**3 + x,
    "affine": lambda x: 7 * x - 3,
    "sigmoid": torch.sigmoid,
    "heavy": lambda x: x * (1 + 1000 * (x.abs() > 1)),
}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), names=st.lists(st.sampled_from(sorted(MAPS)), min_size=3, max_size=3))
def test_increasing_maps_of_each_channel_change_nothing(seed, names):
    sample, x = values(60, 3, seed), values(60, 3, seed + 1)

    def changed(rows):
        return torch.stack([MAPS[name](rows[:, channel]) for channel, name in enumerate(names)], 1)

    assert torch.equal(NormalScores(changed(sample))(changed(x)), NormalScores(sample)(x))


def test_a_decreasing_map_turns_the_sign():
    sample = values(60, 1)
    torch.testing.assert_close(NormalScores(-sample)(-sample), -NormalScores(sample)(sample))


@pytest.mark.parametrize(
    ("model", "data", "name", "d"),
    [(mlp(), vectors(200), "2", 16), (plain(), images(40), "2", None)],
    ids=["mlp", "conv"],
)
def test_moments_are_those_of_the_scores(model, data, name, d):
    rows = []
    observe_rows(model, [name], data, lambda _, found: rows.append(found), limit=10**6)
    x, y = (torch.cat([getattr(part, field) for part in rows]) for field in ("x", "y"))
    [found] = copula_moments(model, [name], data, sample=10**6, limit=10**6)[name]
    assert found.count == len(x)
    if d is not None:  # a linear layer: every row is in the sample
        scores = stats.norm.ppf(stats.rankdata(torch.cat((x, y), 1).numpy(), axis=0) / (len(x) + 1))
        np.testing.assert_allclose(found.covariance, np.cov(scores.T, bias=True), atol=2e-3)
    variance = found.covariance.diagonal()
    assert float(variance.max()) < 1.1
    assert float(variance[-y.shape[1] :].min()) > 0.9


def test_folds_add_up_and_are_dealt_by_example():
    model, data = mlp(), vectors(30)
    [whole] = copula_moments(model, ["2"], data)["2"]
    parts = copula_moments(model, ["2"], data, folds=3)["2"]
    assert [part.count for part in parts] == [10, 10, 10]
    torch.testing.assert_close(sum(part.sum_xx for part in parts), whole.sum_xx, rtol=1e-5, atol=1e-4)
    of_inputs = reader_moments(model, ["2"], data, folds=3)["2"]
    rows = []
    observe_rows(model, ["2"], data, lambda _, found: rows.append(found.x))
    torch.testing.assert_close(of_inputs[1].mean, torch.cat(rows)[1::3].double().mean(0), rtol=1e-5, atol=1e-6)


def test_rows_stay_bounded_whatever_the_number_of_examples():
    model, seen = plain(), []
    observe_rows(model, ["2"], images(300), lambda _, rows: seen.append(len(rows.x)), limit=600)
    assert 300 <= sum(seen) <= 600
    assert ROWS >= 600
    assert copula_moments(model, ["2"], images(300), sample=50, limit=600)["2"][0].count <= 600


class Spikes(nn.Module):
    """A hidden unit that is silent but for rare, huge spikes beside one that varies all the time; each is read by an output of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.eye(2))
            self.head.weight.copy_(torch.eye(2))
            self.hidden.bias.zero_()
            self.head.bias.zero_()

    def forward(self, input):  # noqa: A002
        return self.head(self.hidden(input))


def spikes(n=2000):
    generator = np.random.default_rng(0)
    spike = np.where(generator.uniform(size=n) < 0.01, 100.0, 0.0)
    return Dataset({"input": np.stack((spike, generator.normal(size=n)), 1).astype(np.float32)})


def test_heavy_tails_mislead_the_gaussian_and_not_the_copula():
    """With noise of variance s on each output, the spikes carry at most their entropy, .056 nats; the other unit 1/2 log(1 + 1/s)."""
    from secateurs.groups import find_groups
    from secateurs.passes.ordering import Scoring
    from secateurs.passes.survey import Survey
    from secateurs.settings import MiNodesSettings

    model, data = Spikes(), spikes()
    groups, _ = find_groups(model, data.take(range(2)))
    survey = Survey(model, groups, data, 0)
    variance = data.inputs["input"].var(0)
    noise = 0.01 * variance.mean()
    entropy = -0.01 * np.log(0.01) - 0.99 * np.log(0.99)
    assert 0.5 * np.log1p(variance[1] / noise) > 5 * entropy
    options = MiNodesSettings(criteria=("information",))
    plainly = Scoring(survey, options).orders(groups[0])["information"]
    ranked = Scoring(survey, options, joint=copula_moments(model, ["head"], data)).orders(groups[0])["information"]
    assert plainly.units == (1,), "the Gaussian sees the variance of the spikes"
    assert ranked.units == (0,), "the copula sees that they are rare"
