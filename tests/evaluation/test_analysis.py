"""The paper's analysis: attention of speech on text, speech with text hidden, what states know."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from vita_audio.chat import build_example, prompts
from vita_audio.cli.analyse_attention import main
from vita_audio.evaluation.analysis import AttentionMap, knowledge, summarise_attention
from vita_audio.inference import CodecOptions, GenerationOptions, RuntimeOptions, SpeechPipeline, observation
from vita_audio.inference.observation import speak

GRAMMAR = "#JSGF V1.0;\ngrammar words;\npublic <words> = ( river | blue | quiet )+;\n"
READING = prompts.synthesis("the quiet river runs")


@pytest.fixture(scope="module")
def pipeline(tiny_world) -> SpeechPipeline:
    runtime = RuntimeOptions("cpu", attn_implementation="eager", engine=False)
    return SpeechPipeline.open(tiny_world.model_dir, CodecOptions("mel_vq", tiny_world.codec_dir), runtime)


@pytest.fixture
def conversations(tiny_world) -> list:
    return [READING, prompts.speech_to_speech(tiny_world.audio("question.wav"))]


def test_with_nothing_hidden_replies_are_those_of_vanilla(pipeline, conversations):
    replies = speak(pipeline, conversations, max_new_tokens=100)
    options = GenerationOptions.greedy("vanilla", max_new_tokens=100)
    for conversation, reply in zip(conversations, replies, strict=True):
        assert reply.ids == pipeline.reply(conversation, options, decode=False).token_ids
        assert speak(pipeline, [conversation], max_new_tokens=100)[0].ids == reply.ids, "alone as in a batch"
    assert [pipeline.tokenizer.decode(reply.text).strip() for reply in replies] == [
        "the quiet river runs",
        "blue",
    ]


def test_every_speech_token_has_its_attention_on_the_text(pipeline, conversations):
    for reply in speak(pipeline, conversations, max_new_tokens=100):
        markers = pipeline.tokenizer.convert_tokens_to_ids(["<|begin_of_audio|>", "<|end_of_audio|>"])
        speech = [token for token in reply.ids if token >= markers[1] or token == markers[0]]
        speech = [token for token in speech if token != markers[1]]
        assert reply.attention.shape == (len(speech), len(reply.text))
        assert (reply.attention.sum(dim=1) > 0).all()
        assert (reply.attention.sum(dim=1) < 1).all()


def test_matching_text_with_all_neighbours_is_all_text(pipeline, conversations):
    written = speak(pipeline, conversations, max_new_tokens=100)
    matching = speak(pipeline, conversations, "matching", written=written, neighbours=100, max_new_tokens=100)
    assert [reply.ids for reply in matching] == [reply.ids for reply in written]


def test_hidden_text_gets_no_attention_and_stays_written(pipeline, conversations, monkeypatch):
    written = speak(pipeline, conversations, max_new_tokens=60)
    seen = {"speech": 0.0, "text": 0.0}
    advance = observation._Rows.advance

    def watched(rows, keys):
        hidden, weights = advance(rows, keys)
        on_text = (weights * rows.text[:, : weights.shape[1]]).sum(dim=1)
        for row, speaks in enumerate(rows._speaks(rows.ids[:, -1])):
            if not rows.ended[row]:
                seen["speech" if speaks else "text"] += float(on_text[row])
        return hidden, weights

    monkeypatch.setattr(observation._Rows, "advance", watched)
    hidden = speak(pipeline, conversations, "none", written=written, max_new_tokens=100)
    assert seen["speech"] == 0
    assert seen["text"] > 0
    assert [reply.text for reply in hidden] == [reply.text for reply in written]


def test_attention_other_than_eager_is_refused(tiny_world):
    other = SpeechPipeline.open(
        tiny_world.model_dir,
        CodecOptions("mel_vq", tiny_world.codec_dir),
        RuntimeOptions("cpu", engine=False),
    )
    with pytest.raises(ValueError, match="returns no weights; open the model with eager attention"):
        speak(other, [READING])


def test_states_of_a_model_that_knows_its_samples_tell_the_next_token(pipeline, tiny_world):
    documents = [
        build_example(
            sample | {"audios": [tiny_world.audio(name) for name in sample["audios"]]},
            pipeline.tokenizer,
            tiny_world.codec,
        )
        for sample in (tiny_world.samples[task] for task in ("tts", "sqa", "sqa", "tts"))
    ]
    known = knowledge(pipeline, documents, distances=3)
    assert known.accuracy.shape == (11, 3)
    assert (known.accuracy[:, 0] > 0.9).all()
    assert known.accuracy[0, 2] <= known.accuracy[0, 0]
    assert all(count > 10 for count in known.positions)
    with pytest.raises(ValueError, match="1 documents; the accuracy of states needs two"):
        knowledge(pipeline, documents[:1])


def test_attention_that_follows_the_text_has_its_order_and_focus():
    diagonal = torch.eye(6).repeat_interleave(3, dim=0) * 0.4 + 0.01
    found = summarise_attention([AttentionMap("a", list("abcdef"), diagonal)])
    assert found["order"] > 0.95
    assert found["on_text"] == pytest.approx(0.46)
    assert found["on_matching"] > 0.9 > 0.6 > found["even"]
    level = replace(AttentionMap("b", list("abcdef"), torch.full((18, 6), 0.05)), id="b")
    assert summarise_attention([level])["on_matching"] == pytest.approx(summarise_attention([level])["even"])


def test_the_command_writes_figures_scores_and_sounds(tiny_world, tmp_path, write_lines, capsys):
    samples = [{"id": str(number)} | tiny_world.samples["tts"] for number in range(3)]
    path = write_lines(tmp_path / "tts.jsonl", samples)
    grammar = tmp_path / "words.gram"
    grammar.write_text(GRAMMAR)
    flags = [
        "--model_name_or_path", tiny_world.model_dir, "--audio_tokenizer_type", "mel_vq", "--audio_tokenizer_path",
        tiny_world.codec_dir, "--json_path", path, "--data_root", tiny_world.data_dir, "--grammar", grammar,
        "--transcriber_processes", 0, "--max_new_tokens", 60, "--limit", 2, "--device", "cpu", "--output_dir",
        tmp_path / "out",
    ]  # fmt: skip
    main([str(flag) for flag in flags])
    out = tmp_path / "out"
    found = json.loads((out / "analysis.json").read_text())
    assert list(found["hiding"]) == ["all", "matching", "none"]
    assert all(one["utterances"] == 2 and one["wer"] >= 0 for one in found["hiding"].values())
    assert len(found["heads"]["accuracy"]) == 11
    for name in ("attention", "hiding", "heads"):
        assert (out / f"{name}.png").stat().st_size > 5000
        assert (out / f"{name}.svg").read_text().rstrip().endswith("</svg>")
    assert (out / "wav" / "none" / "0.wav").is_file()
    assert "| all but the matching |" in (out / "analysis.md").read_text()
    assert capsys.readouterr().out.rstrip().endswith("analysis.md")
    with pytest.raises(SystemExit):
        main([*map(str, flags), "--documents", "1"])
