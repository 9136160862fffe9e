"""Two rehearsals of a GPU on a CPU: tensors left on another device, and places where the host waits for the device.

torch's fake CUDA tensors need a torch with CUDA (docs/log.md), so the second device is ``meta`` under FakeTensorMode,
which refuses to mix devices as CUDA does. The waits are found on real tensors, by the operations that read a value
back or whose result has a size that only the device knows.
"""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from vita_audio.audio.mel_vq import MelVQConfig, MelVQTokenizer
from vita_audio.models import (
    Qwen2MTPConfig,
    Qwen2MTPForCausalLM,
    Qwen2MTPSenseVoiceConfig,
    Qwen2MTPSenseVoiceForCausalLM,
    freeze_backbone,
)
from vita_audio.models.attention import PackedDocuments
from vita_audio.training import step_memory
from vita_audio.training.statistics import PredictionSums

PACKAGE = "vita_audio"
GOLDENS = Path(__file__).parents[1] / "goldens" / "mctp"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_nextn_predict_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
WAITING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::equal",
    "aten::is_nonzero",
}

TRAINING_WAITS = {
    "is_packed": "once a pass: packed rows and one document take different attention",
    "group_documents": "once a pass: the documents' lengths decide the shapes of all layers",
    "training_loss": "once a pass: how many positions are supervised, for all heads together",
}
"""Functions in which a training step waits, and why each does."""


class Waits(TorchDispatchMode):
    """Counts the operations that would wait for a GPU, by the function of this package that calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition(".")[0]
        masked = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or masked:
            frames = [frame for frame in traceback.extract_stack() if f"/{PACKAGE}/" in frame.filename]
            self.places[frames[-1].name if frames else "elsewhere"] += 1
        return function(*args, **(kwargs or {}))


def packed_row() -> dict[str, torch.Tensor]:
    positions = torch.cat([torch.arange(length) for length in (9, 3, 12)])[None]
    ids = torch.randint(64, positions.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions < 2, -100)}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_waits_for_the_device_only_where_it_must(frozen, checkpointing):
    model = Qwen2MTPForCausalLM(Qwen2MTPConfig(**SIZES)).train()
    if frozen:
        freeze_backbone(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**packed_row()).loss.backward()  # what is cached from then on
    with Waits() as waits:
        output = model(**packed_row(), num_items_in_batch=torch.tensor(18), return_predictions=True)
        output.loss.backward()
    assert set(waits.places) <= set(TRAINING_WAITS), waits.places
    counts = {}
    for layers in (4, 9):
        deeper = Qwen2MTPForCausalLM(Qwen2MTPConfig(**{**SIZES, "num_hidden_layers": layers})).train()
        with Waits() as waits:
            deeper(**packed_row()).loss.backward()
        counts[layers] = waits.places
    assert counts[4] == counts[9], "no layer waits"


def test_statistics_of_the_log_wait_only_when_they_are_read():
    model = Qwen2MTPForCausalLM(Qwen2MTPConfig(**SIZES)).train()
    output = model(**packed_row(), return_predictions=True)
    sums = PredictionSums(2, 3, torch.device("cpu"))
    with Waits() as waits:
        sums.add(output.predictions, torch.ones(1, 24, dtype=torch.long))
    assert not waits.places


GENERATION_WAITS = {
    "generate": "once: the prompt's padding, and the schedule",
    "decode_in_rounds": "each token: the reference loop asks whether every reply has ended",
}
"""The reference loop of ``generate()``; the engine's recorded rounds do not wait (tests/engine)."""


def test_generation_waits_once_a_token_at_most():
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "checkpoint").eval()
    prompt = torch.arange(5, 25)[None]
    counts = {}
    for tokens in (11, 44):
        with Waits() as waits:
            model.generate(prompt, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        counts[tokens] = waits.places
    assert set(counts[44]) <= set(GENERATION_WAITS), counts[44]
    for place in counts[44]:
        assert counts[44][place] - counts[11].get(place, 0) <= 33, place


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("plus", [False, True])
def test_nothing_in_forward_loss_and_backward_stays_on_another_device(plus, frozen, monkeypatch):
    # meta has no autocast, and asking for it is an error there.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    with torch.device("meta"):
        if plus:
            encoder = {
                "output_size": 32,
                "attention_heads": 2,
                "linear_units": 48,
                "num_blocks": 2,
                "tp_blocks": 1,
            }
            model = Qwen2MTPSenseVoiceForCausalLM(Qwen2MTPSenseVoiceConfig(**SIZES, audio_encoder=encoder))
        else:
            model = Qwen2MTPForCausalLM(Qwen2MTPConfig(**SIZES))
    model.train()
    if frozen:
        freeze_backbone(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        place_on(model, "meta")
        with torch.device("meta"):  # for the inputs that the function makes
            inputs = [torch.zeros(1, 64, dtype=torch.long) for _ in range(2)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step_memory, "_documents", documents_on_meta)
            with torch.device("meta"):
                loss = step_memory._pass(model, step_memory.Batch(1, 64, 32))
        loss.backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert {parameter.grad.device.type for parameter in trained if parameter.grad is not None} == {"meta"}
        with pytest.raises(RuntimeError, match="same device"):
            model.get_input_embeddings()(inputs[0]) + torch.zeros(1, 64, 32)


def documents_on_meta(batch):
    groups = [torch.zeros(2, 32, dtype=torch.long, device="meta")]
    return PackedDocuments(groups, torch.zeros(64, dtype=torch.long, device="meta"))


def place_on(model: nn.Module, device: str) -> None:
    """Replace every parameter and buffer by a fake one on a device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, device=device)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def test_the_codec_encodes_without_waiting_for_each_frame():
    noise = [(torch.randn(16_000), 16_000) for _ in range(2)]
    codec = MelVQTokenizer.fit(noise, MelVQConfig(codebook_size=16), epochs=1)
    counts = []
    for seconds in (1, 4):
        with Waits() as waits:
            codec.encode((torch.randn(16_000 * seconds), 16_000))
        counts.append(waits.places.total())
    assert counts[0] == counts[1]
