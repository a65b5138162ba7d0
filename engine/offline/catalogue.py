"""What the engine offers, for the command line to list."""

from __future__ import annotations

from engine.strategies import STRATEGIES


def strategies() -> list[dict[str, str]]:
    """Name, summary, source and parts of each strategy, in the order of the table."""
    return [{"name": s.name, "summary": s.summary, "source": s.source, **s.parts()} for s in STRATEGIES.values()]
