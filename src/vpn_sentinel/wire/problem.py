"""Errors as RFC 9457 problem details."""

from http import HTTPStatus
from typing import Final

import msgspec

CONTENT_TYPE: Final = "application/problem+json"
# A header of the server's own refusals. Gateways write problem details, too, which tell nothing about key or report.
MARK: Final = ("vpn-sentinel", "1")
MARK_BYTES: Final = (MARK[0].encode(), MARK[1].encode())
# RFC 9110 renamed these; Python follows from 3.13 on, and the server's responses must not depend on it.
_RENAMED: Final = {413: "Content Too Large", 422: "Unprocessable Content"}


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """`detail` is for people: what is wrong, and where. `type` is always `about:blank`: the status is the kind."""

    status: int
    title: str
    detail: str
    type: str = "about:blank"


def problem(status: int, detail: str) -> Problem:
    return Problem(status=status, title=_RENAMED.get(status) or HTTPStatus(status).phrase, detail=detail)
