"""Exact and small-sample confidence intervals, without a statistics package in the core.

Binomial intervals are Clopper and Pearson's; the interval of a paired difference is unconditional (Berger and Boos); means of few values use
Student's t. All three need quantiles of the beta distribution, found by bisection on the regularised incomplete beta function (continued
fraction, Lentz's method).

References:
    Clopper and Pearson 1934; Berger and Boos 1994; McNemar 1947; Press et al., Numerical Recipes, section 6.4.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["binomial_interval", "mcnemar_p_value", "paired_difference_interval", "student_interval"]


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b)."""
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 1.0
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - _incomplete_beta(b, a, 1.0 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1.0)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    fraction = d
    for m in range(1, 1000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 + numerator * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + numerator / c
            c = c if abs(c) > tiny else tiny
            fraction *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return front * fraction


def _beta_quantile(probability: float, a: float, b: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        if _incomplete_beta(a, b, middle) < probability:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def binomial_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a proportion.

    >>> low, high = binomial_interval(915, 1000)
    >>> round(low, 4), round(high, 4)
    (0.896, 0.9315)
    """
    tail = (1.0 - confidence) / 2.0
    low = 0.0 if successes == 0 else _beta_quantile(tail, successes, trials - successes + 1)
    high = 1.0 if successes == trials else _beta_quantile(1.0 - tail, successes + 1, trials - successes)
    return low, high


def paired_difference_interval(lost: int, gained: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of the accuracy drop on the same examples: the chance to lose an example minus the chance to gain one.

    A drop D is kept in the interval while an outcome at least as far from it as (`lost` - `gained`) / `trials` has a chance of
    (1 - `confidence`) / 2 or more, for some share of discordant pairs inside a Clopper-Pearson interval of that share. That inner
    interval's own error, a twentieth of the whole, is paid for (Berger and Boos), so the interval holds at least as often as it says.
    Unlike intervals that condition on the discordant pairs, it is open where no pair, or only losses, were seen.

    Args:
        lost: examples that only the baseline gets right.
        gained: examples that only the candidate gets right.
        trials: all examples.
        confidence: two-sided.

    Returns:
        Lower and upper end, as fractions of `trials`, to 1e-7.

    References:
        Berger and Boos, P values maximized over a confidence set for the nuisance parameter, JASA 89, 1994.

    >>> low, high = paired_difference_interval(0, 0, 1000)
    >>> round(low, 4), round(high, 4)
    (-0.0052, 0.0052)
    """
    inner = (1.0 - confidence) / 20.0
    shares = binomial_interval(lost + gained, trials, 1.0 - inner)
    tail = (1.0 - confidence - inner) / 2.0
    return -_upper_drop(gained - lost, trials, shares, tail), _upper_drop(lost - gained, trials, shares, tail)


def _upper_drop(net: int, trials: int, shares: tuple[float, float], tail: float) -> float:
    """Return the largest drop under which `net` losses or fewer have a chance of `tail` at some share of discordant pairs."""
    low, high = net / trials, shares[1]
    while high - low > 1e-7:
        drop = 0.5 * (low + high)
        between = np.linspace(max(abs(drop), shares[0]), max(abs(drop), shares[1]), 9)
        if _chance_of_at_most(net, trials, drop, between).max() >= tail:
            low = drop
        else:
            high = drop
    return high


def _chance_of_at_most(net: int, trials: int, drop: float, shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return P(losses - gains <= `net`) for each share of discordant pairs, by inverting the characteristic function of their sum."""
    reach = int(12.0 * math.sqrt(trials * shares.max()) + 60.0)
    centre = round(trials * drop)
    size = 2 * min(reach + abs(net - centre), 2 * trials) + 1
    turn = 2.0 * np.pi * np.fft.rfftfreq(size)
    cosine, sine = np.cos(turn), np.sin(turn)
    share = shares[:, None]
    step = (1.0 - share + share * cosine) + 1j * (drop * sine)
    chances = np.fft.irfft(np.conj(step**trials * np.exp(-1j * turn * (centre - size // 2))), n=size, axis=1)
    return np.asarray(chances[:, : max(0, net - centre + size // 2 + 1)].sum(1), dtype=np.float64)


def mcnemar_p_value(lost: int, gained: int) -> float:
    """Exact two-sided McNemar test that losses and gains are equally likely.

    >>> round(mcnemar_p_value(10, 2), 4)
    0.0386
    """
    discordant, fewer = lost + gained, min(lost, gained)
    if discordant == 0:
        return 1.0
    tail = sum(math.comb(discordant, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / (1 << discordant))


def student_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of a few values; needs at least two.

    >>> low, high = student_interval([1.0, 2.0, 3.0])
    >>> round(low, 3), round(high, 3)
    (-0.484, 4.484)
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs at least 2 values, got {n}")
    degrees = n - 1
    x = _beta_quantile(1.0 - confidence, degrees / 2.0, 0.5)
    t = math.sqrt(degrees * (1.0 - x) / x)
    mean = statistics.fmean(values)
    half = t * statistics.stdev(values) / math.sqrt(n)
    return mean - half, mean + half
