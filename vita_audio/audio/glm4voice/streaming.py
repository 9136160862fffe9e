"""Streaming decoding of a reply (section 7 of the GLM-4-Voice specification).

Each chunk of codes is decoded with the preceding speech as the flow's prompt. Adjacent chunks share
34 mel frames that are cross-faded, and the vocoder starts from the previous chunk's last frame and the end of
its source. All of this state is kept in a :class:`StreamState` that the caller holds.

The reference keeps the whole history as the prompt, so chunk k costs k chunks. Here the prompt is the last
``prompt_tokens`` codes (cut at an attention block of the token encoder), so every chunk costs the same;
with ``prompt_tokens=None`` the window is unbounded and the results equal the reference's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vita_audio.audio.base import AudioStream, check_codes
from vita_audio.audio.glm4voice.flow import DEFAULT_SEED, FlowDecoder, FlowInput, draw_normal, nearest_indices
from vita_audio.audio.glm4voice.vocoder import Vocoder, draw_source

OVERLAP_TOKENS = 5
"""The mel frames of this many codes (34 frames) are held back and faded into the next chunk."""

_CACHED_FRAMES = 1  # mel frames, and their source samples, that the vocoder repeats at a seam


@dataclass(frozen=True)
class StreamSchedule:
    """How a reply is split into chunks, and how far each chunk looks back. First chunks are small and fast.

    Attributes:
        chunks: (codes, solver steps) of each chunk in turn; the last pair repeats. Defaults to the public demo's.
        prompt_tokens: codes of history that condition a chunk; None for all of them.
    """

    chunks: tuple[tuple[int, int], ...] = ((10, 1), (10, 3), (20, 5), (30, 7), (40, 9), (50, 10))
    prompt_tokens: int | None = 50

    def __post_init__(self) -> None:
        if not self.chunks or any(size < 1 or steps < 1 for size, steps in self.chunks):
            raise ValueError(f"schedule chunks must be pairs of positive (codes, steps), got {self.chunks}")
        if self.chunks[0][0] <= OVERLAP_TOKENS:
            raise ValueError(
                f"the first chunk needs more than {OVERLAP_TOKENS} codes, got {self.chunks[0][0]}"
            )
        if self.prompt_tokens is not None and self.prompt_tokens <= OVERLAP_TOKENS:
            raise ValueError(f"prompt_tokens must exceed {OVERLAP_TOKENS}, got {self.prompt_tokens}")

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(codes, steps) of chunk ``index``."""
        return self.chunks[min(index, len(self.chunks) - 1)]


REPLY_SCHEDULE = StreamSchedule(((8, 1), (8, 3), (16, 5), (24, 7), (32, 9), (48, 10)))
"""The default of a codec. The model speaks in groups of eight codes, so a chunk is full when a group is complete."""


class NoiseSource:
    """Random numbers of one stream, in the reference's order: the mel's noise, phases, the source's noise.

    Args:
        generator: their source; None for a new one per chunk, seeded with 42, as in the
            reference. Override the methods to inject recorded numbers.
    """

    def __init__(self, generator: torch.Generator | None = None):
        self._given = generator
        self._current = generator

    def saved(self) -> Callable[[], None]:
        """A function that takes back all draws from now on."""
        generator, drawn = self._given, None if self._given is None else self._given.get_state()

        def restore() -> None:
            if generator is not None and drawn is not None:
                generator.set_state(drawn)

        return restore

    def begin_chunk(self) -> None:
        """Called before each chunk's draws."""
        self._current = self._given or torch.Generator().manual_seed(DEFAULT_SEED)

    def mel(self, bins: int, start: int, frames: int) -> Tensor:
        """The solver's initial noise, (bins, frames); frame 0 is frame ``start`` of the whole reply."""
        return draw_normal((1, bins, frames), self._current)[0]

    def source(self, harmonics: int, samples: int) -> tuple[Tensor, Tensor]:
        """Phases (harmonics, 1) and noise (harmonics, samples) of the vocoder."""
        phase, noise = draw_source(1, harmonics, samples, self._current)
        return phase[0], noise[0]


