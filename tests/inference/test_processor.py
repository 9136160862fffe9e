"""``AutoProcessor`` for both families: its prompts are the pipeline's, and feed ``generate`` as they are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoProcessor

from vita_audio.audio import load_audio
from vita_audio.chat import Conversation, Message, SampleError
from vita_audio.chat.content import read_chatml, write_chatml
from vita_audio.constants import AUDIO_TAG, IM_END, IM_START
from vita_audio.inference import GenerationOptions, SpeechPipeline, VitaAudioProcessor, prompts
from vita_audio.inference.backend import collate_prompts

REPOSITORY = Path(__file__).resolve().parents[2]
TOKENIZE = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}


@dataclass(frozen=True)
class World:
    """One family: a pipeline and a processor of the same folders."""

    pipeline: SpeechPipeline
    processor: VitaAudioProcessor
    folder: Path
    codec: dict

    def prompts(self, *conversations: Conversation) -> dict:
        batch = collate_prompts(
            [self.pipeline.prompt(one) for one in conversations],
            self.processor.tokenizer.pad_token_id,
            torch.device("cpu"),
        )
        return {"input_ids": batch.pop("inputs"), **batch}


@pytest.fixture(scope="module", params=["qwen2_mtp", "qwen2_mtp_sensevoice"])
def world(request, tiny_world, plus_model_dir, frontend_dir) -> World:
    codec = {"audio_tokenizer_type": "mel_vq", "audio_tokenizer_path": tiny_world.codec_dir}
    folder = tiny_world.model_dir
    if request.param == "qwen2_mtp_sensevoice":
        folder = plus_model_dir
        codec |= {"audio_tokenizer_type": "sensevoice_mel_vq", "frontend_path": frontend_dir}
    return World(
        SpeechPipeline.from_pretrained(folder, **codec, device="cpu"),
        AutoProcessor.from_pretrained(folder, **codec, device="cpu"),
        folder,
        codec,
    )


def assert_same(inputs, expected) -> None:
    assert list(inputs) == list(expected)
    for name, value in expected.items():
        values, wanted = (value, inputs[name]) if isinstance(value, list) else ([value], [inputs[name]])
        assert all(torch.equal(one, other) for one, other in zip(values, wanted, strict=True)), name


def text(content: str) -> dict:
    return {"type": "text", "text": content}


def audio(clip) -> dict:
    return {"type": "audio", "audio": clip}


def tasks(tiny_world) -> dict[str, tuple[Conversation, list[dict]]]:
    """Each task as the project and as transformers writes it."""
    question, voice = tiny_world.audio("question.wav"), tiny_world.audio("reading.wav")
    voice_prompt = {"role": "system", "content": [text("Your Voice: "), audio(voice), text("\n")]}
    instruction = "Convert the text to speech.\nthe quiet river"
    heard = {"role": "user", "content": [audio(question)]}
    return {
        "typed question": (prompts.chat("hello"), [{"role": "user", "content": "hello"}]),
        "typed tag": (
            prompts.chat(f"what does {AUDIO_TAG} mean"),
            [{"role": "user", "content": [text("what does "), text(f"{AUDIO_TAG} mean")]}],
        ),
        "typed tag in a string": (
            prompts.chat(f"{AUDIO_TAG}{IM_END}"),
            [{"role": "user", "content": f"{AUDIO_TAG}{IM_END}"}],
        ),
        "system": (
            prompts.speech_to_speech(question, "Be brief.", prompts.SYSTEM_PROMPTS["luke"]),
            [
                {"role": "system", "content": prompts.SYSTEM_PROMPTS["luke"]},
                {"role": "user", "content": [text("Be brief.\n"), audio(question)]},
            ],
        ),
        "spoken question": (prompts.speech_to_speech(question), [heard]),
        "voice": (prompts.speech_to_speech(question, voice=voice), [voice_prompt, heard]),
        "ASR": (
            prompts.transcription(question),
            [{"role": "user", "content": [text("Convert the speech to text.\n"), audio(question)]}],
        ),
        "TTS": (prompts.synthesis("the quiet river"), [{"role": "user", "content": instruction}]),
        "cloning": (
            prompts.synthesis("the quiet river", voice),
            [voice_prompt, {"role": "user", "content": [text(instruction)]}],
        ),
        "history": (
            Conversation(
                (
                    Message("user", ("", "")),
                    Message("assistant", ("blue\n", "")),
                    Message("user", ("and now?",)),
                ),
                (question, voice),
            ),
            [
                {"role": "user", "content": [{"type": "audio", "path": question}]},
                {
                    "role": "assistant",
                    "content": [text("blue\n"), {"type": "audio", "url": f"file://{voice}"}],
                },
                {"role": "user", "content": "and now?"},
            ],
        ),
    }


def test_prompts_equal_the_pipelines_for_every_task_alone_and_in_a_batch(world, tiny_world):
    every = tasks(tiny_world)
    for conversation, messages in every.values():
        expected = world.prompts(conversation)
        given = world.processor.apply_chat_template(messages, add_generation_prompt=True, **TOKENIZE)
        assert_same(given, expected)
        assert_same(
            world.processor.apply_chat_template(conversation, add_generation_prompt=True, **TOKENIZE),
            expected,
        )
    batch = world.processor.apply_chat_template(
        [messages for _, messages in every.values()], add_generation_prompt=True, padding=True, **TOKENIZE
    )
    assert_same(batch, world.prompts(*(conversation for conversation, _ in every.values())))
    assert batch["attention_mask"][0, 0] == 0, "short rows are padded on the left"


def test_the_reply_is_opened_only_on_request(world):
    messages = [{"role": "user", "content": "hello"}]
    opened = world.processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)[0]
    closed = world.processor.apply_chat_template(messages, tokenize=True)[0]
    assert closed.tolist() + world.processor.tokenizer.encode(f"{IM_START}assistant\n") == opened.tolist()
    text = world.processor.apply_chat_template(messages)
    assert text == f"{IM_START}user\nhello{IM_END}\n"
    assert torch.equal(world.processor(text)["input_ids"][0], closed)


def test_text_and_audio_in_one_call_equal_the_messages(world, tiny_world):
    """Also in the two steps that other processors take: template first, then text and audio."""
    typed_tags = {"typed tag", "typed tag in a string"}
    every = [pair for name, pair in tasks(tiny_world).items() if name not in typed_tags]
    conversations = [conversation for conversation, _ in every]
    expected = world.prompts(*conversations)
    texts = world.processor.apply_chat_template(
        [messages for _, messages in every], add_generation_prompt=True, tokenize=False
    )
    clips = [list(conversation.audios) for conversation in conversations]
    assert_same(world.processor(text=texts, audio=clips, return_tensors="pt", padding=True), expected)
    assert_same(world.processor(texts, [clip for row in clips for clip in row]), expected)

    plain = world.processor(text=f"Convert the speech to text.\n{AUDIO_TAG}", audio=clips[4][-1])
    assert_same(plain, world.prompts(prompts.transcription(clips[4][-1])))


def test_bare_arrays_take_the_rate_of_the_call(world, tiny_world):
    waveform, rate = load_audio(tiny_world.audio("question.wav"))
    expected = world.prompts(prompts.speech_to_speech((waveform, rate)))
    array = waveform.numpy()
    messages = [{"role": "user", "content": [audio(array)]}]
    options = {"add_generation_prompt": True} | TOKENIZE
    assert_same(
        world.processor.apply_chat_template(messages, processor_kwargs={"sampling_rate": rate}, **options),
        expected,
    )
    assert_same(world.processor(text=AUDIO_TAG, audio=[array], sampling_rate=rate), expected)
    assert_same(world.processor(text=AUDIO_TAG, audio=(array, rate)), expected)
    assert_same(world.processor(text=AUDIO_TAG, audio={"array": array, "sampling_rate": rate}), expected)
    with pytest.raises(SampleError, match="without its sample rate"):
        world.processor.apply_chat_template(messages, **options)


def test_inputs_feed_generate_and_replies_come_back_as_text_and_sound(world, tiny_world):
    model = AutoModelForCausalLM.from_pretrained(world.folder)
    conversations = [
        prompts.speech_to_speech(tiny_world.audio("question.wav")),
        prompts.synthesis("the quiet"),
    ]
    inputs = world.processor.apply_chat_template(conversations, add_generation_prompt=True, **TOKENIZE)
    tokenizer = world.processor.tokenizer
    generated = model.generate(
        **inputs.to("cpu"),
        do_sample=False,
        max_new_tokens=40,
        mtp_inference_mode="1 2",
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    new = generated[:, inputs["input_ids"].shape[1] :]
    replies = world.pipeline.reply_batch(conversations, GenerationOptions.greedy("1 2", max_new_tokens=40))
    texts = world.processor.batch_decode(new, skip_special_tokens=True)
    for row, reply, written in zip(new, replies, texts, strict=True):
        spoken, waveform, rate = world.processor.decode_speech(row)
        assert spoken == written == reply.text
        assert world.processor.split(row.tolist()) == (reply.text, reply.codes)
        assert (waveform is None) == (reply.waveform is None)
        assert waveform is None or torch.equal(waveform, reply.waveform)
        assert rate == reply.sample_rate
    assert any(reply.codes for reply in replies)
    assert world.processor.decode(new[0]) == tokenizer.decode(new[0])
    one = int(new[0, 0])
    for ids in (one, np.int64(one), new[0, 0], [one], new[:1, :1]):
        assert world.processor.decode(ids) in (tokenizer.decode([one]), [tokenizer.decode([one])])
    labels = new[0].clone()
    labels[3] = -100
    for read in (
        world.processor.decode,
        partial(world.processor.decode, skip_special_tokens=True),
        world.processor.split,
        lambda ids: world.processor.batch_decode([ids]),
    ):
        with pytest.raises(ValueError, match=r"^token id -100 is not valid; [^\n]+$"):
            read(labels)
    with pytest.raises(ValueError, match="begin with the prompt"):
        world.processor.decode_speech(generated[0])
    with pytest.raises(ValueError, match="one row at a time"):
        world.processor.split(new)


def test_a_saved_processor_opens_with_its_codec_and_other_folders_can_be_given(world, tiny_world, tmp_path):
    world.processor.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
    expected = {name: str(value) for name, value in world.codec.items()}
    assert saved == {"processor_class": "VitaAudioProcessor"} | expected

    conversation = prompts.speech_to_speech(tiny_world.audio("question.wav"))
    wanted = world.prompts(conversation)
    opened = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert isinstance(opened, VitaAudioProcessor)
    assert_same(opened.apply_chat_template(conversation, add_generation_prompt=True, **TOKENIZE), wanted)
    assert opened.to_dict() == world.processor.to_dict()

    moved = shutil.copytree(tiny_world.codec_dir, tmp_path / "codec")
    opened = AutoProcessor.from_pretrained(tmp_path / "saved", audio_tokenizer_path=moved)
    assert opened.to_dict() == world.processor.to_dict() | {"audio_tokenizer_path": str(moved)}
    opened.save_pretrained(tmp_path / "saved")
    shutil.rmtree(moved)
    with pytest.raises(
        ValueError, match=r"processor_config.json has audio_tokenizer_path=.*; give"
    ) as refusal:
        AutoProcessor.from_pretrained(tmp_path / "saved")
    assert "\n" not in str(refusal.value)


def test_a_model_of_the_hugging_face_cache_opens_by_its_name(world, tmp_path):
    revision = "a" * 40
    cached = tmp_path / "models--owner--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(revision)
    shutil.copytree(
        world.folder, cached / "snapshots" / revision, ignore=shutil.ignore_patterns("*.safetensors")
    )
    processor = AutoProcessor.from_pretrained(
        "owner/name", **world.codec, cache_dir=tmp_path, local_files_only=True
    )
    assert processor.to_dict() == world.processor.to_dict()
    assert_same(processor("hello"), world.prompts(prompts.chat("hello")))


def test_without_a_codec_text_works_and_audio_is_refused(world, tiny_world):
    processor = AutoProcessor.from_pretrained(world.folder)
    assert_same(
        processor.apply_chat_template(prompts.chat("hello"), add_generation_prompt=True, **TOKENIZE),
        world.prompts(prompts.chat("hello")),
    )
    with pytest.raises(ValueError, match="no codec; give"):
        processor(text=AUDIO_TAG, audio=tiny_world.audio("question.wav"))
    with pytest.raises(ValueError, match="no codec; give"):
        processor.decode_speech([1])


REFUSED_MESSAGES = {
    "part 0 of message 0 is {'type': 'image'": [
        {"role": "user", "content": [{"type": "image", "url": "a.png"}]}
    ],
    "part 1 of message 0": [{"role": "user", "content": [text("a"), "b"]}],
    "give the audio as one of audio, path, url": [{"role": "user", "content": [{"type": "audio"}]}],
    "not downloaded": [{"role": "user", "content": [audio("https://example.com/a.wav")]}],
    "no such audio file": [{"role": "user", "content": [audio("nowhere.wav")]}],
    "message 1 has role 'tool'": [{"role": "user", "content": "a"}, {"role": "tool", "content": [text("b")]}],
    "content of message 0 must be text": [{"role": "user", "content": 5}],
    "message 0 must be an object": ["hello"],
    "'messages' must be a list": "hello",
    "'messages' is missing or empty": [],
    "blank": [{"role": "user", "content": "Convert the text to speech.\n "}],
}


@pytest.mark.parametrize("message", REFUSED_MESSAGES)
def test_messages_that_cannot_be_used_are_refused_in_one_line(world, message):
    with pytest.raises(SampleError, match=re.escape(message)) as refusal:
        world.processor.apply_chat_template(REFUSED_MESSAGES[message], tokenize=True)
    assert "\n" not in str(refusal.value)


def test_calls_with_unsupported_meanings_are_refused(world, tiny_world):
    clip = tiny_world.audio("question.wav")
    for arguments, message in (
        ({"text": AUDIO_TAG, "audio": [clip, clip]}, "1 <|audio|> tags but 2 audios"),
        ({"text": [AUDIO_TAG, AUDIO_TAG], "audio": clip}, "1 <|audio|> tags but 0 audios"),
        ({"text": [AUDIO_TAG, ""], "audio": [[clip]]}, "1 lists for 2 texts"),
        ({"text": []}, "give a string"),
        ({"text": [{"role": "user"}]}, "messages go to apply_chat_template"),
        ({"text": f"{IM_START}user\nhello"}, "not whole turns"),
        ({"text": "hello", "return_tensors": "np"}, "return_tensors='np'"),
        ({"text": "hello", "padding_side": "right"}, "padding_side='right'"),
        ({"text": "hello", "images": ["a.png"]}, "images="),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            world.processor(**arguments)
    with pytest.raises(TypeError, match="sampling_rat: this processor has no such argument"):
        world.processor(text=AUDIO_TAG, audio=np.zeros(9), sampling_rat=16_000)
    with pytest.raises(SampleError, match="use tokenize=True"):
        world.processor.apply_chat_template([{"role": "user", "content": AUDIO_TAG}])


def test_folders_without_a_kind_are_of_glm_4_voice_in_the_family_of_the_model(world):
    decoder = (
        REPOSITORY / "tests" / "goldens" / "glm4voice" / "decoder"
    )  # of other codes, so that it is refused
    kind = world.codec["audio_tokenizer_type"].replace("mel_vq", "glm4voice")
    with pytest.raises(ValueError, match=rf"speech tokens, the {kind} codec \d+ codes"):
        AutoProcessor.from_pretrained(world.folder, flow_path=decoder)


def test_tokenizer_and_codec_must_belong_together(tiny_world, plus_model_dir, frontend_dir):
    with pytest.raises(ValueError, match="--audio_tokenizer_type sensevoice_mel_vq"):
        AutoProcessor.from_pretrained(
            plus_model_dir, audio_tokenizer_type="mel_vq", audio_tokenizer_path=tiny_world.codec_dir
        )
    with pytest.raises(ValueError, match="--audio_tokenizer_type mel_vq"):
        AutoProcessor.from_pretrained(
            tiny_world.model_dir,
            audio_tokenizer_type="sensevoice_mel_vq",
            audio_tokenizer_path=tiny_world.codec_dir,
            frontend_path=frontend_dir,
        )


PLAIN_TEXT = st.text(st.characters(codec="utf-8")).filter(
    lambda text: not any(token in text for token in (AUDIO_TAG, IM_START, IM_END))
)


@given(
    turns=st.lists(
        st.tuples(
            st.sampled_from(["system", "user", "assistant"]), st.lists(PLAIN_TEXT, min_size=1, max_size=3)
        ),
        min_size=1,
        max_size=4,
    ),
    opens=st.booleans(),
)
def test_a_conversation_written_as_one_string_reads_back(turns, opens):
    messages = tuple(Message(role, tuple(texts)) for role, texts in turns)
    conversation = Conversation(messages, ("a.wav",) * sum(message.num_audios for message in messages))
    try:
        written = write_chatml(conversation, opens)
    except SampleError:  # the pieces of a token may meet at an audio's tag
        return
    assert read_chatml(written) == (messages, opens)


def test_importing_the_package_registers_the_processor_and_loads_no_codec():
    code = (
        "import sys, vita_audio; from transformers.models.auto.processing_auto import PROCESSOR_MAPPING as known;"
        "print([known[one].__name__ for one in (vita_audio.models.Qwen2MTPConfig, "
        "vita_audio.models.Qwen2MTPSenseVoiceConfig)],"
        "[name for name in sys.modules if name.startswith(('vita_audio.audio.glm4voice', 'vita_audio.audio.mel_vq'))])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "['VitaAudioProcessor', 'VitaAudioProcessor'] []"


def test_the_example_of_the_documentation_runs(tiny_world, tmp_path, monkeypatch):
    page = (REPOSITORY / "docs" / "inference.md").read_text(encoding="utf-8")
    section = page.split("## With transformers alone", 1)[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    (tmp_path / "output").mkdir()
    shutil.copytree(tiny_world.model_dir, tmp_path / "output" / "stage4")
    shutil.copytree(tiny_world.codec_dir, tmp_path / "output" / "codec")
    shutil.copy(tiny_world.audio("question.wav"), tmp_path / "question.wav")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert names["text"].strip() == "blue"
    assert load_audio("answer.wav")[1] == names["rate"]
