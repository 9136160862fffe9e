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
