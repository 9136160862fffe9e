"""Train one stage.

The stage scripts in scripts/deepspeed/sts_qwen25 launch this command. Its options are in
vita_audio/training/arguments.py and in transformers' TrainingArguments.

    python vita_audio/cli/launch.py --nproc_per_node 8 tools/finetune_sts.py --model_name_or_path … --dataset_name …

It checks the options, locks the output folder, opens tokenizer, rows and codec, then the model with its heads,
freezes the parameters that the stage does not train, continues from the last complete checkpoint if there is one,
trains, and saves an ordinary model folder. OUTPUT_DIR/run.json records the run. When restarted, it continues where
it was stopped; a finished stage continues if --max_steps is raised.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_flash_attn_2_available

from vita_audio.audio import is_continuous_kind
from vita_audio.cli.launch import end_with_launcher, refuse
from vita_audio.cli.validation import open_speaker
from vita_audio.data import (
    CodecSpec,
    DataConfig,
    ResumeError,
    TooManyBadSamples,
    ValidationSet,
    build_train_loader,
    extend_tokenizer,
    read_validation_set,
)
from vita_audio.data.faults import MachineError
from vita_audio.data.loader import TrainLoader
from vita_audio.data.mixing import MixError
from vita_audio.data.token_cache import TokenCacheError
from vita_audio.distributed import agreed, barrier, is_first, local_rank, rank, world_size
from vita_audio.files import write_json
from vita_audio.models import load_with_heads, open_tokenizer, resize_vocabulary
from vita_audio.models.compat import disable_shared_memory_allreduce
from vita_audio.provenance import RUN_FILE, describe_run
from vita_audio.training import (
    ArgumentError,
    DataArguments,
    ModelArguments,
    RunFolder,
    SpeechTrainer,
    StageArguments,
    apply_stage,
    check_input_folder,
    describe_changes,
    describe_trainable,
    fit_to_processes,
)
from vita_audio.training.checkpoints import CheckpointStateError, load_loader_states, steps_done
from vita_audio.training.command_line import parse_arguments
from vita_audio.training.deepspeed_config import builds_optimizer
from vita_audio.training.interruption import REQUEUE
from vita_audio.training.planner import plan_run
from vita_audio.training.quiet import hush_libraries
from vita_audio.training.result import check_checkpoint, check_result

logger = logging.getLogger("finetune_sts")

AT_THE_DOOR = (ValueError, OSError, ImportError)
"""Errors raised by bad input while options, folders, codec, tokenizer and model are opened."""
WHILE_TRAINING = (
    *(MixError, TokenCacheError, ResumeError, TooManyBadSamples, MachineError),
    *(CheckpointStateError, FloatingPointError),
)
"""Errors that input may raise later; any other error keeps its traceback."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train one stage from command-line options; ``sys.argv`` by default."""
    end_with_launcher()
    # 1. Options, and whether this machine supports them.
    with told_in_one_line(*AT_THE_DOOR):
        model_args, data_args, stage_args = parse_arguments(argv)
        check_input_folder(model_args.model_name_or_path, stage_args.output_dir)
        dtype, attention = choose_numerics(model_args, stage_args)
        check_launch(stage_args)
    hush_libraries()
    set_up_logging(stage_args)
    connect(stage_args)
    set_seed(stage_args.seed)

    # 2. The output folder: lock it and read its progress.
    with RunFolder(stage_args.output_dir) as folder:
        with told_in_one_line(*AT_THE_DOOR), agreed(*AT_THE_DOOR):
            if is_first():
                folder.lock()
                if stage_args.overwrite_output_dir:
                    folder.start_over()
        with told_in_one_line(*AT_THE_DOOR):
            finished = folder.finished_steps()
            if finished is not None and finished >= stage_args.max_steps:
                logger.info("%s holds the finished stage; raise --max_steps to go on", folder.path)
                return
            checkpoint = folder.continue_from(stage_args.max_steps)

        # 3. Text tokenizer with speech tokens, and the codec; 4. rows.
        with told_in_one_line(*AT_THE_DOOR), agreed(*AT_THE_DOOR):
            tokenizer, codec = open_tokenizers(model_args, data_args)
            loader = open_rows(data_args, stage_args, tokenizer, codec)
            run = describe(model_args, data_args, stage_args, dtype, loader, checkpoint)
            if checkpoint is not None:
                logger.info("continuing from %s", checkpoint)
                fit_to_processes(checkpoint, stage_args)
                if steps_done(checkpoint) < stage_args.max_steps:
                    check_checkpoint(checkpoint, deepspeed=bool(stage_args.deepspeed))
                for line in describe_changes(checkpoint, run["arguments"]):
                    logger.warning("%s", line)
                states = load_loader_states(checkpoint)
                loader.load_state_dict(states[rank()] if len(states) == world_size() else states)
        with told_in_one_line(*AT_THE_DOOR):
            loader.check_ranks_agree()
            validation = open_validation(data_args, stage_args, tokenizer, codec)
            speaker = None
            if validation is not None and is_deepspeed_zero3_enabled():
                logger.warning("validation speaks no answers under ZeRO-3: no process holds the whole model")
            elif validation is not None:
                speaker = open_speaker(
                    data_args, codec, tokenizer, validation.requests, rank=rank(), world_size=world_size()
                )
        if is_first():
            with told_in_one_line(*AT_THE_DOOR):
                folder.reopen()
                write_json(folder.path / RUN_FILE, run)

        if checkpoint is None or steps_done(checkpoint) < stage_args.max_steps:
            # 5. The model with its heads; 6. what this stage trains.
            with told_in_one_line(*AT_THE_DOOR):
                model = open_model(model_args, data_args, tokenizer, dtype, attention)
            apply_stage(
                model,
                language_model_freeze=model_args.language_model_freeze,
                audio_model_freeze=model_args.audio_model_freeze,
            )
            if model_args.lora_r:
                model = with_lora(model, model_args)
            logger.info(describe_trainable(model))

            # 7. Train, from where an earlier run was stopped.
            trainer = SpeechTrainer(
                model=model,
                args=stage_args,
                processing_class=tokenizer,
                loader=loader,
                run=run,
                validation=validation,
                speaker=speaker,
                checkpointed_layers=choose_checkpointed_layers(
                    model, model_args, data_args, stage_args, dtype
                ),
            )
            with told_in_one_line(*WHILE_TRAINING):
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
                if trainer.stopped_by is not None:
                    leave_for_requeue(trainer)
                trainer.save_model()
                trainer.save_state()
        elif is_first():
            with told_in_one_line(*AT_THE_DOOR):
                folder.take_result(checkpoint)

        # 8. The stage's result is an ordinary model folder; the marker says that it is complete.
        barrier()
        if is_first():
            with told_in_one_line(*AT_THE_DOOR):
                check_result(folder.path)
                folder.finish()


