"""Estimates: against sums made by hand, against the engine's own counters, and within what no pipeline could beat."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from engine.container import Container
from engine.experts.buffer import ExpertBuffer
from engine.experts.eviction import POLICIES, LeastRecentlyUsed
from engine.experts.profile import PathProfile
from engine.experts.provision import Provision
from engine.generate import Engine
from engine.models import model_config
from engine.offline.routing.estimate import (
    Demand,
    DeviceRates,
    Estimate,
    drawn_from,
    estimate,
    times_by_hand,
    uniform,
)
from engine.offline.routing.simulation import Arithmetic, SimulatedLoader, Storage, Stretch, simulate, stretches
from engine.offline.routing.trace import AHEAD, Trace, record_trace
from engine.protocol import ArithmeticTimes, ExpertBudget
from engine.strategies import STRATEGIES, Strategy

LAYERS, EXPERTS, TOP_K = 3, 4, 2  # of the small random Mixtral
TIMES = Arithmetic(layer_s=0.010, head_s=0.003, expert_s={0: 0.002})
ARITHMETIC_S = 3 * 0.010 + 0.003 + 6 * 0.002


def trace_of(chosen: Sequence[Sequence[Sequence[int]]]) -> Trace:
    """chosen[token][layer] are experts; what looking ahead says is the truth."""
    array = np.array(chosen, np.uint16)
    n = len(array)
    ahead = np.zeros((n, LAYERS - 1, min(AHEAD, EXPERTS)), np.uint16)
    for token in range(n):
        for layer in range(1, LAYERS):
            right = array[token, layer].tolist()
            ahead[token, layer - 1] = right + [e for e in range(EXPERTS) if e not in right]
    return Trace("by hand", LAYERS, EXPERTS, 0, np.zeros(n, np.int32), np.zeros(1, np.int32), array, ahead)


TURNING = trace_of([[[t % 4, (t + 1) % 4] for _ in range(LAYERS)] for t in range(12)])
CUT = [Stretch(0, 1, 12)]


def run(
    container: Container,
    strategy: Strategy,
    bytes_per_s: float,
    budget: int | None = None,
    profile: PathProfile | None = None,
    trace: Trace = TURNING,
) -> tuple[list[float], list[int]]:
    """Seconds and bytes read of each decoded token."""
    provision = Provision.of(container, strategy, None if budget is None else ExpertBudget(experts=budget))
    (steps,) = simulate(provision, trace, TIMES, Storage(bytes_per_s), CUT, profile=profile).steps
    return list(steps.time_s[1:]), list(steps.read_bytes[1:])


def test_without_a_cache_a_token_costs_its_bytes_and_its_arithmetic(container: Container) -> None:
    slot = container.primary[0, 0].slot_bytes
    times, read = run(container, STRATEGIES["naive-swap"], slot / 0.005)
    assert read == [6 * slot] * 11
    assert times == pytest.approx([ARITHMETIC_S + 6 * 0.005] * 11)


def test_with_everything_in_memory_it_costs_its_arithmetic(container: Container, profile: PathProfile) -> None:
    assert run(container, STRATEGIES["full-load"], 1.0) == (pytest.approx([ARITHMETIC_S] * 11), [0] * 11)
    times, read = run(container, STRATEGIES["edgemoe-buffer"], 1e6, 12, profile)
    assert (times[4:], read[4:]) == (pytest.approx([ARITHMETIC_S] * 7), [0] * 7)  # four tokens ask for all experts


def test_an_oracle_hides_what_the_arithmetic_is_long_enough_for_and_no_more(container: Container) -> None:
    slot = container.primary[0, 0].slot_bytes
    oracle = replace(STRATEGIES["edgemoe-preload"], predictor="oracle")
    times, read = run(container, oracle, slot / 0.005)
    assert times == pytest.approx([ARITHMETIC_S] * 11)  # two reads take 10 ms, a layer with its experts 14
    assert sum(read) <= 6 * 11 * slot
    slow, _ = run(container, oracle, slot / 0.050)  # the storage is never idle, and nothing is read in vain
    assert slow[2:-1] == pytest.approx([6 * 0.050] * 8)
    demanded, _ = run(container, STRATEGIES["naive-swap"], slot / 0.050)
    assert all(0 < b - a < ARITHMETIC_S + 1e-9 for a, b in zip(slow[2:-1], demanded[2:-1], strict=True))


def test_a_speculative_read_gives_way_at_its_next_chunk(shipped: Container) -> None:
    chunk, slot = 16 << 10, shipped.primary[0, 0].slot_bytes
    rate = chunk / 0.001
    assert slot > 2 * chunk
    buffer = ExpertBuffer(None, slot, LeastRecentlyUsed())
    provision = Provision.of(shipped, STRATEGIES["edgemoe"])
    loader = SimulatedLoader(shipped, buffer, provision.records, provision.slabs, Storage(rate), threaded=True)
    with loader.lock:
        loader.predict([(1, 0)])
        loader.compute(0.0014)
        loader.demand([provision.records[0, 1]])
        entry = loader.wait_for({(0, 1)}, lambda: loader.now_s)
    assert loader.now_s == pytest.approx((2 * chunk + slot) / rate)
    assert (entry.key, loader.wasted_bytes, loader.read_bytes) == ((0, 1), 2 * chunk, slot + 2 * chunk)


def test_storage_stands_idle_while_a_naive_swap_computes(container: Container) -> None:
    slot = container.primary[0, 0].slot_bytes
    quick = Arithmetic(layer_s=0.0, head_s=0.0, expert_s={0: 0.0005})
    (steps,) = simulate(
        Provision.of(container, STRATEGIES["naive-swap"]), TURNING, quick, Storage(slot / 0.005), CUT
    ).steps
    assert steps.time_s[2:] == pytest.approx([6 * 0.0055] * 10)


# --- against the engine ---------------------------------------------------------------------------------------------

TOKENS = [int(t) for t in np.random.RandomState(5).randint(0, 96, 60)]
PROMPT = 8


def measured(container: Container, strategy: Strategy, profile: PathProfile, budget: int | None) -> list[list[int]]:
    """Counters of each step of the engine itself; before each layer's experts it waits until nothing is being read."""
    engine = Engine(
        container, strategy, profile=profile, backend="numpy",
        expert_budget=None if budget is None else ExpertBudget(experts=budget),
    )  # fmt: skip
    loader = engine.supply._loader

    def settle(layer: int, chosen: np.ndarray) -> None:
        while strategy.threaded:
            with loader.lock:
                if not loader._predicted and all(entry.ready for entry in engine.supply.buffer.entries.values()):
                    return
            time.sleep(1e-5)

    steps = []
    try:
        state = engine.model.start(len(TOKENS))
        engine.supply.take_counters()  # of loading
        for first, last in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, len(TOKENS)))]:
            if first:
                engine.supply.begin(TOKENS[first])
            engine.model.forward(np.array(TOKENS[first:last]), state, engine.supply, observe=settle)
            settle(0, np.zeros(0))
            _, *counters = engine.supply.take_counters()
            steps.append(counters)
    finally:
        engine.close()
    return steps


