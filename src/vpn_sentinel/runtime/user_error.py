"""The one kind of failure that ends a command with a single line instead of a traceback."""


class UserError(Exception):
    """Something that the program needs cannot be used, and whoever runs it can mend that.

    The message is one line: what, where, and why.
    """
