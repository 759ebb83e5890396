"""The one exception that a user's input can cause."""


class InputError(ValueError):
    """Something the caller gave cannot be used.

    The message is one line that names the thing, its value and the way out; the command line
    prints it as it is and exits with code 2.
    """
