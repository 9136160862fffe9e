"""What a stage script would start: ``DRY_RUN=1 bash scripts/deepspeed/sts_qwen25/finetune_….sh …``.

    python -m vita_audio.cli.dry_run [TYPED …] -- COMMAND …

Prints the resolved command, every hyperparameter with its source, the parameters that train, the data, and the plan
of :mod:`vita_audio.training.planner`. Nothing is started and no folder is made. The exit status is 0 if the stage
would start, and 78, as for the stage itself, if it would be refused; the last lines say why.

The sources are ``flag`` and ``argument`` (typed after the script's name), ``environment`` (a variable of the shell),
``script`` (a default in the script), ``checkpoint`` (the model's folder) and ``default`` (the program's own).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from vita_audio.cli.finetune import choose_numerics, resolved_arguments
from vita_audio.cli.launch import REFUSED
from vita_audio.cli.plan_run import config_file, describe_plan
from vita_audio.data import CodecSpec, extend_tokenizer
from vita_audio.data.mixing import FileState, Mix, MixError, SourceSpec, read_mix
from vita_audio.models import Qwen2MTPConfig, open_tokenizer
from vita_audio.models.configuration import Qwen2MTPSenseVoiceConfig
from vita_audio.models.open import config_with_heads, open_config
from vita_audio.training import (
    ArgumentError,
    DataArguments,
    ModelArguments,
    RunFolder,
    StageArguments,
    check_input_folder,
    describe_changes,
)
from vita_audio.training.command_line import flag_values, parse_arguments
from vita_audio.training.planner import plan_run
from vita_audio.training.quiet import hush_libraries

_PROGRAM = "tools/finetune_sts.py"
_VARIABLES = {
    "num_nextn_predict_layers": ("NUM_HEADS",),
    "deepspeed": ("DEEPSPEED_CONFIG",),
    "output_dir": ("OUTPUT_DIR", "OUTPUT_ROOT"),
    "model_name_or_path": ("MODEL_NAME_OR_PATH", "OUTPUT_ROOT"),
    "lr_scheduler_kwargs": ("LR_SCHEDULER_KWARGS", "MIN_LR_RATIO"),
}
"""Variables of the stage scripts whose names are not those of their flags."""
_INTERNAL = frozenset({"do_train", "remove_unused_columns", "ignore_data_skip", "logging_nan_inf_filter"})
"""Options that have one value only."""
_NAMES = {
    alias.removeprefix("--"): entry.name
    for group in (ModelArguments, DataArguments, StageArguments)
    for entry in fields(group)
    for alias in entry.metadata.get("aliases", ())
}
"""The option of each other name, such as the published ones."""
_SIZES = Path(__file__).resolve().parents[2] / "configs/models"
_EPOCH_LABELS = ("data set", "files", "missing", "ratio", "samples", "an epoch")


@dataclass(frozen=True)
class Value:
    """A hyperparameter.

    Attributes:
        text: its value.
        source: where it comes from.
    """

    text: str
    source: str


@dataclass
class DryRun:
    """What was found.

    Attributes:
        command: the words of the command.
        processes: of the whole launch.
        values: hyperparameters by flag.
        problems: one line for each reason to refuse the start.
    """

    command: list[str]
    processes: int
    values: dict[str, Value]
    problems: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> None:
    """Print what the command would do; ``argv`` holds the typed words, ``--`` and the command.

    Raises:
        SystemExit: status 78 if the stage would be refused.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    divider = words.index("--")
    run = read_command(words[:divider], words[divider + 1 :], os.environ)
    hush_libraries()
    print(f"command\n  {shlex.join(run.command)}\n")
    sections = _sections(run)
    print("hyperparameters")
    width = max(map(len, run.values))
    for name, value in run.values.items():
        print(f"  {name:<{width}}  {value.text}  ({value.source})")
    for title, lines in sections.items():
        print("\n".join(["", title, *(f"  {line}" for line in lines)]))
    if run.problems:
        print("\nwould be refused")
        print("\n".join(f"  {problem}" for problem in run.problems))
        sys.exit(REFUSED)
    print("\nwould start")


