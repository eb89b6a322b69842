"""The one exception that means "the caller can fix this"."""


class UserError(ValueError):
    """Bad input: the message is one line that says what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2; the server answers 400.
    """
