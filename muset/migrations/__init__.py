"""The history of the database's schema, run by Alembic."""

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, func, select

from flask_muset.errors import DatabaseError

__all__ = ["is_newest", "upgrade"]

#: Any number, the same in all versions.
_LOCK = 0x6D75736574


def upgrade(connection: Connection) -> None:
    """Bring the schema to the newest version, inside the caller's transaction.

    Of several that do this at once one does it and the others wait for it: on SQLite for the lock
    of its transaction, on PostgreSQL here.

    Raises:
        CommandError: The schema is newer than this program.
        DatabaseError: The database cannot hold any text.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
        encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
        if encoding != "UTF8":
            raise DatabaseError(
                f"the database's encoding is {encoding} and must be UTF8; make another one with "
                "CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0"
            )
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def is_newest(connection: Connection) -> bool:
    """Whether the schema has the newest version; reads only."""
    there = MigrationContext.configure(connection).get_current_heads()
    return set(there) == set(ScriptDirectory.from_config(_config()).get_heads())


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "muset:migrations")
    return config
