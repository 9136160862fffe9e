"""The engine against ``generate()``: every mode, alone and in company, both families, sessions, cancelling."""

import gc
import json
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_requests import golden_request
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from vita_audio.engine import AudioRows, Engine, Finished, Request, Sampling, Tokens, kernels
from vita_audio.engine.drafting import DraftLength
from vita_audio.models import SCHEDULES

from .conftest import GOLDENS, random_model

CASES = json.loads((GOLDENS / "generation_expected.json").read_text())
SENSEVOICE = GOLDENS.parent / "sensevoice"
MODES = ["vanilla", "turbo", "boost", "balance", [1, 3, 2, 2], [2, 9], [7, 1, 1, 4, 1, 2]]


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, max_rows=4, max_length=300)


def reference(model, prompt, mode, max_new_tokens=30, stops=(), penalty=1.0, **inputs):
    """The tokens that ``generate()`` makes."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        mtp_inference_mode=mode,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=penalty,
        eos_token_id=list(stops) or None,
        pad_token_id=0,
        **inputs,
    )
    return output[0, len(prompt) :].tolist()


def test_tokens_equal_the_golden_ones_alone_and_in_company(golden_model):
    engine = Engine(golden_model, max_rows=5, max_length=200)
    for case in CASES:
        assert engine.submit(golden_request(case)).tokens() == case["new_tokens"]
    handles = [engine.submit(golden_request(case)) for case in CASES]
    assert [handle.tokens() for handle in handles] == [case["new_tokens"] for case in CASES]


@given(st.integers(0, 2**32))
@settings(max_examples=12, deadline=None)
def test_requests_that_join_and_leave_at_random_get_the_tokens_of_generate(model, engine, seed):
    chance = random.Random(seed)
    running = {}
    for _ in range(chance.randint(3, 9)):
        prompt = [chance.randrange(96) for _ in range(chance.choice([1, 2, 5, 30, 90]))]
        mode, length = chance.choice(MODES), chance.randint(1, 40)
        stops = [chance.randrange(96) for _ in range(chance.choice([0, 0, 3]))]
        penalty = chance.choice([1.0, 1.0, 1.3])
        handle = engine.submit(
            Request(
                prompt,
                mode,
                Sampling(repetition_penalty=penalty),
                lossless=chance.random() < 0.25,
                max_new_tokens=length,
                stop_tokens=stops,
            )
        )
        running[handle] = reference(
            model, prompt, "vanilla" if handle.request.lossless else mode, length, stops, penalty
        )
        for _ in range(chance.randint(0, 4)):
            engine.step()
        if chance.random() < 0.2:
            handle.cancel()
            del running[handle]
    for handle, expected in running.items():
        assert handle.tokens() == expected
    assert engine.num_rows == engine.num_waiting == 0


@pytest.mark.parametrize("name", ["a", "b"])
def test_plus_prompts_with_speech_get_the_tokens_of_generate(sensevoice_model, name):
    golden = {key: torch.from_numpy(value) for key, value in np.load(SENSEVOICE / "lm_eval.npz").items()}
    clips = {"a": ["audio_f1", "audio_f2"], "b": ["audio_f3", "audio_f2"]}[name]
    ids = golden[f"{name}_input_ids"]
    audios = [golden[clip] for clip in clips]
    places = [golden[f"{name}_audio_indices_{i}"] for i in range(2)]
    with torch.inference_mode():
        embeds = sensevoice_model.embed_inputs(ids, audios=audios, audio_indices=places)
    engine = Engine(sensevoice_model, max_rows=2, max_length=400, prompt_chunk=20)
    for row in range(len(ids)):
        mine = [
            (clip, place) for clip, place in zip(audios, places, strict=True) if int(place[0, 0, 0]) == row
        ]
        inputs = {
            "audios": [clip for clip, _ in mine],
            "audio_indices": [torch.stack([torch.zeros_like(place[0]), place[1]]) for _, place in mine],
        }
        prompt = ids[row].tolist()
        for mode in SCHEDULES:
            expected = reference(sensevoice_model, prompt, mode, 24, **inputs)
            assert (
                engine.submit(Request(prompt, mode, max_new_tokens=24, embeds=embeds[row])).tokens()
                == expected
            )


def test_a_gpus_few_shapes_give_the_same_tokens(golden_model, sensevoice_model):
    """Padded windows, here on the CPU; the end of a Plus prompt may be shorter than a round."""

    def padded(model):
        engine = Engine(model, max_rows=3, max_length=300)
        engine._turns._shapes = replace(engine._turns._shapes, exact=False)
        return engine

    engine = padded(golden_model)
    handles = [engine.submit(golden_request(case)) for case in CASES]
    assert [handle.tokens() for handle in handles] == [case["new_tokens"] for case in CASES]

    engine = padded(sensevoice_model)
    session, prompt = engine.session(), list(range(20, 50))
    for _ in range(3):
        with torch.inference_mode():
            embeds = sensevoice_model.embed_inputs(torch.tensor([prompt]))[0]
        request = Request(prompt, "boost", max_new_tokens=9, embeds=embeds, session=session)
        tokens = engine.submit(request).tokens()
        assert tokens == reference(sensevoice_model, prompt, "boost", 9)
        prompt = [*prompt, *tokens[:2], 7, 8]


@pytest.fixture(scope="module")
def sensevoice_model(tmp_path_factory):
    config = json.loads((SENSEVOICE / "lm_config.json").read_text())
    config |= {"model_type": "qwen2_mtp_sensevoice", "architectures": ["Qwen2MTPSenseVoiceForCausalLM"]}
    folder = tmp_path_factory.mktemp("plus")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to(SENSEVOICE / "lm_weights.safetensors")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_a_model_with_a_sliding_window_and_one_without_heads_give_the_tokens_of_generate():
    windowed = random_model(1, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    headless = random_model(2, num_hidden_layers=3, num_nextn_predict_layers=0)
    prompt = list(range(40, 70))
    for each, modes in ((windowed, ["vanilla", "boost"]), (headless, ["vanilla", "turbo"])):
        engine = Engine(each, max_rows=2, max_length=200)
        for mode in modes:
            assert engine.submit(Request(prompt, mode, max_new_tokens=25)).tokens() == reference(
                each, prompt, mode, 25
            )


def test_bfloat16_gives_the_tokens_of_generate_on_clear_choices():
    model = random_model(3).to(torch.bfloat16)
    engine = Engine(model, max_rows=2, max_length=200)
    agreed = [
        engine.submit(Request([seed, 3, 9], "boost", max_new_tokens=12)).tokens()
        == reference(model, [seed, 3, 9], "boost", 12)
        for seed in range(20)
    ]
    assert sum(agreed) >= 15, "rounding may change a close choice, not most of them"


# -- speech rows --------------------------------------------------------------------------------------------


def test_speech_rows_alone_are_the_best_of_speech_and_the_check_counts_where_text_was_better(model):
    """A random model mixes text into speech, so ``auto`` must report it; ``on`` keeps all head tokens speech."""
    rows = AudioRows(begin=60, end=61)
    engine = Engine(model, max_rows=2, max_length=300, speech=rows)
    prompt = [3, 60, 70, 71]
    off = engine.submit(Request(prompt, "turbo", max_new_tokens=50)).tokens()
    auto = engine.submit(Request(prompt, "turbo", audio_rows="auto", max_new_tokens=50))
    tokens = auto.tokens()
    inside = True
    for token in tokens:
        assert not inside or token >= 60, "between the markers only speech"
        inside = token >= 60 and token != 61
    assert off != tokens
    assert auto.stats.disagreements > 0
    on = engine.submit(Request(prompt, "turbo", audio_rows="on", max_new_tokens=50)).tokens()
    assert all(token >= 60 for i, token in enumerate(on) if i % 5)


def test_speech_rows_change_nothing_where_the_choice_lies_among_them(model):
    speaking = random_model(4)
    with torch.no_grad():
        speaking.lm_head.weight[:40] *= 0.01
    engine = Engine(speaking, max_rows=3, max_length=300, speech=AudioRows(begin=40, end=41))
    prompt = [3, 40, 70, 71]
    handles = [
        engine.submit(Request(prompt, mode, audio_rows=rows, max_new_tokens=40))
        for mode in ("turbo", "boost")
        for rows in ("off", "auto", "on")
    ]
    tokens = [handle.tokens() for handle in handles]
    assert tokens[0] == tokens[1] == tokens[2] != tokens[3] == tokens[4] == tokens[5]
    assert not any(handle.stats.disagreements for handle in handles)


@pytest.mark.parametrize("stops", [[None], [5.0], ["7"], torch.tensor([5.0])])
def test_stop_tokens_that_are_no_ids_are_refused(model, stops):
    engine = Engine(model, max_rows=1, max_length=100)
    with pytest.raises(ValueError, match=r"stop_tokens=.*: give token ids"):
        engine.submit(Request([1], stop_tokens=stops, max_new_tokens=3))
    for accepted in (torch.tensor([5]), {5: 1}, range(5, 6)):
        assert engine.submit(Request([1], stop_tokens=accepted, max_new_tokens=3)).tokens()


@pytest.mark.parametrize("own_kernels", ["1", "0"])
def test_heads_forget_what_they_computed_from_rejected_drafts(model, monkeypatch, own_kernels):
    """A lossless reply leaves the caches of a conversation as any other: the heads speak next."""
    monkeypatch.setenv(kernels.SWITCH, own_kernels)
    monkeypatch.setattr(DraftLength, "best", lambda self, behind=None: 4)
    engine, fresh = (Engine(model, max_rows=1, max_length=300) for _ in range(2))
    for start in range(8):
        session, said = engine.session(), list(range(start, start + 12))
        for lossless in (True, False, True, False):
            request = {"schedule": "turbo", "lossless": lossless, "max_new_tokens": 25}
            reply = engine.submit(Request(said, session=session, **request)).tokens()
            assert reply == fresh.submit(Request(said, **request)).tokens()
            said = [*said, *reply, 7]
        engine.close_session(session)


@pytest.mark.parametrize("schedule", ["vanilla", "turbo"])
def test_each_token_is_checked_once(schedule):
    """Every choice among speech would have been text, and the other reply's rounds read all rows."""
    writing = random_model(4)
    with torch.no_grad():
        writing.lm_head.weight[60:] *= 0.01
        writing.lm_head.weight[61] = 0  # no end of speech
    engine = Engine(writing, max_rows=2, max_length=300, speech=AudioRows(begin=60, end=61))
    checked = engine.submit(Request([3, 60], schedule, audio_rows="auto", max_new_tokens=40))
    engine.submit(Request([3, 5], schedule, max_new_tokens=40))
    assert min(checked.tokens()) >= 60
    assert 35 <= checked.stats.disagreements <= 40  # those of the last round wait for the next one


