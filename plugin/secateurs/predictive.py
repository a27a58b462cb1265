r"""MIPP's paper mode: mutual information by the loss of trained predictors.

For units $X_1, \dots, X_N$ and a reader's output $Y$, with one-hidden-layer networks trained on the squared error of the standardised $Y$ and
judged on held-out examples:

1. order the units by the loss of a predictor of $Y$ from that unit alone, the largest loss (least information) first;
2. train a predictor $g$ from all units; its loss is $L_0$;
3. for each unit in that order, mask it and train on briefly; the loss is $L_i$. If it recovers to $L_0$, the unit is removed for good and what
   was trained goes on from there;
4. steps 2 and 3 are repeated from other starting points and other splits of the examples, all in step. A unit stays only if the drop
   $L_i - L_0$ is positive with a confidence: the lower end of the one-sided Student interval over the repeats.

A unit is masked by its mean. Several readers of a group have a predictor each; their losses are added. The repeats are trained at once, as
batched products.

References:
    Westphal et al. 2024 (MIPP); Covert et al. 2020 (SAGE: information as a reduction of predictive loss). Widths, rates and epochs are ours:
    the paper's main text does not give them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.confidence import lower_bound
from secateurs.data import Dataset
from secateurs.information import Order
from secateurs.rows import Rows, observe_rows

__all__ = ["Effort", "Reading", "observed_readings", "predictive_elimination", "seconds_per_training", "trainings"]

LIMIT = 1 << 12
"""Rows on which predictors are trained and judged."""
HELD_OUT = 5
"""Every so many-th example of a shuffled list judges instead of training."""


@dataclass(frozen=True)
class Effort:
    """How long predictors are trained.

    Attributes:
        hidden: units of the hidden layer.
        batch: rows per step.
        epochs: of a first training, at the most.
        brief: epochs of a training after a unit was masked, at the most.
        patience: epochs without a better held-out loss after which a training ends.
        rate: learning rate of Adam.
    """

    hidden: int = 64
    batch: int = 256
    epochs: int = 100
    brief: int = 15
    patience: int = 4
    rate: float = 3e-3


@dataclass(frozen=True)
class Reading:
    """Rows of one reader of a group.

    Attributes:
        x: what it reads, shape `(rows, d)`.
        y: what it puts out, shape `(rows, p)`.
        examples: the number of each row's example, shape `(rows,)`.
        columns: of each unit, shape `(units, b)`.
    """

    x: Tensor
    y: Tensor
    examples: Tensor
    columns: Tensor


def trainings(units: int, readers: int, repeats: int) -> int:
    """Return how many predictors paper mode trains for one group."""
    return readers * (units + repeats * (1 + units))


def observed_readings(
    model: nn.Module, names: Sequence[str], data: Dataset, *, limit: int = LIMIT, seed: int = 0
) -> dict[str, Rows]:
    """Return a bounded number of rows of each layer, evenly over the examples.

    Args:
        model: the network.
        names: linear layers or convolutions with one group.
        data: calibration examples.
        limit: rows per layer.
        seed: of the drawn positions.
    """
    some = np.linspace(0, len(data) - 1, min(len(data), limit)).round().astype(int)
    parts: dict[str, list[Rows]] = {}

    def receive(name: str, rows: Rows) -> None:
        parts.setdefault(name, []).append(Rows(rows.x.float().clone(), rows.y.float().clone(), rows.examples))

    observe_rows(model, names, data.take(some), receive, limit=limit, seed=seed)
    return {
        name: Rows(*(torch.cat([getattr(part, field) for part in found]) for field in ("x", "y", "examples")))
        for name, found in parts.items()
    }


class _Predictors:
    """Several one-hidden-layer networks from rows of their own to targets, trained in step.

    Args:
        x: shape `(1 or networks, rows, d)`, standardised.
        y: shape `(rows, p)`, standardised.
        training: the rows that each network learns from, shape `(networks, n)`.
        held_out: the rows that judge it, shape `(networks, m)`.
        effort: of the training.
        generator: of weights and batches.
    """

    def __init__(
        self, x: Tensor, y: Tensor, training: Tensor, held_out: Tensor, effort: Effort, generator: torch.Generator
    ) -> None:
        self._x, self._y, self._training, self._held_out = x, y, training, held_out
        self._effort, self._generator = effort, generator
        count, d = len(training), x.shape[-1]
        self._which = torch.arange(count)[:, None] if len(x) > 1 else torch.zeros(count, 1, dtype=torch.long)
        self.mask = torch.ones(d)

        def drawn(*shape: int, fan_in: int) -> Tensor:
            values: Tensor = torch.randn(count, *shape, generator=generator) * fan_in**-0.5
            return values

        self._weights = [
            drawn(d, effort.hidden, fan_in=d) * 2**0.5,
            torch.zeros(count, 1, effort.hidden),
            drawn(effort.hidden, y.shape[1], fan_in=effort.hidden),
            torch.zeros(count, 1, y.shape[1]),
        ]

    def copy(self) -> _Predictors:
        """Return predictors with the same weights that can be trained on by themselves."""
        twin = copy.copy(self)
        twin.mask, twin._weights = self.mask.clone(), [weight.clone() for weight in self._weights]
        return twin

    def train(self, epochs: int) -> Tensor:
        """Train until no held-out loss has fallen for a while, keep each network's best state, and return its loss, shape `(networks,)`."""
        effort, best, stale = self._effort, self.losses(), 0
        kept = [weight.clone() for weight in self._weights]
        self._weights = [weight.requires_grad_() for weight in self._weights]
        optimiser = torch.optim.Adam(self._weights, lr=effort.rate)
        for _ in range(epochs):
            self._epoch(optimiser)
            losses = self.losses()
            better = losses < best
            best = torch.where(better, losses, best)
            for state, weight in zip(kept, self._weights, strict=True):
                state[better] = weight.detach()[better]
            stale = 0 if bool(better.any()) else stale + 1
            if stale == effort.patience:
                break
        self._weights = kept
        return best

    def losses(self) -> Tensor:
        """Return each network's mean squared error on its held-out rows."""
        with torch.no_grad():
            return self._error(self._held_out)

    def _epoch(self, optimiser: torch.optim.Optimizer) -> None:
        shuffle = torch.randperm(self._training.shape[1], generator=self._generator)
        with torch.enable_grad():
            for batch in shuffle.split(self._effort.batch):
                optimiser.zero_grad()
                torch.autograd.backward(self._error(self._training[:, batch]).sum())
                optimiser.step()

    def _error(self, rows: Tensor) -> Tensor:
        first, shift, second, constant = self._weights
        hidden = torch.relu(torch.baddbmm(shift, self._x[self._which, rows] * self.mask, first))
        error: Tensor = torch.baddbmm(constant, hidden, second) - self._y[rows]
        losses: Tensor = error.square().mean((1, 2))
        return losses


