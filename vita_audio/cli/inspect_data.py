"""Show a data mix as the model will see it, on one HTML page, without training.

    python tools/inspect_data.py configs/sts_finetune_stage1.yaml --tokenizer MODEL_DIR \\
        --audio_tokenizer_type glm4voice --audio_tokenizer_path WEIGHTS [--audio_token_cache TOKENS]

Reads the first samples of the mix's stream, in training order, through the same code as training.
The page shows, for each source (also of ratio 0), the numbers of samples and hours, and the refused samples with
their reasons; document lengths; how full the rows are; and samples with audio players, coloured text and speech
tokens, and supervised tokens underlined. For files of tools/prepare_data.py it shows what was rejected before, and
histograms before and after the checks. Hours come from file headers, or from codes if the audio is missing.
"""

from __future__ import annotations

import argparse
import base64
import html
import mimetypes
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from vita_audio.audio import AudioError, available_kinds, is_continuous_kind
from vita_audio.audio.archives import file_exists, file_size, read_file
from vita_audio.audio.io import audio_duration
from vita_audio.chat import ChatTokens, Example, SampleError, extend_tokenizer, locate, parse_sample
from vita_audio.cli.arguments import command_parser
from vita_audio.cli.preparation_html import preparation_html
from vita_audio.constants import (
    AUDIO_CODEBOOK_SIZE,
    BEGIN_OF_AUDIO,
    DEFAULT_TEXT_AUDIO_RATIO,
    IGNORE_INDEX,
)
from vita_audio.data import CodecSpec, DataConfig
from vita_audio.data.loader import PackedRows
from vita_audio.data.mixing import Mix, Place, read_mix
from vita_audio.data.packing import RowPacker
from vita_audio.data.report import Report
from vita_audio.data.sources import Rows, SourceError
from vita_audio.data.speech import SpeechReader
from vita_audio.data.token_cache import TokenCache
from vita_audio.files import write_text
from vita_audio.models.open import open_tokenizer

CODES_PER_SECOND = 12.5
LARGEST_EMBEDDED_CLIP = 3_000_000  # bytes; keeps the page loadable


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page of a mix.

    Raises:
        ValueError: mix, tokenizer, codec or cache cannot be used. Bad samples are on the page.
    """
    options = parse_options(argv)
    write_text(options.out, render(inspect(options), options))
    tqdm.write(f"wrote {options.out}")


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("config", help="YAML of the data mix")
    parser.add_argument(
        "--tokenizer", required=True, help="folder of the text tokenizer, such as a model's folder"
    )
    parser.add_argument(
        "--audio_tokenizer_type",
        choices=available_kinds(),
        help="the codec; without it, samples with audio are refused",
    )
    parser.add_argument("--audio_tokenizer_path")
    parser.add_argument("--audio_model_name_or_path", help="SenseVoice's folder, for sensevoice kinds")
    parser.add_argument("--audio_token_cache")
    parser.add_argument(
        "--data_root", help="base folder of relative paths (default: $ROOT_PATH, else the mix's folder)"
    )
    parser.add_argument("--model_max_length", type=int, default=8192, help="tokens in a row")
    parser.add_argument(
        "--text_audio_interval_ratio", type=int, nargs="+", default=list(DEFAULT_TEXT_AUDIO_RATIO)
    )
    parser.add_argument("--scan", type=int, default=2000, help="samples read for the statistics")
    parser.add_argument("--show", type=int, default=4, help="samples shown per source")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, default=Path("data_inspection.html"))
    return parser.parse_args(argv)


@dataclass
class SourceView:
    """One source: statistics of the samples read so far."""

    rows: int = 0
    per_epoch: int = 0
    used: int = 0
    tokens: int = 0
    supervised: int = 0
    seconds: float = 0.0
    lengths: list[int] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    samples: list[str] = field(default_factory=list)

    @property
    def hours_per_epoch(self) -> float:
        return self.seconds / 3600 * self.per_epoch / max(1, self.used)


@dataclass
class Inspection:
    """The content of the page."""

    sources: dict[str, SourceView]
    missing: list[str]
    row_fills: list[float]
    examples_of_refusal: dict[str, str]
    capacity: int
    preparation: str


def inspect(options: argparse.Namespace) -> Inspection:
    """Read the beginning of the mix's stream."""
    config = DataConfig(
        options.config,
        seq_length=options.model_max_length,
        text_audio_interval_ratio=options.text_audio_interval_ratio,
        token_cache=options.audio_token_cache,
        data_root=options.data_root,
    )
    codec = _codec(options)
    tokenizer = _tokenizer(options.tokenizer, codec)
    specs = read_mix(config.dataset_path, config.root)
    mix = Mix(specs, options.seed)
    rows = PackedRows(config, mix, tokenizer, _reader(codec, config), rank=0, world_size=1)

    sources: dict[str, SourceView] = defaultdict(SourceView)
    for spec in specs:
        if (
            spec not in mix.specs and spec.path.is_file()
        ):  # there, but its ratio or num is too small for a sample
            sources[spec.name].rows += _rows(spec.path)
    for spec, source_rows, used in zip(mix.specs, mix.rows, mix.used, strict=True):
        view = sources[
            spec.name
        ]  # files with the same name in one data set are one source, as in the counters
        view.rows += len(source_rows)
        view.per_epoch += used
    packer: RowPacker[int] = RowPacker(config.seq_length)
    fills: list[float] = []
    refusals: dict[str, str] = {}
    for position in tqdm(range(min(options.scan, len(mix))), unit="sample", desc="reading"):
        place, report = mix.place(position), Report()
        view = sources[mix.specs[place.source].name]
        document = rows.read(place, report)
        if document is None:
            error = report.errors[0]
            view.refused[error["reason"]] += 1
            refusals.setdefault(error["reason"], f"{error['file']}, row {error['row']}: {error['message']}")
            continue
        example, length = document.example, len(document.example)
        audios = _audio_files(mix, place, config)
        view.used += 1
        view.tokens += length
        view.supervised += sum(label != IGNORE_INDEX for label in example.labels)
        view.seconds += _seconds(audios, example, tokenizer)
        view.lengths.append(length)
        if len(view.samples) < options.show:
            view.samples.append(_sample_html(place, example, audios, tokenizer))
        finished = packer.add(length, length)
        if finished:
            fills.append(sum(finished) / config.seq_length)
    preparation = preparation_html((spec.name, spec.path) for spec in specs)
    return Inspection(dict(sources), mix.missing, fills, refusals, config.seq_length, preparation)


