"""The tables. Each database has a full-text index of its own, which stands in the migrations."""

from datetime import datetime
from typing import Annotated

from sqlalchemy import (
    BigInteger,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

__all__ = ["Base", "Corpus", "Document", "Key", "Passage", "Preferences", "Usage", "User"]

#: Only what SQLite calls INTEGER is given out by itself there, and has 64 bits.
BigId = Annotated[int, mapped_column(BigInteger().with_variant(Integer, "sqlite"))]


class Base(DeclarativeBase):
    """Common to all tables; constraints have names, so that migrations can change them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class User(Base):
    """Somebody whose keys and documents these are.

    The row of a user who was deleted stays, without address and name: an id is never given again,
    so that nobody gets to see the usage of somebody before them.
    """

    __tablename__ = "users"

    id: Mapped[BigId] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime]
    name: Mapped[str] = mapped_column(server_default="")
    version: Mapped[int] = mapped_column(server_default="1")
    deleted_at: Mapped[datetime | None]


class Key(Base):
    """A key; only its digest is kept. Times are UTC."""

    __tablename__ = "keys"

    id: Mapped[BigId] = mapped_column(primary_key=True)
    user_id: Mapped[BigId] = mapped_column(ForeignKey("users.id"))
    role: Mapped[str]
    prefix: Mapped[str] = mapped_column(index=True)
    digest: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class Document(Base):
    """A document; the id of a deleted one is never used again."""

    __tablename__ = "documents"
    __table_args__ = (UniqueConstraint("user_id", "sha256"), {"sqlite_autoincrement": True})

    id: Mapped[BigId] = mapped_column(primary_key=True)
    user_id: Mapped[BigId] = mapped_column(ForeignKey("users.id"))
    title: Mapped[str]
    sha256: Mapped[str]
    characters: Mapped[int]
    passages: Mapped[int]
    text: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime]


class Passage(Base):
    """A piece of a document: text[start:end], offsets in code points."""

    __tablename__ = "passages"

    id: Mapped[BigId] = mapped_column(primary_key=True)
    document_id: Mapped[BigId] = mapped_column(
        ForeignKey("documents.id", ondelete="CASCADE"), index=True
    )
    start: Mapped[int]
    end: Mapped[int]
    text: Mapped[str] = mapped_column(Text)


class Corpus(Base):
    """One row about all passages; `version` grows with every document that comes or goes."""

    __tablename__ = "corpus"

    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger)
    passages: Mapped[int] = mapped_column(BigInteger)
    characters: Mapped[int] = mapped_column(BigInteger)


class Preferences(Base):
    """What a user likes, as the text of a JSON object; NULL where that was deleted.

    `seq` is the sequence of the write that this is: an older one that comes late is refused by it.
    """

    __tablename__ = "preferences"

    user_id: Mapped[BigId] = mapped_column(
        ForeignKey("users.id", ondelete="CASCADE"), primary_key=True
    )
    data: Mapped[str | None] = mapped_column(Text)
    seq: Mapped[int] = mapped_column(BigInteger)


class Usage(Base):
    """What one request has used; `cost` in billionths, so that sums are exact.

    Whoever has used it may be gone: no foreign key.
    """

    __tablename__ = "usage"
    __table_args__ = (Index("ix_usage_user_id_day", "user_id", "day"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[BigId]
    request_id: Mapped[str]
    model: Mapped[str]
    provider: Mapped[str]
    day: Mapped[str] = mapped_column(index=True)
    status: Mapped[str]
    requests: Mapped[int]
    input_tokens: Mapped[int] = mapped_column(BigInteger)
    output_tokens: Mapped[int] = mapped_column(BigInteger)
    estimated: Mapped[bool]
    cost: Mapped[int] = mapped_column(BigInteger)
