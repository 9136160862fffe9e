"""Our calls of FlashAttention, checked against sdpa through a stand-in that demands what the kernels demand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers import modeling_flash_attention_utils as utils

from vita_audio.models import Qwen2MTPConfig, Qwen2MTPForCausalLM
from vita_audio.models.compat import set_attention_implementation

HEADS, LAYERS = 2, 3


@pytest.fixture
def stand_in(monkeypatch):
    """The stand-in, installed for one test."""
    for place, name in (
        (utils, "is_flash_attn_2_available"),
        (utils, "_loaded_implementation"),
        (PreTrainedModel, "_flash_attn_can_dispatch"),
    ):
        monkeypatch.setattr(place, name, getattr(place, name))
    for name in ("flash_attn", "flash_attn.bert_padding"):
        monkeypatch.setitem(sys.modules, name, None)
    specification = importlib.util.spec_from_file_location(
        "flash_stand_in", Path(__file__).with_name("flash_stand_in.py")
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.install()
    return module


def make(implementation: str):
    torch.manual_seed(0)
    config = Qwen2MTPConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS + HEADS,
        num_nextn_predict_layers=HEADS,
        num_attention_heads=8,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    model = Qwen2MTPForCausalLM(config).to(torch.bfloat16)
    if implementation == "flash_attention_2":
        set_attention_implementation(model.config, implementation)
    return model


def rows(*lengths: list[int]) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(96, (len(lengths), sum(lengths[0])), generator=draw)
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions < 2, -100)}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lengths", [([9, 1, 14, 8],), ([9, 1, 14, 8], [20, 12]), ([32],), ([16, 16], [32])])
def test_packed_rows_reach_the_kernel_by_document_and_give_the_losses_and_gradients_of_sdpa(
    stand_in, lengths, checkpointing
):
    batch = rows(*lengths)
    results = {}
    for name in ("sdpa", "flash_attention_2"):
        model = make(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        stand_in.CALLS.clear()
        output = model(**batch)
        output.loss.backward()
        norms = torch.stack([parameter.grad.float().norm() for parameter in model.parameters()])
        results[name] = torch.cat([output.loss[None].detach(), output.mtp_losses, norms])
    torch.testing.assert_close(results["flash_attention_2"], results["sdpa"], rtol=3e-2, atol=1e-3)
    ends = [0]
    for row in lengths:
        for length in row:
            ends.append(ends[-1] + length)
    longest = max(length for row in lengths for length in row)
    want = {"ends": ends, "longest": longest, "dtype": torch.bfloat16, "causal": True}
    assert [want] * (LAYERS + HEADS) * (1 + checkpointing) == stand_in.CALLS


def test_rows_padded_on_the_left_are_unpadded_for_the_kernel(stand_in):
    batch = rows([12], [12])
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = {}
    for name in ("sdpa", "flash_attention_2"):
        model = make(name).eval()
        with torch.no_grad():
            logits[name] = model(batch["input_ids"], attention_mask=mask, position_ids=positions).logits[
                mask.bool()
            ]
    difference = (logits["flash_attention_2"] - logits["sdpa"]).float().norm() / logits["sdpa"].float().norm()
    assert difference < 0.02
    assert [call["ends"] for call in stand_in.CALLS] == [[0, 12, 19]] * LAYERS


def test_generation_with_a_cache_gives_the_tokens_of_sdpa(stand_in):
    prompt = rows([10], [10])["input_ids"]
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0
    replies = []
    for name in ("sdpa", "flash_attention_2"):
        model = make(name).eval()
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        replies.append(model.generate(prompt, attention_mask=mask, mtp_inference_mode=[1, 2], **options))
    assert torch.equal(*replies)
    assert all(call["causal"] or call.get("shape", (0, 1))[1] == 1 for call in stand_in.CALLS)


def test_a_stand_in_that_forgets_the_mask_gives_other_losses(stand_in):
    batch = rows([9, 1, 14, 8])
    right = make("flash_attention_2").train()(**batch).loss
    stand_in.install(wrong=True)
    wrong = make("flash_attention_2").train()(**batch).loss
    assert abs(wrong - right) > 0.05
