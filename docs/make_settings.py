"""Write the page of settings from their declarations, for `make pages`.

A setting is declared in `agent/settings.py` and the modules that it names, in `server/settings.py`, or, for both, in
`wire/settings.py`.
"""

from enum import Enum
from pathlib import Path
from typing import Any, Final

from vpn_sentinel.agent.geo import settings as geo
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.runtime.settings import Section, Setting, key_of
from vpn_sentinel.server import settings as server

PAGE: Final = Path(__file__).parent / "reference" / "settings.md"
_HEAD: Final = """\
# Settings

Written from the declarations in the code by `make pages`; a test keeps this page current.

A setting comes from a TOML file, the environment, or a flag; a later one of these wins.

- Environment: the name as on this page.
- `NAME_FILE` in the environment names a file that holds the value, for Docker secrets. It counts as the environment.
- One pair of quotes around a whole value in the environment is removed, also of keys and passwords: Docker passes on
  quotes in an env file and in a list in a compose file. Of two different pairs the inner one is kept; quotes in a file
  are kept too. A client of the replaced program sends its key with the quotes; the server accepts that as the same key.
  `VPN_SENTINEL_HOOK` and `TZ` are read without this.
- TOML: `--config FILE` or `VPN_SENTINEL_CONFIG`. The same name without its prefix, in any case: `api_key = "…"`,
  `home_networks = ["198.51.100.7"]`. Names without a prefix too: `telegram_bot_token = "…"`.
- Flags: see [the commands](cli.md).

An empty value counts as not set. An invalid value prevents the start, with one line that names the setting. The start
prints a warning for a name with our prefix that no command reads, with a similar one that exists, and for a setting
without an effect, such as `VPN_SENTINEL_TRANSMISSION_USER` without `VPN_SENTINEL_TRANSMISSION_URL`.

Lists are separated by commas; lists of addresses, networks, countries and names by spaces or line ends too. Booleans
are `true`, `false`, `1`, `0`, `yes`, `no`, `on`, `off`.

## Who reads what

The commands `server`, `agent`, `check` and `geo` read the settings that name them. `up` reads those of server and
agent, `doctor` those of agent and geo, and `db`, `token`, `tunnel` and `notify` those of the server.

A server needs no setting to start. An agent needs its server's address and a key, and should know the home's address:

```sh
VPN_SENTINEL_URL=https://sentinel.example:5000
VPN_SENTINEL_API_KEY=vs_…
VPN_SENTINEL_HOME_NETWORKS=198.51.100.7
```

## Contents

"""


def sections() -> list[Section]:
    """All of them: those of the server, those of the agent and `geo`, and those that they share."""
    shared = [part for part in server.SECTIONS if part in geo.SECTIONS]
    own = [part for part in (*server.SECTIONS, *geo.SECTIONS) if part not in shared]
    return [*own, *shared]


def render() -> str:
    """The page's text."""
    parts = sections()
    contents = "".join(f"- [{part.title}](#{_anchor(part.title)})\n" for part in parts)
    return "\n".join([_HEAD + contents, *(_section(part) for part in parts)])


def _anchor(title: str) -> str:
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c == "-")


def _section(part: Section) -> str:
    readers = {setting.read_by for setting in part.settings}
    same = readers.pop() if len(readers) == 1 else None
    lines = [f"## {part.title}", ""]
    if part.about:
        lines += [part.about]
    if same:
        lines += [f"Read by {_commands(same)}.", "", "| setting | default | value |", "|---|---|---|"]
    else:
        lines += ["| setting | default | read by | value |", "|---|---|---|---|"]
    for setting in part.settings:
        who = "" if same else f" {', '.join(setting.read_by)} |"
        lines.append(f"| `{setting.key}` | {_default(setting)} |{who} {_takes(setting)} |")
        lines += [
            f"| `{key_of(old)}` | |{who} the old name of `{setting.key}`, which wins |" for old in setting.old_names
        ]
    return "\n".join([*lines, ""])


def _commands(names: tuple[str, ...]) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def _default(setting: Setting[Any]) -> str:
    if setting.default_text:
        return setting.default_text
    match setting.default:
        case bool() as value:
            return str(value).lower()
        case int() | float() as value:
            return f"{value:g}"
        case None | "" | () | Secret():
            return "none"
        case Enum() as value:
            return f"`{value.value}`"
        case str() as value:
            return f"`{value}`"
        case value:
            msg = f"{setting.key} needs a default_text: {value!r} cannot be shown"
            raise ValueError(msg)


def _takes(setting: Setting[Any]) -> str:
    parts = [setting.takes]
    if setting.pair:
        parts.append(f"only together with `{key_of(setting.pair)}`")
    needed = [" or ".join(f"`{key_of(name)}`" for name in row.needs) for row in setting.idle if row.needs]
    if needed:
        parts.append(f"no effect without {' and '.join(needed)}")
    return "; ".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
