"""Passages that match a text."""

import hashlib
import json
import unicodedata
from collections.abc import Sequence

from flask_muset.errors import ValidationError
from muset.ports import Cache, DocumentStore, ScoredPassage

__all__ = ["SearchService"]

#: Seconds for which a result is kept. The documents cannot change meanwhile: they are in its key.
_KEPT_S = 3600.0


class SearchService:
    """Finds passages; the same text among the same documents is looked for once.

    Args:
        documents: Where they are found.
        cache: Where results are kept.
    """

    def __init__(self, documents: DocumentStore, cache: Cache) -> None:
        self._documents = documents
        self._cache = cache

    def search(self, query: str, k: int) -> Sequence[ScoredPassage]:
        """The passages that have most of a text's rarest words, the best first.

        Args:
            query: Any text that is not blank.
            k: How many at most.

        Raises:
            ValidationError: The text is blank.
        """
        wanted = _normalised(query)
        if not wanted:
            raise ValidationError("must not be blank", field="q")
        asked = json.dumps([wanted, k]).encode()
        key = f"search:{self._documents.version()}:{hashlib.sha256(asked).hexdigest()}"
        found: tuple[ScoredPassage, ...] = self._cache.cache_aside(
            key, lambda: self._documents.search(wanted, k=k).passages, _KEPT_S
        )
        return found


def _normalised(query: str) -> str:
    """The text without what no index sees: case, and how much blank there is between words."""
    return " ".join(unicodedata.normalize("NFC", query).lower().split())
