"""Synthetic records, complete and valid: what a farm would have measured on devices that do not exist."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from engine.protocol import DeviceFacts, Load, RunRequest, Sample, Steps, Totals
from reports.records import Cell, Run, RunStatus, Sweep, Verdict

MIB = 1 << 20
EXPERT_BYTES = 600_000
LOOKUPS = 12  # experts that a token activates
STARTED = "2026-11-23T22:{minute:02d}:{second:02d}+00:00"


@dataclass(frozen=True)
class Behaviour:
    """How a strategy behaves on average."""

    hit: float
    late: float
    peak_bytes: int
    expert_bytes: int
    expert_budget_bytes: int | None


STRATEGIES = {
    "naive-swap": Behaviour(0.0, 0.0, 58 * MIB, 0, 0),
    "full-load": Behaviour(1.0, 0.0, 171 * MIB, 115 * MIB, None),
    "edgemoe": Behaviour(0.72, 0.11, 66 * MIB, 0, 10 * EXPERT_BYTES),
}
DEVICES = {"pi4b-emulated": 43e6, "jetson-tx2-emulated": 200e6}


def facts(device: str = "pi4b-emulated") -> DeviceFacts:
    return DeviceFacts(
        hostname=device, machine="aarch64", kernel="6.6.31+rpt-rpi-v8", os="Debian GNU/Linux 12 (bookworm)",
        model="Raspberry Pi 4 Model B Rev 1.5", cpu="Cortex-A72", cores=4, memory_bytes=8_189_000_000, page_bytes=4096,
        boot_id="5f1c6f0e-7d6e-4f5a-9a53-0e6a2a1f4c11", python="3.11.2", numpy="1.24.2", blas=None, engine="0.1.0",
    )  # fmt: skip


def sample(
    behaviour: Behaviour, bytes_per_s: float, rng: random.Random, tokens: int, prompt=0, repetition=0, warmup=False
):
    columns: dict[str, list] = {name: [] for name in Steps.__dataclass_fields__}
    for step in range(tokens):
        lookups = LOOKUPS if step else 6 * LOOKUPS
        hits = sum(rng.random() < behaviour.hit for _ in range(lookups))
        late = min(lookups - hits, sum(rng.random() < behaviour.late for _ in range(lookups)))
        misses = lookups - hits - late
        speculative = 0 if behaviour.hit in (0.0, 1.0) else late + 2
        stall = (misses + 0.4 * late) * EXPERT_BYTES / bytes_per_s * rng.uniform(0.95, 1.1)
        compute = (0.011 if step else 0.060) * rng.uniform(0.96, 1.12)
        row = {
            "time_s": compute + stall, "stall_s": stall, "hits": hits, "late": late, "misses": misses,
            "read_bytes": (misses + speculative) * EXPERT_BYTES, "prefetched_bytes": speculative * EXPERT_BYTES,
            "wasted_bytes": EXPERT_BYTES if speculative and rng.random() < 0.3 else 0,
        }  # fmt: skip
        for name, value in row.items():
            columns[name].append(value)
    answer = random.Random(prompt)
    return Sample(
        prompt=prompt, repetition=repetition, warmup=warmup,
        tokens=tuple(answer.randrange(32000) for _ in range(tokens)),
        steps=Steps(**{name: tuple(values) for name, values in columns.items()}),
        major_faults=rng.randrange(40), peak_resident_bytes=behaviour.peak_bytes - rng.randrange(MIB),
    )  # fmt: skip


def cell(device="pi4b-emulated", strategy="edgemoe", **changes) -> Cell:
    budget = "10-experts" if strategy == "edgemoe" else "default"
    usual = Cell(device, "tiny-mixtral-int4", "c0" * 32, strategy, budget, "dialogue", "d0" * 32, "cold")
    return replace(usual, **changes)


def run(
    device="pi4b-emulated", strategy="edgemoe", block=0, *, tokens=32, prompts=2, repetitions=2, seed=0, **changes
) -> Run:
    behaviour, bytes_per_s = STRATEGIES[strategy], DEVICES.get(device, 43e6)
    rng = random.Random(f"{device} {strategy} {block} {seed}")
    name = f"{device}-{strategy}-{block}-{seed}"
    second = 7 * list(STRATEGIES).index(strategy)
    request = RunRequest(
        run_id=name, container="edgemoe-farm/store/c0c0c0c0.moe", strategy=strategy,
        prompts=tuple(tuple(range(5, 29 + 3 * i)) for i in range(prompts)), max_new_tokens=tokens, warmups=1,
        repetitions=repetitions, emulated_read_bytes_per_s=bytes_per_s,
    )  # fmt: skip
    samples = [sample(behaviour, bytes_per_s, rng, tokens, warmup=True)]
    samples += [sample(behaviour, bytes_per_s, rng, tokens, p, r) for p in range(prompts) for r in range(repetitions)]
    load = Load(
        load_s=1.9 if strategy == "full-load" else 0.31, non_expert_bytes=22 * MIB, expert_bytes=behaviour.expert_bytes,
        expert_budget_bytes=behaviour.expert_budget_bytes, container_bytes=140 * MIB, container_experts=192,
        page_cache_resident_fraction=0.004,
        strategy={"residency": strategy, "eviction": "edgemoe" if strategy == "edgemoe" else "none"},
        reader="pread", backend="numpy",
    )  # fmt: skip
    complete = Run(
        id=name, sweep_id="20261123-221500-3f2a", cell=cell(device, strategy), block=block, status=RunStatus.OK,
        verdict=Verdict.VALID, request=request, facts=facts(device), load=load, samples=tuple(samples),
        totals=Totals(21.5, behaviour.peak_bytes, 310, 900_000_000, 0.01),
        emulated=(f"expert reads limited to {bytes_per_s / 1e6:.0f} MB/s by the engine",),
        started_at=STARTED.format(minute=15 + block, second=second),
        ended_at=STARTED.format(minute=15 + block, second=second + 6), farm_version="0.1.0", engine_sha256="e1" * 32,
        command="python3 -m engine run --request request.json",
    )  # fmt: skip
    return replace(complete, **changes)


def failed(status=RunStatus.FAILED, reason="the engine ended with exit status 3", *, fault=None, **changes) -> Run:
    """A run without an answer."""
    ended = {"verdict": Verdict.INVALID, "reasons": (reason,), "fault": fault}
    return replace(run(**changes), status=status, **ended, facts=None, load=None, samples=(), totals=None)


def runs(devices=tuple(DEVICES), blocks=3, **changes) -> list[Run]:
    return [run(d, s, b, **changes) for b in range(blocks) for d in devices for s in STRATEGIES]


def sweep(measured: list[Run], **changes) -> Sweep:
    planned = tuple(dict.fromkeys((r.cell.key, r.block) for r in measured))
    usual = Sweep(
        "20261123-221500-3f2a", "demo", "[matrix]\n", "naive-swap", planned, "2026-11-23T22:15:00+00:00", "0.1.0"
    )
    return replace(usual, **changes)


@pytest.fixture
def make() -> SimpleNamespace:
    return SimpleNamespace(run=run, runs=runs, failed=failed, sweep=sweep, cell=cell, facts=facts, sample=sample)
