r"""Node baselines that everybody compares with, through the same driver: Torch-Pruning's importances, and chance, decide the removal orders.

`taylor` is the first-order change of the loss, $\sum |w\,\partial L/\partial w|$ over the weights that produce or read a unit, with the cross
entropy of calibration labels, or of the network's own predictions where there are none.

References:
    Fang et al. 2023, DepGraph (group magnitude importance). Molchanov et al. 2019 (Taylor importance).
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch_pruning.pruner import importance

from secateurs.data import Dataset
from secateurs.errors import GroupError
from secateurs.forward import call, device_of, logits
from secateurs.groups import Group, Limits, group_importances
from secateurs.information import Order
from secateurs.outputs import label_loss, own_labels, prediction_rows
from secateurs.passes.base import Context
from secateurs.passes.survey import Survey, weight_order
from secateurs.passes.width import NodePass
from secateurs.settings import BaselineSettings, MagnitudeSettings

__all__ = ["Magnitude", "RandomNodes", "Taylor"]


class _Importance(NodePass):
    """Removal orders by one of Torch-Pruning's importances.

    It scores channels; units that are more than one of them (attention heads) are ordered by the same quantity summed over their weights.
    """

    @abc.abstractmethod
    def scorer(self) -> Callable[[Any], Tensor]:
        """Return Torch-Pruning's importance."""

    @abc.abstractmethod
    def weigh(self, weight: nn.Parameter) -> Tensor:
        """Return what each entry of a weight counts, for units that Torch-Pruning does not know."""

    def prepare(self, model: nn.Module, data: Dataset) -> None:
        """Give the network what the importance reads, for example gradients."""

    def orders(self, survey: Survey, context: Context) -> Mapping[str, Mapping[str, Order]]:
        """Return the order of ascending importance of each group."""
        limits = Limits(self.settings.time_limit, self.settings.max_group_items)
        data = context.calibration
        plain = [group.root for group in survey.groups if _is_plain(group)]
        scored = group_importances(
            context.model, context.example, plain, self.scorer(), limits, lambda twin: self.prepare(twin, data)
        )
        others = [group for group in survey.groups if not _is_plain(group)]
        found = {root: _ascending(scores) for root, scores in scored.items()}
        if others:
            twin = copy.deepcopy(survey.model).eval()
            self.prepare(twin, data)
            found |= {group.root: weight_order(twin, group, self.weigh) for group in others}
        return {root: {self.name: order} for root, order in found.items()}


class Magnitude(_Importance):
    """Remove the units of smallest group magnitude."""

    name: ClassVar[str] = "magnitude"
    Settings: ClassVar[type[MagnitudeSettings]] = MagnitudeSettings
    settings: MagnitudeSettings

    def scorer(self) -> Callable[[Any], Tensor]:
        """Return the group magnitude importance."""
        found: Callable[[Any], Tensor] = importance.GroupMagnitudeImportance(p=self.settings.p)
        return found

    def weigh(self, weight: nn.Parameter) -> Tensor:
        """Return $|w|^p$."""
        return weight.detach().double().abs() ** self.settings.p


class Taylor(_Importance):
    """Remove the units whose weights the loss is least sensitive to, to first order."""

    name: ClassVar[str] = "taylor"
    Settings: ClassVar[type[BaselineSettings]] = BaselineSettings
    settings: BaselineSettings

    def scorer(self) -> Callable[[Any], Tensor]:
        """Return the group Taylor importance."""
        found: Callable[[Any], Tensor] = importance.GroupTaylorImportance()
        return found

    def weigh(self, weight: nn.Parameter) -> Tensor:
        r"""Return $|w\,\partial L/\partial w|$."""
        assert weight.grad is not None, "`prepare` gives every weight a gradient"
        return (weight.detach() * weight.grad).double().abs()

    def prepare(self, model: nn.Module, data: Dataset) -> None:
        """Leave the gradient of the mean cross entropy on calibration data in the parameters; zero where the prediction does not use one.

        Raises:
            GroupError: the prediction has no gradient.
        """
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
            parameter.grad = None
        with torch.enable_grad():
            for batch in data.batches(64):
                flat = prediction_rows(logits(call(model, batch)))
                if batch.labels is None or len(batch.labels.reshape(-1)) != len(flat):
                    labels = own_labels(flat.detach())
                else:
                    labels = torch.as_tensor(batch.labels, device=device_of(model)).reshape(-1)
                loss = label_loss(flat, labels) / len(data)
                if not loss.requires_grad:
                    raise GroupError(
                        f"pass {self.name!r} needs the gradient of the prediction, and the first output of the network has none; return one "
                        f"that depends on the weights without `no_grad` or `detach` first, or choose the pass 'magnitude'."
                    )
                loss.backward()
        for parameter in model.parameters():
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)


class RandomNodes(NodePass):
    """Remove units at random."""

    name: ClassVar[str] = "random-nodes"
    Settings: ClassVar[type[BaselineSettings]] = BaselineSettings
    settings: BaselineSettings

    def orders(self, survey: Survey, context: Context) -> Mapping[str, Mapping[str, Order]]:
        """Return a random order of each group, from the run's seed."""
        generator = torch.Generator().manual_seed(context.seed)
        return {
            group.root: {self.name: _ascending(torch.rand(group.units, generator=generator).tolist())}
            for group in survey.groups
        }


def _ascending(scores: list[float]) -> Order:
    values = torch.as_tensor(scores, dtype=torch.float64)
    order = values.argsort(stable=True)[:-1]
    return Order(tuple(order.tolist()), tuple(values[order].tolist()))


def _is_plain(group: Group) -> bool:
    """Tell whether a unit is one output channel of the group's root, as Torch-Pruning sees it."""
    return not group.observed and all(
        member.index.shape[1] == 1 for member in group.of("out") if member.module == group.root
    )