def read_command(typed: Sequence[str], command: Sequence[str], environment: Mapping[str, str]) -> DryRun:
    """The command's flags and their sources.

    Args:
        typed: what followed the script's name: SEQ_LENGTH, TIMESTAMP and flags.
        command: the resolved command.
        environment: of the script. A variable that the script set itself is not in it.
    """
    program = next(i for i, word in enumerate(command) if word.endswith(_PROGRAM))
    given = list(typed)
    arguments = [given.pop(0) for _ in range(2) if given and not given[0].startswith("--")]
    own = command[program + 1 : len(command) - len(given)]
    values = {}
    for flag, words in flag_values(own):
        names = _VARIABLES.get(flag, (flag.upper(),))
        variable = next((name for name in names if environment.get(name)), None)
        source = "script" if variable is None else f"environment: {variable}"
        if flag == "model_max_length":
            source = "argument" if arguments[:1] not in ([], [""]) else "script"
        values[_NAMES.get(flag, flag)] = Value(" ".join(words), source)
    values |= {_NAMES.get(flag, flag): Value(" ".join(words), "flag") for flag, words in flag_values(given)}
    launcher = dict(flag_values([word for word in command[2:program] if word != "--standalone"]))
    processes = int(launcher["nproc_per_node"][0]) * int(launcher.get("nnodes", ["1"])[0])
    return DryRun(list(command), processes, values)


def _sections(run: DryRun) -> dict[str, list[str]]:
    """The parts that need the options parsed; completes the hyperparameters and finds the problems."""
    program = next(i for i, word in enumerate(run.command) if word.endswith(_PROGRAM))
    with tempfile.TemporaryDirectory() as stand_in:
        words = _with_stand_ins(run, run.command[program + 1 :], Path(stand_in))
        try:
            model, data, stage = parse_arguments(words)
        except (ValueError, OSError) as error:
            run.problems.append(str(error))
            return {}
        given = Path(run.values["model_name_or_path"].text)
        config = _config(run, model, data)
        dtype = _numerics(run, model, stage)
        _complete_values(run, config, model, data, stage)
        sections = {"continues": _continuation(run, given, model, data, stage, dtype)}
        sections["data"] = _data(run, data, stage)
        sections["trains and costs"] = _plan(run, config, model, data, stage, dtype)
    return {title: lines for title, lines in sections.items() if lines}


def _with_stand_ins(run: DryRun, words: list[str], folder: Path) -> list[str]:
    """The command's words, with the published model's config in the place of model folders that are not there."""
    (folder / "config.json").write_text((_SIZES / "qwen2.5_7b_mtp0.json").read_text(encoding="utf-8"))
    replaced = list(words)
    for flag, hint in (
        ("model_name_or_path", "give the base model's folder, or run the previous stage first"),
        ("audio_model_name_or_path", "give SenseVoiceSmall's folder"),
    ):
        places = [i + 1 for i, word in enumerate(words[:-1]) if word == f"--{flag}"]
        if places and not Path(words[places[-1]]).is_dir():
            run.problems.append(f"--{flag} {words[places[-1]]}: no such folder; {hint}")
            replaced[places[-1]] = str(folder)
    return replaced