def test_the_tokens_of_a_restricted_row_do_not_depend_on_its_company(model):
    rows = AudioRows(begin=60, end=61)
    requests = [
        Request([3, 60, 70 + i], mode, audio_rows=choice, lossless=lossless, max_new_tokens=30)
        for i, (mode, choice, lossless) in enumerate(
            [
                ("turbo", "on", False),
                ("boost", "off", False),
                ("turbo", "auto", False),
                ("turbo", "auto", True),
            ]
        )
    ]
    alone = [
        Engine(model, max_rows=1, max_length=200, speech=rows).submit(each).tokens() for each in requests
    ]
    engine = Engine(model, max_rows=4, max_length=200, speech=rows)
    handles = [engine.submit(each) for each in requests]
    assert [handle.tokens() for handle in handles] == alone
    assert alone[3] == reference(model, [3, 60, 73], "vanilla", 30), (
        "drafts may be restricted, the reply is not"
    )


# -- sampling and lossless ----------------------------------------------------------------------------------


def test_a_seeded_request_draws_the_same_tokens_in_any_company(model, engine):
    def seeded(seed, lossless=False):
        return Request(
            [5, 6, 7], "boost", Sampling(True, 1.5, 30, 0.9, 1.1, seed), lossless, max_new_tokens=25
        )

    alone = {
        (seed, how): engine.submit(seeded(seed, how)).tokens() for seed in (1, 2) for how in (False, True)
    }
    assert len({tuple(tokens) for tokens in alone.values()}) == 4
    company = [engine.submit(seeded(seed, how)) for seed, how in alone]
    engine.submit(Request([1], "turbo", max_new_tokens=40))
    assert [handle.tokens() for handle in company] == list(alone.values())


