import threading
from ipaddress import ip_address

import pytest

from vpn_sentinel.agent.net.resolver import HostResolver, NotFoundError, system_lookup

ONE = ip_address("192.0.2.1")


async def test_a_literal_is_its_own_address() -> None:
    names = HostResolver(lambda host: pytest.fail(f"asked for {host}"))
    assert await names.addresses("192.0.2.1") == (ONE,)
    assert await names.addresses("[2001:db8::1]") == (ip_address("2001:db8::1"),)
    assert names.known("192.0.2.1") == (ONE,)


async def test_the_last_good_answer_stands_in_for_a_dead_resolver() -> None:
    alive = True

    def lookup(host: str) -> tuple:  # type: ignore[type-arg]
        if not alive:
            raise OSError("no resolver")
        return (ONE,)

    names = HostResolver(lookup)
    assert await names.addresses("a.test") == (ONE,)
    alive = False
    assert await names.addresses("a.test") == (ONE,)
    with pytest.raises(NotFoundError, match=r"b\.test"):
        await names.addresses("b.test")


async def test_a_resolver_that_hangs_is_not_waited_for_and_not_asked_twice() -> None:
    release, asked = threading.Event(), []

    def lookup(host: str) -> tuple:  # type: ignore[type-arg]
        asked.append(host)
        release.wait(5)
        return (ONE,)

    names = HostResolver(lookup, patience=0.02)
    names.remember("a.test", (ip_address("192.0.2.9"),))
    assert await names.addresses("a.test") == (ip_address("192.0.2.9"),)
    assert await names.addresses("a.test") == (ip_address("192.0.2.9"),)
    assert asked == ["a.test"]
    release.set()
    assert await names.addresses("a.test", patience=5) == (ONE,)


async def test_nothing_is_remembered_of_nothing() -> None:
    names = HostResolver(lambda _: ())
    names.remember("a.test", ())
    assert names.known("a.test") == ()
    with pytest.raises(NotFoundError):
        await names.addresses("a.test")


def test_the_system_knows_localhost() -> None:
    assert ip_address("127.0.0.1") in system_lookup("localhost")
