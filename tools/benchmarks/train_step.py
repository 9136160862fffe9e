"""One training step of the heads: our implementation and the plain one, in seconds and peak memory.

``python tools/benchmark.py train-step --heads 10 --frozen --seq 4096 --hidden 512 --layers 8 --vocab 32768``

A step is forward and backward over one packed row. The plain way computes, as the public code does,
float32 logits of the backbone and of every head over the whole row, and keeps autograd's record of
them; attention is transformers' ``sdpa`` with a dense mask. Ours computes logits only where there is a label,
one chunk at a time together with their gradient, and attends document by document. A third line gives the plain
way our attention, which separates the two gains.

The floor is the time the necessary multiplications alone would take at the speed this machine
reaches on one large matrix product: backbone forward (and backward when it trains), heads forward and
backward, attention inside documents, LM head at supervised positions. Softmax, norms, rotary
embedding, masks and copies come on top; they account for the distance to the floor.

Every way recomputes activations (gradient checkpointing), as the stage scripts do, unless disabled;
the floor does not include that.

Each way runs in a separate process, since a CPU process never returns its peak memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from vita_audio.cli.arguments import command_parser
from vita_audio.constants import IGNORE_INDEX
from vita_audio.models import Qwen2MTPConfig, Qwen2MTPForCausalLM, freeze_backbone
from vita_audio.models.attention import attention_masks, document_ids
from vita_audio.models.compat import checkpointing_function, enable_checkpointing
from vita_audio.models.loss import shifted_targets
from vita_audio.models.mctp import run_cascade

WAYS = {"plain": "sdpa", "plain, our attention": "packed_sdpa", "ours": "packed_sdpa"}
"""The measured implementations, and their attention."""


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    context = multiprocessing.get_context("spawn")
    results = {}
    for way in WAYS:
        with context.Pool(1) as pool:
            results[way] = pool.apply(measure, (way, vars(arguments)))
        print(f"{way}: {json.dumps(results[way])}", file=sys.stderr)
    report(arguments, results)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = command_parser(__doc__, prog="benchmark.py train-step")
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
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one warm-up step")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    arguments.intermediate = arguments.intermediate or 11 * arguments.hidden // 4
    return arguments


def measure(way: str, options: dict) -> dict[str, float]:
    """Median seconds per step and processor seconds (which other processes disturb less); peak memory
    in GB above the model's own; the loss.
    """
    arguments = argparse.Namespace(**options)
    torch.manual_seed(0)
    model = build_model(arguments, WAYS[way])
    batch = build_batch(arguments)
    step = (lambda: model(**batch).loss) if way == "ours" else (lambda: plain_loss(model, **batch))
    memory_before = peak_memory(arguments.device)
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
        "gigabytes": peak_memory(arguments.device) - memory_before,
        "loss": loss.item(),
        "matmul": matmul_speed(arguments) if way == "ours" else 0.0,
    }


def build_model(arguments: argparse.Namespace, attention: str) -> Qwen2MTPForCausalLM:
    heads_of_64 = max(1, arguments.hidden // 64)
    config = Qwen2MTPConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers + arguments.heads,
        num_nextn_predict_layers=arguments.heads,
        num_attention_heads=heads_of_64,
        num_key_value_heads=max(1, heads_of_64 // 4),
        max_position_embeddings=arguments.seq,
    )
    dtype = getattr(torch, arguments.dtype)
    model = Qwen2MTPForCausalLM(config).to(arguments.device, dtype).train()
    model.set_attn_implementation(attention)
    if arguments.frozen:
        freeze_backbone(model)
    if arguments.gradient_checkpointing:
        enable_checkpointing(model)
    return model


def build_batch(arguments: argparse.Namespace) -> dict[str, Tensor]:
    """One row of documents of equal length whose ends are supervised."""
    positions = torch.arange(arguments.seq) % arguments.document
    input_ids = torch.randint(arguments.vocab, (1, arguments.seq))
    prompt = round(arguments.document * (1 - arguments.supervised))
    labels = input_ids.masked_fill(positions < prompt, IGNORE_INDEX)
    batch = {"input_ids": input_ids, "position_ids": positions[None], "labels": labels}
    return {name: tensor.to(arguments.device) for name, tensor in batch.items()}


def plain_loss(model: Qwen2MTPForCausalLM, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
    """The same loss with full float32 logits for the backbone and every head."""
    config = model.config
    embeds = model.get_input_embeddings()(input_ids)
    masks = attention_masks(config, embeds, None, None, position_ids)
    hidden = model.model(
        inputs_embeds=embeds, position_ids=position_ids, attention_mask=masks, use_cache=False
    ).last_hidden_state
    frozen = model.has_frozen_backbone
    documents = document_ids(position_ids)

    def loss_of(state: Tensor, shift: int) -> Tensor:
        logits = model.lm_head(state).float()
        return cross_entropy(logits.flatten(0, 1), shifted_targets(labels, documents, shift).flatten())

    main_loss = loss_of(hidden, 1)
    checkpoint = checkpointing_function(model.model)
    states = run_cascade(
        model.heads,
        embeds.detach() if frozen else embeds,
        hidden.detach() if frozen else hidden,
        position_ids,
        model.model.rotary_emb,
        attention_mask=masks["full_attention"],
        checkpoint=checkpoint,
    )
    head_losses = [loss_of(state, k + 2) for k, state in enumerate(states)]
    head_loss = config.mtp_loss_weight * torch.stack(head_losses).mean()
    return head_loss if frozen else main_loss + head_loss


def peak_memory(device: str) -> float:
    """Peak memory of this process so far, in GB."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


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


def necessary_operations(arguments: argparse.Namespace) -> float:
    """Multiply-adds x 2 that every implementation of this step needs."""
    d, tokens = arguments.hidden, arguments.seq
    key_value = d * max(1, d // 64 // 4) / max(1, d // 64)
    layer = 2 * d * d + 2 * d * key_value + 3 * d * arguments.intermediate
    # Causal attention inside a document: half of (length x length) scores, and as much for the values.
    attention = arguments.document * d
    head = layer + 2 * d * d + attention
    # Backward costs twice the forward: gradients of inputs and of weights.
    backbone_passes = 1 if arguments.frozen else 3
    lm_head_passes = 2 if arguments.frozen else 3
    terms = arguments.heads + (0 if arguments.frozen else 1)
    supervised = terms * arguments.supervised * tokens
    return 2 * (
        tokens * (arguments.layers * (layer + attention) * backbone_passes + arguments.heads * head * 3)
        + supervised * arguments.vocab * d * lm_head_passes
    )


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
    operations = necessary_operations(arguments)
    floor = operations / ours["matmul"]
    summary = {
        "speedup": round(plain["seconds"] / ours["seconds"], 2),
        "cpu_time_speedup": round(plain["cpu_seconds"] / ours["cpu_seconds"], 2),
        "memory_ratio": round(ours["gigabytes"] / plain["gigabytes"], 3),
        "floor_seconds": round(floor, 2),
        "times_floor": round(ours["seconds"] / floor, 2),
    }
    console.print(
        f"ours: {summary['speedup']}x faster, {summary['memory_ratio']:.1%} of the memory. Floor: "
        f"{operations / 1e9:,.0f} GFLOP at {ours['matmul'] / 1e9:,.0f} GFLOP/s (float matrix product of this machine) "
        f"= {floor:.2f} s; ours takes {summary['times_floor']} times that."
    )
    print(json.dumps(summary))
