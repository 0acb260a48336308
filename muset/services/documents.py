"""What may be stored, read and deleted by whom."""

from collections.abc import Sequence

from flask_muset.errors import AuthorizationError, MusetError, NotFoundError, ValidationError
from muset.ports import Cache, Document, DocumentStore, Principal

__all__ = ["MAX_ID", "DocumentService"]

#: Ids are signed 64-bit integers in every database; a greater one exists nowhere.
MAX_ID = (1 << 63) - 1
_MAX_TITLE = 200
#: Seconds for which a document is read from the cache, and from there alone while the database is
#: away; and for which it is remembered that there is none.
_FRESH_S, _STALE_S, _MISSING_S = 300.0, 3600.0, 5.0


def _key(document_id: int) -> str:
    return f"document:{document_id}"


def _not_found(document_id: int) -> NotFoundError:
    return NotFoundError(
        f"no document has the id {document_id}",
        resource_type="document",
        details={"document_id": document_id},
    )


class DocumentService:
    """Documents of one deployment: members read all and change their own, admins change all.

    Args:
        store: Where they are kept.
        cache: Where those are that were read lately.
        max_bytes: Size of a text at most, in bytes of UTF-8.
    """

    def __init__(self, store: DocumentStore, cache: Cache, max_bytes: int) -> None:
        self._store = store
        self._cache = cache
        self._max_bytes = max_bytes

    def add(self, who: Principal, title: str, text: str) -> tuple[Document, bool]:
        """Store and index a text; False beside the document if this user had the text already.

        Raises:
            ValidationError: The title or the text is not allowed; 413 for a text that is too long.
        """
        title = title.strip()
        if not 1 <= len(title) <= _MAX_TITLE:
            raise ValidationError(f"must have 1 to {_MAX_TITLE} characters", field="title")
        for name, value in (("title", title), ("text", text)):
            self._check_characters(name, value)
        if not text.strip():
            raise ValidationError("must not be blank", field="text")
        size = len(text.encode())
        if size > self._max_bytes:
            raise too_large(self._max_bytes)
        document, is_new = self._store.add(user_id=who.user_id, title=title, text=text)
        # Somebody may have asked for it before it was there.
        self._cache.delete(_key(document.id))
        return document, is_new

    def _check_characters(self, name: str, value: str) -> None:
        if "\0" in value:
            raise ValidationError("must not have NUL characters", field=name)
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValidationError(
                f"has half of a surrogate pair at character {error.start}", field=name
            ) from None

    def get(self, document_id: int) -> Document:
        """One document with its text.

        Raises:
            NotFoundError: There is none.
        """
        if not 0 < document_id <= MAX_ID:
            raise _not_found(document_id)
        document: Document = self._cache.cache_aside(
            _key(document_id),
            lambda: self._read(document_id),
            _FRESH_S,
            stale_if_error=_STALE_S,
            negative_expire=_MISSING_S,
        )
        return document

    def _read(self, document_id: int) -> Document:
        document = self._store.get(document_id)
        if document is None:
            raise _not_found(document_id)
        return document

    def list(self, limit: int, after_id: int) -> tuple[Sequence[Document], int | None]:
        """A page of summaries, and the id to go on after, None at the end."""
        found = self._store.list(limit=limit + 1, after_id=after_id)
        return found[:limit], (found[limit - 1].id if len(found) > limit else None)

    def delete(self, who: Principal, document_id: int) -> None:
        """Forget a document and its passages.

        Raises:
            NotFoundError: There is none.
            AuthorizationError: It is somebody else's.
        """
        document = self.get(document_id)
        if not who.is_admin and document.user_id != who.user_id:
            raise AuthorizationError(
                f"user {who.user_id} may not delete document {document_id}",
                user_message="Only its owner or an admin may delete this document.",
            )
        # Before as well: whoever dies in between leaves nothing behind that could be read.
        self._cache.delete(_key(document_id))
        try:
            if not self._store.delete(document_id):
                raise _not_found(document_id)
        finally:
            self._cache.delete(_key(document_id))


def too_large(max_bytes: int) -> MusetError:
    """The error for a body or a text above the limit: status 413."""
    error = ValidationError(
        f"more than {max_bytes} bytes",
        user_message=f"A document may have at most {max_bytes} bytes.",
        details={"max_bytes": max_bytes},
    )
    error.status = 413
    return error
