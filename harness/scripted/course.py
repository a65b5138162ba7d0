"""Works out what a scripted engine writes, and when, from its request, device and fault.

Every number is made up: plausible, the same for the same seed, and labelled in every record and on every page.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.codec import from_json, loads, to_json
from engine.protocol import Course, DeviceFacts, Load, RunRequest, Sample, Steps, Totals, Watched, encode_event
from harness.scripted.faults import FaultKind, ScriptedFault

THROTTLED, SLOW_DISK = 2.5, 8.0  # times as long
_EXPERTS = 6  # that a token activates, in all layers
_RECORD_BYTES = 1 << 20
_SPEED = {"full-load": 0.5, "naive-swap": 1.6}  # time of a token against that of the strategies between them


@dataclass(frozen=True)
class ScriptedCourse:
    """Holds all that a run writes, and how it ends if nobody interferes."""

    lines: tuple[tuple[float, bytes], ...]  # seconds after the start, what is written then
    end_s: float
    ending: dict[str, Any] | None  # as the agent's supervisor writes it down; None: the power is cut
    log: str

    @property
    def size_bytes(self) -> int:
        return sum(len(line) for _, line in self.lines)


def course(text: str, facts: DeviceFacts, seed: str, fault: ScriptedFault | None, deadline_s: float) -> ScriptedCourse:
    """Returns the course of a run. `text` is its request, `seed` the noise's, `deadline_s` the supervisor's."""
    events = list(_events(text, facts, seed, fault))
    lines = [(due_s, line.encode() + b"\n") for due_s, line in events]
    kind, end_s = (None if fault is None else fault.kind), lines[-1][0]
    exited = {"status": 0, "timed_out": False, "oom_kills": 0, "watched": to_json(_watched(kind, end_s))}
    cut = 1 + int(fault.at * (len(lines) - 1)) if fault is not None else len(lines)  # lines that go well
    at_s = lines[min(cut, len(lines) - 1)][0]
    if kind is FaultKind.STALL:
        killed = {**exited, "status": -signal.SIGTERM, "timed_out": True}
        return ScriptedCourse(tuple(lines[:cut]), deadline_s, killed, "")
    if kind is FaultKind.REBOOT:
        return ScriptedCourse(tuple(lines[:cut]), at_s, None, "")
    if kind is FaultKind.OUT_OF_MEMORY:
        killed = {**exited, "status": -signal.SIGKILL, "oom_kills": 1}
        return ScriptedCourse(tuple(lines[:cut]), at_s, killed, "")
    if kind is FaultKind.DISK_FULL:
        half = lines[cut][1][: len(lines[cut][1]) // 2]
        log = "OSError: [Errno 28] No space left on device\n"
        return ScriptedCourse((*lines[:cut], (at_s, half)), at_s, {**exited, "status": 1}, log)
    if kind is FaultKind.DAMAGE:
        assert fault is not None
        name, damaged = _damaged(lines[cut][1], fault.variant)
        lines[cut] = (at_s, damaged + b"\n")
        return ScriptedCourse(tuple(lines), end_s, exited, f"\x1b[31mscripted damage: {name}\x1b[0m\n")
    return ScriptedCourse(tuple(lines), end_s, exited, "")


def _watched(kind: FaultKind | None, seconds: float) -> Watched:
    """Returns what the watcher beside the engine would have seen."""
    throttled = kind is FaultKind.THROTTLE
    warm, hot = 45.0, 85.0 if throttled else 52.0
    return Watched(
        readings=2,
        period_s=seconds,
        watched_s=seconds,
        temperature_c=Course(warm, hot, warm, hot),
        governor="performance",
        governor_after="performance",
        throttled=throttled,
        under_voltage=False,
        throttle_causes=("scripted: the processor is too hot",) if throttled else (),
        load=Course(0.0, 0.0, 0.0, 0.0),
        memory_pressure=Course(0.0, 0.0, 0.0, 0.0),
        power="mains",
        power_after="mains",
    )


def _events(text: str, facts: DeviceFacts, seed: str, fault: ScriptedFault | None) -> Iterator[tuple[float, str]]:
    request = from_json(RunRequest, loads(text))
    chance = random.Random(seed)  # noqa: S311
    kind = None if fault is None else fault.kind
    storage = SLOW_DISK if kind is FaultKind.SLOW_DISK else 1.0
    token_s = random.Random(facts.hostname).uniform(0.01, 0.04) * _SPEED.get(request.strategy, 1.0)  # noqa: S311
    keeps_all = request.strategy.startswith("full-load")
    now_s = 0.05
    yield now_s, encode_event("started", facts=facts, request_sha256=hashlib.sha256(text.encode()).hexdigest())
    load = _load(request, chance.uniform(0.1, 0.2) * storage, keeps_all)
    now_s += load.load_s
    yield now_s, encode_event("loaded", load=load)
    order = [
        (prompt, repetition)
        for repetition in range(-request.warmups, request.repetitions)
        for prompt in range(len(request.prompts))
    ]
    for i, (prompt, repetition) in enumerate(order):
        throttled = fault is not None and kind is FaultKind.THROTTLE and i >= fault.at * len(order)
        factor = token_s * (THROTTLED if throttled else 1.0)
        steps = _steps(request, chance, factor, storage, 0 if keeps_all else _EXPERTS // 2)
        now_s += sum(steps.time_s)
        yield (
            now_s,
            encode_event(
                "sample",
                sample=Sample(
                    prompt=prompt,
                    repetition=repetition if repetition >= 0 else repetition + request.warmups,
                    warmup=repetition < 0,
                    tokens=_tokens(request, prompt),
                    steps=steps,
                    major_faults=0,
                    peak_resident_bytes=64 * _RECORD_BYTES,
                ),
            ),
        )
    nats = tuple(2.0 * len(passage.continuation) for passage in request.passages)
    totals = Totals(now_s, 64 * _RECORD_BYTES, 0, 0, load.page_cache_resident_fraction, nats)
    yield now_s + 0.01, encode_event("finished", totals=totals)


def _load(request: RunRequest, load_s: float, keeps_all: bool) -> Load:
    budget = request.expert_budget
    return Load(
        load_s=load_s,
        non_expert_bytes=8 * _RECORD_BYTES,
        expert_bytes=32 * _RECORD_BYTES if keeps_all else 0,
        expert_budget_bytes=None if budget is None else budget.bytes or (budget.experts or 0) * _RECORD_BYTES,
        container_bytes=40 * _RECORD_BYTES,
        container_experts=32,
        page_cache_resident_fraction=0.0 if request.page_cache == "cold" else 1.0,
        strategy={"name": request.strategy, "precision": "stored"},
        reader="pread" if request.reader == "auto" else request.reader,
        backend="numpy" if request.backend == "auto" else request.backend,
        threads=1,
        lanes=request.lanes or 1,
        notes=("scripted: every number is made up",),
    )


def _steps(request: RunRequest, chance: random.Random, token_s: float, storage: float, missed: int) -> Steps:
    n = request.max_new_tokens
    waits = [token_s * 0.1 * missed * storage * chance.uniform(0.9, 1.1) for _ in range(n)]
    times = [waits[i] + token_s * (4.0 if i == 0 else 1.0) * chance.uniform(0.97, 1.03) for i in range(n)]
    none = (0,) * n
    return Steps(
        time_s=tuple(round(t, 6) for t in times),
        stall_s=tuple(round(t, 6) for t in waits),
        hits=(_EXPERTS - missed,) * n,
        late=none,
        misses=(missed,) * n,
        read_bytes=(missed * _RECORD_BYTES,) * n,
        prefetched_bytes=none,
        wasted_bytes=none,
    )


def _tokens(request: RunRequest, prompt: int) -> tuple[int, ...]:
    """Returns the same tokens for every strategy and on every device."""
    chance = random.Random(f"{request.container.rpartition('/')[2]} {request.prompts[prompt]}")  # noqa: S311
    return tuple(chance.randrange(1, 96) for _ in range(request.max_new_tokens))


def _damaged(line: bytes, variant: int) -> tuple[str, bytes]:
    """Returns the damages: (name, the bytes instead of `line`), without a newline within."""
    forms = (
        ("cut off", line[: len(line) // 2]),
        ("binary", bytes(range(11, 256)) * 8),
        ("HTML", b"<!DOCTYPE html><html><script>alert(1)</script><h1>502 Bad Gateway</h1></html>"),
        ("escape codes", b"\x1b]0;owned\x07\x1b[2J\x1b[31m" + line),
        ("deep JSON", b"[" * 200_000),
        ("wrong types", json.dumps({"v": 1, "event": "sample", "sample": {"prompt": "<b>0</b>"}}).encode()),
        ("an endless line", b"x" * (4 << 20)),
    )
    return forms[variant % len(forms)]
