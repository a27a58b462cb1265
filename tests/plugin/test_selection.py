"""Widths and removals, as properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateurs.selection import keep_counts, keep_for_ratio, removed_units

widths = {
    "units": st.integers(1, 500),
    "min_units": st.integers(1, 600),
    "round_to": st.integers(1, 64),
}


@given(ratio=st.floats(0, 1), **widths)
def test_a_width_is_a_multiple_above_the_floor_or_all_units(units, ratio, min_units, round_to):
    keep = keep_for_ratio(units, ratio, min_units=min_units, round_to=round_to)
    assert 1 <= keep <= units
    assert keep % round_to == 0 or keep == units
    assert keep >= min(min_units, units)


@given(ratio=st.floats(0, 1), units=st.integers(1, 500), round_to=st.integers(1, 64))
def test_the_nearest_multiple_is_taken(units, ratio, round_to):
    keep = keep_for_ratio(units, ratio, round_to=round_to)
    if round_to < keep < units:
        assert abs(keep - units * ratio) <= round_to / 2 + 1e-9


@given(first=st.floats(0, 1), second=st.floats(0, 1), **widths)
def test_a_larger_ratio_never_keeps_fewer(first, second, units, min_units, round_to):
    options = {"min_units": min_units, "round_to": round_to}
    low, high = sorted((first, second))
    assert keep_for_ratio(units, low, **options) <= keep_for_ratio(units, high, **options)


@given(grid=st.integers(1, 64), **widths)
def test_the_grid_runs_down_from_all_units(units, grid, min_units, round_to):
    counts = keep_counts(units, grid, min_units=min_units, round_to=round_to)
    assert counts[0] == units
    assert counts == sorted(set(counts), reverse=True)
    assert len(counts) <= grid + 1
    assert all(keep >= min(min_units, units) and (keep % round_to == 0 or keep == units) for keep in counts)


@given(st.data())
def test_the_head_of_the_order_goes(data):
    units = data.draw(st.integers(1, 40))
    order = data.draw(st.permutations(range(units)))[: units - 1]
    keep = data.draw(st.integers(1, units))
    removed = removed_units(order, units, keep)
    assert len(removed) == units - keep
    assert list(removed) == sorted(removed)
    assert set(removed) == set(order[: units - keep])


@pytest.mark.parametrize("keep", [0, 5, -1])
def test_more_than_the_order_holds_is_refused(keep):
    with pytest.raises(ValueError, match=r"between 1 and 4"):
        removed_units([0, 1, 2], 4, keep)
