"""The caches of generation: keys and values of the backbone, and the state of each head.

Backbone and heads must hold the same positions. :class:`MCTPCache` applies transformers' cache operations (crop,
reorder, repeat, select, reset) to both, and refuses to continue from positions that its heads have missed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from vita_audio.models.compat import CACHE
from vita_audio.models.configuration import Qwen2MTPConfig

__all__ = ["CACHE", "HeadCache", "MCTPCache", "cache_length", "check_continues"]


class HeadCache(DynamicCache):
    """The state of one head: its keys and values, and the hidden states queued for it.

    In the model, a head's layer is indexed by its place in the whole stack; here it is the only layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Tensor] = []

    @property
    def length(self) -> int:
        """The number of positions seen and queued."""
        return self.get_seq_length() + sum(part.shape[1] for part in self.waiting)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int = 0, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, (batch, heads, new, d_head) each; returns all of them."""
        return super().update(key_states, value_states, 0, *args, **kwargs)

    def add(self, hidden: Tensor) -> None:
        """Queue hidden states (batch, new, d) of the positions that follow those already here."""
        self.waiting.append(hidden)

    def take(self) -> Tensor:
        """All queued hidden states, (batch, new, d); empties the queue."""
        waiting, self.waiting = self.waiting, []
        return waiting[0] if len(waiting) == 1 else torch.cat(waiting, dim=1)

    def crop_to(self, seen: int, known: int) -> None:
        """Keep at most ``seen`` positions, and of the queued states those before position ``known``."""
        if (surplus := self.get_seq_length() - seen) > 0:
            self.crop(-surplus)
            self.waiting = []  # they follow positions that are gone
        elif self.waiting:
            self.waiting = [self.take()[:, : max(known - self.get_seq_length(), 0)]]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes a copy of row ``beam_idx[i]``."""
        super().reorder_cache(beam_idx)
        self.waiting = [part.index_select(0, beam_idx.to(part.device)) for part in self.waiting]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        self.waiting = [part.repeat_interleave(repeats, dim=0) for part in self.waiting]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at ``indices``."""
        super().batch_select_indices(indices)
        self.waiting = [part[indices] for part in self.waiting]


class FirstHeadCache(HeadCache):
    """Head 0's cache in a conversation. It keeps the backbone's hidden states, so a crop can queue them again.

    One state per position costs 12% on top of the backbone's keys and values at 7B.
    """

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []

    def add(self, hidden: Tensor) -> None:
        """See :class:`HeadCache`."""
        super().add(hidden)
        self.given.append(hidden)

    def crop_to(self, seen: int, known: int) -> None:
        """See :class:`HeadCache`; positions between ``seen`` and ``known`` are queued again."""
        super().crop_to(seen, known)
        given = torch.cat(self.given, dim=1)[:, :known] if self.given else None
        self.given = [] if given is None else [given]
        self.waiting = [] if given is None else [given[:, self.get_seq_length() :]]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """See :class:`HeadCache`."""
        super().reorder_cache(beam_idx)
        self.given = [part.index_select(0, beam_idx.to(part.device)) for part in self.given]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See :class:`HeadCache`."""
        super().batch_repeat_interleave(repeats)
        self.given = [part.repeat_interleave(repeats, dim=0) for part in self.given]

    def batch_select_indices(self, indices: Tensor) -> None:
        """See :class:`HeadCache`."""
        super().batch_select_indices(indices)
        self.given = [part[indices] for part in self.given]


class MCTPCache(DynamicCache):
    """Keys and values of the backbone, and a :class:`HeadCache` per head.

    Pass one as ``past_key_values`` (or ``cache``) to ``generate``, or to the model's ``forward``, to reuse it in the
    next turn. The prompt of that turn is the whole conversation so far; only its unseen end is computed.
    """

    def __init__(self, config: Qwen2MTPConfig) -> None:
        super().__init__(config=config)
        self.config = config
        num_heads = config.num_nextn_predict_layers
        self.heads = [HeadCache() if k else FirstHeadCache() for k in range(num_heads)]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append a backbone layer's keys and values, (batch, heads, new, d_head) each; returns everything cached.

        Raises:
            ValueError: the heads have missed an earlier pass, or the number of rows is another.
        """
        if layer_idx == 0:
            self.check()
            held = getattr(self.layers[0], "keys", None) if self.get_seq_length() else None
            if held is not None and len(held) != len(key_states):
                raise ValueError(
                    f"MCTPCache: it holds {len(held)} rows, the input has {len(key_states)}; give each batch "
                    "a cache of its own, or batch_repeat_interleave() this one"
                )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def check(self) -> None:
        """Check that the heads have seen every position that the backbone holds.

        Raises:
            ValueError: they have not.
        """
        if self.heads and self.heads[0].length != self.get_seq_length():
            raise ValueError(
                f"MCTPCache: the backbone holds {self.get_seq_length()} positions, its heads have seen "
                f"{self.heads[0].length}; fill it with generate() or the whole model's forward, not the backbone's"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` positions, in the backbone and in the heads."""
        super().crop(tokens_to_remove)
        length = self.get_seq_length()
        # At position t head k has read token t + k + 1, so the heads' last K positions must be computed again.
        seen, known = max(length - len(self.heads), 0), length
        for head in self.heads:
            head.crop_to(seen, known)
            known = head.get_seq_length()  # the next head knows of what this one has seen

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes a copy of row ``beam_idx[i]``."""
        super().reorder_cache(beam_idx)
        for head in self.heads:
            head.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        for head in self.heads:
            head.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at ``indices``."""
        super().batch_select_indices(indices)
        for head in self.heads:
            head.batch_select_indices(indices)

    def reset(self) -> None:
        """Forget everything."""
        fresh = MCTPCache(self.config)
        self.layers, self.heads = fresh.layers, fresh.heads


def cache_length(cache: Cache | None) -> int:
    """Positions that a cache holds; 0 for None."""
    return 0 if cache is None else int(cache.get_seq_length())


def check_continues(cache: Cache | None, prompt_length: int) -> None:
    """Refuse a cache that a prompt cannot continue, judging by its length: its ids are not stored.

    Raises:
        ValueError: the cache holds as many positions as the prompt, or more.
    """
    held = cache_length(cache)
    if held and held >= prompt_length:
        raise ValueError(
            f"{CACHE}: the cache already holds {held} positions and the prompt has {prompt_length}; pass the whole "
            "conversation so far, or shorten the cache with cache.crop(-n)"
        )
