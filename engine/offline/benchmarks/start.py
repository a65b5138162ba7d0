"""Times what passes between starting the engine's process and its first token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from engine.device.meters import evict_from_page_cache, page_cache_resident_fraction
from engine.errors import RequestError

Progress = Callable[[int, int], None]  # done, of

PHASES = ("interpreter", "numpy", "engine", "container", "kernels", "non_experts", "experts", "first_token")
DEADLINE_S = 600.0

# In a process of its own, as on a device. A monotonic clock is the whole system's: the first time is the parent's.
_CHILD = """\
import sys, time
times = [float(sys.argv[1]), time.monotonic()]
import numpy
times.append(time.monotonic())
from engine.container import Container
from engine.generate import Engine
from engine.protocol import Sampling
from engine.strategies import strategy_named
times.append(time.monotonic())
container = Container.open(sys.argv[2])
times.append(time.monotonic())
engine = Engine(container, strategy_named(sys.argv[3]), backend=sys.argv[4], threads=int(sys.argv[5]))
loaded = time.monotonic()
engine.generate((0,), 1, Sampling())
last = time.monotonic()
phases = [b - a for a, b in zip(times, times[1:])]
phases += [engine.phases_s[name] for name in ("kernels", "non_experts", "experts")] + [last - loaded]
import json
print(json.dumps([phases, engine.model.weight_bytes]))
engine.close()
"""


def bench_start(
    path: str,
    strategy: str,
    *,
    backend: str = "auto",
    threads: int = 1,
    cold: bool = True,
    rounds: int = 5,
    progress: Progress = lambda done, of: None,
) -> dict[str, Any]:
    """Returns seconds of each phase, medians over `rounds` processes. A round before them warms all but the container.

    `cold`: the page cache holds nothing of the container. Raises RequestError where the engine does not start.
    """
    rows: list[list[float]] = []
    resident: list[float | None] = []
    weight_bytes = 0
    for nth in range(rounds + 1):
        progress(nth, rounds + 1)
        if cold:
            evict_from_page_cache(path)
        resident.append(page_cache_resident_fraction(path))
        arguments = [sys.executable, "-c", _CHILD, repr(time.monotonic()), path, strategy, backend, str(threads)]
        done = subprocess.run(
            arguments, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
            env=_environment(),
        )  # fmt: skip
        if done.returncode:
            *_, reason = done.stderr.strip().splitlines() or ["it said nothing"]
            raise RequestError(f"{path}: the engine did not start: {reason.partition('Error: ')[2] or reason}")
        phases, weight_bytes = json.loads(done.stdout)
        if nth:
            rows.append(phases)
    columns = dict(zip(PHASES, zip(*rows, strict=True), strict=True))
    total = median(sum(row) for row in rows)
    return {
        "container": path,
        "strategy": strategy,
        "page_cache": "cold" if cold else "warm",
        "page_cache_resident_fraction": resident[-1],
        "non_expert_bytes": weight_bytes,
        "total_s": total,
        "numpy_and_non_experts_share": median(
            (row[PHASES.index("numpy")] + row[PHASES.index("non_experts")]) / sum(row) for row in rows
        ),
        "phases": {
            name: {"s": median(times), "s_least": min(times), "s_most": max(times)} for name, times in columns.items()
        },
    }


def _environment() -> dict[str, str]:
    """Returns the environment of a device, where compiled modules stay beside the source."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": str(Path(__file__).parents[3]), "OPENBLAS_NUM_THREADS": "1"}
