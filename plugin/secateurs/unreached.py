"""Why layers are in no group: what a trace does not reach, and what no group can be made of."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from secateurs.data import Dataset
from secateurs.forward import call, inference, output_tensors
from secateurs.layers import CONVOLUTIONS, is_depthwise, is_stored_transposed
from secateurs.plan import unnumbered
from secateurs.report import Skipped

__all__ = ["named", "unreached"]

UNKNOWN = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.RNNBase)
"""Layers with units of which no group can be made."""
NOT_CALLED = (
    "it was not called in the forward pass of the examples: it is not used for them, or computed without a call, as `layer.forward(x)` or by "
    "its weight alone; call it as `layer(x)`"
)
NO_GRADIENT = (
    "the trace, which follows gradients back from the outputs of the network, does not reach it: it runs under `no_grad`, behind it is a "
    "`detach` or a rounding, or no output depends on it"
)
COMPILED = "it is compiled by torch.jit, which hides its layers; give the Python module that it was made from"


def named(layers: Sequence[str]) -> str:
    """Return the names of layers, with `*` for the numbers in which some differ.

    >>> named(["layers.0.up", "layers.1.up", "head"])
    "'layers.*.up' and 'head'"
    """
    kinds: dict[str, list[str]] = {}
    for name in layers:
        kinds.setdefault(unnumbered(name), []).append(name)
    shown = [repr(like[0] if len(like) == 1 else kind) for kind, like in kinds.items()]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def unreached(model: nn.Module, example: Dataset, reached: Collection[str]) -> list[Skipped]:
    """Return why layers that could have units are not offered, though no group was refused.

    Args:
        model: the network; it is not changed.
        example: inputs for one forward pass.
        reached: names of the layers in the dependency graph.
    """
    compiled = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    outermost = [name for name in compiled if name.rpartition(".")[0] not in compiled or not name]
    found = [Skipped(where=name or "the network", reason=COMPILED) for name in outermost]
    layers = {name: module for name, module in model.named_modules() if _has_units(module)}
    known = {name for name, layer in layers.items() if not isinstance(layer, UNKNOWN)}
    found += [
        Skipped(where=name, reason=f"it is a {type(layer).__name__}, whose units cannot be removed yet")
        for name, layer in layers.items()
        if name not in known
    ]
    missing = [name for name in layers if name in known and name not in reached]
    if not known and not found:
        return [Skipped(where="the network", reason="it has no linear layer and no convolution")]
    if missing and len(missing) == len(known):
        found.append(Skipped(where="the network", reason=_why_nothing(model, example, missing)))
    elif missing:
        called = _called(model, example, missing)[0]
        found += [Skipped(where=name, reason=_why(model, name, called)) for name in missing]
    return found


def _has_units(layer: nn.Module) -> bool:
    linear = isinstance(layer, (nn.Linear, *UNKNOWN)) or is_stored_transposed(layer)
    return linear or (isinstance(layer, CONVOLUTIONS) and not is_depthwise(layer))


def _called(model: nn.Module, example: Dataset, names: Sequence[str]) -> tuple[set[str], bool]:
    """Return which of some layers a forward pass calls, and whether the network returns a floating-point tensor."""
    called: set[str] = set()
    with inference(model), ExitStack() as stack:
        for name in names:

            def note(*_: object, name: str = name) -> None:
                called.add(name)

            stack.callback(model.get_submodule(name).register_forward_pre_hook(note).remove)
        outputs = call(model, example)
    return called, bool(output_tensors(outputs))


def _why(model: nn.Module, name: str, called: Collection[str]) -> str:
    parent = name.rpartition(".")[0]
    if isinstance(model.get_submodule(parent), nn.MultiheadAttention):
        return f"{parent!r}, a MultiheadAttention, computes with its weight and does not call it"
    return NO_GRADIENT if name in called else NOT_CALLED


def _why_nothing(model: nn.Module, example: Dataset, layers: Sequence[str]) -> str:
    """Return why a trace reaches none of the layers of a network."""
    called, returns = _called(model, example, layers)
    if not returns:
        why = "it returns no floating-point tensor from which to follow gradients back; return scores, not choices"
    elif called:
        why = (
            "its outputs have no gradient, as under `no_grad`, `inference_mode` or after `detach`; leave these out of `forward`, Secateurs "
            "switches gradients off by itself"
        )
    else:
        why = NOT_CALLED.replace("it was", "none was").replace("it is", "they are")
    return f"the trace reaches none of its layers ({named(layers)}): {why}"