def test_lossless_drafts_of_a_good_drafter_are_accepted_and_counted(model):
    """Heads whose layer adds nothing repeat what the backbone says when it says one thing only."""
    constant = random_model(5)
    with torch.no_grad():
        constant.lm_head.weight[7] += 5 * constant.model.norm.weight
        constant.model.norm.weight.abs_()
    engine = Engine(constant, max_rows=1, max_length=300)
    handle = engine.submit(Request([1, 2, 3], lossless=True, max_new_tokens=60))
    events = list(handle)
    assert [token for event in events[:-1] for token in event.ids] == reference(
        constant, [1, 2, 3], "vanilla", 60
    )
    assert sum(event.accepted for event in events[:-1]) >= handle.stats.new_tokens - handle.stats.rounds
    assert 0 <= handle.stats.accepted <= handle.stats.drafts


# -- conversations ------------------------------------------------------------------------------------------


def test_a_session_computes_only_what_is_new_and_gives_the_tokens_of_a_fresh_one(model):
    engine = Engine(model, max_rows=3, max_length=500)
    chance = random.Random(0)
    session = engine.session()
    prompt, before = [chance.randrange(96) for _ in range(20)], 0
    for turn, mode in enumerate(["boost", "vanilla", "turbo", "balance"]):
        handle = engine.submit(Request(prompt, mode, max_new_tokens=20, session=session))
        others = [engine.submit(Request([turn, i], "turbo", max_new_tokens=9)) for i in range(3)]
        tokens = handle.tokens()
        assert tokens == reference(model, prompt, mode, 20)
        assert all(len(other.tokens()) == 9 for other in others)
        assert handle.stats.cached_tokens >= before
        before = len(prompt) + 15
        prompt = [*prompt, *tokens, *(chance.randrange(96) for _ in range(6))]
    engine.close_session(session)
    with pytest.raises(ValueError, match="session: it is closed"):
        engine.submit(Request([1], max_new_tokens=5, session=session))


