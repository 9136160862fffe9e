"""Generation in rounds against the golden tokens, alone and in batches, with and without caches."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, StoppingCriteria, StoppingCriteriaList

import vita_audio  # noqa: F401
from vita_audio.models import MCTPCache, Qwen2MTPConfig, Qwen2MTPForCausalLM
from vita_audio.models.schedule import BACKBONE, Schedule

GOLDENS = Path(__file__).parents[1] / "goldens" / "mctp"
CASES = json.loads((GOLDENS / "generation_expected.json").read_text())
PROMPT = torch.tensor([CASES[0]["prompt"]])
MODE = [1, 3, 2, 2]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(GOLDENS / "checkpoint")


def arguments(case):
    names = ("mtp_inference_mode", "repetition_penalty", "eos_token_id", "max_new_tokens")
    return {name: case[name] for name in names} | {"pad_token_id": 0}


def new_tokens(model, prompt, **kwargs):
    kwargs = {
        "mtp_inference_mode": MODE,
        "max_new_tokens": 12,
        "eos_token_id": None,
        "pad_token_id": 0,
    } | kwargs
    kwargs.setdefault("attention_mask", torch.ones_like(prompt))
    return model.generate(prompt, **kwargs)[:, prompt.shape[1] :]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["key"])
def test_tokens_equal_the_golden_ones_alone_and_in_a_padded_batch(model, case):
    prompt, expected = case["prompt"], case["new_tokens"]
    alone = torch.tensor([prompt])
    for use_cache in (True, False):
        tokens = new_tokens(model, alone, use_cache=use_cache, **arguments(case))
        assert tokens[0].tolist() == expected

    other = [7, 300, 41] * 5
    width = max(len(prompt), len(other))
    batch = torch.tensor([[0] * (width - len(ids)) + ids for ids in (prompt, other)])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in (prompt, other)])
    # The repetition penalty looks at padding too, as everywhere in transformers.
    if case["repetition_penalty"] == 1.0:
        tokens = new_tokens(model, batch, attention_mask=mask, **arguments(case))[0].tolist()
        assert tokens[: len(expected)] == expected
        assert not any(tokens[len(expected) :])


@pytest.mark.parametrize("use_cache", [True, False])
def test_raw_logits_equal_the_golden_ones(model, use_cache):
    golden = np.load(GOLDENS / "generation_logits.npz")
    cases = [case for case in CASES if case["key"] in golden]
    assert len(cases) == len(golden.files)
    for case in cases:
        output = model.generate(
            torch.tensor([case["prompt"]]),
            attention_mask=torch.ones(1, len(case["prompt"]), dtype=torch.long),
            return_dict_in_generate=True,
            output_logits=True,
            use_cache=use_cache,
            **arguments(case),
        )
        logits = torch.stack(output.logits, dim=1)[0]
        torch.testing.assert_close(logits, torch.from_numpy(golden[case["key"]]).float(), atol=2e-3, rtol=0)


def test_tokens_equal_the_definition_without_caches(model):
    """SPEC "Generation": every step over the whole sequence so far, ids only."""
    sequence = PROMPT.clone()
    since_backbone = 0
    for step in [step for step, _ in zip(Schedule.parse(MODE).steps(3), range(15), strict=False)]:
        since_backbone = 0 if step == BACKBONE else since_backbone + 1
        n = sequence.shape[1]
        hidden = model.model(input_ids=sequence, use_cache=False).last_hidden_state
        for k in range(since_backbone):
            embeds = model.get_input_embeddings()(sequence[:, k + 1 :])
            hidden = model.heads[k](
                embeds,
                hidden[:, : n - k - 1],
                attention_mask=None,
                position_embeddings=model.model.rotary_emb(embeds, torch.arange(k + 1, n)[None]),
            )
        position = n - since_backbone - 1
        token = model.lm_head(hidden[:, position]).argmax(dim=-1, keepdim=True)
        sequence = torch.cat([sequence, token], dim=1)
    tokens = new_tokens(model, PROMPT, max_new_tokens=15)
    assert tokens[0].tolist() == sequence[0, PROMPT.shape[1] :].tolist()


def test_rows_that_end_in_different_rounds_are_padded(model):
    free = new_tokens(model, PROMPT.repeat(2, 1) + torch.tensor([[0], [1]]), max_new_tokens=12)
    stop = [free[0, 2].item(), free[1, 9].item()]
    rows = new_tokens(
        model, PROMPT.repeat(2, 1) + torch.tensor([[0], [1]]), eos_token_id=stop, pad_token_id=639
    ).tolist()
    for row, full in zip(rows, free.tolist(), strict=True):
        end = next(i for i, token in enumerate(full) if token in stop) + 1
        assert row[:end] == full[:end]
        assert set(row[end:]) <= {639}
    assert 639 in rows[0] or 639 in rows[1]


class Recorder:
    """A streamer that notes what it gets, and how many logits had been made by then."""

    def __init__(self):
        self.puts, self.ended = [], False

    def put(self, value):
        self.puts.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_a_streamer_gets_each_token_before_the_next_is_made(model):
    streamer, made = Recorder(), []

    def note(_ids, scores):
        made.append(len(streamer.puts))
        return scores

    tokens = new_tokens(model, PROMPT, streamer=streamer, logits_processor=[note])
    assert streamer.puts == [PROMPT[0].tolist()] + [[token] for token in tokens[0].tolist()]
    assert made == list(range(1, 13))
    assert streamer.ended


def test_processors_and_criteria_see_every_token_of_backbone_and_heads(model):
    seen = []

    class Watch(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(input_ids.shape[1])
            return torch.tensor([input_ids.shape[1] == PROMPT.shape[1] + 6])

    def forbid(ids, scores):
        return scores.index_fill(1, torch.tensor([int(banned)]), float("-inf"))

    banned = new_tokens(model, PROMPT)[0, 2]  # made by a head
    tokens = new_tokens(
        model, PROMPT, logits_processor=[forbid], stopping_criteria=StoppingCriteriaList([Watch()])
    )
    assert banned not in tokens
    assert seen == [PROMPT.shape[1] + i for i in range(1, 7)]
    assert tokens.shape[1] == 6


def test_sampling_repeats_with_the_seed_and_varies_without(model):
    def draw(seed):
        torch.manual_seed(seed)
        return new_tokens(model, PROMPT, do_sample=True, top_k=50, num_return_sequences=2)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert draw(0).shape == (2, 12)


def test_the_dict_output_holds_an_entry_per_token(model):
    output = model.generate(
        PROMPT,
        mtp_inference_mode=MODE,
        max_new_tokens=7,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
    )
    assert output.sequences.shape[1] == PROMPT.shape[1] + 7
    assert [len(part) for part in (output.scores, output.logits, output.hidden_states)] == [7, 7, 7]
    assert output.scores[0].shape == (1, 640)


def test_a_conversation_continues_from_its_cache(model):
    cache = MCTPCache(model.config)
    turn = torch.tensor([[9, 8, 7]])
    first = model.generate(
        PROMPT, mtp_inference_mode=[1, 1], max_new_tokens=5, eos_token_id=None, past_key_values=cache
    )
    second_prompt = torch.cat([first, turn], dim=1)
    assert 0 < cache.get_seq_length() < second_prompt.shape[1]
    tokens = new_tokens(model, second_prompt, past_key_values=cache)
    assert torch.equal(tokens, new_tokens(model, second_prompt))


@pytest.mark.parametrize("mode", ["vanilla", [1, 1], MODE], ids=str)
def test_the_backbone_sees_every_position_once(model, mode):
    positions = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, args: positions.append(args[0].shape[1]))
    try:
        new_tokens(model, PROMPT, mtp_inference_mode=mode)
    finally:
        hook.remove()
    last_backbone_token = PROMPT.shape[1] + 12 - 1
    assert positions[0] == PROMPT.shape[1]
    assert last_backbone_token - 3 <= sum(positions) <= last_backbone_token


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_forward_continues_a_cache_under_either_name(model, name):
    whole = model(PROMPT).logits
    cache = DynamicCache(config=model.config)
    model(PROMPT[:, :5], use_cache=True, **{name: cache})
    rest = model(PROMPT[:, 5:], use_cache=True, **{name: cache})
    assert cache.get_seq_length() == PROMPT.shape[1]
    torch.testing.assert_close(rest.logits, whole[:, 5:], rtol=1e-4, atol=1e-4)
    assert rest.past_key_values is cache


def test_a_cache_without_the_state_of_heads_is_refused(model):
    output = model.generate(
        PROMPT, mtp_inference_mode="vanilla", max_new_tokens=2, return_dict_in_generate=True
    )
    with pytest.raises(ValueError, match="lacks the state of the heads"):
        new_tokens(model, output.sequences, past_key_values=output.past_key_values)


@pytest.mark.parametrize("mode", ["vanilla", [1, 3]], ids=str)
def test_generation_beyond_the_positions_of_the_model_warns_once(model, mode, monkeypatch):
    monkeypatch.setattr(model.config, "max_position_embeddings", PROMPT.shape[1] + 2)
    said = []
    logger = logging.getLogger("transformers.generation.stopping_criteria")
    monkeypatch.setattr(logger, "handle", lambda record: said.append(record.getMessage()))
    transformers.utils.logging.warning_once.cache_clear()
    for _ in range(2):
        new_tokens(model, PROMPT, mtp_inference_mode=mode, max_new_tokens=8)
    assert len(said) == 1
    assert "exceeded the model's predefined maximum length" in said[0]


def test_a_static_cache_gives_the_same_tokens(model):
    assert torch.equal(new_tokens(model, PROMPT, cache_implementation="static"), new_tokens(model, PROMPT))


def test_the_module_keeps_nothing_between_calls(model):
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    first = new_tokens(model, PROMPT)
    new_tokens(model, PROMPT[:, :4])
    assert torch.equal(first, new_tokens(model, PROMPT))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_the_schedule_is_the_argument_else_the_generation_config_else_the_backbone_alone(model):
    assert model.generation_config.mtp_inference_mode == [1, 3]
    by_config = new_tokens(model, PROMPT, mtp_inference_mode=None)
    assert torch.equal(by_config, new_tokens(model, PROMPT, mtp_inference_mode=[1, 3]))
    assert not torch.equal(by_config, new_tokens(model, PROMPT, mtp_inference_mode="vanilla"))
    fresh = Qwen2MTPForCausalLM(model.config)
    fresh.load_state_dict(model.state_dict())
    vanilla = new_tokens(fresh.eval(), PROMPT, mtp_inference_mode=None)
    assert torch.equal(vanilla, new_tokens(model, PROMPT, mtp_inference_mode=[8192, 0]))


@pytest.mark.parametrize("mode", [[], [1], [1, 2, 3], [0, 4], [1, -1], [-1, 2], [1, 2.5], "fast", [True, 1]])
def test_malformed_schedules_are_refused_with_the_allowed_form(model, mode):
    with pytest.raises(ValueError, match=r"mtp_inference_mode=.*(give pairs|use one of vanilla, balance)"):
        model.generate(PROMPT, mtp_inference_mode=mode, max_new_tokens=2)


def test_beam_search_is_refused_with_heads_and_works_without(model):
    with pytest.raises(ValueError, match="pass mtp_inference_mode="):
        new_tokens(model, PROMPT, num_beams=2)
    assert new_tokens(model, PROMPT, num_beams=2, mtp_inference_mode=[8192, 0]).shape == (1, 12)


def test_a_prefill_in_chunks_is_refused_with_heads_and_works_without(model):
    with pytest.raises(ValueError, match="prefill_chunk_size=2: heads need a single prefill"):
        new_tokens(model, PROMPT, prefill_chunk_size=2)
    chunked = new_tokens(model, PROMPT, prefill_chunk_size=2, mtp_inference_mode="vanilla")
    assert torch.equal(chunked, new_tokens(model, PROMPT, mtp_inference_mode="vanilla"))


def test_arguments_may_be_positional_as_in_transformers(model):
    criteria = StoppingCriteriaList(
        [lambda input_ids, scores, **_: torch.ones(len(input_ids), dtype=torch.bool)]
    )
    assert model.generate(PROMPT, None, None, criteria, max_new_tokens=9).shape[1] == PROMPT.shape[1] + 1


def test_a_model_without_heads_runs_every_schedule_on_its_backbone():
    torch.manual_seed(0)
    config = Qwen2MTPConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    plain = Qwen2MTPForCausalLM(config).eval()
    prompt = torch.tensor([[3, 4, 5]])
    assert torch.equal(
        new_tokens(plain, prompt, mtp_inference_mode=[1, 10]),
        new_tokens(plain, prompt, mtp_inference_mode=[9, 0]),
    )
