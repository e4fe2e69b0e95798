"""Lines of the log that stand there once, however often they come up."""

import functools
import logging


@functools.cache
def log_once(logger: logging.Logger, message: str, level: int = logging.INFO) -> None:
    """Log a message the first time that this logger is given it in this process."""
    logger.log(level, message)
