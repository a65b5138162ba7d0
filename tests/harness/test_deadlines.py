from __future__ import annotations

import pytest

from harness.deadlines import parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("6h", 21600), ("90m", 5400), ("1h30m", 5400), ("1h 30min", 5400), ("2d", 172800), ("45", 45), (" 0.5H ", 1800)],
)
def test_durations(text, seconds) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "6 parsecs", "-1h", "0", "nan", "1e9", "6h or so"])
def test_what_is_no_duration(text) -> None:
    assert parse_duration(text) is None
