"""Measures on one device during a sweep: connects when needed, gives up when it must, records everything."""

from __future__ import annotations

import contextlib
import random
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from device_inventory.inventory import Device
from engine.errors import ProtocolError
from engine.protocol import RunRequest
from harness.device.collect import log_tail
from harness.device.deploy import EngineBundle
from harness.device.retry import FAULT_OF_STATUS, RETRIES, fault_of_error
from harness.device.session import Outcome, Session
from harness.errors import (
    DeviceBusyError,
    DeviceError,
    FarmError,
    HostKeyError,
    RemoteTimeoutError,
    TakenOverError,
    UnreachableError,
    unforeseen,
)
from harness.sweep.health import HealthBook
from harness.sweep.matrix import Matrix
from harness.sweep.plan import Measurement, emulated_conditions, make_request
from harness.sweep.verify import Answers, incomplete, judge, malformed_samples
from reports.errors import ReportError
from reports.records import Fault, Run, RunEstimate, RunStatus, Sweep, Verdict, run_id
from reports.results.health import DeviceHealth, Health, Mark

# After which faults to look whether the device still has what was sent: reading all of it, or by what is known of it.
_THOROUGH = (Fault.ENGINE, Fault.WRONG_ANSWER, Fault.STORAGE)
_BRIEFLY = (Fault.OUT_OF_MEMORY, Fault.TIMED_OUT, Fault.COMMAND_FAILED)
CANARY_PAUSES_S = (10.0, 40.0, 160.0)  # before each canary run that may bring a quarantined device back


class Listener(Protocol):
    """Watches a sweep. It is called from the workers' threads, and must be safe for that."""

    def device_is(self, device: str, state: str) -> None:
        """Hears `connecting`, `deploying NAME`, `waiting: WHY`, `measuring`, `done`, or why it cannot be used."""
        ...

    def cell_started(self, measurement: Measurement) -> None: ...

    def engine_said(self, measurement: Measurement, event: str, content: dict[str, Any]) -> None: ...

    def cell_ended(self, run: Run) -> None: ...


_OF_ALL = (ReportError, TakenOverError)  # what ends the sweep: no record can be kept, or another controller has it
Estimator = Callable[[Session, Measurement, RunRequest], RunEstimate | None]


class Surroundings:
    """Holds what the workers of one sweep share."""

    def __init__(
        self,
        sweep: Sweep,
        open_session: Callable[[Device], Session],
        *,
        farm_version: str,
        earlier: Iterable[Run] = (),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        random: Callable[[], float] = random.random,
        pause: Callable[[threading.Event, float], object] = threading.Event.wait,
        estimate: Estimator = lambda session, measurement, request: None,
        canary: bool = False,
        engines: Mapping[str, EngineBundle] | None = None,
    ) -> None:
        """Takes `earlier`, the runs from before the sweep was resumed; `estimate` is asked before each run.

        `pause` waits so many seconds, or until the event that stops the sweep. `canary`: every device has to prove
        itself before its first cell. `engines`: those that measurements name, by hash.
        """
        self.attempts: Counter[tuple[str, int]] = Counter()
        self.answers = Answers()
        self.unforgotten: dict[str, str] = {}  # device -> its last run in the records, which may still lie there
        self.baselines_c: dict[str, float] = {}  # by device: each worker has its own
        for run in earlier:  # in the order of their start, one after another: of a run only its answer is kept
            if run.request is not None:
                self.unforgotten[run.cell.device] = run.id
            self.attempts[run.cell.key, run.block] += 1
            self.answers.know(run)
            self.remember_baseline(run)
        self.sweep_id = sweep.id
        self.open_session = open_session
        self.farm_version = farm_version
        self.now = now
        self.random = random
        self.estimate = estimate
        self.canary = canary
        self.engines = engines or {}
        self.stopping = threading.Event()
        self._pause = pause

    def utc(self) -> str:
        return self.now().isoformat()

    def pause(self, seconds: float) -> None:
        """Waits so many seconds, or until the sweep is stopped."""
        self._pause(self.stopping, seconds)

    def remember_baseline(self, run: Run) -> None:
        """Remembers the first temperature of a device, to which it has to come back before each run."""
        if run.conditions is not None and run.conditions.temperature_c.before is not None:
            self.baselines_c.setdefault(run.cell.device, run.conditions.temperature_c.before)


