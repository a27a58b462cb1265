"""Partitions of layers: worked by hand, as properties, and against all partitions there are."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs.segmentation import anchored_clusters, elbow, optimal_losses, optimal_segments, removed_members

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


# --- Fisher's optimal segmentation -------------------------------------------------------------------------------------------------------


def squared_deviation(samples, partition):
    """Return the summed squared deviation from the segments' means, by two passes."""
    x = np.asarray(samples, dtype=np.float64).reshape(len(samples), -1)
    return sum(float(((x[part] - x[part].mean(0)) ** 2).sum()) for part in partition)


def partitions(size, segments):
    for cuts in combinations(range(1, size), segments - 1):
        yield [list(range(start, stop)) for start, stop in pairwise([0, *cuts, size])]


@settings(max_examples=1000)
@given(st.integers(1, 8), st.integers(1, 3), st.data())
def test_no_other_partition_is_better(size, width, data):
    values = st.floats(-1e3, 1e3)
    samples = data.draw(st.lists(st.lists(values, min_size=width, max_size=width), min_size=size, max_size=size))
    segments = data.draw(st.integers(1, size))
    found = optimal_segments(samples, segments)
    assert len(found) == segments
    assert all(found)
    assert [layer for part in found for layer in part] == list(range(size))
    best = min(squared_deviation(samples, partition) for partition in partitions(size, segments))
    assert squared_deviation(samples, found) == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert optimal_losses(samples)[segments - 1] == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_segments_far_apart_keep_their_digits():
    """Differences of prefix sums would lose the spread of 1e-3 beside the distance of 1e9."""
    samples = [0.0, 1e-3, 5e-3, 1e9, 1e9 + 1e-3, 1e9 + 5e-3]
    assert optimal_segments(samples, 4) == [[0, 1], [2], [3, 4], [5]]
    assert optimal_losses(samples)[3] == pytest.approx(2 * 2 * (0.5e-3) ** 2, rel=1e-3)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=9))
def test_the_loss_falls_to_zero(samples):
    losses = optimal_losses(samples)
    assert len(losses) == len(samples)
    assert all(after <= before + 1e-9 for before, after in pairwise(losses))
    assert losses[-1] == 0


def test_a_row_of_the_matrix_tells_more_than_its_sum():
    """Two groups of layers that are each alike and unlike the others: all column sums are the same."""
    matrix = np.kron(np.eye(2), np.ones((3, 3)))
    assert optimal_segments(matrix, 2) == [[0, 1, 2], [3, 4, 5]]
    assert np.ptp(matrix.sum(0)) == 0


@pytest.mark.parametrize("true", [1, 2, 3, 4, 6])
def test_the_elbow_finds_the_number_of_levels(true):
    noise = np.random.default_rng(true).normal(scale=0.01, size=(24, 5))
    levels = np.random.default_rng(0).normal(size=(true, 5))
    samples = np.repeat(levels, 24 // true, axis=0) + (noise if true > 1 else 0)
    losses = optimal_losses(samples)
    assert elbow(losses) == true
    assert optimal_segments(samples, true) == [
        list(range(start, start + 24 // true)) for start in range(0, 24, 24 // true)
    ]


@pytest.mark.parametrize(
    ("losses", "expected"), [([5.0], 1), ([0.0, 0.0, 0.0], 1), ([3.0, 0.0], 1), ([8.0, 0.0, 0.0, 0.0], 2)]
)
def test_the_elbow_by_hand(losses, expected):
    assert elbow(losses) == expected


@pytest.mark.parametrize(
    ("samples", "segments", "message"),
    [
        ([1.0, 2.0], 0, "from 1 to the number of samples, 2; got 0"),
        ([1.0, 2.0], 3, "from 1 to the number of samples, 2; got 3"),
        ([], 1, "shape"),
        ([[[1.0]]], 1, "shape"),
        ([1.0, float("nan")], 1, "NaN"),
    ],
)
def test_wrong_samples(samples, segments, message):
    with pytest.raises(ValueError, match=message):
        optimal_segments(samples, segments)


def test_no_losses_have_no_elbow():
    with pytest.raises(ValueError, match="losses"):
        elbow([])
