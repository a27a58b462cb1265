"""Cost of a structure: parameters and multiply-accumulates, in total and by module.

MACs are counted by torch's own `FlopCounterMode` (which counts 2 FLOPs per MAC of convolutions and matrix products, whoever calls them) on one
example, with fused attention and recurrent kernels, which it cannot see into, replaced by the products that they stand for. Both costs of a
layer are proportional to the product of its widths, which is what lets allocation predict the cost of widths that it has not built. Costs
that are no such sums, latency and peak memory, are asked of a target (`TargetedCost`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from secateurs.data import Dataset
from secateurs.errors import SecateursError
from secateurs.forward import call, inference
from secateurs.interfaces import CostModel, StructureCost, StructureCostModel
from secateurs.settings import TargetSettings

if TYPE_CHECKING:
    from secateurs.groups import Group

__all__ = ["Change", "TargetedCost", "change", "macs", "on_target", "parameters", "total", "weight_bytes"]


def macs(model: nn.Module, example: Dataset) -> Mapping[str, float]:
    """Return the multiply-accumulates of one example by module, on the innermost module that does the work.

    >>> import numpy as np
    >>> float(sum(macs(torch.nn.Linear(3, 4), Dataset({"x": np.zeros((1, 3), np.float32)})).values()))
    12.0
    """
    one = example.take([0])
    counter = FlopCounterMode(display=False)
    names = {
        f"{type(model).__name__}.{name}" if name else type(model).__name__: name for name, _ in model.named_modules()
    }
    with inference(model), _unfused(), counter:
        call(model, one)
    counts = {names[key]: sum(by_op.values()) for key, by_op in counter.get_flop_counts().items() if key in names}
    own = dict(counts)
    for name, value in counts.items():
        if name:
            parent = _parent(name, counts)
            own[parent] = own.get(parent, 0) - value
    return {name: value / 2 for name, value in own.items() if value > 0}


@contextmanager
def _unfused() -> Iterator[None]:
    """Make attention and recurrent layers call plain matrix products for the length of a block."""
    backends = torch.backends
    fast, onednn = backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(onednn)


def _parent(name: str, known: Mapping[str, int]) -> str:
    while name:
        name = name.rpartition(".")[0]
        if name in known:
            return name
    return ""


def parameters(model: nn.Module, example: Dataset | None = None) -> Mapping[str, float]:  # noqa: ARG001 - the cost model's signature
    """Return the number of parameters by module; a shared tensor counts once, where it is first found."""
    seen: set[int] = set()
    counts: dict[str, float] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                counts[name] = counts.get(name, 0.0) + parameter.numel()
    return counts


def total(costs: Mapping[str, float]) -> int:
    """Return the sum over modules."""
    return round(sum(costs.values()))


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers; shared tensors count once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@dataclass(frozen=True)
class Change:
    """One cost of a network before and after, in the cost model's unit.

    Attributes:
        before: of the baseline.
        after: of the candidate.
        reason: why they cannot be told; both are then NaN.
    """

    before: float
    after: float
    reason: str | None = None

    @property
    def ratio(self) -> float:
        """Candidate / baseline; 1 where neither costs anything."""
        return self.after / self.before if self.before else 1.0


def change(model: CostModel, baseline: nn.Module, candidate: nn.Module, example: Dataset) -> Change:
    """Return what a network costs before and after; what a target cannot tell is no error, and says why."""
    try:
        before, after = (sum(model(network, example).values()) for network in (baseline, candidate))
    except SecateursError as error:
        return Change(float("nan"), float("nan"), str(error))
    return Change(before, after)


class TargetedCost:
    """A cost that one target was asked for: as a cost model it puts all of it on the network itself, and it knows the cost of any widths.

    Args:
        model: what knows the costs.
        target: provider, threads, batch size and sequence length.
    """

    def __init__(self, model: StructureCostModel, target: TargetSettings) -> None:
        self._model, self._target = model, target

    def __call__(self, model: nn.Module, example: Dataset) -> Mapping[str, float]:
        """Return the cost of a network, on the network itself."""
        return {"": self._model.total(model, example, self._target)}

    def structure(self, model: nn.Module, example: Dataset, groups: Sequence[Group]) -> StructureCost:
        """Return the cost of a network at any widths of its groups."""
        return self._model.structure(model, example, groups, self._target)


def on_target(model: CostModel | StructureCostModel, target: TargetSettings) -> CostModel:
    """Return a registered cost model ready for use: bound to a target where it depends on one."""
    return TargetedCost(model, target) if isinstance(model, StructureCostModel) else model