def _rows(path: Path) -> int:
    try:
        return len(Rows(path))
    except SourceError:
        return 0


def _codec(options: argparse.Namespace) -> CodecSpec | None:
    if options.audio_tokenizer_type is None:
        return None
    return CodecSpec(
        options.audio_tokenizer_type,
        options.audio_tokenizer_path,
        options.audio_model_name_or_path,
        options.audio_token_cache,
    )


def _tokenizer(folder: str, codec: CodecSpec | None) -> PreTrainedTokenizerBase:
    """The text tokenizer with the codec's speech tokens."""
    tokenizer = open_tokenizer(folder)
    if codec is not None:
        extend_tokenizer(tokenizer, is_continuous_kind(codec.kind), codec.codebook_size())
    elif BEGIN_OF_AUDIO not in tokenizer.get_vocab():  # text-only data is also rendered with speech tokens
        extend_tokenizer(tokenizer, False, AUDIO_CODEBOOK_SIZE)
    return tokenizer


def _reader(codec: CodecSpec | None, config: DataConfig) -> SpeechReader | None:
    if codec is None:
        return None
    cache = None
    if config.token_cache:
        cache = TokenCache.find(config.token_cache, codec.kind, codec.fingerprint())
    return SpeechReader(codec, cache, config.root, config.longest_clip)


def _audio_files(mix: Mix, place: Place, config: DataConfig) -> list[str]:
    try:
        sample = parse_sample(mix.raw(place))
    except SampleError:
        return []
    located = locate(sample, config.root, mix.specs[place.source].path.parent)
    return [str(audio) for audio in located.audios]


def _seconds(audios: list[str], example: Example, tokenizer: PreTrainedTokenizerBase) -> float:
    try:
        return sum(audio_duration(path) for path in audios)
    except AudioError:
        tokens = ChatTokens.of(tokenizer)
        codes = sum(0 <= token - tokens.first_code < tokens.codebook_size for token in example.input_ids)
        return codes / CODES_PER_SECOND


# -- the page ----------------------------------------------------------------------------------------------


