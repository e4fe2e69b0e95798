"""The base of every error that a user can cause: its message is one line, without a traceback."""

import re


class HpgrError(ValueError):
    """A configuration, path or file that cannot be used; the message says what would be."""


def one_line(error: Exception) -> str:
    """The message of `error` without line breaks, and without the addresses that gin adds.

    Control characters are escaped.
    """
    message = re.sub(r" \(<[^\n]*>\)", "", str(error).strip())
    message = re.sub(r"\s*\n\s*", " | ", message)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
