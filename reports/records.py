"""Records: raw and complete, valid or not constructed. Everything else is derived from them and never stored.

History of VERSION: 1 first. Added since, so that records may lack them: Run.estimate, Run.fault, Run.conditions,
Run.lease_token, Sweep.engines and what the history in engine.protocol lists (of late Sample.layers, Sample.timeline and
Conditions.resident). Removed since, so that records may have it: Run.extra, in which nothing was ever stored.
"""

from __future__ import annotations

import enum
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

from engine.codec import from_json, to_json
from engine.errors import ProtocolError
from engine.protocol import DeviceFacts, Load, RunRequest, Sample, Totals, Watched
from reports.errors import RecordError

VERSION = 1
MOST_ATTEMPTS = 100  # at one cell and block: far more than any sweep makes

T = TypeVar("T")


class RunStatus(enum.StrEnum):
    """The end of an attempt at a cell."""

    OK = "ok"
    FAILED = "failed"
    OUT_OF_MEMORY = "out_of_memory"
    TIMED_OUT = "timed_out"
    UNREACHABLE = "unreachable"
    SKIPPED = "skipped"


class Verdict(enum.StrEnum):
    """The trust in a run's numbers: whether they may be used."""

    VALID = "valid"
    SUSPECT = "suspect"
    INVALID = "invalid"


class Fault(enum.StrEnum):
    """The reason why an attempt did not end ok: a result, or the infrastructure, and then another try may succeed."""

    UNREACHABLE = "unreachable"  # no connection
    LINK_LOST = "link_lost"  # lost during the run, and not regained in time
    LEASE_LOST = "lease_lost"  # another controller took the device during a long outage, or a person took it away
    REBOOTED = "rebooted"  # the device restarted during the run
    STALLED = "stalled"  # the device gave no answer within the deadline of an act
    DISK_FULL = "disk_full"
    STORAGE = "storage"  # failed, went read-only, or was cleaned under the run
    KILLED = "killed"  # by nobody who left a word, and not for want of memory
    DAMAGED_OUTPUT = "damaged_output"  # what came back is not what an engine says
    COMMAND_FAILED = "command_failed"  # the device could not do what the farm needs

    OUT_OF_MEMORY = "out_of_memory"
    TIMED_OUT = "timed_out"  # the engine was at work when its deadline came
    WRONG_ANSWER = "wrong_answer"
    ENGINE = "engine"  # refused, incomplete, or a bug

    UNFIT = "unfit"  # a check of the device fails, or the container has no room there: not measured
    BUSY = "busy"  # another controller uses the device: not measured
    UNTRIED = "untried"  # the device had been given up before

    @property
    def is_infrastructure(self) -> bool:
        """Returns whether another attempt may end otherwise; such faults count against the device's health."""
        return self in _INFRASTRUCTURE


_INFRASTRUCTURE = frozenset(
    {
        Fault.UNREACHABLE,
        Fault.LINK_LOST,
        Fault.LEASE_LOST,
        Fault.REBOOTED,
        Fault.STALLED,
        Fault.DISK_FULL,
        Fault.STORAGE,
        Fault.KILLED,
        Fault.DAMAGED_OUTPUT,
        Fault.COMMAND_FAILED,
    }
)


@dataclass(frozen=True)
class Cell:
    """One point of a matrix: what is measured, on what, under which conditions."""

    device: str
    container: str  # its name in the matrix
    container_sha256: str
    strategy: str
    expert_budget: str  # as asked for: "8-experts", "16777216" or "default"
    workload: str
    workload_sha256: str  # of the prompts' token ids and the sampling
    page_cache: str

    def __post_init__(self) -> None:
        for name in ("device", "container", "strategy", "expert_budget", "workload", "page_cache"):
            part = getattr(self, name)
            _require(
                bool(part) and "/" not in part and part.isprintable(),
                f"cell: {name} {part!r} must be printable, without '/': the parts of a cell's key are joined with it",
            )

    @property
    def key(self) -> str:
        """Returns what identifies the cell within a sweep."""
        return f"{self.device}/{self.key_on_device}"

    @property
    def key_on_device(self) -> str:
        """Returns the part of the key that is the same on all devices."""
        return "/".join((self.container, self.strategy, self.expert_budget, self.workload, self.page_cache))


