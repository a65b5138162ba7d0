"""The preloader's own judgement: is it worth it, and how good were the predictions."""

from __future__ import annotations

import dataclasses

import numpy as np

from engine.container import Container
from engine.experts.governor import RETRIAL_EVERY, TRIAL_TOKENS, PreloadGovernor
from engine.experts.profile import PathProfile
from engine.experts.relief import CacheAwareRouting, LowBitMisses
from engine.generate import Engine
from engine.protocol import ExpertBudget, Sampling
from engine.strategies import STRATEGIES

PROMPT = (1, 17, 5, 80, 33)


def preloaded_tokens(seconds_with: float, seconds_without: float, tokens: int) -> list[bool]:
    """Which of the tokens were decoded with preloading, if a token costs so much with and without it."""
    governor, decisions = PreloadGovernor(), []
    for _ in range(tokens):
        decisions.append(governor.preloading)
        governor.decoded(seconds_with if governor.preloading else seconds_without)
    return decisions


def test_the_governor_settles_on_what_is_faster_and_goes_on_trying_the_other() -> None:
    tokens = 10 * RETRIAL_EVERY * TRIAL_TOKENS
    late = tokens // 2
    gain = preloaded_tokens(0.8, 1.0, tokens)[late:]
    loss = preloaded_tokens(1.0, 0.8, tokens)[late:]
    assert sum(gain) / len(gain) == 1 - 1 / RETRIAL_EVERY
    assert sum(loss) / len(loss) == 1 / RETRIAL_EVERY


def test_the_governor_changes_its_mind_when_the_storage_does() -> None:
    governor = PreloadGovernor()
    for _ in range(5 * RETRIAL_EVERY * TRIAL_TOKENS):
        governor.decoded(1.0 if governor.preloading else 0.8)
    decisions = []
    for _ in range(60 * RETRIAL_EVERY * TRIAL_TOKENS):
        governor.decoded(0.5 if governor.preloading else 0.8)
        decisions.append(governor.preloading)
    assert sum(decisions[-RETRIAL_EVERY * TRIAL_TOKENS :]) > RETRIAL_EVERY * TRIAL_TOKENS / 2


def test_one_slow_token_in_a_trial_convinces_nobody() -> None:
    governor = PreloadGovernor()
    decisions = []
    for token in range(6 * RETRIAL_EVERY * TRIAL_TOKENS):
        hiccup = 50.0 if governor.preloading and token % TRIAL_TOKENS == 2 else 0.0
        governor.decoded((0.8 if governor.preloading else 1.0) + hiccup)
        decisions.append(governor.preloading)
    assert sum(decisions[-RETRIAL_EVERY * TRIAL_TOKENS :]) > RETRIAL_EVERY * TRIAL_TOKENS / 2


def engine_with(container: Container, profile: PathProfile, name: str, budget: int | None) -> Engine:
    return Engine(
        container,
        STRATEGIES[name],
        profile=profile,
        expert_budget=None if budget is None else ExpertBudget(experts=budget),
    )


def test_predictions_are_scored_against_what_the_router_says(container: Container, profile: PathProfile) -> None:
    engine = engine_with(container, profile, "edgemoe-lookahead", 12)
    try:
        asked: list[int] = []
        right = [0, 0, 0]
        predictor = engine.supply._predictor
        assert predictor is not None
        rank, fetch = predictor.predict, engine.supply.fetch
        said: dict[int, list[int]] = {}

        def predict(layer: int) -> list[int]:
            said[layer] = rank(layer)
            return said[layer]

        def count(layer, chosen, shares, hidden):  # type: ignore[no-untyped-def]
            if len(chosen) == 1 and said.get(layer):
                asked.extend(chosen[0].tolist())
                for i, n in enumerate((1, 2, chosen.shape[1])):
                    right[i] += len(set(said[layer][:n]) & set(chosen[0].tolist()))
            said.pop(layer, None)
            return fetch(layer, chosen, shares, hidden)

        predictor.predict = predict  # type: ignore[method-assign]
        engine.supply.fetch = count  # type: ignore[method-assign]
        engine.generate(PROMPT, 12, Sampling())
        recall = engine.supply.take_recall()
    finally:
        engine.close()
    assert recall is not None
    assert recall.activated == len(asked) == 11 * 2 * 2  # tokens, layers that look-ahead sees, k
    assert [recall.first, recall.first_two, recall.first_k] == right
    assert engine.supply.take_recall() is None


