"""Rates of test sets, how certain they are, and whether two runs differ by more than chance.

Every score is a ratio of two sums over utterances: errors over words, right answers over questions. The two summands of
an utterance are its :data:`Mark`. Utterances are the unit of chance: intervals resample them, and a comparison
of two runs resamples them in pairs, since both answered the same items (Bisani and Ney, 2004).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

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

    Shares of right answers have Wilson's interval, which also holds when all or no answers are right. Other rates have
    the bootstrap-t interval (Efron and Tibshirani, 1993, chapter 12), which unlike percentiles covers the skewed
    errors of small sets. Where no error was seen, the upper limit is three over the denominator (Hanley and
    Lippman-Hand, 1983).
    """
    values = np.asarray(marks, dtype=np.float64)
    if len(values) < 2 or not values[:, 1].sum():
        return None
    if is_share(values):
        return _wilson(float(values[:, 0].sum()), len(values))
    if not values[:, 0].any():
        return 0.0, min(1.0, 3 / float(values[:, 1].sum()))
    low, high = _limits(*_bootstrap_t(values))
    return (max(low, 0.0) if (values[:, 0] >= 0).all() else low), high


def is_share(values: Any) -> bool:
    """Whether every utterance is right or wrong, with the same weight."""
    return bool(np.isin(values[:, 0], (0, 1)).all() and (values[:, 1] == 1).all())


def difference(first: Sequence[Mark], second: Sequence[Mark]) -> tuple[float, tuple[float, float], float]:
    """How much a rate of the second run exceeds the first's, on the same items in the same order.

    Returns:
        The difference, its 95% interval by the paired bootstrap, and the p-value of no difference: McNemar's exact test
        for answers that are right or wrong, else the bootstrap's.

    Raises:
        ValueError: the runs have different numbers of items, or fewer than two.
    """
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(one) != len(two) or len(one) < 2 or not one[:, 1].sum() or not two[:, 1].sum():
        raise ValueError(f"{len(one)} and {len(two)} items; a comparison needs the same, and two at least")
    value, error, resampled = _bootstrap_t(np.concatenate([one, two], axis=1))
    limits = _limits(value, error, resampled)
    if is_share(one) and is_share(two):
        return value, limits, mcnemar(one[:, 0] > two[:, 0], two[:, 0] > one[:, 0])
    if error == 0:  # every utterance has the same marks, or all differ alike
        return value, limits, 1.0 if value == 0 else 2.0 ** (1 - len(one))
    farther = int((np.abs(resampled) >= abs(value / error)).sum())
    return value, limits, (farther + 1) / (len(resampled) + 1)


def mcnemar(only_first: Any, only_second: Any) -> float:
    """The exact p-value of McNemar's test: chance that so uneven a split of the changed items is luck.

    Args:
        only_first, only_second: (items,) bool; right in this run only.
    """
    first, second = int(np.sum(only_first)), int(np.sum(only_second))
    if first + second == 0:
        return 1.0
    changed = first + second
    tail = sum(math.comb(changed, count) for count in range(min(first, second) + 1))
    return min(1.0, 2 * tail / 2**changed)


def holm(values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number (Holm, 1979), so that any false alarm among them stays at its level."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    adjusted, highest = [0.0] * len(values), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - place) * values[index]))
        adjusted[index] = highest
    return adjusted


def _bootstrap_t(values: Any) -> tuple[float, float, Any]:
    """A rate or a difference of two, its standard error, and the t statistics of resampled sets.

    Args:
        values: (utterances, 2) marks, or (utterances, 4) those of two runs.

    Returns:
        Value, standard error, and (resamples,) values of (resampled - value) / resampled error.
    """
    count = len(values)
    products = (values[:, :, None] * values[:, None, :]).reshape(count, -1)
    columns = np.concatenate([values, products], axis=1)
    value, error = _estimate(columns.sum(axis=0)[None], values.shape[1])
    generator, found = np.random.default_rng(_SEED), []
    for start in range(0, RESAMPLES, _BLOCK):
        picks = generator.multinomial(
            count, np.full(count, 1 / count), size=min(_BLOCK, RESAMPLES - start)
        ).astype(np.float64)
        resampled, errors = _estimate(picks @ columns, values.shape[1])
        # A resample that happens to hold no error has none of its own; the floor keeps its statistic finite.
        floor = max(float(error[0]) / 3, np.finfo(np.float64).tiny)
        found.append((resampled - value) / np.maximum(errors, floor))
    return float(value[0]), float(error[0]), np.nan_to_num(np.concatenate(found))


def _estimate(sums: Any, width: int) -> tuple[Any, Any]:
    """Rates, or differences of two, and their standard errors (linearised) from sums of values and of their products.

    Args:
        sums: (resamples, width + width²).
    """
    pairs = sums[:, :width].reshape(len(sums), -1, 2)
    products = sums[:, width:].reshape(len(sums), width, width)
    signs = np.array([1.0]) if width == 2 else np.array([-1.0, 1.0])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = pairs[..., 0] / pairs[..., 1]
        weights = np.stack([signs / pairs[..., 1], -signs * ratios / pairs[..., 1]], axis=-1)
    weights = weights.reshape(len(sums), width)
    variances = np.einsum("rc,rcd,rd->r", weights, products, weights)
    return (signs * ratios).sum(axis=-1), np.sqrt(np.maximum(variances, 0))


def _limits(value: float, error: float, resampled: Any) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, (tail, 1 - tail))
    return value - float(high) * error, value - float(low) * error


def _wilson(right: float, count: int) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, spread = right / count, z * z / count
    centre = share + spread / 2
    reach = z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return (centre - reach) / (1 + spread), (centre + reach) / (1 + spread)
