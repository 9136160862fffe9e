"""The pipeline on a tiny model that knows three samples by heart."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import zip_longest

import pytest
import torch

from vita_audio.chat import ReplyParser
from vita_audio.engine import SpeechWorker
from vita_audio.inference import (
    AudioChunk,
    CodecOptions,
    GenerationOptions,
    Reply,
    Request,
    RuntimeOptions,
    SpeechPipeline,
    TextDelta,
    collect,
    prompts,
)
from vita_audio.models import Qwen2MTPConfig
from vita_audio.models.configuration import num_positions

MODES = ["vanilla", "balance", "boost", "turbo"]
READING = "the quiet river runs"


@pytest.fixture(scope="module", params=[True, False], ids=["engine", "generate"])
def pipeline(tiny_world, request) -> SpeechPipeline:
    return open_pipeline(tiny_world, request.param)


@pytest.fixture(scope="module")
def reference(tiny_world) -> SpeechPipeline:
    """For what only the loop of ``generate()`` shows: the passes of the model's own modules."""
    return open_pipeline(tiny_world, False)


def open_pipeline(world, engine: bool) -> SpeechPipeline:
    codec = CodecOptions("mel_vq", world.codec_dir)
    return SpeechPipeline.open(world.model_dir, codec, RuntimeOptions(device="cpu", engine=engine))


def options(mode: str = "boost", **changes) -> GenerationOptions:
    return GenerationOptions(mode=mode, max_new_tokens=120, **changes)


@pytest.mark.parametrize("mode", MODES)
def test_a_text_is_read_aloud_with_the_learnt_codes(pipeline, tiny_world, mode):
    reply = pipeline.synthesize(READING, options=options(mode))
    assert reply.text == READING
    assert reply.codes == tiny_world.codec.encode(tiny_world.audio("reading.wav"))


def test_sound_that_a_thread_decodes_is_the_same_and_all_of_it_comes(tiny_world):
    ours = open_pipeline(tiny_world, True)
    expected = ours.synthesize(READING, options=options()).waveform
    with SpeechWorker(ours.codec, threaded=True) as worker:
        ours.backend._speech = worker
        events = [*ours.stream(prompts.synthesis(READING), options=options())]
    chunks = [event.samples for event in events if isinstance(event, AudioChunk)]
    assert isinstance(events[-1], Reply)
    assert torch.equal(torch.cat(chunks), events[-1].waveform)
    assert len(events[-1].waveform) == len(expected)


@pytest.mark.timeout(60)
def test_a_reply_that_ends_while_nobody_looks_is_not_waited_for(tiny_world, monkeypatch):
    """The engine's thread may end a request between two looks at it."""
    ours = open_pipeline(tiny_world, True)
    advance = ours.backend._advance

    def late(made):
        while made[0][0].finished is None:
            ours.backend.engine.step()
        monkeypatch.setattr(
            ours.backend.speech, "wait", lambda _: pytest.fail("waits for sound that is not due")
        )
        advance(made)

    monkeypatch.setattr(ours.backend, "_advance", late)
    assert ours.transcribe(tiny_world.audio("question.wav"), options=options()).text == "the blue key"


def test_with_weights_in_8_bits_the_words_are_the_same(tiny_world):
    codec = CodecOptions("mel_vq", tiny_world.codec_dir)
    small = SpeechPipeline.open(
        tiny_world.model_dir, codec, RuntimeOptions(device="cpu", quantization="int8")
    )
    reply = small.synthesize(READING, options=options())
    assert reply.text == READING
    assert reply.codes == tiny_world.codec.encode(tiny_world.audio("reading.wav"))
    assert not small.model.lm_head.weight.numel()


@pytest.mark.parametrize("mode", MODES)
def test_only_the_reply_is_decoded(pipeline, tiny_world, mode):
    reply = pipeline.speech_to_speech(tiny_world.audio("question.wav"), options=options(mode))
    answer = tiny_world.codec.encode(tiny_world.audio("answer.wav"))
    assert reply.text.strip() == "blue"
    assert reply.codes == answer
    assert torch.equal(reply.waveform, tiny_world.codec.decode(answer))
    assert reply.sample_rate == tiny_world.codec.sample_rate


