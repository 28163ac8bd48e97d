"""How a remedy fails."""


class RemedyError(Exception):
    """A remedy did not work; the text says why, without credentials."""
