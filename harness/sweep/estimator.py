"""Estimates a cell before it is measured, for the record and for the reader beside the measured time."""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from engine.container import Container
from engine.experts.profile import PathProfile
from engine.protocol import ArithmeticTimes, RunRequest
from engine.strategies import strategy_named
from harness.device.session import Session
from harness.sweep.matrix import ContainerFile
from harness.sweep.plan import Measurement
from reports.records import RunEstimate

if TYPE_CHECKING:
    from engine.offline.routing.estimate import Demand

_RUN_TOKENS = 96  # replayed for a cell of a run: it must take well under a second


class CellEstimator:
    """Estimates a cell before its run: asks a device once for its times of a container, replays once for each cell.

    Whatever goes wrong, there is no estimate, and the run goes on: it is not what the run is for.
    """

    def __init__(self) -> None:
        self._times: dict[tuple[str, str, str, int], ArithmeticTimes | None] = {}
        self._cells: dict[str, RunEstimate | None] = {}
        self._lock = threading.Lock()  # devices are measured side by side
        self._demand = lru_cache(_demand_of_run)

    def __call__(self, session: Session, measurement: Measurement, request: RunRequest) -> RunEstimate | None:
        key = measurement.cell.key
        if key not in self._cells:
            try:
                self._cells[key] = self._estimate(session, measurement, request)
            except Exception:  # noqa: BLE001 - whatever it is, the run goes on
                self._cells[key] = None
        return self._cells[key]

    def _estimate(self, session: Session, measurement: Measurement, request: RunRequest) -> RunEstimate | None:
        from engine.offline.routing.estimate import DeviceRates, estimate
        from engine.offline.routing.simulation import Storage

        rate, strategy = request.emulated_read_bytes_per_s, strategy_named(request.strategy)
        if rate is None and strategy.residency != "all":
            return None
        times = self._times_of(session, measurement, request)
        if times is None:
            return None
        machine = DeviceRates(
            times, "timed on the device", None if rate is None else Storage(rate),
            "no storage" if rate is None else f"emulated storage, {rate / 1e6:g} MB/s",
        )  # fmt: skip
        container = measurement.container
        with self._lock:
            opened, profile, demand = self._demand(container)
        found = estimate(
            opened, strategy, machine, demand, profile=profile, expert_budget=request.expert_budget,
            prompt_tokens=round(mean(map(len, request.prompts))), new_tokens=request.max_new_tokens,
            profile_file_bytes=file_bytes(container.profile), most_tokens=_RUN_TOKENS,
        )  # fmt: skip
        if found.token_s is None or found.floor_s is None or found.hit_rate is None or found.read_bytes is None:
            return None
        return RunEstimate(
            found.token_s, found.floor_s, found.hit_rate, found.read_bytes, found.memory_bytes or 0,
            f"arithmetic {machine.times_from}; {machine.storage_from}; routing {demand.source}",
        )  # fmt: skip

    def _times_of(self, session: Session, measurement: Measurement, request: RunRequest) -> ArithmeticTimes | None:
        key = (measurement.cell.device, measurement.cell.container_sha256, request.backend, request.threads)
        if key not in self._times:
            try:
                self._times[key] = session.arithmetic(
                    request.container, backend=request.backend, threads=request.threads
                )
            except Exception:  # noqa: BLE001 - whatever it is, the run goes on
                self._times[key] = None
        return self._times[key]


def _demand_of_run(file: ContainerFile) -> tuple[Container, PathProfile | None, Demand]:
    container = Container.open(str(file.path))
    profile = None if file.profile is None else PathProfile.load(str(file.profile))
    return container, profile, demand_of(container, file.trace, profile)


def demand_of(container: Container, trace: Path | None, profile: PathProfile | None) -> Demand:
    """Returns what an estimate replays: a recorded trace, else a walk along the profile's paths, else chance."""
    from engine.offline.routing.estimate import Demand, drawn_from, uniform
    from engine.offline.routing.trace import Trace

    if trace is not None:
        return Demand(Trace.load(str(trace)), f"replayed from {trace}")
    return uniform(container) if profile is None else drawn_from(profile, container)


def file_bytes(path: Path | None) -> int:
    """Returns the size of a file, and 0 where there is none."""
    return 0 if path is None else path.stat().st_size
