"""Every setting with values that cannot be used: one line that names it, before anything starts."""

import os
from pathlib import Path

import pytest

from vpn_sentinel.cli.main import main
from vpn_sentinel.cli.settings import every_setting
from vpn_sentinel.runtime.settings import UNPREFIXED

LONG = "x" * 64 + ".example"  # a label takes 63 bytes
URLS = [
    "example", "ftp://h", "http://", "http://a..b", f"https://{LONG}", "http://h:0", "http://h:x", "http://[::1",
    "https://[fe80::1%eth0]", "https://h:99999", "http://192.0.2.256", "http://2001:db8::1", "http://a b",
]  # fmt: skip
STRICT = [*URLS, "https://☃.example", "https://xn--a.example"]  # by IDNA 2008
BASES = [*URLS, "https://u:HUSH@h", "https://h/?a=b", "https://h/ä", "https://h/\x01"]
# `{}` is a folder with a file of text in it, and a pipe that nobody writes or reads.
NO_PEM = ["{}/text", "{}/two\nlines", "{}/none", "{}", "{}/pipe"]
SERVER = {
    "SERVER_HOST": ["not a host", "::1%"], "SERVER_HEALTH_HOST": ["a b"], "SERVER_API_PORT": ["0", "99999", "x"],
    "SERVER_HEALTH_PORT": ["-1"], "SERVER_DASHBOARD_PORT": ["1e3"], "API_PATH": ["/", "/a b"],
    "DASHBOARD_PUBLIC": ["perhaps"], "SERVER_WEB_DASHBOARD_ENABLED": ["perhaps"], "PORT_CHECK": ["perhaps"],
    "SERVER_DASHBOARD_ENABLED": ["perhaps"], "WEBHOOK_ALLOW_PRIVATE": ["perhaps"], "TELEGRAM_ENABLED": ["perhaps"],
    "DATABASE_URL": [
        "sqlite:///", "sqlite:///:memory:", "sqlite:////tmp/", "sqlite:////tmp/x.db?mode=ro", "mysql://h/x",
        "postgresql://h:99999/x", "postgresql://h/x?sslmode=maybe", "postgresql://h/x?what=1",
        "postgresql://h/x?ssl_min_protocol_version=9", "postgresql://h/x?sslrootcert={}/text",
        "postgresql://h/x?sslrootcert={}/pipe",
        "postgresql://h/x?sslcert={}/text&sslkey={}/text", "postgresql://h/x?sslnegotiation=maybe",
    ],
    "TLS_CERT_PATH": ["{}/none", "{}", "{}/pipe"], "TLS_KEY_PATH": ["{}/none", "{}/pipe"], "CA_FILE": NO_PEM,
    "CANARY_ZONE": ["x", "a b.example", f"{LONG}"], "CANARY_HOST": ["name"], "CANARY_PORT": ["0"],
    "CANARY_NS": ["a b.example"], "CANARY_ADDRESSES": ["name", "fe80::1%1"], "PUBLIC_URL": BASES,
    "TRACE_URL": [*BASES, *STRICT],
    "SERVER_ALLOWED_IPS": ["name", "fe80::1%1"], "TRUSTED_PROXIES": ["proxy", "10.0.0.0/33"],
    "SERVER_RATE_LIMIT_REQUESTS": ["0"],
    "CLIENT_TIMEOUT_MINUTES": ["nan"], "SERVER_ALERT_THRESHOLD_MINUTES": ["x"], "SERVER_CHECK_INTERVAL_MINUTES": ["x"],
    "MISSED_REPORTS": ["0", "1.5"], "GRACE_DOWN": ["-1"], "GRACE_DEGRADED": ["x"], "GRACE_UNVERIFIED": ["inf"],
    "GRACE_RECOVERY": ["nan"], "FLAP_CALM": ["x"],
    "FLAP_COUNT": ["1", "17"], "FLAP_WINDOW": ["0"], "MAX_LOSS": ["20", "x%"], "MAX_RTT_MS": ["0", "1s"],
    "RETENTION_DAYS": ["0"], "API_KEY": ["short", "këy-of-ours"],
    "TELEGRAM_BOT_TOKEN": ["x", "²:abc", "123:ä", "1:a b"], "TELEGRAM_CHAT_ID": ["x y", "²", "@ä"],
    "TELEGRAM_API_URL": STRICT, "WEBHOOK_URL": [*STRICT, "https://h/ä", "https://h/\x01", "http://xn--/"],
    "LOG_FILE": ["{}", "{}/none/two\nlines", "{}/none/x", "{}/pipe"],
    "DEBUG": ["perhaps"], "BACKUP_HOURS": ["-1"], "BACKUP_KEEP": ["0"],
    "BACKUP_DIR": ["{}/text", "{}/text/two\nlines", "{}/text/below", "/proc/backups", "{}/" + "x" * 300, "{}/pipe"],
}  # fmt: skip
AGENT = {
    "URL": [*BASES, "http://sentinel.example"],
    "API_KEY": ["k\u00e9y"], "CLIENT_ID": ["a b", "x" * 101, "é"],
    "ROLE": ["other"], "SITE": ["a\x01"], "ALLOW_INSECURE": ["perhaps"], "INTERVAL": ["0", "inf"],
    "PULSE_SECONDS": ["0"], "TIMEOUT": ["x"], "LEAK_WATCH": ["perhaps"], "REMEDY_DRY_RUN": ["perhaps"],
    "TUNNEL_INTERFACE": ["wg0,wg1", "wg0 wg1", "wg0,", "a/b", "é" * 8, "a:1", ".."],
    "TUNNEL_ENDPOINTS": ["vpn.example:1", "1.1.1.1"],
    "OPENVPN_MANAGEMENT": ["x", "/" + "x" * 107, "{}", "{}/text", "{}/text/below", "127.0.0.1:0", "8.8.8.8:7505"],
    "OPENVPN_MANAGEMENT_PASSWORD": ["a\x01"], "GLUETUN_URL": [*URLS, "http://u:p@127.0.0.1"],
    "GLUETUN_API_KEY": ["é"], "GLUETUN_USER": ["a:b"], "GLUETUN_PASSWORD": ["é"],
    "FORWARDED_PORT": ["x", "{}", "{}/text/below"],
    "MEANT_OUTSIDE": ["all", "port x/tcp", "user nobody-of-that-name", "interface 'a\"b'"],
    "HEALTH_HOST": ["name", "a b", "::1%1"], "HEALTH_PORT": ["0"],
    "CA_FILE": NO_PEM, "TLS_CERT_PATH": NO_PEM, "GEO_DB": ["{}/none", "{}", "{}/pipe"],
    "GEOLOCATION_SERVICE": ["other"],
    "IPINFO_URL": BASES, "IPAPI_URL": BASES, "IPWHOIS_URL": BASES, "TRACE_URL": BASES,
    "CONTAIN": ["perhaps"], "HOOK": ["relative", "'", "{}/none", "{}/text", "{}"], "HOOK_TIMEOUT": ["0"],
    "REMEDY_GLUETUN_RESTART": ["perhaps"], "REMEDY_RESUME": ["perhaps"], "REMEDY_AFTER": ["-1"], "REMEDY_CAP": ["0"],
    "QBITTORRENT_URL": BASES, "QBITTORRENT_USER": ["alone"], "TRANSMISSION_URL": BASES, "TRANSMISSION_USER": ["a:b"],
    "HOME_NETWORKS": ["home", "fe80::1%eth0", "fe80::1", "64:ff9b::/96"],
    "EXPECTED_COUNTRIES": ["Netherlands"], "ALLOWED_RESOLVERS": ["x"],
    "ALLOWED_OUTSIDE": ["x"], "MAX_LOSS": ["-1", "nan"], "MAX_RTT_MS": ["inf"],
}  # fmt: skip
GEO = {"DBIP_URL": BASES, "MAXMIND_URL": BASES, "MAXMIND_ACCOUNT": ["name"]}
# Any text is one; what cannot be done with it is said where it is done. TZ is the system's.
FREE = {
    "DATA_DIR",
    "TZ",
    "WEBHOOK_SECRET",
    "QBITTORRENT_PASSWORD",
    "TRANSMISSION_PASSWORD",
    "MAXMIND_KEY",
}
ROLES = {"server": SERVER, "agent": AGENT, "geo update": GEO}


