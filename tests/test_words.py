"""Prose is readable at first sight: sentences are short, and docstrings begin with a sentence."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "MANUAL.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "DECISIONS.md", "CHANGELOG.md")
MOST_WORDS = 35
MOST_LONG = 0.03  # share of sentences that may have more


def sentences(text: str) -> Iterator[str]:
    """Yields the sentences of Markdown or a docstring; blocks, tables and headings are none."""
    text = re.sub(r"^```.*?^```|^[|#][^\n]*$", "", text, flags=re.S | re.M)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*[-*] |\s*\d+\. )", text):
        for sentence in re.split(r"(?<=[.!?:])\s+", " ".join(re.sub(r"`[^`]*`", "x", paragraph).split())):
            if sentence:
                yield sentence


def docstrings() -> Iterator[tuple[Path, str]]:
    for folder in ("engine", "harness", "reports", "device_inventory", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                    yield path, text


def test_long_and_short_sentences_are_told_apart() -> None:
    text = "One thought. Another:\n- `a b c` is it\n- " + "word " * 40 + "\n\n```\n" + "code " * 50 + "\n```\n"
    assert [len(sentence.split()) for sentence in sentences(text)] == [2, 1, 4, 41]


@pytest.mark.parametrize("page", PAGES)
def test_sentences_of_the_pages_are_short(page: str) -> None:
    lengths = [len(sentence.split()) for sentence in sentences((ROOT / page).read_text(encoding="utf-8"))]
    assert len(lengths) > 20
    assert sum(n > MOST_WORDS for n in lengths) < MOST_LONG * len(lengths)


def test_sentences_of_docstrings_are_short() -> None:
    lengths = [len(sentence.split()) for _, text in docstrings() for sentence in sentences(text)]
    assert len(lengths) > 3000
    assert sum(n > MOST_WORDS for n in lengths) < MOST_LONG * len(lengths)


def test_docstrings_begin_with_a_sentence() -> None:
    for path, text in docstrings():
        assert not re.match(r"(Of|As|By which|By what|Who|Whose|Whom) ", text), f"{path}: {text.splitlines()[0]}"


def test_the_readme_fits_a_few_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 140
