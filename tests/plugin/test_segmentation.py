"""Anchored clusters: worked by hand, and as properties."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateurs.segmentation import anchored_clusters, removed_members

CHAIN = [
    [1.00, 0.99, 0.97, 0.90, 0.50],
    [0.99, 1.00, 0.99, 0.98, 0.60],
    [0.97, 0.99, 1.00, 0.99, 0.70],
    [0.90, 0.98, 0.99, 1.00, 0.99],
    [0.50, 0.60, 0.70, 0.99, 1.00],
]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.98, [[0, 1], [2, 3], [4]]),
        (0.95, [[0, 1, 2], [3, 4]]),
        (0.99, [[0, 1], [2, 3], [4]]),
        (1.0, [[0], [1], [2], [3], [4]]),
        (0.0, [[0, 1, 2, 3, 4]]),
    ],
)
def test_by_hand(threshold, expected):
    assert anchored_clusters(CHAIN, threshold) == expected


def test_a_layer_is_compared_with_the_anchor_and_not_with_its_neighbour():
    drift = [[1.0, 0.99, 0.9], [0.99, 1.0, 0.99], [0.9, 0.99, 1.0]]
    assert anchored_clusters(drift, 0.98) == [[0, 1], [2]]


def test_nothing_makes_no_clusters():
    assert anchored_clusters(np.zeros((0, 0)), 0.9) == []


matrices = st.integers(1, 9).flatmap(
    lambda n: st.lists(st.lists(st.floats(-0.1, 1), min_size=n, max_size=n), min_size=n, max_size=n)
)


@given(matrices, st.floats(0, 1))
def test_clusters_partition_the_layers_and_hold_the_threshold(matrix, threshold):
    clusters = anchored_clusters(matrix, threshold)
    assert [layer for cluster in clusters for layer in cluster] == list(range(len(matrix)))
    for cluster in clusters:
        assert all(matrix[cluster[0]][layer] >= threshold for layer in cluster[1:])
    for cluster, following in pairwise(clusters):
        assert matrix[cluster[0]][following[0]] < threshold


@given(matrices, st.floats(0, 1), st.integers(1, 4))
def test_removal_keeps_every_anchor_and_runs_back_to_front(matrix, threshold, k):
    clusters = anchored_clusters(matrix, threshold)
    removed = removed_members(clusters, k)
    assert removed == sorted(set(removed), reverse=True)
    for cluster in clusters:
        gone = [layer for layer in cluster if layer in removed]
        assert gone == [layer for position, layer in enumerate(cluster) if position and (position - 1) % k == 0]


@pytest.mark.parametrize(
    ("matrix", "threshold", "message"),
    [
        ([[1, 0.5]], 0.9, "square"),
        ([1.0], 0.9, "square"),
        ([[1]], 1.5, "threshold"),
        ([[1]], -0.1, "threshold"),
        ([[1]], float("nan"), "threshold"),
    ],
)
def test_wrong_arguments(matrix, threshold, message):
    with pytest.raises(ValueError, match=message):
        anchored_clusters(matrix, threshold)


def test_granularity_starts_at_one():
    with pytest.raises(ValueError, match="granularity"):
        removed_members([[0, 1]], 0)
