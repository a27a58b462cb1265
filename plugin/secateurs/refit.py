r"""Refit: fold the least-squares map from the kept units to the dense network's pre-activations into the consumers' weights.

For a consumer with weight $W$ whose dense pre-activation is $y$ and whose input in the pruned network is $x$,

$$W' = W_0 + (\mathrm{Cov}(y, x) - W_0\,\mathrm{Cov}(x))\,(\mathrm{Cov}(x) + \lambda I)^{-1}, \qquad b' = \overline{y} - W'\,\overline{x},$$

with $W_0$ the sliced weight, so that the ridge pulls towards what is there. $b'$ goes into the layer's bias, or into the running mean of the
BatchNorm behind it. A consumer with neither gets the uncentred second moments and no new parameter: a centred map without its bias is worse
than no refit. Consumers are refitted from input to output, each on statistics gathered after the layers before it were refitted.

References:
    MIPP's theorem 1 (a function from the kept units exists); Frantar and Alistarh 2022 (OBC); Luo et al. 2017 (ThiNet).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.data import Dataset
from secateurs.forward import call, inference
from secateurs.layers import NORMS, as_weight, is_matrix_layer, weight_dims, weight_matrix, widths_of
from secateurs.moments import PairedMoments, Positions, output_positions, patches, rows_of_output, token_rows
from secateurs.plan import Plan
from secateurs.prefix import Prefix, Timeline
from secateurs.probe import sweep
from secateurs.rows import ROWS

__all__ = ["Solution", "following_norms", "install", "paired_moments", "refit", "refittable", "solve"]


@dataclass(frozen=True)
class Solution:
    """A consumer's new weight, outputs first, and the shift of its output (None: no constant term was fitted)."""

    weight: Tensor
    shift: Tensor | None


def _any(model: nn.Module, name: str) -> Any:
    """Return a module whose attributes the type checker need not know."""
    return model.get_submodule(name)


def refittable(layer: nn.Module) -> bool:
    """Tell whether a layer is one that `refit` can update: linear, or a convolution with one group."""
    return is_matrix_layer(layer)


