"""transformers' own model tests on both families: ``python families.py RESULTS.json``.

The tests come from the sdist of transformers (``test_transformers_suite.py`` fetches it and runs this file).
The result of each is written as "passed", "skipped: …" or the first line of what went wrong.
"""

import json
import sys
import unittest
from pathlib import Path

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers_tests import test_modeling_common as common
from transformers_tests.generation.test_utils import GenerationTesterMixin

from vita_audio.models import (
    Qwen2MTPConfig,
    Qwen2MTPForCausalLM,
    Qwen2MTPModel,
    Qwen2MTPSenseVoiceConfig,
    Qwen2MTPSenseVoiceForCausalLM,
    Qwen2MTPSenseVoiceModel,
)

FAMILIES = {
    Qwen2MTPConfig: (Qwen2MTPModel, Qwen2MTPForCausalLM),
    Qwen2MTPSenseVoiceConfig: (Qwen2MTPSenseVoiceModel, Qwen2MTPSenseVoiceForCausalLM),
}
ENCODER = {"output_size": 16, "attention_heads": 2, "linear_units": 16, "num_blocks": 2, "tp_blocks": 1}

# The suite knows by these names which class has no loss, and which labels a class takes.
for config_class, (backbone, causal_lm) in FAMILIES.items():
    MODEL_MAPPING_NAMES[config_class.model_type] = backbone.__name__
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config_class.model_type] = causal_lm.__name__

set_config = common.set_config_for_less_flaky_test


def set_config_with_encoder_sizes(config):
    """The suite takes a field named ``audio_encoder`` for a configuration; ours is a dict of sizes."""
    sizes, config.audio_encoder = getattr(config, "audio_encoder", None), None
    set_config(config)
    config.audio_encoder = sizes


common.set_config_for_less_flaky_test = set_config_with_encoder_sizes


class ModelTester:
    """What the suite asks of a model: a tiny configuration and a batch that fits it."""

    batch_size = 13
    seq_length = 7
    is_training = True
    hidden_size = 32
    num_attention_heads = 4
    num_hidden_layers = 1  # those of a forward pass; the configuration counts the head's layer as well

    def __init__(self, config_class):
        self.config_class = config_class

    def get_config(self):
        encoder = {"audio_encoder": ENCODER | {"ctc_vocab_size": 8}}
        return self.config_class(
            vocab_size=99,
            hidden_size=self.hidden_size,
            intermediate_size=32,
            num_hidden_layers=self.num_hidden_layers + 1,
            num_nextn_predict_layers=1,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **(encoder if self.config_class is Qwen2MTPSenseVoiceConfig else {}),
        )

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, 99, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Family(common.ModelTesterMixin, GenerationTesterMixin):
    config_class: type
    test_can_init_all_missing_weights_before_2023 = (
        True  # the year is read from a licence header; we have none
    )

    def setUp(self):
        self.model_tester = ModelTester(self.config_class)


class Qwen2MTPTest(Family, unittest.TestCase):
    config_class = Qwen2MTPConfig
    all_model_classes = FAMILIES[config_class]


class Qwen2MTPSenseVoiceTest(Family, unittest.TestCase):
    config_class = Qwen2MTPSenseVoiceConfig
    all_model_classes = FAMILIES[config_class]
    test_all_params_have_gradient = (
        False  # a released encoder brings its CTC layer, which the model does not use
    )


class Outcomes(unittest.TestResult):
    """Outcome of each test, by class and name."""

    def __init__(self):
        super().__init__()
        self.outcomes = {}

    def note(self, test, outcome):
        test = getattr(test, "test_case", test)  # a subtest counts for its test
        self.outcomes.setdefault(f"{type(test).__name__}.{test._testMethodName}", outcome)

    def addSuccess(self, test):
        self.note(test, "passed")

    def addSkip(self, test, reason):
        self.note(test, f"skipped: {reason}")

    def addError(self, test, error):
        self.note(test, f"{error[0].__name__}: {error[1]}".splitlines()[0])

    addFailure = addError

    def addSubTest(self, test, subtest, error):
        if error is not None:
            self.addError(test, error)


if __name__ == "__main__":
    outcomes = Outcomes()
    loader = unittest.defaultTestLoader
    unittest.TestSuite(
        loader.loadTestsFromTestCase(family) for family in (Qwen2MTPTest, Qwen2MTPSenseVoiceTest)
    ).run(outcomes)
    Path(sys.argv[1]).write_text(json.dumps(outcomes.outcomes, indent=1), encoding="utf-8")
