"""The address that an HTTPS service sees for this host: for networks that block UDP."""

import asyncio
from typing import Final

from vpn_sentinel.agent.net.http import Client, HttpError, json_in
from vpn_sentinel.agent.net.urls import address_in
from vpn_sentinel.agent.probes.datagram import RESEND_AFTER_S
from vpn_sentinel.domain.observation import Answer, Canary, Path, Probe
from vpn_sentinel.domain.policy import IPAddress, is_public
from vpn_sentinel.runtime.shortage import is_shortage

TRACE_PATH = "/cdn-cgi/trace"
TRACE_URL: Final = "https://1.1.1.1"
TRACE_URL_6: Final = "https://[2606:4700:4700::1111]"
TRACE_TIMEOUT_S = 2.5


def parse_trace(body: bytes) -> dict[str, str]:
    """The `key=value` lines of Cloudflare's trace."""
    lines = body.decode("utf-8", "replace").splitlines()
    return {key: value for key, found, value in (line.partition("=") for line in lines) if found}


async def trace(http: Client, base: str, path: Path, limit: float = TRACE_TIMEOUT_S, family: int = 4) -> Canary:
    """Ask Cloudflare's trace at a literal address of `family`; with a second connection when the first is slow.

    A connection that began while the tunnel went away has a source address and a route that no longer work.
    """
    async with asyncio.TaskGroup() as group:
        first = group.create_task(_canary(http, base + TRACE_PATH, "trace", path, limit, family))
        done, asking = await asyncio.wait({first}, timeout=RESEND_AFTER_S)
        if asking:
            again = _canary(http, base + TRACE_PATH, "trace", path, limit - RESEND_AFTER_S, family)
            asking.add(group.create_task(again))
        while asking and not any(task.result().answer is Answer.ANSWERED for task in done):
            done, asking = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        for task in asking:
            task.cancel()
    found = [task.result() for task in done]
    return next((c for c in found if c.answer is Answer.ANSWERED), found[0])


async def whoami(http: Client, server: str, path: Path, limit: float = TRACE_TIMEOUT_S) -> Canary:
    """Ask the project's own server, `GET /api/v1/whoami` → `{"ip": "…"}`."""
    return await _canary(http, server + "/api/v1/whoami", "server", path, limit)


async def _canary(http: Client, url: str, target: str, path: Path, limit: float, family: int = 4) -> Canary:
    address: IPAddress | None = None
    try:
        response = await http.get(url, limit=limit)
        # The page of a captive portal has no address, so it is not an answer.
        address = _address(target, response.body) if response.status == 200 else None
        answer = Answer.ANSWERED if address is not None else Answer.LOST
        if address is not None and not is_public(address):
            # A server on the LAN does not see the exit address; a trace with a private address is not Cloudflare's.
            address, answer = None, Answer.UNKNOWN if target == "server" else Answer.LOST
    except HttpError as e:
        answer = Answer.UNKNOWN if is_shortage(e.__cause__) else Answer.LOST
    family = address.version if address else family
    return Canary(probe=Probe.DEFAULT, target=target, family=family, answer=answer, path=path, address=address)


def _address(target: str, body: bytes) -> IPAddress | None:
    if target == "trace":
        return address_in(parse_trace(body).get("ip", ""))
    try:
        fields = json_in(body)
    except ValueError:
        return None
    text = fields.get("ip") if isinstance(fields, dict) else None
    return address_in(text) if isinstance(text, str) else None
