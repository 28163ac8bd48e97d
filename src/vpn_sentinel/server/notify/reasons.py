"""Why a notice was not delivered, and what to do, for people. Without addresses, tokens and chat numbers."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

_NOT_TELEGRAM: Final = (
    "what answers is not Telegram: check VPN_SENTINEL_TELEGRAM_API_URL, and whether this network wants a login first"
)
_TELEGRAM: Final[Mapping[str, str]] = {
    "auth": "Telegram does not know the bot's token: check TELEGRAM_BOT_TOKEN, or have @BotFather make a new one",
    "forbidden": "the bot may not write to the chat: add it to the group again, or press Start in a private chat",
    "chat_not_found": "Telegram finds no such chat for this bot: check TELEGRAM_CHAT_ID (a group's begins with -), and "
    "write the bot a message or add it to the group first",
    "chat_moved": "the group became a supergroup with another number: set TELEGRAM_CHAT_ID to it",
    "topic_closed": "the topic in the group is closed: open it again",
    "topic_gone": "there is no such topic in the group: check the number behind the colon of TELEGRAM_CHAT_ID; without "
    "one, see that the bot may write to the group's General topic",
    "no_right_to_write": "the bot may not write in the group: give it the right to send messages",
    "refused": "Telegram refuses the message for a reason that is not known here: try the bot in this chat by hand",
    "rejected": "Telegram takes no form of this message, the shortest neither: check TELEGRAM_CHAT_ID",
    "conflict": "another program uses the bot's token, or a webhook is set on it: give each program a bot of its own",
    "rate_limited": "Telegram takes no more messages for now: it is tried again when that is over",
    "server_error": "Telegram has trouble of its own: it is tried again",
    "unexpected_status": _NOT_TELEGRAM,
    "garbage": _NOT_TELEGRAM,
    "bad_url": "the address of the Bot API is not valid: check VPN_SENTINEL_TELEGRAM_API_URL",
    "unreachable": "Telegram cannot be reached from here: check the network, DNS, and that a firewall allows port 443",
}
_WEBHOOK: Final[Mapping[str, str]] = {
    "auth": "the receiver asks for other credentials (HTTP 401, 403 or 407): check VPN_SENTINEL_WEBHOOK_URL",
    "not_found": "nothing takes notices at that address (HTTP 404, 405 or 410): check VPN_SENTINEL_WEBHOOK_URL",
    "redirect": "the receiver redirects, which is not followed: set VPN_SENTINEL_WEBHOOK_URL to where it leads",
    "private_address": "the receiver has a private address: VPN_SENTINEL_WEBHOOK_ALLOW_PRIVATE=true permits that",
    "rate_limited": "the receiver takes no more requests for now (HTTP 429): it is tried again when that is over",
    "server_error": "the receiver has trouble of its own (HTTP 5xx): it is tried again; see its log",
    "garbage": "what answers does not speak HTTP: check VPN_SENTINEL_WEBHOOK_URL, and http or https in it",
    "bad_url": "the receiver's address is not valid: check VPN_SENTINEL_WEBHOOK_URL",
    "unreachable": "the receiver cannot be reached: see that it runs, and check the host and port in "
    "VPN_SENTINEL_WEBHOOK_URL",
}
_ANY: Final[Mapping[str, str]] = {
    "timeout": "no answer in time: the other side is slow, or a firewall drops what is sent to it",
    "broken_off": "the connection was interrupted: it is tried again",
    "tls": "TLS failed: the certificate is not trusted, is out of date or for another name, or the port does not speak "
    "TLS; for a certificate of your own authority, set VPN_SENTINEL_CA_FILE",
    "unreadable": "another version of VPN Sentinel wrote the notice, and it cannot be read",
    "too_large": "the message is too large for the other side",
}

_ALL: Final[Mapping[str, str]] = {**_WEBHOOK, **_TELEGRAM, **_ANY}


def reason_text(channel: str, reason: str) -> str:
    """`reason` (see `DeliveryError`) as a sentence for people; a word that is not known here is returned as it is."""
    own = {"telegram": _TELEGRAM, "webhook": _WEBHOOK}.get(channel, {})
    if known := own.get(reason) or _ALL.get(reason):
        return known
    if reason.startswith("http_") and reason[5:].isdigit():
        number = int(reason[5:])
        phrase = f" {HTTPStatus(number).phrase}" if number in set(HTTPStatus) else ""
        return f"the receiver answers HTTP {number}{phrase}: see its log, and check VPN_SENTINEL_WEBHOOK_URL"
    if reason.startswith("bug_"):
        return f"a defect of VPN Sentinel ({reason[4:]}): please report it, with the line in the log"
    return reason
