r"""The Gaussian copula of what a layer reads and what it puts out: normal scores instead of values.

Each channel is mapped to $\Phi^{-1}$ of its rank, so that heavy tails and saturation cannot dominate a covariance; the joint covariance of the
scores of $X$ and $Y$ then goes into the Gaussian formulas. The information that they give is a lower bound, and does not change under
strictly increasing maps of any channel.

Ranks are taken among a bounded sample of rows (`SAMPLE`) that a first sweep gathers, evenly over the examples; a second sweep adds up moments
of scores. Memory is that of the sample and of the moments, whatever the number of batches. Equal values (the zeros behind a ReLU) share their
middle rank.

References:
    Ince et al. 2017 (Gaussian copula mutual information).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.data import Dataset
from secateurs.layers import CONVOLUTIONS
from secateurs.moments import Moments
from secateurs.rows import Rows, observe_rows

__all__ = ["NormalScores", "copula_moments"]

SAMPLE = 1024
"""Rows among which ranks are taken."""
LIMIT = 1 << 15
"""Rows whose scores are added up: looking ranks up costs more than the products."""


class NormalScores:
    r"""Maps values to $\Phi^{-1}(\text{middle rank} / (m + 1))$ among a sample of $m$ rows.

    Args:
        sample: shape `(m, channels)`.
    """

    def __init__(self, sample: Tensor) -> None:
        self._sorted = sample.T.contiguous().sort(1).values
        count = len(sample)
        # Left and right rank sum to between 0 and 2m; one more, so that the ends stay finite.
        ranks = (torch.arange(2 * count + 1, dtype=torch.float64) + 1) / (2 * (count + 1))
        self._table = torch.special.ndtri(ranks).float()

    def __call__(self, values: Tensor) -> Tensor:
        """Return the scores of values, shape `(rows, channels * k)`, where $k$ neighbouring columns belong to one channel."""
        channels = len(self._sorted)
        by_channel = values.unflatten(1, (channels, -1)).permute(1, 0, 2)
        flat = by_channel.reshape(channels, -1).to(self._sorted.dtype).contiguous()
        twice = torch.searchsorted(self._sorted, flat) + torch.searchsorted(self._sorted, flat, right=True)
        found: Tensor = self._table[twice].reshape(by_channel.shape).permute(1, 0, 2).reshape(values.shape)
        return found


def copula_moments(
    model: nn.Module,
    names: Sequence[str],
    data: Dataset,
    *,
    folds: int = 1,
    seed: int = 0,
    sample: int = SAMPLE,
    limit: int = LIMIT,
) -> dict[str, list[Moments]]:
    """Return the joint moments of the scores of what each layer reads and puts out, apart for each fold of the examples.

    Args:
        model: the network.
        names: linear layers or convolutions with one group.
        data: calibration examples.
        folds: into which the examples are dealt in turn.
        seed: of the drawn positions.
        sample: rows among which ranks are taken, at the most.
        limit: rows per layer whose scores are added up.

    Returns:
        By layer, of rows `(x, y)`, shape `(d + p,)`.
    """
    sizes = {name: _columns_per_channel(model.get_submodule(name)) for name in names}
    scores = _scores(model, sizes, data, sample, seed)
    found: dict[str, list[Moments]] = {}

    def receive(name: str, rows: Rows) -> None:
        of_x, of_y = scores[name]
        values = torch.cat((of_x(rows.x), of_y(rows.y)), 1)
        parts = found.setdefault(name, [Moments.zeros(values.shape[1]) for _ in range(folds)])
        for fold, part in enumerate(parts):
            part.update(values if folds == 1 else values[rows.examples % folds == fold])

    observe_rows(model, names, data, receive, limit=limit, seed=seed)
    return found


def _scores(
    model: nn.Module, sizes: dict[str, int], data: Dataset, sample: int, seed: int
) -> dict[str, tuple[NormalScores, NormalScores]]:
    """Rank the channels of inputs and outputs; of a patch, its middle stands for the channel."""
    some = np.linspace(0, len(data) - 1, min(len(data), sample)).round().astype(int)
    gathered: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def receive(name: str, rows: Rows) -> None:
        middle = slice(sizes[name] // 2, None, sizes[name])
        gathered.setdefault(name, []).append((rows.x[:, middle].clone(), rows.y.clone()))

    observe_rows(model, list(sizes), data.take(some.tolist()), receive, limit=sample, seed=seed)
    found = {}
    for name, parts in gathered.items():
        xs, ys = zip(*parts, strict=True)
        x, y = torch.cat(xs), torch.cat(ys)
        kept = torch.linspace(0, len(x) - 1, min(len(x), sample)).round().long()
        found[name] = NormalScores(x[kept]), NormalScores(y[kept])
    return found


def _columns_per_channel(layer: Any) -> int:
    return math.prod(layer.kernel_size) if isinstance(layer, CONVOLUTIONS) else 1
