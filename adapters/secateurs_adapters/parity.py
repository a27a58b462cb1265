"""Agreement of an exported file with the network it came from, over every output, at several batch sizes and lengths.

An export that succeeds may still have fixed the batch size, the sequence length or one branch of the network; only
running the file at sizes other than the ones it was traced with shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateurs.errors import DataError, ExportError, last_line
from secateurs.forward import call, inference
from secateurs.report import Parity
from secateurs.rounding import ROUNDING_STEPS, Floats, distance, gaps, scales, shares
from secateurs_adapters.session import Session

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from secateurs.data import Dataset

__all__ = ["TOLERANCE", "check_parity", "network_outputs", "refuse_complex", "resample"]

Array = npt.NDArray[Any]

TOLERANCE = 1e-4
"""Largest difference allowed, as a share of how far the values of an output differ between examples."""
_HALF_STEPS = 16
"""Rounding steps that make up the tolerance where these are coarser than `TOLERANCE` (half precision)."""


@dataclass(frozen=True)
class _Pair:
    """An output at one batch size: in the network, in the file, and where that is, in words."""

    truth: Floats
    got: Floats
    where: str


@dataclass
class _Output:
    """An output at every batch size.

    Attributes:
        name: in the file.
        tolerance: share of how far its values differ that an entry may be wrong by; 0 for whole numbers.
        rounding: share of its own value that an entry may be wrong by besides.
        pairs: the output at each size.
    """

    name: str
    tolerance: float
    rounding: float
    pairs: list[_Pair] = field(default_factory=list)


@dataclass(frozen=True)
class _Entry:
    """An entry of an output in the network and in the file, their difference, and what is allowed, in two parts."""

    where: str
    value: float
    got: float
    difference: float
    spread: float
    rounding: float

    @property
    def allowed(self) -> float:
        return self.spread + self.rounding

    @property
    def share(self) -> float:
        if self.difference == 0.0:
            return 0.0
        return self.difference / self.allowed if self.allowed > 0.0 else float("inf")


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

    Entry $i$ of output $o$, $y_{oi}$ in the network, may differ by $\tau s_o + 32 \epsilon \max(|y_{oi}|, m_o)$ in the
    file, with $\tau$ the `tolerance` and $\epsilon$ the rounding step of its type. The spread $s_o$ is how far the
    values of the output differ from those of the first example, so that an entry that is the same for every example (a
    masked score, an offset) does not widen what the others may differ by; nor does what fills in for a mask that
    moves. Where the examples are all the same, or do not change the output, it is how far its entries differ from each
    other. The size $m_o$ is the median of $|y_{oi}|$ over what differs between examples, at least
    $\min(1, \max|y_{oi}|) / 8$: runtimes compute sigmoid and its like to a few rounding steps of 1, not of the result.
    Infinite entries and whole numbers must be equal.

    Args:
        path: the file.
        model: the network; run in evaluation mode, then put back into the mode it had.
        example: where the rows of the inputs are drawn from, with replacement.
        batch_sizes: the sizes to compare at; none should be the one the file was traced with.
        lengths: the sequence length at each of these sizes, for a file that leaves it free; empty keeps the example's.
        by_name: compare the outputs that the file has with the entries of these names in what the network returns;
            otherwise the file has every tensor that the network returns, in its order.
        tolerance: share $\tau$ of each output's spread. Half-precision outputs are allowed 16 rounding steps of their
            type where that is more, in place of 32 as well.
        seed: of the draw.

    Returns:
        The largest absolute and relative difference over all outputs and batch sizes, the loosest tolerance that
        applied, and the largest share of what was allowed.

    Raises:
        ExportError: the file cannot be run at one of the sizes, or disagrees with the network.
    """
    outputs: dict[str, _Output] = {}
    batches: list[Dataset] = []
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
        _pair(expected, obtained, where, outputs, tolerance)
        batches.append(batch)
    given = [[batch.inputs[name].astype(np.float64) for batch in batches] for name in example.inputs]
    varied = any(gap.any() for values in given for gap in gaps(values))
    return _judge(list(outputs.values()), varied, list(batch_sizes), list(lengths))


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


def refuse_complex(output: Tensor, name: str) -> None:
    """Raise an `ExportError` for an output of complex numbers."""
    if output.is_complex():
        raise ExportError(
            f"output {name!r} is complex ({output.dtype}), and an ONNX file has no complex outputs here; return "
            "`torch.view_as_real(x)` instead, the real and the imaginary part on a last axis of 2."
        )


