"""The peak memory of training, measured, beside the planner's.

``python tools/benchmark.py memory --sizes 256 512 --stages 1 2 3 4``

Each case trains a few steps with the real trainer and DeepSpeed's ZeRO-2 on random rows, in two processes on CPUs, and
reads the most memory that a process has held from Linux, less what it held before the model was made. A first, tiny
case opens the libraries. On a GPU the same numbers come from ``torch.cuda.max_memory_allocated``: ``--processes 1``
on one card.

The sizes are hidden sizes; layers, MLP and vocabulary follow from them. The last column is (planned - measured) /
measured.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vita_audio.cli.arguments import command_parser
from vita_audio.constants import IGNORE_INDEX
from vita_audio.models import Qwen2MTPConfig, Qwen2MTPForCausalLM
from vita_audio.training import SpeechTrainer, StageArguments, apply_stage
from vita_audio.training.planner import Batch, Plan, Setup, Zero, make_plan

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = {1: (0, False), 2: (1, True), 3: (10, True), 4: (10, False)}
"""Heads, and whether the LLM is frozen."""
LAYERS = {256: 4, 384: 5, 512: 6, 640: 7}
"""Backbone layers of each hidden size."""
STEPS = 2
"""Adam's moments are there from the second on."""


def main(argv: list[str]) -> None:
    parser = command_parser(__doc__, prog="benchmark.py memory")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(LAYERS))
    parser.add_argument("--stages", type=int, nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--seq", type=int, default=1024, help="tokens in a row")
    parser.add_argument("--document", type=int, default=256, help="tokens in each document")
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--checkpointed_layers", type=int, help="that recompute their activations (default: all)"
    )
    parser.add_argument("--cases", help="internal: the cases, as JSON, in a process of the launcher")
    options = parser.parse_args(argv)
    if options.cases:
        measure(json.loads(options.cases))
        return
    cases = [
        {**vars(options), "size": size, "stage": stage} for size in options.sizes for stage in options.stages
    ]
    report(compare(cases))


def compare(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measured and planned bytes of each case."""
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            case["output_dir"] = folder
        command = [
            *(sys.executable, str(REPOSITORY / "vita_audio/cli/launch.py"), "--standalone"),
            *("--nproc_per_node", str(cases[0]["processes"]), str(REPOSITORY / "tools/benchmark.py")),
            *("memory", "--cases", json.dumps(cases)),
        ]
        # Freed tensors go back to the system at once, so the memory of the process is that of its tensors.
        own = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        run = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"the measured processes failed: {run.stderr[-2000:]}")
        measured = json.loads((Path(folder) / "measured.json").read_text())
    results = []
    for case, size in zip(cases, measured, strict=True):
        plan = plan_of(case)
        parameters = sum(every for _, every in plan.parameters.values())
        named = {"size": case["size"], "stage": case["stage"], "parameters": parameters}
        results.append({**named, "measured": size, "planned": plan.peak_bytes})
    return results


def config_of(case: dict[str, Any]) -> Qwen2MTPConfig:
    heads, _ = STAGES[case["stage"]]
    size = case["size"]
    return Qwen2MTPConfig(
        vocab_size=case["vocab"],
        hidden_size=size,
        intermediate_size=11 * size // 4,
        num_hidden_layers=LAYERS.get(size, 8) + heads,
        num_nextn_predict_layers=heads,
        num_attention_heads=max(1, size // 64),
        num_key_value_heads=max(1, size // 256),
        max_position_embeddings=case["seq"],
    )


def plan_of(case: dict[str, Any]) -> Plan:
    setup = Setup(
        language_model_freeze=STAGES[case["stage"]][1],
        batch=Batch(1, case["seq"], case["document"], supervised=0.5),
        accumulation=1,
        gpus=case["processes"],
        dtype=getattr(torch, case["dtype"]),
        checkpointed_layers=case["checkpointed_layers"],
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    return make_plan(config_of(case), setup, Zero.from_config(deepspeed_config()))


def deepspeed_config() -> dict[str, Any]:
    auto = dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"
    )
    zero = {"stage": 2, "reduce_bucket_size": 10_000_000, "overlap_comm": False, "contiguous_gradients": True}
    return {
        **auto,
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "steps_per_print": 10**6,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }


class RandomRows:
    """Endless rows of documents of equal length whose second half is supervised."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case = case

    def __iter__(self):
        positions = torch.arange(self.case["seq"]) % self.case["document"]
        while True:
            ids = torch.randint(self.case["vocab"], (1, self.case["seq"]))
            labels = ids.masked_fill(positions < self.case["document"] // 2, IGNORE_INDEX)
            yield {"input_ids": ids, "position_ids": positions[None], "labels": labels}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def counts(self) -> dict[str, float]:
        return {"epoch": 0.0}


def measure(cases: list[dict[str, Any]]) -> None:
    """In a launched process: train each case, and let the first process write what it held."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
    train({**cases[0], "size": 64, "stage": 4})
    peaks = [train(case) for case in cases]
    if int(os.environ["RANK"]) == 0:
        (Path(cases[0]["output_dir"]) / "measured.json").write_text(json.dumps(peaks))


def train(case: dict[str, Any]) -> int:
    """The most bytes that training a case held at once."""
    cuda = torch.cuda.is_available()
    arguments = StageArguments(
        output_dir=case["output_dir"],
        max_steps=STEPS,
        use_cpu=not cuda,
        bf16=case["dtype"] == "bfloat16",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        gradient_accumulation_steps=1,
        per_device_train_batch_size=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        deepspeed=deepspeed_config(),
    )
    gc.collect()
    before = held(reset=True)
    if cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    model = Qwen2MTPForCausalLM(config_of(case)).to(getattr(torch, case["dtype"]))
    apply_stage(model, language_model_freeze=STAGES[case["stage"]][1])
    SpeechTrainer(
        model=model,
        args=arguments,
        loader=RandomRows(case),
        checkpointed_layers=case["checkpointed_layers"],
    ).train()
    return (torch.cuda.max_memory_allocated() if cuda else held()) - before


def held(*, reset: bool = False) -> int:
    """The most memory that this process has held, in bytes; ``reset`` starts over from what it holds now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def report(results: list[dict[str, Any]]) -> None:
    table = Table(title="Peak memory of a process, GB")
    for column in ("hidden size", "stage", "parameters", "measured", "planned", "difference"):
        table.add_column(column, justify="right")
    for result in results:
        difference = result["planned"] / result["measured"] - 1
        table.add_row(
            *(str(result["size"]), str(result["stage"]), f"{result['parameters'] / 1e6:,.0f} M"),
            *(f"{result['measured'] / 1e9:.2f}", f"{result['planned'] / 1e9:.2f}", f"{difference:+.1%}"),
        )
    Console().print(table)
    print(json.dumps(results))
