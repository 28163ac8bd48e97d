"""Targets whose input is a message, a header or a file: of agents and of the server, of the owner, of the disk."""

import contextlib
from pathlib import Path

import msgspec

from bench.fuzz.target import File, Target, Try, check, scratch
from vpn_sentinel.agent.containment import proof
from vpn_sentinel.agent.geo.settings import GeoSettings
from vpn_sentinel.agent.geo.store import GeoError, read_manifest
from vpn_sentinel.agent.geo.unpack import gunzip, only_database
from vpn_sentinel.agent.geo.verify import examine
from vpn_sentinel.agent.health import Health, HealthFacts
from vpn_sentinel.agent.leakwatch.meant import parse_meant
from vpn_sentinel.agent.probes import mmdb, origin
from vpn_sentinel.agent.probes.dns import LearnedZone, nameservers
from vpn_sentinel.agent.probes.system_resolver import only_local
from vpn_sentinel.agent.remedies.plan import RemedyMemory
from vpn_sentinel.agent.settings import AgentSettings
from vpn_sentinel.agent.uplink.session import Greeted, ProtocolError, Session
from vpn_sentinel.agent.uplink.uploader import read_list
from vpn_sentinel.cli.check import _policy_file
from vpn_sentinel.cli.settings import every_setting
from vpn_sentinel.domain.observation import Observation, Trigger
from vpn_sentinel.domain.policy import IPNetwork
from vpn_sentinel.runtime import wal
from vpn_sentinel.runtime.addresses import parse_address, parse_network
from vpn_sentinel.runtime.clock import SystemClock
from vpn_sentinel.runtime.settings import SettingError, Source
from vpn_sentinel.server.access import key_from
from vpn_sentinel.server.client import client_address, headers_of
from vpn_sentinel.server.ingest.admission import Refusal
from vpn_sentinel.server.ingest.session import _check_hello, _check_reports, _known, _timed, parse
from vpn_sentinel.server.settings import ServerSettings
from vpn_sentinel.wire import codec, keepalive
from vpn_sentinel.wire.messages import PROTOCOL, Exchange, Hello, Report, Reports

NOW = 1_800_000_000.0
_HELLO = Hello(protocol=PROTOCOL, client_id="fuzz", spool="fuzz", version="0", interval=30.0, wall=NOW)


def agents_messages() -> Try:
    again = codec.decoder(Observation)

    def one(data: bytes) -> None:
        with contextlib.suppress(Refusal):
            said = parse(data)
            check(parse(codec.encode(said)) == said, "a message that does not come back")
            hello = said.hello if isinstance(said, Exchange) else said
            if isinstance(hello, Hello):
                _check_hello(hello)
            reports = said.reports if isinstance(said, Exchange) else said
            if isinstance(reports, Reports):
                _check_reports(reports)
                for report in reports.items:
                    kept = _timed(report, NOW).observation
                    check(again(codec.encode_observation(kept)) == kept, "an observation that does not come back")
        _known(data.decode("utf-8", "replace"))

    return one


def servers_messages() -> Try:
    report = Report(seq=7, age=1.0, observation=Observation(trigger=Trigger.START))

    def one(data: bytes) -> None:
        greeting = Session(_HELLO, last=7, answer_timeout_s=10.0)
        greeting.open(NOW)
        with contextlib.suppress(ProtocolError):
            if isinstance(event := greeting.receive(data), Greeted):
                LearnedZone().learn(event.canary_zone, event.echo)
                with contextlib.suppress(ProtocolError):
                    greeting.offer([report], pending=0, thinned=0, now=NOW)
                    greeting.receive(data)
        waiting = Session(_HELLO, last=7, answer_timeout_s=10.0)
        waiting.open(NOW)
        waiting.receive(b'{"type":"welcome","ack":0,"wall":1}')
        waiting.offer([report], pending=0, thinned=0, now=NOW)
        with contextlib.suppress(ProtocolError):
            waiting.receive(data)

    return one


def keepalives() -> Try:
    def one(data: bytes) -> None:
        with contextlib.suppress(msgspec.DecodeError, ValueError):
            found = keepalive.read(data, NOW)
            codec.encode_observation(found.observation)
            for name, beginning in found.odd:
                check(name.isascii() and beginning.isascii(), "what was not understood cannot be shown")

    return one


def forwarded_for() -> Try:
    """A header's value; behind a line end others, as `name: value`."""
    trusted: tuple[IPNetwork, ...] = (parse_network("10.0.0.0/8"), parse_network("fd00::/8"))

    def one(data: bytes) -> None:
        first, *others = data.split(b"\n")
        raw = [(b"x-forwarded-for", first)]
        raw += [(name.strip().lower(), value.strip()) for name, _, value in (o.partition(b":") for o in others)]
        headers = headers_of({"headers": raw})
        for remote in ("10.0.0.1", "203.0.113.9", "fd00::1%eth0"):
            found = client_address(remote, headers.get("x-forwarded-for"), trusted)
            check(found is None or parse_address(str(found)) == found, "an address that does not come back")
        key = key_from(headers)
        check(key is None or key, "an empty key")

    return one


