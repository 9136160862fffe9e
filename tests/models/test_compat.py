"""Contracts with transformers and DeepSpeed: a failing test names what an upgrade broke.

Each test names the private behaviour that vita_audio/models/compat.py (or a hook of ours that transformers calls)
relies on. Run against another version: ``PYTHONPATH=folder-of-that-version pytest tests/models/test_compat.py``.
"""

import inspect
import re
from pathlib import Path

import pytest
import torch
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, StaticCache, Trainer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from vita_audio.models import MCTPCache, Qwen2MTPConfig, Qwen2MTPForCausalLM, compat

ROOT = Path(__file__).parents[2]
IDS = torch.arange(3, 13)[None]


def config(**changes):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_nextn_predict_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return Qwen2MTPConfig(**sizes | changes)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Qwen2MTPForCausalLM(config()).eval()


def test_the_cache_argument_and_output_have_the_name_we_chose():
    parameters = inspect.signature(Qwen2DecoderLayer.forward).parameters
    assert compat.CACHE in parameters, (
        f"Qwen2DecoderLayer takes its cache under another name: {list(parameters)}"
    )
    fields = BaseModelOutputWithPast.__dataclass_fields__
    assert compat.CACHE in fields, f"outputs name their cache otherwise: {list(fields)}"


def test_the_attention_back_end_is_read_and_set_on_the_configuration(model):
    assert compat.attention_implementation(model.config) == "packed_sdpa", (
        "config._attn_implementation no longer tells the back end: packed rows take the dense mask"
    )
    compat.set_attention_implementation(model.config, "eager")
    assert compat.attention_implementation(model.model.layers[0].self_attn.config) == "eager", (
        "layers no longer read the back end from the model's configuration"
    )


def test_a_backbone_forward_takes_use_cache_from_the_configuration_and_records_its_layers(model):
    assert getattr(model.model(IDS), compat.CACHE) is not None, (
        "config.use_cache no longer fills the argument"
    )
    model.config.use_cache = False
    assert getattr(model.model(IDS), compat.CACHE) is None, "config.use_cache no longer fills the argument"
    states = model.model(IDS, output_hidden_states=True).hidden_states
    assert len(states) == 3, "output_hidden_states no longer records the input and each backbone layer"
    model.set_attn_implementation("eager")
    attentions = model.model(IDS, output_attentions=True).attentions
    assert [tuple(each.shape) for each in attentions] == [(1, 4, 10, 10)] * 2, (
        "output_attentions no longer records the second output of Qwen2Attention"
    )


def test_the_last_hidden_state_by_negative_index_is_the_backbones(model):
    recorder = inspect.signature(type(compat.recorded_outputs("num_backbone_layers")["hidden_states"]))
    if "num_hidden_layers_key" not in recorder.parameters:
        pytest.skip("this transformers selects no hidden states by index")
    output = model.model(IDS, output_hidden_states=[-1])
    assert output.hidden_states[-1] is output.last_hidden_state, (
        "negative indices of output_hidden_states count the heads' layers again"
    )


def test_a_causal_lm_is_built_without_a_second_backbone(model):
    names = [name for name, _ in model.named_children()]
    assert names == ["model", "lm_head", "mtp_projs", "mtp_embed_norms", "mtp_hidden_norms"], (
        "PreTrainedModel.__init__ builds modules of Qwen2ForCausalLM"
    )
    assert model.generation_config is not None, "PreTrainedModel.__init__ no longer makes a generation config"


def test_gradient_checkpointing_sets_its_function_on_the_backbone(model):
    assert compat.checkpointing_function(model.model) is None
    model.gradient_checkpointing_enable({"use_reentrant": False})
    run = compat.checkpointing_function(model.model)
    assert run is not None, "gradient_checkpointing_enable no longer sets module.gradient_checkpointing"
    doubled = run(lambda x: 2 * x, torch.ones(2, requires_grad=True))
    assert doubled.tolist() == [2, 2], (
        "module._gradient_checkpointing_func no longer runs (function, *inputs)"
    )


def test_a_marked_module_is_not_initialized_again(model):
    marked, plain = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    marked._is_hf_initialized = True
    for number, module in enumerate((marked, plain)):
        copied = torch.nn.Linear(8, 8)
        compat.keep_initialized_mark(module, copied)
        before = copied.weight.clone()
        model.add_module("extra", copied)
        model.post_init()
        assert torch.equal(copied.weight, before) == (number == 0), (
            "post_init() no longer goes by module._is_hf_initialized"
        )


def test_a_cache_made_by_transformers_has_no_room_for_the_heads_layers(model):
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
        model(IDS, use_cache=True, **{compat.CACHE: cache})
        assert cache.get_seq_length() == 10
        assert cache.is_initialized, (
            "caches are sized by num_hidden_layers again, and the heads' layers stay empty: see num_kv_shared_layers "
            "and kv_sharing_modes of the config"
        )


