"""Runs a container under a strategy, token by token as in decoding, to measure what a lossy strategy loses."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import numpy as np

from engine.container import Container
from engine.experts.profile import PathProfile
from engine.generate import Engine
from engine.models.interface import ModelConfig
from engine.protocol import ExpertBudget, Passage, Sampling
from engine.strategies import strategy_named


class DecodingModel:
    """Computes logits of given tokens while the strategy decides which experts are read, replaced or preferred.

    Holds a thread and a file: close it, or use it in a `with` block. Raises EngineError where the strategy cannot run.
    """

    def __init__(
        self, container: str, strategy: str, *, expert_budget: ExpertBudget | None = None, profile: str | None = None
    ) -> None:
        self._engine = Engine(
            Container.open(container),
            strategy_named(strategy),
            expert_budget=expert_budget,
            profile=None if profile is None else PathProfile.load(profile),
        )

    @property
    def config(self) -> ModelConfig:
        return self._engine.model.config

    def answers(self, passage: Passage) -> np.ndarray:
        """Returns the logits that predict each token of the continuation, (len(continuation), vocab).

        Raises RequestError, StorageError.
        """
        return np.stack(list(self._engine.predict(passage)))

    def generate(self, prompt: Sequence[int], most: int) -> tuple[int, ...]:
        """Returns the likeliest continuation, up to `most` tokens or the end-of-sequence token."""
        return self._engine.generate(tuple(prompt), most, Sampling(), stop_at_eos=True)[0]

    def __enter__(self) -> DecodingModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.close()
