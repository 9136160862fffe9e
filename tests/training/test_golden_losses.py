"""Losses of the first steps of every stage and both variants, equal to recorded ones: float32, fixed seeds.

``PYTHONPATH=. python tests/training/test_golden_losses.py`` records them again, after a change that is meant to change
them, into tests/goldens/training_steps.json.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from vita_audio.models import (
    Qwen2MTPConfig,
    Qwen2MTPForCausalLM,
    Qwen2MTPSenseVoiceConfig,
    Qwen2MTPSenseVoiceForCausalLM,
)
from vita_audio.training import SpeechTrainer, StageArguments, apply_stage

GOLDENS = Path(__file__).parents[1] / "goldens" / "training_steps.json"
STEPS, TIME, VOCABULARY, FRAMES = 5, 96, 160, 12
STAGES = {
    1: {"heads": 0, "frozen": False, "learning_rate": 6e-5},
    2: {"heads": 1, "frozen": True, "learning_rate": 1e-3},
    3: {"heads": 10, "frozen": True, "learning_rate": 1e-3},
    4: {"heads": 10, "frozen": False, "learning_rate": 5e-5, "mtp_learning_rate_multiplier": 10.0},
}
ENCODER = {
    "output_size": 32,
    "attention_heads": 2,
    "linear_units": 48,
    "num_blocks": 2,
    "tp_blocks": 1,
}
CASES = [f"{variant}, stage {stage}" for variant in ("base", "plus") for stage in STAGES]


def record(case: str, folder: Path, **options: Any) -> list[dict[str, float]]:
    """The logged losses of a stage's first steps, at a constant rate.

    Args:
        options: of the trainer, on top of the stage's.
    """
    variant, _, stage = case.partition(", stage ")
    settings = dict(STAGES[int(stage)])
    heads, frozen = settings.pop("heads"), settings.pop("frozen")
    plus = variant == "plus"
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3 + heads,
        "num_nextn_predict_layers": heads,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.08,
    }
    if plus:
        model = Qwen2MTPSenseVoiceForCausalLM(Qwen2MTPSenseVoiceConfig(**sizes, audio_encoder=ENCODER))
    else:
        model = Qwen2MTPForCausalLM(Qwen2MTPConfig(**sizes))
    apply_stage(model, language_model_freeze=frozen)
    arguments = StageArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        logging_steps=1,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
        **options,
    )
    trainer = SpeechTrainer(model=model, args=arguments, loader=Rows(plus))
    trainer.train()
    names = ("loss", "main_loss", *(f"mtp_loss_{k}" for k in range(heads)), "grad_norm")
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [{name: float(line[name]) for name in names if name in line} for line in lines]


class Rows:
    """Four packed rows, over and over; in the Plus variant with a clip in each document of 24 tokens and more."""

    def __init__(self, plus: bool) -> None:
        draw = torch.Generator().manual_seed(1)
        self.rows = [self._row(draw, plus) for _ in range(4)]

    def __iter__(self):
        yield from map(dict, itertools.cycle(self.rows))

    def _row(self, draw: torch.Generator, plus: bool) -> dict:
        lengths = [40, 5, 30, 21]
        ids = torch.randint(VOCABULARY, (1, TIME), generator=draw)
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        labels = ids.masked_fill(positions < 4, -100)
        row = {"input_ids": ids, "position_ids": positions, "labels": labels}
        if plus:
            places = torch.arange(FRAMES + 4)
            starts = [0, 45]
            row["audios"] = [torch.randn(FRAMES, 560, generator=draw) for _ in starts]
            row["audio_indices"] = [torch.stack([0 * places, start + places])[:, None] for start in starts]
        return row

    def state_dict(self):
        return {}

    def counts(self):
        return {"epoch": 0.0}


@pytest.mark.parametrize("case", CASES)
def test_the_first_steps_give_the_recorded_losses(case, tmp_path):
    golden = json.loads(GOLDENS.read_text())[case]
    lines = record(case, tmp_path)
    assert len(lines) == len(golden) == STEPS
    for line, want in zip(lines, golden, strict=True):
        assert line == pytest.approx(want, rel=1e-4)
    assert lines[-1]["loss"] < lines[0]["loss"], "it learns"


@pytest.fixture
def compiled_graphs():
    """How many graphs torch.compile has made since the start of the test."""
    torch.compiler.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        ("base, stage 1", "aot_eager"),
        ("plus, stage 1", "aot_eager"),
        ("base, stage 3", "aot_eager"),
        ("base, stage 4", "aot_eager"),
        ("plus, stage 4", "inductor"),
    ],
)
def test_compiled_layers_give_the_recorded_losses_and_share_their_graphs(
    case, backend, tmp_path, compiled_graphs
):
    lines = record(case, tmp_path, torch_compile=True, torch_compile_backend=backend)
    for line, want in zip(lines, json.loads(GOLDENS.read_text())[case], strict=True):
        assert line == pytest.approx(want, rel=1e-4)
    # A norm, an MLP, and what comes before and after attention; again for a backbone without gradient. Not 4 a layer.
    assert 4 <= compiled_graphs() <= 12


if __name__ == "__main__":
    recorded = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as temporary:
            recorded[name] = record(name, Path(temporary))
    GOLDENS.write_text(json.dumps(recorded, indent=1) + "\n")
