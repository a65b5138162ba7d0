"""Reads sizes as people write them."""

from __future__ import annotations

from typing import Optional

_BYTE_SUFFIXES = (
    ("kib", 1 << 10), ("mib", 1 << 20), ("gib", 1 << 30), ("kb", 10**3), ("mb", 10**6), ("gb", 10**9), ("b", 1),
)  # fmt: skip


def size_of(text: str) -> Optional[int]:
    """Returns the bytes of `16777216`, `64MiB` or `64 MB`; None where the text is not a size."""
    number, factor = text.strip().lower().replace(" ", "").replace("_", ""), 1
    for suffix, value in _BYTE_SUFFIXES:
        if number.endswith(suffix):
            number, factor = number[: -len(suffix)], value
            break
    try:
        size = float(number) * factor
    except ValueError:
        return None
    return int(size) if 0 < size < 1 << 62 else None
