"""Decisions about results: which sweep is the baseline, which regressions are known, how a night ended."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from types import EllipsisType
from typing import Any

import sqlalchemy as sa

from reports.errors import DatabaseError, MovedError, RecordError
from reports.records import Cell, instant, require_utc
from reports.results import schema
from reports.results.transactions import Transactions, explained


@dataclass(frozen=True)
class Baseline:
    """The sweep with which those that follow are compared, by a name that is moved from one sweep to the next."""

    name: str
    sweep_id: str
    pinned_at: str  # UTC, ISO 8601
    pinned_by: str  # user@host
    note: str = ""  # why

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable():
            raise RecordError(f"baseline {self.name[:80]!r}: a name is printable and not empty")
        require_utc(self.pinned_at, f"baseline {self.name}: pinned_at")


@dataclass(frozen=True)
class Acknowledgement:
    """A regression that is known and accepted until a day: it is shown, and fails no gate."""

    device: str
    strategy: str
    metric: str
    cell: str  # its key; "": all cells of the strategy on the device
    reason: str
    by: str  # user@host
    at: str  # UTC, ISO 8601
    expires_at: str

    def __post_init__(self) -> None:
        where = f"acknowledgement of {self.metric} of {self.strategy} on {self.device}"
        for name in ("device", "strategy", "metric", "reason"):
            if not getattr(self, name):
                raise RecordError(f"{where}: {name} must not be empty")
        require_utc(self.at, f"{where}: at")
        require_utc(self.expires_at, f"{where}: expires_at")
        if not instant(self.at) < instant(self.expires_at):
            raise RecordError(f"{where}: it expires at {self.expires_at}, before it begins: give a later day")

    def covers(self, cell: Cell, metric: str, at: str) -> bool:
        """Returns whether a regression that is found `at` that time is this one."""
        is_same = (self.device, self.strategy, self.metric) == (cell.device, cell.strategy, metric)
        return is_same and self.cell in ("", cell.key) and instant(self.at) <= instant(at) < instant(self.expires_at)


@dataclass(frozen=True)
class NightRecord:
    """The end of a night. Its columns are searched; reports/nights/night.py reads `record`, the whole of it."""

    sweep_id: str
    name: str  # of the matrix
    baseline_sweep_id: str | None  # None: there was none yet
    at: str  # UTC, ISO 8601
    exit_code: int
    record: str  # JSON

    def __post_init__(self) -> None:
        require_utc(self.at, f"night {self.sweep_id}: at")


class BaselineRows(Transactions):
    """The methods of ResultsDatabase about baselines, acknowledgements and nights."""

    def pin(self, baseline: Baseline, *, seen: Baseline | EllipsisType | None = ...) -> None:
        """Moves a name to a sweep, from another one where it is taken. Durable on return.

        `seen` is what it was when somebody decided so, None for nothing: where it is another by now, nothing is moved
        and MovedError raised.
        """
        others = sa.delete(schema.baselines).where(schema.baselines.c.name == baseline.name)

        def act(connection: sa.Connection) -> None:
            known = sa.select(schema.sweeps.c.id).where(schema.sweeps.c.id == baseline.sweep_id)
            if connection.execute(known).scalar() is None:
                raise DatabaseError(
                    f"baseline {baseline.name}: sweep {baseline.sweep_id} is not in the results database"
                )
            self._require(connection, baseline.name, seen, baseline)
            connection.execute(others)
            connection.execute(sa.insert(schema.baselines).values(asdict(baseline)))

        with explained(f"baseline {baseline.name} cannot be stored"):
            self._write(act)

    def unpin(self, name: str, *, seen: Baseline | EllipsisType | None = ...) -> None:
        """Removes a name; an unknown one is no error. `seen` as in `pin`."""
        gone = sa.delete(schema.baselines).where(schema.baselines.c.name == name)

        def act(connection: sa.Connection) -> None:
            self._require(connection, name, seen, None)
            connection.execute(gone)

        with explained(f"baseline {name} cannot be removed"):
            self._write(act)

    def _require(
        self, connection: sa.Connection, name: str, seen: Baseline | EllipsisType | None, becomes: Baseline | None
    ) -> None:
        """Looks again in the transaction that acts, with the row locked until it ends. Raises MovedError.

        What it shall become it is already where the answer to a first attempt got lost.
        """
        if seen is ...:
            return
        query = sa.select(*_columns(schema.baselines, Baseline)).where(schema.baselines.c.name == name)
        row = connection.execute(query.with_for_update()).first()
        found = None if row is None else Baseline(*row)
        if found not in (seen, becomes):
            what = "was removed" if found is None else f"was pinned to {found.sweep_id} by {found.pinned_by}"
            raise MovedError(f"baseline {name}: {what} a moment ago: look at `edgemoe-farm baseline list` first")

    def baseline(self, name: str) -> Baseline | None:
        return next((baseline for baseline in self.baselines() if baseline.name == name), None)

    def baselines(self) -> list[Baseline]:
        """Returns all baselines by name."""
        query = sa.select(*_columns(schema.baselines, Baseline)).order_by(schema.baselines.c.name)
        return [Baseline(*row) for row in self._rows("baselines", query)]

    def acknowledge(self, acknowledgement: Acknowledgement) -> None:
        """Stores an acknowledgement, once if it is said twice. Durable on return."""
        row = asdict(acknowledgement)
        same = [schema.acknowledgements.c[name] == value for name, value in row.items()]

        def act(connection: sa.Connection) -> None:
            if connection.execute(sa.select(schema.acknowledgements.c.id).where(*same)).first() is None:
                connection.execute(sa.insert(schema.acknowledgements).values(row))

        with explained(f"the acknowledgement for {acknowledgement.device} cannot be stored"):
            self._write(act)

    def acknowledgements(self, *, at: str | None = None) -> list[Acknowledgement]:
        """Returns all acknowledgements, the oldest first, or those in force at a time."""
        query = sa.select(*_columns(schema.acknowledgements, Acknowledgement)).order_by(schema.acknowledgements.c.id)
        known = [Acknowledgement(*row) for row in self._rows("acknowledgements", query)]
        return [a for a in known if at is None or instant(a.at) <= instant(at) < instant(a.expires_at)]

    def withdraw(self, acknowledgement: Acknowledgement) -> None:
        """Removes an acknowledgement."""
        same = [schema.acknowledgements.c[name] == value for name, value in asdict(acknowledgement).items()]
        with explained(f"the acknowledgement for {acknowledgement.device} cannot be removed"):
            self._write(lambda connection: connection.execute(sa.delete(schema.acknowledgements).where(*same)))

    def add_night(self, night: NightRecord, *, anew: bool = True) -> NightRecord:
        """Stores a night; judged again, it replaces what it said before. Durable on return.

        Without `anew` what is there already stays. Returns what is stored then.
        """
        before = sa.delete(schema.nights).where(schema.nights.c.sweep_id == night.sweep_id)

        known = sa.select(*_columns(schema.nights, NightRecord)).where(schema.nights.c.sweep_id == night.sweep_id)

        def act(connection: sa.Connection) -> NightRecord:
            row = None if anew else connection.execute(known).first()
            if row is not None:
                return NightRecord(*row)
            connection.execute(before)
            connection.execute(sa.insert(schema.nights).values(asdict(night)))
            return night

        with explained(f"the night of sweep {night.sweep_id} cannot be stored"):
            return self._write(act)

    def night(self, sweep_id: str) -> NightRecord | None:
        query = sa.select(*_columns(schema.nights, NightRecord)).where(schema.nights.c.sweep_id == sweep_id)
        return next((NightRecord(*row) for row in self._rows("nights", query)), None)

    def nights(
        self,
        *,
        name: str | None = None,
        before: NightRecord | None = None,
        until: str | None = None,
        last: int | None = None,
    ) -> list[NightRecord]:
        """Returns nights, the oldest first: all, those of a matrix or before another one, or the `last` of them.

        `until`: none that is dated later; a clock that was years ahead would have had the last night for years.
        """
        columns = schema.nights.c
        query = sa.select(*_columns(schema.nights, NightRecord)).order_by(columns.at.desc(), columns.sweep_id.desc())
        if name is not None:
            query = query.where(columns.name == name)
        if before is not None:
            query = query.where(sa.tuple_(columns.at, columns.sweep_id) < (before.at, before.sweep_id))
        if until is not None:
            query = query.where(columns.at <= until)
        return [NightRecord(*row) for row in reversed(self._rows("nights", query.limit(last)))]


def _columns(table: sa.Table, cls: type[Baseline | Acknowledgement | NightRecord]) -> list[sa.Column[Any]]:
    return [table.c[field.name] for field in fields(cls)]
