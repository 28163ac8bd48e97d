"""`vpn-sentinel notify test CHANNEL`."""

import argparse
import asyncio
import sys
from typing import TYPE_CHECKING, Any, Final

from vpn_sentinel.cli.settings import add_config, server_settings
from vpn_sentinel.domain.notice import Kind, Notice
from vpn_sentinel.runtime.clock import SystemClock

if TYPE_CHECKING:
    from vpn_sentinel.server.settings import ServerSettings

# Channel -> why it may be missing.
CHANNELS: Final = {
    "telegram": "is not set up, or turned off: set TELEGRAM_BOT_TOKEN and TELEGRAM_CHAT_ID",
    "webhook": "is not set up: set VPN_SENTINEL_WEBHOOK_URL",
}


def add(commands: Any) -> None:
    parser = commands.add_parser("notify", help="send a test message")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    test = verbs.add_parser("test", help="send one message now, not by the outbox, and print the result")
    test.add_argument("channel", metavar="CHANNEL", choices=tuple(CHANNELS), help=" or ".join(CHANNELS))
    add_config(test)
    test.set_defaults(func=_test)


def _test(args: argparse.Namespace) -> int:
    return asyncio.run(_send(server_settings(args), args.channel))


async def _send(settings: "ServerSettings", name: str) -> int:
    import httpx

    from vpn_sentinel.server.notify.channel import DeliveryError, TransientError
    from vpn_sentinel.server.notify.channels import build_channels
    from vpn_sentinel.server.notify.guard import tls
    from vpn_sentinel.server.notify.reasons import reason_text

    clock = SystemClock()
    async with httpx.AsyncClient(verify=tls(settings.ca_file), timeout=15.0, trust_env=False) as http:
        channels = build_channels(settings, http, clock=clock)
        if name not in channels:
            print(f"vpn-sentinel: {name} {CHANNELS[name]}", file=sys.stderr)
            return 1
        try:
            await channels[name].send(Notice(kind=Kind.TEST, at=clock.wall()), 0)
        except DeliveryError as e:
            asked = e.retry_after if isinstance(e, TransientError) else None
            wait = f"; it asks to wait {asked:.0f} s" if asked else ""
            print(f"vpn-sentinel: {name}: {reason_text(name, e.reason)}{wait}", file=sys.stderr)
            return 1
    print(f"{name}: sent")
    return 0
