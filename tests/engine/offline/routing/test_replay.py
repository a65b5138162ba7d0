"""Replay of a recorded trace: against the engine itself, and against all that could have been done."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path

import numpy as np
import pytest

from engine.container import Container
from engine.errors import ContainerError, RequestError
from engine.experts.eviction import POLICIES
from engine.experts.profile import PathCounter, PathProfile
from engine.generate import Engine
from engine.models.switch import Switch
from engine.offline.accuracy.model import MappedExperts, OfflineModel
from engine.offline.importing.importer import import_checkpoint
from engine.offline.routing.activations import profile_texts
from engine.offline.routing.replay import Step, belady, replay_policies, replay_predictors
from engine.offline.routing.trace import Trace, record_trace
from engine.offline.tokenizer import Tokenizer
from engine.protocol import ExpertBudget
from engine.quantize import Format
from engine.strategies import STRATEGIES
from tests.golden.checkpoints import HELD_OUT, held_out_text
from tests.golden.switch import SwitchRecipe


@pytest.fixture(scope="module")
def text(shipped: Container) -> list[int]:
    return list(Tokenizer.from_container(shipped.path).encode(held_out_text(HELD_OUT[0]))[:300])


@pytest.fixture(scope="module")
def profile(shipped: Container, text: list[int]) -> PathProfile:
    return profile_texts(OfflineModel(shipped), [text])


@pytest.fixture(scope="module")
def trace(shipped: Container, text: list[int]) -> Trace:
    return record_trace(shipped, text[200:], 256)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [2, 24, 64])
def test_a_replay_is_what_the_engine_measures_to_the_expert(
    shipped: Container, text: list[int], profile: PathProfile, trace: Trace, policy: str, size: int
) -> None:
    strategy = dataclasses.replace(STRATEGIES["edgemoe-buffer"], eviction=policy)
    engine = Engine(shipped, strategy, profile=profile, expert_budget=ExpertBudget(experts=size))
    try:
        state = engine.model.start(len(text))
        for token in text[200:]:
            engine.model.forward(np.array([token]), state, engine.supply)
        measured = engine.supply.take_counters()
    finally:
        engine.close()
    hits = replay_policies(trace, profile, [size], [policy])[policy][size]
    assert (hits.hits, hits.misses) == (measured.hits, measured.misses)


@pytest.mark.parametrize("policy", POLICIES)
def test_of_an_encoder_and_a_decoder_the_decoder_is_replayed(policy: str, tmp_path: Path) -> None:
    recipe = SwitchRecipe("traced", seed=6, vocab=60, hidden=32, width=32, heads=4, head_dim=8, experts=4)
    container = import_checkpoint(recipe.write(tmp_path / "hf"), tmp_path / "m.emoe", [Format("fp32")])
    text = [int(t) for t in np.random.RandomState(3).randint(2, 60, 80)]
    profile = profile_texts(OfflineModel(container), [text], 80)
    trace = record_trace(container, text, 80)
    assert (trace.layers, trace.first_layer, trace.chosen.shape, trace.ahead.shape) == (4, 2, (41, 2, 1), (41, 1, 4))
    trace.save(str(tmp_path / "t"))
    assert Trace.load(str(tmp_path / "t")).first_layer == 2
    strategy = dataclasses.replace(STRATEGIES["edgemoe-buffer"], eviction=policy)
    engine = Engine(container, strategy, profile=profile, expert_budget=ExpertBudget(experts=3))
    try:
        assert isinstance(engine.model, Switch)
        state = engine.model.start(40, 41)
        engine.model.encode(np.array(text[:40]), state, MappedExperts(container))
        for token in [0, *text[40:]]:
            engine.model.forward(np.array([token]), state, engine.supply)
        measured = engine.supply.take_counters()
    finally:
        engine.close()
    hits = replay_policies(trace, profile, [3], [policy])[policy][3]
    assert (hits.hits, hits.misses) == (measured.hits, measured.misses)
    recall = replay_predictors(trace, profile)
    assert recall["oracle"][1] == (1.0, 1.0)
    assert recall["look-ahead"][1][0] == 0 < recall["look-ahead"][1][1]


def test_belady_is_the_best_that_could_be_done() -> None:
    chooser = random.Random(3)
    for _ in range(60):
        demands: list[Step] = [(0, tuple(sorted(chooser.sample(range(5), 2)))) for _ in range(7)]
        for size in (2, 3):
            assert belady(demands, size).hits == most_hits(demands, size)


def most_hits(demands: list[Step], size: int) -> int:
    """By trying every choice of what stays."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for _, chosen in demands:
        following: dict[frozenset[int], int] = {}
        for resident, hits in best.items():
            present = resident | set(chosen)
            gained = hits + len(resident & set(chosen))
            for kept in itertools.combinations(sorted(present), min(size, len(present))):
                key = frozenset(kept)
                following[key] = max(following.get(key, 0), gained)
        best = following
    return max(best.values())


def test_no_policy_beats_belady_and_more_room_never_hurts_it(trace: Trace, profile: PathProfile) -> None:
    results = replay_policies(trace, profile, [8, 32, 96])
    for name, by_size in results.items():
        for size, hits in by_size.items():
            assert hits.hit_rate <= results["belady"][size].hit_rate, name
            assert hits.hits + hits.misses == trace.chosen.size
    rates = [results["belady"][size].hit_rate for size in (8, 32, 96)]
    assert rates == sorted(rates)


def test_recall_of_predictors(trace: Trace, profile: PathProfile) -> None:
    recalls = replay_predictors(trace, profile)
    assert recalls["oracle"][2] == (1.0,) * 8
    assert recalls["oracle"][1] == (0.5,) * 8  # one of two
    assert recalls["look-ahead"][2][0] == 0  # blind for a token's first layer
    assert np.mean(recalls["look-ahead"][2][1:]) > np.mean(recalls["static"][2])
    for recall in recalls.values():
        assert all(a <= b <= c for a, b, c in zip(recall[1], recall[2], recall[4], strict=True))


def test_a_trace_survives_its_file_and_damage_does_not(trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "t.trace"
    trace.save(str(path))
    again = Trace.load(str(path))
    for name in ("tokens", "starts", "chosen", "ahead"):
        assert (getattr(again, name) == getattr(trace, name)).all()
    content = path.read_bytes()
    chooser = random.Random(5)
    for _ in range(200):
        damaged = bytearray(content)
        damaged[chooser.randrange(len(damaged))] ^= 1 << chooser.randrange(8)
        path.write_bytes(damaged)
        try:
            Trace.load(str(path))
        except ContainerError as error:
            assert str(path) in str(error)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ContainerError, match="make it again"):
        Trace.load(str(path))
    with pytest.raises(RequestError, match="the profile is of"):
        replay_policies(trace, PathCounter(2, 4).finish())
