"""Asks for a device's lease, waits for it, renews it and gives it back.

It is kept on the device: see harness/agent/lease.py.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import NoReturn

from engine.codec import from_json, loads, to_json
from engine.errors import ProtocolError
from harness.device.deploy import safe_name
from harness.errors import DeviceBusyError, DeviceError, LeaseLostError, RemoteCommandError
from harness.process import identity, lives, owner
from harness.transport import Completed
from reports.text import harmless

RENEW_S = 45.0
WAIT_S = 3600.0
OUTAGE_S = 150.0  # within which a controller is back, or never
ROUND_S = 30.0  # of waiting on the device, between two starts of the agent there
STEP_S = 60.0
ANSWER_BYTES = 1 << 20
MOST_S = 1e8


@dataclass(frozen=True)
class Owner:
    """Describes a controller to others."""

    who: str  # user@host
    sweep: str  # its id; empty for what belongs to none
    pid: int
    process: str  # see harness.process.identity

    @classmethod
    def this_process(cls, sweep: str = "") -> Owner:
        return cls(owner(), sweep, os.getpid(), identity(os.getpid()))

    def __str__(self) -> str:
        return harmless(f"{self.who} for sweep {self.sweep}" if self.sweep else self.who, limit=120)

    @property
    def is_dead(self) -> bool:
        """Tells whether this is a process of this machine that has ended; False where that is not known here."""
        return lives(self.pid, self.process) is False


@dataclass(frozen=True)
class Holder:
    """Identifies who asks for leases. It is one for all that a process does for a sweep, which so keeps its own."""

    id: str
    owner: Owner

    @classmethod
    @cache
    def this_process(cls, sweep: str = "") -> Holder:
        return cls(secrets.token_hex(8), Owner.this_process(sweep))


@dataclass(frozen=True)
class Waiter:
    owner: Owner
    since_s: float


@dataclass(frozen=True)
class LeaseState:
    """Holds what a device says of its lease. Ages are by its own clock, at the moment of its answer."""

    state: str  # free; held; expired: the holder gave no sign of life in time, and loses it to whoever asks
    token: int  # grows with every change of holder
    holder: str | None
    owner: Owner | None
    since_s: float | None
    heartbeat_age_s: float | None  # None: none since the device started
    expires_in_s: float | None
    queue: tuple[Waiter, ...]
    granted: bool = False
    position: int | None = None  # in the queue, from 1
    occupied: bool = False  # an engine of a former holder does not end

    def __post_init__(self) -> None:
        if self.state not in ("free", "held", "expired"):
            raise ProtocolError(f"unknown state {self.state!r:.40} of a lease")

    @classmethod
    def parse(cls, output: bytes, device: str) -> LeaseState:
        """Reads a device's answer. Raises RemoteCommandError: a device may answer anything."""
        try:
            return from_json(cls, loads(output.strip()))
        except ProtocolError as error:
            raise RemoteCommandError(f"{device}: no sensible answer about the lease: {error}") from None


Call = Callable[..., Completed]  # of a verb of the agent, with its arguments; raises DeviceError
Waiting = Callable[[str], None]  # told what is waited for, each time that it is something else
Tick = Callable[[], None]  # called about once a second while waiting; an exception from it ends that


def _nothing(*_: str) -> None:
    """Ignores what it is told."""


