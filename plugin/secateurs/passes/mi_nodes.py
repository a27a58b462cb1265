"""`mi-nodes`: mutual-information-preserving node pruning (MIPP), Gaussian and in closed form.

Units are removed one at a time, each time the one whose removal loses least of the information between the units that are left and what their
readers compute from them; the readers are then refitted towards the dense network. Several removal orders compete, and measured allocation
takes the better one per group: the information order, the order by predictive residual, and the order by weight norm.

References:
    Westphal et al. 2024, Mutual Information Preserving Pruning (arXiv 2411.00147).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateurs.data import Dataset
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
from secateurs.interfaces import ProgressEvent
from secateurs.layers import weight_matrix
from secateurs.passes.base import Context
from secateurs.passes.survey import Survey, norm_order
from secateurs.passes.width import NodePass
from secateurs.sensitivity import output_sensitivity
from secateurs.settings import MiNodesSettings

__all__ = ["MiNodes", "removal_order"]


def removal_order(
    survey: Survey,
    group: Group,
    criterion: str,
    *,
    sensitivity: Mapping[str, Tensor] | None = None,
    ridge: float = 1e-3,
    noise: float = 1e-2,
) -> Order:
    """Return the order in which the units of one group should go.

    Args:
        survey: the groups and the statistics of their readers.
        group: one of them.
        criterion: `information`, `residual` or `magnitude`.
        sensitivity: mean squared loss gradient of each reader's outputs; None weights all outputs alike.
        ridge: on the covariance of each reader's input, relative to its mean variance.
        noise: floor on the outputs, relative to their mean variance.

    Returns:
        All units but one, first removed first.
    """
    if criterion == "magnitude":
        return norm_order(survey.model, group)
    criteria: list[Criterion] = []
    for member in group.of("in"):
        if member.module not in survey.moments:
            continue
        layer: Any = survey.model.get_submodule(member.module)
        weight = weight_matrix(layer).double()
        covariance = ridged(survey.moments[member.module].covariance, ridge)
        variance = ((weight @ covariance) * weight).sum(1)
        weights = None if sensitivity is None else sensitivity[member.module].double()
        columns = survey.columns(member.module, member.index)
        if criterion == "information":
            criteria.append(
                InformationLoss(precision(covariance), weight, noise_floor(variance, noise, weights), columns)
            )
        else:
            importance = torch.ones_like(variance) if weights is None else weights
            criteria.append(ResidualIncrease(precision(covariance), weight, importance, columns))
    return backward_elimination(criteria, group.units)


class MiNodes(NodePass):
    """Remove the units that carry the least information to the layers that read them."""

    name: ClassVar[str] = "mi-nodes"
    Settings: ClassVar[type[MiNodesSettings]] = MiNodesSettings
    settings: MiNodesSettings

    def orders(self, survey: Survey, context: Context) -> Mapping[str, Mapping[str, Order]]:
        """Return one removal order per group and criterion, from the output to the input."""
        sensitivity = (
            self._sensitivity(survey, context.calibration, context.seed) if self.settings.loss_weighting else None
        )
        total = len(survey.groups)
        found: dict[str, dict[str, Order]] = {}
        for number, group in enumerate(reversed(survey.groups), start=1):
            context.progress(ProgressEvent(f"{self.name}: removal orders", number, total, group.root))
            found[group.root] = {
                criterion: removal_order(
                    survey,
                    group,
                    criterion,
                    sensitivity=sensitivity,
                    ridge=self.settings.ridge,
                    noise=self.settings.noise_floor,
                )
                for criterion in self.settings.criteria
            }
        return found

    @staticmethod
    def _sensitivity(survey: Survey, calibration: Dataset, seed: int) -> dict[str, Tensor]:
        some = calibration.take(range(min(256, len(calibration))))
        return output_sensitivity(survey.model, list(survey.moments), some, seed=seed)
