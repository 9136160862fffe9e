"""What a stage costs, before it runs: memory of each GPU, hours, GPU-hours, disk.

    python tools/plan_run.py --stage 1 --gpus 16
    python tools/plan_run.py --stage 4 --variant plus --config MODEL_DIR --deepspeed ds_config_zero3.json
    python tools/plan_run.py --sheet --gpus 8 16 32 64 > sheet.md

Heads, frozen parts, steps and DeepSpeed config are those of the stage's script unless a flag replaces them. Memory is
that of one GPU; CUDA itself takes about 1 GB more. Hours follow from the share of the GPU's peak that the model's
operations reach (--mfu): measure it with ``tools/benchmark.py train-step``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vita_audio.cli.arguments import command_parser
from vita_audio.models import Qwen2MTPConfig
from vita_audio.models.open import config_with_heads, open_config
from vita_audio.training.deepspeed_config import read_deepspeed_config
from vita_audio.training.lora_arguments import LoraArguments
from vita_audio.training.planner import GPUS, Gpu, Plan, Setup, Zero, make_plan, plan_within
from vita_audio.training.step_arguments import ALL, AUTO
from vita_audio.training.step_memory import Batch

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = {1: "stage1", 2: "mtp1_stage1", 3: "mtp10_stage1", 4: "mtp10_stage2"}
PREFIXES = {"base": "glm4voice", "plus": "sensevoice_glm4voice"}
_ROW_LENGTHS = {1: 8192, 2: 8192, 3: 8192, 4: 2048}
"""Of the paper; the scripts' own default is 32768."""


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan of one stage, or the cost sheet of all four.

    Raises:
        ValueError: a config, a script or a number that cannot be used.
    """
    options = parse_options(argv)
    if options.sheet:
        print(cost_sheet(options))
        return
    plan = plan_stage(options.stage, options, options.gpus[0])
    print(f"stage {options.stage} ({options.variant}), {options.gpus[0]} GPUs\n")
    print("\n".join(describe_plan(plan, options.mfu, options.speech_share)))


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--stage", type=int, choices=STAGES, default=1)
    parser.add_argument("--variant", choices=PREFIXES, default="base")
    parser.add_argument(
        "--config",
        default=str(REPOSITORY / "configs/models/qwen2.5_7b_mtp0.json"),
        help="model folder, or a JSON file of configs/models/ (default: Qwen2.5-7B)",
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[8])
    parser.add_argument("--deepspeed", help="DeepSpeed config (default: the stage's)")
    parser.add_argument("--seq", type=int, help="tokens in a row (default: 8192; 2048 in stage 4)")
    parser.add_argument("--rows", type=int, default=1, help="rows of a GPU's batch")
    parser.add_argument("--accumulation", type=int, default=16, help="batches of an optimizer step")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the stage's)")
    parser.add_argument("--document", type=int, default=512, help="tokens in a document, on average")
    parser.add_argument("--supervised", type=float, default=0.5, help="share of tokens that are learnt")
    parser.add_argument("--speech_share", type=float, default=1.0, help="share of tokens that are speech")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--lora_r", type=int, default=0, help="rank of LoRA adapters (default: no LoRA)")
    parser.add_argument(
        "--train_embeddings", action="store_true", help="with --lora_r: embedding and LM head train"
    )
    parser.add_argument(
        "--checkpointed_layers",
        default=ALL,
        help="layers that recompute their activations: all, a number, or auto: as few as fit --gpu_memory_gb",
    )
    parser.add_argument("--gpu_memory_gb", type=float, default=80.0, help="for auto (default: 80)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the GPU's peak (default: 0.4)")
    parser.add_argument("--sheet", action="store_true", help="all stages on all kinds of GPU, as Markdown")
    options = parser.parse_args(argv)
    for name in ("gpus", "rows", "accumulation"):
        values = getattr(options, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name} {values}: give 1 or more")
    if options.checkpointed_layers not in (ALL, AUTO) and not options.checkpointed_layers.isdecimal():
        parser.error(
            f"--checkpointed_layers {options.checkpointed_layers}: give {ALL}, {AUTO}, or a number of layers"
        )
    for name in ("mfu", "supervised", "speech_share"):
        if not 0 < getattr(options, name) <= 1:
            parser.error(f"--{name} {getattr(options, name)}: give a share above 0 and up to 1")
    return options


def plan_stage(stage: int, options: argparse.Namespace, gpus: int) -> Plan:
    """The plan of a published stage with this command's options."""
    script = read_stage_script(f"finetune_{PREFIXES[options.variant]}_{STAGES[stage]}")
    config = config_with_heads(
        open_config(options.config) if Path(options.config).is_dir() else config_file(options.config),
        int(script["NUM_HEADS"]),
        sensevoice=options.variant == "plus",
    )
    deepspeed = options.deepspeed or REPOSITORY / "scripts/deepspeed" / script["DEFAULT_DEEPSPEED_CONFIG"]
    frozen = script["LANGUAGE_MODEL_FREEZE"] == "True"
    lora = LoraArguments(lora_r=options.lora_r, lora_train_embeddings=options.train_embeddings)
    lora.check_lora(language_model_freeze=frozen)
    layers = options.checkpointed_layers
    setup = Setup(
        language_model_freeze=frozen,
        batch=Batch(options.rows, options.seq or _ROW_LENGTHS[stage], options.document, options.supervised),
        accumulation=options.accumulation,
        steps=options.steps or int(script["MAX_STEPS"]),
        gpus=gpus,
        dtype=getattr(torch, options.dtype),
        checkpointed_layers=int(layers) if layers.isdecimal() else None,
        lora=lora if options.lora_r else None,
    )
    zero = Zero.from_config(read_deepspeed_config(str(deepspeed)))
    if layers == AUTO:
        return plan_within(config, setup, zero, options.gpu_memory_gb * 1e9)
    return make_plan(config, setup, zero)


