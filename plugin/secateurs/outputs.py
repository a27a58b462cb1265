r"""What predictions say: as rows of classes or as measured values, how far two of them are apart, and how wrong one is.

A prediction is classes where its class axis is wider than one: axis 1 of maps, shape `(n, classes, height, width)` or with three axes of space,
else the last axis, shape `(n, classes)` or `(n, length, classes)`. Where it is one wide, a prediction is a value: of a regression, or the
logit of a single class. A softmax over one class is constant, so values are compared as the means of Gaussians instead.

References:
    Hinton et al. 2015, Distilling the knowledge in a neural network (temperature).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from secateurs.data import IGNORED

__all__ = [
    "joined",
    "kl_divergence",
    "label_loss",
    "own_labels",
    "prediction_rows",
    "sampled_loss",
    "soft_loss",
    "unsure_temperature",
]


def prediction_rows(prediction: Tensor) -> Tensor:
    """Return predictions as rows, one for each example, token or pixel, with classes on the last axis.

    Args:
        prediction: shape `(n, classes)`, `(n, length, classes)`, `(n, classes, *space)` with two or three axes of space, or `(n,)`.

    >>> prediction_rows(torch.zeros(2, 21, 8, 8)).shape
    torch.Size([128, 21])
    """
    if prediction.ndim < 2:
        return prediction.reshape(-1, 1)
    classes = prediction.movedim(1, -1) if prediction.ndim > 3 else prediction
    return classes.reshape(-1, classes.shape[-1])


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the predictions of several batches as one, along the first axis.

    Where that is not the axis of the examples, as in `(length, n, classes)`, batches of several sizes are joined as rows; scalars are stacked.

    >>> joined([torch.zeros(7, 4, 3), torch.zeros(7, 2, 3)]).shape
    torch.Size([42, 3])
    """
    if parts[0].ndim == 0:
        return torch.stack(list(parts))
    alike = len({part.shape[1:] for part in parts}) == 1
    return torch.cat(list(parts) if alike else [prediction_rows(part) for part in parts])


def own_labels(prediction: Tensor) -> Tensor:
    """Return what a prediction says: the class of each example, token or pixel, in the shape without the class axis; or the values.

    >>> own_labels(torch.tensor([[0.1, 0.9], [0.8, 0.2]])).tolist()
    [1, 0]
    """
    rows = prediction_rows(prediction)
    said = rows.squeeze(-1) if rows.shape[-1] == 1 else rows.argmax(-1)
    if prediction.ndim < 2:
        return said
    return said.reshape(prediction.shape[:1] + prediction.shape[2:] if prediction.ndim > 3 else prediction.shape[:-1])


def kl_divergence(reference: Tensor, candidate: Tensor, temperature: float = 1.0) -> float:
    r"""Return the mean over rows of $T^2\,\mathrm{KL}(\mathrm{softmax}(r/T)\,\|\,\mathrm{softmax}(c/T))$, in nats.

    For values: the divergence $(r - c)^2 / 2\sigma^2$ of Gaussians around them, with the variance $\sigma^2$ of $r$, or $r^2$ of a single one.

    Args:
        reference: logits $r$; see the module's docstring.
        candidate: logits $c$, same shape.
        temperature: $T$; the factor keeps small differences comparable (Hinton et al. 2015).

    Returns:
        Infinity where a logit of the candidate is not finite, so that a broken network is never preferred.
    """
    r, c = prediction_rows(reference.double()), prediction_rows(candidate.double())
    if r.shape[-1] == 1:
        error, spread = (r - c).square().mean(), r.var(correction=0) if len(r) > 1 else r.square().mean()
        value = float(error / (2 * spread)) if spread > 0 else math.inf if error > 0 else float(error)
    else:
        p, q = torch.log_softmax(r / temperature, -1), torch.log_softmax(c / temperature, -1)
        value = temperature**2 * float((p.exp() * (p - q)).sum(-1).mean())
    return value if value == value else math.inf


def unsure_temperature(reference: Tensor, *, share: float = 0.2, highest: float = 16.0) -> float:
    r"""Return the least power of two at which the mean entropy of $\mathrm{softmax}(r/T)$ is a share of its maximum; 1 for values.

    A network is nearly certain on examples that it has learned by heart, and a divergence at $T = 1$ then sees little but its few doubts: on
    CIFAR-10 it undervalues what pruning early layers does to new images five times as much as what pruning late layers does.

    Args:
        reference: logits $r$; see the module's docstring.
        share: of the logarithm of the number of classes.
        highest: where the search ends.
    """
    rows, temperature = prediction_rows(reference.double()), 1.0
    if rows.shape[-1] == 1:
        return temperature
    most = math.log(rows.shape[-1])
    while temperature < highest:
        p = torch.log_softmax(rows / temperature, -1)
        if float(-(p.exp() * p).sum(-1).mean()) >= share * most:
            break
        temperature *= 2
    return temperature


def label_loss(rows: Tensor, labels: Tensor) -> Tensor:
    """Return the sum over rows of the cross-entropy of class labels, or of the squared error where labels are floats; `IGNORED` counts 0.

    Args:
        rows: shape `(rows, classes)`, from `prediction_rows`.
        labels: one per row, in any shape.
    """
    if labels.is_floating_point():
        return F.mse_loss(rows.reshape(-1), labels.to(rows).reshape(-1), reduction="sum")
    return F.cross_entropy(rows, labels.long().reshape(-1), ignore_index=IGNORED, reduction="sum")


def soft_loss(rows: Tensor, target: Tensor, temperature: float) -> Tensor:
    r"""Return, for each row, $T^2\,\mathrm{KL}(\mathrm{softmax}(t/T)\,\|\,\mathrm{softmax}(r/T))$, or half the squared error of a value.

    Args:
        rows: what learns, shape `(rows, classes)`.
        target: what it learns from, same shape.
        temperature: $T$.
    """
    if rows.shape[-1] == 1:
        return 0.5 * (rows - target.to(rows)).square().sum(-1)
    softened = F.log_softmax(rows / temperature, -1), F.log_softmax(target.to(rows) / temperature, -1)
    return temperature**2 * F.kl_div(*softened, log_target=True, reduction="none").sum(-1)


def sampled_loss(rows: Tensor) -> Tensor:
    """Return the sum over rows of the loss of labels drawn from the predictions themselves: classes, or values with unit variance."""
    if rows.shape[-1] == 1:
        drawn = rows.detach() + torch.randn_like(rows)
        return 0.5 * (rows - drawn).square().sum()
    return label_loss(rows, torch.distributions.Categorical(logits=rows.detach()).sample())
