"""The published mix, prepared whole from miniatures: found, shown and trained on."""

from __future__ import annotations

import html
import json
import logging
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from vita_audio.audio.mel_vq import MelVQConfig, MelVQTokenizer
from vita_audio.cli import finetune, inspect_data
from vita_audio.corpora import Settings, prepare, read_recipes
from vita_audio.data.mixing import Mix, read_mix

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDENS = REPOSITORY / "tests/goldens"
MIXES = [REPOSITORY / f"configs/sts_finetune_stage{stage}.yaml" for stage in (1, 2)]
IN_PLACE = ("globe_v2", "voice_assistant")
"""Sets whose clips stay in the publisher's Parquet files."""
CODES = 64  # speech tokens of the golden tokenizers


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path_factory):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ROOT_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("arrow"))
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture(scope="module")
def root(tmp_path_factory, miniatures, sound) -> Path:
    """A data root with all sets."""
    root = tmp_path_factory.mktemp("root")
    for name, recipe in read_recipes().items():
        source = root / "sources" / recipe.alias
        source.mkdir(parents=True)
        miniatures[name](source)
        prepare(recipe, source, root, Settings(clips="stay" if recipe.alias in IN_PLACE else "tar"))
    codec = MelVQTokenizer.fit(
        [sound(seed, seconds=3.0) for seed in range(4)], MelVQConfig(codebook_size=CODES), epochs=1
    )
    codec.save_pretrained(root / "codec")
    return root


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.stem)
def test_both_published_mixes_find_every_file(root, mix, tmp_path):
    specs = read_mix(mix, root)
    assert len(specs) == 116
    assert all(spec.path.is_file() and spec.path.stat().st_size for spec in specs)
    assert Mix(specs, 42, strict=True, cache_dir=str(tmp_path)).missing == []


def test_the_inspection_shows_all_sources_and_what_was_rejected(root, tmp_path):
    page = tmp_path / "page.html"
    inspect_data.main(
        [
            *(str(MIXES[0]), "--data_root", str(root), "--out", str(page), "--show", "1"),
            *("--tokenizer", str(GOLDENS / "data/tokenizer/glm4voice")),
            *("--audio_tokenizer_type", "mel_vq", "--audio_tokenizer_path", str(root / "codec")),
        ]
    )
    text = page.read_text(encoding="utf-8")
    for name in yaml.safe_load(MIXES[0].read_text())["dataset"]:
        assert f"<td>{html.escape(name)}/" in text, name
    table = text.split("<h2>Sources</h2>")[1].split("</table>")[0]
    assert table.count("<tr><td>") == len({spec.name for spec in read_mix(MIXES[0], root)})
    assert "audio_truncated" not in table, "training has nothing left to refuse"
    assert "internal" not in table


def test_one_step_of_the_glm_variant_runs_over_the_mix(root, tmp_path):
    base = tmp_path / "base"
    AutoTokenizer.from_pretrained(GOLDENS / "data/tokenizer/glm4voice").save_pretrained(base)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=688, **sizes, **heads)).save_pretrained(base)
    assert train(root, tmp_path, base, "mel_vq")


def test_one_step_of_the_sensevoice_variant_runs_over_the_mix(root, tmp_path):
    base = tmp_path / "base"
    AutoTokenizer.from_pretrained(GOLDENS / "data/tokenizer/sensevoice_glm4voice").save_pretrained(base)
    config = json.loads((GOLDENS / "sensevoice/lm_config.json").read_text())
    config |= {"model_type": "qwen2_mtp_sensevoice", "architectures": ["Qwen2MTPSenseVoiceForCausalLM"]}
    (base / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDENS / "sensevoice/lm_weights.safetensors", base / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(688)
    model.save_pretrained(base)
    heads = config["num_nextn_predict_layers"]
    frontend = ["--audio_model_name_or_path", str(GOLDENS / "sensevoice")]
    assert train(
        root, tmp_path, base, "sensevoice_mel_vq", "--num_nextn_predict_layers", str(heads), *frontend
    )


def train(root: Path, folder: Path, base: Path, kind: str, *more: str) -> float:
    """The loss of one step over the published mix."""
    options = {
        "model_name_or_path": base,
        "dataset_name": MIXES[0],
        "data_root": root,
        "strict_data": True,
        "audio_tokenizer_type": kind,
        "audio_tokenizer_path": root / "codec",
        "model_max_length": 512,
        "output_dir": folder / "out",
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "dataloader_num_workers": 0,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    finetune.main([*(word for name, value in options.items() for word in (f"--{name}", str(value))), *more])
    history = json.loads((folder / "out/trainer_state.json").read_text())["log_history"]
    return next(line["loss"] for line in history if "loss" in line)