def test_streaming_reads_every_expert_of_every_layer_for_every_token(
    container: Container, profile: PathProfile
) -> None:
    engine = engine_with(container, profile, "sti", 5)
    try:
        _, steps = engine.generate(PROMPT, 6, Sampling())
        assert not engine.supply.buffer.held_bytes > 5 * 16384
    finally:
        engine.close()
    slot = container.primary[0, 0].slot_bytes
    total = sum(steps.read_bytes)
    assert 12 * 5 * slot <= total <= 12 * 7 * slot  # six tokens; the last preloads may reach into a seventh
    assert not any(steps.wasted_bytes)


def test_preloading_without_a_buffer_keeps_nothing_beyond_the_next_layer(
    container: Container, profile: PathProfile
) -> None:
    engine = engine_with(container, profile, "edgemoe-preload", None)
    try:
        _, steps = engine.generate(PROMPT, 12, Sampling())
        assert engine.supply.buffer.held_bytes <= 12 * 16384
        assert len(engine.supply.buffer.entries) <= 2 * engine.model.config.top_k
    finally:
        engine.close()
    assert sum(steps.hits) + sum(steps.late) > 0
    assert sum(steps.prefetched_bytes) > 0


def test_a_switched_off_preloader_reads_nothing_ahead(container: Container, profile: PathProfile) -> None:
    engine = engine_with(container, profile, "edgemoe-adaptive", 6)
    governor = engine.supply._governor
    assert governor is not None
    governor.decoded = lambda time_s: None  # type: ignore[method-assign]
    governor.preloading = False
    try:
        tokens, steps = engine.generate(PROMPT, 12, Sampling())
    finally:
        engine.close()
    assert not any(steps.prefetched_bytes)
    assert dataclasses.replace(STRATEGIES["edgemoe-adaptive"], adaptive=False).parts()["preloading"] == "always"
    other = engine_with(container, profile, "full-load", None)
    try:
        assert other.generate(PROMPT, 12, Sampling())[0] == tokens
    finally:
        other.close()


def test_unimportant_misses_are_read_in_few_bits_and_important_ones_never(
    container: Container, profile: PathProfile
) -> None:
    engine = engine_with(container, profile, "edgemoe-lowbit", 3)
    smallest = min(container.records, key=lambda r: r.bytes).format
    fetch, seen = engine.supply.fetch, []

    def check(layer, chosen, shares, hidden):  # type: ignore[no-untyped-def]
        for group in fetch(layer, chosen, shares, hidden):
            for expert, matrices in group:
                low = matrices["gate"].format == container.formats[smallest]
                if len(chosen) == 1:
                    seen.append((low, float(shares[0][list(chosen[0]).index(expert)])))
                else:
                    assert not low
            yield group

    engine.supply.fetch = check  # type: ignore[method-assign]
    try:
        engine.generate(PROMPT, 30, Sampling())
    finally:
        engine.close()
    assert any(low for low, _ in seen)
    assert all(share < LowBitMisses.UNIMPORTANT / 2 for low, share in seen if low)
    assert any(not low for low, _ in seen)


def test_cache_aware_routing_keeps_the_best_expert_and_misses_less(container: Container, profile: PathProfile) -> None:
    misses = {}
    for name in ("edgemoe-buffer", "edgemoe-cacheaware"):
        engine = engine_with(container, profile, name, 4)
        try:
            _, steps = engine.generate(PROMPT, 40, Sampling())
        finally:
            engine.close()
        misses[name] = sum(steps.misses[1:]) + sum(steps.late[1:])
    assert misses["edgemoe-cacheaware"] < misses["edgemoe-buffer"]
    relief = CacheAwareRouting()
    logits = np.array([[1.0, 0.9, 5.0, -0.5]], np.float32)
    assert np.argsort(-relief.prefer(logits, [1])[0])[:2].tolist() == [2, 1]  # nearly as good as 0, and here
    assert np.argsort(-relief.prefer(logits, [3])[0])[:2].tolist() == [2, 0]  # 3 is here, but far worse
