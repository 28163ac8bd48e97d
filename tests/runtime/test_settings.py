"""Settings: the later place wins, every error names its key, and nothing mistyped passes in silence."""

import os
import threading
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from vpn_sentinel.runtime import parsers as read
from vpn_sentinel.runtime import settings
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.runtime.settings import Section, Setting, SettingError, Source
from vpn_sentinel.wire.settings import TZ


def named(
    name: str, parse: Callable[[str], Any] = read.text, default: Any = None, old_names: tuple[str, ...] = ()
) -> Setting[Any]:
    return Section("", read_by=("agent",)).add(name, parse, default, "", old_names=old_names)


def test_the_flag_wins_over_the_environment_and_that_over_the_file() -> None:
    file, env, flags = {"interval": "3"}, {"VPN_SENTINEL_INTERVAL": "2"}, {"INTERVAL": "1"}
    assert Source(env={}).raw("INTERVAL") is None
    assert Source(env={}, file=file).raw("INTERVAL") == "3"
    assert Source(env=env, file=file).raw("INTERVAL") == "2"
    assert Source(env=env, file=file, flags=flags).raw("INTERVAL") == "1"


def test_an_empty_value_counts_as_not_set() -> None:
    file = {"interval": 3}
    assert Source(env={"VPN_SENTINEL_INTERVAL": ""}, file=file, flags={"INTERVAL": ""}).raw("INTERVAL") == "3"
    assert Source(env={"VPN_SENTINEL_INTERVAL": "  "}).raw("INTERVAL") is None
    assert Source(env={}, file={"url": ""}).get(named("URL", read.url, None)) is None
    assert Source(env={}, file={"url": []}).get(named("URL", read.urls, ())) == ()


@pytest.mark.parametrize(
    ("value", "text"), [("a", "a"), (3, "3"), (2.5, "2.5"), (True, "true"), (False, "false"), (["a", 1], "a,1")]
)
def test_a_file_may_hold_what_toml_has(value: object, text: str) -> None:
    assert Source(env={}, file={"name": value}).raw("NAME") == text


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ('"true"', "true"),
        ("'true'", "true"),
        (" ' true ' ", "true"),
        ('""', None),
        ('"', '"'),
        ('"true', '"true'),
        ("\"true'", "\"true'"),
        ('"a" "b"', '"a" "b"'),
        ('"it\'s"', "it's"),
        ("'\"kept\"'", '"kept"'),
    ],
)
def test_quotes_around_a_value_of_the_environment_are_no_part_of_it(said: str, meant: str | None) -> None:
    """As an env file of Docker, or a list in a compose file, hands them over."""
    assert Source(env={"VPN_SENTINEL_IT": said}).raw("IT") == meant
    assert Source(env={"TELEGRAM_BOT_TOKEN": said}).raw("TELEGRAM_BOT_TOKEN") == meant
    # Elsewhere they were taken away already, or are meant.
    assert Source(env={}, flags={"IT": said}).raw("IT") == said
    assert Source(env={"TZ": said}).get(TZ) == said.strip()


def test_names_of_files_may_stand_in_quotes_and_what_they_hold_stays(tmp_path: Path) -> None:
    (tmp_path / "key").write_text('"hunter2"\n')
    (tmp_path / "toml").write_text("url = '\"kept\"'\n")
    env = {"VPN_SENTINEL_CONFIG": f'"{tmp_path}/toml"', "VPN_SENTINEL_API_KEY_FILE": f"'{tmp_path}/key'"}
    source = Source.load(env, {})
    assert (source.raw("URL"), source.raw("API_KEY")) == ('"kept"', '"hunter2"')


def test_a_file_may_not_hold_a_table_or_a_date() -> None:
    with pytest.raises(SettingError, match=r"^name: takes a text, a number"):
        Source(env={}, file={"name": {"a": 1}}).raw("NAME")


@pytest.mark.parametrize("value", [16**5000, [16**5000]], ids=["alone", "in a list"])
def test_a_file_may_not_hold_a_number_that_cannot_be_written(value: object) -> None:
    with pytest.raises(SettingError, match=r"^name: is too long a number"):
        Source(env={}, file={"name": value}).raw("NAME")


