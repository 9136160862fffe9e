"""How many tokens a lossless round drafts: what rounds cost, and what was accepted so far. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RoundCost:
    """What a lossless round costs, in passes of the backbone over one position.

    Attributes:
        head: a head's pass over one position.
        position: what a further position adds to a pass, as a share of it.
    """

    head: float
    position: float = 0.0

    def of(self, drafts: int, behind: float) -> float:
        """Cost of a round that verifies ``drafts`` tokens and drafts as many; its heads lag ``behind`` positions."""
        backbone = 1 + self.position * drafts
        return backbone + drafts * self.head * (1 + self.position * (drafts + behind))


class DraftLength:
    """How many tokens to draft next, from what was accepted so far.

    A round with m drafts yields 1 + a_1 + a_1 a_2 + … tokens, where a_i is the chance that draft i is accepted if those
    before it were. The m with the most tokens for the cost is drafted.

    Args:
        most: number of heads.
    """

    HOPE = 0.95
    """Assumed chance of a draft that was not tried lately, so that longer drafts are tried again."""
    PRIOR = 2
    """Outcomes that this assumption counts as."""
    PACE = 0.1
    """Weight of the newest outcome, once there are several."""
    ROUNDS = 8
    """Rounds over which the cost of bringing up a lagging head is spread."""
    LARGEST_LAG = 24
    """Positions that count at most, so that a head which was not used for long is used again."""

    def __init__(self, most: int, cost: RoundCost):
        self._chances = [self.HOPE] * most
        self._outcomes = [0] * most
        self._cost = cost

    def update(self, drafted: int, accepted: int) -> None:
        """Learn from a round that drafted and accepted so many tokens."""
        for i in range(len(self._chances)):
            if i < min(accepted + 1, drafted):
                self._outcomes[i] += 1
                outcome, pace = float(i < accepted), max(self.PACE, 1 / (self._outcomes[i] + self.PRIOR))
            else:
                outcome, pace = self.HOPE, self.PACE / 10
            self._chances[i] += pace * (outcome - self._chances[i])

    def best(self, behind: Sequence[int] | None = None) -> int:
        """The number of tokens to draft.

        Args:
            behind: how many positions each head lags behind the backbone; None: none.
        """
        best, best_rate, tokens, chance = 0, 1.0, 1.0, 1.0
        for count, each in enumerate(self._chances, start=1):
            chance *= each
            tokens += chance
            lag = min(behind[count - 1], self.LARGEST_LAG) / self.ROUNDS if behind else 0
            rate = tokens / self._cost.of(count, lag)
            if rate > best_rate:
                best, best_rate = count, rate
        return best
