"""Lossless rounds: the heads draft, the backbone's next pass verifies, and its own token follows.

Greedy: the longest prefix of the drafts that the backbone would have chosen. Sampling: speculative sampling as
Leviathan et al. (2023) and Chen et al. (2023) define it; a draft from q is accepted with probability min(1, p / q), and
the first one rejected is replaced by a draw from the positive part of p - q, so the output has distribution p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vita_audio.engine.sampling import pick


def accept_greedy(drafts: Tensor, counts: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Verify drafts against the backbone's choices.

    Args:
        drafts: (rows, K) ids, of which ``counts`` (rows,) are drafts.
        best: (rows, K + 1), the backbone's choice in place of each draft, and after the last.

    Returns:
        Number of drafts accepted, (rows,), and the backbone's token that follows them, (rows,).
    """
    columns = torch.arange(drafts.shape[1], device=drafts.device)
    agree = (drafts == best[:, :-1]) & (columns < counts[:, None])
    accepted = agree.long().cumprod(dim=1).sum(dim=1)
    return accepted, best.gather(1, accepted[:, None]).squeeze(1)


def accept_sampled(
    drafts: Tensor, counts: Tensor, p: Tensor, q: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Verify sampled drafts.

    Args:
        drafts: (rows, K) ids, of which ``counts`` (rows,) are drafts.
        p: (rows, K + 1, vocabulary), the backbone's distributions in place of each draft, and after the last.
        q: (rows, K, vocabulary), the distributions that the drafts were drawn from.
        uniforms: (rows, K + 1) float64 in [0, 1): one test for each draft, and the final draw.

    Returns:
        Number of drafts accepted, (rows,), and the token that follows them, (rows,).
    """
    columns = torch.arange(drafts.shape[1], device=drafts.device)
    chosen = drafts[:, :, None]
    ratio = p[:, :-1].gather(2, chosen) / q.gather(2, chosen).clamp(min=torch.finfo(q.dtype).tiny)
    accept = (uniforms[:, :-1] < ratio.squeeze(2)) & (columns < counts[:, None])
    accepted = accept.long().cumprod(dim=1).sum(dim=1)
    at = accepted[:, None, None].expand(-1, 1, p.shape[2])
    target = p.gather(1, at).squeeze(1)
    padded = torch.cat([q, torch.zeros_like(q[:, :1])], dim=1)  # after the last draft nothing was drafted
    drafted = padded.gather(1, at).squeeze(1) * (accepted < counts)[:, None]
    residual = (target - drafted).clamp(min=0)
    # Rounding can leave nothing where p and q are equal; such a draft is rejected with probability 0.
    residual = torch.where(residual.sum(dim=1, keepdim=True) > 0, residual, target)
    return accepted, pick(residual, uniforms[:, -1])


class DraftLength:
    """How many tokens to draft next, from what was accepted so far.

    A round with m drafts costs 1 + m * ``cost`` backbone passes and yields 1 + a_1 + a_1 a_2 + … tokens, where
    a_i is the chance that draft i is accepted if those before it were. The best m is drafted.

    Args:
        most: number of heads.
        cost: a draft's share of a backbone pass.
    """

    HOPE = 0.9
    """Assumed chance of a draft that was not tried lately, so that longer drafts are tried again."""
    PACE = 0.1
    """Weight of the newest outcome, once there are several."""

    def __init__(self, most: int, cost: float):
        self._chances = [self.HOPE] * most
        self._outcomes = [0] * most
        self._cost = cost

    def update(self, drafted: int, accepted: int) -> None:
        """Learn from a round that drafted and accepted so many tokens."""
        for i in range(len(self._chances)):
            if i < min(accepted + 1, drafted):
                self._outcomes[i] += 1
                outcome, pace = float(i < accepted), max(self.PACE, 1 / (self._outcomes[i] + 1))
            else:
                outcome, pace = self.HOPE, self.PACE / 10
            self._chances[i] += pace * (outcome - self._chances[i])

    def best(self) -> int:
        """The number of tokens to draft."""
        best, best_rate, tokens, chance = 0, 1.0, 1.0, 1.0
        for count, each in enumerate(self._chances, start=1):
            chance *= each
            tokens += chance
            rate = tokens / (1 + count * self._cost)
            if rate > best_rate:
                best, best_rate = count, rate
        return best