class Lease:
    """Is one session's hold on its device."""

    def __init__(
        self,
        device: str,
        root: str,
        holder: Holder,
        call: Call,
        *,
        wait_s: float = WAIT_S,
        step_s: float = STEP_S,
        outage_s: float = OUTAGE_S,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC).astimezone(),
    ) -> None:
        """Asks for nothing yet. `root`: the farm's folder on the device; `wait_s`: how long to wait, 0: not at all.

        `step_s`: deadline of a short act there; `outage_s`: how long a controller that lost its link takes to notice
        and to give up. The lease lives for longer: no outage that a controller survives costs it the device. Who does
        not want to wait so long for a dead one has `devices unlock`.
        """
        self.holder = holder
        self.holder_id = (
            f"{holder.id}-{safe_name(device)}"  # two names of one device in an inventory exclude each other
        )
        self.token: int | None = None
        self._device, self._root = device, root
        self._call, self._wait_s, self._step_s = call, wait_s, step_s
        self.ttl_s = max(4 * RENEW_S, outage_s + 30.0)
        self._clock, self._now = clock, now
        self._renewed_s = 0.0
        self._asked = False  # something of ours may be there
        self._until_s: float | None = None  # when the waiting ends
        self._since: tuple[int, str] = (-1, "")  # of which token, in words

    def hold(self, waiting: Waiting = _nothing, tick: Tick = _nothing) -> int:
        """Returns the fencing token once the lease is ours. Raises DeviceBusyError, UnreachableError (ask again)."""
        if self.token is not None and self._clock() - self._renewed_s < RENEW_S:
            return self.token
        self.token = None
        if self._until_s is None:
            self._until_s = self._clock() + self._wait_s
        round_s, state, dead = 0.0, "", None
        while True:
            seen = self._acquire(round_s, dead, tick)
            if seen.granted:
                return self._granted(seen)
            if seen.holder != dead and self._is_dead_predecessor(seen.owner):
                dead = seen.holder
                continue
            left_s = self._until_s - self._clock()
            if left_s <= 0:
                self._give_up(seen)
            before, state = state, f"waiting: {_ordinal(seen.position or 1)} in the queue, {self._describe(seen)}"
            if state != before:
                waiting(state)
            round_s = min(ROUND_S, left_s)

    def keep(self, for_s: float = 0.0) -> None:
        """Gives a sign of life where one is due; none can follow for `for_s` then. Raises LeaseLostError."""
        if self.token is None or (not for_s and self._clock() - self._renewed_s < RENEW_S):
            return
        began_s = self._clock()
        ttl_s = str(self.ttl_s + for_s)
        done = self._call("renew", self._root, self.holder_id, str(self.token), ttl_s, deadline_s=self._step_s)
        seen = LeaseState.parse(done.stdout, self._device)
        if not seen.granted:
            self.token = None
            raise LeaseLostError(f"{self._device}: {lost_to(seen.owner)}")
        self._renewed_s = began_s

    def attended(self, *, lost: bool) -> None:
        """Notes that an engine was followed to its end, which renews the lease, or finds it lost."""
        self._renewed_s = max(self._renewed_s, self._clock() - RENEW_S / 2)
        if lost:
            self.token = None

    def release(self) -> None:
        """Gives up the lease, or the place in the queue; a device that cannot be reached notices by itself."""
        if not self._asked:
            return
        self.token, self._asked = None, False
        with suppress(DeviceError):
            self._call("release", self._root, self.holder_id, deadline_s=self._step_s)

    def look(self) -> LeaseState:
        """Returns the lease as it stands; changes nothing. Raises DeviceError."""
        return LeaseState.parse(self._call("look", self._root, deadline_s=self._step_s).stdout, self._device)

    def unlock(self, token: int) -> LeaseState:
        """Takes it from the holder under `token`, nobody else; returns how it stands then. Raises DeviceError."""
        done = self._call("unlock", self._root, str(token), deadline_s=self._step_s)
        return LeaseState.parse(done.stdout, self._device)

    def _acquire(self, round_s: float, instead_of: str | None, tick: Tick) -> LeaseState:
        wish = {
            "holder": self.holder_id,
            "owner": to_json(self.holder.owner),
            "ttl_s": self.ttl_s,
            "wait_s": round_s,
            "queue": self._wait_s > 0,
            "instead_of": instead_of,
        }
        output = bytearray()

        def take(piece: bytes) -> None:
            output.extend(piece)
            if len(output) > ANSWER_BYTES:
                raise RemoteCommandError(f"{self._device}: an answer about the lease of over {ANSWER_BYTES} bytes")
            tick()

        began_s, self._asked = self._clock(), True
        self._call(
            "acquire", self._root, stdin=json.dumps(wish).encode(), deadline_s=self._step_s + round_s,
            on_stdout=take,
        )  # fmt: skip
        seen = LeaseState.parse(bytes(output), self._device)
        self._renewed_s = began_s
        return seen

    def _granted(self, seen: LeaseState) -> int:
        self.token, self._until_s = seen.token, None
        if seen.occupied:
            self.release()
            raise DeviceBusyError(
                f"{self._device}: an engine of a former holder of the lease does not end, killed or not: restart it"
            )
        return seen.token

    def _give_up(self, seen: LeaseState) -> NoReturn:
        self._until_s = None
        self.release()
        waited = f" (waited {self._wait_s:g} s)" if self._wait_s else ""
        raise DeviceBusyError(
            f"{self._device}: {self._describe(seen)}{waited}: wait longer with --wait, or, if its controller is gone "
            f"for good, `edgemoe-farm devices unlock {self._device}`"
        )

    def _is_dead_predecessor(self, owner: Owner | None) -> bool:
        """Tells whether `owner` is this sweep's killed controller, whose lease need not expire first."""
        return owner is not None and owner.sweep == self.holder.owner.sweep and owner.is_dead

    def _describe(self, seen: LeaseState) -> str:
        if seen.state != "held" or seen.owner is None:
            return f"free for {seen.queue[0].owner}, whose turn it is" if seen.queue else "free"
        if self._since[0] != seen.token:  # once: the same text each time is one line in a log
            since = self._now() - timedelta(seconds=min(max(seen.since_s or 0.0, 0.0), MOST_S))
            self._since = seen.token, f"{since:%H:%M}" if (seen.since_s or 0) < 86400 else f"{since:%Y-%m-%d %H:%M}"
        return f"held by {seen.owner} since {self._since[1]}"


def lost_to(owner: Owner | None) -> str:
    """Returns why a run is not there, in words."""
    whose = f"{owner} has taken the device" if owner is not None else "the lease was removed by `devices unlock`"
    return f"the lease on the device was lost, {whose}: resume the sweep"


def _ordinal(n: int) -> str:
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"
