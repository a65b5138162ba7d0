"""The table of strategies: each a row of parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Optional

from engine.errors import RequestError
from engine.protocol import ExpertBudget


@dataclass(frozen=True)
class Strategy:
    """Who holds experts and when they arrive. What a part does is described where it is implemented, in experts/."""

    name: str
    summary: str
    source: str
    residency: str  # all: every expert before the first token · none: kept for one use · buffer: within a budget
    eviction: Optional[str] = None  # lru, forward-distance
    predictor: Optional[str] = None  # path, look-ahead; with one, an I/O thread preloads what it predicts
    prefetch_depth: Optional[int] = None  # experts preloaded for a layer at most; None: the model's top-k
    default_budget: Optional[ExpertBudget] = None
    lossless: bool = True

    @property
    def needs_profile(self) -> bool:
        """Paths, and the frequencies that weigh experts against one another, come from a profile."""
        return self.predictor == "path" or self.eviction == "forward-distance"

    def parts(self) -> Dict[str, str]:
        return {
            "residency": self.residency,
            "eviction": self.eviction or "none",
            "predictor": self.predictor or "none",
            "precision": "stored",
        }

    def describe(self) -> Dict[str, Any]:
        """The row, for people and machines."""
        return {
            "name": self.name,
            "summary": self.summary,
            "source": self.source,
            "lossless": self.lossless,
            "needs_profile": self.needs_profile,
            "parts": self.parts(),
        }


STRATEGIES: Dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy(
            "full-load",
            "every expert in memory before the first token",
            "IO-FREE in the EdgeMoE paper",
            residency="all",
        ),
        Strategy(
            "naive-swap",
            "reads each expert when it is activated and keeps none",
            "IO-EXP in the EdgeMoE paper",
            residency="none",
        ),
        Strategy(
            "edgemoe",
            "expert buffer with a byte budget; preloads what the activation path predicts while the layer computes",
            "EdgeMoE, IEEE TMC 2025, sections 3.2 to 3.4",
            residency="buffer",
            eviction="forward-distance",
            predictor="path",
            default_budget=ExpertBudget(experts=10),
        ),
        Strategy(
            "edgemoe-lookahead",
            "edgemoe, but asks the next layer's router ahead of time instead of a dictionary of paths",
            "gate look-ahead as in HOBBIT (2024) and Fate (2025), in EdgeMoE's pipeline",
            residency="buffer",
            eviction="forward-distance",
            predictor="look-ahead",
            default_budget=ExpertBudget(experts=10),
        ),
    )
}


def strategy_named(name: str) -> Strategy:
    try:
        return STRATEGIES[name]
    except KeyError:
        raise RequestError(f"strategy {name!r} is not one of {', '.join(STRATEGIES)}") from None
