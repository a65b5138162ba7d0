"""Checks that DECISIONS.md is whole, and that it and CONTRIBUTING.md name files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "DECISIONS.md").read_text(encoding="utf-8")
INDEX, _, SECTIONS = TEXT.partition("\n## Scope\n")
HEADING = re.compile(r'^### (\d+)\. (.+) <a id="decision-(\d+)"></a>\n\nStatus: (.+)\n\n', re.MULTILINE)
STATUS = re.compile(r"(accepted|amended by \d+(, \d+)*|replaced by \d+)(, split from \d+)?")
ROW = re.compile(r"^\| \[(\d+)\]\(#decision-(\d+)\) \| (.+) \| (.+) \|$", re.MULTILINE)
NUMBERS = {int(heading[1]) for heading in HEADING.finditer(SECTIONS)}


def bodies() -> list[tuple[int, str]]:
    headings = list(HEADING.finditer(SECTIONS))
    ends = [heading.start() for heading in headings[1:]] + [len(SECTIONS)]
    found = zip(headings, ends, strict=True)
    return [(int(heading[1]), SECTIONS[heading.end() : end].split("\n## ")[0].strip()) for heading, end in found]


def test_the_index_lists_what_the_sections_say_in_their_order() -> None:
    listed = [(row[1], row[2], row[3], row[4]) for row in ROW.finditer(INDEX)]
    written = [(found[1], found[3], found[2], found[4]) for found in HEADING.finditer(SECTIONS)]
    assert listed == written
    assert len(written) == SECTIONS.count("\n### ")


def test_every_number_is_used_once() -> None:
    assert set(range(1, len(bodies()) + 1)) == NUMBERS


def test_a_status_names_other_decisions() -> None:
    for heading in HEADING.finditer(SECTIONS):
        assert STATUS.fullmatch(heading[4]), f"decision {heading[1]}: {heading[4]}"
        named = {int(number) for number in re.findall(r"\d+", heading[4])}
        assert named <= NUMBERS - {int(heading[1])}, f"decision {heading[1]}: {heading[4]}"


@pytest.mark.parametrize(("number", "body"), bodies(), ids=lambda value: value if isinstance(value, int) else "")
def test_a_decision_has_its_lines(number: int, body: str) -> None:
    labels = re.findall(r"^- \*\*(\w+):\*\* \S", body, re.MULTILINE)
    assert labels in (["Context", "Decision", "Consequence"], ["Context", "Decision", "Consequence", "Evidence"])
    assert body.startswith("- **Context:** ")
    references = {
        int(reference) for group in re.findall(r"\((\d+(?:, \d+)*)\)", body) for reference in group.split(", ")
    }
    assert references <= NUMBERS


@pytest.mark.parametrize("page", ["DECISIONS.md", "CONTRIBUTING.md"])
def test_every_file_that_it_names_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:engine|harness|reports|device_inventory|tests|ci)/[\w./-]*", text))
    named = {name.rstrip(".") for name in named if "NAME" not in name}  # a recipe's new file
    assert len(named) > 15
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_every_test_that_a_recipe_names_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 3
    assert {name for name in named if f"def {name}(" not in written} == set()
