"""Runs migrations on the connection that `open_store` passes."""

from alembic import context

from vpn_sentinel.server.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transaction_per_migration=False,
    render_as_batch=True,
)
context.run_migrations()