def leave_for_requeue(trainer: SpeechTrainer) -> NoReturn:
    """End after a signal: the checkpoint is there, and the exit status asks for another start."""
    barrier()  # the first process may still be marking the checkpoint
    step = trainer.state.global_step
    logger.info("stopped by %s after step %d, which is saved; start again to go on", trainer.stopped_by, step)
    sys.exit(REQUEUE)


def choose_numerics(model_args: ModelArguments, stage_args: StageArguments) -> tuple[torch.dtype, str]:
    """The type of the weights and the attention implementation, with ``auto`` resolved.

    Raises:
        ArgumentError: FlashAttention is requested but cannot run.
    """
    name = model_args.dtype
    if name == "auto":
        name = "bfloat16" if stage_args.bf16 else "float32"
    attention = model_args.attn_implementation
    flash_runs = torch.cuda.is_available() and is_flash_attn_2_available()
    half = name != "float32"  # FlashAttention supports half precision only
    if attention == "auto":
        attention = "flash_attention_2" if flash_runs and half else "sdpa"
    elif attention == "flash_attention_2" and not (flash_runs and half):
        missing = "an NVIDIA GPU and the flash-attn package" if half else "--bf16 True"
        raise ArgumentError(f"--attn_implementation flash_attention_2 needs {missing}; give auto or sdpa")
    return getattr(torch, name), attention


