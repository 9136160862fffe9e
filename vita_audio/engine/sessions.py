"""A conversation's place in the engine: its caches stay between requests.

Nothing has to be said about what changed. The next request brings the whole conversation so far; the caches are cut
back to the first token that differs, and only what follows is computed. An interrupted reply is thus a prompt that
holds what was heard of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(eq=False)
class Session:
    """What the caches of one conversation hold. Made by :meth:`vita_audio.engine.Engine.session`.

    Attributes:
        tokens: ids whose positions are in the caches, and those that follow.
        seen: positions that the backbone has computed.
        seen_heads: positions that each head has computed.
        embeds: (time, d), the inputs of the earlier prompt if they were not plain embeddings.
        row: its row in the engine's state; None before the first request, and after the engine needed the row.
        busy: a request runs in it.
    """

    tokens: list[int] = field(default_factory=list)
    seen: int = 0
    seen_heads: list[int] = field(default_factory=list)
    embeds: Tensor | None = None
    row: int | None = None
    busy: bool = False
    closed: bool = False
    used_at: float = 0.0

    def forget(self) -> None:
        """Drop what is known about the caches; the next request computes its whole prompt."""
        self.tokens, self.seen, self.embeds, self.row = [], 0, None, None
        self.seen_heads = [0] * len(self.seen_heads)

    def common(self, prompt: Sequence[int], embeds: Tensor | None) -> int:
        """How many tokens at the start of a prompt are those of the caches."""
        most = min(len(prompt), len(self.tokens))
        length = next((i for i in range(most) if prompt[i] != self.tokens[i]), most)
        if embeds is None and self.embeds is None:
            return length
        if embeds is None or self.embeds is None:
            return 0  # one of the two was computed from other inputs than its ids
        ours, theirs = self.embeds[:length], embeds[:length]
        shared = min(len(ours), len(theirs))
        differ = (ours[:shared] != theirs[:shared].to(ours)).any(dim=1).nonzero()
        return int(differ[0]) if len(differ) else length

    def cut(self, length: int, num_heads: int) -> None:
        """Forget everything from token ``length`` on."""
        self.tokens = self.tokens[:length]
        self.seen = min(self.seen, length)
        # A head reads up to ``num_heads`` tokens ahead of its position.
        valid = max(length - num_heads, 0)
        self.seen_heads = [min(seen, valid) for seen in self.seen_heads]
        self.embeds = None if self.embeds is None else self.embeds[:length]
