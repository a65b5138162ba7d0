"""Text and values that a stranger would send, as hypothesis strategies."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

SNIPPETS = (
    "\x1b[31m", "\x1b]0;owned\x07", "\x1b]52;c;cm0gLXJm\x07", "\x9b2J", "\r", "\n", "\t", "\0", "\x7f", "\u202e",
    "\u2066", "\u2028", "\ud800", "\ufeff", "<script>alert(1)</script>", "<img src=x onerror=alert(2)>", "\"'&",
    "{{ 7 * 7 }}", "[red]", "[/]", "; touch owned", "$(touch owned)", "`touch owned`", "| touch owned", "../",
    "/etc/passwd", "-rf", "--", "~", "=cmd()", "%s%n", "CON", "'", "\\", " ", "*",
)  # fmt: skip
texts = st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=4), max_size=6).map("".join)
long_texts = st.builds(lambda text, n: text * n, texts, st.sampled_from((1, 1, 1, 50, 5000)))
numbers = (
    st.integers(-(2**70), 2**70)
    | st.sampled_from((0, -1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**400, 1e308, -1e308, 5e-324, -0.0))
    | st.floats()
)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | numbers | long_texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def nested(depth: int, inside: str = "1") -> str:
    return "[" * depth + inside + "]" * depth


@st.composite
def damaged(draw: st.DrawFn, good: dict[str, Any]) -> str:
    """A message as JSON in which up to three things have been replaced, removed or added, anywhere in it."""
    message = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(0, 3))):
        spot: Any = message
        while True:
            keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(spot[key], dict | list) and spot[key] and draw(st.integers(0, 3)):
                spot = spot[key]
                continue
            act = draw(st.integers(0, 9))
            if act == 0:
                del spot[key]
            elif act == 1 and isinstance(spot, dict):
                spot[draw(texts)] = draw(values)
            elif act == 2 and isinstance(spot, list):
                spot.extend([draw(values)] * draw(st.sampled_from((1, 1000))))
            else:
                spot[key] = draw(values)
            break
    text = json.dumps(message)
    if draw(st.integers(0, 9)) == 0:  # JSON of a depth that only some of Python's code can bear
        text = text.replace("1", nested(draw(st.integers(1, 1200))), 1)
    return text
