r"""Mutual information between adjacent layers under a Gaussian model, in closed form, and what removing a unit costs.

A reader with weight $W$ computes $Y = W X + b$; with noise of covariance $D$ on $Y$ (a deterministic network would have infinite
information), $X \sim N(\mu, \Sigma)$ and units that own blocks of columns of $X$,

$$S = \Sigma^{-1}, \qquad J = S + W^\top D^{-1} W, \qquad I(X_i; Y \mid X_{\setminus i}) = \tfrac12 \log \frac{\det J_{ii}}{\det S_{ii}},$$

where $J$ is the $X$ block of the joint precision of $(X, Y)$. Removing unit $i$ marginalises it out of both:
$J \leftarrow J - J_{:i} J_{ii}^{-1} J_{i:}$, the same for $S$. A whole layer costs one inversion and one rank-$b$ down-date per unit. The
predictive version scores a unit by the increase of the residual of the best linear map $B$ from the kept units to $Y$,
$\operatorname{tr}(B_i^\top F B_i S_{ii}^{-1})$ with the weights $F$ of the outputs' errors, and $B \leftarrow B - B_i S_{ii}^{-1} S_{i:}$.

Both re-rank after every removal, so of two identical units exactly one goes. Where $Y$ is observed and not computed (a copula), $W$ is the
regression of $Y$ on $X$ and $D$ holds its residual covariance beside the noise; the formulas stay.

References:
    Westphal et al. 2024 (MIPP, transfer-entropy redundancy criterion); Hassibi and Stork 1993 (OBS); Kurtic et al. 2023 (ZipLM). We differ from
    MIPP by the closed form in place of trained predictors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from secateurs.errors import DataError

__all__ = [
    "Criterion",
    "InformationLoss",
    "Order",
    "ResidualIncrease",
    "backward_elimination",
    "noise_floor",
    "precision",
    "ridged",
]

PENDING = 384
"""Columns whose elimination waits, at the most, before it is applied to the whole matrix."""
PANEL = 512
"""Rows of a symmetric update that are computed at once."""
LEAST_WEIGHT = 1e-6
"""Weight of an output that the loss does not care for, relative to the mean: it bounds its noise."""


@dataclass(frozen=True)
class Order:
    """A removal order.

    Attributes:
        units: unit indices, first removed first.
        losses: what each removal cost when it was made, in nats or squared error.
        removable: how many of the first go by the confidence with which they lose nothing; None where no confidence was asked for.
    """

    units: tuple[int, ...]
    losses: tuple[float, ...]
    removable: int | None = None


class Criterion(Protocol):
    """Scores the units of one reader, and forgets one."""

    def scores(self) -> Tensor:
        """Return what removing each unit would cost now, shape `(units,)`; arbitrary for units that are gone."""

    def remove(self, unit: int) -> None:
        """Remove one unit."""


def ridged(covariance: Tensor, ridge: float) -> Tensor:
    """Return the covariance with `ridge` times its mean variance added to the diagonal.

    Twins and dead units make a covariance singular; 1e-3 in float64 keeps every determinant positive.
    """
    mean_variance = covariance.diagonal().mean().clamp_min(1e-12)
    return covariance + ridge * mean_variance * torch.eye(len(covariance), dtype=covariance.dtype)


def precision(covariance: Tensor) -> Tensor:
    """Return the symmetric inverse of a positive definite matrix (see `ridged`)."""
    inverse: Tensor = torch.linalg.inv(covariance)
    return inverse.add_(inverse.T.clone()).mul_(0.5)


def noise_floor(variance: Tensor, share: float, weights: Tensor | None = None) -> Tensor:
    r"""Return the noise of the outputs, $f \cdot \overline{\mathrm{Var}(Y)} \cdot F^{-1}$ with weights $F$ of mean diagonal 1.

    A floor relative to each output's own variance would make the weights a no-op.

    Args:
        variance: of each output, shape `(p,)`.
        share: $f$.
        weights: how much the loss cares for each output, shape `(p,)`, non-negative, or with each pair of them, shape `(p, p)`, positive
            semi-definite; None weights all alike.

    Returns:
        Variances, shape `(p,)`, or with weights of pairs a covariance, shape `(p, p)`.
    """
    base = share * variance.mean().clamp_min(1e-12)
    if weights is None:
        return base.expand_as(variance).clone()
    if weights.ndim == 1:
        return base / (weights / weights.mean().clamp_min(1e-300)).clamp_min(LEAST_WEIGHT)
    relative = weights / weights.diagonal().mean().clamp_min(1e-300)
    return base * precision(relative + LEAST_WEIGHT * torch.eye(len(relative), dtype=relative.dtype))


class InformationLoss:
    """Conditional mutual information of each unit with the reader's output, given the units that are left, in nats.

    Args:
        precision: of the reader's input, shape `(d, d)`, positive definite (see `precision`); it is not changed.
        weight: of the reader, or the regression of its output on its input, shape `(p, d)`.
        noise: on the outputs: variances, shape `(p,)`, positive, or a covariance, shape `(p, p)`, positive definite.
        columns: shape `(units, b)`: the columns of each unit.
    """

    def __init__(self, precision: Tensor, weight: Tensor, noise: Tensor, columns: Tensor) -> None:
        whitened = weight / noise.sqrt()[:, None] if noise.ndim == 1 else _whitened(weight, noise)
        self._alone = _Elimination(precision, columns)
        self._with_output = _Elimination(torch.addmm(precision, whitened.T, whitened), columns)

    def scores(self) -> Tensor:
        """Return the information lost with each unit, in nats, at least 0."""
        gain = _log_determinants(self._with_output.blocks) - _log_determinants(self._alone.blocks)
        return 0.5 * gain.clamp_min(0)

    def remove(self, unit: int) -> None:
        """Marginalise a unit out."""
        self._alone.remove(unit)
        self._with_output.remove(unit)


class ResidualIncrease:
    """Increase of the weighted squared error of the best linear map from the units that are left to the reader's output.

    Args:
        precision: of the reader's input, shape `(d, d)`, positive definite; it is not changed.
        weight: of the reader, or the regression of its output on its input, shape `(p, d)`.
        importance: weight of each output's squared error, shape `(p,)`, or of the products of two outputs' errors, shape `(p, p)`,
            positive semi-definite.
        columns: shape `(units, b)`.
    """

    def __init__(self, precision: Tensor, weight: Tensor, importance: Tensor, columns: Tensor) -> None:
        maps = importance.sqrt()[:, None] * weight if importance.ndim == 1 else _root(importance) @ weight
        if len(maps) > maps.shape[1]:  # only products of its columns count
            maps = torch.linalg.qr(maps, mode="r").R
        self._elimination = _Elimination(precision, columns, maps)
        of_units = maps.T[columns]
        self._products = of_units @ of_units.mT

    def scores(self) -> Tensor:
        """Return the increase of the squared error with each unit removed, at least 0."""
        lower = torch.linalg.cholesky_ex(self._elimination.blocks).L
        solved = torch.cholesky_solve(self._products, lower)
        return solved.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(0)

    def remove(self, unit: int) -> None:
        """Remove a unit and let the others make up for it as well as they can."""
        factors, pulled, share = self._elimination.remove(unit)
        # (B - C F)^T (B - C F), of which only the units' own blocks are wanted
        cross = factors.mT @ (pulled - 0.5 * (share.T @ share) @ factors)
        self._products -= cross + cross.mT
        self._products[unit] = 0


class _Elimination:
    r"""A precision matrix $P$ from which units are marginalised out, lazily, and a linear map that follows.

    With $P_{ii} = L L^\top$ and $F = L^{-1} P_{i:}$, removing unit $i$ is $P \leftarrow P - F^\top F$ and, for the best map $B$ from the units
    that are left, $B \leftarrow B - C F$ with $C = B_{:i} L^{-\top}$. Only the diagonal blocks of $P$ are kept up to date. The factors wait:
    they are applied to a row of $P$ when it is needed, and to all of it when there are many, so that a step reads the factors instead of
    writing the whole matrix. The result differs from that of immediate updates by rounding alone.

    Args:
        precision: shape `(d, d)`; it is not changed.
        columns: shape `(units, b)`.
        maps: $B$, shape `(p, d)`; it is not changed.
    """

    def __init__(self, precision: Tensor, columns: Tensor, maps: Tensor | None = None) -> None:
        self._base = precision
        self._maps = precision.new_zeros(0, len(precision)) if maps is None else maps
        self._position = columns.clone()
        self._left = precision.new_ones(len(columns), 1, 1)
        self._size = columns.shape[1]
        self.blocks = precision[columns[:, :, None], columns[:, None, :]]
        self._restart()

    def _restart(self) -> None:
        width = len(self._base)
        capacity = min(PENDING // self._size + 1, len(self._position)) * self._size
        self._factors = self._base.new_empty(capacity, width)
        self._shares = self._base.new_empty(len(self._maps), capacity)
        self._pending = 0
        self._present = self._base.new_ones(width)

    def remove(self, unit: int) -> tuple[Tensor, Tensor, Tensor]:
        """Marginalise a unit out; its block becomes an identity.

        Returns:
            Per unit the factors, shape `(units, b, b)`; $C^T B$ before the step, the same shape; and $C$, shape `(p, b)`.

        Raises:
            DataError: the matrix is not positive definite.
        """
        if self._pending == len(self._factors):
            self._apply()
        index, done = self._position[unit], self._pending
        factors, shares = self._factors[:done], self._shares[:, :done]
        own = factors.index_select(1, index)
        rows = torch.addmm(self._base.index_select(0, index), own.T, factors, alpha=-1).mul_(self._present)
        lower, failed = torch.linalg.cholesky_ex(rows[:, index])
        if failed:
            raise DataError(
                "the covariance of what a layer reads is not positive definite to rounding; a larger `ridge` makes it so"
            )
        fresh = torch.linalg.solve_triangular(lower, rows, upper=False)
        share = torch.linalg.solve_triangular(
            lower, (self._maps.index_select(1, index) - shares @ own).T, upper=False
        ).T
        pulled = torch.addmm(share.T @ self._maps, share.T @ shares, factors, alpha=-1)
        self._factors[done : done + self._size], self._shares[:, done : done + self._size] = fresh, share
        self._pending += self._size
        self._present[index] = 0
        self._left[unit] = False
        per_unit = self._per_unit(fresh) * self._left
        self.blocks.baddbmm_(per_unit.mT, per_unit, alpha=-1)
        self.blocks[unit] = torch.eye(self._size, dtype=self.blocks.dtype)
        return per_unit, self._per_unit(pulled), share

    def _per_unit(self, rows: Tensor) -> Tensor:
        """Return the columns of each unit, shape `(units, rows, b)`."""
        picked = rows.index_select(1, self._position.flatten())
        return picked.reshape(len(rows), *self._position.shape).transpose(0, 1)

    def _apply(self) -> None:
        """Apply all waiting factors and drop the columns of units that are gone."""
        kept = self._present.nonzero().squeeze(1)
        factors = self._factors[: self._pending].index_select(1, kept)
        fresh = self._base.new_empty(len(kept), len(kept))
        for start in range(0, len(kept), PANEL):  # the upper half, and its mirror image
            panel = slice(start, start + PANEL)
            rows = self._base.index_select(0, kept[panel]).index_select(1, kept[start:])
            torch.addmm(rows, factors[:, panel].T, factors[:, start:], alpha=-1, out=fresh[panel, start:])
            fresh[start:, panel] = fresh[panel, start:].T.clone()
        self._base = fresh
        self._maps = torch.addmm(self._maps.index_select(1, kept), self._shares[:, : self._pending], factors, alpha=-1)
        place = torch.zeros_like(self._present, dtype=torch.long)
        place[kept] = torch.arange(len(kept))
        self._position = place[self._position]
        self._restart()


def _root(matrix: Tensor) -> Tensor:
    """Return a matrix whose square (transposed times itself) is a positive semi-definite one, up to rounding."""
    size = matrix.diagonal().mean().clamp_min(1e-300)
    lower: Tensor = torch.linalg.cholesky(matrix / size + 1e-10 * torch.eye(len(matrix), dtype=matrix.dtype))
    return lower.T * size.sqrt()


def _whitened(weight: Tensor, noise: Tensor) -> Tensor:
    """Return a weight whose square is $W^T D^{-1} W$."""
    whitened: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(noise), weight, upper=False)
    return whitened


def _log_determinants(blocks: Tensor) -> Tensor:
    if blocks.shape[1] == 1:
        return blocks[:, 0, 0].clamp_min(1e-300).log()
    determinants: Tensor = torch.linalg.slogdet(blocks).logabsdet
    return determinants


def backward_elimination(criteria: Sequence[Criterion], units: int, keep: int = 1) -> Order:
    """Remove units one at a time, each time the one that costs least in total over all readers.

    Args:
        criteria: one per reader of the group, in one unit (nats, or a common squared error); they are used up.
        units: how many units the group has.
        keep: how many are left at the end.

    Returns:
        The order of removal with the cost of each step.
    """
    gone = torch.zeros(units, dtype=torch.bool)
    order: list[int] = []
    losses: list[float] = []
    for _ in range(units - keep):
        totals = torch.stack([criterion.scores() for criterion in criteria]).sum(0).masked_fill(gone, float("inf"))
        unit = int(totals.argmin())
        order.append(unit)
        losses.append(float(totals[unit]))
        gone[unit] = True
        for criterion in criteria:
            criterion.remove(unit)
    return Order(tuple(order), tuple(losses))
