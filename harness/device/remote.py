"""Implements harness.device.session.Session: one device in use, over any transport."""

from __future__ import annotations

import json
import shlex
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from device_inventory import Device
from engine.codec import from_json, loads, to_json, to_sparse_json
from engine.errors import ProtocolError
from engine.protocol import ArithmeticTimes, DeviceFacts, RunRequest, Settle, StorageRates
from harness import agent
from harness.device.bootstrap import WheelCache, bootstrap
from harness.device.collect import Collector, Ending, OnEvent, classify, conditions, log_tail
from harness.device.deploy import (
    ENGINE_SOURCE,
    REMOVE,
    EngineBundle,
    FarmFolder,
    HashCache,
    UploadTurns,
    difference,
    engine_bundle,
    look_at_blob,
    put_blob,
)
from harness.device.lease import RENEW_S, WAIT_S, Holder, Lease, Tick, Waiting
from harness.device.probe import (
    ARITHMETIC_DEADLINE_S,
    SELFTEST_DEADLINE_S,
    KernelReport,
    Python,
    find_python,
    read_arithmetic,
    read_facts,
    read_kernels,
    read_storage,
    run_selftest,
)
from harness.device.retry import fault_of_error
from harness.device.session import Outcome
from harness.doctor.survey import KINDS, Pruned, Survey, prune, survey
from harness.errors import DeviceError, LeaseLostError, PythonMissingError, RemoteTimeoutError, UnreachableError
from harness.transport import Completed, Transport
from harness.transport.shell import HASH_BYTES_PER_S
from reports.records import Fault, RunStatus
from reports.text import harmless

T = TypeVar("T")

STEP_S, IDLE_S, RECONNECT_S = Device.step_s, Device.idle_s, Device.reconnect_s
ENGINE_GRACE_S = 2.0  # the engine ends itself at its deadline; the supervisor ends it this much later
FOLLOW_GRACE_S = 30.0
SETTLED_S = 60.0  # an act that went well for so long did reconnect
UNPACK_DEADLINE_S = 300.0  # 20 MB of numpy, in a thousand files, onto a slow card
ENGINE_DEADLINE_S = 120.0  # 100 files, each synced, onto a slow card
STALE_DAYS = 7.0  # after which a run that nobody collected is removed
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.25, 10.0