def config_file(path: str) -> Qwen2MTPConfig:
    """A JSON file of ``configs/models``.

    Raises:
        ValueError: it cannot be read, or is no config of this family.
    """
    from vita_audio.models.folder import read_object

    values: dict[str, Any] = read_object(Path(path))
    for name in ("architectures", "model_type"):
        values.pop(name, None)
    return Qwen2MTPConfig(**values)


def read_stage_script(name: str) -> dict[str, str]:
    """The values that a stage script sets, by variable."""
    text = (REPOSITORY / "scripts/deepspeed/sts_qwen25" / f"{name}.sh").read_text(encoding="utf-8")
    return {
        match[1]: match[2]
        for match in re.finditer(r"^(\w+)=(?:\$\{\w+:-)?([^}\n]*)\}?$", text, flags=re.MULTILINE)
    }


def describe_plan(
    plan: Plan, mfu: float, speech_share: float = 1.0, gpus: Mapping[str, Gpu] = GPUS
) -> list[str]:
    """The plan as lines of text."""
    lines = ["parameters                  trained               all"]
    for part, (trained, every) in plan.parameters.items():
        lines.append(f"  {part:<18}{trained:>15,}{every:>18,}")
    lines.append("memory of a GPU                 GB")
    for kind, size in plan.states.items():
        lines.append(f"  {kind:<24}{_gb(size):>8}")
    for phase, kinds in (("backward", plan.backward), ("update", plan.update)):
        shown = ", ".join(f"{kind} {_gb(size).strip()}" for kind, size in kinds.items())
        lines.append(f"  {'+ ' + phase:<24}{_gb(sum(kinds.values())):>8}  ({shown})")
    lines.append(f"  {'peak':<24}{_gb(plan.peak_bytes):>8}")
    lines.append(f"  {plan.recomputed_layers} of {plan.layers} layers recompute their activations")
    if plan.host_bytes:
        lines.append(f"  {'in the host, each rank':<24}{_gb(plan.host_bytes):>8}")
    lines += [
        f"an optimizer step: {plan.tokens_per_step:,} tokens, {plan.flops_per_step / 1e15:,.1f} PFLOP, and "
        f"{plan.recomputed_flops / 1e15:,.1f} recomputed",
        f"{plan.steps:,} steps at {mfu:.0%} of the GPU's peak (MFU):",
    ]
    for kind, gpu in gpus.items():
        seconds, hours = plan.step_seconds(gpu.flops, mfu), plan.hours(gpu.flops, mfu)
        fit = "fits" if plan.peak_bytes < gpu.usable_bytes else f"does not fit {gpu.memory / 1e9:.0f} GB"
        lines.append(
            f"  {kind:<18}{seconds:>8,.1f} s a step {hours:>8,.1f} hours {hours * plan.gpus:>9,.0f} GPU-hours  {fit}"
        )
    lines += [
        f"speech seen: {plan.speech_hours(speech_share):,.0f} hours if {speech_share:.0%} of the tokens are speech",
        f"disk: {_gb(plan.checkpoint_bytes).strip()} GB a checkpoint (two are kept, three while one is written), "
        f"{_gb(plan.result_bytes).strip()} GB the result",
    ]
    return lines


def cost_sheet(options: argparse.Namespace) -> str:
    """Hours of each stage on each kind and number of GPUs, as a Markdown table."""
    plans = {
        (stage, count): plan_stage(stage, options, count)
        for stage in STAGES
        for count in (options.gpus if stage == 1 else options.gpus[:1])
    }
    lines = [
        "| GPUs | "
        + " | ".join(f"stage {stage}" for stage in STAGES)
        + " | days | GPU-hours | stage 1, GB | fits |",
        "|---|" + "---:|" * (len(STAGES) + 3) + "---|",
    ]
    for kind, gpu in GPUS.items():
        for count in options.gpus:
            hours = []
            for stage in STAGES:
                # The batch of a step is the original's, of 16 GPUs: fewer GPUs accumulate more.
                plan = replace(plans[stage, options.gpus[0]], gpus=count)
                plan = replace(plan, flops_per_step=plan.flops_per_step * _PUBLISHED_GPUS // options.gpus[0])
                hours.append(plan.hours(gpu.flops, options.mfu))
            peak = plans[1, count].peak_bytes
            fits = "yes" if peak < gpu.usable_bytes else "no"
            cells = [f"{count} × {kind}", *(f"{hour:,.0f} h" for hour in hours), f"{sum(hours) / 24:,.1f}"]
            cells += [f"{sum(hours) * count:,.0f}", _gb(peak).strip(), fits]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_PUBLISHED_GPUS = 16


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}"