@dataclass(frozen=True)
class RunEstimate:
    """The expectation of a run, made before it, per decoded token. Nothing in it was measured by the run."""

    token_s: float
    floor_s: float  # what no pipeline could beat
    hit_rate: float
    read_bytes: float
    memory_bytes: int
    basis: str  # where routing, arithmetic and storage rate were taken from, in words


@dataclass(frozen=True)
class Conditions(Watched):
    """The conditions of a run: what was seen of the device beside it, its page cache and its memory limit."""

    page_cache_resident_fraction: float | None = None  # of the container, just before it was loaded
    memory_limit_bytes: int | None = None  # as asked for; None: no limit
    memory_limit_method: str = "none"  # that held it: cgroup-v2, cgroup-v1, rlimit-data or none
    memory_peak_bytes: int | None = None
    memory_peak_source: str | None = None  # the limit's own counter, or ru_maxrss: of the process alone


@dataclass(frozen=True)
class Run:
    """One engine process for one cell: what was asked for, what was observed, how it ended."""

    id: str
    sweep_id: str  # the execution of a matrix to which it belongs
    cell: Cell
    block: int  # the interleaved round in which it ran: runs of one block are compared in pairs
    status: RunStatus
    verdict: Verdict
    reasons: tuple[str, ...] = ()  # for the status and the verdict, each with the remedy where there is one
    fault: Fault | None = None  # None where the status is ok, and in records from before it was kept
    request: RunRequest | None = None  # None where the engine was never started
    facts: DeviceFacts | None = None
    load: Load | None = None
    samples: tuple[Sample, ...] = ()  # warm-ups included, marked
    totals: Totals | None = None
    emulated: tuple[str, ...] = ()  # conditions that were emulated, e.g. "storage limited to 43 MB/s by the engine"
    started_at: str = ""  # UTC, ISO 8601, the controller's clock
    ended_at: str = ""
    farm_version: str = ""
    engine_sha256: str = ""
    command: str = ""  # what ran on the device
    estimate: RunEstimate | None = None  # None: not enough was known
    conditions: Conditions | None = None  # None where no engine ran
    lease_token: int | None = None  # under which the device was held; grows with every change of holder
    log_tail: str = ""  # the end of the engine's stderr, control characters removed

    def __post_init__(self) -> None:
        where = f"run {self.id or '(without id)'}"
        _require(bool(self.id) and bool(self.sweep_id), f"{where}: id and sweep_id must not be empty")
        _require(self.block >= 0, f"{where}: block is negative")
        for name in ("started_at", "ended_at"):
            require_utc(getattr(self, name), f"{where}: {name}", optional=True)
        for i, sample in enumerate(self.samples):
            known = self.request is not None and 0 <= sample.prompt < len(self.request.prompts)
            _require(known, f"{where}: samples[{i}].prompt is {sample.prompt}, which was not asked for")
        twice = [key for key, n in Counter((s.prompt, s.repetition, s.warmup) for s in self.samples).items() if n > 1]
        _require(not twice, f"{where}: a repetition of a prompt was recorded twice: {twice[:1]}")
        if self.status is RunStatus.OK:
            for name in ("request", "facts", "load", "totals"):
                _require(getattr(self, name) is not None, f"{where}: the status is ok, but {name} is missing")
            _require(bool(self.timed_samples), f"{where}: the status is ok, but no timed sample was recorded")
            _require(self.fault is None, f"{where}: the status is ok, but a fault is recorded: {self.fault}")
        else:
            _require(self.verdict is not Verdict.VALID, f"{where}: a run that is {self.status.value} is never valid")
        if self.verdict is not Verdict.VALID:
            _require(bool(self.reasons), f"{where}: the verdict {self.verdict.value} needs a reason")

    @property
    def timed_samples(self) -> tuple[Sample, ...]:
        """Returns the samples without the warm-ups."""
        return tuple(s for s in self.samples if not s.warmup)


@dataclass(frozen=True)
class Sweep:
    """One execution of a matrix."""

    id: str  # e.g. 20261123-221500-3f2a
    name: str  # of the matrix; where it is not all of that, with a purpose: "demo (confirmation)"
    matrix_toml: str  # as it was read
    baseline: str  # the strategy against which the others are compared
    planned: tuple[tuple[str, int], ...]  # (cell key, block) of everything that was to be measured
    started_at: str
    farm_version: str  # 0.1.0, with its commit where it ran from a checkout: 0.1.0+g3f2a91c04b7e
    matrix_folder: str = ""  # on the controller: where the matrix's relative paths start, for `run --resume`
    engines: tuple[str, ...] = ()  # of each of `planned`, where several take turns; empty: the one that the farm has

    def __post_init__(self) -> None:
        where = f"sweep {self.id or '(without id)'}"
        _require(bool(self.id) and bool(self.name), f"{where}: id and name must not be empty")
        _require(bool(self.planned), f"{where}: nothing was planned")
        _require(len(set(self.planned)) == len(self.planned), f"{where}: a cell is planned twice in one block")
        _require(len(self.engines) in (0, len(self.planned)), f"{where}: engines and what is planned differ in length")
        require_utc(self.started_at, f"{where}: started_at")


