"""What the server measures, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vita_audio.inference import AudioChunk, Reply

_SECONDS = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)
_SPEEDS = (10, 20, 50, 100, 200, 300, 500, 750, 1000, 2000, 5000)


class Metrics:
    """Counters of one server; :meth:`text` is the page that Prometheus reads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "vita_audio_requests_total", "Requests by address and status", ["path", "status"], registry=self.registry
        )  # fmt: skip
        self.replies = Counter(
            "vita_audio_replies_total", "Replies by how they ended", ["outcome"], registry=self.registry
        )
        self.tokens = Counter("vita_audio_tokens_total", "Tokens generated", registry=self.registry)
        self.sound = Counter("vita_audio_sound_seconds_total", "Speech sent", registry=self.registry)
        self.underruns = Counter(
            "vita_audio_underruns_total", "Pauses of a player that plays as sound comes", registry=self.registry
        )  # fmt: skip
        self.first_chunk = self._histogram("first_chunk", "From the request to its first codes", _SECONDS)
        self.first_sound = self._histogram("first_sound", "From the request to its first sound", _SECONDS)
        self.speed = Histogram(
            "vita_audio_tokens_per_second", "Speed of a reply", buckets=_SPEEDS, registry=self.registry
        )
        self.slots = self._gauge("slots_used", "Replies that are being generated")
        self.waiting = self._gauge("queue", "Requests that wait for a slot")
        self.sessions = self._gauge("sessions", "Open realtime connections")

    def observe(self, reply: Reply) -> None:
        """Record a complete reply."""
        timings = reply.timings
        self.tokens.inc(timings.new_tokens)
        self.speed.observe(timings.tokens_per_second)
        if timings.first_chunk is not None:
            self.first_chunk.observe(timings.first_chunk)
        if timings.first_sound is not None:
            self.first_sound.observe(timings.first_sound)
        if reply.waveform is not None:
            self.sound.inc(len(reply.waveform) / reply.sample_rate)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vita_audio_{name}_seconds", what, buckets=buckets, registry=self.registry)

    def _gauge(self, name: str, what: str) -> Gauge:
        return Gauge(f"vita_audio_{name}", what, registry=self.registry)


class Player:
    """Counts the pauses of a player that begins with the first sound and plays as it comes.

    Args:
        rate: of the samples, in Hz.
    """

    def __init__(self, rate: int):
        self._rate = rate
        self._ends: float | None = None
        self.underruns = 0

    def hear(self, chunk: AudioChunk) -> None:
        """The next chunk, at the time that it states."""
        if not len(chunk.samples):
            return
        if self._ends is not None and chunk.seconds > self._ends:
            self.underruns += 1
        begins = chunk.seconds if self._ends is None else max(self._ends, chunk.seconds)
        self._ends = begins + len(chunk.samples) / self._rate
