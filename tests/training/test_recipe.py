"""The published schedule and the switches of the recipe, by the scripts' own defaults."""

import pytest

from vita_audio.training.scheduler import warmup_cosine

pytestmark = pytest.mark.slow

STEPS = 6
PUBLISHED = {"MAX_STEPS": str(STEPS), "LR_SCHEDULER_TYPE": "warmup_cosine", "DEEPSPEED_CONFIG": ""}


def logged_rates(lines: list[dict[str, float]]) -> list[float]:
    return [line["learning_rate"] for line in lines]


def planned_rates(peak: float, first: int) -> list[float]:
    """The rates of updates, counted from 0."""
    share = warmup_cosine(1, STEPS)
    return [peak * share(update) for update in range(first, first + STEPS)]


def test_the_optimizer_of_deepspeed_follows_the_published_schedule(tiny_world):
    base = str(tiny_world.root / "base")
    run = tiny_world.run_stage("stage1", MODEL_NAME_OR_PATH=base, NPROC_PER_NODE="1", **PUBLISHED)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "training on CPUs: PyTorch's Adam instead of DeepSpeed's" in run.stderr
    # DeepSpeed steps the schedule with the optimizer, so that the rate in a log line is that of the next update.
    assert logged_rates(tiny_world.losses("stage1")) == pytest.approx(planned_rates(1e-3, first=1), rel=1e-6)


def test_our_optimizer_follows_the_published_schedule_and_losses_of_ranks_add_up(tiny_world):
    base = str(tiny_world.root / "base")
    run = tiny_world.run_stage(
        "mtp10_stage2",
        MODEL_NAME_OR_PATH=base,
        NUM_HEADS="2",
        LOSS_AVERAGE="rank",
        DECAY_NORMS="True",
        **PUBLISHED,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = tiny_world.losses("mtp10_stage2")
    # The first group is the model's; the heads' rates are ten times these.
    assert logged_rates(lines) == pytest.approx(planned_rates(1e-3, first=0), rel=1e-6)
    for line in lines:
        parts = line["main_loss"] + (line["mtp_loss_0"] + line["mtp_loss_1"]) / 2
        assert line["loss"] == pytest.approx(parts, rel=1e-3)
