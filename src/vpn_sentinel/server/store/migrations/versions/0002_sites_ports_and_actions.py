"""Sites, roles, declared rules, forwarded ports and what agents did"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Added in place: a default lets rows that are there keep their table.
    op.add_column("tunnels", sa.Column("role", sa.Text(), nullable=False, server_default="tunnel"))
    op.add_column("tunnels", sa.Column("site", sa.Text(), nullable=False, server_default=""))
    op.add_column("tunnels", sa.Column("policy", sa.Text(), nullable=False, server_default=""))
    op.add_column("tunnels", sa.Column("port", sa.Integer(), nullable=True))
    op.add_column("tunnels", sa.Column("port_check", sa.Text(), nullable=False, server_default=""))
    op.create_index("ix_tunnels_site", "tunnels", ["site"], unique=False)
    op.create_table(
        "actions",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("tunnel_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["tunnel_id"], ["tunnels.id"], name="fk_actions_tunnel_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_actions"),
    )
    op.create_index("ix_actions_tunnel_id_at", "actions", ["tunnel_id", "at"], unique=False)
