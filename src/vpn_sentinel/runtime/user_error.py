"""The exception that ends a command with one line instead of a traceback."""


class UserError(Exception):
    """Something that the program needs cannot be used, and the user can repair that.

    The message is one line: what, where, and why.
    """
