"""Lists the strategies: each is a row of parts."""

from __future__ import annotations

from typing import Any, Dict, Optional

from engine.dataclass import dataclass
from engine.errors import RequestError
from engine.experts.eviction import POLICIES
from engine.experts.predictors import PREDICTORS
from engine.protocol import ExpertBudget


@dataclass(frozen=True)
class Strategy:
    """Says who holds experts and when they arrive. Each part is described where it is implemented, in experts/."""

    name: str
    summary: str
    source: str
    # all: every expert before the first token · none: kept for one use · stream: as none, but whole layers at a time ·
    # buffer: within a budget
    residency: str
    precision: str = "stored"  # stored: each expert's primary record; or the one in this precision
    form: str = "packed"  # of experts in memory: packed, as they are stored; or dequantised, to FP32
    eviction: Optional[str] = None  # a row of POLICIES
    predictor: Optional[str] = None  # a row of PREDICTORS: an I/O thread preloads what it predicts
    prefetch_depth: Optional[int] = None  # experts preloaded for a layer at most; None: the model's top-k
    relief: Optional[str] = None  # a row of RELIEFS: what it does instead of reading what was asked for
    adaptive: bool = False  # the preloader switches itself off where it does not pay
    default_budget: Optional[ExpertBudget] = None
    lossless: bool = True  # gives the tokens of the container's stored precision

    @property
    def needs_profile(self) -> bool:
        """Tells whether one of its parts works with paths or frequencies, which come from a profile."""
        predicts = self.predictor is not None and PREDICTORS[self.predictor].needs_profile
        return predicts or (self.eviction is not None and POLICIES[self.eviction].needs_profile)

    def parts(self) -> Dict[str, str]:
        return {
            "residency": self.residency,
            "eviction": self.eviction or "none",
            "predictor": self.predictor or "none",
            "preloading": "none" if not self.threaded else "adaptive" if self.adaptive else "always",
            "precision": self.precision,
            "form": self.form,
            "relief": self.relief or "none",
        }

    @property
    def has_budget(self) -> bool:
        """Tells whether an expert budget means something to it."""
        return self.residency in ("buffer", "stream")

    @property
    def threaded(self) -> bool:
        """Tells whether experts are read on a thread of their own."""
        return self.predictor is not None or self.residency == "stream"

    def describe(self) -> Dict[str, Any]:
        """Returns the row, for people and machines."""
        return {
            "name": self.name,
            "summary": self.summary,
            "source": self.source,
            "lossless": self.lossless,
            "has_budget": self.has_budget,
            "needs_profile": self.needs_profile,
            "parts": self.parts(),
        }


_PAPER = "EdgeMoE, IEEE TMC 2025"
_TEN_EXPERTS = ExpertBudget(experts=10)  # the default of all the paper's experiments

