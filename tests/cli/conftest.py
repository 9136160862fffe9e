"""What tests of commands share: flags of the tiny world, and the one line of a refusal."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vita_audio.cli.arguments import one_line_refusals

Command = Callable[[list[str]], None]


@pytest.fixture
def codec_flags(tiny_world) -> list[str]:
    kind = ["--audio_tokenizer_type", "mel_vq", "--audio_tokenizer_path", str(tiny_world.codec_dir)]
    return [*kind, "--device", "cpu"]


@pytest.fixture
def refusal(capsys) -> Callable[..., str]:
    """Runs a command that must refuse its input, and returns the line that it prints."""

    def run(command: Command, *arguments: object) -> str:
        with pytest.raises(SystemExit) as exit_, one_line_refusals():
            command([str(argument) for argument in arguments])
        said = str(exit_.value) if isinstance(exit_.value.code, str) else capsys.readouterr().err.strip()
        assert "\n" not in said
        assert said.startswith("error: ")
        return said.removeprefix("error: ")

    return run
