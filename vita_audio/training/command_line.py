"""Parses the flags of a training run, from the command line or from a JSON file.

Flags may have underscores or dashes. A JSON file of arguments (``finetune_sts.py arguments.json``) is read as the
equivalent flags; flags after it take precedence. The result is the three groups of
:mod:`vita_audio.training.arguments`, and every error is one line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from vita_audio.files import parse_settings
from vita_audio.training.arguments import (
    ArgumentError,
    DataArguments,
    ModelArguments,
    StageArguments,
    say_once,
)
from vita_audio.training.published import built_in, check_built_in

_EVAL_STEPS = 0.05
"""Share of the steps between two validations."""
_SENSEVOICE_FOLDER = "models/FunAudioLLM/SenseVoiceSmall"


def parse_arguments(
    argv: Sequence[str] | None = None,
) -> tuple[ModelArguments, DataArguments, StageArguments]:
    """Read a run's options.

    Args:
        argv: the command-line arguments. None: those of this process.

    Raises:
        ArgumentError: an option that is unknown, refused or out of range; one line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("--") and words[0].endswith(".json"):
        words = [*_words_of_json(words[0]), *words[1:]]
    groups: list[Any] = [ModelArguments, DataArguments, StageArguments]
    parser = _Parser(groups, prog="finetune_sts.py", allow_abbrev=False)
    try:
        rest = [word for flag, values in flag_values(words) for word in _without_built_in(flag, values)]
        model, data, stage = parser.parse_args_into_dataclasses(rest, look_for_args_file=False)
    except ArgumentError:
        raise
    except (TypeError, ValueError) as error:
        raise ArgumentError(" ".join(str(error).split())) from error
    if stage.use_cpu and model.attn_implementation == "flash_attention_2":
        say_once("training on CPUs: sdpa instead of flash_attention_2")
        model.attn_implementation = "sdpa"
    _find_sensevoice(model, data)
    if data.eval_dataset_name is not None:
        stage.validate_every(_EVAL_STEPS)
    elif stage.eval_steps is not None:
        raise ArgumentError(
            f"--eval_steps {stage.eval_steps}: also give --eval_dataset_name, the mix to validate on"
        )
    return model, data, stage


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Report an error in one line instead of three hundred lines of usage."""
        raise ArgumentError(message)


def flag_values(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Flags without leading dashes and with underscores, each with the words up to the next flag."""
    flag, values = None, []
    for word in words:
        if not word.startswith("--"):
            if flag is None:
                raise ArgumentError(f"{word}: flags start with --; a JSON file of arguments comes first")
            values.append(word)
            continue
        if flag is not None:
            yield flag, values
        name, equals, value = word[2:].partition("=")
        flag, values = name.replace("-", "_"), [value] if equals else []
    if flag is not None:
        yield flag, values


def _without_built_in(flag: str, values: list[str]) -> list[str]:
    """The words to parse; none for a flag with built-in behaviour, whose value is only checked."""
    if flag == "warmup_ratio" and not _is_below_one(values):
        raise ArgumentError(
            f"--warmup_ratio {' '.join(values)}: give a share of the steps, 0 or more and below 1"
        )
    if built_in(flag) is None:
        return [f"--{flag}", *values]
    check_built_in(flag, values)
    return []


def _is_below_one(values: list[str]) -> bool:
    try:
        (value,) = map(float, values)
    except ValueError:
        return False
    return 0 <= value < 1


def _words_of_json(file: str) -> list[str]:
    try:
        content = parse_settings(Path(file).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ArgumentError(f"{file}: cannot be read; give a JSON file of arguments") from error
    except ValueError as error:
        raise ArgumentError(f"{file}: not valid JSON ({error}); correct the file") from error
    if not isinstance(content, dict):
        raise ArgumentError(f"{file}: must be a JSON object of arguments; correct the file")
    words = []
    for name, value in content.items():
        if value is not None:
            words += [f"--{name.lstrip('-')}", *_words_of_value(value)]
    return words


def _words_of_value(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(item) for item in value]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]


def _find_sensevoice(model: ModelArguments, data: DataArguments) -> None:
    """Default to SenseVoice's folder in the published layout unless a flag sets another."""
    if not data.continuous_input:
        return
    if model.audio_model_name_or_path is None:
        model.audio_model_name_or_path = os.path.join(os.environ.get("ROOT_PATH", ""), _SENSEVOICE_FOLDER)
    if not Path(model.audio_model_name_or_path).exists():
        raise ArgumentError(
            f"--audio_model_name_or_path {model.audio_model_name_or_path}: no such folder; give SenseVoiceSmall's"
        )