@pytest.mark.parametrize(
    ("command", "name", "value"),
    [(c, n, v) for c, settings in ROLES.items() for n, values in settings.items() for v in values],
)
def test_a_setting_that_cannot_be_used_is_named(
    command: str, name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "text").write_text("no PEM, no program, no socket\n")
    os.mkfifo(tmp_path / "pipe")
    key = name if name in UNPREFIXED else f"VPN_SENTINEL_{name}"
    settings = {
        # Nothing is started, whatever is not refused: there is no folder to be had.
        "VPN_SENTINEL_DATA_DIR": str(tmp_path / "text" / "x"),
        "VPN_SENTINEL_API_KEY": "k" * 12,
        **({"VPN_SENTINEL_URL": "http://127.0.0.1:9"} if command == "agent" else {}),
        **({"TELEGRAM_BOT_TOKEN": "1:a", "TELEGRAM_CHAT_ID": "1"} if name.startswith("TELEGRAM") else {}),
        key: value.replace("{}", str(tmp_path)),
    }
    for there in [n for n in os.environ if n.startswith(("VPN_SENTINEL_", "TELEGRAM_"))]:
        monkeypatch.delenv(there)
    for key_, text in settings.items():
        monkeypatch.setenv(key_, text)
    assert main(command.split()) == 1
    said = capfd.readouterr().err
    assert said.startswith(f"vpn-sentinel: {key}: ")
    assert "HUSH" not in said
    assert said.count("\n") == 1


def test_no_setting_is_left_out() -> None:
    assert {name for setting in every_setting() for name in setting.names} == {
        name for settings in ROLES.values() for name in settings
    } | FREE
