"""Plans scripts/finetune_own_data.sh: checks the model and the data, and says what to train, for how long.

    python -m vita_audio.cli.own_voice own/asr.jsonl own/tts.jsonl --model MODEL --out OUT

Writes OUT/mix.yaml, and prints the settings of the training as lines of shell. Everything that would stop the training
later is refused here in one line.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile

from vita_audio.audio import is_continuous_kind
from vita_audio.audio.archives import is_stored
from vita_audio.chat import prompts, read_samples
from vita_audio.cli.arguments import command_parser, run_command
from vita_audio.files import read_json, write_text
from vita_audio.models import open_config
from vita_audio.models.folder import CheckpointError
from vita_audio.provenance import RUN_FILE

CODES_PER_SECOND = 12.5
_TOKENS_AROUND = 30
"""Tokens of a sample beside its speech: the template, the request and the transcript."""
_USUAL_SECONDS = 5.0
_FEWEST_STEPS, _MOST_STEPS = 40, 4000
_MIX = """# Written by scripts/finetune_own_data.sh.
dataset:
  own:
    data_paths: {own}
"""
_OLD = """  old:
    num: {number}  # of each file; others in each epoch
    data_paths: {old}
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Print the settings.

    Raises:
        ValueError: model, codec or data cannot be used; one line.
    """
    options = parse_options(argv)
    settings = model_settings(options)
    counts, seconds, say = read_data(options.data, options.data_root)
    if not counts.total():
        raise ValueError(f"{options.data[0]}: no samples; see tools/prepare_data.py folder")
    old = [path for path in options.old_data if path]
    for path in old:
        next(read_samples(path, options.data_root))  # refuses a file that cannot be read
    tokens = seconds * CODES_PER_SECOND + counts.total() * _TOKENS_AROUND
    # A third of the rows is old data.
    share = 1.5 if old else 1.0
    rows = math.ceil(options.epochs * share * tokens / options.seq_length)
    steps = options.steps or min(_MOST_STEPS, max(_FEWEST_STEPS, math.ceil(rows / options.rows_per_step)))
    write_mix(options, old, counts.total())
    settings |= {
        "DATASET_NAME": str(options.out.resolve() / "mix.yaml"),
        "MAX_STEPS": str(steps),
        "SAY": options.say or say or "good morning",
    }
    for name, value in settings.items():
        print(f"{name}={shlex.quote(value)}")
    shown = ", ".join(f"{task} {count}" for task, count in counts.items())
    print(f"own data: {shown}; {seconds / 60:.1f} minutes of speech; {steps} steps", file=sys.stderr)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("data", nargs="+", help="JSON lines, as tools/prepare_data.py folder writes them")
    parser.add_argument("--model", required=True)
    parser.add_argument("--codec", default="")
    parser.add_argument("--codec_type", default="")
    parser.add_argument("--data_root", default=".", help="base folder of relative paths")
    parser.add_argument("--old_data", nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--say", default="")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--seq_length", type=int, required=True)
    parser.add_argument("--rows_per_step", type=int, required=True)
    options = parser.parse_args(argv)
    if options.steps < 0 or not options.epochs > 0:
        parser.error("--steps and --epochs must be above 0")
    return options


def model_settings(options: argparse.Namespace) -> dict[str, str]:
    """Model, codec and stage script; what is not given comes from the model's ``run.json``.

    Raises:
        ValueError: the model or the codec cannot be used.
    """
    config = open_config(options.model)
    plus = bool(getattr(config, "continuous_input", False))
    heads = getattr(config, "num_nextn_predict_layers", 0)
    file = Path(options.model) / RUN_FILE
    trained: dict[str, Any] = read_json(file)["arguments"] if file.is_file() else {}
    published = "sensevoice_glm4voice" if plus else "glm4voice"
    kind = options.codec_type or trained.get("audio_tokenizer_type") or published
    codec = options.codec or trained.get("audio_tokenizer_path") or ""
    if not codec or not Path(codec).exists():
        raise CheckpointError(
            f"--codec {codec}: no such folder; give the codec that the model was trained with"
        )
    if is_continuous_kind(kind) is not plus:
        raise CheckpointError(
            f"--codec_type {kind}: does not fit {options.model}, a {config.model_type} model"
        )
    settings = {
        "MODEL_NAME_OR_PATH": str(Path(options.model).resolve()),
        "NUM_HEADS": str(heads),
        "AUDIO_TOKENIZER_TYPE": kind,
        "AUDIO_TOKENIZER_PATH": str(Path(codec).resolve()),
        "STAGE_SCRIPT": f"finetune_{'sensevoice_' if plus else ''}glm4voice_mtp10_stage2.sh",
    }
    frontend = trained.get("audio_model_name_or_path")
    if plus and frontend and Path(frontend).exists():
        settings["AUDIO_MODEL_NAME_OR_PATH"] = str(Path(frontend).resolve())
    return settings


def read_data(files: Sequence[str], data_root: str) -> tuple[Counter[str], float, str]:
    """Samples by task, seconds of speech, and a sentence that the voice says in them.

    Raises:
        ValueError: a file or a recording cannot be read.
    """
    counts: Counter[str] = Counter()
    seconds, say = 0.0, ""
    for file in files:
        for number, sample in read_samples(file, data_root):
            question = prompts.from_sample(sample)
            task = prompts.task_of(question)
            counts[task] += 1
            if task == "TTS":
                say = say or prompts.requested_text(question.messages[-1])
            for audio in map(str, sample.audios):
                if not is_stored(audio):
                    raise ValueError(
                        f"{file}, line {number}: {audio}: no such file; set DATA_ROOT to the folder that it starts from"
                    )
                seconds += duration(audio)
    return counts, seconds, say


def duration(path: str) -> float:
    """Seconds of a recording; of a format whose header says nothing, those of a usual sentence."""
    try:
        return float(soundfile.info(path).duration)
    except (RuntimeError, OSError):
        return _USUAL_SECONDS


def write_mix(options: argparse.Namespace, old: Sequence[str], own_samples: int) -> None:
    """Write the mix: the own data whole, and half as many samples of old data."""

    def listed(paths: Sequence[str]) -> str:
        return "[" + ", ".join(json.dumps(str(Path(path).resolve())) for path in paths) + "]"

    text = _MIX.format(own=listed(options.data))
    if old:
        text += _OLD.format(old=listed(old), number=max(1, round(own_samples / 2 / len(old))))
    write_text(options.out / "mix.yaml", text)


if __name__ == "__main__":
    run_command(main)
