"""Simulates a farm: the product's own nightly run, with a measuring function that draws from recorded noise.

The noise (noise.json, one record a run) is what `edgemoe-farm demo` measured in seven nights on a shared machine. A
drawn run takes its cell's level in one recorded night. This is multiplied by how far one recorded run of the cell was
off the level of its own night; its samples deviate as that run's did. So nights drift and blocks vary as recorded.
Old and new engine of a confirmation share the night.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median

from device_inventory import Device, Inventory
from engine.protocol import DeviceFacts, Load, Passage, RunRequest, Sample, Steps, Totals
from harness.demo.faults import write_model
from harness.night.config import NightlyConfig, read_nightly
from harness.night.run import NightRun
from harness.night.state import finish
from harness.sweep.engines import EngineStore
from harness.sweep.matrix import read_matrix
from harness.sweep.plan import Measurement, Plan
from harness.sweep.planning import new_sweep, plan_matrix
from harness.tables import DEFAULT_BUDGET
from reports.nights.gate import Measured
from reports.nights.night import Night
from reports.records import Run, RunStatus, Sweep, Verdict
from reports.results.baselines import Acknowledgement, Baseline
from reports.results.database import ResultsDatabase

NOISE = Path(__file__).parent / "noise.json"
BLOCKS, PAIRS = 3, 10
OLD, NEW, CHANGED = "0" * 64, "1" * 64, "2" * 64  # engines
START = datetime(2026, 1, 1, 2, tzinfo=UTC)

MATRIX = """
name = "simulated"
baseline = "naive-swap"
strategies = {strategies}
warmups = 0
repetitions = 1
blocks = {blocks}
[device_expert_budgets]
{budgets}
[[containers]]
name = "mix16"
path = "tiny.emoe"
profile = "tiny.profile.json"
[[workloads]]
name = "novel"
tokens = [[5, 6, 7], [5, 6, 8]]
max_new_tokens = 2
"""
NIGHTLY = """
name = "simulated"
matrix = "matrix.toml"
baseline = "main"
"""

Where = tuple[str, str]  # device, strategy


@dataclass(frozen=True)
class Change:
    """What an engine does otherwise on one device with one strategy."""

    slower: float = 1.0
    nats: float = 1.0  # per token, a factor
    other_answer: bool = False
    throttled: bool = False


@dataclass(frozen=True)
class Recorded:
    """One recorded run, as factors of its night's level."""

    ttft: float
    tpot: float
    samples_ttft: tuple[float, ...]  # factors of the run
    samples_tpot: tuple[float, ...]
    peak_bytes: int


@dataclass
class Cells:
    """Holds what was recorded of one cell: the levels of the nights, and all its runs."""

    levels: dict[int, tuple[float, float]] = field(default_factory=dict)  # night -> (ttft, tpot)
    runs: list[Recorded] = field(default_factory=list)


Noise = Mapping[tuple[str, str, str], Cells]  # by device, strategy, expert budget


