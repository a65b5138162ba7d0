"""Turns the bytes of an engine's run into an Outcome. A device may send anything: nothing here trusts it."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.codec import MAX_LINE_BYTES
from engine.errors import ProtocolError
from engine.protocol import LIMIT_METHODS, DeviceFacts, Load, RunRequest, Sample, Totals, Watched, decode_event
from harness.device.lease import Owner, lost_to
from reports.records import Conditions, Fault, RunStatus
from reports.text import harmless

MAX_EVENT_BYTES = 512 << 20  # of one run
LINE_BYTES = 1 << 20  # of one event, and for each token that was asked for
TOKEN_BYTES = 512
LOG_TAIL_CHARACTERS = 8000
MESSAGE_CHARACTERS = 4000
FULL_DISK_BYTES = 1 << 16  # less is none: a file system keeps a few blocks to itself
OnEvent = Callable[[str, dict[str, Any]], None]


class Collector:
    """Takes the bytes of events in any pieces, checks them, and keeps what they say."""

    def __init__(self, request: RunRequest, request_text: str, on_event: OnEvent | None = None) -> None:
        self.offset = 0  # bytes taken: where to go on after a lost link
        self.facts: DeviceFacts | None = None
        self.load: Load | None = None
        self.samples: list[Sample] = []
        self.totals: Totals | None = None
        self.failure: tuple[str, str] | None = None  # kind, message
        self._request_sha256 = hashlib.sha256(request_text.encode()).hexdigest()
        self._expected_samples = len(request.prompts) * (request.warmups + request.repetitions)
        self._most_samples = self._expected_samples + (request.timeline_steps > 0)
        tokens = max(request.max_new_tokens, len(request.passages))
        self._line_bytes = min(MAX_LINE_BYTES, LINE_BYTES + tokens * TOKEN_BYTES)
        self._on_event = on_event
        self._rest = bytearray()

    def feed(self, piece: bytes) -> None:
        """Takes the next bytes. Raises ProtocolError for whatever does not fit the protocol."""
        self.offset += len(piece)
        if self.offset > MAX_EVENT_BYTES:
            raise ProtocolError(f"the run sent more than {MAX_EVENT_BYTES} bytes of events")
        first, *others = piece.split(b"\n")
        self._rest += first
        for following in others:
            line, self._rest = bytes(self._rest), bytearray(following)
            self._check_length(line)
            self._take(*decode_event(line))
        self._check_length(self._rest)

    def _check_length(self, line: bytes | bytearray) -> None:
        """Refuses a long line before it is parsed: numbers take many times the memory of their digits."""
        if len(line) > self._line_bytes:
            raise ProtocolError(f"an event is longer than {self._line_bytes} bytes, which this run has no use for")

    def _take(self, event: str, content: dict[str, Any]) -> None:
        if self.totals is not None or self.failure is not None:
            raise ProtocolError(f"event {event!r} after the last one")
        if event == "settling" and self.facts is None:
            if self._on_event is not None:
                self._on_event(
                    event,
                    {
                        **content,
                        "reasons": tuple(_line(reason) for reason in content["reasons"]),
                    },
                )
            return
        expected = "started" if self.facts is None else "loaded" if self.load is None else "sample or finished"
        if event not in expected and event != "failed":
            raise ProtocolError(f"event {event!r} where {expected!r} was expected")
        if event == "started":
            if content["request_sha256"] != self._request_sha256:
                raise ProtocolError("the run folder on the device holds another request than this one")
            self.facts = content["facts"]
        elif event == "loaded":
            self.load = content["load"]
        elif event == "sample":
            if len(self.samples) == self._most_samples:
                raise ProtocolError(f"more than the {self._most_samples} samples that were asked for")
            self.samples.append(content["sample"])
        elif event == "finished":
            if len(self.samples) < self._expected_samples:
                raise ProtocolError(f"finished with {len(self.samples)} of {self._expected_samples} samples")
            self.totals = content["totals"]
        else:
            self.failure = (content["kind"], _line(content["message"]))
        if self._on_event is not None:
            self._on_event(event, content)


@dataclass(frozen=True)
class LimitHeld:
    """Describes the memory limit that held an engine process."""

    method: str  # see engine.device.limits
    peak_bytes: int | None = None
    peak_source: str | None = None

    def __post_init__(self) -> None:
        if self.method not in LIMIT_METHODS:
            raise ProtocolError(f"unknown method {self.method!r:.40} of a memory limit")


@dataclass(frozen=True)
class Ending:
    """Tells how an engine process ended, as the agent on the device saw it."""

    # exited: its supervisor saw it end; died: both are gone; absent: there is no such run; fenced: the lease is lost;
    # occupied: another engine does not end; damaged: a file that was put there was replaced, and nothing was started
    state: str
    status: int | None = None  # negative: the signal
    timed_out: bool = False  # the supervisor killed it at the deadline
    oom_kills: int | None = None  # by the kernel during the run; None: it does not say
    rebooted: bool = False
    free_bytes: int | None = None  # on the disk of the run's folder, when it had ended
    log_tail: str = ""
    watched: Watched | None = None  # of the device meanwhile
    limit: LimitHeld | None = None  # None: no memory limit was made
    fenced_by: Owner | None = None  # None: nobody, the lease was removed
    damaged: str = ""  # which file was replaced

    def __post_init__(self) -> None:
        if self.state not in ("exited", "died", "absent", "fenced", "occupied", "damaged"):
            raise ProtocolError(f"unknown state {self.state!r:.40}")


def conditions(request: RunRequest, collected: Collector, ending: Ending) -> Conditions:
    """Returns the conditions under which the run was measured, as far as the device told."""
    watched = ending.watched or Watched(unknown=("watch: the device was not watched, see the end of its log",))
    limit = ending.limit or LimitHeld("none")
    return Conditions(
        **vars(watched),
        page_cache_resident_fraction=collected.load.page_cache_resident_fraction if collected.load else None,
        memory_limit_bytes=request.memory_limit_bytes,
        memory_limit_method=limit.method,
        memory_peak_bytes=limit.peak_bytes,
        memory_peak_source=limit.peak_source,
    )


def classify(
    collected: Collector, ending: Ending, deadline_s: float
) -> tuple[RunStatus, Fault | None, tuple[str, ...]]:
    """Returns the status of a run, whose fault it was, and the reasons with their evidence."""
    status, fault, reasons = _judge(collected, ending, deadline_s)
    if status is RunStatus.OUT_OF_MEMORY and ending.limit is not None and ending.limit.method != "none":
        reasons += (f"its memory was limited ({ending.limit.method}): that it does not fit is an answer",)
    return status, fault, reasons


def _judge(collected: Collector, ending: Ending, deadline_s: float) -> tuple[RunStatus, Fault | None, tuple[str, ...]]:
    if ending.state == "fenced":
        return RunStatus.UNREACHABLE, Fault.LEASE_LOST, (lost_to(ending.fenced_by),)
    if ending.state == "occupied":
        reason = "an engine of an earlier run does not end, killed or not: restart the device"
        return RunStatus.FAILED, Fault.STALLED, (reason,)
    if ending.state == "damaged":
        reason = f"{_line(ending.damaged)} on the device is not what was sent: it is sent again"
        return RunStatus.FAILED, Fault.STORAGE, (reason,)
    if collected.totals is not None and (ending.status in (0, None) or ending.timed_out):
        return RunStatus.OK, None, ()
    if ending.timed_out:
        reason = f"no end within {deadline_s:g} s, killed on the device: raise the deadline or lessen the workload"
        return RunStatus.TIMED_OUT, Fault.TIMED_OUT, (reason,)
    if collected.failure is not None:
        return _reported(*collected.failure)
    if ending.state == "absent":
        reason = "the run folder has vanished from the device: is its disk being cleaned?"
        return RunStatus.FAILED, Fault.STORAGE, (reason,)
    if ending.rebooted:
        reason = "the device restarted during the run: check power supply and temperature"
        return RunStatus.UNREACHABLE, Fault.REBOOTED, (reason,)
    if ending.free_bytes is not None and ending.free_bytes < FULL_DISK_BYTES and not ending.oom_kills:
        reason = f"the device's disk is full ({ending.free_bytes} bytes are free): see `edgemoe-farm devices prune`"
        return RunStatus.FAILED, Fault.DISK_FULL, (reason,)
    if collected.totals is not None:
        return RunStatus.FAILED, Fault.ENGINE, (f"the engine finished, and then {_how(ending)}{_last_words(ending)}",)
    if ending.state == "died" or ending.status == -signal.SIGKILL:
        return _killed(ending)
    if ending.status == 0:
        return RunStatus.FAILED, Fault.ENGINE, (f"the engine ended without its last event{_last_words(ending)}",)
    return RunStatus.FAILED, Fault.ENGINE, (f"the engine {_how(ending)}{_last_words(ending)}",)


def _reported(kind: str, message: str) -> tuple[RunStatus, Fault, tuple[str, ...]]:
    """Returns what the engine itself names as the cause of its failure."""
    if kind == "memory":
        return RunStatus.OUT_OF_MEMORY, Fault.OUT_OF_MEMORY, (message,)
    if kind == "deadline":
        return RunStatus.TIMED_OUT, Fault.TIMED_OUT, (message,)
    if kind == "storage":
        return RunStatus.FAILED, fault_of_words(message) or Fault.STORAGE, (message,)
    return RunStatus.FAILED, Fault.ENGINE, (message,)


def fault_of_words(message: str) -> Fault | None:
    """Returns the fault that the system's words for an error name: one of the device's storage, or None."""
    return next((fault for words, fault in _STORAGE_WORDS if words in message), None)


# As glibc, musl and Android's C library put them; Python and the commands that we use do not translate them.
_STORAGE_WORDS = (
    ("No space left on device", Fault.DISK_FULL),
    ("Disk quota exceeded", Fault.DISK_FULL),
    ("Input/output error", Fault.STORAGE),
    ("I/O error", Fault.STORAGE),
    ("Read-only file system", Fault.STORAGE),
    ("Structure needs cleaning", Fault.STORAGE),
    ("Stale file handle", Fault.STORAGE),
    ("Transport endpoint is not connected", Fault.STORAGE),
    ("No such device", Fault.STORAGE),
    ("is not the farm's folder any more", Fault.STORAGE),  # see harness/agent/place.py
)


def _killed(ending: Ending) -> tuple[RunStatus, Fault, tuple[str, ...]]:
    """Judges a run that SIGKILL ended: the kernel's count of out-of-memory kills is the only evidence."""
    who = "the engine" if ending.state == "exited" else "the engine and its supervisor"
    if ending.oom_kills is None:
        why = "out of memory is suspected, this kernel keeps no count (oom_kill in /proc/vmstat)"
    elif ending.oom_kills > 0:
        why = f"the kernel counted {ending.oom_kills} out-of-memory kill(s) meanwhile (oom_kill in /proc/vmstat)"
    else:
        why = (
            "no out-of-memory kill was counted: a person did it, or Android's phantom process killer (termux-wake-lock)"
        )
        return RunStatus.FAILED, Fault.KILLED, (f"{who} was killed by signal 9; {why}",)
    reason = f"{who} was killed by signal 9; {why}: choose a smaller expert budget"
    return RunStatus.OUT_OF_MEMORY, Fault.OUT_OF_MEMORY, (reason,)


def _how(ending: Ending) -> str:
    if ending.status is None:
        return "vanished"
    if ending.status >= 0:
        return f"exited with status {ending.status}"
    try:
        name = signal.Signals(-ending.status).name
    except ValueError:
        name = "unknown"
    return f"was killed by signal {-ending.status} ({name})"


def _last_words(ending: Ending) -> str:
    lines = log_tail(ending.log_tail).strip().splitlines()
    return f": {lines[-1][:400]}" if lines else ""


def _line(text: str) -> str:
    return harmless(text, limit=MESSAGE_CHARACTERS).strip()


def log_tail(text: str) -> str:
    """Returns the end of an engine's log, harmless, with its line breaks."""
    return harmless(text[-4 * LOG_TAIL_CHARACTERS :], lines=True, instead="")[-LOG_TAIL_CHARACTERS:]
