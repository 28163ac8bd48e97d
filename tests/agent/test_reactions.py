"""Reactions as the wiring uses them: off by default, and what was done rides with the next observation."""

import asyncio
import stat
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.agent.containment.test_containment import Kept
from tests.agent.containment.test_proof import POLICY, WELL, canary
from tests.agent.doubles import FakeKernel
from tests.conftest import ManualClock
from vpn_sentinel.agent.containment.containment import Mode
from vpn_sentinel.agent.containment.surroundings import Surroundings
from vpn_sentinel.agent.introspect.settings import IntrospectSettings
from vpn_sentinel.agent.net import interfaces
from vpn_sentinel.agent.net.http import Client
from vpn_sentinel.agent.net.resolver import HostResolver
from vpn_sentinel.agent.reactions import ReactionQueue, Reactions
from vpn_sentinel.agent.remedies.settings import ReactionSettings
from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.observation import Answer, Escape, Outcome
from vpn_sentinel.domain.observation import Path as Way
from vpn_sentinel.domain.verdict import State
from vpn_sentinel.runtime.settings import SettingError, Source

LEAKING = replace(WELL, canaries=(canary(Answer.ANSWERED, Way.OUTSIDE, "91.10.10.20"),))
ESCAPE = Escape(
    interface="eth0",
    protocol="udp",
    source=ip_address("192.168.1.20"),
    destination=ip_address("198.51.100.9"),
    destination_port=4444,
)


def read(**values: str) -> ReactionSettings:
    return ReactionSettings.read(Source(env={f"VPN_SENTINEL_{k}": v for k, v in values.items()}))


def made(**values: str) -> tuple[ReactionQueue, Reactions]:
    kernel = FakeKernel()
    kept = Kept()
    around = Surroundings(
        kernel=kernel,
        tables=None,
        survey=lambda: interfaces.survey(kernel),
        endpoints=tuple,
        facts=kept,
        names=HostResolver(),
        urls=("https://sentinel.example",),
        policy=POLICY,
    )
    http = Client(names=HostResolver())
    clock = ManualClock()
    settings = read(**values)
    queue = ReactionQueue(settings.contain, around.survey, POLICY)
    return queue, Reactions(settings, queue, around, kept, http, clock, client_id="anna", control=IntrospectSettings())


async def until_told(reactions: Reactions, count: int) -> list[tuple[str, Outcome]]:
    found: list[tuple[str, Outcome]] = []
    async with asyncio.timeout(5):
        while len(found) < count:
            found += [(a.name, a.outcome) for a in reactions.add_to(WELL).actions]
            await asyncio.sleep(0.01)
    return found


def test_everything_is_off_by_default() -> None:
    settings = read()
    assert settings.contain is Mode.OFF
    assert (settings.hook, settings.gluetun_restart, settings.qbittorrent_url, settings.transmission_url) == (
        (),
        False,
        None,
        None,
    )


async def test_off_says_and_does_nothing() -> None:
    queue, reactions = made()
    async with asyncio.TaskGroup() as group:
        running = group.create_task(reactions.run())
        reactions.done(LEAKING, judge(LEAKING, POLICY))
        queue.escaped(ESCAPE)
        await asyncio.sleep(0)
        seen = reactions.add_to(WELL)
        running.cancel()
    assert (seen.contained, seen.actions) == (None, ())


async def test_an_escape_alone_is_enough_and_an_allowed_one_is_none() -> None:
    queue, reactions = made(CONTAIN="dry-run")
    async with asyncio.TaskGroup() as group:
        running = group.create_task(reactions.run())
        queue.escaped(replace(ESCAPE, destination=ip_address("198.51.100.9")))
        assert await until_told(reactions, 1) == [("contain", Outcome.DRY_RUN)]
        running.cancel()


async def test_a_command_is_run_and_its_end_rides_with_the_next_round(tmp_path: Path) -> None:
    script, out = tmp_path / "on change", tmp_path / "out"
    script.write_text(f'#!/bin/sh\ncat > "{out}"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    _queue, reactions = made(HOOK=f"'{script}' --quiet")
    verdict = judge(LEAKING, POLICY)
    assert verdict.state is State.LEAKING
    async with asyncio.TaskGroup() as group:
        running = group.create_task(reactions.run())
        reactions.done(LEAKING, verdict)
        assert await until_told(reactions, 1) == [("hook", Outcome.DONE)]
        running.cancel()
    assert '"state": "leaking"' in out.read_text()
    assert reactions.add_to(WELL).actions == (), "told once"


def test_a_command_in_quotes_as_an_env_file_hands_it_over(tmp_path: Path) -> None:
    script = tmp_path / "on change"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o700)
    assert read(HOOK='"/bin/sh -c true"').hook == ("/bin/sh", "-c", "true")
    assert read(HOOK=f'"{script}"').hook == (str(script),)
    assert read(HOOK=f"'{script}' '--loud'").hook == (str(script), "--loud")


def test_a_command_that_others_may_write_is_refused_at_the_start(tmp_path: Path) -> None:
    script = tmp_path / "on-change"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o777)
    with pytest.raises(SettingError, match=f"VPN_SENTINEL_HOOK: {script} can be written by everybody: "):
        read(HOOK=f"'{script}'")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"CONTAIN": "maybe"}, "CONTAIN"),
        ({"HOOK": "relative.sh"}, "HOOK"),
        ({"HOOK": "/bin/sh -c 'unclosed"}, "HOOK"),
        ({"HOOK_TIMEOUT": "0"}, "HOOK_TIMEOUT"),
        ({"REMEDY_CAP": "0"}, "REMEDY_CAP"),
        ({"QBITTORRENT_URL": "ftp://x"}, "QBITTORRENT_URL"),
        ({"QBITTORRENT_USER": "admin"}, "QBITTORRENT_USER"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(values: dict[str, str], named: str) -> None:
    with pytest.raises(SettingError, match=f"VPN_SENTINEL_{named}"):
        read(**values)
