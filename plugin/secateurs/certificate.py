r"""Certificates: the pruned network must compute what the masked original computes.

The masked original is the original with the removed units zeroed *where their readers read them* (zeroing weights is not enough where
$f(0) \neq 0$) and with dropped blocks bypassed. The readers are observed on the running network (`secateurs.readers`), not taken from the plan
under test, so that a wrong index, a forgotten reader, a re-cut head or a stale attribute shows as a difference. Certificates come before refit
and training, which change the function on purpose.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.data import Dataset
from secateurs.errors import CertificateError, PlanError, first_line
from secateurs.forward import DOES_NOT_RUN, call, frozen_randomness, inference, leaves
from secateurs.layers import mixes, weight_dims
from secateurs.plan import DropBlock, Edit, Plan, RemoveUnits, SetAttribute
from secateurs.readers import masked, observe_readers
from secateurs.report import Certificate, Skipped
from secateurs.rounding import ROUNDING_STEPS, Floats, distance, gaps, scales, shares
from secateurs.surgery import applied

__all__ = ["Certified", "certify", "certify_network", "keep_certified", "masks_of"]

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest difference, as a share of how much an output varies over the examples, by its dtype."""
BATCH_SIZES = (2, 5)
SHORTEST_SEQUENCE = 4
"""Sequences of at least this length are compared at half of it too."""
MOST = 1 << 22
"""Numbers that are compared at once, at the most, or those of one example."""


@dataclass
class _Difference:
    """What is known of the differences so far; the spread is of each output."""

    max_abs: float = 0.0
    scale: float = 0.0
    tolerance: float = 0.0
    worst: float = 0.0
    spread: dict[int, float] = field(default_factory=dict)

    def add(self, number: int, expected: Tensor, got: Tensor) -> None:
        r"""Compare one output of one batch.

        A number $v$ may differ by $\tau s + \min(32 \epsilon, \tau) \max(|v|, m)$, with the tolerance $\tau$ and the rounding step
        $\epsilon$ of its dtype, $s$ how much the output varies over the examples, and $m$ how large it is as a rule
        (`secateurs.rounding.scales`). What is the same for every example (a mask, an offset) thus leaves no room for the rest. Whole
        numbers and infinite ones must be equal.
        """
        exact = not (expected.is_floating_point() or expected.is_complex())
        tolerance = 0.0 if exact else _tolerance(expected.dtype)
        step = 0.0 if exact else min(ROUNDING_STEPS * torch.finfo(expected.dtype).eps, tolerance)
        spread, usual = scales([_array(_drawn(expected))])
        spread = self.spread[number] = max(self.spread.get(number, 0.0), spread)
        for first, second in zip(_pieces(expected), _pieces(got), strict=True):
            truth, found = _array(first), _array(second)
            self.max_abs = max(self.max_abs, float(distance(truth, found).max()))
            self.worst = max(self.worst, float(shares(truth, found, tolerance, step, spread, usual).max()))
            if not exact:
                self.scale = max(self.scale, float(np.abs(truth[np.isfinite(truth)]).max(initial=0.0)))
                self.tolerance = max(self.tolerance, tolerance)


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE.get(dtype.to_real() if dtype.is_complex else dtype, TOLERANCE[torch.float32])


