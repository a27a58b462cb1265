"""Figures of merit of classifiers, of examples or of tokens: accuracy, top-5 accuracy and macro F1."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from secateurs.data import IGNORED
from secateurs.errors import DataError

__all__ = ["Accuracy", "F1Macro", "TopFiveAccuracy", "accuracy"]

Array = npt.NDArray[Any]


class Accuracy:
    """Share of examples whose largest score is the label's; classes on the last axis.

    An example with a NaN among its scores is wrong. Labels with an axis more than one per example (one per token, say) give
    the share over all labels but those of -100.

    >>> import numpy as np
    >>> Accuracy().value(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 0]))
    0.5
    """

    name: str = "accuracy"
    higher_is_better: bool = True
    top: int = 1

    def per_example(self, outputs: Array, labels: Array) -> npt.NDArray[np.bool_] | None:
        """Return whether each example is right, or None where there are several labels per example."""
        hits = self._hits(outputs, labels)
        return hits if hits.ndim == 1 else None

    def value(self, outputs: Array, labels: Array) -> float:
        """Return the share of labels that are right, in [0, 1]."""
        return float(self._hits(outputs, labels)[_counted(labels)].mean())

    def _hits(self, outputs: Array, labels: Array) -> npt.NDArray[np.bool_]:
        _check(self.name, outputs, labels)
        known = ~np.isnan(outputs).any(-1)
        if self.top == 1:
            return np.asarray((outputs.argmax(-1) == labels) & known, dtype=np.bool_)
        signed = outputs if outputs.dtype.kind == "f" else outputs.astype(np.int64)
        # Ranked stably, so that ties go to the lower class as argmax has it.
        best = np.argsort(-signed, axis=-1, kind="stable")[..., : self.top]
        return np.asarray((best == labels[..., None]).any(-1) & known, dtype=np.bool_)


class TopFiveAccuracy(Accuracy):
    """Share of examples whose label is among the five largest scores."""

    name: str = "top5-accuracy"
    top: int = 5


class F1Macro:
    """Mean over classes of the harmonic mean of precision and recall.

    A class in neither labels nor predictions does not count, and neither does a token labelled -100. An example with a NaN among its scores
    is wrong.
    """

    name: str = "f1-macro"
    higher_is_better: bool = True

    def per_example(self, outputs: Array, labels: Array) -> npt.NDArray[np.bool_] | None:  # noqa: ARG002
        """Return None: it is not a mean over examples."""
        return None

    def value(self, outputs: Array, labels: Array) -> float:
        """Return the macro F1 in [0, 1], by torchmetrics."""
        _check(self.name, outputs, labels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch
            from torchmetrics.functional.classification import multiclass_f1_score

            counted = _counted(labels)
            right = labels[counted].astype(np.int64)
            unknown = np.asarray(np.isnan(outputs).any(-1))[counted]
            # Where a score is NaN, any class but the right one.
            chosen = np.where(unknown, (right + 1) % outputs.shape[-1], outputs.argmax(-1)[counted])
            predicted, truth = torch.from_numpy(chosen), torch.from_numpy(right)
            return float(multiclass_f1_score(predicted, truth, num_classes=outputs.shape[-1], average="macro"))


accuracy = Accuracy()


def _counted(labels: Array) -> npt.NDArray[np.bool_]:
    """Return which labels count: all of one per example, and of several those that are not `IGNORED`."""
    return np.ones(labels.shape, np.bool_) if labels.ndim < 2 else np.asarray(labels != IGNORED, np.bool_)


def _check(name: str, outputs: Array, labels: Array) -> None:
    if labels.dtype.kind not in "iub":
        raise DataError(
            f"metric {name!r} needs integer class labels, got {labels.dtype}; give the class index of each example."
        )
    if outputs.ndim < 2 or outputs.shape[:-1] != labels.shape or outputs.shape[-1] < 2:
        raise DataError(
            f"metric {name!r} needs outputs of shape (*labels, classes) with at least 2 classes, got outputs "
            f"{outputs.shape} and labels {labels.shape}; choose another metric, or return class scores first."
        )
    counted = labels[_counted(labels)]
    if labels.size and not counted.size:
        raise DataError(f"metric {name!r}: every label is {IGNORED}, which counts for nothing; give labels.")
    if labels.size and not 0 <= int(counted.min()) <= int(counted.max()) < outputs.shape[-1]:
        raise DataError(
            f"metric {name!r}: labels go from {counted.min()} to {counted.max()}, but the network has "
            f"{outputs.shape[-1]} classes; labels must lie in 0 to {outputs.shape[-1] - 1}."
        )
