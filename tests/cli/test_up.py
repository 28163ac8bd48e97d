"""`vpn-sentinel up`: the agent beside the server reaches it, or a line says why not."""

import pytest

from vpn_sentinel.cli.up import _own_url
from vpn_sentinel.runtime.settings import SettingError, Source
from vpn_sentinel.server.settings import ServerSettings


def serving(**env: str) -> ServerSettings:
    return ServerSettings.read(Source({f"VPN_SENTINEL_{k}": v for k, v in env.items()}))


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("::", "http://127.0.0.1:5000"),
        ("0.0.0.0", "http://127.0.0.1:5000"),
        ("192.0.2.7", "http://192.0.2.7:5000"),
        ("::1", "http://[::1]:5000"),
        ("nas.lan", "http://nas.lan:5000"),
    ],
)
def test_it_goes_where_the_server_listens(host: str, url: str) -> None:
    assert _own_url(serving(SERVER_HOST=host)) == url


def test_an_allow_list_that_keeps_it_out_is_told() -> None:
    with pytest.raises(SettingError, match=r"^VPN_SENTINEL_SERVER_ALLOWED_IPS: needs 127.0.0.1 too"):
        _own_url(serving(SERVER_ALLOWED_IPS="192.0.2.0/24"))
    assert _own_url(serving(SERVER_ALLOWED_IPS="192.0.2.0/24,127.0.0.0/8"))
