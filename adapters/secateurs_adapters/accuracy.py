"""The metric of both files on the evaluation data, and how far they differ on the same examples.

Where every example is right or wrong, the metric carries Clopper and Pearson's interval and the drop the exact
interval of a paired difference. Without labelled data, agreement of the two files' outputs takes the place of a
metric.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from secateurs.errors import DataError
from secateurs.intervals import binomial_interval, paired_difference_interval
from secateurs.report import Accuracy, Estimate, Pairs
from secateurs.rounding import ROUNDING_STEPS, largest, scales, shares
from secateurs_adapters.session import Session, run_dataset, seeded_inputs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from secateurs.data import Dataset
    from secateurs.interfaces import Metric

__all__ = ["Comparison", "agreement", "compare_accuracy", "score"]

Array = npt.NDArray[Any]

SEEDED_EXAMPLES = 256
"""Seeded inputs are drawn until there are this many examples."""
AGREEMENT_TOLERANCE = 1e-2
"""Outputs that are not class scores agree within this share of the baseline's largest absolute output, masks left aside."""
BATCH_TOLERANCE = 1e-3
"""Share of how much an output varies that larger batches may change it by."""
_BATCH_BYTES = 4 * 1024 * 1024
_LARGEST_BATCH = 64


@dataclass(frozen=True)
class Comparison:
    """The metric of both files, and the drop from baseline to candidate (positive is worse), with the pairs behind it.

    The drop is None where the candidate's metric is not finite.
    """

    baseline: Accuracy
    candidate: Accuracy
    drop: Estimate | None
    pairs: Pairs | None = None


def compare_accuracy(
    baseline: Session, candidate: Session, evaluation: Dataset, metric: Metric, *, batch_size: int = 1
) -> Comparison:
    """Run the evaluation data through both files and compare their metric.

    Args:
        baseline: session of the baseline file.
        candidate: session of the candidate file.
        evaluation: labelled examples.
        metric: what is computed of the baseline's first output and of the candidate's of that name, or its first.
        batch_size: to run at; small examples are run in larger batches where that does not change what the files return.

    Returns:
        Both metrics and the drop, as fractions; baseline minus candidate where higher is better, else the reverse.

    Raises:
        DataError: there are no labels, data, files and metric do not fit each other, or the baseline's metric is not finite.
    """
    if evaluation.labels is None:
        raise DataError(
            f"data set {evaluation.origin!r} has no labels, and metric {metric.name!r} needs one per example; add "
            "labels."
        )
    of_baseline, of_candidate = _dataset_runs(baseline, candidate, evaluation.inputs, batch_size)
    name, before = next(iter(of_baseline.items()))
    after = of_candidate.get(name, next(iter(of_candidate.values())))
    if before.dtype.kind == "f" and before.size and np.isnan(before).all():
        raise DataError(
            f"{baseline.path.name!r} returns nothing but NaN on data set {evaluation.origin!r}, so that nothing can be compared with it; look "
            "for weights or inputs that overflow."
        )
    first, right_before = score(metric, before, evaluation.labels)
    second, right_after = score(metric, after, evaluation.labels)
    if first.value is None:
        raise DataError(
            f"{metric.name} of {baseline.path.name!r} is NaN or infinite on data set {evaluation.origin!r}, so that nothing can be compared "
            "with it; look for examples on which the network overflows, or choose another metric."
        )
    if second.value is None:
        return Comparison(first, second, None)
    if right_before is None or right_after is None:
        drop = first.value - second.value if metric.higher_is_better else second.value - first.value
        return Comparison(first, second, Estimate(value=drop))
    n = len(evaluation)
    pairs = Pairs(lost=int((right_before & ~right_after).sum()), gained=int((~right_before & right_after).sum()), n=n)
    interval = paired_difference_interval(pairs.lost, pairs.gained, n)
    return Comparison(first, second, Estimate(value=(pairs.lost - pairs.gained) / n, ci95=interval), pairs)


def score(metric: Metric, outputs: Array, labels: Array) -> tuple[Accuracy, npt.NDArray[np.bool_] | None]:
    """Return the metric and which examples are right.

    There is neither an interval nor a right and wrong where the metric is not a mean over examples.
    """
    right = metric.per_example(outputs, labels)
    if right is None:
        return Accuracy(value=metric.value(outputs, labels), n=len(labels), metric=metric.name), None
    hits = int(right.sum())
    interval = binomial_interval(hits, len(right))
    return Accuracy(value=hits / len(right), ci95=interval, n=len(right), metric=metric.name), right


def agreement(
    baseline: Session,
    candidate: Session,
    *,
    inputs: Mapping[str, Array] | None = None,
    batch_size: int = 1,
    length: int | None = None,
    examples: int = SEEDED_EXAMPLES,
    seed: int = 0,
) -> dict[str, float]:
    """Return the share of examples on which each output of two files agrees, by name, in the baseline's order.

    Class scores (two axes or more, at least two wide) agree where their largest entry is the same; other outputs
    where they differ by at most 1 % of the baseline's largest absolute output. An output without an axis for the
    examples counts once per run. Outputs that are no tensors are left out.

    Args:
        baseline: session of the baseline file.
        candidate: session of the candidate file.
        inputs: what to run them on; None makes seeded inputs from the baseline's signature.
        batch_size: examples per run of the seeded inputs.
        length: size of free axes other than the batch in seeded inputs; None takes 16.
        examples: seeded inputs are drawn until there are this many.
        seed: of the seeded inputs.

    Raises:
        DataError: the files take different inputs, or return different shapes.
    """
    if inputs is not None:
        pairs = [_dataset_runs(baseline, candidate, inputs, batch_size)]
    else:
        pairs = list(_seeded_runs(baseline, candidate, batch_size, length, examples, seed))
    shares: dict[str, list[float]] = {}
    weights: dict[str, list[int]] = {}
    for before, after in pairs:
        for name, other in _matched(baseline, candidate, before, after).items():
            agreed = _agreed(before[name], other)
            shares.setdefault(name, []).append(float(agreed.mean()) if len(agreed) else 1.0)
            weights.setdefault(name, []).append(max(len(agreed), 1))
    return {name: float(np.average(shares[name], weights=weights[name])) for name in shares}


