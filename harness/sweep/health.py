"""Reads and notes the health of devices in the results database, which other controllers may share."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from reports.results.database import ResultsDatabase
from reports.results.health import DeviceHealth, HealthMark, Mark


class HealthBook:
    """Reads and notes health; safe to share between threads, as the database is."""

    def __init__(self, database: ResultsDatabase, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._database = database
        self._now = now

    def of(self, device: str) -> DeviceHealth:
        return self._database.health(device, at=self._now().isoformat())

    def note(self, device: str, mark: Mark, note: str = "") -> None:
        """Notes a mark of a device. Raises DatabaseError."""
        self._database.add_mark(HealthMark(device, mark, self._now().isoformat(), note))