class DeviceWorker:
    """Measures one cell after another; used by one thread, but for `cancel`."""

    def __init__(
        self,
        device: Device,
        matrix: Matrix,
        listener: Listener,
        surroundings: Surroundings,
        health: HealthBook,
    ) -> None:
        self.device = device
        self.unusable: str | None = None  # why nothing more is tried
        self._unusable_status = RunStatus.UNREACHABLE
        self._matrix = matrix
        self._listener = listener
        self._around = surroundings
        self._health = health
        self._is_admitted = False  # its health allows it to be measured
        self._session: Session | None = None
        self._lease_token: int | None = None
        self._failures: Counter[tuple[str, int]] = (
            Counter()
        )  # of a cell and block, of the infrastructure, in this sweep
        self._undeployable: dict[str, str] = {}  # container -> why

    def measure(self, measurement: Measurement) -> Run | None:
        """Returns the record of one attempt at a cell, or None where `stop` cut it off.

        Raises nothing for a device's failure, nor for one that nobody foresaw: only what concerns every device, such
        as results that cannot be stored. Once the record is stored, ask `tries_again`.
        """
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
        except _OF_ALL:
            raise
        except Exception as error:  # noqa: BLE001 - a record, and the sweep goes on
            run = self._of_unforeseen(attempt, error)
        if self._around.stopping.is_set() and run.status is not RunStatus.OK:
            self.forget(run)
            return None
        self._around.attempts[measurement.key] += 1
        return run

    def tries_again(self, run: Run) -> bool:
        """Returns whether the attempt that was just stored must be repeated, after the wait that comes before.

        A device whose attempts keep failing is quarantined: canary runs bring it back, or it is given up.
        """
        if run.fault is None or not run.fault.is_infrastructure or self.unusable:
            return False
        key, backoff = (run.cell.key, run.block), RETRIES[run.fault]
        self._failures[key] += 1
        state = self._health.of(self.device.name)
        if state.health is Health.QUARANTINED:
            try:
                self._rescue(state)
            except _Stopped:
                return False
        if self.unusable or self._failures[key] >= backoff.attempts:
            return False
        if state.health is not Health.QUARANTINED:
            pause_s = backoff.pause_s(self._failures[key], self._around.random)
            what = run.fault.value.replace("_", " ")
            self._listener.device_is(self.device.name, f"{what}: tried again in {pause_s:.0f} s")
            self._around.pause(pause_s)
        return True

    def forget(self, run: Run) -> None:
        """Lets the device remove a run whose record is safe, or not wanted."""
        if self._session is not None and run.request is not None:
            try:
                self._session.forget(run.id)
            except Exception:  # noqa: BLE001 - the record is safe
                self.disconnect()

    def cancel(self) -> None:
        """Kills the engine in flight, from another thread; if the device does not answer, its deadline ends it."""
        session = self._session
        if session is not None:
            with contextlib.suppress(Exception):
                session.cancel()

    def disconnect(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            with contextlib.suppress(Exception):  # its lease runs out by itself
                session.close()

    def _attempt(self, attempt: _Attempt) -> Run:
        try:
            if self.unusable is None and not self._is_admitted:
                self._admit()
            if self.unusable is not None:
                return attempt.without_engine(self._unusable_status, Fault.UNTRIED, self.unusable)
            session = self._held()
            if attempt.measurement.engine_sha256:
                session.use(self._around.engines[attempt.measurement.engine_sha256])
            attempt = replace(attempt, lease_token=self._lease_token)
            request = self._prepared(session, attempt)
            attempt = replace(attempt, estimate=self._around.estimate(session, attempt.measurement, request))
        except _UndeployableError as error:
            return attempt.without_engine(RunStatus.SKIPPED, Fault.UNFIT, str(error))
        except DeviceError as error:
            fault = fault_of_error(error)
            if self._session is not None and fault in (Fault.COMMAND_FAILED, Fault.STORAGE):
                damage = self._damage(self._session, thorough=False)
                if damage is not None:
                    reasons = (damage[1], str(error))
                    return attempt.without_engine(_status_of(error), damage[0], "; ".join(reasons))
            if not fault.is_infrastructure:
                self._give_up(str(error), _status_of(error))
            return attempt.without_engine(_status_of(error), fault, str(error))
        self._listener.device_is(self.device.name, "measuring")
        outcome = session.execute(
            request,
            on_event=lambda event, content: self._heard(attempt.measurement, event, content),
            keep=True,
        )
        run = attempt.judged(request, outcome, session.engine_sha256)
        if run.fault in _THOROUGH or run.fault in _BRIEFLY:  # only now: a look costs time
            damage = self._damage(session, thorough=run.fault in _THOROUGH)
            if damage is not None:
                run = replace(run, status=RunStatus.FAILED, fault=damage[0], reasons=(damage[1], *run.reasons))
        self._around.remember_baseline(run)
        return run

    def _damage(self, session: Session, *, thorough: bool) -> tuple[Fault, str] | None:
        """Returns the fault and the reason where the device lost or changed what was sent to it, and mends that.

        What such a device does is no result of the engine, and shows in no comparison as one.
        """
        try:
            found = session.damage(thorough=thorough)
        except DeviceError as error:
            fault = fault_of_error(error)
            return (fault if fault.is_infrastructure else Fault.STORAGE), str(error)
        if found is None:
            return None
        return Fault.STORAGE, f"{self.device.name}: the device's storage lost or changed what was sent: {found}"

    def _of_unforeseen(self, attempt: _Attempt, error: Exception) -> Run:
        """Returns the record of an attempt that ended with an error nobody foresaw, its traceback in the log.

        The session may be in any state: the next attempt opens another, which discards what this one left there.
        """
        trace = "" if isinstance(error, FarmError) else "".join(traceback.format_exception(error))
        self.disconnect()
        self._around.unforgotten[self.device.name] = attempt.identity
        fault = Fault.UNFIT if isinstance(error, FarmError) else Fault.COMMAND_FAILED
        return attempt.without_engine(RunStatus.SKIPPED, fault, self._told(error), log_tail=log_tail(trace))

    def _told(self, error: Exception) -> str:
        return str(error) if isinstance(error, FarmError) else f"{self.device.name}: {unforeseen(error)}"

    def _heard(self, measurement: Measurement, event: str, content: dict[str, Any]) -> None:
        if event == "settling":
            self._listener.device_is(self.device.name, f"waiting: {'; '.join(content['reasons'])}")
        elif event == "started":
            self._listener.device_is(self.device.name, "measuring")
        self._listener.engine_said(measurement, event, content)

    def _connected(self) -> Session:
        """Returns the session, opened where there is none; it reconnects by itself. Raises DeviceError, _Stopped."""
        if self._session is None:
            self._raise_if_stopping()
            self._listener.device_is(self.device.name, "connecting")
            self._session = self._around.open_session(self.device)
            left = self._around.unforgotten.pop(self.device.name, None)
            if left is not None:
                self._session.forget(left)
        return self._session

    def _held(self) -> Session:
        """Waits until the device is ours alone, and returns the session. Raises DeviceError, _Stopped."""
        session = self._connected()
        self._lease_token = session.hold(
            lambda state: self._listener.device_is(self.device.name, state), self._raise_if_stopping
        )
        return session

    # --- health ---------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Sets `unusable` for a device in maintenance, or quarantined and not brought back."""
        name, state = self.device.name, self._health.of(self.device.name)
        if state.health is Health.MAINTENANCE:
            reason = f"{name}: {state.reason} since {state.since[:16]}: `edgemoe-farm devices health {name} --good`"
            self._give_up(reason, RunStatus.SKIPPED)
        elif (self._around.canary or state.health is Health.QUARANTINED) and (failure := self._canary_failure()):
            self._give_up(_quarantined(name, state, failure), _status_of(failure))
        self._is_admitted = True

    def _rescue(self, state: DeviceHealth) -> None:
        """Runs canaries, each after a longer pause; sets `unusable` where none succeeds."""
        if self._session is None:  # it was not there from the start: nothing says that it will come
            return self._give_up(state.reason, RunStatus.UNREACHABLE)
        failure: DeviceError | None = None
        for pause_s in CANARY_PAUSES_S:
            self._listener.device_is(self.device.name, f"quarantined: a canary run in {pause_s:.0f} s")
            self._around.pause(pause_s)
            if self._around.stopping.is_set():
                return None
            failure = self._canary_failure()
            if failure is None:
                return None
        assert failure is not None
        return self._give_up(_quarantined(self.device.name, state, failure), _status_of(failure))

    def _canary_failure(self) -> DeviceError | None:
        """Lets the engine prove itself on the device, and notes the outcome; None where all held."""
        self._listener.device_is(self.device.name, "canary run")
        try:
            self._held().selftest()
        except DeviceBusyError as error:  # which says nothing about the device
            return error
        except (_Stopped, *_OF_ALL):
            raise
        except Exception as error:  # noqa: BLE001 - the same
            failure = error if isinstance(error, DeviceError) else DeviceError(self._told(error))
            self._health.note(self.device.name, Mark.CANARY_FAILED, str(failure))
            return failure
        self._health.note(self.device.name, Mark.CANARY_OK)
        return None

    def _give_up(self, reason: str, status: RunStatus) -> None:
        self.unusable, self._unusable_status = reason, status

    def _prepared(self, session: Session, attempt: _Attempt) -> RunRequest:
        """Deploys container and profile; returns the request. Raises DeviceError, _UndeployableError, _Stopped."""
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
                container=self._put(session, container.path, attempt.measurement.cell.container_sha256),
                profile=self._put(session, container.profile) if container.profile else None,
                baseline_c=self._around.baselines_c.get(self.device.name),
            )
        except (UnreachableError, RemoteTimeoutError):
            raise
        except TakenOverError:
            raise
        except (FarmError, ProtocolError) as error:
            if isinstance(error, DeviceError) and fault_of_error(error) is Fault.STORAGE:
                raise  # which may be mended
            self._undeployable[container.name] = str(error)
            raise _UndeployableError(str(error)) from None

    def _put(self, session: Session, source: Path, sha256: str | None = None) -> str:
        return session.put(
            source, sha256=sha256, progress=lambda _: self._raise_if_stopping()
        )  # a cut upload goes on at its end

    def _raise_if_stopping(self) -> None:
        if self._around.stopping.is_set():
            raise _Stopped


