"""The history of the database's schema, run by Alembic.

Alembic is a quarter of what a start takes, and most starts find the newest schema: it is imported
where there is something to change.
"""

from typing import TYPE_CHECKING

from sqlalchemy import Connection, func, inspect, select, text

from flask_muset.errors import DatabaseError

if TYPE_CHECKING:
    from alembic.config import Config

__all__ = ["HEAD", "is_newest", "upgrade"]

#: The newest revision.
HEAD = "0004"

#: Any number, the same in all versions.
_LOCK = 0x6D75736574


def upgrade(connection: Connection) -> None:
    """Bring the schema to the newest version, inside the caller's transaction.

    Of several that do this at once one does it and the others wait for it: on SQLite for the lock
    of its transaction, on PostgreSQL here.

    Raises:
        DatabaseError: The schema is newer than this program, or the database cannot hold any text.
    """
    from alembic import command
    from alembic.util import CommandError

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
    try:
        command.upgrade(config, HEAD)
    except CommandError as error:
        raise DatabaseError(
            f"the schema of the database is unknown here ({error}); run the newer Muset that has "
            "made it, or restore a backup from before"
        ) from error


def is_newest(connection: Connection) -> bool:
    """Whether the schema has the newest version; reads only."""
    if not inspect(connection).has_table("alembic_version"):
        return False
    there = connection.scalars(text("SELECT version_num FROM alembic_version")).all()
    return list(there) == [HEAD]


def _config() -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "muset:migrations")
    return config
