"""Train one stage.

The stage scripts in scripts/deepspeed/sts_qwen25 run this under torchrun; every option is in
vita_audio/training/arguments.py or is one of transformers' TrainingArguments.

    torchrun --nproc_per_node 8 tools/finetune_sts.py --model_name_or_path … --dataset_name mix.yaml …

What happens, in order: check the options, open tokenizer and model, grow missing heads, freeze
what the stage does not train, build the loader, continue from the last complete checkpoint if
there is one, train, save.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import deepspeed
import torch
import transformers
from transformers import AutoTokenizer, set_seed
from transformers.utils import is_flash_attn_2_available

from vita_audio.audio import is_continuous_kind
from vita_audio.data import (
    CodecSpec,
    DataConfig,
    ResumeError,
    TooManyBadSamples,
    build_train_loader,
    extend_tokenizer,
)
from vita_audio.data.mixing import MixError
from vita_audio.data.token_cache import TokenCacheError
from vita_audio.models import load_with_heads, resize_vocabulary
from vita_audio.training import SpeechTrainer, StageArguments, apply_stage, last_complete_checkpoint
from vita_audio.training.command_line import parse_arguments
from vita_audio.training.stages import describe_trainable

logger = logging.getLogger("finetune_sts")

FINISHED_MARKER = "stage.complete"


def main() -> None:
    _die_with_launcher()
    # 1. Options, checked as they are read.
    with _told_in_one_line(ValueError):
        model_args, data_args, stage_args = parse_arguments()
    output_dir = Path(stage_args.output_dir)
    _set_up_logging(stage_args)
    if (output_dir / FINISHED_MARKER).is_file():
        logger.info("%s holds the finished stage; remove it to train again", output_dir)
        return
    set_seed(stage_args.seed)
    if stage_args.deepspeed:
        # On CPUs DeepSpeed would compile a shared-memory all-reduce that only its inference uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # ZeRO-3 splits the model while it is opened, so DeepSpeed must know the other ranks by then.
        deepspeed.init_distributed(dist_backend=stage_args.ddp_backend)

    # 2. Text tokenizer with speech tokens; 3. model with its heads.
    with _told_in_one_line(ValueError, OSError, ImportError):
        tokenizer = AutoTokenizer.from_pretrained(
            model_args.tokenizer_name_or_path or model_args.model_name_or_path
        )
        codec = CodecSpec(
            kind=data_args.audio_tokenizer_type,
            path=data_args.audio_tokenizer_path,
            frontend_path=model_args.audio_model_name_or_path,
            token_cache=data_args.audio_token_cache,
            feature_cache=data_args.audio_feature_cache,
        )
        extend_tokenizer(tokenizer, is_continuous_kind(codec.kind), codec.codebook_size())
        model = _open_model(model_args, data_args, stage_args, tokenizer)

    # 4. What this stage trains.
    apply_stage(
        model,
        language_model_freeze=model_args.language_model_freeze,
        audio_model_freeze=model_args.audio_model_freeze,
    )
    logger.info(describe_trainable(model))

    # 5. Rows.
    build_loader = partial(
        build_train_loader,
        DataConfig(
            dataset_path=data_args.dataset_name,
            seq_length=data_args.model_max_length,
            text_audio_interval_ratio=data_args.text_audio_interval_ratio,
            num_workers=stage_args.dataloader_num_workers,
            micro_batch_size=stage_args.per_device_train_batch_size,
            max_error_share=data_args.max_error_share,
            strict=data_args.strict_data,
            data_root=data_args.data_root,
            token_cache=data_args.audio_token_cache,
        ),
        tokenizer,
        codec,
        rank=stage_args.process_index,
        world_size=stage_args.world_size,
        seed=stage_args.data_seed if stage_args.data_seed is not None else stage_args.seed,
        output_dir=output_dir,
    )

    # 6. Train, from where an earlier run was stopped.
    trainer = SpeechTrainer(
        model=model, args=stage_args, processing_class=tokenizer, build_loader=build_loader
    )
    checkpoint = last_complete_checkpoint(output_dir)
    if checkpoint is not None:
        logger.info("continuing from %s", checkpoint)
    if checkpoint is None or _steps_done(checkpoint) < stage_args.max_steps:
        # What input can do; any other error keeps its traceback.
        with _told_in_one_line(MixError, TokenCacheError, ResumeError, TooManyBadSamples, FloatingPointError):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.save_model()
        trainer.save_state()
    elif trainer.is_world_process_zero():
        # Stopped between the last step and the result: the last checkpoint is the result.
        for file in checkpoint.iterdir():
            if file.suffix in (".json", ".safetensors", ".jinja", ".txt"):
                shutil.copy2(file, output_dir)

    # 7. The stage's result is an ordinary model folder; the marker says that it is whole.
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        (output_dir / FINISHED_MARKER).touch()


def _open_model(model_args, data_args, stage_args, tokenizer) -> transformers.PreTrainedModel:
    dtype = model_args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if stage_args.bf16 else "float32"
    attention = model_args.attn_implementation
    if attention == "auto":
        # FlashAttention takes half precision only.
        flash = dtype != "float32" and torch.cuda.is_available() and is_flash_attn_2_available()
        attention = "flash_attention_2" if flash else "sdpa"
    model = load_with_heads(
        model_args.model_name_or_path,
        model_args.num_nextn_predict_layers,
        sensevoice=data_args.continuous_input,
        audio_model_path=model_args.audio_model_name_or_path,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
    )
    resize_vocabulary(model, len(tokenizer))
    if model_args.mtp_loss_weight is not None:
        model.config.mtp_loss_weight = model_args.mtp_loss_weight
    model.config.use_cache = False
    if model_args.num_nextn_predict_layers:
        model.set_default_mode(data_args.text_audio_interval_ratio)
    return model


@contextmanager
def _told_in_one_line(*errors: type[Exception]) -> Iterator[None]:
    """End the process with the message of such an error, which says what to do, and without a traceback."""
    try:
        yield
    except errors as error:
        sys.exit(f"finetune_sts: {error}")


def _die_with_launcher() -> None:
    """Ask Linux to end this process with torchrun, so that no orphan goes on writing to the run's folder."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _steps_done(checkpoint: Path) -> int:
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]


def _set_up_logging(stage_args: StageArguments) -> None:
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    for name in ("vita_audio", "finetune_sts"):
        # Every rank would say the same; the first one says it.
        logging.getLogger(name).setLevel(logging.INFO if stage_args.process_index == 0 else logging.ERROR)
    transformers.utils.logging.set_verbosity(stage_args.get_process_log_level())


if __name__ == "__main__":
    main()
