import argparse
import asyncio
import json
import os
import subprocess
import sys
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path as FilePath

import pytest

from tests.agent.doubles import ETH, http, reply
from vpn_sentinel.agent.net.interfaces import Survey
from vpn_sentinel.agent.once import CheckResult, check_once
from vpn_sentinel.agent.settings import ProbeSettings
from vpn_sentinel.cli import check
from vpn_sentinel.cli.main import main
from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.observation import (
    Answer,
    Canary,
    Link,
    Observation,
    Path,
    Place,
    Probe,
    ResolverSighting,
    Routed,
    Trigger,
)
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import State
from vpn_sentinel.runtime.clock import SystemClock
from vpn_sentinel.runtime.parsers import networks
from vpn_sentinel.runtime.settings import SettingError, Source

EXIT, HOME, EGRESS = (ip_address(a) for a in ("203.0.113.4", "198.51.100.7", "203.0.113.53"))
SEEN = Observation(
    trigger=Trigger.START,
    link=Link(name="wg0", present=True, up=True, rx_bytes=5, tx_bytes=6),
    interfaces=("eth0", "wg0"),
    canaries=(
        Canary(
            probe=Probe.DEFAULT, target="cloudflare", family=4, answer=Answer.ANSWERED, path=Path.TUNNEL, address=EXIT
        ),
        Canary(probe=Probe.PHYSICAL, target="cloudflare", family=4, answer=Answer.BLOCKED, path=Path.OUTSIDE),
    ),
    resolvers=(
        ResolverSighting(method="google", nameserver=ip_address("10.0.0.1"), answer=Answer.ANSWERED, egress=EGRESS),
    ),
    places=(
        Place(ip=EXIT, source="a", country="DE", city="Berlin"),
        Place(ip=EXIT, source="b", country="NL", city="Amsterdam", asn=64500, org="Example \x1b[31m"),
        Place(ip=EXIT, source="c", country="NL", region="North Holland", timezone="Europe/Amsterdam"),
        Place(ip=EGRESS, source="b", country="NL", org="Resolver Ltd"),
    ),
    took_ms=321.4,
)
SURVEY = Survey(interfaces=(ETH,), tunnel="wg0", uplinks=(ETH,), beside=(ETH,))


def looked(seen: Observation, policy: Policy | None = None, survey: Survey = SURVEY) -> CheckResult:
    return CheckResult(seen, judge(seen, policy or Policy()), survey)


def test_the_object_has_the_promised_shape() -> None:
    said = check.as_json(SEEN, judge(SEEN, Policy()))
    assert list(said) == [
        "state", "findings", "exit", "resolvers", "tunnel", "uplinks", "routes", "system_lookup", "leak_watch",
            "escapes", "took_ms",
    ]  # fmt: skip
    assert said["state"] == "protected"
    assert said["exit"] == {
        "ipv4": "203.0.113.4", "ipv6": None, "country": "NL", "city": "Amsterdam", "region": "North Holland",
        "asn": 64500,
        "org": "Example \x1b[31m", "timezone": "Europe/Amsterdam",
    }  # fmt: skip
    assert said["resolvers"] == [{"ip": "203.0.113.53", "country": "NL", "org": "Resolver Ltd"}]
    assert said["tunnel"] == {
        "interface": "wg0", "present": True, "up": True, "received_bytes": 5, "sent_bytes": 6,
    }  # fmt: skip
    assert (said["leak_watch"], said["escapes"]) == (None, [])
    assert said["took_ms"] == 321


def test_routes_and_ways_out_are_told() -> None:
    part = Routed(interface="eth0", family=4, share=0.43, networks=(ip_network("128.0.0.0/1"),))
    seen = replace(SEEN, uplinks=("eth0", "eth1"), routed=(Routed(interface="wg0", family=4, share=0.57), part))
    said = check.as_json(seen, judge(seen, Policy()))
    assert said["uplinks"] == ["eth0", "eth1"]
    assert said["routes"][1] == {
        "interface": "eth0", "family": 4, "share": 0.43, "networks": ["128.0.0.0/1"], "more": 0, "traffic": "",
    }  # fmt: skip
    assert ("routes", "eth0: 43 % of IPv4, past the tunnel (128.0.0.0/1)") in check._facts(seen)
    whole = replace(part, share=1.0, networks=(ip_network("0.0.0.0/0"),))
    balanced = replace(seen, routed=(Routed(interface="wg0", family=4, share=1.0), whole))
    assert [words for label, words in check._facts(balanced) if label == "routes"] == [
        "wg0: some connections of IPv4", "eth0: some connections of IPv4, past the tunnel (0.0.0.0/0)",
    ]  # fmt: skip
    assert ("beside it", "eth0, eth1") in check._facts(seen)


