"""Figures of an evaluation: each is drawn once and saved as PNG and SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vita_audio.evaluation.analysis import VISIBLE, AttentionMap, Knowledge

ANALYSIS = ("attention", "hiding", "heads")
"""Names of the figures of an analysis, without suffix."""
INK, SOFT, ACCENT = "#1d2433", "#5d6880", "#2f6fb3"
DOTS_PER_INCH = 150
_LONGEST_LABELS = 60
"""Text tokens that still have a label each."""
_HIDDEN = {"all": "nothing", "matching": "all but the matching", "none": "all"}


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Save a figure as ``path`` with the suffixes .png and .svg; returns both paths."""
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=DOTS_PER_INCH, facecolor="white")
    return files


def attention_figure(one: AttentionMap) -> Figure:
    """Attention of the speech of a reply (across) on its text (down); every column is scaled to its largest value."""
    text = len(one.text)
    figure = Figure(figsize=(9.5, 1.4 + 0.22 * min(text, _LONGEST_LABELS)), layout="constrained")
    panel = figure.subplots()
    scaled = one.weights / one.weights.amax(dim=1, keepdim=True).clamp(min=1e-9)
    panel.imshow(scaled.T, aspect="auto", cmap="Blues", interpolation="nearest", vmin=0, vmax=1)
    if text <= _LONGEST_LABELS:
        panel.set_yticks(range(text), [label.strip() or "␣" for label in one.text], fontsize=8)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("speech token")
    panel.set_title(f"attention on the text, mean of heads and layers ({one.id})", **_TITLE)
    return figure


def hiding_figure(scores: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Word error rate of the speech by what text it cannot see, with 95% intervals."""
    figure = Figure(figsize=(9.5, 2.2), layout="constrained")
    panel = figure.subplots()
    names = [_HIDDEN[visible] for visible in VISIBLE]
    rates = [100 * (scores[visible]["wer"] or 0.0) for visible in VISIBLE]
    bars = panel.barh(names, rates, color=ACCENT, height=0.6)
    panel.bar_label(bars, [f"{rate:.1f}" for rate in rates], padding=4)
    for place, visible in enumerate(VISIBLE):
        if limits := scores[visible]["interval"]:
            panel.plot([100 * limit for limit in limits], [place, place], color=INK, linewidth=1.2)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.2 * max(*rates, 1.0))
    panel.set_xlabel("speech WER, %")
    panel.set_title("text hidden from the speech", **_TITLE)
    panel.tick_params(axis="y", length=0)
    return figure


def knowledge_figure(known: Knowledge) -> Figure:
    """Accuracy of every state at every distance, as a map with numbers."""
    heads, distances = known.accuracy.shape
    figure = Figure(figsize=(9.5, 1.2 + 0.3 * heads), layout="constrained")
    panel = figure.subplots()
    panel.imshow(known.accuracy, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    for head in range(heads):
        for distance in range(distances):
            value = float(known.accuracy[head, distance])
            if math.isnan(value):  # no speech is so far ahead
                continue
            colour = "white" if value > 0.55 else INK
            panel.text(
                distance, head, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour
            )
    panel.set_yticks(range(heads), ["backbone", *(f"head {head}" for head in range(1, heads))])
    panel.set_xticks(range(distances), [str(distance) for distance in range(1, distances + 1)])
    panel.set_xlabel("distance of the speech token from the last token read")
    panel.set_title("speech tokens that a state tells, %", **_TITLE)
    return figure


def tradeoff_figure(panels: Mapping[str, Sequence[Mapping[str, Any]]], speed: str) -> Figure:
    """Quality against speed: a panel for each score, a point for each mode.

    Args:
        panels: title of the score to its points: ``{label, speed, value, interval}``; values in percent.
        speed: label of the speed.
    """
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(5.2 * across, 0.5 + 3.2 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    labels = list(dict.fromkeys(point["label"] for points in panels.values() for point in points))
    for panel in axes[len(panels) :]:
        panel.axis("off")
    for panel, (title, points) in zip(axes, panels.items(), strict=False):
        for point in points:
            _point(panel, point, labels.index(point["label"]))
        panel.set_xlim(0, 1.1 * max(point["speed"] for point in points))
        panel.set_xlabel(speed)
        panel.set_title(title, **_TITLE)
        panel.grid(color="#e6eaf0")
        panel.set_axisbelow(True)
    _legend(figure)
    return figure


def bar_groups(panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, str]]]], label: str) -> Figure:
    """Grouped bars.

    Args:
        panels: title of a panel to its series, of each the group and a pair of height and label.
        label: of the heights.
    """
    width = max(len(groups) for series in panels.values() for groups in series.values())
    figure = Figure(figsize=(max(5.5, 2.6 + 2.4 * width), 3.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for panel, (title, series) in zip(axes, panels.items(), strict=True):
        names = list(dict.fromkeys(name for groups in series.values() for name in groups))
        share = 0.85 / len(series)
        for index, (one, groups) in enumerate(series.items()):
            places = [names.index(name) + share * (index - (len(series) - 1) / 2) for name in groups]
            heights, labels = zip(*groups.values(), strict=True)
            bars = panel.bar(places, heights, width=0.92 * share, label=one)
            panel.bar_label(bars, labels, fontsize=7, padding=2)
        panel.set_xticks(range(len(names)), names)
        panel.set_ylabel(label)
        panel.margins(y=0.18)
        panel.set_title(title, **_TITLE)
    _legend(figure)
    return figure


def lines(panels: Mapping[str, Mapping[str, Sequence[float]]], across: str, up: str) -> Figure:
    """Lines over 1, 2, …: title of a panel to its series."""
    figure = Figure(figsize=(max(4.8 * len(panels), 5.5), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (title, series) in zip(axes, panels.items(), strict=True):
        for name, values in series.items():
            panel.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=name)
        panel.set_ylim(bottom=0)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_xlabel(across)
        panel.set_ylabel(up)
        panel.set_title(title, **_TITLE)
        panel.grid(color="#e6eaf0")
        panel.legend(frameon=False, fontsize=8)
    return figure


_TITLE: dict[str, Any] = {"loc": "left", "fontweight": "bold", "fontsize": 10}


_MARKERS = "osD^vPX*"


def _point(panel: Axes, point: Mapping[str, Any], number: int) -> None:
    colour = f"C{number % 10}"
    if point["interval"]:
        panel.plot([point["speed"]] * 2, point["interval"], color=colour, linewidth=1.0, alpha=0.6)
    marker = _MARKERS[number % len(_MARKERS)]
    panel.plot([point["speed"]], [point["value"]], marker, color=colour, label=point["label"])


def _legend(figure: Figure) -> None:
    """One legend for all panels, above them."""
    found = {
        label: handle
        for panel in figure.axes
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        found.values(), found.keys(), loc="outside upper left", frameon=False, fontsize=8, ncols=min(4, len(found))
    )  # fmt: skip
