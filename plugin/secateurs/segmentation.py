"""Partitions of an ordered sequence of layers from their similarity matrix.

References:
    MPruner (Hu et al. 2024): contiguous clusters compared with their first member.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["anchored_clusters", "removed_members"]


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
