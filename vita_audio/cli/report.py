"""Report a run on one page: replies, scores, speed and training curves.

    python tools/report.py --run quickstart

The folder may come from the quickstart, from one or several stages, from an evaluation or from inference:
training logs (``trainer_state.json``), scores (``results.json``) and replies (``replies.jsonl``) are found
anywhere below it. The output is ``report.html``, a single file that contains its pictures and sounds, and the
pictures as ``report/*.png``. Parts that a run does not have yet are omitted.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import librosa
import matplotlib
import numpy as np
import soundfile
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vita_audio import files
from vita_audio.audio import load_audio
from vita_audio.cli.arguments import command_parser
from vita_audio.constants import AUDIO_TAG
from vita_audio.evaluation.figures import ANALYSIS
from vita_audio.evaluation.scoreboard import LEGEND, columns, interval_text
from vita_audio.models.schedule import SCHEDULES

STAGE_FOLDER = re.compile(r"finetune_(?:sensevoice_)?glm4voice_(\w+?)(?:\.sh)?")
STAGES = {
    "stage1": "1 · alignment",
    "mtp1_stage1": "2 · one head",
    "mtp10_stage1": "3 · ten heads",
    "mtp10_stage2": "4 · supervised finetuning",
}
INK, SOFT, ACCENT = "#1d2433", "#5d6880", "#2f6fb3"
DOTS_PER_INCH = 150

Entry = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page of a run.

    Raises:
        ValueError: there is no such folder, it holds nothing to report, or a file in it is damaged.
    """
    parser = command_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--out", type=Path, metavar="HTML", help="default: report.html in the run's folder")
    parser.add_argument("--title", default="A speech language model")
    args = parser.parse_args(argv)
    if not args.run.is_dir():
        raise ValueError(f"{args.run}: no such folder; give the output folder of the run")
    print(write_report(args.run, args.out or args.run / "report.html", args.title))


def write_report(run: Path, out: Path, title: str) -> Path:
    """Write the page and its pictures; return the page's path.

    Raises:
        ValueError: the folder holds nothing to report, or a file in it is damaged.
    """
    score_file, reply_file = find(run, "results.json"), find(run, "replies.jsonl")
    logs = read_training_logs(run)
    scores = [] if score_file is None else read_list(score_file)
    replies = [] if reply_file is None else list(files.read_json_lines(reply_file))
    if not (logs or scores or replies):
        raise ValueError(
            f"{run}: no trainer_state.json, results.json or replies.jsonl below it; nothing to report"
        )
    matplotlib.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": SOFT}
    )
    sounds = run if reply_file is None else reply_file.parent
    pictures = {
        "losses": loss_figure(logs) if logs else None,
        "speed": speed_figure(scores),
        "spectrogram": reply_figure(replies, sounds),
    }
    embedded = {
        name: embed_figure(figure, out.parent / "report" / f"{name}.png")
        for name, figure in pictures.items()
        if figure is not None
    }
    analysis = analysis_pictures(run)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.ChainableUndefined)
    template = environment.from_string(
        Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    )
    page = template.render(
        title=title,
        subtitle=subtitle(logs, scores),
        conversations=conversations(replies, sounds),
        scores=score_table(scores),
        analysis=analysis,
        **embedded,
    )
    files.write_text(out, page)
    return out


def subtitle(logs: dict[str, list[Entry]], scores: list[Entry]) -> str:
    parts = []
    if logs:
        steps = sum(history[-1]["step"] for history in logs.values())
        parts.append(f"{len(logs)} stages, {steps} steps")
    if scores:
        parts.append(f"{len(scores)} rows of scores, the last: {scores[-1]['stage']}, {scores[-1]['mode']}")
    return " · ".join(parts)


# -- results of the run -----------------------------------------------------------------------------------


def find(run: Path, name: str) -> Path | None:
    """The file of that name nearest to the top of a run's folder; the newest of several at the same depth."""
    return min(run.rglob(name), key=lambda path: (len(path.parts), -path.stat().st_mtime), default=None)