def emulated_in(runs: Iterable[Run]) -> tuple[str, ...]:
    """Returns each condition that was emulated in some of the runs once, in order of appearance."""
    return tuple(dict.fromkeys(condition for run in runs for condition in run.emulated))


def emulation(conditions: Iterable[str]) -> str:
    """Returns emulated conditions as one text, empty where there are none."""
    return "; ".join(conditions)


def last_attempts(runs: Iterable[Run]) -> list[Run]:
    """Returns the last run of each cell and block: a resumed sweep tries unreachable devices again.

    Their ids count attempts. Clocks are asked only where an id is of another form: they may be set back.
    """
    tried: dict[tuple[str, int], list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run.started_at, run.id)):
        tried[run.cell.key, run.block].append(run)
    last = [
        same[-1] if len(same) == 1 else max(same, key=lambda r: attempt(r.id, r.sweep_id, r.cell.key, r.block))
        for same in (list(reversed(same)) for same in tried.values())  # of equals, `max` takes the first
    ]
    return sorted(last, key=lambda run: (run.started_at, run.id))


def run_id(sweep_id: str, cell_key: str, block: int, attempt: int) -> str:
    """Returns the id of an attempt at a cell, always the same: a resumed controller finds a surviving engine."""
    digest = hashlib.sha256(f"{cell_key}\n{block}\n{attempt}".encode()).hexdigest()
    return f"{sweep_id}-{digest[:16]}"


def attempt(identity: str, sweep_id: str, cell_key: str, block: int) -> int:
    """Returns which attempt at a cell a run's id names, from 0; -1 for an id of another form."""
    return next((n for n in range(MOST_ATTEMPTS) if identity == run_id(sweep_id, cell_key, block, n)), -1)


def by_cell(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Returns runs by the key of their cell, both in the order of the runs."""
    found: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        found[run.cell.key].append(run)
    return found


# --- JSON -----------------------------------------------------------------------------------------------------------

_REMOVED: dict[type, tuple[str, ...]] = {Run: ("extra",)}  # fields that older records have


def run_to_json(run: Run) -> dict[str, Any]:
    """Returns the whole record for json.dumps; `v` is the version of this schema."""
    return {"v": VERSION, **to_json(run)}


def run_from_json(record: dict[str, Any]) -> Run:
    """Returns the run of a record. Raises RecordError for an unknown key or version, a missing key or a wrong type."""
    return _decode(Run, record)


def sweep_to_json(sweep: Sweep) -> dict[str, Any]:
    return {"v": VERSION, **to_json(sweep)}


def sweep_from_json(record: dict[str, Any]) -> Sweep:
    return _decode(Sweep, record)


def _decode(cls: type[T], record: dict[str, Any]) -> T:
    content = dict(record)
    version = content.pop("v", None)
    name = f"{cls.__name__.lower()} {str(content.get('id', '(without id)'))[:80]!r}"
    if version != VERSION:
        raise RecordError(f"{name}: record version {version!r} where {VERSION} is known: use the farm that wrote it")
    for gone in _REMOVED.get(cls, ()):
        content.pop(gone, None)
    try:
        return from_json(cls, content)
    except ProtocolError as error:
        raise RecordError(f"{name} is damaged: {error}") from None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RecordError(message)


def require_utc(text: str, where: str, *, optional: bool = False) -> None:
    """Raises RecordError unless `text` is a UTC time in ISO 8601."""
    if optional and not text:
        return
    try:
        utc = datetime.fromisoformat(text).utcoffset() == timedelta(0)
    except ValueError:
        utc = False
    _require(utc, f"{where} {text[:40]!r} is not a UTC time like 2026-11-23T22:15:00+00:00")


def instant(utc: str) -> datetime:
    """Returns a time to compare by: a second and its first fraction are not in the order of their text."""
    return datetime.fromisoformat(utc)
