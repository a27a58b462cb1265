"""Who reads a unit: found by running the network, independently of any plan and of the dependency graph.

Every layer that mixes channels (linear, convolution, embedding, recurrent, ...) is made to answer with its recorded output, so that a
disturbance of some units reaches the readers of those units and nobody after them. What then differs at a layer's input is exactly what that
layer reads of the disturbed units, whatever views, concatenations, splits or attention lie between.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.data import Dataset
from secateurs.forward import call, frozen_randomness, inference, leaves
from secateurs.layers import NORMS, channel_dim, mixes
from secateurs.probe import first_tensor

__all__ = ["Reading", "masked", "observe_readers"]


STRENGTHS = (4.0, 1.0, 0.25, 0.05)
"""Sizes of the disturbances, relative to the range of the layer's output."""


@dataclass(frozen=True)
class Reading:
    """Where disturbed units arrive.

    Attributes:
        readers: module name to the sorted channel indices of its input that depend on the disturbed units.
        reaches_output: whether the network's output depends on them without passing through a reader.
    """

    readers: Mapping[str, tuple[int, ...]]
    reaches_output: bool


class _Recorder:
    """Outputs and inputs of every mixing layer, call by call; in the second pass, outputs are replayed and inputs compared."""

    def __init__(
        self, model: nn.Module, disturbed: Mapping[str, tuple[int, ...]], watched: Collection[str], seed: int
    ) -> None:
        self.layers = {name: module for name, module in model.named_modules() if mixes(module) or name in watched}
        self.watched = {name for name in watched if not mixes(self.layers[name])}
        self.disturbed = disturbed
        self.noise = torch.Generator().manual_seed(seed)
        self.inputs: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        self.outputs: dict[str, list[Any]] = {name: [] for name in self.layers}
        self.calls = dict.fromkeys(self.layers, 0)
        self.changed: dict[str, set[int]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in self.layers.items():

                def hook(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                    value = first_tensor((args, kwargs))
                    self.inputs[name].append(torch.empty(0) if value is None else value.detach().clone())
                    self.outputs[name].append(_copied(output))

                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    @contextmanager
    def replaying(self, strength: float) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in self.layers.items():

                def hook(layer: nn.Module, args: Any, kwargs: Any, _: Any, name: str = name) -> Any:
                    position = self.calls[name]
                    self.calls[name] += 1
                    value = first_tensor((args, kwargs))
                    if value is not None and value.shape == self.inputs[name][position].shape:
                        self._compare(name, layer, value, self.inputs[name][position])
                    if name in self.watched:
                        return None
                    recorded = _copied(self.outputs[name][position])
                    if name not in self.disturbed:
                        return recorded
                    return self._disturb(layer, recorded, self.disturbed[name], strength)

                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def _compare(self, name: str, layer: nn.Module, value: Tensor, clean: Tensor) -> None:
        dim = channel_dim(layer, value)
        flat = _differs(value, clean).movedim(dim, 0).flatten(1).any(1)
        found = flat.nonzero().flatten().tolist()
        if found:
            self.changed.setdefault(name, set()).update(found)

    def _disturb(self, layer: nn.Module, output: Any, units: tuple[int, ...], strength: float) -> Any:
        """Return the recorded output with noise on some channels, `strength` times the output's range."""
        value = first_tensor(output)
        if value is None or not value.numel():
            return output
        index = torch.tensor(units, device=value.device)
        dim = channel_dim(layer, value)
        part = value.index_select(dim, index)
        noise = torch.randn(part.shape, generator=self.noise).to(value.device, value.dtype)
        # In place on a copy, which keeps the layout: another one adds up in another order, and every channel behind it would differ a little.
        disturbed = value.clone()
        disturbed.index_copy_(dim, index, part + strength * (float(value.abs().max()) + 0.25) * noise)
        return (disturbed, *output[1:]) if isinstance(output, tuple) else disturbed


def _differs(first: Tensor, second: Tensor) -> Tensor:
    """Return where two tensors differ; NaN equals NaN."""
    return (first != second) & ~(first.isnan() & second.isnan())


def _copied(output: Any) -> Any:
    """Return a layer's output with its tensors cloned: what follows may change them in place (`out += x`)."""
    if isinstance(output, Tensor):
        return output.clone()
    return type(output)(map(_copied, output)) if type(output) in (tuple, list) else output


def observe_readers(
    model: nn.Module,
    data: Dataset,
    disturbed: Mapping[str, tuple[int, ...]],
    *,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
    watched: Collection[str] = (),
) -> Reading:
    """Disturb channels of some layers' outputs and see which layers' inputs change.

    Args:
        model: the network; it is not changed.
        data: a few examples for the forward passes.
        disturbed: name of a mixing layer to the output channels to disturb.
        seed: of the noise, and of what the network draws itself, in every pass anew.
        watched: layers that work on each channel by itself and are to be counted as readers too; a disturbance goes on through them.
        strengths: of the disturbances to join, relative to each output's range: what saturates a strong one may show a weak one.

    Returns:
        The readers of the disturbed channels. Channels that a norm multiplies by zero are read all the same.

    Raises:
        Exception: one of `DOES_NOT_RUN`: the network does not run with disturbed units.
    """
    readers: dict[str, set[int]] = {}
    reaches = False
    with inference(model), _revived(model):
        recorder = _Recorder(model, disturbed, watched, seed)
        with recorder.recording(), frozen_randomness(seed):
            clean = [value.clone() for value in leaves(call(model, data))]
        for strength in strengths:
            recorder.calls = dict.fromkeys(recorder.layers, 0)
            with recorder.replaying(strength), frozen_randomness(seed):
                outputs = leaves(call(model, data))
            reaches |= any(
                a.shape != b.shape or bool(_differs(a, b).any()) for a, b in zip(clean, outputs, strict=True)
            )
        for name, found in recorder.changed.items():
            readers.setdefault(name, set()).update(found)
    return Reading({name: tuple(sorted(found)) for name, found in readers.items()}, reaches)


@contextmanager
def _revived(model: nn.Module) -> Iterator[None]:
    """Give channels that a norm multiplies by zero (what network slimming leaves) the factor one for the length of a block.

    Who reads them is then seen; whether they count is no matter here.
    """
    found = {layer.weight for layer in model.modules() if isinstance(layer, NORMS) and layer.weight is not None}
    before = [(weight, weight.detach().clone()) for weight in found if bool((weight == 0).any())]
    try:
        for weight, clean in before:
            weight.copy_(torch.where(clean == 0, torch.ones_like(clean), clean))
        yield
    finally:
        for weight, clean in before:
            weight.copy_(clean)


@contextmanager
def masked(model: nn.Module, masks: Mapping[str, tuple[int, ...]], bypassed: tuple[str, ...] = ()) -> Iterator[None]:
    """Make `model` the masked original for the length of a block.

    Args:
        model: the original.
        masks: reader to the channels of its input that are set to zero.
        bypassed: blocks that return their first input unchanged, in the form of their first output; other values become None.
    """
    with ExitStack() as stack:
        for name, units in masks.items():

            def pre_hook(layer: nn.Module, args: Any, kwargs: Any, units: tuple[int, ...] = units) -> Any:
                return _zeroed(layer, args, kwargs, units)

            stack.callback(model.get_submodule(name).register_forward_pre_hook(pre_hook, with_kwargs=True).remove)
        for path in bypassed:

            def bypass(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
                first = args[0] if args else next(iter(kwargs.values()))
                return (first, *[None] * (len(output) - 1)) if isinstance(output, tuple) else first

            stack.callback(model.get_submodule(path).register_forward_hook(bypass, with_kwargs=True).remove)
        yield


def _zeroed(layer: nn.Module, args: Any, kwargs: Any, units: tuple[int, ...]) -> tuple[Any, Any]:
    """Return the arguments with some channels of the first one set to zero."""

    def zeroed(value: Tensor) -> Tensor:
        index = torch.tensor(units, device=value.device)
        return value.index_fill(channel_dim(layer, value), index, 0)

    if args:
        return (zeroed(args[0]), *args[1:]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: zeroed(kwargs[name])}
