"""The adapter for Kimi-Audio-Evalkit, against a stand-in with the interface of its base class and its loader."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vita_audio.inference import GenerationOptions, prompts

ADAPTER = Path(__file__).resolve().parents[2] / "third_party" / "kimi_audio_evalkit" / "vita_audio.py"

BASE = """
class BaseModel:
    NAME = None

    def generate_inner(self, msg):
        raise NotImplementedError

    def __call__(self, msg):
        import torch
        with torch.inference_mode():
            return self.generate_inner(msg)
"""

LOADER = """
import importlib, inspect, pkgutil
from .base import BaseModel

def build_model(name, model_path):
    modules = [importlib.import_module(f"{__name__}.{one.name}") for one in pkgutil.iter_modules(__path__)]
    classes = [one for module in modules for _, one in inspect.getmembers(module, inspect.isclass)]
    models = {one.NAME: one for one in classes if issubclass(one, BaseModel) and one is not BaseModel}
    return models[name](model_path=model_path)
"""


@pytest.fixture(scope="module")
def build_model(tmp_path_factory):
    """The Evalkit's loader, with the adapter linked in as its documentation says."""
    root = tmp_path_factory.mktemp("evalkit")
    models = root / "almeval" / "models"
    models.mkdir(parents=True)
    (root / "almeval" / "__init__.py").touch()
    (models / "__init__.py").write_text(LOADER)
    (models / "base.py").write_text(BASE)
    (models / ADAPTER.name).symlink_to(ADAPTER)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        yield importlib.import_module("almeval.models").build_model
    for name in [name for name in sys.modules if name.split(".")[0] == "almeval"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def settings(tiny_world) -> dict:
    return {
        "model_dir": str(tiny_world.model_dir),
        "audio_tokenizer_type": "mel_vq",
        "audio_tokenizer_path": str(tiny_world.codec_dir),
        "device": "cpu",
        "generation": {"max_new_tokens": 60},
    }


@pytest.fixture(scope="module")
def model(build_model, settings):
    return build_model("VITA-Audio", settings | {"greedy": True})


def item(audio, text: str = "", task: str = "Open-Ended") -> dict:
    meta = {
        "task": task,
        "interactive": "Audio-QA",
        "audio_type": "Speech",
        "dataset_name": "a",
        "subset": "a",
    }
    return {"index": 0, "audio": audio, "text": text, "meta": meta}


def test_speech_is_written_down_in_the_words_of_the_training_data(model, tiny_world):
    answer = model(item([tiny_world.audio("question.wav")], "Please transcribe the audio.", task="ASR"))
    assert answer == ("Convert the speech to text.\n<|audio|>", "the blue key")


def test_a_spoken_question_is_answered_with_text_alone(model, tiny_world):
    prompt, text = model(item([tiny_world.audio("question.wav")]))
    assert (prompt, text.strip()) == ("<|audio|>", "blue")


def test_prompts_are_those_of_the_pipeline(build_model, settings, tiny_world):
    question, other = tiny_world.audio("question.wav"), tiny_world.audio("answer.wav")
    model = build_model("VITA-Audio", settings | {"system_prompt": "omni"})
    omni = prompts.SYSTEM_PROMPTS["omni"]
    assert model.conversation(item(question, "Which colour?")) == prompts.speech_to_speech(
        question, "Which colour?", omni
    )
    assert model.conversation(item([question], task="ASR")) == prompts.transcription(question)
    assert build_model("VITA-Audio", settings).conversation(item(question)) == prompts.speech_to_speech(
        question
    )
    two = model.conversation(item([question, other], "Which is louder?"))
    assert (two.messages[-1].content, two.audios) == (
        "Which is louder?\n<|audio|><|audio|>",
        (question, other),
    )


def test_the_checkpoint_decides_unless_greedy_is_asked_for(build_model, model, settings):
    assert model.options == GenerationOptions.greedy(max_new_tokens=60)
    sampled = build_model("VITA-Audio", settings)
    assert sampled.options == GenerationOptions(max_new_tokens=60)
    changed = settings | {"generation": {"mode": "turbo", "seed": 1}}
    assert build_model("VITA-Audio", changed).options == replace(GenerationOptions(), mode="turbo", seed=1)


def test_the_generation_config_of_the_checkpoint_reaches_the_reply(build_model, settings, tiny_world):
    model = build_model("VITA-Audio", settings)
    model.pipeline.model.generation_config.repetition_penalty = 100.0
    assert model(item(tiny_world.audio("question.wav"), task="ASR"))[1] != "the blue key"


def test_a_missing_folder_is_refused_in_one_line(build_model, settings):
    with pytest.raises(ValueError, match="nowhere: no such folder") as refusal:
        build_model("VITA-Audio", settings | {"audio_tokenizer_path": "nowhere"})
    assert "\n" not in str(refusal.value)