def render(inspection: Inspection, options: argparse.Namespace) -> str:
    """The self-contained HTML page."""
    sources = sorted(inspection.sources.items(), key=lambda item: -item[1].per_epoch)
    parts = [
        f"<h1>{html.escape(str(options.config))}</h1>",
        _totals_html(inspection),
        _missing_html(inspection.missing),
        "<h2>Sources</h2>",
        _table_html(sources),
        inspection.preparation,
        "<h2>Document lengths</h2>",
        *(_histogram_html(name, view.lengths) for name, view in sources if view.lengths),
        _refusals_html(inspection.examples_of_refusal),
        "<h2>Samples</h2><p class=legend><span class=text>text</span> <span class=code>speech codes</span> "
        "<span class=heard>speech features</span> <span class=control>control tokens</span> "
        "<span class=learnt>supervised</span></p>",
        *(f"<h3>{html.escape(name)}</h3>{''.join(view.samples)}" for name, view in sources if view.samples),
    ]
    body = "\n".join(parts)
    head = f"<meta charset=utf-8><title>Data mix</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en>{head}{body}</html>\n"


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#1c2330}
table{border-collapse:collapse;width:100%}th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid #dde2ea}
th:first-child,td:first-child,td.left{text-align:left}h2{margin-top:2.5rem}
.bars{display:flex;align-items:flex-end;height:70px;gap:2px}.bars i{flex:1;background:#5b8def;min-height:1px}
.axis{display:flex;justify-content:space-between;color:#68748a;font-size:12px}
.sample{border:1px solid #dde2ea;border-radius:8px;padding:.7rem 1rem;margin:.7rem 0}
.tokens{white-space:pre-wrap;overflow-wrap:anywhere}.text{background:#eef3ff}.code{background:#ffe9cf;font-size:11px}
.heard{background:#dff3e4;font-size:11px}.control{color:#8a4bd6;font-size:11px}.learnt{border-bottom:2px solid #d64550}
audio{height:30px;margin-right:.5rem}.warning{background:#fff4d6;padding:.6rem 1rem;border-radius:8px}
small{color:#68748a}
"""


def _totals_html(inspection: Inspection) -> str:
    views = inspection.sources.values()
    read = sum(view.used + view.refused.total() for view in views)
    fill = sum(inspection.row_fills) / len(inspection.row_fills) if inspection.row_fills else None
    rows = f"{len(inspection.row_fills)} rows of {inspection.capacity} tokens"
    fill_text = f"{rows}, <b>{fill:.2%}</b> full" if fill is not None else "too few samples for one full row"
    return (
        f"<p>{len(inspection.sources)} sources, <b>{sum(view.per_epoch for view in views):,}</b> samples per epoch, "
        f"about <b>{sum(view.hours_per_epoch for view in views):,.1f} hours</b> of speech. "
        f"Read here: {read:,} samples; {fill_text}.</p>"
    )


def _missing_html(missing: list[str]) -> str:
    if not missing:
        return ""
    lines = "<br>".join(map(html.escape, missing))
    return f"<div class=warning>{len(missing)} files cannot be used:<br>{lines}</div>"


def _table_html(sources: list[tuple[str, SourceView]]) -> str:
    headings = (
        "source",
        "rows",
        "per epoch",
        "hours per epoch",
        "read",
        "mean tokens",
        "supervised",
        "refused",
    )
    rows = []
    for name, view in sources:
        refused = ", ".join(f"{reason} {count}" for reason, count in view.refused.most_common()) or "–"
        cells = (
            html.escape(name),
            f"{view.rows:,}",
            f"{view.per_epoch:,}",
            f"{view.hours_per_epoch:,.2f}",
            f"{view.used + view.refused.total():,}",
            f"{view.tokens / max(1, view.used):.0f}",
            f"{view.supervised / max(1, view.tokens):.0%}",
            html.escape(refused),
        )
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    return (
        f"<table><tr>{''.join(f'<th>{heading}</th>' for heading in headings)}</tr>"
        f"{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
    )


def _histogram_html(name: str, lengths: list[int], bins: int = 40) -> str:
    longest = max(lengths)
    counts = Counter(min(bins - 1, length * bins // (longest + 1)) for length in lengths)
    highest = max(counts.values())
    bars = "".join(f"<i style='height:{100 * counts[index] / highest:.0f}%'></i>" for index in range(bins))
    return (
        f"<h3>{html.escape(name)}</h3><div class=bars>{bars}</div>"
        f"<div class=axis><span>0</span><span>{longest} tokens</span></div>"
    )


def _refusals_html(examples: dict[str, str]) -> str:
    if not examples:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(reason)}</td><td class=left>{html.escape(text)}</td></tr>"
        for reason, text in examples.items()
    )
    return f"<h2>Refused: one of each reason</h2><table>{rows}</table>"


def _sample_html(
    place: Place, example: Example, audios: list[str], tokenizer: PreTrainedTokenizerBase
) -> str:
    players = "".join(_player_html(path) for path in audios)
    return (
        f"<div class=sample><small>row {place.row}, {len(example)} tokens</small><div>{players}</div>"
        f"<div class=tokens>{''.join(_runs_html(example, tokenizer))}</div></div>"
    )


def _player_html(path: str) -> str:
    if not file_exists(path):
        return f"<small>{html.escape(path)} is missing </small>"
    if file_size(path) > LARGEST_EMBEDDED_CLIP:
        return f"<small>{html.escape(path)} is too large to embed </small>"
    kind = mimetypes.guess_type(path)[0] or "audio/wav"
    content = base64.b64encode(read_file(path)).decode()
    title = html.escape(path, quote=True)
    return f"<audio controls preload=none title='{title}' src='data:{kind};base64,{content}'></audio>"


def _runs_html(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Coloured spans of adjacent tokens of the same kind and supervision."""
    tokens = ChatTokens.of(tokenizer)
    special = set(tokenizer.all_special_ids) | {tokens.begin, tokens.end, tokens.turn_openings["user"][0]}

    def kind(token: int) -> str:
        if 0 <= token - tokens.first_code < tokens.codebook_size:
            return "code"
        if token == tokens.context:
            return "heard"
        return "control" if token in special else "text"

    pairs = zip(example.input_ids, example.labels, strict=True)
    for (name, learnt), run in groupby(pairs, key=lambda pair: (kind(pair[0]), pair[1] != IGNORE_INDEX)):
        ids = [token for token, _ in run]
        if name == "code":
            shown = f" ♪{' '.join(str(token - tokens.first_code) for token in ids)} "
        elif name == "heard":
            shown = f" ♪ {len(ids)} features "
        else:
            shown = html.escape(str(tokenizer.decode(ids)))
        yield f"<span class='{name}{' learnt' if learnt else ''}'>{shown}</span>"
