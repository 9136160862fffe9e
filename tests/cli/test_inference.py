"""The command that talks to a model."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from vita_audio.cli import inference
from vita_audio.cli.inference import main
from vita_audio.inference import GenerationOptions, Reply, SpeechPipeline, Timings, prompts


@pytest.fixture
def flags(tiny_world, codec_flags, tmp_path) -> list[str]:
    return ["--model_name_or_path", str(tiny_world.model_dir), *codec_flags, "--output_dir", str(tmp_path)]


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "replies.jsonl").read_text().splitlines()]


def test_every_kind_of_request_is_answered_whole_and_streaming(flags, tiny_world, tmp_path):
    main(
        [
            *flags, "--text", "hello", "--question", tiny_world.audio("question.wav"),
            "--asr", tiny_world.audio("question.wav"), "--tts", "the quiet river runs",
            "--voice", tiny_world.audio("answer.wav"), "--samples", str(tiny_world.data_dir / "sqa.jsonl"),
            "--max-new-tokens", "60", "--mode", "boost",
        ]
    )  # fmt: skip
    replies = records(tmp_path)
    assert [(reply["task"], reply["streaming"]) for reply in replies] == [
        (task, streaming)
        for task in ("text", "speech QA", "ASR", "TTS", "voice clone", "speech QA")
        for streaming in (False, True)
    ]
    assert all((tmp_path / r["wav"]).is_file() for r in replies if r["task"] in ("TTS", "speech QA"))
    assert {reply["text"] for reply in replies if reply["task"] == "ASR"} == {"the blue key"}


def test_each_record_says_how_it_was_made(flags, tiny_world, tmp_path):
    question = ["--question", tiny_world.audio("question.wav"), "--no_stream", "--max_new_tokens", "60"]
    main([*flags, *question])
    main([*flags, *question, "--output_dir", str(tmp_path / "luke"), "--system_prompt", "luke"])
    (trained,), (luke,) = records(tmp_path), records(tmp_path / "luke")
    assert (trained["system"], trained["text"].strip()) == (None, "blue"), "asked as it was trained"
    assert luke["system"].startswith("Your Name: Luke")
    assert trained["options"]["do_sample"] is False
    assert trained["mode"] == "boost", "the checkpoint names none"


def test_samples_whose_ids_differ_in_punctuation_have_their_own_files(flags, tiny_world, tmp_path):
    samples = tmp_path / "samples.jsonl"
    names = ["a.b", "a/b", "a b"]
    lines = [json.dumps({"id": name} | tiny_world.samples["tts"]) for name in names]
    samples.write_text("\n".join(lines))
    main([*flags, "--samples", str(samples), "--data_root", str(tiny_world.data_dir), "--no_stream"])
    assert len({reply["wav"] for reply in records(tmp_path)}) == 3


def test_every_part_has_run_once_before_the_first_request_is_timed(flags, tiny_world, monkeypatch):
    events = []
    codec = type(tiny_world.codec)
    monkeypatch.setattr(codec, "decode", noting(events, "decode", codec.decode))
    monkeypatch.setattr(codec, "stream", noting(events, "stream", codec.stream))
    monkeypatch.setattr(SpeechPipeline, "reply", noting(events, "reply", SpeechPipeline.reply))
    monkeypatch.setattr(inference, "answer", noting(events, "answer", inference.answer))
    main([*flags, "--tts", "the quiet river runs"])
    assert {"reply", "decode", "stream"} <= set(events[: events.index("answer")])


def noting(events: list[str], name: str, call):
    def noted(*args, **kwargs):
        events.append(name)
        return call(*args, **kwargs)

    return noted


def test_the_table_fits_into_80_columns_and_keeps_its_words_whole():
    timings = Timings(0.01, 0.1, 1.2345, 2.3456, 9.0, 10.0, 160)
    reply = Reply(
        "three plus five is eight", [1] * 50, torch.zeros(64_000), 16_000, [], timings,
        GenerationOptions.greedy("balance"),
    )  # fmt: skip
    table = inference.new_table()
    question = inference.Question("voice_clone_12_clip", "voice clone", prompts.chat("x"))
    inference.add_row(table, question, True, reply)
    shown = io.StringIO()
    Console(file=shown, width=80).print(table)
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if "voice_clone_12_clip" in line)
    for cell in ("balance ~", "three plus five is", "4.0", "1234", "2346"):
        assert cell in row
    for heading in ("request", "mode", "text", "chunk", "sound", "tok/s"):
        assert any(heading in line for line in lines)


def test_without_arguments_five_lines_explain_what_to_give():
    with pytest.raises(SystemExit) as exit_:
        main([])
    lines = str(exit_.value.code).splitlines()
    assert len(lines) == 5
    for word in ("--model_name_or_path", "--audio_tokenizer_path", "--question", "quickstart.sh", "--help"):
        assert any(word in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tts", "x", "--mode", "fast"], "mtp_inference_mode='fast'"),
        (["--asr", "nowhere.wav"], "nowhere.wav: no such file"),
        ([], "nothing to answer: give --text"),
        (["--text", "x", "--voice", "voice.wav"], "--voice applies to the --tts texts"),
        (["--samples", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--text", "x", "--fast"], "unrecognized arguments: --fast"),
        (["--text", "x", "--top_k", "few"], "argument --top_k: invalid int value: 'few'"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(refusal, flags, arguments, message):
    assert refusal(main, *flags, *arguments).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "foo"], "device 'foo': "),
        (["--device", "cuda:99"], "device 'cuda:99': "),
        (["--attn_implementation", "flash_attention_2"], "attn_implementation flash_attention_2: "),
        (["--audio_tokenizer_type", "glm4voice", "--flow_path", "x"], "{codec}: holds a mel_vq codec"),
        (["--audio_tokenizer_type", "sensevoice_mel_vq", "--frontend_path", "x"], "a qwen2_mtp model does not read"),
        (["--audio_tokenizer_type", "sensevoice_mel_vq"], "--frontend_path: the sensevoice_mel_vq codec needs"),
        (["--audio_tokenizer_type", "glm4voice"], "--flow_path: the glm4voice codec needs it for speech output"),
        (["--audio_tokenizer_path", "nowhere"], "nowhere: no such folder"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ],
)  # fmt: skip
def test_what_this_machine_or_the_codec_lacks_is_reported_before_the_model_loads(
    refusal, flags, tiny_world, monkeypatch, arguments, message
):
    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("vita_audio.models.open_model", load)
    said = refusal(main, *flags, "--text", "x", *arguments)
    assert said.startswith(message.format(codec=tiny_world.codec_dir))


def test_a_codec_without_folder_cannot_listen(refusal, tiny_world):
    model = ["--model_name_or_path", tiny_world.model_dir, "--device", "cpu"]
    said = refusal(main, *model, "--asr", tiny_world.audio("question.wav"))
    assert said == "--audio_tokenizer_path: the glm4voice codec needs it for speech input"


def test_without_weights_the_refusal_points_to_the_quickstart(refusal, codec_flags):
    said = refusal(main, "--model_name_or_path", "VITA-Audio-Boost", *codec_flags, "--text", "hello")
    assert said.startswith("VITA-Audio-Boost: no such folder")
    assert said.endswith("; bash scripts/quickstart.sh makes a small one to talk to")
