r"""Similarity of representations: unbiased minibatch linear CKA, all pairs in one matrix product.

For a batch of $n \ge 4$ examples with features $X_l$ flattened to shape $(n, d_l)$: $K = X X^\top$ with zero diagonal is U-centred,
$m = K\mathbf 1/(n-2)$, $m \mathrel{-}= \sum m / (2(n-1))$, $\hat K = K - m\mathbf 1^\top - \mathbf 1 m^\top$ with zero diagonal, and
$\mathrm{HSIC}_u(l, k) = \langle \hat K_l, \hat K_k\rangle / (n(n-3))$. With $\mathrm{vec}(\hat K_l)$ as the rows of $G$, all pairs are
$G G^\top$, summed over batches in float64; $\mathrm{CKA} = S_{lk} / \sqrt{S_{ll} S_{kk}}$ at the end. Memory is $L n^2$ whatever the number of
batches.

The biased estimator (paper mode) centres with $H = I - \mathbf 1\mathbf 1^\top/n$ instead. It is not interpretable at small $n$: independent
features of width 768 score .92 at $n = 64$.

Examples are what is compared: for token models, `pooled` makes one row of each sequence first.

References:
    Kornblith et al. 2019; Song et al. 2012 (U-statistic); Nguyen et al. 2021 (minibatch form).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from secateurs.data import Dataset
from secateurs.errors import DataError

__all__ = ["CkaAccumulator", "Estimator", "linear_cka", "pooled"]

Estimator = Literal["unbiased", "biased"]
MINIMUM_EXAMPLES = 4
LEAST_SPREAD = 1 / 4
"""Share of the features' squared norm that their spread around the mean has to make up for float32 to hold it without centring."""
PIECE = 2048
"""About the width of the pieces into which the features are cut for one Gram matrix."""


def pooled(outputs: Tensor, tokens: Tensor) -> Tensor:
    """Return one row per sequence, the mean over its tokens but the first.

    Padding is no token. The first one (`[CLS]`, the beginning of a text) often serves as an attention sink, whose output dwarfs all others:
    a mean with it would be little else. Where there is no second token, the first stands for the sequence.

    Args:
        outputs: shape `(n, length, d)`.
        tokens: which positions are tokens, bool, shape `(n, length)`; at least one in each row.

    Returns:
        Shape `(n, d)`.

    >>> pooled(torch.tensor([[[9.0], [1.0], [3.0], [7.0]]]), torch.tensor([[True, True, True, False]]))
    tensor([[2.]])
    """
    first = tokens.long().cumsum(1) == 1
    counted = torch.where(tokens.sum(1, keepdim=True) > 1, tokens & ~first, tokens).to(outputs.dtype)
    # Padding may hold anything, even NaN: it is selected away, not multiplied by zero.
    kept = torch.where(counted[:, :, None] > 0, outputs, 0)
    return kept.sum(1) / counted.sum(1, keepdim=True).clamp_min(1)


def _gram(x: Tensor) -> Tensor:
    """Return the Gram matrix of features up to terms that centring removes, float64.

    Neither estimator depends on the features' mean, but where it dwarfs their spread, float32 would lose the spread to cancellation. Only there
    is it worth subtracting, which reads and writes the features several times; the Gram matrix tells, as it holds both norms.
    """
    # A Gram matrix does not depend on the order of the features: in the order of memory (channels last, for one), flattening copies nothing.
    flat = x.permute(0, *sorted(range(1, x.ndim), key=x.stride, reverse=True)).flatten(1)
    if flat.dtype not in (torch.float32, torch.float64):
        flat = flat.float()
    gram = _product(flat)
    norm, total = torch.stack((gram.trace(), gram.sum())).tolist()
    spread = norm - total / len(gram)
    return gram if spread >= LEAST_SPREAD * norm > 0 else _product(_without_mean(flat))


