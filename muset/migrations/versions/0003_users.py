"""Names and versions of users, the mark of those who are gone, and usage by user."""

import unicodedata

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_users = sa.table("users", sa.column("id", sa.Integer), sa.column("email", sa.String))


def upgrade() -> None:
    op.add_column("users", sa.Column("name", sa.String, nullable=False, server_default=""))
    op.add_column("users", sa.Column("version", sa.Integer, nullable=False, server_default="1"))
    op.add_column("users", sa.Column("deleted_at", sa.DateTime))
    op.create_index("ix_usage_user_id_day", "usage", ["user_id", "day"])
    _bring_emails_into_one_form()


def _bring_emails_into_one_form() -> None:
    """Of several users that differ in case alone one gets the address.

    The others stay as they are: their keys hold, and an admin says what becomes of them.
    """
    connection = op.get_bind()
    rows = connection.execute(sa.select(_users.c.id, _users.c.email).order_by(_users.c.id)).all()
    taken = {row.email for row in rows}
    for row in rows:
        email = unicodedata.normalize("NFC", row.email.strip().lower())
        if email not in taken:
            taken.add(email)
            change = sa.update(_users).where(_users.c.id == row.id).values(email=email)
            connection.execute(change)
