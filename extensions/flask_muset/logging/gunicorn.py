"""gunicorn's own log, through ours from its first line.

    logger_class = "flask_muset.logging.gunicorn.Logger"

Call `flask_muset.logging.configure` in gunicorn's configuration file before.
"""

from typing import Any

from gunicorn import glogging

__all__ = ["Logger"]


class Logger(glogging.Logger):  # type: ignore[misc]
    """Leaves gunicorn's error log to the standard library's root logger, which ours is."""

    def setup(self, cfg: Any) -> None:
        """Set up as gunicorn does, without a handler of its own for its error log."""
        super().setup(cfg)
        for handler in list(self.error_log.handlers):
            if getattr(handler, "_gunicorn", False):
                self.error_log.removeHandler(handler)
        self.error_log.propagate = True
