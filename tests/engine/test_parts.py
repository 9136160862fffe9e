"""The engine's parts by themselves: draws, acceptance, draft lengths, kernels, caches, turns."""

from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vita_audio.engine import AudioRows, Sampling
from vita_audio.engine.drafting import DraftLength, RoundCost
from vita_audio.engine.graphs import Graphs
from vita_audio.engine.kernels import Product
from vita_audio.engine.rounds import BURST, Modes, Plan, Round
from vita_audio.engine.sampling import Drawing, Rules, distribution, pick
from vita_audio.engine.scheduler import Scheduler, Turn, segments
from vita_audio.engine.speculation import accept_greedy, accept_sampled
from vita_audio.engine.state import State
from vita_audio.engine.weights import Weights
from vita_audio.models.schedule import Schedule

from .conftest import random_model

MILLION = 1_000_000


def uniforms(*shape):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def fits(counts, probabilities) -> bool:
    expected = np.asarray(probabilities, dtype=float) * counts.sum()
    used = expected > 0
    assert counts[~used].sum() == 0
    return chisquare(counts[used], expected[used] * counts[used].sum() / expected[used].sum()).pvalue > 0.01


def test_a_million_draws_have_the_distribution():
    probabilities = torch.tensor([0.05, 0.0, 0.5, 0.25, 0.2])
    draws = pick(probabilities.expand(MILLION, -1), uniforms(MILLION))
    assert fits(torch.bincount(draws, minlength=5).numpy(), probabilities)


def test_a_million_verified_drafts_have_the_backbones_distribution():
    """Whatever the heads draft: first token from p0; after an accepted first draft the second from p1."""
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.5, 0.0]])
    q = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.0, 0.5, 0.25, 0.25]])
    draws = uniforms(MILLION, 5)
    drafts = torch.stack([pick(q[i].expand(MILLION, -1), draws[:, i]) for i in range(2)], dim=1)
    counts = torch.full((MILLION,), 2)
    accepted, following = accept_sampled(
        drafts, counts, p.expand(MILLION, -1, -1), q.expand(MILLION, -1, -1), draws[:, 2:]
    )
    first = torch.where(accepted > 0, drafts[:, 0], following)
    assert fits(torch.bincount(first, minlength=4).numpy(), p[0])
    second = torch.where(accepted > 1, drafts[:, 1], following)[accepted > 0]
    assert fits(torch.bincount(second, minlength=4).numpy(), p[1])
    assert fits(torch.bincount(following[accepted > 1], minlength=4).numpy(), p[2])
    assert 0 < (accepted == 0).float().mean() < (1 - torch.minimum(p[0], q[0]).sum()) + 0.01


@pytest.mark.slow
@pytest.mark.parametrize("how", ["backbone", "lossless", "lossless from speech rows"])
def test_sampled_replies_have_the_backbones_distribution(how):
    """131,072 replies of three tokens over six ids: the exact probabilities of all 216 are known."""
    model = random_model(
        6,
        vocab_size=6,
        hidden_size=16,
        num_hidden_layers=3,
        num_nextn_predict_layers=2,
        initializer_range=0.2,
    )
    prompt, count, lossless = [1, 3], 1 << 14, how != "backbone"
    options = Sampling(do_sample=True, temperature=1.3)
    with torch.inference_mode():
        weights = Weights(model, AudioRows(3, 4))
        state = State(weights, count, 10, most=BURST + 2)
        rules, modes = Rules.of(count, weights.device), Modes.of(count, weights.device)
        rules.sampled.fill_(True)
        rules.temperature.fill_(options.temperature)
        modes.lossless.fill_(lossless)
        modes.heads_speak.fill_(how.endswith("speech rows"))
        drafted = torch.zeros(count, 2, 6)
        random, seen = torch.Generator().manual_seed(0), torch.zeros(216, dtype=torch.long)
        for _ in range(8):
            state.tokens[:, :2] = torch.tensor(prompt)
            for tensor, value in zip(state.lengths, (2, 0, 0, 0), strict=True):
                tensor.fill_(value)
            state.backbone_steps.fill_(1)
            state.head_steps.fill_(2 * lossless)
            for turn in range(3):
                state.uniforms.uniform_(generator=random)
                plan = Plan(
                    0, count, width=2 if turn == 0 else 3, head_width=5, length=8, backbone_steps=1,
                    head_steps=2 * lossless, lossless=lossless, heads_speak=how.endswith("speech rows"),
                    speech=how.endswith("speech rows"), drawing=Drawing.of([options]),
                )  # fmt: skip
                turn_of_all = Round(weights, state, plan, rules, modes, draft_probabilities=drafted)
                turn_of_all.read()
                turn_of_all.go_on()
            reply = state.tokens[:, 2:5]
            seen += torch.bincount(reply @ torch.tensor([36, 6, 1]), minlength=216)
        replies = torch.cartesian_prod(*[torch.arange(6)] * 3)
        ids = torch.cat([torch.tensor(prompt).expand(216, -1), replies], dim=1)
        log_probabilities = (model(ids).logits[:, 1:4] / options.temperature).log_softmax(-1)
        exact = log_probabilities.gather(2, replies[:, :, None]).sum(dim=(1, 2)).exp()
    assert fits(seen.numpy(), exact)