def following_norms(model: nn.Module, example: Dataset) -> dict[str, str]:
    """Map each layer whose output goes straight into a BatchNorm, and was seen going nowhere else first, to that BatchNorm."""
    produced: dict[int, tuple[str, Tensor, int]] = {}
    found: dict[str, str] = {}
    handles = []
    for name, module in model.named_modules():
        if refittable(module):

            def remember(_: nn.Module, __: object, output: Tensor, name: str = name) -> None:
                # The tensor is held, so that its identity stays its own; its version tells of an operation in place (ReLU) since.
                produced[id(output)] = (name, output, output._version)

            handles.append(module.register_forward_hook(remember))
        elif isinstance(module, NORMS) and module.track_running_stats:

            def match(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                if id(args[0]) in produced and produced[id(args[0])][2] == args[0]._version:
                    found.setdefault(produced[id(args[0])][0], name)

            handles.append(module.register_forward_pre_hook(match))
    try:
        with inference(model):
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def paired_moments(
    model: nn.Module,
    dense: nn.Module,
    name: str,
    data: Dataset,
    *,
    outputs: Sequence[int] | None = None,
    batch_size: int = 64,
    rows: int = ROWS,
    seed: int = 0,
    prefixes: tuple[Prefix, Prefix] | None = None,
) -> PairedMoments:
    """Gather the moments of what a consumer reads in `model` together with what the same consumer puts out in `dense`.

    Args:
        model: the pruned network.
        dense: the network it came from.
        name: of the consumer, in both.
        data: calibration examples.
        outputs: the dense consumer's output channels that `model` still has; None for all.
        batch_size: examples per forward pass.
        rows: upper limit of rows in all.
        seed: of the drawn positions.
        prefixes: recordings of both networks that end before the consumer, with the same batches; None runs them from the start.
    """
    layer: Any = model.get_submodule(name)
    columns = None if outputs is None else torch.tensor(outputs)
    batches = max(1, -(-len(data) // batch_size))
    positions = Positions(max(rows // batches, 1), seed)
    moments: list[PairedMoments] = []
    dense_rows: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def dense_tap(_: Tensor, output: Tensor) -> None:
        chosen = positions.draw(len(output), output_positions(layer, output))
        y = rows_of_output(layer, output, chosen)
        dense_rows.append(
            (chosen, y if columns is None else y[:, columns], token_rows(layer, output, chosen, batch.tokens))
        )

    def pruned_tap(inputs: Tensor, _: Tensor) -> None:
        chosen, y, real = dense_rows.pop()
        x = patches(layer, inputs, chosen)
        if not moments:
            moments.append(PairedMoments.zeros(x.shape[1], y.shape[1]))
        moments[0].update(*((x, y) if real is None else (x[real], y[real])))

    for number, batch in enumerate(data.longest_first().batches(batch_size)):
        with nullcontext() if prefixes is None else prefixes[1].replaying(number):
            sweep(dense, batch, {name: dense_tap}, batch_size=batch_size, stop_after=name)
        with nullcontext() if prefixes is None else prefixes[0].replaying(number):
            sweep(model, batch, {name: pruned_tap}, batch_size=batch_size, stop_after=name)
    return moments[0]


def solve(moments: PairedMoments, current: Tensor, *, constant: bool, ridge: float) -> Solution:
    """Return the consumer's best weight for the moments.

    Args:
        moments: of its input and of the output it should have.
        current: its weight, any shape with the outputs first; the ridge pulls towards it.
        constant: fit a constant term (it has a bias, or a BatchNorm behind it).
        ridge: relative to the mean variance of the input.
    """
    start = current.detach().flatten(1).double()
    second, cross = moments.x.second, moments.cross
    if constant:
        mean = moments.x.mean
        second, cross = second - torch.outer(mean, mean), cross - torch.outer(moments.mean_y, mean)
    damped = second + ridge * second.diagonal().mean().clamp_min(1e-12) * torch.eye(len(second), dtype=second.dtype)
    weight = start + torch.linalg.solve(damped, (cross - start @ second).T).T
    shift = moments.mean_y - weight @ moments.x.mean if constant else None
    return Solution(weight.reshape(current.shape), shift)


def install(
    model: nn.Module, name: str, solution: Solution, norm: str | None = None, mean: Tensor | None = None
) -> None:
    """Write a solution into the network; the shift goes to the bias, or to the running mean of the BatchNorm `norm`.

    Args:
        model: changed in place.
        name: of the consumer.
        solution: what to write.
        norm: the BatchNorm behind a consumer without a bias.
        mean: the dense network's running mean of the channels that are left.
    """
    layer: Any = model.get_submodule(name)
    with torch.no_grad():
        layer.weight.copy_(as_weight(layer, solution.weight.flatten(1)))
        if solution.shift is None:
            return
        if layer.bias is not None:
            layer.bias.copy_(solution.shift)
        elif norm is not None and mean is not None:
            # The normalisation subtracts its mean: a constant on its input is a mean that is smaller by it.
            _any(model, norm).running_mean.copy_(mean.double() - solution.shift)


def refit(
    model: nn.Module,
    dense: nn.Module,
    plan: Plan,
    consumers: Sequence[str],
    data: Dataset,
    *,
    ridge: float = 1e-3,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Refit consumers of a pruned network towards the dense network, in place, from input to output.

    Args:
        model: the pruned network; changed in place.
        dense: the network it came from, with the same names.
        plan: the edits between the two.
        consumers: names of linear layers or convolutions, in order of execution.
        data: calibration examples; labels are not used.
        ridge: relative to the mean variance of each consumer's input.
        batch_size: examples per forward pass.
        seed: of the drawn positions.
        progress: called with the number of consumers done and their total.

    Returns:
        The names that were refitted.
    """
    data = data.longest_first()
    example = data.take(range(min(2, len(data))))
    norms = following_norms(model, example)
    timelines = Timeline(model, example), Timeline(dense, example)
    prefixes: tuple[Prefix, Prefix] | None = None
    holders = Counter(id(tensor) for module in model.modules() for tensor in module.parameters(recurse=False))
    done: list[str] = []

    def resumed(network: nn.Module, side: int) -> Prefix:
        start = None if prefixes is None else prefixes[side]
        return Prefix(network, data, [name], timelines[side], batch_size=batch_size, start=start)

    for number, name in enumerate(consumers):
        if progress is not None:
            progress(number, len(consumers))
        layer: Any = model.get_submodule(name)
        if not refittable(layer) or holders[id(layer.weight)] > 1:
            continue  # a tied weight serves another layer too, which was not asked
        original = dense.get_submodule(name)
        outputs = plan.kept(name, "weight", weight_dims(original)[0], widths_of(original)[1])
        # Everything before this consumer has its final weights: both networks go on from there.
        prefixes = resumed(model, 0), resumed(dense, 1)
        moments = paired_moments(
            model, dense, name, data, outputs=outputs, batch_size=batch_size, seed=seed, prefixes=prefixes
        )
        norm = norms.get(name)
        solution = solve(
            moments, weight_matrix(layer), constant=layer.bias is not None or norm is not None, ridge=ridge
        )
        install(model, name, solution, norm, None if norm is None else _any(dense, norm).running_mean[outputs])
        done.append(name)
    return done
