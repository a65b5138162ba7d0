"""Runs a plan: a worker for each device, one engine at a time on each, every record stored before the next.

A device's failure is a record and never ends the sweep. What ends it: everything measured, `stop` (Ctrl-C), or a
failure of the controller itself, such as a results database that takes no more records.
"""

from __future__ import annotations

import concurrent.futures
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from harness.sweep.health import HealthBook
from harness.sweep.plan import Measurement, Plan
from harness.sweep.progress import Unfailing
from harness.sweep.worker import DeviceWorker, Listener, Surroundings
from reports.records import Fault, Run, RunStatus, Sweep, Verdict, attempt
from reports.results.database import ResultsDatabase

MAX_DEVICES_AT_ONCE = 1024  # a thread each: a device must never wait for another
CANCEL_PAUSE_S = 2.0  # between attempts to kill what is in flight, until the workers have ended
CANCEL_DEADLINE_S = 20.0  # for one attempt


class SweepRunner:
    """Measures what a plan says, stores every record. `measure` returns when all ended or after `stop`."""

    def __init__(
        self,
        plan: Plan,
        database: ResultsDatabase,
        listener: Listener,
        surroundings: Surroundings,
        *,
        deadline_s: float = math.inf,
        tick: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts no cell later than `deadline_s` after `measure` began; cells in flight end.

        `tick` is called several times a second while measuring; what it raises ends the sweep.
        """
        self._tick = tick
        self._plan = plan
        self._database = database
        self._listener = listener = Unfailing(listener)
        self._surroundings = surroundings
        self._deadline_s, self._clock = deadline_s, clock
        self._late_at = math.inf
        health = HealthBook(database, surroundings.now)
        self._workers = [DeviceWorker(device, plan.matrix, listener, surroundings, health) for device in plan.devices]

    def measure(self) -> None:
        """Blocks until the sweep ends. Raises what the controller itself failed of."""
        if not self._workers:
            return
        self._late_at = self._clock() + self._deadline_s
        with concurrent.futures.ThreadPoolExecutor(min(len(self._workers), MAX_DEVICES_AT_ONCE), "device") as pool:
            futures = [pool.submit(self._measure_device, worker) for worker in self._workers]
            pending = set(futures)
            try:
                while pending and not self.stopped:
                    # The wait is short so that the main thread gets to run its signal handlers.
                    ended, pending = concurrent.futures.wait(
                        pending, timeout=0.2, return_when=concurrent.futures.FIRST_EXCEPTION
                    )
                    for future in ended:
                        future.result()
                    self._tick()
            finally:
                self.stop()
                while pending:
                    self._cancel_all()
                    _, pending = concurrent.futures.wait(pending, timeout=CANCEL_PAUSE_S)
        for future in futures:
            future.result()

    def stop(self) -> None:
        """Starts no further cell and kills those in flight; for signal handlers and other threads."""
        self._surroundings.stopping.set()

    @property
    def stopped(self) -> bool:
        return self._surroundings.stopping.is_set()

    def _measure_device(self, worker: DeviceWorker) -> None:
        try:
            for measurement in self._plan.of_device(worker.device.name):
                run = self._measure_cell(worker, measurement)
                if run is None:  # `run --resume` measures the cell
                    return self._listener.device_is(worker.device.name, "stopped" if self.stopped else "out of time")
                self._listener.cell_ended(run)
            return self._listener.device_is(worker.device.name, worker.unusable or "done")
        finally:
            worker.disconnect()

    def _measure_cell(self, worker: DeviceWorker, measurement: Measurement) -> Run | None:
        """Stores each attempt at a cell and returns the last; None where the sweep was stopped, or late, before it."""
        while not self.stopped and self._clock() < self._late_at:
            run = worker.measure(measurement)
            if run is None:
                return None
            self._database.add_run(run, pause=partial(self._await_database, worker.device.name))
            worker.forget(run)
            if not worker.tries_again(run):
                return run
        return None

    def _await_database(self, device: str, why: str, seconds: float) -> bool:
        """Waits for a server that is away; returns False where the sweep is being stopped."""
        self._listener.device_is(device, f"waiting for the results database: {why}")
        return not self._surroundings.stopping.wait(seconds)

    def _cancel_all(self) -> None:
        """Cancels on all devices at once: one that does not answer must not keep the others running."""
        threads = [threading.Thread(target=worker.cancel, daemon=True) for worker in self._workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(CANCEL_DEADLINE_S)


@dataclass(frozen=True)
class Tally:
    """Counts the last attempts at each cell and block of a sweep by status."""

    counts: dict[RunStatus, int]
    missing: int
    suspect: int
    over_limit: int = 0  # of those out of memory: a limit that was asked for is what they do not fit
    to_repeat: int = 0  # by `run --resume`: their last attempts failed of the infrastructure

    @property
    def exit_code(self) -> int:
        """Returns 0 if all are ok or over their limit, 3 if some failed or are missing, 4 if no device was usable."""
        total = sum(self.counts.values())
        unused = self.counts.get(RunStatus.UNREACHABLE, 0) + self.counts.get(RunStatus.SKIPPED, 0)
        if total and unused == total:
            return 4
        answered = self.counts.get(RunStatus.OK, 0) + self.over_limit
        return 0 if answered == total and not self.missing else 3


def tally(sweep: Sweep, runs: Iterable[Run]) -> Tally:
    last: dict[tuple[str, int], tuple[int, str, str, RunStatus, Verdict, Fault | None, bool]] = {}
    for run in runs:  # as they come, and without their samples: a sweep may be larger than the memory
        key, told = (run.cell.key, run.block), (run.status, run.verdict, run.fault, _is_over_limit(run))
        nth = attempt(run.id, run.sweep_id, *key)
        latest = (nth, run.started_at, run.id, *told)
        last[key] = max(latest, last.get(key, latest), key=lambda each: each[:3])
    return Tally(
        counts=dict(Counter(status for _, _, _, status, *_ in last.values())),
        missing=len(sweep.planned) - len(last),
        suspect=sum(verdict is Verdict.SUSPECT for *_, verdict, _, _ in last.values()),
        over_limit=sum(over for *_, over in last.values()),
        to_repeat=sum(fault is not None and fault.is_infrastructure for *_, fault, _ in last.values()),
    )


def _is_over_limit(run: Run) -> bool:
    held = run.conditions is not None and run.conditions.memory_limit_method != "none"
    return run.status is RunStatus.OUT_OF_MEMORY and held