def _product(flat: Tensor) -> Tensor:
    r"""Return $X X^\top$, float64: products of pieces of the features in their own precision, summed in float64.

    The pieces are views. Without them, the product of so long a matrix uses one thread, and float32 loses a digit to its length. A Gram matrix
    is symmetric: its lower left quarter is not computed.
    """
    n, width = flat.shape
    parts, half = math.gcd(width, max(width // PIECE, 1)), n // 2
    pieces = flat.view(n, parts, width // parts).transpose(0, 1)
    upper, lower = pieces[:, :half], pieces[:, half:]
    gram = torch.empty(n, n, dtype=torch.float64, device=flat.device)
    gram[:half] = torch.bmm(upper, pieces.transpose(1, 2)).sum(0, dtype=torch.float64)
    gram[half:, half:] = torch.bmm(lower, lower.transpose(1, 2)).sum(0, dtype=torch.float64)
    gram[half:, :half] = gram[:half, half:].T
    return gram


def _without_mean(flat: Tensor) -> Tensor:
    """Return features less their mean; those that are constant up to rounding become exactly zero."""
    mean, rounding = flat.mean(0), 8 * torch.finfo(flat.dtype).eps
    flat = flat - mean
    return flat.masked_fill_(flat.abs().amax(0) <= rounding * mean.abs(), 0)


def _centred(grams: Tensor, estimator: Estimator) -> Tensor:
    """Return Gram matrices of shape `(L, n, n)` centred; they may be overwritten."""
    n = grams.shape[1]
    if estimator == "biased":
        mean = grams.mean(2)
        return grams - mean[:, :, None] - mean[:, None, :] + mean.mean(1)[:, None, None]
    grams.diagonal(dim1=1, dim2=2).zero_()
    mean = grams.sum(2) / (n - 2)
    mean -= mean.sum(1, keepdim=True) / (2 * (n - 1))
    grams = grams - mean[:, :, None] - mean[:, None, :]
    grams.diagonal(dim1=1, dim2=2).zero_()
    return grams


class CkaAccumulator:
    """All-pairs CKA of several modules over many batches; memory does not grow with the batches.

    Attach `tap(name)` to each module, call `end_batch()` after each forward pass, then `compute()`.

    Args:
        names: the modules, in order.
        estimator: see the module's docstring.
    """

    def __init__(self, names: Sequence[str], estimator: Estimator = "unbiased") -> None:
        self.names = list(names)
        self.estimator: Estimator = estimator
        self.examples = 0
        self._grams: dict[str, Tensor] = {}
        self._sums = torch.zeros(len(self.names), len(self.names), dtype=torch.float64)

    def tap(self, name: str) -> Callable[[Tensor, Tensor], None]:
        """Return the tap for one module's output."""

        def update(_: Tensor, outputs: Tensor) -> None:
            self._grams[name] = _gram(outputs.detach())

        return update

    def end_batch(self, _batch: Dataset | None = None, _output: Any = None) -> None:
        """Add the batch whose outputs were tapped; batches of fewer than 4 examples are left out."""
        missing = [name for name in self.names if name not in self._grams]
        if missing:
            raise DataError(
                f"CKA: the module {missing[0]!r} was not called in the forward pass; name blocks that run on every batch."
            )
        grams = [self._grams.pop(name) for name in self.names]
        n = len(grams[0])
        for name, gram in zip(self.names, grams, strict=True):
            if len(gram) != n:
                raise DataError(
                    f"CKA compares the same examples: {self.names[0]!r} puts out {n} rows in one batch, {name!r} {len(gram)}; name modules "
                    f"whose outputs have one row per example."
                )
        if n < MINIMUM_EXAMPLES:
            return
        scale = n * (n - 3) if self.estimator == "unbiased" else (n - 1) ** 2
        # All pairs of layers at once: one product of (L, n * n) matrices.
        rows = _centred(torch.stack(grams).cpu(), self.estimator).flatten(1)
        self._sums += rows @ rows.T / scale
        self.examples += n

    @property
    def constant(self) -> tuple[str, ...]:
        """The modules whose outputs were the same for every example; they have no CKA."""
        own = self._sums.diagonal().tolist()
        return tuple(name for name, value in zip(self.names, own, strict=True) if value <= 0)

    def compute(self, names: Sequence[str] | None = None) -> Tensor:
        """Return the CKA matrix, shape `(L, L)`, float64; entries may be slightly negative.

        Args:
            names: the modules to compare; None for all.

        Raises:
            DataError: fewer than 4 examples were seen, or a module is constant or not finite.
        """
        if self.examples < MINIMUM_EXAMPLES:
            raise DataError(
                f"CKA needs batches of at least {MINIMUM_EXAMPLES} examples; saw {self.examples}. Give more calibration data."
            )
        names = self.names if names is None else list(names)
        index = torch.tensor([self.names.index(name) for name in names], dtype=torch.int64)
        sums = self._sums[index][:, index]
        own = sums.diagonal()
        for name, value in zip(names, own.tolist(), strict=True):
            if value != value or value in (float("inf"), float("-inf")):
                raise DataError(
                    f"CKA: the outputs of {name!r} hold NaN or infinite values; check the network on the calibration data."
                )
            if value <= 0:
                raise DataError(
                    f"CKA: the outputs of {name!r} are the same for every example; it cannot be compared with other layers."
                )
        return sums / torch.sqrt(own[:, None] * own[None, :])


def linear_cka(x: Tensor, y: Tensor, estimator: Estimator = "unbiased") -> Tensor:
    r"""Linear centred kernel alignment of two representations of the same examples.

    $\mathrm{CKA}(X, Y) = \mathrm{HSIC}(X, Y) / \sqrt{\mathrm{HSIC}(X, X)\,\mathrm{HSIC}(Y, Y)}$. About 0 for independent representations, 1 for
    equal up to rotation and scale.

    Args:
        x: activations $X$, shape `(n, ...)`, one row per example.
        y: activations $Y$, shape `(n, ...)`, the same examples in the same order.
        estimator: `unbiased` (U-statistic) or `biased`.

    Returns:
        Scalar, float64.

    Raises:
        DataError: fewer than 4 rows, different numbers of rows, or a constant input.

    >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 3.0], [4.0, 1.0], [0.0, 5.0]])
    >>> round(float(linear_cka(x, 3 * x)), 6)
    1.0
    """
    if len(x) != len(y):
        raise DataError(f"CKA compares the same examples: got {len(x)} rows and {len(y)} rows.")
    accumulator = CkaAccumulator(["x", "y"], estimator)
    accumulator.tap("x")(x, x)
    accumulator.tap("y")(y, y)
    accumulator.end_batch()
    return accumulator.compute()[0, 1]
