"""A farm whose nights are drawn from recorded noise: what `edgemoe-farm demo` measured, seven times, on a machine that
others used meanwhile (noise.json, one record a run).

A run is the level of its cell in one of the recorded nights, times what one of the cell's recorded runs was off its own
night's level; its samples are off it as that run's were. So nights drift as recorded nights did, and blocks vary as
recorded blocks did. Old and new engine of a confirmation share the night.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from statistics import median

from engine.protocol import DeviceFacts, Load, Passage, RunRequest, Sample, Steps, Totals
from reports.judging.judgement import GATED
from reports.judging.noise import SWEEPS, noise_floors
from reports.nights.confirmation import Suspicion
from reports.nights.gate import Limits, Measured
from reports.nights.night import Night
from reports.nights.outcome import ROUNDS, Context, Evidence, judge_night
from reports.records import Cell, Run, RunStatus, Sweep, Verdict
from reports.results.baselines import Acknowledgement

NOISE = Path(__file__).parent / "noise.json"
BLOCKS, PAIRS = 3, 10
OLD, NEW, CHANGED = "0" * 64, "1" * 64, "2" * 64  # engines
START = datetime(2026, 1, 1, 2, tzinfo=UTC)

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
    """Of one cell: the levels of the recorded nights, and all its runs."""

    levels: dict[int, tuple[float, float]] = field(default_factory=dict)  # night -> (ttft, tpot)
    runs: list[Recorded] = field(default_factory=list)


def recorded() -> dict[tuple[str, str, str], Cells]:
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


class SimulatedFarm:
    """Nights in a row, each against the baseline that was measured first."""

    def __init__(self, seed: int, noise: Mapping[tuple[str, str, str], Cells], limits: Limits | None = None) -> None:
        self._rng = random.Random(seed)
        self._noise = noise
        self._limits = limits or GATED
        self._n = 0
        self.nights: list[Night] = []
        self.baseline = self._measure(OLD, {}, self._drift())
        self._sides: deque[Measured] = deque([self.baseline], SWEEPS)

    def night(
        self,
        changes: Mapping[Where, Change] | None = None,
        acknowledgements: Sequence[Acknowledgement] = (),
        *,
        engine: str | None = None,
        kept: Sequence[str] = (OLD, NEW),
    ) -> Night:
        """Measured, judged, and confirmed where something is suspected."""
        drift, changes = self._drift(), changes or {}
        engine = engine or (CHANGED if changes else NEW)
        candidate = self._measure(engine, changes, drift)
        floors = noise_floors(chain.from_iterable(side.runs for side in self._sides), self._limits)
        self._sides.append(candidate)
        night = judge_night(
            "simulated", Evidence(candidate, "main", self.baseline, floors, self.nights),
            Context(self._limits, ROUNDS, acknowledgements),
            lambda found, _: self._again(found, engine, changes, drift), kept.__contains__, candidate.sweep.started_at,
        )  # fmt: skip
        self.nights.append(Night.from_json(night.to_json()))
        return night

    def measure(self, changes: Mapping[Where, Change]) -> Measured:
        """A night that nobody judges."""
        return self._measure(NEW, changes, self._drift())

    def _drift(self) -> dict[str, int]:
        """Of each device, which recorded night it has."""
        devices = sorted({device for device, *_ in self._noise})
        nights = sorted(next(iter(self._noise.values())).levels)
        return {device: self._rng.choice(nights) for device in devices}

    def _measure(self, engine: str, changes: Mapping[Where, Change], drift: Mapping[str, int]) -> Measured:
        sweep, runs = f"night-{self._n:04d}", []
        for block in range(BLOCKS):
            for key in self._noise:
                runs.append(self._run(sweep, key, block, engine, changes, drift))
        return self._measured(sweep, runs)

    def _again(
        self, suspicions: Sequence[Suspicion], engine: str, changes: Mapping[Where, Change], drift: Mapping[str, int]
    ) -> tuple[str, Sequence[Run]]:
        sweep, runs = f"confirmation-{self._n:04d}", []
        for pair in range(PAIRS):
            for key in dict.fromkeys((s.cell.device, s.cell.strategy, s.cell.expert_budget) for s in suspicions):
                runs.append(self._run(sweep, key, 2 * pair, OLD, {}, drift))
                runs.append(self._run(sweep, key, 2 * pair + 1, engine, changes, drift))
        return sweep, self._measured(sweep, runs).runs

    def _measured(self, sweep: str, runs: list[Run]) -> Measured:
        at = (START + timedelta(days=self._n)).isoformat()
        self._n += 1
        planned = tuple((run.cell.key, run.block) for run in runs)
        return Measured.of(Sweep(sweep, "simulated", "", "naive-swap", planned, at, "0.1.0"), runs)

    def _run(
        self,
        sweep: str,
        key: tuple[str, str, str],
        block: int,
        engine: str,
        changes: Mapping[Where, Change],
        drift: Mapping[str, int],
    ) -> Run:
        device, strategy, budget = key
        change = changes.get((device, strategy), Change())
        ttft, tpot = self._noise[key].levels[drift[device]]
        noise = self._rng.choice(self._noise[key].runs)
        prompts = tuple((5, 6, 7 + i) for i in range(len(noise.samples_tpot)))
        samples = tuple(
            Sample(
                i,
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
            for i, (a, b) in enumerate(zip(noise.samples_ttft, noise.samples_tpot, strict=True))
        )
        cell = Cell(device, "mix16", "c" * 64, strategy, budget, "novel", "d" * 64, "cold")
        request = RunRequest("r", "c", strategy, prompts, 2, passages=(Passage((5,), (6,) * 100),))
        run = Run(
            f"{sweep}-{device}-{strategy}-{block}-{engine[0]}", sweep, cell, block, RunStatus.OK, Verdict.VALID,
            request=request, facts=FACTS, load=LOAD, samples=samples,
            totals=Totals(1.0, noise.peak_bytes, 0, 0, 0.0, (230.0 * change.nats,)),
            started_at=(START + timedelta(days=self._n, seconds=block)).isoformat(), engine_sha256=engine,
        )  # fmt: skip
        reasons = ("throttled during the run (soft temperature limit)",)
        return replace(run, verdict=Verdict.SUSPECT, reasons=reasons) if change.throttled else run


FACTS = DeviceFacts(
    hostname="simulated", machine="x86_64", kernel="6", os=None, model=None, cpu=None, cores=2, memory_bytes=None,
    page_bytes=4096, boot_id=None, python="3.11.2", numpy="2.0.0", blas=None, engine="0.1.0",
)  # fmt: skip
LOAD = Load(
    load_s=0.3, non_expert_bytes=1, expert_bytes=0, expert_budget_bytes=None, container_bytes=9, container_experts=4,
    page_cache_resident_fraction=0.0, strategy={"precision": "stored"}, reader="pread", backend="native",
)  # fmt: skip
