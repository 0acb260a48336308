"""What people are called and how they are reached, checked and in one form."""

import re
import unicodedata

from flask_muset.errors import ValidationError

__all__ = ["clean_email", "clean_name"]

#: RFC 5321, section 4.5.3.1: a local part has at most 64 octets, a path at most 254 without its
#: brackets. A domain needs no dot: the first admin is at localhost.
_EMAIL = re.compile(r"[^@\s]{1,64}@[^@\s.]+(?:\.[^@\s.]+)*")
_MAX_EMAIL = 254
_MAX_NAME = 200
#: Control characters, halves of surrogate pairs, and separators of lines and paragraphs.
_NOT_IN_A_NAME = frozenset({"Cc", "Cs", "Zl", "Zp"})


def clean_email(text: str, field: str) -> str:
    """An e-mail address in the one form in which it is kept: NFC, in lower case.

    RFC 5321 lets a host tell the case of a local part; none that matters does, and two users that
    differ in case alone are one person who cannot come in.

    Args:
        text: As somebody has written it.
        field: What an error calls it.

    Raises:
        ValidationError: It is no address.
    """
    email = unicodedata.normalize("NFC", text.strip().lower())
    if len(email) > _MAX_EMAIL or not email.isprintable() or not _EMAIL.fullmatch(email):
        # Without the text: what people mistype is still theirs, and this goes to the log.
        raise ValidationError("is not an e-mail address such as ada@example.org", field=field)
    return email


def clean_name(text: str, field: str) -> str:
    """A name without blanks around it.

    Raises:
        ValidationError: It is empty, too long, or has characters that are no part of a name.
    """
    name = unicodedata.normalize("NFC", text).strip()
    if not 1 <= len(name) <= _MAX_NAME:
        raise ValidationError(f"must have 1 to {_MAX_NAME} characters", field=field)
    for place, character in enumerate(name):
        if unicodedata.category(character) in _NOT_IN_A_NAME:
            raise ValidationError(
                f"must not have control characters; character {place} is U+{ord(character):04X}",
                field=field,
            )
    return name
