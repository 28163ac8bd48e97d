"""What may name a tunnel."""

import pytest

from vpn_sentinel.domain.tunnel import MAX_NAME_LENGTH, tunnel_name


@pytest.mark.parametrize("name", ["nl-1", "a", "0", "home.vpn_2", "_nl", "-nl", "A" * MAX_NAME_LENGTH])
def test_a_name(name: str) -> None:
    assert tunnel_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".a", "..", "a b", "a/b", "ä", "a\n", "\x00", "<b>", "１", "A" * (MAX_NAME_LENGTH + 1)]
)
def test_no_name(name: str) -> None:
    with pytest.raises(ValueError, match="a name takes"):
        tunnel_name(name)
