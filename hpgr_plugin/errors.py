"""The base of every error that a user can cause: its message is one line, without a traceback."""


class HpgrError(ValueError):
    """A configuration, path or file that cannot be used; the message says what would be."""