class RemoteSession:
    """Runs engines on one device. One thread uses it; `cancel` may come from another."""

    facts: DeviceFacts
    engine_sha256: str

    def __init__(
        self,
        connect: Callable[[], Transport],
        *,
        root: str,
        cache_dir: Path,
        python: str | None = None,
        engine_source: Path | None = None,
        wheels: WheelCache | None = None,
        gate: Callable[[str, Survey], None] = lambda root, survey: None,
        uploads: UploadTurns | None = None,
        step_s: float = STEP_S,
        idle_s: float = IDLE_S,
        holder: Holder | None = None,
        wait_s: float = WAIT_S,
        reconnect_s: float = RECONNECT_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Connects and deploys. `gate` sees the farm's folder there and a survey; it raises DeviceError if unfit.

        `wheels` gives numpy to a device without it; None: it is left as it is.
        """
        self._connect = connect
        self._step_s, self._idle_s, self._reconnect_s = step_s, idle_s, reconnect_s
        self._clock = clock
        self._sleep = sleep
        self._cache = HashCache(cache_dir)
        self._uploads = uploads or UploadTurns()
        self._running: str | None = None  # the run folder in use
        self._there: dict[tuple[Path, str | None], str] = {}  # files that were seen there, until a run fails
        self._proven: dict[str, str] = {}  # paths there -> the hash that was found
        self._sizes: dict[str, int] = {}
        self._mended: list[str] = []  # what was not what had been sent
        self._ended: str | None = None  # the run folder that was collected last
        self._abandoned: list[str] = []  # run folders to be discarded before the next run
        self._cancelled = threading.Event()
        self._engine_bytes_sent = 0
        self._transport = connect()
        try:
            self._root, self._declared, self._wheels = root, python, wheels
            self._prepare()
            found = survey(self._transport, self.python.path, self._place.root, deadline_s=step_s)
            gate(self._place.root, found)
            if found.stale_runs:  # they belong to controllers that will not come back
                self.prune(days=STALE_DAYS, kinds=("runs",))
            self._lease = Lease(
                self._transport.name, self._place.root, holder or Holder.this_process(), self._agent,
                wait_s=wait_s, step_s=step_s, outage_s=idle_s + reconnect_s, clock=clock,
            )  # fmt: skip
            self._bundle = engine_bundle(engine_source or ENGINE_SOURCE)
            self._deploy_engine(self._bundle)
            self.facts = read_facts(self._transport, self.python, self._engine)
        except BaseException:
            self._transport.close()
            raise

    @property
    def bytes_sent(self) -> int:
        return self._transport.bytes_sent + self._engine_bytes_sent

    def close(self) -> None:
        self._lease.release()
        self._transport.close()

    def hold(self, waiting: Waiting = lambda state: None, tick: Tick = lambda: None) -> int:
        """Makes sure that this controller alone measures there, and waits for that; returns the fencing token.

        `waiting` hears what is waited for; `tick` is called about once a second meanwhile, and an exception from it
        ends that. Costs nothing where a sign of life was given a moment ago. Raises DeviceBusyError, UnreachableError.
        """

        def watch() -> None:
            if self._cancelled.is_set():
                raise DeviceError("cancelled")
            tick()

        return self._persist(lambda: self._lease.hold(waiting, watch), lambda: None)

    def put(self, source: Path, *, sha256: str | None = None, progress: Callable[[int], None] | None = None) -> str:
        """Deploys a container or profile by content hash; returns its path on the device.

        `sha256`: the hash that was planned. A link that is lost and regained costs what was in flight. Raises
        DiskFullError, UnreachableError.
        """
        if (source, sha256) not in self._there:
            total = source.stat().st_size if source.is_file() else 0

            def watch(present: int) -> None:
                check_s = total / HASH_BYTES_PER_S if present == total else 0.0  # the device is about to read all of it
                self._lease.keep(check_s if check_s > RENEW_S else 0.0)
                if progress is not None:
                    progress(present)

            digest = sha256 or self._cache.sha256(source)
            self._keep_while_hashed(total)
            path = self._persist(
                lambda: put_blob(
                    self._transport, self.python.path, self._place, source, self._cache, watch, self._uploads,
                    planned=digest,
                ),
                lambda: self._transport.bytes_sent,
            )  # fmt: skip
            self._there[source, sha256] = path
            self._proven[path], self._sizes[path] = digest, total
        return self._there[source, sha256]

    def use(self, bundle: EngineBundle) -> None:
        """Deploys another engine by content hash: it is the one that runs from now on. Raises DeviceError."""
        if bundle.sha256 != self.engine_sha256:
            self._persist(lambda: self._deploy_engine(bundle), lambda: None)

    def deployed(self, source: Path) -> str | None:
        """Returns the path on the device of a container or profile that is there, else None; sends nothing."""
        digest, total = self._cache.sha256(source), source.stat().st_size
        target = self._place.blob(digest, source)
        self._keep_while_hashed(total)
        return target if look_at_blob(self._transport, self.python.path, target, digest, total) == "ok" else None

    def damage(self, *, thorough: bool) -> str | None:
        """Looks whether the device still has what was sent, and mends it; returns what was wrong, or None.

        `thorough` reads all of the containers again. Raises DeviceError where it cannot be told or mended.
        """
        return self._persist(lambda: self._look_for_damage(thorough), lambda: None)

    def _look_for_damage(self, thorough: bool) -> str | None:
        self._mended.clear()
        self._prepare()
        self._deploy_engine(self._bundle)
        for path, sha256 in list(self._proven.items()):
            with suppress(LeaseLostError):  # it may have gone with the rest, and is asked for again before the next run
                self._keep_while_hashed(self._sizes[path] if thorough else 0)
            how = "full" if thorough else "known"
            if look_at_blob(self._transport, self.python.path, path, sha256, -1, how=how) != "ok":
                self._mended.append(f"{path} was missing or damaged")
                del self._proven[path]
                self._there.clear()
        self._lease.token = None
        return "; ".join(self._mended) or None

    def _keep_while_hashed(self, size_bytes: int) -> None:
        """Keeps the lease while the device reads so many bytes of a file."""
        check_s = size_bytes / HASH_BYTES_PER_S
        self._lease.keep(check_s if check_s > RENEW_S else 0.0)

    def arithmetic(self, container: str, *, backend: str, threads: int) -> ArithmeticTimes:
        """Returns how long a token of `container`, a path on the device, takes there. Raises DeviceError."""
        self._lease.keep(ARITHMETIC_DEADLINE_S)
        return read_arithmetic(self._transport, self.python, self._engine, container, backend=backend, threads=threads)

    def prune(self, *, days: float, kinds: tuple[str, ...] = KINDS, dry: bool = False) -> Pruned:
        """Removes what nobody used for `days` from the device's disk. Raises DeviceError."""
        return prune(self._transport, self.python.path, self._place.root, days=days, kinds=kinds, dry=dry)

    def storage(self, container: str) -> StorageRates:
        """Returns how fast `container`, a path on the device, is read there, measured lately. Raises DeviceError."""
        self._lease.keep()
        return read_storage(self._transport, self.python, self._engine, container)

    def execute(self, request: RunRequest, *, on_event: OnEvent | None = None, keep: bool = False) -> Outcome:
        """Runs the engine detached, follows it across lost links, collects it. Never raises for a device's failure.

        A run of this id that is on the device already, left by a controller that died, is collected instead. `keep`:
        its folder stays until `forget`.
        """
        end = self._end if keep else self._discard
        run = self._place.run(request.run_id)
        text = json.dumps(to_sparse_json(request), allow_nan=False)
        arguments = [self.python.path, "-m", "engine", "run", "--request", f"{run}/request.json"]
        collected = Collector(request, text, on_event)
        plan = {
            "arguments": arguments,
            "cwd": self._engine,
            "request": text,
            "deadline_s": request.deadline_s + ENGINE_GRACE_S,
            "settle": to_json(request.settle or Settle()),
            "memory_limit_bytes": request.memory_limit_bytes,
            "files": {
                path: self._proven[path] for path in (request.container, request.profile) if path in self._proven
            },
        }
        self._running = run
        ending = Ending("absent")
        try:
            token = self.hold()
            ending = self._persist(lambda: self._attend(run, token, plan, collected), lambda: collected.offset)
            self._lease.attended(lost=ending.state == "fenced")
            status, fault, reasons = classify(collected, ending, request.deadline_s)
            self._ended = run
            if not keep:
                self._remove(run)
        except KeyboardInterrupt:
            self._discard(run)
            raise
        except ProtocolError as error:  # before its parents: what the device sends is damaged
            end(run)
            status, fault = RunStatus.FAILED, Fault.DAMAGED_OUTPUT
            reasons = (f"the device sent damaged output: {harmless(error)}",)
        except RemoteTimeoutError as error:
            end(run)
            status, fault, reasons = RunStatus.TIMED_OUT, Fault.STALLED, (str(error),)
        except UnreachableError as error:
            self._abandoned.append(run)
            status, fault = RunStatus.UNREACHABLE, Fault.LINK_LOST
            reasons = (f"{error}; not back within {self._reconnect_s:g} s",)
        except DeviceError as error:
            end(run)
            status, fault, reasons = RunStatus.FAILED, fault_of_error(error), (str(error),)
        finally:
            self._running = None
        if self._cancelled.is_set() and status is not RunStatus.OK:
            status, fault, reasons = RunStatus.FAILED, Fault.UNTRIED, ("cancelled",)
        if status is not RunStatus.OK:
            self._there.clear()  # if it failed for want of a file, the next one shall not
        return Outcome(
            status=status,
            reasons=reasons,
            fault=fault,
            facts=collected.facts,
            load=collected.load,
            samples=tuple(collected.samples),
            totals=collected.totals,
            conditions=conditions(request, collected, ending),
            command=f"cd {shlex.quote(self._engine)} && {shlex.join(arguments)}",
            log_tail=log_tail(ending.log_tail),
        )

    def kernels(self) -> KernelReport:
        """Returns which kernels do the arithmetic there. Raises DeviceError."""
        return read_kernels(self._transport, self.python, self._engine)

    def selftest(self) -> None:
        """Runs the engine's own self-test on the device, as a canary. Raises DeviceError where it does not hold."""
        self.hold()
        self._lease.keep(SELFTEST_DEADLINE_S)
        self._persist(lambda: run_selftest(self._transport, self.python, self._engine, self._place.root), lambda: None)

    def forget(self, run_id: str) -> None:
        """Removes what a run left on the device, and ends what still runs of it: its outcome is stored."""
        run = self._place.run(run_id)
        if run == self._ended:
            self._remove(run)
        elif run not in self._abandoned:  # of another controller
            self._abandoned.append(run)

    def cancel(self) -> None:
        """Kills the engine in flight on the device, from another thread; `execute` then returns soon (failed)."""
        self._cancelled.set()
        run, end = self._running, self._clock() + self._step_s
        if run is None:
            return
        transport = self._connect()  # the other thread is using the first
        try:
            while self._running == run and self._clock() < end:  # it may not have started yet
                self._agent("kill", run, self._lease.holder_id, transport=transport)
                self._sleep(0.1)
        except DeviceError:
            return  # out of reach: the supervisor holds the deadline
        finally:
            transport.close()

    def _attend(self, run: str, token: int, plan: dict[str, Any], collected: Collector) -> Ending:
        """Starts the run unless it exists, and follows it from the first byte that is not here yet."""
        if self._cancelled.is_set():
            raise DeviceError("cancelled")
        while self._abandoned:  # what was given up for lost may still run, and would disturb this one
            self._agent("discard", self._abandoned[-1], self._lease.holder_id)
            self._abandoned.pop()
        # Once it has been heard of, it must not be started a second time, whatever happened to its folder.
        stdin = json.dumps(plan).encode() if collected.offset == 0 else b""
        done = self._agent(
            "attend",
            run,
            str(collected.offset),
            self._lease.holder_id,
            str(token),
            str(self._lease.ttl_s),
            stdin=stdin,
            deadline_s=plan["settle"]["max_wait_s"] + plan["deadline_s"] + FOLLOW_GRACE_S,
            on_stdout=collected.feed,
            silence_s=self._idle_s,
        )
        lines = done.stderr.split(b"\n")
        return from_json(Ending, loads(max(lines, key=len)))

    def _prepare(self) -> None:
        """Finds a Python, makes sure of the farm's folder, and brings numpy where there is none. Raises DeviceError."""
        try:
            self.python: Python = find_python(self._transport, self._declared)
            self._place = FarmFolder.prepare(self._transport, self.python.path, self._root)
        except PythonMissingError as missing:
            if self._wheels is None or missing.bare is None:
                raise
            bare = missing.bare
            self._place = FarmFolder.prepare(self._transport, bare, self._root)

            def unpack(folder: str, archive: str) -> None:
                self._agent("install", folder, archive, python=bare, deadline_s=UNPACK_DEADLINE_S)
                self._mended.append(f"numpy in {folder} was missing or damaged")

            self.python = bootstrap(self._transport, self._place, missing, self._wheels, self._cache, unpack)

    def _deploy_engine(self, bundle: EngineBundle) -> None:
        folder = self._place.engine(bundle.sha256)
        differs = difference(self._transport, self.python.path, folder, bundle.files)
        if differs is not None:
            self._agent("install", folder, stdin=bundle.content, deadline_s=max(self._step_s, ENGINE_DEADLINE_S))
            self._engine_bytes_sent += len(bundle.content)
            self._mended.append(f"the engine in {folder} was damaged: {differs}")
        self.engine_sha256, self._engine, self._bundle = bundle.sha256, folder, bundle

    def _remove(self, run: str) -> None:
        """Removes a run that has ended; cheaper than `discard`, which starts a Python to look for survivors."""
        try:
            command = ["sh", "-c", REMOVE, "sh", run, self._lease.holder_id, self._place.root]
            self._transport.run(command, deadline_s=self._step_s, check=False)
        except DeviceError:
            self._abandoned.append(run)  # before the next run, then

    def _end(self, run: str) -> None:
        """Ends what may still run, and leaves the folder."""
        with suppress(DeviceError):
            self._agent("kill", run, self._lease.holder_id)
            self._ended = run

    def _discard(self, run: str) -> None:
        """Ends what may still run, and removes the folder; a device that cannot be reached keeps it."""
        with suppress(DeviceError):
            self._agent("discard", run, self._lease.holder_id)

    def _agent(
        self, verb: str, *arguments: str, transport: Transport | None = None, python: str | None = None, **options: Any
    ) -> Completed:
        options = {"deadline_s": self._step_s, **options}
        return agent.call(transport or self._transport, python or self.python.path, verb, *arguments, **options)

    def _persist(self, act: Callable[[], T], progress: Callable[[], object]) -> T:
        """Repeats `act` after each lost link, until `reconnect_s` have passed without progress."""
        give_up: float | None = None
        while True:
            began, before = self._clock(), progress()
            try:
                return act()
            except LeaseLostError:
                raise
            except UnreachableError as loss:
                now = self._clock()
                if give_up is None or progress() != before or now - began > SETTLED_S:
                    give_up = now + self._reconnect_s
                self._await_link(loss, give_up)

    def _await_link(self, loss: UnreachableError, give_up: float) -> None:
        backoff_s = FIRST_BACKOFF_S
        while True:
            remaining_s = give_up - self._clock()
            if remaining_s <= 0 or self._cancelled.is_set():
                raise loss
            self._sleep(min(backoff_s, remaining_s))
            backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)
            try:
                self._transport.run(["true"], deadline_s=self._step_s)
                return
            except UnreachableError as still:
                loss = still
