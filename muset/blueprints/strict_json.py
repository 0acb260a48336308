"""JSON that is read as RFC 8259 has it."""

import math
from typing import Any, NoReturn

from flask.json.provider import DefaultJSONProvider

__all__ = ["StrictJSON"]


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is too large")
    return value


class StrictJSON(DefaultJSONProvider):
    """Objects keep their order. What Python would read and JSON does not have is refused.

    NaN and numbers without an end could be read and kept, but not written as JSON again.
    """

    sort_keys = False

    def loads(self, s: str | bytes, **kwargs: Any) -> Any:
        """Read a text.

        Raises:
            ValueError: It is no JSON, or too deep to be read.
        """
        try:
            return super().loads(s, parse_constant=_refuse, parse_float=_number, **kwargs)
        except RecursionError:
            raise ValueError("nested too deep") from None
