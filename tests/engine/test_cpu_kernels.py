"""The CPU's own kernels: each against PyTorch, passes against float32, and where they cannot be compiled."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from golden_requests import golden_request
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vita_audio.engine import Engine, Request, Sampling, cpu_kernels, kernels
from vita_audio.engine.drafting import DraftLength
from vita_audio.engine.sampling import best_ids
from vita_audio.engine.state import State, window_of
from vita_audio.engine.steps import run_backbone, run_head
from vita_audio.engine.weights import AudioRows, Weights

from .conftest import GOLDENS, random_model

CASES = json.loads((GOLDENS / "generation_expected.json").read_text())

SETS = [[], ["-mavx2", "-mfma"], ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]]
"""Instruction sets other than this CPU's."""
TYPES = [torch.bfloat16, torch.float32]


def draws(seed):
    """Whole numbers from ``low`` to ``high``, at random."""
    chance = torch.Generator().manual_seed(seed)
    return lambda low, high: int(torch.randint(low, high + 1, (1,), generator=chance))


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)
    torch.manual_seed(0)


def runs_here(flags):
    return not flags or (
        torch.cpu._is_avx512_supported() if "-mavx512f" in flags else torch.cpu._is_avx2_supported()
    )


@pytest.fixture(params=["this CPU's", *SETS], ids=["own", "plain", "avx2", "avx512"])
def instructions(request, monkeypatch):
    """Kernels compiled for several sets of instructions; this CPU's own, and those of others that it can run."""
    if request.param != "this CPU's":
        if not runs_here(request.param):
            pytest.skip("this CPU has no such instructions")
        monkeypatch.setattr(cpu_kernels, "instructions", lambda: request.param)
    cpu_kernels.extension.cache_clear()
    yield
    cpu_kernels.extension.cache_clear()


def without_own_kernels(monkeypatch, model):
    monkeypatch.setenv(kernels.SWITCH, "0")
    weights = Weights(model)
    monkeypatch.delenv(kernels.SWITCH)
    assert weights.backbone_pass is None
    return weights


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("outputs", [[1], [31, 2], [64], [40, 40], [32, 8, 8]])
@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 30])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_product_is_pytorchs_and_a_row_does_not_depend_on_its_company(outputs, rows, dtype):
    weights = [torch.randn(size, 70).to(dtype) for size in outputs]
    biases = [None if i == 1 else torch.randn(size).to(dtype) for i, size in enumerate(outputs)]
    x = torch.randn(rows, 2 * 70).to(dtype)[:, ::2]
    add = torch.randn(rows, sum(outputs)).to(dtype)
    close = {"rtol": 1 / 128, "atol": 0.01} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    product, plain = cpu_kernels.PackedProduct(weights, biases), cpu_kernels.PackedProduct(weights)
    expected = x.double() @ torch.cat(weights).double().t()
    bias = torch.cat(
        [torch.zeros(n) if b is None else b.double() for n, b in zip(outputs, biases, strict=True)]
    )
    torch.testing.assert_close(product(x).double(), expected + bias, **close)
    torch.testing.assert_close(plain(x, add=add).double(), expected + add.double(), **close)
    assert torch.equal(product(x), torch.cat([product(row[None]) for row in x]))
    assert product.num_bytes == dtype.itemsize * 70 * sum(outputs)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("size", [1, 5, 1024, 4100])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_best_id_is_the_first_of_the_highest(size, dtype):
    logits = torch.randn(3, 2, size).to(dtype)
    logits[1, 1] = -torch.inf
    logits[2, 0] = logits[2, 0].amax()
    assert torch.equal(best_ids(logits), logits.float().argmax(dim=-1))


SHAPES = {
    "heads of 16": {"head_dim": 16},
    "heads of 18": {"head_dim": 18},
    "heads of 64": {"head_dim": 64},
    "one key head": {"num_key_value_heads": 1},
    "a key head each": {"num_key_value_heads": 4},
    "a window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "a long window": {"use_sliding_window": True, "sliding_window": 70, "max_window_layers": 0},
}


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_passes_are_as_close_to_float32_as_pytorchs_and_equal_in_float32(shape, monkeypatch):
    """Two of three rows, one of which has fewer new positions, over caches that hold more than they see."""
    model = random_model(1, initializer_range=0.15, hidden_size=64, intermediate_size=72, **shape).bfloat16()
    for weight in model.parameters():
        if weight.ndim == 1:  # norms, which begin as ones, and biases
            weight.data.uniform_(0.5, 1.5)
    own, theirs = Weights(model), without_own_kernels(monkeypatch, model)
    single = random_model_like(model)
    own_single, exact = Weights(single), without_own_kernels(monkeypatch, single)
    assert own.backbone_pass is not None
    assert own_single.backbone_pass is not None
    errors = {"own": [], "theirs": []}
    for known, width in [(0, 1), (0, 7), (5, 3), (62, 11), (100, 64), (0, 130), (200, 1)]:
        outputs = [two_passes(weights, known, width) for weights in (own, theirs, exact, own_single)]
        for name, output in zip(errors, outputs, strict=False):
            errors[name].append((output - outputs[2]).square().mean().sqrt().item())
        torch.testing.assert_close(outputs[3], outputs[2], rtol=1e-3, atol=1e-3)
    assert sum(errors["own"]) <= 1.2 * sum(errors["theirs"]), errors


