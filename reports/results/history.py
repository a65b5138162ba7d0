"""Questions about years of sweeps, answered from columns and indexes: records are read only where they are wanted."""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import sqlalchemy as sa

from reports.errors import RecordError
from reports.records import RunStatus, Sweep, Verdict, attempt, sweep_from_json
from reports.results import schema
from reports.results.transactions import Transactions, parsed


class Recorded(NamedTuple):
    """The progress of a sweep."""

    runs: int  # attempts, all of them
    cells: int  # and blocks, with one attempt or more
    last_started_at: str


Endings = dict[tuple[RunStatus, Verdict], int]


def credible_until(now: datetime) -> str:
    """Returns the date from which on a clock must have been wrong, with room for clocks that are somewhat ahead."""
    return (now + timedelta(days=1)).isoformat()


def newest_first(started_at: Any, identity: Any) -> tuple[Any, ...]:
    """Returns the order in which what a wrong clock has dated years ahead comes last: it would be first for years."""
    ahead = sa.case((started_at > credible_until(datetime.now(UTC)), 1), else_=0)
    return ahead, started_at.desc(), identity.desc()


class HistoryRows(Transactions):
    """The methods of ResultsDatabase about the past."""

    def sweeps(self, *, name: str | None = None, last: int | None = None) -> list[Sweep]:
        """Returns all sweeps, or those of a matrix, the oldest first; or only the `last` of them."""
        columns = schema.sweeps.c
        query = sa.select(columns.record).order_by(columns.started_at.desc(), columns.id.desc()).limit(last)
        if name is not None:
            query = query.where(columns.name == name)
        return [sweep_from_json(parsed(record)) for (record,) in reversed(self._rows("sweeps", query))]

    def sweeps_before(self, sweep: Sweep, limit: int) -> list[Sweep]:
        """Returns earlier sweeps of the same matrix, the newest first."""
        table = schema.sweeps.c
        earlier = sa.tuple_(table.started_at, table.id) < (sweep.started_at, sweep.id)
        query = sa.select(table.record).where(table.name == sweep.name, earlier)
        query = query.order_by(table.started_at.desc(), table.id.desc()).limit(limit)
        return [sweep_from_json(parsed(record)) for (record,) in self._rows("sweeps", query)]

    def engines(self, beginning: str) -> list[tuple[str, str]]:
        """Returns (SHA-256, the newest sweep's id) of the engines whose hash begins so, at most two."""
        table = schema.runs.c
        hashes = sa.select(table.engine_sha256).where(table.engine_sha256.startswith(beginning, autoescape=True))
        found = [sha256 for (sha256,) in self._rows("engines", hashes.distinct().limit(2))]
        newest = sa.select(table.sweep_id).order_by(*newest_first(table.started_at, table.id)).limit(1)
        return [(each, self._rows("engines", newest.where(table.engine_sha256 == each))[0][0]) for each in found]

    def commits(self, beginning: str) -> list[tuple[str, str]]:
        """Returns (commit, the newest sweep's id) of the farm's commits that begin so, at most two."""
        table = schema.sweeps.c
        version = table.record.contains(f"+g{beginning}", autoescape=True)
        query = sa.select(table.record).where(version).order_by(*newest_first(table.started_at, table.id))
        found: dict[str, str] = {}
        for (record,) in self._rows("sweeps", query):
            sweep = sweep_from_json(parsed(record))
            commit = sweep.farm_version.partition("+g")[2].partition(".")[0]
            if commit.startswith(beginning):
                found.setdefault(commit, sweep.id)
        return list(found.items())[:2]

    def engines_of(self, sweep_id: str, status: RunStatus | None = None) -> set[str]:
        """Returns the SHA-256 of the engines that measured a sweep, or its runs of `status`; reads no record."""
        query = sa.select(schema.runs.c.engine_sha256).where(schema.runs.c.sweep_id == sweep_id).distinct()
        if status is not None:
            query = query.where(schema.runs.c.status == status.value)
        return {sha256 for (sha256,) in self._rows("engines", query)}

    def recorded(self, sweep_id: str | None = None) -> dict[str, Recorded]:
        """Returns how far each sweep with a record is, or one of them; reads no record."""
        cell = schema.runs.c.cell + sa.literal("/") + sa.cast(schema.runs.c.block, sa.String)
        numbers = sa.func.count(), sa.func.count(cell.distinct()), sa.func.max(schema.runs.c.started_at)
        query = sa.select(schema.runs.c.sweep_id, *numbers).group_by(schema.runs.c.sweep_id)
        if sweep_id is not None:
            query = query.where(schema.runs.c.sweep_id == sweep_id)
        return {identity: Recorded(*found) for identity, *found in self._rows("runs", query)}

    def endings(self) -> dict[str, Endings]:
        """Returns for each sweep how often the last attempt at a cell and block ended in which way."""
        columns = schema.runs.c
        tried = sa.func.count().over(partition_by=(columns.sweep_id, columns.cell, columns.block))
        attempts = sa.select(
            columns.id, columns.sweep_id, columns.cell, columns.block, columns.started_at, columns.status,
            columns.verdict, tried.label("tried"),
        ).subquery()  # fmt: skip
        ending = (attempts.c.sweep_id, attempts.c.status, attempts.c.verdict)
        once = sa.select(*ending, sa.func.count()).where(attempts.c.tried == 1).group_by(*ending)
        again = sa.select(
            attempts.c.sweep_id, attempts.c.cell, attempts.c.block, attempts.c.id, *ending[1:]
        ).where(attempts.c.tried > 1).order_by(attempts.c.started_at.desc(), attempts.c.id.desc())  # fmt: skip
        last: dict[tuple[str, str, int], tuple[int, str, str]] = {}
        for sweep_id, cell, block, identity, status, verdict in self._rows("runs", again):
            nth, key = attempt(identity, sweep_id, cell, block), (sweep_id, cell, block)
            if key not in last or nth > last[key][0]:
                last[key] = nth, status, verdict
        counted = Counter((key[0], status, verdict) for key, (_, status, verdict) in last.items())
        for sweep_id, status, verdict, n in self._rows("runs", once):
            counted[sweep_id, status, verdict] += n
        found: dict[str, Endings] = defaultdict(dict)
        for (sweep_id, status, verdict), n in counted.items():
            try:
                found[sweep_id][RunStatus(status), Verdict(verdict)] = n
            except ValueError as error:
                raise RecordError(
                    f"a run of sweep {sweep_id} in the results database is damaged: {error}: restore the database"
                ) from None
        return dict(found)
