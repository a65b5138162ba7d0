import csv
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from reports.judging.judgement import GATED, Side, compare_sides
from reports.judging.tables import FORMATS, totals
from reports.text import marked
from tests.reports.judging.test_judgement import AFTER, other_tokens, steady
from tests.security.hostile import SNIPPETS

_KEYS = {"metric", "baseline", "candidate", "ratio", "ci_low", "ci_high", "verdict"}


@pytest.fixture
def comparison(make):
    """Something of everything."""
    slower = [other_tokens(run) for run in steady(make, sweep=AFTER, factor=1.2)]
    gone = steady(make, device="jetson-tx2-emulated")
    other = steady(make, strategy="full-load")
    refused = [replace(run, emulated=()) for run in steady(make, strategy="full-load", sweep=AFTER)]
    after = [replace(run, facts=replace(run.facts, kernel="6.12")) for run in (*slower, *refused)]
    return compare_sides(Side("before", (*steady(make), *gone, *other)), Side("after", tuple(after)), GATED)


def test_json_has_every_pair_with_plain_numbers(comparison) -> None:
    content = json.loads(FORMATS["json"](comparison))
    assert (content["baseline"], content["candidate"], content["exit_code"]) == ("before", "after", 1)
    assert all(pair.keys() >= _KEYS for pair in content["pairs"])
    (tpot,) = (pair for pair in content["pairs"] if pair["metric"] == "tpot_s")
    assert tpot["candidate"] / tpot["baseline"] == pytest.approx(tpot["ratio"]) == pytest.approx(1.2)
    assert tpot["ci_low"] < 1.2 < tpot["ci_high"]
    assert (tpot["device"], tpot["unit"], tpot["verdict"]) == ("pi4b-emulated", "s", "worse")
    assert {(pair["metric"], pair["verdict"]) for pair in content["pairs"]} >= {("answer", "worse"), ("result", "gone")}
    assert content["incomparable"][0]["reason"].startswith("emulation: ")
    assert {"what": "pi4b-emulated: kernel", "baseline": "6.6.31+rpt-rpi-v8", "candidate": "6.12"} in (
        content["environment"]
    )


def test_csv_has_a_row_a_pair(comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(FORMATS["csv"](comparison))))
    assert len(rows) == len(comparison.judged)
    tpot = next(row for row in rows if row["metric"] == "tpot_s")
    assert float(tpot["ratio"]) == pytest.approx(1.2)
    assert next(row for row in rows if row["metric"] == "result")["ratio"] == ""


def test_markdown_and_latex_have_rows_reasons_and_differences(comparison) -> None:
    markdown = FORMATS["markdown"](comparison)
    assert markdown.startswith("**after** against **before**: ")
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(comparison.judged)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {10}
    assert "- pi4b-emulated: kernel: 6.6.31+rpt-rpi-v8 → 6.12" in markdown
    assert "1.200 | 1.1" in markdown
    latex = FORMATS["latex"](comparison)
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + len(comparison.judged)
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {7}
    assert "% not comparable: " in latex


def test_totals_are_in_words(comparison) -> None:
    assert totals(comparison) == "3 worse, 1 unchanged, 1 gone, 1 not comparable"


@pytest.mark.parametrize("text", [*SNIPPETS, r"100% of \input{x} & $y_1$ #~^", "a|b\nc", '=cmd|" /C calc"!A0'])
def test_what_strangers_say_stays_text(comparison, text) -> None:
    cell = replace(comparison.judged[0].cell, workload=r"=<b>|&_\input{x}", strategy="@x")
    hostile = replace(
        comparison,
        candidate=text,
        judged=tuple(replace(judged, reason=text, cell=cell) for judged in comparison.judged),
        incomparable=((text, text),),
        environment=((text, text, text),),
    )
    output = {name: write(hostile) for name, write in FORMATS.items()}
    assert all(found.encode() for found in output.values())  # half a surrogate pair has none
    assert json.loads(output["json"])["pairs"][0]["reason"] == text
    shown = marked(text)
    rows = list(csv.DictReader(io.StringIO(output["csv"], newline="")))
    assert len(rows) == len(comparison.judged)
    assert rows[0]["reason"] in (shown, f"'{shown}")
    assert not any(row[name].startswith(("=", "+", "-", "@")) for row in rows for name in ("reason", "strategy"))
    for name in ("markdown", "latex"):
        assert len(output[name].splitlines()) == len(FORMATS[name](comparison).splitlines())
    table = [line for line in output["markdown"].splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {10}
    assert not re.search(r"(?<!\\)[<*`]", output["markdown"].replace("**", ""))
    assert r"\input" not in output["latex"].split(r"\begin{tabular}")[1]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on this machine")
def test_latex_is_latex(comparison, tmp_path) -> None:
    document = r"\documentclass{article}\usepackage{booktabs}\begin{document}" + "\n"
    (tmp_path / "a.tex").write_text(f"{document}{FORMATS['latex'](comparison)}\\end{{document}}\n")
    subprocess.run(["pdflatex", "-halt-on-error", "a.tex"], cwd=tmp_path, check=True, capture_output=True, timeout=100)
