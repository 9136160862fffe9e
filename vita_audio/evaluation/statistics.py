"""Rates of test sets, how certain they are, and whether two runs differ by more than chance.

Every score is a ratio of two sums over utterances: errors over words, right answers over questions. The two summands of
an utterance are its :data:`Mark`. Utterances are the unit of chance: intervals resample them, and a comparison
of two runs resamples them in pairs, since both answered the same items (Bisani and Ney, 2004).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

Mark = tuple[float, float]
"""What an utterance adds to a score: numerator and denominator."""
Marks = Mapping[str, Mark]

RESAMPLES = 2000
CONFIDENCE = 0.95
_SEED = 0
_BLOCK = 250  # resamples at a time: 250 x 20,000 utterances are 40 MB


def rate(marks: Sequence[Mark]) -> float | None:
    """The ratio of the sums; None if the denominator is 0."""
    above, below = map(math.fsum, zip(*marks, strict=True)) if marks else (0.0, 0.0)
    return above / below if below else None


def rates(utterances: Sequence[Marks]) -> dict[str, float | None]:
    """The rate of every score that an utterance has a mark for."""
    return {key: rate(marks) for key, marks in by_score(utterances).items()}


def by_score(utterances: Sequence[Marks]) -> dict[str, list[Mark]]:
    """The marks of each score, in the order of the utterances that have one."""
    found: dict[str, list[Mark]] = {}
    for marks in utterances:
        for key, (above, below) in marks.items():
            found.setdefault(key, []).append((above, below))
    return found


def intervals(utterances: Sequence[Marks]) -> dict[str, tuple[float, float]]:
    """The 95% interval of every score that has one."""
    found = {key: interval(marks) for key, marks in by_score(utterances).items()}
    return {key: limits for key, limits in found.items() if limits is not None}


def interval(marks: Sequence[Mark]) -> tuple[float, float] | None:
    """The 95% confidence interval of a rate; None for fewer than two utterances or without a rate.

    Shares of right answers have Wilson's interval, which also holds when all or no answers are right. Other rates
    have the bootstrap's, with the quantiles of Student's t, which correct it for small sets.
    """
    values = np.asarray(marks, dtype=np.float64)
    if len(values) < 2 or not values[:, 1].sum():
        return None
    if is_share(values):
        return _wilson(float(values[:, 0].sum()), len(values))
    value = values[:, 0].sum() / values[:, 1].sum()
    return _widened(float(value), _resampled(values), len(values))


def is_share(values: Any) -> bool:
    """Whether every utterance is right or wrong, with the same weight."""
    return bool(np.isin(values[:, 0], (0, 1)).all() and (values[:, 1] == 1).all())


def difference(first: Sequence[Mark], second: Sequence[Mark]) -> tuple[float, tuple[float, float], float]:
    """How much a rate of the second run exceeds the first's, on the same items in the same order.

    Returns:
        The difference, its 95% interval by the paired bootstrap, and the p-value of no difference: McNemar's exact test
        for answers that are right or wrong, else of the bootstrap's t statistic.

    Raises:
        ValueError: the runs have different numbers of items, or fewer than two.
    """
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(one) != len(two) or len(one) < 2 or not one[:, 1].sum() or not two[:, 1].sum():
        raise ValueError(f"{len(one)} and {len(two)} items; a comparison needs the same, and two at least")
    value = float(two[:, 0].sum() / two[:, 1].sum() - one[:, 0].sum() / one[:, 1].sum())
    resampled = _resampled(two, one)
    limits = _widened(value, resampled, len(one))
    if is_share(one) and is_share(two):
        return value, limits, mcnemar(one[:, 0] > two[:, 0], two[:, 0] > one[:, 0])
    error = float(np.nanstd(resampled))
    if error == 0:
        return value, limits, 1.0 if value == 0 else 0.0
    return value, limits, float(2 * stats.t.sf(abs(value) / error, len(one) - 1))


def mcnemar(only_first: Any, only_second: Any) -> float:
    """The exact p-value of McNemar's test: chance that so uneven a split of the changed items is luck.

    Args:
        only_first, only_second: (items,) bool; right in this run only.
    """
    first, second = int(np.sum(only_first)), int(np.sum(only_second))
    if first + second == 0:
        return 1.0
    return float(stats.binomtest(first, first + second).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number (Holm, 1979), so that any false alarm among them stays at its level."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    adjusted, highest = [0.0] * len(values), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - place) * values[index]))
        adjusted[index] = highest
    return adjusted


def _resampled(values: Any, subtracted: Any = None) -> Any:
    """Rates of :data:`RESAMPLES` resampled sets, minus those of ``subtracted`` at the same items: (resamples,)."""
    generator = np.random.default_rng(_SEED)
    count, found = len(values), []
    for start in range(0, RESAMPLES, _BLOCK):
        picks = generator.multinomial(
            count, np.full(count, 1 / count), size=min(_BLOCK, RESAMPLES - start)
        ).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            above, below = (picks @ values).T
            block = above / below
            if subtracted is not None:
                above, below = (picks @ subtracted).T
                block = block - above / below
        found.append(block)
    return np.concatenate(found)


def _widened(value: float, resampled: Any, count: int) -> tuple[float, float]:
    """The bootstrap's percentiles, moved outwards from ``value`` as Student's t exceeds the normal distribution."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(resampled, (tail, 1 - tail))
    widening = float(stats.t.ppf(1 - tail, count - 1) / stats.norm.ppf(1 - tail))
    widening *= math.sqrt(count / (count - 1))
    return value - widening * (value - float(low)), value + widening * (float(high) - value)


def _wilson(right: float, count: int) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share."""
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    share, spread = right / count, z * z / count
    centre = share + spread / 2
    reach = z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return (centre - reach) / (1 + spread), (centre + reach) / (1 + spread)
