"""Whatever others send is read, or refused as documented. `make fuzz` looks for longer, and finds new inputs."""

import ast
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

import vpn_sentinel
from bench.fuzz.mutate import CORPUS, corpus, mutated
from bench.fuzz.run import MOST
from bench.fuzz.target import ENDS
from bench.fuzz.targets import TARGETS

SOURCE = Path(vpn_sentinel.__file__).parent
TRIED = 300
# Calls by which bytes and texts become values.
READS = {
    "Decoder", "decoder", "decompress", "decompressobj", "fromhex", "from_bytes", "frombuf", "from_toml", "iter_unpack",
    "json_in", "loads", "readline", "readuntil", "unpack", "unpack_from",
}  # fmt: skip
# Modules that call one of those, and read nothing of others with it.
KERNEL = "structures of one size, which the kernel fills"
SPOOL = "the agent's own spool"
DATABASE = "the server's own database"
CHECKED = "checked already as the message was read"
OUR_OWN = {
    "agent.containment.instance_lock": KERNEL,
    "agent.doctor.server": CHECKED,
    "agent.probes.echoes": CHECKED,
    "agent.leakwatch.bpf": "addresses that are addresses already",
    "agent.leakwatch.tap": KERNEL,
    "agent.net.packettime": KERNEL,
    "agent.remedies.remedies": SPOOL,
    "agent.uplink.batching": SPOOL,
    "server.api.present": DATABASE,
    "server.app": DATABASE,
    "server.bot.poller_lease": DATABASE,
    "server.dashboard.view": DATABASE,
    "server.notify.outbox": DATABASE,
    "server.tracking.decision": DATABASE,
    "server.tracking.enrichment": DATABASE,
    "server.tracking.sites": DATABASE,
    "wire.rest": DATABASE,
}


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    ENDS.close()


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_comes_is_read_or_refused(name: str) -> None:
    target, seeds = TARGETS[name], corpus(name)
    one = target.make()
    for data in (*seeds, *islice(mutated(seeds, random.Random(name), target.longest), TRIED)):
        try:
            one(data)
        except BaseException as e:
            e.add_note(f"{name} was given {data!r}")
            raise


def test_every_module_that_reads_has_a_target() -> None:
    covered = {module for target in TARGETS.values() for module in target.modules}
    assert covered <= set(modules())
    reading = {name for name, path in modules().items() if reads(path)}
    assert reading - covered - OUR_OWN.keys() == set()
    assert OUR_OWN.keys() - reading == set()


def test_the_corpus_is_small_and_of_targets() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*")) < len(TARGETS) * MOST


def modules() -> dict[str, Path]:
    return {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}


def reads(path: Path) -> bool:
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return any((getattr(call, "attr", None) or getattr(call, "id", None)) in READS for call in calls)
