"""The controllers that share a results database, as it knows them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa

from reports.results import schema
from reports.results.transactions import Transactions, explained


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
        """Returns the time in UTC, ISO 8601."""
        return datetime.fromtimestamp(round(self.started_at_s), UTC).isoformat()

    def __str__(self) -> str:
        return f"{self.owner} (process {self.pid})"


class ControllerRows(Transactions):
    """The methods of ResultsDatabase about controllers."""

    def controllers(self) -> list[Controller]:
        """Returns the controllers that are at work, or were when last heard of, the oldest first."""
        columns = [schema.controllers.c[name] for name in ("id", "owner", "pid", "process", "sweep_id")]
        columns += [schema.controllers.c.started_at_s, schema.controllers.c.heard_at_s]
        query = sa.select(*columns, self._now - schema.controllers.c.heard_at_s).order_by(
            schema.controllers.c.started_at_s
        )
        return [Controller(*row) for row in self._rows("controllers", query)]

    def enter(self, controller: Controller, *, instead_of: Controller | None = None) -> bool:
        """Gives a controller its sweep's one place, or that of another; False where somebody else has it (now)."""

        def act(connection: sa.Connection) -> None:
            if instead_of is not None:
                gone = (
                    schema.controllers.c.id == instead_of.id,
                    schema.controllers.c.heard_at_s == instead_of.heard_at_s,
                )
                connection.execute(sa.delete(schema.controllers).where(*gone))
            row = {name: getattr(controller, name) for name in ("id", "owner", "pid", "process", "sweep_id")}
            connection.execute(
                sa.insert(schema.controllers).values(**row, started_at_s=self._now, heard_at_s=self._now)
            )

        with explained(f"the controller of sweep {controller.sweep_id} cannot be stored"):
            try:
                self._write(act)
            except sa.exc.IntegrityError:
                return any(other.id == controller.id for other in self.controllers())  # a lost answer: it was stored
        return True

    def beat(self, controller: Controller) -> bool:
        """Tells that a controller lives; False where it has lost its place. Waits for no server that is away."""
        query = (
            sa.update(schema.controllers).where(schema.controllers.c.id == controller.id).values(heard_at_s=self._now)
        )
        with explained("the controller's heartbeat cannot be stored"):
            return self._begun(lambda connection: connection.execute(query).rowcount) == 1

    def leave(self, controller: Controller) -> None:
        query = sa.delete(schema.controllers).where(schema.controllers.c.id == controller.id)
        with explained("the controller's end cannot be stored"):
            self._begun(lambda connection: connection.execute(query))
