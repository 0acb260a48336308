"""What the extensions tell: signals and their payloads.

Listeners such as the Metrics extension meet the others here and nowhere else.
The sender is the Flask application. Every label comes from a bounded set.
"""

from dataclasses import dataclass

from blinker import Namespace

from flask_muset.errors import ErrorCategory, Severity

__all__ = ["ErrorEvent", "error_handled"]

_signals = Namespace()


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    """One error that was handled, sent once for each, repeats too.

    Attributes:
        category: Label.
        severity: Label.
        error: Name of the class in the error tree.
        status: HTTP status that the client gets; for a stream the one it got.
        retryable: Whether the client may try again.
        refusal: Whether this process refused on purpose.
        streaming: Whether the response had begun.
        fingerprint: The same for the same fault, 12 hexadecimal digits.
        request_id: Of the request.
        exception: As it was raised, before it was translated.
    """

    category: ErrorCategory
    severity: Severity
    error: str
    status: int
    retryable: bool
    refusal: bool
    streaming: bool
    fingerprint: str
    request_id: str
    exception: BaseException


#: Sent with `event`, an ErrorEvent, for every error of a request.
error_handled = _signals.signal("error-handled")