def simulated(
    container: Container, strategy: Strategy, profile: PathProfile, budget: int | None, trace: Trace
) -> list[list[int]]:
    provision = Provision.of(container, strategy, None if budget is None else ExpertBudget(experts=budget))
    (cut,) = stretches(trace, PROMPT, len(TOKENS))
    # Reads that take no time to speak of: what was predicted is there when it is needed, as in `measured`.
    (steps,) = simulate(provision, trace, TIMES, Storage(1e15), [cut], profile=profile).steps
    columns = (steps.hits, steps.late, steps.misses, steps.read_bytes, steps.prefetched_bytes, steps.wasted_bytes)
    return [list(row) for row in zip(*columns, strict=True)]


@pytest.fixture(scope="module")
def trace(container: Container) -> Trace:
    return record_trace(container, TOKENS, len(TOKENS))


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "random"])
@pytest.mark.parametrize("budget", [2, 5, 8, 12])
def test_counters_are_the_engines_own(
    container: Container, profile: PathProfile, trace: Trace, policy: str, budget: int
) -> None:
    strategy = replace(STRATEGIES["edgemoe-buffer"], eviction=policy)
    expected = measured(container, strategy, profile, budget)
    assert simulated(container, strategy, profile, budget, trace) == expected


@pytest.mark.parametrize(
    ("name", "budget"),
    [("full-load", None), ("naive-swap", None), ("edgemoe", 12), ("edgemoe-lookahead", 12), ("edgemoe-combined", 12)],
)
def test_counters_are_the_engines_own_where_it_preloads(
    container: Container, profile: PathProfile, trace: Trace, name: str, budget: int | None
) -> None:
    expected = measured(container, STRATEGIES[name], profile, budget)
    assert simulated(container, STRATEGIES[name], profile, budget, trace) == expected


# --- estimates ------------------------------------------------------------------------------------------------------

LABEL = "fp16"
DEVICE = DeviceRates(
    ArithmeticTimes(0.010, 0.003, {LABEL: 0.002}, non_expert_bytes=1000, base_bytes=500, backend="numpy", variant=None),
    "told", Storage(1e7), "told",
)  # fmt: skip


