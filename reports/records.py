"""Records: raw and complete, valid or not constructed. Everything else is derived from them and never stored.

History of VERSION: 1 first.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from engine.protocol import DeviceFacts, Load, RunRequest, Sample, Totals

VERSION = 1


class RunStatus(str, enum.Enum):
    """How an attempt at a cell ended."""

    OK = "ok"
    FAILED = "failed"
    OUT_OF_MEMORY = "out_of_memory"
    TIMED_OUT = "timed_out"
    UNREACHABLE = "unreachable"
    SKIPPED = "skipped"


class Verdict(str, enum.Enum):
    """Whether the numbers of a run may be used."""

    VALID = "valid"
    SUSPECT = "suspect"
    INVALID = "invalid"


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

    @property
    def key(self) -> str:
        """Identifies the cell within a sweep."""
        return "/".join(
            (self.device, self.container, self.strategy, self.expert_budget, self.workload, self.page_cache)
        )


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
    log_tail: str = ""  # the end of the engine's stderr, control characters removed
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """One execution of a matrix."""

    id: str  # e.g. 20261123-221500-3f2a
    name: str  # of the matrix
    matrix_toml: str  # as it was read
    baseline: str  # the strategy against which the others are compared
    planned: tuple[tuple[str, int], ...]  # (cell key, block) of everything that was to be measured
    started_at: str
    farm_version: str
