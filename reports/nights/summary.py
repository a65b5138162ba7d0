"""A night in a few lines: Markdown for people, JUnit XML for CI, a small JSON object for a webhook."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree import ElementTree

from reports import text
from reports.judging.judgement import Mark
from reports.nights.night import Finding, Kind, Night
from reports.records import Cell

TITLES = {
    Kind.REGRESSION: "Regressions",
    Kind.MISSING: "Missing results",
    Kind.INFRASTRUCTURE: "Infrastructure",
    Kind.INCONCLUSIVE: "Inconclusive",
}
_ELEMENTS = {
    Kind.REGRESSION: "failure",
    Kind.MISSING: "error",
    Kind.INFRASTRUCTURE: "error",
    Kind.INCONCLUSIVE: "skipped",
}
_MOST_SHOWN = 50  # of one kind


def summary_line(night: Night) -> str:
    """Returns one line: how the night ended."""
    parts = [f"{n} {title.lower()}" for kind, title in TITLES.items() if (n := len(_of(night.findings, kind)))]
    if night.acknowledged:
        parts.append(f"{len(night.acknowledged)} acknowledged")
    against = f" against {night.baseline}" if night.baseline else ""
    return f"{night.name}, sweep {night.sweep_id}{against}: {', '.join(parts) or 'no regression'}"


def markdown(night: Night) -> str:
    """Returns the summary for a CI job, a chat or a mail."""
    lines = [f"## {text.markdown(summary_line(night))}", ""]
    for kind, title in TITLES.items():
        lines += _section(title, _of(night.findings, kind))
    lines += _section("Acknowledged", night.acknowledged)
    if night.confirmations:
        lines += ["### Measured again", "", "| cell | metric | result |", "|---|---|---|"]
        rows = night.confirmations[:_MOST_SHOWN]
        lines += [f"| {_code(c.cell.key)} | {text.markdown(c.metric)} | {text.markdown(c.note)} |" for c in rows] + [""]
    if night.comparison is not None:
        better = [j for j in night.comparison.judged if j.mark is Mark.BETTER]
        if better:
            lines += [f"{len(better)} better than the baseline.", ""]
        if night.too_noisy:
            lines += [f"Too noisy to say in {night.too_noisy} of {len(night.comparison.judged)} comparisons.", ""]
        if night.comparison.environment:
            lines += ["### Differences of environment", ""]
            changes = night.comparison.environment[:_MOST_SHOWN]
            lines += [
                f"- {text.markdown(what)}: {text.markdown(before)} → {text.markdown(after)}"
                for what, before, after in changes
            ] + [""]
    return "\n".join(lines).rstrip() + "\n"


def junit(night: Night) -> bytes:
    """Returns a test case for each cell: regressions fail, missing results are errors, inconclusive ones skipped.

    A cell of which nothing was measured in this night has not passed, whatever else is known of it: it is an error.
    """
    by_cell: dict[str, list[Finding]] = {cell.key: [] for cell in _cells(night)}
    cells = {cell.key: cell for cell in _cells(night)}
    for finding in night.findings:
        by_cell.setdefault(finding.cell.key if finding.cell else "", []).append(finding)
    measured = _measured(night)
    for key, planned in cells.items():
        if not by_cell[key] and key not in measured:
            by_cell[key] = [Finding(Kind.MISSING, "nothing of it was measured in this night", planned)]
    suite = ElementTree.Element("testsuite", name=_xml(night.name), timestamp=night.at[:19], tests=str(len(by_cell)))
    counts = dict.fromkeys(_ELEMENTS.values(), 0)
    for key, findings in by_cell.items():
        cell = cells.get(key)
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=_xml(cell.device if cell else night.name),
            name=_xml(cell.key_on_device if cell else "the night"),
        )
        if findings:
            gravest = min(findings, key=lambda f: list(Kind).index(f.kind))
            element = _ELEMENTS[gravest.kind]
            counts[element] += 1
            told = ElementTree.SubElement(case, element, message=_xml(str(gravest)), type=gravest.kind.value)
            told.text = _xml("\n".join(str(finding) for finding in findings))
    for element, name in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        suite.set(name, str(counts[element]))
    content: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return content


def payload(night: Night) -> dict[str, Any]:
    """Returns the object for a webhook; chat services show its `text`."""
    return {
        "text": summary_line(night),
        "name": night.name,
        "sweep": night.sweep_id,
        "baseline": night.baseline,
        "at": night.at,
        "exit_code": night.exit_code,
        "findings": [
            {
                "kind": finding.kind.value,
                "device": finding.cell.device if finding.cell else None,
                "strategy": finding.cell.strategy if finding.cell else None,
                "cell": finding.cell.key if finding.cell else None,
                "metric": finding.metric or None,
                "reason": finding.reason,
            }
            for finding in night.findings[:_MOST_SHOWN]
        ],
        "acknowledged": len(night.acknowledged),
    }


def _cells(night: Night) -> Iterable[Cell]:
    judged = night.comparison.judged if night.comparison else ()
    found = [j.cell for j in judged] + [t.cell for t in night.trends]
    found += [f.cell for f in night.findings if f.cell is not None]
    return {cell.key: cell for cell in found}.values()


def _measured(night: Night) -> set[str]:
    """Returns the keys of the cells of which the night has a value."""
    judged = night.comparison.judged if night.comparison else ()
    found = {j.cell.key for j in judged if j.candidate is not None}
    return found | {t.cell.key for t in night.trends if t.points and t.points[-1].sweep_id == night.sweep_id}


def _of(findings: Iterable[Finding], kind: Kind) -> list[Finding]:
    return [finding for finding in findings if finding.kind is kind]


def _section(title: str, findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return []
    lines = [f"### {title}", ""]
    for finding in findings[:_MOST_SHOWN]:
        where = f"{_code(finding.cell.key)}: " if finding.cell else ""
        metric = f"{text.markdown(finding.metric)}: " if finding.metric else ""
        lines.append(f"- {where}{metric}{text.markdown(finding.reason)}")
    if len(findings) > _MOST_SHOWN:
        lines.append(f"- and {len(findings) - _MOST_SHOWN} more")
    return [*lines, ""]


def _code(name: str) -> str:
    return "`" + re.sub("[`|]", " ", text.harmless(name)) + "`"


def _xml(content: str) -> str:
    return text.marked(content)
