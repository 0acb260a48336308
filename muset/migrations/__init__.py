"""The history of the database's schema, run by Alembic."""

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection

__all__ = ["upgrade"]


def upgrade(connection: Connection) -> None:
    """Bring the schema to the newest version, inside the caller's transaction."""
    config = Config()
    config.set_main_option("script_location", "muset:migrations")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
