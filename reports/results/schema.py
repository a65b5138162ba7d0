"""The tables of the results database: what they are in its newest schema. How older ones become so: migrations/.

A run is one row: the columns that are searched, and the complete record as JSON, from which the Run is rebuilt. Nothing
derived is stored. A change here takes a step there, and its number below: tests hold that both lead to the same.

History of VERSION: 1.
History of REVISION: 1 (the first releases, some without health_marks and controllers); 2 with baselines,
acknowledgements, nights, and the index of a device's runs; 3 with nights that outlive their sweeps; 4 with what
was imported.
"""

from __future__ import annotations

import sqlalchemy as sa

VERSION = 1  # older farms refuse another one
REVISION = 4  # Alembic's: older farms go on beside a newer one
READABLE = 3  # the revision from which on nothing is missing that is read


def text(length: int) -> sa.String:
    """Ordered by code point everywhere: a language's order would shuffle times and ids."""
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


metadata = sa.MetaData()

version = sa.Table("farm_schema", metadata, sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))

revision = sa.Table(
    "alembic_version", metadata, sa.Column("version_num", sa.String(32), primary_key=True, nullable=False)
)

# --- raw records ----------------------------------------------------------------------------------------------------

sweeps = sa.Table(
    "sweeps",
    metadata,
    sa.Column("id", text(100), primary_key=True),
    sa.Column("name", text(200), nullable=False, index=True),
    sa.Column("started_at", text(40), nullable=False, index=True),
    sa.Column("record", sa.Text, nullable=False),
)

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", text(100), primary_key=True),
    sa.Column("sweep_id", sa.ForeignKey("sweeps.id"), nullable=False),
    sa.Column("cell", sa.Text, nullable=False),
    sa.Column("block", sa.Integer, nullable=False),
    sa.Column("device", text(200), nullable=False),
    sa.Column("container", text(200), nullable=False),
    sa.Column("strategy", text(200), nullable=False),
    sa.Column("workload", text(200), nullable=False),
    sa.Column("status", text(20), nullable=False),
    sa.Column("verdict", text(20), nullable=False),
    sa.Column("started_at", text(40), nullable=False),
    sa.Column("engine_sha256", text(64), nullable=False, index=True),
    sa.Column("record", sa.Text, nullable=False),
    sa.Index("ix_runs_sweep", "sweep_id", "started_at"),
    sa.Index("ix_runs_device", "device", "started_at"),
    sa.Index("ix_runs_history", "device", "container", "strategy", "workload", "started_at"),
)

imports = sa.Table(  # sweeps that were measured elsewhere: whoever measures them goes on with them, not we
    "imports",
    metadata,
    sa.Column("sweep_id", text(100), primary_key=True),
)

# --- what people and controllers said -------------------------------------------------------------------------------

marks = sa.Table(
    "health_marks",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("device", text(200), nullable=False, index=True),
    sa.Column("mark", text(20), nullable=False),
    sa.Column("at", text(40), nullable=False),
    sa.Column("note", sa.Text, nullable=False),
)

controllers = sa.Table(
    "controllers",
    metadata,
    sa.Column("id", text(100), primary_key=True),
    sa.Column("owner", text(300), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("process", text(200), nullable=False),
    sa.Column("sweep_id", sa.ForeignKey("sweeps.id"), nullable=False, unique=True),  # one controller a sweep
    sa.Column("started_at_s", sa.Double, nullable=False),
    sa.Column("heard_at_s", sa.Double, nullable=False),
)

baselines = sa.Table(
    "baselines",
    metadata,
    sa.Column("name", text(200), primary_key=True),
    sa.Column("sweep_id", sa.ForeignKey("sweeps.id"), nullable=False),  # a pinned sweep is not to be removed
    sa.Column("pinned_at", text(40), nullable=False),
    sa.Column("pinned_by", text(300), nullable=False),
    sa.Column("note", sa.Text, nullable=False),
)

acknowledgements = sa.Table(
    "acknowledgements",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("device", text(200), nullable=False),
    sa.Column("strategy", text(200), nullable=False),
    sa.Column("metric", text(100), nullable=False),
    sa.Column("cell", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("by", text(300), nullable=False),
    sa.Column("at", text(40), nullable=False),
    sa.Column("expires_at", text(40), nullable=False),
)

nights = sa.Table(
    "nights",
    metadata,
    sa.Column("sweep_id", text(100), primary_key=True),  # which may be gone by now, as may its baseline
    sa.Column("name", text(200), nullable=False),
    sa.Column("baseline_sweep_id", text(100)),
    sa.Column("at", text(40), nullable=False),
    sa.Column("exit_code", sa.Integer, nullable=False),
    sa.Column("record", sa.Text, nullable=False),
    sa.Index("ix_nights_name", "name", "at"),
)
