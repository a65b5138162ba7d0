"""Both engines, each in a fresh process, asked for the same."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from engine.codec import to_json
from engine.protocol import ExpertBudget, Passage, RunRequest, decode_event

Enter = Callable[[], None]  # what a process does before it becomes an engine: goes onto cores, under limits
DEADLINE_S = 1200
MOST_OTHERS_SHARE = 0.03


@dataclass(frozen=True)
class Decoded:
    """What one process did. Step 0 is the prompt's."""

    tokens: tuple[int, ...]
    time_s: tuple[float, ...]
    load_s: float
    peak_bytes: int
    nats: float | None = None  # of the passage's continuation
    hit_rate: float | None = None  # while decoding; None: not ours to know
    stall_share: float | None = None
    read_bytes_per_token: float | None = None
    backend: str | None = None
    others_share: float = 0.0  # of all cores' time that went to other processes while it ran

    @property
    def tokens_per_s(self) -> float:
        return (len(self.time_s) - 1) / sum(self.time_s[1:])

    @property
    def steady_tokens_per_s(self) -> float:
        """Returns the median token's rate: all cost the same where nothing is waited for, and outliers do not count."""
        return 1 / median(self.time_s[1:])


@dataclass(frozen=True)
class Work:
    """The same for both."""

    prompt: tuple[int, ...]
    new_tokens: int
    threads: int
    passage: Passage | None = None  # predicted after all that is timed


def on_cores(threads: int) -> Enter:
    """Pins as many cores as threads."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return lambda: os.sched_setaffinity(0, cores)


def ours(container: str, work: Work, enter: Enter, strategy: str = "full-load", **request: Any) -> Decoded:
    """`request`: further fields of RunRequest; `budget_bytes` becomes its expert budget."""
    budget_bytes = request.pop("budget_bytes", None)
    asked = RunRequest(
        "peers", container, strategy, prompts=(work.prompt,), max_new_tokens=work.new_tokens, threads=work.threads,
        expert_budget=None if budget_bytes is None else ExpertBudget(bytes=budget_bytes),
        passages=() if work.passage is None else (work.passage,), **{"page_cache": "warm", **request},
    )  # fmt: skip
    out, others_share = _run(["engine", "run", "--request", "-"], to_json(asked), enter)
    events: dict[str, Any] = {}
    for line in out.splitlines():
        events.update(decode_event(line)[1])
    sample, load, totals = events["sample"], events["load"], events["totals"]
    steps = sample.steps
    uses = sum(steps.hits[1:]) + sum(steps.late[1:]) + sum(steps.misses[1:])
    return Decoded(
        sample.tokens, steps.time_s, load.load_s, totals.peak_resident_bytes,
        nats=totals.passage_nats[0] if totals.passage_nats else None,
        hit_rate=sum(steps.hits[1:]) / max(1, uses),
        stall_share=sum(steps.stall_s[1:]) / sum(steps.time_s[1:]),
        read_bytes_per_token=sum(steps.read_bytes[1:]) / (len(steps.time_s) - 1),
        backend=load.variant or load.backend, others_share=others_share,
    )  # fmt: skip


def theirs(gguf: str, work: Work, enter: Enter, *, repack: bool = True) -> Decoded:
    """llama.cpp, its file mapped; `repack`: matrices that it multiplies faster in another order are copied into it."""
    passage = None if work.passage is None else [work.passage.prompt, work.passage.continuation]
    asked = {"model": gguf, "prompt": work.prompt, "new": work.new_tokens, "threads": work.threads, "repack": repack,
             "passage": passage}  # fmt: skip
    out, others_share = _run(["tests.programs.peers.llama"], asked, enter)
    got = json.loads(out)
    return Decoded(
        tuple(got["tokens"]), tuple(got["time_s"]), got["load_s"], got["peak_bytes"], nats=got["nats"],
        others_share=others_share,
    )  # fmt: skip


def undisturbed(decode: Callable[[], Decoded], most_tries: int) -> Decoded:
    """Repeated while others take part of the machine; the least disturbed one."""
    tries: list[Decoded] = []
    while len(tries) < most_tries and (not tries or tries[-1].others_share > MOST_OTHERS_SHARE):
        tries.append(decode())
    return min(tries, key=lambda decoded: decoded.others_share)


def _run(module: Sequence[str], request: object, enter: Enter) -> tuple[str, float]:
    """What it printed, and the share of all cores' time that others had meanwhile."""
    busy_s, own_s, start = _busy_s(), _children_s(), time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", *module], input=json.dumps(request), preexec_fn=enter,
        capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    if result.returncode:
        raise SystemExit(f"{module[0]}: status {result.returncode}: {result.stderr[-400:].strip()}")
    others_s = _busy_s() - busy_s - (_children_s() - own_s)
    return result.stdout, max(0.0, others_s / (time.perf_counter() - start) / (os.cpu_count() or 1))


def _busy_s() -> float:
    """Returns the times of all cores since the machine started; what a hypervisor took counts too."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, interrupts, soft, stolen = map(int, file.readline().split()[1:9])
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
