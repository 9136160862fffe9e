"""The cost of the GLM-4-Voice codec, and the savings from streaming state.

Everything runs at the released sizes with random weights, since time does not depend on their values;
``--flow FOLDER`` uses the decoder in a folder instead (and skips the encoder).

1. Encode, and decode with 1 and 10 solver steps: real-time factors (seconds of computation per second of speech).
2. First chunk: ten codes to the first samples, through a stream and without one.
3. A reply of 60 s through a stream with a bounded prompt window: the time of each chunk, whose
   least-squares slope over the chunks shows that the cost does not grow.
4. The same reply decoded as the public demo does it: at every tenth code, decode everything from the
   beginning and play the new part, with 1, 3, 5, ... solver steps. One decode costs (flow step) * steps +
   vocoder; both parts are measured at several lengths, interpolated between them and summed over the
   demo's prefixes, because running all of them would take an hour.

``--max_steps`` caps the solver steps of parts 3 and 4, so they take only minutes on a CPU; the
totals of the full schedules follow from it by adding the missing flow steps, whose time was measured.
``--clock process`` measures the processor time of one thread, for machines with other load.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

from vita_audio.audio.glm4voice import (
    FlowDecoder,
    NoiseSource,
    StreamingDecoder,
    StreamState,
    Vocoder,
    VQEncoder,
)
from vita_audio.audio.glm4voice.config import FlowConfig, VocoderConfig
from vita_audio.audio.glm4voice.streaming import StreamSchedule
from vita_audio.audio.glm4voice.vq_encoder import SAMPLE_RATE, released_config
from vita_audio.cli.arguments import command_parser

CODES_PER_SECOND = 12.5
MIN_SLOPE_POINTS = 4
DEMO_CHUNK = 10  # codes between two decodes of the public demo
DEMO_MAX_STEPS = 10
FLOW_LENGTHS = (10, 50, 150, 375, 750)
VOCODER_LENGTHS = (10, 50, 150)  # linear in length, so longer ones are extrapolated

console = Console()


@dataclass
class Chunk:
    """One decode of a stream: its size, its conditioning, the requested and executed steps, and its time."""

    codes: int
    prompt_codes: int
    full_steps: int
    steps: int
    seconds: float


def main(argv: list[str]) -> None:
    arguments = _parse(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    clock = time.process_time if arguments.clock == "process" else time.perf_counter
    bench = CodecBenchmark(arguments, clock)
    results = {"threads": arguments.threads, "clock": arguments.clock, "max_steps": arguments.max_steps}
    if not arguments.only_stream:
        results |= bench.offline()
    streamed, chunks = bench.stream()
    results |= streamed | bench.without_state(chunks)
    results |= bench.window_difference()
    print(json.dumps(results))


class CodecBenchmark:
    """The parts of the benchmark; each prints its table and returns its figures."""

    def __init__(self, arguments: argparse.Namespace, clock: Callable[[], float]):
        self.codes_total = int(arguments.seconds * CODES_PER_SECOND)
        self.max_steps = arguments.max_steps
        self.device = torch.device(arguments.device)
        self.clock = clock
        self.random_weights = arguments.flow is None
        if self.random_weights:
            self.flow = FlowDecoder(FlowConfig()).to(self.device)
            self.vocoder = Vocoder(VocoderConfig()).fold_weight_norm().to(self.device)
        else:
            self.flow = FlowDecoder.from_pretrained(arguments.flow, device=self.device)
            self.vocoder = Vocoder.from_pretrained(arguments.flow, device=self.device)
        self._decode(10, steps=1)  # warm up

    def offline(self) -> dict[str, float]:
        """Encoding and offline decoding."""
        results, table = {}, Table("work", "figure", title=f"Offline, {self.device}")
        if self.random_weights:
            results["encode_rtf"] = self._encode_factor()
            table.add_row("encode 10 s", f"real-time factor {results['encode_rtf']:.3f}")
        for steps in (1, 10):
            results[f"decode_{steps}_rtf"] = self._time(lambda steps=steps: self._decode(50, steps)) / 4
        decoder = StreamingDecoder(self.flow, self.vocoder, StreamSchedule().prompt_tokens)
        first_steps = StreamSchedule()[0][1]
        results["first_chunk_s"] = self._time(
            lambda: decoder.decode([StreamState()], [self._codes(10)], [False], first_steps)
        )
        results["first_chunk_10_steps_s"] = self._time(
            lambda: decoder.decode([StreamState()], [self._codes(10)], [False], 10)
        )
        results["first_chunk_without_state_s"] = self._time(lambda: self._decode(10, 1))
        table.add_row("decode 4 s, 1 step", f"real-time factor {results['decode_1_rtf']:.3f}")
        table.add_row("decode 4 s, 10 steps", f"real-time factor {results['decode_10_rtf']:.3f}")
        table.add_row(
            f"first chunk of 10 codes, stream, {first_steps} step", f"{results['first_chunk_s']:.2f} s"
        )
        table.add_row(
            "first chunk of 10 codes, stream, 10 steps", f"{results['first_chunk_10_steps_s']:.2f} s"
        )
        table.add_row(
            "first chunk of 10 codes, no state, 1 step", f"{results['first_chunk_without_state_s']:.2f} s"
        )
        console.print(table)
        return results

    def stream(self) -> tuple[dict[str, float], list[Chunk]]:
        """A whole reply through a stream; the time of each full-size chunk against its number."""
        schedule = StreamSchedule()
        decoder = StreamingDecoder(self.flow, self.vocoder, schedule.prompt_tokens)
        state, chunks, waves, done = StreamState(), [], [], 0
        with Progress(console=console) as progress:
            task = progress.add_task("streaming", total=self.codes_total)
            while done < self.codes_total:
                size, full_steps = schedule[len(chunks)]
                codes, steps = (
                    self._codes(min(size, self.codes_total - done)),
                    min(full_steps, self.max_steps),
                )
                prompt = len(state.tokens)
                start = self.clock()
                (output,) = decoder.decode([state], [codes], [done + size >= self.codes_total], steps)
                chunks.append(Chunk(len(codes), prompt, full_steps, steps, self.clock() - start))
                waves.append(output.wave)
                done += size
                progress.advance(task, size)
        table = Table("chunk", "codes", "prompt codes", "steps", "time (s)", title="Stream, bounded window")
        for index, chunk in enumerate(chunks):
            row = (index, chunk.codes, chunk.prompt_codes, chunk.steps)
            table.add_row(*map(str, row), f"{chunk.seconds:.2f}")
        console.print(table)
        # The last chunk also flushes the overlap; the others of full size are the same work.
        steady = [chunk.seconds for chunk in chunks[:-1] if chunk.codes == schedule.chunks[-1][0]]
        inside = max(float(wave.diff().abs().max()) for wave in waves)
        seams = max(abs(float(b[0] - a[-1])) for a, b in pairwise(waves))
        console.print(f"largest jump at a seam {seams:.4f}, inside chunks {inside:.4f}")
        results = {"jump_at_seams": seams, "jump_inside": inside}
        if len(steady) >= MIN_SLOPE_POINTS:
            slope, error = _slope(steady)
            console.print(
                f"slope over {len(steady)} full-size chunks: {1000 * slope:+.1f} ± {1000 * error:.1f} ms "
                f"per chunk, {slope / np.mean(steady):+.2%} of the mean chunk"
            )
            results |= {"slope_ms_per_chunk": 1000 * slope, "slope_error_ms": 1000 * error}
            results |= {"steady_chunk_s": float(np.mean(steady))}
        return results, chunks

    def without_state(self, chunks: list[Chunk]) -> dict[str, float]:
        """Total work of decoding everything again at every chunk, from measured parts, compared with the stream's."""
        lengths = sorted({min(length, self.codes_total) for length in FLOW_LENGTHS} | {self.codes_total})
        seconds = [
            self._time(lambda length=length: self._mel(length, 1))
            for length in track(lengths, "flow", console=console)
        ]
        mels = [
            torch.randn(1, 80, self.flow.frames(length), device=self.device) for length in VOCODER_LENGTHS
        ]
        vocoder_seconds = [self._time(lambda mel=mel: self.vocoder(mel)) for mel in mels]
        slope, offset = np.polyfit(VOCODER_LENGTHS, vocoder_seconds, 1)

        def flow_step(codes: int) -> float:
            return float(np.interp(codes, lengths, seconds))

        def missing(chunk: Chunk) -> float:
            return (chunk.full_steps - chunk.steps) * flow_step(chunk.codes + chunk.prompt_codes)

        work = {"again": [0.0, 0.0]}
        for index, prefix in enumerate(range(DEMO_CHUNK, self.codes_total + 1, DEMO_CHUNK)):
            full = min(1 + 2 * index, DEMO_MAX_STEPS)
            for column, steps in enumerate((min(full, self.max_steps), full)):
                work["again"][column] += steps * flow_step(prefix) + slope * prefix + offset
        small, count = self._small_chunk(), self.codes_total / DEMO_CHUNK
        work["by ten"] = [count * small.seconds, count * (small.seconds + missing(small))]
        measured = sum(chunk.seconds for chunk in chunks)
        work["growing"] = [measured, measured + sum(map(missing, chunks))]

        names = {
            "again": "everything again at every tenth code (summed)",
            "by ten": "stream, chunks of ten codes (one measured, times their number)",
            "growing": "stream, growing chunks (measured)",
        }
        table = Table("decoding the reply", "work (s)", "times less", "work, full steps (s)", "times less")
        for key, name in names.items():
            row = [name]
            for column in (0, 1):
                row += [f"{work[key][column]:.0f}", f"{work['again'][column] / work[key][column]:.1f}"]
            table.add_row(*row)
        console.print(table)
        flow_text = ", ".join(f"{n} codes {s:.2f} s" for n, s in zip(lengths, seconds, strict=True))
        console.print(
            f"steps capped at {self.max_steps} in the first two columns; one flow step: {flow_text}; "
            f"vocoder: {1000 * slope:.1f} ms per code"
        )
        return {
            f"{name.replace(' ', '_')}_{steps}_s": work[name][column]
            for name in names
            for column, steps in enumerate(("capped", "full"))
        }

    def window_difference(self, codes: int = 90, chunk: int = 30) -> dict[str, float]:
        """Distance between the mels of a bounded and the unbounded window, in units of the mel's deviation."""
        tokens, window = self._codes(codes), StreamSchedule().prompt_tokens
        mels = []
        for prompt_tokens in (None, window):
            decoder = StreamingDecoder(self.flow, self.vocoder, prompt_tokens)
            state = StreamState(_FrameNoise())
            outputs = [
                decoder.decode([state], [tokens[i : i + chunk]], [i + chunk >= codes], steps=1)[0]
                for i in range(0, codes, chunk)
            ]
            mels.append(torch.cat([output.mel for output in outputs], dim=1))
        unbounded, bounded = mels
        difference = float((bounded - unbounded).square().mean().sqrt() / unbounded.std())
        console.print(
            f"a window of {window} codes moves the mel of {codes} codes by {difference:.4f} of its deviation (RMS)"
        )
        return {"window_mel_difference": difference}

    def _encode_factor(self) -> float:
        encoder = VQEncoder(released_config()).to(self.device)
        speech = 0.1 * torch.randn(10 * SAMPLE_RATE)
        encoder.encode([speech[:SAMPLE_RATE]])  # warm up
        return self._time(lambda: encoder.encode([speech])) / 10

    def _small_chunk(self) -> Chunk:
        """One chunk of ten codes in the middle of a reply."""
        window = StreamSchedule().prompt_tokens
        decoder, state = StreamingDecoder(self.flow, self.vocoder, window), StreamState()
        decoder.decode([state], [self._codes(window)], [False], 1)
        steps, codes = min(DEMO_MAX_STEPS, self.max_steps), self._codes(DEMO_CHUNK)
        seconds = self._time(lambda: decoder.decode([state], [codes], [False], steps))
        return Chunk(DEMO_CHUNK, window, DEMO_MAX_STEPS, steps, seconds)

    def _decode(self, codes: int, steps: int) -> None:
        self.vocoder(self._mel(codes, steps))

    def _mel(self, codes: int, steps: int) -> torch.Tensor:
        return self.flow(self._codes(codes), steps=steps)

    def _codes(self, count: int) -> torch.Tensor:
        return torch.randint(0, self.flow.config.vocab_size, (count,))

    def _time(self, work: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = self.clock()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock() - start


class _FrameNoise(NoiseSource):
    """Noise tied to frames of the reply, so two windows start from the same numbers."""

    def mel(self, bins: int, start: int, frames: int) -> torch.Tensor:
        whole = torch.randn(start + frames, bins, generator=torch.Generator().manual_seed(0))
        return whole[start:].T


def _slope(seconds: list[float]) -> tuple[float, float]:
    """Least-squares slope over the chunk number, and its standard error."""
    (slope, _), covariance = np.polyfit(np.arange(len(seconds)), seconds, 1, cov=True)
    return float(slope), float(np.sqrt(covariance[0, 0]))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = command_parser(__doc__, prog="benchmark.py codec")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the reply")
    parser.add_argument("--max_steps", type=int, default=1, help="cap on solver steps, for both ways")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=("wall", "process"), default="wall")
    parser.add_argument(
        "--flow", help="folder of a decoder; without it, random weights of the released sizes"
    )
    parser.add_argument("--only_stream", action="store_true", help="skip the offline figures")
    arguments = parser.parse_args(argv)
    if arguments.clock == "process" and (arguments.threads != 1 or arguments.device != "cpu"):
        parser.error("--clock process needs --threads 1 on the cpu")
    return arguments
