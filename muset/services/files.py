"""What a file is, and what it says."""

from dataclasses import replace
from pathlib import PurePath

from flask_muset.errors import MusetError, ValidationError
from muset.ports import CallPolicy, Extracted, Extractor
from muset.services.documents import too_large

__all__ = ["SUFFIXES", "FileService"]

_BY_SUFFIX = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".markdown": "text",
    ".html": "html",
    ".htm": "html",
    ".pdf": "pdf",
}
_BY_TYPE = {
    "text/plain": "text",
    "text/markdown": "text",
    "text/x-markdown": "text",
    "text/html": "html",
    "application/pdf": "pdf",
    # Where a client does not know, the suffix says it.
    "application/octet-stream": "text",
}
SUFFIXES = tuple(_BY_SUFFIX)
_MAX_TITLE = 200


class FileService:
    """Reads text, Markdown, HTML and PDF.

    Args:
        extractor: Reads the last two.
        policy: What guards its calls.
        max_bytes: Size of a file at most.
    """

    def __init__(self, extractor: Extractor, policy: CallPolicy, max_bytes: int) -> None:
        self._extractor = extractor
        self._policy = policy
        self.max_bytes = max_bytes

    def read(
        self, name: str, data: bytes, *, media_type: str = "", charset: str | None = None
    ) -> Extracted:
        """Text and title; the title is the file's name where the file has none.

        Args:
            name: Of the file; its suffix says what it is, or, without one, the media type does.
            data: The file.
            media_type: As its sender says, empty for nothing.
            charset: As its sender says; text and Markdown are UTF-8 whatever that is.

        Raises:
            ValidationError: It cannot be read, and why; 413 for one that is too large, 415 for
                another kind.
        """
        kind = _kind(name, media_type)
        if len(data) > self.max_bytes:
            raise too_large(self.max_bytes)
        if kind == "text":
            found = Extracted(_utf8(data))
        else:
            found = self._policy.call(self._extractor.extract, data, kind, charset)
        title = found.title or _plain(name).stem or "Untitled"
        return replace(found, title=title[:_MAX_TITLE])


def _plain(name: str) -> PurePath:
    """The name without folders, whichever system it is from."""
    return PurePath(PurePath(name.replace("\\", "/")).name)


def _kind(name: str, media_type: str) -> str:
    suffix = _plain(name).suffix.lower()
    if suffix and suffix not in _BY_SUFFIX:
        raise _unsupported(suffix)
    if media_type and media_type not in _BY_TYPE:
        raise _unsupported(media_type)
    return _BY_SUFFIX.get(suffix) or _BY_TYPE.get(media_type, "text")


def _unsupported(what: str) -> MusetError:
    error = ValidationError(
        f"{what} is not read; only .txt, .md, .html and .pdf are",
        user_message="Only text, Markdown, HTML and PDF (.txt, .md, .html, .pdf) are read.",
        details={"got": what},
    )
    error.status = 415
    return error


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValidationError(
            f"is not UTF-8: byte {error.start} cannot be read; save the file as UTF-8",
            field="file",
        ) from None