def test_replies_with_pytorchs_kernels_are_the_goldens(golden_model, monkeypatch):
    monkeypatch.setenv(kernels.SWITCH, "0")
    engine = Engine(golden_model, max_rows=3, max_length=300)
    assert engine.weights.backbone_pass is None
    handles = [engine.submit(golden_request(case)) for case in CASES]
    assert [handle.tokens() for handle in handles] == [case["new_tokens"] for case in CASES]


def random_model_like(model):
    copy = type(model)(model.config)
    copy.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    return copy.float().eval()


def two_passes(weights, known, width):
    """The outputs of the backbone and of a head, and what the caches then hold, in one tensor."""
    torch.manual_seed(width)
    state = State(weights, rows=3, length=300, most=4)
    for cache in state.caches:
        content = torch.randn(2, 3, weights.kv, 301, weights.head_size).bfloat16().to(weights.dtype)
        content[:, :, :, known + width :] = torch.nan  # what no position sees
        for content_of, at in zip(content, places_of(weights, state), strict=True):
            cache.view(-1)[at] = content_of
    state.tokens.random_(96)
    first, end = torch.tensor([known, known]), torch.tensor([known + width, known + max(1, width - 2)])
    x = torch.randn(2 * width, weights.d).bfloat16().to(weights.dtype)
    with torch.inference_mode():
        window = window_of(weights, state, slice(1, 3), first, end, width, known + width)
        hidden = run_backbone(weights, state, x, window)
        output = run_head(weights, state, 0, hidden, window)
    kept = (torch.arange(end[0] - width, end[0]) >= 0).repeat(2) & (
        end[:, None] - width + torch.arange(width) >= first[:, None]
    ).flatten()
    caches = [
        cache.view(-1)[at[row, :, :length]]
        for cache in state.caches[: weights.num_layers + 1]
        for at in places_of(weights, state)
        for row, length in ((1, end[0]), (2, end[1]))
    ]
    return torch.cat([part.float().flatten() for part in (hidden[kept], output[kept], *caches)])


def places_of(weights, state):
    """Where a cache has its keys and its values, (3, kv, 301, d_head) each."""
    _, rows, kv, places, width = state.caches[0].shape
    size = weights.head_size
    start = torch.arange(rows * kv).view(rows, kv, 1, 1) * places * width
    place, j = torch.arange(301)[:, None], torch.arange(size)
    if weights.backbone_pass is None:
        return start + place * size + j, start + rows * kv * places * width + place * size + j
    # Blocks of 64 positions; keys 32 at a time, values in 32 dimensions at a time; what takes 32 bits together.
    n = 4 // weights.dtype.itemsize
    key, block = place % 64, place // 64 * 64 * width
    keys = key // 32 * 32 * size + j // n * 32 * n + key % 32 * n + j % n
    values = j // 32 * 32 * 64 + key // n * 32 * n + j % 32 * n + key % n
    return start + block + keys, start + rows * kv * places * width + block + values


@pytest.mark.parametrize("dtype", TYPES)
@given(seed=st.integers(0, 10_000))
@example(seed=32)  # sampled lossless replies whose heads lag behind in company
@example(seed=192)
@settings(max_examples=15, deadline=None)
def test_a_reply_does_not_depend_on_its_company(dtype, seed):
    """Not in one bit: greedy replies of a random model are long chains of close choices."""
    some = draws(seed)
    model = random_model(2).to(dtype)
    alone = Engine(model, max_rows=1, max_length=200)
    together = Engine(model, max_rows=3, max_length=200, prompt_chunk=16)
    requests = [
        Request(
            [some(0, 95) for _ in range(some(1, 80))],
            ["vanilla", "balance", "boost", "turbo"][some(0, 3)],
            Sampling(do_sample=some(0, 1) == 1, seed=some(0, 99)),
            lossless=some(0, 3) == 0,
            max_new_tokens=some(1, 40),
        )
        for _ in range(5)
    ]
    handles = []
    for request in requests:
        handles.append(together.submit(request))
        for _ in range(some(0, 3)):
            together.step()
    assert [handle.tokens() for handle in handles] == [alone.submit(request).tokens() for request in requests]