@given(st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_the_rules_are_those_of_transformers(seed):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 40, generator=random) * 4
    if seed % 3 == 0:
        logits = logits.round()  # ties
    used = torch.rand(3, 40, generator=random) < 0.3
    options = [
        Sampling(True, 0.7, 5, 0.8, 1.3),
        Sampling(True, 1.5, 0, 0.6),
        Sampling(False, repetition_penalty=2.0),
    ]
    rules = Rules.of(3, logits.device)
    for row, each in enumerate(options):
        rules.set(row, each)
    ours = distribution(logits, rules, Drawing.of(options), used, 0)
    for row, each in enumerate(options):
        ids = used[row].nonzero().T
        scores = logits[row : row + 1]
        if each.repetition_penalty != 1 and ids.numel():
            scores = RepetitionPenaltyLogitsProcessor(each.repetition_penalty)(ids, scores)
        if not each.do_sample:
            assert ours[row].argmax() == scores.argmax()
            assert ours[row].sum() == 1
            continue
        scores = TemperatureLogitsWarper(each.temperature)(ids, scores)
        if each.top_k:
            scores = TopKLogitsWarper(each.top_k)(ids, scores)
        if each.top_p < 1:
            scores = TopPLogitsWarper(each.top_p)(ids, scores)
        torch.testing.assert_close(ours[row], scores[0].softmax(-1))


def test_greedy_acceptance_is_the_longest_agreeing_prefix():
    drafts = torch.tensor([[1, 2, 3], [1, 9, 3], [1, 2, 3], [1, 2, 3]])
    best = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [5, 2, 3, 4]])
    accepted, following = accept_greedy(drafts, torch.tensor([3, 3, 1, 0]), best)
    assert accepted.tolist() == [3, 1, 1, 0]
    assert following.tolist() == [4, 2, 2, 5]


def test_draft_lengths_follow_what_is_accepted_and_come_back():
    length = DraftLength(10, RoundCost(head=0.1))
    assert length.best() >= 7
    for _ in range(60):
        length.update(drafted := length.best(), accepted=min(2, drafted))
    assert 2 <= length.best() <= 4
    for _ in range(200):
        length.update(drafted := length.best(), accepted=drafted)
    assert length.best() == 10
    costly = DraftLength(10, RoundCost(head=1.5))
    assert costly.best() == 0


def test_fewer_tokens_are_drafted_where_positions_cost_and_by_heads_that_are_behind():
    length = DraftLength(10, RoundCost(head=0.1))
    behind = DraftLength(10, RoundCost(head=0.1, position=0.15))
    assert 0 < behind.best() < length.best()
    current = behind.best()
    assert behind.best([0] * current + [50] * (10 - current)) == current  # for one token more it does not pay
    assert length.best([500] * 10) == length.best()


