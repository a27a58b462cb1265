"""Rows: what layers read and put out, one row per example and output position, shown batch by batch.

Every statistic of a layer's input starts here. The rows are bounded by a limit that holds for all batches together and are drawn evenly over
the examples; rows of padding are left out. Nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateurs.data import Dataset
from secateurs.moments import Moments, Positions, output_positions, patches, rows_of_output, token_rows
from secateurs.probe import Tap, sweep

__all__ = ["ROWS", "Rows", "observe_rows", "reader_moments"]

ROWS = 1 << 17
"""Rows (examples times positions) that one layer's statistics use at most."""


@dataclass(frozen=True)
class Rows:
    """Some rows of one batch at one layer.

    Attributes:
        x: what the layer reads, shape `(rows, d)`.
        y: what it puts out, shape `(rows, p)`.
        examples: the number of each row's example, in the order of the sweep, shape `(rows,)`.
    """

    x: Tensor
    y: Tensor
    examples: Tensor


def observe_rows(
    model: nn.Module,
    names: Sequence[str],
    data: Dataset,
    receive: Callable[[str, Rows], None],
    *,
    limit: int = ROWS,
    seed: int = 0,
    batch_size: int = 64,
) -> None:
    """Run the network over the data once and show the rows of some layers.

    Args:
        model: the network.
        names: linear layers or convolutions with one group.
        data: the examples.
        receive: called with a layer's name and its rows, once per batch; must not keep them.
        limit: rows per layer that are shown in all, unless there are more batches than that: each batch shows one position at least.
        seed: of the drawn positions; the same seed, limit and data show the same rows again.
        batch_size: examples per forward pass.
    """
    batches = max(1, -(-len(data) // batch_size))
    positions = Positions(max(limit // batches, 1), seed)

    def tap_for(name: str, layer: nn.Module, batch: Dataset, seen: int) -> Tap:
        def tap(inputs: Tensor, output: Tensor) -> None:
            drawn = positions.draw(len(output), output_positions(layer, output))
            x, y = patches(layer, inputs, drawn), rows_of_output(layer, output, drawn)
            owners = seen + torch.arange(len(x)) * len(batch) // len(x)
            real = token_rows(layer, output, drawn, batch.tokens)
            receive(name, Rows(x, y, owners) if real is None else Rows(x[real], y[real], owners[real]))

        return tap

    seen = 0
    for batch in data.longest_first().batches(batch_size):
        taps = {name: tap_for(name, model.get_submodule(name), batch, seen) for name in names}
        sweep(model, batch, taps, batch_size=batch_size)
        seen += len(batch)


def reader_moments(
    model: nn.Module,
    names: Sequence[str],
    data: Dataset,
    *,
    folds: int = 1,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, list[Moments]]:
    """Return the moments of what each layer reads, apart for each of several folds of the examples; folds add up.

    Args:
        model: the network.
        names: linear layers or convolutions with one group.
        data: calibration examples.
        folds: into which the examples are dealt in turn.
        seed: of the drawn positions.
        batch_size: examples per forward pass.
    """
    found: dict[str, list[Moments]] = {}

    def receive(name: str, rows: Rows) -> None:
        parts = found.setdefault(name, [Moments.zeros(rows.x.shape[1]) for _ in range(folds)])
        if folds == 1:
            parts[0].update(rows.x)
            return
        for fold, part in enumerate(parts):
            part.update(rows.x[rows.examples % folds == fold])

    observe_rows(model, names, data, receive, seed=seed, batch_size=batch_size)
    return found
