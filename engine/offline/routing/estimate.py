"""Estimates each strategy on a device before it is measured there.

For one strategy, container, budget and device, per decoded token after a prompt:

    arithmetic_s   layers * layer_s + head_s + the activated experts' expert_s: interpreter included, waiting for
                   nothing. Measured on the device by `python3 -m engine arithmetic`, or by hand (times_by_hand) from
                   its memory's rate: weight bytes / (bytes/s * share that kernels reach) + the interpreter's seconds
                   for each layer and expert, both as found where they were measured last
    token_s        from engine.offline.routing.simulation: one lane that computes and one that reads at the
                   storage's rate, layer by layer, through the engine's own buffer, policy, predictor and
                   queues of reads
    hit_rate, read_bytes, wasted_bytes    counted there as the engine counts them
    floor_s        what no pipeline could beat: max(arithmetic_s, (read_bytes - wasted_bytes) / bytes/s)
    memory_bytes   interpreter and numpy + the profile's tables + non-experts + experts held + keys and values of the
                   whole sequence. Working memory of a prompt is not in it
    bound          what the floor consists of: storage, or else of the arithmetic the larger part: memory (weight bytes
                   / bytes/s of memory) or interpreter; "arithmetic" where the memory's rate is not known

What routers ask for is replayed from a trace; without one, it is drawn from a profile's paths; without that, uniform.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from engine.container import Container
from engine.errors import EngineError, RequestError
from engine.experts.profile import ExpertSet, PathProfile
from engine.experts.provision import Provision, check_records
from engine.models import model_config
from engine.offline.routing.simulation import Arithmetic, Storage, Stretch, simulate, stretches
from engine.offline.routing.trace import AHEAD, Trace
from engine.protocol import ArithmeticTimes, ExpertBudget
from engine.strategies import Strategy

# By hand: the share of one core's plain read of memory that native kernels reach in weights, and what Python takes on
# top, on an x86-64 with AVX-512 where int4 experts of 0.1 and 0.8 MB and layers of 0.4 and 1.8 MB were timed.
KERNEL_SHARES = {"fp32": 0.75, "fp16": 0.75, "bf16": 0.75, "int8": 0.65, "int4": 0.65, "int3": 0.3, "int2": 0.3}
INTERPRETER_LAYER_S, INTERPRETER_EXPERT_S, INTERPRETER_HEAD_S = 30e-6, 18e-6, 5e-6
INTERPRETER_BYTES = 36 << 20
PROFILE_GROWTH = 6  # bytes in memory for each of the file: keys are Python's objects; 5.8

DRAWN_TOKENS = 512  # of routing that is made up


@dataclass(frozen=True)
class DeviceRates:
    """Holds what an estimate knows of a device."""

    times: ArithmeticTimes
    times_from: str  # in words
    storage: Storage | None  # None: not known; strategies that read cannot be estimated
    storage_from: str
    memory_bytes_per_s: float | None = None  # one core's plain read


@dataclass(frozen=True)
class Demand:
    """Holds what the routers ask for."""

    trace: Trace
    source: str  # in words
    has_previews: bool = True  # the trace knows what looking ahead said


@dataclass(frozen=True)
class Estimate:
    """Holds the estimate of one strategy, per decoded token. `needs` says why there is none, and what would help."""

    strategy: str
    needs: str | None = None
    token_s: float | None = None
    floor_s: float | None = None
    arithmetic_s: float | None = None
    memory_bytes: int | None = None
    hit_rate: float | None = None
    read_bytes: float | None = None
    wasted_bytes: float | None = None
    bound: str | None = None


def estimate(
    container: Container,
    strategy: Strategy,
    machine: DeviceRates,
    demand: Demand,
    *,
    profile: PathProfile | None = None,
    expert_budget: ExpertBudget | None = None,
    prompt_tokens: int = 32,
    new_tokens: int = 48,
    profile_file_bytes: int = 0,
    most_tokens: int | None = None,
) -> Estimate:
    """Returns the estimate; `needs` says what is missing. `most_tokens`: replay no more than about so many."""
    try:
        return _estimate(
            container, strategy, machine, demand, profile, expert_budget if strategy.has_budget else None,
            prompt_tokens, new_tokens, profile_file_bytes, most_tokens,
        )  # fmt: skip
    except EngineError as error:
        return Estimate(strategy.name, needs=str(error))


def _estimate(
    container: Container,
    strategy: Strategy,
    machine: DeviceRates,
    demand: Demand,
    profile: PathProfile | None,
    expert_budget: ExpertBudget | None,
    prompt_tokens: int,
    new_tokens: int,
    profile_file_bytes: int,
    most_tokens: int | None,
) -> Estimate:
    trace = demand.trace
    if (trace.layers, trace.experts) != (container.moe_layers, container.experts_per_layer):
        raise RequestError("needs a trace of this model: `edgemoe-farm model trace` makes one")
    check_records(container, strategy)
    if strategy.relief is not None:
        raise RequestError("needs the routers' own numbers, which no trace holds: measure it")
    if strategy.form != "packed":
        raise RequestError("needs to be measured: numpy computes there, on experts in FP32")
    if strategy.predictor in ("look-ahead", "combined") and not demand.has_previews:
        raise RequestError("needs a trace, to know what looking ahead would say: `edgemoe-farm model trace` makes one")
    if machine.storage is None and strategy.residency != "all":
        raise RequestError(f"needs the storage's rate: {machine.storage_from}")
    provision = Provision.of(container, strategy, expert_budget)
    provision.check_profile(profile)
    storage = machine.storage or Storage(1e9)  # of which nothing is read while decoding
    cut = _at_most(stretches(trace, prompt_tokens, new_tokens), most_tokens)
    arithmetic = arithmetic_of(container, machine.times)
    simulated = simulate(provision, trace, arithmetic, storage, cut, profile=profile)

    # The first sequence fills the buffer and is not counted, unless it is the only one.
    counted = simulated.steps[1:] or simulated.steps
    tokens = sum(len(steps.time_s) - 1 for steps in counted)
    hits, late, misses, read_bytes, wasted_bytes = (
        sum(sum(getattr(steps, name)[1:]) for steps in counted)
        for name in ("hits", "late", "misses", "read_bytes", "wasted_bytes")
    )
    layers = trace.layers - trace.first_layer
    rows = [row for stretch in cut[-len(counted) :] for row in range(stretch.first_decoded, stretch.stop)]
    demanded = [
        provision.records[layer, expert]
        for row in rows
        for layer, experts in enumerate(trace.chosen[row].tolist(), trace.first_layer)
        for expert in experts
    ]
    arithmetic_s = layers * arithmetic.layer_s + arithmetic.head_s
    arithmetic_s += sum(arithmetic.expert_s[record.format] for record in demanded) / tokens
    storage_s = (read_bytes - wasted_bytes) / tokens / storage.bytes_per_s
    weight_bytes = sum(_dense_bytes(container)) + sum(record.bytes for record in demanded) / tokens
    return Estimate(
        strategy.name,
        token_s=sum(sum(steps.time_s[1:]) for steps in counted) / tokens,
        floor_s=max(arithmetic_s, storage_s),
        arithmetic_s=arithmetic_s,
        memory_bytes=(machine.times.base_bytes or INTERPRETER_BYTES)
        + PROFILE_GROWTH * profile_file_bytes
        + machine.times.non_expert_bytes
        + simulated.held_bytes
        + model_config(container).state_bytes(prompt_tokens + new_tokens),
        hit_rate=hits / max(1, hits + late + misses),
        read_bytes=read_bytes / tokens,
        wasted_bytes=wasted_bytes / tokens,
        bound=_bound(storage_s, arithmetic_s, weight_bytes, machine.memory_bytes_per_s),
    )


def _bound(storage_s: float, arithmetic_s: float, weight_bytes: float, memory_bytes_per_s: float | None) -> str:
    if storage_s > arithmetic_s:
        return "storage"
    if memory_bytes_per_s is None:
        return "arithmetic"
    return "memory" if weight_bytes / memory_bytes_per_s > arithmetic_s / 2 else "interpreter"


def _at_most(cut: Sequence[Stretch], tokens: int | None) -> list[Stretch]:
    """Returns the first ones, two at least if there are two."""
    kept: list[Stretch] = []
    for stretch in cut:
        if tokens is not None and len(kept) > 1 and sum(s.stop - s.first_decoded for s in kept) >= tokens:
            break
        kept.append(stretch)
    return kept


# --- arithmetic and memory ------------------------------------------------------------------------------------------


def arithmetic_of(container: Container, times: ArithmeticTimes) -> Arithmetic:
    """Returns the arithmetic. A format with too few experts to time counts as slow as the slowest.

    Raises RequestError for times that are of another container.
    """
    if not times.expert_s:
        raise RequestError(f"{container.path}: no expert was timed: the arithmetic of its experts is not known")
    slowest = max(times.expert_s.values())
    return Arithmetic(
        times.layer_s,
        times.head_s,
        {number: times.expert_s.get(fmt.label, slowest) for number, fmt in enumerate(container.formats)},
    )


def times_by_hand(container: Container, memory_bytes_per_s: float) -> ArithmeticTimes:
    """Returns times from shapes and the rate at which one core reads memory; see the constants above."""
    layers_bytes, head_bytes = _dense_bytes(container)
    layers = container.moe_layers - model_config(container).first_layer
    largest = max(container.tensors.values(), key=lambda tensor: tensor.bytes)
    dense = memory_bytes_per_s * KERNEL_SHARES[largest.precision]
    return ArithmeticTimes(
        layer_s=layers_bytes / layers / dense + INTERPRETER_LAYER_S,
        head_s=head_bytes / dense + INTERPRETER_HEAD_S,
        expert_s={
            fmt.label: layout.bytes / (memory_bytes_per_s * KERNEL_SHARES[fmt.precision]) + INTERPRETER_EXPERT_S
            for fmt, layout in zip(container.formats, container.layouts, strict=True)
        },
        non_expert_bytes=container.non_expert_bytes,
        base_bytes=None,
        backend="native",
        variant=None,
    )


def _dense_bytes(container: Container) -> tuple[int, int]:
    """Returns the non-expert bytes that a decoded token passes: (all layers, head). Of an embedding it takes a row."""
    sizes = {name: tensor.bytes for name, tensor in container.tensors.items() if not name.startswith("encoder.")}
    head = "head" if "head" in sizes else next((name for name in sizes if name.endswith("embed")), "")
    layers = sum(size for name, size in sizes.items() if name != head and not name.endswith("embed"))
    return layers, sizes.get(head, 0)


# --- routing that nobody recorded -----------------------------------------------------------------------------------


def drawn_from(profile: PathProfile, container: Container, seed: int = 0) -> Demand:
    """Returns a walk along the profile's paths: each layer's experts as they followed on those of the layer before."""
    walk = random.Random(seed)  # noqa: S311 - no secret depends on it
    config = model_config(container)
    first, top_k = config.first_layer, config.top_k
    even = dict.fromkeys(range(profile.experts), 1)

    def choose(layer: int, before: ExpertSet) -> ExpertSet:
        chosen: list[int] = []
        for counts in (profile.one[layer].get((before,), {}), profile.marginal[layer], even):
            left = {expert: count for expert, count in counts.items() if count and expert not in chosen}
            while left and len(chosen) < top_k:
                (expert,) = walk.choices(list(left), list(left.values()))
                del left[expert]
                chosen.append(expert)
        return tuple(sorted(chosen))

    return Demand(_made_up(container, first, choose), "drawn from the profile's paths", has_previews=False)


def uniform(container: Container, seed: int = 0) -> Demand:
    """Returns uniform demand, every expert as likely as any other: for use if nothing is known."""
    walk = random.Random(seed)  # noqa: S311 - no secret depends on it
    config, experts = model_config(container), range(container.experts_per_layer)
    trace = _made_up(
        container, config.first_layer, lambda layer, before: tuple(sorted(walk.sample(experts, config.top_k)))
    )
    return Demand(trace, "uniform: neither trace nor profile is known", has_previews=False)


def _made_up(container: Container, first: int, choose: Callable[[int, ExpertSet], ExpertSet]) -> Trace:
    layers, experts = container.moe_layers, container.experts_per_layer
    before: ExpertSet = ()
    chosen = []
    for _ in range(DRAWN_TOKENS):
        for layer in range(first, layers):
            before = choose(layer, before)
            chosen.append(before)
    decoder = layers - first
    return Trace(
        "made up", layers, experts, first, np.zeros(DRAWN_TOKENS, np.int32), np.zeros(1, np.int32),
        np.array(chosen, np.uint16).reshape(DRAWN_TOKENS, decoder, -1),
        np.zeros((DRAWN_TOKENS, decoder - 1, min(AHEAD, experts)), np.uint16),
    )  # fmt: skip
