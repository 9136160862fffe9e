"""One training step of a stage: our implementation and the plain one, in seconds and peak memory.

``python tools/benchmark.py train-step --stage 3 --seq 4096 --hidden 512 --layers 8 --vocab 32768``
``python tools/benchmark.py train-step --stage 4 --variant plus``

A step is forward and backward over one packed row. The plain way computes, as the public code does,
float32 logits of the backbone and of every head over the whole row, and keeps autograd's record of
them; attention is transformers' ``sdpa`` with a dense mask. Ours computes logits only where there is a label,
one chunk at a time together with their gradient, and attends document by document. A third line gives the plain
way our attention, which separates the two gains. ``--torch_compile`` adds ours with compiled layers; the warm-up step
compiles.

The floor is the time the necessary multiplications alone would take at the speed this machine
reaches on one large matrix product: backbone forward (and backward when it trains), heads forward and
backward, attention inside documents, LM head at supervised positions. Softmax, norms, rotary
embedding, masks and copies come on top; they account for the distance to the floor. MFU is the share of that
speed that the operations of :func:`vita_audio.training.planner.step_flops` reach, which count a causal attention
as a full one; the plan's memory stands beside the measured one.

Every way recomputes activations (gradient checkpointing), as the stage scripts do, unless disabled;
neither floor nor MFU includes that. The Plus variant hears one clip in each document, through a small encoder.

Each way is timed in one process and its memory measured in another, which gives freed memory back at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.memory import held
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from vita_audio.cli.arguments import command_parser
from vita_audio.constants import IGNORE_INDEX
from vita_audio.models import (
    Qwen2MTPConfig,
    Qwen2MTPForCausalLM,
    Qwen2MTPSenseVoiceConfig,
    Qwen2MTPSenseVoiceForCausalLM,
)
from vita_audio.models.attention import attention_masks, document_ids
from vita_audio.models.compat import enable_checkpointing
from vita_audio.models.cost import attention_flops
from vita_audio.models.loss import CHUNK_LOGITS_CPU, CHUNK_LOGITS_GPU, shifted_targets
from vita_audio.models.mctp import run_cascade
from vita_audio.training.compilation import compile_layers
from vita_audio.training.planner import Batch, Setup, step_flops
from vita_audio.training.stages import apply_stage
from vita_audio.training.step_memory import step_memory

WAYS = {"plain": "sdpa", "plain, our attention": "packed_sdpa", "ours": "packed_sdpa"}
"""The measured implementations, and their attention."""
COMPILED = "ours, compiled"
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Has freed tensors go back to the system at once, so the memory of a process is that of its tensors."""
STAGES = {1: (0, False), 2: (1, True), 3: (10, True), 4: (10, False)}
"""Heads, and whether only they train."""
SMALL_ENCODER = {
    "output_size": 128,
    "attention_heads": 2,
    "linear_units": 256,
    "num_blocks": 4,
    "tp_blocks": 0,
}
CLIP_FRAMES = 28


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    context = multiprocessing.get_context("spawn")
    results = {}
    for way in (*WAYS, *([COMPILED] if arguments.torch_compile else [])):
        with context.Pool(1) as pool:
            results[way] = pool.apply(measure, (way, vars(arguments)))
        os.environ.update(GIVE_BACK)
        with context.Pool(1) as pool:
            results[way]["gigabytes"] = pool.apply(measure_memory, (way, vars(arguments)))
        for name in GIVE_BACK:
            del os.environ[name]
        print(f"{way}: {json.dumps(results[way])}", file=sys.stderr)
    report(arguments, results)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = command_parser(__doc__, prog="benchmark.py train-step")
    parser.add_argument("--stage", type=int, choices=STAGES, help="sets --heads and --frozen")
    parser.add_argument("--variant", choices=("base", "plus"), default="base")
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--layers", type=int, default=8, help="backbone layers")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, help="MLP width (default: 11/4 of hidden)")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--seq", type=int, default=4096, help="tokens in the row")
    parser.add_argument("--document", type=int, default=512, help="tokens in each document")
    parser.add_argument("--supervised", type=float, default=0.4, help="share of each document, at its end")
    parser.add_argument("--frozen", action="store_true", help="train the heads only (stages 2 and 3)")
    parser.add_argument(
        "--no_gradient_checkpointing",
        dest="gradient_checkpointing",
        action="store_false",
        help="keep all activations; by default all ways use checkpointing, as the stage scripts do",
    )
    parser.add_argument("--torch_compile", action="store_true", help="also measure ours with compiled layers")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one warm-up step")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    if arguments.stage:
        arguments.heads, arguments.frozen = STAGES[arguments.stage]
    arguments.intermediate = arguments.intermediate or 11 * arguments.hidden // 4
    return arguments


