"""What the engine offers, for the command line to list."""

from __future__ import annotations

from typing import Any

from engine.strategies import STRATEGIES


def strategies() -> list[dict[str, Any]]:
    """Name, summary, source, lossless and parts of each strategy, in the order of the table."""
    return [
        {"name": s.name, "summary": s.summary, "source": s.source, "lossless": s.lossless, "parts": s.parts()}
        for s in STRATEGIES.values()
    ]
