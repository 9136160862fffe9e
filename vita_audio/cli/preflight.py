"""Would this stage run on this cluster? One minute of checks, a line each.

    bash scripts/preflight.sh finetune_glm4voice_stage1 [SEQ_LENGTH] [TIMESTAMP] [flags]
    PREFLIGHT=1 bash scripts/deepspeed/sts_qwen25/finetune_glm4voice_stage1.sh …       checks first, then trains

Takes the options of tools/finetune_sts.py and runs in the same processes: versions, devices and their links,
all-reduce, disk, data and codec, a step at the real row length with every attention back end, in bfloat16 and
float32, with Liger's loss and ours, memory beside the plan, and a file that every process reads back. Every process
takes part in every check. A process that does not answer within PREFLIGHT_TIMEOUT seconds (300) is named. The exit
status is 0, or 78 if a check has failed; nothing is trained and the output folder holds nothing new.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers.utils import is_flash_attn_2_available

from vita_audio.cli.finetune import (
    AT_THE_DOOR,
    check_launch,
    choose_numerics,
    connect,
    open_model,
    open_rows,
    open_tokenizers,
    told_in_one_line,
)
from vita_audio.cli.launch import end_with_launcher, refuse
from vita_audio.cli.preflight_step import (
    DOCUMENT,
    TOLERANCE,
    CheckFailed,
    StepResult,
    close,
    compare,
    one_loss,
    one_step,
)
from vita_audio.data.faults import first_line
from vita_audio.distributed import gather_objects, is_first, local_rank, rank, world_size
from vita_audio.models.attention import PACKED_SDPA
from vita_audio.models.compat import enable_checkpointing
from vita_audio.models.loss import chunked_losses, liger_forward, liger_losses
from vita_audio.provenance import versions
from vita_audio.training import DataArguments, ModelArguments, StageArguments, apply_stage
from vita_audio.training.command_line import parse_arguments
from vita_audio.training.planner import Plan, plan_run
from vita_audio.training.quiet import hush_libraries
from vita_audio.training.recomputation import recompute_first

_GROUP_TIMEOUT = timedelta(days=1)
"""Of the group that watches the others; each wait has its own, shorter limit."""
_DISK_SPEED_BYTES = 2**26
_SLOW_DISK = 100e6
"""Bytes a second below which saving a checkpoint takes longer than training between two of them might."""


class NotTried(ValueError):
    """A check that needs what an earlier one did not find."""


@dataclass
class Preflight:
    """What the checks share.

    Attributes:
        model_args, data_args, stage_args: the options of the stage.
        attention: back ends to compare, the stage's own first.
        state: what earlier checks have opened, for later ones.
    """

    model_args: ModelArguments
    data_args: DataArguments
    stage_args: StageArguments
    dtype: torch.dtype
    attention: list[str]
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Of this process."""
        return self.stage_args.device

    def need(self, name: str) -> Any:
        """What an earlier check has opened.

        Raises:
            NotTried: it has failed.
        """
        if name not in self.state:
            raise NotTried(f"not tried: there is no {name}, see above")
        return self.state[name]


def main(argv: Sequence[str] | None = None) -> None:
    """Run every check and print the table; ``argv`` holds the options of tools/finetune_sts.py.

    Raises:
        SystemExit: status 78 if a check has failed.
    """
    end_with_launcher()
    with told_in_one_line(*AT_THE_DOOR):
        model_args, data_args, stage_args = parse_arguments(argv)
        dtype, attention = choose_numerics(model_args, stage_args)
        check_launch(stage_args)
    hush_libraries()
    connect(stage_args)
    if world_size() > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo")
    run = Preflight(model_args, data_args, stage_args, dtype, attention_names(attention, dtype))
    failed = run_checks(run)
    if failed:
        refuse(f"preflight: {len(failed)} of {len(CHECKS)} checks failed: {'; '.join(failed)}")


def attention_names(chosen: str, dtype: torch.dtype) -> list[str]:
    """The back ends to compare: the chosen one, and the others that are installed or that PREFLIGHT_ATTENTION names."""
    others = os.environ.get("PREFLIGHT_ATTENTION", "").split()
    if not others:
        flash = torch.cuda.is_available() and is_flash_attn_2_available() and dtype != torch.float32
        others = ["sdpa", "eager", *(["flash_attention_2"] if flash else [])]
    return [chosen, *(name for name in others if name != chosen)]


