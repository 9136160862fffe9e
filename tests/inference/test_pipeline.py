"""The pipeline on a tiny model that knows three samples by heart."""

from __future__ import annotations

import threading

import pytest
import torch

from vita_audio.inference import (
    AudioChunk,
    Conversation,
    GenerationOptions,
    Reply,
    SpeechPipeline,
    TextDelta,
    prompts,
)

MODES = ["vanilla", "balance", "boost", "turbo"]
READING = "the quiet river runs"


@pytest.fixture(scope="module")
def pipeline(tiny_world) -> SpeechPipeline:
    return SpeechPipeline.from_pretrained(tiny_world.model_dir, "mel_vq", tiny_world.codec_dir, device="cpu")


def options(mode: str = "boost", **changes) -> GenerationOptions:
    return GenerationOptions(mode=mode, max_new_tokens=120, **changes)


@pytest.mark.parametrize("mode", MODES)
def test_a_text_is_read_with_the_codes_learnt(pipeline, tiny_world, mode):
    reply = pipeline.synthesize(READING, options=options(mode))
    assert reply.text == READING
    assert reply.codes == tiny_world.codec.encode(tiny_world.audio("reading.wav"))


@pytest.mark.parametrize("mode", MODES)
def test_only_the_reply_is_decoded(pipeline, tiny_world, mode):
    reply = pipeline.speech_to_speech(tiny_world.audio("question.wav"), options=options(mode))
    answer = tiny_world.codec.encode(tiny_world.audio("answer.wav"))
    assert reply.text.strip() == "blue"
    assert reply.codes == answer
    assert torch.equal(reply.waveform, tiny_world.codec.decode(answer))
    assert reply.sample_rate == tiny_world.codec.sample_rate


def test_speech_is_written_down_without_speaking(pipeline, tiny_world):
    reply = pipeline.transcribe(tiny_world.audio("question.wav"), options=options())
    assert (reply.text, reply.codes, reply.waveform) == ("the blue key", [], None)
    assert reply.timings.first_chunk is None


def test_voice_prompt_comes_before_the_question(pipeline, tiny_world):
    question, voice = tiny_world.audio("question.wav"), tiny_world.audio("answer.wav")
    prompt = pipeline.prompt(prompts.speech_to_speech(question, voice=voice))
    text = pipeline.tokenizer.decode(prompt.input_ids)
    voice_codes, question_codes = (
        "".join(f"<|audio_{code}|>" for code in tiny_world.codec.encode(audio)) for audio in (voice, question)
    )
    assert text.index(f"Your Voice: <|begin_of_audio|>{voice_codes}") < text.index(question_codes)


@pytest.mark.parametrize("mode", MODES)
def test_streamed_reply_equals_the_whole_one(pipeline, tiny_world, mode):
    whole = pipeline.synthesize(READING, options=options(mode))
    *events, last = pipeline.stream(prompts.synthesis(READING), options(mode))
    assert isinstance(last, Reply)
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == last.text == whole.text
    chunks = [event for event in events if isinstance(event, AudioChunk)]
    assert [code for chunk in chunks for code in chunk.codes] == last.codes == whole.codes
    assert torch.equal(torch.cat([chunk.samples for chunk in chunks]), last.waveform)
    torch.testing.assert_close(last.waveform, whole.waveform)
    assert last.token_ids == whole.token_ids
    assert last.timings.first_token <= last.timings.first_chunk <= last.timings.first_sound


@pytest.mark.parametrize(("mode", "expected"), [("boost", 1), ("turbo", 1), ("vanilla", 10)])
def test_first_chunk_comes_out_of_the_prefill_in_boost_and_turbo(pipeline, mode, expected):
    """READING's first chunk: a text token, the begin marker and 8 codes; ten tokens, nine by the heads."""
    passes = 0

    def count(*_):
        nonlocal passes
        passes += 1

    passes_at_codes = []
    with pipeline.model.model.layers[0].register_forward_hook(count):
        tap_put = _record_first_chunk(pipeline, lambda: passes_at_codes.append(passes))
        pipeline.reply(prompts.synthesis(READING), options(mode), decode=False)
        tap_put.undo()
    assert passes_at_codes[0] == expected


def _record_first_chunk(pipeline, on_chunk) -> pytest.MonkeyPatch:
    from vita_audio.inference.streaming import ReplySplitter

    patch, push = pytest.MonkeyPatch(), ReplySplitter.push

    def recording_push(self, token):
        piece = push(self, token)
        if isinstance(piece, tuple):
            on_chunk()
        return piece

    patch.setattr(ReplySplitter, "push", recording_push)
    return patch


def test_batched_replies_equal_single_ones(pipeline, tiny_world):
    conversations = [
        prompts.synthesis(READING),
        prompts.transcription(tiny_world.audio("question.wav")),
        prompts.speech_to_speech(tiny_world.audio("question.wav")),
    ]
    batched = pipeline.reply_batch(conversations, options())
    for conversation, reply in zip(conversations, batched, strict=True):
        assert reply.token_ids == pipeline.reply(conversation, options()).token_ids


def test_closing_a_stream_stops_generation(pipeline):
    events = pipeline.stream(prompts.synthesis(READING), GenerationOptions(max_new_tokens=1000))
    next(events)
    events.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "generation"]


def test_an_error_inside_generation_reaches_the_listener(pipeline):
    bad = GenerationOptions(do_sample=True, temperature=-1.0)
    with pytest.raises(ValueError, match="temperature"):
        list(pipeline.stream(prompts.synthesis(READING), bad))


def test_sampling_with_a_seed_repeats_and_leaves_the_global_generator_alone(pipeline):
    sampled = options(do_sample=True, temperature=5.0, seed=3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = (pipeline.synthesize(READING, options=sampled).token_ids for _ in range(2))
    assert first == second
    assert torch.equal(before, torch.get_rng_state())
    assert first != pipeline.synthesize(READING, options=options()).token_ids


def test_a_model_without_files_is_refused_in_one_line(tiny_world, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        SpeechPipeline.from_pretrained(tmp_path, "mel_vq", tiny_world.codec_dir)


def test_a_codec_of_another_size_is_refused(tiny_world, tmp_path):
    from vita_audio.audio.mel_vq import MelVQConfig, MelVQTokenizer

    clips = [(torch.randn(16_000 * 8) * 0.1, 16_000)]
    MelVQTokenizer.fit(clips, MelVQConfig(codebook_size=65), epochs=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"audio_64.*model was trained with"):
        SpeechPipeline.from_pretrained(tiny_world.model_dir, "mel_vq", tmp_path)


def test_tags_and_audios_must_agree():
    with pytest.raises(ValueError, match=r"1 <\|audio\|> tags but 0 audios"):
        Conversation([{"role": "user", "content": "<|audio|>"}])
