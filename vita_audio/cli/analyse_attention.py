"""The paper's analysis of a checkpoint: what its speech attends to, what it needs of the text, and what its heads know.

    python tools/analyse_attention.py --model_name_or_path DIR --audio_tokenizer_path DIR --json_path tts_test.jsonl \\
        --transcriber whisper --output_dir out

Greedy replies to items of a test set (texts to read aloud, or spoken questions), in three runs: the speech may attend
to all text, only to the matching tokens, or to none; a recogniser hears them (arXiv 2505.03739, Figure 1). Then the
accuracy of the states of backbone and heads on the replies of the set. Writes analysis.json, analysis.md, attention,
hiding and heads as PNG and SVG, and the replies with their WAV files.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vita_audio.chat import build_example, read_samples
from vita_audio.cli.arguments import CODEC, RUNTIME, add_system_prompt, command_parser, transcriber_group
from vita_audio.evaluation.analysis import VISIBLE, Knowledge, hide_text, knowledge, summarise_attention
from vita_audio.evaluation.bench import with_system
from vita_audio.evaluation.figures import (
    ANALYSIS,
    attention_figure,
    hiding_figure,
    knowledge_figure,
    save_figure,
)
from vita_audio.evaluation.items import every_nth, read_test_set
from vita_audio.evaluation.listening import Listener
from vita_audio.evaluation.results import checkpoint_fingerprint
from vita_audio.evaluation.transcribers import TranscriberConfig, TranscriberPool
from vita_audio.files import write_json, write_text
from vita_audio.inference import SpeechPipeline
from vita_audio.inference.pipeline import default_device
from vita_audio.provenance import git_revision, versions

logger = logging.getLogger(__name__)
_HIDDEN = {"all": "none", "matching": "all but the matching", "none": "all"}


def main(argv: Sequence[str] | None = None) -> None:
    """Analyse one checkpoint.

    Raises:
        ValueError: the checkpoint, the codec, the recogniser or the test set cannot be used.
    """
    parser = command_parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--json_path", required=True, type=Path, metavar="FILE", help="test set")
    parser.add_argument("--data_root", type=Path, metavar="DIR", help="base folder of relative audio paths")
    parser.add_argument("--output_dir", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--limit", type=int, default=20, metavar="N", help="replies of each run (default: 20)"
    )
    parser.add_argument(
        "--documents", type=int, default=80, metavar="N", help="documents for the states (default: 80)"
    )
    parser.add_argument(
        "--neighbours", type=int, default=1, metavar="N",
        help="text tokens on both sides of the one with most attention that also match (default: 1)",
    )  # fmt: skip
    parser.add_argument("--max_new_tokens", type=int, default=1024, metavar="N", help="longest reply")
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="replies made together")
    add_system_prompt(parser)
    RUNTIME.add_to(parser)
    CODEC.add_to(parser)
    transcriber_group().add_to(parser)
    parser.add_argument(
        "--transcriber_processes", type=int, default=2, metavar="N", help="0 recognises in this process"
    )
    args = parser.parse_args(argv)
    for name, least in (
        ("limit", 1),
        ("documents", 2),
        ("neighbours", 0),
        ("max_new_tokens", 1),
        ("batch_size", 1),
    ):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: give {least} or more")

    recogniser: TranscriberConfig = transcriber_group().read(args)
    if recogniser.name != "pocketsphinx":
        recogniser = replace(recogniser, device=args.device or default_device())
    recogniser.check()
    items = read_test_set(args.json_path, args.data_root, args.limit, answer_lists=True)
    runtime = replace(RUNTIME.read(args), attn_implementation="eager", engine=False)
    pipeline = SpeechPipeline.open(args.model_name_or_path, CODEC.read(args), runtime)
    system = pipeline.system_message(args.system_prompt)
    items = [replace(item, conversation=with_system(item.conversation, system)) for item in items]
    with TranscriberPool(recogniser, args.transcriber_processes) as pool:
        hidden, maps = hide_text(
            pipeline, items, Listener(pipeline.codec, pool), args.output_dir, batch_size=args.batch_size,
            neighbours=args.neighbours, max_new_tokens=args.max_new_tokens,
        )  # fmt: skip
    spoken = [one for one in maps if one.weights.numel()]
    known = knowledge(pipeline, _documents(pipeline, args))

    if spoken:
        save_figure(attention_figure(spoken[0]), args.output_dir / ANALYSIS[0])
    else:
        logger.warning("no reply has both text and speech, so there is no picture of the attention")
    save_figure(hiding_figure(hidden), args.output_dir / ANALYSIS[1])
    save_figure(knowledge_figure(known), args.output_dir / ANALYSIS[2])
    result = {
        "checkpoint": str(args.model_name_or_path),
        "weights": checkpoint_fingerprint(Path(args.model_name_or_path)),
        "test_set": str(args.json_path),
        "recogniser": recogniser.describe(),
        "system": system,
        "neighbours": args.neighbours,
        "git": git_revision(),
        "versions": versions(),
        "attention": summarise_attention(spoken),
        "hiding": hidden,
        "heads": {"accuracy": _cells(known), "positions": known.positions},
    }
    write_json(args.output_dir / "analysis.json", result)
    text = _markdown(result, known)
    write_text(args.output_dir / "analysis.md", text)
    print(f"{text}\n{args.output_dir / 'analysis.md'}")


def _documents(pipeline: SpeechPipeline, args: Any) -> list[Any]:
    """Samples of the test set with their replies, as in training."""
    samples = list(read_samples(args.json_path, args.data_root, answer_lists=True))
    return [
        build_example(sample, pipeline.tokenizer, pipeline.codec)
        for _, sample in every_nth(samples, args.documents, args.json_path)
    ]


def _markdown(result: dict[str, Any], known: Knowledge) -> str:
    seen = result["attention"]
    rows = [
        f"| {_HIDDEN[visible]} | {100 * one['wer']:.1f} | {_range(one['interval'])} | {one['utterances']} |"
        for visible, one in ((visible, result["hiding"][visible]) for visible in VISIBLE)
    ]
    heads = [
        f"| {'backbone' if head == 0 else f'head {head}'} | "
        + " | ".join("–" if value is None else f"{100 * value:.0f}" for value in line)
        + " |"
        for head, line in enumerate(_cells(known))
    ]
    distances = range(1, known.accuracy.shape[1] + 1)
    order = "–" if seen["order"] is None else f"{seen['order']:.2f}"
    attention = ["No reply has both text and speech."]
    if seen["speech_tokens"]:
        attention = [
            f"{100 * seen['on_text']:.0f}% of the attention of {seen['speech_tokens']} speech tokens goes to the text,",
            f"{100 * seen['on_matching']:.0f}% of that to one token and its neighbours",
            f"({100 * seen['even']:.0f}% if it were even).",
            f"Correlation of the places in speech and text: {order}.",
        ]
    return "\n".join(
        [
            "### Attention of speech on text",
            "",
            *attention,
            "",
            "### Speech with text hidden",
            "",
            "| hidden text | speech WER % | 95% interval | utterances |",
            "| --- | ---: | ---: | ---: |",
            *rows,
            "",
            f"Heard by {result['recogniser']}.",
            "",
            "### Speech tokens that a state tells, by distance from the last token read, %",
            "",
            f"| state | {' | '.join(map(str, distances))} |",
            f"| --- | {' | '.join('---:' for _ in distances)} |",
            *heads,
            "",
        ]
    )


def _cells(known: Knowledge) -> list[list[float | None]]:
    """The accuracies; None where no speech is so far ahead."""
    return [[None if math.isnan(value) else value for value in line] for line in known.accuracy.tolist()]


def _range(limits: Sequence[float] | None) -> str:
    return "–" if limits is None else " – ".join(f"{100 * limit:.1f}" for limit in limits)