def run_checks(run: Preflight) -> list[str]:
    """Run all checks in all processes and print a line for each; returns the lines of those that failed."""
    watch = None
    if world_size() > 1:
        watch = distributed.new_group(backend="gloo", timeout=_GROUP_TIMEOUT)
    failed = []
    for name, check in CHECKS.items():
        try:
            mine = ("ok", check(run))
        except NotTried as skipped:
            mine = ("skip", str(skipped))
        except (ValueError, OSError) as error:
            mine = ("FAIL", str(error).strip().splitlines()[0])
        except (RuntimeError, ImportError, KeyError) as error:
            mine = ("FAIL", first_line(error))
        wait_for_all(watch, name)
        verdict, text = summary(gather_objects(mine))
        if is_first():
            print(f"{verdict:<5} {name:<12} {text}", flush=True)
        if verdict == "FAIL":
            failed.append(f"{name}: {text}")
    return failed


def summary(answers: list[tuple[str, str]]) -> tuple[str, str]:
    """The worst verdict of all processes, with the first process that has it where they differ."""
    for verdict in ("FAIL", "skip"):
        texts = {number: text for number, (its, text) in enumerate(answers) if its == verdict}
        if texts:
            number, text = next(iter(texts.items()))
            alike = len(texts) == len(answers) and len(set(texts.values())) == 1
            return verdict, text if alike or len(answers) == 1 else f"process {number}: {text}"
    return answers[0]


def wait_for_all(watch: Any, name: str) -> None:
    """End everything if a process has not finished the check within the limit; the line names it."""
    if watch is None:
        return
    limit = float(os.environ.get("PREFLIGHT_TIMEOUT", "300"))
    try:
        distributed.monitored_barrier(watch, timeout=timedelta(seconds=limit), wait_all_ranks=True)
    except RuntimeError as error:
        if is_first():
            print(f"FAIL  {name}", flush=True)
        refuse(f"preflight: {name}: a process hangs for {limit:g} s: {first_line(error)}")


# -- the checks -------------------------------------------------------------------------------------------------


def check_versions(run: Preflight) -> str:
    """The same packages in every process."""
    mine = versions()
    first: dict[str, str | None] = gather_objects(mine)[0]
    for name, version in mine.items():
        if version != first[name]:
            raise CheckFailed(
                f"{name} {version}, but {first[name]} in process 0; install the same everywhere"
            )
    return ", ".join(f"{name} {mine[name]}" for name in ("torch", "transformers", "deepspeed"))


def check_devices(run: Preflight) -> str:
    """The same kind of GPU everywhere, and which of a machine reach each other directly."""
    if run.device.type != "cuda":
        return f"{world_size()} processes on CPUs"
    properties = torch.cuda.get_device_properties(run.device)
    mine = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
    kinds = gather_objects(mine)
    if mine != kinds[0]:
        raise CheckFailed(f"{mine}, but process 0 has {kinds[0]}: the slowest sets the pace")
    others = [i for i in range(torch.cuda.device_count()) if i != local_rank()]
    linked = sum(torch.cuda.can_device_access_peer(local_rank(), other) for other in others)
    return f"{world_size()} × {mine}; direct links to {linked} of {len(others)} others of the machine"


def check_all_reduce(run: Preflight) -> str:
    """The sum over all processes is right; how fast it is."""
    if world_size() == 1:
        return "one process"
    elements = 2**26 if run.device.type == "cuda" else 2**20
    values = torch.full((elements,), float(rank() + 1), device=run.device)
    start = time.perf_counter()
    distributed.all_reduce(values)
    total = values[:: elements - 1].tolist()  # waits for the result
    seconds = time.perf_counter() - start
    want = world_size() * (world_size() + 1) / 2
    if total != [want, want]:
        raise CheckFailed(
            f"the sum of all processes is {total[0]:g}, not {want:g}: check the network (NCCL_DEBUG=INFO)"
        )
    moved = 2 * (world_size() - 1) / world_size() * values.nbytes
    return f"{moved / seconds / 1e9:.2f} GB/s on the bus with {values.nbytes / 1e6:,.0f} MB"


