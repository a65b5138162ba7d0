"""Nights outlive their sweeps: pruning takes the runs, and a night keeps the points of its trend lines."""

import sqlalchemy as sa
from alembic import op

from reports.results.schema import text

revision = "3"
down_revision = "2"


def upgrade() -> None:
    # SQLite cannot drop a foreign key, so the table is made anew.
    op.create_table(
        "kept_nights",
        sa.Column("sweep_id", text(100), primary_key=True),
        sa.Column("name", text(200), nullable=False),
        sa.Column("baseline_sweep_id", text(100)),
        sa.Column("at", text(40), nullable=False),
        sa.Column("exit_code", sa.Integer, nullable=False),
        sa.Column("record", sa.Text, nullable=False),
    )
    op.execute(
        "INSERT INTO kept_nights (sweep_id, name, baseline_sweep_id, at, exit_code, record) "
        "SELECT sweep_id, name, baseline_sweep_id, at, exit_code, record FROM nights"
    )
    op.drop_table("nights")
    op.rename_table("kept_nights", "nights")
    op.create_index("ix_nights_name", "nights", ["name", "at"])
