"""Options of the server; every limit of a request is here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServeOptions:
    """How the server listens, and what it accepts.

    Attributes:
        host: address to listen on; the default is reachable from this machine only.
        port: port to listen on; 0 takes a free one.
        served_name: name of the model for clients; defaults to the checkpoint's folder.
        voices_dir: folder of voice prompts; each sound file is a voice of its name.
        api_key_file: file of accepted API keys, one a line; without it no key is needed.
        cors_origins: origins of web pages that may use the server, besides its own page.
        slots: replies at once.
        queue: requests that may wait for a slot; more are refused.
        sessions_per_key: open realtime connections of one API key, or of all clients if there are no keys.
        body_megabytes: largest body of a request, in MB.
        audio_seconds: longest clip, in seconds.
        text_characters: longest text of a request.
        new_tokens: longest reply, in tokens; a request may ask for fewer.
        reply_seconds: longest time that a request may take.
        idle_seconds: a realtime connection without any event is closed after this time.
        session_seconds: longest realtime connection.
        drain_seconds: longest wait for running replies before the server ends.
        log_content: write the text of requests and replies to the log.

    Raises:
        ValueError: a number is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_name: str | None = None
    voices_dir: Path | None = None
    api_key_file: Path | None = None
    cors_origins: list[str] = field(default_factory=list)
    slots: int = 8
    queue: int = 32
    sessions_per_key: int = 32
    body_megabytes: float = 25.0
    audio_seconds: float = 120.0
    text_characters: int = 4096
    new_tokens: int = 1024
    reply_seconds: float = 120.0
    idle_seconds: float = 300.0
    session_seconds: float = 3600.0
    drain_seconds: float = 30.0
    log_content: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port}: give 0 to 65535")
        for entry in fields(self):
            value, least = getattr(self, entry.name), 0 if entry.name in ("queue", "port") else 1
            if entry.type == "int" and value < least:
                raise ValueError(f"{entry.name}={value}: give {least} or more")
            if entry.type == "float" and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{entry.name}={value}: give a number above 0")

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK

    @property
    def url(self) -> str:
        """The address for clients on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def body_bytes(self) -> int:
        """Largest body of a request, in bytes."""
        return int(self.body_megabytes * 1_000_000)


@dataclass(frozen=True)
class Scale:
    """How many servers run on Ray.

    Attributes:
        replicas: servers at the least.
        most_replicas: servers at the most; defaults to ``replicas``. Ray starts and ends them so that each has
            ``slots`` requests and conversations on average, those that wait included.
        grow_seconds: another server is started when there were too few for this time.
        shrink_seconds: a server is ended when there were too many for this time.
        gpus_per_replica: GPUs that Ray reserves for a server.
        cpus_per_replica: CPU cores that Ray reserves for a server.
        revision: any text; another one replaces all servers in turn, for example after the weights have changed.

    Raises:
        ValueError: a number is out of range.
    """

    replicas: int = 1
    most_replicas: int | None = None
    grow_seconds: float = 30.0
    shrink_seconds: float = 600.0
    gpus_per_replica: float = 0.0
    cpus_per_replica: float = 1.0
    revision: str = ""

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"replicas={self.replicas}: give 1 or more")
        if self.most_replicas is not None and self.most_replicas < self.replicas:
            raise ValueError(
                f"most_replicas={self.most_replicas}: give {self.replicas} or more, as replicas says"
            )
        for name in ("grow_seconds", "shrink_seconds", "gpus_per_replica", "cpus_per_replica"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 or more")


def read_keys(file: Path | None) -> tuple[str, ...]:
    """The API keys of a file, one a line; blank lines and lines that begin with ``#`` do not count.

    Raises:
        ValueError: the file holds no key.
        OSError: it cannot be read.
    """
    if file is None:
        return ()
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"{file}: holds no API key; write one a line")
    return keys
