"""One function makes a stranger's text harmless."""

from __future__ import annotations

import pytest

from reports.text import harmless, inert, markdown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ordinary – ü 漢 字", "ordinary – ü 漢 字"),
        ("\x1b[31mred\x1b[0m", " red "),
        ("\x1b]0;owned\x07title", " title"),
        ("cut \x1b", "cut  "),
        ("two\nlines\tand\u202fa thin space", "two lines and a thin space"),
        ("turned \u202e, joined \u200b, half \ud800, private \ue000", "turned  , joined  , half  , private  "),
        (ValueError("an error\r"), "an error "),
        (12, "12"),
    ],
)
def test_one_line_without_anything_invisible(text: object, shown: str) -> None:
    assert harmless(text) == shown
    assert harmless(text).isprintable()


def test_lines_and_spaces_stay_where_they_are_wanted() -> None:
    text = "a\x1b[31mred\x1b[0m \x1b]0;title\x07b\u202ec\x00\r\td\ne\u202f1\u2028f"
    assert harmless(text, lines=True, instead="") == "ared bc\td\ne\u202f1f"
    assert harmless("a\x1b[31mb\0c", lines=True, instead="\ufffd") == "a\ufffdb\ufffdc"


def test_no_more_than_the_limit() -> None:
    assert harmless("x" * 100_000, limit=400) == "x" * 400
    assert harmless("x\n" * 100_000, limit=3) == "x x"
    assert harmless("\x1b[1m" * 100_000, limit=10) == " " * 10


def test_markdown_has_no_marks_of_a_stranger() -> None:
    assert markdown("a|b\n*c* <d> @e") == r"a\|b \*c\* \<d\> \@e"


def test_a_cell_of_a_spreadsheet_is_no_formula() -> None:
    assert [inert(value) for value in ("=1+1", "@x", "a=1", 3, None)] == ["'=1+1", "'@x", "a=1", 3, None]
    assert [inert(value) for value in ("pi;=1", "pi; +1", "a\t@x", "a\n=1", "a|-1", 'a;"=1', "\tx", "a;b=1", "-5")] == [
        "pi;'=1", "pi; '+1", "a\t'@x", "a\n'=1", "a|'-1", "a;\"'=1", "'\tx", "a;b=1", "'-5",
    ]  # fmt: skip