def check_launch(stage_args: StageArguments) -> None:
    """Refuse a start without a required launcher, before anything is connected or loaded.

    Raises:
        ArgumentError: the launcher is missing; the message says how to start.
    """
    how = "python vita_audio/cli/launch.py --nproc_per_node N tools/finetune_sts.py …"
    if "RANK" in os.environ:
        return
    if stage_args.deepspeed:
        raise ArgumentError(
            f"--deepspeed needs a launcher: {how}, or a script of scripts/deepspeed/sts_qwen25"
        )
    if stage_args.n_gpu > 1:
        raise ArgumentError(
            f"one process and {stage_args.n_gpu} GPUs: start with {how}, or set CUDA_VISIBLE_DEVICES to one GPU"
        )


def connect(stage_args: StageArguments) -> None:
    """Connect the processes. ZeRO-3 partitions the model while it is opened, so this comes first."""
    if stage_args.deepspeed:
        import deepspeed

        disable_shared_memory_allreduce()
        deepspeed.init_distributed(dist_backend=stage_args.ddp_backend)
    _ = stage_args.device  # connects otherwise


def open_tokenizers(
    model_args: ModelArguments, data_args: DataArguments
) -> tuple[PreTrainedTokenizerBase, CodecSpec]:
    """The text tokenizer, with the codec's tokens, and the codec.

    The codec is opened once on each machine that has its folder, to check that it is the right one. Tokens that the
    model does not know yet let LoRA train the embeddings, unless an option says otherwise.

    Raises:
        ValueError, OSError: a folder cannot be used.
    """
    tokenizer = open_tokenizer(model_args.tokenizer_name_or_path or model_args.model_name_or_path)
    codec = CodecSpec(
        kind=data_args.audio_tokenizer_type,
        path=data_args.audio_tokenizer_path,
        frontend_path=model_args.audio_model_name_or_path,
        token_cache=data_args.audio_token_cache,
        feature_cache=data_args.audio_feature_cache,
    )
    if codec.path is not None and Path(codec.path).exists() and local_rank() == 0:
        try:
            _ = codec.open_discrete().codebook_size
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"--audio_tokenizer_path {codec.path}: no codec of --audio_tokenizer_type {codec.kind} ({error!r}); "
                "give a matching folder and type"
            ) from error
    added = extend_tokenizer(tokenizer, is_continuous_kind(codec.kind), codec.codebook_size())
    if model_args.lora_train_embeddings is None:
        model_args.lora_train_embeddings = added > 0
    return tokenizer, codec


def open_rows(
    data_args: DataArguments,
    stage_args: StageArguments,
    tokenizer: PreTrainedTokenizerBase,
    codec: CodecSpec,
) -> TrainLoader:
    """This rank's rows, from the beginning."""
    config = rows_config(data_args, stage_args, data_args.dataset_name)
    return build_train_loader(
        config,
        tokenizer,
        codec,
        rank=rank(),
        world_size=world_size(),
        seed=stage_args.data_seed if stage_args.data_seed is not None else stage_args.seed,
        output_dir=stage_args.output_dir,
    )


def open_validation(
    data_args: DataArguments,
    stage_args: StageArguments,
    tokenizer: PreTrainedTokenizerBase,
    codec: CodecSpec,
) -> ValidationSet | None:
    """The validation set; None if no mix was given for it."""
    if data_args.eval_dataset_name is None:
        return None
    return read_validation_set(
        rows_config(data_args, stage_args, data_args.eval_dataset_name),
        tokenizer,
        codec,
        samples=data_args.eval_samples,
        requests=data_args.eval_speech_samples,
        rank=rank(),
        world_size=world_size(),
    )


