"""Every eviction policy with every predictor, under random timing of the reads: the same tokens."""

from __future__ import annotations

import dataclasses
import random
import time

import pytest

from engine.container import Container
from engine.experts.eviction import POLICIES
from engine.experts.predictors import PREDICTORS
from engine.experts.profile import PathProfile
from engine.experts.store import ExpertStore
from engine.generate import Engine
from engine.protocol import ExpertBudget, Sampling
from engine.strategies import STRATEGIES

PROMPT = (1, 17, 5, 80, 33)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("predictor", [None, *PREDICTORS])
@pytest.mark.parametrize("model", ["container", "switch"])
def test_any_policy_with_any_predictor_gives_the_same_tokens(
    model: str,
    policy: str,
    predictor: str | None,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    container: Container = request.getfixturevalue(model)
    profile: PathProfile = request.getfixturevalue("profile" if model == "container" else "switch_profile")
    expected = generate(container, profile, STRATEGIES["full-load"].name, None)
    strategy = dataclasses.replace(
        STRATEGIES["edgemoe"], name="mixture", eviction=policy, predictor=predictor, prefetch_depth=3
    )
    monkeypatch.setitem(STRATEGIES, "mixture", strategy)
    chooser = random.Random(f"{policy} {predictor}")
    read = ExpertStore.read

    def unsteady(self: ExpertStore, *arguments: object) -> int:
        if chooser.random() < 0.2:
            time.sleep(chooser.random() * 1e-3)
        return read(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ExpertStore, "read", unsteady)
    for budget in (1, 2, 5, 9):
        assert generate(container, profile, "mixture", budget) == expected


def generate(container: Container, profile: PathProfile, strategy: str, budget: int | None) -> tuple[int, ...]:
    engine = Engine(
        container,
        STRATEGIES[strategy],
        profile=profile,
        expert_budget=None if budget is None else ExpertBudget(experts=budget),
    )
    try:
        tokens, _ = engine.generate(PROMPT, 12, Sampling())
        assert engine.supply.buffer.budget_bytes is None or (
            engine.supply.buffer.held_bytes <= engine.supply.buffer.budget_bytes
        )
        return tokens
    finally:
        engine.close()
