"""The one exception for what a user can mend."""


class UserError(Exception):
    """One clear sentence that says what is wrong and what to do; the commands print it and exit with code 2."""


class TooLongError(UserError):
    """A run that does not fit the caches or the maxima of what runs it."""
