"""Text from strangers, made harmless: what a device, a model or another controller wrote, before people see it."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

# ECMA-48 control sequences, and operating system commands such as a terminal's title.
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?")


def harmless(text: object, *, limit: int | None = None, lines: bool = False, instead: str = " ") -> str:
    """Returns `text` without anything that could act on a terminal, a log or a page.

    Terminal escapes, control characters, direction marks and other invisible characters become `instead`. The result
    is one line unless `lines` is set, which keeps line breaks, tabs and spaces of other widths. `limit` keeps that
    many characters of the beginning.
    """
    shown = str(text)
    if limit is not None:
        shown = shown[: 4 * limit]  # what follows costs time for each character, and a device may send megabytes
    if not shown.isprintable():
        shown = _ESCAPES.sub(lambda _: instead, shown)
        shown = "".join(c if c.isprintable() or (lines and _is_space(c)) else instead for c in shown)
    return shown[:limit]


def marked(text: str) -> str:
    """Returns harmless text that keeps its lines, with U+FFFD in place of what could act."""
    return harmless(text, lines=True, instead="\ufffd")


def markdown(text: str) -> str:
    """Returns a stranger's text as one line of Markdown in which nothing is mark-up, HTML, a link or a mention."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~&@])", r"\\\1", harmless(text))


_FORMULA = re.compile(r"""((?:^|[;|\t\r\n])["'\s]*)(?=[=+\-@])|^(?=[\t\r])""")


def inert(value: Any) -> Any:
    """Returns a cell of a spreadsheet that is no formula: a quote goes before text that would begin one.

    That may be in its midst, too: half of Europe reads lists by semicolons, and others by tabs or bars.
    """
    return _FORMULA.sub(r"\1'", value) if isinstance(value, str) else value


def _is_space(character: str) -> bool:
    return character in "\n\t" or unicodedata.category(character) == "Zs"
