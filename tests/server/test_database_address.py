"""Addresses of a PostgreSQL as libpq documents them, and as hosters hand them out."""

import os
import shutil
import socket
import ssl
import subprocess
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import select

from tests.conftest import POSTGRES_BINARIES, Postgres, open_folder
from vpn_sentinel.runtime.settings import SettingError, Source
from vpn_sentinel.server.settings import ServerSettings
from vpn_sentinel.server.store.address import parse
from vpn_sentinel.server.store.connecting import os_error_text
from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.schema import meta
from vpn_sentinel.server.store.store import StoreUnusable

TAKEN: dict[str, dict[str, Any]] = {
    "postgresql://u:p@db.example/name?sslmode=require": {
        "hosts": (("db.example", 5432),), "user": "u", "password": "p", "database": "name",
        "tls": {"sslmode": "require"},
    },
    "postgres://u@db:6432/name": {"hosts": (("db", 6432),), "user": "u", "password": None},
    "postgresql+asyncpg://u@db/name?ssl=require": {"tls": {"sslmode": "require"}},
    "postgresql://u:p@a:1,b:2/name": {"hosts": (("a", 1), ("b", 2)), "session": "read-write"},
    "postgresql://u@a,b/name?target_session_attrs=any": {"hosts": (("a", 5432), ("b", 5432)), "session": "any"},
    "postgresql:///name?host=a,b&port=1,2": {"hosts": (("a", 1), ("b", 2)), "database": "name"},
    "postgresql:///name?host=/run/postgresql": {"hosts": (("/run/postgresql", 5432),)},
    "postgresql://%2Frun%2Fpostgresql/name": {"hosts": (("/run/postgresql", 5432),)},
    "postgresql://u@[2001:db8::5]:6000/name": {"hosts": (("2001:db8::5", 6000),)},
    "postgresql://[2001:db8::5]/name": {"hosts": (("2001:db8::5", 5432),)},
    "postgresql://u:p%40ss%2F%3A%23+%25@db/name": {"password": "p@ss/:#+%"},
    "postgresql://u:p%zz%40100%@db/name": {"password": "p%zz@100%"},  # taken at its word, for it can mean nothing else
    "postgresql://u:p@ss@db/name": {"password": "p@ss", "hosts": (("db", 5432),)},
    "postgresql://db/n?sslmode=require&": {"tls": {"sslmode": "require"}},
    "postgresql://db/n?hostaddr=192.0.2.1&sslmode=verify-ca": {"hosts": (("192.0.2.1", 5432),)},
    "postgresql://a:1,b:2/n?hostaddr=192.0.2.1,2001:db8::1": {"hosts": (("192.0.2.1", 1), ("2001:db8::1", 2))},
    "postgresql:///n?hostaddr=192.0.2.1,192.0.2.2&port=6": {"hosts": (("192.0.2.1", 6), ("192.0.2.2", 6))},
    "postgresql:///n?hostaddr=192.0.2.1&sslmode=verify-full": {"hosts": (("192.0.2.1", 5432),)},
    "postgresql://": {"hosts": (), "user": None, "database": None},
    "postgresql://db": {"hosts": (("db", 5432),), "database": None},
    "postgresql:///?dbname=n&user=u&password=p%20q": {"database": "n", "user": "u", "password": "p q"},
    "postgresql://db/n?connect_timeout=10&application_name=vpn": {
        "timeout": 10.0, "settings": {"application_name": "vpn"},
    },
    "postgresql://db/n?connect_timeout=0": {"timeout": 5.0},
    "postgresql://db/n?options=&port=&application_name=&sslmode=": {
        "hosts": (("db", 5432),), "settings": {"application_name": "vpn-sentinel"}, "tls": {},
    },
    "postgresql://db/n?options=-csearch_path%3Dvpn%2Cpublic": {
        "settings": {"options": "-csearch_path=vpn,public", "application_name": "vpn-sentinel"},
    },
    "postgresql://db/n?sslmode=require&channel_binding=require": {"unsupported": ("channel_binding=require",)},
    "postgresql://db/n?sslmode=disable&keepalives_idle=30&gssencmode=disable&pgbouncer=true": {
        "tls": {"sslmode": "disable"},
    },
    "postgresql://db/n?sslmode=verify-full&sslrootcert=system": {
        "tls": {"sslmode": "verify-full", "sslrootcert": "system"},
    },
}  # fmt: skip


@pytest.mark.parametrize(("url", "found"), TAKEN.items(), ids=TAKEN.keys())
def test_libpqs_forms_are_read(url: str, found: dict[str, Any]) -> None:
    address = parse(url)
    assert {name: getattr(address, name) for name in found} == found
    assert "p@ss" not in repr(address)


