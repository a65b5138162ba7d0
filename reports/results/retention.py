"""The retention of a results database: old sweeps go with their runs, but for those that somebody still needs.

How their nights ended stays: a trend line outlives its raw samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime

import sqlalchemy as sa

from reports.records import Sweep, instant
from reports.results import schema
from reports.results.database import ResultsDatabase
from reports.results.history import credible_until
from reports.results.transactions import explained


@dataclass(frozen=True)
class Retention:
    """A rule for sweeps that may go: started before a time, but for the last so many of each matrix."""

    before: str  # UTC, ISO 8601
    keep: int = 0


@dataclass(frozen=True)
class Doomed:
    """The effect of a retention on a database."""

    sweeps: tuple[Sweep, ...]  # to be removed, the oldest first
    kept: tuple[tuple[Sweep, str], ...] = field(default=())  # as old, and why each stays


def outdated(database: ResultsDatabase, retention: Retention, running: Collection[str] = ()) -> Doomed:
    """Returns what a retention removes and keeps; `running` has the ids of sweeps that are being measured."""
    pinned = {baseline.sweep_id: baseline.name for baseline in database.baselines()}
    doomed: list[Sweep] = []
    kept: list[tuple[Sweep, str]] = []
    later: Counter[str] = Counter()  # sweeps of each name
    credible = credible_until(datetime.now(UTC))
    for sweep in reversed(database.sweeps()):
        if instant(sweep.started_at) > instant(credible):
            continue  # it stays, and takes no place among the last ones
        later[sweep.name] += 1
        if instant(sweep.started_at) >= instant(retention.before):
            continue
        if sweep.id in pinned:
            kept.append((sweep, f"is baseline {pinned[sweep.id]}"))
        elif sweep.id in running:
            kept.append((sweep, "is being measured"))
        elif later[sweep.name] <= retention.keep:
            kept.append((sweep, f"is one of the last {retention.keep} of {sweep.name}"))
        else:
            doomed.append(sweep)
    return Doomed(tuple(reversed(doomed)), tuple(reversed(kept)))


def remove(
    database: ResultsDatabase, sweep: Sweep, *, dead: Collection[str] = (), runs: int | None = None
) -> int | None:
    """Removes a sweep with its runs, whole or not at all; returns how many.

    A person may have been asked since it was chosen. Returns None, and removes nothing, where somebody measures it by
    now, or has: it does not have `runs` runs any more. `dead` has the ids of controllers that are known to have ended.
    Refuses one that was pinned meanwhile.
    """

    def act(connection: sa.Connection) -> int | None:
        columns = schema.runs.c
        # Who is about to enter or add a run waits for this row, and then finds no sweep (SQLite has one writer).
        connection.execute(sa.select(schema.sweeps.c.id).where(schema.sweeps.c.id == sweep.id).with_for_update())
        controllers = sa.select(schema.controllers.c.id).where(schema.controllers.c.sweep_id == sweep.id)
        if {found for (found,) in connection.execute(controllers)} - set(dead):
            return None
        here = connection.execute(sa.select(sa.func.count()).where(columns.sweep_id == sweep.id)).scalar_one()
        if runs is not None and here != runs:
            return None
        connection.execute(sa.delete(schema.runs).where(columns.sweep_id == sweep.id))
        connection.execute(sa.delete(schema.controllers).where(schema.controllers.c.sweep_id == sweep.id))
        connection.execute(sa.delete(schema.imports).where(schema.imports.c.sweep_id == sweep.id))
        connection.execute(sa.delete(schema.sweeps).where(schema.sweeps.c.id == sweep.id))
        return int(here)

    with explained(f"sweep {sweep.id} cannot be removed"):
        return database._write(act)


def vacuum(database: ResultsDatabase) -> None:
    """Gives the room of what was removed back to the disk. Others wait meanwhile; a file needs its size free."""
    statements = {
        "sqlite": ("VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"),
        "postgresql": ("SET statement_timeout = 0", "VACUUM (ANALYZE) runs, sweeps"),
    }
    engine = database._engine.execution_options(isolation_level="AUTOCOMMIT")
    what = "the room of what was removed cannot be given back"
    with explained(what), database._turn, engine.connect() as connection:
        for statement in statements[engine.dialect.name]:
            connection.exec_driver_sql(statement)
        connection.invalidate()  # its settings are not those of the others
