"""The settings of `vpn-sentinel geo`. The agent reads none of them, so MaxMind's key stays out of it."""

from dataclasses import dataclass
from pathlib import Path

from vpn_sentinel.agent.geo.store import FOLDER
from vpn_sentinel.agent.net.urls import is_insecure
from vpn_sentinel.runtime import settings as s
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.runtime.settings import SettingError, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class GeoSettings:
    """`files` is set when the agent is told to read other files than the folder's."""

    folder: Path
    files: str | None
    dbip_url: str
    maxmind_url: str
    maxmind_account: str | None
    maxmind_key: Secret
    ca_file: str | None

    @classmethod
    def read(cls, source: Source) -> "GeoSettings":
        """Raises SettingError naming the setting that cannot be used."""
        ca = source.get("CA_FILE", s.authorities, None)
        replaced_ca = source.get("TLS_CERT_PATH", s.authorities, None)
        account = source.get("MAXMIND_ACCOUNT", _account, None)
        key = source.get("MAXMIND_KEY", s.secret, Secret(""))
        maxmind_url = source.get("MAXMIND_URL", s.url, "https://download.maxmind.com")
        if bool(account) != bool(key):
            missing = "MAXMIND_KEY" if account else "MAXMIND_ACCOUNT"
            raise SettingError(s.PREFIX + missing, "is not set: MaxMind takes account number and licence key together")
        if not key.reveal().isascii() or not key.reveal().isprintable():
            raise SettingError(s.PREFIX + "MAXMIND_KEY", "takes printable ASCII characters")
        if key and is_insecure(maxmind_url) and not source.get("ALLOW_INSECURE", s.boolean, False):
            raise SettingError(s.PREFIX + "MAXMIND_URL", f"{maxmind_url} would carry the key in clear; use https")
        return cls(
            folder=source.get("DATA_DIR", Path, Path(s.default_data_dir())) / FOLDER,
            files=source.raw("GEO_DB"),
            dbip_url=source.get("DBIP_URL", s.url, "https://download.db-ip.com"),
            maxmind_url=maxmind_url,
            maxmind_account=account,
            maxmind_key=key,
            ca_file=str(ca or replaced_ca) if ca or replaced_ca else None,
        )


def _account(value: str) -> str:
    if not (value.isascii() and value.isdigit() and len(value) <= 20):
        msg = "is not an account number"  # not repeated: people mix it up with the key
        raise ValueError(msg)
    return value
