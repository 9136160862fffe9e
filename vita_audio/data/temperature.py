"""Temperature: an alternative to ratios, for sets of very different sizes.

A data set of n rows gets a share of the epoch in proportion to n^(1/T): T = 1 leaves every set its size, higher
temperatures favour small sets, and an infinite one makes all sets equal. The epoch keeps its number of rows.
(Multilingual models are sampled so: Arivazhagan et al., "Massively multilingual neural machine translation in the
wild", arXiv:1907.05019, section 5.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Name = TypeVar("Name")


def tempered_ratios(rows: Mapping[Name, int], temperature: float) -> dict[Name, float]:
    """The ratio of each data set.

    Args:
        rows: rows of each data set; those of no rows get ratio 0.
        temperature: 1 or more.
    """
    total = sum(rows.values())
    weights = {name: count ** (1 / temperature) if count else 0.0 for name, count in rows.items()}
    whole = sum(weights.values())
    return {name: total * weights[name] / whole / count if count else 0.0 for name, count in rows.items()}
