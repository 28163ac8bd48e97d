"""The settings of `vpn-sentinel geo`. The agent reads few of them, and not MaxMind's key."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vpn_sentinel.agent import settings as agent
from vpn_sentinel.agent.net.urls import is_insecure
from vpn_sentinel.runtime import parsers as p
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.runtime.settings import Idle, Section, SettingError, Source, fill, key_of
from vpn_sentinel.wire.settings import read_data_dir


def _account(value: str) -> str:
    if not (value.isascii() and value.isdigit() and len(value) <= 20):
        msg = "is not an account number"  # not repeated: people mix it up with the key
        raise ValueError(msg)
    return value


UPDATES: Final = Section(
    "Offline databases of places",
    "See [offline databases](../how-to/geo.md). The agent reads none of these, so it never has MaxMind's key.\n",
    read_by=("geo",),
)
SECTIONS: Final = (*agent.SECTIONS, UPDATES)


@dataclass(frozen=True, slots=True, kw_only=True)
class GeoSettings:
    """`files` is set when the agent is configured to read other files than those of the folder."""

    folder: Path
    files: str | None
    ca_file: str | None
    dbip_url: str = UPDATES.field("DBIP_URL", p.url, "https://download.db-ip.com", "base address of DB-IP's files")
    maxmind_url: str = UPDATES.field(
        "MAXMIND_URL",
        p.url,
        "https://download.maxmind.com",
        "base address of MaxMind's files",
        idle=(Idle(needs=("MAXMIND_KEY",)),),
    )
    maxmind_account: str | None = UPDATES.field(
        "MAXMIND_ACCOUNT",
        _account,
        None,
        "MaxMind account number; with the key, `geo update` fetches GeoLite2",
        pair="MAXMIND_KEY",
    )
    maxmind_key: Secret = UPDATES.field(
        "MAXMIND_KEY",
        p.header,
        Secret(""),
        "MaxMind licence key; it is sent to that address alone, and not over plain HTTP",
        pair="MAXMIND_ACCOUNT",
    )

    @classmethod
    def read(cls, source: Source) -> "GeoSettings":
        """Raises SettingError naming the setting that cannot be used."""
        ca = source.get(agent.CA_FILE)
        settings = fill(
            cls,
            source,
            folder=read_data_dir(source) / agent.GEO_FOLDER,
            files=source.text(agent.GEO_DB),
            ca_file=None if ca is None else str(ca),
        )
        account, key, url = settings.maxmind_account, settings.maxmind_key, settings.maxmind_url
        if bool(account) != bool(key):
            missing = key_of("MAXMIND_KEY" if account else "MAXMIND_ACCOUNT")
            raise SettingError(missing, "is not set: MaxMind takes account number and licence key together")
        allow_insecure = source.get(agent.ALLOW_INSECURE)
        if key and is_insecure(url) and not allow_insecure:
            raise SettingError(key_of("MAXMIND_URL"), f"{url} would carry the key in clear; use https")
        return settings
