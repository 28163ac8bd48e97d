"""Sites, roles, declared policies, forwarded ports and actions of agents"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Only what is missing, as in 0001: earlier builds could be killed between two of these statements.
    existing = {column["name"] for column in sa.inspect(op.get_bind()).get_columns("tunnels")}
    # With a default, a column is added in place, without a copy of the table.
    for column in (
        sa.Column("role", sa.Text(), nullable=False, server_default="tunnel"),
        sa.Column("site", sa.Text(), nullable=False, server_default=""),
        sa.Column("policy", sa.Text(), nullable=False, server_default=""),
        sa.Column("port", sa.Integer(), nullable=True),
        sa.Column("port_check", sa.Text(), nullable=False, server_default=""),
    ):
        if column.name not in existing:
            op.add_column("tunnels", column)
    op.create_index("ix_tunnels_site", "tunnels", ["site"], unique=False, if_not_exists=True)
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
        if_not_exists=True,
    )
    op.create_index("ix_actions_tunnel_id_at", "actions", ["tunnel_id", "at"], unique=False, if_not_exists=True)
