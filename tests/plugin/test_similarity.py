"""CKA against a naive float64 implementation with another formula, its invariances, its streaming form and its errors."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import images, residual

from secateurs.errors import DataError
from secateurs.passes.compared import cka_matrix
from secateurs.similarity import CkaAccumulator, linear_cka


def hsic(x, y, estimator):
    """HSIC by the textbook formulas: Song et al.'s three-term U-statistic, or the centring matrix."""
    x, y = (np.asarray(value, dtype=np.float64).reshape(len(value), -1) for value in (x, y))
    n = len(x)
    K, L = x @ x.T, y @ y.T
    if estimator == "biased":
        H = np.eye(n) - np.ones((n, n)) / n
        return np.trace(K @ H @ L @ H) / (n - 1) ** 2
    np.fill_diagonal(K, 0)
    np.fill_diagonal(L, 0)
    one = np.ones(n)
    middle = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
    return (np.trace(K @ L) + middle - 2 / (n - 2) * one @ K @ L @ one) / (n * (n - 3))


def cka(x, y, estimator="unbiased"):
    return hsic(x, y, estimator) / np.sqrt(hsic(x, x, estimator) * hsic(y, y, estimator))


def related(n=24, seed=0, shape=(5,), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator, dtype=dtype)
    mix = torch.randn(x[0].numel(), 7, generator=generator, dtype=dtype)
    return x, x.flatten(1) @ mix + 2 * torch.randn(n, 7, generator=generator, dtype=dtype) + 1


estimators = pytest.mark.parametrize("estimator", ["unbiased", "biased"])


@estimators
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 3)], ids=["vectors", "tokens", "maps"])
def test_equals_the_naive_implementation(estimator, shape):
    x, y = related(shape=shape)
    assert float(linear_cka(x, y, estimator)) == pytest.approx(cka(x, y, estimator), abs=1e-12)


@estimators
def test_the_smallest_batch_has_four_examples(estimator):
    x, y = related(n=4)
    assert float(linear_cka(x, y, estimator)) == pytest.approx(cka(x, y, estimator), abs=1e-10)


def test_half_precision_is_raised_to_float32():
    x, y = related(n=32)
    x, y = x.half(), y.half()
    assert float(linear_cka(x, y)) == pytest.approx(cka(x.double(), y.double()), abs=1e-5)


@pytest.mark.parametrize("offset", [0, 30, 300], ids=lambda value: f"mean{value}")
def test_float32_is_exact_however_large_the_mean_of_the_features(offset):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 200, generator=generator) + offset
    y = x @ torch.randn(200, 50, generator=generator) / 14 + torch.randn(64, 50, generator=generator)
    expected = cka(*(value.double() - value.double().mean(0) for value in (x, y)))  # the naive sums cancel as well
    assert float(linear_cka(x, y)) == pytest.approx(expected, abs=2e-6)


def test_unbiased_is_zero_for_independent_features_and_biased_is_not():
    values = {"unbiased": [], "biased": []}
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(64, 768, generator=generator) for _ in range(2))
        for estimator, found in values.items():
            found.append(float(linear_cka(x, y, estimator)))
    assert abs(np.mean(values["unbiased"])) < 0.01
    assert max(map(abs, values["unbiased"])) < 0.08
    assert np.mean(values["biased"]) == pytest.approx(0.92, abs=0.01)


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(5, 30),
    width=st.integers(1, 12),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-10, 10),
    estimator=st.sampled_from(["unbiased", "biased"]),
)
def test_invariant_to_rotation_scale_and_shift(seed, n, width, scale, shift, estimator):
    x, y = related(n, seed, (width,))
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    plain = float(linear_cka(x, y, estimator))
    assert float(linear_cka(scale * x @ rotation + shift, y, estimator)) == pytest.approx(plain, abs=1e-7)
    assert float(linear_cka(x, scale * x @ rotation + shift, estimator)) == pytest.approx(1.0, abs=1e-7)


@given(seed=st.integers(0, 10_000), n=st.integers(5, 20))
def test_the_order_of_the_examples_does_not_matter(seed, n):
    x, y = related(n, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert float(linear_cka(x[order], y[order])) == pytest.approx(float(linear_cka(x, y)), abs=1e-9)


@estimators
def test_streaming_averages_numerators_and_denominators_apart(estimator):
    layers = [related(56, seed)[1] for seed in range(3)]
    batches = [slice(0, 16), slice(16, 24), slice(24, 56)]
    accumulator = CkaAccumulator(["a", "b", "c"], estimator)
    taps = [accumulator.tap(name) for name in "abc"]
    for batch in batches:
        for tap, layer in zip(taps, layers, strict=True):
            tap(layer[batch], layer[batch])
        accumulator.end_batch()
    sums = np.array([[sum(hsic(x[b], y[b], estimator) for b in batches) for y in layers] for x in layers])
    expected = sums / np.sqrt(np.outer(np.diag(sums), np.diag(sums)))
    np.testing.assert_allclose(accumulator.compute().numpy(), expected, atol=1e-10)
    assert accumulator.examples == 56


def test_a_last_batch_of_three_is_left_out():
    x, y = related(19)
    accumulator = CkaAccumulator(["x", "y"])
    for batch in (slice(0, 16), slice(16, 19)):
        accumulator.tap("x")(x[batch], x[batch])
        accumulator.tap("y")(y[batch], y[batch])
        accumulator.end_batch()
    assert accumulator.examples == 16
    assert float(accumulator.compute()[0, 1]) == pytest.approx(cka(x[:16], y[:16]), abs=1e-12)


def test_the_matrix_of_a_network_holds_the_pairwise_values():
    model, data = residual(), images(48)
    names = ["layers.0", "layers.1", "layers.3"]
    matrix = cka_matrix(model, names, data, batch_size=48)
    outputs = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: outputs.__setitem__(name, output.double())
        )
        for name in names
    ]
    with torch.no_grad():
        model(torch.from_numpy(data.inputs["input"]))
    for handle in handles:
        handle.remove()
    expected = [[cka(outputs[a], outputs[b]) for b in names] for a in names]
    np.testing.assert_allclose(matrix.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(matrix.diagonal().numpy(), 1.0, atol=1e-12)


@estimators
def test_three_examples_are_too_few(estimator):
    x, y = related(3)
    with pytest.raises(DataError, match="at least 4 examples"):
        linear_cka(x, y, estimator)


def test_different_numbers_of_rows_are_refused():
    x, y = related(8)
    with pytest.raises(DataError, match="8 rows and 7 rows"):
        linear_cka(x, y[:7])


@estimators
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_values_that_are_not_finite_name_the_layer(bad, estimator):
    x, y = related(8)
    y[3, 2] = bad
    with pytest.raises(DataError, match="outputs of 'y' hold NaN or infinite"):
        linear_cka(x, y, estimator)


@estimators
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [7, 300, 1000])
def test_a_constant_layer_is_named_whatever_its_value(dtype, width, estimator):
    generator = torch.Generator().manual_seed(width)
    constant = torch.randn(1, width, generator=generator, dtype=dtype).repeat(33, 1)
    with pytest.raises(DataError, match="outputs of 'x' are the same for every example"):
        linear_cka(constant, torch.randn(33, 9, generator=generator, dtype=dtype), estimator)


def test_a_module_that_was_not_called_is_named():
    accumulator = CkaAccumulator(["x", "idle"])
    accumulator.tap("x")(*related(8))
    with pytest.raises(DataError, match="'idle' was not called"):
        accumulator.end_batch()
