"""From the bytes that an engine run left behind to an Outcome. A device may send anything: nothing here trusts it."""

from __future__ import annotations

import hashlib
import re
import signal
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.errors import ProtocolError
from engine.protocol import MAX_LINE_BYTES, DeviceFacts, Load, RunRequest, Sample, Totals, decode_event
from reports.records import RunStatus

MAX_EVENT_BYTES = 512 << 20  # of one run
LINE_BYTES = 1 << 20  # of one event, and for each token that was asked for
TOKEN_BYTES = 512
LOG_TAIL_CHARACTERS = 8000
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
        tokens = max(request.max_new_tokens, len(request.passages))
        self._line_bytes = min(MAX_LINE_BYTES, LINE_BYTES + tokens * TOKEN_BYTES)
        self._on_event = on_event
        self._rest = bytearray()

    def feed(self, piece: bytes) -> None:
        """Raises ProtocolError for whatever does not fit the protocol."""
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
        """Before it is parsed: numbers take many times the memory of their digits."""
        if len(line) > self._line_bytes:
            raise ProtocolError(f"an event is longer than {self._line_bytes} bytes, which this run has no use for")

    def _take(self, event: str, content: dict[str, Any]) -> None:
        if self.totals is not None or self.failure is not None:
            raise ProtocolError(f"event {event!r} after the last one")
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
            if len(self.samples) == self._expected_samples:
                raise ProtocolError(f"more than the {self._expected_samples} samples that were asked for")
            self.samples.append(content["sample"])
        elif event == "finished":
            if len(self.samples) != self._expected_samples:
                raise ProtocolError(f"finished with {len(self.samples)} of {self._expected_samples} samples")
            self.totals = content["totals"]
        else:
            self.failure = (content["kind"], printable(content["message"]))
        if self._on_event is not None:
            self._on_event(event, content)


@dataclass(frozen=True)
class Ending:
    """How an engine process ended, as the agent on the device saw it."""

    state: str  # exited: its supervisor saw it end; died: both are gone; absent: there is no such run
    status: int | None = None  # negative: the signal
    timed_out: bool = False  # the supervisor killed it at the deadline
    oom_kills: int | None = None  # by the kernel during the run; None: it does not say
    rebooted: bool = False
    log_tail: str = ""

    def __post_init__(self) -> None:
        if self.state not in ("exited", "died", "absent"):
            raise ProtocolError(f"unknown state {self.state!r:.40}")


def judge(collected: Collector, ending: Ending, deadline_s: float) -> tuple[RunStatus, tuple[str, ...]]:
    """The status of a run, and the reasons with what evidence there is."""
    if collected.totals is not None:
        if ending.status in (0, None) or ending.timed_out:
            return RunStatus.OK, ()
        return RunStatus.FAILED, (f"the engine finished, and then {_how(ending)}{_last_words(ending)}",)
    if ending.timed_out:
        reason = f"no end within {deadline_s:g} s, killed on the device: raise the deadline or lessen the workload"
        return RunStatus.TIMED_OUT, (reason,)
    if collected.failure is not None:
        kind, message = collected.failure
        status = {"memory": RunStatus.OUT_OF_MEMORY, "deadline": RunStatus.TIMED_OUT}.get(kind, RunStatus.FAILED)
        return status, (message,)
    if ending.state == "absent":
        return RunStatus.FAILED, ("the run folder has vanished from the device: is its disk being cleaned?",)
    if ending.rebooted:
        return RunStatus.UNREACHABLE, ("the device restarted during the run: check power supply and temperature",)
    if ending.state == "died" or ending.status == -signal.SIGKILL:
        return _killed(ending)
    if ending.status == 0:
        return RunStatus.FAILED, (f"the engine ended without its last event{_last_words(ending)}",)
    return RunStatus.FAILED, (f"the engine {_how(ending)}{_last_words(ending)}",)


def _killed(ending: Ending) -> tuple[RunStatus, tuple[str, ...]]:
    """SIGKILL leaves no word: the kernel's count of out-of-memory kills is the only evidence."""
    who = "the engine" if ending.state == "exited" else "the engine and its supervisor"
    if ending.oom_kills is None:
        why = "out of memory is suspected, this kernel keeps no count (oom_kill in /proc/vmstat)"
    elif ending.oom_kills > 0:
        why = f"the kernel counted {ending.oom_kills} out-of-memory kill(s) meanwhile (oom_kill in /proc/vmstat)"
    else:
        why = (
            "no out-of-memory kill was counted: a person did it, or Android's phantom process killer (termux-wake-lock)"
        )
        return RunStatus.FAILED, (f"{who} was killed by signal 9; {why}",)
    return RunStatus.OUT_OF_MEMORY, (f"{who} was killed by signal 9; {why}: choose a smaller expert budget",)


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
    lines = printable(ending.log_tail).strip().splitlines()
    return f": {lines[-1][:400]}" if lines else ""


def printable(text: str) -> str:
    """The end of a text without control characters, terminal escapes and direction marks; line breaks stay."""
    text = _ESCAPES.sub("", text[-4 * LOG_TAIL_CHARACTERS :])
    kept = "".join(c for c in text if c in "\n\t" or unicodedata.category(c)[0] != "C")
    return kept[-LOG_TAIL_CHARACTERS:]


# ECMA-48 control sequences, and operating system commands such as a terminal's title.
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?")
