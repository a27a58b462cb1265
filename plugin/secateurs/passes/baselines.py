"""Baselines that everybody compares with, through the same driver: Torch-Pruning's importances decide the removal orders.

References:
    Fang et al. 2023, DepGraph (group magnitude importance).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch_pruning.pruner import importance

from secateurs.groups import Group, Limits, group_importances
from secateurs.information import Order
from secateurs.passes.base import Context
from secateurs.passes.survey import Survey, norm_order
from secateurs.passes.width import NodePass
from secateurs.settings import MagnitudeSettings

__all__ = ["Magnitude"]


class Magnitude(NodePass):
    """Remove the units of smallest group magnitude."""

    name: ClassVar[str] = "magnitude"
    Settings: ClassVar[type[MagnitudeSettings]] = MagnitudeSettings
    settings: MagnitudeSettings

    def orders(self, survey: Survey, context: Context) -> Mapping[str, Mapping[str, Order]]:
        """Return the order of ascending magnitude of each group.

        Torch-Pruning scores channels; units that are more than one of them (attention heads) are ordered by the norm of their weights.
        """
        limits = Limits(self.settings.time_limit, self.settings.max_group_items)
        scorer = importance.GroupMagnitudeImportance(p=self.settings.p)
        scores = group_importances(
            context.model, context.example, [group.root for group in survey.groups if _is_plain(group)], scorer, limits
        )
        found = {}
        for group in survey.groups:
            if not _is_plain(group):
                found[group.root] = {self.name: norm_order(survey.model, group)}
                continue
            values = torch.as_tensor(scores[group.root], dtype=torch.float64)
            order = values.argsort()[:-1]
            found[group.root] = {self.name: Order(tuple(order.tolist()), tuple(values[order].tolist()))}
        return found


def _is_plain(group: Group) -> bool:
    """Tell whether a unit is one output channel of the group's root, as Torch-Pruning sees it."""
    return all(member.index.shape[1] == 1 for member in group.of("out") if member.module == group.root)
