"""Replies from the engine: rounds at the machine's limit, many replies at once, speech decoded beside them."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vita_audio.audio import AudioTokenizer
from vita_audio.chat import ChatTokens, Example
from vita_audio.engine import (
    AudioRows,
    Engine,
    Finished,
    Handle,
    Quantization,
    Sampling,
    SpeechWorker,
    Tokens,
    row_bytes,
)
from vita_audio.engine import Request as EngineRequest
from vita_audio.inference.backend import Backend, check_length, collate_prompts
from vita_audio.inference.options import GenerationOptions
from vita_audio.inference.replies import Event, ReplyAssembly, Request
from vita_audio.models.configuration import num_positions

if TYPE_CHECKING:
    from vita_audio.models import Qwen2MTPForCausalLM

MOST_ROWS = 8
"""Replies at once; more wait for a free row."""

LONGEST = 32_768
"""Tokens of a row, at most."""

SHARE_OF_GPU = 0.5
"""Share of a GPU's free memory that caches may take."""


class EngineBackend(Backend):
    """The engine and a worker for speech; both are made for the first reply.

    On a CPU, model and codec share the cores, so the codec decodes between the rounds, in the thread that waits for
    an event. On a GPU it runs in a thread and on a stream of its own.

    Args:
        model: any causal LM of the family, on its device. Its weights are copied into the engine's layout.
        tokenizer: the text tokenizer saved with it.
        codec: turns codes into sound.
        max_rows: replies at once; None: 8, or as many as fit a GPU.
        quantization: see :class:`~vita_audio.engine.weights.Weights`. Unless none, the model's matrices are emptied.
    """

    def __init__(
        self,
        model: Qwen2MTPForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        codec: AudioTokenizer,
        max_rows: int | None = None,
        quantization: Quantization = "none",
    ):
        self._model = model
        self._tokenizer = tokenizer
        self._codec = codec
        self._tokens = ChatTokens.of(tokenizer)
        self._max_rows = max_rows
        self._quantization: Quantization = quantization
        self._engine: Engine | None = None
        self._speech: SpeechWorker | None = None
        self._making = threading.Lock()

    @property
    def max_rows(self) -> int | None:
        """Replies at once; None: 8, or as many as fit a GPU. Fixed once the engine is made.

        Raises:
            ValueError: the engine has another number of rows already.
        """
        return self._max_rows

    @max_rows.setter
    def max_rows(self, rows: int | None) -> None:
        with self._making:
            if self._engine is not None and rows != self._max_rows:
                made = f"the engine was made with {self._max_rows} rows at its first use"
                raise ValueError(f"max_rows={rows}: {made}; set it before, or open the model again")
            self._max_rows = rows

    @property
    def engine(self) -> Engine:
        """The engine, made at the first use."""
        with self._making:
            if self._engine is None:
                length = min(num_positions(self._model.config), LONGEST)
                self._max_rows = self._rows(length)
                self._engine = Engine(
                    self._model,
                    max_rows=self._max_rows,
                    max_length=length,
                    speech=AudioRows(self._tokens.begin, self._tokens.end),
                    quantization=self._quantization,
                    free=self._quantization != "none",
                )
            return self._engine

    @property
    def speech(self) -> SpeechWorker:
        """The worker that decodes streamed replies, made at the first use."""
        with self._making:
            if self._speech is None:
                self._speech = SpeechWorker(self._codec, threaded=self._codec.device.type == "cuda")
            return self._speech

    def stream_many(self, requests: Sequence[Request]) -> Generator[tuple[int, Event], None, None]:
        """See :meth:`Backend.stream_many`. Each request has its own options."""
        replies: list[ReplyAssembly] = []
        handles: list[Handle] = []
        try:
            options = [self._resolved(request) for request in requests]
            prepared = [self._request(request, each) for request, each in zip(requests, options, strict=True)]
            for request, each in zip(requests, options, strict=True):
                speech = self.speech.open() if request.sound == "streamed" else None
                replies.append(ReplyAssembly(request, each, self._tokenizer, self._codec, speech))
            handles += [self.engine.submit(each) for each in prepared]
            open_replies = set(range(len(handles)))
            while open_replies:
                happened = False
                for index in sorted(open_replies):
                    for event in self._news(handles[index], replies[index]):
                        happened = True
                        yield index, event
                    if replies[index].ended:
                        open_replies.discard(index)
                if not happened and open_replies:
                    self._advance([(handles[index], replies[index]) for index in open_replies])
        finally:
            for handle in handles:
                if handle.finished is None:
                    handle.cancel()
            for reply in replies:
                reply.cancel()

    def tokens(self, request: Request) -> Generator[int, None, None]:
        """See :meth:`Backend.tokens`."""
        handle = self.engine.submit(self._request(request, self._resolved(request)))
        with closing(iter(handle)) as events:
            for event in events:
                if isinstance(event, Tokens):
                    yield from event.ids

    def _news(self, handle: Handle, reply: ReplyAssembly) -> Iterator[Event]:
        """The events of a reply that are ready; its end once all its sound is decoded."""
        while (news := handle.pop()) is not None:
            if isinstance(news, Finished):
                yield from reply.finish(news.stats)
            else:
                now = time.perf_counter()
                for token in news.ids:
                    yield from reply.push(token, now, token in self._tokens.stops)
        yield from reply.heard()
        if handle.finished is not None and not handle.has_events and not reply.speaking:
            yield from reply.end()

    def _advance(self, made: Sequence[tuple[Handle, ReplyAssembly]]) -> None:
        """Decode speech that is due, else run a round; where others do both, wait for them."""
        if self.speech_step():
            return
        waiting = [handle for handle, _ in made if handle.finished is None]
        if waiting:
            self.engine.wait(*waiting)
        elif all(reply.finished for _, reply in made):  # another thread decodes the rest
            self.speech.wait([reply.speech for _, reply in made if reply.speech is not None])

    def speech_step(self) -> bool:
        """Decode one chunk in this thread, if the codec has none of its own. Returns whether one was due."""
        return self._speech is not None and not self._speech.threaded and self._speech.step()

    def _resolved(self, request: Request) -> GenerationOptions:
        num_heads = self._model.config.num_nextn_predict_layers
        return request.options.resolved(self._model.generation_config, num_heads)

    def _request(self, request: Request, options: GenerationOptions) -> EngineRequest:
        """The same request as the engine's."""
        check_length(self._model.config, len(request.prompt.input_ids), options.max_new_tokens)
        if options.do_sample and not (options.temperature or 0) > 0:
            raise ValueError(f"temperature={options.temperature}: give a number above 0")
        return EngineRequest(
            prompt=[int(token) for token in request.prompt.input_ids],
            schedule=options.schedule,
            sampling=Sampling(
                do_sample=bool(options.do_sample),
                temperature=_number(options.temperature, 1.0) if options.do_sample else 1.0,
                top_k=int(_number(options.top_k, 0)),
                top_p=_number(options.top_p, 1.0),
                repetition_penalty=_number(options.repetition_penalty, 1.0),
                seed=options.seed,
            ),
            lossless=options.lossless,
            audio_rows=options.audio_rows,
            max_new_tokens=options.max_new_tokens,
            stop_tokens=self._tokens.stops,
            embeds=self._embeds(request.prompt),
            session=request.session,
        )

    @torch.inference_mode()
    def _embeds(self, prompt: Example) -> Tensor | None:
        """Inputs (time, d) of a prompt that holds continuous speech; None for plain token embeddings."""
        if not prompt.features:
            return None
        batch = collate_prompts([prompt], self._tokens.pad, self._model.device)
        model: Any = self._model
        embeds: Tensor = model.embed_inputs(
            batch["inputs"], audios=batch["audios"], audio_indices=batch["audio_indices"]
        )
        return embeds[0]

    def _rows(self, length: int) -> int:
        if self._max_rows is not None or self._model.device.type != "cuda":
            return self._max_rows or MOST_ROWS
        free, _ = torch.cuda.mem_get_info(self._model.device)
        return max(1, min(MOST_ROWS, int(free * SHARE_OF_GPU / row_bytes(self._model, length))))


def _number(value: float | None, default: float) -> float:
    return default if value is None else value
