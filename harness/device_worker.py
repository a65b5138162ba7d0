"""One device during a sweep: connects when needed, gives up when it must, makes a record of everything."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from device_inventory.inventory import Device
from engine.errors import ProtocolError
from engine.protocol import RunRequest
from harness.errors import DeviceError, HostKeyError, UnreachableError
from harness.matrix import Matrix
from harness.plan import Measurement, emulated_conditions, make_request, run_id
from harness.session import Outcome, Session
from harness.verify import Answers, incomplete, judge, malformed_samples
from reports.records import Run, RunEstimate, RunStatus, Sweep, Verdict

MAX_CONNECTION_FAILURES = 2  # in a row: then the rest of the device's cells are recorded as unreachable, untried
RECONNECT_PAUSE_S = 5.0


class Listener(Protocol):
    """Who watches a sweep. Called from the workers' threads: implementations take care of that themselves."""

    def device_is(self, device: str, state: str) -> None:
        """`connecting`, `deploying NAME`, `waiting: WHY`, `measuring`, `done`, or why it cannot be used."""
        ...

    def cell_started(self, measurement: Measurement) -> None: ...

    def engine_said(self, measurement: Measurement, event: str, content: dict[str, Any]) -> None: ...

    def cell_ended(self, run: Run) -> None: ...


Estimator = Callable[[Session, Measurement, RunRequest], RunEstimate | None]


class Surroundings:
    """What the workers of one sweep share."""

    def __init__(
        self,
        sweep: Sweep,
        open_session: Callable[[Device], Session],
        *,
        farm_version: str,
        earlier: Iterable[Run] = (),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        reconnect_pause_s: float = RECONNECT_PAUSE_S,
        estimate: Estimator = lambda session, measurement, request: None,
    ) -> None:
        """`earlier`: the runs of this sweep from before it was resumed; `estimate` is asked before each run."""
        earlier = list(earlier)
        self.sweep_id = sweep.id
        self.open_session = open_session
        self.farm_version = farm_version
        self.attempts = Counter((run.cell.key, run.block) for run in earlier)
        self.answers = Answers(earlier)
        self.baselines_c: dict[str, float] = {}  # by device: each worker has its own
        for run in sorted(earlier, key=lambda run: run.started_at):
            self.remember_baseline(run)
        self.now = now
        self.reconnect_pause_s = reconnect_pause_s
        self.estimate = estimate
        self.stopping = threading.Event()

    def utc(self) -> str:
        return self.now().isoformat()

    def remember_baseline(self, run: Run) -> None:
        """The first temperature of a device in this sweep is what it has to come back to before each run."""
        if run.conditions is not None and run.conditions.temperature_c.before is not None:
            self.baselines_c.setdefault(run.cell.device, run.conditions.temperature_c.before)


