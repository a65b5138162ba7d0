"""What was imported is known: the controller that measures a sweep is the one to resume it."""

import sqlalchemy as sa
from alembic import op

from reports.results.schema import text

revision = "4"
down_revision = "3"


def upgrade() -> None:
    op.create_table("imports", sa.Column("sweep_id", text(100), primary_key=True))
