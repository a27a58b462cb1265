"""Removal orders of one group after another, from the output to the input: Gaussian, Gaussian copula and trained predictors.

The three estimators see the same rows: what every reader of a group reads, and what it puts out. Outputs that groups closer to the output
of the network have dropped already carry no weight.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateurs.confidence import confident_elimination
from secateurs.errors import RecipeError
from secateurs.groups import Group
from secateurs.information import (
    Criterion,
    InformationLoss,
    Order,
    ResidualIncrease,
    backward_elimination,
    noise_floor,
    precision,
    ridged,
)
from secateurs.layers import weight_matrix
from secateurs.moments import Moments
from secateurs.passes.survey import Survey, norm_order
from secateurs.predictive import Reading, predictive_elimination, seconds_per_training, trainings
from secateurs.rows import Rows
from secateurs.settings import MiNodesSettings

__all__ = ["Dropped", "Scoring", "check_trainings", "from_output_to_input", "predicted_order"]

PAPER_CONFIDENCE = 0.95
"""Confidence of paper mode where a target is given and none in the settings."""


class Dropped:
    """Which outputs of the readers are gone, because the groups that they belong to were processed before."""

    def __init__(self) -> None:
        self._gone: dict[str, set[int]] = {}

    def add(self, group: Group, units: Sequence[int]) -> None:
        """Note that units of a group are gone."""
        for member in group.of("out"):
            self._gone.setdefault(member.module, set()).update(member.index[list(units)].ravel().tolist())

    def left(self, name: str, outputs: int) -> Tensor:
        """Return the outputs of a layer that are left."""
        gone = self._gone.get(name, set())
        return torch.tensor([index for index in range(outputs) if index not in gone], dtype=torch.long)


def from_output_to_input(survey: Survey) -> list[Group]:
    """Return the groups whose last reader runs last first, so that a reader's outputs are settled before its inputs."""
    place = {name: number for number, name in enumerate(survey.moments)}
    return sorted(
        survey.groups,
        key=lambda group: max((place.get(m.module, -1) for m in group.of("in")), default=-1),
        reverse=True,
    )


@dataclass(frozen=True)
class _Linear:
    """A reader under the Gaussian model.

    Attributes:
        precision: of its input, shape `(d, d)`.
        weight: the best linear map to its output, shape `(p, d)`.
        variance: of its output, shape `(p,)`.
        residual: covariance of what the map leaves of the output, shape `(p, p)`; None where it leaves nothing.
    """

    precision: Tensor
    weight: Tensor
    variance: Tensor
    residual: Tensor | None = None


