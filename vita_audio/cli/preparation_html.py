"""The part of the inspection page about preparation: what tools/prepare_data.py kept and rejected, and histograms."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vita_audio.files import read_json


def preparation_html(files: Iterable[tuple[str, Path]]) -> str:
    """Counts, reasons and histograms of the files that have a report next to them; empty if none has.

    Args:
        files: names of sources with their files.
    """
    reports = [(name, report) for name, file in files if (report := _report(file)) is not None]
    if not reports:
        return ""
    rows = "".join(_row_html(name, report) for name, report in reports)
    return (
        "<h2>Preparation</h2><table><tr><th>source</th><th>items read</th><th>samples</th><th>hours</th>"
        f"<th>rejected</th></tr>{rows}</table>" + "".join(_histograms_html(*one) for one in reports)
    )


def _report(file: Path) -> Mapping[str, Any] | None:
    try:
        report = read_json(file.with_name(f"{file.name.removesuffix('.jsonl')}.report.json"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, Mapping) and "rejected" in report else None


def _row_html(name: str, report: Mapping[str, Any]) -> str:
    reasons = Counter(report["rejected"]).most_common()
    rejected = ", ".join(f"{reason} {count:,}" for reason, count in reasons) or "–"
    cells = (name, f"{report['read']:,}", f"{report['samples']:,}", f"{report['hours']:,.2f}", rejected)
    return f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"


def _histograms_html(name: str, report: Mapping[str, Any]) -> str:
    """For each quantity the counts before the checks, pale, and after them."""
    parts = []
    for quantity, stages in report["histograms"].items():
        before = {int(value): count for value, count in stages.get("before", {}).items()}
        after = {int(value): count for value, count in stages.get("after", {}).items()}
        most, last = max(before.values(), default=1), max(before, default=0)
        bars = "".join(
            _bar_html(value, before.get(value, 0), after.get(value, 0), most) for value in range(last + 1)
        )
        parts.append(
            f"<small>{html.escape(quantity)}, before (pale) and after the checks</small>"
            f"<div class=bars>{bars}</div><div class=axis><span>0</span><span>{last}</span></div>"
        )
    return f"<h3>{html.escape(name)}</h3>{''.join(parts)}" if parts else ""


def _bar_html(value: int, before: int, after: int, most: int) -> str:
    kept, all_ = f"{100 * after / most:.0f}%", f"{100 * before / most:.0f}%"
    colours = f"to top,#5b8def {kept},#f0b8bd {kept} {all_},transparent {all_}"
    title = f"{value}: {before:,} before, {after:,} after"
    return f"<i title='{title}' style='height:100%;background:linear-gradient({colours})'></i>"
