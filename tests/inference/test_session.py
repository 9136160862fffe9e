"""Conversations over several turns: history, caches, interruption."""

import random
from itertools import islice

import pytest

from vita_audio.chat import ChatTokens
from vita_audio.inference import (
    AudioChunk,
    CodecOptions,
    GenerationOptions,
    Reply,
    RuntimeOptions,
    SpeechPipeline,
    prompts,
)
from vita_audio.inference.session import heard_part

OPTIONS = GenerationOptions("boost", max_new_tokens=60)


@pytest.fixture(scope="module", params=[True, False], ids=["engine", "generate"])
def pipeline(tiny_world, request):
    codec = CodecOptions("mel_vq", tiny_world.codec_dir)
    return SpeechPipeline.open(
        tiny_world.model_dir, codec, RuntimeOptions(device="cpu", engine=request.param)
    )


@pytest.fixture(scope="module")
def reference(tiny_world):
    codec = CodecOptions("mel_vq", tiny_world.codec_dir)
    return SpeechPipeline.open(tiny_world.model_dir, codec, RuntimeOptions(device="cpu", engine=False))


def continued(reference, ids, options=OPTIONS):
    """The reply of a model that never saw the conversation before."""
    output = reference.model.generate(
        reference.model.dummy_inputs["input_ids"].new_tensor([ids]),
        mtp_inference_mode=options.mode,
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=list(ChatTokens.of(reference.tokenizer).stops),
        pad_token_id=0,
    )[0, len(ids) :].tolist()
    stops = ChatTokens.of(reference.tokenizer).stops
    return output[:-1] if output[-1] in stops else output


def test_the_second_turn_reads_the_first_as_it_was_written_and_computes_only_what_is_new(
    pipeline, reference, tiny_world
):
    question = prompts.speech_to_speech(tiny_world.audio("question.wav"))
    with pipeline.session("Be brief.") as session:
        first = session.reply(question, OPTIONS)
        history = session.history
        assert history[-len(first.token_ids) - 2 : -2] == first.token_ids
        second = session.reply(prompts.chat("and now?"), OPTIONS)
        assert pipeline.tokenizer.decode(history).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
        asked = session.history[: len(session.history) - len(second.token_ids) - 2]
        assert asked[: len(history)] == history
        assert second.token_ids == continued(reference, asked)
        assert first.system == second.system == "Be brief."
        with pytest.raises(ValueError, match="system message can only begin a conversation"):
            session.reply(prompts.chat("x", system="y"), OPTIONS)


def test_an_interrupted_reply_leaves_what_was_heard_and_the_next_one_is_a_fresh_sessions(
    pipeline, reference, tiny_world
):
    chance = random.Random(0)
    questions = [
        prompts.synthesis("the quiet river runs"),
        prompts.speech_to_speech(tiny_world.audio("question.wav")),
        prompts.chat("hello there"),
    ]
    for _ in range(10):
        with pipeline.session(None) as session:
            stream = session.stream(chance.choice(questions), OPTIONS)
            events = list(islice(stream, chance.randint(1, 5)))
            stream.close()
            codes = sum(len(event.codes) for event in events if isinstance(event, AudioChunk))
            heard = chance.randint(0, codes)
            session.interrupt(heard_codes=heard)
            tokens = ChatTokens.of(pipeline.tokenizer)
            spoken = [id for id in session.history if 0 <= id - tokens.first_code < tokens.codebook_size]
            before = len(spoken)
            answer = session.reply(prompts.chat("go on"), OPTIONS)
            asked = session.history[: len(session.history) - len(answer.token_ids) - len(tokens.turn_end)]
            assert answer.token_ids == continued(reference, asked)
            assert before >= heard


def test_what_was_heard_ends_with_its_last_code_and_closes_its_speech(pipeline):
    tokens = ChatTokens.of(pipeline.tokenizer)
    begin, end, code = tokens.begin, tokens.end, tokens.first_code
    reply = [5, begin, code, code + 1, code + 2, end, 6, 7, begin, code + 3, end]
    assert heard_part(reply, 0, tokens) == []
    assert heard_part(reply, 2, tokens) == [5, begin, code, code + 1, end]
    assert heard_part(reply, 3, tokens) == [5, begin, code, code + 1, code + 2, end]
    assert heard_part(reply, 4, tokens) == reply
    assert heard_part(reply, 99, tokens) == reply
    assert heard_part([code, code + 1], 1, tokens) == [code], "a reply of speech alone has no markers"


def test_seconds_of_sound_are_counted_in_codes(pipeline):
    with pipeline.session(None) as session:
        whole = session.reply(prompts.synthesis("the quiet river runs"), OPTIONS)
        assert isinstance(whole, Reply)
        session.interrupt(heard_seconds=3.2 / pipeline.codec.frame_rate)
        tokens = ChatTokens.of(pipeline.tokenizer)
        history = session.history
        spoken = [id for id in history if 0 <= id - tokens.first_code < tokens.codebook_size]
        assert len(spoken) == 3
        with pytest.raises(ValueError, match="give heard_codes or heard_seconds"):
            session.interrupt()
