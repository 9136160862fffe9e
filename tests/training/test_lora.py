"""LoRA: what trains, exact resumption, what a checkpoint holds, merging, and the refusals."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from vita_audio.cli import finetune, merge_lora
from vita_audio.models import load_with_heads, open_model, open_tokenizer
from vita_audio.models.cost import PROJECTIONS
from vita_audio.training.lora_arguments import LoraArguments
from vita_audio.training.stages import apply_stage

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools/finetune_sts.py"
STEPS = 4


@pytest.fixture(scope="module")
def speaking(tiny_world):
    """A model whose tokenizer has all tokens: stage 4 starts from such a one."""
    folder = tiny_world.root / "speaking"
    finetune.main(tiny_world.options(folder, max_steps=1, save_steps=1, num_nextn_predict_layers=2))
    return folder


def options(world, base, folder, **more):
    given = {"model_name_or_path": base, "lora_r": 4, "lora_dropout": 0.1, "num_nextn_predict_layers": 2}
    return world.options(folder, **{**given, **more})


@pytest.fixture(scope="module")
def adapted(tiny_world, speaking):
    """The result of a run with adapters in stage 4."""
    folder = tiny_world.root / "adapted"
    finetune.main(options(tiny_world, speaking, folder))
    return folder


def names_in(folder: Path) -> set[str]:
    return {
        name.removeprefix("base_model.model.") for name in load_file(folder / "adapter_model.safetensors")
    }


def test_a_checkpoint_holds_adapters_and_heads_and_not_the_base(adapted, speaking):
    base = load_file(speaking / "model.safetensors")
    for folder in (adapted, adapted / "checkpoint-2"):
        assert not (folder / "model.safetensors").exists()
        held = names_in(folder)
        whole = {name for name in held if ".lora_" not in name}
        assert whole == {
            name for name in base if name.startswith(("mtp_", "model.layers.2.", "model.layers.3."))
        }
        adapters = {name.rsplit(".lora_", 1)[0].rsplit(".", 1)[1] for name in held - whole}
        assert adapters == set(PROJECTIONS)
        assert len(held - whole) == 2 * 2 * len(PROJECTIONS)  # layers, A and B
    assert "LoRA of rank 4 in the language model, and 2 heads" in (adapted / "README.md").read_text()


def test_a_stage_that_adds_tokens_trains_the_embeddings_whole(tiny_world):
    folder = tiny_world.root / "first"
    finetune.main(
        options(tiny_world, tiny_world.root / "base", folder, num_nextn_predict_layers=0, max_steps=1)
    )
    whole = {name for name in names_in(folder) if ".lora_" not in name}
    assert whole == {"model.embed_tokens.weight", "lm_head.weight"}
    assert json.loads((folder / "run.json").read_text())["arguments"]["lora_train_embeddings"] is True
    merge_lora.main([str(folder), "--output_dir", str(tiny_world.root / "first_merged")])
    merged = load_file(tiny_world.root / "first_merged/model.safetensors")
    trained = load_file(folder / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(merged["lm_head.weight"], trained)


def test_a_stopped_run_continues_with_the_losses_and_weights_of_an_uninterrupted_one(
    tiny_world, speaking, adapted
):
    folder = tiny_world.root / "stopped"
    shutil.copytree(
        adapted, folder, ignore=shutil.ignore_patterns("checkpoint-4", "stage.complete", "adapter_*")
    )
    shutil.copytree(adapted / "checkpoint-2", folder / "checkpoint-2", dirs_exist_ok=True)
    finetune.main(options(tiny_world, speaking, folder))
    assert [line["loss"] for line in tiny_world.logged(folder)] == [
        line["loss"] for line in tiny_world.logged(adapted)
    ]
    got, want = (load_file(each / "adapter_model.safetensors") for each in (folder, adapted))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_merged_model_is_an_ordinary_folder_with_the_logits_of_the_adapters(
    tiny_world, adapted, speaking
):
    from vita_audio.training.lora import open_with_adapter

    merged = tiny_world.root / "merged"
    merge_lora.main([str(adapted), "--output_dir", str(merged)])
    model, whole = open_with_adapter(adapted), AutoModelForCausalLM.from_pretrained(merged).eval()
    ids = torch.randint(0, 688, (2, 40), generator=torch.Generator().manual_seed(0))
    positions, labels = torch.arange(40)[None].expand(2, -1), ids
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-5)
        losses = [each(input_ids=ids, position_ids=positions, labels=labels) for each in (whole, model)]
        torch.testing.assert_close(losses[0].mtp_losses, losses[1].mtp_losses, rtol=0, atol=1e-5)
        base = open_model(speaking)(ids).logits
    assert (whole(ids).logits - base).abs().max() > 1e-3  # the adapters have learned something
    assert (
        open_model(merged).generation_config.mtp_inference_mode == model.generation_config.mtp_inference_mode
    )
    assert len(open_tokenizer(merged)) == len(open_tokenizer(adapted))
    assert not (merged / "adapter_config.json").exists()
    assert "merge_lora" not in (merged / "README.md").read_text()


def test_peft_itself_opens_the_adapters(adapted, speaking):
    from peft import PeftModel

    from vita_audio.training.lora import open_with_adapter

    ids = torch.arange(30)[None]
    theirs = PeftModel.from_pretrained(load_with_heads(speaking, 2), adapted).eval()
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=ids).logits, open_with_adapter(adapted)(input_ids=ids).logits)


def refusal(function, *arguments) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_adapters_are_refused_as_a_model_and_the_command_that_merges_them_is_named(adapted):
    command = f"python tools/merge_lora.py {adapted} --output_dir MERGED"
    assert command in refusal(open_model, adapted)
    assert command in refusal(load_with_heads, adapted, 2)


def test_adapters_are_never_merged_into_another_model(tiny_world, adapted, tmp_path):
    message = refusal(merge_lora.merge, adapted, tmp_path / "out", str(tiny_world.root / "base"))
    assert "other weights" in message or "shape" in message
    changed = tmp_path / "changed"
    shutil.copytree(tiny_world.root / "speaking", changed, ignore=shutil.ignore_patterns("checkpoint-*"))
    tensors = load_file(changed / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    assert "has other weights; give that model" in refusal(
        merge_lora.merge, adapted, tmp_path / "out", str(changed)
    )
    assert "give the base model with --base" in refusal(
        merge_lora.merge, adapted, tmp_path / "out", str(tmp_path / "moved")
    )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_whole_result_is_not_merged(adapted, speaking, tmp_path):
    assert "not the result of a run with --lora_r" in refusal(merge_lora.merge, speaking, tmp_path / "out")
    assert "is not empty" in refusal(merge_lora.merge, adapted, adapted)
    broken = tmp_path / "broken"
    shutil.copytree(adapted, broken, ignore=shutil.ignore_patterns("checkpoint-*"))
    tensors = load_file(broken / "adapter_model.safetensors")
    first = min(tensors)
    metadata = {"base_fingerprint": "any"}
    rest = {name: tensor for name, tensor in tensors.items() if name != first}
    save_file(
        rest,
        broken / "adapter_model.safetensors",
        metadata,
    )
    assert f"the first is {first}: stored None" in refusal(merge_lora.merge, broken, tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_r": -1}, "--lora_r -1: give a rank"),
        ({"lora_r": 4, "lora_alpha": 0}, "--lora_alpha 0: give 1 or more"),
        ({"lora_r": 4, "lora_dropout": 1}, "--lora_dropout 1.0: give a share"),
        (
            {"lora_r": 4, "lora_target_modules": ["q_proj", "lm_head"]},
            "--lora_target_modules lm_head: give some of",
        ),
        (
            {"lora_r": 4, "num_nextn_predict_layers": 1, "language_model_freeze": True},
            "--lora_r with --language_model",
        ),
    ],
)
def test_options_that_make_no_adapter_are_refused_in_one_line(tiny_world, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        finetune.main(tiny_world.options(tmp_path / "out", **flags))
    assert end.value.code == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"finetune_sts: {message}")


def test_a_checkpoint_is_not_continued_with_another_rank(tiny_world, speaking, adapted, capsys):
    for rank in (8, 0):
        with pytest.raises(SystemExit):
            finetune.main(options(tiny_world, speaking, adapted, lora_r=rank, max_steps=STEPS + 1))
        assert f"--lora_r {rank} (was 4): " in capsys.readouterr().err


def test_eight_bit_moments_are_bitsandbytes(monkeypatch, tiny_world, tmp_path, capsys):
    from vita_audio.training import optimizers

    with pytest.raises(SystemExit):
        finetune.main(tiny_world.options(tmp_path / "out", optim="adamw_bnb_8bit"))
    assert capsys.readouterr().err.startswith("finetune_sts: --optim adamw_bnb_8bit")
    made = []
    stand_in = types.ModuleType("bitsandbytes")
    stand_in.optim = types.SimpleNamespace(
        AdamW8bit=lambda groups, **options: made.append(("plain", groups, options)),
        PagedAdamW8bit=lambda groups, **options: made.append(("paged", groups, options)),
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)
    monkeypatch.setattr(optimizers, "find_spec", lambda name: name)
    for name in optimizers.EIGHT_BIT:
        optimizers.check_optimizer(name, use_cpu=False, deepspeed_builds=False)
        optimizers.build_optimizer(name, [], betas=(0.9, 0.95), eps=1e-8, device=torch.device("cuda"))
    assert [kind for kind, _, _ in made] == ["plain", "plain", "paged"]
    assert made[0][2] == {"betas": (0.9, 0.95), "eps": 1e-8}
    for settings, problem in (
        ({"use_cpu": True}, "need a GPU"),
        ({"deepspeed_builds": True}, "builds another"),
    ):
        wanted = {"use_cpu": False, "deepspeed_builds": False, **settings}
        with pytest.raises(ValueError, match=problem):
            optimizers.check_optimizer("adamw_8bit", **wanted)


def test_the_heads_of_a_model_with_a_frozen_lm_head_learn_beside_the_backbone(speaking):
    from vita_audio.training.lora import insert_adapters

    model = load_with_heads(speaking, 2)
    apply_stage(model)
    wrapped = insert_adapters(model, LoraArguments(lora_r=2, lora_train_embeddings=False)).train()
    assert not model.lm_head.weight.requires_grad
    ids = torch.arange(32)[None]
    outputs = wrapped(input_ids=ids, labels=ids)
    assert outputs.main_loss is not None
    outputs.loss.backward()
    assert all((each.grad is not None) is each.requires_grad for each in wrapped.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_deepspeed_trains_adapters_on_two_processes_and_continues_exactly(
    tiny_world, speaking, tmp_path, zero
):
    config = json.loads((REPOSITORY / f"scripts/deepspeed/ds_config_zero{zero}.json").read_text())
    config.pop("optimizer", None)
    config |= {"zero_allow_untested_optimizer": True}
    if zero == 3:
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    common = {"deepspeed": tmp_path / "ds.json", "ddp_backend": "gloo", "save_steps": 1}

    def train(folder):
        run = tiny_world.launch(2, TOOL, *options(tiny_world, speaking, folder, **common))
        assert run.returncode == 0, run.stderr[-3000:]
        return [line["loss"] for line in tiny_world.logged(folder)]

    losses = train(tmp_path / "whole")
    held = sum(tensor.nbytes for tensor in load_file(tmp_path / "whole/adapter_model.safetensors").values())
    (states,) = (
        (tmp_path / "whole/checkpoint-4").glob("global_step*/*model_states.pt") if zero == 2 else (None,)
    )
    assert states is None or states.stat().st_size < 3 * held
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole/checkpoint-3", stopped / "checkpoint-3")
    assert train(stopped) == losses
    got, want = (load_file(each / "adapter_model.safetensors") for each in (stopped, tmp_path / "whole"))
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert merge_lora.merge(tmp_path / "whole", tmp_path / "merged")[0] < 1e-5
