"""Documents in the database."""

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    Connection,
    Integer,
    Select,
    column,
    delete,
    func,
    insert,
    select,
    table,
    update,
)

from muset.adapters.sqlite import Database
from muset.adapters.sqlite_search import index_passages, search_passages
from muset.models import Document as Table
from muset.ports import Document, Retrieval

__all__ = ["SqliteDocumentStore"]

_SUMMARY = (
    Table.id,
    Table.user_id,
    Table.title,
    Table.sha256,
    Table.passages,
    Table.characters,
    Table.created_at,
)


def _document(row: Any) -> Document:
    values = dict(row._mapping)
    values["created_at"] = values["created_at"].replace(tzinfo=UTC)
    return Document(**values)


class SqliteDocumentStore:
    """Implements `muset.ports.DocumentStore`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, *, user_id: int, title: str, text: str) -> tuple[Document, bool]:
        """Store and index in one transaction; a text that this user has stays as it is."""

        def work(connection: Connection) -> tuple[Document, bool]:
            sha256 = hashlib.sha256(text.encode()).hexdigest()
            same = select(*_SUMMARY).where(Table.user_id == user_id, Table.sha256 == sha256)
            known = connection.execute(same).one_or_none()
            if known is not None:
                return _document(known), False
            values = {
                "user_id": user_id,
                "title": title,
                "sha256": sha256,
                "characters": len(text),
                "passages": 0,
                "text": text,
                "created_at": datetime.now(UTC).replace(tzinfo=None),
            }
            connection.execute(insert(Table).values(values))
            document_id = connection.execute(same).one().id
            passages = index_passages(connection, document_id, text)
            connection.execute(
                update(Table).where(Table.id == document_id).values(passages=passages)
            )
            return _document(connection.execute(same).one()), True

        return self._database.write(work)

    def get(self, document_id: int) -> Document | None:
        """One document with its text."""
        query = select(*_SUMMARY, Table.text).where(Table.id == document_id)
        row = self._database.read(lambda c: c.execute(query).one_or_none())
        return None if row is None else _document(row)

    def owner(self, document_id: int) -> int | None:
        """The user whose document it is."""
        query = select(Table.user_id).where(Table.id == document_id)
        return self._database.read(lambda c: c.execute(query).scalar_one_or_none())

    def list(self, *, limit: int, after_id: int) -> Sequence[Document]:
        """Summaries in the order of their ids, those above `after_id` alone."""
        query = select(*_SUMMARY).where(Table.id > after_id).order_by(Table.id).limit(limit)
        return self._database.read(lambda c: [_document(row) for row in c.execute(query)])

    def delete(self, document_id: int) -> bool:
        """Forget a document and its passages; False if there is none."""
        change = delete(Table).where(Table.id == document_id)
        return self._database.write(lambda c: c.execute(change).rowcount == 1)

    def version(self) -> str:
        """The last id that was given and the number of documents.

        Each document that comes raises the one for ever, and each that goes lowers the other.
        """
        sequence: Select[tuple[int]] = select(column("seq", Integer))
        sequence = sequence.select_from(table("sqlite_sequence"))
        last = sequence.where(column("name") == Table.__tablename__).scalar_subquery()
        query = select(func.coalesce(last, 0), func.count(Table.id))
        last_id, count = self._database.read(lambda c: c.execute(query).one())
        return f"{last_id}.{count}"

    def existing(self, document_ids: Sequence[int]) -> frozenset[int]:
        """Those of the ids that exist."""
        query = select(Table.id).where(Table.id.in_(document_ids))
        return self._database.read(lambda c: frozenset(c.execute(query).scalars()))

    def search(
        self, question: str, *, k: int, document_ids: Sequence[int] | None = None
    ) -> Retrieval:
        """The k best passages; any text is a legal question."""
        return self._database.read(
            lambda c: search_passages(c, question, k=k, document_ids=document_ids)
        )
