"""Two DeepSpeed processes, one with audio in its row and one without, against one process alone."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from vita_audio.models import freeze_audio_encoder

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens" / "sensevoice"

# Two steps with the encoder frozen, two with it trainable; audio changes ranks between the steps.
WORKER = """
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from transformers import AutoModelForCausalLM
import vita_audio
from vita_audio.models import freeze_audio_encoder

stage, checkpoint, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
deepspeed.init_distributed("gloo")
rank = deepspeed.comm.get_rank()
batches = torch.load(folder / "batches.pt")
for encoder in ("frozen", "trainable"):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if encoder == "frozen":
        freeze_audio_encoder(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config={
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.02}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    })
    engine.train()
    losses, gradients = [], []
    for step in range(2):
        loss = engine(**batches[(rank + step) % 2]).loss
        engine.backward(loss)
        found = {n: safe_get_full_grad(p) for n, p in model.named_parameters() if p.requires_grad}
        gradients.append({name: grad.clone() for name, grad in found.items() if grad is not None})
        engine.step()
        losses.append(loss.item())
    torch.save({"losses": losses, "gradients": gradients}, folder / f"{encoder}_{rank}.pt")
deepspeed.comm.barrier()
"""


def batches():
    """The golden packed row with three audios, and a row of text."""
    golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDENS / "lm_train.npz").items()}
    with_audio = {name: golden[name] for name in ("input_ids", "labels", "position_ids")}
    with_audio["audios"] = [golden[f"audio_{i}"] for i in range(3)]
    with_audio["audio_indices"] = [golden[f"audio_indices_{i}"] for i in range(3)]
    ids = torch.arange(20, 104)[None]
    return [with_audio, {"input_ids": ids, "labels": ids, "position_ids": torch.arange(84)[None]}]


def single_process(checkpoint, frozen):
    """Losses and gradients of the same two steps with both rows on one process."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if frozen:
        freeze_audio_encoder(model)
    # Plain gradient descent: Adam would blow rounding up where gradients are near zero.
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.02)
    model.train()
    losses, gradients = [], []
    for _ in range(2):
        optimizer.zero_grad()
        step = [model(**batch).loss for batch in batches()]
        (sum(step) / 2).backward()
        losses.append([loss.item() for loss in step])
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return losses, gradients


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_with_and_without_audio_take_equal_steps(stage, sensevoice_checkpoint, tmp_path):
    torch.save(batches(), tmp_path / "batches.pt")
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    # The first run on a machine compiles DeepSpeed's shared-memory communication.
    done = subprocess.run(
        [*command, tmp_path / "worker.py", str(stage), sensevoice_checkpoint, tmp_path],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    for encoder in ("frozen", "trainable"):
        ranks = [torch.load(tmp_path / f"{encoder}_{rank}.pt") for rank in range(2)]
        losses, gradients = single_process(sensevoice_checkpoint, encoder == "frozen")
        for step in range(2):
            for rank in range(2):
                assert ranks[rank]["losses"][step] == pytest.approx(losses[step][(rank + step) % 2], rel=1e-5)
            for name, expected in gradients[step].items():
                error = (ranks[0]["gradients"][step][name] - expected).norm()
                assert error <= 1e-4 * expected.norm() + 1e-6, f"{encoder}, step {step}: {name}"
        assert gradients[1]["model.audio_projection.mlp.0.weight"].norm() > 0
        assert any("audio_model" in name for name in gradients[0]) == (encoder == "trainable")