REFUSED = {
    "mysql://u:HUSH@db/n": "takes sqlite",
    "postgresql://u:HUSH@db/n?sslmode=on": "sslmode in the address is not one of disable,",
    "postgresql://u:HUSH@db/n?sslrootcert=/nowhere.pem": "sslrootcert in the address: /nowhere.pem: No such file",
    "postgresql://u:HUSH@db/n?target_session_attrs=best": "target_session_attrs in the address is not one of any,",
    "postgresql://u:HUSH@db/n?connect_timeout=soon": "connect_timeout in the address is no whole number",
    "postgresql://u:HUSH@db/n?service=prod": "the parameter 'service' of the address is not supported here",
    "postgresql://u:HUSH@db/n?flag": "takes NAME=VALUE",
    "postgresql://u:HUSH#x@db/n": "write a space as %20 and # as %23",
    "postgresql://u:HU/SH@db/n": "a port in the address is no number",
    "postgresql://u:HUSH@db:70000/n": "a port in the address is no number",
    "postgresql://u:HUSH@sentinel..example/n": "names a host with an empty part",
    "postgresql://u:HUSH@192.0.2.256/n": "names a host of four numbers that is no IPv4 address",
    "postgresql://u:HUSH@a,b%20c/n": "names a host with characters that no name takes",
    "postgresql://u:HUSH@a,,b/n": "a host in the address is empty",
    "postgresql://u:HUSH@a,b/n?port=1,2,3": "2 hosts and 3 ports",
    "postgresql://u:HUSH@[2001:db8::5/n": "takes brackets",
    "postgresql://u:%ff%fe@db/n": "not UTF-8",
    "postgresql://u:HUSH%00@db/n": "the password in the address holds %00",
    "postgresql://db/n?user=HUSH%00": "user in the address holds %00",
    "postgresql://u:HUSH@a,b/n?hostaddr=192.0.2.1": "2 hosts and 1 of hostaddr",
    "postgresql://u:HUSH@db/n?hostaddr=192.0.2.1&sslmode=verify-full": "hostaddr in the address is what a certificate",
    "postgresql://u:HUSH@db/n?hostaddr=192.0.2.1&sslrootcert=system": "leave it out, or use verify-ca",
}


@pytest.mark.parametrize(("url", "problem"), REFUSED.items(), ids=REFUSED.keys())
def test_what_cannot_be_used_is_one_line_at_the_start_without_the_password(url: str, problem: str) -> None:
    with pytest.raises(SettingError) as caught:
        ServerSettings.read(Source(env={"VPN_SENTINEL_DATABASE_URL": url}))
    said = str(caught.value)
    assert said.startswith("VPN_SENTINEL_DATABASE_URL: ")
    assert problem in said
    assert "\n" not in said
    assert not any(part in said for part in ("HUSH", "HU/SH", "SH@"))


# -- a real server


def parts_of(url: str) -> tuple[str, str]:
    name, _, folder = url.partition("@/")[2].partition("?host=")
    return name, folder


async def works(url: str) -> bool:
    store = await open_store(url)
    try:
        await store.ping()
        return await store.read(select(meta.c.value).where(meta.c.key == "ping")) != []
    finally:
        await store.close()


async def test_a_socket_by_every_spelling(postgres: Postgres) -> None:
    name, folder = parts_of(postgres.new_database())
    quoted = folder.replace("/", "%2F")
    for url in (
        f"postgresql:///{name}?host={folder}&user=sentinel",
        f"postgres://sentinel@{quoted}/{name}",
        f"postgresql+asyncpg://sentinel:unused@/{name}?host={folder}&connect_timeout=3&application_name=x",
        f"postgresql://sentinel@{quoted}:5432,localhost:1/{name}?sslmode=disable",
        f"postgresql://sentinel@localhost:1,{quoted}/{name}?target_session_attrs=primary",
        f"postgresql:///{name}?host={folder}&user=sentinel&options=-csearch_path%3Dpublic&target_session_attrs=read-write",
    ):
        assert await works(url), url


async def test_where_tables_are_is_the_owners(postgres: Postgres) -> None:
    name, folder = parts_of(postgres.new_database())
    plain = await asyncpg.connect(host=folder, user="sentinel", database=name)
    await plain.execute("CREATE SCHEMA vpn")
    assert await works(f"postgresql:///{name}?host={folder}&user=sentinel&options=-csearch_path%3Dvpn")
    assert await plain.fetchval("SELECT count(*) FROM vpn.meta") == 1
    await plain.close()


async def test_a_standby_that_is_asked_for_and_not_there_is_one_line(postgres: Postgres) -> None:
    name, folder = parts_of(postgres.new_database())
    with pytest.raises(StoreUnusable) as caught:
        await open_store(f"postgresql:///{name}?host={folder}&user=sentinel&target_session_attrs=standby")
    assert str(caught.value) == f"database at {folder}: no host meets target_session_attrs=standby"


