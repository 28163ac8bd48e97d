"""Numbers of things in words."""


def counted(number: float, noun: str, plural: str = "") -> str:
    """`1 gap`, `2 gaps`, `0 gaps`; `plural` for a noun that takes more than an s."""
    return f"{number:.15g} {noun if number == 1 else plural or noun + 's'}"
