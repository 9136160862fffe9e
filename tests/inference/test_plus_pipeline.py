"""The pipeline of the Plus family: the question enters as SenseVoice features."""

from __future__ import annotations

import pytest
import torch

from vita_audio.inference import GenerationOptions, Reply, SpeechPipeline, prompts


@pytest.fixture(scope="module")
def pipeline(plus_model_dir, frontend_dir, tiny_world) -> SpeechPipeline:
    return SpeechPipeline.from_pretrained(
        plus_model_dir,
        "sensevoice_mel_vq",
        tiny_world.codec_dir,
        frontend_path=frontend_dir,
        device="cpu",
        dtype=torch.float32,
    )


OPTIONS = GenerationOptions(mode="1 2", max_new_tokens=24)


def test_the_reply_depends_on_the_audio(pipeline, tiny_world):
    replies = [
        pipeline.speech_to_speech(tiny_world.audio(name), options=OPTIONS).token_ids
        for name in ("question.wav", "answer.wav")
    ]
    assert replies[0] != replies[1]


def test_batches_with_and_without_audio_give_the_replies_of_single_requests(pipeline, tiny_world):
    conversations = [
        prompts.speech_to_speech(tiny_world.audio("question.wav"), voice=tiny_world.audio("reading.wav")),
        prompts.chat("hello"),
        prompts.transcription(tiny_world.audio("answer.wav")),
    ]
    batched = pipeline.reply_batch(conversations, OPTIONS)
    for conversation, reply in zip(conversations, batched, strict=True):
        assert reply.token_ids == pipeline.reply(conversation, OPTIONS).token_ids


def test_voice_prompt_and_question_keep_their_order(pipeline, tiny_world):
    """Bug 5 of the data specification: features follow the tags, the system message's first."""
    question, voice = tiny_world.audio("question.wav"), tiny_world.audio("reading.wav")
    prompt = pipeline.prompt(prompts.speech_to_speech(question, voice=voice))
    assert prompt.feature_positions[0][-1] < prompt.feature_positions[1][0]
    for features, audio in zip(prompt.features, (voice, question), strict=True):
        assert torch.equal(features, pipeline.codec.features(audio))


@pytest.mark.parametrize("mode", ["vanilla", "1 2"])
def test_streamed_reply_equals_the_whole_one(pipeline, tiny_world, mode):
    conversation = prompts.speech_to_speech(tiny_world.audio("question.wav"))
    options = GenerationOptions(mode=mode, max_new_tokens=24)
    *_, last = pipeline.stream(conversation, options)
    whole = pipeline.reply(conversation, options)
    assert isinstance(last, Reply)
    assert (last.text, last.codes, last.token_ids) == (whole.text, whole.codes, whole.token_ids)


def test_model_and_codec_must_be_of_one_family(plus_model_dir, frontend_dir, tiny_world):
    with pytest.raises(ValueError, match="sensevoice_mel_vq"):
        SpeechPipeline.from_pretrained(plus_model_dir, "mel_vq", tiny_world.codec_dir)
    with pytest.raises(ValueError, match="--audio_tokenizer_type mel_vq"):
        SpeechPipeline.from_pretrained(
            tiny_world.model_dir,
            "sensevoice_mel_vq",
            tiny_world.codec_dir,
            frontend_path=frontend_dir,
        )
