"""The supply of experts: same answer whatever the strategy, within the budget, whatever the storage does."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.container import Container, Record
from engine.errors import ContainerError, MemoryBudgetError, RequestError, StorageError
from engine.experts.buffer import ExpertBuffer
from engine.experts.eviction import POLICIES, LeastRecentlyUsed, PolicyInputs, policy_named
from engine.experts.predictors import LookAheadPredictor, PathPredictor
from engine.experts.profile import PathCounter, PathProfile
from engine.experts.store import ExpertStore
from engine.generate import Engine
from engine.protocol import READERS, ExpertBudget, Sampling, Steps
from engine.quantize import Format
from engine.selftest import all_formats, selftest_profile, write_random_model
from engine.strategies import STRATEGIES

PROMPT = (1, 17, 5, 80, 33)


def generate(
    container: Container, strategy: str, profile: PathProfile, budget: int | None = None, reader: str = "pread"
) -> tuple[tuple[int, ...], Steps]:
    engine = Engine(
        container,
        STRATEGIES[strategy],
        profile=profile,
        expert_budget=None if budget is None else ExpertBudget(experts=budget),
        reader=reader,
    )
    try:
        return engine.generate(PROMPT, 16, Sampling())
    finally:
        engine.close()


@pytest.mark.parametrize("fmt", all_formats(), ids=lambda f: f.label)
def test_all_strategies_give_the_same_tokens_at_every_precision_and_budget(tmp_path: Path, fmt: Format) -> None:
    write_random_model(str(tmp_path / "m.emoe"), [fmt])
    container = Container.open(str(tmp_path / "m.emoe"))
    profile = selftest_profile(container)
    expected, _ = generate(container, "full-load", profile)
    assert len(set(expected)) > 3  # not a model that says one thing whatever its experts do
    for strategy in (s.name for s in STRATEGIES.values() if s.lossless and not s.has_budget):
        assert generate(container, strategy, profile)[0] == expected
    for budget in range(1, len(container.primary) + 1):
        for strategy in (s.name for s in STRATEGIES.values() if s.lossless and s.has_budget):
            assert generate(container, strategy, profile, budget)[0] == expected


def test_what_each_strategy_reads_is_what_its_name_says(container: Container, profile: PathProfile) -> None:
    slot, layers, top_k = container.primary[0, 0].slot_bytes, 3, 2
    _, full = generate(container, "full-load", profile)
    assert sum(full.read_bytes) == sum(full.misses) == sum(full.late) == 0
    assert set(full.hits[1:]) == {layers * top_k}
    _, naive = generate(container, "naive-swap", profile)
    assert set(naive.misses[1:]) == {layers * top_k}
    assert set(naive.read_bytes[1:]) == {layers * top_k * slot}
    assert sum(naive.hits) == sum(naive.prefetched_bytes) == 0
    _, whole = generate(container, "edgemoe", profile, 12)
    assert 0 < sum(whole.read_bytes) <= len(container.primary) * slot  # each at most once
    _, small = generate(container, "edgemoe", profile, 6)
    activations = [h + late + m for h, late, m in zip(small.hits, small.late, small.misses, strict=True)]
    assert set(activations[1:]) == {layers * top_k}
    assert sum(small.hits) > 0
    assert sum(small.prefetched_bytes) > 0
    assert all(
        w <= r
        for w, r in zip(itertools.accumulate(small.wasted_bytes), itertools.accumulate(small.read_bytes), strict=True)
    )


def logits_of(container: Container, strategy: str, profile: PathProfile, budget: int | None = None) -> np.ndarray:
    """Returns logits of a prompt, whose prefill makes large products, and of four tokens after it: (5, vocab)."""
    engine = Engine(
        container,
        STRATEGIES[strategy],
        profile=profile,
        expert_budget=None if budget is None else ExpertBudget(experts=budget),
        backend="numpy",  # which both forms have
    )
    try:
        state = engine.model.start(16, 4)
        rows = [engine.model.prefill(np.arange(1, 17), state, engine.supply)]
        for token in (7, 80, 33, 2):
            rows.append(engine.model.forward(np.array([token]), state, engine.supply))
        return np.concatenate(rows)
    finally:
        engine.close()


@pytest.mark.parametrize("fmt", [*all_formats(), None], ids=lambda f: "mixed" if f is None else f.label)
def test_dequantised_experts_give_the_same_bits_as_packed_ones(tmp_path: Path, fmt: Format | None) -> None:
    write_random_model(str(tmp_path / "m.emoe"), [fmt] if fmt else all_formats(), mixed=fmt is None)
    container = Container.open(str(tmp_path / "m.emoe"))
    profile = selftest_profile(container)
    expected = logits_of(container, "full-load", profile)
    for budget in (1, 2, 6, 12):
        logits = logits_of(container, "edgemoe-dequantised", profile, budget)
        assert np.array_equal(logits.view(np.uint32), expected.view(np.uint32))


def test_a_substitute_in_few_bits_fits_the_slab_of_any_expert(container: Container, profile: PathProfile) -> None:
    """Dequantised, a record with scales takes more memory than one of fp16, however few its bits are."""
    expected: list[tuple[int, ...]] = []
    for form in ("packed", "dequantised"):
        strategy = dataclasses.replace(
            STRATEGIES["edgemoe-lowbit"], name="form", form=form, predictor=None, adaptive=False
        )
        engine = Engine(container, strategy, profile=profile, expert_budget=ExpertBudget(experts=1))
        try:
            expected.append(engine.generate(PROMPT, 16, Sampling())[0])
        finally:
            engine.close()
    assert expected[0] == expected[1]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("strategy", ["edgemoe", "edgemoe-dequantised"])
def test_the_byte_budget_is_never_exceeded(
    container: Container, profile: PathProfile, strategy: str, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts every slab that is alive, by its own finaliser, and not by the buffer's account."""
    import weakref

    import engine.experts.buffer as buffer_module

    alive, most = [0], [0]
    new_slab = buffer_module.new_slab

    def counted(size: int) -> np.ndarray:
        slab = new_slab(size)
        alive[0] += size
        most[0] = max(most[0], alive[0])
        weakref.finalize(slab, lambda: alive.__setitem__(0, alive[0] - size))
        return slab

    monkeypatch.setattr(buffer_module, "new_slab", counted)
    slab = container.primary[0, 0].slot_bytes
    if strategy == "edgemoe-dequantised":
        slab = 2 * slab  # 3 x 48 x 40 halves take two pages of 16 KiB less than their floats: 12,160 and 23,040 bytes
    for budget in (1, 2, 5, 9):
        most[0] = alive[0]
        before = alive[0]
        generate(container, strategy, profile, budget, reader)
        assert 0 < most[0] - before <= budget * slab


