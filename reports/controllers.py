"""The controllers that share a results database, as it knows them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass(frozen=True)
class Controller:
    """A process that measures a sweep, or did when it was last heard of. Times are by the database's clock."""

    id: str
    owner: str  # user@host
    pid: int
    process: str  # tells it from a later process of the same number, and its machine from others; "": unknown
    sweep_id: str
    started_at_s: float = 0.0  # since 1970
    heard_at_s: float = 0.0
    silent_s: float = 0.0  # since then

    @property
    def started_at(self) -> str:
        """UTC, ISO 8601."""
        return datetime.fromtimestamp(round(self.started_at_s), UTC).isoformat()

    def __str__(self) -> str:
        return f"{self.owner} (process {self.pid})"
