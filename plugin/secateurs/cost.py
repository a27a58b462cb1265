"""Cost of a structure: parameters and multiply-accumulates, in total and by module.

MACs are counted by torch's own `FlopCounterMode` (which counts 2 FLOPs per MAC of convolutions and matrix products, whoever calls them) on one
example, with fused attention and recurrent kernels, which it cannot see into, replaced by the products that they stand for. Both costs of a
layer are proportional to the product of its widths, which is what lets allocation predict the cost of widths that it has not built. Costs
that are no such sums, latency and peak memory, are asked of a target (`TargetedCost`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from secateurs.data import Dataset
from secateurs.errors import ModelError, SecateursError, first_line
from secateurs.forward import DOES_NOT_RUN, call, inference
from secateurs.interfaces import CostModel, StructureCost, StructureCostModel
from secateurs.settings import TargetSettings

if TYPE_CHECKING:
    from secateurs.groups import Group

__all__ = ["Change", "TargetedCost", "change", "macs", "on_target", "parameters", "total", "weight_bytes"]


def macs(model: nn.Module, example: Dataset) -> Mapping[str, float]:
    """Return the multiply-accumulates of one example by module, on the innermost module that does the work.

    Args:
        model: the network; it is not changed.
        example: one example, or several where the network may not run on a single one: it runs on as few as it takes.

    Raises:
        ModelError: it runs on none of these numbers of examples.

    >>> import numpy as np
    >>> float(sum(macs(torch.nn.Linear(3, 4), Dataset({"x": np.zeros((1, 3), np.float32)})).values()))
    12.0
    """
    refused = ""
    for size in sorted({min(size, len(example)) for size in (1, 2, len(example))}):
        try:
            counts = _flops(model, example.take(range(size)))
        except DOES_NOT_RUN as error:  # it takes pairs, or normalises over the batch
            refused = f"{type(error).__name__}: {first_line(error)}"
            continue
        own = dict(counts)
        for name, value in counts.items():
            if name:
                parent = _parent(name, counts)
                own[parent] = own.get(parent, 0) - value
        return {name: value / (2 * size) for name, value in own.items() if value > 0}
    raise ModelError(
        f"multiply-accumulates cannot be counted: the network runs neither on 1 example nor on {len(example)} of them ({refused}). Let it "
        f"take any number of examples, or set targets and limits of parameters or units."
    )


class _Calls(ModuleTracker):
    """The modules that are running, by path with a dot in front.

    Torch's own follows gradients too, which fails where a network computes some in its forward pass, and knows a shared module by another name.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model, self._stack = model, ExitStack()

    def __enter__(self) -> Self:
        for name, module in self._model.named_modules():

            def enter(*_: Any, name: str = f".{name}") -> None:
                self.parents.add(name)

            def leave(*_: Any, name: str = f".{name}") -> None:
                self.parents.discard(name)

            self._stack.callback(module.register_forward_pre_hook(enter).remove)
            self._stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _flops(model: nn.Module, batch: Dataset) -> dict[str, int]:
    """Return the floating-point operations of a forward pass by module, those inside it included."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Calls(model)
    with inference(model), _unfused(), counter:
        call(model, batch)
    return {key[1:]: sum(ops.values()) for key, ops in counter.get_flop_counts().items() if key.startswith(".")}


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

    @property
    def counts(self) -> tuple[int | None, int | None]:
        """Both, rounded; None where they cannot be told."""
        return (None, None) if self.reason is not None else (round(self.before), round(self.after))


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
