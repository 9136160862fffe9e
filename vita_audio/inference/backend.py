"""Generates replies: takes requests and streams text and sound as soon as they are available.

:meth:`Backend.stream_many` is the only interface. One reply is a stream, a batch is many streams, and a whole reply
is its collected stream (:func:`collect`). The model emits one row of ids in which text and speech codes alternate;
:class:`~vita_audio.chat.reply.ReplyParser` separates them. In Boost and Turbo the prefill round produces the first
chunk of speech.

:class:`ReferenceBackend` runs the decoding loop of ``model.generate``,
:class:`~vita_audio.inference.engine_backend.EngineBackend` the engine.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from vita_audio.audio import AudioTokenizer
from vita_audio.chat import ChatTokens, Example
from vita_audio.inference.options import GenerationOptions
from vita_audio.inference.replies import Event, Reply, ReplyAssembly, Request
from vita_audio.models.configuration import num_positions

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

    from vita_audio.models import Qwen2MTPForCausalLM


class Backend(ABC):
    """Generates replies."""

    @abstractmethod
    def tokens(self, request: Request) -> Generator[int, None, None]:
        """Ids of one reply as they are generated, including the stop token. Closing ends generation at once."""

    @abstractmethod
    def stream_many(self, requests: Sequence[Request]) -> Generator[tuple[int, Event], None, None]:
        """Events of several replies as they occur, each with the index of its request.

        The last event of each reply is a :class:`Reply`. Closing the iterator ends generation at once.

        Raises:
            ValueError: the options of a request are not supported, or prompt and reply exceed the model's positions.
        """

    def stream(self, request: Request) -> Generator[Event, None, None]:
        """Events of one reply; see :meth:`stream_many`."""
        with closing(self.stream_many([request])) as events:
            for _, event in events:
                yield event


def collect(events: Iterator[tuple[int, Event]], count: int) -> list[Reply]:
    """The complete replies of a stream of ``count`` requests, in the order of the requests."""
    replies = {index: event for index, event in events if isinstance(event, Reply)}
    return [replies[index] for index in range(count)]


class ReferenceBackend(Backend):
    """The decoding loop of ``model.generate``, one padded batch at a time.

    Args:
        model: any causal LM of the family, on its device.
        tokenizer: the text tokenizer saved with it.
        codec: turns codes into sound.
    """

    def __init__(self, model: Qwen2MTPForCausalLM, tokenizer: PreTrainedTokenizerBase, codec: AudioTokenizer):
        self._model = model
        self._tokenizer = tokenizer
        self._codec = codec
        self._tokens = ChatTokens.of(tokenizer)

    def stream_many(self, requests: Sequence[Request]) -> Generator[tuple[int, Event], None, None]:
        """See :meth:`Backend.stream_many`. All requests of a call share their options, except the seed."""
        if not requests:
            return
        options = self._shared_options(requests)
        rows = [
            ReplyAssembly(request, replace(options, seed=request.options.seed), self._tokenizer, self._codec)
            for request in requests
        ]
        with closing(self._steps(requests, options)) as steps:
            for step in steps:
                now = time.perf_counter()
                for index, (row, token) in enumerate(zip(rows, step, strict=True)):
                    if row.ended:
                        continue
                    ends = token in self._tokens.stops
                    for event in row.push(token, now, ends):
                        yield index, event
                    if ends:
                        for event in row.end():
                            yield index, event
        for index, row in enumerate(rows):
            if not row.ended:  # the longest reply allowed
                for event in row.end():
                    yield index, event

    def tokens(self, request: Request) -> Generator[int, None, None]:
        """See :meth:`Backend.tokens`."""
        options = self._shared_options([request])
        with closing(self._steps([request], options)) as steps:
            for (token,) in steps:
                yield token
                if token in self._tokens.stops:
                    return

    def _shared_options(self, requests: Sequence[Request]) -> GenerationOptions:
        num_heads = self._model.config.num_nextn_predict_layers
        resolved = {
            repr(options): options
            for options in (
                replace(request.options.resolved(self._model.generation_config, num_heads), seed=None)
                for request in requests
            )
        }
        if len(resolved) != 1:
            raise ValueError(f"requests of one batch must share their options, got {', '.join(resolved)}")
        options = next(iter(resolved.values()))
        if options.lossless or options.audio_rows != "off":
            raise ValueError(
                "lossless and audio_rows need the engine; leave out engine=False (--engine false)"
            )
        return options

    # A decorated generator is in inference mode only while it runs, not while it waits for its caller.
    @torch.inference_mode()
    def _steps(
        self, requests: Sequence[Request], options: GenerationOptions
    ) -> Generator[list[int], None, None]:
        """The token of each row, step by step."""
        for request in requests:
            check_length(self._model.config, len(request.prompt.input_ids), options.max_new_tokens)
        seeds = [request.options.seed for request in requests]
        generators = None
        if options.do_sample and any(seed is not None for seed in seeds):
            generators = [self._generator(seed) for seed in seeds]
        iterate: Any = self._model.iterate  # MTPGenerationMixin's; PreTrainedModel does not declare it
        tokens = iterate(
            **collate_prompts([request.prompt for request in requests], self._tokens.pad, self._model.device),
            generators=generators,
            pad_token_id=self._tokens.pad,
            eos_token_id=list(self._tokens.stops),
            **options.arguments(),
        )
        for step in tokens:
            yield step.tolist()

    def _generator(self, seed: int | None) -> torch.Generator | None:
        return None if seed is None else torch.Generator(self._model.device).manual_seed(seed)


def check_length(config: PreTrainedConfig, prompt_tokens: int, max_new_tokens: int) -> None:
    """Refuse a prompt and a reply that exceed the model's positions together.

    Raises:
        ValueError: they do.
    """
    positions = num_positions(config)
    if prompt_tokens >= positions:
        raise ValueError(
            f"the prompt has {prompt_tokens} tokens, the model {positions} positions; shorten the prompt"
        )
    if prompt_tokens + max_new_tokens > positions:
        raise ValueError(
            f"the prompt has {prompt_tokens} tokens, the model {positions} positions; give max_new_tokens="
            f"{positions - prompt_tokens} or less, not {max_new_tokens}, or shorten the prompt"
        )


def collate_prompts(prompts: Sequence[Example], pad_id: int, device: torch.device) -> dict[str, Any]:
    """Left-padded batch: ``inputs`` (token ids) and ``attention_mask``, (rows, time); with continuous
    input also ``audios``, a list of (frames, features), and ``audio_indices``, a list of
    (2, 1, places): batch row and time of each position that the audio fills."""
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
    batch: dict[str, Any] = {"inputs": input_ids.to(device), "attention_mask": attention_mask.to(device)}
    if audios:
        batch |= {"audios": audios, "audio_indices": audio_indices}
    return batch