@pytest.mark.parametrize("lossless", [False, True])
def test_after_an_interruption_the_reply_is_that_of_a_fresh_session_with_what_was_heard(model, lossless):
    engine = Engine(model, max_rows=3, max_length=500)
    chance = random.Random(1)
    for _ in range(50):
        session = engine.session()
        prompt = [chance.randrange(96) for _ in range(chance.randint(1, 40))]
        mode = chance.choice(MODES)
        handle = engine.submit(Request(prompt, mode, lossless=lossless, max_new_tokens=60, session=session))
        heard, events = [], iter(handle)
        for _ in range(chance.randint(1, 6)):
            event = next(events)
            if isinstance(event, Finished):
                break
            heard += event.ids
        made = handle.stats.rounds
        handle.cancel()
        assert handle.stats.rounds == made, "no further round"
        heard = heard[: chance.randint(0, len(heard))]
        following = [*prompt, *heard, *(chance.randrange(96) for _ in range(4))]
        again = engine.submit(Request(following, mode, lossless=lossless, max_new_tokens=15, session=session))
        assert again.tokens() == reference(model, following, "vanilla" if lossless else mode, 15)
        if chance.random() < 0.5:
            engine.close_session(session)


def test_idle_sessions_give_way_to_requests_the_oldest_first(model):
    engine = Engine(model, max_rows=2, max_length=200)
    sessions = [engine.session() for _ in range(3)]
    prompts = [[i, 5, 6, 7, 8, 9] for i in range(3)]
    for session, prompt in zip(sessions, prompts, strict=True):
        engine.submit(Request(prompt, max_new_tokens=5, session=session)).tokens()
    assert [session.row is None for session in sessions] == [True, False, False]
    for index in (0, 1, 2, 2):
        handle = engine.submit(
            Request([*prompts[index], 1], "turbo", max_new_tokens=8, session=sessions[index])
        )
        assert handle.tokens() == reference(model, [*prompts[index], 1], "turbo", 8)


# -- many requests ------------------------------------------------------------------------------------------


def test_a_thousand_requests_that_come_and_go_leave_nothing_and_change_no_other(model):
    engine = Engine(model, max_rows=4, max_length=120)
    expected = {mode: reference(model, [4, 5, 6], mode, 12) for mode in ("turbo", "boost", "vanilla")}
    chance = random.Random(2)
    threads = threading.active_count()
    honest, open_handles = [], []
    for _ in range(1000):
        mode = chance.choice(list(expected))
        handle = engine.submit(Request([4, 5, 6], mode, max_new_tokens=12))
        if chance.random() < 0.25:
            honest.append((handle, mode))
        else:
            open_handles.append(handle)
        if chance.random() < 0.5:
            engine.step()
        if open_handles and chance.random() < 0.8:
            ending = open_handles.pop(chance.randrange(len(open_handles)))
            if chance.random() < 0.5:
                ending.cancel()
            else:
                events = iter(ending)
                next(events)
                events.close()  # a listener that leaves
            assert ending.finished is not None
    for handle, mode in honest:
        assert handle.tokens() == expected[mode]
    for handle in open_handles:
        handle.cancel()
    assert engine.num_rows == engine.num_waiting == 0
    assert engine._table.num_idle == 0
    assert threading.active_count() == threads
    gc.collect()
    handles = [each for each in gc.get_objects() if type(each).__name__ == "Running"]
    assert not handles


