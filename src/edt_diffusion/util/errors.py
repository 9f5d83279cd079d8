"""The exception type for mistakes of a user."""


class UserError(ValueError):
    """A mistake that the user can put right: a wrong path, name, size or combination of settings.

    The message is one line that says what was given, what was expected and how to put it right. The command line
    prints it without a traceback and exits with code 2; in Python it is an ordinary `ValueError`. Mistakes of our own
    are `assert`s, never this.
    """
