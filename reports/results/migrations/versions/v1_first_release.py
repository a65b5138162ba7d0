"""The tables of the first release. Its databases have no revision: they are taken for this one."""

import sqlalchemy as sa
from alembic import op

from reports.results.schema import text

revision = "1"
down_revision = None


def upgrade() -> None:
    op.create_table("farm_schema", sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))
    op.create_table(
        "sweeps",
        sa.Column("id", text(100), primary_key=True),
        sa.Column("name", text(200), nullable=False, index=True),
        sa.Column("started_at", text(40), nullable=False, index=True),
        sa.Column("record", sa.Text, nullable=False),
    )
    op.create_table(
        "runs",
        sa.Column("id", text(100), primary_key=True),
        sa.Column("sweep_id", text(100), sa.ForeignKey("sweeps.id"), nullable=False),
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
    )
    op.create_index("ix_runs_sweep", "runs", ["sweep_id", "started_at"])
    op.create_index("ix_runs_history", "runs", ["device", "container", "strategy", "workload", "started_at"])
