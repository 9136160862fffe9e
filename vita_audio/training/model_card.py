"""The README.md of a trained folder: what the model is, its origin, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vita_audio.files import read_json, write_text

CARD_FILE = "README.md"


def write_model_card(folder: str | Path, run: Mapping[str, Any] | None) -> None:
    """Write the card of a model folder.

    Args:
        folder: contains ``config.json`` and, if the model has heads, ``generation_config.json``.
        run: the content of ``run.json``, see :func:`vita_audio.provenance.describe_run`.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    write_text(
        folder / CARD_FILE,
        f"{_FRONT_MATTER}\n{_what(config, run)}\n\n{_load(folder)}\n{_training(folder, run)}",
    )


_FRONT_MATTER = """---
library_name: transformers
tags:
- vita-audio
- speech-language-model
---"""


def _what(config: Mapping[str, Any], run: Mapping[str, Any] | None) -> str:
    heads = config.get("num_nextn_predict_layers", 0)
    backbone = config["num_hidden_layers"] - heads
    arguments = run["arguments"] if run else {}
    codec = arguments.get("audio_tokenizer_type")
    return (
        "# VITA-Audio\n\n"
        f"A speech language model: a Qwen2 backbone of {backbone} layers with {heads} MCTP heads"
        + (f", which reads and writes the speech tokens of `{codec}`." if codec else ".")
    )


def _load(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        return (
            f"## Use\n\nThis folder holds LoRA adapters of `{base}` and what was trained beside them. "
            "Merge them first:\n\n```bash\npython tools/merge_lora.py PATH --output_dir MERGED\n```\n"
        )
    return (
        "## Use\n\n```python\n"
        "import vita_audio  # registers the model type\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n'
        "```\n\n`vita_audio.inference.SpeechPipeline` also speaks and listens; it needs the codec's folder.\n"
    )


def _training(folder: Path, run: Mapping[str, Any] | None) -> str:
    if run is None:
        return ""
    arguments, generation_file = run["arguments"], folder / "generation_config.json"
    mode = read_json(generation_file).get("mtp_inference_mode") if generation_file.is_file() else None
    git = run.get("git")
    revision = (
        f"{git['revision']}{' with changes' if git['modified'] else ''}" if git else "not in a checkout"
    )
    output = Path(str(arguments.get("output_dir")))
    data, mix = run["data"], Path(str(arguments.get("dataset_name"))).name
    rows = {
        "Run": f"`{output.parent.name}/{output.name}`",
        "Base": f"`{arguments.get('model_name_or_path')}`",
        "Trained": _trained(arguments),
        "Steps": f"{arguments.get('max_steps')}, rows of {arguments.get('model_max_length')} tokens",
        "Learning rate": f"{arguments.get('learning_rate')}, {arguments.get('lr_scheduler_type')}",
        "Data": f"`{mix}`, {data['samples_per_epoch']:,} samples, fingerprint {data['fingerprint']}",
        "Default schedule": None if mode is None else " ".join(map(str, mode)),
        "Code": revision,
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items() if value is not None)
    return f"\n## Training\n\n| | |\n|---|---|\n{table}\nAll options and versions are in `run.json`.\n"


def _trained(arguments: Mapping[str, Any]) -> str:
    heads = arguments.get("num_nextn_predict_layers") or 0
    if rank := arguments.get("lora_r"):
        return f"LoRA of rank {rank} in the language model" + (f", and {heads} heads" if heads else "")
    if arguments.get("language_model_freeze"):
        return f"{heads} heads, the language model frozen"
    return f"language model and {heads} heads" if heads else "language model"