class Scoring:
    """Closed-form removal orders.

    Args:
        survey: the groups and the statistics of their readers.
        settings: of the pass.
        sensitivity: how much the loss cares for each reader's outputs, or for pairs of them; None weights all outputs alike.
        joint: for a copula: the moments of the scores of inputs and outputs, by reader and fold; None for the plain Gaussian.
    """

    def __init__(
        self,
        survey: Survey,
        settings: MiNodesSettings,
        *,
        sensitivity: Mapping[str, Tensor] | None = None,
        joint: Mapping[str, Sequence[Moments]] | None = None,
    ) -> None:
        self._survey, self._settings = survey, settings
        self._sensitivity, self._joint = sensitivity, joint

    def orders(self, group: Group, *, keep: int = 1, dropped: Dropped | None = None) -> dict[str, Order]:
        """Return one removal order per criterion of the settings.

        Args:
            group: one of the survey's.
            keep: units that are left at the end of an order.
            dropped: outputs that are gone.
        """
        readers = self._readers(group, dropped or Dropped(), None)
        found: dict[str, Order] = {}
        for name in self._settings.criteria:
            if name == "magnitude" or not readers:
                found[name] = norm_order(self._survey.model, group)
            else:
                criteria = [self._criterion(name, *reader) for reader in readers]
                found[name] = backward_elimination(criteria, group.units, keep)
        return found

    def confident(self, group: Group, dropped: Dropped | None = None) -> Order:
        """Return the order in which units go that do not surely carry information, and how many of them there are.

        Args:
            group: one of the survey's.
            dropped: outputs that are gone.
        """
        settings, gone = self._settings, dropped or Dropped()
        assert settings.confidence is not None

        def criteria(without: int | None) -> list[Criterion]:
            return [self._criterion("information", *reader) for reader in self._readers(group, gone, without)]

        whole = criteria(None)
        if not whole:
            return Order((), (), 0)
        return confident_elimination(
            whole,
            [criteria(fold) for fold in range(settings.repeats)],
            group.units,
            confidence=settings.confidence,
            margin=settings.least_information,
            keep=settings.min_units,
        )

    def _readers(
        self, group: Group, dropped: Dropped, without: int | None
    ) -> list[tuple[_Linear, Tensor | None, Tensor]]:
        """Return the model, the weights of the outputs and the columns of each reader that has outputs left."""
        found = []
        models: dict[str, _Linear] = {}
        for member in group.of("in"):
            name = member.module
            if name not in self._survey.moments:
                continue
            if name not in models:
                models[name] = self._linear(name, without)
            linear = models[name]
            left = dropped.left(name, len(linear.weight))
            if not len(left):
                continue
            weights = None if self._sensitivity is None else self._sensitivity[name].double()
            if weights is not None:
                weights = weights[left] if weights.ndim == 1 else weights[left][:, left]
            some = _Linear(
                linear.precision,
                linear.weight[left],
                linear.variance[left],
                None if linear.residual is None else linear.residual[left][:, left],
            )
            found.append((some, weights, self._survey.columns(name, member.index)))
        return found

    def _linear(self, name: str, without: int | None) -> _Linear:
        """Return a reader's model from all examples, or from all but those of one fold."""
        layer: Any = self._survey.model.get_submodule(name)
        weight = weight_matrix(layer).double()
        if self._joint is not None:
            return self._of_scores(_summed(self._joint[name], without), weight.shape[1])
        moments = self._survey.moments[name]
        if without is not None:
            moments = moments - self._survey.folds[name][without]
        covariance = ridged(moments.covariance, self._settings.ridge)
        return _Linear(precision(covariance), weight, ((weight @ covariance) * weight).sum(1))

    def _of_scores(self, moments: Moments, d: int) -> _Linear:
        covariance = moments.covariance
        inverse = precision(ridged(covariance[:d, :d], self._settings.ridge))
        across, outputs = covariance[d:, :d], covariance[d:, d:]
        weight = across @ inverse
        return _Linear(inverse, weight, outputs.diagonal(), outputs - weight @ across.T)

    def _criterion(self, name: str, linear: _Linear, weights: Tensor | None, columns: Tensor) -> Criterion:
        if name == "residual":
            importance = torch.ones_like(linear.variance) if weights is None else weights
            return ResidualIncrease(linear.precision, linear.weight, importance, columns)
        noise = noise_floor(linear.variance, self._settings.noise_floor, weights)
        if linear.residual is not None:
            noise = linear.residual + (noise.diag() if noise.ndim == 1 else noise)
        return InformationLoss(linear.precision, linear.weight, noise, columns)


def _summed(parts: Sequence[Moments], without: int | None) -> Moments:
    whole = functools.reduce(operator.add, parts)
    return whole if without is None else whole - parts[without]


def check_trainings(survey: Survey, settings: MiNodesSettings) -> None:
    """Refuse paper mode where it would train more predictors than the settings allow.

    Raises:
        RecipeError: with an estimate of the time, from one training that is timed.
    """
    count, widest = 0, (0, 0)
    for group in survey.groups:
        names = [member.module for member in group.of("in") if member.module in survey.moments]
        count += trainings(group.units, len(names), settings.repeats)
        sizes = (weight_matrix(survey.model.get_submodule(name)).shape for name in names)
        widest = max([widest, *((shape[1], shape[0]) for shape in sizes)])
    if count <= settings.max_trainings:
        return
    hours = count * seconds_per_training(*widest, repeats=settings.repeats) / 3600
    raise RecipeError(
        f"pass 'mi-nodes': `estimator: mlp` would train {count:,} predictors, about {hours:,.1f} hours if all were as large as the largest; "
        f"`max_trainings` allows {settings.max_trainings:,}. Use `estimator: gaussian`, which needs none, or raise `max_trainings`."
    )


def predicted_order(
    survey: Survey, group: Group, rows: Mapping[str, Rows], settings: MiNodesSettings, dropped: Dropped, seed: int
) -> Order:
    """Return the removal order of paper mode.

    Args:
        survey: what was found out about the network.
        group: one of the survey's.
        rows: of every reader.
        settings: of the pass.
        dropped: outputs that are gone.
        seed: of the trainings.
    """
    readings = []
    for member in group.of("in"):
        if member.module not in rows:
            continue
        of_reader = rows[member.module]
        left = dropped.left(member.module, of_reader.y.shape[1])
        if len(left):
            columns = survey.columns(member.module, member.index)
            readings.append(Reading(of_reader.x, of_reader.y[:, left], of_reader.examples, columns))
    if not readings:
        return Order((), (), 0)
    return predictive_elimination(
        readings,
        confidence=settings.confidence or PAPER_CONFIDENCE,
        repeats=settings.repeats,
        keep=settings.min_units,
        seed=seed,
    )