def test_speech_is_transcribed_without_a_spoken_reply(pipeline, tiny_world):
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
def test_first_chunk_comes_out_of_the_prefill_in_boost_and_turbo(reference, mode, expected):
    """READING's first chunk: a text token, the begin marker and 8 codes; ten tokens, nine by the heads."""
    passes = 0

    def count(*_):
        nonlocal passes
        passes += 1

    passes_at_codes = []
    with reference.model.model.layers[0].register_forward_hook(count):
        tap_put = _record_first_chunk(reference, lambda: passes_at_codes.append(passes))
        reference.reply(prompts.synthesis(READING), options(mode), decode=False)
        tap_put.undo()
    assert passes_at_codes[0] == expected


def _record_first_chunk(pipeline, on_chunk) -> pytest.MonkeyPatch:
    patch, push = pytest.MonkeyPatch(), ReplyParser.push

    def recording_push(self, token):
        piece = push(self, token)
        if isinstance(piece, tuple):
            on_chunk()
        return piece

    patch.setattr(ReplyParser, "push", recording_push)
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


def test_closing_a_stream_stops_generation(reference):
    """A reply that would not end: closing it lets no further pass of the model happen, nor does waiting."""
    passes = 0

    def count(*_):
        nonlocal passes
        passes += 1

    endless = GenerationOptions(mode="turbo", max_new_tokens=1500)
    with pytest.MonkeyPatch.context() as patch, reference.model.model.layers[0].register_forward_hook(count):
        patch.setattr(reference.backend, "_tokens", replace(reference.backend._tokens, stops=(0,)))
        events = reference.stream(prompts.synthesis(READING), endless)
        next(events)
        before = passes
        events.close()
        assert passes == before < 20
        assert list(events) == []
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_prompts_and_replies_beyond_the_positions_of_the_model_are_refused_in_one_line(pipeline, monkeypatch):
    passes = []
    length = len(pipeline.prompt(prompts.synthesis(READING)).input_ids)
    with pipeline.model.model.register_forward_hook(lambda *_: passes.append(1)):
        monkeypatch.setattr(pipeline.model.config, "max_position_embeddings", length)
        with pytest.raises(ValueError, match=rf"^the prompt has {length} tokens, .*; shorten the prompt$"):
            pipeline.synthesize(READING, options=options())
        monkeypatch.setattr(pipeline.model.config, "max_position_embeddings", length + 119)
        with pytest.raises(ValueError, match=r"give max_new_tokens=119 or less, not 120, or shorten[^\n]*$"):
            list(pipeline.stream(prompts.synthesis(READING), options()))
        assert passes == []
        monkeypatch.setattr(pipeline.model.config, "max_position_embeddings", length + 120)
        assert pipeline.synthesize(READING, options=options()).text == READING


def test_rotary_scaling_adds_positions():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
    assert num_positions(Qwen2MTPConfig(max_position_embeddings=32768)) == 32768
    assert num_positions(Qwen2MTPConfig(max_position_embeddings=32768, rope_parameters=yarn)) == 131_072


@pytest.mark.parametrize("stop", ["<|im_end|>", "<|endoftext|>"])
def test_either_stop_token_ends_the_reply_and_generation(reference, stop):
    passes, token = 0, reference.tokenizer.convert_tokens_to_ids(stop)

    def say_it(_module, _inputs, logits):
        nonlocal passes
        passes += 1
        return logits.index_fill(-1, torch.tensor(token), 1e4)

    with reference.model.lm_head.register_forward_hook(say_it):
        reply = reference.synthesize(READING, options=options("vanilla"))
    assert (reply.token_ids, reply.timings.new_tokens, passes) == ([], 1, 1)


def test_the_given_decoder_is_opened(tiny_world):
    with pytest.raises(ValueError, match=r"^decoder_folder: no such folder"):
        SpeechPipeline.from_pretrained(tiny_world.model_dir, "glm4voice", flow_path="decoder_folder")


def test_a_listener_between_two_events_is_not_in_inference_mode(pipeline):
    for _ in pipeline.stream(prompts.synthesis(READING), options()):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_seeded_replies_are_the_same_alone_in_a_batch_in_threads_and_read_in_turn(pipeline, tiny_world):
    conversations = [prompts.synthesis(READING), prompts.speech_to_speech(tiny_world.audio("question.wav"))]
    sampled = options(do_sample=True, temperature=3.0, seed=7)
    alone = [pipeline.reply(conversation, sampled).token_ids for conversation in conversations]

    assert [reply.token_ids for reply in pipeline.reply_batch(conversations, sampled)] == alone

    with ThreadPoolExecutor(4) as threads:
        replies = list(
            threads.map(lambda conversation: pipeline.reply(conversation, sampled), conversations * 4)
        )
    assert [reply.token_ids for reply in replies] == alone * 4

    streams = [pipeline.stream(conversation, sampled) for conversation in conversations]
    read_in_turn = [[], []]
    for events in zip_longest(*streams):
        for events_read, event in zip(read_in_turn, events, strict=True):
            events_read.append(event)
    ends = [next(event for event in events if isinstance(event, Reply)) for events in read_in_turn]
    assert [reply.token_ids for reply in ends] == alone


