"""Baselines that everybody compares with, through the same driver: Torch-Pruning's importances decide the removal orders.

References:
    Fang et al. 2023, DepGraph (group magnitude importance).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch_pruning.pruner import importance

from secateurs.groups import Limits, group_importances
from secateurs.information import Order
from secateurs.passes.base import Context
from secateurs.passes.width import NodePass, Survey
from secateurs.settings import MagnitudeSettings

__all__ = ["Magnitude"]


class Magnitude(NodePass):
    """Remove the units of smallest group magnitude."""

    name: ClassVar[str] = "magnitude"
    Settings: ClassVar[type[MagnitudeSettings]] = MagnitudeSettings
    settings: MagnitudeSettings

    def orders(self, survey: Survey, context: Context) -> Mapping[str, Mapping[str, Order]]:
        """Return the order of ascending magnitude of each group."""
        limits = Limits(self.settings.time_limit, self.settings.max_group_items)
        scorer = importance.GroupMagnitudeImportance(p=self.settings.p)
        scores = group_importances(
            context.model, context.example, [group.root for group in survey.groups], scorer, limits
        )
        found = {}
        for group in survey.groups:
            values = torch.as_tensor(scores[group.root], dtype=torch.float64)
            order = values.argsort()[:-1]
            found[group.root] = {self.name: Order(tuple(order.tolist()), tuple(values[order].tolist()))}
        return found
