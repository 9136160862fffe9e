"""What the command that makes codes ahead of training refuses; what it writes is tested with the token cache."""

from __future__ import annotations

import pytest

from vita_audio.cli.tokenize_audio import main


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_name", "nowhere.yaml"], "nowhere.yaml"),
        (["--audio_tokenizer_path", "nowhere"], "nowhere: no such folder"),
        (["--audio_tokenizer_type", "glm4voice"], "{codec}: holds a mel_vq codec"),
        (["--device", "cuda:99"], "device 'cuda:99': "),
        (
            ["--audio-tokenizer-type", "cosyvoice"],
            "argument --audio_tokenizer_type: invalid choice: 'cosyvoice'",
        ),
    ],
)
def test_wrong_input_is_refused_in_one_line(refusal, tiny_world, codec_flags, tmp_path, flags, message):
    mix = tmp_path / "mix.yaml"
    mix.write_text(f"dataset: {{words: {{data_paths: [{tiny_world.data_dir}/asr.jsonl]}}}}\n")
    given = ["--dataset_name", mix, *codec_flags, "--output_dir", tmp_path / "tokens"]
    assert refusal(main, *given, *flags).startswith(message.format(codec=tiny_world.codec_dir))
