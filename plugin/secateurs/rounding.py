"""How far numbers may differ by rounding alone: by how much they vary, and by their own size, whatever constants stand beside them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["ROUNDING_STEPS", "Floats", "distance", "gaps", "largest", "masks_out", "scales", "shares"]

Floats = npt.NDArray[np.float64]

ROUNDING_STEPS = 32
"""Rounding steps that are allowed of a number's type and size; sums round by the size of what they add."""
_FAR = 1000.0
"""Values that are this many times larger than all others, and equal to one part in as many, fill in for a mask."""


def gaps(values: Sequence[Floats]) -> list[Floats]:
    """Return how far the entries of an array differ from those of its first example; 0 where one is not finite."""
    first: dict[tuple[int, ...], Floats] = {}
    found = []
    for value in values:
        if not value.ndim or not value.size:
            found.append(np.zeros_like(value))
            continue
        with np.errstate(invalid="ignore", over="ignore"):
            gap = np.abs(value - first.setdefault(value.shape[1:], value[:1]))
        found.append(np.where(np.isfinite(gap), gap, 0.0))
    return found


def masks_out(values: Sequence[Floats]) -> Sequence[Floats]:
    """Return an output with infinity for what fills in for a mask: large values that are all but equal, far from the rest."""
    sizes = np.abs(_finite(values))
    fill = sizes.max(initial=0.0) * (1.0 - 1.0 / _FAR)
    others = sizes[sizes < fill]
    if sizes.size > others.size + 1 and others.size and others.max() * _FAR < fill:
        return masks_out([np.where(np.abs(value) < fill, value, np.inf) for value in values])
    return values


def _finite(values: Sequence[Floats]) -> Floats:
    flat = np.concatenate([value.ravel() for value in values])
    finite: Floats = flat[np.isfinite(flat)]
    return finite


def largest(value: Floats) -> float:
    """Return the largest absolute value that is finite and fills in for no mask."""
    return float(np.abs(_finite(masks_out([value]))).max(initial=0.0))


def scales(values: Sequence[Floats], varied: bool = True) -> tuple[float, float]:
    r"""Return how far the values of an output differ, between examples if these do, and how large they are as a rule.

    The first is $s = \max |v - v_0|$ over finite entries, with $v_0$ of the first example; where nothing differs between examples, the range
    of the entries. The second is the median of $|v|$ over what differs, at least $\min(1, \max |v|) / 8$: sigmoid and its like are computed to
    a few rounding steps of 1, not of the result.

    Args:
        values: an output, for one batch after the other; examples are on axis 0.
        varied: whether the inputs of the examples differ.
    """
    least = min(1.0, float(np.abs(_finite(values)).max(initial=0.0))) / 8
    values = masks_out(values)
    known = _finite(values)
    if not known.size:
        return 0.0, least
    differing = gaps(values)
    if varied and any(gap.any() for gap in differing):
        live = np.concatenate([np.abs(value[gap > 0.0]) for value, gap in zip(values, differing, strict=True)])
        return max(float(gap.max(initial=0.0)) for gap in differing), max(least, float(np.median(live)))
    sizes = np.abs(known)
    return float(np.ptp(known)) or float(sizes.max()), max(least, float(np.median(sizes)))


def shares(truth: Floats, got: Floats, tolerance: float, step: float, spread: float, usual: float) -> Floats:
    r"""Return each difference as a share of what is allowed, $\tau s + \epsilon \max(|v|, m)$; infinite where nothing is.

    Args:
        truth: what it should be, $v$.
        got: what it is.
        tolerance: $\tau$.
        step: $\epsilon$, share of its own size that a number may be wrong by.
        spread: $s$, the first of `scales`.
        usual: $m$, the second.
    """
    size = np.where(np.isfinite(truth), np.abs(truth), 0.0)
    difference = distance(truth, got)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0.0, 0.0, difference / (tolerance * spread + step * np.maximum(size, usual)))


def distance(truth: Floats, got: Floats) -> Floats:
    """Return the absolute differences; infinite where one side is not finite and the other is not the same."""
    same = (truth == got) | (np.isnan(truth) & np.isnan(got))
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.where(same, 0.0, np.abs(truth - got))
    return np.where(np.isnan(difference), np.inf, difference)
