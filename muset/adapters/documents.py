"""Documents in the database."""

import hashlib
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from sqlalchemy import Connection, delete, select

from muset.adapters.database import Database, compute, insert_if_new
from muset.adapters.passages import Index
from muset.models import Corpus
from muset.models import Document as Table
from muset.ports import Document, Retrieval

__all__ = ["SqlDocumentStore"]

_SUMMARY = (
    Table.id,
    Table.user_id,
    Table.title,
    Table.sha256,
    Table.passages,
    Table.characters,
    Table.created_at,
)
_VERSION = select(Corpus.version)


def _document(row: Any) -> Document:
    values = dict(row._mapping)
    values["created_at"] = values["created_at"].replace(tzinfo=UTC)
    return Document(**values)


class SqlDocumentStore:
    """Implements `muset.ports.DocumentStore`.

    Args:
        database: Where they are.
        index: Of their passages, in the same database.
    """

    def __init__(self, database: Database, index: Index) -> None:
        self._database = database
        self._index = index
        #: One text at a time: more would take the native threads, of which there are few, and be no
        #: quicker.
        self._turn = threading.Lock()

    def add(self, *, user_id: int, title: str, text: str) -> tuple[Document, bool]:
        """Store and index in one transaction; a text that this user has stays as it is."""
        sha256 = compute(lambda: hashlib.sha256(text.encode()).hexdigest())
        same = select(*_SUMMARY).where(Table.user_id == user_id, Table.sha256 == sha256)
        known = self._database.read(lambda c: c.execute(same).one_or_none())
        if known is not None:
            return _document(known), False
        with self._turn:
            passages = compute(partial(self._index.prepare, text))
        values = {
            "user_id": user_id,
            "title": title,
            "sha256": sha256,
            "characters": len(text),
            "passages": len(passages),
            "text": text,
            "created_at": datetime.now(UTC).replace(tzinfo=None),
        }

        def work(connection: Connection) -> tuple[Document, bool]:
            while (document_id := insert_if_new(connection, Table, values)) is None:
                # Somebody has put it in meanwhile; it may be gone again.
                row = connection.execute(same).one_or_none()
                if row is not None:
                    return _document(row), False
            self._index.add(connection, document_id, passages)
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

        def work(connection: Connection) -> bool:
            there = select(Table.id).where(Table.id == document_id).with_for_update()
            if connection.execute(there).first() is None:
                return False
            self._index.remove(connection, document_id)
            connection.execute(delete(Table).where(Table.id == document_id))
            return True

        return self._database.write(work)

    def version(self) -> str:
        """A number that grows with each document that comes or goes."""
        return str(self._database.read(lambda c: c.execute(_VERSION).scalar_one()))

    def existing(self, document_ids: Sequence[int]) -> frozenset[int]:
        """Those of the ids that exist."""
        query = select(Table.id).where(Table.id.in_(document_ids))
        return self._database.read(lambda c: frozenset(c.execute(query).scalars()))

    def search(
        self, question: str, *, k: int, document_ids: Sequence[int] | None = None
    ) -> Retrieval:
        """The k best passages; any text is a legal question."""
        return self._database.read(
            lambda c: self._index.search(c, question, k=k, document_ids=document_ids)
        )
