"""Runs one night, from the plan to the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Protocol

from device_inventory import Inventory
from harness.errors import UsageError
from harness.night.config import NightlyConfig
from harness.night.state import NightState, night_folder, prune_reports, state_file, unfinished
from harness.sweep.engines import EngineStore
from harness.sweep.matrix import parse_matrix, read_matrix
from harness.sweep.measure import INTERRUPTED
from harness.sweep.plan import Plan
from harness.sweep.planning import new_sweep, plan_again, plan_matrix
from harness.sweep.presence import Presence, at_work
from reports.errors import UnknownSweepError
from reports.files import replacing
from reports.judging.noise import noise_before
from reports.nights.confirmation import Suspicion
from reports.nights.gate import Measured
from reports.nights.night import Night
from reports.nights.outcome import Context, Evidence, judge_night
from reports.nights.summary import junit, markdown, payload
from reports.nights.trends import NIGHTS
from reports.pages import render
from reports.records import Run, Sweep
from reports.results.baselines import NightRecord
from reports.results.database import ResultsDatabase


class MeasureSweep(Protocol):
    """Measures a plan and stores its runs; `summary` asks for a table at the end. Returns the exit code of `run`."""

    def __call__(
        self,
        sweep: Sweep,
        plan: Plan,
        *,
        presence: Presence,
        deadline_s: float,
        canary: bool,
        kept: EngineStore,
        summary: bool,
    ) -> int: ...


class _Interrupted(Exception):
    """Says that a signal came while something was measured."""


class NightRun:
    """Runs one night: measures the matrix, judges it, measures doubts again, and publishes what it found."""

    def __init__(
        self,
        config: NightlyConfig,
        inventory: Inventory,
        database: ResultsDatabase,
        kept: EngineStore,
        *,
        measure: MeasureSweep,
        say: Callable[[str], None],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Goes on with the night that was interrupted, where there is one.

        `kept` has the engines that can be deployed again; `say` takes news, which may hold a stranger's text.
        """
        self._config, self._inventory, self._database, self._kept = config, inventory, database, kept
        self._measure_sweep, self._say, self._now = measure, say, now
        self._state = unfinished(config, now())
        self._baseline_sweep: str | None = None

    def measure_and_judge(self) -> Night | None:
        """Returns the night; None where it was interrupted: what is measured is stored, the next call goes on."""
        try:
            return self._judge(self._measure_matrix())
        except _Interrupted:
            return None

    def store(self, night: Night) -> None:
        """Stores the night in the results database, where later nights find it."""
        record = NightRecord(
            night.sweep_id, night.name, self._baseline_sweep, night.at, night.exit_code, night.to_json()
        )
        self._database.add_night(record)

    def publish(self, night: Night) -> Path:
        """Writes the page and summaries of a stored night and removes what is too old; returns the page's path."""
        folder = night_folder(self._config, night.sweep_id)
        page = render(self._database, [night.sweep_id], folder / "report.html", "nightly")
        contents = {
            "summary.md": markdown(night).encode(),
            "junit.xml": junit(night),
            "night.json": json.dumps(payload(night), indent=2).encode(),  # last: by it prune_reports knows the folder
        }
        for name, content in contents.items():
            with replacing(folder / name) as file:
                file.write(content)
        prune_reports(self._config)
        wanted = {engine for b in self._database.baselines() for engine in self._database.engines_of(b.sweep_id)}
        self._kept.prune(days=self._config.keep_engines_days, wanted=wanted)
        return page

    def _measure_matrix(self) -> Sweep:
        if self._state is not None:
            self._say(f"going on with the night that began at {self._state.began[:16]}, sweep {self._state.sweep_id}")
            try:
                sweep = self._database.sweep(self._state.sweep_id)
                plan_again(sweep, self._inventory, self._database, failed_too=False)
            except (UsageError, UnknownSweepError) as error:
                raise UsageError(f"{error}; or remove {state_file(self._config)}, for a new night") from None
        else:
            plan = plan_matrix(read_matrix(self._config.matrix), self._inventory)
            sweep = new_sweep(plan, self._database, at=self._now())
            self._state = NightState(self._now().isoformat(), sweep.id)
            self._state.save(self._config)
        self._measure(sweep, canary=True)
        return sweep

    def _measure(self, sweep: Sweep, *, canary: bool) -> None:
        with at_work(self._database, sweep.id) as presence:
            plan = plan_again(sweep, self._inventory, self._database, failed_too=False)
            code = self._measure_sweep(
                sweep, plan, presence=presence, deadline_s=max(0.0, self._left_s()), canary=canary, kept=self._kept,
                summary=canary,
            )  # fmt: skip
        if code == INTERRUPTED:
            raise _Interrupted

    def _left_s(self) -> float:
        assert self._state is not None
        return self._config.deadline_s - max(0.0, self._state.age_s(self._now()))

    def _judge(self, sweep: Sweep) -> Night:
        config, at = self._config, self._now().isoformat()
        nights = self._database.nights(name=config.name, until=at, last=NIGHTS)
        records = [r for r in nights if r.sweep_id != sweep.id]
        pinned = self._database.baseline(config.baseline)
        baseline = None if pinned is None else Measured.read(self._database, self._database.sweep(pinned.sweep_id))
        self._baseline_sweep = None if pinned is None else pinned.sweep_id
        evidence = Evidence(
            Measured.read(self._database, sweep),
            config.baseline,
            baseline,
            noise_before(self._database, sweep, config.limits),
            [Night.from_json(record.record, trends_only=True) for record in records],
        )
        context = Context(config.limits, config.rounds, self._database.acknowledgements(at=at))
        return judge_night(config.name, evidence, context, partial(self._again, sweep), self._kept.__contains__, at)

    def _again(self, night: Sweep, suspicions: Sequence[Suspicion], round_: int) -> tuple[str, Sequence[Run]] | None:
        """Measures old and new engine in turns: a sweep of its own for each round."""
        assert self._state is not None
        if round_ < len(self._state.rounds):
            sweep = self._database.sweep(self._state.rounds[round_])
        elif self._left_s() <= 0:
            return None
        else:
            matrix = parse_matrix(
                night.matrix_toml, source=f"matrix of sweep {night.id}", folder=Path(night.matrix_folder)
            )
            plan = in_turns(plan_matrix(matrix, self._inventory), suspicions, self._config.pairs)
            what = ", ".join(dict.fromkeys(f"{s.cell.strategy} on {s.cell.device}" for s in suspicions))
            self._say(f"measuring again, old and new engine in turns: {what}")
            sweep = new_sweep(plan, self._database, purpose="confirmation", at=self._now())
            self._state = self._state.with_round(sweep.id)
            self._state.save(self._config)
        self._measure(sweep, canary=False)
        return sweep.id, Measured.read(self._database, sweep).runs


def in_turns(plan: Plan, suspicions: Sequence[Suspicion], pairs: int) -> Plan:
    """Plans pairs of blocks, 2 i and 2 i + 1, of old and new engine; which comes first alternates."""
    cells = {s.cell.key: (s.old_sha256, s.new_sha256) for s in suspicions}
    turns = [
        ((key, 2 * pair + turn), engine)
        for pair in range(pairs)
        for i, (key, engines) in enumerate(cells.items())
        for turn, engine in enumerate(engines if (pair + i) % 2 == 0 else engines[::-1])
    ]
    return plan.in_turns([key for key, _ in turns], [engine for _, engine in turns])
