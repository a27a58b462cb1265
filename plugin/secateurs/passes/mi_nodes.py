"""`mi-nodes`: mutual-information-preserving node pruning (MIPP).

Units are removed one at a time, each time the one whose removal loses least of the information between the units that are left and what their
readers compute from them; the readers are then refitted towards the dense network. Several removal orders compete, and measured allocation
takes the better one per group: the information order, the order by predictive residual, and the order by weight norm.

With a `confidence` and no target, the widths emerge as in the paper: a unit stays only if it surely carries information.

References:
    Westphal et al. 2024, Mutual Information Preserving Pruning (arXiv 2411.00147).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

from torch import Tensor

from secateurs.copula import copula_moments
from secateurs.groups import Group
from secateurs.information import Order
from secateurs.interfaces import ProgressEvent
from secateurs.passes.base import Context
from secateurs.passes.ordering import Dropped, Scoring, check_trainings, from_output_to_input, predicted_order
from secateurs.passes.survey import Survey
from secateurs.passes.width import NodePass
from secateurs.predictive import observed_readings
from secateurs.selection import keep_for_ratio
from secateurs.sensitivity import output_sensitivity
from secateurs.settings import MiNodesSettings

__all__ = ["MiNodes"]


class MiNodes(NodePass):
    """Remove the units that carry the least information to the layers that read them."""

    name: ClassVar[str] = "mi-nodes"
    Settings: ClassVar[type[MiNodesSettings]] = MiNodesSettings
    settings: MiNodesSettings

    @property
    def settles(self) -> bool:
        """Whether the confidence decides on the widths."""
        return self.settings.confidence is not None and not self._given()

    @property
    def folds(self) -> int:
        """Folds of the calibration examples that the widths need."""
        return self.settings.repeats if self.settles and self.settings.estimator == "gaussian" else 1

    def orders(self, survey: Survey, context: Context) -> Mapping[str, Mapping[str, Order]]:
        """Return one removal order per group and criterion, from the output to the input."""
        found: dict[str, Mapping[str, Order]] = {}
        dropped = Dropped()
        finding = self._predicted if self.settings.estimator == "mlp" else self._scored
        for number, (group, orders) in enumerate(finding(survey, context, dropped), start=1):
            context.progress(
                ProgressEvent(f"{self.name}: removal orders", number, len(survey.groups), f"{group.root} ranked")
            )
            found[group.root] = orders
            if self.settings.sequential:
                order = next(iter(orders.values()))
                dropped.add(group, order.units[: self._provisional(group, order)])
        return found

    def _scored(
        self, survey: Survey, context: Context, dropped: Dropped
    ) -> Iterator[tuple[Group, Mapping[str, Order]]]:
        settings = self.settings
        joint = None
        if settings.estimator == "copula":
            folds = settings.repeats if self.settles else 1
            joint = copula_moments(
                survey.model, list(survey.moments), context.calibration, folds=folds, seed=context.seed
            )
        scoring = Scoring(survey, settings, sensitivity=self._sensitivity(survey, context), joint=joint)
        for group in from_output_to_input(survey):
            if self.settles:
                yield group, {"information": scoring.confident(group, dropped)}
            else:
                yield group, scoring.orders(group, keep=self._fewest(group), dropped=dropped)

    def _predicted(
        self, survey: Survey, context: Context, dropped: Dropped
    ) -> Iterator[tuple[Group, Mapping[str, Order]]]:
        check_trainings(survey, self.settings)
        rows = observed_readings(survey.model, list(survey.moments), context.calibration, seed=context.seed)
        for group in from_output_to_input(survey):
            yield group, {"prediction": predicted_order(survey, group, rows, self.settings, dropped, context.seed)}

    def _fewest(self, group: Group) -> int:
        """Return how many units are left at the end of an order: fewer than any width of measured allocation's grid.

        The narrowest width is a `grid`-th of the units, rounded to some multiple: never less than half of that.
        """
        if self.settings.allocation == "uniform" or self.settings.target_units is not None:
            return 1
        return max(1, group.units // (2 * self.settings.grid))

    def _provisional(self, group: Group, order: Order) -> int:
        """Return how many units of a group count as gone for the groups before it.

        They are those that go by confidence, or those of a uniform ratio that about meets the target: removing a share of all units squares in
        MACs and parameters. In a search, whose candidates share one order, a half stands for the target.
        """
        if self.settles:
            return order.removable or 0
        kind, target = self._target() if self._given() and not self._searched else ("", 0.5)
        ratio = target if kind == "units" else math.sqrt(target)
        return group.units - keep_for_ratio(group.units, ratio, min_units=self.settings.min_units)

    def _sensitivity(self, survey: Survey, context: Context) -> dict[str, Tensor] | None:
        if self.settings.loss_weighting == "none":
            return None
        calibration = context.calibration
        some = calibration.take(range(min(256, len(calibration))))
        pairs = self.settings.loss_weighting == "full"
        return output_sensitivity(survey.model, list(survey.moments), some, pairs=pairs, seed=context.seed)
