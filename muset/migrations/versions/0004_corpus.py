"""The corpus: its version and size, and PostgreSQL's index over its passages."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_POSTGRESQL = (
    # A few kilobytes are read faster as they are than compressed and elsewhere.
    "ALTER TABLE passages SET (toast_tuple_target = 8160)",
    "ALTER TABLE passages ADD COLUMN terms tsvector NOT NULL",
    "CREATE INDEX ix_passages_terms ON passages USING gin (terms)",
    # In how many passages a term is: PostgreSQL knows it only by counting them.
    """CREATE TABLE terms (
       term text COLLATE "C" CONSTRAINT pk_terms PRIMARY KEY, passages bigint NOT NULL
       ) WITH (fillfactor = 70)""",
)


def upgrade() -> None:
    op.create_table(
        "corpus",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("passages", sa.BigInteger, nullable=False),
        sa.Column("characters", sa.BigInteger, nullable=False),
    )
    op.execute(
        "INSERT INTO corpus (id, version, passages, characters) "
        'SELECT 1, 1, count(*), coalesce(sum("end" - start), 0) FROM passages'
    )
    if op.get_context().dialect.name == "postgresql":
        for statement in _POSTGRESQL:
            op.execute(statement)