@pytest.mark.parametrize("head", [0.1, 0.2, 0.3])
def test_after_many_rejections_tokens_are_drafted_again(head):
    """Also by heads that lag behind by then."""
    length, lags = DraftLength(10, RoundCost(head, position=0.15)), [0] * 10
    drafted = []
    for step in range(600):
        drafts = length.best(lags)
        accepted = 0 if step < 40 else drafts
        lags = [0 if i < drafts else lag + accepted + 1 for i, lag in enumerate(lags)]
        length.update(drafts, accepted)
        drafted.append(drafts)
    assert sum(drafted[:40]) < 100
    assert min(drafted[-300:]) >= max(1, length.best() - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out_features", "in_features"), [(24, 16), (700, 300), (1500, 800)])
def test_products_equal_those_of_torch_whichever_kernel_runs(dtype, out_features, in_features):
    torch.manual_seed(0)
    weights = [torch.randn(out_features // 2, in_features, dtype=dtype) / in_features**0.5 for _ in range(2)]
    bias = torch.randn(out_features // 2, dtype=dtype)
    joined, plain = Product(weights, [bias, None]), Product([torch.cat(weights)])
    for rows in (1, 2, 11, 30):
        x, add = torch.randn(rows, in_features, dtype=dtype), torch.randn(rows, out_features, dtype=dtype)
        exact = x.double() @ torch.cat(weights).double().T
        tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 5e-2, "rtol": 2e-2}
        torch.testing.assert_close(plain(x).double(), exact, **tolerance)
        torch.testing.assert_close(plain(x, add=add.clone()).double(), exact + add.double(), **tolerance)
        offset = torch.cat([bias, torch.zeros_like(bias)]).double()
        torch.testing.assert_close(joined(x).double(), exact + offset, **tolerance)


def test_rows_of_the_state_change_places_with_all_they_hold(model):
    weights = Weights(model)
    state = State(weights, rows=3, length=12, most=4)
    for number, tensor in enumerate((*state.caches, state.hidden), start=1):
        tensor.copy_(torch.arange(tensor.numel()).view_as(tensor) + number)
    state.tokens.copy_(torch.arange(state.tokens.numel()).view_as(state.tokens))
    state.set(0, 5, 4, [4, 3, 2, 1])
    state.set(2, 9, 8, [8, 8, 8, 8])
    before = [tensor.clone() for tensor in (*state.caches, state.hidden, state.tokens, *state.lengths)]
    state.swap(0, 2, 10)
    assert state.known.tolist() == [9, 0, 5]
    assert torch.equal(state.caches[0][:, 0, :, :10], before[0][:, 2, :, :10])
    state.swap(2, 0, 10)
    after = (*state.caches, state.hidden, state.tokens, *state.lengths)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("turbo", [(1, 10), (1, 10)]),
        ("boost", [(1, 10), (4, 10), (4, 10)]),
        ("vanilla", [(4, 0), (4, 0)]),
        ([6, 2], [(4, 0), (2, 2), (4, 0)]),
        ([1, 25], [(1, 10), (1, 10), (1, 3), (1, 10)]),
    ],
)
def test_a_schedule_becomes_rounds(mode, expected):
    assert list(islice(segments(Schedule.parse(mode), 10, 4), len(expected))) == expected


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 14)), min_size=1, max_size=3),
    st.integers(0, 5),
)
def test_rounds_make_the_steps_of_their_schedule(pairs, num_heads):
    schedule = Schedule(tuple(pairs))
    steps = []
    for passes, heads in islice(segments(schedule, num_heads, 4), 60):
        assert passes <= 4
        assert heads <= num_heads
        steps += [-1] * passes + list(range(heads))
    assert steps[:50] == list(islice(schedule.steps(num_heads), 50))


@dataclass
class Row:
    started: bool
    unseen: int = 0
    joins: bool = True


def test_prompts_and_rounds_take_turns_and_the_soonest_to_speak_comes_first():
    scheduler = Scheduler(chunk=10, chunk_alone=100)
    assert scheduler.next([]) is None
    rows = [Row(True), Row(False, 35), Row(False, 8)]
    turns = []
    for _ in range(8):
        turn = scheduler.next(rows)
        turns.append(turn)
        if turn.kind == "prompt":
            rows[turn.first].unseen -= scheduler.chunk(rows)
        if turn.kind == "first":
            rows[turn.first].started = True
    waits = [Turn("first", 2, 3), *[Turn("prompt", 1, 2)] * 3]
    assert turns == [turn for wait in waits for turn in (wait, Turn("round", 0, 3))]
    assert scheduler.next([Row(False, 35)]).kind == "first", "alone, a whole prompt is one chunk"


def test_first_rounds_that_fit_into_one_chunk_run_together():
    def first(*rows):
        turn = Scheduler(chunk=10, chunk_alone=100).next(rows)
        return turn.kind, turn.first, turn.last

    assert first(Row(False, 30), Row(False, 40), Row(False, 30)) == ("first", 0, 3)
    assert first(Row(False, 30), Row(False, 90), Row(False, 20)) == ("first", 2, 3)
    assert first(Row(True), Row(False, 5), Row(False, 5), Row(False, 5)) == ("first", 1, 3)
    assert first(Row(False, 5), Row(False, 5, joins=False), Row(False, 9)) == ("first", 0, 1)


def test_without_cuda_recordings_simply_run():
    graphs, calls = Graphs(torch.device("cpu")), []
    for _ in range(3):
        graphs.run("key", lambda: calls.append(1))
    assert len(calls) == 3


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"repetition_penalty": 0.0}],
    ids=str,
)
def test_sampling_options_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match=rf"^{next(iter(changes))}=[^\n]+$"):
        Sampling(**changes)