class DeviceWorker:
    """Measures one cell after another; used by one thread, but for `cancel`."""

    def __init__(self, device: Device, matrix: Matrix, listener: Listener, surroundings: Surroundings) -> None:
        self.device = device
        self.unusable: str | None = None  # why nothing more is tried
        self._unusable_status = RunStatus.UNREACHABLE
        self._matrix = matrix
        self._listener = listener
        self._around = surroundings
        self._session: Session | None = None
        self._connection_failures = 0  # in a row
        self._undeployable: dict[str, str] = {}  # container -> why

    def measure(self, measurement: Measurement) -> Run | None:
        """The record of one cell, None where it was cut off by `stop`. Raises nothing for a device's failure."""
        self._listener.cell_started(measurement)
        attempt = _Attempt(
            run_id(
                self._around.sweep_id,
                measurement.cell.key,
                measurement.block,
                self._around.attempts[measurement.key],
            ),
            self._around,
            measurement,
            self.device,
            self._around.utc(),
        )
        try:
            run = self._attempt(attempt)
        except _Stopped:
            return None
        return None if self._around.stopping.is_set() and run.status is not RunStatus.OK else run

    def cancel(self) -> None:
        """From another thread: kills the engine in flight. Where the device does not answer, its deadline does."""
        session = self._session
        if session is not None:
            with contextlib.suppress(DeviceError):
                session.cancel()

    def disconnect(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _attempt(self, attempt: _Attempt) -> Run:
        try:
            session = self._connected()
            if session is None:
                return attempt.without_engine(self._unusable_status, self.unusable or "")
            request = self._prepared(session, attempt)
            attempt = replace(attempt, estimate=self._around.estimate(session, attempt.measurement, request))
        except _UndeployableError as error:
            return attempt.without_engine(RunStatus.SKIPPED, str(error))
        except UnreachableError as error:
            self._lost(str(error))
            return attempt.without_engine(RunStatus.UNREACHABLE, str(error))
        self._listener.device_is(self.device.name, "measuring")
        outcome = session.execute(
            request, on_event=lambda event, content: self._heard(attempt.measurement, event, content)
        )
        run = attempt.judged(request, outcome, session.engine_sha256)
        self._around.remember_baseline(run)
        if outcome.status is RunStatus.UNREACHABLE:
            self._lost(run.reasons[0])
        else:
            self._connection_failures = 0
        return run

    def _heard(self, measurement: Measurement, event: str, content: dict[str, Any]) -> None:
        if event == "settling":
            self._listener.device_is(self.device.name, f"waiting: {'; '.join(content['reasons'])}")
        elif event == "started":
            self._listener.device_is(self.device.name, "measuring")
        self._listener.engine_said(measurement, event, content)

    def _connected(self) -> Session | None:
        """The session, opened where there is none; None where the device cannot be used (see `unusable`)."""
        while self._session is None and self.unusable is None:
            self._raise_if_stopping()
            self._listener.device_is(self.device.name, "connecting")
            try:
                self._session = self._around.open_session(self.device)
            except UnreachableError as error:
                self._lost(str(error))
                if self.unusable is None:
                    self._around.stopping.wait(self._around.reconnect_pause_s)
            except HostKeyError as error:
                self.unusable = str(error)
            except DeviceError as error:  # connected, but not fit: no Python, no space for the engine
                self.unusable, self._unusable_status = str(error), RunStatus.SKIPPED
        return None if self.unusable else self._session

    def _lost(self, reason: str) -> None:
        """The session stays: it connects again by itself, and knows which engine it left behind."""
        self._connection_failures += 1
        if self._connection_failures >= MAX_CONNECTION_FAILURES:
            self.unusable = reason

    def _prepared(self, session: Session, attempt: _Attempt) -> RunRequest:
        """Container and profile are on the device. Raises UnreachableError, _UndeployableError, _Stopped."""
        container = attempt.measurement.container
        if container.name in self._undeployable:
            raise _UndeployableError(self._undeployable[container.name])
        self._listener.device_is(self.device.name, f"deploying {container.name}")
        try:
            return make_request(
                attempt.measurement,
                self._matrix,
                self.device,
                identity=attempt.identity,
                container=self._put(session, container.path),
                profile=self._put(session, container.profile) if container.profile else None,
                baseline_c=self._around.baselines_c.get(self.device.name),
            )
        except UnreachableError:
            raise
        except (DeviceError, ProtocolError) as error:
            self._undeployable[container.name] = str(error)
            raise _UndeployableError(str(error)) from None

    def _put(self, session: Session, source: Path) -> str:
        return session.put(source, progress=lambda _: self._raise_if_stopping())  # a cut upload goes on at its end

    def _raise_if_stopping(self) -> None:
        if self._around.stopping.is_set():
            raise _Stopped


class _Stopped(Exception):
    """The sweep was stopped before the engine started."""


class _UndeployableError(Exception):
    """A container that does not get onto the device: its cells are skipped, the device's others go on."""


@dataclass(frozen=True)
class _Attempt:
    """One attempt at a cell, and how it becomes a record."""

    identity: str
    around: Surroundings
    measurement: Measurement
    device: Device
    started_at: str
    estimate: RunEstimate | None = None

    def without_engine(self, status: RunStatus, reason: str) -> Run:
        """The engine was never started."""
        return self._record(status, Verdict.INVALID, (reason,))

    def judged(self, request: RunRequest, outcome: Outcome, engine_sha256: str) -> Run:
        """What came back, checked: complete, of the right answer, under the conditions that were asked for."""
        evidence: dict[str, Any] = {
            "request": request,
            "facts": outcome.facts,
            "load": outcome.load,
            "samples": outcome.samples,
            "totals": outcome.totals,
            "conditions": outcome.conditions,
            "command": outcome.command,
            "log_tail": outcome.log_tail,
            "engine_sha256": engine_sha256,
        }
        malformed = malformed_samples(request, outcome.samples)
        if malformed:
            return self._record(RunStatus.FAILED, Verdict.INVALID, (malformed,), **{**evidence, "samples": ()})
        if outcome.status is not RunStatus.OK:
            reasons = outcome.reasons or (f"the engine ended as {outcome.status.value}: see the end of its log",)
            return self._record(outcome.status, Verdict.INVALID, reasons, **evidence)
        failure = incomplete(request, outcome)
        if outcome.load is not None and failure is None:
            failure = self.around.answers.disagreement(
                self.identity, self.measurement.cell, request, outcome.load, outcome.samples
            )
        if outcome.load is None or failure is not None:
            reasons = (failure or "", *outcome.reasons)
            return self._record(RunStatus.FAILED, Verdict.INVALID, reasons, **evidence)
        verdict, reasons = judge(request, outcome.load, outcome.conditions)
        return self._record(RunStatus.OK, verdict, (*outcome.reasons, *reasons), **evidence)

    def _record(self, status: RunStatus, verdict: Verdict, reasons: tuple[str, ...], **evidence: Any) -> Run:
        return Run(
            id=self.identity,
            sweep_id=self.around.sweep_id,
            cell=self.measurement.cell,
            block=self.measurement.block,
            status=status,
            verdict=verdict,
            reasons=reasons,
            emulated=emulated_conditions(self.device),
            started_at=self.started_at,
            ended_at=self.around.utc(),
            farm_version=self.around.farm_version,
            estimate=self.estimate,
            **evidence,
        )
