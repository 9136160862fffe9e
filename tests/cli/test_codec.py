"""The codec from the command line."""

from __future__ import annotations

import json

import pytest
import torch

from vita_audio.audio import load_audio
from vita_audio.cli.codec import main


@pytest.fixture
def flags(tiny_world) -> list[str]:
    return ["--tokenizer-type", "mel_vq", "--tokenizer", str(tiny_world.codec_dir), "--device", "cpu"]


def test_codes_are_printed_or_written_and_decoded_again(flags, tiny_world, tmp_path, capsys):
    clips = [tiny_world.audio("question.wav"), tiny_world.audio("answer.wav")]
    main(["encode", *clips, *flags])
    codes = json.loads(capsys.readouterr().out)
    assert codes == [tiny_world.codec.encode(clip) for clip in clips]
    main(["encode", *clips, *flags, "--output", str(tmp_path / "codes.json")])
    assert json.loads((tmp_path / "codes.json").read_text()) == codes
    main(["decode", str(tmp_path / "codes.json"), *flags, "--output", str(tmp_path / "again.wav")])
    waveform, rate = load_audio(tmp_path / "again.wav")
    assert rate == tiny_world.codec.sample_rate
    torch.testing.assert_close(waveform, tiny_world.codec.decode(codes[0]), atol=1e-4, rtol=0)


def test_a_round_trip_and_a_stream_give_the_same_sound_and_their_speed(flags, tiny_world, tmp_path, capsys):
    clip = tiny_world.audio("answer.wav")
    main(["round-trip", clip, *flags, "--output", str(tmp_path / "whole.wav")])
    (tmp_path / "codes.json").write_text(json.dumps(tiny_world.codec.encode(clip)))
    main(
        [
            "stream",
            str(tmp_path / "codes.json"),
            *flags,
            "--piece",
            "7",
            "--output",
            str(tmp_path / "stream.wav"),
        ]
    )
    assert capsys.readouterr().err.count("real-time factor") >= 3
    whole, streamed = (load_audio(tmp_path / f"{name}.wav")[0] for name in ("whole", "stream"))
    assert len(whole) == len(streamed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "nowhere.wav"], "nowhere.wav: "),
        (["encode", "{clip}", "--device", "foo"], "device 'foo': "),
        (["encode", "{clip}", "--tokenizer", "nowhere"], "nowhere: no such folder"),
        (["encode", "{clip}", "--tokenizer_type", "glm4voice"], "{codec}: holds a mel_vq codec"),
        (["encode", "{clip}", "--compare_bf16"], "--compare_bf16: the mel_vq codec has one precision only"),
        (["decode", "{clip}", "--output", "x.wav"], "{clip}: not valid JSON"),
        (["decode", "{empty}", "--output", "x.wav"], "{empty}: expected a non-empty JSON list of codes"),
        (["decode", "{codes}", "--output", "x.wav"], "code 64 "),
        (["decode", "{codes}"], "the following arguments are required: --output"),
    ],
)
def test_unusable_input_is_refused_in_one_line(refusal, flags, tiny_world, tmp_path, arguments, message):
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "codes.json").write_text("[64]")
    places = {
        "clip": tiny_world.audio("question.wav"), "codec": tiny_world.codec_dir,
        "empty": tmp_path / "empty.json", "codes": tmp_path / "codes.json",
    }  # fmt: skip
    command, *rest = [argument.format(**places) for argument in arguments]
    assert refusal(main, command, *flags, *rest).startswith(message.format(**places))