def test_a_secret_may_stand_in_a_file_of_its_own(tmp_path: Path) -> None:
    held = tmp_path / "key"
    held.write_text("hunter2hunter2\n")
    assert Source(env={"VPN_SENTINEL_API_KEY_FILE": str(held)}).raw("API_KEY") == "hunter2hunter2"
    assert Source(env={"TELEGRAM_BOT_TOKEN_FILE": str(held)}).raw("TELEGRAM_BOT_TOKEN") == "hunter2hunter2"
    both = {"VPN_SENTINEL_API_KEY_FILE": str(held), "VPN_SENTINEL_API_KEY": "said"}
    assert Source(env=both).raw("API_KEY") == "said"
    held.write_text("\n")
    assert Source(env={"VPN_SENTINEL_API_KEY_FILE": str(held)}).raw("API_KEY") is None


def test_a_secrets_file_that_cannot_be_read_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"^VPN_SENTINEL_API_KEY_FILE: /[^']*/none: No such file or directory$"):
        Source(env={"VPN_SENTINEL_API_KEY_FILE": str(tmp_path / "none")}).raw("API_KEY")
    held = tmp_path / "key"
    held.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingError, match=r"^VPN_SENTINEL_API_KEY_FILE: .*utf-8"):
        Source(env={"VPN_SENTINEL_API_KEY_FILE": str(held)}).raw("API_KEY")


def test_the_mark_that_some_editors_put_in_front_is_no_part_of_a_secret(tmp_path: Path) -> None:
    held = tmp_path / "key"
    held.write_bytes(b"\xef\xbb\xbfhunter2hunter2\r\n")
    assert Source(env={"VPN_SENTINEL_API_KEY_FILE": str(held)}).raw("API_KEY") == "hunter2hunter2"
    config = tmp_path / "sentinel.toml"
    config.write_bytes(b"\xef\xbb\xbfapi_key = 'hunter2hunter2'\n")
    assert Source.load({}, {}, str(config)).raw("API_KEY") == "hunter2hunter2"


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"hunter2\0hunter2", "a character that no setting takes"), (b"x" * 70_000, "more than 65536 bytes")],
)
def test_a_file_that_holds_no_setting_names_the_key(content: bytes, said: str, tmp_path: Path) -> None:
    held = tmp_path / "key"
    held.write_bytes(content)
    with pytest.raises(SettingError, match=f"^VPN_SENTINEL_API_KEY_FILE: .*{said}"):
        Source(env={"VPN_SENTINEL_API_KEY_FILE": str(held)}).raw("API_KEY")


def test_a_secret_of_two_lines_is_refused(tmp_path: Path) -> None:
    held = tmp_path / "key"
    held.write_text("hunter2\nhunter2\n")
    with pytest.raises(SettingError, match=r"^VPN_SENTINEL_X: takes one line of printable characters$"):
        Source(env={"VPN_SENTINEL_X_FILE": str(held)}).get(named("X", read.secret, None))


def test_a_pipe_is_read_and_one_that_nobody_writes_into_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    source = Source(env={"VPN_SENTINEL_API_KEY_FILE": str(pipe)})
    writing = threading.Thread(target=pipe.write_text, args=("hunter2hunter2\n",))
    writing.start()
    assert source.raw("API_KEY") == "hunter2hunter2"
    writing.join()
    monkeypatch.setattr(settings, "_PIPE_TIMEOUT_S", 0.01)
    with pytest.raises(SettingError, match=r"^VPN_SENTINEL_API_KEY_FILE: .* is a pipe that nobody writes into$"):
        source.raw("API_KEY")


def test_the_configuration_is_a_toml_file(tmp_path: Path) -> None:
    file = tmp_path / "sentinel.toml"
    file.write_text('interval = 5\nhome_networks = ["10.0.0.0/8", "fd00::/8"]\n')
    by_flag = Source.load({}, {"URL": None, "NAME": "nl"}, str(file))
    by_env = Source.load({"VPN_SENTINEL_CONFIG": str(file)}, {})
    for source in (by_flag, by_env):
        assert source.get(named("INTERVAL", read.integer(1, 9), 0)) == 5
        assert source.get(named("HOME_NETWORKS", read.networks, ())) == (
            ip_network("10.0.0.0/8"),
            ip_network("fd00::/8"),
        )
        assert source.unknown([named("INTERVAL"), named("HOME_NETWORKS")]) == []
    assert by_flag.flags == {"NAME": "nl"}
    assert Source.load({}, {}).file == {}


