"""Intervals and p-values against scipy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from secateurs.intervals import (
    _beta_quantile,
    _chance_of_at_most,
    _incomplete_beta,
    binomial_interval,
    mcnemar_p_value,
    paired_difference_interval,
    student_interval,
)

positive = st.floats(0.05, 500)
confidences = st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99, 0.999])


@given(a=positive, b=positive, x=st.floats(0, 1))
def test_incomplete_beta(a, b, x):
    assert _incomplete_beta(a, b, x) == pytest.approx(special.betainc(a, b, x), rel=1e-9, abs=1e-12)


@given(a=st.floats(0.5, 500), b=st.floats(0.5, 500), p=st.floats(1e-4, 1 - 1e-4))
def test_beta_quantile(a, b, p):
    assert _beta_quantile(p, a, b) == pytest.approx(stats.beta.ppf(p, a, b), rel=1e-8)


@st.composite
def counts(draw):
    trials = draw(st.integers(1, 5000))
    return draw(st.integers(0, trials)), trials


@given(counts(), confidences)
def test_binomial_interval(count, confidence):
    successes, trials = count
    exact = stats.binomtest(successes, trials).proportion_ci(confidence, method="exact")
    assert binomial_interval(successes, trials, confidence) == pytest.approx((exact.low, exact.high), abs=1e-9)


@pytest.mark.parametrize(("successes", "trials"), [(91_234, 100_000), (1, 1_000_000), (0, 50_000), (50_000, 50_000)])
def test_binomial_interval_of_large_samples(successes, trials):
    exact = stats.binomtest(successes, trials).proportion_ci(0.95, method="exact")
    assert binomial_interval(successes, trials) == pytest.approx((exact.low, exact.high), rel=1e-7, abs=1e-12)


@given(lost=st.integers(0, 60), gained=st.integers(0, 60), same=st.integers(0, 500), confidence=confidences)
def test_paired_difference_surrounds_the_drop_and_mirrors(lost, gained, same, confidence):
    trials = lost + gained + same
    if not trials:
        return
    low, high = paired_difference_interval(lost, gained, trials, confidence)
    assert -1 <= low <= (lost - gained) / trials <= high <= 1
    assert paired_difference_interval(gained, lost, trials, confidence) == pytest.approx((-high, -low), abs=1e-6)
    if lost == gained:
        assert low < 0 < high, "no number of examples proves that nothing is ever lost"


@pytest.mark.parametrize(("trials", "confidence"), [(5, 0.8), (12, 0.95), (20, 0.9)])
def test_paired_difference_holds_at_least_as_often_as_it_says(trials, confidence):
    """By the exact chance of every outcome, for losses and gains of every likelihood."""
    outcomes = [(lost, gained) for lost in range(trials + 1) for gained in range(trials + 1 - lost)]
    ends = np.array([paired_difference_interval(*outcome, trials, confidence) for outcome in outcomes])
    counts = np.array([(lost, gained, trials - lost - gained) for lost, gained in outcomes])
    for p_lost, p_gained in [
        (0, 0),
        (0.01, 0),
        (0.05, 0.05),
        (0.2, 0.1),
        (0.1, 0.4),
        (0.5, 0.5),
        (0.33, 0.33),
        (0.9, 0),
    ]:
        chances = stats.multinomial.pmf(counts, trials, [p_lost, p_gained, 1 - p_lost - p_gained])
        drop = p_lost - p_gained
        for missed in (ends[:, 0] > drop + 1e-7, ends[:, 1] < drop - 1e-7):
            assert chances[missed].sum() <= (1 - confidence) / 2, (p_lost, p_gained)


@pytest.mark.parametrize(
    ("lost", "gained", "trials"), [(60, 40, 1_000), (600, 550, 10_000), (30_000, 29_000, 1_000_000)]
)
def test_paired_difference_is_near_the_normal_interval_of_many_pairs(lost, gained, trials):
    low, high = paired_difference_interval(lost, gained, trials)
    drop, half = (lost - gained) / trials, 1.96 * np.sqrt(lost + gained - (lost - gained) ** 2 / trials) / trials
    assert half < high - drop < 1.25 * half
    assert half < drop - low < 1.25 * half


SHARES = st.just(0.0) | st.floats(1e-9, 1)
"""Of probabilities: SciPy's binomial overflows at those next to nothing."""


@given(st.integers(1, 40), SHARES, SHARES, st.data())
def test_the_chance_of_a_net_loss_is_the_trinomial_one(trials, share, part, data):
    drop, net = share * (2 * part - 1), data.draw(st.integers(-trials, trials))
    pairs = np.arange(trials + 1)
    expected = (stats.binom.pmf(pairs, trials, share) * stats.binom.cdf((pairs + net) // 2, pairs, part)).sum()
    assert _chance_of_at_most(net, trials, drop, np.array([share])) == pytest.approx([expected], abs=1e-9)


@given(lost=st.integers(0, 300), gained=st.integers(0, 300))
def test_mcnemar(lost, gained):
    expected = stats.binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert mcnemar_p_value(lost, gained) == pytest.approx(expected, rel=1e-9)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30), confidences)
def test_student_interval(values, confidence):
    sem = stats.sem(values)
    if sem < 1e-9:
        return
    expected = stats.t.interval(confidence, len(values) - 1, loc=np.mean(values), scale=sem)
    assert student_interval(values, confidence) == pytest.approx(expected, rel=1e-6, abs=1e-6 * sem)


def test_student_interval_of_equal_values_is_a_point():
    assert student_interval([2.5, 2.5, 2.5]) == (2.5, 2.5)


@pytest.mark.parametrize("values", [[], [1.0]], ids=["none", "one"])
def test_student_interval_needs_two_values(values):
    with pytest.raises(ValueError, match="at least 2 values"):
        student_interval(values)
