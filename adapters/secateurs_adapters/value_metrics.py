"""Figures of merit that are no share of examples: perplexity, errors and correlations of values, and the overlap of maps.

All are computed by torchmetrics, on the network's first output. None has an exact interval, so none can be judged with
`budget.accuracy_confidence`.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from secateurs.data import IGNORED
from secateurs.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["MeanAbsoluteError", "MeanIoU", "MeanSquaredError", "Perplexity", "Spearman"]

Array = npt.NDArray[Any]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torchmetrics says on import about packages that it could use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Whole:
    """A metric of all examples together."""

    name: ClassVar[str]
    higher_is_better: ClassVar[bool] = True

    def per_example(self, outputs: Array, labels: Array) -> npt.NDArray[np.bool_] | None:  # noqa: ARG002
        """Return None: it is no share of examples."""
        return None


class Perplexity(_Whole):
    r"""Exponential of the mean negative log-likelihood of the tokens to be predicted, $\exp(-\frac1N\sum_t \log p(y_t\mid x_{\le t}))$.

    Labels, shape `(n, length)`, are what each position is to predict, as recovery and accuracy take them: in a causal model
    the *next* token (`next_token: true` of the source `hf`), not the inputs as they are. Labels of -100 (padding, the last
    token) do not count. Lower is better; a drop is a difference of perplexities.
    """

    name = "perplexity"
    higher_is_better = False

    def value(self, outputs: Array, labels: Array) -> float:
        """Return the perplexity, at least 1.

        Args:
            outputs: scores of the vocabulary, shape `(n, length, vocabulary)`.
            labels: indices of the tokens to be predicted, shape `(n, length)`.
        """
        _integers(self.name, labels)
        if outputs.ndim != 3 or outputs.shape[:2] != labels.shape:
            raise DataError(
                f"metric {self.name!r} needs outputs of shape (n, length, vocabulary) and labels of shape (n, length), got "
                f"{outputs.shape} and {labels.shape}; give the token that each position is to predict as its label."
            )
        _in_range(self.name, labels, outputs.shape[-1])
        with _quiet():
            from torchmetrics.functional.text import perplexity

            scores, tokens = _tensor(outputs, np.float32), _tensor(labels, np.int64)
            return float(perplexity(scores, tokens, ignore_index=IGNORED))


class _OfValues(_Whole):
    """A metric of one value per example, or of several at equal weight."""

    def value(self, outputs: Array, labels: Array) -> float:
        """Return the metric.

        Args:
            outputs: shape of the labels, or with a last axis of one more.
            labels: the true values, floats or integers.
        """
        if outputs.shape == (*labels.shape, 1):
            outputs = outputs[..., 0]
        if outputs.shape != labels.shape or labels.dtype.kind not in "fiu":
            raise DataError(
                f"metric {self.name!r} needs one value per label, got outputs {outputs.shape} and labels {labels.shape} of "
                f"{labels.dtype}; choose another metric, or labels of the outputs' shape."
            )
        with _quiet():
            return float(self._of(_tensor(outputs, np.float64).reshape(-1), _tensor(labels, np.float64).reshape(-1)))

    def _of(self, predicted: Tensor, truth: Tensor) -> Tensor:
        raise NotImplementedError


class MeanSquaredError(_OfValues):
    """Mean squared difference from the labels, in their unit squared; lower is better."""

    name = "mean-squared-error"
    higher_is_better = False

    def _of(self, predicted: Tensor, truth: Tensor) -> Tensor:
        from torchmetrics.functional.regression import mean_squared_error

        return mean_squared_error(predicted, truth)


class MeanAbsoluteError(_OfValues):
    """Mean absolute difference from the labels, in their unit; lower is better."""

    name = "mean-absolute-error"
    higher_is_better = False

    def _of(self, predicted: Tensor, truth: Tensor) -> Tensor:
        from torchmetrics.functional.regression import mean_absolute_error

        return mean_absolute_error(predicted, truth)


class Spearman(_OfValues):
    """Spearman's rank correlation with the labels, in [-1, 1]: of similarity scores, say."""

    name = "spearman"

    def _of(self, predicted: Tensor, truth: Tensor) -> Tensor:
        from torchmetrics.functional.regression import spearman_corrcoef

        return spearman_corrcoef(predicted, truth)


class MeanIoU(_Whole):
    """Mean over classes of intersection over union of predicted and true pixels, over all images together (mIoU).

    A class in neither labels nor predictions does not count, and neither do pixels labelled -100; pixels with a NaN among their
    scores are wrong. Scores of a lower resolution than the labels are interpolated bilinearly first, as the authors of
    SegFormer evaluate theirs.
    """

    name = "mean-iou"

    def value(self, outputs: Array, labels: Array) -> float:
        """Return the mean IoU in [0, 1].

        Args:
            outputs: scores of the classes, shape `(n, classes, height, width)`.
            labels: class indices, shape `(n, height, width)`, of that size or a larger one.
        """
        _integers(self.name, labels)
        if outputs.ndim != 4 or labels.ndim != 3 or len(outputs) != len(labels) or outputs.shape[1] < 2:
            raise DataError(
                f"metric {self.name!r} needs outputs of shape (n, classes, height, width) and labels of shape (n, height, width), "
                f"got {outputs.shape} and {labels.shape}; transpose them."
            )
        _in_range(self.name, labels, outputs.shape[1])
        with _quiet():
            from torch.nn import functional
            from torchmetrics.functional.classification import multiclass_jaccard_index

            scores, classes = _tensor(outputs, np.float32), _tensor(labels, np.int64)
            if scores.shape[2:] != classes.shape[1:]:
                scores = functional.interpolate(scores, classes.shape[1:], mode="bilinear", align_corners=False)
            # Where a score is NaN, any class but the right one.
            chosen = scores.argmax(1).where(~scores.isnan().any(1), (classes + 1) % scores.shape[1])
            found = multiclass_jaccard_index(chosen, classes, num_classes=scores.shape[1], ignore_index=IGNORED)
            return float(found)


def _tensor(array: Array, kind: type[np.generic]) -> Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array, dtype=kind))


def _integers(name: str, labels: Array) -> None:
    if labels.dtype.kind not in "iu":
        raise DataError(f"metric {name!r} needs integer labels, got {labels.dtype}; give class or token indices.")


def _in_range(name: str, labels: Array, classes: int) -> None:
    counted = labels[labels != IGNORED]
    if not counted.size:
        raise DataError(f"metric {name!r}: every label is {IGNORED}, which counts for nothing; give labels.")
    if not 0 <= int(counted.min()) <= int(counted.max()) < classes:
        raise DataError(
            f"metric {name!r}: labels go from {counted.min()} to {counted.max()}, but the network has {classes} classes; labels "
            f"must lie in 0 to {classes - 1}, or be {IGNORED} where they do not count."
        )