def _config(run: DryRun, model: ModelArguments, data: DataArguments) -> Qwen2MTPConfig:
    """The config of the model that would train, with a row for every token."""
    folder = model.model_name_or_path
    try:
        base = open_config(folder)
    except (ValueError, OSError) as error:
        run.problems.append(str(error))
        base = config_file(str(_SIZES / "qwen2.5_7b_mtp0.json"))
    config = config_with_heads(base, model.num_nextn_predict_layers, sensevoice=data.continuous_input)
    if model.mtp_loss_weight is not None:
        config.mtp_loss_weight = model.mtp_loss_weight
    if (Path(folder) / "tokenizer.json").is_file():
        codec = CodecSpec(
            kind=data.audio_tokenizer_type, path=data.audio_tokenizer_path, token_cache=data.audio_token_cache
        )
        try:
            tokenizer = open_tokenizer(model.tokenizer_name_or_path or folder)
            added = extend_tokenizer(tokenizer, data.continuous_input, codec.codebook_size())
            if model.lora_train_embeddings is None:
                model.lora_train_embeddings = added > 0
            config.vocab_size = max(config.vocab_size, -len(tokenizer) // 8 * -8)
        except (ValueError, OSError) as error:
            run.problems.append(str(error))
    return config


def _numerics(run: DryRun, model: ModelArguments, stage: StageArguments) -> torch.dtype:
    try:
        dtype, attention = choose_numerics(model, stage)
    except ArgumentError as error:
        run.problems.append(str(error))
        return torch.bfloat16
    chosen = {"dtype": str(dtype).removeprefix("torch."), "attn_implementation": attention}
    for name, value in chosen.items():
        before = run.values.get(name)
        if before is None or before.text == "auto":
            source = "default" if before is None else before.source
            run.values[name] = Value(f"auto: {value}", source)
    return dtype


def _complete_values(run: DryRun, config: Qwen2MTPConfig, *groups: Any) -> None:
    """Add what the command does not name: the model's own values, and the program's defaults."""
    for name in ("mtp_loss_weight", "mtp_detach_backbone"):
        run.values.setdefault(name, Value(str(getattr(config, name)), "checkpoint"))
    run.values["layers"] = Value(
        f"{config.num_backbone_layers} and {config.num_nextn_predict_layers} heads", "checkpoint"
    )
    for name in ("hidden_size", "intermediate_size", "vocab_size", "rope_theta"):
        value = getattr(config, name, None) or (config.rope_parameters or {}).get(name)
        run.values[name] = Value(str(value), "checkpoint")
    for group in groups:
        ours = [each for each in type(group).__mro__ if each.__module__.startswith("vita_audio.")]
        own = {name for each in ours for name in each.__annotations__}
        for entry in fields(group):
            if entry.name in run.values or entry.name in _INTERNAL or entry.name not in own:
                continue
            default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
            if default is not MISSING:
                run.values[entry.name] = Value(str(getattr(default, "value", default)), "default")


def _continuation(
    run: DryRun,
    given: Path,
    model: ModelArguments,
    data: DataArguments,
    stage: StageArguments,
    dtype: torch.dtype,
) -> list[str]:
    """What the run would continue from, and the options that have changed since."""
    folder = RunFolder(stage.output_dir)
    try:
        check_input_folder(str(given), stage.output_dir)
        finished = folder.finished_steps()
        if finished is not None and finished >= stage.max_steps and not stage.overwrite_output_dir:
            return [f"{folder.path} holds the finished stage; nothing would be trained"]
        checkpoint = None if stage.overwrite_output_dir else folder.continue_from(stage.max_steps)
        if checkpoint is None:
            return []
        arguments = resolved_arguments(model, data, stage, dtype) | {"model_name_or_path": str(given)}
        return [
            f"from {checkpoint}",
            *describe_changes(checkpoint, json.loads(json.dumps(arguments, default=str))),
        ]
    except (ValueError, OSError) as error:
        run.problems.append(str(error))
        return []


def _data(run: DryRun, data: DataArguments, stage: StageArguments) -> list[str]:
    """The mix: for each data set its files, samples, and samples of an epoch."""
    try:
        specs = read_mix(data.dataset_name, data.data_root)
    except MixError as error:
        run.problems.append(str(error))
        return []
    files = [FileState(spec.name, str(spec.path)) for spec in specs if spec.ratio and spec.num]
    try:
        seed = stage.data_seed if stage.data_seed is not None else stage.seed
        files = Mix(specs, seed, strict=data.strict_data).files
    except (ValueError, OSError) as error:
        run.problems.append(str(error).splitlines()[0])
    found = {state.path: state for state in files}
    by_set: dict[str, list[SourceSpec]] = defaultdict(list)
    for spec in specs:
        by_set[spec.dataset].append(spec)
    rows: list[tuple[str, ...]] = [_EPOCH_LABELS]
    for name, members in by_set.items():
        states = [found.get(str(spec.path)) for spec in members]
        there = [state for state in states if state is not None and state.rows]
        missing = sum(state is not None and not state.rows for state in states)
        counts = (sum(state.rows for state in there), sum(state.used for state in there))
        shown = (name, str(len(members)), str(missing), f"{members[0].ratio:g}")
        rows.append((*shown, *(f"{count:,}" for count in counts)))
    used = [state for state in files if state.rows]
    totals = (f"{sum(state.rows for state in used):,}", f"{sum(state.used for state in used):,}")
    rows.append(("all", str(len(specs)), str(len(files) - len(used)), "", *totals))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_EPOCH_LABELS))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _plan(
    run: DryRun,
    config: Qwen2MTPConfig,
    model: ModelArguments,
    data: DataArguments,
    stage: StageArguments,
    dtype: torch.dtype,
) -> list[str]:
    """The plan of :mod:`vita_audio.training.planner` for this command."""
    device = "cpu" if run.values.get("use_cpu", Value("False", "")).text == "True" else "cuda"
    plan = plan_run(config, model, data, stage, gpus=run.processes, dtype=dtype, device=device)
    lines = describe_plan(plan, mfu=0.4)
    if isinstance(config, Qwen2MTPSenseVoiceConfig):
        lines.append("the encoder's work on clips is not included")
    return [
        *lines,
        "assumed: documents of 512 tokens, half of all tokens supervised; tools/plan_run.py asks for others",
    ]


if __name__ == "__main__":
    main()