def health_requests() -> Try:
    health = Health(lambda: HealthFacts(NOW, NOW, NOW, "protected", 0), SystemClock(), 30.0)

    def one(data: bytes) -> None:
        for names in (None, {"localhost"}):
            answer = health._response(data.decode("latin-1").split("\r\n"), names)
            status = int(answer[9:12])
            check(status < 500 or status == 503, "a fault of ours")
            check(len(answer) < 1024 and answer.count(b"\r\n\r\n") == 1, "an answer that repeats what was sent")

    return one


def resolv_conf() -> Try:
    """resolv.conf and nsswitch.conf."""
    file = File()

    def one(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        for musl in (False, True):
            check(1 <= len(nameservers(text, musl=musl)) <= 3, "more nameservers than the C library takes")
        only_local(Path(file.hold(data)))

    return one


def databases() -> Try:
    """A file in MaxMind's format."""
    file = File()
    asked = tuple(parse_address(a) for a in ("185.65.134.1", "2a03:1b20:3::1", "127.0.0.1"))

    def one(data: bytes) -> None:
        path = file.hold(data)
        with contextlib.suppress(GeoError):
            examine(Path(path), NOW, "")
        try:
            reader = mmdb.open_file(path)
        except ValueError:
            return
        for address in asked:
            with contextlib.suppress(ValueError):
                mmdb.read("fuzz", address, mmdb.get(reader, address))
        reader.close()

    return one


def archives() -> Try:
    """A tar file, packed or not, that may hold a database; or the folder's own list."""
    file, folder = File(), scratch()
    unpacked, found = folder / "unpacked", folder / "found"

    def one(data: bytes) -> None:
        path = Path(file.hold(data))
        with contextlib.suppress(GeoError):
            gunzip(path, unpacked, 1 << 16)
            check(unpacked.stat().st_size <= 1 << 16, "more than was allowed")
            path = unpacked
        with contextlib.suppress(GeoError):
            only_database(path, found, 1 << 16)
        (folder / "geo.json").write_bytes(data)
        with contextlib.suppress(GeoError):
            read_manifest(folder)
        for made in folder.iterdir():
            made.unlink()

    return one


def settings() -> Try:
    """A configuration file."""
    file = File()

    def one(data: bytes) -> None:
        for read in (ServerSettings.read, lambda s: AgentSettings.read(s, hostname="fuzz"), GeoSettings.read):
            with contextlib.suppress(SettingError):
                source = Source.load({}, {}, file.hold(data))
                read(source)
                source.unknown(every_setting())
        with contextlib.suppress(SettingError):
            _policy_file(file.path)

    return one


def declarations() -> Try:
    """What the owner declares as meant, and what the agent keeps in its spool between two starts."""

    def one(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        with contextlib.suppress(ValueError):
            parse_meant(text)
        origin._read(text)
        proof.from_text(text)
        read_list(text)
        RemedyMemory.from_text(text)

    return one


def write_ahead_logs() -> Try:
    """The log of an SQLite file; its first 136 bytes are the index beside it."""
    database = scratch() / "db"
    index, log = database.with_name("db-shm"), database.with_name("db-wal")

    def one(data: bytes) -> None:
        index.write_bytes(data[:136])
        log.write_bytes(data[136:])
        found = wal.examine(database)
        check(found is None or found.lost is None or 0 <= found.lost <= len(data), "more is lost than there was")

    return one


TARGETS = {
    "agents_messages": Target(
        modules=("server.ingest.session", "wire.codec", "wire.messages"), make=agents_messages, longest=16384
    ),
    "servers_messages": Target(modules=("agent.uplink.session", "wire.messages"), make=servers_messages),
    "keepalives": Target(modules=("wire.keepalive",), make=keepalives),
    "forwarded_for": Target(
        modules=("server.access", "server.client", "runtime.addresses"), make=forwarded_for, longest=1024
    ),
    "health_requests": Target(modules=("agent.health",), make=health_requests),
    "resolv_conf": Target(modules=("agent.probes.dns", "agent.probes.system_resolver"), make=resolv_conf, longest=8192),
    "databases": Target(modules=("agent.probes.mmdb", "agent.geo.verify"), make=databases, longest=8192),
    "archives": Target(modules=("agent.geo.unpack", "agent.geo.store"), make=archives, longest=8192),
    "settings": Target(
        modules=(
            "runtime.settings",
            "runtime.parsers",
            "server.settings",
            "server.store.address",
            "agent.settings",
            "cli.check",
        ),
        make=settings,
        longest=8192,
    ),
    "declarations": Target(
        modules=(
            "agent.leakwatch.meant",
            "agent.probes.origin",
            "agent.remedies.plan",
            "agent.containment.proof",
            "agent.uplink.uploader",
        ),
        make=declarations,
    ),
    "write_ahead_logs": Target(modules=("runtime.wal",), make=write_ahead_logs, longest=8192),
}
