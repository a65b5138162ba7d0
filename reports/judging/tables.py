"""A comparison as text for other tools: Markdown, CSV, JSON and LaTeX. Every number is in the metric's unit."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from engine.codec import to_json
from reports import units
from reports.judging.judgement import ANSWER, RESULT, Comparison, Judged, Mark, exit_code
from reports.metrics import METRICS
from reports.records import Cell
from reports.text import harmless, inert, markdown, marked

_MARKS = {
    Mark.BETTER: "✓",
    Mark.WORSE: "✗",
    Mark.UNCHANGED: "=",
    Mark.INCONCLUSIVE: "?",
    Mark.SUSPECT: "!",
    Mark.NEW: "+",
    Mark.GONE: "-",
    Mark.FAILING: "✗",
}
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "×": r"$\times$", units.SPACE: r"\,", "–": "--", "✓": "", "✗": "", "µ": r"\textmu{}",
}  # fmt: skip


def pairs(comparison: Comparison) -> list[dict[str, Any]]:
    """Returns a row for each cell and metric, with plain values."""
    return [
        {
            **to_json(judged.cell),
            "metric": judged.metric,
            "unit": METRICS[judged.metric].unit if judged.metric in METRICS else "",
            "baseline": None if judged.baseline is None else judged.baseline.median,
            "candidate": None if judged.candidate is None else judged.candidate.median,
            "ratio": judged.ratio,
            "ci_low": judged.ci_low,
            "ci_high": judged.ci_high,
            "verdict": judged.mark.value,
            "reason": judged.reason,
            "noise": judged.noise,
            "minimum_detectable": judged.minimum_detectable,
        }
        for judged in comparison.judged
    ]


def as_json(comparison: Comparison) -> str:
    content = {
        "baseline": comparison.baseline,
        "candidate": comparison.candidate,
        "exit_code": exit_code(comparison),
        "pairs": pairs(comparison),
        "incomparable": [{"cell": cell, "reason": reason} for cell, reason in comparison.incomparable],
        "environment": [
            {"what": what, "baseline": before, "candidate": after} for what, before, after in comparison.environment
        ],
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def as_csv(comparison: Comparison) -> str:
    rows = pairs(comparison)
    names = [*(f.name for f in fields(Cell)), *_COLUMNS]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\r\n")  # RFC 4180; a lone \r of a text is quoted, too
    writer.writeheader()
    for row in rows:
        writer.writerow({k: inert(marked(v)) if isinstance(v, str) else v for k, v in row.items()})
    return text.getvalue()


def as_markdown(comparison: Comparison) -> str:
    sides = (f"**{markdown(name)}**" for name in (comparison.candidate, comparison.baseline))
    lines = [f"{' against '.join(sides)}: {totals(comparison)}"]
    lines += ["", f"| {' | '.join(HEADINGS)} |", "|" + "---|" * 3 + "---:|" * 4 + "---|---|"]
    lines += [f"| {' | '.join(map(markdown, cells(judged)))} |" for judged in comparison.judged]
    if comparison.incomparable:
        lines += ["", "Not comparable:", ""]
        lines += [f"- {markdown(cell)}: {markdown(reason)}" for cell, reason in comparison.incomparable]
    if comparison.environment:
        lines += ["", "Different, too:", ""]
        lines += [f"- {markdown(what)}: {markdown(a)} → {markdown(b)}" for what, a, b in comparison.environment]
    return "\n".join(lines) + "\n"


def as_latex(comparison: Comparison) -> str:
    """Returns a table for \\usepackage{booktabs}; what could not be compared stands in comments."""
    lines = [f"% {_one_line(comparison.candidate)} against {_one_line(comparison.baseline)}: {totals(comparison)}"]
    lines += [f"% not comparable: {_one_line(cell)}: {_one_line(reason)}" for cell, reason in comparison.incomparable]
    lines += [f"% {_one_line(what)}: {_one_line(a)} -> {_one_line(b)}" for what, a, b in comparison.environment]
    lines += [r"\begin{tabular}{lllrrrrl}", r"\toprule"]
    lines += [" & ".join(map(_latex, HEADINGS[:-1])) + r" \\", r"\midrule"]
    lines += [" & ".join(_latex(cell).strip() for cell in cells(judged)[:-1]) + r" \\" for judged in comparison.judged]
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "markdown": as_markdown,
    "csv": as_csv,
    "json": as_json,
    "latex": as_latex,
}

# --- rows for people --------------------------------------------------------------------------------------------------

HEADINGS = ("device", "cell", "metric", "baseline", "candidate", "ratio", "95 % interval", "verdict", "why")


def cells(judged: Judged) -> tuple[str, ...]:
    """Returns the texts of a row under HEADINGS."""
    cell = judged.cell
    before, after = judged.baseline, judged.candidate
    metric = METRICS.get(judged.metric)
    texts = ["", ""]
    if metric is not None:
        sides = [None if side is None else side.median for side in (before, after)]
        scale = units.scale(metric.unit, sides)
        texts = [scale.text(value) for value in sides]
    interval = "" if judged.ci_low is None or judged.ci_high is None else _interval(judged.ci_low, judged.ci_high)
    label = {ANSWER: "Answer", RESULT: "Result"}.get(judged.metric) or METRICS[judged.metric].label
    ratio = "" if judged.ratio is None else _ratio(judged.ratio)
    return (
        cell.device,
        cell.key_on_device,
        label,
        *texts,
        ratio,
        interval,
        f"{_MARKS[judged.mark]} {judged.mark.value}",
        judged.reason,
    )


def totals(comparison: Comparison) -> str:
    """Returns how many of each mark there are, in words."""
    counts = Counter(judged.mark for judged in comparison.judged)
    parts = [f"{counts[mark]} {mark.value}" for mark in Mark if counts[mark]]
    if comparison.incomparable:
        parts.append(f"{len(comparison.incomparable)} not comparable")
    return ", ".join(parts) or "nothing to compare"


def _ratio(value: float) -> str:
    """Returns a ratio in which a change of one in a thousand can be seen, if it is small."""
    return f"{value:.3f}" if 0.1 < value < 1.995 else units.ratio(value)


def _interval(low: float, high: float) -> str:
    return f"{_ratio(low)}–{_ratio(high)}"


def _one_line(text: str) -> str:
    return " ".join(harmless(text).split())


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in _one_line(text))


_COLUMNS = (
    "metric", "unit", "baseline", "candidate", "ratio", "ci_low", "ci_high", "verdict", "reason", "noise",
    "minimum_detectable",
)  # fmt: skip
