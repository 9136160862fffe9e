"""Curves of one or several training runs, as a picture and a page, without TensorBoard.

    python tools/plot_training.py output/LM/finetune_glm4voice_mtp10_stage1/run1 [RUN …] --out curves

Reads the log of each run's folder, finished or not, and draws one panel for each group of columns: losses and
accuracies of backbone, heads, tasks and sources, learning rates, gradient norms, speed and data. Validation is dashed.
Several runs share the panels. Writes curves.png and curves.html.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from vita_audio.cli.arguments import command_parser
from vita_audio.files import read_json, write_text
from vita_audio.training.checkpoints import last_complete_checkpoint

_LOG = "trainer_state.json"
_SINGLE = ("loss", "main_loss", "main_accuracy", "learning_rate", "grad_norm")
_BY_KIND = ("main_loss", "main_accuracy", "mtp_loss_0", "mtp_accuracy_0", "mtp_loss", "mtp_accuracy")
"""What is drawn of each task and source."""
_VALIDATION = "eval_"
_WIDTH, _HEIGHT = 6.0, 3.2
"""Inches of a panel."""


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the curves.

    Raises:
        ValueError: a folder without a log, or a damaged log.
    """
    parser = command_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output folder of a run")
    parser.add_argument("--out", type=Path, default=Path("curves"), help="name of both files, without suffix")
    parser.add_argument("--smooth", type=int, default=1, metavar="N", help="average over N log lines")
    options = parser.parse_args(argv)
    if options.smooth < 1:
        parser.error(f"--smooth {options.smooth}: give 1 or more")
    logs = {str(run): read_log(run) for run in options.runs}
    picture = options.out.with_suffix(".png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(logs, options.smooth).savefig(picture, dpi=120)
    write_text(options.out.with_suffix(".html"), page(logs, picture))
    print(f"wrote {picture} and {options.out.with_suffix('.html')}")


def read_log(run: Path) -> list[dict[str, float]]:
    """The log lines of a run with a loss, of steps and of validations.

    They are those of its result, else of its last complete checkpoint.

    Raises:
        ValueError: there is no log, or it is damaged.
    """
    file = run / _LOG
    if not file.is_file():
        checkpoint = last_complete_checkpoint(run) if run.is_dir() else None
        if checkpoint is None:
            raise ValueError(
                f"{run}: no {_LOG} there and no complete checkpoint; give the output folder of a run"
            )
        file = checkpoint / _LOG
    try:
        lines = [line for line in read_json(file)["log_history"] if {"loss", "eval_loss"} & line.keys()]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: damaged ({error}); restore it from the checkpoint before") from error
    if not lines:
        raise ValueError(f"{file}: holds no step yet; lower --logging_steps or wait")
    return lines


def panels(logs: dict[str, list[dict[str, float]]]) -> dict[str, list[str]]:
    """Columns of each panel that some run has."""
    logged = {name for lines in logs.values() for line in lines for name in line}
    names = {name.removeprefix(_VALIDATION) for name in logged}
    groups = {name: [name] for name in _SINGLE}
    for what, title in (("loss", "losses"), ("accuracy", "accuracies")):
        heads = [name for name in names if name.startswith(f"mtp_{what}_")]
        groups[f"{title} of the heads"] = sorted(heads, key=lambda name: int(name.rsplit("_", 1)[1]))
    for part in ("learning_rate", "grad_norm", "speech"):
        groups[f"{part} by part"] = sorted(name for name in names if name.startswith(f"{part}/"))
    for kind in ("task", "source"):
        for what in _BY_KIND:
            own = [name for name in names if name.startswith(f"{kind}/") and name.endswith(f"/{what}")]
            groups[f"{what} by {kind}"] = sorted(own)
    groups |= {name: [name] for name in sorted(names) if name.startswith(("speed/", "data/"))}
    with_validation = {
        title: [one for name in group for one in (name, _VALIDATION + name) if one in logged]
        for title, group in groups.items()
    }
    return {title: group for title, group in with_validation.items() if group}


def draw(logs: dict[str, list[dict[str, float]]], smooth: int) -> Figure:
    """All panels, two in a row."""
    drawn = panels(logs)
    rows = math.ceil(len(drawn) / 2)
    figure = Figure(figsize=(2 * _WIDTH, rows * _HEIGHT), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flat
    colours = matplotlib.colormaps["tab10"]
    for axis, (title, names) in zip(axes, drawn.items(), strict=False):
        for number, (run, lines) in enumerate(logs.items()):
            for shade, name in enumerate(names):
                points = [(line["step"], line[name]) for line in lines if name in line]
                if not points:
                    continue
                steps, values = zip(*points, strict=True)
                alpha = 1 - 0.8 * shade / len(names)
                label = run if shade == 0 else None
                axis.plot(
                    steps,
                    list(_averaged(values, smooth)),
                    color=colours(number % 10),
                    linestyle="--" if name.startswith(_VALIDATION) else "-",
                    alpha=alpha,
                    label=label,
                )
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    if len(logs) > 1:
        figure.axes[0].legend(fontsize=8)
    for axis in figure.axes[len(drawn) :]:
        axis.set_visible(False)
    return figure


def page(logs: dict[str, list[dict[str, float]]], picture: Path) -> str:
    """The picture, and the last line of each run, in one HTML file."""
    columns = [name for names in panels(logs).values() for name in names]
    rows = [["run", "step", *columns]]
    for run, lines in logs.items():
        last = {name: value for line in lines for name, value in line.items()}
        shown: list[Any] = [last.get(name, "") for name in columns]
        rows.append(
            [run, str(last["step"]), *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in shown)]
        )
    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in column) + "</tr>"
        for column in zip(*rows, strict=True)
    )
    image = base64.b64encode(picture.read_bytes()).decode()
    return (
        '<!doctype html><meta charset="utf-8"><title>Training curves</title>'
        "<style>body{font:15px sans-serif;margin:2em}img{max-width:100%}td{padding:.2em 1em .2em 0}</style>"
        f'<img alt="training curves" src="data:image/png;base64,{image}"><table>{cells}</table>\n'
    )


def _averaged(values: Sequence[float], count: int) -> Iterator[float]:
    """Means over the last ``count`` values."""
    for end in range(1, len(values) + 1):
        window = values[max(0, end - count) : end]
        yield sum(window) / len(window)