def _pair(
    expected: Sequence[Tensor],
    obtained: Mapping[str, Array],
    where: str,
    outputs: dict[str, _Output],
    tolerance: float,
) -> None:
    """Add to `outputs` what the network and the file give at one batch size."""
    if len(expected) != len(obtained):
        raise ExportError(
            f"the network has {len(expected)} outputs, the file {len(obtained)}; return each tensor once."
        )
    for reference, (name, value) in zip(expected, obtained.items(), strict=True):
        refuse_complex(reference, name)
        if tuple(reference.shape) != value.shape:
            raise ExportError(
                f"output {name!r} has shape {value.shape} in the file and {tuple(reference.shape)} in the network at "
                f"{where}. Look for a size that `forward` hard-codes, and take it from `x.shape` instead."
            )
        known = outputs.setdefault(name, _Output(name, *_shares(reference.dtype, tolerance)))
        known.pairs.append(_Pair(reference.detach().double().numpy(), value.astype(np.float64), where))


def _shares(dtype: torch.dtype, tolerance: float) -> tuple[float, float]:
    """Return the share of the spread, and of an entry's own value, that an entry of a type may be wrong by."""
    if not dtype.is_floating_point:
        return 0.0, 0.0
    step = torch.finfo(dtype).eps
    share = max(tolerance, _HALF_STEPS * step)
    return share, min(ROUNDING_STEPS * step, share)


def _worst(output: _Output, varied: bool) -> _Entry:
    """Return the entry of an output that comes closest to what is allowed, or goes furthest beyond it."""
    spread, usual = scales([pair.truth for pair in output.pairs], varied)
    worst = _Entry("", 0.0, 0.0, 0.0, 0.0, 0.0)
    for pair in output.pairs:
        truth, difference = pair.truth, distance(pair.truth, pair.got)
        if not truth.size:
            continue
        found_shares = shares(truth, pair.got, output.tolerance, output.rounding, spread, usual)
        at = np.unravel_index(int(found_shares.argmax()), truth.shape)
        place = f"entry {[int(index) for index in at]} at {pair.where}" if at else pair.where
        rounding = output.rounding * max(float(np.abs(truth[at])) if np.isfinite(truth[at]) else 0.0, usual)
        found = _Entry(
            place, float(truth[at]), float(pair.got[at]), float(difference[at]), output.tolerance * spread, rounding
        )
        worst = max(worst, found, key=lambda entry: entry.share)
    return worst


def _judge(outputs: Sequence[_Output], varied: bool, batch_sizes: list[int], lengths: list[int]) -> Parity:
    worst_shares, differences, relative = [], [], []
    for output in outputs:
        worst = _worst(output, varied)
        if worst.share > 1.0:
            raise ExportError(_refusal(output, worst))
        worst_shares.append(worst.share)
        gap, scale = _gap_and_scale(output)
        differences.append(gap)
        relative.append(gap / scale if gap else 0.0)
    return Parity(
        max_abs=max(differences),
        max_rel=max(relative),
        tolerance=max(output.tolerance for output in outputs),
        worst=max(worst_shares),
        batch_sizes=batch_sizes,
        sequence_lengths=lengths,
    )


def _gap_and_scale(output: _Output) -> tuple[float, float]:
    """Return the largest absolute difference of an output, and its largest finite absolute value."""
    gap = scale = 0.0
    for pair in output.pairs:
        gap = max(gap, float(distance(pair.truth, pair.got).max(initial=0.0)))
        scale = max(scale, float(np.abs(pair.truth).max(where=np.isfinite(pair.truth), initial=0.0)))
    return gap, scale


def _refusal(output: _Output, worst: _Entry) -> str:
    found = (
        f"the exported file disagrees with the network: output {output.name!r} differs by {worst.difference:.3g} "
        f"({worst.got:.6g} in the file, {worst.value:.6g} in the network, {worst.where})"
    )
    advice = "Look for random or data-dependent steps in `forward`"
    if not output.tolerance:
        return f"{found}; whole numbers must be equal. {advice}, and for scores that are almost equal before `argmax`."
    return (
        f"{found}; allowed is {worst.allowed:.3g}: {worst.spread:.3g}, {output.tolerance:.3g} of how far its values differ, and "
        f"{worst.rounding:.3g} for rounding. {advice}; if there are none, give examples that differ more."
    )
