"""Generation of token ids from prepared prompts, alone or in batches.

Knows tensors and schedules, nothing of codecs and little of text: a prompt comes in as an
``Example`` of the data engine (ids, and features with their positions for continuous input),
token ids go out. Everything that reads or hears them is in ``streaming.py`` and ``pipeline.py``.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from vita_audio.models.generation import check_mode

if TYPE_CHECKING:
    from vita_audio.data.chat import Example


@dataclass(frozen=True)
class GenerationOptions:
    """How a reply is generated.

    Attributes:
        mode: name of a schedule (``vanilla``, ``balance``, ``boost``, ``turbo``) or the schedule
            ``[M1, m1, M2, m2, ...]`` itself: tokens by the backbone, then by the heads, in turn.
        max_new_tokens: longest reply, text and audio tokens together.
        do_sample: draw tokens instead of taking the likeliest.
        temperature, top_k, top_p: shape of the distribution drawn from; ``top_k=0`` keeps all tokens.
        repetition_penalty: above 1 discourages tokens already said.
        seed: of the draws; None continues torch's generator.
    """

    mode: str | Sequence[int] = "boost"
    max_new_tokens: int = 1024
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``model.generate``; states every choice, so that defaults
        stored with a checkpoint do not slip in."""
        arguments: dict[str, Any] = {
            "mtp_inference_mode": resolve_mode(self.mode),
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.do_sample,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.do_sample:
            arguments |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return arguments


def resolve_mode(mode: str | Sequence[int]) -> list[int]:
    """A schedule from its name, from text such as ``"1 10 4 10"``, or from its numbers.

    Raises:
        ValueError: no such name, or not pairs of (backbone tokens >= 1, head tokens >= 0).
    """
    if isinstance(mode, str) and re.fullmatch(r"\W*\d+(\W+\d+)*\W*", mode):
        mode = [int(number) for number in re.findall(r"\d+", mode)]
    return check_mode(mode)


def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Example],
    options: GenerationOptions,
    *,
    pad_id: int,
    stop_ids: Sequence[int],
    **generate_arguments: Any,
) -> list[list[int]]:
    """Replies to several prompts at once.

    Args:
        prompts: one per row; padded on the left, so that every row ends where its reply begins.
        pad_id: fills the left side, and the right side of rows that ended early.
        stop_ids: tokens that end a reply.
        generate_arguments: passed on to ``model.generate``, e.g. ``streamer``.

    Returns:
        New token ids per prompt, without the token that ended the reply.
    """
    inputs = collate_prompts(prompts, pad_id, model.device)
    with torch.inference_mode(), _seeded(options.seed, model.device):
        output = model.generate(
            **inputs,
            **options.arguments(),
            pad_token_id=pad_id,
            eos_token_id=list(stop_ids),
            **generate_arguments,
        )
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [cut_at_stop(row, stop_ids) for row in rows]


def collate_prompts(prompts: Sequence[Example], pad_id: int, device: torch.device) -> dict[str, Any]:
    """Left-padded batch: ``input_ids`` and ``attention_mask`` (rows, time); with continuous
    input also ``audios``, a list of (frames, features), and ``audio_indices``, a list of
    (2, 1, places): batch row and time of each place that the audio fills."""
    length = max(len(prompt.input_ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), length), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    audios, audio_indices = [], []
    for row, prompt in enumerate(prompts):
        start = length - len(prompt.input_ids)
        input_ids[row, start:] = torch.as_tensor(prompt.input_ids, dtype=torch.long)
        attention_mask[row, start:] = 1
        audios += [features.to(device) for features in prompt.features]
        audio_indices += [places.to(device) for places in prompt.audio_indices(row, offset=start)]
    batch = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
    if audios:
        batch |= {"audios": audios, "audio_indices": audio_indices}
    return batch


def cut_at_stop(ids: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    """What stands before the first stop token."""
    end = next((index for index, token in enumerate(ids) if token in stop_ids), len(ids))
    return list(ids[:end])


class TokenTap(BaseStreamer):
    """A transformers streamer that hands each new token of one row to a function, prompt left out."""

    def __init__(self, on_token, on_end=lambda: None):
        self._on_token = on_token
        self._on_end = on_end
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # generate() sends the prompt first
            self._prompt_seen = True
            return
        for token in value.reshape(-1).tolist():
            self._on_token(token)

    def end(self) -> None:
        self._on_end()


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draws from ``seed`` inside, and leaves the caller's generator as it was."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