def test_nothing_known_is_none_and_never_a_guess() -> None:
    bare = Observation(trigger=Trigger.START)
    said = check.as_json(bare, judge(bare, Policy()))
    assert set(said["exit"].values()) == {None}
    assert said["tunnel"]["interface"] is None
    assert json.dumps(said)


def test_findings_carry_their_evidence() -> None:
    said = check.as_json(SEEN, judge(SEEN, Policy(home_networks=(networks("203.0.113.4")[0],))))
    assert said["state"] == "leaking"
    (finding, *_) = said["findings"]
    assert (finding["code"], finding["severity"]) == ("ip_leak", "critical")
    assert finding["evidence"]["address"] == "203.0.113.4"


def test_every_state_has_its_exit_status() -> None:
    assert check.STATUS == {
        State.PROTECTED: 0, State.DEGRADED: 1, State.LEAKING: 2, State.DOWN: 3, State.UNKNOWN: 4,
    }  # fmt: skip


def test_people_see_state_exit_and_advice(capsys: pytest.CaptureFixture[str]) -> None:
    policy = Policy(home_networks=networks("203.0.113.4"))
    check.show(looked(SEEN, policy))
    out = capsys.readouterr().out
    for expected in ("LEAKING", "203.0.113.4", "Amsterdam", "AS64500", "wg0, up", "Resolver Ltd", "ip_leak", "→ Stop"):
        assert expected in out


def test_the_terminal_obeys_nobody_else(capsys: pytest.CaptureFixture[str]) -> None:
    check.show(looked(SEEN))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "Example \\x1b[31m" in out


ALONE = replace(SEEN, link=None)
SILENT = replace(ALONE, canaries=(replace(SEEN.canaries[0], address=None),))
MISSING = {
    "no home network": (ALONE, "", "no home network is declared: set VPN_SENTINEL_HOME_NETWORKS"),
    "none of the exit's family": (
        ALONE,
        "2001:db8::/32",
        "None of the home networks (2001:db8::/32) can be compared",
    ),
    "no exit": (SILENT, "198.51.100.7", "No answer showed from which address traffic leaves"),
}


@pytest.mark.parametrize(("seen", "home", "advice"), MISSING.values(), ids=MISSING.keys())
def test_what_is_missing_to_judge_the_exit_is_said(
    seen: Observation, home: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = Policy(home_networks=networks(home))
    check.show(looked(seen, policy))
    out = capsys.readouterr().out
    assert "tunnel_unknown" in out
    assert advice in out
    assert ("no home network is declared" in out) == (not home)


UNSEEN = {
    "all was looked at": (looked(SEEN), []),
    "no netlink": (looked(replace(SEEN, interfaces=None)), ["Interfaces"]),
    "no other interface": (looked(SEEN, survey=Survey(tunnel="wg0")), ["The kill switch: no other"]),
    "not permitted": (
        looked(replace(SEEN, canaries=(SEEN.canaries[0], replace(SEEN.canaries[1], answer=Answer.UNKNOWN)))),
        ["The kill switch: nothing could be asked by eth0"],
    ),
    "no nameservers": (looked(replace(SEEN, resolvers=())), ["Nameservers: /etc/resolv.conf"]),
    "nameservers after a leak": (
        looked(replace(SEEN, resolvers=()), Policy(home_networks=networks("203.0.113.4"))),
        ["Nameservers: not asked"],
    ),
    "no place": (looked(replace(SEEN, places=())), ["The place of 203.0.113.4"]),
}


@pytest.mark.parametrize(("found", "lines"), UNSEEN.values(), ids=UNSEEN.keys())
def test_what_was_not_looked_at_is_said(found: CheckResult, lines: list[str]) -> None:
    said = check.unseen(found)
    assert len(said) == len(lines)
    assert all(text.startswith(start) for text, start in zip(said, lines, strict=True))


def arguments(**more: object) -> argparse.Namespace:
    return argparse.Namespace(**{"policy": None, "home": None, "country": None, **more})


def test_file_flags_and_settings_add_up(tmp_path: FilePath) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(
        'home_networks = ["198.51.100.0/24"]\nexpected_countries = "nl"\nallowed_resolvers = ["10.0.0.1"]\n'
    )
    base = Policy(home_networks=networks("192.0.2.1"))
    policy = check._policy(base, arguments(policy=str(file), home=["2001:db8::1"], country=["de", "nl"]))
    assert [str(n) for n in policy.home_networks] == ["192.0.2.1/32", "198.51.100.0/24", "2001:db8::1/128"]
    assert policy.expected_countries == ("NL", "DE")
    assert policy.allows_resolver(ip_address("10.0.0.1"))


FILES = {
    "not TOML": "home_networks = [",
    "an unknown name": 'home_network = "x"',
    "no texts": "home_networks = [1]",
    "no network": 'home_networks = "home"',
    "no country": 'expected_countries = "Netherlands"',
}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES.keys())
def test_a_policy_that_cannot_be_used_is_wrong_usage(
    text: str, tmp_path: FilePath, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.toml").write_text(text)
    assert main(["check", "--policy", str(tmp_path / "p.toml")]) == 64
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [["--home", "x"], ["--country", "x"], ["--server", "x"], ["--policy", "/nonexistent"], ["--interface", "a/b"]],
)
def test_wrong_usage_is_one_line_and_64(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *words]) == 64
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)