def test_experts_of_mixed_precision_share_a_budget(tmp_path: Path) -> None:
    write_random_model(str(tmp_path / "mixed.emoe"), [Format("fp32"), Format("int2")], mixed=True)
    container = Container.open(str(tmp_path / "mixed.emoe"))
    sizes = {r.slot_bytes for r in container.primary.values()}
    assert len(sizes) == 2
    profile = selftest_profile(container)
    expected, _ = generate(container, "full-load", profile)
    for budget in (1, 2, 3, 7, 12):
        for strategy in ("edgemoe", "edgemoe-dequantised"):
            assert generate(container, strategy, profile, budget)[0] == expected
    buffer = ExpertBuffer(100, 60, LeastRecentlyUsed())
    keys, record = itertools.count(), container.primary[0, 0]
    chooser = random.Random(0)
    for _ in range(2000):
        entry = buffer.reserve(
            (0, next(keys)),
            record,
            slab_bytes=chooser.choice([10, 20, 60]),
            layer=0,
            speculative=False,
            keep=frozenset(),
        )
        assert entry is not None
        entry.ready = True
        live = sum(e.slab.nbytes for e in buffer.entries.values())
        assert live <= buffer.held_bytes <= 100


def test_a_budget_without_room_for_an_expert_is_refused(container: Container, profile: PathProfile) -> None:
    with pytest.raises(MemoryBudgetError, match="1-experts"):
        Engine(container, STRATEGIES["edgemoe"], profile=profile, expert_budget=ExpertBudget(bytes=1000))
    with pytest.raises(RequestError, match="no expert buffer"):
        Engine(container, STRATEGIES["naive-swap"], expert_budget=ExpertBudget(experts=4))
    with pytest.raises(RequestError, match="model profile"):
        Engine(container, STRATEGIES["edgemoe"])
    other = PathProfile(2, 4, 0, ({}, {}), ({}, {}), ({}, {}))
    with pytest.raises(RequestError, match="2 MoE layers"):
        Engine(container, STRATEGIES["edgemoe"], profile=other)


def test_a_budget_under_one_tokens_working_set_is_warned_of(container: Container, profile: PathProfile) -> None:
    for budget, warned in ((5, True), (6, False)):
        engine = Engine(container, STRATEGIES["edgemoe"], profile=profile, expert_budget=ExpertBudget(experts=budget))
        assert bool(engine.notes) is warned
        engine.close()


# --- storage that is slow, late, or fails ---------------------------------------------------------------------------