STRATEGIES: Dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy(
            "full-load",
            "every expert in memory before the first token",
            f"IO-FREE in {_PAPER}",
            residency="all",
        ),
        Strategy(
            "full-load-int8",
            "full-load with every expert in INT8",
            f"IO-QFREE in {_PAPER}",
            residency="all",
            precision="int8",
            lossless=False,
        ),
        Strategy(
            "naive-swap",
            "reads each expert when it is activated and keeps none",
            f"IO-EXP in {_PAPER}",
            residency="none",
        ),
        Strategy(
            "naive-swap-int4",
            "naive-swap with every expert in INT4",
            f"IO-QEXP in {_PAPER}",
            residency="none",
            precision="int4",
            lossless=False,
        ),
        Strategy(
            "naive-swap-int2",
            "naive-swap with every expert in INT2",
            f"IO-QEXP in {_PAPER}",
            residency="none",
            precision="int2",
            lossless=False,
        ),
        Strategy(
            "sti",
            "streams all experts of each layer through a preload buffer, whatever the router says",
            "STI, ASPLOS 2023, with experts as its shards: a baseline of the EdgeMoE paper",
            residency="stream",
            default_budget=_TEN_EXPERTS,
        ),
        Strategy(
            "edgemoe-bitwidths",
            "ablation: naive-swap, to be run on a container of adapted bitwidths",
            f"{_PAPER}, figure 18",
            residency="none",
        ),
        Strategy(
            "edgemoe-preload",
            "ablation: edgemoe-bitwidths that preloads what the activation path predicts, and keeps nothing",
            f"{_PAPER}, figure 18",
            residency="none",
            predictor="path",
        ),
        Strategy(
            "edgemoe-buffer",
            "ablation: edgemoe without preloading",
            f"{_PAPER}, figure 14",
            residency="buffer",
            eviction="forward-distance",
            default_budget=_TEN_EXPERTS,
        ),
        Strategy(
            "edgemoe",
            "expert buffer with a byte budget; preloads what the activation path predicts while the layer computes",
            f"{_PAPER}, sections 3.2 to 3.4",
            residency="buffer",
            eviction="forward-distance",
            predictor="path",
            default_budget=_TEN_EXPERTS,
        ),
        Strategy(
            "edgemoe-dequantised",
            "edgemoe with a buffer of experts in FP32: fewer of them in a budget, and less arithmetic at each use",
            f"{_PAPER}, on Jetson and Raspberry Pi",
            residency="buffer",
            form="dequantised",
            eviction="forward-distance",
            predictor="path",
            default_budget=_TEN_EXPERTS,
        ),
        Strategy(
            "edgemoe-online",
            "edgemoe that weighs experts by their recent uses instead of the profile's frequencies",
            f"the paper's formula, {_PAPER}, section 3.4, with a frequency learned while running: ours",
            residency="buffer",
            eviction="online-distance",
            predictor="path",
            default_budget=_TEN_EXPERTS,
        ),
        Strategy(
            "edgemoe-lookahead",
            "edgemoe, but asks the next layer's router ahead of time instead of a dictionary of paths",
            "gate look-ahead as in HOBBIT (2024) and Fate (2025), in EdgeMoE's pipeline",
            residency="buffer",
            eviction="online-distance",
            predictor="look-ahead",
            default_budget=_TEN_EXPERTS,
        ),
        Strategy(
            "edgemoe-combined",
            "edgemoe-lookahead that asks token id and paths too, and hears whoever was right on that layer of late",
            "ours: the token id is known before the first layer, where looking ahead is blind",
            residency="buffer",
            eviction="online-distance",
            predictor="combined",
            default_budget=_TEN_EXPERTS,
        ),
        Strategy(
            "edgemoe-oracle",
            "edgemoe that is told the routers' choices, from a rehearsal of each prompt: no predictor can do more",
            "ours: the upper bound",
            residency="buffer",
            eviction="online-distance",
            predictor="oracle",
            default_budget=_TEN_EXPERTS,
        ),
        Strategy(
            "edgemoe-adaptive",
            "edgemoe-combined with a preloader that switches itself off where measurement shows that it does not pay",
            "ours: preloading hides latency and saves no byte, so on saturated storage it can only lose",
            residency="buffer",
            eviction="online-distance",
            predictor="combined",
            adaptive=True,
            default_budget=_TEN_EXPERTS,
        ),
        Strategy(
            "edgemoe-lowbit",
            "edgemoe-adaptive that reads a missing expert in its fewest bits where the router gives it little weight",
            "low-bit substitutes as in HOBBIT (2024)",
            residency="buffer",
            eviction="online-distance",
            predictor="combined",
            relief="low-bit",
            adaptive=True,
            default_budget=_TEN_EXPERTS,
            lossless=False,
        ),
        Strategy(
            "edgemoe-cacheaware",
            "edgemoe-adaptive whose routers prefer experts in memory where they are nearly indifferent",
            "cache-prior: Skliar et al., Mixture of Cache-Conditional Experts (2024)",
            residency="buffer",
            eviction="online-distance",
            predictor="combined",
            relief="cache-aware",
            adaptive=True,
            default_budget=_TEN_EXPERTS,
            lossless=False,
        ),
    )
}


def strategy_named(name: str) -> Strategy:
    """Returns the row of the table. Raises RequestError."""
    try:
        return STRATEGIES[name]
    except KeyError:
        raise RequestError(f"strategy {name!r} is not one of {', '.join(STRATEGIES)}") from None
