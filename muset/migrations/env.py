"""Alembic's entry: works on the connection that `muset.migrations.upgrade` hands over."""

from alembic import context

from muset.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
)
context.run_migrations()