def measure(way: str, options: dict) -> dict[str, float]:
    """Median seconds per step and processor seconds (which other processes disturb less), and the loss."""
    arguments = argparse.Namespace(**options)
    model, step = build_step(way, arguments)
    seconds, cpu_seconds = [], []
    for _ in range(arguments.steps + 1):
        model.zero_grad(set_to_none=True)
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = step()
        loss.backward()
        if arguments.device.startswith("cuda"):
            torch.cuda.synchronize(arguments.device)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {
        "seconds": statistics.median(seconds[1:]),
        "cpu_seconds": statistics.median(cpu_seconds[1:]),
        "loss": loss.item(),
        "matmul": matmul_speed(arguments) if way == "ours" else 0.0,
    }


def measure_memory(way: str, options: dict) -> float:
    """Peak memory of a step in GB, above the model's own."""
    tiny = {
        "hidden": 64,
        "intermediate": 128,
        "layers": 1,
        "heads": 1,
        "seq": 64,
        "document": 32,
        "vocab": 64,
    }
    for given in (options | tiny, options):  # the tiny step opens the libraries
        arguments = argparse.Namespace(**given)
        model, step = build_step(way, arguments)
        gc.collect()
        on_gpu = arguments.device.startswith("cuda")
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(arguments.device)
        before = torch.cuda.memory_allocated(arguments.device) if on_gpu else held(reset=True)
        step().backward()
        peak = torch.cuda.max_memory_allocated(arguments.device) if on_gpu else held()
        del model, step
    return (peak - before) / 1e9


def build_step(way: str, arguments: argparse.Namespace) -> tuple[Qwen2MTPForCausalLM, Callable[[], Tensor]]:
    """The model of a way, and its forward pass over one row, which returns the loss."""
    torch.manual_seed(0)
    model = build_model(arguments, WAYS.get(way, WAYS["ours"]))
    if way == COMPILED:
        compile_layers(model)
    batch = build_batch(arguments)
    if way.startswith("plain"):
        return model, lambda: plain_loss(model, **batch)
    return model, lambda: model(**batch).loss


