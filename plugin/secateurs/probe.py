"""Probes: temporary observers of activations. One sweep feeds every statistic, and nothing is left on the network.

A tap accumulates, so that memory does not grow with the number of batches. A statistic that needs several modules of one batch (CKA)
registers one tap per module and is told when a batch ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from secateurs.data import Dataset
from secateurs.forward import call, inference, output_tensors

__all__ = ["Tap", "execution_order", "first_tensor", "sweep", "tapped"]


Tap = Callable[[Tensor, Tensor], None]
"""Receives what goes into and comes out of one module, once per call; must not keep the tensors."""


class _Enough(BaseException):
    """All taps of a truncated sweep have fired."""


def first_tensor(value: Any) -> Tensor | None:
    """Return the first floating-point tensor of a module's inputs or outputs."""
    found = output_tensors(value)
    return found[0] if found else None


@contextmanager
def tapped(model: nn.Module, taps: Mapping[str, Tap], *, stop_after: str | None = None) -> Iterator[None]:
    """Attach taps to modules by qualified name for the length of a block.

    Args:
        model: the network.
        taps: module name to tap.
        stop_after: the module after whose call the forward pass may end; saves the rest of it.
    """
    handles = []

    def hook_for(name: str, tap: Tap) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs, outputs = first_tensor((args, kwargs)), first_tensor(output)
            if inputs is None or outputs is None:
                raise TypeError(f"module {name!r} passes no floating-point tensor; it cannot be observed")
            tap(inputs, outputs)
            if name == stop_after:
                raise _Enough

        return hook

    try:
        for name, tap in taps.items():
            handles.append(model.get_submodule(name).register_forward_hook(hook_for(name, tap), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def sweep(
    model: nn.Module,
    data: Dataset,
    taps: Mapping[str, Tap],
    *,
    batch_size: int = 64,
    stop_after: str | None = None,
    before_batch: Callable[[Dataset], None] | None = None,
    after_batch: Callable[[Dataset, Any], None] | None = None,
    drop_last: bool = False,
) -> None:
    """Run the network over `data` once, in evaluation mode, and feed the taps.

    Args:
        model: the network; its modes come out as they went in.
        data: the examples.
        taps: module name to tap.
        batch_size: examples per forward pass.
        stop_after: end each forward pass after this module.
        before_batch: called before each forward pass with the batch.
        after_batch: called after each batch with the batch and the network's output (None if the pass was cut short).
        drop_last: leave out a last, smaller batch.
    """
    with inference(model), tapped(model, taps, stop_after=stop_after):
        for batch in data.batches(batch_size, drop_last=drop_last):
            if before_batch is not None:
                before_batch(batch)
            try:
                output = call(model, batch)
            except _Enough:
                output = None
            if after_batch is not None:
                after_batch(batch, output)


def execution_order(model: nn.Module, data: Dataset) -> list[str]:
    """Return the qualified names of the modules with parameters of their own, in the order of their first call."""
    order: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue

        def hook(*_: Any, name: str = name) -> None:
            if name not in order:
                order.append(name)

        handles.append(module.register_forward_pre_hook(hook))
    try:
        with inference(model):
            call(model, data)
    finally:
        for handle in handles:
            handle.remove()
    return order
