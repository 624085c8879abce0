"""The one exception of this package: its message is a single line that says what to do."""


class AprtError(Exception):
    """A refusal. The command prints it and exits with 2."""