def test_our_cache_covers_every_operation_of_a_cache():
    answered = {
        # with the heads
        *("update", "crop", "reset", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"),
        # of single layers, or before anything is there; the heads are in step whatever they do
        *("early_initialization", "offload", "prefetch", "activate_past_recording", "is_recording_past"),
        # refused by transformers: our layers are attention without state or indexer
        *(
            "update_conv_state",
            "update_recurrent_state",
            "update_indexer",
            "get_conv_state",
            "get_recurrent_state",
        ),
        *("has_previous_state",),
        # questions
        *("get_seq_length", "get_mask_sizes", "get_query_offset", "get_max_length", "get_max_cache_shape"),
        *(
            "batch_size",
            "max_batch_size",
            "max_cache_len",
            "is_compileable",
            "is_initialized",
            "is_croppable",
        ),
        *("is_sliding", "is_linear", "is_dummy"),
    }
    operations = {name for name in dir(Cache) if not name.startswith("_")}
    assert operations <= answered, (
        f"new operations of Cache: {sorted(operations - answered)}; MCTPCache must carry its heads along or refuse"
    )
    changed = {"update", "crop", "reset", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"}
    assert changed <= set(vars(MCTPCache))


def test_generate_calls_the_hooks_that_we_override():
    asked = []

    class Watching(Qwen2MTPForCausalLM):
        def read_generation_config(self, read, generation_config, **kwargs):
            asked.append("read_generation_config")
            return super().read_generation_config(read, generation_config, **kwargs)

        def check_generation_mode(self, mode, generation_config):
            asked.append("check_generation_mode")

        def expand_inputs(self, expand, expand_size, **kwargs):
            asked.append("expand_inputs")
            return super().expand_inputs(expand, expand_size, **kwargs)

        def decode(self, decode, input_ids, *args, **kwargs):
            asked.append("decode")
            return super().decode(decode, input_ids, *args, **kwargs)

    Watching(config()).generate(IDS, do_sample=True, num_return_sequences=2, max_new_tokens=2)
    missing = {"read_generation_config", "check_generation_mode", "expand_inputs", "decode"} - set(asked)
    assert not missing, (
        f"generate() no longer calls the method behind {sorted(missing)}: see GenerationHooks for its private name"
    )


@pytest.mark.parametrize(
    "name",
    ["_prepare_generation_config", "_validate_generation_mode", "_sample", "_expand_inputs_for_generation"],
)
def test_the_hooks_override_methods_that_exist(name):
    assert hasattr(GenerationMixin, name), f"GenerationMixin has no {name} any more"


def test_generate_leaves_the_padding_id_on_its_config_and_checks_whether_all_rows_are_done(model):
    seen = []

    class Watching(Qwen2MTPForCausalLM):
        def decode(self, decode, input_ids, *args, generation_config, **kwargs):
            seen.append(compat.pad_token(generation_config))
            return super().decode(decode, input_ids, *args, generation_config=generation_config, **kwargs)

    Watching(model.config).generate(IDS, pad_token_id=7, max_new_tokens=1)
    assert seen[0].item() == 7, "generate() no longer leaves _pad_token_tensor on its config"
    for done in (True, False):
        unfinished = compat.has_unfinished_sequences(model, done, False, torch.device("cpu"))
        assert unfinished is not done, "_has_unfinished_sequences no longer answers for one rank"


def test_a_field_of_ours_survives_in_a_generation_config(tmp_path):
    generation_config = GenerationConfig(_from_model_config=True)
    generation_config.mtp_inference_mode = [1, 3]
    compat.detach_from_model_config(generation_config)
    generation_config.save_pretrained(tmp_path)
    again = GenerationConfig.from_pretrained(tmp_path)
    assert getattr(again, "mtp_inference_mode", None) == [1, 3], (
        "unknown fields are dropped from generation configs"
    )


def test_a_trainer_writes_checkpoints_by_the_methods_we_use():
    assert hasattr(Trainer, "_get_output_dir"), "Trainer chooses its folder in another way: see SpeechTrainer"
    parameters = list(inspect.signature(Trainer._save_checkpoint).parameters)
    assert parameters == ["self", "model", "trial"], (
        f"Trainer._save_checkpoint takes {parameters}: see SpeechTrainer"
    )


def test_deepspeed_keeps_a_table_of_the_operators_it_may_compile():
    import deepspeed

    table = dict(deepspeed.ops.__compatible_ops__)
    try:
        compat.disable_shared_memory_allreduce()
        assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
        assert "deepspeed_shm_comm" in table, "DeepSpeed names its shared-memory all-reduce otherwise"
    finally:
        deepspeed.ops.__compatible_ops__.update(table)


PRIVATE = re.compile(
    r"\._(attn_implementation|gradient_checkpointing_func|from_model_config|pad_token_tensor|is_hf_initialized)\b"
    r"|\._(has_unfinished_sequences|get_output_dir)\b|__compatible_ops__|merge_with_config_defaults|capture_outputs"
)


# audio stands below models and cannot import compat.
ELSEWHERE = {"vita_audio/audio/glm4voice/vq_encoder.py", "vita_audio/audio/sensevoice/encoder.py"}


def test_private_names_are_used_in_one_file():
    found = {
        str(file.relative_to(ROOT)): sorted({match[0] for match in PRIVATE.finditer(file.read_text("utf-8"))})
        for folder in ("vita_audio", "tools")
        for file in (ROOT / folder).rglob("*.py")
    }
    found = {file: names for file, names in found.items() if names and file not in ELSEWHERE}
    assert set(found) == {"vita_audio/models/compat.py"}, found
