r"""Mutual information between adjacent layers under a Gaussian model, in closed form, and what removing a unit costs.

A reader with weight $W$ computes $Y = W X + b$; with noise of covariance $D$ on $Y$ (a deterministic network would have infinite
information), $X \sim N(\mu, \Sigma)$ and units that own blocks of columns of $X$,

$$S = \Sigma^{-1}, \qquad J = S + W^\top D^{-1} W, \qquad I(X_i; Y \mid X_{\setminus i}) = \tfrac12 \log \frac{\det J_{ii}}{\det S_{ii}},$$

where $J$ is the $X$ block of the joint precision of $(X, Y)$. Removing unit $i$ marginalises it out of both:
$J \leftarrow J - J_{:i} J_{ii}^{-1} J_{i:}$, the same for $S$. A whole layer costs one inversion and one rank-$b$ down-date per unit. The
predictive version scores a unit by the increase of the residual of the best linear map $B$ from the kept units to $Y$,
$\operatorname{tr}(B_i S_{ii}^{-1} B_i^\top)$, with $B \leftarrow B - B_i S_{ii}^{-1} S_{i:}$.

Both re-rank after every removal, so of two identical units exactly one goes.

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

__all__ = ["Criterion", "InformationLoss", "Order", "ResidualIncrease", "backward_elimination", "noise_floor", "ridged"]


@dataclass(frozen=True)
class Order:
    """A removal order.

    Attributes:
        units: unit indices, first removed first.
        losses: what each removal cost when it was made, in nats or squared error.
    """

    units: tuple[int, ...]
    losses: tuple[float, ...]


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


def noise_floor(variance: Tensor, share: float, weights: Tensor | None = None) -> Tensor:
    r"""Return the noise variance of each output, $f \cdot \overline{\mathrm{Var}(Y)} / w_j$ with weights of mean 1.

    A floor relative to each output's own variance would make the weights a no-op.

    Args:
        variance: of each output, shape `(p,)`.
        share: $f$.
        weights: how much the loss cares for each output, shape `(p,)`, non-negative; None weights all alike.
    """
    base = share * variance.mean().clamp_min(1e-12)
    if weights is None:
        return base.expand_as(variance).clone()
    relative = weights / weights.mean().clamp_min(1e-300)
    return base / relative.clamp_min(1e-6)


class InformationLoss:
    """Conditional mutual information of each unit with the reader's output, given the units that are left, in nats.

    Args:
        covariance: of the reader's input, shape `(d, d)`, positive definite (see `ridged`).
        weight: of the reader, shape `(p, d)`.
        noise: variance on each output, shape `(p,)`, positive.
        columns: shape `(units, b)`: the columns of each unit.
    """

    def __init__(self, covariance: Tensor, weight: Tensor, noise: Tensor, columns: Tensor) -> None:
        self._columns = columns
        self._S = torch.linalg.inv(covariance)
        self._S = 0.5 * (self._S + self._S.T)
        self._J = self._S + weight.T @ (weight / noise[:, None])

    def scores(self) -> Tensor:
        """Return the information lost with each unit, in nats, at least 0."""
        return 0.5 * (_log_determinants(self._J, self._columns) - _log_determinants(self._S, self._columns)).clamp_min(
            0
        )

    def remove(self, unit: int) -> None:
        """Marginalise a unit out."""
        index = self._columns[unit]
        _marginalise(self._J, index)
        _marginalise(self._S, index)


class ResidualIncrease:
    """Increase of the weighted squared error of the best linear map from the units that are left to the reader's output.

    Args:
        covariance: of the reader's input, shape `(d, d)`, positive definite.
        weight: of the reader, shape `(p, d)`.
        importance: weight of each output's squared error, shape `(p,)`.
        columns: shape `(units, b)`.
    """

    def __init__(self, covariance: Tensor, weight: Tensor, importance: Tensor, columns: Tensor) -> None:
        self._columns = columns
        self._S = torch.linalg.inv(covariance)
        self._S = 0.5 * (self._S + self._S.T)
        self._B = importance.sqrt()[:, None] * weight

    def scores(self) -> Tensor:
        """Return the increase of the squared error with each unit removed."""
        index = self._columns
        blocks = self._S[index[:, :, None], index[:, None, :]]
        maps = self._B.T[index]  # (units, b, p)
        solved = torch.linalg.solve(blocks + _removed_identity(blocks), maps)
        increase: Tensor = (maps * solved).sum((1, 2))
        return increase

    def remove(self, unit: int) -> None:
        """Remove a unit and let the others make up for it as well as they can."""
        index = self._columns[unit]
        block = self._S[index][:, index]
        self._B -= self._B[:, index] @ torch.linalg.solve(block, self._S[index])
        _marginalise(self._S, index)
        self._B[:, index] = 0


def _removed_identity(blocks: Tensor) -> Tensor:
    """Return an identity for blocks of units that are gone (all zero), so that batched solves stay defined."""
    gone = (blocks == 0).all(-1).all(-1)
    return gone[:, None, None] * torch.eye(blocks.shape[-1], dtype=blocks.dtype)


def _log_determinants(matrix: Tensor, columns: Tensor) -> Tensor:
    blocks = matrix[columns[:, :, None], columns[:, None, :]]
    if columns.shape[1] == 1:
        return blocks[:, 0, 0].clamp_min(1e-300).log()
    determinants: Tensor = torch.linalg.slogdet(blocks + _removed_identity(blocks)).logabsdet
    return determinants


def _marginalise(matrix: Tensor, index: Tensor) -> None:
    """Eliminate some variables from a precision matrix in place; their rows and columns become zero."""
    rows = matrix[index].clone()
    matrix.addmm_(rows.T, torch.linalg.solve(rows[:, index], rows), alpha=-1)
    matrix[index] = 0
    matrix[:, index] = 0


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