def _status_of(error: DeviceError) -> RunStatus:
    """Returns the status of a cell whose engine was never started."""
    return RunStatus.UNREACHABLE if isinstance(error, (UnreachableError, HostKeyError)) else RunStatus.SKIPPED


def _quarantined(name: str, state: DeviceHealth, failure: DeviceError) -> str:
    why = f"the canary run failed ({failure})"
    if state.health is Health.QUARANTINED:
        why = f"quarantined after {state.faults_in_a_row} failures in a row ({state.reason}), and {why}"
    return f"{name}: {why}: see `edgemoe-farm doctor {name}`, then `edgemoe-farm devices health {name} --canary`"


class _Stopped(Exception):
    """Says that the sweep was stopped before the engine started."""


class _UndeployableError(Exception):
    """Says that a container does not get onto the device: its cells are skipped, the others go on."""


@dataclass(frozen=True)
class _Attempt:
    """Turns one attempt at a cell into a record."""

    identity: str
    around: Surroundings
    measurement: Measurement
    device: Device
    started_at: str
    estimate: RunEstimate | None = None
    lease_token: int | None = None

    def without_engine(self, status: RunStatus, fault: Fault, reason: str, *, log_tail: str = "") -> Run:
        """Returns the record of a cell whose engine was never started."""
        return self._record(status, Verdict.INVALID, (reason,), fault=fault, log_tail=log_tail)

    def judged(self, request: RunRequest, outcome: Outcome, engine_sha256: str) -> Run:
        """Returns the record of what came back, checked for completeness, answer and conditions."""
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
            evidence |= {"samples": (), "fault": Fault.ENGINE}
            return self._record(RunStatus.FAILED, Verdict.INVALID, (malformed,), **evidence)
        if outcome.status is not RunStatus.OK:
            reasons = outcome.reasons or (f"the engine ended as {outcome.status.value}: see the end of its log",)
            fault = outcome.fault or FAULT_OF_STATUS[outcome.status]
            return self._record(outcome.status, Verdict.INVALID, reasons, fault=fault, **evidence)
        failure, fault = incomplete(request, outcome), Fault.ENGINE
        if outcome.load is not None and failure is None:
            fault = Fault.WRONG_ANSWER
            failure = self.around.answers.disagreement(
                self.identity, self.measurement.cell, request, outcome.load, outcome.samples, engine_sha256
            )
        if outcome.load is None or failure is not None:
            reasons = (failure or "", *outcome.reasons)
            return self._record(RunStatus.FAILED, Verdict.INVALID, reasons, fault=fault, **evidence)
        verdict, reasons = judge(request, outcome.load, outcome.conditions, outcome.totals)
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
            lease_token=self.lease_token,
            **evidence,
        )
