"""The exception for every problem that a user can fix."""


class UserError(Exception):
    """A problem that the user can fix. The message says what happened and what to do.

    The commands print the message and exit with code 2. Any other exception is a bug.
    """


class TooLongError(UserError):
    """A run that is longer than the caches, or than the largest sizes of an engine."""
