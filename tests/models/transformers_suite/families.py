"""transformers' own model tests on both families.

pytest does not collect this file with the others: it needs transformers' test files, which
:mod:`tests.models.test_transformers_suite` fetches, puts on the path and then runs it with.
"""

import json
import unittest
from pathlib import Path

import torch
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin

from vita_audio.models import (
    Qwen2MTPConfig,
    Qwen2MTPForCausalLM,
    Qwen2MTPModel,
    Qwen2MTPSenseVoiceConfig,
    Qwen2MTPSenseVoiceForCausalLM,
    Qwen2MTPSenseVoiceModel,
)

DEVIATIONS = json.loads((Path(__file__).parent / "deviations.json").read_text(encoding="utf-8"))

ENCODER = {
    "input_size": 560,
    "output_size": 16,
    "attention_heads": 2,
    "linear_units": 16,
    "num_blocks": 2,
    "tp_blocks": 1,
    "ctc_vocab_size": 8,
}


class ModelTester:
    """What the suite asks of a model: a tiny configuration and a batch that fits it."""

    batch_size = 13
    seq_length = 7
    is_training = True
    hidden_size = 32
    num_attention_heads = 4
    num_hidden_layers = 1  # layers that a forward pass shows; the configuration counts the head's, too

    def __init__(self, config_class):
        self.config_class = config_class

    def get_config(self):
        config = self.config_class(
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
        )
        if "sensevoice" in config.model_type:
            config.audio_encoder |= ENCODER
        return config

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, 99, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class FamilyTests(ModelTesterMixin, GenerationTesterMixin):
    config_class: type

    def setUp(self):
        self.model_tester = ModelTester(self.config_class)


class Qwen2MTPTest(FamilyTests, unittest.TestCase):
    config_class = Qwen2MTPConfig
    all_model_classes = (Qwen2MTPModel, Qwen2MTPForCausalLM)


class Qwen2MTPSenseVoiceTest(FamilyTests, unittest.TestCase):
    config_class = Qwen2MTPSenseVoiceConfig
    all_model_classes = (Qwen2MTPSenseVoiceModel, Qwen2MTPSenseVoiceForCausalLM)