def test_rows_of_a_batch_with_different_seeds_draw_different_tokens(pipeline):
    prompt = pipeline.prompt(prompts.synthesis(READING))
    seeded = [Request(prompt, options(do_sample=True, temperature=5.0, seed=seed)) for seed in (1, 2, 1)]
    first, second, third = collect(pipeline.backend.stream_many(seeded), 3)
    assert first.token_ids == third.token_ids != second.token_ids


def test_requests_with_different_options_do_not_share_a_batch(reference):
    prompt = reference.prompt(prompts.synthesis(READING))
    with pytest.raises(ValueError, match="share their options"):
        list(
            reference.backend.stream_many(
                [Request(prompt, options("boost")), Request(prompt, options("turbo"))]
            )
        )


def test_the_checkpoint_sets_what_a_call_leaves_open_and_the_reply_states_what_was_used(pipeline):
    stored = pipeline.model.generation_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "mtp_inference_mode", [1, 4, 3, 8, 4, 10], raising=False)
        patch.setattr(stored, "repetition_penalty", 1.05)
        used = pipeline.synthesize(READING, options=GenerationOptions(max_new_tokens=20)).options
        assert (used.mode, used.repetition_penalty, used.do_sample) == ("balance", 1.05, False)
        used = pipeline.synthesize(
            READING, options=GenerationOptions.greedy("turbo", max_new_tokens=9)
        ).options
        assert (used.mode, used.repetition_penalty, used.max_new_tokens) == ("turbo", 1.0, 9)


def test_a_repetition_penalty_reaches_the_model(pipeline):
    strong = options(repetition_penalty=50.0)
    assert (
        pipeline.synthesize(READING, options=strong).codes
        != pipeline.synthesize(READING, options=options()).codes
    )


def test_the_reply_states_which_system_message_was_used(pipeline):
    assert pipeline.chat("hi", "Speak.", options()).system == "Speak."
    assert pipeline.chat("hi", options=options()).system is None


def test_an_error_inside_generation_reaches_the_caller(pipeline):
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
    with pytest.raises(ValueError, match=r"config\.json: not found"):
        SpeechPipeline.from_pretrained(tmp_path, "mel_vq", tiny_world.codec_dir)


def test_a_codec_of_another_size_is_refused(tiny_world, tmp_path):
    from vita_audio.audio.mel_vq import MelVQConfig, MelVQTokenizer

    clips = [(torch.randn(16_000 * 8) * 0.1, 16_000)]
    MelVQTokenizer.fit(clips, MelVQConfig(codebook_size=65), epochs=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"64 speech tokens.*65 codes.*model was trained with"):
        SpeechPipeline.from_pretrained(tiny_world.model_dir, "mel_vq", tmp_path)


@pytest.mark.parametrize(
    "choice",
    [
        {"max_new_tokens": None},
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": "5"},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"seed": 1.5},
        {"seed": "a"},
        {"seed": 1 << 64},
        {"do_sample": "no"},
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused_in_one_line(choice):
    with pytest.raises(ValueError, match=rf"^{next(iter(choice))}=[^\n]+$"):
        GenerationOptions(**choice)


@pytest.mark.parametrize("changes", [{"lossless": True}, {"audio_rows": "on"}], ids=str)
def test_what_only_the_engine_can_do_is_refused_without_it(reference, changes):
    with pytest.raises(ValueError, match=r"^lossless and audio_rows need the engine; leave out engine=False"):
        reference.synthesize(READING, options=options(**changes))


def test_a_batch_of_nothing_gives_no_replies(pipeline):
    assert pipeline.reply_batch([]) == []


def test_the_number_of_rows_is_fixed_once_the_engine_is_made(tiny_world):
    backend = open_pipeline(tiny_world, engine=True).backend
    backend.max_rows = 2
    assert backend.engine.num_rows == 0
    backend.max_rows = 2
    with pytest.raises(ValueError, match="max_rows=3: the engine was made with 2 rows"):
        backend.max_rows = 3
    assert backend.max_rows == 2
