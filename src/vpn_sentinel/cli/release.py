"""`vpn-sentinel release`: remove an agent's containment from this network namespace."""

import argparse
import asyncio
from typing import Any

from vpn_sentinel.cli.process import report
from vpn_sentinel.runtime.user_error import UserError


def add(commands: Any) -> None:
    parser = commands.add_parser("release", help="open what containment closed in this network namespace")
    parser.set_defaults(func=run)


def run(_: argparse.Namespace) -> int:
    """Raises UserError when the rules cannot be seen or removed."""
    from vpn_sentinel.agent.containment.containment import failure_reason
    from vpn_sentinel.agent.containment.instance_lock import SingleInstanceLock
    from vpn_sentinel.agent.containment.nft import Nftables
    from vpn_sentinel.agent.containment.rules import TABLE, removal
    from vpn_sentinel.agent.containment.table import owner_of

    lock = SingleInstanceLock()
    try:
        owner = owner_of(TABLE)
        if owner is None:
            report("Nothing is closed here.")
            return 0
        # Without a running agent no marker is needed: the next start finds no rules.
        alone = lock.take() and lock.bound
        asyncio.run(Nftables()(removal(released_owner=None if alone else owner)))
    except OSError as e:
        raise UserError(f"the containment could not be removed: {failure_reason(e)}") from e
    finally:
        lock.leave()
    name = owner.rpartition("/")[0] or "an agent without a name"
    after = "No agent runs here." if alone else "The agent that runs here closes again only on a new leak."
    report(f"Open: the rules of {name} are removed. {after}")
    return 0
