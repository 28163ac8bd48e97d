"""A server's answer to one datagram, without its ledger."""

from vpn_sentinel.wire import echo, pulse


def reply(datagram: bytes, host: str, port: int, secret: bytes) -> bytes | None:
    """As the server answers whoever shows a key of its own; None for everything else."""
    if not pulse.is_request(datagram):
        return None
    key = echo.key_for(secret, pulse.ident_of(datagram))
    return pulse.reply(datagram, pulse.packed(host), port, key) if echo.is_genuine(datagram, key) else None
