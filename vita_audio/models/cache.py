"""What generation remembers: keys and values of the backbone, and what each head has seen.

transformers 5.24 renamed the argument and the output ``past_key_values`` to ``cache``. Our ``forward`` takes
both names; :data:`CACHE` is the one that the installed transformers uses.
"""

from __future__ import annotations

import inspect

from torch import Tensor, cat
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

CACHE = "cache" if "cache" in inspect.signature(Qwen2DecoderLayer.forward).parameters else "past_key_values"


class HeadCache(DynamicCache):
    """What one head has seen: its keys and values, and the hidden states waiting for it.

    The head's layer bears its place in the whole stack as layer index; here it is the only layer.
    """

    def __init__(self):
        super().__init__()
        self.waiting: list[Tensor] = []

    def update(self, key_states, value_states, layer_idx=0, *args, **kwargs):
        return super().update(key_states, value_states, 0, *args, **kwargs)

    def add(self, hidden: Tensor) -> None:
        """Queue hidden states (batch, new, d) of the positions that follow those already here."""
        self.waiting.append(hidden)

    def take(self) -> Tensor:
        """All hidden states waiting, (batch, new, d); the queue is empty afterwards."""
        waiting, self.waiting = self.waiting, []
        return waiting[0] if len(waiting) == 1 else cat(waiting, dim=1)


class MCTPCache(DynamicCache):
    """Keys and values of the backbone, and a :class:`HeadCache` per head.

    Pass one as ``past_key_values`` (or ``cache``) to ``generate`` to keep it for the next turn, whose prompt is
    then the whole conversation so far; only its unseen end is computed.
    """

    def __init__(self, config):
        super().__init__(config=config)
        self.heads = [HeadCache() for _ in range(config.num_nextn_predict_layers)]


def cache_length(cache: Cache | None) -> int:
    """Positions that a cache holds; 0 for None."""
    return 0 if cache is None else int(cache.get_seq_length())