async def test_a_database_that_cannot_hold_every_name_is_refused_at_the_start(postgres: Postgres) -> None:
    url = postgres.new_database("-E", "LATIN1", "--locale=C", "-T", "template0")
    with pytest.raises(StoreUnusable, match=r"^database at /[^ ]*: its encoding is LATIN1, .* ENCODING 'UTF8'$"):
        await open_store(url)
    assert await works(postgres.new_database("-E", "SQL_ASCII", "--locale=C", "-T", "template0"))


async def test_a_host_that_does_not_answer_leaves_time_for_the_next(postgres: Postgres) -> None:
    name, folder = parts_of(postgres.new_database())
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes the connection, and says nothing
        first = f"127.0.0.1:{deaf.getsockname()[1]}"
        assert await works(f"postgresql://sentinel@{first},{folder.replace('/', '%2F')}/{name}?connect_timeout=2")


@pytest.fixture(scope="module")
def hosted() -> Iterator[tuple[str, Path]]:
    """As a hoster has it: TLS and a password, on `localhost`. The address without its parameters; the certificate."""
    if not POSTGRES_BINARIES:
        pytest.skip("PostgreSQL is not installed: `make test` as root installs it")
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: `make test` as root installs it")
    folder = open_folder("vs-pgs-")
    cluster = Postgres(folder, POSTGRES_BINARIES[0])
    cluster.start()
    name = parts_of(cluster.new_database())[0]
    data, psql = folder / "data", ["psql", "-h", str(folder), "-U", "sentinel", "-d", "postgres", "-c"]
    key, cert, copied = data / "server.key", data / "server.crt", folder / "ca.pem"
    try:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
             "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert],
            check=True, capture_output=True,
        )  # fmt: skip
        key.chmod(0o600)
        shutil.copy(cert, copied)
        if os.geteuid() == 0:
            shutil.chown(key, "postgres")
            shutil.chown(cert, "postgres")
        (data / "pg_hba.conf").write_text("local all all trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n")
        role = "CREATE ROLE hosted SUPERUSER LOGIN PASSWORD 'p@ss/#%'"
        subprocess.run([*psql, role], check=True, capture_output=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        cluster.stop()
        options = f"-k {folder} -c listen_addresses=127.0.0.1 -c port={port} -c ssl=on -c fsync=off"
        cluster._run("pg_ctl", "-D", str(data), "-w", "-o", options, "-l", str(folder / "log"), "start")
        yield f"postgresql://hosted:p%40ss%2F%23%25@localhost:{port}/{name}", copied
        cluster.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("mode", ["require", "prefer", "verify-ca&sslrootcert={ca}", "verify-full&sslrootcert={ca}"])
async def test_a_hosters_address(hosted: tuple[str, Path], mode: str) -> None:
    url, ca = hosted
    assert await works(f"{url}?sslmode={mode.format(ca=ca)}")


async def test_a_password_from_a_file(hosted: tuple[str, Path], tmp_path: Path) -> None:
    passfile = tmp_path / "pgpass"
    passfile.write_text("localhost:*:*:hosted:p@ss/#%\n")
    passfile.chmod(0o600)
    url = hosted[0].replace(":p%40ss%2F%23%25@", "@")
    assert await works(f"{url}?sslmode=require&passfile={passfile}")


def test_a_failure_of_tls_is_no_errno() -> None:
    failed = ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)")
    failed.reason = "WRONG_VERSION_NUMBER"
    assert os_error_text(failed) == "TLS failed: WRONG_VERSION_NUMBER"
    assert os_error_text(socket.gaierror(socket.EAI_NONAME, "Name or service not known")) == "Name or service not known"
    assert os_error_text(ConnectionRefusedError(111, "Connect call failed ('192.0.2.1', 5432)")) == "Connection refused"


WRONG = {
    "no TLS": ("?sslmode=disable", "no pg_hba.conf entry"),
    "another's certificate": ("?sslmode=verify-full&sslrootcert=system", "certificate is not accepted: self-signed"),
    "another name's": ("?sslmode=verify-full&sslrootcert={ca}&host=127.0.0.1&port={port}", "IP address mismatch"),
    "a wrong password": ("?sslmode=require&password=HUSH", "password authentication failed"),
    "a database that is not there": ("?sslmode=require&dbname=elsewhere", "does not exist"),
}


@pytest.mark.parametrize(("query", "why"), WRONG.values(), ids=WRONG.keys())
async def test_what_the_server_refuses_is_one_line(hosted: tuple[str, Path], query: str, why: str) -> None:
    port = hosted[0].rpartition(":")[2].partition("/")[0]
    with pytest.raises(StoreUnusable, match=why) as caught:
        await open_store(hosted[0] + query.format(ca=hosted[1], port=port))
    said = "".join(traceback.format_exception(caught.value))
    assert str(caught.value).startswith(("database at localhost: ", "database at 127.0.0.1: "))
    assert "\n" not in str(caught.value)
    assert "HUSH" not in said
    assert "p@ss" not in said