def check_disk(run: Preflight) -> str:
    """Speed, and room for the checkpoints that are kept, the one being written, and the result."""
    folder = existing(Path(run.stage_args.output_dir))
    plan = run.state["plan"] = plan_of(run)
    kept = run.stage_args.save_total_limit
    need = plan.result_bytes + plan.checkpoint_bytes * ((kept or math.ceil(saves(run.stage_args))) + 1)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise CheckFailed(
            f"{folder}: {free / 1e9:,.0f} GB free, but the checkpoints need {need / 1e9:,.0f} GB; free some, "
            "keep fewer (SAVE_TOTAL_LIMIT), or give another ROOT_PATH"
        )
    if local_rank():
        return ""
    file = folder / f".preflight-{rank()}"
    start = time.perf_counter()
    try:
        with open(file, "wb") as stream:
            stream.write(os.urandom(2**20) * (_DISK_SPEED_BYTES // 2**20))
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        file.unlink(missing_ok=True)
    speed = _DISK_SPEED_BYTES / (time.perf_counter() - start)
    slow = f": slow, a checkpoint takes {plan.checkpoint_bytes / speed:,.0f} s" if speed < _SLOW_DISK else ""
    return f"{free / 1e9:,.0f} GB free, {need / 1e9:,.1f} GB needed, {speed / 1e6:,.0f} MB/s{slow}"


def check_codec(run: Preflight) -> str:
    """Text tokenizer and codec open, and fit each other."""
    run.state["tokenizer"], codec = open_tokenizers(run.model_args, run.data_args)
    run.state["codec"] = codec
    return f"{codec.kind}, {codec.codebook_size():,} codes; {len(run.state['tokenizer']):,} tokens"


def check_data(run: Preflight) -> str:
    """The mix can be read, and every process has the same files and the same token cache."""
    tokenizer, codec = run.state.get("tokenizer"), run.state.get("codec")
    loader, problem = None, None
    if tokenizer is not None and codec is not None:
        try:
            loader = open_rows(run.data_args, run.stage_args, tokenizer, codec)
        except (ValueError, OSError, RuntimeError) as error:
            problem = error
    if not all(gather_objects(loader is not None)):
        raise problem or NotTried("not tried: a process has no mix or no codec")
    assert loader is not None
    loader.check_ranks_agree()
    return f"{len(loader.mix):,} samples an epoch in {len(loader.mix.specs)} files, {len(loader.mix.missing)} missing"


def check_step(run: Preflight) -> str:
    """A step at the real row length with every attention back end; their losses and gradients agree."""
    tokenizer = run.need("tokenizer")
    model: Any = open_model(run.model_args, run.data_args, tokenizer, run.dtype, run.attention[0])
    model = model.to(run.device)
    apply_stage(
        model,
        language_model_freeze=run.model_args.language_model_freeze,
        audio_model_freeze=run.model_args.audio_model_freeze,
    )
    if run.stage_args.gradient_checkpointing:
        enable_checkpointing(model)
        recompute_first(model, run.need("plan").recomputed_layers)
    run.state["model"] = model.train()
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    try:
        results = {name: step_with(run, model, name) for name in run.attention}
    finally:
        model.set_attn_implementation(built_as(run.attention[0]))
    reference = next(iter(results))
    for name, result in results.items():
        if name != "eager":  # compared on a short row
            compare(name, result, reference, results[reference], run.dtype)
    loss, norm, seconds, _ = results[reference]
    shown = ", ".join(run.attention)
    return f"loss {loss:.4f}, gradient norm {norm:.3g}, {seconds:.2f} s; equal with {shown}"


def check_precision(run: Preflight) -> str:
    """The loss in the stage's type against float32, and Liger's against ours."""
    model = run.need("model")
    length = min(run.data_args.model_max_length, 2 * DOCUMENT)
    said = "float32 already"
    with torch.no_grad():
        torch.manual_seed(0)
        loss = one_loss(model, length, run.device)
        if run.dtype != torch.float32:
            torch.manual_seed(0)
            model.set_attn_implementation(PACKED_SDPA)  # FlashAttention has no float32
            exact = one_loss(model.float(), length, run.device)
            model.to(run.dtype).set_attn_implementation(built_as(run.attention[0]))
            close(f"{run.dtype}".removeprefix("torch."), loss, "float32", exact, TOLERANCE[run.dtype])
            said = f"loss {loss:.4f}, {exact:.4f} in float32"
    if run.device.type == "cuda" and liger_forward() is not None:
        hidden = torch.randn(256, model.config.hidden_size, device=run.device, dtype=run.dtype)
        weight = model.lm_head.weight.detach()
        targets = torch.randint(len(weight), (256,), device=run.device)
        ones = torch.ones(256, device=run.device)
        ours, theirs = (
            function(hidden, weight, targets, ones, False, False)[0].mean().item()
            for function in (chunked_losses, liger_losses)
        )
        close("Liger's loss", theirs, "ours", ours, TOLERANCE[run.dtype])
        said += "; Liger's loss equals ours"
    return said


def check_memory(run: Preflight) -> str:
    """The plan against the GPU, and the measured step against the plan."""
    run.need("model")
    plan: Plan = run.need("plan")
    planned = f"planned {plan.peak_bytes / 1e9:,.1f} GB a process"
    if run.device.type != "cuda":
        return planned
    total = torch.cuda.get_device_properties(run.device).total_memory
    measured = torch.cuda.max_memory_allocated(run.device)
    if plan.peak_bytes > total:
        raise CheckFailed(
            f"{planned}, but the GPU has {total / 1e9:,.0f} GB; give more GPUs, a shorter row or ZeRO-3 "
            "(DEEPSPEED_CONFIG)"
        )
    return f"{planned} of {total / 1e9:,.0f}; the step alone, with whole gradients, held {measured / 1e9:,.1f} GB"


def check_files(run: Preflight) -> str:
    """What a process writes into the output folder the others can read, as a checkpoint needs."""
    folder = existing(Path(run.stage_args.output_dir))
    mine = folder / f".preflight-{rank()}.pt"
    error: Exception | None = None
    try:
        torch.save(torch.arange(1000) + rank(), mine)
    except (OSError, RuntimeError) as failure:
        error = failure
    gather_objects(None)
    other = (rank() + 1) % world_size()
    try:
        if error is None and torch.load(folder / f".preflight-{other}.pt")[0] != other:
            error = CheckFailed(f"{folder}: the file of process {other} was read back changed")
    except (OSError, RuntimeError) as failure:
        error = error or CheckFailed(
            f"{folder}: the file of process {other} cannot be read ({first_line(failure)}); the folder must be shared"
        )
    gather_objects(None)
    mine.unlink(missing_ok=True)
    if error is not None:
        raise error
    return f"{folder}: every process reads what another wrote"


CHECKS: dict[str, Callable[[Preflight], str]] = {
    "versions": check_versions,
    "devices": check_devices,
    "all-reduce": check_all_reduce,
    "disk": check_disk,
    "codec": check_codec,
    "data": check_data,
    "files": check_files,
    "step": check_step,
    "precision": check_precision,
    "memory": check_memory,
}


# -- helpers ----------------------------------------------------------------------------------------------------


def plan_of(run: Preflight) -> Plan:
    """The plan of the stage on this cluster."""
    from vita_audio.models.open import config_with_heads, open_config

    model, data, stage = run.model_args, run.data_args, run.stage_args
    base = open_config(model.model_name_or_path)
    config = config_with_heads(base, model.num_nextn_predict_layers, sensevoice=data.continuous_input)
    return plan_run(config, model, data, stage, gpus=world_size(), dtype=run.dtype, device=run.device.type)


def saves(stage: StageArguments) -> float:
    """Checkpoints of the whole stage."""
    return 1 / stage.save_steps if stage.save_steps < 1 else stage.max_steps / stage.save_steps


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def built_as(attention: str) -> str:
    """The back end that a model gets when it is built with this one."""
    return PACKED_SDPA if attention == "sdpa" else attention


def step_with(run: Preflight, model: Any, name: str) -> StepResult:
    """:func:`one_step` at the real row length; with ``eager``, whose mask would not fit, on a short row beside sdpa.

    Raises:
        CheckFailed: eager and sdpa differ.
    """
    length = run.data_args.model_max_length
    if name != "eager":
        model.set_attn_implementation(built_as(name))
        torch.manual_seed(0)
        return one_step(model, length, run.device)
    short = {}
    for each in ("eager", PACKED_SDPA):
        model.set_attn_implementation(each)
        torch.manual_seed(0)
        short[each] = one_step(model, min(length, 2 * DOCUMENT), run.device)
    compare("eager", short["eager"], "sdpa", short[PACKED_SDPA], run.dtype)
    return short["eager"]