def test_every_strategy_has_an_estimate_or_says_what_it_needs(container: Container, profile: PathProfile) -> None:
    demand = Demand(TURNING, "by hand")
    found = {
        name: estimate(
            container, strategy, DEVICE, demand, profile=profile, expert_budget=ExpertBudget(experts=5),
            prompt_tokens=2, new_tokens=4,
        )
        for name, strategy in STRATEGIES.items()
    }  # fmt: skip
    for name, row in found.items():
        assert (row.needs is None) != (row.token_s is None), name
        if row.token_s is not None:
            assert row.floor_s is not None
            assert row.floor_s <= row.token_s * (1 + 1e-9), name
    slot = container.primary[0, 0].slot_bytes
    assert found["full-load"].arithmetic_s == pytest.approx(ARITHMETIC_S)
    assert found["full-load"].memory_bytes == 1500 + 12 * slot + model_config(container).state_bytes(2 + 4)
    assert found["edgemoe-buffer"].memory_bytes == 1500 + 5 * slot + model_config(container).state_bytes(2 + 4)
    assert found["naive-swap"].read_bytes == 6 * slot
    assert found["naive-swap"].hit_rate == 0
    assert {name for name, row in found.items() if row.needs} == {
        "edgemoe-dequantised", "edgemoe-lowbit", "edgemoe-cacheaware",
    }  # fmt: skip


def need(container: Container, name: str, demand: Demand, machine: DeviceRates = DEVICE, **options: object) -> str:
    row: Estimate = estimate(container, STRATEGIES[name], machine, demand, **options)  # type: ignore[arg-type]
    assert row.needs is not None
    return row.needs


def test_what_is_missing_is_said_in_the_row(container: Container, profile: PathProfile, switch: Container) -> None:
    assert "model profile" in need(container, "edgemoe", uniform(container))
    assert "model trace" in need(container, "edgemoe-lookahead", drawn_from(profile, container), profile=profile)
    assert "model trace" in need(switch, "naive-swap", Demand(replace(TURNING, layers=2, first_layer=0), ""))
    dark = replace(DEVICE, storage=None, storage_from="say it")
    assert "storage's rate: say it" in need(container, "naive-swap", uniform(container), dark)
    assert estimate(container, STRATEGIES["full-load"], dark, uniform(container)).needs is None
    assert "longer one" in need(container, "naive-swap", uniform(container), prompt_tokens=5000)


def test_what_a_token_is_bound_by(container: Container) -> None:
    def bound(storage: float, memory: float | None) -> str | None:
        machine = replace(DEVICE, storage=Storage(storage), memory_bytes_per_s=memory)
        return estimate(container, STRATEGIES["naive-swap"], machine, uniform(container)).bound

    assert bound(1e3, 1e9) == "storage"
    assert bound(1e12, 1e6) == "memory"
    assert bound(1e12, 1e12) == "interpreter"
    assert bound(1e12, None) == "arithmetic"


def test_by_hand_half_the_memory_rate_is_twice_the_time_of_weights(container: Container, switch: Container) -> None:
    for model in (container, switch):
        at = {rate: times_by_hand(model, rate) for rate in (1e9, 2e9, 1e15)}
        for part in ("layer_s", "head_s"):
            fast, slow, interpreter = (getattr(at[rate], part) for rate in (2e9, 1e9, 1e15))
            assert slow - interpreter == pytest.approx(2 * (fast - interpreter), rel=1e-3)
            assert interpreter > 0
        assert set(at[1e9].expert_s) == {fmt.label for fmt in model.formats}


def test_routing_is_drawn_from_the_profile_and_without_one_from_all(
    container: Container, profile: PathProfile, switch: Container, switch_profile: PathProfile
) -> None:
    for model, known in ((container, profile), (switch, switch_profile)):
        demand = drawn_from(known, model)
        first = demand.trace.first_layer
        assert (demand.trace.layers, demand.trace.experts) == (model.moe_layers, model.experts_per_layer)
        drawn = demand.trace.chosen.tolist()
        for token in drawn[1:]:
            for i, chosen in enumerate(token[1:], 1):
                followed = known.one[first + i].get((tuple(sorted(token[i - 1])),), {})
                assert set(chosen) & set(followed) or not followed
        assert not demand.has_previews
        assert drawn_from(known, model, seed=0).trace.chosen.tolist() == drawn
        counts = np.bincount(uniform(model).trace.chosen.ravel(), minlength=model.experts_per_layer)
        assert counts.min() > 0.8 * counts.mean()
