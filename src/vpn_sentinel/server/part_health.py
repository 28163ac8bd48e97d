"""What each part of the server says of itself to /health/ready."""

from typing import NamedTuple


class PartHealth(NamedTuple):
    """Whether it can do its work; `detail` says why not, or how it stands, in words without names and addresses."""

    ok: bool
    detail: str = ""
