"""The text of a PDF."""

import re
from io import BytesIO

from pypdf import PdfReader
from pypdf.errors import DependencyError, LimitReachedError

from muset.adapters.extraction.refusal import RefusedError

__all__ = ["MAX_PAGES", "pdf_text"]

MAX_PAGES = 5_000
_SPACE_BEFORE_BREAK = re.compile(r"[ \t]+(?=\n)")
_EMPTY_LINES = re.compile(r"\n{3,}")


def pdf_text(data: bytes, max_bytes: int) -> str:
    """The pages one after the other, an empty line between them.

    Args:
        data: The file.
        max_bytes: Enough of the text, in UTF-8; reading stops when there is more.

    Raises:
        RefusedError: It needs a password, has too many pages, or a stream that is too large.
        Exception: Anything at all where the file is broken.
    """
    try:
        return _text(PdfReader(BytesIO(data)), max_bytes)
    except LimitReachedError:
        raise RefusedError("too_much") from None
    except DependencyError:
        # Of all that is optional, only AES is ever needed for text.
        raise RefusedError("encrypted") from None


def _text(reader: PdfReader, max_bytes: int) -> str:
    # Many files are encrypted only to forbid printing, and open without a password.
    if reader.is_encrypted and not reader.decrypt(""):
        raise RefusedError("encrypted")
    if len(reader.pages) > MAX_PAGES:
        raise RefusedError("too_many_pages")
    pages, size = [], 0
    for page in reader.pages:
        text = _SPACE_BEFORE_BREAK.sub("", page.extract_text()).strip()
        if text:
            pages.append(_EMPTY_LINES.sub("\n\n", text))
            size += len(text.encode("utf-8", "replace"))
        if size > max_bytes:
            break
    return "\n\n".join(pages)
