"""A credential shows itself to nobody by accident."""

from dataclasses import dataclass

import pytest

from vpn_sentinel.runtime.secret import Secret


@dataclass
class Settings:
    key: Secret


def test_no_way_of_printing_shows_it() -> None:
    secret = Secret("hunter2")
    for shown in (str(secret), repr(secret), f"{secret}", f"{secret!r:>20}", "%s" % secret, repr(Settings(secret))):  # noqa: UP031
        assert "hunter2" not in shown
        assert "***" in shown
    with pytest.raises(AttributeError, match="__dict__"):
        secret.__dict__  # noqa: B018


def test_who_sends_it_can_have_it() -> None:
    assert Secret("hunter2").reveal() == "hunter2"


def test_equal_secrets_are_equal_and_nothing_else_is() -> None:
    assert Secret("a") == Secret("a")
    assert Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert len({Secret("a"), Secret("a"), Secret("b")}) == 2
    assert Secret("a")
    assert not Secret("")
