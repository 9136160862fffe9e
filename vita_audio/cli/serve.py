"""Serve a model: OpenAI's protocols over HTTP and websockets, and a page to talk to.

    python tools/serve.py --model_name_or_path DIR --audio_tokenizer_type mel_vq --audio_tokenizer_path DIR

Without a model it serves the quickstart's. The server listens on this machine only unless --host says otherwise;
give --api_key_file then. --ray runs several replicas, on one machine or many. SIGTERM or Ctrl-C lets running replies
end. docs/serving.md describes the protocols.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from vita_audio.cli.arguments import CODEC, RUNTIME, OptionGroup, command_parser
from vita_audio.extras import needs_extra
from vita_audio.inference import CodecOptions, SpeechPipeline
from vita_audio.serving import Service, create_app
from vita_audio.serving.config import Scale, ServeOptions, read_keys
from vita_audio.serving.server import Server

Paths = TypeVar("Paths", CodecOptions, ServeOptions)

SERVING = OptionGroup("server", ServeOptions)
SCALE = OptionGroup("Ray", Scale)

QUICKSTART = Path(__file__).resolve().parents[2] / "quickstart"
NO_MODEL = """\
serve needs a model: --model_name_or_path DIR --audio_tokenizer_type KIND --audio_tokenizer_path DIR [--flow_path DIR].
No weights yet? bash scripts/quickstart.sh trains a small model; after that no flag is needed. All flags: --help"""


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until a signal.

    Raises:
        ValueError: a folder, file, device or option cannot be used; the message is one line.
        OSError: the address cannot be used.
    """
    args = parse(argv)
    options = SERVING.read(args)
    keys = read_keys(options.api_key_file)
    folder, codec = choose_model(args)
    name = options.served_name or Path(folder).resolve().name
    if not options.on_loopback and not keys:
        print(
            "warning: everybody who reaches this address can use the server; see --api_key_file",
            file=sys.stderr,
        )
    if is_on_ray(args):
        serve_on_ray(args, folder, codec, welcome(options.url, name, bool(keys)))
        return
    leave_cores_free()
    pipeline = SpeechPipeline.open(folder, codec, RUNTIME.read(args))
    asyncio.run(serve(Service(pipeline, options, name), keys))


def web_demo(argv: Sequence[str] | None = None) -> None:
    """The same as :func:`main`, or with ``--gradio`` the pages of vita_audio/serving/demo.py.

    Raises:
        ValueError, OSError: as for :func:`main`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--gradio" not in words:
        main(words)
        return
    args = parse([word for word in words if word != "--gradio"])
    if is_on_ray(args):
        raise ValueError("--gradio: its pages do not run on Ray; leave out --ray and --ray_address")
    with needs_extra("demo"):
        from vita_audio.serving.demo import open_demo
    options = SERVING.read(args)
    folder, codec = choose_model(args)
    pipeline = SpeechPipeline.open(folder, codec, RUNTIME.read(args))
    with open_demo(pipeline, options, options.served_name or Path(folder).resolve().name) as address:
        print(f"pages for files: {address}", flush=True)
        wait_for_a_signal()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read a command line."""
    parser = command_parser(__doc__)
    parser.add_argument(
        "--model_name_or_path", metavar="DIR", help="checkpoint folder (default: the quickstart's)"
    )
    CODEC.add_to(parser)
    RUNTIME.add_to(parser)
    SERVING.add_to(parser)
    SCALE.add_to(parser)
    parser.add_argument("--ray", action="store_true", help="deploy on Ray Serve, started on this machine")
    parser.add_argument(
        "--ray_address", metavar="ADDRESS", help="deploy on this Ray cluster instead; auto finds it"
    )
    return parser.parse_args(argv)


def is_on_ray(args: argparse.Namespace) -> bool:
    """Whether replicas are deployed on Ray.

    Raises:
        ValueError: flags that Ray needs are missing, or there are flags that only Ray needs.
    """
    if args.ray or args.ray_address is not None:
        if args.port == 0:
            raise ValueError("port=0: Ray does not say which port is free; give a number")
        return True
    if SCALE.read(args) != Scale():
        raise ValueError("the number of replicas is Ray's; add --ray or --ray_address")
    return False


def choose_model(args: argparse.Namespace) -> tuple[str | Path, CodecOptions]:
    """The folder of the model, and its codec; the quickstart's if no model is given.

    Raises:
        SystemExit: there is no model.
    """
    if args.model_name_or_path is not None:
        return args.model_name_or_path, CODEC.read(args)
    model = QUICKSTART / "stages/finetune_glm4voice_mtp10_stage2/quickstart"
    if not (model / "config.json").is_file():
        sys.exit(NO_MODEL)
    return model, CodecOptions("mel_vq", QUICKSTART / "codec")


def leave_cores_free() -> None:
    """Compute with half of the cores, unless OMP_NUM_THREADS is set; connections and the detector need the others."""
    import torch  # takes seconds, and --help needs none

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))


async def serve(service: Service, keys: Sequence[str]) -> None:
    """Run the server; print how to use it as soon as it is ready."""
    server = Server(create_app(service, keys), service)
    running = asyncio.create_task(server.serve())
    while not server.started and not running.done():
        await asyncio.sleep(0.05)
    if server.started:
        print(welcome(server.address, service.name, bool(keys)), flush=True)
    await running
    if not server.started:
        raise OSError("the server did not start; its log says why")


def serve_on_ray(args: argparse.Namespace, folder: str | Path, codec: CodecOptions, message: str) -> None:
    """Deploy replicas on Ray Serve; see vita_audio/serving/cluster.py. With a Ray of its own, serve until a signal.

    Raises:
        OSError: the replicas do not start.
    """
    options = SERVING.read(args)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if args.ray_address is None and options.on_loopback:
        # The one switch that makes Ray listen on loopback: 127.0.0.1 as its address is replaced by the machine's own.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    with needs_extra("ray"):
        from vita_audio.serving import cluster
    plan = cluster.Plan(
        model_name_or_path=str(Path(folder).absolute()),
        codec=_absolute(codec),
        runtime=RUNTIME.read(args),
        server=_absolute(options),
        scale=SCALE.read(args),
    )
    with cluster.deployed(plan, args.ray_address):
        print(message, flush=True)
        if args.ray_address is None:
            wait_for_a_signal()


def _absolute(options: Paths) -> Paths:
    """The same with absolute paths: Ray's processes may have another working directory."""
    given: dict[str, Any] = {entry.name: getattr(options, entry.name) for entry in fields(options)}
    paths = [name for name in given if name.endswith(("_path", "_dir", "_file")) and given[name] is not None]
    return replace(options, **given | {name: Path(given[name]).absolute() for name in paths})


def wait_for_a_signal() -> None:
    """Return at SIGTERM or Ctrl-C; a second one raises KeyboardInterrupt."""
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    over.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)


def welcome(address: str, name: str, needs_key: bool) -> str:
    """What to do with a server that is ready."""
    key = " -H 'Authorization: Bearer YOUR_KEY'" if needs_key else ""
    body = shlex.quote(f'{{"model": "{name}", "input": "one two three", "response_format": "wav"}}')
    return f"""\
serving {name} at {address}/v1
talk to it: {address}/
try it:     curl {address}/v1/audio/speech{key} -H 'Content-Type: application/json' -d {body} -o speech.wav"""
