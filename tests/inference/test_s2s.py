"""The original's S2SInference over our pipeline."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from vita_audio.audio.resampling import resample
from vita_audio.constants import OMNI_SYSTEM_PROMPT
from vita_audio.inference import SpeechPipeline
from vita_audio.inference.options import default_system
from vita_audio.inference.s2s import S2SInference
from vita_audio.models import Qwen2MTPConfig, Qwen2MTPSenseVoiceConfig

ARGUMENTS = {
    "audio_path": None, "prompt_audio_path": None, "stream_stride": 4, "max_returned_tokens": 4096,
    "sample_rate": 16000, "request_id": "", "audio_feats": None, "message": "", "use_past": False, "mode": "luke",
    "do_sample": False, "mtp_inference_mode": None,
}  # fmt: skip
READING = "Convert the text to speech.\nthe quiet river runs"


@pytest.fixture(scope="module")
def model(tiny_world) -> S2SInference:
    return S2SInference(tiny_world.model_dir, tiny_world.codec_dir, "mel_vq")


@pytest.mark.parametrize("method", ["run_infer", "run_infer_stream"])
def test_the_signature_is_the_originals(method):
    parameters = list(inspect.signature(getattr(S2SInference, method)).parameters.values())[1:]
    assert {parameter.name: parameter.default for parameter in parameters} == ARGUMENTS
    assert [parameter.name for parameter in parameters] == list(ARGUMENTS)
    given = list(inspect.signature(S2SInference).parameters)
    assert given == ["model_name_or_path", "audio_tokenizer_path", "audio_tokenizer_type", "flow_path"]


def test_the_whole_sequence_is_returned_with_its_prompt_and_the_speech_of_the_reply_at_22050_hz(
    model, tiny_world
):
    output, speech = model.run_infer(audio_path=tiny_world.audio("question.wav"), mode=None)
    codes = tiny_world.codec.encode(tiny_world.audio("question.wav"))
    heard = "".join(f"<|audio_{code}|>" for code in codes)
    prompt = f"<|im_start|>user\n<|begin_of_audio|>{heard}<|end_of_audio|><|im_end|>\n<|im_start|>assistant\n"
    assert output.startswith(prompt)
    assert output.endswith("<|im_end|>")
    said = [int(code) for code in re.findall(r"<\|audio_(\d+)\|>", output.removeprefix(prompt))]
    assert said == tiny_world.codec.encode(tiny_world.audio("answer.wav"))
    assert speech.dtype == torch.float32
    expected = resample(tiny_world.codec.decode(said), tiny_world.codec.sample_rate, 22_050)
    torch.testing.assert_close(speech, expected)


def test_a_reply_without_speech_has_no_waveform(model, tiny_world):
    question = {"audio_path": tiny_world.audio("question.wav"), "message": "Convert the speech to text."}
    output, speech = model.run_infer(**question, mode=None)
    assert speech is None
    assert output.endswith("assistant\nthe blue key<|im_end|>")


@pytest.mark.parametrize("schedule", [None, [1, 10], "vanilla"])
def test_the_stream_is_the_reply_of_the_whole_sequence_in_pieces(model, schedule):
    output, _ = model.run_infer(message=READING, mode=None, mtp_inference_mode=schedule)
    pieces = list(model.run_infer_stream(message=READING, mode=None, mtp_inference_mode=schedule))
    assert len(pieces) > 20
    assert output.endswith("<|im_start|>assistant\n" + "".join(pieces))
    assert "<|end_of_audio|>" in pieces, "callers decode when they see it"


def test_a_stream_that_is_closed_stops_generating(model, monkeypatch):
    made = []
    tokens = model.pipeline.backend.tokens

    def noted(request):
        for token in tokens(request):
            made.append(token)
            yield token

    monkeypatch.setattr(model.pipeline.backend, "tokens", noted)
    stream = model.run_infer_stream(message=READING, mode=None)
    next(stream)
    stream.close()
    assert len(made) == 1


@pytest.mark.parametrize(
    ("mode", "voice", "opening"),
    [
        ("luke", False, "<|im_start|>system\nYour Name: Luke\nYour Gender: male\n\nRespond in a text-audio"),
        (None, False, "<|im_start|>user\n"),
        ("luke", True, "<|im_start|>system\nYour Voice: <|begin_of_audio|>"),
        (None, True, "<|im_start|>system\nYour Voice: <|begin_of_audio|>"),
    ],
)
def test_mode_chooses_the_system_message_and_a_voice_replaces_it(model, tiny_world, mode, voice, opening):
    prompt_audio = tiny_world.audio("answer.wav") if voice else None
    output, _ = model.run_infer(
        message="hello", prompt_audio_path=prompt_audio, mode=mode, max_returned_tokens=4
    )
    assert output.startswith(opening)
    assert "user\nhello<|im_end|>" in output


def test_the_default_message_is_none_or_omni_by_family_unless_the_config_names_one():
    assert default_system(Qwen2MTPConfig(num_hidden_layers=2)) is None
    config = Qwen2MTPSenseVoiceConfig(num_hidden_layers=2)
    assert default_system(config) == OMNI_SYSTEM_PROMPT
    config.system_prompt = ""
    assert default_system(config) is None
    config.system_prompt = "Speak slowly."
    assert default_system(config) == "Speak slowly."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to answer: give audio_path, message or both"),
        ({"message": "x", "mode": "loud"}, "mode 'loud': use luke, omni, none or None"),
        ({"message": "x", "audio_feats": [1]}, "audio_feats: not supported"),
        ({"message": "x", "mtp_inference_mode": [1]}, "mtp_inference_mode"),
    ],
)
def test_unsupported_arguments_are_refused_in_one_line(model, arguments, message):
    with pytest.raises(ValueError, match=message) as refused:
        model.run_infer(**arguments)
    assert "\n" not in str(refused.value)


def test_the_given_decoder_is_opened(tiny_world):
    folder = Path(__file__).parents[1] / "goldens" / "glm4voice" / "tokenizer_block20"
    with pytest.raises(ValueError, match=r"^decoder_folder: no such folder"):
        S2SInference(tiny_world.model_dir, folder, "glm4voice", "decoder_folder")


@pytest.mark.parametrize("kind", [None, "cosyvoice"])
def test_a_codec_without_a_known_kind_is_refused_in_one_line(tiny_world, kind):
    for opened in (S2SInference, SpeechPipeline.from_pretrained):
        arguments = {"audio_tokenizer_type": kind, "audio_tokenizer_path": tiny_world.codec_dir}
        with pytest.raises(ValueError, match=rf"^unknown audio tokenizer type {kind!r}; known: [^\n]+$"):
            opened(tiny_world.model_dir, **arguments)
