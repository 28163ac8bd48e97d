"""What people can say to the bot."""

import re
from typing import Final

# Telegram's form: a slash, up to 32 letters, digits and underscores, and in groups the name of the bot that is meant.
_COMMAND: Final = re.compile(r"/([A-Za-z0-9_]{1,32})(?:@([A-Za-z0-9_]+))?(?:\s|$)", re.ASCII)

COMMANDS: Final = {
    "status": "how every tunnel stands",
    "ping": "whether the server answers",
    "help": "this list",
}
HELP: Final = "\n".join(("<b>VPN Sentinel</b>", *(f"/{name}: {does}" for name, does in COMMANDS.items())))
PONG: Final = "🏓 pong: VPN Sentinel is running."


def parse(text: str, username: str) -> str | None:
    """The command in a message, in lower case; it may be one that does not exist.

    None when there is none, or one that is meant for another bot than `username`.
    """
    found = _COMMAND.match(text)
    if found is None:
        return None
    name, addressee = found.groups()
    if addressee is not None and addressee.lower() != username.lower():
        return None
    return name.lower()
