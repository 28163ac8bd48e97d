"""Settings that both agent and server read, declared once."""

from pathlib import Path
from typing import Any, Final

from vpn_sentinel.domain.policy import MAX_FLAP_COUNT, Policy
from vpn_sentinel.runtime import parsers as p
from vpn_sentinel.runtime.settings import Section, Source, default_data_dir

_EVERY: Final = ("server", "agent", "check", "geo")

# --- the policy: `Policy` has a field for each, of its name in lower case ---------------------------------------------

POLICY: Final = Section(
    "Policy",
    """\
On the agent, on the server, or on both. Networks of both are combined; an agent's countries replace the server's. Of a
limit the agent's counts, unless it is the default. In every list of networks `::ffff:192.0.2.1` is `192.0.2.1`, and an
address has no zone (`%eth0`).
""",
    read_by=("server", "agent", "check"),
)
POLICY.add(
    "HOME_NETWORKS",
    p.home_networks,
    Policy.home_networks,
    "the home's public addresses and networks, such as `198.51.100.7`: traffic that comes out there is a leak",
)
POLICY.add(
    "EXPECTED_COUNTRIES",
    p.countries,
    Policy.expected_countries,
    "countries where the exit may be, ISO codes of two letters: `NL, DE`",
    default_text="any",
)
POLICY.add("ALLOWED_RESOLVERS", p.networks, Policy.allowed_resolvers, "resolvers whose use is never a leak")
POLICY.add(
    "ALLOWED_OUTSIDE",
    p.networks,
    Policy.allowed_outside,
    "addresses and networks whose traffic is meant to leave beside the tunnel (split tunnelling)",
)
POLICY.add(
    "MAX_LOSS",
    p.share,
    Policy.max_loss,
    "the share of pulses that may be lost, 0 to 1 or in percent: `0.05`, `5%`. More is `high_loss`. The agent measures "
    "a loss of 20 % or more quickly; a much smaller one is computed from 60 pulses, so chance has an influence",
)
POLICY.add(
    "MAX_RTT_MS",
    p.number(1, 1_000_000, "milliseconds"),
    Policy.max_rtt_ms,
    "milliseconds that the median round trip of the pulses may take. More is `high_latency`",
)

TIMES: Final = Section(
    "How long trouble must last",
    "A leak is notified at once. All other trouble must last without a break: see [states](states.md).\n",
    read_by=("server",),
)
TIMES.add("GRACE_DOWN", p.number(0, 3600, "seconds"), Policy.grace_down, "seconds that *down* must last")
TIMES.add("GRACE_DEGRADED", p.number(0, 3600, "seconds"), Policy.grace_degraded, "seconds that *degraded* must last")
TIMES.add(
    "GRACE_UNVERIFIED",
    p.number(0, 3600, "seconds"),
    Policy.grace_unverified,
    "seconds without anything verified, after which a tunnel is *unverified*",
)
TIMES.add("GRACE_RECOVERY", p.number(0, 3600, "seconds"), Policy.grace_recovery, "seconds that recovery must last")
TIMES.add(
    "FLAP_COUNT",
    p.integer(2, MAX_FLAP_COUNT),
    Policy.flap_count,
    "a tunnel that leaves *protected* this many times within `VPN_SENTINEL_FLAP_WINDOW` is flapping, 2 to 16",
)
TIMES.add("FLAP_WINDOW", p.number(1, 86400, "seconds"), Policy.flap_window, "seconds; see `VPN_SENTINEL_FLAP_COUNT`")
TIMES.add(
    "FLAP_CALM",
    p.number(0, 86400, "seconds"),
    Policy.flap_calm,
    "seconds that the recovery of a flapping tunnel must last",
)


def read_policy(source: Source, reader: str) -> Policy:
    """The policy from the settings that the command `reader` reads. Raises SettingError."""
    read = [setting for setting in (*POLICY.settings, *TIMES.settings) if reader in setting.read_by]
    values: dict[str, Any] = {setting.name.lower(): source.get(setting) for setting in read}
    return Policy(**values)


# --- the rest ---------------------------------------------------------------------------------------------------------

EVERYWHERE: Final = Section("Agent and server", read_by=("server", "agent"))
DATA_DIR: Final = EVERYWHERE.add(
    "DATA_DIR",
    Path,
    None,
    "the data folder: the server's SQLite database, the agent's spool of waiting reports, and the [databases of "
    "places](../how-to/geo.md)",
    default_text="`/var/lib/vpn-sentinel` for root, else `~/.local/state/vpn-sentinel`",
    read_by=_EVERY,
)
API_PATH: Final = EVERYWHERE.add(
    "API_PATH", p.path, "/api/v1", "the path before every route; the same on agent and server"
)
DEBUG: Final = EVERYWHERE.add("DEBUG", p.boolean, False, "true logs more")
LOG_FILE: Final = EVERYWHERE.add(
    "LOG_FILE",
    p.text,
    None,
    "a file for the log; a new one gets mode 0600, an existing one keeps its mode",
    default_text="standard error",
)
TZ: Final = EVERYWHERE.add(
    "TZ",
    p.text,
    None,
    "the time zone of messages, in addition to UTC; read from the environment only",
    default_text="the system's",
    read_by=_EVERY,
    verbatim=True,
    env_only=True,
)


def read_data_dir(source: Source) -> Path:
    """Raises SettingError."""
    return source.get(DATA_DIR) or Path(default_data_dir())
