"""A stand-in for FlashAttention-2: its interface and its demands, computed on a CPU.

``install()`` makes transformers use it as it would the package. It refuses what the kernels refuse: other types than
half precision, other layouts, cumulative lengths that are not int32 or do not cover the tokens. ``CALLS`` keeps the
arguments of every call. With ``wrong=True`` it forgets the causal mask, as a broken build might.
"""

from __future__ import annotations

import sys
import types
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

CALLS: list[dict[str, Any]] = []


def install(wrong: bool = False) -> None:
    """Register the module ``flash_attn``, and have transformers find it on a CPU."""
    import transformers.modeling_flash_attention_utils as utils
    from transformers import PreTrainedModel

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        check(q, k, v, 3)
        for ends, longest, states in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
            assert ends.dtype == torch.int32, "cumulative lengths are int32"
            assert isinstance(longest, int), "the longest length is a number of the host"
            assert ends[0] == 0
            assert ends[-1] == len(states), "the documents cover all tokens"
            assert int(ends.diff().max()) == longest
            assert int(ends.diff().min()) > 0
        CALLS.append(
            {"ends": cu_seqlens_q.tolist(), "longest": max_seqlen_q, "dtype": q.dtype, "causal": causal}
        )
        parts = []
        for (start, end), (first, last) in zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True):
            parts.append(
                attend(q[start:end], k[first:last], v[first:last], softmax_scale, causal and not wrong)
            )
        return torch.cat(parts)

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        check(q, k, v, 4)
        CALLS.append({"shape": tuple(q.shape), "keys": k.shape[1], "dtype": q.dtype, "causal": causal})
        rows = zip(q, k, v, strict=True)
        return torch.stack([attend(*row, softmax_scale, causal and not wrong) for row in rows])

    module = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    module.flash_attn_varlen_func = flash_attn_varlen_func
    module.flash_attn_with_kvcache = None
    padding = types.ModuleType("flash_attn.bert_padding")
    padding.pad_input, padding.unpad_input = utils._pad_input, utils._unpad_input
    sys.modules |= {"flash_attn": module, "flash_attn.bert_padding": padding}
    utils.is_flash_attn_2_available = lambda: True
    utils._loaded_implementation = None
    PreTrainedModel._flash_attn_can_dispatch = lambda *_, **__: True


def check(q: Tensor, k: Tensor, v: Tensor, dimensions: int) -> None:
    """What the kernels demand of queries, keys and values: (…, tokens, heads, head size)."""
    assert q.dtype in (torch.float16, torch.bfloat16), "half precision only"
    assert q.dtype == k.dtype == v.dtype
    for states in (q, k, v):
        assert states.dim() == dimensions
        assert states.stride(-1) == 1, "the last dimension is contiguous"
        assert states.shape[-1] % 8 == 0
        assert states.shape[-1] <= 256
    assert k.shape == v.shape
    assert q.shape[-2] % k.shape[-2] == 0, "query heads share key heads"


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
    """One document. (tokens, heads, head size) in and out; a causal mask is aligned at the end."""
    groups, dtype = q.shape[1] // k.shape[1], q.dtype
    q, k, v = (states.transpose(0, 1).float() for states in (q, k, v))
    k, v = k.repeat_interleave(groups, dim=0), v.repeat_interleave(groups, dim=0)
    mask = (
        torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1]) if causal else None
    )
    out = scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale)[0]
    return out.transpose(0, 1).to(dtype)
