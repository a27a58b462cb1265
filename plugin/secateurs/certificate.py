r"""Certificates: the pruned network must compute what the masked original computes.

The masked original is the original with the removed units zeroed *where their readers read them* (zeroing weights is not enough where
$f(0) \neq 0$) and with dropped blocks bypassed. The readers are observed on the running network (`secateurs.readers`), not taken from the plan
under test, so that a wrong index, a forgotten reader, a re-cut head or a stale attribute shows as a difference. Certificates come before refit
and training, which change the function on purpose.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.data import Dataset
from secateurs.errors import CertificateError, PlanError, first_line
from secateurs.forward import DOES_NOT_RUN, call, inference, output_tensors
from secateurs.layers import mixes, weight_dims
from secateurs.plan import DropBlock, Edit, Plan, RemoveUnits, SetAttribute
from secateurs.readers import masked, observe_readers
from secateurs.report import Certificate, Skipped
from secateurs.surgery import applied

__all__ = ["Certified", "certify", "certify_network", "keep_certified", "masks_of"]

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest difference, as a share of the output scale, by the dtype of the output."""
BATCH_SIZES = (2, 5)
SMALLEST_SHARE = 1e-3
"""An output's scale counts as at least this share of the largest output's: rounding inside the network is relative to what is large in it."""
SHORTEST_SEQUENCE = 4
"""Sequences of at least this length are compared at half of it too."""


@dataclass
class _Difference:
    """What is known of one output so far: its largest difference, its scale, and the tolerance that its dtype allows."""

    max_abs: float = 0.0
    scale: float = 0.0
    tolerance: float = 0.0

    def add(self, expected: Tensor, got: Tensor) -> None:
        difference = (expected.double() - got.double()).abs().max()
        self.max_abs = max(self.max_abs, float(difference.nan_to_num(nan=float("inf"))))
        self.scale = max(self.scale, float(expected.abs().max()))
        self.tolerance = TOLERANCE.get(expected.dtype, TOLERANCE[torch.float32])


@dataclass(frozen=True)
class Certified:
    """What is left of a plan after its edits were checked.

    Attributes:
        plan: the edits that hold.
        certificate: of all of them together; None if none is left.
        vetoed: the edits that do not, with the measured difference.
    """

    plan: Plan
    certificate: Certificate | None
    vetoed: tuple[Skipped, ...]


def masks_of(original: nn.Module, plan: Plan, data: Dataset) -> dict[str, tuple[int, ...]]:
    """Return, for every reader of the units that `plan` removes, the input channels to zero.

    Raises:
        CertificateError: a removed unit reaches the network's output, or nothing reads it.
    """
    masks: dict[str, set[int]] = {}
    bypassed = tuple(path for edit in plan.of(DropBlock) for path in edit.paths)
    with masked(original, {}, bypassed):
        for number, edit in enumerate(plan.edits):
            if not isinstance(edit, RemoveUnits):
                continue
            reading = observe_readers(original, data, _produced(original, edit, Plan(edits=plan.edits[:number])))
            if reading.reaches_output:
                raise CertificateError(f"units of {edit.root!r} reach the output of the network")
            if not reading.readers:
                raise CertificateError(f"no layer reads the units of {edit.root!r}; the group cannot be certified")
            for name, channels in reading.readers.items():
                masks.setdefault(name, set()).update(channels)
    return {name: tuple(sorted(channels)) for name, channels in masks.items()}


def _produced(original: nn.Module, edit: RemoveUnits, earlier: Plan) -> dict[str, tuple[int, ...]]:
    """Return the output channels that an edit takes from layers that mix channels, as the original counts them.

    Args:
        original: the network before the plan.
        edit: whose indices refer to what the edits before it leave.
        earlier: those edits; they may have taken other channels of the same layer.
    """
    produced = {}
    for piece in edit.slices:
        layer: Any = original.get_submodule(piece.module)
        if piece.parameter == "weight" and mixes(layer) and piece.dim == weight_dims(layer)[0]:
            left = earlier.kept(piece.module, piece.parameter, piece.dim, layer.weight.shape[piece.dim])
            produced[piece.module] = tuple(left[position] for position in piece.removed)
    return produced


