"""Training on a GPU: every attention back end and both losses give the golden numbers of the CPU."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

import vita_audio  # noqa: F401
from vita_audio.models import freeze_backbone

GOLDENS = Path(__file__).parents[1] / "goldens" / "mctp"
EXPECTED = json.loads((GOLDENS / "training_expected.json").read_text())


def batch():
    golden = np.load(GOLDENS / "training_batch.npz")
    return {name: torch.from_numpy(golden[name]).cuda() for name in ("input_ids", "position_ids", "labels")}


@pytest.mark.parametrize("case", ["joint", "frozen_llm"])
@pytest.mark.parametrize("attention", ["packed_sdpa", "sdpa", "eager"])
def test_losses_equal_the_golden_ones(case, attention):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "checkpoint").cuda().train()
    model.set_attn_implementation(attention)
    if case == "frozen_llm":
        freeze_backbone(model)
    output = model(**batch())
    output.loss.backward()
    assert output.loss.item() == pytest.approx(EXPECTED[case]["loss"], rel=1e-4)
    assert output.mtp_losses.tolist() == pytest.approx(EXPECTED[case]["head_losses"], rel=1e-4)


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed")
def test_flash_attention_gives_the_losses_of_sdpa_in_bfloat16():
    losses = {}
    for attention in ("sdpa", "flash_attention_2"):
        model = AutoModelForCausalLM.from_pretrained(
            GOLDENS / "checkpoint", dtype=torch.bfloat16, attn_implementation=attention
        )
        losses[attention] = model.cuda().train()(**batch()).loss.item()
    assert losses["flash_attention_2"] == pytest.approx(losses["sdpa"], rel=1e-2)