def test_a_thread_of_its_own_serves_many_threads(model):
    engine = Engine(model, max_rows=3, max_length=120)
    expected = reference(model, [4, 5, 6], "boost", 25)
    results, before = [], set(threading.enumerate())
    with engine.running():
        listeners = [
            threading.Thread(
                target=lambda: results.append(
                    engine.submit(Request([4, 5, 6], "boost", max_new_tokens=25)).tokens()
                )
            )
            for _ in range(6)
        ]
        for listener in listeners:
            listener.start()
        for listener in listeners:
            listener.join(timeout=60)
        endless = engine.submit(Request([4], max_new_tokens=100))
    assert results == [expected] * 6
    assert endless.finished.reason in ("cancelled", "length")
    assert set(threading.enumerate()) <= before


def test_an_error_in_the_engines_thread_reaches_those_who_wait(model, monkeypatch):
    engine = Engine(model, max_rows=1, max_length=120)
    monkeypatch.setattr(engine._turns, "run_round", lambda *_: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with engine.running(), pytest.raises(RuntimeError, match="the engine's thread failed"):
        engine.submit(Request([1], max_new_tokens=3)).tokens()


def test_a_deadline_ends_a_reply_and_a_request_that_still_waits(model):
    engine = Engine(model, max_rows=1, max_length=300)
    first = engine.submit(Request([1, 2], "vanilla", max_new_tokens=250, timeout=0.05))
    second = engine.submit(Request([1, 2], max_new_tokens=9, timeout=0.01))
    engine.step()
    time.sleep(0.06)
    assert [list(handle)[-1].reason for handle in (first, second)] == ["deadline", "deadline"]
    assert first.stats.new_tokens > 0 == second.stats.new_tokens


def test_a_prompt_in_chunks_keeps_nobody_waiting_longer_than_one(model):
    """Between two rounds of a reply lies at most one chunk of somebody's prompt, or one first round."""
    engine = Engine(model, max_rows=3, max_length=500, prompt_chunk=16)
    talker = engine.submit(Request([1, 2, 3], "turbo", max_new_tokens=100))
    while not talker.has_events:
        engine.step()
    newcomer = engine.submit(Request(list(range(90)) * 2, "turbo", max_new_tokens=10))
    gaps, gap = [], 0
    while newcomer.finished is None:
        before = talker.stats.rounds
        engine.step()
        gap += 1
        if talker.stats.rounds > before:
            gaps.append(gap)
            gap = 0
    assert max(gaps) == 2
    assert newcomer.tokens() == reference(model, list(range(90)) * 2, "turbo", 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "prompt: give at least one token"),
        ({"prompt": [96]}, "prompt: token 96 is not in 0 to 95"),
        ({"prompt": [-1]}, "prompt: token -1 is not in 0 to 95"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: give 1 or more"),
        ({"max_new_tokens": 300}, "exceed this engine's max_length of 300"),
        ({"audio_rows": "auto"}, "was not told which rows are speech"),
        ({"audio_rows": "maybe"}, "use auto, on or off"),
        ({"schedule": "warp"}, "mtp_inference_mode='warp'"),
        ({"embeds": torch.zeros(2, 32)}, "embeds: give 1 rows of 32"),
    ],
    ids=str,
)
def test_what_the_engine_cannot_do_is_refused_in_one_line(engine, changes, message):
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        engine.submit(Request(**{"prompt": [1], "max_new_tokens": 5} | changes))
    assert engine.num_waiting == 0


def test_models_that_the_engine_cannot_run_are_refused():
    with pytest.raises(ValueError, match="rope_type dynamic: the engine needs one of"):
        Engine(random_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))
    headless = Engine(random_model(num_hidden_layers=2, num_nextn_predict_layers=0), max_rows=1)
    with pytest.raises(ValueError, match="lossless: the model has no heads"):
        headless.submit(Request([1], lossless=True, max_new_tokens=5))
    with pytest.raises(ValueError, match="max_length=900: the model's positions end at 512"):
        Engine(random_model(), max_length=900)


def test_rounds_report_their_tokens_and_the_end_its_figures(engine):
    *rounds, end = engine.submit(Request([1, 2, 3], [1, 4], max_new_tokens=12))
    assert [len(event.ids) for event in rounds] == [5, 5, 2]
    assert all(isinstance(event, Tokens) and event.accepted is None for event in rounds)
    assert (end.reason, end.stats.new_tokens, end.stats.rounds, end.stats.prompt_tokens) == (
        "length",
        12,
        3,
        3,
    )
    assert 0 < end.stats.first_seconds < end.stats.seconds


def test_the_documents_example_runs(model):
    """docs/engine.md."""
    page = (Path(__file__).parents[2] / "docs" / "engine.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    names = {"model": model, "prompt": [1, 2, 3], "end": 5}
    exec(code, names)