def rows_config(data_args: DataArguments, stage_args: StageArguments, mix: str) -> DataConfig:
    """How a mix becomes rows."""
    return DataConfig(
        dataset_path=mix,
        seq_length=data_args.model_max_length,
        text_audio_interval_ratio=data_args.text_audio_interval_ratio,
        num_workers=stage_args.dataloader_num_workers,
        micro_batch_size=stage_args.per_device_train_batch_size,
        max_error_share=data_args.max_error_share,
        strict=data_args.strict_data,
        data_root=data_args.data_root,
        token_cache=data_args.audio_token_cache,
    )


def describe(
    model_args: ModelArguments,
    data_args: DataArguments,
    stage_args: StageArguments,
    dtype: torch.dtype,
    loader: TrainLoader,
    checkpoint: Path | None,
) -> dict[str, Any]:
    """The content of ``run.json``."""
    arguments = resolved_arguments(model_args, data_args, stage_args, dtype)
    data = {"fingerprint": loader.mix.fingerprint, "samples_per_epoch": len(loader.mix)}
    resumed = None if checkpoint is None else checkpoint.name
    return describe_run("finetune_sts", arguments, data, resumed_from=resumed)


def resolved_arguments(
    model_args: ModelArguments, data_args: DataArguments, stage_args: StageArguments, dtype: torch.dtype
) -> dict[str, Any]:
    """Every option by name, as ``run.json`` keeps it."""
    return {
        **asdict(model_args),
        **asdict(data_args),
        **stage_args.to_dict(),
        "dtype": str(dtype).removeprefix("torch."),
        "deepspeed_builds_optimizer": isinstance(stage_args.deepspeed, dict)
        and builds_optimizer(stage_args.deepspeed),
    }


def open_model(
    model_args: ModelArguments,
    data_args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    attention: str,
) -> PreTrainedModel:
    """The model with its heads, an embedding row for every token, and its default schedule.

    Raises:
        ValueError: the folder cannot be used.
    """
    model = load_with_heads(
        model_args.model_name_or_path,
        model_args.num_nextn_predict_layers,
        sensevoice=data_args.continuous_input,
        audio_model_path=model_args.audio_model_name_or_path,
        dtype=dtype,
        attn_implementation=attention,
    )
    resize_vocabulary(model, len(tokenizer))
    if model_args.mtp_loss_weight is not None:
        model.config.mtp_loss_weight = model_args.mtp_loss_weight
    model.config.system_prompt = ""  # samples have their own; none is added to the others
    if model_args.num_nextn_predict_layers:
        model.set_default_mode(data_args.text_audio_interval_ratio)
    return model


def with_lora(model: PreTrainedModel, model_args: ModelArguments) -> PreTrainedModel:
    """The model with adapters, which behaves as the model does."""
    from vita_audio.training.lora import add_lora  # PEFT takes seconds to import

    wrapped: Any = add_lora(model, model_args)
    return wrapped


def choose_checkpointed_layers(
    model: PreTrainedModel,
    model_args: ModelArguments,
    data_args: DataArguments,
    stage_args: StageArguments,
    dtype: torch.dtype,
) -> int | None:
    """How many layers recompute their activations, by the options or by the plan; None: all."""
    if not stage_args.chooses_checkpointed_layers:
        return stage_args.fixed_checkpointed_layers
    config: Any = model.config
    device = stage_args.device.type
    plan = plan_run(config, model_args, data_args, stage_args, gpus=world_size(), dtype=dtype, device=device)
    logger.info(
        "%d of %d layers recompute their activations: planned %.3g GB of %.3g",
        plan.recomputed_layers,
        plan.layers,
        plan.peak_bytes / 1e9,
        stage_args.gpu_memory_bytes / 1e9,
    )
    return plan.recomputed_layers


@contextmanager
def told_in_one_line(*errors: type[Exception]) -> Iterator[None]:
    """End the process with the message of one of these errors, without a traceback."""
    try:
        yield
    except errors as error:
        refuse(f"finetune_sts: {error}")


def set_up_logging(stage_args: StageArguments) -> None:
    """Log on the first process only; the others would repeat the same lines."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    for name in ("vita_audio", "finetune_sts"):
        logging.getLogger(name).setLevel(logging.INFO if is_first() else logging.ERROR)
    transformers.utils.logging.set_verbosity(stage_args.get_process_log_level())