def probes(**values: str) -> ProbeSettings:
    return ProbeSettings.read(Source({f"VPN_SENTINEL_{k}": v for k, v in values.items()}))


async def test_a_server_that_is_named_is_asked() -> None:
    def answer(request: str) -> bytes:
        return reply('{"ip":"198.51.100.7"}') if "/api/v1/whoami" in request else reply("", 429)

    async with http(answer) as (port, _):
        base = f"http://127.0.0.1:{port}"
        settings = probes(TRACE_URL=base, IPINFO_URL=base, IPAPI_URL=base, IPWHOIS_URL=base)
        found = await check_once(settings, Policy(home_networks=networks("198.51.100.7")), SystemClock(), server=base)
    assert found.verdict.state is State.LEAKING
    assert ("server", HOME) in [(c.target, c.address) for c in found.seen.canaries]


async def test_a_ca_file_without_certificates_is_named(tmp_path: FilePath) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    with pytest.raises(SettingError, match="VPN_SENTINEL_CA_FILE"):
        await check_once(probes(CA_FILE=str(tmp_path / "ca.pem")), Policy(), SystemClock())


async def test_a_database_that_is_none_is_named(tmp_path: FilePath) -> None:
    (tmp_path / "x.mmdb").write_text("nothing")
    with pytest.raises(SettingError, match="VPN_SENTINEL_GEO_DB"):
        await check_once(probes(GEO_DB=str(tmp_path / "x.mmdb")), Policy(), SystemClock())


async def test_without_any_network_it_says_unknown_and_why() -> None:
    command = ["unshare", "--user", "--net", "--map-root-user", sys.executable, "-m", "vpn_sentinel", "check", "--json"]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    async with asyncio.timeout(10):
        out, err = await process.communicate()
    assert process.returncode == 4, err
    said = json.loads(out)
    assert out.count(b"\n") == 1
    assert (said["state"], [f["code"] for f in said["findings"]]) == ("unknown", ["no_network"])


def test_what_is_wrong_beside_the_round_is_said_apart_from_its_object(tmp_path: FilePath) -> None:
    (tmp_path / "file").touch()
    command = ["unshare", "--user", "--net", "--map-root-user", sys.executable, "-m", "vpn_sentinel", "check", "--json"]
    env = {
        "PATH": os.environ["PATH"],
        "VPN_SENTINEL_DATA_DIR": str(tmp_path / "file"),
        "VPN_SENTINEL_HOME_NETWORK": "1.2.3.4",
    }
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=20, check=False)
    assert json.loads(done.stdout)["state"] == "unknown"
    misspelt, unusable = done.stderr.splitlines()
    assert misspelt == "vpn-sentinel: VPN_SENTINEL_HOME_NETWORK: no such setting; is VPN_SENTINEL_HOME_NETWORKS meant?"
    assert "a database of places cannot be used" in unusable
    assert f"{tmp_path}/file/geo/geo.json: Not a directory" in unusable
