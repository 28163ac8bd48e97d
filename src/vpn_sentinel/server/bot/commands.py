"""The bot's commands."""

import re
from typing import Final

# Telegram's syntax: a slash, up to 32 letters, digits and underscores, and in groups @ and the addressed bot's name.
_COMMAND: Final = re.compile(r"/([A-Za-z0-9_]{1,32})(?:@([A-Za-z0-9_]+))?(?:\s|$)", re.ASCII)

COMMANDS: Final = {
    "status": "the state of every tunnel",
    "ping": "whether the server answers",
    "help": "this list",
}
HELP: Final = "\n".join(("<b>VPN Sentinel</b>", *(f"/{name}: {does}" for name, does in COMMANDS.items())))
PONG: Final = "🏓 pong: VPN Sentinel is running."


def parse(text: str, username: str) -> str | None:
    """The command in a message, in lower case; it may be unknown.

    None when there is none, or one for another bot than `username`.
    """
    found = _COMMAND.match(text)
    if found is None:
        return None
    name, addressee = found.groups()
    if addressee is not None and addressee.lower() != username.lower():
        return None
    return name.lower()
