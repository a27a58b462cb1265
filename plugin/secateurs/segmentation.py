"""Partitions of an ordered sequence of layers from their similarity matrix.

Anchored clusters grow from the front and compare with their first member. Fisher's optimal segmentation finds, among all partitions into K
contiguous segments, the one whose layers differ least from the means of their segments.

References:
    Hu et al. 2024, MPruner (anchored clusters); Fisher 1958, On Grouping for Maximum Homogeneity; Li et al. 2024, SGLP (segments of layers);
    Satopaa et al. 2011, Kneedle (the elbow).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["anchored_clusters", "elbow", "optimal_losses", "optimal_segments", "removed_members"]


def anchored_clusters(similarity: npt.ArrayLike, threshold: float) -> list[list[int]]:
    """Split layers into contiguous clusters, each compared with its first member (the anchor).

    Layer e joins the current cluster while `similarity[anchor, e] >= threshold`, else it starts the next one.

    Args:
        similarity: CKA matrix, shape `(L, L)`.
        threshold: in [0, 1].

    Returns:
        The clusters, in order; together they are `range(L)`.

    Raises:
        ValueError: the matrix is not square or the threshold is outside [0, 1].

    >>> anchored_clusters([[1, 0.99, 0.5], [0.99, 1, 0.99], [0.5, 0.99, 1]], 0.98)
    [[0, 1], [2]]
    """
    matrix = np.asarray(similarity, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"`similarity` must be a square matrix, got shape {matrix.shape}")
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"`threshold` must be in [0, 1], got {threshold}")
    clusters: list[list[int]] = []
    for layer in range(len(matrix)):
        if clusters and matrix[clusters[-1][0], layer] >= threshold:
            clusters[-1].append(layer)
        else:
            clusters.append([layer])
    return clusters


def removed_members(clusters: Sequence[Sequence[int]], granularity: int) -> list[int]:
    """Return the layers that granularity k removes: members 1, 1+k, 1+2k, ... of each cluster, back to front.

    >>> removed_members([[0, 1, 2, 3], [4], [5, 6]], 1)
    [6, 3, 2, 1]
    >>> removed_members([[0, 1, 2, 3], [4], [5, 6]], 2)
    [6, 3, 1]
    """
    if granularity < 1:
        raise ValueError(f"`granularity` must be at least 1, got {granularity}")
    return sorted((layer for cluster in clusters for layer in cluster[1::granularity]), reverse=True)


def optimal_segments(samples: npt.ArrayLike, segments: int) -> list[list[int]]:
    r"""Split ordered samples into contiguous segments of the least squared deviation from their means.

    Minimises $\sum_{g=1}^{K} D(g)$ with $D(i..j) = \sum_{s=i}^{j} \lVert x_s - \bar x_{i..j} \rVert^2$ by
    $L(n, k) = \min_j L(j-1, k-1) + D(j, n)$; the partition is read off the minimising $j$. Of several best ones, the one whose last
    segments start first is returned. Costs $O(K L^2)$ beside the $O(d L^2)$ of $D$.

    Args:
        samples: $x$, shape `(L,)` or `(L, d)`, in order: a row of the CKA matrix per layer, or one number.
        segments: $K$, from 1 to $L$.

    Returns:
        The segments, in order; together they are `range(L)`, and none is empty.

    Raises:
        ValueError: a shape, a value or the number of segments is not allowed.

    >>> optimal_segments([0.0, 0.1, 5.0, 5.1, 9.0], 3)
    [[0, 1], [2, 3], [4]]
    """
    deviation = _deviations(samples)
    if not 1 <= segments <= len(deviation):
        raise ValueError(f"`segments` must be from 1 to the number of samples, {len(deviation)}; got {segments}")
    _, starts = _dynamic_program(deviation, segments)
    found: list[list[int]] = []
    end = len(deviation)
    for k in range(segments - 1, -1, -1):
        start = int(starts[k, end - 1])
        found.append(list(range(start, end)))
        end = start
    return found[::-1]


def optimal_losses(samples: npt.ArrayLike) -> list[float]:
    """Return the least summed squared deviation for 1, 2, ..., L segments.

    Args:
        samples: as for `optimal_segments`.

    >>> [round(loss, 6) for loss in optimal_losses([0.0, 0.0, 3.0])]
    [6.0, 0.0, 0.0]
    """
    deviation = _deviations(samples)
    losses, _ = _dynamic_program(deviation, len(deviation))
    return [float(loss) for loss in losses[:, -1]]


def elbow(losses: Sequence[float]) -> int:
    r"""Return the number of segments at the elbow of the loss curve.

    With $x_k = (k-1)/(K_{max}-1)$ and $y_k = L(k)/L(1)$, the elbow is the first $k$ with the largest $1 - x_k - y_k$: the point farthest below
    the line from no splitting to splitting everything. A loss of zero at $k = 1$ needs no second segment.

    Args:
        losses: $L(1), ..., L(K_{max})$, falling.

    Raises:
        ValueError: there is no loss.

    >>> elbow([10.0, 4.0, 0.5, 0.4, 0.3, 0.0])
    3
    """
    if not losses:
        raise ValueError("`losses` is empty; give the loss for 1 segment at the least")
    if losses[0] <= 0 or len(losses) == 1:
        return 1
    last = len(losses) - 1
    depths = [1 - k / last - loss / losses[0] for k, loss in enumerate(losses)]
    return 1 + depths.index(max(depths))


def _deviations(samples: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return D(i..j), shape `(L, L)`, zero below the diagonal.

    All segments that end at j follow from those that end before it (Welford's update), which keeps the digits that differences of prefix sums
    lose where segments lie far apart.
    """
    x = np.asarray(samples, dtype=np.float64)
    if x.ndim not in (1, 2) or x.size == 0:
        raise ValueError(f"`samples` must have shape (L,) or (L, d) with L >= 1 and d >= 1, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("`samples` holds NaN or infinite values")
    x = x.reshape(len(x), -1)
    means = np.zeros_like(x)
    deviation = np.zeros((len(x), len(x)))
    for end in range(len(x)):
        step = x[end] - means[: end + 1]
        means[: end + 1] += step / np.arange(end + 1, 0, -1)[:, None]
        deviation[: end + 1, end] = (step * (x[end] - means[: end + 1])).sum(1)
        if end:
            deviation[:end, end] += deviation[:end, end - 1]
    return deviation


def _dynamic_program(
    deviation: npt.NDArray[np.float64], segments: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return L(n, k) and the start of the last segment, shape `(K, L)` each: row k - 1, column of the last sample."""
    size = len(deviation)
    losses = np.full((segments, size), np.inf)
    starts = np.zeros((segments, size), dtype=np.int64)
    losses[0] = deviation[0]
    for k in range(1, segments):
        for end in range(k, size):
            options = losses[k - 1, k - 1 : end] + deviation[k : end + 1, end]
            best = int(options.argmin())
            losses[k, end], starts[k, end] = options[best], best + k
    return losses, starts