def build_config(arguments: argparse.Namespace) -> Qwen2MTPConfig:
    heads_of_64 = max(1, arguments.hidden // 64)
    sizes = {
        "vocab_size": arguments.vocab,
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.intermediate,
        "num_hidden_layers": arguments.layers + arguments.heads,
        "num_nextn_predict_layers": arguments.heads,
        "num_attention_heads": heads_of_64,
        "num_key_value_heads": max(1, heads_of_64 // 4),
        "max_position_embeddings": arguments.seq,
    }
    if arguments.variant == "plus":
        return Qwen2MTPSenseVoiceConfig(**sizes, audio_encoder=SMALL_ENCODER)
    return Qwen2MTPConfig(**sizes)


def build_model(arguments: argparse.Namespace, attention: str) -> Qwen2MTPForCausalLM:
    config = build_config(arguments)
    dtype = getattr(torch, arguments.dtype)
    plus = arguments.variant == "plus"
    model_class = Qwen2MTPSenseVoiceForCausalLM if plus else Qwen2MTPForCausalLM
    model = model_class(config).to(arguments.device, dtype).train()
    model.set_attn_implementation(attention)
    apply_stage(model, language_model_freeze=arguments.frozen)
    if arguments.gradient_checkpointing:
        enable_checkpointing(model)
    return model


def build_batch(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of documents of equal length whose ends are supervised."""
    positions = torch.arange(arguments.seq) % arguments.document
    input_ids = torch.randint(arguments.vocab, (1, arguments.seq))
    prompt = round(arguments.document * (1 - arguments.supervised))
    labels = input_ids.masked_fill(positions < prompt, IGNORE_INDEX)
    batch: dict[str, Any] = {"input_ids": input_ids, "position_ids": positions[None], "labels": labels}
    batch = {name: tensor.to(arguments.device) for name, tensor in batch.items()}
    if arguments.variant == "plus":
        starts = range(0, arguments.seq - CLIP_FRAMES - 4, arguments.document)
        places = torch.arange(CLIP_FRAMES + 4)
        batch["audios"] = [torch.randn(CLIP_FRAMES, 560, device=arguments.device) for _ in starts]
        batch["audio_indices"] = [torch.stack([0 * places, start + places]) for start in starts]
    return batch


def plain_loss(
    model: Qwen2MTPForCausalLM, input_ids: Tensor, position_ids: Tensor, labels: Tensor, **audio: Any
) -> Tensor:
    """The same loss with full float32 logits for the backbone and every head."""
    config = model.config
    plain_embeds = model.get_input_embeddings()(input_ids)
    embeds = model.embed_inputs(input_ids, **audio)
    masks = attention_masks(config, embeds, None, None, position_ids)
    hidden = model.model(
        inputs_embeds=embeds, position_ids=position_ids, attention_mask=masks, use_cache=False
    ).last_hidden_state
    frozen = model.has_frozen_backbone
    detached = frozen or config.mtp_detach_backbone
    documents = document_ids(position_ids)

    def loss_of(state: Tensor, shift: int) -> Tensor:
        logits = model.lm_head(state).float()
        return cross_entropy(logits.flatten(0, 1), shifted_targets(labels, documents, shift).flatten())

    main_loss = loss_of(hidden, 1)
    if not config.num_nextn_predict_layers:
        return main_loss
    states = run_cascade(
        model.heads,
        plain_embeds.detach() if detached else plain_embeds,
        hidden.detach() if detached else hidden,
        position_ids,
        model.model.rotary_emb,
        attention_mask=masks["full_attention"],
    )
    head_losses = [loss_of(state, k + 2) for k, state in enumerate(states)]
    head_loss = config.mtp_loss_weight * torch.stack(head_losses).mean()
    return head_loss if frozen else main_loss + head_loss


def matmul_speed(arguments: argparse.Namespace) -> float:
    """Floating-point operations per second of one large product in the benchmark's data type."""
    a = torch.randn(2048, 2048, device=arguments.device, dtype=getattr(torch, arguments.dtype))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        if arguments.device.startswith("cuda"):
            torch.cuda.synchronize(arguments.device)
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def operations(arguments: argparse.Namespace) -> tuple[int, int]:
    """Operations of the step by the planner's count, and the fewest: a causal attention needs half of a full one."""
    config, setup = build_config(arguments), build_setup(arguments)
    counted, _ = step_flops(config, setup)
    passes = 3 * arguments.heads + arguments.layers * (1 if arguments.frozen else 3)
    attention = passes * sum(attention_flops(config, length) for length in setup.batch.documents)
    return counted, counted - attention // 2


def build_setup(arguments: argparse.Namespace) -> Setup:
    batch = Batch(1, arguments.seq, arguments.document, arguments.supervised)
    layers = None if arguments.gradient_checkpointing else 0
    return Setup(language_model_freeze=arguments.frozen, batch=batch, checkpointed_layers=layers)


def planned_gigabytes(arguments: argparse.Namespace) -> float:
    """The plan's memory above the model's own: gradients, activations and the loss."""
    on_gpu = arguments.device.startswith("cuda")
    peak, _ = step_memory(
        build_config(arguments),
        build_setup(arguments).batch,
        language_model_freeze=arguments.frozen,
        dtype=getattr(torch, arguments.dtype),
        checkpointed_layers=build_setup(arguments).checkpointed_layers,
        chunk_logits=CHUNK_LOGITS_GPU if on_gpu else CHUNK_LOGITS_CPU,
    )
    return peak / 1e9


def report(arguments: argparse.Namespace, results: dict[str, dict[str, float]]) -> None:
    ours, plain = results["ours"], results["plain"]
    table = Table(title="One training step")
    for column in ("way", "seconds", "CPU seconds", "peak memory above the model, GB", "loss"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, result in results.items():
        figures = (result["seconds"], result["cpu_seconds"], result["gigabytes"])
        table.add_row(way, *(f"{figure:.2f}" for figure in figures), f"{result['loss']:.5f}")
    console = Console()
    console.print(table)
    counted, fewest = operations(arguments)
    floor = fewest / ours["matmul"]
    summary = {
        "tokens_per_second": round(arguments.seq / ours["seconds"]),
        "mfu": round(counted / (ours["seconds"] * ours["matmul"]), 3),
        "speedup": round(plain["seconds"] / ours["seconds"], 2),
        "cpu_time_speedup": round(plain["cpu_seconds"] / ours["cpu_seconds"], 2),
        "memory_ratio": round(ours["gigabytes"] / plain["gigabytes"], 3),
        "gigabytes": round(ours["gigabytes"], 3),
        "planned_gigabytes": round(planned_gigabytes(arguments), 3),
        "floor_seconds": round(floor, 2),
        "times_floor": round(ours["seconds"] / floor, 2),
    }
    if COMPILED in results:
        summary["compiled"] = round(results[COMPILED]["seconds"] / ours["seconds"], 3)
        summary["compiled_cpu_time"] = round(results[COMPILED]["cpu_seconds"] / ours["cpu_seconds"], 3)
    console.print(
        f"ours: {summary['speedup']}x faster, {summary['memory_ratio']:.1%} of the memory "
        f"({summary['gigabytes']} GB, planned {summary['planned_gigabytes']}); "
        f"{summary['tokens_per_second']:,} tokens/s, MFU {summary['mfu']:.1%} of the "
        f"{ours['matmul'] / 1e9:,.0f} GFLOP/s of a matrix product on this machine. "
        f"Floor: {fewest / 1e9:,.0f} GFLOP = {floor:.2f} s; ours takes {summary['times_floor']} times that."
    )
    print(json.dumps(summary))
