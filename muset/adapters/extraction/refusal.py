"""Why a file is not read."""

__all__ = ["RefusedError"]


class RefusedError(Exception):
    """A file is not read.

    Args:
        reason: A key of `muset.adapters.extraction.process.REASONS`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
