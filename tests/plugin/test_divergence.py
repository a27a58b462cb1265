"""Divergences between predictions, and the temperature at which they are taken."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax

from secateurs.forward import kl_divergence, unsure_temperature


def logits(n=50, classes=10, scale=1.0, seed=0):
    return scale * torch.from_numpy(np.random.default_rng(seed).normal(size=(n, classes)))


@given(st.floats(0.5, 16), st.integers(2, 20), st.integers(0, 100))
def test_the_divergence_is_that_of_the_softened_distributions(temperature, classes, seed):
    r, c = logits(7, classes, 3, seed), logits(7, classes, 3, seed + 1000)
    p, q = (softmax(values.numpy() / temperature, axis=1) for values in (r, c))
    expected = temperature**2 * rel_entr(p, q).sum(1).mean()
    assert kl_divergence(r, c, temperature) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_broken_network_is_infinitely_far():
    broken = logits()
    broken[3, 2] = float("nan")
    assert kl_divergence(logits(), broken, 4.0) == float("inf")


@given(st.floats(0.1, 200), st.integers(0, 50))
def test_the_temperature_is_the_least_that_leaves_doubt(scale, seed):
    r = logits(scale=scale, seed=seed)
    found = unsure_temperature(r)

    def doubt(temperature):
        p = softmax(r.numpy() / temperature, axis=1)
        return -(p * np.log(np.maximum(p, 1e-300))).sum(1).mean() / np.log(10)

    assert found in (1, 2, 4, 8, 16)
    assert found == 16 or doubt(found) >= 0.2 - 1e-12
    assert found == 1 or doubt(found / 2) < 0.2