def read_training_logs(run: Path) -> dict[str, list[Entry]]:
    """Log entries with a loss of every stage below a folder, in order of training, keyed by the stage's title.

    A finished stage has its state next to the model, an unfinished one in its last checkpoint. Of several runs
    of a stage the newest is used. A folder that is not named after a stage script keeps its name as title.
    """
    newest: dict[str, Path] = {}
    for state in sorted(run.rglob("trainer_state.json"), key=lambda path: path.stat().st_mtime):
        newest[stage_title(state)] = state
    known = list(STAGES.values())
    logs = {}
    for title in sorted(newest, key=lambda title: known.index(title) if title in known else len(known)):
        state = files.read_json(newest[title])
        if not isinstance(state, dict):
            raise ValueError(f"{newest[title]}: not the state of a trainer; remove the file")
        history = [entry for entry in state.get("log_history", []) if "loss" in entry]
        if history:
            logs[title] = history
    return logs


def stage_title(state: Path) -> str:
    """The stage whose script named a parent folder of the file, else the run's folder name."""
    for part in reversed(state.resolve().parts):
        match = STAGE_FOLDER.fullmatch(part)
        if match and match[1] in STAGES:
            return STAGES[match[1]]
    folder = state.resolve().parent
    return (folder.parent if folder.name.startswith("checkpoint-") else folder).name


def analysis_pictures(run: Path) -> dict[str, str]:
    """The figures of tools/analyse_attention.py as data URIs, by name; empty if it has not run."""
    result = find(run, "analysis.json")
    if result is None:
        return {}
    paths = {name: result.with_name(f"{name}.png") for name in ANALYSIS}
    return {name: data_uri("image/png", path.read_bytes()) for name, path in paths.items() if path.is_file()}


def read_list(path: Path) -> list[Entry]:
    """The rows of a score file."""
    content = files.read_json(path)
    if not isinstance(content, list):
        raise ValueError(f"{path}: not a table of scores; remove the file")
    return content


# -- replies ------------------------------------------------------------------------------------


def conversations(replies: list[Entry], folder: Path) -> list[Entry]:
    """One card for each request: its turns, then a reply for every mode."""
    cards: dict[str, Entry] = {}
    for reply in replies:
        name = reply["name"]
        if name not in cards:
            cards[name] = {"task": reply["task"], "turns": question_turns(reply)}
        kind = "streamed" if reply["streaming"] else "whole"
        wav = folder / reply["wav"] if reply["wav"] else None
        turn = {
            "who": f"{mode_name(reply['mode'])}, {kind}",
            "words": reply["text"].strip(),
            "audio": embed_audio(wav) if wav else None,
        }
        cards[name]["turns"].append(turn)
    return list(cards.values())


def question_turns(reply: Entry) -> list[Entry]:
    audios = iter(reply["audios"])
    turns = []
    for message in reply["question"]:
        count = message["content"].count(AUDIO_TAG)
        words = message["content"].replace(AUDIO_TAG, "").strip()
        sounds = [next(audios, None) for _ in range(count)] or [None]
        for index, sound in enumerate(sounds):
            file = None if sound is None else Path(sound)
            turns.append(
                {
                    "who": message["role"],
                    "words": words if index == 0 else "",
                    "audio": embed_audio(file) if file is not None and file.is_file() else None,
                }
            )
    return turns


def mode_name(mode: Any) -> str:
    return mode if isinstance(mode, str) else " ".join(map(str, mode))


def embed_audio(path: Path) -> str:
    """A data URI of the clip as 16-bit WAV."""
    waveform, rate = load_audio(path)
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform.clamp(-1, 1).numpy(), rate, format="WAV", subtype="PCM_16")
    return data_uri("audio/wav", buffer.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# -- scores ----------------------------------------------------------------------------------------------


def score_table(scores: list[Entry]) -> Entry | None:
    """Titles and formatted cells of the columns that any row has."""
    if not scores:
        return None
    shown = columns(scores)
    rows = []
    for index, row in enumerate(scores):
        cells = [
            {"value": column.cell(row), "text": column.is_text, "interval": interval_text(column, row)}
            for column in shown
        ]
        new_stage = index > 0 and row["stage"] != scores[index - 1]["stage"]
        rows.append({"cells": cells, "new_stage": new_stage})
    titles = [{"title": column.title, "text": column.is_text} for column in shown]
    return {"columns": titles, "rows": rows, "legend": LEGEND}


# -- plots --------------------------------------------------------------------------------------------


def loss_figure(logs: dict[str, list[Entry]]) -> Figure:
    """A panel for each stage, with a line for every head, and for the LLM if it trains."""
    across = min(2, len(logs))
    rows = math.ceil(len(logs) / across)
    figure = Figure(figsize=(9.5, 3.1 * rows), layout="constrained")
    panels = figure.subplots(rows, across, squeeze=False).flatten()
    for panel, (stage_title, history) in zip(panels, logs.items(), strict=False):
        heads = sorted(
            {key for entry in history for key in entry if key.startswith("mtp_loss_")}, key=head_number
        )
        colours = matplotlib.colormaps["viridis"](np.linspace(0.15, 0.9, max(len(heads), 1)))
        plot_loss(panel, history, "main_loss", "LLM", INK, 1.6)
        for head, colour in zip(heads, colours, strict=False):
            plot_loss(panel, history, head, f"head {head_number(head) + 1}", colour, 1.0)
        panel.set_title(stage_title, loc="left", fontweight="bold")
        panel.set_xlabel("step")
        panel.set_ylabel("loss")
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", color="#e6eaf0")
        panel.legend(frameon=False, fontsize=7, ncols=2 if len(heads) > 4 else 1, loc="upper right")
    for panel in panels[len(logs) :]:
        panel.axis("off")
    return figure


def plot_loss(panel: Axes, history: list[Entry], key: str, label: str, colour: Any, width: float) -> None:
    """Plot a line, unless no entry has the key."""
    points = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
    panel.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=width)


