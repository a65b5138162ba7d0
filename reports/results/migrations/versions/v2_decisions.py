"""Baselines, acknowledgements and nights; and a device's last runs found without sorting all of its runs.

Farms of revision 1 made health_marks and controllers where they were missing.
"""

import sqlalchemy as sa
from alembic import op

from reports.results.schema import text

revision = "2"
down_revision = "1"


def upgrade() -> None:
    op.create_table(
        "health_marks",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("device", text(200), nullable=False),
        sa.Column("mark", text(20), nullable=False),
        sa.Column("at", text(40), nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        if_not_exists=True,
    )
    op.create_index("ix_health_marks_device", "health_marks", ["device"], if_not_exists=True)
    op.create_table(
        "controllers",
        sa.Column("id", text(100), primary_key=True),
        sa.Column("owner", text(300), nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("process", text(200), nullable=False),
        sa.Column("sweep_id", text(100), sa.ForeignKey("sweeps.id"), nullable=False, unique=True),
        sa.Column("started_at_s", sa.Double, nullable=False),
        sa.Column("heard_at_s", sa.Double, nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "baselines",
        sa.Column("name", text(200), primary_key=True),
        sa.Column("sweep_id", text(100), sa.ForeignKey("sweeps.id"), nullable=False),
        sa.Column("pinned_at", text(40), nullable=False),
        sa.Column("pinned_by", text(300), nullable=False),
        sa.Column("note", sa.Text, nullable=False),
    )
    op.create_table(
        "acknowledgements",
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
    op.create_table(
        "nights",
        sa.Column("sweep_id", text(100), sa.ForeignKey("sweeps.id"), primary_key=True),
        sa.Column("name", text(200), nullable=False),
        sa.Column("baseline_sweep_id", text(100)),
        sa.Column("at", text(40), nullable=False),
        sa.Column("exit_code", sa.Integer, nullable=False),
        sa.Column("record", sa.Text, nullable=False),
    )
    op.create_index("ix_nights_name", "nights", ["name", "at"])
    op.create_index("ix_runs_device", "runs", ["device", "started_at"])
