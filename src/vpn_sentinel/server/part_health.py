"""The health of each part of the server, as /health/ready shows it."""

from typing import NamedTuple


class PartHealth(NamedTuple):
    """Whether the part can do its work; `detail` says why not, or its present state, without names and addresses."""

    ok: bool
    detail: str = ""
