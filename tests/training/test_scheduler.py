"""The learning rate follows the published curve, step by step."""

import math
import pickle

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupCosineLR

from vita_audio.training.scheduler import WARMUP_COSINE, build_scheduler, warmup_cosine

PUBLISHED_WARMUP = 0.03


def optimizer_with_two_rates() -> torch.optim.SGD:
    """Stage 4's groups: the model at 5e-5, the heads at ten times that."""
    groups = [{"params": [torch.zeros(1)], "lr": rate} for rate in (5e-5, 5e-4)]
    return torch.optim.SGD(groups, lr=1.0)


def rates(scheduler, optimizer: torch.optim.SGD, steps: int) -> list[tuple[float, ...]]:
    """The rates that every update uses, of all groups."""
    used = []
    for _ in range(steps):
        used.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        scheduler.step()
    return used


@pytest.mark.parametrize("steps", [8000, 4000, 240, 10, 2])
def test_every_rate_of_every_group_equals_that_of_deepspeed(steps):
    warmup_steps = math.ceil(steps * PUBLISHED_WARMUP)
    ours, theirs = optimizer_with_two_rates(), optimizer_with_two_rates()
    published = WarmupCosineLR(theirs, steps, warmup_num_steps=warmup_steps, cos_min_ratio=0.1)
    got = rates(build_scheduler(WARMUP_COSINE, ours, warmup_steps, steps), ours, steps + 5)
    want = rates(published, theirs, steps + 5)
    assert torch.tensor(got, dtype=torch.float64).allclose(
        torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"warmup_type": "linear"}, {"warmup_type": "linear", "cos_min_ratio": 0.1}),
        ({"warmup_min_ratio": 0.2, "cos_min_ratio": 0.3}, {"warmup_min_ratio": 0.2, "cos_min_ratio": 0.3}),
    ],
)
def test_other_arguments_also_give_the_rates_of_deepspeed(ours, theirs):
    mine, published = optimizer_with_two_rates(), optimizer_with_two_rates()
    got = rates(build_scheduler(WARMUP_COSINE, mine, 30, 100, ours), mine, 100)
    want = rates(WarmupCosineLR(published, 100, warmup_num_steps=30, **theirs), published, 100)
    assert torch.tensor(got).allclose(torch.tensor(want), rtol=1e-12, atol=0)


def test_the_warm_up_is_logarithmic_and_the_end_is_a_tenth():
    share = warmup_cosine(240, 8000)
    assert share(25) == pytest.approx(0.59, abs=0.01)
    assert share(240) == pytest.approx(1.0)
    assert share(8000) == pytest.approx(0.1)
    assert share(9000) == pytest.approx(0.1)


def test_other_schedules_are_chosen_by_name():
    optimizer = optimizer_with_two_rates()
    scheduler = build_scheduler("cosine_with_min_lr", optimizer, 10, 100, {"min_lr_rate": 0.1})
    assert [used[1] / 5e-4 for used in rates(scheduler, optimizer, 2)] == pytest.approx([0.0, 0.1])


def test_a_saved_schedule_continues():
    first, second = optimizer_with_two_rates(), optimizer_with_two_rates()
    scheduler = build_scheduler(WARMUP_COSINE, first, 3, 20)
    rates(scheduler, first, 7)
    resumed = build_scheduler(WARMUP_COSINE, second, 3, 20)
    resumed.load_state_dict(pickle.loads(pickle.dumps(scheduler.state_dict())))
    scheduler.step()
    resumed.step()
    assert resumed.get_last_lr() == scheduler.get_last_lr()


@pytest.mark.parametrize(
    "arguments",
    [{"warmup_type": "steep"}, {"cos_min_ratio": 2}, {"warmup_min_ratio": -1}, {"cos_min_ratio": "x"}],
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        warmup_cosine(10, 100, **arguments)
