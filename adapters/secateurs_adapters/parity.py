"""Agreement of an exported file with the network it came from, over every output, at several batch sizes and lengths.

An export that succeeds may still have fixed the batch size, the sequence length or one branch of the network; only
running the file at sizes other than the ones it was traced with shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateurs.errors import DataError, ExportError, last_line
from secateurs.forward import call, inference
from secateurs.report import Parity
from secateurs_adapters.session import Session

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from secateurs.data import Dataset

__all__ = ["TOLERANCE", "check_parity", "network_outputs", "resample"]

Array = npt.NDArray[Any]

TOLERANCE = 1e-4
"""Largest difference allowed, as a share of an output's largest absolute value."""
_HALF_STEPS = 16
"""Rounding steps of the output's type that are allowed where these are coarser than `TOLERANCE` (half precision)."""


@dataclass
class _Difference:
    """What is known of one output so far: its largest difference, its scale, and the tolerance that its type allows."""

    max_abs: float = 0.0
    scale: float = 0.0
    tolerance: float = TOLERANCE

    @property
    def relative(self) -> float:
        if self.max_abs == 0.0:
            return 0.0
        return self.max_abs / self.scale if self.scale > 0.0 else float("inf")


def check_parity(
    path: Path,
    model: nn.Module,
    example: Dataset,
    batch_sizes: Sequence[int],
    *,
    lengths: Sequence[int] = (),
    by_name: bool = False,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Parity:
    r"""Compare a file with a network.

    Over the outputs $o$, $\max_o \max|y_o - \hat y_o| / \max|y_o|$ must stay within `tolerance`.

    Args:
        path: the file.
        model: the network; run in evaluation mode, then put back into the mode it had.
        example: where the rows of the inputs are drawn from, with replacement.
        batch_sizes: the sizes to compare at; none should be the one the file was traced with.
        lengths: the sequence length at each of these sizes, for a file that leaves it free; empty keeps the example's.
        by_name: compare the outputs that the file has with the entries of these names in what the network returns;
            otherwise the file has every tensor that the network returns, in its order.
        tolerance: share of each output's scale. Half-precision outputs are allowed 16 rounding steps of their type
            where that is more.
        seed: of the draw.

    Returns:
        The largest absolute and relative difference over all outputs and batch sizes, and the loosest tolerance that
        applied.

    Raises:
        ExportError: the file cannot be run at one of the sizes, or disagrees with the network.
    """
    differences: dict[str, _Difference] = {}
    try:
        session = Session(path)
    except DataError as error:
        raise ExportError(
            f"the exported file does not load: {error} Choose another `opset`, or replace the operator it names."
        ) from None
    for index, size in enumerate(batch_sizes):
        batch = resample(example, size, seed + index)
        where = f"batch size {size}"
        if lengths:
            batch, where = batch.at_length(lengths[index]), f"{where} and sequence length {lengths[index]}"
        expected = network_outputs(model, batch, session.outputs if by_name else None)
        try:
            obtained = session.run(session.feeds(batch.inputs))
        except DataError as error:
            raise ExportError(
                f"the exported file does not run at {where}: {error} Look for a size that `forward` hard-codes, and "
                "take it from `x.shape` instead."
            ) from None
        _compare(expected, obtained, where, differences, tolerance)
    return _judge(differences, list(batch_sizes), list(lengths))


def resample(example: Dataset, size: int, seed: int) -> Dataset:
    """Return `size` examples drawn from `example`: without replacement while they last."""
    generator = np.random.default_rng(seed)
    return example.take(generator.choice(len(example), size, replace=size > len(example)))


def network_outputs(model: nn.Module, batch: Dataset, names: Sequence[str] | None = None) -> list[Tensor]:
    """Return every tensor that a network returns in evaluation mode, in the order in which an exported file lists them.

    Args:
        model: the network.
        batch: what it is called with.
        names: return the entries of these names instead, for a network that returns a mapping.

    Raises:
        ExportError: the network fails at this batch size, returns no tensor or none of a name, or its first output
            lacks the examples on its first axis.
    """
    try:
        with inference(model):
            outputs = call(model, batch)
    except Exception as error:
        raise ExportError(
            f"the network itself fails at batch size {len(batch)} ({type(error).__name__}: {last_line(error)}). If the example has "
            "the shapes and types that `forward` takes, look for a batch size that it hard-codes, and take it from "
            "`x.shape` instead."
        ) from error
    if names is not None:
        missing = [name for name in names if not isinstance(outputs, Mapping) or name not in outputs]
        if missing:
            raise ExportError(
                f"the file has the outputs {missing}, which the network does not return; use `exporter: dynamo`."
            )
        outputs = [outputs[name] for name in names]
    found = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    if not found:
        raise ExportError(
            f"the network returned {type(outputs).__name__}, which holds no tensor; return a tensor, a tuple or a dict."
        )
    if found[0].ndim == 0 or len(found[0]) != len(batch):
        raise ExportError(
            f"the first output has shape {tuple(found[0].shape)} at batch size {len(batch)}; it needs the examples on "
            "its first axis. Look for a batch size that `forward` hard-codes, for example in `view(2, ...)`, and take "
            "it from `x.shape` instead."
        )
    return found


def _compare(
    expected: Sequence[Tensor],
    obtained: Mapping[str, Array],
    where: str,
    differences: dict[str, _Difference],
    tolerance: float,
) -> None:
    if len(expected) != len(obtained):
        raise ExportError(
            f"the network has {len(expected)} outputs, the file {len(obtained)}; return each tensor once."
        )
    for reference, (name, value) in zip(expected, obtained.items(), strict=True):
        if tuple(reference.shape) != value.shape:
            raise ExportError(
                f"output {name!r} has shape {value.shape} in the file and {tuple(reference.shape)} in the network at "
                f"{where}. Look for a size that `forward` hard-codes, and take it from `x.shape` instead."
            )
        exact = not (reference.is_floating_point() or reference.is_complex())
        steps = 0.0 if exact else _HALF_STEPS * torch.finfo(reference.dtype).eps
        known = differences.setdefault(name, _Difference(tolerance=0.0 if exact else max(tolerance, steps)))
        truth, got = reference.detach().double().numpy(), value.astype(np.float64)
        known.max_abs = max(known.max_abs, _distance(truth, got))
        finite = truth[np.isfinite(truth)]
        known.scale = max(known.scale, float(np.abs(finite).max()) if finite.size else 0.0)


def _distance(truth: Array, got: Array) -> float:
    """Return the largest absolute difference; infinite where one side is not finite and the other is not the same."""
    same = (truth == got) | (np.isnan(truth) & np.isnan(got))
    if same.all():
        return 0.0
    difference = np.abs(truth[~same] - got[~same])
    return float("inf") if not np.isfinite(difference).all() else float(difference.max())


def _judge(differences: Mapping[str, _Difference], batch_sizes: list[int], lengths: list[int]) -> Parity:
    for name, known in differences.items():
        if not known.relative <= known.tolerance:
            raise ExportError(
                f"the exported file disagrees with the network: output {name!r} differs by {known.max_abs:.3g}, "
                f"{known.relative:.3g} of its largest value; allowed is {known.tolerance:.3g}, at batch sizes "
                f"{batch_sizes}{f' and sequence lengths {lengths}' if lengths else ''}. Look for random or data-dependent steps in `forward`."
            )
    found = list(differences.values())
    return Parity(
        max_abs=max(known.max_abs for known in found),
        max_rel=max(known.relative for known in found),
        tolerance=max(known.tolerance for known in found),
        batch_sizes=batch_sizes,
        sequence_lengths=lengths,
    )