def certify(original: nn.Module, plan: Plan, data: Dataset, *, batch_sizes: Sequence[int] = BATCH_SIZES) -> Certificate:
    """Measure the difference between `plan` applied to `original` and the masked original.

    Args:
        original: the network before the plan; it is not changed.
        plan: the edits; each group at most once.
        data: realistic inputs, at least `max(batch_sizes)` examples.
        batch_sizes: the sizes of the batches to compare on.

    Returns:
        As `certify_network`; ask it whether it `holds`.

    Raises:
        CertificateError: it cannot be measured: the outputs are constant or not finite, or the plan does not run.
    """
    try:
        pruned = applied(original, plan)
    except PlanError as error:
        raise CertificateError(str(error)) from error
    except DOES_NOT_RUN as error:
        raise CertificateError(f"the plan cannot be applied: {first_line(error)}") from error
    return certify_network(original, pruned, plan, data, batch_sizes=batch_sizes)


def certify_network(
    original: nn.Module, pruned: nn.Module, plan: Plan, data: Dataset, *, batch_sizes: Sequence[int] = BATCH_SIZES
) -> Certificate:
    """Measure the difference between a pruned network, however it was made, and the original masked as `plan` says.

    Each output is held to its own scale, so that large coordinates do not hide wrong scores beside them. Inputs that are sequences of
    integers are compared on their first half too, where the original runs on it: what was cut right for one length only shows there.

    Args:
        original: the network before the plan; it is not changed.
        pruned: the network to judge; it is not changed.
        plan: the edits that `pruned` claims to be; only the masks are made from it.
        data: realistic inputs, at least `max(batch_sizes)` examples.
        batch_sizes: the sizes of the batches to compare on.

    Returns:
        Difference over all batches and lengths, scale and tolerance of the output that comes closest to its tolerance; ask it whether it
        `holds`.

    Raises:
        CertificateError: it cannot be measured: the outputs are constant or not finite, or one of the two does not run.
    """
    bypassed = tuple(path for edit in plan.of(DropBlock) for path in edit.paths)
    try:
        masks = masks_of(original, plan, data.take(range(min(len(data), max(batch_sizes)))))
    except DOES_NOT_RUN as error:
        raise CertificateError(f"the masked original does not run: {first_line(error)}") from error
    outputs: list[_Difference] = []
    sizes = sorted({min(size, len(data)) for size in batch_sizes})
    for batch, shorter in _batches(data, sizes):
        with inference(original, pruned):
            try:
                with masked(original, masks, bypassed):
                    expected = _run(original, batch, "masked original")
                _refuse_constant(expected)
            except CertificateError:
                if shorter:
                    continue
                raise
            got = _run(pruned, batch, "pruned network")
        if len(expected) != len(got):
            raise CertificateError(
                f"the pruned network returns {len(got)} tensors where the original returns {len(expected)}"
            )
        outputs += [_Difference() for _ in range(len(expected) - len(outputs))]
        for a, b, output in zip(expected, got, outputs[: len(expected)], strict=True):
            if a.shape != b.shape:
                raise CertificateError(
                    f"the pruned network returns shape {tuple(b.shape)} where the original returns {tuple(a.shape)}"
                )
            output.add(a, b)
    return _worst(outputs, sizes)


def _worst(outputs: Sequence[_Difference], sizes: list[int]) -> Certificate:
    """Return the certificate of the output that comes closest to its tolerance, or goes furthest beyond it."""
    least = SMALLEST_SHARE * max(output.scale for output in outputs)
    found = [
        Certificate(max_abs=one.max_abs, scale=max(one.scale, least), tolerance=one.tolerance, batch_sizes=sizes)
        for one in outputs
    ]
    return max(found, key=lambda one: (one.share / one.tolerance, one.scale))


