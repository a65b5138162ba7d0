"""A scripted device: a Session whose engine answers at once, and fails where a test says so."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from device_inventory import Device, Inventory
from engine.protocol import (
    ArithmeticTimes,
    DeviceFacts,
    Load,
    ReadingRate,
    RunRequest,
    Sample,
    Steps,
    StorageRates,
    Totals,
)
from harness.device.deploy import EngineBundle
from harness.device.session import Outcome
from harness.errors import UnreachableError
from harness.sweep.matrix import parse_matrix
from harness.sweep.plan import Measurement, Plan, make_plan
from harness.sweep.runner import SweepRunner
from harness.sweep.worker import Estimator, Surroundings
from reports.records import Run, RunStatus, Sweep
from reports.results.database import ResultsDatabase

FACTS = DeviceFacts(
    hostname="scripted", machine="x86_64", kernel="6", os=None, model=None, cpu=None, cores=2, memory_bytes=None,
    page_bytes=4096, boot_id=None, python="3.11.2", numpy="2.0.0", blas=None, engine="0.1.0",
)  # fmt: skip
MATRIX = """
name = "scripted"
strategies = ["full-load", "naive-swap", "edgemoe"]
expert_budgets = ["4-experts", "8-experts"]
warmups = 0
repetitions = 2
blocks = 2
[[containers]]
name = "c"
path = "c.emoe"
profile = "c.profile"
[[workloads]]
name = "w"
prompts = ["a text", "another"]
max_new_tokens = 3
"""


def load_of(request: RunRequest, **changes: Any) -> Load:
    usual: dict[str, Any] = {
        "load_s": 0.1, "non_expert_bytes": 1, "expert_bytes": 0, "expert_budget_bytes": None, "container_bytes": 9,
        "container_experts": 4, "page_cache_resident_fraction": 0.0 if request.page_cache == "cold" else 1.0,
        "strategy": {"precision": "stored"}, "backend": "numpy",
        "reader": "pread" if request.reader == "auto" else request.reader, "lanes": request.lanes or 1,
    }  # fmt: skip
    return Load(**{**usual, **changes})


def samples_of(request: RunRequest, shift: int = 0) -> tuple[Sample, ...]:
    n = request.max_new_tokens
    nothing = dict.fromkeys(Steps.__dataclass_fields__, (0,) * n)
    steps = Steps(**{**nothing, "time_s": (0.5,) * n, "stall_s": (0.0,) * n})
    return tuple(
        Sample(prompt, repetition, False, tuple(100 * prompt + shift + i for i in range(n)), steps, 0, 1)
        for prompt, repetition in itertools.product(range(len(request.prompts)), range(request.repetitions))
    )


def ok(request: RunRequest, **changes: Any) -> Outcome:
    parts = {"facts": FACTS, "load": load_of(request), "samples": samples_of(request), "totals": Totals(1, 1, 0, 0, 0)}
    return Outcome(RunStatus.OK, (), **{**parts, **changes}, command="python3 -m engine run", log_tail="")


@dataclass
class ScriptedFarm:
    """Devices whose behaviour a test sets; it keeps what happened on them, in order."""

    answer: Callable[[RunRequest], Outcome] = ok
    open_error: Callable[[Device], Exception | None] = lambda device: None
    put_error: Callable[[Path], Exception | None] = lambda path: None
    asked: list[str] = field(default_factory=list)  # for the lease
    waits: str = ""
    on_wait: Callable[[], None] = lambda: None
    hold_error: Callable[[str], Exception | None] = lambda device: None
    before: Callable[[str, RunRequest], None] = lambda device, request: None
    damage: Callable[[bool], str | Exception | None] = lambda thorough: None  # what was lost or changed on the device
    planned: dict[Path, str | None] = field(default_factory=dict)  # the hash that a file had to have
    canary_error: Callable[[str], Exception | None] = lambda device: None
    canaries: list[str] = field(default_factory=list)
    time_error: Callable[[str], Exception | None] = lambda container: None
    timed: list[tuple[str, str]] = field(default_factory=list)  # device, container
    opened: list[str] = field(default_factory=list)
    requests: list[tuple[str, RunRequest]] = field(default_factory=list)
    busy: dict[str, int] = field(default_factory=dict)
    most_busy: int = 0
    forgotten: list[tuple[str, bool]] = field(default_factory=list)  # run, and whether its record was stored by then
    stored: Callable[[str], set[str]] = lambda device: set()
    cancelled: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    def open_session(self, device: Device) -> ScriptedSession:
        self.opened.append(device.name)
        error = self.open_error(device)
        if error:
            raise error
        return ScriptedSession(self, device.name)


class ScriptedSession:
    facts = FACTS
    engine_sha256 = "e" * 64
    bytes_sent = 0

    def __init__(self, farm: ScriptedFarm, device: str) -> None:
        self._farm = farm
        self._device = device
        self.was_cancelled = threading.Event()

    def hold(self, waiting: Callable[[str], None] = lambda state: None, tick: Callable[[], None] = lambda: None) -> int:
        farm = self._farm
        farm.asked.append(self._device)
        error = farm.hold_error(self._device)
        if error:
            raise error
        if farm.waits:
            waiting(farm.waits)
            farm.on_wait()
            tick()
        return 7

    def put(self, source: Path, *, sha256: str | None = None, progress: Callable[[int], None] | None = None) -> str:
        self._farm.planned[source] = sha256
        error = self._farm.put_error(source)
        if error:
            raise error
        if progress:
            progress(1)
        return f"store/{source.name}"

    def damage(self, *, thorough: bool) -> str | None:
        found = self._farm.damage(thorough)
        if isinstance(found, Exception):
            raise found
        return found

    def use(self, bundle: EngineBundle) -> None:
        self.engine_sha256 = bundle.sha256

    def deployed(self, source: Path) -> str | None:
        return f"store/{source.name}"

    def arithmetic(self, container: str, *, backend: str, threads: int) -> ArithmeticTimes:
        self._farm.timed.append((self._device, container))
        error = self._farm.time_error(container)
        if error:
            raise error
        return ArithmeticTimes(1e-3, 1e-3, {"fp32": 1e-3}, 1, 1, "numpy", None)

    def storage(self, container: str) -> StorageRates:
        return StorageRates("direct", 1, "", rates=(ReadingRate("direct", 1, 9e7, 8e7, 1e8),))

    def execute(
        self,
        request: RunRequest,
        *,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
        keep: bool = False,
    ) -> Outcome:
        assert keep, "a controller that dies before the record is stored would lose the run"
        farm = self._farm
        farm.requests.append((self._device, request))
        farm.busy[self._device] = farm.busy.get(self._device, 0) + 1
        farm.most_busy = max(farm.most_busy, farm.busy[self._device])
        try:
            farm.before(self._device, request)
            outcome = farm.answer(request)
        finally:
            farm.busy[self._device] -= 1
        if on_event:
            for sample in outcome.samples:
                on_event("sample", {"sample": sample})
        return outcome

    def selftest(self) -> None:
        self._farm.canaries.append(self._device)
        error = self._farm.canary_error(self._device)
        if error:
            raise error

    def forget(self, run_id: str) -> None:
        self._farm.forgotten.append((run_id, run_id in self._farm.stored(self._device)))

    def cancel(self) -> None:
        self._farm.cancelled.append(self._device)
        self.was_cancelled.set()

    def close(self) -> None:
        self._farm.closed.append(self._device)


class Witness:
    """A listener that writes down what it is told."""

    def __init__(self) -> None:
        self.states: list[tuple[str, str]] = []
        self.ended: list[Run] = []

    def device_is(self, device: str, state: str) -> None:
        self.states.append((device, state))

    def cell_started(self, measurement: Measurement) -> None: ...

    def engine_said(self, measurement: Measurement, event: str, content: dict[str, Any]) -> None: ...

    def cell_ended(self, run: Run) -> None:
        self.ended.append(run)


class Bench:
    """A plan, a database and scripted devices; `measure` runs what is missing, as the command line would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.farm = ScriptedFarm()
        self.witness = Witness()
        self.database = ResultsDatabase.open(folder / "farm.db")
        self.farm.stored = lambda device: {run.id for run in self.database.runs(device=device)}
        self.sweep: Sweep | None = None
        self.estimate: Estimator = lambda session, measurement, request: None
        self.canary, self.engines = False, dict[str, EngineBundle]()
        self.pauses: list[float] = []  # between attempts, and before canary runs
        self._seconds = itertools.count()

    def plan(self, matrix: str = MATRIX, devices: tuple[str, ...] = ("pi",), **changes: Any) -> Plan:
        inventory = Inventory({name: Device(name, "h", tags=(name[:2],)) for name in devices})
        parts: dict[str, Any] = {
            "container_sha256": {"c": "c" * 64},
            "tokenise": lambda path, text: tuple(text.encode()),
        }
        return make_plan(parse_matrix(matrix, source="m.toml", folder=self.folder), inventory, **{**parts, **changes})

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=next(self._seconds))

    def runner(self, plan: Plan, **options: Any) -> SweepRunner:
        if self.sweep is None:
            self.sweep = Sweep(
                "20260101-000000-abcd", plan.matrix.name, plan.matrix.toml, plan.matrix.baseline,
                tuple(m.key for m in plan.measurements), "2026-01-01T00:00:00+00:00", "0.1.0", str(self.folder),
                tuple(m.engine_sha256 for m in plan.measurements if m.engine_sha256),
            )  # fmt: skip
            self.database.add_sweep(self.sweep)
        around = Surroundings(
            self.sweep, self.farm.open_session, farm_version="0.1.0", earlier=self.runs(), now=self.now,
            random=lambda: 1.0, pause=lambda stopping, seconds: self.pauses.append(seconds), estimate=self.estimate,
            canary=self.canary, engines=self.engines,
        )  # fmt: skip
        return SweepRunner(plan, self.database, self.witness, around, **options)

    def measure(self, plan: Plan) -> list[Run]:
        self.runner(plan).measure()
        return self.runs()

    def runs(self) -> list[Run]:
        return self.database.runs()


@pytest.fixture
def bench(tmp_path: Path):
    bench = Bench(tmp_path)
    yield bench
    bench.database.close()


@pytest.fixture
def unreachable() -> UnreachableError:
    return UnreachableError("pi: no connection to h: is it switched on?")