@pytest.mark.parametrize("dtype", TYPES)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_rounds_in_one_call_are_those_in_parts(dtype, seed):
    """Replies that end early, in company and in conversations, with and without the rows of speech."""
    some = draws(seed)
    model = random_model(3).to(dtype)
    with torch.no_grad():
        model.lm_head.weight[:50] *= 0.7  # so that speech goes on for a while
    engines = [Engine(model, max_rows=3, max_length=200, speech=AudioRows(50, 51)) for _ in range(2)]
    engines[1]._turns._greedy = None
    sessions = [[engine.session() for _ in range(2)] for engine in engines]
    turns = [
        {
            "prompt": [some(0, 95) for _ in range(some(1, 40))],
            "schedule": ["vanilla", "balance", "boost", "turbo", "2-3"][some(0, 4)],
            "lossless": some(0, 2) == 0,
            "audio_rows": ["off", "auto", "on"][some(0, 2)],
            "stop_tokens": [some(0, 95) for _ in range(some(0, 8))],
            "max_new_tokens": some(1, 40),
            "place": some(0, 3),
            "steps": some(0, 3),
        }
        for _ in range(6)
    ]
    found = []
    for engine, theirs in zip(engines, sessions, strict=True):
        handles, said = [], [[], []]
        for turn in turns:
            turn = dict(turn)
            place, steps = turn.pop("place"), turn.pop("steps")
            if place < 2 and not theirs[place].busy:  # goes on with what was said there
                turn |= {"session": theirs[place], "prompt": (said[place] + turn["prompt"])[-150:]}
                said[place] = turn["prompt"]
            handles.append(engine.submit(Request(**turn)))
            for _ in range(steps):
                engine.step()
        found.append([handle.tokens() for handle in handles])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("schedule", "lossless", "tokens", "heads"),
    [
        ("vanilla", False, 1, []),
        ("turbo", False, 1, []),
        ("turbo", False, 3, [20, 20]),
        ("vanilla", True, 1, []),
        ("vanilla", True, 2, []),  # the backbone's next pass makes the second
        ("vanilla", True, 3, [20]),
    ],
)
def test_nothing_is_computed_after_a_reply_of_so_many_tokens(monkeypatch, schedule, lossless, tokens, heads):
    monkeypatch.setattr(DraftLength, "best", lambda self, behind=None: 4)
    engine = Engine(random_model(4), max_rows=1, max_length=200)
    handle = engine.submit(Request(range(20), schedule, lossless=lossless, max_new_tokens=tokens))
    engine.step()
    assert engine._table._state.seen[0] == 20
    assert engine._table._state.seen_heads[0].tolist() == heads + [0] * (4 - len(heads))
    assert len(handle.tokens()) == tokens


@pytest.mark.parametrize(("schedule", "lossless"), [("vanilla", False), ("turbo", False), ("vanilla", True)])
def test_nothing_is_computed_after_a_stop_token(schedule, lossless):
    engine = Engine(random_model(4), max_rows=1, max_length=200)
    prompt = list(range(20))
    reply = engine.submit(Request(prompt, schedule, lossless=lossless, max_new_tokens=12)).tokens()
    stop = next(i for i in range(2, 12) if reply[i] not in reply[:i])
    session = engine.session()
    request = Request(
        prompt, schedule, lossless=lossless, stop_tokens=[reply[stop]], max_new_tokens=99, session=session
    )
    assert engine.submit(request).tokens() == reply[: stop + 1]
    assert session.seen <= 20 + stop
    if schedule == "turbo":  # the heads in use, up to the one that gave the stop token
        assert sum(seen == session.seen for seen in session.seen_heads) == stop % 5


def test_inputs_of_any_layout_give_the_same_reply():
    model = random_model(4)
    engine = Engine(model, max_rows=1, max_length=200)
    embeds = torch.randn(20, 32)
    request = {"schedule": "turbo", "max_new_tokens": 20}
    replies = [
        engine.submit(Request(range(20), embeds=each, **request)).tokens()
        for each in (embeds, embeds.t().contiguous().t())
    ]
    assert replies[0] == replies[1]


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("audio_rows", ["off", "on"])
def test_weights_that_are_not_numbers_give_tokens_all_the_same(audio_rows):
    model = random_model(4)
    model.model.norm.weight.data.fill_(torch.nan)
    engine = Engine(model, max_rows=1, max_length=200, speech=AudioRows(50, 51))
    tokens = engine.submit(Request([1, 2, 60], "turbo", audio_rows=audio_rows, max_new_tokens=12)).tokens()
    assert len(tokens) == 12
    assert all(0 <= token < 96 for token in tokens)