@dataclass
class StreamState:
    """The state that is kept between the chunks of one reply.

    Attributes:
        noise: source of the reply's random numbers.
        tokens: codes of the prompt window, (kept,).
        mel: the mel returned for them, (80, kept frames); see :attr:`StreamChunk.mel`.
        total_tokens: codes of the whole reply so far.
        total_frames: mel frames returned so far.
        overlap: frames held back for the fade, (80, 34).
        cached_mel: last returned frame, (80, 1).
        cached_source: last source samples, (256,).
    """

    noise: NoiseSource = field(default_factory=NoiseSource)
    tokens: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    mel: Tensor | None = None
    total_tokens: int = 0
    total_frames: int = 0
    overlap: Tensor | None = None
    cached_mel: Tensor | None = None
    cached_source: Tensor | None = None

    def reset(self) -> None:
        """Discard the reply; the noise source continues."""
        fresh = StreamState(self.noise)
        self.__dict__.update(fresh.__dict__)


@dataclass
class StreamChunk:
    """Output of one chunk.

    Attributes:
        wave: new samples, (samples,).
        mel: the vocoder's input, with the repeated frame and without the overlap, (80, frames).
    """

    wave: Tensor
    mel: Tensor


class StreamingDecoder:
    """Flow and vocoder for streams; their states belong to the caller."""

    def __init__(self, flow: FlowDecoder, vocoder: Vocoder, prompt_tokens: int | None = None):
        self.flow = flow
        self.vocoder = vocoder
        self.prompt_tokens = prompt_tokens
        self.overlap_frames = flow.frames(OVERLAP_TOKENS)
        self.cached_samples = _CACHED_FRAMES * vocoder.samples_per_frame
        # Symmetric Hamming window, as in the reference: first half fades in, second half out.
        window = torch.hamming_window(2 * self.overlap_frames, periodic=False, dtype=torch.float64)
        self._fade_in, self._fade_out = window.chunk(2)

    @torch.no_grad()
    def decode(
        self,
        states: Sequence[StreamState],
        chunks: Sequence[Tensor],
        last: Sequence[bool],
        steps: int = 10,
    ) -> list[StreamChunk]:
        """The next chunk of several replies in one batch; lengths may differ.

        Args:
            states: one per reply, updated in place.
            chunks: new codes of each, (codes,), long; may be empty only if ``last``.
            last: whether each reply ends with its chunk.
            steps: solver steps, for all.

        Raises:
            ValueError: a reply's first chunk is too short to hold back the overlap.
        """
        for state in states:
            state.noise.begin_chunk()
        mels = self._mels(states, chunks, steps)
        vocoded: list[tuple[Tensor, Tensor | None]] = []
        for state, mel, final in zip(states, mels, last, strict=True):
            if state.overlap is not None:
                mel = self._faded(mel, state.overlap) if mel.shape[1] else state.overlap
            if not final and mel.shape[1] <= self.overlap_frames:
                raise ValueError(
                    f"a first chunk of {mel.shape[1]} mel frames is too short; "
                    f"give more than {OVERLAP_TOKENS} codes"
                )
            if state.cached_mel is not None:
                mel = torch.cat([state.cached_mel, mel], dim=1)
            keep = mel.shape[1] - (0 if final else self.overlap_frames)
            vocoded.append((mel[:, :keep], None if final else mel[:, keep:]))
        sounds = [self._vocode(state, mel) for state, (mel, _) in zip(states, vocoded, strict=True)]
        return [
            self._advance(*arguments) for arguments in zip(states, chunks, vocoded, sounds, last, strict=True)
        ]

    def _mels(self, states: Sequence[StreamState], chunks: Sequence[Tensor], steps: int) -> list[Tensor]:
        """New mel of each reply, (80, frames); none for a reply without new codes."""
        bins = self.flow.config.output_size
        inputs = {
            index: self._flow_input(state, chunk)
            for index, (state, chunk) in enumerate(zip(states, chunks, strict=True))
            if len(chunk)
        }
        mels = [torch.zeros(bins, 0, device=self.flow.device) for _ in states]
        if inputs:
            for index, mel in zip(inputs, self.flow.generate(list(inputs.values()), steps), strict=True):
                mels[index] = mel
        return mels

    def _flow_input(self, state: StreamState, chunk: Tensor) -> FlowInput:
        """The right end of the unbounded stream's input to the flow, as wide as the kept codes."""
        tokens = torch.cat([state.tokens, chunk])
        total_tokens = state.total_tokens + len(chunk)
        total_frames = self.flow.frames(total_tokens)
        skipped = total_tokens - len(tokens)
        start = self._frame_grid(skipped)
        sources = (nearest_indices(total_tokens, total_frames, start) - skipped).clamp(min=0)
        known = state.total_frames - start
        bins = self.flow.config.output_size
        prompt = torch.zeros(bins, 0) if state.mel is None else state.mel[:, state.mel.shape[1] - known :]
        return FlowInput(tokens, sources, state.noise.mel(bins, start, len(sources)), prompt)

    def _frame_grid(self, tokens: int) -> int:
        """A frame at which a window may start after this many codes: one where the UNet's strides align."""
        stride = 2 ** (len(self.flow.config.estimator.channels) - 1)
        return self.flow.frames(tokens) // stride * stride

    def _faded(self, mel: Tensor, overlap: Tensor) -> Tensor:
        """The first frames of ``mel`` faded in over those held back."""
        start = mel[:, : self.overlap_frames] * self._fade_in.to(mel.device)
        mixed = start + overlap * self._fade_out.to(mel.device)
        return torch.cat([mixed.to(mel.dtype), mel[:, self.overlap_frames :]], dim=1)

    def _vocode(self, state: StreamState, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Waveform and source of one reply's mel.

        Replies do not share passes here: the vocoder integrates the pitch, so the rounding of another batch shape would
        grow to an audible phase, and one reply fills a device well enough.
        """
        frames = mel.shape[1]
        if frames == 0:
            return mel.new_zeros(0), mel.new_zeros(0)
        harmonics = self.vocoder.config.nb_harmonics + 1
        phase, noise = state.noise.source(harmonics, frames * self.vocoder.samples_per_frame)
        cached = None if state.cached_source is None else state.cached_source[None, None]
        wave, source = self.vocoder(mel[None], cached, phase=phase[None], noise=noise[None])
        return wave[0], source[0, 0]

    def _advance(
        self,
        state: StreamState,
        chunk: Tensor,
        vocoded: tuple[Tensor, Tensor | None],
        sound: tuple[Tensor, Tensor],
        final: bool,
    ) -> StreamChunk:
        """Update the state for the next chunk. Returns the newly final output."""
        (mel, overlap), (wave, source) = vocoded, sound
        if final:
            state.reset()
            return StreamChunk(wave.cpu(), mel.cpu())
        state.overlap, state.cached_mel = overlap, mel[:, -_CACHED_FRAMES:]
        state.cached_source = source[-self.cached_samples :]
        state.total_tokens += len(chunk)
        state.total_frames += mel.shape[1]
        state.tokens = torch.cat([state.tokens, chunk])
        state.mel = mel if state.mel is None else torch.cat([state.mel, mel], dim=1)
        if self.prompt_tokens is not None:
            block = self.flow.config.encoder.block_size
            start = max(0, state.total_tokens - self.prompt_tokens) // block * block
            state.tokens = state.tokens[len(state.tokens) - (state.total_tokens - start) :]
            kept_frames = state.total_frames - self._frame_grid(start)
            state.mel = state.mel[:, state.mel.shape[1] - kept_frames :]
        return StreamChunk(wave[: -self.cached_samples].cpu(), mel.cpu())


class GLM4VoiceStream(AudioStream):
    """One reply: collects codes until the schedule's next chunk is full, then decodes it."""

    def __init__(
        self,
        decoder: StreamingDecoder,
        schedule: StreamSchedule,
        generator: torch.Generator | None = None,
    ):
        self.decoder = decoder
        self.schedule = schedule
        self.state = StreamState(NoiseSource(generator))
        self.pending: list[int] = []
        self.chunks_done = 0
        self.ending = False

    def push(self, tokens: Sequence[int], last: bool = False) -> Tensor:
        """See :meth:`AudioStream.push`; returns no samples until the first chunk is full."""
        return push_many([self], [tokens], [last])[0]

    @property
    def missing(self) -> int:
        """See :attr:`AudioStream.missing`."""
        return self.schedule[self.chunks_done][0] - len(self.pending)

    @property
    def pass_key(self) -> tuple[int, int | None]:
        """Solver steps and prompt window of the next chunk; chunks of equal keys share passes."""
        return self.schedule[self.chunks_done][1], self.decoder.prompt_tokens

    def saved(self) -> Callable[[], None]:
        """A function that restores the stream as it is now."""
        mine, state = {**self.__dict__, "pending": [*self.pending]}, dict(self.state.__dict__)
        undo_draws = self.state.noise.saved()

        def restore() -> None:
            self.__dict__.update(mine)
            self.state.__dict__.update(state)
            undo_draws()

        return restore

    def _next_chunk(self) -> tuple[Tensor, bool] | None:
        """Codes of the next chunk that is due, if any, and whether it is the last."""
        size, _ = self.schedule[self.chunks_done]
        final = self.ending and len(self.pending) <= size
        if len(self.pending) < size and not final:
            return None
        codes, self.pending = self.pending[:size], self.pending[size:]
        self.chunks_done += 1
        if final:
            self.ending, self.chunks_done = False, 0
        return torch.tensor(codes, dtype=torch.long), final


def push_many(
    streams: Sequence[GLM4VoiceStream], tokens: Sequence[Sequence[int]], last: Sequence[bool]
) -> list[Tensor]:
    """:meth:`GLM4VoiceStream.push` for several streams of one decoder, in shared passes.

    Args:
        streams: distinct streams of the same codec.
        tokens: next codes of each.
        last: whether each reply ends here.

    Returns:
        New samples of each, (samples,). They do not depend on the other streams, see :meth:`FlowDecoder.generate`.

    Raises:
        ValueError: a code is outside the vocabulary. After this or any other error the streams are unchanged.
    """
    for stream, codes in zip(streams, tokens, strict=True):
        check_codes(codes, stream.decoder.flow.config.vocab_size)
    before = [stream.saved() for stream in streams]
    try:
        for stream, codes, final in zip(streams, tokens, last, strict=True):
            stream.pending += [int(code) for code in codes]
            stream.ending = bool(final)
        return _decode_due(streams)
    except BaseException:
        for restore in before:
            restore()
        raise


@torch.no_grad()
def _decode_due(streams: Sequence[GLM4VoiceStream]) -> list[Tensor]:
    """Decode every chunk that is due. Returns the new samples of each stream."""
    waves: list[list[Tensor]] = [[] for _ in streams]
    while True:
        # Chunks with equal solver steps and prompt windows are decoded together.
        due: dict[tuple[int, int | None], list[tuple[int, Tensor, bool]]] = defaultdict(list)
        for index, stream in enumerate(streams):
            key = stream.pass_key
            chunk = stream._next_chunk()
            if chunk is not None:
                due[key].append((index, *chunk))
        if not due:
            return [torch.cat([torch.empty(0), *parts]) for parts in waves]
        for (steps, _), members in due.items():
            indices, codes, finals = zip(*members, strict=True)
            decoder = streams[indices[0]].decoder
            outputs = decoder.decode([streams[i].state for i in indices], codes, finals, steps)
            for index, output in zip(indices, outputs, strict=True):
                waves[index].append(output.wave.float())
