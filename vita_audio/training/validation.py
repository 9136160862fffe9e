"""Validation during a stage: losses and accuracies as in training, and answers that can be heard.

The losses are those of training on one batch of the whole set: sums over the supervised tokens of all ranks, divided
by their number. Answers come from a :class:`Speaker` that the command hands in, since training knows no inference.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vita_audio.constants import IGNORE_INDEX
from vita_audio.data.faults import first_line
from vita_audio.data.validation import ValidationSet
from vita_audio.distributed import gather_objects, is_first
from vita_audio.training.statistics import LOSS, PredictionSums, accuracies, breakdown

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spoken:
    """An answer that the model has spoken.

    Attributes:
        name: ``tts_0``, ``speech_qa_1``, …
        text: request, reply and, with a recogniser, what it heard; Markdown.
        waveform: (samples,); None if the reply holds no speech.
        sample_rate: in Hz.
        errors, words: word errors of the speech, and words of the text that it should say; None without a recogniser.
    """

    name: str
    text: str
    waveform: Tensor | None
    sample_rate: int
    errors: float | None = None
    words: float | None = None


Speaker = Callable[[PreTrainedModel], list[Spoken]]
"""Answers this rank's requests with the model as it is."""


def score(model: PreTrainedModel, data: ValidationSet, device: torch.device) -> dict[str, float]:
    """Losses and accuracies of the validation set; all ranks must call it.

    Returns:
        ``eval_loss``, ``eval_main_loss``, ``eval_mtp_loss_0``, ``eval_main_accuracy``, …, and those of
        each task and source as in the training log.
    """
    config: Any = model.config
    heads = config.num_nextn_predict_layers
    sums = PredictionSums(heads, len(data.kinds), device)
    items = 0
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in data.batches:
                items += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
                inputs = {name: _to_device(value, device) for name, value in batch.items()}
                kinds = inputs.pop("kinds")
                output: Any = model(**inputs, num_items_in_batch=1, logits_to_keep=1, return_predictions=True)
                sums.add(output.predictions, kinds)
    finally:
        model.train(training)
    ranks = gather_objects((sums.take(), items))
    total = torch.stack([own for own, _ in ranks]).sum(dim=0)
    count = max(1, sum(own for _, own in ranks))
    losses = [loss / count for loss in total[LOSS].sum(dim=1).tolist()]
    figures = {f"mtp_loss_{head}": loss for head, loss in enumerate(losses[1:])}
    mean = config.mtp_loss_weight * sum(losses[1:]) / heads if heads else 0.0
    if not getattr(model, "has_frozen_backbone", False):
        figures["main_loss"] = losses[0]
        mean += losses[0]
    figures = {"loss": mean, **figures, **accuracies(total), **breakdown(total, data.kinds)}
    return {f"eval_{name}": value for name, value in figures.items()}


def listen(model: PreTrainedModel, speaker: Speaker) -> tuple[list[Spoken], dict[str, float]]:
    """The answers of all ranks, on the first, and their word error rates by task; all ranks must call it.

    A failure is logged: it is no reason to end a run.
    """
    training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    spoken: list[Spoken] = []
    # The next steps must not depend on what was drawn here.
    with torch.random.fork_rng(devices):
        try:
            spoken = speaker(model.eval())
        except (ValueError, RuntimeError, OSError) as error:
            logger.warning("validation: no answers could be spoken: %s", first_line(error))
        finally:
            model.train(training)
    everyone = gather_objects(spoken)
    answers = [answer for own in everyone for answer in own] if is_first() else []
    rates: dict[str, float] = {}
    for task in sorted({answer.name.rsplit("_", 1)[0] for own in everyone for answer in own}):
        heard = [
            (answer.errors, answer.words)
            for own in everyone
            for answer in own
            if answer.name.rsplit("_", 1)[0] == task and answer.errors is not None and answer.words
        ]
        if heard:
            rates[f"eval_speech/{task}_wer"] = sum(e for e, _ in heard) / sum(w for _, w in heard)
    return answers, rates


def _to_device(value: Any, device: torch.device) -> Any:
    """A tensor, or a list of them, on a device."""
    if isinstance(value, list):
        return [one.to(device) for one in value]
    return value.to(device)