def test_a_gate_and_what_it_lets_through_come_apart_again():
    """In memory their blocks take turns."""
    gate, up = (torch.randn(40, 32).bfloat16() for _ in range(2))
    x = torch.randn(3, 32).bfloat16()
    torch.testing.assert_close(
        cpu_kernels.PackedProduct([gate, up])(x), x @ torch.cat([gate, up]).t(), rtol=0.01, atol=0.01
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_large_weights_lie_in_large_pages_where_the_system_gives_them():
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("this system has none")

    def in_large_pages():
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages"))

    before = in_large_pages()
    kept = cpu_kernels.memory([1 << 24], torch.bfloat16).fill_(1)
    assert in_large_pages() - before >= cpu_kernels.HUGE_PAGE  # memory in pieces may not give all of them
    assert kept.data_ptr() % cpu_kernels.HUGE_PAGE == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_small_weights_take_no_large_pages():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    kept = [cpu_kernels.memory([100, 100], torch.bfloat16).fill_(1) for _ in range(200)]
    assert resident() - before < len(kept) * cpu_kernels.HUGE_PAGE // 4


# -- compiling ----------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has not compiled anything, with an empty folder for the result."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    for cached in (cpu_kernels.extension, kernels._tried_on_cpu):
        cached.cache_clear()
    yield tmp_path
    for cached in (cpu_kernels.extension, kernels._tried_on_cpu):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "No such file or directory: 'no-such-compiler'"),
        ("false", "false ended with status 1"),
    ],
)
def test_without_a_compiler_the_engine_says_so_once_and_takes_pytorchs_kernels(
    fresh, monkeypatch, caplog, compiler, reason
):
    monkeypatch.setenv("CXX", compiler)
    model = random_model(4).bfloat16()
    for _ in range(2):
        engine = Engine(model, max_rows=1, max_length=50)
        assert engine.weights.backbone_pass is None
        assert len(engine.submit(Request([1, 2], "boost", max_new_tokens=8)).tokens()) == 8
    (message,) = (record.getMessage() for record in caplog.records if record.name == kernels.__name__)
    assert message.startswith("the engine runs on PyTorch's kernels alone, since those for this CPU")
    assert reason in message


def test_the_compilers_first_error_is_the_reason(fresh, monkeypatch, tmp_path):
    source = tmp_path / "broken.cpp"
    source.write_text("int main() { return x; }\n")
    monkeypatch.setattr(cpu_kernels, "SOURCE", source)
    with pytest.raises(RuntimeError, match=r"broken\.cpp:1:.* error: .x. was not declared"):
        cpu_kernels.extension()
    assert list((fresh / "vita_audio").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(fresh, monkeypatch, caplog):
    (fresh / "vita_audio").write_text("a file in its place")
    assert kernels.cpu_kernels(torch.device("cpu"), torch.bfloat16) is None
    assert str(fresh / "vita_audio") in caplog.text


def test_it_is_compiled_once_also_by_two_at_once(fresh, monkeypatch):
    with ThreadPoolExecutor(2) as pool:
        paths = set(pool.map(cpu_kernels.compiled, [[], []]))
    assert [*(fresh / "vita_audio").iterdir()] == list(paths)
    monkeypatch.setattr(subprocess, "run", None)
    assert {cpu_kernels.compiled([])} == paths


def test_a_compiled_file_that_cannot_be_loaded_is_made_again(fresh, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "instructions", list)
    path = cpu_kernels.compiled([])
    size = path.stat().st_size
    path.write_bytes(b"")
    assert cpu_kernels.extension().float32
    assert path.stat().st_size == size


def test_other_types_and_the_switch_leave_it_to_pytorch(monkeypatch):
    cpu = torch.device("cpu")
    mixed = random_model(5).bfloat16()
    mixed.model.norm.float()
    assert Weights(mixed).backbone_pass is None
    assert kernels.cpu_kernels(cpu, torch.bfloat16) is cpu_kernels
    assert kernels.cpu_kernels(cpu, torch.float32) is cpu_kernels
    assert kernels.cpu_kernels(cpu, torch.float16) is None
    assert Weights(random_model(5, intermediate_size=49).bfloat16()).backbone_pass is None
    monkeypatch.setenv("VITA_AUDIO_KERNELS", "0")
    assert kernels.cpu_kernels(cpu, torch.bfloat16) is None


def test_loading_the_kernels_leaves_small_numbers_as_they_are():
    """A library that is linked with ``-ffast-math`` makes its process round subnormal numbers to zero."""
    script = (
        "import torch; from vita_audio.engine import cpu_kernels as own\n"
        "own.extension(); x = torch.tensor([1e-40]); assert (x / 2).item() > 0 and 5e-324 * 1.0 > 0"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
