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
from secateurs_adapters.session import Session, run_dataset, seeded_inputs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from secateurs.data import Dataset
    from secateurs.interfaces import Metric

__all__ = ["Comparison", "agreement", "compare_accuracy", "score"]

Array = npt.NDArray[Any]

SEEDED_BATCHES = 256
"""Seeded batches are drawn until they hold this many examples."""
AGREEMENT_TOLERANCE = 1e-2
"""Outputs that are not class scores agree within this share of the baseline's largest absolute output."""
_BATCH_BYTES = 4 * 1024 * 1024
_LARGEST_BATCH = 64


@dataclass(frozen=True)
class Comparison:
    """The metric of both files, and the drop from baseline to candidate (positive is worse), with the pairs behind it."""

    baseline: Accuracy
    candidate: Accuracy
    drop: Estimate
    pairs: Pairs | None = None


def compare_accuracy(
    baseline: Session, candidate: Session, evaluation: Dataset, metric: Metric, *, batch_size: int = 1
) -> Comparison:
    """Run the evaluation data through both files and compare their metric.

    Args:
        baseline: session of the baseline file.
        candidate: session of the candidate file.
        evaluation: labelled examples.
        metric: what is computed of each file's first output.
        batch_size: smallest batch to run at; small examples are run in larger ones.

    Returns:
        Both metrics and the drop, as fractions; baseline minus candidate where higher is better, else the reverse.

    Raises:
        DataError: there are no labels, or data, files and metric do not fit each other.
    """
    if evaluation.labels is None:
        raise DataError(
            f"data set {evaluation.origin!r} has no labels, and metric {metric.name!r} needs one per example; add "
            "labels."
        )
    size = _batch_size(evaluation.inputs, batch_size)
    before = _first(run_dataset(baseline, evaluation.inputs, size))
    after = _first(run_dataset(candidate, evaluation.inputs, size))
    first, right_before = score(metric, before, evaluation.labels)
    second, right_after = score(metric, after, evaluation.labels)
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
    seed: int = 0,
) -> float:
    """Return the share of examples on which the first outputs of two files agree.

    Class scores (two axes or more, at least two wide) agree where their largest entry is the same; other outputs
    where they differ by at most 1 % of the baseline's largest absolute output.

    Args:
        baseline: session of the baseline file.
        candidate: session of the candidate file.
        inputs: what to run them on; None makes seeded inputs from the baseline's signature.
        batch_size: examples per run of the seeded inputs.
        seed: of the seeded inputs.

    Raises:
        DataError: the files take different inputs, or return different shapes.
    """
    if inputs is None:
        inputs = _seeded(baseline, batch_size, seed)
    size = _batch_size(inputs, batch_size)
    before, after = _first(run_dataset(baseline, inputs, size)), _first(run_dataset(candidate, inputs, size))
    if before.shape != after.shape:
        raise DataError(
            f"the first output has shape {before.shape} in {baseline.path.name!r} and {after.shape} in "
            f"{candidate.path.name!r}; compare two files of the same task."
        )
    if before.ndim >= 2 and before.shape[-1] > 1:
        return float((before.argmax(-1) == after.argmax(-1)).mean())
    reference = before.astype(np.float64)
    allowed = AGREEMENT_TOLERANCE * np.abs(reference).max()
    close = np.abs(reference - after.astype(np.float64)) <= allowed
    return float(close.reshape(len(close), -1).all(1).mean())


def _seeded(session: Session, batch_size: int, seed: int) -> dict[str, Array]:
    size = session.fixed_batch() or batch_size
    wanted = (
        max(_batch_size(seeded_inputs(session, size, seed), size), SEEDED_BATCHES) if size < SEEDED_BATCHES else size
    )
    parts = [seeded_inputs(session, size, seed + index) for index in range(-(-wanted // size))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _batch_size(inputs: Mapping[str, Array], smallest: int) -> int:
    """Return a batch size whose inputs hold about 4 MiB, at most 64 and at least `smallest`."""
    row = max(sum(array[:1].nbytes for array in inputs.values()), 1)
    return max(smallest, min(_LARGEST_BATCH, _BATCH_BYTES // row))


def _first(outputs: Mapping[str, Array]) -> Array:
    return next(iter(outputs.values()))
