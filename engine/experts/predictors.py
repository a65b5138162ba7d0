"""Which experts a layer will activate, before its router is asked."""

from __future__ import annotations

from collections import deque
from typing import Callable, Deque, Dict, List, Optional, Tuple

import numpy as np

from engine.experts.profile import ExpertSet, PathProfile


class Predictor:
    """Is told what each MoE layer did for one token, layers in their order, and asked about the next one."""

    def begin(self, token: int) -> None:
        """The next token to be decoded is known; its first layer has not run yet."""

    def observe(self, layer: int, chosen: ExpertSet, hidden: np.ndarray) -> None:
        """The router of `layer` chose `chosen`; `hidden` (hidden,) is the residual stream before its experts."""

    def predict(self, layer: int) -> List[int]:
        """Experts of `layer`, which follows the last one observed, the likeliest first; empty if nothing is known."""
        raise NotImplementedError


class PathPredictor(Predictor):
    """EdgeMoE's predictor: the experts that followed most often on those of the two previous MoE layers."""

    def __init__(self, profile: PathProfile) -> None:
        self._profile = profile
        self._previous: Deque[ExpertSet] = deque(maxlen=2)
        self._known: Dict[Tuple[int, Tuple[ExpertSet, ...]], List[int]] = {}

    def observe(self, layer: int, chosen: ExpertSet, hidden: np.ndarray) -> None:
        self._previous.append(chosen)

    def predict(self, layer: int) -> List[int]:
        key = (layer, tuple(self._previous))
        if key not in self._known:
            self._known[key] = self._profile.ranking(layer, key[1])
        return self._known[key]


class LookAheadPredictor(Predictor):
    """Asks the next layer's router already, with this layer's hidden state (HOBBIT, Fate and others).

    The residual stream changes little from layer to layer, so most of the answer is right; needs no profile. It is
    blind for the first layer of a token, whose input is not known before the token is.
    """

    def __init__(self, preview_router: Callable[[int, np.ndarray], np.ndarray]) -> None:
        """`preview_router(layer, hidden)`: logits (experts,) of that layer's router for a hidden state (hidden,)."""
        self._preview_router = preview_router
        self._last: Optional[Tuple[int, np.ndarray]] = None  # layer, hidden

    def observe(self, layer: int, chosen: ExpertSet, hidden: np.ndarray) -> None:
        self._last = (layer, hidden)

    def predict(self, layer: int) -> List[int]:
        if self._last is None or layer <= self._last[0]:
            return []
        ranked: List[int] = np.argsort(-self._preview_router(layer, self._last[1]), kind="stable").tolist()
        return ranked
