"""What a run shows: two real processes train and validate, and TensorBoard's files are read back.

The learning rate is so small that the model stays as it was, so every figure can be computed here by hand.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from vita_audio.audio import get_audio_tokenizer
from vita_audio.cli.plot_training import main as plot
from vita_audio.data import build_example

REPOSITORY = Path(__file__).resolve().parents[2]
HEADS, TIME = 10, 256
TASKS = {"asr": "asr", "tts": "tts", "sqa": "speech_qa"}


@pytest.fixture(scope="module")
def run(tiny_world, tmp_path_factory):
    """A run of two processes over three sources, validated twice."""
    root = tmp_path_factory.mktemp("watched")
    sources = "".join(f"  {task}: {{data_paths: [{task}.jsonl]}}\n" for task in TASKS)
    mix = root / "mix.yaml"
    mix.write_text("dataset:\n" + sources)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_world.model_dir)
    for parameter in model.parameters():  # no longer known by heart, or every accuracy would be 1
        parameter.data += 0.1 * parameter.std() * torch.randn_like(parameter)
    model.save_pretrained(root / "model")
    AutoTokenizer.from_pretrained(tiny_world.model_dir).save_pretrained(root / "model")
    options = {
        "model_name_or_path": root / "model",
        "dataset_name": mix,
        "data_root": tiny_world.data_dir,
        "audio_tokenizer_type": "mel_vq",
        "audio_tokenizer_path": tiny_world.codec_dir,
        "model_max_length": TIME,
        "output_dir": root / "out",
        "max_steps": 4,
        "logging_steps": 2,
        "detail_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-30,
        "mtp_learning_rate_multiplier": 10,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": 0,
        "report_to": "tensorboard",
        "use_cpu": True,
        "bf16": False,
        "eval_dataset_name": mix,
        "eval_steps": 2,
        "eval_speech_samples": 2,
        "eval_speech_tokens": 120,
        "eval_transcriber": "command:sh -c 'echo the quiet river flows' {wav}",
        "ddp_backend": "gloo",
    }
    words = [f"{word}" for name, value in options.items() for word in (f"--{name}", value)]
    launcher = [
        sys.executable,
        str(REPOSITORY / "vita_audio/cli/launch.py"),
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    process = subprocess.run(
        [*launcher, str(REPOSITORY / "tools/finetune_sts.py"), *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return root, process


@pytest.fixture(scope="module")
def events(run):
    reader = EventAccumulator(
        str(run[0] / "out/runs"), size_guidance={"scalars": 0, "audio": 0, "tensors": 0}
    )
    reader.Reload()
    return reader


@pytest.fixture(scope="module")
def by_hand(run, tiny_world):
    """For each task the summed losses and hits, and the count, of the backbone and every head, from full logits."""
    model = AutoModelForCausalLM.from_pretrained(run[0] / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run[0] / "model")
    codec = get_audio_tokenizer("mel_vq", tiny_world.codec_dir)
    figures = {}
    for task, sample in tiny_world.samples.items():
        audios = [tiny_world.audio(name) for name in sample["audios"]]
        example = build_example(sample | {"audios": audios}, tokenizer, codec)
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)
        positions = torch.arange(ids.shape[1])[None]
        with torch.no_grad():
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            states = [hidden]
            masks = {"full_attention": None}
            states += model.head_states(ids, hidden, positions, masks)
            rows = []
            for shift, state in enumerate(states, start=1):
                logits, targets = model.lm_head(state)[0, :-shift], labels[shift:]
                known = targets != -100
                loss = cross_entropy(logits[known], targets[known], reduction="sum")
                hits = (logits[known].argmax(dim=1) == targets[known]).sum()
                rows.append((loss.item(), hits.item(), known.sum().item()))
        figures[task] = (rows, int((labels[1:] != -100).sum()))
    return figures


def scalars(events, tag):
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_validation_logs_the_losses_and_accuracies_that_full_logits_give(events, by_hand):
    items = sum(count for _, count in by_hand.values())
    losses, names = [], ["main", *(f"mtp_{k}" for k in range(HEADS))]
    for head, name in enumerate(names):
        loss, hits, count = (sum(rows[head][i] for rows, _ in by_hand.values()) for i in range(3))
        part, _, number = name.partition("_")
        tag = "_".join(filter(None, (part, "{}", number)))
        losses.append(loss / items)
        for step, value in scalars(events, "eval/" + tag.format("loss")):
            assert value == pytest.approx(loss / items, rel=1e-4), (step, name)
        assert dict(scalars(events, "eval/" + tag.format("accuracy"))) == pytest.approx(
            {2: hits / count, 4: hits / count}, rel=1e-5
        )
    assert [step for step, _ in scalars(events, "eval/loss")] == [2, 4]
    assert scalars(events, "eval/loss")[0][1] == pytest.approx(losses[0] + sum(losses[1:]) / HEADS, rel=1e-4)


def test_validation_and_training_split_them_by_task_and_source(events, by_hand):
    for task, slug in TASKS.items():
        rows, _ = by_hand[task]
        heads = [sum(row[i] for row in rows[1:]) for i in range(3)]
        for tag, want in {
            f"task/{slug}/main_loss": rows[0][0] / rows[0][2],
            f"task/{slug}/mtp_accuracy_3": rows[4][1] / rows[4][2],
            f"task/{slug}/mtp_loss_9": rows[10][0] / rows[10][2],
            f"source/{task}/{task}/main_accuracy": rows[0][1] / rows[0][2],
            f"source/{task}/{task}/mtp_loss": heads[0] / heads[2],
        }.items():
            for prefix in ("eval", "train"):
                # A document is cut by no row, so its mean in training is the same however often it was drawn.
                assert scalars(events, f"{prefix}/{tag}")[-1][1] == pytest.approx(want, rel=1e-4), tag


def test_answers_are_heard_and_scored(events, tiny_world):
    assert sorted(events.Tags()["audio"]) == ["eval/speech_qa_1", "eval/tts_0"]
    for tag in events.Tags()["audio"]:
        assert [clip.step for clip in events.Audio(tag)] == [2, 4]
        assert events.Audio(tag)[0].length_frames > 1000
    text = events.Tensors("eval/tts_0/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "the quiet river runs" in text
    assert "**heard** the quiet river flows" in text
    assert [value for _, value in scalars(events, "eval/speech/tts_wer")] == [0.25, 0.25]


def test_the_log_holds_rates_norms_speed_and_data_of_all_ranks(run, events):
    history = json.loads((run[0] / "out/trainer_state.json").read_text())["log_history"]
    lines = [line for line in history if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert line["learning_rate/heads"] == pytest.approx(10 * line["learning_rate/language_model"])
        norms = [line["grad_norm/language_model"], line["grad_norm/heads"]]
        assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(line["grad_norm"], rel=1e-4)
        assert line["speed/tokens_per_second"] > 0
        assert 0 < line["speed/mfu"] < 1
        assert line["speed/memory_gb"] > 0.1
        assert 0 < line["data/wait_share"] < 1
        assert 0.3 < line["data/fill"] <= 1
        for name in ("speed/mfu", "grad_norm/heads", "learning_rate/heads", "data/fill", "main_accuracy"):
            assert line[name] == pytest.approx(dict(scalars(events, f"train/{name}"))[line["step"]], rel=1e-5)
    # Two ranks, two rows a step, several documents a row.
    assert lines[1]["data/used"] >= 2 * 2 * 4
    assert "4/4" in run[1].stderr, "a progress bar"


def test_curves_of_the_run_are_drawn_with_the_validation(run, tmp_path):
    plot([str(run[0] / "out"), "--out", str(tmp_path / "curves")])
    text = (tmp_path / "curves.html").read_text()
    for name in ("eval_loss", "mtp_accuracy_9", "speed/mfu", "task/asr/main_loss"):
        assert f"<td>{name}</td>" in text
