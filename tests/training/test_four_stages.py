"""The published scripts, run as they are: four stages, two DeepSpeed processes each."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import vita_audio  # noqa: F401  registers the model type
from vita_audio.models import load_with_heads

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
HEADS = ("mtp_", "model.layers.2.", "model.layers.3.")


@pytest.fixture(scope="module")
def chain(tiny_world):
    """All four stages, each from the one before under the same TIMESTAMP."""
    runs = {
        "stage1": tiny_world.run_stage("stage1", MODEL_NAME_OR_PATH=str(tiny_world.root / "base")),
        "mtp1_stage1": tiny_world.run_stage("mtp1_stage1"),
        # Two heads do here what ten do on a cluster.
        "mtp10_stage1": tiny_world.run_stage("mtp10_stage1", NUM_HEADS="2"),
        "mtp10_stage2": tiny_world.run_stage("mtp10_stage2", NUM_HEADS="2", DEEPSPEED_CONFIG=""),
    }
    for name, run in runs.items():
        assert run.returncode == 0, f"{name}: {run.stderr[-2000:]}"
    return tiny_world


def weights(world, name):
    return load_file(world.result(name) / "model.safetensors")


def test_every_stage_lowers_its_loss_and_logs_every_head(chain):
    for name, heads in (("stage1", 0), ("mtp1_stage1", 1), ("mtp10_stage1", 2), ("mtp10_stage2", 2)):
        lines = chain.losses(name)
        assert len(lines) == 4
        assert lines[-1]["loss"] < lines[0]["loss"]
        assert [key for key in lines[0] if key.startswith("mtp_loss")] == [
            f"mtp_loss_{k}" for k in range(heads)
        ]
        assert ("main_loss" in lines[0]) == (name in ("stage1", "mtp10_stage2"))


def test_the_logged_parts_add_up_to_the_loss(chain):
    for line in chain.losses("mtp10_stage2"):
        parts = line["main_loss"] + (line["mtp_loss_0"] + line["mtp_loss_1"]) / 2
        assert line["loss"] == pytest.approx(parts, rel=1e-4)


def test_head_stages_leave_the_language_model_unchanged_bit_for_bit(chain):
    first, second, third = (weights(chain, name) for name in ("stage1", "mtp1_stage1", "mtp10_stage1"))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert torch.equal(tensor, third[name]), name
    assert set(third) - set(first) == {name for name in third if name.startswith(HEADS)}


def test_the_last_stage_trains_every_parameter(chain):
    third, fourth = weights(chain, "mtp10_stage1"), weights(chain, "mtp10_stage2")
    unmoved = [name for name in third if torch.equal(third[name], fourth[name])]
    assert unmoved == []


def test_the_result_loads_by_its_own_name_with_every_weight_and_generates(chain):
    model = AutoModelForCausalLM.from_pretrained(chain.result("mtp10_stage2"))
    tokenizer = AutoTokenizer.from_pretrained(chain.result("mtp10_stage2"))
    assert type(model).__name__ == "Qwen2MTPForCausalLM"
    assert model.get_input_embeddings().num_embeddings % 8 == 0
    loaded = model.state_dict()
    for name, tensor in weights(chain, "mtp10_stage2").items():
        assert torch.equal(loaded[name], tensor), name
    prompt = tokenizer("<|im_start|>user\nsay one", return_tensors="pt").input_ids
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    (reply,) = model.generate(prompt, mtp_inference_mode=[1, 2], **options)
    assert len(reply) == prompt.shape[1] + 8
    # Every third token is the backbone's: the likeliest after all before it.
    logits = model(reply[None]).logits[0]
    for place in range(prompt.shape[1], len(reply), 3):
        assert reply[place] == logits[place - 1].argmax()


def test_a_finished_stage_returns_at_once_and_changes_nothing(chain):
    before = (chain.result("stage1") / "model.safetensors").stat().st_mtime_ns
    run = chain.run_stage("stage1", MODEL_NAME_OR_PATH=str(chain.root / "base"))
    assert run.returncode == 0
    assert "finished stage" in run.stderr
    assert (chain.result("stage1") / "model.safetensors").stat().st_mtime_ns == before


def test_a_stage_stopped_before_its_result_was_written_uses_its_last_checkpoint(chain):
    result = chain.result("mtp1_stage1")
    want = weights(chain, "mtp1_stage1")
    (result / "stage.complete").unlink()
    (result / "model.safetensors").unlink()
    assert chain.run_stage("mtp1_stage1").returncode == 0
    got = weights(chain, "mtp1_stage1")
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_checkpoint_of_another_mix_is_named_in_one_line(chain):
    folder = chain.root / "other_mix"
    base = str(chain.root / "base")
    settings = {"MODEL_NAME_OR_PATH": base, "OUTPUT_DIR": str(folder), "NPROC_PER_NODE": "1"}
    assert chain.run_stage("stage1", **settings, MAX_STEPS="2").returncode == 0
    (folder / "stage.complete").unlink()
    other = chain.root / "other_mix.yaml"
    other.write_text((chain.root / "mix.yaml").read_text().replace("ratio: 1.0", "ratio: 0.5"))
    run = chain.run_stage("stage1", **settings, MAX_STEPS="4", DATASET_NAME=str(other))
    assert run.returncode != 0
    assert "finetune_sts: the checkpoint was made with another data mix or seed" in run.stderr
    assert "Traceback" not in run.stderr.split("finetune_sts: the checkpoint")[0]


def test_partitioning_the_model_between_processes_changes_nothing(chain):
    """ZeRO-3, heads grown under it included, gives the losses of ZeRO-2."""
    config = json.loads((REPOSITORY / "scripts/deepspeed/ds_config_zero3.json").read_text())
    del config["optimizer"]  # DeepSpeed's own would have to be compiled
    config |= {"zero_allow_untested_optimizer": True}
    config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    path = chain.root / "zero3.json"
    path.write_text(json.dumps(config))
    folder = chain.root / "zero3"
    run = chain.run_stage(
        "mtp10_stage1", NUM_HEADS="2", DEEPSPEED_CONFIG=str(path), OUTPUT_DIR=str(folder), MASTER_PORT="29633"
    )
    assert run.returncode == 0, run.stderr[-2000:]
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    got = [line["loss"] for line in history if "loss" in line]
    want = [line["loss"] for line in chain.losses("mtp10_stage1")]
    assert got == pytest.approx(want, rel=1e-4)
    saved = load_file(folder / "model.safetensors")
    for name, tensor in weights(chain, "mtp10_stage1").items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(tiny_world):
    model = load_with_heads(tiny_world.root / "base", num_heads=0)
    model.model.norm.weight.data[0] = float("nan")
    broken = tiny_world.root / "broken"
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(tiny_world.root / "base").save_pretrained(broken)
    out = broken / "out"
    run = tiny_world.run_stage(
        "stage1", MODEL_NAME_OR_PATH=str(broken), OUTPUT_DIR=str(out), NPROC_PER_NODE="1"
    )
    assert run.returncode != 0
    assert "loss is nan at step 1" in run.stderr
    assert not (out / "stage.complete").exists()


def test_a_wrong_option_is_named_in_one_line(tiny_world):
    base = str(tiny_world.root / "base")
    run = tiny_world.run_stage("stage1", "--lerning_rate", "1", MODEL_NAME_OR_PATH=base, NPROC_PER_NODE="1")
    assert run.returncode != 0
    assert "finetune_sts: Some specified arguments are not used" in run.stderr


def test_an_unusable_folder_is_named_in_one_line(tiny_world):
    empty = tiny_world.root / "empty"
    empty.mkdir()
    AutoTokenizer.from_pretrained(tiny_world.root / "base").save_pretrained(empty)
    run = tiny_world.run_stage(
        "stage1", MODEL_NAME_OR_PATH=str(empty), NPROC_PER_NODE="1", OUTPUT_DIR=str(empty / "out")
    )
    assert run.returncode != 0
    assert f"finetune_sts: {empty}/config.json: not found" in run.stderr
