"""What the engine offers, for the command line to list."""

from __future__ import annotations

from typing import Any

from engine.strategies import STRATEGIES


def strategies() -> list[dict[str, Any]]:
    """Name, summary, source, lossless and parts of each strategy, in the order of the table."""
    return [strategy.describe() for strategy in STRATEGIES.values()]