def recorded() -> Noise:
    by_cell: dict[tuple[str, str, str], dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in json.loads(NOISE.read_text()):
        by_cell[row["device"], row["strategy"], row["budget"]][row["night"]].append(row)
    found: dict[tuple[str, str, str], Cells] = defaultdict(Cells)
    for key, nights in by_cell.items():
        for night, rows in nights.items():
            level = tuple(median(median(row[name]) for row in rows) for name in ("ttft_s", "tpot_s"))
            found[key].levels[night] = level
            for row in rows:
                ttft, tpot = median(row["ttft_s"]), median(row["tpot_s"])
                found[key].runs.append(
                    Recorded(
                        ttft / level[0],
                        tpot / level[1],
                        tuple(x / ttft for x in row["ttft_s"]),
                        tuple(x / tpot for x in row["tpot_s"]),
                        row["peak_bytes"],
                    )
                )
    return dict(found)


class _NamesOfEngines(EngineStore):
    """Keeps the names of engines alone: nothing runs them."""

    def __contains__(self, sha256: str) -> bool:
        return self._path(sha256).is_file()


class SimulatedFarm:
    """Drives the product's own nights, each against the baseline that was measured first; only measuring is simulated.

    `disturb` changes the runs of a night's matrix before they are stored.
    """

    def __init__(self, seed: int, noise: Noise, folder: Path) -> None:
        """Makes a farm with an empty results database; what it needs on disk goes to `folder`."""
        self._rng = random.Random(seed)
        self._noise = noise
        self._folder = folder
        self._days = -1
        self._calls = 0
        self._inventory = Inventory({name: Device(name, "simulated") for name in _devices(noise)})
        self._kept = _NamesOfEngines(folder / "engines")
        self._config = self._write_files()
        self.disturb: Callable[[list[Run]], list[Run]] = lambda runs: runs
        self.database = ResultsDatabase.open(":memory:")
        self.baseline = self._measure(OLD, {})
        pinned_at = self.baseline.sweep.started_at
        self.database.pin(Baseline(self._config.baseline, self.baseline.sweep.id, pinned_at, "simulated"))

    def night(
        self,
        changes: Mapping[Where, Change] | None = None,
        acknowledgements: Sequence[Acknowledgement] = (),
        *,
        engine: str | None = None,
        kept: Sequence[str] = (OLD, NEW),
    ) -> Night:
        """Returns the next night, measured, judged and confirmed as `edgemoe-farm nightly` does it."""
        self._begin(engine or (CHANGED if changes else NEW), changes or {})
        self._keep(kept)
        for acknowledgement in acknowledgements:
            self.database.acknowledge(acknowledgement)
        config = replace(self._config, pairs=PAIRS)
        run = NightRun(
            config, self._inventory, self.database, self._kept, measure=self._measured, say=lambda news: None,
            now=self._now,
        )  # fmt: skip
        night = run.measure_and_judge()
        assert night is not None
        run.store(night)
        finish(config)
        return night

    def measure(self, changes: Mapping[Where, Change]) -> Measured:
        """Returns a sweep of the matrix that nobody judges."""
        return self._measure(NEW, changes)

    def _measure(self, engine: str, changes: Mapping[Where, Change]) -> Measured:
        self._begin(engine, changes)
        plan = plan_matrix(read_matrix(self._config.matrix), self._inventory)
        sweep = new_sweep(plan, self.database, at=self._now())
        self._measured(sweep, plan)
        return Measured.read(self.database, sweep)

    def _write_files(self) -> NightlyConfig:
        write_model(self._folder)
        budgets = {
            device: [b for d, _, b in self._noise if d == device and b != DEFAULT_BUDGET] for device, *_ in self._noise
        }
        (self._folder / "matrix.toml").write_text(
            MATRIX.format(
                blocks=BLOCKS, strategies=json.dumps(list(dict.fromkeys(strategy for _, strategy, _ in self._noise))),
                budgets="\n".join(f"{device} = {json.dumps(found)}" for device, found in budgets.items()),
            )
        )  # fmt: skip
        (self._folder / "nightly.toml").write_text(NIGHTLY)
        config = read_nightly(self._folder / "nightly.toml")
        config.reports.mkdir(exist_ok=True)
        return config

    def _begin(self, engine: str, changes: Mapping[Where, Change]) -> None:
        """Lets a day pass, and draws for each device which recorded night it has."""
        self._days += 1
        self._engine, self._changes = engine, changes
        nights = sorted(next(iter(self._noise.values())).levels)
        self._drift = {device: self._rng.choice(nights) for device in _devices(self._noise)}

    def _keep(self, engines: Sequence[str]) -> None:
        folder = self._folder / "engines"
        folder.mkdir(exist_ok=True)
        for engine in (OLD, NEW):
            path = folder / f"{engine}.zip"
            path.touch() if engine in engines else path.unlink(missing_ok=True)

    def _now(self) -> datetime:
        self._calls += 1
        return START + timedelta(days=self._days, milliseconds=self._calls)

    def _measured(self, sweep: Sweep, plan: Plan, **_: object) -> int:
        """Stands for harness.sweep.measure: stores a run for each measurement of the plan, in its order."""
        runs = [self._run(sweep, i, measurement) for i, measurement in enumerate(plan.measurements)]
        for run in runs if sweep.engines else self.disturb(runs):
            self.database.add_run(run)
        return 0

    def _run(self, sweep: Sweep, i: int, measurement: Measurement) -> Run:
        cell, engine = measurement.cell, measurement.engine_sha256 or self._engine
        is_changed = engine == self._engine
        change = self._changes.get((cell.device, cell.strategy), Change()) if is_changed else Change()
        recorded_cell = self._noise[cell.device, cell.strategy, cell.expert_budget]
        ttft, tpot = recorded_cell.levels[self._drift[cell.device]]
        noise = self._rng.choice(recorded_cell.runs)
        samples = tuple(
            Sample(
                prompt,
                0,
                False,
                (9, 9 + change.other_answer),
                Steps(
                    (ttft * noise.ttft * a * change.slower, tpot * noise.tpot * b * change.slower),
                    *((0,) * 2 for _ in range(7)),
                ),
                0,
                noise.peak_bytes,
            )
            for prompt, (a, b) in enumerate(zip(noise.samples_ttft, noise.samples_tpot, strict=True))
        )
        request = RunRequest("r", "c", cell.strategy, measurement.prompts, 2, passages=(Passage((5,), (6,) * 100),))
        started_at = (datetime.fromisoformat(sweep.started_at) + timedelta(seconds=i)).isoformat()
        run = Run(
            f"{sweep.id}-{i}", sweep.id, cell, measurement.block, RunStatus.OK, Verdict.VALID,
            request=request, facts=FACTS, load=LOAD, samples=samples,
            totals=Totals(1.0, noise.peak_bytes, 0, 0, 0.0, (230.0 * change.nats,)),
            started_at=started_at, engine_sha256=engine,
        )  # fmt: skip
        reasons = ("throttled during the run (soft temperature limit)",)
        return replace(run, verdict=Verdict.SUSPECT, reasons=reasons) if change.throttled else run


def _devices(noise: Noise) -> list[str]:
    return sorted({device for device, *_ in noise})


FACTS = DeviceFacts(
    hostname="simulated", machine="x86_64", kernel="6", os=None, model=None, cpu=None, cores=2, memory_bytes=None,
    page_bytes=4096, boot_id=None, python="3.11.2", numpy="2.0.0", blas=None, engine="0.1.0",
)  # fmt: skip
LOAD = Load(
    load_s=0.3, non_expert_bytes=1, expert_bytes=0, expert_budget_bytes=None, container_bytes=9, container_experts=4,
    page_cache_resident_fraction=0.0, strategy={"precision": "stored"}, reader="pread", backend="native",
)  # fmt: skip