def head_number(key: str) -> int:
    return int(key.rsplit("_", 1)[1])


def speed_figure(scores: list[Entry]) -> Figure | None:
    """Tokens per second and the time to the first chunk, by mode, of the last stage with speeds."""
    timed = [row for row in scores if row.get("tokens_per_second")]
    if not timed:
        return None
    rows = {row["mode"]: row for row in timed if row["stage"] == timed[-1]["stage"]}
    known = list(SCHEDULES)
    modes = sorted(rows, key=lambda mode: known.index(mode) if mode in known else len(known))
    figure = Figure(figsize=(9.5, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    speeds = [rows[mode]["tokens_per_second"] for mode in modes]
    labels = [f"{speed:.0f}  (×{speed / speeds[0]:.1f})" for speed in speeds]
    draw_bars(left, modes, speeds, labels, "tokens per second")
    delays = [1000 * (rows[mode].get("first_chunk_seconds") or 0) for mode in modes]
    draw_bars(right, modes, delays, [f"{delay:.0f}" for delay in delays], "milliseconds to the first chunk")
    figure.suptitle(timed[-1]["stage"], x=0.01, ha="left", fontweight="bold", fontsize=10)
    return figure


def draw_bars(
    panel: Axes, names: list[str], values: Sequence[float], labels: list[str], axis_label: str
) -> None:
    bars = panel.barh(names, values, color=ACCENT, height=0.6)
    panel.bar_label(bars, labels, padding=4)
    panel.invert_yaxis()
    panel.set_xlabel(axis_label)
    panel.set_xlim(right=1.25 * max(values, default=1) or 1)
    panel.tick_params(axis="y", length=0)


def reply_figure(replies: list[Entry], folder: Path) -> Figure | None:
    """Mel spectrogram of the first spoken answer, under its text."""
    spoken = [reply for reply in replies if reply["wav"]]
    spoken.sort(key=lambda reply: reply["task"] != "speech QA")
    if not spoken:
        return None
    waveform, rate = load_audio(folder / spoken[0]["wav"])
    mel = librosa.feature.melspectrogram(y=waveform.numpy(), sr=rate, n_fft=1024, hop_length=128, n_mels=96)
    decibels = librosa.power_to_db(mel, ref=np.max, top_db=70)
    figure = Figure(figsize=(9.5, 3.0), layout="constrained")
    panel = figure.subplots()
    seconds = len(waveform) / rate
    panel.imshow(decibels, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, len(mel)))
    hertz = librosa.mel_frequencies(n_mels=96, fmax=rate / 2)
    marks = [mark for mark in (250, 500, 1000, 2000, 4000, 8000) if mark < rate / 2]
    panel.set_yticks([float(np.searchsorted(hertz, mark)) for mark in marks], [f"{mark}" for mark in marks])
    panel.set_xlabel("seconds")
    panel.set_ylabel("Hz")
    text = spoken[0]["text"].strip() or spoken[0]["question"][-1]["content"].split("\n")[-1]
    panel.set_title(f"“{text}” ({mode_name(spoken[0]['mode'])})", loc="left", fontweight="bold")
    return figure


def embed_figure(figure: Figure, path: Path) -> str:
    """Save a picture and return it as a data URI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH, facecolor="white")
    return data_uri("image/png", path.read_bytes())