def _batches(data: Dataset, sizes: Sequence[int]) -> Iterator[tuple[Dataset, bool]]:
    """Yield batches of other examples each, every one followed by its first half where it has one, and whether it is that."""
    start = 0
    for size in sizes:
        batch = data.take([(start + step) % len(data) for step in range(size)])
        start += size
        yield batch, False
        half = _first_half(batch)
        if half is not None:
            yield half, True


def _first_half(batch: Dataset) -> Dataset | None:
    """Return a batch with each sequence of integers cut to half of its own length; None where there is none to cut."""
    cut = {
        name: array[:, : array.shape[1] // 2]
        for name, array in batch.inputs.items()
        if array.ndim >= 2 and array.dtype.kind in "iub" and array.shape[1] >= SHORTEST_SEQUENCE
    }
    return replace(batch, inputs={**batch.inputs, **cut}) if cut else None


def _run(model: nn.Module, batch: Dataset, what: str) -> list[Tensor]:
    try:
        outputs = output_tensors(call(model, batch))
    except DOES_NOT_RUN as error:
        raise CertificateError(f"the {what} does not run: {first_line(error)}") from error
    return [value for value in outputs if value.numel()]


def _refuse_constant(outputs: Sequence[Tensor]) -> None:
    """Outputs that do not depend on the input cannot certify anything."""
    if not outputs:
        raise CertificateError(
            "the network returns no floating-point numbers to compare; return the scores instead of what is chosen by them"
        )
    if not all(bool(value.isfinite().all()) for value in outputs):
        raise CertificateError("the masked original returns NaN or infinite values; it cannot certify anything")
    if all(len(value) > 1 and float((value - value[:1]).abs().max()) <= 1e-12 for value in outputs if value.ndim):
        raise CertificateError("the outputs are the same for every example; such a network cannot certify anything")


def _steps(plan: Plan) -> Iterator[Plan]:
    """Split a plan into edits that stand or fall together: each edit of structure with the attributes that follow it."""
    step: list[Edit] = []
    for edit in plan.edits:
        if step and not isinstance(edit, SetAttribute):
            yield Plan(edits=tuple(step))
            step = []
        step.append(edit)
    if step:
        yield Plan(edits=tuple(step))


def keep_certified(original: nn.Module, plan: Plan, data: Dataset) -> Certified:
    """Check every edit by itself, leave out those that fail, and certify the rest together.

    Args:
        original: the network before the plan.
        plan: the edits proposed; each group at most once.
        data: realistic inputs.

    Returns:
        The plan that holds, its certificate, and the vetoes with their reasons.

    Raises:
        CertificateError: edits that hold one by one do not hold together.
    """
    kept: list[Plan] = []
    vetoed: list[Skipped] = []
    current = copy.deepcopy(original)
    for step in _steps(plan):
        head = step.edits[0]
        where = str(getattr(head, "root", None) or getattr(head, "path", None) or getattr(head, "module", ""))
        try:
            certificate = certify(current, step, data)
        except CertificateError as error:
            vetoed.append(Skipped(where=where, reason=f"not certified: {error}"))
            continue
        if not certificate.holds:
            reason = f"not certified: differs from the masked original by {certificate.max_abs:.3g} on a scale of {certificate.scale:.3g}"
            vetoed.append(Skipped(where=where, reason=reason))
            continue
        kept.append(step)
        current = applied(current, step)
    whole = Plan.join(kept)
    if not whole:
        return Certified(whole, None, tuple(vetoed))
    certificate = certify(original, whole, data)
    if not certificate.holds:
        raise CertificateError(
            f"edits that are certified one by one differ together: by {certificate.max_abs:.3g} on a scale of {certificate.scale:.3g}. "
            f"Please report this network; pruning it in two passes avoids it."
        )
    return Certified(whole, certificate, tuple(vetoed))
