"""The result of one check of `doctor`."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

_LOGIN: Final = re.compile(r"://[^/\s]*@")  # a user name and a password in a URL


class CheckState(StrEnum):
    OK = "ok"
    GAP = "gap"  # something is not watched, or would fail when needed: `fix` says what to change
    UNKNOWN = "unknown"  # it could not be checked


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """`found` is what was found here, `means` what that means for the monitoring, `fix` what to do about a gap."""

    name: str
    state: CheckState
    found: str
    means: str = ""
    fix: str = ""


def ok(name: str, found: str, means: str = "") -> Check:
    return Check(name=name, state=CheckState.OK, found=without_login(found), means=means)


def gap(name: str, found: str, means: str, fix: str) -> Check:
    return Check(name=name, state=CheckState.GAP, found=without_login(found), means=means, fix=without_login(fix))


def unknown(name: str, found: str, means: str = "", fix: str = "") -> Check:
    return Check(name=name, state=CheckState.UNKNOWN, found=without_login(found), means=means, fix=fix)


def without_login(text: str) -> str:
    """`text` without user names and passwords in its URLs: people paste this output into bug reports."""
    return _LOGIN.sub("://***@", text)
