"""The one kind of failure that ends a command with a single line instead of a traceback."""


class Unusable(Exception):
    """Something that the program needs cannot be used. The message is one line: what, where, and why."""
