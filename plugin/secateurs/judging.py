"""Judging a network on validation data: its metric beside the baseline's, example by example where the metric counts examples."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import nn

from secateurs.budget import Budget, accuracy_row
from secateurs.data import Dataset
from secateurs.errors import DataError, RecipeError
from secateurs.forward import predict
from secateurs.interfaces import Metric
from secateurs.intervals import paired_difference_interval
from secateurs.report import Estimate, Pairs, TargetRatios

__all__ = ["Judge", "Judgement", "Validation"]

Hits = npt.NDArray[np.bool_]


class Validation:
    """The metric of a network on validation data, and which examples the network gets right.

    Args:
        metric: the figure of merit; one where lower is better is negated.
        data: labelled examples.
    """

    def __init__(self, metric: Metric, data: Dataset) -> None:
        self.sign = 1.0 if metric.higher_is_better else -1.0
        self._metric, self._data = metric, data
        self._last: tuple[Callable[[], nn.Module | None], Hits | None] = (lambda: None, None)

    def __call__(self, model: nn.Module) -> float:
        """Return the metric, higher is better."""
        labels = self._data.labels
        assert labels is not None
        outputs = predict(model, self._data).float().cpu().numpy()
        self._last = (weakref.ref(model), self._metric.per_example(outputs, labels))
        return self.sign * self._metric.value(outputs, labels)

    def hits(self, model: nn.Module) -> Hits | None:
        """Return whether each example is right, or None where the metric is no mean over examples.

        Args:
            model: a network that has not changed since its metric was taken, if that was the last one.
        """
        if self._last[0]() is not model:
            self(model)
        return self._last[1]


@dataclass(frozen=True)
class Judgement:
    """What a network is worth beside the baseline.

    Attributes:
        value: the metric, in its own direction; None where it is not finite.
        drop: how much worse than the baseline, with the exact 95 % interval where there is one; None where it is not finite.
        pairs: examples on which the two differ, where the metric counts examples.
        reason: why the budget does not allow it; None if it does.
    """

    value: float | None
    drop: Estimate | None
    pairs: Pairs | None
    reason: str | None


class Judge:
    """Compares networks with the baseline, by the rule of the verdict, on validation data.

    Args:
        budget: `accuracy_drop`, and `accuracy_confidence` where the interval decides.
        evaluate: network to metric, higher is better; a `Validation` gives the examples beside it.
        baseline: the network before all passes.

    Raises:
        RecipeError: confidence is asked for and there is no exact interval.
        DataError: the baseline's metric is not finite.
    """

    def __init__(self, budget: Budget, evaluate: Callable[[nn.Module], float], baseline: nn.Module) -> None:
        assert budget.accuracy_drop is not None
        self.limit = budget.accuracy_drop
        self._budget, self._evaluate = budget, evaluate
        self.before = evaluate(baseline)
        if not math.isfinite(self.before):
            raise DataError(
                f"the metric of the network before pruning is {self.before} on validation data, with which no drop can be compared; look for "
                "examples on which it overflows, or choose another `metric`."
            )
        self._hits = self._which(baseline)
        if budget.accuracy_confidence is not None and self._hits is None:
            raise RecipeError(
                "`budget.accuracy_confidence` needs a metric that counts examples, and this one has no exact interval; leave it out to "
                "search by the point drop."
            )

    def __call__(self, model: nn.Module, value: float | None = None) -> Judgement:
        """Judge a network.

        Args:
            model: the network.
            value: its metric, higher is better, if it is known.
        """
        value = self._evaluate(model) if value is None else value
        pairs, interval = self._pairs(model), None
        if not math.isfinite(value):
            return Judgement(None, None, pairs, "the metric is not finite")
        if pairs is not None:
            interval = paired_difference_interval(pairs.lost, pairs.gained, pairs.n)
        drop = Estimate(value=self.before - value, ci95=interval)
        row = accuracy_row(self._budget, None, TargetRatios(accuracy_drop=drop, accuracy_pairs=pairs))
        assert row is not None
        reason = None
        if row.status != "pass":
            reason = row.reason or f"the drop {drop.value:.4f} is above {row.limit:g}"
        sign = self._evaluate.sign if isinstance(self._evaluate, Validation) else 1.0
        return Judgement(sign * value, drop, pairs, reason)

    def _which(self, model: nn.Module) -> Hits | None:
        return self._evaluate.hits(model) if isinstance(self._evaluate, Validation) else None

    def _pairs(self, model: nn.Module) -> Pairs | None:
        before, after = self._hits, self._which(model) if self._hits is not None else None
        if before is None or after is None:
            return None
        return Pairs(lost=int((before & ~after).sum()), gained=int((after & ~before).sum()), n=len(before))
