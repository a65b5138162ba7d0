"""Keeps the lease on a device: who may measure there, and who waits. Files in the farm's folder, under a lock.

lease.json  what must survive a power cut: the fencing token, which only grows, and who holds the lease
alive.json  what a restart ends: the holder's last sign of life, and the queue. Of this boot, or void
lock        locked with flock for the moment of a change: agents that come at once change one after the other

Times are the device's own, in seconds since it started. A holder that gives no sign of life for its `ttl_s` has lost
the lease as soon as somebody else wants it, and not before.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

from harness.agent.files import read, write
from harness.agent.place import verify

Clock = Callable[[], float]  # files.since_boot_s
TICKET_TTL_S = 60.0  # who waits gives a sign of life more often than that, or loses the place
LOCK_S = 10.0
MOST_TTL_S = 86400.0  # a lease that runs for longer than a day was never granted
MOST_TOKEN = 1 << 53
MOST_NAME = 1000


@contextlib.contextmanager
def locked(root: str) -> Iterator[int]:
    """Yields the lock's handle, for a child that must not inherit it. Raises TimeoutError, NotOursError."""
    verify(root)
    folder = os.path.join(root, "lease")
    handle = os.open(os.path.join(folder, "lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        end = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"{folder}/lock has been locked for {LOCK_S:g} s: is a process stopped?"
                    ) from None
                time.sleep(0.001)
        try:
            yield handle
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # for a child, too, that has not closed its copy yet
    finally:
        os.close(handle)


class LeaseFiles:
    """Holds the lease as it stands. Read, change and save it while `locked`, or the clock would run backwards."""

    def __init__(self, root: str, clock: Clock, boot: Optional[str]) -> None:
        self.folder = os.path.join(root, "lease")
        self.now, self.boot = clock(), boot
        self.token, self.holder, self.owner = _granted(self.folder)
        alive = read(self.folder, "alive.json") or {}
        written = alive.get("written", 0.0)
        if alive.get("boot_id") != boot or (boot is None and not self._is_past(written)):
            alive = {}
        signs = alive if alive.get("holder") == self.holder else {}
        times = [signs.get(name) for name in ("since", "heartbeat", "expires")]
        sound = self._is_past(times[0]) and self._is_past(times[1]) and self._is_past(times[2], ahead_s=MOST_TTL_S)
        self.since: Optional[float] = times[0] if sound else None
        self.heartbeat: Optional[float] = times[1] if sound else None
        self.expires: float = times[2] if sound and times[2] is not None else self.now
        tickets = alive.get("queue")
        self.queue = [
            {"holder": t["holder"], "owner": _owner(t["owner"]), "since": t["since"], "heartbeat": t["heartbeat"]}
            for t in (tickets if isinstance(tickets, list) else ())
            if self._is_ticket(t) and self.now - t["heartbeat"] <= TICKET_TTL_S
        ]

    def _is_past(self, value: Any, ahead_s: float = 0.0) -> bool:
        """Tells whether a time was noted since the device started, or lies no further ahead."""
        return type(value) in (int, float) and -1e9 < value <= self.now + ahead_s

    def _is_ticket(self, ticket: Any) -> bool:
        return (
            isinstance(ticket, dict)
            and _is_name(ticket.get("holder"))
            and _owner(ticket.get("owner")) is not None
            and self._is_past(ticket.get("since"))
            and self._is_past(ticket.get("heartbeat"))
        )

    @property
    def state(self) -> str:
        if self.holder is None:
            return "free"
        return "held" if self.now < self.expires else "expired"

    def seen(self) -> Dict[str, Any]:
        """Returns what the controller is told."""
        return {
            "state": self.state,
            "token": self.token,
            "holder": self.holder,
            "owner": self.owner,
            "since_s": None if self.since is None else self.now - self.since,
            "heartbeat_age_s": None if self.heartbeat is None else self.now - self.heartbeat,
            "expires_in_s": max(0.0, self.expires - self.now) if self.holder is not None else None,
            "queue": [{"owner": t["owner"], "since_s": self.now - t["since"]} for t in self.queue],
        }

    def grant(self, holder: Optional[str], owner: Optional[Dict[str, Any]], ttl_s: float) -> None:
        """Gives the lease to a holder or to nobody; the next token fences out whoever held it."""
        self.token, self.holder, self.owner, self.since = self.token + 1, holder, owner, self.now
        self.beat(ttl_s)  # before the lease itself: half of this leaves things as they were, or nobody's
        write(self.folder, "lease.json", {"v": 1, "token": self.token, "holder": holder, "owner": owner})

    def renewed(self, holder: str, token: int, ttl_s: float) -> bool:
        """Gives a sign of life; returns False where this is no longer the lease that was granted.

        A lease that ran out, but that nobody else took, goes on.
        """
        if (self.holder, self.token) != (holder, token):
            return False
        self.beat(ttl_s)
        return True

    def beat(self, ttl_s: float) -> None:
        self.heartbeat, self.expires = self.now, self.now + ttl_s
        self.save_signs()

    def save_signs(self) -> None:
        """Saves the signs of life, unsynced: a power cut voids them, and a sync would disturb the measurement."""
        signs = {
            "boot_id": self.boot,
            "written": self.now,
            "holder": self.holder,
            "since": self.since,
            "heartbeat": self.heartbeat,
            "expires": self.expires,
            "queue": self.queue,
        }
        write(self.folder, "alive.json", signs, synced=False)


def _granted(folder: str) -> Tuple[int, Optional[str], Optional[Dict[str, Any]]]:
    """Returns token, holder and owner as they were granted last.

    What is damaged is nobody's. If the token is, the next has to be above all that were: the date is, in seconds.
    """
    if not os.path.lexists(os.path.join(folder, "lease.json")):
        return 0, None, None
    kept = read(folder, "lease.json") or {}
    token, holder, owner = kept.get("token"), kept.get("holder"), _owner(kept.get("owner"))
    if type(token) is not int or not 0 <= token < MOST_TOKEN:
        return int(min(max(time.time(), 0.0), MOST_TOKEN / 2)), None, None
    if holder is None or not _is_name(holder) or owner is None:
        return token, None, None
    return token, holder, owner


def _owner(value: Any) -> Optional[Dict[str, Any]]:
    """Returns what this farm knows of an owner; a newer one may have written more. None where it is damaged."""
    if not isinstance(value, dict):
        return None
    pid, words = value.get("pid"), {name: value.get(name) for name in ("who", "sweep", "process")}
    if not all(isinstance(word, str) and len(word) <= MOST_NAME for word in words.values()):
        return None
    return {**words, "pid": pid} if type(pid) is int and 0 <= pid < MOST_TOKEN else None


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MOST_NAME


def request(
    root: str,
    holder: str,
    owner: Dict[str, Any],
    ttl_s: float,
    clock: Clock,
    boot: Optional[str],
    *,
    queue: bool = True,
    instead_of: Optional[str] = None,
) -> Dict[str, Any]:
    """Tries once to get the lease; returns what is seen, with `granted` and the `position` in the queue.

    Asking again does no harm: a holder keeps what it has, a ticket its place. `instead_of`: a holder that is known to
    be dead, whose time need not be waited for. Without `queue` nothing is left behind where the lease is not granted.
    """
    with locked(root):
        lease = LeaseFiles(root, clock, boot)
        others = [ticket for ticket in lease.queue if ticket["holder"] != holder]
        place = next((i for i, ticket in enumerate(lease.queue) if ticket["holder"] == holder), len(others))
        granted = (
            lease.holder == holder
            or (instead_of is not None and lease.holder == instead_of)
            or (lease.state != "held" and place == 0)
        )
        if granted:
            lease.queue = others
            if lease.holder == holder:
                lease.beat(ttl_s)
            else:
                lease.grant(holder, owner, ttl_s)
        elif queue:
            now, is_new = lease.now, place == len(lease.queue)
            since = now if is_new else lease.queue[place]["since"]
            stale = is_new or now - lease.queue[place]["heartbeat"] > TICKET_TTL_S / 4
            lease.queue[place : place + 1] = [{"holder": holder, "owner": owner, "since": since, "heartbeat": now}]
            if stale:  # not each second
                lease.save_signs()
        return {**lease.seen(), "granted": granted, "position": place + 1}


def renew(root: str, holder: str, token: int, ttl_s: float, clock: Clock, boot: Optional[str]) -> Dict[str, Any]:
    """Gives a sign of life; returns what is seen, with `granted` where the lease is still held."""
    with locked(root):
        lease = LeaseFiles(root, clock, boot)
        granted = lease.renewed(holder, token, ttl_s)
        return {**lease.seen(), "granted": granted}


def release(root: str, holder: str, clock: Clock, boot: Optional[str]) -> None:
    """Gives up the lease, or the place in the queue."""
    with locked(root):
        lease = LeaseFiles(root, clock, boot)
        lease.queue = [ticket for ticket in lease.queue if ticket["holder"] != holder]
        if lease.holder == holder:
            lease.grant(None, None, 0.0)
        else:
            lease.save_signs()


def unlock(root: str, token: int, clock: Clock, boot: Optional[str]) -> Dict[str, Any]:
    """Takes the lease from whoever holds it under `token`; returns what is seen then."""
    with locked(root):
        lease = LeaseFiles(root, clock, boot)
        if lease.holder is not None and lease.token == token:
            lease.grant(None, None, 0.0)
        return lease.seen()


def look(root: str, clock: Clock, boot: Optional[str]) -> Dict[str, Any]:
    """Returns what is seen; changes nothing."""
    with locked(root):
        return LeaseFiles(root, clock, boot).seen()