def _standardised(values: Tensor) -> Tensor:
    spread = values.std(0)
    scaled: Tensor = (values - values.mean(0)) / torch.where(spread > 1e-6 * spread.max(), spread, torch.ones(()))
    return scaled


def _splits(examples: Tensor, repeats: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Split rows by example, anew for each repeat; all splits are cut to the same size."""
    training, held_out = [], []
    count = int(examples.max()) + 1
    for _ in range(repeats):
        place = torch.empty(count, dtype=torch.long)
        place[torch.randperm(count, generator=generator)] = torch.arange(count)
        judging = place[examples] % HELD_OUT == 0
        held_out.append(judging.nonzero().squeeze(1))
        training.append((~judging).nonzero().squeeze(1))
    most, least = min(map(len, training)), min(map(len, held_out))
    return torch.stack([rows[:most] for rows in training]), torch.stack([rows[:least] for rows in held_out])


def _alone(reading: Reading, effort: Effort, generator: torch.Generator) -> Tensor:
    """Return the held-out loss of a predictor from each unit alone, shape `(units,)`."""
    x, y = _standardised(reading.x), _standardised(reading.y)
    training, held_out = _splits(reading.examples, 1, generator)
    losses = []
    for columns in reading.columns.split(max(1, 2**14 // (reading.columns.shape[1] + y.shape[1]))):
        units = len(columns)
        of_units = x[:, columns].transpose(0, 1)
        sets = training.expand(units, -1), held_out.expand(units, -1)
        losses.append(_Predictors(of_units, y, *sets, effort, generator).train(effort.brief))
    return torch.cat(losses)


def predictive_elimination(
    readings: Sequence[Reading],
    *,
    confidence: float,
    repeats: int = 5,
    keep: int = 1,
    effort: Effort | None = None,
    seed: int = 0,
) -> Order:
    """Remove every unit whose absence the predictors make up for.

    Args:
        readings: of every reader of the group.
        confidence: with which the drop must be positive for a unit to stay; in [0.5, 1). The higher, the more goes.
        repeats: of each training, at least 2.
        keep: how many units stay at the least.
        effort: of the trainings.
        seed: of weights, batches and splits.

    Returns:
        The units that go, as they went, then those that stay, the smallest mean drop first; the last unit is left out. Losses are mean drops of
        the squared error, with a variance of 1 of every output.
    """
    effort, generator = effort or Effort(), torch.Generator().manual_seed(seed)
    alone = torch.stack([_alone(reading, effort, generator) for reading in readings]).sum(0)
    current = []
    for reading in readings:
        x, y = _standardised(reading.x)[None], _standardised(reading.y)
        current.append(_Predictors(x, y, *_splits(reading.examples, repeats, generator), effort, generator))
    before = torch.stack([predictors.train(effort.epochs) for predictors in current]).sum(0)
    units = len(alone)
    removed: list[tuple[int, float]] = []
    stays: list[tuple[int, float]] = []
    for unit in alone.argsort(descending=True, stable=True).tolist():
        if len(removed) == units - keep:
            stays.append((unit, float("inf")))
            continue
        trial = [predictors.copy() for predictors in current]
        for predictors, reading in zip(trial, readings, strict=True):
            predictors.mask[reading.columns[unit]] = 0
        after = torch.stack([predictors.train(effort.brief) for predictors in trial]).sum(0)
        drops = (after - before).tolist()
        drop = sum(drops) / repeats
        if lower_bound(drops, confidence) > 0:
            stays.append((unit, drop))
        else:
            removed.append((unit, drop))
            current = trial
    order = (removed + sorted(stays, key=lambda item: item[1]))[: units - 1]
    return Order(tuple(unit for unit, _ in order), tuple(drop for _, drop in order), min(len(removed), len(order)))


def seconds_per_training(d: int, p: int, *, repeats: int = 5, effort: Effort | None = None) -> float:
    """Return how long one predictor takes after a unit was masked, measured on random rows of a reader's size.

    Args:
        d: width of the input.
        p: width of the output.
        repeats: trained in step.
        effort: of the training; the measured epochs are scaled up to all of them.
    """
    effort, generator = effort or Effort(), torch.Generator().manual_seed(0)
    rows = effort.batch * 2
    x, y = torch.randn(1, rows, d, generator=generator), torch.randn(rows, p, generator=generator)
    training = torch.arange(rows).expand(repeats, -1)
    predictors = _Predictors(x, y, training, training[:, : rows // HELD_OUT], effort, generator)
    predictors.train(1)
    began = time.perf_counter()
    predictors.train(1)
    return (time.perf_counter() - began) * (LIMIT / rows) * effort.brief / repeats
