"""An index of the delivered notices, by channel, tunnel and time"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    delivered = sa.text("outcome = 'done'")
    op.create_index(
        "ix_outbox_told",
        "outbox",
        ["channel", "tunnel", "settled_at"],
        unique=False,
        if_not_exists=True,
        sqlite_where=delivered,
        postgresql_where=delivered,
    )