@pytest.fixture
def patched_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Record], None]], None]]:
    """Runs a function of the test's before every read of an expert."""
    original = ExpertStore.read

    def install(before: Callable[[Record], None]) -> None:
        def read(self: ExpertStore, record: Record, slab: np.ndarray, broken_off: Any = None) -> int:
            before(record)
            return original(self, record, slab, broken_off)

        monkeypatch.setattr(ExpertStore, "read", read)

    yield install


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("strategy", ["edgemoe", "edgemoe-dequantised"])
def test_random_timing_changes_no_token(
    container: Container, profile: PathProfile, patched_read: Callable[..., None], strategy: str, seed: int
) -> None:
    expected, _ = generate(container, "full-load", profile)
    chooser = random.Random(seed)
    patched_read(lambda record: time.sleep(chooser.choice([0, 0, 0.0001, 0.002])))
    for budget in (1, 2, 3, 6, 12):
        assert generate(container, strategy, profile, budget)[0] == expected


def test_a_speculative_read_gives_way_to_a_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk by chunk: with reads broken off all the time, the answer stays and the waste is accounted for."""
    monkeypatch.setattr("engine.experts.lanes.MOST_CHUNK_BYTES", 1024)
    write_random_model(str(tmp_path / "m.emoe"), [Format("fp32")])
    container = Container.open(str(tmp_path / "m.emoe"))
    # A profile that is always wrong: it predicts what was chosen least.
    honest = selftest_profile(container)
    wrong = PathProfile(
        3,
        4,
        honest.tokens,
        tuple({e: 100 - c.get(e, 0) for e in range(4)} for c in honest.marginal),
        ({},) * 3,
        ({},) * 3,
    )
    expected, _ = generate(container, "full-load", honest)
    engine = Engine(
        container, STRATEGIES["edgemoe"], profile=wrong, expert_budget=ExpertBudget(experts=4),
        emulated_read_bytes_per_s=20e6,
    )  # fmt: skip
    tokens, steps = engine.generate(PROMPT, 16, Sampling())
    engine.close()
    assert tokens == expected
    assert sum(steps.wasted_bytes) > 0
    assert sum(steps.wasted_bytes) <= sum(steps.prefetched_bytes) <= sum(steps.read_bytes)


def test_a_failing_preload_does_not_change_the_answer(
    container: Container, profile: PathProfile, patched_read: Callable[..., None]
) -> None:
    """Preloads fail at any moment, also after the router has come to want what they read."""
    expected, _ = generate(container, "full-load", profile)
    failures = itertools.count()

    def fail_in_preloads(record: Record) -> None:
        entry = supply.buffer.entries.get((record.layer, record.expert))
        if entry is not None and entry.speculative:
            time.sleep(0.0005)  # long enough for some to become demands meanwhile
            if next(failures) % 3:
                raise StorageError("injected")

    engine = Engine(container, STRATEGIES["edgemoe"], profile=profile, expert_budget=ExpertBudget(experts=6))
    supply = engine.supply
    patched_read(fail_in_preloads)
    try:
        for _ in range(20):
            assert engine.generate(PROMPT, 16, Sampling())[0] == expected
    finally:
        engine.close()
    assert next(failures) > 20


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("error", [StorageError("injected"), ValueError("injected")], ids=["storage", "bug"])
def test_a_demanded_expert_that_cannot_be_read_is_an_error_and_no_hang(
    container: Container, profile: PathProfile, patched_read: Callable[..., None], strategy: str, error: Exception
) -> None:
    countdown = itertools.count()

    def fail(record: Record) -> None:
        if next(countdown) >= 5:
            raise error

    patched_read(fail)
    with pytest.raises(StorageError, match="injected"):
        generate(container, strategy, profile, 2 if STRATEGIES[strategy].has_budget else None)
    assert not [t for t in threading.enumerate() if t.name == "experts"]


# --- predictors ----------------------------------------------------------------------------------------


def test_paths_are_counted_over_the_boundary_of_tokens_and_backed_off() -> None:
    counter = PathCounter(2, 8)
    counter.observe([[(1, 0), (2, 3)], [(4, 5), (2, 3)], [(4, 5), (2, 6)]])
    profile = counter.finish(least=1)
    assert profile.tokens == 3
    assert profile.marginal[0] == {0: 1, 1: 1, 4: 2, 5: 2}
    assert profile.one[1] == {((0, 1),): {2: 1, 3: 1}, ((4, 5),): {2: 2, 3: 1, 6: 1}}
    assert profile.two[0] == {((0, 1), (2, 3)): {4: 1, 5: 1}, ((4, 5), (2, 3)): {4: 1, 5: 1}}
    assert profile.ranking(1, [(2, 3), (4, 5)]) == [2, 3, 6]
    assert profile.ranking(0, [(7,), (2, 3)]) == [4, 5, 0, 1]  # two unseen: one, then the marginal
    assert profile.ranking(0, []) == [4, 5, 0, 1]
    assert counter.finish(least=2).two[0] == {}
    predictor = PathPredictor(profile)
    predictor.observe(0, (0, 1), np.zeros(4))
    assert predictor.predict(1) == [2, 3, 6]


def test_a_profile_survives_its_file(tmp_path: Path, profile: PathProfile) -> None:
    path = str(tmp_path / "p.json")
    profile.save(path)
    assert PathProfile.load(path) == profile
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]


def _profile_text(version: int = 3, layers: int = 1, **tables: object) -> str:
    """The file of a profile of one layer with one expert, sound unless something is said."""
    empty = {"keys": [], "sizes": [], "experts": [], "counts": []}
    header = {"schema": "edgemoe-profile", "version": version, "layers": layers, "experts": 1, "tokens": 0}
    layer = {"marginal": [], "one": empty, "two": empty, "by_token": empty, **tables}
    return f"{json.dumps(header)}\n{json.dumps(layer)}\n"


def test_a_small_profile_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(_profile_text(by_token={"keys": [7], "sizes": [1], "experts": [0], "counts": [3]}))
    assert PathProfile.load(str(path)).by_token == ({7: {0: 3}},)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "nonsense", "[" * 100000,
        _profile_text(version=2),
        _profile_text(layers=2),
        _profile_text(layers=0),
        _profile_text(marginal=[[1, 1]]),
        _profile_text(one={"keys": ["x"], "sizes": [0], "experts": [], "counts": []}),
        _profile_text(one={"keys": ["0", "0"], "sizes": [0, 0], "experts": [], "counts": []}),
        _profile_text(one={"keys": ["0"], "sizes": [2], "experts": [0], "counts": [1]}),
        _profile_text(one={"keys": ["0"], "sizes": [1], "experts": [1], "counts": [1]}),
        _profile_text(two={"keys": ["0/0"], "sizes": [-1], "experts": [], "counts": []}),
        _profile_text(by_token={"keys": [0], "sizes": [1], "experts": [70000], "counts": [1]}),
        _profile_text(by_token={"keys": [0], "sizes": [1], "experts": [0], "counts": ["many"]}),
    ],
)  # fmt: skip
def test_a_damaged_profile_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ContainerError, match=r"p\.json"):
        PathProfile.load(str(path))


def test_look_ahead_asks_the_router_of_the_next_layer_and_is_blind_at_the_first() -> None:
    asked = []

    def preview(layer: int, hidden: np.ndarray) -> np.ndarray:
        asked.append((layer, hidden.tolist()))
        return np.array([0.1, 0.9, -3.0, 0.9])

    predictor = LookAheadPredictor(preview)
    assert predictor.predict(0) == []
    predictor.observe(0, (2,), np.array([5.0]))
    assert predictor.predict(1) == [1, 3, 0, 2]
    predictor.observe(1, (1,), np.array([6.0]))
    assert predictor.predict(0) == []
    assert asked == [(1, [5.0])]


def test_look_ahead_with_the_layers_own_input_is_the_router_itself(container: Container, profile: PathProfile) -> None:
    """What is previewed is the real router: given the state that it will see, it gives the answer that it will give."""
    engine = Engine(container, STRATEGIES["full-load"])
    answers: list[tuple[int, list[int], list[int]]] = []
    fetch = engine.supply.fetch

    def compare(layer: int, chosen: np.ndarray, shares: np.ndarray, hidden: np.ndarray) -> object:
        ahead = np.argsort(-engine.model.preview_router(layer, hidden[-1]), kind="stable")[: chosen.shape[1]]
        answers.append((layer, ahead.tolist(), chosen[-1].tolist()))
        return fetch(layer, chosen, shares, hidden)

    engine.supply.fetch = compare  # type: ignore[method-assign, assignment]
    try:
        engine.generate(PROMPT, 6, Sampling())
    finally:
        engine.close()
    assert len(answers) == 6 * 3
    assert all(ahead == chosen for _, ahead, chosen in answers)


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if policy.needs_profile])
def test_a_policy_that_weighs_by_a_profile_is_not_made_without_one(name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} needs a profile: make one with `edgemoe-farm model profile`"):
        policy_named(name, PolicyInputs(layers=2))
    assert policy_named(name, PolicyInputs(layers=2, frequency={})).victim(lambda key: True, 0) is None
