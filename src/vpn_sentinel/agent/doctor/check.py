"""One line of the doctor's answer."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

_LOGIN: Final = re.compile(r"://[^/\s]*@")  # a name and a password in an address


class State(StrEnum):
    OK = "ok"
    GAP = "gap"  # something is not seen, or would fail when it matters; there is something to mend
    UNKNOWN = "unknown"  # it could not be looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """`found` is what is the case here, `means` what follows from it for the watch, `fix` what to do about a gap."""

    name: str
    state: State
    found: str
    means: str = ""
    fix: str = ""


def ok(name: str, found: str, means: str = "") -> Check:
    return Check(name=name, state=State.OK, found=without_login(found), means=means)


def gap(name: str, found: str, means: str, fix: str) -> Check:
    return Check(name=name, state=State.GAP, found=without_login(found), means=means, fix=without_login(fix))


def unknown(name: str, found: str, means: str = "", fix: str = "") -> Check:
    return Check(name=name, state=State.UNKNOWN, found=without_login(found), means=means, fix=fix)


def without_login(text: str) -> str:
    """`text` without the logins of addresses in it: what the doctor says is pasted into reports of trouble."""
    return _LOGIN.sub("://***@", text)