def test_names_in_the_file_are_taken_in_any_case(tmp_path: Path) -> None:
    file = tmp_path / "sentinel.toml"
    file.write_text('HOME_NETWORKS = ["198.51.100.7"]\nTelegram_Chat_ID = "5"\nINTERVALL = 1\ntz = "Asia/Tokyo"\n')
    source = Source.load({}, {}, str(file))
    assert (source.raw("HOME_NETWORKS"), source.raw("TELEGRAM_CHAT_ID")) == ("198.51.100.7", "5")
    known = [named("HOME_NETWORKS"), named("TELEGRAM_CHAT_ID"), TZ]
    assert source.unknown(known) == ["intervall", "tz"]


@pytest.mark.parametrize(
    "content",
    [
        b"= 1",
        b"\xff",
        None,
        b"missed_reports = 3\nMISSED_REPORTS = 4",
        b'[server]\napi_key = "0123456789abcdef"',
        b"a = " + b"[" * 3000,
        b"a = " + b"9" * 5000,
    ],
    ids=["no TOML", "no UTF-8", "missing", "a name twice", "a table", "nested too deep", "too many digits"],
)
def test_a_configuration_that_cannot_be_read_names_itself(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "sentinel.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingError, match=r"^configuration file .*sentinel\.toml: ") as refused:
        Source.load({}, {}, str(file))
    assert "\n" not in str(refused.value)


def test_names_that_nobody_declares_are_told() -> None:
    env = {
        "VPN_SENTINEL_INTERVAL": "1",
        "VPN_SENTINEL_INTERVALL": "1",
        "VPN_SENTINEL_API_KEY_FILE": "/x",
        "VPN_SENTINEL_CONFIG": "/y",
        "VPN_SENTINEL_TELEGRAM_CHAT_ID": "7",  # this one has no prefix
        "PATH": "/bin",
        "TELEGRAM_CHAT_ID": "7",
    }
    source = Source(env={**env, "VPN_SENTINEL_API_KEY": "k"}, file={"interval": 1, "intervall": 1, "server": {}})
    known = [named("INTERVAL"), named("API_KEY"), named("TELEGRAM_CHAT_ID")]
    assert source.unknown(known) == ["VPN_SENTINEL_INTERVALL", "VPN_SENTINEL_TELEGRAM_CHAT_ID", "intervall", "server"]


def test_an_old_name_is_taken_and_the_new_one_wins() -> None:
    setting = named("INTERVAL", read.integer(1, 9), 0, old_names=("PERIOD",))
    old = {"VPN_SENTINEL_PERIOD": "2"}
    assert Source(env=old).get(setting) == 2
    assert Source(env={}, file={"period": 3}).get(setting) == 3
    assert Source(env={**old, "VPN_SENTINEL_INTERVAL": "1"}).get(setting) == 1
    assert Source(env=old).unknown([setting]) == []


def test_an_old_name_that_cannot_be_used_is_named_beside_the_new_one_too() -> None:
    setting = named("INTERVAL", read.integer(1, 9), 0, old_names=("PERIOD",))
    with pytest.raises(SettingError, match=r"^VPN_SENTINEL_PERIOD: "):
        Source(env={"VPN_SENTINEL_PERIOD": "x", "VPN_SENTINEL_INTERVAL": "1"}).get(setting)


def test_the_default_stands_where_nobody_says() -> None:
    assert Source(env={}).get(named("INTERVAL", read.number(1, 9), 30.0)) == 30.0


GOOD: list[tuple[Callable[[str], Any], str, Any]] = [
    (read.text, "a b", "a b"),
    (read.boolean, "1", True),
    (read.boolean, " Yes ", True),
    (read.boolean, "ON", True),
    (read.boolean, "False", False),
    (read.boolean, "off", False),
    (read.boolean, "0", False),
    (read.boolean, "no", False),
    (read.number(0.5, 2), "0.5", 0.5),
    (read.number(0.5, 2), "2", 2.0),
    (read.share, "0.05", 0.05),
    (read.share, "5%", 0.05),
    (read.share, "5 %", 0.05),
    (read.share, "1", 1.0),
    (read.share, "0%", 0.0),
    (read.integer(1, 10), "1", 1),
    (read.integer(1, 10), " 10 ", 10),
    (read.port, "65535", 65535),
    (read.words, "a, b,,c ", ("a", "b", "c")),
    (read.words, "", ()),
    (read.url, "https://vpn.example.org:5000/", "https://vpn.example.org:5000"),
    (read.url, "http://[2a0d::1]:5000/base/", "http://[2a0d::1]:5000/base"),
    (read.urls, "http://a, https://b/", ("http://a", "https://b")),
    (read.urls, "http://a https://b/\n", ("http://a", "https://b")),
    (read.listed, "a, b\n c,,d", ("a", "b", "c", "d")),
    (read.networks, "10.0.0.1, 91.10.20.30/24", (ip_network("10.0.0.1/32"), ip_network("91.10.20.0/24"))),
    (read.networks, "2003:e0::/32", (ip_network("2003:e0::/32"),)),
    (read.networks, "::ffff:10.0.0.1, ::ffff:10.1.0.0/112", (ip_network("10.0.0.1/32"), ip_network("10.1.0.0/16"))),
    (read.home_networks, "::ffff:198.51.100.7", (ip_network("198.51.100.7/32"),)),
    (read.home_networks, "10.0.0.0/8, 2001:db8::/56", (ip_network("10.0.0.0/8"), ip_network("2001:db8::/56"))),
    (read.networks, "10.0.0.1 10.0.0.2", (ip_network("10.0.0.1/32"), ip_network("10.0.0.2/32"))),
    (read.addresses, "192.0.2.1, ::ffff:192.0.2.2", (ip_address("192.0.2.1"), ip_address("192.0.2.2"))),
    (read.listening_host, "::ffff:127.0.0.1", "127.0.0.1"),
    (read.listening_host, "sentinel.example", "sentinel.example"),
    (read.listening_host, "[::]", "::"),
    (read.addresses, "[2001:db8::1]", (ip_address("2001:db8::1"),)),
    (read.networks, "[2001:db8::1]", (ip_network("2001:db8::1/128"),)),
    (read.countries, "nl, SE,xk", ("NL", "SE", "XK")),
    (read.countries, "NL DE", ("NL", "DE")),
    (read.one_of("json", "text"), "JSON", "json"),
]


@pytest.mark.parametrize(("parse", "text", "value"), GOOD)
def test_a_value_that_is_taken(parse: Callable[[str], Any], text: str, value: Any) -> None:
    assert Source(env={"VPN_SENTINEL_IT": text}).get(named("IT", parse, value)) == value
    assert parse(text) == value


BAD: list[tuple[Callable[[str], Any], str, str]] = [
    (read.boolean, "maybe", "is not one of true, false"),
    (read.number(0.5, 2), "0.4", "is not a number from 0.5 to 2"),
    (read.number(0.5, 2, "minutes"), "2.1", "is not a number from 0.5 to 2 minutes"),
    (read.number(0.5, 2), "nan", "is not a number"),
    (read.number(0.5, 2), "inf", "is not a number"),
    (read.number(0.5, 2), "two", "is not a number"),
    (read.share, "20", "is not a share from 0 to 1, nor a percentage such as 5%"),
    (read.share, "101%", "is not a share"),
    (read.share, "%", "is not a share"),
    (read.share, "nan", "is not a share"),
    (read.integer(1, 10), "0", "is not a whole number from 1 to 10"),
    (read.integer(1, 10), "11", "is not a whole number"),
    (read.integer(1, 10), "1.0", "is not a whole number"),
    (read.integer(1, 10), "-1", "is not a whole number"),
    (read.integer(1, 10), "\u0663", "is not a whole number"),
    (read.port, "65536", "is not a whole number from 1 to 65535"),
    (read.url, "vpn.example.org", "is not an address that starts with http"),
    (read.url, "ftp://vpn.example.org", "is not an address"),
    (read.url, "http://", "names no host"),
    (read.url, "http:///path", "names no host"),
    (read.url, "http://:5000", "names no host"),
    (read.url, "http://a b", "holds a space"),
    (read.url, "https://a/x,https://b/y", "is more than one address, and one is wanted"),
    (read.url, "http://a:99999", "has a port that is no number from 1 to 65535"),
    (read.url, "http://a:port", "has a port that is no number from 1 to 65535"),
    (read.url, "http://a:0", "has a port that is no number from 1 to 65535"),
    (read.url, "http://user:HUSH@a", "takes no login"),
    (read.url, "http://u:HU/SH@a", "write / ? # @ of a password as %2F"),
    (read.url, "http://[::1", "takes an IPv6 address in brackets"),
    (read.url, "http://[::1]x:80", "takes an IPv6 address in brackets, and nothing else in them"),
    (read.url, "http://[sentinel.example]", "takes an IPv6 address in brackets, and nothing else in them"),
    (read.url, "http://2001:db8::1:5000", "takes an IPv6 address in brackets"),
    (read.url, "https://[fe80::1%eth0]", "takes no zone of an IPv6 address"),
    (read.url, "https://sentinel..example", "names a host with an empty part"),
    (read.url, "https://.example", "names a host with an empty part"),
    (read.url, "https://192.0.2.256", "names a host of four numbers that is no IPv4 address"),
    (read.url, f"https://{'x' * 64}.example", "names a host with a part of more than 63 characters"),
    (read.url, f"https://{'x.' * 130}example", "names a host of 267 characters, and takes 253"),
    (read.url, f"https://ä{'x' * 64}.example", "cannot be written in ASCII"),
    (read.url, "https://sentinel!.example", "names a host with characters that no name takes"),
    (read.url, "https://xn--/", "names a host with characters that no name takes"),
    (read.urls, "http://a,b", "address 2 of 2 is not an address that starts with"),
    (read.networks, "10.0.0.0/33", "'10.0.0.0/33' is no address or network such as 10.0.0.0/8"),
    (read.networks, "home", "'home' is no address or network such as 10.0.0.0/8"),
    (read.networks, "10.0.0.1;10.0.0.2", "'10.0.0.1;10.0.0.2' is no address or network such as"),
    (read.addresses, "proxy", "'proxy' is no address such as 192.0.2.1"),
    (read.networks, "fe80::1%eth0", "'fe80::1%eth0': an address takes no zone here"),
    (read.networks, "::ffff:198.51.100.7/24", "takes a prefix of 96 to 128"),
    (read.home_networks, "198.51.100.7, fe80::1", "fe80::1/128 is nothing that a home is seen by"),
    (read.home_networks, "64:ff9b::198.51.100.7", "is nothing that a home is seen by"),
    (read.home_networks, "::198.51.100.7", "is nothing that a home is seen by"),
    (read.home_networks, "127.0.0.1", "is nothing that a home is seen by"),
    (read.addresses, "fe80::1%eth0", "takes no zone"),
    (read.countries, "NLD", "is not a country code of two letters"),
    (read.countries, "N1", "is not a country code"),
    (read.countries, "ÄÖ", "is not a country code"),
    (read.countries, "NL, uk", "'UK' is no country in ISO 3166-1: GB is meant?"),
    (read.countries, "EU", "'EU' is no country in ISO 3166-1"),
    (read.one_of("json", "text"), "xml", "is not one of json, text"),
    (read.readable_file, "/nowhere/at/all", "No such file"),
    (read.readable_file, "/", "Is a directory"),
]


@pytest.mark.parametrize(("parse", "text", "problem"), BAD)
def test_a_value_that_is_refused_by_the_name_of_its_key(parse: Callable[[str], Any], text: str, problem: str) -> None:
    with pytest.raises(SettingError) as refused:
        Source(env={"VPN_SENTINEL_IT": text}).get(named("IT", parse, None))
    assert str(refused.value).startswith("VPN_SENTINEL_IT: ")
    assert problem in str(refused.value)
    # It does start so: what is wrong with it is something else.
    assert not text.startswith("http") or "starts with" not in str(refused.value) or "," in text
    assert str(refused.value).isprintable()
    assert refused.value.name == "VPN_SENTINEL_IT"


def test_a_key_without_the_prefix_is_named_as_it_is() -> None:
    with pytest.raises(SettingError, match=r"^TELEGRAM_CHAT_ID: "):
        Source(env={"TELEGRAM_CHAT_ID": "x"}).get(named("TELEGRAM_CHAT_ID", read.integer(1, 2), 1))


def test_an_address_with_a_password_is_not_repeated() -> None:
    with pytest.raises(SettingError) as refused:
        Source(env={"VPN_SENTINEL_URL": "http://user:hunter2@a:99999"}).get(named("URL", read.url, None))
    assert "hunter2" not in str(refused.value)


def test_a_file_that_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.touch()
    assert read.readable_file(str(file)) == file


def test_the_place_for_state_is_the_systems_or_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert settings.default_data_dir() == "/var/lib/vpn-sentinel"
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/ann")
    assert settings.default_data_dir() == "/home/ann/.local/state/vpn-sentinel"


def test_the_environment_is_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPN_SENTINEL_IT", "here")
    assert Source(env=settings.environment()).raw("IT") == "here"


def test_a_secret_setting_is_kept_as_one() -> None:
    found = Source(env={"VPN_SENTINEL_API_KEY": "hunter2"}).get(named("API_KEY", read.secret, None))
    assert found == Secret("hunter2")


def test_a_user_without_a_home_has_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """`docker run --user 12345`: neither HOME nor an entry in passwd(5)."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    monkeypatch.setattr("os.getuid", lambda: 12345)
    assert settings.default_data_dir() == settings.NO_HOME_DATA_DIR