def _dataset_runs(
    baseline: Session, candidate: Session, inputs: Mapping[str, Array], batch_size: int
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Run both files on all examples, in larger batches than asked for where they answer the same in them; return their outputs."""
    size = _batch_size(inputs, batch_size)
    sessions = (baseline, candidate)
    if size > batch_size and not all(_same_in_batches(session, inputs, batch_size, size) for session in sessions):
        size = batch_size
    return run_dataset(baseline, inputs, size), run_dataset(candidate, inputs, size)


def _same_in_batches(session: Session, inputs: Mapping[str, Array], small: int, large: int) -> bool:
    """Tell whether a file takes larger batches and returns the same in them: statistics over a batch, quantisation by its range do not."""
    some = {name: array[:large] for name, array in inputs.items()}
    try:
        expected, found = run_dataset(session, some, small), run_dataset(session, some, large)
    except DataError:
        return False
    return all(_equal(value, found[name]) for name, value in expected.items())


def _equal(expected: Array, found: Array) -> bool:
    if expected.shape != found.shape or expected.dtype.kind != "f":
        return bool(np.array_equal(expected, found))
    if not expected.size:
        return True
    before, after = expected.astype(np.float64), found.astype(np.float64)
    step = ROUNDING_STEPS * float(np.finfo(expected.dtype).eps)
    return float(shares(before, after, BATCH_TOLERANCE, min(step, BATCH_TOLERANCE), *scales([before])).max()) <= 1.0


def _seeded_runs(
    baseline: Session, candidate: Session, batch_size: int, length: int | None, examples: int, seed: int
) -> Iterator[tuple[dict[str, Array], dict[str, Array]]]:
    """Run both files on seeded inputs until there were enough examples; yield their outputs."""
    size = baseline.fixed_batch() or batch_size
    if baseline.fixed_batch() is None:
        larger = min(_batch_size(seeded_inputs(baseline, size, seed, length), size), max(examples, size))
        size = larger if _run_at(larger, (baseline, candidate), seed, length) else size
    for index in range(-(-examples // size)):
        feeds = seeded_inputs(baseline, size, seed + index, length)
        missing = [spec.name for spec in candidate.inputs if spec.name not in feeds]
        if missing or len(candidate.inputs) != len(feeds):
            raise DataError(
                f"{baseline.path.name!r} takes the inputs {list(feeds)} and {candidate.path.name!r} "
                f"{[spec.name for spec in candidate.inputs]}; compare two files of the same task, with the same input names."
            )
        yield (baseline.examples_first(baseline.run(feeds)), candidate.examples_first(candidate.run(feeds)))


def _run_at(size: int, sessions: Sequence[Session], seed: int, length: int | None) -> bool:
    """Tell whether files run at a batch size: some say that it is free, and hold a reshape to the size that they were exported at."""
    try:
        for session in sessions:
            session.run(seeded_inputs(session, size, seed, length))
    except DataError:
        return False
    return True


def _matched(
    baseline: Session, candidate: Session, before: Mapping[str, Array], after: Mapping[str, Array]
) -> dict[str, Array]:
    """Return the candidate's output for each of the baseline's, by name, or by place where the names are others.

    Raises:
        DataError: the number of outputs or their shapes differ.
    """
    if len(before) != len(after) or not before:
        raise DataError(
            f"{baseline.path.name!r} has {len(before)} outputs that can be compared, {candidate.path.name!r} {len(after)}; "
            "compare two files of the same task."
        )
    if set(before) != set(after):
        after = dict(zip(before, after.values(), strict=True))
    for name, value in before.items():
        if value.shape != after[name].shape:
            raise DataError(
                f"the output {name!r} has shape {value.shape} in {baseline.path.name!r} and {after[name].shape} in "
                f"{candidate.path.name!r}; compare two files of the same task."
            )
    return {name: after[name] for name in before}


def _agreed(before: Array, after: Array) -> npt.NDArray[np.bool_]:
    """Return which rows of two outputs agree."""
    if before.ndim >= 2 and before.shape[-1] > 1 and before.dtype.kind == "f":
        same_gaps = np.isnan(before).any(-1) == np.isnan(after).any(-1)
        return np.asarray((before.argmax(-1) == after.argmax(-1)) & same_gaps).reshape(-1)
    if before.dtype.kind not in "fiub":
        return np.atleast_1d(np.asarray(before == after)).reshape(-1)
    reference, other = before.astype(np.float64), after.astype(np.float64)
    with np.errstate(invalid="ignore"):
        close = np.abs(reference - other) <= AGREEMENT_TOLERANCE * largest(reference)
    same = np.atleast_1d(close | (reference == other) | (np.isnan(reference) & np.isnan(other)))
    return np.asarray(same.all(tuple(range(1, same.ndim))))


def _batch_size(inputs: Mapping[str, Array], smallest: int) -> int:
    """Return a batch size whose inputs hold about 4 MiB, at most 64 and at least `smallest`."""
    row = max(sum(array[:1].nbytes for array in inputs.values() if array.ndim), 1)
    return max(smallest, min(_LARGEST_BATCH, _BATCH_BYTES // row))