def _drawn(value: Tensor) -> Tensor:
    """Return an output, or evenly spaced entries of each example where it is large: they tell how it varies as well as all do."""
    every = -(-value.numel() // MOST)
    return value if value.ndim == 0 or every == 1 else value.reshape(len(value), -1)[:, ::every]


def _pieces(value: Tensor) -> Sequence[Tensor]:
    """Return an output in parts of a few examples, to spare memory."""
    return (value,) if value.ndim == 0 else value.split(max(1, MOST * len(value) // value.numel()))


def _array(value: Tensor) -> Floats:
    found: Floats = (torch.view_as_real(value) if value.is_complex() else value).double().cpu().numpy()
    return found


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

    Each output is held to how much it varies itself, so that neither large coordinates beside it nor a mask in it hide wrong scores.
    Inputs that are sequences of integers are compared on their first half too, where the original runs on it: what was cut right for one
    length only shows there.

    Args:
        original: the network before the plan; it is not changed.
        pruned: the network to judge; it is not changed.
        plan: the edits that `pruned` claims to be; only the masks are made from it.
        data: realistic inputs, at least `max(batch_sizes)` examples.
        batch_sizes: the sizes of the batches to compare on.

    Returns:
        The largest difference over all outputs, batches and lengths, and the largest share of what is allowed; ask it whether it `holds`.

    Raises:
        CertificateError: it cannot be measured: the outputs are constant or not finite, or one of the two does not run.
    """
    bypassed = tuple(path for edit in plan.of(DropBlock) for path in edit.paths)
    try:
        masks = masks_of(original, plan, data.take(range(min(len(data), max(batch_sizes)))))
    except DOES_NOT_RUN as error:
        raise CertificateError(f"the masked original does not run: {first_line(error)}") from error
    difference = _Difference()
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
                f"the pruned network returns {len(got)} values where the original returns {len(expected)}"
            )
        for number, (a, b) in enumerate(zip(expected, got, strict=True)):
            if a.shape != b.shape:
                raise CertificateError(
                    f"the pruned network returns shape {tuple(b.shape)} where the original returns {tuple(a.shape)}"
                )
            difference.add(number, a, b)
    return Certificate(
        max_abs=difference.max_abs,
        scale=difference.scale,
        tolerance=difference.tolerance,
        worst=difference.worst,
        batch_sizes=sizes,
    )


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
        with frozen_randomness(0):
            outputs = leaves(call(model, batch))
    except DOES_NOT_RUN as error:
        raise CertificateError(f"the {what} does not run: {first_line(error)}") from error
    return [value for value in outputs if value.numel()]


def _refuse_constant(outputs: Sequence[Tensor]) -> None:
    """Outputs that do not depend on the input cannot certify anything."""
    scores = [value for value in outputs if value.is_floating_point() or value.is_complex()]
    if not scores:
        raise CertificateError(
            "the network returns no floating-point numbers to compare; return the scores instead of what is chosen by them"
        )
    if any(bool(value.isnan().any()) for value in scores):
        raise CertificateError("the masked original returns NaN; it cannot certify anything")
    several = [value for value in scores if value.ndim]
    if several and all(len(value) > 1 and gaps([_array(value)])[0].max() <= 1e-12 for value in several):
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
        The plan that holds, its certificate, and the vetoes with their reasons. Where edits that hold one by one do not hold together,
        those are kept that hold together with all before them.
    """
    kept: list[Plan] = []
    vetoed: list[Skipped] = []
    current = copy.deepcopy(original)
    for step in _steps(plan):
        where = _where(step)
        try:
            certificate = certify(current, step, data)
        except CertificateError as error:
            vetoed.append(Skipped(where=where, reason=f"not certified: {error}"))
            continue
        if not certificate.holds:
            vetoed.append(Skipped(where=where, reason=f"not certified: {_excess(certificate)}"))
            continue
        kept.append(step)
        current = applied(current, step)
    count, together, why = _together(original, kept, data)
    reason = f"not certified: together with the edits before it, {why}; a second pass may remove it"
    late = [Skipped(where=_where(step), reason=reason) for step in kept[count:]]
    return Certified(Plan.join(kept[:count]), together, (*vetoed, *late))


def _together(original: nn.Module, steps: Sequence[Plan], data: Dataset) -> tuple[int, Certificate | None, str]:
    """Return how many edits hold together, from the first on, their certificate, and why no more of them do.

    As a rule all do; else the number is found by bisection.
    """
    holds, fails, why = 0, len(steps) + 1, ""
    found: Certificate | None = None
    tried = len(steps)
    while tried > holds:
        try:
            certificate = certify(original, Plan.join(steps[:tried]), data)
            failure = "" if certificate.holds else f"the network {_excess(certificate)}"
        except CertificateError as error:
            failure = str(error)
        if failure:
            fails, why = tried, failure
        else:
            holds, found = tried, certificate
        tried = (holds + fails) // 2
    return holds, found, why


def _where(step: Plan) -> str:
    head = step.edits[0]
    return str(getattr(head, "root", None) or getattr(head, "path", None) or getattr(head, "module", ""))


def _excess(certificate: Certificate) -> str:
    return (
        f"differs from the masked original by {certificate.max_abs:.3g} on a scale of {certificate.scale:.3g}, "
        f"{certificate.worst:.3g} times what is allowed"
    )
