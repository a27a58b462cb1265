"""What rounding explains: how much an output varies and how large it is, whatever constants and masks stand beside it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateurs.rounding import distance, gaps, largest, masks_out, scales, shares
from secateurs_adapters import measure

LIVE = np.array([[0.5, -2.0], [1.5, 1.0], [-0.25, 4.0]])


def beside(*columns):
    return np.column_stack([LIVE, *columns])


def test_the_spread_is_the_largest_distance_from_the_first_example():
    assert scales([LIVE])[0] == 6.0
    assert scales([LIVE[:1], LIVE[1:]])[0] == 6.0, "of all batches, from the first example of the first one"


@pytest.mark.parametrize("constant", [-1e9, 1e5, -np.inf, np.inf, 0.0, 7.0])
def test_constants_beside_it_leave_the_spread_alone(constant):
    spread, usual = scales([beside(np.full(3, constant))])
    assert spread == 6.0
    assert usual == scales([LIVE])[1] == 1.25, "the median of what differs"


def test_masks_that_move_leave_the_spread_alone():
    masked = beside([0.3, -1e9, -1e9])
    assert scales([masked])[0] == 6.0
    assert np.isinf(masks_out([masked])[0]).sum() == 2
    assert largest(masked) == measure.largest(masked) == 4.0


def test_one_large_value_is_no_mask():
    assert largest(beside([0.3, 0.1, 1e9])) == 1e9


def test_a_single_example_spreads_over_its_entries_and_a_number_over_itself():
    assert scales([LIVE[:1]])[0] == 2.5
    assert scales([np.array(-3.0)])[0] == 3.0
    assert scales([np.array([np.inf])]) == (0.0, 0.0)


def test_whole_numbers_and_infinite_ones_are_equal_or_wrong():
    assert shares(np.array([1.0, np.inf]), np.array([1.0, np.inf]), 0.0, 0.0, 1.0, 1.0).max() == 0.0
    assert shares(np.array([1.0]), np.array([2.0]), 0.0, 0.0, 1.0, 1.0).max() == np.inf
    assert distance(np.array([np.inf, np.nan, 1.0]), np.array([-np.inf, np.nan, np.nan])).tolist() == [
        np.inf,
        0,
        np.inf,
    ]
    assert gaps([np.array([[np.inf], [1.0]])])[0].max() == 0.0


@given(
    st.integers(0, 10_000),
    st.sampled_from([-1e9, -np.inf, 3e5, float(np.finfo(np.float32).min)]),
    st.floats(2e-4, 10.0),
)
def test_a_wrong_entry_is_found_whatever_stands_beside_it(seed, constant, error):
    """More than the tolerance's share of the spread, however large what is constant."""
    random = np.random.default_rng(seed)
    truth = np.column_stack([random.normal(size=(5, 3)), np.full(5, constant)])
    got = truth.copy()
    spread, usual = scales([truth])
    at = random.integers(5), random.integers(3)
    got[at] += error * spread * random.choice([-1, 1])
    assert shares(truth, got, 1e-4, 32 * 1.2e-7, spread, usual).max() > 1.0


@given(st.integers(0, 10_000), st.floats(-3.0, 6.0))
def test_rounding_to_single_precision_is_always_allowed(seed, exponent):
    random = np.random.default_rng(seed)
    truth = 10.0**exponent + random.normal(size=(4, 6)) * 10.0 ** random.uniform(-6, 6)
    spread, usual = scales([truth])
    got = truth.astype(np.float32).astype(np.float64)
    assert shares(truth, got, 1e-4, 32 * 1.2e-7, spread, usual).max() <= 1.0
