"""Two rehearsals of a GPU on a CPU: tensors left on another device, and places where the host waits for the device.

torch's fake CUDA tensors need a torch with CUDA (docs/log.md), so the second device is ``meta``: under FakeTensorMode,
which refuses to mix devices as CUDA does, for training; with real values behind it (tests/helpers/second_device.py) for
generation and the codec, whose next step depends on the values. The waits are found by the operations that read a value
back, copy to the CPU, or have a result whose size only the device knows.
"""

from __future__ import annotations

import json
import traceback
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from second_device import DEVICE, Elsewhere, SecondDevice, move
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from vita_audio.audio import get_audio_tokenizer
from vita_audio.audio.mel_vq import MelVQConfig, MelVQTokenizer
from vita_audio.models import (
    MCTPCache,
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
        moved = name == "aten::_to_copy" and isinstance(args[0], Elsewhere) and (kwargs or {}).get("device")
        if name in WAITING or masked or (moved and moved.type == "cpu"):
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


@pytest.fixture
def second_device(monkeypatch):
    # meta has no autocast, and asking for it is an error there.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    return SecondDevice()


def test_the_second_device_computes_and_refuses_tensors_of_the_first(second_device):
    with second_device:
        numbers = torch.tensor([1.0, 2.0, 3.0], device="meta")
        assert (numbers + torch.arange(3, device=numbers.device)).tolist() == [1, 3, 5]
        assert (numbers + torch.tensor(1.0))[1:].cpu().tolist() == [3, 4], "scalars may be the CPU's"
        for mixed in (lambda: numbers + torch.ones(3), lambda: numbers[torch.tensor([0, 1])]):
            with pytest.raises(RuntimeError, match="not on the same device"):
                mixed()


@pytest.mark.parametrize("cached", [False, True])
def test_nothing_in_generation_stays_on_another_device(second_device, cached):
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "checkpoint").eval()
    prompts = torch.arange(5, 45).reshape(2, 20)
    mask = torch.ones_like(prompts)
    mask[0, :5] = 0  # padding
    settings = {"max_new_tokens": 30, "mtp_inference_mode": [1, 3, 4, 3], "pad_token_id": 0}
    settings |= {"do_sample": False, "eos_token_id": 3, "repetition_penalty": 1.2}

    def answer(device):
        inputs = {"inputs": prompts.to(device), "attention_mask": mask.to(device)}
        if cached:  # a second turn
            del settings["mtp_inference_mode"]
            inputs = {"inputs": prompts[1:].to(device), "cache": MCTPCache(model.config)}
            first = model.generate(**inputs, **settings)
            inputs["inputs"] = torch.cat([first, prompts[:1].to(device)], dim=1)
            settings["mtp_inference_mode"] = [1, 3, 4, 3]
        return model.generate(**inputs, **settings).cpu()

    expected = answer("cpu")
    move(model)
    with second_device:
        assert torch.equal(answer("meta"), expected)


@pytest.fixture(scope="module")
def codec():
    """The codec with its networks on the second device, and what it decodes with them on the first."""
    folder = GOLDENS.parent / "glm4voice"
    codec = get_audio_tokenizer("glm4voice", folder / "tokenizer_block200", flow_path=folder / "decoder")
    expected = codec.decode(CODES), streamed(codec)
    for part in (codec.encoder, codec.flow, codec.vocoder):
        move(part)
    codec.device = DEVICE
    return codec, expected


CODES = [3, 9, 1, 30, 2, 5, 7, 1, 9, 4] * 2


def streamed(codec):
    stream = codec.stream(generator=torch.Generator().manual_seed(0))
    return torch.cat([stream.push(CODES[:12]), stream.push(CODES[12:], last=True)])


def test_nothing_in_the_codec_stays_on_another_device(codec, second_device):
    codec, (whole, pieces) = codec
    name = "b_22k_mono.wav"
    recorded = json.loads((codec.path / "expected.json").read_text())["wavs"][name]["tokens"]
    with second_device:
        assert codec.encode(codec.path.parent / "audio" / name) == recorded
        for decoded, expected in ((codec.decode(CODES), whole), (streamed(codec), pieces)):
            torch.testing.assert_close(decoded, expected, atol=1e-2, rtol=0)  # another attention kernel


CODEC_WAITS = {
    "check_range": "encoding, on the CPU: a clip is checked before it is moved",
    "features": "encoding: transformers' extractor returns the features of a segment on the CPU",
    "_silence_in": "encoding, on the CPU: what a shorter segment is padded with",
    "_waveform": "decoding, once a call: torch.istft makes sure that its windows overlap",
    "decode": "decoding: the waveform is handed out",
    "_advance": "streaming, twice a piece: its waveform and its mel are handed out",
}
"""Functions of the codec in which the host waits, and why each does."""


def test_the_codec_waits_as_often_for_long_speech_as_for_short(codec, second_device):
    codec, _ = codec
    counts = {}
    with second_device:
        for length in (1, 2):
            with Waits() as encoding:
                codec.encode((torch.randn(16_000 * length), 16_000))
            with Waits() as decoding:
                codec.decode(CODES[: 10 * length], steps=2)
            counts[length] = encoding.places + decoding.places
        with Waits() as streaming:
            streamed(codec)
    assert counts[1] == counts[2]
    assert set(counts[1]) | set(streaming.places) <= set(CODEC_WAITS), (counts[1], streaming.places)


def test_the_codec_encodes_without_waiting_for_each_frame():
    noise = [(torch.randn(16_000), 16_000) for _ in range(2)]
    codec = MelVQTokenizer.fit(noise, MelVQConfig(codebook_size=16), epochs=1)
    counts = []
    for seconds in (1, 4):
        with Waits() as waits:
            codec.encode((torch.randn(16_000 * seconds), 16_000))
        counts.append(waits.places.total())
    assert counts[0] == counts[1]
